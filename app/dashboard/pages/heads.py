"""Heads: every head of a run, as a grid, as points, as a ranking and as small maps."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.grids import grid, number_column
from app.dashboard.library import OpenRun, place_of
from app.dashboard.page import Feed, Page, Site, basket_of, enter, told
from app.figures.scores import head_grid, head_scatter
from app.figures.style import said
from interp.errors import InterpError
from interp.scores import HeadScores

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

ROWS = ("run", "metric", "tower", "lo", "hi", "cls", "thr")
"""What the ranking depends on; the page of one head goes through it with [ and ]."""
HEAD = {
    "field": "head", "headerName": "Head", "width": 110, "cellRenderer": "HeadscopeHead",
    "pinned": "left",
}  # fmt: skip
COLUMNS = (
    HEAD,
    {"field": "rank", "headerName": "Rank", "width": 95, "type": "numericColumn"},
    number_column("score", "Score"),
    number_column("ci_lo", "95 % from", width=130),
    number_column("ci_hi", "to"),
    {"field": "n", "headerName": "n", "width": 70, "type": "numericColumn"},
    number_column("null", "Null"),
    number_column("percentile", "Above null, %", width=155, digits=3),
    number_column("q", "q"),
    {"field": "verdict", "headerName": "Verdict", "width": 150},
    {"field": "ranks", "headerName": "Rank range", "width": 140},
)


def layout(site: Site) -> "Component":
    """Controls above, four views below."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    controls = html.Div(
        [
            dmc.Select(id="heads-metric", label="Score", data=[], size="xs", w=230),
            dmc.Select(id="heads-tower", label="Tower", data=[], size="xs", w=120),
            dmc.NumberInput(id="heads-lo", label="From layer", size="xs", w=95, min=0),
            dmc.NumberInput(id="heads-hi", label="to layer", size="xs", w=95, min=0),
            dmc.Select(
                id="heads-class", label="Verdict", size="xs", w=170, clearable=True, data=[]
            ),
            dmc.NumberInput(
                id="heads-threshold", label="Threshold", size="xs", w=120, decimalScale=6
            ),
            html.Div(id="heads-passing", role="status", className="faint"),
        ],
        className="row",
    )
    return html.Div(
        [
            html.H1("Heads", id="heads-title"),
            html.Div(id="heads-note"),
            controls,
            html.Div(
                [
                    html.Div(
                        [
                            html.H2("Grid"),
                            html.Div(
                                html.Div(
                                    [
                                        dcc.Graph(id="heads-grid", config={"displaylogo": False}),
                                        html.Div(id="heads-cursor", hidden=True),
                                    ],
                                    className="frame",
                                ),
                                id="heads-app", tabIndex="0", role="application",
                                **{"aria-label": "grid of heads: arrow keys move, Enter opens",
                                   "aria-describedby": "live"},
                            ),
                        ],
                        className="card",
                    ),
                    html.Div(
                        [
                            html.H2("One score against another"),
                            html.Div(
                                [
                                    dmc.Select(id="heads-x", label="x", data=[], size="xs", w=200),
                                    dmc.Select(id="heads-y", label="y", data=[], size="xs", w=200),
                                ],
                                className="row",
                            ),
                            dcc.Graph(id="heads-scatter", config={"displaylogo": False}),
                            html.P("A click opens a head; a box drawn around heads puts them into "
                                   "the basket.", className="faint"),
                        ],
                        className="card",
                    ),
                ],
                className="columns",
            ),
            html.Div(
                [
                    html.H2("Ranking"),
                    html.Div(
                        [
                            html.A("CSV", id="heads-csv", download=""),
                            html.A("Parquet", id="heads-parquet", download=""),
                            html.Span("chosen rows are the basket", className="faint"),
                        ],
                        className="row",
                    ),
                    grid("heads-table", COLUMNS, key="head", choose="multiRow", label="ranking"),
                ],
                className="card",
            ),
            html.Div(
                [
                    html.H2("Small maps"),
                    html.P(id="heads-atlas-note", className="faint"),
                    html.Div(
                        html.Img(id="heads-atlas", className="atlas", alt="", n_clicks=0),
                        style={"overflow": "auto"}, tabIndex="0", role="group",
                        **{"aria-label": "small maps of all heads"},
                    ),
                ],
                className="card",
            ),
        ]
    )  # fmt: skip


def wire(app: "Dash", site: Site) -> None:
    """Figures follow the feeds, clicks change the state."""
    from dash import ClientsideFunction, Input, Output, html, no_update

    @app.callback(
        Output("heads-metric", "data"),
        Output("heads-x", "data"),
        Output("heads-y", "data"),
        Output("heads-tower", "data"),
        Output("heads-class", "data"),
        Output("heads-note", "children"),
        Output("heads-metric", "placeholder"),
        Output("heads-x", "placeholder"),
        Output("heads-y", "placeholder"),
        Output("heads-tower", "placeholder"),
        Input("heads-run", "data"),
    )
    def choices(feed: Feed | None) -> Any:
        nothing: tuple[list[str], ...] = ([],) * 5
        if not feed or "run" not in feed:
            note: Any = html.P(["Choose a run, or see ", html.A("all runs", href="/")])
            return *nothing, note, *("",) * 4
        found = None
        try:
            found = site.run(feed)
            names = list(found.tables)
            if not names:
                found.table(None)
        except InterpError as error:
            note = no_scores(found) if found is not None else None
            note = note or html.P(told(error), className="alert", role="alert")
            return *nothing, note, *("",) * 4
        towers = list(dict.fromkeys(t for s in found.tables.values() for t in s.towers))
        classes = sorted({v for s in found.tables.values() for v in verdicts(s)})
        first, second = names[0], names[min(1, len(names) - 1)]
        return names, names, names, towers, classes, "", first, first, second, towers[0]

    @app.callback(
        Output("heads-grid", "figure"),
        Output("heads-title", "children"),
        Input("heads-view", "data"),
    )
    def draw(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update, "Heads"
        try:
            table = shown(site.run(feed), feed)
            tower = tower_of(table, feed)
            return head_grid(
                table, tower=tower, theme=feed.get("theme")
            ), f"Heads: {table.detector}"
        except InterpError as error:
            return said(told(error), feed.get("theme")), "Heads"

    @app.callback(Output("heads-scatter", "figure"), Input("heads-points", "data"))
    def scatter(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            tables = site.run(feed).tables
            names = list(tables)
            x = feed.get("x") if feed.get("x") in tables else names[0]
            y = feed.get("y") if feed.get("y") in tables else names[min(1, len(names) - 1)]
            return head_scatter(
                tables, str(x), str(y), tower=tower_of(tables[str(x)], feed),
                theme=feed.get("theme"), marked=basket_of(feed),
            )  # fmt: skip
        except (InterpError, IndexError) as error:
            return said(told(error) if isinstance(error, InterpError) else "no scores to draw",
                        feed.get("theme"))  # fmt: skip

    @app.callback(
        Output("heads-table", "rowData"),
        Output("heads-passing", "children"),
        Output("heads-csv", "href"),
        Output("heads-parquet", "href"),
        Input("heads-rows", "data"),
    )
    def fill(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return [], "", None, None
        try:
            found = site.run(feed)
            table = shown(found, feed)
        except InterpError:
            return [], "", None, None
        at = f"/data/{found.name}/table/{table.detector}"
        return rows(table, feed), passing(table, feed), f"{at}.csv", f"{at}.parquet"

    @app.callback(
        Output("heads-atlas", "src"),
        Output("heads-atlas", "alt"),
        Output("heads-atlas-note", "children"),
        Input("heads-maps", "data"),
    )
    def atlas(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return "", "", ""
        try:
            found = site.run(feed)
            trace = found.trace(feed.get("prompt"))
            tower = feed.get("tower") if feed.get("tower") in trace.towers else None
            tower = tower or next(iter(trace.towers))
        except InterpError as error:
            return "", "", told(error)
        note = f"Prompt {trace.id}, {len(trace.tokens)} tokens. Layers go down, heads across."
        return (
            f"/data/{found.name}/{trace.key}/{tower}/atlas.png",
            f"small attention map of every head of {tower} on prompt {trace.id}",
            note,
        )

    for event, graph, function in (
        ("clickData", "heads-grid", "grid_clicked"),
        ("clickData", "heads-scatter", "head_clicked"),
        ("selectedData", "heads-scatter", "heads_brushed"),
        ("figure", "heads-grid", "grid_drawn"),
        ("selectedRows", "heads-table", "rows_chosen"),
        ("rowData", "heads-table", "order"),
        ("data", "heads-metric", "metrics"),
    ):
        app.clientside_callback(
            ClientsideFunction("headscope", function), Input(graph, event),
            prevent_initial_call=True,
        )  # fmt: skip


def no_scores(run: OpenRun) -> "Component | None":
    """Where to look at a finished run that holds no scores; None for one that is not finished."""
    from dash import html

    if run.run.status != "complete":
        return None
    title = {"intervene": "Intervene", "patch": "Patching"}
    place = place_of(run.name, run.info)
    page = place.partition("?")[0].rsplit("/", 1)[-1]
    link = html.A(f"what it holds is on {title.get(page, 'Head')}", href=place)
    what = run.info.get("view") or "other results"
    if place.endswith("/heads"):
        return html.P(f"This run ({what}) holds no scores of heads.")
    return html.P([f"This run ({what}) holds no scores of heads: ", link, "."])


def shown(run: OpenRun, feed: Feed) -> HeadScores:
    """The table that a feed names; the run's first if it names none."""
    name = feed.get("metric")
    return run.table(name if name in run.tables else None)


def tower_of(table: HeadScores, feed: Feed) -> str:
    """The tower that a feed names, if the table has it."""
    name = feed.get("tower")
    return name if name in table.towers else table.towers[0]


def rows(table: HeadScores, feed: Mapping[str, str]) -> list[dict[str, Any]]:
    """The ranking, filtered: score, interval, null, and how sure its place is.

    Numbers have six digits: there are thousands of rows, and a browser shows four.
    """
    low, high = (_whole(feed.get(name)) for name in ("lo", "hi"))
    tower = feed.get("tower") if feed.get("tower") in table.towers else None
    numbers: dict[str, list[Any]] = {
        n: _short(table.column(n)) for n in ("score", "ci_lo", "ci_hi", "null", "q")
    }
    numbers |= {"percentile": null_percentile(table), "ranks": rank_ranges(table)}
    sign = 1.0 if table.direction == "higher" else -1.0
    order = np.argsort(-sign * table.values, kind="stable")  # undefined heads come last
    out, said_of = [], verdicts(table)
    for rank, i in enumerate(order.tolist(), 1):
        head, verdict = table.heads[i], said_of[i]
        if tower is not None and head.tower != tower:
            continue
        if (low is not None and head.layer < low) or (high is not None and head.layer > high):
            continue
        if feed.get("cls") and verdict != feed["cls"]:
            continue
        row = {name: column[i] for name, column in numbers.items() if column[i] is not None}
        out.append({"head": str(head), "rank": rank, "n": int(table.n[i]), "verdict": verdict,
                    **row})  # fmt: skip
    return out


def verdicts(table: HeadScores) -> list[str]:
    """Verdict of each head; where nothing was tested, that is said instead of *no evidence*."""
    tested = np.isfinite(table.q).any()
    return [str(v) if tested or v != "no evidence" else "not tested" for v in table.verdict]


def _short(column: np.ndarray) -> list[float | None]:
    return [None if x != x else float(f"{x:.6g}") for x in column.tolist()]


def null_percentile(table: HeadScores) -> list[float | None]:
    """Share of all heads' control scores below each head's score, in percent."""
    null = table.null_per_example
    if null is None or not np.isfinite(null).any():
        return [None] * len(table.heads)
    sign = 1.0 if table.direction == "higher" else -1.0
    pool = np.sort(sign * null[np.isfinite(null)])
    below = np.searchsorted(pool, sign * table.values, side="left") / len(pool)
    return [None if np.isnan(v) else round(100 * float(b), 2)
            for v, b in zip(table.values, below, strict=True)]  # fmt: skip


def rank_ranges(table: HeadScores) -> list[str | None]:
    """Places that a head may have, given the intervals of all: those surely above and below."""
    sign = 1.0 if table.direction == "higher" else -1.0
    low, high = (table.ci_lo, table.ci_hi) if sign > 0 else (-table.ci_hi, -table.ci_lo)
    known = np.isfinite(low) & np.isfinite(high)
    lows, highs = np.sort(low[known]), np.sort(high[known])
    above = len(lows) - np.searchsorted(lows, high, side="right")
    below = len(lows) - np.searchsorted(highs, low, side="left")
    return [
        f"{a + 1}–{b}" if k else None
        for a, b, k in zip(above.tolist(), below.tolist(), known.tolist(), strict=True)
    ]


def passing(table: HeadScores, feed: Feed) -> str:
    """How many heads reach a threshold, and how many of their controls do."""
    try:
        threshold = float(feed["thr"])
    except (KeyError, ValueError):
        threshold = table.threshold
    if not np.isfinite(threshold) and not np.isfinite(table.q).any():
        return "no threshold, and no controls to test against"
    if not np.isfinite(threshold):
        return f"{int((table.verdict == table.detector).sum())} heads claimed; no threshold"
    sign = 1.0 if table.direction == "higher" else -1.0
    with np.errstate(invalid="ignore"):
        mine = int((sign * table.values >= sign * threshold).sum())
        null = int((sign * table.null >= sign * threshold).sum())
    against = "no controls" if table.null_per_example is None else f"{null} of their controls do"
    return f"{mine} of {len(table.heads)} heads reach {threshold:g}; {against}"


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


enter(
    Page(
        "heads", "Heads", "/r/{run}/heads", layout, wire,
        feeds={
            "heads-run": ("run", "page"),
            "heads-view": ("run", "metric", "tower", "theme"),
            "heads-points": ("run", "x", "y", "tower", "theme", "basket"),
            "heads-rows": ROWS,
            "heads-maps": ("run", "prompt", "tower"),
        },
        binds={
            "heads-metric": ("value", "metric"), "heads-tower": ("value", "tower"),
            "heads-x": ("value", "x"), "heads-y": ("value", "y"), "heads-lo": ("value", "lo"),
            "heads-hi": ("value", "hi"), "heads-class": ("value", "cls"),
            "heads-threshold": ("value", "thr"),
        },
        later=("heads-points", "heads-maps"),
        keys=("x", "y", "lo", "hi", "cls", "thr"), order=1,
        help="all heads of a run: grid, points, ranking with intervals and nulls, small maps",
    )
)  # fmt: skip
