"""Head scores to look at: five lines of text, a static table, a heat map.

The HTML is plain, without script or network, stays far below 100 KB for any table, and takes the
colours of the page it stands in. Every text that comes from outside is escaped.
"""

import html as markup
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.scores import COLUMNS, HeadScores

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ROWS = 20
_LONGEST = 200
_SHOWN = ("head", "score", "ci_lo", "ci_hi", "n", "null", "q", "verdict")


def _short(value: object, longest: int = _LONGEST) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _claim(scores: HeadScores) -> str:
    """The rule by which a head is claimed, in words."""
    if math.isinf(scores.threshold):
        return f"q <= {scores.alpha:g}"
    relation = ">=" if scores.direction == "higher" else "<="
    return f"q <= {scores.alpha:g} and score {relation} {scores.threshold:g}"


def _source(scores: HeadScores) -> str:
    known = [
        f"{name} {_short(scores.provenance[name], 60)}"
        for name in ("model", "task", "dtype", "seed")
        if scores.provenance.get(name) is not None
    ]
    return ", ".join(known) or "source not recorded"


def text(scores: HeadScores) -> str:
    """Five lines: what, from what, worth how much, how many claimed, which lead."""
    place = {head: i for i, head in enumerate(scores.heads)}
    leaders = [
        f"{head} {scores.values[i]:.3g} [{_number(scores.ci_lo[i])}, {_number(scores.ci_hi[i])}]"
        for head in scores.top(4)
        for i in (place[head],)
    ]
    kind = "heads" if scores.granularity == "query" else "key-value heads"
    unit = f", {_short(scores.unit, 60)}" if scores.unit else ""
    claimed = int((scores.verdict == scores.detector).sum())
    lines = [
        f"HeadScores of {_short(scores.detector, 60)}: {len(scores.heads)} {kind} "
        f"({', '.join(scores.towers)}){unit}",
        f"  from: {_source(scores)}",
        f"  examples: {_short(scores.message)}",
        f"  claimed: {claimed} with {_claim(scores)}",
        f"  top: {', '.join(leaders) or 'none defined'}",
    ]
    return "\n".join(lines)


def html(scores: HeadScores) -> str:
    """A static table of the strongest heads."""
    rows = scores.rows()
    cells = []
    for row in rows[:_ROWS]:
        weight = "bold" if row["verdict"] == scores.detector else "normal"
        values = "".join(f"<td>{markup.escape(_short(_number(row[c])))}</td>" for c in _SHOWN)
        cells.append(f'<tr style="font-weight:{weight}">{values}</tr>')
    head = "".join(f"<th>{name}</th>" for name in _SHOWN)
    lines = [markup.escape(line) for line in text(scores).split("\n")[:4]]
    left = len(rows) - len(cells)
    more = f"<p>{left} more heads: .to_frame(), .plot()</p>" if left > 0 else ""
    return (
        '<div style="background:transparent;color:inherit">'
        f"<p><b>{lines[0]}</b><br>{'<br>'.join(lines[1:])}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>{more}</div>"
    )


def heatmap(scores: HeadScores, *, tower: str | None = None) -> "go.Figure":
    """Heat map of layer by head: hover for the numbers, circles on claimed heads.

    Colours span the detector's range where it is finite, so that figures can be compared; effects,
    which have a sign, get a scale centred on zero.

    Raises:
        InputError: the table has no such tower.
    """
    import plotly.graph_objects as go

    tower = tower or scores.towers[0]
    grid = scores.grid(tower)
    hover = np.full(grid.shape, "no such head", dtype=object)
    marked: list[tuple[int, int]] = []
    for row in scores.rows():
        if row["tower"] != tower:
            continue
        at = (row["layer"], row["index"])
        shown = (f"{name} {_number(row[name])}" for name in COLUMNS[5:])
        hover[at] = markup.escape(_short(f"{row['head']}: {', '.join(shown)}"))
        if row["verdict"] == scores.detector:
            marked.append(at)
    low, high = scores.range
    signed = low < 0 < high
    bounds: dict[str, float] = {"zmid": 0.0} if signed else {}
    if not signed and math.isfinite(low) and math.isfinite(high):
        bounds = {"zmin": low, "zmax": high}
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            colorscale="RdBu" if signed else "Viridis",
            colorbar={"title": {"text": markup.escape(_short(scores.unit, 40)) or "score"}},
            **bounds,
        )
    )
    figure.add_scatter(
        x=[head for _, head in marked],
        y=[layer for layer, _ in marked],
        mode="markers",
        marker={"symbol": "circle-open", "size": 10, "color": "red", "line": {"width": 2}},
        name=markup.escape(_short(scores.detector, 60)),
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_layout(
        title={"text": markup.escape(_short(f"{scores.detector}, {_source(scores)}", 120))},
        xaxis={"title": {"text": "head"}, "dtick": 1 if grid.shape[1] <= 16 else 4},
        yaxis={"title": {"text": "layer"}, "autorange": "reversed"},
        height=min(900, 180 + 22 * grid.shape[0]),
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
    )
    return figure
