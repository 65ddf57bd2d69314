"""Prompt: write or paste one, see its tokens and its cost, run it; two beside each other; needles.

Texts stay in the page and in the requests of this server: the URL holds the hash of a trace, never
a text.
"""

from typing import TYPE_CHECKING, Any

from app.catalog import entries
from app.dashboard.page import Feed, Page, Site, enter, span_of, told
from app.dashboard.prompt_diff import difference, window_of
from app.dashboard.prompt_panels import compared, needles, seen, writing
from app.dashboard.prompt_routes import routes
from app.dashboard.prompt_views import (
    NONE,
    chosen,
    described_map,
    drawn_grid,
    drawn_row,
    heads_of,
    labels_of,
    model_of,
    pair_of,
    prompts_of,
)
from app.figures.prompt import difference_map
from app.figures.style import said
from app.loading import ZOO
from interp.errors import InterpError, RunError
from interp.headid import HeadId

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component


def layout(site: Site) -> "Component":
    """What is written beside what the model makes of it; the difference and needles below."""
    from dash import dcc, html

    return html.Div(
        [
            html.H1("Prompt"),
            html.Div(id="prompt-note"),
            dcc.Store(id="prompt-place"),
            html.Div([writing(site), seen(site)], className="columns"),
            compared(),
            needles(site),
        ]
    )


def wire(app: "Dash", site: Site) -> None:
    """Callbacks and routes of the page."""
    from dash import ClientsideFunction, Input, Output, State, html, no_update

    routes(app.server, site)

    @app.callback(
        Output("prompt-place", "data"),
        Output("prompt-note", "children"),
        Output("prompt-model", "data"),
        Output("prompt-model", "placeholder"),
        Input("prompt-which", "data"),
    )
    def which(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        known = [f"{ZOO}{name}" for name in entries("zoo model")]
        model, note, run, first = "", "", None, None
        try:
            if feed.get("run", NONE) != NONE:
                found = site.run(feed)
                run, model = found.name, model_of(found)
                first = feed.get("prompt") or next(iter(found.traces), None)
        except InterpError as error:
            note = html.P(told(error), role="alert", className="alert")
        models = sorted({*known, *([model] if model else [])})
        place = {
            "run": run, "model": feed.get("model") or model, "prompt": feed.get("prompt"),
            "first": first, "works": site.jobs is not None,
        }  # fmt: skip
        return place, note, models, model or "zoo:needle"

    @app.callback(
        Output("prompt-one", "data"),
        Output("prompt-one", "placeholder"),
        Output("prompt-other", "data"),
        Output("prompt-other-run", "data"),
        Output("prompt-other-run", "placeholder"),
        Output("prompt-head", "data"),
        Output("prompt-head", "placeholder"),
        Output("prompt-ab-note", "children"),
        Input("prompt-ab", "data"),
    )
    def choices(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        names = site.library.names()
        try:
            if feed.get("run", NONE) == NONE:
                raise RunError("a difference needs a run with traces", hint=RUN_FIRST)
            found = site.run(feed)
            trace = found.trace(feed.get("prompt"))
            there = site.library.open(feed["abrun"]) if "abrun" in feed else found
            heads = heads_of(trace, feed)
            note = "Red is more in A, blue is more in B, grey is seen in neither."
            return (
                prompts_of(found), trace.id, prompts_of(there), names, found.name,
                [str(h) for h in heads], str(chosen(trace, feed)), note,
            )  # fmt: skip
        except InterpError as error:
            return [], "", [], names, "", [], "", told(error)

    @app.callback(
        Output("prompt-map", "figure"),
        Output("prompt-map-text", "children"),
        Input("prompt-view", "data"),
    )
    def draw(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        try:
            a, b, found = pair_of(site, feed)
            rows, columns = (span_of(feed.get(n), len(found)) for n in ("dq", "dk"))
            made = difference(a, b, found, *window_of(rows, columns))
        except InterpError as error:
            return said(told(error), feed.get("theme")), ""
        labels = labels_of(a, b, found)
        figure = difference_map(made, labels=labels, theme=feed.get("theme"))
        return figure, described_map(made, found, labels)

    @app.callback(
        Output("prompt-bars", "figure"),
        Output("prompt-bars-text", "children"),
        Input("prompt-line", "data"),
    )
    def bars(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        try:
            a, b, found = pair_of(site, feed)
            return drawn_row(a, b, found, feed)
        except InterpError as error:
            return said(told(error), feed.get("theme")), ""

    @app.callback(
        Output("prompt-grid", "figure"),
        Output("prompt-grid-text", "children"),
        Input("prompt-scores", "data"),
    )
    def grid(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        try:
            return drawn_grid(site, feed)
        except InterpError as error:
            return said(told(error), feed.get("theme")), ""

    for function, source, prop in (
        ("prompt_placed", "prompt-place", "data"),
        ("prompt_zoomed", "prompt-map", "relayoutData"),
        ("prompt_clicked", "prompt-map", "clickData"),
    ):
        app.clientside_callback(
            ClientsideFunction("headscope", function), Input(source, prop),
            prevent_initial_call=True,
        )  # fmt: skip
    app.clientside_callback(
        ClientsideFunction("headscope", "prompt_loaded"),
        Input("prompt-upload", "contents"),
        State("prompt-upload", "filename"),
        prevent_initial_call=True,
    )


RUN_FIRST = "write two prompts and run them, or choose a run in the header"


def command(site: Site, feed: Feed) -> str:
    """The command that captures a prompt of one's own."""
    model = feed.get("model") or (
        model_of(site.run(feed)) if feed.get("run", NONE) != NONE else "zoo:needle"
    )
    return f"headscope capture --model {model} --prompt TEXT"


def python(site: Site, feed: Feed) -> str:
    """The Python that works out the same difference."""
    if "ab" not in feed or feed.get("run", NONE) == NONE:
        return ""
    a, b, found = pair_of(site, feed)
    folders = [str(x.layer.tower.trace.folder) for x in (a, b)]
    head = str(HeadId(a.layer.index, a.head, a.layer.tower.name))
    return (
        "from app.dashboard.prompt_diff import align_towers, difference\n"
        "from interp.traces import Trace\n\n"
        f"a = Trace({folders[0]!r}).head({head!r})\n"
        f"b = Trace({folders[1]!r}).head({head!r})\n"
        "found = align_towers(a.layer.tower, b.layer.tower)\n"
        f"whole = (0, {len(found)})\n"
        "print(difference(a, b, found, whole, whole).values)"
    )


_PAIR = ("run", "prompt", "tower", "ab", "abrun", "dh", "layer", "head")

enter(
    Page(
        "prompt", "Prompt", "/r/{run}/prompt", layout, wire,
        feeds={
            "prompt-which": ("run", "prompt", "model"),
            "prompt-ab": ("run", "prompt", "tower", "abrun", "dh", "layer", "head"),
            "prompt-view": (*_PAIR, "dq", "dk", "theme"),
            "prompt-line": (*_PAIR, "dr", "theme"),
            "prompt-scores": ("run", "dh", "theme"),
        },
        binds={
            "prompt-model": ("value", "model"), "prompt-one": ("value", "prompt"),
            "prompt-other": ("value", "ab"), "prompt-other-run": ("value", "abrun"),
            "prompt-head": ("value", "dh"), "prompt-row": ("value", "dr"),
        },
        keys=("model", "ab", "abrun", "dh", "dq", "dk", "dr"), order=3,
        python=python, command=command,
        help="prompts of one's own: tokens and cost before running, A − B, needles by depth",
    )
)  # fmt: skip
