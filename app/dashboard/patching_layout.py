"""The components of the page Patching, as they stand before anything is drawn."""

from typing import TYPE_CHECKING

from app.dashboard.grids import grid, number_column
from app.dashboard.page import Site
from app.dashboard.pages.heads import HEAD
from app.dashboard.patching import STRONGEST
from app.dashboard.patching_form import form

if TYPE_CHECKING:
    from dash.development.base_component import Component

PLAIN = {"filter": False}  # so few columns need their room for their names
NUMBERS = (
    number_column("effect", "Effect", width=105), number_column("ci_lo", "95 % from", width=105),
    number_column("ci_hi", "to", width=95), number_column("recovered", "Recovered", width=115),
)  # fmt: skip
REST = (
    {"field": "n", "headerName": "n", "width": 70, "type": "numericColumn"},
    {"field": "noise", "headerName": "Noise", "width": 95},
)
_CELLS = (
    HEAD,
    {"field": "position", "headerName": "At", "width": 85},
    {"field": "clean", "headerName": "Clean", "width": 120},
    {"field": "corrupted", "headerName": "Corrupted", "width": 130},
    *NUMBERS,
    *REST,
)
_HEADS = (
    HEAD,
    {"field": "group", "headerName": "Key-value head", "width": 140, "hide": True},
    *NUMBERS,
    number_column("exact", "Exact", width=95),
    *REST,
)
CELLS, HEADS = (tuple({**c, **PLAIN} for c in group) for group in (_CELLS, _HEADS))


def layout(site: Site) -> "Component":
    """Maps over positions, all heads, windows of layers, further runs, and how to make one."""
    from dash import html

    return html.Div(
        [
            html.H1("Patching", id="patching-title"),
            html.Div(id="patching-note"),
            _controls(),
            html.Div([_maps(), _cells()], id="patching-maps", hidden=True, className="patching"),
            html.Div(_heads(), id="patching-heads", hidden=True, className="columns patching"),
            html.Div(
                [
                    html.H2("Attention cut off in windows of layers"),
                    _graph("patching-curves", "patching-windows-text"),
                    html.P(id="patching-windows-text", className="faint"),
                    html.A("CSV", id="patching-windows-csv", download=""),
                ],
                id="patching-windows", hidden=True, className="card patching",
            ),
            html.Div(
                [
                    html.Div([html.H2("Runs of this model"),
                              html.Div(id="patching-runs", className="patching-wide", tabIndex="0",
                                       role="region", **{"aria-label": "runs of this model"})],
                             className="card"),
                    form(site),
                ],
                className="columns patching",
            ),
        ]
    )  # fmt: skip


def _controls() -> "Component":
    import dash_mantine_components as dmc
    from dash import html

    def either(id: str, label: str, *data: tuple[str, str]) -> "Component":
        switch = dmc.SegmentedControl(
            id=id, size="xs", value=data[0][0], data=[{"value": v, "label": n} for v, n in data]
        )
        text = html.Span(label, className="patching-label", id=f"{id}-label")
        return html.Div(
            [text, switch], role="group", **{"aria-labelledby": f"{id}-label"}
        )  # fmt: skip

    return html.Div(
        [
            dmc.Select(id="patching-metric", label="Table", data=[], size="xs", w=190),
            dmc.Select(id="patching-tower", label="Tower", data=[], size="xs", w=110),
            either("patching-value", "Value", ("effect", "effect"), ("recovered", "recovered")),
            html.Div(
                [
                    dmc.Select(id="patching-example", label="Example", data=[], size="xs", w=190,
                               clearable=True, searchable=True, limit=200,
                               placeholder="mean over all"),
                    either("patching-by", "Means by", ("position", "position"), ("span", "span")),
                    either("patching-rows", "Heads", ("strongest", f"strongest {STRONGEST}"),
                           ("all", "all")),
                    dmc.NumberInput(id="patching-layer", label="Of layer", size="xs", w=90, min=0),
                ],
                id="patching-choice", hidden=True, className="row",
            ),
            dmc.NumberInput(id="patching-threshold", label="Grey up to", size="xs", w=110, min=0,
                            decimalScale=6, step=0.05),
        ],
        id="patching-controls", hidden=True, className="row",
    )  # fmt: skip


def _graph(id: str, text: str) -> "Component":
    from dash import dcc, html

    return html.Div(
        dcc.Graph(id=id, config={"displaylogo": False}), role="group", **{"aria-labelledby": text}
    )


def _maps() -> "Component":
    from dash import html

    def one(rows: str, title: str, what: str) -> "Component":
        return html.Div(
            [
                html.H2(title),
                html.P(what, className="faint"),
                _graph(f"patching-map-{rows}", f"patching-map-{rows}-text"),
                html.P(id=f"patching-map-{rows}-text"),
                html.A("CSV", id=f"patching-map-{rows}-csv", download=""),
            ],
            className="card",
        )

    return html.Div(
        [
            html.Div(
                [
                    one("head", "Head × position",
                        "Each cell: one head patched at one position. A click opens the head."),
                    one("layer", "Layer × position",
                        "Each cell: all heads of a layer patched at one position. A click shows "
                        "the heads of that layer."),
                ],
                className="columns",
            ),
            html.P(id="patching-floor", className="faint"),
        ]
    )  # fmt: skip


def _cells() -> "Component":
    from dash import html

    return html.Div(
        [
            html.Div(
                [html.H2("Prompts"), html.Div(id="patching-prompts", className="patching-prompts")],
                className="card",
            ),
            html.Div(
                [html.H2("Strongest cells"),
                 grid("patching-cells", CELLS, key="id", height=330, label="strongest cells")],
                className="card",
            ),
        ],
        className="columns",
    )  # fmt: skip


def _heads() -> "list[Component]":
    from dash import html

    return [
        html.Div(
            [
                html.H2("Heads at all positions"),
                _graph("patching-grid", "patching-grid-text"),
                html.P(id="patching-grid-text", className="faint"),
            ],
            className="card",
        ),
        html.Div(
            [
                html.H2("Table of heads"),
                html.Div(
                    [html.A("CSV", id="patching-csv", download=""),
                     html.A("Parquet", id="patching-parquet", download="")],
                    className="row",
                ),
                grid("patching-table", HEADS, key="key", label="effects of heads", height=420),
            ],
            className="card",
        ),
    ]  # fmt: skip
