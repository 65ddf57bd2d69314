"""Figures of interventions: effects beside random heads, dose and response, side effects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.figures.style import CLAIM, INK, SERIES, esc, styled, theme_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST = 40
_ABOVE, _BELOW, _MEAN = 0.16, 0.1, 0.3


@dataclass(frozen=True)
class Line:
    """One effect, and what stands beside it on the same axis.

    Attributes:
        name: of the heads.
        effect: mean change.
        low: lower end of its 95 % interval, or None.
        high: upper end, or None.
        draws: changes by each set of random heads, with the names of its heads.
        control: their mean, or None.
        control_low: lower end of the interval of that mean, or None.
        control_high: upper end, or None.
    """

    name: str
    effect: float
    low: float | None = None
    high: float | None = None
    draws: Sequence[tuple[str, float]] = ()
    control: float | None = None
    control_low: float | None = None
    control_high: float | None = None


def forest(
    lines: Sequence[Line], *, unit: str, theme: str | None = None,
    beside: str = "random heads of the same layers",
) -> "go.Figure":  # fmt: skip
    """Effects with intervals, one below another, each over what stands beside it.

    Args:
        lines: the effects; the first `MOST` are drawn.
        unit: of the axis.
        theme: `light` or `dark`.
        beside: what the single points beside an effect are.
    """
    import plotly.graph_objects as go

    lines = list(lines)[:MOST]
    name = theme_of(theme)
    figure = go.Figure()
    grey = SERIES[name][5]
    singles = [(i, heads, x) for i, line in enumerate(lines) for heads, x in line.draws]
    if singles:
        figure.add_scatter(
            x=[x for _, _, x in singles], y=[i + _BELOW for i, _, _ in singles], mode="markers",
            name=beside, marker={"symbol": "circle-open", "size": 8, "color": grey,
                                 "line": {"width": 1.5}},
            customdata=[esc(heads, 60) for _, heads, _ in singles],
            hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
        )  # fmt: skip
    means = [(i, line) for i, line in enumerate(lines) if line.control is not None]
    if means:
        figure.add_scatter(
            x=[line.control for _, line in means], y=[i + _MEAN for i, _ in means],
            mode="markers", name="their mean",
            marker={"symbol": "diamond", "size": 9, "color": grey},
            error_x=_error([(x.control, x.control_low, x.control_high) for _, x in means], grey),
            hovertemplate="mean of these: %{x:.4g}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[line.effect for line in lines], y=[i - _ABOVE for i in range(len(lines))],
        mode="markers", name="the heads, with 95 % interval",
        marker={"symbol": "square", "size": 10, "color": CLAIM[name]},
        error_x=_error([(x.effect, x.low, x.high) for x in lines], CLAIM[name]),
        customdata=[esc(line.name, 60) for line in lines],
        hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
    )  # fmt: skip
    styled(figure, theme, height=120 + 44 * max(1, len(lines)), hovermode="closest")
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"t": 60})
    figure.add_vline(x=0, line={"color": INK[name], "width": 1, "dash": "dot"})
    figure.update_xaxes(title=esc(unit), zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(lines))), ticktext=[esc(line.name, 28) for line in lines],
        range=[len(lines) - 0.5, -0.5], zeroline=False, showgrid=False,
    )  # fmt: skip
    return figure


def _error(
    values: Sequence[tuple[float | None, float | None, float | None]], colour: str
) -> dict[str, Any]:
    """Whiskers from means and interval ends; none where an end is not known."""
    plus = [0.0 if v is None or hi is None else max(0.0, hi - v) for v, _, hi in values]
    minus = [0.0 if v is None or lo is None else max(0.0, v - lo) for v, lo, _ in values]
    return {
        "type": "data", "symmetric": False, "array": plus, "arrayminus": minus, "color": colour,
        "thickness": 2, "width": 5,
    }  # fmt: skip


def dose(rows: Sequence[Mapping[str, Any]], *, theme: str | None = None) -> "go.Figure":
    """One measure at several strengths, beside the same recipe on random heads.

    Args:
        rows: of `steer sweep`, all of one measure.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    name = theme_of(theme)
    grey, mine = SERIES[name][5], CLAIM[name]
    rows = sorted(rows, key=lambda r: float(r["strength"]))
    x = [float(r["strength"]) for r in rows]
    bare = float(rows[0]["without"])
    figure = go.Figure()
    singles = [
        (s, float(r["without"]) + c)
        for s, r in zip(x, rows, strict=True) for c in r.get("control_changes") or ()
    ]  # fmt: skip
    if singles:
        figure.add_scatter(
            x=[s for s, _ in singles], y=[v for _, v in singles], mode="markers",
            name="random heads",
            marker={"symbol": "circle-open", "size": 7, "color": grey},
            hovertemplate="random heads at %{x}: %{y:.4g}<extra></extra>",
        )  # fmt: skip
    means = [(s, bare + float(r["control_change"])) for s, r in zip(x, rows, strict=True)
             if r["control_change"] is not None]  # fmt: skip
    if means:
        figure.add_scatter(
            x=[s for s, _ in means], y=[v for _, v in means], mode="lines",
            name="mean of random heads",
            line={"color": grey, "dash": "dash"}, hoverinfo="skip",
        )  # fmt: skip
    values = [float(r["with"]) for r in rows]
    ends = [(v, *_around(r)) for v, r in zip(values, rows, strict=True)]
    bars = _error(ends, mine)
    figure.add_scatter(
        x=x, y=values, mode="lines+markers", name="the heads, with 95 % interval",
        line={"color": mine}, marker={"symbol": "square", "size": 8, "color": mine}, error_y=bars,
        hovertemplate="at %{x}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    styled(figure, theme, height=300, hovermode="closest")
    figure.update_layout(margin={"t": 70})
    figure.add_hline(y=bare, line={"color": INK[name], "width": 1, "dash": "dot"},
                     annotation={"text": "unchanged", "font": {"size": 11}})  # fmt: skip
    figure.update_xaxes(title="strength", zeroline=False)
    figure.update_yaxes(title=esc(rows[0]["measure"]), zeroline=False)
    return figure


def _around(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The interval of a value, from that of its change."""
    if row.get("ci_lo") is None or row.get("ci_hi") is None:
        return None, None
    return float(row["without"]) + row["ci_lo"], float(row["without"]) + row["ci_hi"]


def changes(rows: Sequence[Mapping[str, Any]], *, theme: str | None = None) -> "go.Figure":
    """What a recipe changes, each measure on an axis of its own, beside random heads."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows = list(rows)
    figure: go.Figure = make_subplots(
        rows=len(rows), cols=1, subplot_titles=[esc(r["measure"]) for r in rows],
        vertical_spacing=0.55 / len(rows),
    )  # fmt: skip
    name = theme_of(theme)
    grey, mine = SERIES[name][5], CLAIM[name]
    for i, row in enumerate(rows, 1):
        draws = [float(x) for x in row.get("control_changes") or ()]
        place = {"row": i, "col": 1}
        figure.add_scatter(
            x=draws, y=[0.25] * len(draws), mode="markers", name="random heads",
            showlegend=i == 1, legendgroup="random",
            marker={"symbol": "circle-open", "size": 8, "color": grey},
            hovertemplate="random heads: %{x:.4g}<extra></extra>", **place,
        )  # fmt: skip
        if row["control_change"] is not None:
            figure.add_scatter(
                x=[row["control_change"]], y=[0.25], mode="markers", name="mean of random heads",
                showlegend=i == 1, legendgroup="mean",
                marker={"symbol": "diamond", "size": 9, "color": grey},
                hovertemplate="mean of these: %{x:.4g}<extra></extra>", **place,
            )  # fmt: skip
        ends = (float(row["change"]), row.get("ci_lo"), row.get("ci_hi"))
        figure.add_scatter(
            x=[row["change"]], y=[-0.2], mode="markers", name="the heads, with 95 % interval",
            showlegend=i == 1, legendgroup="mine",
            marker={"symbol": "square", "size": 10, "color": mine}, error_x=_error([ends], mine),
            hovertemplate="the heads: %{x:.4g}<extra></extra>", **place,
        )  # fmt: skip
        figure.add_vline(x=0, line={"color": INK[name], "width": 1, "dash": "dot"}, **place)
    styled(figure, theme, height=100 + 116 * len(rows), hovermode="closest")
    figure.update_layout(
        margin={"t": 74, "b": 30}, legend={"y": 0.995, "yanchor": "top", "yref": "container"}
    )
    figure.update_yaxes(visible=False, range=[-0.7, 0.7])
    figure.update_annotations(font={"size": 12})
    return figure
