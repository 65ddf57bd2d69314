"""Budgets of heads that see images: how much of a query's attention each kind of token gets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import SERIES, esc, styled, theme_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

# With stripes each series can be told from the next without its colour.
SHAPES = ("", "/", "x", ".", "\\", "-", "|", "+")


def segment_order(names: Sequence[str]) -> list[int]:
    """Segments as they are stacked: images, the first token, then the others as they come.

    >>> segment_order(["bos", "other", "question", "image 1", "image 2"])
    [3, 4, 0, 2, 1]
    """

    def rank(i: int) -> tuple[int, int]:
        if names[i].startswith("image"):
            return 0, i
        return {"bos": 1, "other": 3}.get(names[i], 2), i

    return sorted(range(len(names)), key=rank)


def budget_bars(
    mass: np.ndarray,
    segments: Sequence[str],
    at: Sequence[int],
    *,
    axis: str,
    theme: str | None = None,
    marked: int | None = None,
) -> "go.Figure":
    """Stacked bars of mass by segment.

    Args:
        mass: [bar, segment] in 0..1.
        segments: names of the segments.
        at: layer or head of each bar.
        axis: what the bars are: `layer`, or `head`.
        theme: `light` or `dark`.
        marked: layer or head that is pointed at.
    """
    import plotly.graph_objects as go

    name = theme_of(theme)
    colours = SERIES[name]
    figure = go.Figure()
    for place, i in enumerate(segment_order(segments)):
        figure.add_bar(
            x=list(at), y=mass[:, i].astype(np.float32), name=esc(segments[i], 24),
            marker={
                "color": colours[place % len(colours)],
                "pattern": {"shape": SHAPES[place % len(SHAPES)], "solidity": 0.25, "size": 7},
            },
            hovertemplate=f"{axis} %{{x}}, {esc(segments[i], 24)}: %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    styled(figure, theme, height=300, barmode="stack", bargap=0.15, showlegend=True)
    figure.update_xaxes(title=axis, dtick=1 if len(at) <= 40 else None)
    figure.update_yaxes(title="share of attention", range=[0, 1.02])
    if marked is not None and marked in at:
        figure.add_annotation(
            x=marked, y=1.02, yref="y", text="▼", showarrow=False, yshift=7, font={"size": 11}
        )
    return figure
