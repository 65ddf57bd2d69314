r"""Labelled prompts: the prompt files of `interp.promptfile` with a label, and a group, a line.

    {"text": "Lyon lies in France.", "label": true, "group": "Lyon"}
    {"tokens": [1, 5, 9], "label": 0}

Groups hold prompts that are no independent evidence, such as the answers to one question; either
every line has one or none has.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from interp.errors import PromptFileError

if TYPE_CHECKING:
    from interp.promptfile import Line

Label = str | int | float | bool


@dataclass(frozen=True)
class Labelled:
    """Prompts with labels, not yet tokenised.

    Attributes:
        lines: the prompts.
        labels: one per prompt.
        groups: one per prompt, or None.
    """

    lines: "tuple[Line, ...]"
    labels: tuple[Label, ...]
    groups: tuple[str, ...] | None

    def towards(self, text: str | None) -> Label | None:
        """The label that a command line means.

        Raises:
            PromptFileError: no line has it.
        """
        if text is None:
            return None
        known = {word(x): x for x in self.labels}
        if text not in known:
            raise PromptFileError(f"--towards must be a label; {text!r} is none of "
                                  f"{', '.join(sorted(known))}")  # fmt: skip
        return known[text]


def read_labelled(path: Path) -> Labelled:
    """The labelled prompts of a file, or of the standard input for `-`.

    Raises:
        PromptFileError: no such file, or a line that is not a labelled prompt.
    """
    from interp.promptfile import STDIN, parse

    name = "<stdin>" if str(path) == STDIN else str(path)
    try:
        data = sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except OSError as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise PromptFileError(f"prompts must be in a file; {path}: {why}") from error
    rows = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found: list[tuple[str, dict[str, object]]] = []
    for i, row in enumerate(rows):
        taken = _taken(row)
        if taken is not None:
            found.append((f"{name}, line {i + 1}", taken[1]))
            rows[i] = taken[0]
    # Lines that are no JSON mapping are left as they are: the reader of prompts says what is wrong.
    lines = parse(b"\n".join(rows), name if name.endswith(("l", "json")) else f"{name}.jsonl")
    labels, groups = [], []
    for place, marks in found:
        label = marks.get("label")
        if not isinstance(label, str | int | float | bool):
            raise PromptFileError(f"{place}: a line needs a label, a text or a number; got "
                                  f"{json.dumps(label)}")  # fmt: skip
        labels.append(label)
        if "group" in marks:
            groups.append(str(marks["group"]))
    if len({word(x) for x in labels}) < 2:
        raise PromptFileError(f"{name}: at least two labels are needed; got "
                              f"{word(labels[0]) if labels else 'none'}")  # fmt: skip
    if groups and len(groups) != len(labels):
        raise PromptFileError(
            f"{name}: every line has a group or none has; {len(groups)} of {len(labels)} have one"
        )
    return Labelled(tuple(lines), tuple(labels), tuple(groups) or None)


def _taken(row: bytes) -> tuple[bytes, dict[str, object]] | None:
    """A line without its marks, and the marks; None for lines that are no JSON mapping."""
    doubled: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in items]
        doubled.extend(key for key in keys if keys.count(key) > 1)
        return dict(items)

    try:
        content = json.loads(row, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or doubled:
        return None
    marks = {key: content.pop(key) for key in ("label", "group") if key in content}
    return json.dumps(content).encode(), marks


def word(label: Label) -> str:
    """A label as a command line writes it."""
    return str(label).lower() if isinstance(label, bool) else str(label)
