"""Figures of the page Prompt: a head on A minus the head on B, one row of it, a needle's grid."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.dashboard.prompt_diff import Difference
from app.figures.style import DIVERGING, INK, MASKED, SEQUENTIAL, SERIES, esc, styled, theme_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LABELLED = 40


def difference_map(
    found: Difference, *, labels: Sequence[str] = (), theme: str | None = None
) -> "go.Figure":
    """A window of A − B, centred on zero: red is more in A, blue more in B, grey is masked.

    Args:
        found: the window.
        labels: text of each pair, for labels of small windows.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    values = found.values.astype(np.float32)  # plotly spells out half floats
    most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x0=found.c0 + (found.pool_c - 1) / 2,
            dx=found.pool_c,
            y0=found.r0 + (found.pool_r - 1) / 2,
            dy=found.pool_r,
            zmin=-(most or 1.0),
            zmax=most or 1.0,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "A − B", "side": "right"}, "thickness": 12,
                      "outlinewidth": 0},
            hovertemplate="query %{y}, key %{x}: %{z:+.4f}<extra></extra>",
        )
    )  # fmt: skip
    styled(figure, theme, height=520, margin={"l": 60, "r": 10, "t": 12, "b": 50}, dragmode="zoom",
           plot_bgcolor=MASKED[theme_of(theme)])  # fmt: skip
    figure.update_xaxes(
        title="key", range=[found.c0 - 0.5, found.c1 - 0.5], showgrid=False, zeroline=False
    )
    figure.update_yaxes(
        title="query", range=[found.r1 - 0.5, found.r0 - 0.5], showgrid=False, zeroline=False
    )
    for update, low, high in (
        (figure.update_xaxes, found.c0, found.c1),
        (figure.update_yaxes, found.r0, found.r1),
    ):
        if found.exact and high - low <= _LABELLED and len(labels) >= high:
            names = [f"{esc(labels[i], 18)} {i}" for i in range(low, high)]
            update(tickmode="array", tickvals=list(range(low, high)), ticktext=names, title=None)
    if figure.layout.xaxis.ticktext is not None:
        figure.update_xaxes(tickangle=-60)
    return figure


def row_bars(
    one: np.ndarray, other: np.ndarray, order: np.ndarray, *, labels: Sequence[str],
    theme: str | None = None,
) -> "go.Figure":  # fmt: skip
    """What a query gives to some keys, in A and in B.

    Args:
        one: [pair] its row in A.
        other: [pair] its row in B.
        order: the keys that are drawn, as indices of pairs.
        labels: text of each pair.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    name = theme_of(theme)
    colours = SERIES[name]
    texts = [f"{esc(labels[i], 18)} {i}" for i in order.tolist()]
    ink = {"color": INK[name], "width": 0.8}
    figure = go.Figure(
        [
            go.Bar(x=texts, y=np.nan_to_num(one[order]).astype(np.float32), name="A",
                   marker={"color": colours[1], "line": ink}),
            go.Bar(x=texts, y=np.nan_to_num(other[order]).astype(np.float32), name="B",
                   marker={"color": colours[0], "line": ink, "pattern": {"shape": "/"}}),
        ]
    )  # fmt: skip
    styled(figure, theme, height=320, barmode="group")
    figure.update_yaxes(title="attention", rangemode="tozero")
    figure.update_xaxes(tickangle=-60)
    return figure


def needle_grid(
    lengths: Sequence[int],
    depths: Sequence[float],
    scores: np.ndarray,
    counts: np.ndarray,
    *,
    theme: str | None = None,
) -> "go.Figure":
    """Mean score by depth and length; grey where no prompt gave one.

    Args:
        lengths: tokens of the columns.
        depths: of the rows, 0..1.
        scores: [depth, length], NaN where there is none.
        counts: [depth, length] prompts that gave a score.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    name = theme_of(theme)
    most = float(np.nanmax(scores)) if np.isfinite(scores).any() else 1.0
    text = [[f"{s:.2f}" if np.isfinite(s) else "none" for s in row] for row in scores.tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=scores.astype(np.float32), x=[f"{n}" for n in lengths],
            y=[f"{d:g}" for d in depths], zmin=0.0, zmax=max(1.0, most), xgap=2, ygap=2,
            text=text, texttemplate="%{text}", customdata=counts.astype(np.int32),
            colorscale=SEQUENTIAL,
            colorbar={"title": {"text": "score", "side": "right"}, "thickness": 12,
                      "outlinewidth": 0},
            hovertemplate="length %{x}, depth %{y}: %{z:.3f}, n %{customdata}<extra></extra>",
        )
    )  # fmt: skip
    styled(figure, theme, height=int(140 + 34 * max(3, len(depths))),
           plot_bgcolor=MASKED[name])  # fmt: skip
    figure.update_xaxes(title="tokens", type="category", showgrid=False)
    figure.update_yaxes(title="depth", type="category", showgrid=False, autorange="reversed")
    return figure
