"""Tables on stdout: for people on a terminal, for programs everywhere else.

`auto` is a drawn table on a terminal and TSV in a pipe. Numbers are written so that they read back
exactly; what is undefined is null in JSON and empty in CSV and TSV. JSON is one document with the
name and version of its schema; JSONL is one row a line.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.exits import PIPE

VERSION = 1
SHOWN = 20
"""Rows of a part that a drawn table shows unless told otherwise."""


class Format(StrEnum):
    """How a table is written."""

    auto = "auto"
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"


@dataclass(frozen=True)
class Part:
    """Rows that are drawn together.

    Attributes:
        title: line above the drawn table.
        rows: column to value; None is undefined.
        strong: numbers of the rows to stress.
        note: line below the drawn table.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    strong: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """What a command answers.

    Attributes:
        schema: name of the JSON schema, such as `headscope.rank`.
        columns: names of the columns, in order.
        parts: the rows.
        about: further facts for the JSON document.
        hidden: columns that a drawn table leaves out.
        limit: most rows of a part to draw; None draws all.
    """

    schema: str
    columns: Sequence[str]
    parts: Sequence[Part]
    about: Mapping[str, Any] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    limit: int | None = SHOWN

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, part after part."""
        return [{c: row.get(c) for c in self.columns} for part in self.parts for row in part.rows]


def write(table: Table, format: Format = Format.auto) -> bool:
    """Write a table to stdout; returns whether it was drawn for people, notes included.

    Raises:
        typer.Exit: the reader went away; the code is 141.
    """
    if format is Format.auto:
        format = Format.table if sys.stdout.isatty() else Format.tsv
    emit(_WRITERS[format](table))
    return format is Format.table


def emit(text: str) -> None:
    """Write text to stdout at once; a reader that goes away ends the command quietly.

    Raises:
        typer.Exit: the reader went away; the code is 141.
    """
    import typer

    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE) from None


def _json(table: Table) -> str:
    from interp.files import jsonable

    content = {"schema": table.schema, "version": VERSION, **table.about, "rows": table.rows}
    return json.dumps(jsonable(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _jsonl(table: Table) -> str:
    from interp.files import jsonable

    lines = [json.dumps(jsonable(r), allow_nan=False, ensure_ascii=False) for r in table.rows]
    return "".join(f"{line}\n" for line in lines)


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([_plain(row[c]) for c in table.columns] for row in table.rows)
    return out.getvalue()


def _tsv(table: Table) -> str:
    lines = [table.columns, *([_plain(row[c]) for c in table.columns] for row in table.rows)]
    # A cell cannot hold the two signs that divide cells and rows.
    return "".join("\t".join(" ".join(c.split()) for c in cells) + "\n" for cells in lines)


def _plain(value: Any) -> str:
    if value is None or value != value:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _drawn(table: Table) -> str:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    plain = os.environ.get("TERM") in ("dumb", "unknown")
    out = io.StringIO()
    # Outside a terminal nothing may be cut to fit a width.
    console = Console(
        file=out,
        force_terminal=terminal and not plain,
        width=None if terminal else 10_000,
        highlight=False,
    )
    for part in table.parts:
        _draw(console, table, part)
    return out.getvalue()


def _draw(console: Any, table: Table, part: Part) -> None:
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    shown = [c for c in table.columns if c not in table.hidden]
    # Above the table, not in it: its width is that of the columns, and the title would be broken.
    console.print(Text(part.title, style="italic"), soft_wrap=True)
    drawn = Drawn(box=box.SIMPLE_HEAD, expand=False)
    for name in shown:
        numeric = all(isinstance(row.get(name), int | float | None) for row in part.rows)
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    rows = part.rows if table.limit is None else part.rows[: table.limit]
    for i, row in enumerate(rows):
        # Text, never markup: a token or a path may hold brackets.
        cells = [Text(_rounded(row.get(name))) for name in shown]
        drawn.add_row(*cells, style="bold green" if i in part.strong else None)
    console.print(drawn)
    left = len(part.rows) - len(rows)
    more = f"{left} more rows: --top {len(part.rows)}, or --format tsv" if left else ""
    for line in filter(None, (more, part.note)):
        console.print(Text(f"  {line}"), soft_wrap=True)


def _rounded(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_WRITERS: Mapping[Format, Callable[[Table], str]] = {
    Format.table: _drawn,
    Format.json: _json,
    Format.jsonl: _jsonl,
    Format.csv: _csv,
    Format.tsv: _tsv,
}
