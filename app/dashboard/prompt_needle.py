"""A needle in a haystack of one's own: prompts over depths and lengths, and scores by these.

Each prompt is filler, the needle at a depth of it, and the question at the end. Its name says
length and depth, `needle-512-0.25`, by which the scores of a run are sorted again. Spans: `needle`
is the answer where it stands in the needle, `fact` the needle, `question` the question.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.prompt_text import check_text
from interp.errors import InputError
from interp.headid import HeadId

if TYPE_CHECKING:
    from interp.scores import HeadScores

CELLS = 100
"""Most prompts of a grid."""
LONGEST = 32_768
"""Most tokens of one."""
ALL = 400_000
"""Most tokens of all."""
_NAME = re.compile(r"needle-(\d+)-(0(?:\.\d+)?|1(?:\.0+)?)\Z")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Needle:
    """What is hidden and where.

    Attributes:
        haystack: filler; that of the task `needle` if empty.
        needle: the sentence that is hidden.
        answer: the part of it that must come out.
        question: what is asked at the end.
        depths: places, 0 (first) to 1 (last).
        lengths: tokens of a prompt, at most.
    """

    haystack: str
    needle: str
    answer: str
    question: str
    depths: tuple[float, ...]
    lengths: tuple[int, ...]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Needle":
        """What a page sent.

        Raises:
            InputError: it is of another form, or too large.
        """
        texts = {n: check_text(body.get(n), f"the {n}") for n in ("needle", "answer", "question")}
        if texts["needle"].count(texts["answer"]) != 1:
            raise InputError(
                "the answer must stand in the needle exactly once; it stands there "
                f"{texts['needle'].count(texts['answer'])} times"
            )
        haystack = body.get("haystack") or ""
        if haystack:
            check_text(haystack, "the haystack")
        depths = numbers(body.get("depths"), float, "depths")
        lengths = numbers(body.get("lengths"), int, "lengths")
        if not all(0 <= d <= 1 for d in depths):
            raise InputError(f"depths must lie in 0..1; got {', '.join(f'{d:g}' for d in depths)}")
        if not all(1 <= n <= LONGEST for n in lengths):
            raise InputError(f"lengths must lie in 1..{LONGEST} tokens; got {max(lengths)}")
        if len(depths) * len(lengths) > CELLS or len(depths) * sum(lengths) > ALL:
            raise InputError(
                f"a grid may have {CELLS} prompts and {ALL:,} tokens in all; got "
                f"{len(depths) * len(lengths)} and {len(depths) * sum(lengths):,}"
            )
        return cls(haystack, texts["needle"], texts["answer"], texts["question"],
                   tuple(dict.fromkeys(round(d, 4) for d in depths)), tuple(lengths))  # fmt: skip


def numbers(text: object, kind: type, what: str) -> list[Any]:
    """Numbers with commas between them, each once and rising.

    >>> numbers("512, 256,256", int, "lengths")
    [256, 512]

    Raises:
        InputError: it holds none, or something else.
    """
    parts = [p.strip() for p in str(text or "")[:2000].split(",") if p.strip()]
    try:
        found = sorted({kind(p) for p in parts})
    except ValueError:
        found = []
    if not found:
        raise InputError(f"{what} must be numbers with commas between; got {str(text)[:40]!r}")
    return found


def grid(
    needle: Needle, count: Callable[[str], int], room: int | None = None
) -> list[dict[str, Any]]:
    """The prompts, as a file of prompts has them: by length, then depth.

    Args:
        needle: what is hidden and where.
        count: tokens of a text by itself.
        room: positions of the model, if they are limited.

    Raises:
        InputError: needle and question do not fit a length, a length with its answer does not fit
            the model, or the haystack's first sentence fits nowhere.
    """
    fixed = count(needle.needle) + count(needle.question) + 1
    longest = max(needle.lengths) + count(needle.answer)
    if room is not None and longest > room:
        raise InputError(
            f"the longest prompt and its answer must fit the model's {room} positions; they take "
            f"{longest}"
        )
    out = []
    for length in needle.lengths:
        if fixed > length:
            raise InputError(
                f"needle and question take {fixed} tokens; a length of {length} is less"
            )
        filler = _filler(needle, length - fixed, count)
        out += [_prompt(needle, filler, length, depth) for depth in needle.depths]
    return out


def _filler(needle: Needle, room: int, count: Callable[[str], int]) -> list[str]:
    """Sentences that fill a room of tokens; those of one's own text begin anew at its end."""
    out: list[str] = []
    for sentence in _sentences(needle.haystack):
        size = max(1, count(sentence))
        if size > room:
            if needle.haystack and not out and room > 0:
                raise InputError(
                    f"the haystack's first sentence takes {size} tokens; there is room for {room}",
                    hint="sentences end in . or ! or ?",
                )
            break
        room -= size
        out.append(sentence)
    return out


def _sentences(haystack: str) -> Iterator[str]:
    if haystack:
        return cycle(s for s in _SENTENCE.split(haystack.strip()) if s)
    from interp.tasks.lexicon import haystack_sentences

    return haystack_sentences(random.Random(0))


def _prompt(needle: Needle, filler: list[str], length: int, depth: float) -> dict[str, Any]:
    at = round(depth * len(filler))
    before = " ".join(filler[:at])
    start = len(before) + bool(before)
    text = " ".join([*filler[:at], needle.needle, *filler[at:], needle.question])
    inner = start + needle.needle.index(needle.answer)
    return {
        "id": name_of(length, depth),
        "text": text,
        "answer": f" {needle.answer}",
        "spans": {
            "needle": [[inner, inner + len(needle.answer)]],
            "fact": [[start, start + len(needle.needle)]],
            "question": [[len(text) - len(needle.question), len(text)]],
        },
    }


def name_of(length: int, depth: float) -> str:
    """The name of a prompt of the grid.

    >>> name_of(512, 0.25), place_of("needle-512-0.25"), place_of("needle-3")
    ('needle-512-0.25', (512, 0.25), None)
    """
    return f"needle-{length}-{depth:g}"


def place_of(name: str) -> tuple[int, float] | None:
    """Length and depth of a prompt by its name; None if the name says neither."""
    match = _NAME.match(name)
    return None if match is None else (int(match[1]), float(match[2]))


def jsonl(entries: list[dict[str, Any]]) -> str:
    """The prompts as a file has them."""
    return "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)


@dataclass(frozen=True)
class Scores:
    """Scores of a head by depth and length.

    Attributes:
        lengths: of the columns.
        depths: of the rows.
        mean: [depth, length] mean score; NaN where no prompt gave one.
        counts: [depth, length] prompts that gave one.
        asked: prompts of the grid in the table, with or without a score.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    mean: np.ndarray
    counts: np.ndarray
    asked: int


def scores_of(table: "HeadScores", head: HeadId) -> Scores | None:
    """Scores of a head by depth and length; None if the run is not about prompts of a grid.

    Raises:
        InputError: the head is not in the table.
    """
    if head not in table.heads:
        raise InputError(f"{head} is not in the table of {table.detector}")
    failed = [name for name, _ in table.failures]
    places = {name: place_of(name) for name in dict.fromkeys([*table.examples, *failed])}
    known = sorted({p for p in places.values() if p is not None})
    if not known:
        return None
    lengths = tuple(sorted({n for n, _ in known}))
    depths = tuple(sorted({d for _, d in known}))
    total = np.zeros((len(depths), len(lengths)))
    counts = np.zeros(total.shape, dtype=np.int64)
    column = table.per_example[:, table.heads.index(head)]
    for name, value in zip(table.examples, column.tolist(), strict=True):
        place = places[name]
        if place is not None and np.isfinite(value):
            at = depths.index(place[1]), lengths.index(place[0])
            total[at] += value
            counts[at] += 1
    mean = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
    asked = sum(p is not None for p in places.values())
    return Scores(lengths, depths, mean, counts, asked)
