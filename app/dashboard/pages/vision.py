"""Vision: heads on the images of a prompt, and back from patches to tokens and heads."""

from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.grids import grid, number_column
from app.dashboard.page import Feed, Page, Site, enter, head_of, told
from app.dashboard.pages.heads import HEAD
from app.dashboard.vision import (
    MASS,
    best_heads,
    box_names,
    budget,
    own_query,
    pointing,
    query_of,
    shift_of,
    towers_of,
    visual_tables,
)
from app.dashboard.vision_routes import routes
from app.figures.maps import marked
from app.figures.style import said
from app.figures.vision import budget_bars
from interp.errors import InterpError, RunError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

    from app.dashboard.library import OpenRun
    from interp.traces.trace import Trace

COLUMNS = (
    HEAD,
    number_column("pointing", "Hits", width=90, digits=3),
    number_column("share", "In box", width=100, digits=3),
    number_column("chance", "Chance", width=105, digits=3),
    number_column("lift", "× chance", width=115, digits=3),
    number_column("mass", "Image", width=100, digits=3),
    {"field": "n", "headerName": "n", "width": 70, "type": "numericColumn"},
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


def traced(run: "OpenRun", feed: Feed) -> "Trace":
    """The trace that a feed names; the first with images if it names none.

    Raises:
        RunError: the run has no traces.
        UnknownNameError: no such trace.
    """
    if "prompt" in feed:
        return run.trace(feed["prompt"])
    first = run.trace(None)
    return next((t for t in run.traces.values() if t.has_pictures), first)


def seen_tower(trace: "Trace", feed: Feed) -> str:
    """The tower that a feed names, if its positions stand for pixels; else the first of which so.

    Raises:
        RunError: there is none.
    """
    towers = towers_of(trace)
    return feed["tower"] if feed.get("tower") in towers else towers[0]


def nothing(site: Site, feed: Feed, error: InterpError) -> "list[Component]":
    """Why there is nothing to see, and the command that makes it."""
    from dash import html

    out = [html.P(told(error), className="alert", role="alert")]
    if "run" not in feed:
        return out
    try:
        found = site.run(feed)
    except InterpError:
        return out
    others = [(key, t.id) for key, t in found.traces.items() if t.has_pictures]
    if others and "prompt" in feed:
        links = [
            html.Li(html.A(name, href=f"/r/{found.name}/vision?p={key}")) for key, name in others
        ]
        return [*out, html.P("Prompts of this run with images:"), html.Ul(links[:40])]
    model = found.info.get("model") or found.info.get("key", {}).get("model") or "MODEL"
    return [
        *out,
        html.P("A trace of a prompt with an image is made by:"),
        html.Pre(
            f"headscope capture --model {model} --image PICTURE.png --prompt TEXT", tabIndex="0"
        ),
    ]


def drawn_budget(run: "OpenRun", feed: Feed) -> Any:
    """The bars of a feed, and the same in words.

    Raises:
        InterpError: there is no such trace, or it is damaged.
    """
    trace = traced(run, feed)
    tower = seen_tower(trace, feed)
    found = trace.tower(tower)
    query = query_of(trace, tower, feed.get("lock"))
    heads, mass = budget(trace, tower, query, by_segment=feed.get("vsource") == "segment")
    layer_of = np.array([h.layer for h in heads])
    head = head_of({**feed, "tower": tower})
    layer = head.layer if head is not None and head.layer in found.layers else int(layer_of[0])
    whose = words(trace, tower, query, by_segment=feed.get("vsource") == "segment")
    if feed.get("vsplit") == "heads":
        bars, at = mass[layer_of == layer], list(range(int((layer_of == layer).sum())))
        axis, pointer = "head", head.head if head is not None else None
        text = f"Heads of layer {layer} of {tower}. {whose}."
    else:
        at = sorted(found.layers)
        bars = np.stack([mass[layer_of == i].mean(0) for i in at])
        axis, pointer = "layer", layer
        text = f"Mean over the heads of each layer of {tower}. {whose}."
    if "image" in found.segments:
        images = bars[:, found.segments.index("image")]
        best = int(images.argmax())
        text += f" The image gets most in {axis} {at[best]}: {images[best]:.2f}."
    figure = budget_bars(
        bars, found.segments, at, axis=axis, theme=feed.get("theme"), marked=pointer
    )
    return figure, text


def words(trace: "Trace", tower: str, query: int | None, *, by_segment: bool) -> str:
    """Which queries a budget is that of."""
    found = trace.tower(tower)
    if query is None:
        return "Mean over all queries"
    if by_segment:
        name = found.segments[found.about["query_segments"][query]]
        return f"Mean over the queries of segment {name}"
    label = marked(found.labels("query")[query])
    own = ", the prompt's own" if query == own_query(trace, tower) else ""
    return f"From {label} ({query + shift_of(found)}){own}"


def pointed(
    run: "OpenRun", tower: str, box: str | None
) -> tuple[list[dict[str, Any]], str, list[str], str]:
    """Rows of the table of pointing, a line on them, names of boxes, and the one that was taken."""
    traces = list(run.traces.values())
    names = box_names(traces)
    if not names:
        line = "No prompt of this run names a box: boxes in a file of prompts do, or a task's own."
        return [], line, [], ""
    name = box if box in names else names[0]
    rows = pointing(traces, tower, name)
    n = max((r["n"] for r in rows), default=0)
    if not n:
        return [], f"No patch of {tower} touches a box named {name}.", names, name
    few = " With so few, a head may hit by luck." if n < 20 else ""
    line = (
        f"{n} prompts with a box {name}, each from its own query. Hits: how often the patch with "
        f"the largest mass touches the box. In the box: share of the image mass on patches that "
        f"touch it. By chance: share of patches that touch it.{few}"
    )
    return rows, line, names, name


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
        else "row = head.block((0, head.n_query), (0, head.n_key)).mean(0)"
    )  # fmt: skip
    return (
        "from interp.traces import Trace\n\n"
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
