"""Two tables of scores beside each other."""

from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import DIVERGING, SERIES, esc, styled, theme_of
from interp.scores import HeadScores
from interp.scoreview import tick_step

if TYPE_CHECKING:
    import plotly.graph_objects as go


def aligned(base: HeadScores, other: HeadScores) -> np.ndarray:
    """Scores of the other table in the order of the base's heads.

    Both must be about the same heads.
    """
    place = {h: i for i, h in enumerate(other.heads)}
    return other.values[[place[h] for h in base.heads]]


def agreement(base: HeadScores, other: HeadScores, *, theme: str | None = None) -> "go.Figure":
    """Score in one table against score in the other; on the line they are equal."""
    import plotly.graph_objects as go

    x, y = base.values.astype(np.float32), aligned(base, other).astype(np.float32)
    names = [str(h) for h in base.heads]
    known = np.concatenate([x, y])[np.isfinite(np.concatenate([x, y]))]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    colours = SERIES[theme_of(theme)]
    figure = go.Figure(
        [
            go.Scatter(x=[low, high], y=[low, high], mode="lines", hoverinfo="skip",
                       line={"color": colours[5], "dash": "dot"}, showlegend=False),
            go.Scatter(x=x, y=y, mode="markers", text=names, customdata=names, showlegend=False,
                       marker={"size": 8, "color": colours[0], "opacity": 0.8},
                       hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>"),
        ]
    )  # fmt: skip
    styled(figure, theme, height=420)
    figure.update_xaxes(title="this run")
    figure.update_yaxes(title="other run")
    return figure


def difference_grid(
    base: HeadScores, other: HeadScores, *, tower: str, theme: str | None = None
) -> "go.Figure":
    """Other minus this, layer by head, centred on zero."""
    import plotly.graph_objects as go

    change = aligned(base, other) - base.values
    mine = [i for i, h in enumerate(base.heads) if h.tower == tower]
    rows = max(base.heads[i].layer for i in mine) + 1
    columns = max(base.heads[i].head for i in mine) + 1
    grid = np.full((rows, columns), np.nan, np.float32)
    for i in mine:
        grid[base.heads[i].layer, base.heads[i].head] = change[i]
    most = float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0
    figure = go.Figure(
        go.Heatmap(z=grid, zmin=-most or -1.0, zmax=most or 1.0, colorscale=DIVERGING, xgap=1,
                   ygap=1,
                   colorbar={"title": {"text": esc("other − this"), "side": "right"},
                             "thickness": 12, "outlinewidth": 0},
                   hovertemplate="L%{y}H%{x}: %{z:+.4g}<extra></extra>")
    )  # fmt: skip
    styled(figure, theme, height=int(min(760, max(220, 110 + 26 * rows))))
    figure.update_xaxes(title="head", dtick=tick_step(columns), range=[-0.5, columns - 0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    figure.update_yaxes(title="layer", dtick=tick_step(rows), range=[rows - 0.5, -0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    return figure
