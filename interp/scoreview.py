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
_TEXTS = 300
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


def bounds(scores: HeadScores, values: np.ndarray) -> tuple[float, float, str]:
    """Ends of the colours and their scale: a signed score is centred on zero.

    A score of finite range begins at its least value, and ends at the largest found, so that
    figures of weak scores are not dark altogether; the bar says where.
    """
    found = values[np.isfinite(values)]
    low, high = scores.range
    if not len(found):
        return 0.0, 1.0, "Viridis"
    if low < 0 < high:
        most = float(np.abs(found).max()) or 1.0
        return -most, most, "RdBu_r"
    if math.isfinite(low) and math.isfinite(high):
        return low, max(float(found.max()), low + 0.1 * (high - low)), "Viridis"
    return min(0.0, float(found.min())), float(found.max()) or 1.0, "Viridis"


def tick_step(n: int) -> int:
    """Every how many heads or layers an axis has a tick."""
    return 1 if n <= 16 else 4 if n <= 64 else 8


def heatmap(scores: HeadScores, *, tower: str | None = None, claim: str = "#c2255c") -> "go.Figure":
    """Heat map of layer by head: hover for the numbers, rings on claimed heads.

    Layers without attention are gaps. Effects, which have a sign, get a scale centred on zero.

    Args:
        scores: the table.
        tower: the tower to draw; the first of the table by default.
        claim: colour of the rings.

    Raises:
        InputError: the table has no such tower.
    """
    import plotly.graph_objects as go

    tower = tower or scores.towers[0]
    grid = scores.grid(tower)
    low, high, colours = bounds(scores, grid)
    # Of thousands of heads the texts would weigh more than all the rest.
    texts = _texts(scores, tower, grid.shape) if grid.size <= _TEXTS else None
    hover = "%{text}" if texts is not None else "L%{y}H%{x}: %{z:.4g}"
    figure = go.Figure(
        go.Heatmap(
            z=grid.astype(np.float32), text=texts, hovertemplate=f"{hover}<extra></extra>",
            zmin=low, zmax=high, colorscale=colours, xgap=1, ygap=1,
            colorbar={"title": {"text": markup.escape(_short(scores.detector, 24)),
                                "side": "right"}, "thickness": 12, "outlinewidth": 0},
        )
    )  # fmt: skip
    claimed = [
        head for head, verdict in zip(scores.heads, scores.verdict, strict=True)
        if head.tower == tower and verdict == scores.detector
    ]  # fmt: skip
    figure.add_scatter(
        x=[h.head for h in claimed], y=[h.layer for h in claimed], mode="markers",
        marker={"symbol": "circle-open", "size": 11, "color": claim, "line": {"width": 2}},
        name=markup.escape(_short(scores.detector, 60)), hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    rows, columns = grid.shape
    figure.update_layout(
        title={"text": markup.escape(_short(f"{scores.detector}, {_source(scores)}", 120))},
        height=min(900, max(220, 110 + 26 * rows)),
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
    )
    figure.update_xaxes(title="head", dtick=tick_step(columns), range=[-0.5, columns - 0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    figure.update_yaxes(title="layer", dtick=tick_step(rows), range=[rows - 0.5, -0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    return figure


def _texts(scores: HeadScores, tower: str, shape: tuple[int, ...]) -> np.ndarray:
    hover = np.full(shape, "no such head", dtype=object)
    for row in scores.rows():
        if row["tower"] == tower:
            shown = (f"{name} {_number(row[name])}" for name in COLUMNS[5:])
            text = f"{row['head']}: {', '.join(shown)}"
            hover[row["layer"], row["index"]] = markup.escape(_short(text))
    return hover
