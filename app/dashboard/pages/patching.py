"""Patching: effects of heads and layers at positions, of heads, and of windows of layers."""

from typing import TYPE_CHECKING, Any

from app.dashboard import patching as of
from app.dashboard.page import Feed, Page, Site, enter, told
from app.dashboard.pages.heads import tower_of
from app.dashboard.patching_form import line_wired
from app.dashboard.patching_layout import HEADS, layout
from app.dashboard.patching_panels import choices, prompts
from app.dashboard.patching_routes import command, csv_link, python, routes
from app.figures.patching import effect_grid, position_map, window_curves
from app.figures.style import said
from app.positions import ROWS
from interp.errors import InterpError

if TYPE_CHECKING:
    from dash import Dash

PARTS = ("choice", "maps", "heads", "windows")
"""Parts of the page that are there only where the run has something for them."""


def wire(app: "Dash", site: Site) -> None:
    """Figures follow the feeds, clicks change the state."""
    from dash import ClientsideFunction, Input, Output, no_update

    routes(app.server, site.library)
    line_wired(app, site)

    @app.callback(
        Output("patching-note", "children"),
        Output("patching-runs", "children"),
        Output("patching-controls", "hidden"),
        *(Output(f"patching-{part}", "hidden") for part in PARTS),
        Output("patching-metric", "data"),
        Output("patching-metric", "placeholder"),
        Output("patching-tower", "data"),
        Output("patching-tower", "placeholder"),
        Output("patching-example", "data"),
        Output("patching-by", "data"),
        Input("patching-run", "data"),
    )
    def which(feed: Feed | None) -> Any:
        return no_update if feed is None else choices(site, feed)

    @app.callback(
        *(
            Output(f"patching-map-{rows}{end}", prop)
            for rows in ROWS
            for end, prop in (("", "figure"), ("-text", "children"), ("-csv", "href"))
        ),
        Output("patching-floor", "children"),
        Output("patching-prompts", "children"),
        Output("patching-cells", "rowData"),
        Input("patching-view", "data"),
    )
    def draw(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        theme, threshold = feed.get("theme"), of.number(feed, "pmin")
        try:
            run = site.run(feed)
            sweep = of.sweep_of(run)
        except InterpError as error:
            return *(said(told(error), theme), told(error), None) * 2, "", "", []
        out: list[Any] = []
        floor = ""
        for rows in ROWS:
            try:
                view = of.shown(sweep, rows, feed)
                hidden = len(sweep.names(rows)) - len(view.rows)
                out += [
                    position_map(view, theme=theme, threshold=threshold),
                    of.summary(view, threshold, hidden),
                    csv_link(run, rows, sweep, feed),
                ]
                floor = of.floor_note(sweep, view, threshold)
            except InterpError as error:
                out += [said(told(error), theme), told(error), None]
        try:
            listed = of.cell_rows(sweep, feed)
        except InterpError:
            listed = []
        return *out, floor, prompts(sweep, of.example_of(feed)), listed

    @app.callback(
        Output("patching-grid", "figure"),
        Output("patching-grid-text", "children"),
        Output("patching-table", "rowData"),
        Output("patching-table", "columnDefs"),
        Output("patching-csv", "href"),
        Output("patching-parquet", "href"),
        Input("patching-table-view", "data"),
    )
    def heads(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        theme, threshold = feed.get("theme"), of.number(feed, "pmin")
        try:
            run = site.run(feed)
            table = of.effects(run, feed)
            floor = of.floor_of(run, table)
            figure = effect_grid(
                table, tower=tower_of(table, feed), theme=theme, threshold=threshold, floor=floor,
                recovered=feed.get("pval") == "recovered",
            )  # fmt: skip
        except InterpError as error:
            return said(told(error), theme), told(error), [], no_update, None, None
        at = f"/data/{run.name}/table/{table.detector}"
        kv = table.granularity == "kv"
        columns = [{**c, "hide": c["field"] == ("head" if kv else "group")}
                   if c["field"] in ("head", "group") else c for c in HEADS]  # fmt: skip
        rows = of.head_rows(table, threshold, floor)
        return figure, of.table_note(table, rows), rows, columns, f"{at}.csv", f"{at}.parquet"

    @app.callback(
        Output("patching-curves", "figure"),
        Output("patching-windows-text", "children"),
        Output("patching-windows-csv", "href"),
        Input("patching-windows-view", "data"),
    )
    def windows(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        theme = feed.get("theme")
        try:
            run = site.run(feed)
            rows, note = of.windows_of(run)
            return window_curves(rows, theme=theme), note, f"/data/{run.name}/windows.csv"
        except InterpError as error:
            return said(told(error), theme), told(error), None

    for graph, function in (
        ("patching-map-head", "patching_row"), ("patching-map-layer", "patching_layer"),
        ("patching-grid", "head_clicked"),
    ):  # fmt: skip
        app.clientside_callback(
            ClientsideFunction("headscope", function), Input(graph, "clickData"),
            prevent_initial_call=True,
        )  # fmt: skip


enter(
    Page(
        "patching", "Patching", "/r/{run}/patch", layout, wire,
        feeds={
            "patching-run": ("run", "page"),
            "patching-view": ("run", "pex", "pby", "pval", "prows", "play", "pmin", "theme"),
            "patching-table-view": ("run", "metric", "tower", "pval", "pmin", "theme"),
            "patching-windows-view": ("run", "theme"),
        },
        binds={
            "patching-metric": ("value", "metric"), "patching-tower": ("value", "tower"),
            "patching-example": ("value", "pex"), "patching-by": ("value", "pby"),
            "patching-value": ("value", "pval"), "patching-rows": ("value", "prows"),
            "patching-layer": ("value", "play"), "patching-threshold": ("value", "pmin"),
        },
        keys=("pex", "pby", "pval", "prows", "play", "pmin"), order=6,
        python=python, command=command,
        help="effects of patching: heads and layers by positions, all heads, windows of layers",
    )
)  # fmt: skip
