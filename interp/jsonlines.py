"""Lines of JSON that people wrote: every mistake is one line with its file and number."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.errors import PromptFileError

STDIN = "-"


def bytes_of(path: str | Path) -> tuple[bytes, str]:
    """What a file, or the standard input for `-`, holds, and its name in error texts.

    Raises:
        PromptFileError: there is no such file, or it cannot be read.
    """
    if str(path) == STDIN:
        return sys.stdin.buffer.read(), "<stdin>"
    try:
        return Path(path).read_bytes(), str(path)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise PromptFileError(f"prompts must be in a file; {path}: {reason}") from error


def numbered(data: bytes, name: str) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
        PromptFileError: not UTF-8, or no line.
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
    return lines


def refuse_doubles(ids: Sequence[tuple[str, str]]) -> None:
    """Refuse ids, each with its place, of which one comes twice.

    Raises:
        PromptFileError: one does.
    """
    first: dict[str, str] = {}
    for id, place in ids:
        if id in first:
            raise PromptFileError(
                f"{place}: ids must all be different; {id!r} is also the id of {first[id]}"
            )
        first[id] = place


def refuse_unknown(content: Mapping[str, Any], keys: Sequence[str], place: str, what: str) -> None:
    """Refuse a mapping with a key that it cannot have.

    Raises:
        PromptFileError: it has one; the hint names the nearest.
    """
    for key in content:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}"
            raise PromptFileError(f"{place}: there is no key {key!r} in {what}", hint=hint)


def mapping_of(line: str, place: str) -> dict[str, Any]:
    """The mapping that a line of JSON is; each key stands once.

    Raises:
        PromptFileError: the line is something else.
    """

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
    except PromptFileError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise PromptFileError(f"{place}: every line must be JSON; {error}") from None
    if not isinstance(content, dict):
        raise PromptFileError(
            f"{place}: every line must be a JSON mapping; got {brief(content)}",
            hint='write {"text": "..."}',
        )
    return content


def id_of(content: Mapping[str, Any], id: str, place: str) -> str:
    """The id that a mapping says, or another.

    Raises:
        PromptFileError: it is neither a text nor a number.
    """
    name = content.get("id", id)
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise PromptFileError(f"{place}: id must be a text or a number; got {brief(name)}")
    return str(name)


def answer_of(content: Mapping[str, Any], key: str, place: str) -> str | tuple[int, ...] | None:
    """What a mapping says under a key that holds an answer: text, token ids, or nothing.

    Raises:
        PromptFileError: it is neither.
    """
    answer = content.get(key)
    if answer is None or (isinstance(answer, str) and answer):
        return answer
    return ids_of(answer, place, key)


def ids_of(value: Any, place: str, key: str) -> tuple[int, ...]:
    """Token ids from a list of numbers.

    Raises:
        PromptFileError: it is no such list.
    """
    if not isinstance(value, list) or not value or not all(whole(x) and x >= 0 for x in value):
        what = "token ids" if key == "tokens" else "a text or token ids"
        raise PromptFileError(f"{place}: {key} must be {what}, at least one; got {brief(value)}")
    return tuple(value)


def whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def brief(value: Any) -> str:
    """A value as JSON, cut to fit a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
