"""Ranges of characters of a text with images, as ranges of tokens.

A processor writes many placeholders where the text has one, which moves everything after it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from interp.errors import InputError, SpanError
from interp.prompts import Range

Characters = Mapping[str, Sequence[Range]]
"""Name to ranges of characters."""


def placed(
    wanted: Characters, replaced: Sequence[Mapping[str, Any]], text: str, mark: str
) -> dict[str, list[Range]]:
    """Ranges in the text with all its placeholders written out.

    Args:
        wanted: ranges in the text as given.
        replaced: for each placeholder, its range before (`span`) and after (`new_span`).
        text: the text as given.
        mark: what a placeholder is in it.

    Raises:
        SpanError: a range lies outside the text.
    """
    places = [i for i in range(len(text)) if text.startswith(mark, i)] if mark else []
    grown = [
        (at, at + len(mark), r["new_span"][1] - r["new_span"][0])
        for at, r in zip(places, replaced, strict=False)
    ]

    def moved(at: int, *, stop: bool) -> int:
        total = at
        for start, end, length in grown:
            if at >= end or (stop and at > start):
                total += length - (end - start)
        return total

    out: dict[str, list[Range]] = {}
    for name, found in wanted.items():
        for start, stop in found:
            if not 0 <= start < stop <= len(text):
                raise SpanError(
                    f"span {name!r} must lie within the {len(text)} characters of its text; got "
                    f"{start}:{stop}"
                )
            out.setdefault(name, []).append((moved(start, stop=False), moved(stop, stop=True)))
    return out


def covered(
    moved: Mapping[str, Sequence[Range]],
    offsets: Sequence[Sequence[int]],
    tokens: Sequence[int],
    tokenizer: Any,
    text: str,
    wanted: Characters,
) -> dict[str, tuple[Range, ...]]:
    """Tokens that ranges of characters touch.

    What the tokens say is compared with the text, since a processor may add words of its own.

    Raises:
        SpanError: a range touches no token.
        InputError: the tokens found say something else.
    """
    out = {}
    for name, found in moved.items():
        made = []
        for (start, stop), (a, b) in zip(found, wanted[name], strict=True):
            inside = [i for i, (x, y) in enumerate(offsets) if x < stop and y > start]
            if not inside:
                raise SpanError(
                    f"span {name!r} must touch at least one token; {text[a:b]!r} touches none"
                )
            said = "".join(tokenizer.decode(list(tokens[inside[0] : inside[-1] + 1])).split())
            if "".join(text[a:b].split()) not in said:
                raise InputError(
                    f"span {name!r} of a text with images cannot be found again in its tokens",
                    hint="give token ids, or mark the span by a box",
                )
            made.append((inside[0], inside[-1] + 1))
        out[name] = tuple(made)
    return out
