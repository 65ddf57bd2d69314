"""Tables of effects on stdout: what `ablate`, `patch`, `attribute` and `probe` write."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app.exits import say
from app.keep import Answer
from app.tables import SHOWN, Format, Part, Table, write

if TYPE_CHECKING:
    from interp.scores import HeadScores

_FIRST = ("method", "head", "tower", "layer", "index")
_LAST = ("exact",)
"""Columns at the end: that beside which the others are judged."""


def write_effects(
    answer: Answer, *, schema: str, format: Format, top: int | None, quiet: bool
) -> None:
    """Write the tables of an answer, strongest heads first, further columns at the end.

    Args:
        answer: tables of scores, and facts; `notes` among them are said below each table.
        schema: name of the JSON schema; the score of a probe is a score, all others are effects.
        format: of the output.
        top: most heads of each table; all if None.
        quiet: say nothing on stderr.
    """
    tables = list(answer.tables.values())
    value = "score" if schema == "headscope.probe" else "effect"
    tested = any(t.null_per_example is not None for t in tables)
    numbers = (value, "ci_lo", "ci_hi", "n", *(("null", "q", "verdict") if tested else ()))
    # In an order of their own: a saved table does not keep that in which they were made.
    extras = sorted({name for t in tables for name in t.extras}, key=lambda x: (x in _LAST, x))
    notes = [str(x) for x in answer.facts.get("notes", ())]
    towers = {tower for t in tables for tower in t.towers}
    parts = [
        Part(f"{t.detector}: {t.unit}, {t.provenance.get('model', '')}",
             effect_rows(t, value)[:top], note="; ".join([*notes, t.message]))
        for t in tables
    ]  # fmt: skip
    about: dict[str, Any] = {
        "run": None if answer.folder is None else str(answer.folder),
        **answer.facts,
        "methods": {t.detector: facts_of(t) for t in tables},
    }
    hidden = frozenset({"method", "layer", "index"} | ({"tower"} if len(towers) == 1 else set()))
    made = Table(
        schema, (*_FIRST, *numbers, *extras), parts, about, hidden, SHOWN if top is None else None
    )
    if not write(made, format) and not quiet:
        for part in parts:
            say(f"{part.title}: {part.note}")


def effect_rows(table: "HeadScores", value: str) -> list[dict[str, Any]]:
    """Rows of a table, strongest first."""
    place = {str(head): i for i, head in enumerate(table.heads)}
    columns: Mapping[str, Any] = {name: table.column(name).tolist() for name in table.extras}
    rows = []
    for row in table.rows():
        i = place[row["head"]]
        made = {value if k == "score" else k: v for k, v in row.items()}
        made["method"] = made.pop("detector")
        rows.append(made | {name: column[i] for name, column in columns.items()})
    return rows


def facts_of(table: "HeadScores") -> dict[str, Any]:
    """What a table was made from, for the JSON document."""
    return {
        "unit": table.unit,
        "direction": table.direction,
        "granularity": table.granularity,
        "heads": len(table.heads),
        "examples": len(table.examples),
        "message": table.message,
        "params": dict(table.params),
        "provenance": dict(table.provenance),
    }
