"""Needle in a haystack: facts in filler, one of them asked for at the end.

A grid of lengths and depths; each prompt states several facts and asks for one, so that the others
are matched decoys: a head that looks at anything fact-like is told from one that looks at the
fact asked for. Spans are noted while the prompt is put together: `needle` is the answer where it
stands in the context, `fact` the sentence around it, `decoys` the values of the other facts.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from interp.errors import InputError
from interp.prompts import Prompt, Range
from interp.tasks import TASKS, Task
from interp.tasks.ids import opening, ordinary_ids, sample_ids, speaks
from interp.tasks.lexicon import KEYS, VALUES, WORDINGS, haystack_sentence

if TYPE_CHECKING:
    from interp.model import Model


@TASKS.register("needle")
@dataclass(frozen=True)
class Needle(Task):
    """Facts in filler over a grid of lengths and depths.

    Attributes:
        lengths: tokens of a prompt, at most; those beyond the model's context are left out.
        depths: places of the asked fact, 0 (first) to 1 (last).
        facts: facts in the context, the asked one included.
        words: words of a value.
        wording: `direct` or `sentence`; see `interp.tasks.lexicon`.
        style: `text`, `ids` (random tokens, for models without words), or `auto`.
        needle: a free needle sentence instead of facts, with `question` and `answer`.
        question: what is asked of the free needle.
        answer: the part of the free needle that must come out.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    facts: int = 4
    words: int = 3
    wording: str = "direct"
    style: str = "auto"
    needle: str = ""
    question: str = ""
    answer: str = ""

    summary: ClassVar[str] = "facts at any depth of a long context, one asked for (retrieval)"
    spans: ClassVar[tuple[str, ...]] = ("needle", "fact", "question", "decoys")

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise InputError(f"wording must be one of {', '.join(WORDINGS)}; got {self.wording!r}")
        if self.style not in ("auto", "text", "ids"):
            raise InputError(f"style must be auto, text or ids; got {self.style!r}")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise InputError(f"depths must lie in 0..1; got {self.depths}")
        if not 1 <= self.facts * self.words <= len(VALUES) or self.facts > len(KEYS):
            raise InputError(
                f"facts x words must be 1..{len(VALUES)} and facts at most {len(KEYS)}; "
                f"got {self.facts} x {self.words}"
            )
        if self.needle and (self.answer not in self.needle or not self.answer or not self.question):
            raise InputError(
                "a free needle needs a question and an answer that is part of it; got "
                f"question {self.question!r}, answer {self.answer!r}"
            )

    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> list[Prompt]:
        """See `Task.prompts`; prompts run through the grid of lengths and depths in turn."""
        lengths = list(self.lengths)
        if model.context is not None:
            room = model.context - 4 * self.words - 2
            # Where every length is too long for this model: use what it has.
            lengths = [x for x in lengths if x <= room] or [room]
        grid = [(length, depth) for length in lengths for depth in self.depths]
        make = self._from_text if self._speaks(model) else self._from_ids
        out = []
        for i in range(n):
            length, depth = grid[i % len(grid)]
            rng = random.Random(f"{seed}/{i}")
            out.append(make(model, rng, f"needle-{i}", length, depth))
        return out

    def _speaks(self, model: "Model") -> bool:
        """Whether the model's tokenizer knows the words of the text."""
        if self.style != "auto":
            if self.style == "text" and model.tokenizer is None:
                raise InputError(f"needle texts need a tokenizer and {model.name} has none")
            return self.style == "text"
        return speaks(model, haystack_sentence(random.Random(0)))

    def _from_text(
        self, model: "Model", rng: random.Random, id: str, length: int, depth: float
    ) -> Prompt:
        stated, question, answer = self._facts(rng)
        tail = f" {question}"
        fixed = sum(_count(model, f" {s}") for s, _ in stated) + _count(model, tail) + 1
        filler: list[str] = []
        used = fixed
        if used > length:
            raise InputError(
                f"{self.facts} facts and the question take {used} tokens; length {length} is less"
            )
        while used + (size := _count(model, f" {(s := haystack_sentence(rng))}")) <= length:
            filler.append(s)
            used += size
        pieces: list[tuple[str, str | None]] = [(s, None) for s in filler]
        for sentence, value in stated[1:]:
            pieces.insert(rng.randint(0, len(pieces)), (sentence, f"decoys/{value}"))
        pieces.insert(round(depth * len(pieces)), (stated[0][0], f"needle/{stated[0][1]}"))
        text, marks = "", []
        for sentence, mark in pieces:
            start = len(text) + bool(text)
            text += f" {sentence}" if text else sentence
            if mark is not None:
                kind, value = mark.split("/", 1)
                at = start + sentence.rindex(value)
                marks.append((kind, at, at + len(value)))
                if kind == "needle":
                    marks.append(("fact", start, len(text)))
        marks.append(("question", len(text) + 1, len(text) + len(tail)))
        text += tail
        tokens, spans = _tokenise(model, text, marks)
        if tokens and tokens[0] == model.bos_id:
            spans["bos"] = ((0, 1),)
        spans["haystack"] = ((0, spans["question"][0][0]),)
        expected = tuple(model.tokenizer(f" {answer}", add_special_tokens=False).input_ids)
        meta = {"length": length, "depth": depth}
        return Prompt(tokens, spans, id=id, answer=expected, meta=meta)

    def _facts(self, rng: random.Random) -> tuple[list[tuple[str, str]], str, str]:
        """Sentences and their values, the asked one first; the question; the answer."""
        if self.needle:
            return [(self.needle, self.answer)], self.question, self.answer
        form = WORDINGS[self.wording]
        keys = rng.sample(KEYS, self.facts)
        words = rng.sample(VALUES, self.facts * self.words)
        values = [" ".join(words[i :: self.facts]) for i in range(self.facts)]
        stated = [(form.fact.format(key=k, value=v), v) for k, v in zip(keys, values, strict=True)]
        return stated, form.question.format(key=keys[0]), values[0]

    def _from_ids(
        self, model: "Model", rng: random.Random, id: str, length: int, depth: float
    ) -> Prompt:
        ids, bos = ordinary_ids(model), opening(model)
        size = 2 * self.words  # tokens have no word inside them: longer values, as in the card
        special = sample_ids(rng, ids, min(self.facts * (size + 1), len(ids) // 2))
        facts = [special[i : i + size + 1] for i in range(0, len(special), size + 1)]
        facts = [f for f in facts if len(f) == size + 1]
        if not facts:
            raise InputError(f"a vocabulary of {len(ids)} is too small for values of {size} tokens")
        rest = sorted(set(ids) - set(special))
        room = length - len(bos) - 1 - sum(map(len, facts))
        if room < 0:
            raise InputError(f"{len(facts)} facts do not fit a length of {length}")
        hay = [rng.choice(rest) for _ in range(room)]
        places = sorted((rng.randint(0, room), i) for i in range(1, len(facts)))
        places.append((round(depth * room), 0))
        tokens = list(bos)
        spans: dict[str, tuple[Range, ...]] = {}
        at = 0
        decoys: list[Range] = []
        for place, i in sorted(places, key=lambda x: x[0]):
            tokens += hay[at:place] + facts[i]
            at = place
            span = (len(tokens) - size, len(tokens))
            if i == 0:
                spans["needle"] = (span,)
                spans["fact"] = ((span[0] - 1, span[1]),)
            else:
                decoys.append(span)
        tokens += hay[at:] + facts[0][:1]
        if decoys:
            spans["decoys"] = tuple(decoys)
        spans["question"] = ((len(tokens) - 1, len(tokens)),)
        spans["haystack"] = ((0, len(tokens) - 1),)
        if bos:
            spans["bos"] = ((0, 1),)
        meta = {"length": length, "depth": depth}
        return Prompt(tuple(tokens), spans, id=id, answer=tuple(facts[0][1:]), meta=meta)


def _count(model: "Model", text: str) -> int:
    return len(model.tokenizer(text, add_special_tokens=False).input_ids)


def _tokenise(
    model: "Model", text: str, marks: list[tuple[str, int, int]]
) -> tuple[tuple[int, ...], dict[str, tuple[Range, ...]]]:
    """Token ids of a text, and the token ranges of character ranges of it."""
    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of {model.name} does not say where its tokens stand in the text",
            hint="use its fast version (AutoTokenizer with use_fast=True), or style=ids",
        )
    encoded = model.tokenizer(text, return_offsets_mapping=True)
    spans: dict[str, tuple[Range, ...]] = {}
    for name, start, stop in marks:
        # A token that begins with the space before a word belongs to the word.
        inside = [
            i for i, (a, b) in enumerate(encoded.offset_mapping) if a < stop and b > start and a < b
        ]
        spans[name] = (*spans.get(name, ()), (inside[0], inside[-1] + 1))
    return tuple(encoded.input_ids), spans
