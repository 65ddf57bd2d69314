"""The page of measured numbers: a block for each script, with the command that made it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def put(name: str, lines: Sequence[str]) -> None:
    """Put lines, and the command that this process was started with, into the block of a name."""
    text = PAGE.read_text() if PAGE.exists() else "# Benchmarks\n"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    command = shlex.join(["python", *sys.argv])
    block = "\n".join([begin, f"`{command}`", "", *lines, end])
    if begin in text:
        head, rest = text.split(begin, 1)
        text = head + block + rest.split(end, 1)[1]
    else:
        text += f"\n## {name.capitalize()}\n\n{block}\n"
    PAGE.write_text(text)
