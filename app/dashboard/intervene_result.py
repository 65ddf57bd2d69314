"""What a run of an intervention found, as parts of a page, from its tables and facts alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.intervene import heads_of
from app.dashboard.intervene_parts import (
    PLAIN,
    figure,
    interval,
    line,
    number,
    pair,
    share,
    table,
)
from app.dashboard.library import OpenRun
from app.figures.intervene import MOST, Line, changes, dose, forest
from interp.errors import RunError
from interp.headid import HeadId

if TYPE_CHECKING:
    from dash.development.base_component import Component

TEXTS = 6
"""Prompts whose continuations are shown."""
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
            hint="choose heads and an operation; headscope ablate, verdict and steer make one",
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
    chosen = str(rows[0]["heads"])
    lines, numbers = [], []
    for row in rows:
        kind, of = _kind(row), row.get("of", "")
        if kind not in ("chosen", "alone", "without"):
            continue
        names = {
            "chosen": "all together" if " " in chosen else chosen, "alone": of,
            "without": f"all but {of}",
        }  # fmt: skip
        draws, mean = _beside(rows, kind, of)
        drawn = (mean["effect"], mean["ci_lo"], mean["ci_hi"]) if mean else ()
        lines.append(Line(names[kind], row["effect"], row["ci_lo"], row["ci_hi"], draws, *drawn))
        numbers.append([
            names[kind], number(row["effect"]), interval(row), number(lines[-1].control),
            right(base, row["accuracy"]), share(mean["accuracy"] if mean else None),
            number(row["p"]),
        ])  # fmt: skip
    many = sum(_kind(row) == "random" for row in rows)
    different = len(lines[0].draws)
    plural = "s" if different != 1 else ""
    said = f"{many} draws of random heads gave {different} different set{plural}. " if many else ""
    note = f"{facts['unit']} from {number(facts['base'])}. {said}{_sentences(facts)}"
    return [
        figure("Effect beside random heads", forest(lines, unit=facts["unit"], theme=theme),
               f"{note} {_added(lines)}", words_of(lines, facts["unit"])),
        table(["set", "effect", "95 %", "random heads", "right, before → after",
               "right, random", "p"], numbers),
    ]  # fmt: skip


def right(before: float | None, after: float | None) -> str:
    """Shares of examples that are right, before and after."""
    return "–" if after is None else f"{share(before)} → {share(after)}"


def _sentences(facts: Mapping[str, Any]) -> str:
    return " ".join(f"{note}." for note in facts.get("notes") or ())


def _kind(row: Mapping[str, Any]) -> str:
    """What a row of sets is; older runs say so by its name alone."""
    named = {"chosen": "chosen", "random, mean": "random mean"}
    return str(row.get("kind") or named.get(row["set"], "random"))


def _beside(
    rows: Sequence[Mapping[str, Any]], kind: str, of: str
) -> tuple[list[tuple[str, float]], Mapping[str, Any] | None]:
    """The different random sets that stand beside a row, and the mean of the draws."""
    if kind == "without":
        return [], None
    prefix = "alone " if kind == "alone" else ""
    mine = [row for row in rows if row.get("of", "") == of]
    found = {
        " ".join(sorted(str(row["heads"]).split())): float(row["effect"])
        for row in mine
        if _kind(row) == f"{prefix}random"
    }
    mean = next((row for row in mine if _kind(row) == f"{prefix}random mean"), None)
    return list(found.items()), mean


def _added(lines: Sequence[Line]) -> str:
    """What each head adds to the others: all together against all but it."""
    word = "all but "
    rest = {x.name.removeprefix(word): x.effect for x in lines if x.name.startswith(word)}
    if not rest:
        return ""
    parts = [f"{h} {number(lines[0].effect - x)}" for h, x in list(rest.items())[:_HEADS]]
    return f"Beyond the others, each adds: {', '.join(parts)}."


def _ablate(run: OpenRun, theme: str | None) -> "list[Component]":
    """Each head alone: the strongest, beside the other heads of their layers that were measured."""
    from dash import html

    name, found = next(iter(run.tables.items()))
    order = np.argsort(found.values if found.direction == "lower" else -found.values, kind="stable")
    best = [int(i) for i in order if np.isfinite(found.values[i])][: MOST // 2]
    rights = found.column("accuracy") if "accuracy" in found.extras else None
    lines, numbers = [], []
    for i in best:
        head, value = found.heads[i], float(found.values[i])
        peers = [
            (str(h), float(v)) for h, v in zip(found.heads, found.values, strict=True)
            if (h.tower, h.layer) == (head.tower, head.layer) and h != head and np.isfinite(v)
        ]  # fmt: skip
        mean = float(np.mean([v for _, v in peers])) if peers else None
        low, high = float(found.ci_lo[i]), float(found.ci_hi[i])
        lines.append(Line(str(head), value, low, high, peers, mean))
        after = None if rights is None else float(rights[i])
        numbers.append([
            str(head), number(value), interval({"ci_lo": low, "ci_hi": high}), number(mean),
            right(run.facts.get("accuracy"), after),
        ])  # fmt: skip
    beside = "the other heads of the layer"
    few = f"The {len(best)} strongest of {len(found.heads)} heads. "
    return [
        figure(f"Each head alone: {name}",
               forest(lines, unit=found.unit, theme=theme, beside=beside),
               f"{few if len(best) < len(found.heads) else ''}{_sentences(run.facts)} Beside each: "
               f"{beside}, as far as they were measured.", words_of(lines, found.unit)),
        html.P(html.A("all heads as grid and table", href=f"/r/{run.name}/heads")),
        table(["head", "effect", "95 %", beside, "right, before → after"], numbers),
    ]  # fmt: skip


def _verdict(run: OpenRun, theme: str | None) -> "list[Component]":
    """Each claimed head, and all of them, in words and beside their controls."""
    from dash import html

    facts = run.facts
    lines: list[Line] = []
    rows: list[list[Any]] = []
    for row in facts["rows"]:
        draws = [(d["heads"], d["effect"]) for d in facts.get("draws", {}).get(row["head"], ())]
        lines.append(
            Line(row["head"], row["effect"], row["ci_lo"], row["ci_hi"], draws, row["control"])
        )
        rows.append([
            row["head"], html.Strong(row["verdict"]), number(row["score"]),
            number(row["effect"]), interval(row), number(row["control"]),
            right(facts["accuracy"], row["accuracy"]), share(row["control_accuracy"]),
            number(row["q"]), f"{row['as_harmful']} of {row['controls']}",
        ])  # fmt: skip
    unit = "change of log-probability (nats)"
    parts: list[Any] = [html.P(facts["message"])]
    if lines:
        parts.append(
            figure("Effect beside random heads", forest(lines, unit=unit, theme=theme),
                    facts["note"], words_of(lines, unit))
        )  # fmt: skip
        parts.append(table(
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
    texts = [pair(row) for row in rows[:TEXTS]]
    more = len(rows) - len(texts)
    same = sum(bool(row["same"]) for row in rows)
    note = f"{len(rows) - same} of {len(rows)} continuations changed."
    if more:
        note += f" {more} more: headscope show {run.name}"
    return [
        html.P([html.Code(line) for line in facts["recipe"]][:8]),
        html.H3("Text before and after"), html.P(note),
        html.Div(texts, className="intervene-texts"), *_side(facts, theme),
    ]  # fmt: skip


def measured(facts: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows of measures, each with the change by every random control, as far as they were kept."""
    draws = facts.get("draws") or [{} for _ in facts[name]]
    return [{**row, **draw} for row, draw in zip(facts[name], draws, strict=True)]


def _side(facts: Mapping[str, Any], theme: str | None) -> "list[Component]":
    rows = measured(facts, "side_effects")
    notes = _sentences(facts)
    if not rows:
        return [line(notes or "No side effects were measured.")]
    numbers = [
        [r["measure"], number(r["without"]), number(r["with"]), number(r["change"]),
         interval(r), number(r["control_change"]), r["n"]]
        for r in rows
    ]  # fmt: skip
    said = "; ".join(f"{r['measure']} {number(r['change'])}" for r in rows)
    return [
        figure("Change of answers and of neutral text", changes(rows, theme=theme), notes, said),
        table(["measure", "without", "with", "change", "95 %", "random heads", "n"], numbers),
    ]


def _sweep(run: OpenRun, theme: str | None) -> "list[Component]":
    """A curve for each measure."""
    from dash import dcc, html

    facts = run.facts
    names = list(dict.fromkeys(row["measure"] for row in facts["rows"]))
    figures, numbers = [], []
    for name in names:
        rows = [row for row in measured(facts, "rows") if row["measure"] == name]
        said = ", ".join(f"{r['strength']:g}: {number(r['with'])}" for r in rows)
        figures.append(html.Div(
            [html.H3(name), html.Figure(
                [dcc.Graph(figure=dose(rows, theme=theme), config=PLAIN),
                 html.Figcaption(f"By strength {said}.", className="unseen")])]
        ))  # fmt: skip
        numbers += [
            [name, f"{r['strength']:g}", number(r["with"]), number(r["change"]), interval(r),
             number(r["control_change"]), r["n"]]
            for r in rows
        ]  # fmt: skip
    notes = _sentences(facts)
    return [
        html.P([html.Code(line) for line in facts["recipe"]][:8]), line(notes),
        html.Div(figures, className="columns"),
        html.Details([html.Summary("The numbers"), table(
            ["measure", "strength", "value", "change", "95 %", "random heads", "n"], numbers, 30)]),
    ]  # fmt: skip


def words_of(lines: Sequence[Line], unit: str) -> str:
    """Effects in words, for those who do not see the figure."""
    parts = [
        f"{x.name} {number(x.effect)} {interval({'ci_lo': x.low, 'ci_hi': x.high})}"
        + ("" if x.control is None else f", beside it {number(x.control)}")
        for x in lines[:10]
    ]
    return f"{unit}: {'; '.join(parts)}"


VIEWS: Mapping[str, Callable[[OpenRun, str | None], "list[Component]"]] = {
    "sets": _sets,
    "ablate": _ablate,
    "verdict": _verdict,
    "steer": _steer,
    "sweep": _sweep,
}
