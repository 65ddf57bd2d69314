"""Which heads see: the best by a table or by mass, who reads some patches, how well heads point."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from app.catalog import entries
from app.dashboard.library import OpenRun
from app.dashboard.page import Feed
from app.dashboard.vision import (
    Patches,
    looks,
    own_query,
    patches_of,
    query_of,
    shift_of,
    towers_of,
)
from interp.headid import HeadId
from interp.scores import HeadScores
from interp.traces.trace import HeadTrace, Trace

MASS = "mass"
"""What heads are chosen by where no table says which see."""

_PATCHES_AT_ONCE = 256
_VISUAL_TASKS = ("shapes", "tiles")


def readers(
    head: HeadTrace, patches: Patches, chosen: np.ndarray, *, every: bool, most: int = 64
) -> list[tuple[int, float]]:
    """The queries that give most to some patches, with that mass, the most first.

    Args:
        head: the head.
        patches: those of its tower.
        chosen: indices of the patches.
        every: queries that stand for pixels too.
        most: at most so many queries.
    """
    total = np.zeros(head.n_query)
    keys = patches.at[chosen]
    for start in range(0, len(keys), _PATCHES_AT_ONCE):
        total += np.nansum(head.columns(keys[start : start + _PATCHES_AT_ONCE]), axis=0)
    tower = head.layer.tower
    if not every and tower.labels("query") == tower.labels("key")[shift_of(tower) :]:
        own = patches.at - shift_of(tower)
        total[own[own >= 0]] = 0.0
    order = np.argsort(-total, kind="stable")[:most]
    return [(int(i), float(total[i])) for i in order if total[i] > 0]


def is_visual(table: HeadScores, tower: str) -> bool:
    """Whether a table of a tower's heads scores what they do with images."""
    if table.granularity != "query" or tower not in table.towers:
        return False
    entry = entries("detector").get(table.detector.partition("/")[0])
    return "image" in table.params.values() or bool(entry and entry.task in _VISUAL_TASKS)


def visual_tables(run: OpenRun, tower: str) -> list[str]:
    """Names of the run's tables that score what heads of a tower do with images."""
    return [name for name, table in run.tables.items() if is_visual(table, tower)]


def best_heads(
    run: OpenRun, trace: Trace, tower: str, feed: Feed, k: int = 8
) -> tuple[list[tuple[HeadId, float]], str]:
    """The k vision heads of a tower, the best first, and what they were chosen by.

    By the table that the state names, if it is visual; else by the first that is; else by the mass
    that the query gives to patches.
    """
    tables = visual_tables(run, tower)
    wanted = feed.get("vby") or (feed.get("metric") if feed.get("metric") in tables else None)
    name = wanted if wanted in tables or wanted == MASS else next(iter(tables), MASS)
    kept = trace.tower(tower).layers
    if name != MASS:
        table = run.tables[str(name)]
        value = dict(zip(table.heads, table.values.tolist(), strict=True))
        found = [h for h in table.top(len(table.heads)) if h.tower == tower and h.layer in kept]
        return [(h, value[h]) for h in found[:k]], str(name)
    made = looks(trace, tower, query_of(trace, tower, feed.get("lock")))
    return _most(made.heads, made.patches.sum(1), k), MASS


def readers_by_head(
    trace: Trace, tower: str, query: int | None, chosen: np.ndarray, k: int = 12
) -> list[tuple[HeadId, float]]:
    """The heads whose row gives most to some patches."""
    made = looks(trace, tower, query)
    return _most(made.heads, made.patches[:, chosen].sum(1), k)


def _most(heads: Sequence[HeadId], mass: np.ndarray, k: int) -> list[tuple[HeadId, float]]:
    order = np.argsort(-mass, kind="stable")[:k]
    return [(heads[i], float(mass[i])) for i in order]


def pointing(traces: Iterable[Trace], tower: str, box: str) -> list[dict[str, Any]]:
    """How well each head points at a named box, over all prompts that have it.

    Each prompt's own query looks. A hit: the patch with the largest mass touches the box. The share
    is that of the image mass on patches that touch it. Both have the same level by chance, the
    share of patches that touch the box: a row that is even over patches, or one that is shuffled.

    Returns:
        A row per head with `head`, `pointing`, `share`, `chance`, `lift` (share / chance), `mass`
        (on the image) and `n`, sorted by pointing, then share. Prompts that a head gives no mass
        on its image do not count for it.
    """
    rows: dict[HeadId, list[tuple[float, float, float, float]]] = {}
    for trace in traces:
        if not trace.has_pictures or tower not in towers_of(trace):
            continue
        patches = patches_of(trace, tower)
        if box not in patches.named or not (inside := patches.touching(box)).any():
            continue
        made = looks(trace, tower, own_query(trace, tower))
        for head, mass in zip(made.heads, made.patches, strict=True):
            total = float(mass.sum())
            if total > 0:
                found = bool(inside[mass.argmax()]), float(mass[inside].sum()) / total
                rows.setdefault(head, []).append((*found, float(inside.mean()), total))
    out = []
    for head, seen in rows.items():
        hit, share, chance, mass = (float(x) for x in np.mean(seen, axis=0))
        out.append({
            "head": str(head), "pointing": hit, "share": share, "chance": chance,
            "lift": share / chance, "mass": mass, "n": len(seen),
        })  # fmt: skip
    return sorted(out, key=lambda r: (-float(r["pointing"]), -float(r["share"])))


def box_names(traces: Iterable[Trace]) -> list[str]:
    """Names of all boxes, those of most prompts first, `thing` before all others."""
    count: dict[str, int] = {}
    for trace in traces:
        if trace.has_pictures:
            for name in trace.pictures[1].get("boxes", {}):
                count[str(name)] = count.get(str(name), 0) + 1
    return sorted(count, key=lambda n: (n != "thing", -count[n], n))
