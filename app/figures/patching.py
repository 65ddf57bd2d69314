"""Effects of patching: heads by positions, layers by positions, all heads, windows of layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.figures.maps import marked
from app.figures.style import DIVERGING, MASKED, SERIES, esc, styled, theme_of
from interp.errors import InputError
from interp.scoreview import tick_step

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from app.positionview import Column, View
    from interp.scores import HeadScores

DIFFERS = "≠"
"""Before the token of a position at which clean and corrupted prompts differ."""
_LABELLED = 60
_SPOKEN = 8000
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def column_label(column: "Column", most: int = 12) -> str:
    """A position on an axis: its token, both where they differ, and its number.

    >>> from app.positionview import Column
    >>> column_label(Column("3", " Mary", " Anna", True)), column_label(Column("s2", "s2", "s2", True))
    ('≠ ·Mary → ·Anna 3', '≠ s2')
    >>> column_label(Column("0", "<b>", "<b>", False))
    '&lt;b&gt; 0'
    """  # noqa: E501
    mark = f"{DIFFERS} " if column.differs else ""
    clean, corrupted = (esc(marked(x), most) for x in (column.clean, column.corrupted))
    text = clean if clean == corrupted else f"{clean} → {corrupted}"
    return f"{mark}{text}" if column.name == column.clean else f"{mark}{text} {esc(column.name)}"


def position_map(view: "View", *, theme: str | None = None, threshold: float = 0.0) -> "go.Figure":
    """Heads or layers by positions, centred on zero; grey cannot be told from noise.

    Args:
        view: the cells, of `app.positionview.view_of`.
        theme: `light` or `dark`.
        threshold: cells no stronger than this are grey as well.
    """
    import plotly.graph_objects as go

    noise = view.noise(threshold) & np.isfinite(view.values)
    names = [esc(r, 24) for r in view.rows]
    spoken = _texts(view, noise) if view.values.size <= _SPOKEN else None
    common: dict[str, Any] = {
        "x": list(range(len(view.columns))), "y": names, "hoverongaps": False, "xgap": 1,
        "ygap": 1, "text": spoken,
        "hovertemplate": "%{text}<extra></extra>" if spoken else "%{y}: %{z:+.4g}<extra></extra>",
    }  # fmt: skip
    most = _most(np.where(noise, np.nan, view.values))
    figure = go.Figure(
        go.Heatmap(
            z=np.where(noise, np.nan, view.values).astype(np.float32), zmin=-most, zmax=most,
            colorscale=DIVERGING, colorbar=_bar(view.recovered), **common,
        )
    )  # fmt: skip
    if noise.any():
        grey = MASKED[theme_of(theme)]
        figure.add_heatmap(
            z=np.where(noise, 0.0, np.nan).astype(np.float32), showscale=False,
            colorscale=[[0, grey], [1, grey]], zmin=0, zmax=1,
            **(common | ({} if spoken else {"hovertemplate": "%{y}: noise<extra></extra>"})),
        )  # fmt: skip
    styled(figure, theme, height=int(min(1100, max(280, 170 + 17 * len(names)))))
    at, labels = ticks(view.columns)
    figure.update_xaxes(
        tickmode="array", tickvals=at, ticktext=labels, tickangle=-55, showgrid=False,
        zeroline=False, range=[-0.5, len(view.columns) - 0.5],
    )  # fmt: skip
    figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, zeroline=False,
        dtick=1 if len(names) <= 64 else 8,
    )  # fmt: skip
    return figure


def ticks(columns: "Sequence[Column]") -> tuple[list[int], list[str]]:
    """Positions with a label: all of few, of many those that differ, or some of these."""
    at = list(range(len(columns)))
    if len(at) > _LABELLED:
        at = [i for i in at if columns[i].differs] or at[:: -(-len(at) // _LABELLED)]
        at = at[:: -(-len(at) // _LABELLED)]
    return at, [column_label(columns[i]) for i in at]


def _texts(view: "View", noise: np.ndarray) -> list[list[str]]:
    labels = [column_label(c, 24) for c in view.columns]
    return [
        [
            f"{esc(name)} at {label}<br>{_number(view, r, c)}{'<br>noise' if noise[r, c] else ''}"
            for c, label in enumerate(labels)
        ]
        for r, name in enumerate(view.rows)
    ]


def _number(view: "View", r: int, c: int) -> str:
    text = f"{view.values[r, c]:+.4g}"
    if np.isfinite(view.low[r, c]):
        text += f" [{view.low[r, c]:.4g}, {view.high[r, c]:.4g}]"
    return f"{text}, n = {int(view.n[c])}"


def _most(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(np.abs(found).max()) if len(found) and np.abs(found).max() > 0 else 1.0


def _bar(recovered: bool) -> dict[str, Any]:
    # One word: what is measured stands in the text, and small figures have no room for it.
    title = {"text": "recovered" if recovered else "effect", "side": "right"}
    return {"title": title, "thickness": 12, "outlinewidth": 0}


def effect_column(table: "HeadScores", *, recovered: bool = False) -> tuple[np.ndarray, str]:
    """Effects of a table, or its shares of the difference of the runs, and what they are.

    Raises:
        InputError: the table has no shares: the runs do not differ, or the method has none.
    """
    if not recovered:
        return table.values, table.unit
    if "recovered" not in table.extras:
        raise InputError(
            f"table {table.detector} has no share of a difference; choose the effect itself"
        )
    return np.asarray(table.column("recovered"), dtype=np.float64), "share of the difference"


def unsure(
    table: "HeadScores", *, recovered: bool = False, threshold: float = 0.0, floor: float = 0.0
) -> np.ndarray:
    """[head] whether an effect is no stronger than a threshold or rounding, or may be 0.

    Args:
        table: the table.
        recovered: whether the threshold is in shares of the difference.
        threshold: smallest effect that counts.
        floor: what rounding may do, in units of the metric.
    """
    values, _ = effect_column(table, recovered=recovered)
    with np.errstate(invalid="ignore"):
        weak = (np.abs(values) <= threshold) | (np.abs(table.values) <= floor)
        return np.asarray(weak | ((table.ci_lo <= 0) & (table.ci_hi >= 0)))


def effect_grid(
    table: "HeadScores",
    *,
    tower: str | None = None,
    theme: str | None = None,
    recovered: bool = False,
    threshold: float = 0.0,
    floor: float = 0.0,
) -> "go.Figure":
    """Effect of each head, layer by head, centred on zero; grey cannot be told from 0.

    Args:
        table: effects.
        tower: tower of the heads; the table's first if None.
        theme: `light` or `dark`.
        recovered: shares of the difference of the runs.
        threshold: heads no stronger than this are grey as well.
        floor: what rounding may do, in units of the metric.
    """
    import plotly.graph_objects as go

    tower = tower or table.towers[0]
    values, _ = effect_column(table, recovered=recovered)
    noise = unsure(table, recovered=recovered, threshold=threshold, floor=floor)
    mine = [i for i, h in enumerate(table.heads) if h.tower == tower]
    rows = max(table.heads[i].layer for i in mine) + 1
    columns = max(table.heads[i].head for i in mine) + 1
    strong, grey = (np.full((rows, columns), np.nan, np.float32) for _ in range(2))
    ids = np.full((rows, columns), "", dtype=object)
    texts = np.full((rows, columns), "", dtype=object)
    for i in mine:
        head = table.heads[i]
        at = head.layer, head.head
        (grey if noise[i] else strong)[at] = 0 if noise[i] else values[i]
        query = table.granularity == "query"
        ids[at] = str(head) if query else ""
        name = str(head) if query else f"L{head.layer}, key-value head {head.head}"
        ends = (
            "" if np.isnan(table.ci_lo[i])
            else f"<br>effect {table.values[i]:.4g} [{table.ci_lo[i]:.4g}, {table.ci_hi[i]:.4g}]"
        )  # fmt: skip
        texts[at] = f"{esc(name)}: {values[i]:+.4g}{ends}{'<br>noise' if noise[i] else ''}"
    most, colour = _most(strong), MASKED[theme_of(theme)]
    common: dict[str, Any] = {
        "text": texts.tolist(), "customdata": ids.tolist(), "hoverongaps": False, "xgap": 1,
        "ygap": 1, "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip
    figure = go.Figure(
        [
            go.Heatmap(z=strong, zmin=-most, zmax=most, colorscale=DIVERGING,
                       colorbar=_bar(recovered), **common),
            go.Heatmap(z=grey, zmin=0, zmax=1, colorscale=[[0, colour], [1, colour]],
                       showscale=False, **common),
        ]
    )  # fmt: skip
    styled(figure, theme, height=int(min(760, max(220, 110 + 26 * rows))))
    title = "head" if table.granularity == "query" else "key-value head"
    figure.update_xaxes(title=title, dtick=tick_step(columns), range=[-0.5, columns - 0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    figure.update_yaxes(title="layer", dtick=tick_step(rows), range=[rows - 0.5, -0.5],
                        showgrid=False, zeroline=False)  # fmt: skip
    return figure


def window_curves(rows: Sequence[Mapping[str, Any]], *, theme: str | None = None) -> "go.Figure":
    """Relative change of a probability by layer, a curve for each group of hidden tokens.

    Args:
        rows: `layer`, `change`, `ci_lo`, `ci_hi`, `keys`, `queries` and `window` of each, as
            `patching.windows` gives them.
        theme: `light` or `dark`.
    """
    import plotly.graph_objects as go

    curves: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = str(row["keys"]), str(row["queries"]), int(row["window"])
        curves.setdefault(name, []).append(row)
    colours = SERIES[theme_of(theme)]
    figure = go.Figure()
    for i, ((keys, queries, window), found) in enumerate(curves.items()):
        x = [int(r["layer"]) for r in found]
        low, high = ([r.get(k) for r in found] for k in ("ci_lo", "ci_hi"))
        label = esc(f"{keys} → {queries}, {window} layer{'s' if window > 1 else ''}", 60)
        colour = colours[i % len(colours)]
        if all(v is not None and np.isfinite(v) for v in (*low, *high)):
            figure.add_scatter(
                x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=colour,
                opacity=0.2, line={"width": 0}, mode="lines", hoverinfo="skip", legendgroup=label,
                showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=[float(r["change"]) for r in found], name=label, legendgroup=label,
            mode="lines+markers", line={"color": colour, "dash": _DASHES[i % len(_DASHES)]},
            marker={"symbol": _MARKS[i % len(_MARKS)], "size": 8}, showlegend=True,
            hovertemplate=f"{label}, layer %{{x}}: %{{y:+.4g}}<extra></extra>",
        )  # fmt: skip
    styled(figure, theme, height=380)
    figure.update_xaxes(
        title="layer at the centre of the window", dtick=1 if len(rows) < 200 else None
    )
    figure.update_yaxes(title="relative change of the probability", zeroline=True)
    return figure
