r"""Prompts from a file: one a line, as plain text or as JSON with spans.

Plain text is one prompt a line. JSONL is one mapping a line, with text

    {"text": "The code is 7141. What is the code?", "answer": " 7141", "id": "a",
     "spans": {"needle": "7141", "question": [[18, 35]]}}

where a span is given by ranges of characters or by a piece that stands in the text exactly once,
or with token ids, where spans are ranges of tokens:

    {"tokens": [1, 5, 9, 9], "spans": {"needle": [[1, 3]]}, "answer": [9]}

or with images, whose paths are relative to the file, and boxes on them in pixels (left, top,
right, bottom), each a span of the tokens that look at it:

    {"image": "cat.png", "text": "What is this?", "boxes": {"ear": [10, 4, 31, 25]}}
    {"images": ["a.png", "b.png"], "text": "<image> and <image>", "boxes": {"x": [1, [0, 0, 8, 8]]}}

where [1, box] is a box on the second image. A vision transformer alone needs no text.

An answer in text is tokenised as it stands: write the space it begins with. Blank lines are
skipped. A file is JSONL if its name says so (.jsonl, .ndjson, .json) or if it is not a .txt file
and begins with a brace; `-` is the standard input.

`read_file` parses, without a model; `to_prompts` tokenises. Every error is a line: file, number of
the line, what must hold, what came.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, PromptFileError
from interp.images.lines import Box, boxes_of, check_placeholders, check_read, images_of
from interp.jsonlines import (
    STDIN,
    answer_of,
    brief,
    bytes_of,
    id_of,
    ids_of,
    mapping_of,
    numbered,
    refuse_doubles,
    refuse_unknown,
    whole,
)
from interp.prompts import Prompt, Range

if TYPE_CHECKING:
    from interp.model import Model

_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_KEYS = ("text", "tokens", "spans", "answer", "id", "image", "images", "boxes")


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
        images: files of its images.
        boxes: name to image and box in its pixels.
    """

    place: str
    text: str | None
    tokens: tuple[int, ...] | None
    spans: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    answer: str | tuple[int, ...] | None = None
    id: str = ""
    images: tuple[Path, ...] = ()
    boxes: Mapping[str, tuple[int, Box]] = field(default_factory=dict)


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
    return parse(*bytes_of(path))


def parse(data: bytes, name: str) -> list[Line]:
    """The prompts in the bytes of a file.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: how errors call the file; its suffix says what it holds, and images are looked for
            in its folder.

    Raises:
        PromptFileError: the bytes are not prompts.
    """
    lines = numbered(data, name)
    structured = name.lower().endswith(_JSON_NAMES) or (
        not name.lower().endswith(".txt") and lines[0][1].lstrip().startswith("{")
    )
    read = _from_json if structured else _from_text
    folder = Path(name).parent
    prompts = [
        read(line, f"{name}, line {number}", f"line-{number}", folder) for number, line in lines
    ]
    refuse_doubles([(prompt.id, prompt.place) for prompt in prompts])
    return prompts


def to_prompts(lines: Sequence[Line], model: "Model") -> list[Prompt]:
    """Tokenise prompts for a model; `bos` becomes a span where a prompt begins with it.

    Raises:
        PromptFileError: a text without tokenizer, a span that holds no token, token ids that the
            model does not have, images or none where the model reads other things, or a
            placeholder of an image without one.
    """
    return [_prompt(line, model) for line in lines]


def _from_text(line: str, place: str, id: str, folder: Path) -> Line:
    return Line(place, line, None, id=id)


def _from_json(line: str, place: str, id: str, folder: Path) -> Line:
    return line_of(mapping_of(line, place), place, id, folder)


def line_of(content: Mapping[str, Any], place: str, id: str, folder: Path) -> Line:
    """One prompt from the mapping that says it.

    Args:
        content: the mapping.
        place: for error texts.
        id: its name unless the mapping has one.
        folder: where its images are looked for.

    Raises:
        PromptFileError: it does not say a prompt.
    """
    refuse_unknown(content, _KEYS, place, "a prompt")
    images = images_of(content, folder, place)
    boxes = boxes_of(content, len(images), place)
    alone = bool(images) and "text" not in content and "tokens" not in content
    if ("text" in content) == ("tokens" in content) and not alone:
        came = "both" if "text" in content else "neither"
        raise PromptFileError(f"{place}: a prompt has either text or tokens; got {came}")
    text = content.get("text")
    if text is not None and (not isinstance(text, str) or not text):
        raise PromptFileError(f"{place}: text must be a text that is not empty; got {brief(text)}")
    tokens = ids_of(content["tokens"], place, "tokens") if "tokens" in content else None
    if images and tokens is not None:
        raise PromptFileError(
            f"{place}: images belong to a text; got tokens",
            hint="the processor writes the tokens of an image into the text",
        )
    body: str | tuple[int, ...] | None = text if tokens is None else tokens
    if alone:
        body = ""
    if body is None:
        raise PromptFileError(f"{place}: text must be a text that is not empty; got null")
    answer = answer_of(content, "answer", place)
    spans = _spans(content.get("spans"), body, place)
    if images and isinstance(answer, tuple):
        raise PromptFileError(f"{place}: the answer to an image must be a text; got token ids")
    return Line(place, text, tokens, spans, answer, id_of(content, id, place), images, boxes)


def _spans(value: Any, body: str | tuple[int, ...], place: str) -> dict[str, tuple[Range, ...]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PromptFileError(
            f"{place}: spans must map names to lists of ranges; got {brief(value)}",
            hint='write {"needle": [[start, stop]]}',
        )
    spans = {}
    for name, given in value.items():
        if name in ("", "all"):
            raise PromptFileError(f"{place}: a span cannot be called {name!r}; choose another name")
        items = [given] if isinstance(given, str) else given
        if not isinstance(items, list) or not items:
            raise PromptFileError(
                f"{place}: span {name!r} must be a list of ranges [start, stop]; got {brief(given)}"
            )
        spans[name] = tuple(_range(item, body, f"{place}: span {name!r}") for item in items)
    return spans


def _range(item: Any, body: str | tuple[int, ...], where: str) -> Range:
    if isinstance(item, str) and isinstance(body, str):
        times = sum(body.startswith(item, at) for at in range(len(body))) if item else 0
        if times != 1:
            raise PromptFileError(
                f"{where} must stand in the text exactly once; {brief(item)} stands there "
                f"{times} times",
                hint="give its characters as [start, stop]",
            )
        start = body.index(item)
        return start, start + len(item)
    if not isinstance(item, list) or len(item) != 2 or not all(map(whole, item)):
        raise PromptFileError(f"{where} must be ranges [start, stop]; got {brief(item)}")
    start, stop = item
    if not 0 <= start < stop <= len(body):
        unit = "characters" if isinstance(body, str) else "tokens"
        raise PromptFileError(
            f"{where} must lie within the {len(body)} {unit} of its prompt; got {start}:{stop}"
        )
    return start, stop


def _prompt(line: Line, model: "Model") -> Prompt:
    written = line.text is not None or line.tokens is not None
    check_read(model, len(line.images), written=written, place=line.place)
    if line.images:
        return _with_images(line, model)
    spans: Mapping[str, tuple[Range, ...]]
    if line.tokens is not None:
        tokens, spans = line.tokens, line.spans
    else:
        assert line.text is not None
        tokens, spans = _tokenised(line, line.text, model)
    _inside(tokens, line.place, model, "the prompt")
    check_placeholders(tokens, model, line.place)
    answer = tokens_of(line.answer, line.place, model, "the answer")
    if tokens[0] == model.bos_id:
        spans = {"bos": ((0, 1),), **spans}
    return Prompt(tokens, spans, id=line.id, answer=answer)


def tokens_of(
    value: str | tuple[int, ...] | None, place: str, model: "Model", what: str
) -> tuple[int, ...] | None:
    """The token ids of an answer: its own, or those of its text as it stands.

    Args:
        value: the answer, if there is one.
        place: for error texts.
        model: the model.
        what: what it is called in error texts.

    Raises:
        PromptFileError: it has no token, or one that the model does not have.
    """
    if isinstance(value, str):
        value = tuple(_call(place, model, value, add_special_tokens=False).input_ids)
    if value is not None:
        _inside(value, place, model, what)
    return value


def _inside(ids: tuple[int, ...], place: str, model: "Model", what: str) -> None:
    if not ids:
        raise PromptFileError(f"{place}: {what} must hold at least one token; got none")
    if not 0 <= min(ids) <= max(ids) < model.vocabulary:
        raise PromptFileError(
            f"{place}: token ids must lie in 0..{model.vocabulary - 1} for {model.name}; "
            f"{what} has {max(ids)}"
        )


def _with_images(line: Line, model: "Model") -> Prompt:
    from interp.images.prompt import image_prompt

    assert line.answer is None or isinstance(line.answer, str)
    try:
        return image_prompt(
            model, line.text, line.images, boxes=line.boxes, spans=line.spans, answer=line.answer,
            id=line.id,
        )  # fmt: skip
    except InputError as error:
        raise PromptFileError(f"{line.place}: {error}", hint=error.hint) from error


def _tokenised(
    line: Line, text: str, model: "Model"
) -> tuple[tuple[int, ...], dict[str, tuple[Range, ...]]]:
    """Token ids of a text, and the ranges of tokens that its ranges of characters touch."""
    if not line.spans:
        return tuple(_call(line.place, model, text).input_ids), {}
    if model.tokenizer is not None and not getattr(model.tokenizer, "is_fast", False):
        raise PromptFileError(
            f"{line.place}: spans in text need a tokenizer that says where its tokens stand; that "
            f"of {model.name} does not",
            hint="give tokens instead of text, with spans in tokens",
        )
    encoded = _call(line.place, model, text, return_offsets_mapping=True)
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


def _call(place: str, model: "Model", text: str, **options: bool) -> Any:
    tokenizer: Callable[..., Any] | None = model.tokenizer
    if tokenizer is None:
        raise PromptFileError(
            f"{place}: text needs a tokenizer and {model.name} has none",
            hint='give token ids: {"tokens": [1, 2, 3]}',
        )
    try:
        return tokenizer(text, **options)
    except Exception as error:  # noqa: BLE001 - tokenizers without <unk> raise a bare Exception
        raise PromptFileError(
            f"{place}: the tokenizer of {model.name} must know the text; it says: {error}"
        ) from None


__all__ = [
    "STDIN",
    "Line",
    "line_of",
    "parse",
    "read_file",
    "read_prompts",
    "to_prompts",
    "tokens_of",
]
