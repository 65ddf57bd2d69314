"""Head scores as figures: the grid of all heads, one score against another, the ranking's order."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import CLAIM, DIVERGING, SEQUENTIAL, SERIES, esc, styled, theme_of
from interp.scores import HeadScores

if TYPE_CHECKING:
    import plotly.graph_objects as go


def bounds(table: HeadScores, values: np.ndarray) -> tuple[float, float, str]:
    """Ends of the colours and their scale: a signed score is centred on zero."""
    found = values[np.isfinite(values)]
    if not len(found):
        return 0.0, 1.0, SEQUENTIAL
    low, high = table.range
    if low < 0 < high:
        most = float(np.abs(found).max()) or 1.0
        return -most, most, DIVERGING
    if np.isfinite(low) and np.isfinite(high):
        return float(low), max(float(found.max()), low + 0.1 * (high - low)), SEQUENTIAL
    return min(0.0, float(found.min())), float(found.max()) or 1.0, SEQUENTIAL


def head_grid(
    table: HeadScores, *, tower: str | None = None, theme: str | None = None
) -> "go.Figure":
    """Layer by head; heads that are claimed carry a ring, layers without attention are gaps."""
    import plotly.graph_objects as go

    tower = tower or table.towers[0]
    grid = table.grid(tower)
    low, high, colors = bounds(table, grid)
    figure = go.Figure(
        go.Heatmap(
            z=grid.astype(np.float32),
            zmin=low, zmax=high, colorscale=colors, xgap=1, ygap=1,
            colorbar={"title": {"text": esc(table.detector, 24), "side": "right"},
                      "thickness": 12, "outlinewidth": 0},
            hovertemplate="L%{y}H%{x}: %{z:.4g}<extra></extra>",
        )
    )  # fmt: skip
    claimed = [
        h for h, v in zip(table.heads, table.verdict, strict=True)
        if h.tower == tower and v == table.detector
    ]  # fmt: skip
    figure.add_scatter(
        x=[h.head for h in claimed], y=[h.layer for h in claimed], mode="markers",
        marker={"symbol": "circle-open", "size": 11, "color": CLAIM[theme_of(theme)],
                "line": {"width": 2}},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    rows, columns = grid.shape
    styled(figure, theme, height=int(min(760, max(220, 110 + 26 * rows))))
    figure.update_xaxes(title="head", dtick=tick_step(columns), range=[-0.5, columns - 0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    figure.update_yaxes(title="layer", dtick=tick_step(rows), range=[rows - 0.5, -0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    return figure


def head_scatter(
    tables: Mapping[str, HeadScores],
    x: str,
    y: str,
    *,
    tower: str | None = None,
    theme: str | None = None,
    marked: tuple[str, ...] = (),
) -> "go.Figure":
    """One score of each head against another; heads of the basket are filled squares."""
    import plotly.graph_objects as go

    a, b = tables[x], tables[y]
    tower = tower or a.towers[0]
    place = {h: i for i, h in enumerate(b.heads)}
    shared = [h for h in a.heads if h.tower == tower and h in place]
    at = {h: i for i, h in enumerate(a.heads)}
    names = [str(h) for h in shared]
    theme = theme_of(theme)
    # WebGL for thousands of heads; below, what also downloads as a vector.
    draw = go.Scattergl if len(shared) > 3000 else go.Scatter
    figure = go.Figure(
        draw(
            x=a.values[[at[h] for h in shared]].astype(np.float32),
            y=b.values[[place[h] for h in shared]].astype(np.float32),
            mode="markers", customdata=names, text=names,
            marker={"size": [13 if n in marked else 8 for n in names],
                    "symbol": ["square" if n in marked else "circle" for n in names],
                    "color": [h.layer for h in shared], "colorscale": "Cividis", "opacity": 0.85,
                    "line": {"width": 1, "color": SERIES[theme][0]},
                    "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12,
                                 "outlinewidth": 0}},
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    styled(figure, theme, height=420)
    figure.update_xaxes(title=esc(x, 40))
    figure.update_yaxes(title=esc(y, 40))
    return figure


def tick_step(n: int) -> int:
    """Every how many heads or layers an axis has a tick."""
    return 1 if n <= 16 else 4 if n <= 64 else 8
