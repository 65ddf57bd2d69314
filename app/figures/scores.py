"""Head scores as figures: the grid of all heads, one score against another, the ranking's order."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import CLAIM, SERIES, esc, styled, theme_of
from interp.scores import HeadScores
from interp.scoreview import heatmap

if TYPE_CHECKING:
    import plotly.graph_objects as go


def head_grid(
    table: HeadScores, *, tower: str | None = None, theme: str | None = None
) -> "go.Figure":
    """Layer by head, the figure of `HeadScores.plot` in one of the themes."""
    figure = heatmap(table, tower=tower, claim=CLAIM[theme_of(theme)])
    return styled(figure, theme, title=None, height=figure.layout.height)


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
    deep = 1 + max((h.layer for h in shared), default=0)
    every = -(-deep // 8)  # whole layers, at most eight ticks
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
                                 "outlinewidth": 0, "tick0": 0,
                                 "dtick": every}},
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    styled(figure, theme, height=420, dragmode="select")
    figure.update_xaxes(title=esc(x, 40))
    figure.update_yaxes(title=esc(y, 40))
    return figure
