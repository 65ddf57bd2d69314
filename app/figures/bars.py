"""Budgets and distances of a head: where its attention goes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import SEQUENTIAL, SERIES, esc, styled, theme_of

if TYPE_CHECKING:
    import plotly.graph_objects as go


def distance_bars(mass: np.ndarray, *, theme: str | None = None) -> "go.Figure":
    """Mean mass by distance between query and key, in powers of two."""
    import plotly.graph_objects as go

    names = ["0", "1", *(f"{2**b}–{2 ** (b + 1) - 1}" for b in range(1, len(mass) - 1))]
    figure = go.Figure(
        go.Bar(x=names[: len(mass)], y=mass.astype(np.float32),
               marker={"color": SERIES[theme_of(theme)][0]},
               hovertemplate="distance %{x}: %{y:.3f}<extra></extra>")
    )  # fmt: skip
    styled(figure, theme, height=240)
    figure.update_xaxes(title="distance", type="category")
    figure.update_yaxes(title="share of attention", rangemode="tozero")
    return figure


def segment_map(mass: np.ndarray, names: Sequence[str], *, theme: str | None = None) -> "go.Figure":
    """Mean mass from the queries of each segment to the keys of each."""
    import plotly.graph_objects as go

    labels = [esc(n, 20) for n in names]
    figure = go.Figure(
        go.Heatmap(z=mass.astype(np.float32), x=labels, y=labels, zmin=0, zmax=1,
                   colorscale=SEQUENTIAL, xgap=1, ygap=1,
                   texttemplate="%{z:.2f}" if len(names) <= 8 else None,
                   colorbar={"thickness": 12, "outlinewidth": 0},
                   hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>")
    )  # fmt: skip
    styled(figure, theme, height=120 + 28 * max(3, len(names)))
    figure.update_xaxes(title="to keys of")
    figure.update_yaxes(title="from queries of", autorange="reversed")
    return figure


def entropy_line(entropy: np.ndarray, seen: np.ndarray, *, theme: str | None = None) -> "go.Figure":
    """Entropy of each row, with what a uniform row would have; pooled by mean beyond 512.

    Args:
        entropy: [query] in nats.
        seen: [query] keys that the query sees.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    values = entropy.astype(np.float64)
    step = max(1, -(-len(values) // 512))
    at = np.arange(0, len(values), step)
    mean = np.add.reduceat(values, at) / np.diff([*at, len(values)])
    colours = SERIES[theme_of(theme)]
    figure = go.Figure(
        [
            go.Scatter(x=at, y=mean.astype(np.float32), mode="lines", name="entropy",
                       line={"color": colours[0]}),
            go.Scatter(x=at, y=np.log(np.maximum(seen[at], 1)).astype(np.float32), mode="lines",
                       name="log(keys it sees)", line={"color": colours[5], "dash": "dot"}),
        ]
    )  # fmt: skip
    styled(figure, theme, height=240)
    figure.update_xaxes(title="query")
    figure.update_yaxes(title="nats", rangemode="tozero")
    return figure
