"""Head: one head's map at any length, its tokens, budgets, evidence and effects."""

from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.headfacts import alike, badges, causes, evidence, writes
from app.dashboard.modes import MODES, window_of
from app.dashboard.page import Feed, Page, Site, enter, head_of, told
from app.dashboard.pages.heads import ROWS, shown
from app.figures.bars import distance_bars, entropy_line, segment_map
from app.figures.maps import SCALES, marked, window_figure
from app.figures.style import said
from interp.errors import InterpError
from interp.headid import DEFAULT_TOWER, HeadId
from interp.traces.pooling import Window, decode
from interp.traces.trace import HeadTrace

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

    from app.dashboard.library import OpenRun


def layout(site: Site) -> "Component":
    """The map and the tokens beside each other, facts below."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    head = html.Div(
        [
            html.Div(
                [
                    html.H1("Head", id="head-title"),
                    html.Button("◀ [", id="head-before", className="plain",
                                **{"aria-label": "previous head of the ranking"}),
                    html.Button("] ▶", id="head-after", className="plain",
                                **{"aria-label": "next head of the ranking"}),
                    html.Button("basket (b)", id="head-toss", className="plain"),
                ],
                className="row",
            ),
            html.Div(id="head-badges"),
            html.Div(id="head-note"),
        ]
    )  # fmt: skip
    tools = html.Div(
        [
            dmc.SegmentedControl(
                id="head-mode",
                size="xs",
                value="attention",
                data=[{"value": v, "label": n} for v, n in MODES],
            ),
            dmc.SegmentedControl(id="head-scale", size="xs", value="sqrt", data=list(SCALES)),
            html.Button("whole map (z)", id="head-out", className="plain"),
            html.Span(id="head-window", className="faint"),
        ],
        className="row",
    )
    tokens = html.Div(
        [
            html.H2("Tokens"),
            html.P(
                "Hover looks along a row, with Shift along a column; a click locks. "
                "Arrow keys move.",
                className="faint",
            ),
            html.Div(id="token-facts", className="facts-line"),
            html.Div(
                [
                    html.Div(id="tokens", className="tokens", tabIndex="0", role="textbox",
                             **{"aria-label": "tokens of the prompt", "aria-readonly": "true",
                                "aria-multiline": "true", "aria-describedby": "token-facts"}),
                    html.Canvas(id="lines", **{"aria-hidden": "true"}),
                ],
                className="token-box",
            ),
        ],
        className="card",
    )  # fmt: skip
    graph = {"displaylogo": False, "doubleClick": "autosize", "scrollZoom": False}
    return html.Div(
        [
            head,
            dcc.Store(id="head-place"),
            html.Div(
                [
                    html.Div(
                        [
                            html.H2("Map"),
                            tools,
                            html.Div(
                                dcc.Graph(id="head-map", config=graph), role="group",
                                id="head-map-box", **{"aria-label": "attention map",
                                                        "aria-describedby": "head-map-text"},
                            ),
                            html.P(id="head-map-text", className="faint"),
                        ],
                        className="card",
                    ),
                    tokens,
                ],
                className="columns",
            ),
            html.Div(
                [
                    _card("Distance", "head-distance"),
                    _card("Segments", "head-segments"),
                    _card("Entropy", "head-entropy"),
                ],
                className="columns",
            ),
            html.Div(
                [
                    html.Div([html.H2("Evidence"), html.Div(id="head-evidence")], className="card"),
                    html.Div([html.H2("Causes"), html.Div(id="head-causes")], className="card"),
                    html.Div([html.H2("Writes"), html.Div(id="head-writes")], className="card"),
                    html.Div([html.H2("Alike"), html.Div(id="head-alike")], className="card"),
                ],
                className="columns",
            ),
        ]
    )  # fmt: skip


def _card(title: str, id: str) -> "Component":
    from dash import dcc, html

    return html.Div(
        [html.H2(title), dcc.Graph(id=id, config={"displaylogo": False})], className="card"
    )


def wire(app: "Dash", site: Site) -> None:
    """Callbacks of the page."""
    from dash import ClientsideFunction, Input, Output, html, no_update

    @app.callback(
        Output("head-place", "data"),
        Output("head-title", "children"),
        Output("head-badges", "children"),
        Output("head-note", "children"),
        Input("head-which", "data"),
    )
    def which(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            found = site.run(feed)
            head = meant(found, feed)
        except InterpError as error:
            return {}, "Head", [], html.P(told(error), className="alert", role="alert")
        place = {"run": found.name, "prompt": None, "tower": head.tower,
                 "layer": str(head.layer), "head": str(head.head)}  # fmt: skip
        try:
            layer = traced_head(found, feed).layer
            place |= {"prompt": layer.tower.trace.key, "tower": layer.tower.name}
            note = html.P(faithful(layer.form, layer.error, layer.note), className="faint")
        except InterpError as error:
            note = html.P(told(error), className="alert", role="alert")
        return place, f"Head {head}", badges(found, head), note

    @app.callback(
        Output("head-evidence", "children"),
        Output("head-causes", "children"),
        Output("head-writes", "children"),
        Output("head-alike", "children"),
        Input("head-facts", "data"),
    )
    def facts(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            found = site.run(feed)
            head = meant(found, feed)
        except InterpError:
            return ("",) * 4
        return (
            evidence(found, head, feed), causes(site, found, head), writes(found, head, feed),
            alike(found, head),
        )  # fmt: skip

    @app.callback(
        Output("head-map", "figure"),
        Output("head-window", "children"),
        Output("head-map-text", "children"),
        Input("head-view", "data"),
    )
    def draw(feed: Feed | None) -> Any:
        if not feed or "run" not in feed or "layer" not in feed:
            return no_update
        theme = feed.get("theme")
        try:
            traced = traced_head(site.run(feed), feed)
            window, scaled = window_of(traced, feed)
        except InterpError as error:
            return said(told(error), theme), "", told(error)
        tower = traced.layer.tower
        figure = window_figure(
            window, theme=theme, scale=feed.get("scale") or "sqrt",
            queries=tower.labels("query"), keys=tower.labels("key"),
        )  # fmt: skip
        if scaled != 1.0:
            figure.update_traces(colorbar={"title": {"text": f"attention × {scaled:.3g}"}})
        return figure, pooling(window), summary(traced, window)

    @app.callback(
        Output("head-distance", "figure"),
        Output("head-segments", "figure"),
        Output("head-entropy", "figure"),
        Input("head-budget", "data"),
    )
    def budgets(feed: Feed | None) -> Any:
        if not feed or "run" not in feed or "layer" not in feed:
            return no_update
        theme = feed.get("theme")
        try:
            head = traced_head(site.run(feed), feed)
            return (
                distance_bars(head.summary("distance"), theme=theme),
                segment_map(head.summary("segments"), head.layer.tower.segments, theme=theme),
                entropy_line(head.summary("entropy"), seen_by(head), theme=theme),
            )
        except InterpError as error:
            return tuple(said(told(error), theme) for _ in range(3))

    for prop, source, function in (
        ("data", "head-place", "place"),
        ("relayoutData", "head-map", "zoomed"),
        ("n_clicks", "head-before", "head_before"),
        ("n_clicks", "head-after", "head_after"),
        ("n_clicks", "head-toss", "head_toss"),
        ("n_clicks", "head-out", "zoom_out"),
    ):
        app.clientside_callback(
            ClientsideFunction("headscope", function), Input(source, prop),
            prevent_initial_call=True,
        )  # fmt: skip


def meant(run: "OpenRun", feed: Feed) -> HeadId:
    """The head that a feed names, the strongest if it names none.

    Without a tower in the address the head is of the run's own: a vision model has no text.
    """
    head = head_of(feed)
    if head is None:
        return best_of(run, feed)
    if feed.get("tower"):
        return head
    towers = [t for table in run.tables.values() for t in table.towers]
    towers += [t for trace in list(run.traces.values())[:1] for t in trace.towers]
    tower = DEFAULT_TOWER if DEFAULT_TOWER in towers or not towers else towers[0]
    return HeadId(head.layer, head.head, tower)


def seen_by(head: HeadTrace) -> np.ndarray:
    """[query] number of keys that each query sees."""
    seen: np.ndarray = head.layer.array("high") - head.layer.array("low")
    return seen


def best_of(run: "OpenRun", feed: Feed) -> HeadId:
    """The strongest head of the table that a feed names."""
    table = shown(run, feed)
    return (table.top(1) or table.heads)[0]


def traced_head(run: "OpenRun", feed: Feed) -> HeadTrace:
    """The head that a feed names, in the trace that it names."""
    trace = run.trace(feed.get("prompt"))
    head = head_of(feed) or HeadId(0, 0)
    if head.tower == DEFAULT_TOWER and DEFAULT_TOWER not in trace.towers:
        head = HeadId(head.layer, head.head, next(iter(trace.towers)))
    return trace.head(head)


def pooling(window: Window) -> str:
    """What one cell of a window is, in words."""
    where = f"queries {window.q0}–{window.q1 - 1}, keys {window.k0}–{window.k1 - 1}"
    if window.exact:
        return f"{where}, every entry"
    return f"{where}, a cell is the largest of {window.pool_q} × {window.pool_k} entries"


def summary(head: HeadTrace, window: Window) -> str:
    """The map in words, for those who do not see it."""
    rows, columns = np.unravel_index(np.argsort(window.codes, axis=None)[::-1][:3],
                                     window.codes.shape)  # fmt: skip
    keys, queries = head.layer.tower.labels("key"), head.layer.tower.labels("query")
    parts = []
    for r, c in zip(rows.tolist(), columns.tolist(), strict=True):
        i, j = window.q0 + r * window.pool_q, window.k0 + c * window.pool_k
        value = float(decode(window.codes[r : r + 1, c : c + 1])[0, 0])
        parts.append(f"{marked(queries[i])} ({i}) to {marked(keys[j])} ({j}) {value:.2f}")
    return f"Strongest here: {'; '.join(parts)}."


def faithful(form: str, error: float | None, note: str) -> str:
    """What a layer's map is worth, in words."""
    if form == "exact":
        return f"Recomputed from q and k; differs from the model's own rows by at most {error:.1e}."
    whole = "every entry" if form == "rows" else "the largest entries of each row"
    return f"Not reconstructible: {note}. Shown from stored rows, {whole}."


def python(site: Site, feed: Feed) -> str:
    """The Python that shows the same head in a notebook."""
    head = head_of(feed)
    if head is None or "run" not in feed:
        return ""
    prompt = f", prompt={feed['prompt']!r}" if "prompt" in feed else ""
    folder = str(site.root / feed["run"])
    return (
        f"from app import show_head\nfrom interp.run import Run\n\n"
        f"show_head(Run.load({folder!r}), {str(head)!r}{prompt})"
    )


def command(site: Site, feed: Feed) -> str:
    """The command that writes the same head to a file."""
    head = head_of(feed)
    if head is None or "run" not in feed:
        return ""
    return f"headscope export {site.root / feed['run']} --head {head} --out {head}.html"


enter(
    Page(
        "head", "Head", "/r/{run}/head/{layer}/{head}", layout, wire,
        feeds={
            "head-which": ("run", "prompt", "tower", "layer", "head", "metric"),
            "head-facts": ("run", "prompt", "tower", "layer", "head", "metric"),
            "head-view": ("run", "prompt", "tower", "layer", "head", "q", "k", "mode", "scale",
                          "theme"),
            "heads-rows": ROWS,
            "head-budget": ("run", "prompt", "tower", "layer", "head", "theme"),
        },
        binds={"head-mode": ("value", "mode"), "head-scale": ("value", "scale")},
        later=("head-facts", "head-budget", "heads-rows"),
        keys=("mode", "scale", "hide", "lines"), order=2, python=python, command=command,
        help="one head: its map recomputed at any zoom, tokens, budgets, evidence, effects",
    )
)  # fmt: skip
