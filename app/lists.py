"""`headscope list`: what there is to choose from."""

from collections.abc import Sequence
from typing import Annotated

import typer

from app import options as o
from app.catalog import KINDS, Entry, entries
from app.exits import UsageError
from app.tables import Format, Part, Table, write
from interp.errors import UnknownNameError

_WORDS = {
    "detectors": "detector", "tasks": "task", "zoo": "zoo model", "methods": "method",
    "metrics": "metric", "probes": "probe", "makers": "recipe maker", "ops": "op",
}  # fmt: skip
_COLUMNS = ("kind", "name", "summary", "params", "task", "citation")


def listing(
    what: Annotated[
        str | None, typer.Argument(help=f"{', '.join(_WORDS)}; everything if absent.")
    ] = None,
    format: o.Formatted = Format.auto,
    debug: o.Debug = False,
) -> None:
    """List what there is to choose from.

    Detectors, tasks, zoo models, methods, metrics, probes, recipe makers and ops.
    """
    if what is not None and what not in _WORDS:
        raise UnknownNameError("list", what, _WORDS)
    kinds = KINDS if what is None else [_WORDS[what]]
    found = [(kind, list(entries(kind).values())) for kind in kinds]
    if not any(listed for _, listed in found):
        raise UsageError("the sources of headscope must be readable; none were found")
    parts = [Part(f"{kind}s", [_row(entry) for entry in listed]) for kind, listed in found]
    hidden = frozenset({"kind", "citation"} | _empty(parts))
    write(Table("headscope.list", _COLUMNS, parts, hidden=hidden, limit=None), format)


def _row(entry: Entry) -> dict[str, str | None]:
    shown = f"zoo:{entry.name}" if entry.kind == "zoo model" else entry.name
    params = ", ".join(f"{key}={value}" for key, value in entry.params.items())
    return {
        "kind": entry.kind,
        "name": shown,
        "summary": entry.summary,
        "params": params or None,
        "task": entry.task or None,
        "citation": entry.citation or None,
    }


def _empty(parts: Sequence[Part]) -> set[str]:
    return {c for c in _COLUMNS if not any(row[c] for part in parts for row in part.rows)}
