"""What is known of one head in words and small tables: badges, evidence, causes, writes, kin."""

from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.library import OpenRun
from app.dashboard.page import Feed, Site
from app.dashboard.pages.heads import shown, verdicts
from app.figures.maps import marked
from interp.errors import InterpError
from interp.headid import HeadId
from interp.scores import HeadScores

if TYPE_CHECKING:
    from dash.development.base_component import Component

_SHOWN = 10


def _table(head: list[str], rows: list[list[Any]]) -> "Component":
    from dash import html

    return html.Table(
        [
            html.Thead(html.Tr([html.Th(h) for h in head])),
            html.Tbody([html.Tr([html.Td(c) for c in row]) for row in rows]),
        ],
        className="facts",
    )


def _number(x: float | None) -> str:
    return "–" if x is None or np.isnan(x) else f"{x:.4g}"


def at(table: HeadScores, head: HeadId) -> int | None:
    """Column of a head in a table; that of its group in a table of key-value heads is not it."""
    if table.granularity != "query" or head not in table.heads:
        return None
    return table.heads.index(head)


def is_effect(table: HeadScores) -> bool:
    """Whether a table holds what interventions change, rather than what heads look at."""
    return table.unit.startswith("change of")


def badges(run: OpenRun, head: HeadId) -> "list[Component]":
    """Classes of the head with the strength of their evidence, and its key-value group."""
    from dash import html

    out = []
    for name, table in run.tables.items():
        i = at(table, head)
        if i is None or table.verdict[i] == "undefined":
            continue
        text = f"{name} {_number(table.values[i])}"
        if np.isfinite(table.ci_lo[i]):
            text += f" [{_number(table.ci_lo[i])}, {_number(table.ci_hi[i])}]"
        text += f", q {_number(table.q[i])}" if np.isfinite(table.q[i]) else ""
        strong = table.verdict[i] == name
        out.append(html.Span(text if strong else f"{text}: {verdicts(table)[i]}",
                             className="badge strong" if strong else "badge"))  # fmt: skip
    try:
        layer = run.trace(None).layer(head.tower, head.layer)
        size = layer.n_heads // int(layer.about["kv_heads"])
        if size > 1:
            first = head.head // size * size
            kin = [HeadId(head.layer, h, head.tower) for h in range(first, first + size)]
            names = ", ".join(str(h) for h in kin if h != head)
            out.append(html.Span(f"shares keys and values with {names}", className="badge"))
    except InterpError:
        pass
    return out


def evidence(run: OpenRun, head: HeadId, feed: Feed) -> "Component | str":
    """Examples by falling score: the strongest, the weakest, and those that gave none."""
    from dash import html

    try:
        table = shown(run, feed)
    except InterpError:
        return "This run has no table of scores."
    i = at(table, head)
    if i is None:
        return f"{head} is not in the table of {table.detector}."
    scores = table.per_example[:, i]
    sign = 1.0 if table.direction == "higher" else -1.0
    defined = np.flatnonzero(np.isfinite(scores))
    order = defined[np.argsort(-sign * scores[defined], kind="stable")]
    chosen = list(order[:_SHOWN]) + [j for j in order[-_SHOWN:] if j not in order[:_SHOWN]]
    traces = {t.id: key for key, t in run.traces.items()}
    rows: list[list[Any]] = []
    for j in chosen:
        name = table.examples[j]
        null = None if table.null_per_example is None else float(table.null_per_example[j, i])
        where = 1 + int(np.flatnonzero(order == j)[0])
        label: Any = name
        edit: Any = ""
        if name in traces:
            label = html.A(name, href=_link(run, head, traces[name]))
            edit = html.A("edit", href=f"/r/{run.name}/prompt?p={traces[name]}",
                          **{"aria-label": f"edit {name}"})  # fmt: skip
        place = f"{where} of {len(order)}"
        rows.append([label, _number(float(scores[j])), _number(null), place, edit])
    spread = _spread(scores[defined])
    parts: list[Any] = [
        html.P(f"{table.detector}: {table.message}."),
        _table(["prompt", "score", "control", "place", "again"], rows),
        html.P(f"Prompts by interval of the score: {spread}", className="faint"),
    ]
    if table.failures:
        reasons = "; ".join(f"{i}: {why}" for i, why in table.failures[:5])
        parts.append(html.P(f"{len(table.failures)} gave no score: {reasons}"))
    return html.Div(parts)


def _spread(scores: np.ndarray) -> str:
    """How many examples lie in each tenth of the range of their scores."""
    if not len(scores):
        return "none"
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        return f"{_number(low)}: {len(scores)}"
    counts, edges = np.histogram(scores, bins=10, range=(low, high))
    parts = zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return ", ".join(f"{_number(a)}–{_number(b)}: {n}" for n, a, b in parts if n)


def _link(run: OpenRun, head: HeadId, prompt: str | None = None) -> str:
    query = [f"p={prompt}"] if prompt else []
    query += [] if head.tower == "text" else [f"t={head.tower}"]
    place = f"/r/{run.name}/head/{head.layer}/{head.head}"
    return f"{place}?{'&'.join(query)}" if query else place


def causes(site: Site, run: OpenRun, head: HeadId) -> "Component | str":
    """Effects of this head in other runs of the same weights, beside the heads of its layer."""
    from dash import html

    weights = run.info.get("key", {}).get("fingerprint")
    rows: list[list[Any]] = []
    for entry in site.library.entries():
        if entry.run is None or entry.run.info.get("view") is None:
            continue
        if entry.run.info.get("key", {}).get("fingerprint") != weights:
            continue
        try:
            tables = site.library.open(entry.name).tables
        except InterpError:
            continue
        for name, table in tables.items():
            i = at(table, head)
            if i is None or not np.isfinite(table.values[i]) or not is_effect(table):
                continue
            peers = [
                abs(float(v)) for h, v in zip(table.heads, table.values, strict=True)
                if h.layer == head.layer and h != head and np.isfinite(v)
            ]  # fmt: skip
            above = sum(p >= abs(float(table.values[i])) for p in peers)
            peer = f"{above} of {len(peers)} heads of the layer as strong" if peers else "alone"
            rows.append([
                html.A(name, href=f"/r/{entry.name}/heads?m={name}"),
                _number(float(table.values[i])),
                f"[{_number(float(table.ci_lo[i]))}, {_number(float(table.ci_hi[i]))}]",
                int(table.n[i]), peer,
            ])  # fmt: skip
    if not rows:
        return (
            f"No run of this model has intervened on {head} yet. Put it into the basket (b) and "
            "intervene (x)."
        )
    return _table(["run of", "effect", "95 %", "n", "beside"], rows)


def writes(run: OpenRun, head: HeadId, feed: Feed) -> "Component | str":
    """Tokens that the head raises and lowers when it looks at the keys it likes most."""
    from dash import html

    try:
        trace = run.trace(feed.get("prompt"))
        found = trace.head(head).writes()
    except InterpError:
        return "Needs a trace of a prompt: headscope capture makes one."
    if not found:
        return "Kept for heads of text decoders that write to the logits."
    rows = [
        [f"{marked(trace.tokens[w.key])} ({w.key})", ", ".join(map(marked, w.up)),
         ", ".join(map(marked, w.down)), f"{w.rank:,}"]
        for w in found
    ]  # fmt: skip
    copies = sum(w.rank == 1 for w in found)
    return html.Div(
        [
            _table(["looks at", "raises", "lowers", "own rank"], rows),
            html.P(
                f"Directly, past every later layer: W_U norm(v W_O). {copies} of {len(found)} "
                "keys would be copied (own rank 1).",
                className="faint",
            ),
        ]
    )


def alike(run: OpenRun, head: HeadId) -> "Component | str":
    """Heads whose scores on all tables, each in standard units, are nearest."""
    from dash import html

    tables = [t for t in run.tables.values() if at(t, head) is not None]
    if len(tables) < 2:
        return "Needs two tables of scores or more in one run."
    heads = [h for h in tables[0].heads if all(h in t.heads for t in tables)]
    x = np.stack([t.values[[t.heads.index(h) for h in heads]] for t in tables], 1)
    spread = np.nanstd(x, 0)
    x = np.nan_to_num((x - np.nanmean(x, 0)) / np.where(spread > 0, spread, 1))
    far = np.linalg.norm(x - x[heads.index(head)], axis=1)
    rows = []
    for i in np.argsort(far, kind="stable")[1:7]:
        h = heads[i]
        rows.append([html.A(str(h), href=_link(run, h)),
                     f"{far[i]:.2f}"])  # fmt: skip
    return _table(["head", "distance"], rows)
