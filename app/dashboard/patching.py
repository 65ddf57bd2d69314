"""What the page Patching shows of a run: its sweep, its effects, its windows."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.headfacts import is_effect
from app.dashboard.library import OpenRun
from app.dashboard.page import Feed
from app.figures.maps import marked
from app.figures.patching import DIFFERS, effect_column, unsure
from app.positions import EXTRA, PositionSweep, read_positions
from app.positionview import View, cells, strongest, view_of
from interp.errors import InputError, RunError
from interp.headid import HeadId
from interp.scores import HeadScores

if TYPE_CHECKING:
    pass

KINDS = {
    "positions": "heads and layers by positions", "patch": "each head", "attribute": "each head",
    "ablate": "each head", "windows": "windows of layers",
}  # fmt: skip
CUT = ("keys", "queries", "window", "layer", "change", "ci_lo", "ci_hi", "n")
CELLS, STRONGEST = 200, 32
STEPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def sweep_of(run: OpenRun) -> PositionSweep:
    """The sweep over positions that a run keeps.

    Raises:
        RunError: it keeps none, or a damaged one.
    """
    path = run.run.folder / "extra" / f"{EXTRA}.safetensors"
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


def floor_of(run: OpenRun, table: HeadScores) -> float:
    """What rounding may change: as measured, or a step of the precision of the metric."""
    try:
        return sweep_of(run).floor
    except RunError:
        about = table.provenance
        sizes = [abs(float(about[k])) for k in ("clean", "corrupted") if about.get(k) is not None]
        step = STEPS.get(str(about.get("dtype")).removeprefix("torch."), 0.0)
        return step * max(sizes, default=0.0)


def windows_of(run: OpenRun) -> tuple[list[dict[str, Any]], str]:
    """Rows of a run that cuts attention off in windows, and what they are, in words.

    Raises:
        RunError: it is no such run, or a damaged one.
    """
    if run.info.get("view") != "windows" or not run.facts:
        raise RunError(
            f"run {run.name} cuts no attention off",
            hint=f"headscope patch --window 1 -m {run.info.get('model', 'MODEL')}",
        )
    try:
        rows = [{**{k: row.get(k) for k in CUT}, "window": int(row["window"]),
                 "layer": int(row["layer"]), "change": float(row["change"])}
                for row in run.facts["rows"]]  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"run {run.name} is damaged: its rows of windows do not read") from error
    worst = min(rows, key=lambda row: row["change"], default=None)
    best = "" if worst is None else (
        f" Largest loss: {worst['change']:+.3g} around layer {worst['layer']} for {worst['keys']}."
    )  # fmt: skip
    return rows, (
        "0: nothing is lost; -1: the probability falls to 0. Bands are 95 % intervals over "
        f"prompts.{best}"
    )


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


def rows_of(sweep: PositionSweep, rows: str, feed: Feed) -> list[int] | None:
    """The rows that a feed asks for: heads of one layer, the strongest, or all (None).

    Raises:
        InputError: no head of the layer was patched.
    """
    layer = feed.get("play", "")
    if rows == "head" and layer.isascii() and layer.isdigit():
        chosen = [i for i, h in enumerate(sweep.heads) if HeadId.parse(h).layer == int(layer)]
        if not chosen:
            raise InputError(f"no head of layer {layer} was patched")
        return chosen
    return None if feed.get("prows") == "all" else strongest(sweep, rows, STRONGEST)


def mode_of(sweep: PositionSweep, feed: Feed) -> str | None:
    """How a feed takes means: by position, by span, or as the sweep does first (None)."""
    return feed["pby"] if example_of(feed) is None and feed.get("pby") in sweep.modes() else None


def shown(sweep: PositionSweep, rows: str, feed: Feed) -> View:
    """The cells that a feed asks for.

    Raises:
        InputError: see `app.positionview.view_of` and `rows_of`.
    """
    return view_of(
        sweep, rows, example=example_of(feed), by=mode_of(sweep, feed),
        recovered=feed.get("pval") == "recovered", chosen=rows_of(sweep, rows, feed),
    )  # fmt: skip


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
        f"Strongest: {named}" if named else "",
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
    # Of thousands of heads only the strongest: an interval takes its time.
    chosen = rows_of(sweep, "head", feed) or strongest(sweep, "head", 2 * STRONGEST)
    example, by = example_of(feed), mode_of(sweep, feed)
    found = list(cells(sweep, "head", example=example, by=by, chosen=chosen))
    found.sort(key=lambda row: -abs(row["effect"]))
    return [
        {
            "id": str(i), "head": row["row"], "position": row["position"],
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


def table_note(table: HeadScores, rows: list[dict[str, Any]]) -> str:
    """The table in words."""
    strong = [row for row in rows if not row["noise"] and "effect" in row]
    named = ", ".join(f"{r['head'] or r['group']} {r['effect']:+.3g}" for r in strong[:3])
    return (
        f"{table.detector}, {table.unit}: {len(strong)} of {len(rows)} stand out of noise"
        f"{'; strongest ' + named if named else ''}. Grey: the 95 % interval holds 0, or the "
        "effect is no stronger than rounding or the threshold."
    )
