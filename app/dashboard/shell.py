"""What stands around every page: navigation, choice of run and prompt, basket, footer, help."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request

from app.dashboard.page import Feed, Page, Site, pages, told
from interp.errors import InterpError, UnknownNameError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

FEEDS = {"shell-run": ("run", "page"), "shell-prompt": ("run", "prompt", "tower")}
BINDS = {"run-select": ("value", "run"), "prompt-select": ("value", "prompt")}
KEYS = ("run", "lock")

SHORTCUTS = (
    ("← ↑ ↓ →", "move over the grid of heads"),
    ("Enter", "open the head under the cursor"),
    ("[ and ]", "previous and next head of the ranking"),
    ("/ or Ctrl K", "jump to a head: L12H7 or 12.7, or a page, or a run"),
    ("m", "next score"),
    ("s", "hide the sink and renormalise"),
    ("b", "put the head into the basket, or take it out"),
    ("x", "intervene on the basket"),
    ("z", "zoom out to the whole map"),
    ("Alt M", "light or dark"),
    ("?", "these shortcuts"),
    ("Esc", "close, unlock"),
    ("Alt ←", "undo: back to what was shown before"),
)


def layout(site: Site) -> "Component":
    """Everything, mounted once."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    every = pages()
    stores = [
        dcc.Store(id="config"),
        dcc.Store(id="booted"),
        dcc.Store(id="jobs-data"),
        *(dcc.Store(id=name) for name in FEEDS),
        # Pages may share a feed: it is one store.
        *(dcc.Store(id=name) for name in dict.fromkeys(f for page in every for f in page.feeds)),
    ]
    nav = html.Nav(
        [html.A(page.title, **{"data-to": page.name}, id=f"nav-{page.name}") for page in every],
        **{"aria-label": "pages"},
    )
    header = html.Header(
        [
            html.A("headscope", href="/", className="brand"),
            nav,
            html.Div(
                [
                    dmc.Select(
                        id="run-select", data=[], searchable=True, placeholder="run", size="xs",
                        w=200, **{"aria-label": "run"}, nothingFoundMessage="no such run",
                    ),
                    dmc.Select(
                        id="prompt-select", data=[], searchable=True, placeholder="prompt",
                        size="xs", w=160, **{"aria-label": "prompt"},
                        nothingFoundMessage="no such prompt",
                    ),
                    dmc.TextInput(
                        id="jump", placeholder="/ jump", size="xs", w=90,
                        **{"aria-label": "jump to a head, page or run"},
                    ),
                    html.Button("copy", id="copy-open", className="plain",
                                **{"aria-haspopup": "dialog"}),
                    html.Button("☾", id="theme-toggle", className="plain",
                                **{"aria-label": "light or dark"}),
                    html.Button("?", id="help-open", className="plain",
                                **{"aria-label": "shortcuts"}),
                ],
                className="tools",
            ),
        ]
    )  # fmt: skip
    panels = [
        html.Section(
            page.layout(site), hidden=True, id=f"page-{page.name}",
            **{"data-page": page.name, "aria-label": page.title},
        )
        for page in every
    ]  # fmt: skip
    missing = html.Section(
        [
            html.H1("No such page"),
            html.P(["The address leads nowhere. ", html.A("All runs", href="/")]),
        ],
        hidden=True, **{"data-page": "missing", "aria-label": "no such page"},
    )  # fmt: skip
    whole = dmc.MantineProvider(
        id="mantine",
        forceColorScheme="light",
        theme={"primaryColor": "blue", "fontFamily": "system-ui, 'DejaVu Sans', sans-serif",
               "primaryShade": {"light": 8, "dark": 4}, "autoContrast": True},
        children=[
            html.A("to the content", href="#main", className="skip"),
            *stores,
            header,
            html.Div(id="basket", className="basket", hidden=True, role="region",
                     **{"aria-label": "basket of heads"}),
            html.Main([*panels, missing], id="main", tabIndex="-1"),
            html.Footer(html.Div(id="provenance")),
            html.Div(id="live", role="status", className="unseen", **{"aria-live": "polite"}),
            html.Div(id="toasts", **{"aria-live": "polite"}),
            _shortcuts(), _copies(),
        ],
    )  # fmt: skip
    known = config(every, site)
    stores[0].data = known | {"choices": choices_of(whole, known["binds"])}
    return whole


def config(every: list[Page], site: Site) -> dict[str, Any]:
    """What `00_state.js` must know of the pages."""
    binds = {**BINDS, **{k: v for page in every for k, v in page.binds.items()}}
    keys = dict.fromkeys([*KEYS, *(k for page in every for k in page.keys)])
    return {
        "pages": {p.name: {"path": p.path, "title": p.title} for p in every},
        "feeds": {"shell": FEEDS, **{p.name: dict(p.feeds) for p in every}},
        "later": [feed for page in every for feed in page.later],
        "binds": binds,
        "keys": list(keys),
        "jobs": site.jobs is not None,
    }


def wire(app: "Dash", site: Site) -> None:
    """The callbacks of the shell."""
    from dash import ClientsideFunction, Input, Output, html, no_update

    known = config(pages(), site)
    binds = known["binds"]
    app.clientside_callback(
        ClientsideFunction("headscope", "boot"),
        Output("booted", "data"),
        Input("config", "data"),
        prevent_initial_call=False,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "bound"),
        *(Input(name, prop) for name, (prop, _) in binds.items()),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("headscope", "chosen_from"),
        *(Input(name, "data") for name in choices_of(app.layout, binds)),
        prevent_initial_call=True,
    )

    @app.callback(Output("run-select", "data"), Input("shell-run", "data"))
    def runs(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        return [{"value": n, "label": n} for n in site.library.names()]

    @app.callback(
        Output("prompt-select", "data"),
        Output("prompt-select", "placeholder"),
        Output("provenance", "children"),
        Input("shell-prompt", "data"),
    )
    def prompts(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return [], "prompt", ""
        try:
            found = site.run(feed)
            listed = [
                {"value": key, "label": f"{t.id} ({len(t.tokens)})"}
                for key, t in found.traces.items()
            ]
        except InterpError as error:
            return [], "prompt", html.P(told(error), role="alert", className="alert")
        first = listed[0]["label"] if listed else "no traces"
        return listed, first, provenance(found.name, found.info)


def choices_of(layout: "Component", binds: Mapping[str, Any]) -> list[str]:
    """Bound controls that are lists of choices."""
    lists = ("Select", "MultiSelect")
    return [c.id for c in layout._traverse() if _kind(c) in lists and c.id in binds]


def _kind(component: object) -> str:
    return str(getattr(component, "_type", "")) if getattr(component, "id", None) else ""


def provenance(name: str, info: Any) -> str:
    """Where the numbers come from, in a line."""
    key = info.get("key", {})
    facts = {
        "run": name, "hash": str(info.get("content_key", ""))[:10],
        "model": info.get("model") or key.get("model"), "revision": info.get("revision"),
        "weights": key.get("fingerprint"), "dtype": key.get("dtype"),
        "attention": key.get("attention"), "seed": info.get("seed", key.get("seed")),
        "headscope": key.get("headscope"), "python": info.get("python"),
        "made": info.get("created"),
    }  # fmt: skip
    return " · ".join(f"{k} {v}" for k, v in facts.items() if v not in (None, ""))


def routes(server: Flask, site: Site) -> None:
    """Copies of what is shown, and the state of jobs."""

    @server.get("/copy/<kind>")
    def copy(kind: str) -> Response:
        state = {k: v for k, v in request.args.items() if v}
        try:
            if kind not in ("python", "command"):
                raise UnknownNameError("kind of copy", kind, ("python", "command"))
            text = copied(kind, state, site)
        except InterpError as error:
            return Response(told(error), status=404, mimetype="text/plain")
        return Response(text, mimetype="text/plain")


def copied(kind: str, state: Feed, site: Site) -> str:
    """The Python or the command that shows what the page shows."""
    page = next((p for p in pages() if p.name == state.get("page")), None)
    own = getattr(page, kind, None)
    if own is not None and (made := own(site, state)):
        return str(made)
    if "run" not in state:
        return (
            f"headscope serve {site.root}"
            if kind == "command"
            else (f"from interp.run import Run\n\nrun = Run.load({str(site.root)!r} + '/NAME')")
        )
    found = site.run(state)
    folder = site.root / found.name
    if kind == "command":
        return str(found.info.get("command") or f"headscope show {folder}")
    name = state.get("metric") or next(iter(found.tables), None)
    lines = ["from interp.run import Run", "", f"run = Run.load({str(folder)!r})"]
    if name is not None:
        lines += [f"scores = run.scores[{name.partition('/')[0]!r}]", "scores.plot()"]
    return "\n".join(lines)


def _shortcuts() -> "Component":
    from dash import html

    rows = [html.Tr([html.Td(html.Kbd(k)), html.Td(what)]) for k, what in SHORTCUTS]
    return html.Dialog(
        [
            html.H2("Shortcuts", id="shortcuts-title"),
            html.Table(html.Tbody(rows)),
            html.P(["Every score and formula: ", html.A("Help", href="/help"), "."]),
            html.Button("Close", className="plain", **{"data-close": "shortcuts"}),
        ],
        id="shortcuts",
        **{"aria-labelledby": "shortcuts-title"},
    )


def _copies() -> "Component":
    from dash import html

    return html.Dialog(
        [
            html.H2("Copy or download what is shown", id="copies-title"),
            html.Div(
                [
                    html.Button("as link", id="copy-link", className="plain"),
                    html.Button("as Python", id="copy-python", className="plain"),
                    html.Button("as command", id="copy-command", className="plain"),
                ],
                className="row",
            ),
            html.Div(
                [
                    html.Button("figures as PNG", id="figures-png", className="plain"),
                    html.Button("figures as SVG", id="figures-svg", className="plain"),
                ],
                className="row",
            ),
            html.Pre(id="copy-text", tabIndex="0", **{"aria-label": "copied text"}),
            html.Button("Close", className="plain", **{"data-close": "copies"}),
        ],
        id="copies",
        **{"aria-labelledby": "copies-title"},
    )
