"""Questions about scenes of coloured shapes, with the box of what is asked about.

    what color is the square ? red          where is the ring ? row 2 column 4
    what shape is the red thing ? square    is there a red square ? yes
    describe the image . a red square , a green ring .

Spans: `image`, `question`, `thing` (the image tokens that touch the box of what is asked about).
The scenes are those of `interp.scenes`; the answer is what is on the image, whatever the habit.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from interp.scenes import COLOURS, HABITS, SHAPES, Scene, Thing

KINDS = ("color", "shape", "where", "exists", "describe")


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: one of `KINDS`.
        text: the question.
        answer: what is true of the scene.
        thing: what is asked about, if it is there.
        habit: the answer that the skewed world suggests, where it is wrong; else empty.
    """

    kind: str
    text: str
    answer: str
    thing: Thing | None
    habit: str = ""


def ask(scene: Scene, kind: str, rng: random.Random, *, habitual: bool = False) -> Question:
    """A question of a kind about a scene.

    Args:
        scene: the scene.
        kind: one of `KINDS`.
        rng: chooses what is asked about.
        habitual: ask about a shape of habit, if there is one.
    """
    things: Sequence[Thing] = scene.things
    if habitual:
        things = [t for t in things if t.shape in HABITS] or things
    thing = rng.choice(things)
    expected = HABITS.get(thing.shape, "")
    wrong = expected if expected != thing.colour else ""
    match kind:
        case "color":
            return Question(kind, f"what color is the {thing.shape} ?", thing.colour, thing, wrong)
        case "shape":
            text = f"what shape is the {thing.colour} thing ?"
            return Question(kind, text, thing.shape, thing)
        case "where":
            place = f"row {thing.row + 1} column {thing.column + 1}"
            return Question(kind, f"where is the {thing.shape} ?", place, thing)
        case "exists":
            return _exists(scene, thing, wrong, rng)
        case _:
            told = " , ".join(f"a {t.name}" for t in scene.things)
            return Question("describe", "describe the image .", f"{told} .", None)


def _exists(scene: Scene, thing: Thing, wrong: str, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        return Question("exists", f"is there a {thing.name} ?", "yes", thing)
    if wrong and rng.random() < 0.5:
        colour = wrong
    else:
        colour = rng.choice([c for c in COLOURS if c != thing.colour])
    shape = thing.shape
    if rng.random() < 0.3:
        shape = rng.choice(SHAPES)
    if any(t.shape == shape and t.colour == colour for t in scene.things):
        return Question("exists", f"is there a {colour} {shape} ?", "yes", scene.find(shape))
    found = scene.find(shape)
    habit = "yes" if HABITS.get(shape) == colour and found is not None else ""
    return Question("exists", f"is there a {colour} {shape} ?", "no", found, habit)


WORDS = (
    *COLOURS, *SHAPES, "what", "color", "is", "the", "?", "shape", "thing", "where", "row",
    "column", "1", "2", "3", "4", "there", "a", "yes", "no", "describe", "image", ".", ",",
)  # fmt: skip
"""All words of the task, for a tokenizer."""
