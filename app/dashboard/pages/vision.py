"""Vision: heads on the images of a prompt, and back from patches to tokens and heads."""

from typing import TYPE_CHECKING, Any

from app.dashboard.grids import grid, number_column
from app.dashboard.page import Feed, Page, Site, enter, head_of, told
from app.dashboard.pages.heads import HEAD
from app.dashboard.vision import query_of, towers_of
from app.dashboard.vision_heads import MASS, best_heads, visual_tables
from app.dashboard.vision_panels import drawn_budget, nothing, pointed, seen_tower, traced
from app.dashboard.vision_routes import routes
from app.figures.style import said
from interp.errors import InterpError, RunError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

PLAIN = {"filter": False}  # so few columns need their room for their names
COLUMNS = (
    {**HEAD, **PLAIN, "width": 122},
    {**number_column("pointing", "Hits", width=68, digits=3), **PLAIN},
    {**number_column("share", "In box", width=82, digits=3), **PLAIN},
    {**number_column("chance", "Chance", width=86, digits=3), **PLAIN},
    {**number_column("lift", "× chance", width=108, digits=3), **PLAIN},
    {**number_column("mass", "Image", width=90, digits=3), **PLAIN},
    {"field": "n", "headerName": "n", "width": 54, "type": "numericColumn", **PLAIN},
)


def layout(site: Site) -> "Component":
    """Images and tokens beside each other; readers, budgets and pointing below."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    choices = html.Div(
        [
            dmc.Select(id="vision-tower", label="Tower", data=[], size="xs", w=130),
            dmc.Select(id="vision-by", label="Vision heads by", data=[], size="xs", w=220),
        ],
        className="row",
    )
    picture = html.Div(
        [
            html.H2("Image"),
            html.Div(id="vision-tools", className="vision-tools"),
            html.Div(id="vision-facts", className="vision-facts"),
            html.Div(id="vision-images", className="vision-images"),
            html.P(
                "Click chooses a patch, Shift adds one, dragging chooses all in a box. On the "
                "keyboard: arrows move, Space chooses, Shift + arrows extend, Esc clears.",
                className="faint",
            ),
        ],
        className="card",
    )
    query = html.Div(
        [
            html.H2("Query"),
            html.Div(id="vision-strip-tools"),
            html.Div(id="vision-tokens", className="tokens", tabIndex="0", role="radiogroup",
                     **{"aria-label": "token whose row is drawn: arrow keys move"}),
            html.H2("Vision heads"),
            html.P(id="vision-heads-note", className="faint"),
            html.Div(id="vision-heads", className="vision-heads"),
        ],
        className="card",
    )  # fmt: skip
    reverse = html.Div(
        [
            html.H2("Who reads these patches"),
            html.P(id="vision-readers-note", role="status"),
            html.Div(id="vision-readers", className="columns"),
        ],
        className="card",
    )
    budgets = html.Div(
        [
            html.H2("Budget"),
            html.Div(
                [
                    dmc.SegmentedControl(
                        id="vision-split", size="xs", value="layers",
                        data=[{"value": "layers", "label": "layers"},
                              {"value": "heads", "label": "heads of the layer"}],
                    ),
                    dmc.SegmentedControl(
                        id="vision-source", size="xs", value="query",
                        data=[{"value": "query", "label": "this query"},
                              {"value": "segment", "label": "all queries of its segment"}],
                    ),
                ],
                className="row",
            ),
            html.Div(
                dcc.Graph(id="vision-budget", config={"displaylogo": False}),
                role="group", **{"aria-labelledby": "vision-budget-text"},
            ),
            html.P(id="vision-budget-text", className="faint"),
        ],
        className="card",
    )  # fmt: skip
    boxes = html.Div(
        [
            html.H2("Pointing"),
            dmc.Select(id="vision-box", label="Box", data=[], size="xs", w=200),
            html.P(id="vision-pointing-note", className="faint", role="status"),
            grid("vision-pointing", COLUMNS, key="head", height=330,
                 label="how well each head points at the box"),
        ],
        className="card",
    )  # fmt: skip
    body = html.Div(
        [
            choices,
            html.Div([picture, query], className="columns"),
            reverse,
            html.Div([budgets, boxes], className="columns"),
        ],
        id="vision-body",
        hidden=True,
    )
    return html.Div(
        [
            html.H1("Vision"),
            html.Div(id="vision-note"),
            dcc.Store(id="vision-place"),
            body,
        ]
    )


def wire(app: "Dash", site: Site) -> None:
    """Callbacks and routes of the page."""
    from dash import ClientsideFunction, Input, Output, no_update

    routes(app.server, site.library)

    @app.callback(
        Output("vision-place", "data"),
        Output("vision-note", "children"),
        Output("vision-body", "hidden"),
        Output("vision-tower", "data"),
        Output("vision-tower", "placeholder"),
        Output("vision-by", "data"),
        Output("vision-by", "placeholder"),
        Input("vision-which", "data"),
    )
    def which(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        try:
            if "run" not in feed:
                raise RunError("no run is chosen", hint="choose one in the header")
            found = site.run(feed)
            trace = traced(found, feed)
            tower = seen_tower(trace, feed)
            heads, by = best_heads(found, trace, tower, feed)
        except InterpError as error:
            return None, nothing(site, feed, error), True, [], "", [], ""
        place = {
            "run": found.name, "prompt": trace.key, "id": trace.id, "tower": tower, "by": by,
            "heads": [[str(h), v] for h, v in heads],
            "asked": [feed.get("prompt", ""), feed.get("tower", "")],
            "layers": {i: layer.n_heads for i, layer in trace.tower(tower).layers.items()},
        }  # fmt: skip
        tables = visual_tables(found, tower)
        choices = [*({"value": n, "label": n} for n in tables),
                   {"value": MASS, "label": "mass on the image"}]  # fmt: skip
        named = next(c["label"] for c in choices if c["value"] == by)
        return place, "", False, towers_of(trace), tower, choices, named

    @app.callback(
        Output("vision-budget", "figure"),
        Output("vision-budget-text", "children"),
        Input("vision-budgets", "data"),
    )
    def budgets(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            return drawn_budget(site.run(feed), feed)
        except InterpError as error:
            return said(told(error), feed.get("theme")), ""

    @app.callback(
        Output("vision-pointing", "rowData"),
        Output("vision-pointing-note", "children"),
        Output("vision-box", "data"),
        Output("vision-box", "placeholder"),
        Input("vision-points", "data"),
    )
    def points(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            found = site.run(feed)
            tower = seen_tower(traced(found, feed), feed)
            rows, note, names, name = pointed(found, tower, feed.get("vbox"))
        except InterpError as error:
            return [], told(error), [], ""
        return rows, note, names, name

    app.clientside_callback(
        ClientsideFunction("headscope", "vision_place"), Input("vision-place", "data"),
        prevent_initial_call=True,
    )  # fmt: skip


def python(site: Site, feed: Feed) -> str:
    """The Python that reads the same row."""
    if "run" not in feed:
        return ""
    found = site.run(feed)
    trace = traced(found, feed)
    tower = seen_tower(trace, feed)
    head = head_of({**feed, "tower": tower})
    name = head if head is not None else best_heads(found, trace, tower, feed, 1)[0][0][0]
    query = query_of(trace, tower, feed.get("lock"))
    row = (
        f"row = head.rows([{query}])[0]" if query is not None
        else "row = np.nan_to_num(head.block((0, head.n_query), (0, head.n_key))).mean(0)"
    )  # fmt: skip
    return (
        "import numpy as np\nfrom interp.traces import Trace\n\n"
        f"trace = Trace({str(trace.folder)!r})\n"
        f"head = trace.head({str(name)!r})\n{row}\n"
        f'boxes = trace.pictures[0]["{tower}/boxes"]  # pixels of each position; NaN: none'
    )


def command(site: Site, feed: Feed) -> str:
    """The command that made what is shown."""
    if "run" not in feed:
        return ""
    return str(site.run(feed).info.get("command") or "")


enter(
    Page(
        "vision", "Vision", "/r/{run}/vision", layout, wire,
        feeds={
            "vision-which": ("run", "prompt", "tower", "metric", "vby", "lock"),
            "vision-budgets": ("run", "prompt", "tower", "lock", "layer", "head", "vsplit",
                               "vsource", "theme"),
            "vision-points": ("run", "prompt", "tower", "vbox"),
        },
        binds={
            "vision-tower": ("value", "tower"), "vision-by": ("value", "vby"),
            "vision-split": ("value", "vsplit"), "vision-source": ("value", "vsource"),
            "vision-box": ("value", "vbox"),
        },
        keys=("layer", "head", "patches", "vby", "vsplit", "vsource", "vbox", "opacity", "smooth",
              "contour", "noboxes", "frame", "every"),
        order=4, python=python, command=command,
        help="heads on images: overlays for any patch grid, readers of patches, budgets, pointing",
    )
)  # fmt: skip
