"""What a run of an intervention found, as parts of a page; drawn from its tables and facts alone."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.intervene import heads_of
from app.dashboard.library import OpenRun
from app.figures.intervene import MOST, Line, changes, dose, forest
from interp.errors import RunError
from interp.headid import HeadId

if TYPE_CHECKING:
    from dash.development.base_component import Component

TEXTS = 6
"""Prompts whose continuations are shown."""
_PIECES = 30
_HEADS = 24


def shown(run: OpenRun, theme: str | None) -> "list[Component]":
    """All that the page shows of a run.

    Raises:
        RunError: it holds no intervention, or is not complete.
    """
    view = VIEWS.get(str(run.info.get("view")))
    if view is None:
        raise RunError(
            f"{run.name} holds no intervention",
            hint="choose heads and an operation above; headscope ablate, verdict and steer make one",
        )
    if not run.facts:
        raise RunError(
            f"{run.name} is {run.run.status}: nothing was found yet",
            hint=f"go on with: {run.info.get('command')}",
        )
    return [_named(run), *view(run, theme)]


def is_intervention(info: Mapping[str, Any]) -> bool:
    """Whether a run is one that this page shows."""
    return str(info.get("view")) in VIEWS


def _named(run: OpenRun) -> "Component":
    """What was done to which heads, with links."""
    from dash import html

    parts: list[Any] = []
    heads = heads_of(run.info, run.facts)
    for text in heads[:_HEADS]:
        h = HeadId.parse(text)
        tower = "" if h.tower == "text" else f"?t={h.tower}"
        parts += [html.A(text, href=f"/r/{run.name}/head/{h.layer}/{h.head}{tower}"), " "]
    if len(heads) > _HEADS:
        parts.append(f"and {len(heads) - _HEADS} more ")
    if heads:
        parts.append(
            html.Button("put these into the basket", className="plain intervene-take",
                        **{"data-heads": ",".join(heads[:60])})
        )  # fmt: skip
    return html.Div(
        [
            html.P([html.A(run.name, href=f"/r/{run.name}/intervene"), ": ",
                    html.Code(str(run.info.get("command") or ""))]),
            html.P(parts) if parts else "",
        ]
    )  # fmt: skip


# ---- effects


def _sets(run: OpenRun, theme: str | None) -> "list[Component]":
    """Heads taken away together; with --each also alone, and all but each."""
    facts = run.facts
    rows, base = list(facts["rows"]), facts.get("base_accuracy")
    lines, table = [], []
    for row in rows:
        kind = row.get("kind") or ("chosen" if row["set"] == "chosen" else "")
        if kind not in ("chosen", "alone", "without"):
            continue
        of = row.get("of", "")
        several = len(str(rows[0]["heads"]).split()) > 1
        name = {"chosen": "all together" if several else str(rows[0]["heads"]), "alone": of,
                "without": f"all but {of}"}[kind]  # fmt: skip
        draws, mean = _beside(rows, kind, of)
        line = Line(
            name, row["effect"], row["ci_lo"], row["ci_hi"], draws,
            *((mean["effect"], mean["ci_lo"], mean["ci_hi"]) if mean else ()),
        )  # fmt: skip
        lines.append(line)
        accuracy = None if row["accuracy"] is None else f"{_share(base)} → {_share(row['accuracy'])}"
        beside = mean["accuracy"] if mean else None
        table.append([name, _number(row["effect"]), _interval(row), _number(line.control),
                      accuracy or "–", _share(beside), _number(row["p"])])  # fmt: skip
    draws = lines[0].draws
    drawn = sum((r.get("kind") or r["set"].partition(" ")[0]) == "random" for r in rows)
    drawn -= sum(r["set"] == "random, mean" and not r.get("kind") for r in rows)
    said = f"{drawn} draws of random heads, {len(draws)} of them different." if drawn else ""
    note = f"{facts['unit']} from {_number(facts['base'])}. {said} {' '.join(facts['notes'])}"
    adds = _added(lines)
    return [
        _figure("Effect beside random heads", forest(lines, unit=facts["unit"], theme=theme),
                f"{note} {adds}", words_of(lines, facts["unit"])),
        _table(["set", "effect", "95 %", "random heads", "right, before → after",
                "right, random", "p"], table),
    ]  # fmt: skip


def _beside(
    rows: Sequence[Mapping[str, Any]], kind: str, of: str
) -> tuple[list[tuple[str, float]], Mapping[str, Any] | None]:
    """The different random sets that stand beside a row, and their mean."""
    if kind == "without":
        return [], None
    prefix = "alone " if kind == "alone" else ""
    found: dict[str, float] = {}
    mean = None
    for row in rows:
        what = row.get("kind") or {"random, mean": "random mean", "chosen": "chosen"}.get(
            row["set"], "random"
        )
        if row.get("of", "") != of:
            continue
        if what == f"{prefix}random":
            found[" ".join(sorted(str(row["heads"]).split()))] = row["effect"]
        elif what == f"{prefix}random mean":
            mean = row
    return list(found.items()), mean


def _added(lines: Sequence[Line]) -> str:
    """What each head adds to the others: all together against all but it."""
    rest = {x.name.removeprefix("all but "): x.effect for x in lines if x.name.startswith("all but ")}
    if not rest:
        return ""
    parts = [f"{h} {_number(lines[0].effect - effect)}" for h, effect in list(rest.items())[:_HEADS]]
    return f"Beyond the others, each adds: {', '.join(parts)}."


def _ablate(run: OpenRun, theme: str | None) -> "list[Component]":
    """Each head alone: the strongest, beside the other heads of their layers that were measured."""
    from dash import html

    name, table = next(iter(run.tables.items()))
    base = run.facts.get("accuracy")
    order = np.argsort(table.values, kind="stable")
    order = order if table.direction == "lower" else order[::-1]
    order = [int(i) for i in order if np.isfinite(table.values[i])][: MOST // 2]
    right = table.column("accuracy") if "accuracy" in table.extras else None
    lines, rows = [], []
    for i in order:
        head = table.heads[i]
        peers = [
            (str(h), float(v)) for h, v in zip(table.heads, table.values, strict=True)
            if (h.tower, h.layer) == (head.tower, head.layer) and h != head and np.isfinite(v)
        ]  # fmt: skip
        mean = float(np.mean([v for _, v in peers])) if peers else None
        lines.append(
            Line(str(head), float(table.values[i]), float(table.ci_lo[i]), float(table.ci_hi[i]),
                 peers, mean)
        )  # fmt: skip
        after = "–" if right is None else f"{_share(base)} → {_share(float(right[i]))}"
        rows.append([
            str(head), _number(lines[-1].effect),
            _interval({"ci_lo": lines[-1].low, "ci_hi": lines[-1].high}), _number(mean), after,
        ])  # fmt: skip
    beside = "the other heads of the layer"
    few = f" Of {len(table.heads)} heads the {len(order)} strongest." if len(order) < len(
        table.heads) else ""  # fmt: skip
    notes = " ".join(f"{note}." for note in run.facts.get("notes", ()))
    return [
        _figure(f"Each head alone: {name}",
                forest(lines, unit=table.unit, theme=theme, beside=beside),
                f"{notes}{few} Beside each: {beside}, as far as they were measured.",
                words_of(lines, table.unit)),
        html.P(html.A("all heads as grid and table", href=f"/r/{run.name}/heads")),
        _table(["head", "effect", "95 %", beside, "right, before → after"], rows),
    ]  # fmt: skip


def _verdict(run: OpenRun, theme: str | None) -> "list[Component]":
    """Each claimed head, and all of them, in words and beside their controls."""
    from dash import html

    facts = run.facts
    lines, rows = [], []
    for row in facts["rows"]:
        draws = [(d["heads"], d["effect"]) for d in facts.get("draws", {}).get(row["head"], ())]
        lines.append(
            Line(row["head"], row["effect"], row["ci_lo"], row["ci_hi"], draws, row["control"])
        )
        rows.append([
            row["head"], html.Strong(row["verdict"]), _number(row["score"]),
            _number(row["effect"]), _interval(row), _number(row["control"]),
            f"{_share(facts['accuracy'])} → {_share(row['accuracy'])}",
            _share(row["control_accuracy"]), _number(row["q"]),
            f"{row['as_harmful']} of {row['controls']}",
        ])  # fmt: skip
    unit = "change of log-probability (nats)"
    parts: list[Any] = [html.P(facts["message"])]
    if lines:
        parts.append(
            _figure("Effect beside random heads", forest(lines, unit=unit, theme=theme),
                    facts["note"], words_of(lines, unit))
        )  # fmt: skip
        parts.append(_table(
            ["head", "verdict", "score", "effect", "95 %", "random heads",
             "right, before → after", "right, random", "q", "random as harmful"], rows,
        ))  # fmt: skip
    sentences = facts["sentences"][2 : 2 + len(lines)]
    return [*parts, html.Ul([html.Li(s) for s in sentences])]


# ---- recipes


def _steer(run: OpenRun, theme: str | None) -> "list[Component]":
    """Continuations side by side, and side effects."""
    from dash import html

    facts = run.facts
    rows = list(facts["rows"])
    texts = [_pair(row) for row in rows[:TEXTS]]
    more = len(rows) - len(texts)
    same = sum(bool(row["same"]) for row in rows)
    note = f"{len(rows) - same} of {len(rows)} continuations changed."
    if more:
        note += f" {more} more: headscope show {run.name}"
    return [
        html.P([html.Code(line) for line in facts["recipe"]][:8]),
        html.H3("Text before and after"), html.P(note), html.Div(texts, className="intervene-texts"),
        *_side(facts, theme),
    ]  # fmt: skip


def _side(facts: Mapping[str, Any], theme: str | None) -> "list[Component]":
    rows = list(facts["side_effects"])
    notes = " ".join(f"{note}." for note in facts["notes"])
    if not rows:
        return [_line(notes or "No side effects were measured.")]
    table = [
        [r["measure"], _number(r["without"]), _number(r["with"]), _number(r["change"]),
         _interval(r), _number(r["control_change"]), r["n"]]
        for r in rows
    ]  # fmt: skip
    said = "; ".join(f"{r['measure']} {_number(r['change'])}" for r in rows)
    return [
        _figure("Change of answers and of neutral text", changes(rows, theme=theme), notes, said),
        _table(["measure", "without", "with", "change", "95 %", "random heads", "n"], table),
    ]


def _sweep(run: OpenRun, theme: str | None) -> "list[Component]":
    """A curve for each measure."""
    from dash import dcc, html

    facts = run.facts
    names = list(dict.fromkeys(row["measure"] for row in facts["rows"]))
    figures, table = [], []
    for name in names:
        rows = [row for row in facts["rows"] if row["measure"] == name]
        said = ", ".join(f"{r['strength']:g}: {_number(r['with'])}" for r in rows)
        figures.append(html.Div(
            [html.H3(name), dcc.Graph(figure=dose(rows, theme=theme), config=_PLAIN),
             html.P(f"By strength {said}.", className="unseen")]
        ))  # fmt: skip
        table += [
            [name, f"{r['strength']:g}", _number(r["with"]), _number(r["change"]), _interval(r),
             _number(r["control_change"]), r["n"]]
            for r in rows
        ]  # fmt: skip
    notes = " ".join(f"{note}." for note in facts["notes"])
    return [
        html.P([html.Code(line) for line in facts["recipe"]][:8]), _line(notes),
        html.Div(figures, className="columns"),
        html.Details([html.Summary("The numbers"), _table(
            ["measure", "strength", "value", "change", "95 %", "random heads", "n"], table[:30])]),
    ]  # fmt: skip


VIEWS: Mapping[str, Callable[[OpenRun, str | None], "list[Component]"]] = {
    "sets": _sets,
    "ablate": _ablate,
    "verdict": _verdict,
    "steer": _steer,
    "sweep": _sweep,
}


# ---- texts


def pieces(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts in runs of words, each with whether the other lacks it.

    >>> pieces("a b c", "a d c")
    ([('a ', False), ('b', True), (' c', False)], [('a ', False), ('d', True), (' c', False)])
    """
    a, b = (re.findall(r"\s+|\S+", text) for text in (before, after))
    mine: list[tuple[str, bool]] = []
    other: list[tuple[str, bool]] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for into, words in ((mine, a[i:j]), (other, b[k:m])):
            if words:
                into.append(("".join(words), tag != "equal"))
    return mine, other


def _pair(row: Mapping[str, Any]) -> "Component":
    from dash import html

    before, after = pieces(row["without"], row["with"])
    answer = "" if row.get("answer") is None else f" · answer: {row['answer']}"
    return html.Div(
        [
            html.P([html.Bdi(f"{row['id']}: {row['prompt']}"), html.Bdi(answer)], className="faint"),
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


def words_of(lines: Sequence[Line], unit: str) -> str:
    """Effects in words, for those who do not see the figure."""
    parts = [
        f"{x.name} {_number(x.effect)} {_interval({'ci_lo': x.low, 'ci_hi': x.high})}"
        + ("" if x.control is None else f", beside it {_number(x.control)}")
        for x in lines[:10]
    ]
    return f"{unit}: {'; '.join(parts)}"


# ---- parts

_PLAIN = {"displaylogo": False}


def _figure(title: str, figure: Any, note: str, said: str) -> "Component":
    from dash import dcc, html

    return html.Div(
        [
            html.H3(title),
            html.Div(dcc.Graph(figure=figure, config=_PLAIN), role="img", **{"aria-label": said}),
            html.P(note, className="faint"),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], most: int = 24) -> "Component":
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


def _line(text: str) -> "Component":
    from dash import html

    return html.P(text, className="faint")


def _number(x: Any) -> str:
    return "–" if x is None or x != x else f"{x:.3g}"


def _share(x: Any) -> str:
    return "–" if x is None or x != x else f"{x:.0%}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("ci_lo"), row.get("ci_hi")
    return "–" if low is None or high is None else f"[{_number(low)}, {_number(high)}]"
