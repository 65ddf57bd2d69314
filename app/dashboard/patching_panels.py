"""Parts of the page Patching that are made of components: choices, prompts, further runs."""

from typing import TYPE_CHECKING, Any

from app.dashboard.library import OpenRun
from app.dashboard.page import Feed, Site, told
from app.dashboard.patching import KINDS, effects, effects_of, sweep_of
from app.figures.maps import marked
from app.figures.patching import DIFFERS
from app.positions import EXTRA, PositionSweep
from interp.errors import InterpError

if TYPE_CHECKING:
    from dash.development.base_component import Component

BY = [{"value": "position", "label": "position"}, {"value": "span", "label": "span"}]
LISTED, MARKED = 25, 60


def choices(site: Site, feed: Feed) -> tuple[Any, ...]:
    """What the page offers for a run: note, further runs, what is hidden, and lists of choices."""
    from dash import html

    def nothing(note: Any, run: OpenRun | None = None) -> tuple[Any, ...]:
        return note, others(site, run), *(True,) * 5, [], "", [], "", [], BY

    if "run" not in feed:
        return nothing(html.P(["Choose a run, or see ", html.A("all runs", href="/")]))
    run = None
    try:
        run = site.run(feed)
        tables = effects_of(run)
        swept = (run.run.folder / "extra" / f"{EXTRA}.safetensors").exists()
        sweep = sweep_of(run) if swept else None
        cut = run.info.get("view") == "windows" and bool(run.facts)
        if sweep is None and not tables and not cut:
            effects(run, feed)
    except InterpError as error:
        return nothing(html.P(told(error), className="alert", role="alert"), run)
    modes = sweep.modes() if sweep is not None else ()
    towers = list(dict.fromkeys(t for table in tables.values() for t in table.towers))
    examples = (
        [{"value": str(i), "label": x or str(i)} for i, x in enumerate(sweep.examples)]
        if sweep is not None
        else []
    )
    return (
        _note(run), others(site, run), sweep is None and not tables,
        sweep is None, sweep is None, not tables,
        not cut, list(tables), next(iter(tables), ""), towers, next(iter(towers), ""), examples,
        [m | {"disabled": m["value"] not in modes} for m in BY],
    )  # fmt: skip


def _note(run: OpenRun) -> "Component":
    from dash import html

    what = KINDS.get(str(run.info.get("view")), "effects of heads")
    words = [what, str(run.info.get("model") or ""), str(run.info.get("task") or "")]
    notes = [str(x) for x in run.facts.get("notes", ())]
    return html.P("; ".join([" · ".join(w for w in words if w), *notes]), className="faint")


def prompts(sweep: PositionSweep, example: int | None) -> "list[Component] | str":
    """Tokens of a clean and a corrupted prompt, marked where they differ."""
    from dash import html

    if example is None:
        return "Choose an example to read its two prompts."
    if example >= len(sweep.texts):
        return ""
    clean, corrupted = sweep.texts[example]
    odd = [i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
    marks = set(odd[:MARKED])
    gap = sweep.clean[example], sweep.corrupted[example]
    out: list[Any] = []
    for name, tokens, value in (("Clean", clean, gap[0]), ("Corrupted", corrupted, gap[1])):
        parts: list[Any] = []
        for i, token in enumerate(tokens):
            text = marked(token)
            if i in marks:
                parts.append(html.Mark(f"{DIFFERS}{text}"))
            elif parts and isinstance(parts[-1], str):
                parts[-1] += f"{text} "
            else:
                parts.append(f" {text} ")
        out.append(html.P([html.Strong(f"{name}, {sweep.metric} {value:.4g}: "), *parts]))
    at = ", ".join(map(str, odd[:MARKED])) + (", …" if len(odd) > MARKED else "")
    out.append(html.P(f"They differ at {at or 'no position'}.", className="faint"))
    return out


def others(site: Site, run: OpenRun | None) -> "Component | str":
    """Runs of the same weights that patch or attribute; of any if there is no run."""
    from dash import html

    weights = run.info.get("key", {}).get("fingerprint") if run is not None else None
    rows = []
    for entry in site.library.entries():
        if entry.run is None or entry.run.info.get("view") not in KINDS:
            continue
        info = entry.run.info
        if run is not None and info.get("key", {}).get("fingerprint") != weights:
            continue
        here = run is not None and run.name == entry.name
        link: Any = html.Strong(entry.name) if here else html.A(
            entry.name, href=f"/r/{entry.name}/patch"
        )  # fmt: skip
        rows.append(html.Tr([
            html.Td(link), html.Td(KINDS[str(info["view"])]),
            html.Td(", ".join(map(str, info.get("scores") or {})) or "–"),
            html.Td(str(info.get("task") or "")), html.Td(entry.run.status),
        ]))  # fmt: skip
    if not rows:
        return "No run patches this model yet; measure below, or in a terminal."
    head = html.Tr([html.Th(x) for x in ("run", "what", "tables", "prompts", "status")])
    table = html.Table([html.Thead(head), html.Tbody(rows[:LISTED])], className="facts")
    more = len(rows) - LISTED
    return html.Div([table, html.P(f"and {more} more")] if more > 0 else table)
