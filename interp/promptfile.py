r"""Prompts from a file: one a line, as plain text or as JSON with spans.

Plain text is one prompt a line. JSONL is one mapping a line, with text

    {"text": "The code is 7141. What is the code?", "answer": " 7141", "id": "a",
     "spans": {"needle": "7141", "question": [[18, 35]]}}

where a span is given by ranges of characters or by a piece that stands in the text exactly once,
or with token ids, where spans are ranges of tokens:

    {"tokens": [1, 5, 9, 9], "spans": {"needle": [[1, 3]]}, "answer": [9]}

An answer in text is tokenised as it stands: write the space it begins with. Blank lines are
skipped. A file is JSONL if its name says so (.jsonl, .ndjson, .json) or if it is not a .txt file
and begins with a brace; `-` is the standard input.

`read_file` parses, without a model; `to_prompts` tokenises. Every error is a line: file, number of
the line, what must hold, what came.
"""

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import PromptFileError
from interp.prompts import Prompt, Range

if TYPE_CHECKING:
    from interp.model import Model

STDIN = "-"
_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_KEYS = ("text", "tokens", "spans", "answer", "id")


@dataclass(frozen=True)
class Line:
    """One prompt as its file has it.

    Attributes:
        place: file and line, for error texts.
        text: the text, or None where there are tokens.
        tokens: token ids, or None where there is text.
        spans: name to ranges, of characters of the text or of tokens.
        answer: text or token ids, if any.
        id: name of the prompt; `line-N` unless the file names it.
    """

    place: str
    text: str | None
    tokens: tuple[int, ...] | None
    spans: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    answer: str | tuple[int, ...] | None = None
    id: str = ""


def read_prompts(path: str | Path, model: "Model") -> list[Prompt]:
    """Prompts of a file, or of the standard input for `-`, as a model reads them.

    Raises:
        PromptFileError: see `read_file` and `to_prompts`.
    """
    return to_prompts(read_file(path), model)


def read_file(path: str | Path) -> list[Line]:
    """The prompts of a file, or of the standard input for `-`, not yet tokenised.

    Raises:
        PromptFileError: no such file, not UTF-8, empty, or a line that is not a prompt.
    """
    if str(path) == STDIN:
        return parse(sys.stdin.buffer.read(), "<stdin>")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise PromptFileError(f"prompts must be in a file; {path}: {reason}") from error
    return parse(data, str(path))


def parse(data: bytes, name: str) -> list[Line]:
    """The prompts in the bytes of a file.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: how errors call the file; its suffix says what it holds.

    Raises:
        PromptFileError: the bytes are not prompts.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise PromptFileError(
            f"{name}, line {number}: prompts must be UTF-8; got byte 0x{data[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from None
    # Only "\n" ends a line: other separators may stand inside a JSON string.
    lines = [(i, x.removesuffix("\r")) for i, x in enumerate(text.split("\n"), 1) if x.strip()]
    if not lines:
        raise PromptFileError(f"{name}: a prompt file must hold at least one prompt; it is empty")
    structured = name.lower().endswith(_JSON_NAMES) or (
        not name.lower().endswith(".txt") and lines[0][1].lstrip().startswith("{")
    )
    read = _from_json if structured else _from_text
    prompts = [read(line, f"{name}, line {number}", f"line-{number}") for number, line in lines]
    first: dict[str, Line] = {}
    for prompt in prompts:
        if prompt.id in first:
            raise PromptFileError(
                f"{prompt.place}: ids must all be different; {prompt.id!r} is also the id of "
                f"{first[prompt.id].place}"
            )
        first[prompt.id] = prompt
    return prompts


def to_prompts(lines: Sequence[Line], model: "Model") -> list[Prompt]:
    """Tokenise prompts for a model; `bos` becomes a span where a prompt begins with it.

    Raises:
        PromptFileError: a text without tokenizer, a span that holds no token, token ids that the
            model does not have.
    """
    return [_prompt(line, model) for line in lines]


def _from_text(line: str, place: str, id: str) -> Line:
    return Line(place, line, None, id=id)


def _from_json(line: str, place: str, id: str) -> Line:
    content = _mapping(line, place)
    for key in content:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_KEYS)}"
            raise PromptFileError(f"{place}: there is no key {key!r} in a prompt", hint=hint)
    if ("text" in content) == ("tokens" in content):
        came = "both" if "text" in content else "neither"
        raise PromptFileError(f"{place}: a prompt has either text or tokens; got {came}")
    text = content.get("text")
    if text is not None and (not isinstance(text, str) or not text):
        raise PromptFileError(f"{place}: text must be a text that is not empty; got {_brief(text)}")
    tokens = _ids(content["tokens"], place, "tokens") if "tokens" in content else None
    body: str | tuple[int, ...] | None = text if tokens is None else tokens
    if body is None:
        raise PromptFileError(f"{place}: text must be a text that is not empty; got null")
    answer = content.get("answer")
    if answer is not None and not (isinstance(answer, str) and answer):
        answer = _ids(answer, place, "answer")
    name = content.get("id", id)
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise PromptFileError(f"{place}: id must be a text or a number; got {_brief(name)}")
    return Line(place, text, tokens, _spans(content.get("spans"), body, place), answer, str(name))


def _mapping(line: str, place: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise PromptFileError(f"{place}: a key may stand once; {twice[0]!r} stands twice")
        return dict(pairs)

    try:
        content = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise PromptFileError(
            f"{place}: every line must be JSON; column {error.colno}: {error.msg.lower()}",
            hint="one mapping a line; plain text prompts belong in a .txt file",
        ) from None
    except RecursionError:
        raise PromptFileError(f"{place}: every line must be JSON; it is nested too deep") from None
    if not isinstance(content, dict):
        raise PromptFileError(
            f"{place}: every line must be a JSON mapping; got {_brief(content)}",
            hint='write {"text": "..."}',
        )
    return content


def _ids(value: Any, place: str, key: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_whole(x) and x >= 0 for x in value):
        what = "token ids" if key == "tokens" else "a text or token ids"
        raise PromptFileError(f"{place}: {key} must be {what}, at least one; got {_brief(value)}")
    return tuple(value)


def _spans(value: Any, body: str | tuple[int, ...], place: str) -> dict[str, tuple[Range, ...]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PromptFileError(
            f"{place}: spans must map names to lists of ranges; got {_brief(value)}",
            hint='write {"needle": [[start, stop]]}',
        )
    spans = {}
    for name, given in value.items():
        if name in ("", "all"):
            raise PromptFileError(f"{place}: a span cannot be called {name!r}; choose another name")
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list) or not items:
            raise PromptFileError(
                f"{place}: span {name!r} must be a list of ranges [start, stop]; got "
                f"{_brief(given)}"
            )
        spans[name] = tuple(_range(item, body, f"{place}: span {name!r}") for item in items)
    return spans


def _range(item: Any, body: str | tuple[int, ...], where: str) -> Range:
    if isinstance(item, str) and isinstance(body, str):
        times = sum(body.startswith(item, at) for at in range(len(body))) if item else 0
        if times != 1:
            raise PromptFileError(
                f"{where} must stand in the text exactly once; {_brief(item)} stands there "
                f"{times} times",
                hint="give its characters as [start, stop]",
            )
        start = body.index(item)
        return start, start + len(item)
    if not isinstance(item, list) or len(item) != 2 or not all(map(_whole, item)):
        raise PromptFileError(f"{where} must be ranges [start, stop]; got {_brief(item)}")
    start, stop = item
    if not 0 <= start < stop <= len(body):
        unit = "characters" if isinstance(body, str) else "tokens"
        raise PromptFileError(
            f"{where} must lie within the {len(body)} {unit} of its prompt; got {start}:{stop}"
        )
    return start, stop


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _prompt(line: Line, model: "Model") -> Prompt:
    spans: Mapping[str, tuple[Range, ...]]
    if line.tokens is not None:
        tokens, spans = line.tokens, line.spans
    else:
        assert line.text is not None
        tokens, spans = _tokenised(line, line.text, model)
    answer = line.answer
    if isinstance(answer, str):
        encoded = _call(line, model, answer, add_special_tokens=False)
        answer = tuple(encoded.input_ids)
    for ids, what in ((tokens, "the prompt"), (answer, "the answer")):
        if ids is not None and not ids:
            raise PromptFileError(f"{line.place}: {what} must hold at least one token; got none")
        if ids and not 0 <= min(ids) <= max(ids) < model.vocabulary:
            raise PromptFileError(
                f"{line.place}: token ids must lie in 0..{model.vocabulary - 1} for {model.name}; "
                f"{what} has {max(ids)}"
            )
    if tokens[0] == model.bos_id:
        spans = {"bos": ((0, 1),), **spans}
    return Prompt(tokens, spans, id=line.id, answer=answer)


def _tokenised(
    line: Line, text: str, model: "Model"
) -> tuple[tuple[int, ...], dict[str, tuple[Range, ...]]]:
    """Token ids of a text, and the ranges of tokens that its ranges of characters touch."""
    if not line.spans:
        return tuple(_call(line, model, text).input_ids), {}
    if model.tokenizer is not None and not getattr(model.tokenizer, "is_fast", False):
        raise PromptFileError(
            f"{line.place}: spans in text need a tokenizer that says where its tokens stand; that "
            f"of {model.name} does not",
            hint="give tokens instead of text, with spans in tokens",
        )
    encoded = _call(line, model, text, return_offsets_mapping=True)
    spans = {
        name: tuple(_cover(encoded.offset_mapping, r, f"{line.place}: span {name!r}") for r in rs)
        for name, rs in line.spans.items()
    }
    return tuple(encoded.input_ids), spans


def _cover(offsets: Sequence[Range], characters: Range, where: str) -> Range:
    start, stop = characters
    # Special tokens stand nowhere in the text: their range is 0:0, which touches nothing.
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if not inside:
        raise PromptFileError(
            f"{where} must touch at least one token; characters {start}:{stop} touch none"
        )
    return inside[0], inside[-1] + 1


def _call(line: Line, model: "Model", text: str, **options: bool) -> Any:
    tokenizer: Callable[..., Any] | None = model.tokenizer
    if tokenizer is None:
        raise PromptFileError(
            f"{line.place}: text needs a tokenizer and {model.name} has none",
            hint='give token ids: {"tokens": [1, 2, 3]}',
        )
    try:
        return tokenizer(text, **options)
    except Exception as error:  # noqa: BLE001 - tokenizers without <unk> raise a bare Exception
        raise PromptFileError(
            f"{line.place}: the tokenizer of {model.name} must know the text; it says: {error}"
        ) from None
