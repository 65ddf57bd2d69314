"""Coloured objects: three things of three colours are listed, and the colour of one is asked for.

One worked example comes first. The corrupted prompt asks for another of the three things
(`object`), or swaps the colours of the two in the list (`colour`); either way the answer turns into
the wrong answer, and nothing else changes.

After the task of Ippolito & Callison-Burch in BIG-bench as used by Merullo et al. 2310.08744; the
wording is our own.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from interp.errors import InputError
from interp.prompts import Prompt, PromptPair, Range
from interp.tasks import TASKS
from interp.tasks.pairs import PairTask, check_style, filled, from_ids, vocabulary, with_ends

if TYPE_CHECKING:
    from interp.model import Model

CORRUPTIONS = ("object", "colour")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "gold", "silver")
OBJECTS = (
    "book", "cup", "pen", "ball", "key", "box", "hat", "bag", "lamp", "shirt", "plate", "phone",
    "ring", "card", "cap", "bottle", "knife", "bowl",
)  # fmt: skip
SURFACES = ("table", "floor", "bed", "shelf", "desk")
_THING = "a {{c{0}}} {{o{0}}}"
_ASK = " Question: what colour is the {{{0}}}? Answer:"


def _list(*things: int) -> str:
    first, second, third = (_THING.format(k) for k in things)
    return f"On the {{surface}} there is {first}, {second} and {third}."


TEMPLATE = f"{_list(4, 5, 6)}{_ASK.format('o5')} {{c5}}. {_list(1, 2, 3)}{_ASK.format('asked')}"
FRAME = ("", "c1", "o1", "", "c2", "o2", "", "c3", "o3", "", "", "asked", "")


@TASKS.register("coloured-objects")
@dataclass(frozen=True)
class ColouredObjects(PairTask):
    """The colour of one of three things.

    Attributes:
        corruption: `object` (another thing is asked for) or `colour` (two colours are swapped).
        style: `text`, `ids` (random tokens, for models without such words), or `auto`.
    """

    corruption: str = "object"
    style: str = "auto"

    summary: ClassVar[str] = "the colour of one of three listed things"
    spans: ClassVar[tuple[str, ...]] = ("colour", "object", "decoys", "asked", "end")

    def __post_init__(self) -> None:
        if self.corruption not in CORRUPTIONS:
            raise InputError(f"corruption must be object or colour; got {self.corruption!r}")
        check_style(self.style)

    def pairs(self, model: "Model", n: int, *, seed: int = 0) -> list[PromptPair]:
        """See `PairTask.pairs`.

        Raises:
            InputError: style is `text`, and fewer than six colours or things are single tokens.
        """
        kinds = {"colours": (COLOURS, 6), "things": (OBJECTS, 6)}
        words = vocabulary(model, self.style, _sample(), kinds) or {}
        colours, objects = words.get("colours", {}), words.get("things", {})
        return [
            self._pair(model, random.Random(f"{seed}/{i}"), i, colours, objects) for i in range(n)
        ]

    def _pair(
        self, model: "Model", rng: random.Random, i: int, colours: dict[str, int],
        objects: dict[str, int],
    ) -> PromptPair:  # fmt: skip
        asked, other = rng.sample((1, 2, 3), 2)
        slots = [f"{kind}{k}" for kind in "co" for k in range(1, 7)]
        if colours:
            drawn = rng.sample(list(colours), 6) + rng.sample(list(objects), 6)
            words = dict(zip(slots, drawn, strict=True))
            words |= {"asked": words[f"o{asked}"], "surface": rng.choice(SURFACES)}
            ids = colours | objects
            tokens, places = filled(model, TEMPLATE, words, ids)
            token = {slot: ids[words[slot]] for slot in slots}
        else:
            frame = ["" if x == "asked" else x for x in FRAME]
            known = [x for x in FRAME if x and x != "asked"]
            made, token, places = from_ids(model, rng, frame, known)
            at = len(made) - len(FRAME) + FRAME.index("asked")
            made[at] = token[f"o{asked}"]
            tokens, places["asked"] = tuple(made), ((at, at + 1),)
        changed = list(tokens)
        if self.corruption == "object":
            changed[places["asked"][0][0]] = token[f"o{other}"]
        else:
            changed[places[f"c{asked}"][0][0]] = token[f"c{other}"]
            changed[places[f"c{other}"][0][0]] = token[f"c{asked}"]
        decoys: tuple[Range, ...] = tuple(places[f"c{k}"][0] for k in (1, 2, 3) if k != asked)
        spans = with_ends(
            model, tokens,
            {"colour": places[f"c{asked}"], "object": places[f"o{asked}"][:1], "decoys": decoys,
             "asked": places["asked"]},
        )  # fmt: skip
        meta = {"wrong": token[f"c{other}"], "place": asked}
        answer = (token[f"c{asked}"],)
        return PromptPair(
            Prompt(tokens, spans, id=f"colours-{i}", answer=answer, meta=meta),
            Prompt(
                tuple(changed), spans, id=f"colours-{i}-{self.corruption}", answer=answer, meta=meta
            ),
        )


def _sample() -> str:
    """The template filled with words, to see whether a tokenizer knows them."""
    words = {f"c{k}": COLOURS[k] for k in range(1, 7)} | {f"o{k}": OBJECTS[k] for k in range(1, 7)}
    return TEMPLATE.format(**words, asked=OBJECTS[1], surface=SURFACES[0])
