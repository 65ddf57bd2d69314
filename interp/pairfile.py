r"""Pairs of prompts from a file: one a line, as JSON.

    {"clean": "When Mary and John went out, John spoke to",
     "corrupted": "When Mary and John went out, Anna spoke to",
     "answer": " Mary", "wrong": " John", "id": "a"}

(on one line). Each of the two is a text, or a mapping as a line of a prompt file holds it, with
spans, tokens or images; see `interp.promptfile`. `answer` is what should follow the clean prompt,
`wrong` what it is compared with; each a text, tokenised as it stands (write the space it begins
with), or token ids. The prompts must have equally many tokens. Where the corrupted prompt names no
span of its own it has those of the clean one, at the same positions.

`read_lines` parses, without a model; `to_pairs` tokenises. Every error is a line: file, number of
the line, what must hold, what came.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, PromptFileError
from interp.jsonlines import (
    answer_of,
    brief,
    bytes_of,
    id_of,
    mapping_of,
    numbered,
    refuse_doubles,
    refuse_unknown,
)
from interp.promptfile import Line, line_of, to_prompts, tokens_of
from interp.prompts import Prompt, PromptPair

if TYPE_CHECKING:
    from interp.model import Model

_KEYS = ("clean", "corrupted", "answer", "wrong", "id")
_SIDES = ("clean", "corrupted")


@dataclass(frozen=True)
class PairLine:
    """One pair as its file has it.

    Attributes:
        place: file and line, for error texts.
        clean: the clean prompt, without its answer.
        corrupted: the corrupted prompt.
        answer: what follows the clean prompt: text, token ids, or None.
        wrong: what it is compared with, likewise.
        id: name of the pair; `line-N` unless the file names it.
    """

    place: str
    clean: Line
    corrupted: Line
    answer: str | tuple[int, ...] | None
    wrong: str | tuple[int, ...] | None
    id: str


def read_pairs(path: str | Path, model: "Model") -> list[PromptPair]:
    """Pairs of a file, or of the standard input for `-`, as a model reads them.

    Raises:
        PromptFileError: see `read_lines` and `to_pairs`.
    """
    return to_pairs(read_lines(path), model)


def read_lines(path: str | Path) -> list[PairLine]:
    """The pairs of a file, or of the standard input for `-`, not yet tokenised.

    Raises:
        PromptFileError: no such file, not UTF-8, empty, or a line that is not a pair.
    """
    return parse(*bytes_of(path))


def holds_pairs(data: bytes) -> bool:
    """Whether the bytes of a prompt file are meant as pairs: its first line has one of the two."""
    for row in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if row.strip():
            try:
                content = json.loads(row)
            except (ValueError, RecursionError):
                return False
            return isinstance(content, dict) and any(side in content for side in _SIDES)
    return False


def parse(data: bytes, name: str) -> list[PairLine]:
    """The pairs in the bytes of a file.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: how errors call the file; images are looked for in its folder.

    Raises:
        PromptFileError: the bytes are not pairs.
    """
    folder = Path(name).parent
    pairs = [
        _pair_line(mapping_of(line, f"{name}, line {number}"), f"{name}, line {number}",
                   f"line-{number}", folder)
        for number, line in numbered(data, name)
    ]  # fmt: skip
    refuse_doubles([(pair.id, pair.place) for pair in pairs])
    return pairs


def _pair_line(content: Mapping[str, Any], place: str, id: str, folder: Path) -> PairLine:
    if not any(side in content for side in _SIDES):
        raise PromptFileError(
            f"{place}: pairs of prompts are needed, clean and corrupted; got {brief(content)}",
            hint='write {"clean": "...", "corrupted": "...", "answer": " x", "wrong": " y"}',
        )
    refuse_unknown(content, _KEYS, place, "a pair")
    name = id_of(content, id, place)
    clean, corrupted = (_side(content, side, place, name, folder) for side in _SIDES)
    if corrupted.answer is not None:
        raise PromptFileError(
            f"{place}: the answer of a pair is that of its clean prompt; the corrupted one has "
            f"one too",
            hint='what the corrupted prompt calls for is "wrong"',
        )
    answer = answer_of(content, "answer", place)
    if answer is not None and clean.answer is not None:
        raise PromptFileError(f"{place}: a pair has one answer; its clean prompt has another")
    wrong = answer_of(content, "wrong", place)
    answer = clean.answer if answer is None else answer
    return PairLine(place, replace(clean, answer=None), corrupted, answer, wrong, name)


def _side(content: Mapping[str, Any], side: str, place: str, id: str, folder: Path) -> Line:
    value = content.get(side)
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise PromptFileError(
            f"{place}: {side} must be a text or a prompt; got {brief(value)}",
            hint=f'write {{"{side}": "..."}} or {{"{side}": {{"text": "...", "spans": {{}}}}}}',
        )
    if "id" in value:
        raise PromptFileError(f"{place}: a pair has one id; its {side} prompt has another")
    return line_of(value, f"{place}, {side}", id, folder)


def to_pairs(lines: Sequence[PairLine], model: "Model") -> list[PromptPair]:
    """Tokenise pairs for a model.

    Raises:
        PromptFileError: see `interp.promptfile.to_prompts`; or the prompts of a pair do not have
            equally many tokens, or answer and wrong answer begin with the same one.
    """
    return [_pair(line, model) for line in lines]


def _pair(line: PairLine, model: "Model") -> PromptPair:
    [clean], [other] = to_prompts([line.clean], model), to_prompts([line.corrupted], model)
    if len(clean) != len(other):
        raise PromptFileError(
            f"{line.place}: clean and corrupted must have equally many tokens; got {len(clean)} "
            f"and {len(other)}",
            hint=_parting(clean, other, model),
        )
    answer = tokens_of(line.answer, line.place, model, "the answer")
    wrong = tokens_of(line.wrong, line.place, model, "the wrong answer")
    if answer and wrong and answer[0] == wrong[0]:
        raise PromptFileError(
            f"{line.place}: answer and wrong must begin with different tokens, of which the first "
            f"is measured; both begin with {_shown(answer[:1], model)}",
            hint="choose others, or leave the common beginning to the prompts",
        )
    meta = {} if wrong is None else {"wrong": wrong[0]}
    spans = {k: v for k, v in clean.spans.items() if k != "bos"} | dict(other.spans)
    try:
        return PromptPair(
            replace(clean, answer=answer, meta={**clean.meta, **meta}),
            replace(other, answer=answer, meta={**other.meta, **meta}, spans=spans),
        )
    except InputError as error:
        raise PromptFileError(f"{line.place}: {error}", hint=error.hint) from error


def _parting(clean: Prompt, other: Prompt, model: "Model") -> str:
    """Where two prompts begin to differ."""
    both = enumerate(zip(clean.tokens, other.tokens, strict=False))
    at = next((i for i, (a, b) in both if a != b), min(len(clean), len(other)))
    a, b = (_shown(p.tokens[at : at + 3], model) for p in (clean, other))
    return f"they part at token {at}: {a} and {b}; choose words of equally many tokens"


def _shown(tokens: Sequence[int], model: "Model") -> str:
    if not tokens:
        return "the end"
    if model.tokenizer is None:
        return " ".join(map(str, tokens))
    return " ".join(repr(model.tokenizer.decode([t])) for t in tokens)
