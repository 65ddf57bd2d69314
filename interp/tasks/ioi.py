"""Indirect object identification: two people, one gives something to — the other.

"When A and B arrived at the park, B handed a book to" is completed by A, the name that occurs once.
The corrupted prompt either holds three names that do not repeat (`abc`), which takes away the
reason for any answer, or repeats the other name (`flip`), which turns the answer around.

Wang et al. 2022, arXiv 2211.00593; templates, names and things are our own.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from interp.errors import InputError
from interp.prompts import Prompt, PromptPair
from interp.tasks import TASKS
from interp.tasks.pairs import PairTask, check_style, filled, from_ids, vocabulary, with_ends

if TYPE_CHECKING:
    from interp.model import Model


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CORRUPTIONS = ("abc", "flip")
NAMES = _words(
    """
    Mary John Tom James Dan Martin Amy Alice Anna Adam Andrew Ben Bob Brian Carl Charles Chris
    Claire Daniel David Diana Emily Emma Eric Frank George Grace Helen Henry Jack Jane Jason Julia
    Kate Kevin Laura Linda Lisa Lucy Mark Michael Nick Oliver Paul Peter Rachel Richard Robert Rose
    Ruth Ryan Sam Sarah Scott Simon Steve Susan Victoria William
    """
)
TEMPLATES = (
    "When {first} and {second} arrived at the {place}, {third} handed a {thing} to",
    "After {first} and {second} had talked in the {place}, {third} gave the {thing} to",
    "While {first} and {second} were walking to the {place}, {third} passed the {thing} to",
    "Once {first} and {second} came back from the {place}, {third} sent a {thing} to",
    "Then {first} and {second} sat down near the {place}, and {third} offered a {thing} to",
)
PLACES = ("park", "station", "market", "school", "garden", "library", "river", "office")
THINGS = ("book", "drink", "letter", "ball", "ticket", "ring", "bottle", "map")
FRAME = ("", "first", "", "second", "", "third", "", "")


@TASKS.register("ioi")
@dataclass(frozen=True)
class Ioi(PairTask):
    """Two names, one of them repeated; the other is the answer.

    Attributes:
        corruption: `abc` (three other names) or `flip` (the other name is repeated).
        style: `text`, `ids` (random tokens, for models without such words), or `auto`.
    """

    corruption: str = "abc"
    style: str = "auto"

    summary: ClassVar[str] = "which of two names was not repeated (indirect object)"
    spans: ClassVar[tuple[str, ...]] = ("io", "s1", "s2", "end")

    def __post_init__(self) -> None:
        if self.corruption not in CORRUPTIONS:
            raise InputError(f"corruption must be abc or flip; got {self.corruption!r}")
        check_style(self.style)

    def pairs(self, model: "Model", n: int, *, seed: int = 0) -> list[PromptPair]:
        """See `PairTask.pairs`.

        Raises:
            InputError: style is `text`, and fewer than five names are single tokens.
        """
        if self.style == "auto" and _is_toy(model):
            from interp.zoo.planted_ioi import ioi_pairs

            return ioi_pairs(n, corruption=self.corruption, seed=seed)
        sample = TEMPLATES[0].format(
            first=NAMES[0], second=NAMES[1], third=NAMES[0], place=PLACES[0], thing=THINGS[0]
        )
        words = vocabulary(model, self.style, sample, {"names": (NAMES, 5)})
        ids = {} if words is None else words["names"]
        return [self._pair(model, random.Random(f"{seed}/{i}"), i, ids) for i in range(n)]

    def _pair(self, model: "Model", rng: random.Random, i: int, ids: dict[str, int]) -> PromptPair:
        subject_first = rng.random() < 0.5
        io_slot, s_slot = ("second", "first") if subject_first else ("first", "second")
        meta: dict[str, object] = {"order": "baba" if subject_first else "abba"}
        if ids:
            template = rng.randrange(len(TEMPLATES))
            names = rng.sample(list(ids), 5)
            words = dict(zip(("first", "second"), names[:2], strict=True))
            words |= {"third": words[s_slot]}
            words |= {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
            clean, places = filled(model, TEMPLATES[template], words, ids)
            meta["template"] = template
            token = {slot: ids[words[slot]] for slot in ("first", "second")}
            new = [ids[x] for x in names[2:]]
        else:
            known = ("first", "second", "new1", "new2", "new3")
            frame = ["" if x == "third" else x for x in FRAME]
            tokens, token, places = from_ids(model, rng, frame, known)
            at = len(tokens) - len(FRAME) + FRAME.index("third")
            tokens[at] = token[s_slot]
            places["third"] = ((at, at + 1),)
            clean, new = tuple(tokens), [token[x] for x in known[2:]]
        other = list(clean)
        slots = [places[slot][0][0] for slot in ("first", "second", "third")]
        if self.corruption == "flip":
            other[slots[2]] = token[io_slot]
        else:
            for place, name in zip(slots, new, strict=True):
                other[place] = name
        spans = {"io": places[io_slot], "s1": places[s_slot], "s2": places["third"]}
        spans = with_ends(model, clean, spans)
        meta["wrong"] = token[s_slot]
        answer = (token[io_slot],)
        return PromptPair(
            Prompt(clean, spans, id=f"ioi-{i}", answer=answer, meta=meta),
            Prompt(tuple(other), spans, id=f"ioi-{i}-{self.corruption}", answer=answer, meta=meta),
        )


def _is_toy(model: "Model") -> bool:
    """Whether the model reads the words of the planted circuit."""
    from interp.zoo.planted_ioi import BOS, END, VOCAB

    if model.tokenizer is None or model.vocabulary != VOCAB:
        return False
    words = model.tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    return words[BOS] == "<bos>" and words[END] == "<end>" and "name1" in words and "f1" in words
