"""What the page Patching shows of a run: its sweep, its effects, tokens, and further runs."""

import csv
import io
import shlex
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flask import Flask, Response, request

from app.dashboard.data import KEPT, answered
from app.dashboard.headfacts import is_effect
from app.dashboard.library import Library, OpenRun
from app.dashboard.page import Feed, Site
from app.figures.maps import marked
from app.figures.patching import DIFFERS, effect_column, unsure
from app.positions import ROWS, PositionSweep, read_positions
from app.positionview import COLUMNS, View, cells, strongest, view_of
from interp.errors import InputError, InterpError, RunError, UnknownNameError
from interp.headid import HeadId
from interp.scores import HeadScores

if TYPE_CHECKING:
    from dash.development.base_component import Component

KINDS = {
    "positions": "heads and layers by positions", "patch": "each head", "attribute": "each head",
    "ablate": "each head", "windows": "windows of layers",
}  # fmt: skip
LISTED, CELLS, MARKED, STRONGEST = 25, 200, 60, 32


def sweep_of(run: OpenRun) -> PositionSweep:
    """The sweep over positions that a run keeps.

    Raises:
        RunError: it keeps none, or a damaged one.
    """
    path = run.run.folder / "extra" / "positions.safetensors"
    found = _read(run.run.folder, path.stat().st_mtime_ns) if path.exists() else None
    if found is None:
        raise RunError(
            f"run {run.name} patches no single positions",
            hint=f"headscope patch --positions -m {run.info.get('model', 'MODEL')}",
        )
    return found


@lru_cache(maxsize=4)
def _read(folder: Path, stamp: int) -> PositionSweep | None:
    from interp.run import Run

    return read_positions(Run.load(folder))


def effects_of(run: OpenRun) -> dict[str, HeadScores]:
    """Tables of effects: all of a run that patches or attributes, those with effects of others."""
    mine = run.info.get("view") in KINDS
    return {name: t for name, t in run.tables.items() if mine or is_effect(t)}


def effects(run: OpenRun, feed: Feed) -> HeadScores:
    """The table of effects that a feed names; the first if it names none of them.

    Raises:
        RunError: the run has none.
    """
    tables = effects_of(run)
    if not tables:
        raise RunError(
            f"run {run.name} holds no effects of heads",
            hint=f"headscope patch -m {run.info.get('model', 'MODEL')} measures them",
        )
    return tables.get(feed.get("metric", "")) or next(iter(tables.values()))


def number(feed: Feed, name: str) -> float:
    """A number of the state, 0 if it is none."""
    try:
        value = abs(float(feed.get(name, "")))
    except ValueError:
        return 0.0
    return value if np.isfinite(value) else 0.0


def example_of(feed: Feed) -> int | None:
    """The example that a feed names; None for the mean."""
    text = feed.get("pex", "")
    return int(text) if text.isascii() and text.isdigit() else None


def shown(sweep: PositionSweep, rows: str, feed: Feed) -> View:
    """The cells that a feed asks for: of one layer, of the strongest heads, or of all.

    Raises:
        InputError: see `app.positionview.view_of`.
    """
    chosen = None
    layer = feed.get("play", "")
    if rows == "head" and layer.isascii() and layer.isdigit():
        chosen = [i for i, h in enumerate(sweep.heads) if HeadId.parse(h).layer == int(layer)]
        if not chosen:
            raise InputError(f"no head of layer {layer} was patched")
    elif feed.get("prows") != "all":
        chosen = strongest(sweep, rows, STRONGEST)
    example = example_of(feed)
    by = feed.get("pby") if example is None and feed.get("pby") in sweep.modes() else None
    recovered = feed.get("pval") == "recovered"
    return view_of(sweep, rows, example=example, by=by, recovered=recovered, chosen=chosen)


def summary(view: View, threshold: float, hidden: int) -> str:
    """Cells in words, for those who do not see them."""
    strong = np.where(view.noise(threshold) | ~np.isfinite(view.values), 0, np.abs(view.values))
    count = int((strong > 0).sum())
    order = np.argsort(-strong, axis=None, kind="stable")[: min(3, count)]
    places = [np.unravel_index(int(i), strong.shape) for i in order]
    named = "; ".join(
        f"{view.rows[r]} at {_plain(view, int(c))} {view.values[r, c]:+.3g}" for r, c in places
    )
    parts = [
        f"{count} of {int(np.isfinite(view.values).sum())} cells stand out of noise",
        f"strongest: {named}" if named else "",
        f"{hidden} weaker rows are not drawn" if hidden else "",
    ]
    return ". ".join(p for p in parts if p) + "."


def _plain(view: View, at: int) -> str:
    column = view.columns[at]
    text = marked(column.clean)
    return text if column.name == column.clean else f"{text} {column.name}"


def floor_note(sweep: PositionSweep, view: View, threshold: float) -> str:
    """What is grey and why, in words."""
    floor = (
        f"Patched with its own values, a run changes by {view.floor:.2g} at most ({view.unit}): "
        "rounding, the floor of what can be seen."
    )
    mean = "" if np.isnan(view.low).all() else " or whose 95 % interval over examples holds 0"
    extra = f", or no stronger than {threshold:g}" if threshold > view.floor else ""
    return f"{floor} Grey: cells at that floor{mean}{extra}."


def cell_rows(sweep: PositionSweep, feed: Feed) -> list[dict[str, Any]]:
    """The strongest cells of heads, as rows of a table."""
    example = example_of(feed)
    by = feed.get("pby") if example is None and feed.get("pby") in sweep.modes() else None
    layer = feed.get("play")
    found = [
        row for row in cells(sweep, "head", example=example, by=by)
        if not layer or str(HeadId.parse(row["row"]).layer) == layer
    ]  # fmt: skip
    found.sort(key=lambda row: -abs(row["effect"]))
    return [
        {
            "id": i, "head": row["row"], "position": row["position"],
            "clean": marked(row["clean"]),
            "corrupted": f"{DIFFERS} {marked(row['corrupted'])}" if row["differs"] else "same",
            "effect": row["effect"], "ci_lo": row["ci_lo"], "ci_hi": row["ci_hi"],
            "recovered": row["recovered"], "n": row["n"],
            "noise": "within" if row["noise"] else "",
        }
        for i, row in enumerate(found[:CELLS])
    ]  # fmt: skip


def head_rows(table: HeadScores, threshold: float, floor: float) -> list[dict[str, Any]]:
    """Effects of heads, the strongest of either sign first."""
    noise = unsure(table, floor=floor, threshold=threshold)
    shares = np.full(len(table.heads), np.nan)
    if "recovered" in table.extras:
        shares, _ = effect_column(table, recovered=True)
    exact = table.column("exact") if "exact" in table.extras else None
    size = np.where(np.isfinite(table.values), np.abs(table.values), -1)
    out = []
    for i in np.argsort(-size, kind="stable").tolist():
        head = table.heads[i]
        query = table.granularity == "query"
        row = {
            "key": str(head), "head": str(head) if query else None,
            "group": None if query else f"L{head.layer}, group {head.head}",
            "n": int(table.n[i]), "noise": "within" if noise[i] else "",
        }  # fmt: skip
        numbers = {
            "effect": table.values[i], "ci_lo": table.ci_lo[i], "ci_hi": table.ci_hi[i],
            "recovered": shares[i], "exact": np.nan if exact is None else exact[i],
        }  # fmt: skip
        out.append(row | {k: float(v) for k, v in numbers.items() if np.isfinite(v)})
    return out


def prompts(sweep: PositionSweep, example: int | None) -> "list[Component] | str":
    """Tokens of a clean and a corrupted prompt; where they differ they are marked and underlined."""
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
                parts[-1] += f" {text}"
            else:
                parts.append(f" {text} " if parts else text)
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


def routes(server: Flask, library: Library) -> None:
    """The cells of a sweep as a CSV file."""

    @server.get("/data/<run>/positions/<rows>.csv")
    @answered
    def positions(run: str, rows: str) -> Response:
        if rows not in ROWS:
            raise UnknownNameError("kind of rows", rows, ROWS)
        example = request.args.get("example", "")
        if example and not (example.isascii() and example.isdigit()):
            raise InputError(f"example must be a number from 0; got {example[:40]!r}")
        found = cells(
            sweep_of(library.open(run)), rows, example=int(example) if example else None,
            by=request.args.get("by") or None,
        )  # fmt: skip
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
        answer = Response(out.getvalue().encode("utf-8", "replace"), mimetype="text/csv")
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{run}-{rows}-positions")
        answer.headers["Content-Disposition"] = f'attachment; filename="{stem}.csv"'
        answer.headers["Cache-Control"] = KEPT
        return answer


def csv_link(run: OpenRun, rows: str, sweep: PositionSweep, feed: Feed) -> str:
    """Where the drawn cells are to be had as numbers."""
    example = example_of(feed)
    query = f"?example={example}" if example is not None else ""
    if example is None and feed.get("pby") in sweep.modes():
        query = f"?by={feed['pby']}"
    return f"/data/{run.name}/positions/{rows}.csv{query}"


def python(site: Site, feed: Feed) -> str:
    """The Python that draws the same."""
    if "run" not in feed:
        return ""
    run = site.run(feed)
    lines = ["from interp.run import Run", "", f"run = Run.load({str(site.root / run.name)!r})"]
    try:
        sweep_of(run)
    except InterpError:
        name = next(iter(effects_of(run)), None)
        if name is None:
            return ""
        lines.insert(0, "from app.figures.patching import effect_grid")
        return "\n".join([*lines, f"effect_grid(run.scores[{name!r}]).show()"])
    lines[:0] = [
        "from app.figures.patching import position_map",
        "from app.positions import read_positions", "from app.positionview import view_of",
    ]  # fmt: skip
    more = f", example={example_of(feed)}" if example_of(feed) is not None else ""
    more += ", recovered=True" if feed.get("pval") == "recovered" else ""
    lines.append(f'position_map(view_of(read_positions(run), "head"{more})).show()')
    return "\n".join(lines)


def command(site: Site, feed: Feed) -> str:
    """The command that made the run."""
    if "run" not in feed:
        return ""
    run = site.run(feed)
    return str(run.info.get("command") or shlex.join(["headscope", "show", run.name]))
