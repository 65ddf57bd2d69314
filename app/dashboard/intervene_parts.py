"""Parts of a page of results: figures with words, tables of numbers, two texts side by side."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash.development.base_component import Component

PLAIN = {"displaylogo": False}
_PIECES = 40


def pieces(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts in runs of words, each with whether the other lacks it.

    >>> pieces("a b c", "a d c")
    ([('a ', False), ('b ', True), ('c', False)], [('a ', False), ('d ', True), ('c', False)])
    """
    a, b = (re.findall(r"\S+\s*|\s+", text) for text in (before, after))
    # A word at the end of a text is the same word although no space follows it there.
    keys = [[word.strip() for word in words] for words in (a, b)]
    mine: list[tuple[str, bool]] = []
    other: list[tuple[str, bool]] = []
    matched = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for tag, i, j, k, m in matched.get_opcodes():
        for into, words in ((mine, a[i:j]), (other, b[k:m])):
            if words:
                into.append(("".join(words), tag != "equal"))
    return mine, other


def pair(row: Mapping[str, Any]) -> "Component":
    """A prompt with its continuations without and with a recipe, what differs marked."""
    from dash import html

    before, after = pieces(row["without"], row["with"])
    answer = "" if row.get("answer") is None else f" · answer: {row['answer']}"
    return html.Div(
        [
            html.P(
                [html.Bdi(f"{row['id']}: {row['prompt']}"), html.Bdi(answer)], className="faint"
            ),
            html.Div(
                [
                    html.Div([html.H4("without"), html.P(_marked(before, html.Del))]),
                    html.Div([html.H4("with"), html.P(_marked(after, html.Ins))]),
                ],
                className="intervene-pair",
            ),
        ]
    )  # fmt: skip


def _marked(parts: Sequence[tuple[str, bool]], mark: Any) -> list[Any]:
    # Beyond this many pieces nothing is marked: a page holds a limited number of elements.
    if len(parts) > _PIECES:
        return ["".join(text for text, _ in parts)]
    return [mark(text) if new else text for text, new in parts]


def figure(title: str, drawn: Any, note: str, said: str) -> "Component":
    """A figure under its title, in words for those who do not see it, and a note."""
    from dash import dcc, html

    return html.Div(
        [
            html.H3(title),
            html.Figure(
                [dcc.Graph(figure=drawn, config=PLAIN), html.Figcaption(said, className="unseen")]
            ),
            html.P(note, className="faint"),
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], most: int = 24) -> "Component":
    """The first rows of a table."""
    from dash import html

    return html.Div(
        html.Table(
            [
                html.Thead(html.Tr([html.Th(h, scope="col") for h in head])),
                html.Tbody([html.Tr([html.Td(c) for c in row]) for row in rows[:most]]),
            ],
            className="facts",
        ),
        className="wide", tabIndex="0", role="group", **{"aria-label": "the numbers"},
    )  # fmt: skip


def line(text: str) -> "Component":
    """A line of small print."""
    from dash import html

    return html.P(text, className="faint")


def number(x: Any) -> str:
    """Three digits, or a dash for what is undefined."""
    return "–" if x is None or x != x else f"{x:.3g}"


def share(x: Any) -> str:
    """A share in percent."""
    return "–" if x is None or x != x else f"{x:.0%}"


def interval(row: Mapping[str, Any]) -> str:
    """The ends `ci_lo` and `ci_hi` of a row."""
    low, high = row.get("ci_lo"), row.get("ci_hi")
    return "–" if low is None or high is None else f"[{number(low)}, {number(high)}]"
