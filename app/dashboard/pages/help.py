"""Help: every score, effect and operation with its formula, range and source; keys and colours."""

from typing import TYPE_CHECKING, Any

from app.catalog import Entry, entries
from app.dashboard.page import Page, Site, enter, pages
from app.dashboard.shell import SHORTCUTS

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

KINDS = (
    ("detector", "Detectors: what a head does"),
    ("method", "Methods: whether it matters"),
    ("metric", "Metrics: by what that is judged"),
    ("probe", "Probes: what can be read off it"),
    ("recipe maker", "Recipes: how it can be used"),
    ("op", "Operations of a recipe"),
    ("task", "Tasks: where prompts come from"),
)
COLOURS = (
    ("Scores and attention", "dark to bright, from nothing to the most (Viridis)"),
    ("Differences and effects", "blue is less, red is more, white is zero, always symmetric"),
    ("Grey", "masked: this query does not see this key; that is not the same as little"),
    ("A ring in the grid", "the head is claimed: q and threshold are both met"),
    ("A square among points", "the head is in the basket"),
    ("Attention is drawn", "by its square root unless told otherwise; the bar shows real values"),
)
READING = (
    ("score", "mean over prompts; NaN and n = 0 where no prompt defines it"),
    ("95 %", "percentile bootstrap over prompts"),
    ("null", "mean score of the matched controls of the same prompts"),
    ("above null", "share of all control scores below the head's score"),
    ("q", "Benjamini-Hochberg over all heads of the table, of a paired one-sided test"),
    ("rank range", "places that the head may have, given the intervals of all heads"),
    ("effect", "metric with the intervention minus metric without: harm is negative"),
    ("recomputed", "maps come from stored queries, keys and row log-sum-exps; the largest "
                   "difference from the model's own rows at capture stands above each map"),
    ("pooled", "a cell stands for several entries and holds the largest, never the mean"),
)  # fmt: skip


def layout(site: Site) -> "Component":
    """Everything at once: it is text."""
    from dash import html

    parts: list[Any] = [
        html.H1("Help"),
        html.H2("Pages"),
        _facts([(p.title, p.help) for p in pages() if p.help]),
        html.H2("Keys"),
        html.Table(html.Tbody([html.Tr([html.Td(html.Kbd(k)), html.Td(t)]) for k, t in SHORTCUTS]),
                   className="facts"),
        html.H2("Colours"),
        _facts(COLOURS),
        html.H2("Columns"),
        _facts(READING),
    ]  # fmt: skip
    for kind, title in KINDS:
        parts.append(html.H2(title))
        parts += [_entry(e) for e in entries(kind).values()]
    return html.Div(parts, className="help")


def wire(app: "Dash", site: Site) -> None:
    """Nothing changes here."""


def _facts(rows: Any) -> "Component":
    from dash import html

    made = [html.Tr([html.Th(name, scope="row"), html.Td(text)]) for name, text in rows]
    return html.Table(html.Tbody(made), className="facts")


def _entry(entry: Entry) -> "Component":
    from dash import html

    facts = [
        ("unit", entry.unit), ("range", entry.range), ("no evidence", entry.no_evidence),
        ("source", entry.citation), ("runs on", entry.task),
        ("parameters", ", ".join(f"{k}={v}" for k, v in entry.params.items())),
    ]  # fmt: skip
    said = " · ".join(f"{name}: {text}" for name, text in facts if text)
    return html.Details(
        [
            html.Summary([html.Code(entry.name), f" {entry.summary}"]),
            html.P(said, className="faint") if said else None,
            html.Pre(entry.doc, tabIndex="0", **{"aria-label": f"definition of {entry.name}"}),
        ],
        id=f"help-{entry.kind.replace(' ', '-')}-{entry.name}",
    )


enter(
    Page(
        "help", "Help", "/help", layout, wire, order=9,
        help="every score with its formula, range and source",
    )
)  # fmt: skip
