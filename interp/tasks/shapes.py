"""Questions about scenes of coloured shapes, with the box of what is asked about.

    what color is the square ? red          where is the ring ? row 2 column 4
    what shape is the red thing ? square    is there a red square ? yes
    describe the image . a red square , a green ring .

Spans: `image`, `question`, `thing` (the image tokens that touch the box of what is asked about).
The scenes are those of `interp.scenes`; the answer is what is on the image, whatever the habit.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from interp.errors import InputError
from interp.prompts import Prompt, PromptPair
from interp.scenes import COLOURS, HABITS, SHAPES, WORLDS, Scene, Thing, make_scene
from interp.tasks import TASKS
from interp.tasks.pairs import PairTask

if TYPE_CHECKING:
    from interp.model import Model

KINDS = ("color", "shape", "where", "exists", "describe")
CORRUPTIONS = ("paint", "blank", "blur", "mask", "swap")


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


@TASKS.register("shapes")
@dataclass(frozen=True)
class Shapes(PairTask):
    """Questions about rendered scenes; for plain vision transformers, the scenes alone.

    Attributes:
        kind: `color`, `shape`, `where`, `exists` or `describe`.
        world: `skewed`, `even` or `conflict`.
        faint: share of things whose colour is hard to see.
        habitual: ask about shapes of habit only.
        corruption: `paint` (what is asked about gets another colour), `blank` (grey image), `blur`,
            `mask` (the box of what is asked about is grey) or `swap` (another scene).
        wanted: colour of the thing that matters to a plain vision transformer.
    """

    kind: str = "color"
    world: str = "even"
    faint: float = 0.0
    habitual: bool = False
    corruption: str = "paint"
    wanted: str = "red"

    summary: ClassVar[str] = "questions about coloured shapes on a grid, with their boxes"
    spans: ClassVar[tuple[str, ...]] = ("image", "thing")
    target: ClassVar[str] = "question"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS), ("world", self.world, WORLDS),
            ("corruption", self.corruption, CORRUPTIONS),
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"shapes:{name} must be one of {', '.join(known)}; got {value!r}")

    def pairs(self, model: "Model", n: int, *, seed: int = 0) -> list[PromptPair]:
        """See `PairTask.pairs`.

        Raises:
            InputError: the model reads no images.
        """
        from interp.zoo.planted_vlm import is_planted, picture_pairs

        if is_planted(model):
            return picture_pairs(n, seed=seed)
        return [self._pair(model, f"{seed}/{i}", f"shapes-{seed}-{i}") for i in range(n)]

    def scene(self, place: str) -> tuple[Scene, Question]:
        """A scene of this task and the question about it."""
        scene = make_scene(place, world=self.world, faint=self.faint)
        rng = random.Random(f"ask/{place}")
        return scene, ask(scene, self.kind, rng, habitual=self.habitual)

    def picture(self, place: str) -> tuple[Scene, Question]:
        """A scene with the wanted colour; its shape is what a vision transformer is asked for."""
        scene = make_scene(place, world=self.world, faint=self.faint, needs=(self.wanted,))
        thing = scene.find(self.wanted)
        assert thing is not None
        return scene, Question("shape", f"what is {self.wanted} ?", thing.shape, thing)

    def _pair(self, model: "Model", place: str, name: str) -> PromptPair:
        alone = not model.reads_tokens
        scene, asked = self.picture(place) if alone else self.scene(place)
        clean = _prompt(model, scene, scene.pixels, asked, name)
        other, wrong = self._corrupted(scene, asked, place, (self.wanted,) if alone else ())
        corrupted = _prompt(model, scene, other, asked, f"{name}-{self.corruption}")
        if wrong and model.tokenizer is not None:
            ids = model.tokenizer(wrong, add_special_tokens=False).input_ids
            clean = replace(clean, meta={**clean.meta, "wrong": ids[0]})
            corrupted = replace(corrupted, meta={**corrupted.meta, "wrong": ids[0]})
        return PromptPair(clean, corrupted)

    def _corrupted(
        self, scene: Scene, asked: Question, place: str, needs: tuple[str, ...]
    ) -> tuple[np.ndarray, str]:
        """Another image, and the answer it calls for where that is known."""
        rng = random.Random(f"corrupt/{place}")
        thing = asked.thing
        match self.corruption:
            case "paint" if thing is not None:
                taken = {t.colour for t in scene.things}
                colour = rng.choice([c for c in COLOURS if c not in taken])
                painted = make_scene(
                    place, world=self.world, faint=self.faint, needs=needs,
                    paint={(thing.row, thing.column): colour},
                )  # fmt: skip
                return painted.pixels, colour if self.kind == "color" else ""
            case "mask" if thing is not None:
                return masked(scene.pixels, thing.box), asked.habit
            case "blank":
                return np.full_like(scene.pixels, 24), asked.habit
            case "blur":
                return blurred(scene.pixels), asked.habit
            case _:
                return make_scene(f"{place}/other", world=self.world, faint=self.faint).pixels, ""


def masked(pixels: np.ndarray, box: tuple[int, int, int, int], level: int = 24) -> np.ndarray:
    """The image with a box filled with one level of grey."""
    left, top, right, bottom = box
    out = pixels.copy()
    out[top:bottom, left:right] = level
    return out


def blurred(pixels: np.ndarray, radius: int = 8) -> np.ndarray:
    """The image averaged over squares of 2·radius + 1 pixels, its border repeated outwards."""
    wide = np.pad(pixels.astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    size = 2 * radius + 1
    for axis in (0, 1):
        total = np.cumsum(wide, axis)
        zero = np.zeros_like(total.take([0], axis))
        total = np.concatenate([zero, total], axis)
        wide = (total.take(range(size, total.shape[axis]), axis)
                - total.take(range(total.shape[axis] - size), axis)) / size  # fmt: skip
    return wide.round().clip(0, 255).astype(np.uint8)


def _prompt(model: "Model", scene: Scene, pixels: np.ndarray, asked: Question, name: str) -> Prompt:
    from interp.images import image_prompt

    boxes: dict[str, Any] = {f"thing-{i}": t.box for i, t in enumerate(scene.things)}
    if asked.thing is not None:
        boxes["thing"] = asked.thing.box
    text = asked.text if model.reads_tokens else None
    made: Prompt = image_prompt(
        model, text, [pixels], boxes=boxes, answer=asked.answer if text else None, id=name
    )
    classes = getattr(model.config, "label2id", None) or {}
    if not model.reads_tokens and asked.answer in classes:
        made = replace(made, answer=(int(classes[asked.answer]),))
    words: dict[str, str] = {}
    for i, t in enumerate(scene.things):
        words |= {t.shape: f"thing-{i}", t.colour: f"thing-{i}"}
    if asked.kind in ("color", "shape") and asked.thing is not None:
        words = {asked.answer: "thing"}
    meta = {
        "answer_spans": words, "boxes": boxes, "habit": asked.habit, "question": asked.text,
        "right": asked.answer, "faint": bool(asked.thing and asked.thing.faint),
    }  # fmt: skip
    return replace(made, meta={**made.meta, **meta})
