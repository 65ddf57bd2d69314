"""Compare: two runs, head by head."""

from typing import TYPE_CHECKING, Any

from app.dashboard.grids import grid, number_column
from app.dashboard.page import Feed, Page, Site, enter, told
from app.dashboard.pages.heads import HEAD, shown, tower_of
from app.figures.compare import agreement, aligned, difference_grid
from app.figures.style import said
from interp.errors import InterpError, RunError
from interp.scores import HeadScores

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

COLUMNS = (
    HEAD,
    number_column("base", "This run", width=120),
    number_column("other", "Other run", width=120),
    number_column("difference", "Other − this", width=130),
    number_column("rank_base", "Rank here", width=110),
    number_column("rank_other", "Rank there", width=110),
    {"field": "verdict", "headerName": "Verdict here", "width": 150},
    {"field": "verdict_other", "headerName": "Verdict there", "width": 150},
)


def layout(site: Site) -> "Component":
    """The two runs above, agreement and differences below."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    return html.Div(
        [
            html.H1("Compare"),
            html.Div(
                [
                    dmc.Select(id="compare-other", label="Other run", data=[], size="xs", w=420,
                               searchable=True),
                    dmc.Select(id="compare-metric", label="Score", data=[], size="xs", w=220),
                ],
                className="row",
            ),
            html.P(id="compare-note", role="status"),
            html.Div(
                [
                    html.Div([html.H2("Agreement"),
                              dcc.Graph(id="compare-points", config={"displaylogo": False})],
                             className="card"),
                    html.Div([html.H2("Difference"),
                              dcc.Graph(id="compare-grid", config={"displaylogo": False})],
                             className="card"),
                ],
                className="columns",
            ),
            html.Div(
                [html.H2("Heads"),
                 grid("compare-table", COLUMNS, key="head", label="heads of both runs")],
                className="card",
            ),
        ]
    )  # fmt: skip


def wire(app: "Dash", site: Site) -> None:
    """Callbacks of the page."""
    from dash import ClientsideFunction, Input, Output, no_update

    @app.callback(
        Output("compare-other", "data"),
        Output("compare-metric", "data"),
        Input("compare-runs", "data"),
    )
    def choices(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        names = [n for n in site.library.names() if n != feed.get("run")]
        try:
            metrics = list(site.run(feed).tables) if "run" in feed else []
        except InterpError:
            metrics = []
        return names, metrics

    @app.callback(
        Output("compare-points", "figure"),
        Output("compare-grid", "figure"),
        Output("compare-table", "rowData"),
        Output("compare-note", "children"),
        Input("compare-view", "data"),
    )
    def draw(feed: Feed | None) -> Any:
        if feed is None:
            return no_update
        theme = feed.get("theme")
        if "run" not in feed or "other" not in feed:
            empty = said("Choose a run in the header and another one here.", theme)
            return empty, empty, [], ""
        try:
            base, other = tables(site, feed)
            found = base.compare(other)
        except InterpError as error:
            empty = said(told(error), theme)
            return empty, empty, [], told(error)
        o = found.overlap
        note = (
            f"{base.detector} and {other.detector}: Spearman {found.spearman:.3f}; of the top "
            f"{found.k}, {o.shared} are shared, {o.expected:.2f} by chance (p {o.p:.2g}); "
            f"agreement beyond chance {o.corrected:.3f}."
        )
        return (
            agreement(base, other, theme=theme),
            difference_grid(base, other, tower=tower_of(base, feed), theme=theme),
            rows(base, other), note,
        )  # fmt: skip

    app.clientside_callback(
        ClientsideFunction("headscope", "head_clicked"), Input("compare-points", "clickData"),
        prevent_initial_call=True,
    )  # fmt: skip
    app.clientside_callback(
        ClientsideFunction("headscope", "grid_clicked"), Input("compare-grid", "clickData"),
        prevent_initial_call=True,
    )  # fmt: skip


def tables(site: Site, feed: Feed) -> tuple[HeadScores, HeadScores]:
    """The two tables of a feed: of one name where both runs have it, else the only ones.

    Raises:
        RunError: the runs share no table, and have more than one each.
    """
    mine, theirs = site.run(feed), site.library.open(feed["other"])
    base = shown(mine, feed)
    if base.detector in theirs.tables:
        return base, theirs.tables[base.detector]
    shared = [n for n in mine.tables if n in theirs.tables]
    if "metric" not in feed and shared:
        return mine.tables[shared[0]], theirs.tables[shared[0]]
    if len(theirs.tables) == 1 and (len(mine.tables) == 1 or "metric" in feed):
        return base, next(iter(theirs.tables.values()))
    raise RunError(
        f"runs to compare must share a table of scores; they have {', '.join(mine.tables)} and "
        f"{', '.join(theirs.tables) or 'none'}"
    )


def rows(base: HeadScores, other: HeadScores) -> list[dict[str, Any]]:
    """Each head with its score, rank and verdict in both."""
    there = aligned(base, other)
    ranks = [{r["head"]: i for i, r in enumerate(t.rows(), 1)} for t in (base, other)]
    verdicts = {str(h): str(v) for h, v in zip(other.heads, other.verdict, strict=True)}
    place = {str(h): i for i, h in enumerate(base.heads)}
    out = []
    for row in base.rows():
        i = place[row["head"]]
        b, o = float(base.values[i]), float(there[i])
        finite = b == b and o == o
        out.append({
            "head": row["head"], "base": b if b == b else None, "other": o if o == o else None,
            "difference": o - b if finite else None, "rank_base": ranks[0][row["head"]],
            "rank_other": ranks[1][row["head"]], "verdict": row["verdict"],
            "verdict_other": verdicts[row["head"]],
        })  # fmt: skip
    return out


def command(site: Site, feed: Feed) -> str:
    """The command that prints the same comparison."""
    if "run" not in feed or "other" not in feed:
        return ""
    return f"headscope compare {site.root / feed['run']} {site.root / feed['other']}"


def python(site: Site, feed: Feed) -> str:
    """The Python that makes the same comparison."""
    if "run" not in feed or "other" not in feed:
        return ""
    base, other = tables(site, feed)
    one, two = (str(site.root / feed[n]) for n in ("run", "other"))
    return (
        "from interp.run import Run\n\n"
        f"base = Run.load({one!r}).scores[{base.detector!r}]\n"
        f"other = Run.load({two!r}).scores[{other.detector!r}]\n"
        "print(base.compare(other))"
    )


enter(
    Page(
        "compare", "Compare", "/compare", layout, wire,
        feeds={
            "compare-runs": ("run", "page"),
            "compare-view": ("run", "other", "metric", "tower", "theme"),
        },
        binds={"compare-other": ("value", "other"), "compare-metric": ("value", "metric")},
        keys=("other",), order=7, python=python, command=command,
        help="two runs head by head: agreement beyond chance, differences, ranks",
    )
)  # fmt: skip
