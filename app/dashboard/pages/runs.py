"""Runs: what there is under the folder."""

from typing import TYPE_CHECKING, Any

from app.dashboard.grids import grid, link_column
from app.dashboard.library import Entry, place_of
from app.dashboard.page import Feed, Page, Site, enter
from interp.errors import InterpError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

START = (
    "headscope rank retrieval --model zoo:needle",
    "headscope capture --model zoo:needle --task needle --n 2",
    "headscope verdict retrieval --model zoo:needle",
)
COLUMNS = (
    link_column("run", "Run", "/r/{}/heads", width=330),
    {"field": "kind", "headerName": "What", "width": 110},
    {"field": "status", "headerName": "Status", "width": 120},
    {"field": "model", "headerName": "Model", "width": 150},
    {"field": "dtype", "headerName": "Dtype", "width": 100},
    {"field": "attention", "headerName": "Attention", "width": 125},
    {"field": "examples", "headerName": "Prompts", "width": 115, "type": "numericColumn"},
    {"field": "longest", "headerName": "T max", "width": 105, "type": "numericColumn"},
    {"field": "scores", "headerName": "Scores", "width": 260},
    {"field": "traces", "headerName": "Traces", "width": 105, "type": "numericColumn"},
    {"field": "seen", "headerName": "Inputs", "width": 100},
    {"field": "created", "headerName": "Made", "width": 175},
    {"field": "version", "headerName": "Version", "width": 90},
)


def layout(site: Site) -> "Component":
    """A table, or how to make the first run."""
    from dash import html

    return html.Div(
        [
            html.H1("Runs"),
            html.Div(id="runs-note"),
            html.Div(
                [
                    html.Button("Compare the two chosen", id="runs-compare", className="plain"),
                    html.Button("Look again", id="runs-again", className="plain"),
                ],
                className="row",
            ),
            grid("runs-table", COLUMNS, key="run", choose="multiRow", label="table of runs"),
        ]
    )


def wire(app: "Dash", site: Site) -> None:
    """Fill the table."""
    from dash import ClientsideFunction, Input, Output, State, html, no_update

    @app.callback(
        Output("runs-table", "rowData"),
        Output("runs-note", "children"),
        Input("runs-list", "data"),
        Input("runs-again", "n_clicks"),
    )
    def fill(feed: Feed | None, again: int | None) -> Any:
        if feed is None:
            return no_update, no_update
        entries = site.library.entries()
        note: Any = [
            html.P(f"{e.name}: {e.error}; {e.hint}", className="alert", role="alert")
            for e in entries
            if e.run is None
        ]
        if not entries:
            note = [
                html.P(f"There is no run in {site.root} yet. Each of these makes one:"),
                html.Pre("\n".join(START), tabIndex="0"),
            ]
        return [row_of(e, _longest(site, e)) for e in entries], note

    app.clientside_callback(
        ClientsideFunction("headscope", "compare_chosen"),
        Input("runs-compare", "n_clicks"),
        State("runs-table", "selectedRows"),
        prevent_initial_call=True,
    )
    app.clientside_callback(ClientsideFunction("headscope", "runs"), Input("run-select", "data"))


def row_of(entry: Entry, longest: int | None = None) -> dict[str, Any]:
    """One run as a row of the table; `longest` is the number of tokens of its longest trace."""
    if entry.run is None:
        return {"run": entry.name, "kind": "damaged", "status": "damaged"}
    info = entry.run.info
    key = info.get("key", {})
    scores = info.get("scores") or {}
    folder = entry.run.folder
    return {
        "run": entry.name,
        "to": place_of(entry.name, info),
        "kind": info.get("view") or info.get("kind") or _command(info.get("command")),
        "model": info.get("model") or key.get("model"),
        "dtype": str(key.get("dtype") or "").removeprefix("torch."),
        "attention": key.get("attention"),
        "examples": _sum(key, "n"),
        "longest": longest,
        "scores": ", ".join(scores),
        "traces": len(list((folder / "traces").iterdir())) if (folder / "traces").is_dir() else 0,
        "seen": "images, text" if (folder / "extra" / "sight.safetensors").exists() else "text",
        "status": entry.run.status,
        "created": str(info.get("created") or "").replace("T", " ").rstrip("Z"),
        "version": key.get("headscope"),
    }


def _command(line: object) -> str:
    """The name of the command of a line: `rank` of `headscope rank sink`."""
    words = str(line or "").split()
    return words[1] if len(words) > 1 else "rank"


def _longest(site: Site, entry: Entry) -> int | None:
    if entry.run is None or not (entry.run.folder / "traces").is_dir():
        return None
    try:
        traces = site.library.open(entry.name).traces
    except InterpError:
        return None
    return max((len(t.tokens) for t in traces.values()), default=None)


def _sum(key: Any, name: str) -> int | None:
    tasks = key.get("tasks")
    if isinstance(tasks, list):
        found = [t.get(name) for t in tasks if isinstance(t, dict)]
        return max((n for n in found if isinstance(n, int)), default=None)
    n = key.get(name)
    return n if isinstance(n, int) else None


enter(
    Page(
        "runs", "Runs", "/", layout, wire, feeds={"runs-list": ("page",)}, order=0,
        help="every run under the folder; choose two to compare them",
    )
)  # fmt: skip
