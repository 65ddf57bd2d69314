"""Head scores as the table that `rank` and `show` write."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from app.tables import SHOWN, Part, Table
from interp.scores import COLUMNS, HeadScores

if TYPE_CHECKING:
    from interp.run import Run

SCHEMA = "headscope.rank"


def head_table(
    scores: Mapping[str, HeadScores], *, run: "Run | None" = None, top: int | None = None
) -> Table:
    """One row per head, a part per detector, strongest heads first.

    Args:
        scores: detector to scores, in the order to show them.
        run: the run they are from, if any.
        top: most heads of each detector; all if None.
    """
    towers = {tower for table in scores.values() for tower in table.towers}
    hidden = {"detector", "layer", "index"} | ({"tower"} if len(towers) == 1 else set())
    return Table(
        SCHEMA,
        COLUMNS,
        [_part(table, top) for table in scores.values()],
        {
            "run": None if run is None else str(run.folder),
            "detectors": {name: _facts(table) for name, table in scores.items()},
        },
        frozenset(hidden),
        SHOWN if top is None else None,
    )


def _part(scores: HeadScores, top: int | None) -> Part:
    rows = scores.rows()[:top]
    strong = frozenset(i for i, row in enumerate(rows) if row["verdict"] == scores.detector)
    model = scores.provenance.get("model", "")
    title = f"{scores.detector}: {scores.unit or 'score'}, {model}"
    return Part(title, rows, strong, f"{_claimed(scores)}; {scores.message}")


def _claimed(scores: HeadScores) -> str:
    count = int((scores.verdict == scores.detector).sum())
    sign = ">=" if scores.direction == "higher" else "<="
    text = (
        f"{count} of {len(scores.heads)} heads: q <= {scores.alpha:g} and score {sign} "
        f"{scores.threshold:g}"
    )
    if len(scores.towers) > 1:
        text += f"; q over all heads of {' and '.join(scores.towers)}"
    left = scores.provenance.get("left_out", {})
    return "; ".join([text, *(f"tower {t} is left out: {why}" for t, why in left.items())])


def _facts(scores: HeadScores) -> dict[str, Any]:
    return {
        "unit": scores.unit,
        "range": scores.range,
        "direction": scores.direction,
        "threshold": scores.threshold,
        "alpha": scores.alpha,
        "heads": len(scores.heads),
        "examples": len(scores.examples),
        "failures": [{"id": i, "reason": why} for i, why in scores.failures],
        "message": scores.message,
        "params": scores.params,
        "provenance": scores.provenance,
    }
