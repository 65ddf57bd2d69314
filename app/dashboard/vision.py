"""Where heads look on images, from traces: patches, rows over them, budgets, readers, pointing.

Everything is read from arrays of the trace with numpy alone. Which pixels a position stands for is
taken from `pictures.safetensors`, so that any grid will do: merged patches, tiles, video frames.

query   a position of the tower, or None for the mean over all queries
mass    attention of one row that falls on some positions, 0..1
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.catalog import entries
from app.dashboard.library import OpenRun
from app.dashboard.page import Feed
from interp.errors import InputError, RunError
from interp.headid import DEFAULT_TOWER, HeadId
from interp.scores import HeadScores
from interp.traces.trace import EXACT, HeadTrace, TowerTrace, Trace

IMAGE, TILE, FRAME, MASS, ALL = 2, 5, 6, "mass", "all"
"""Columns of `places`; heads chosen by mass; the query that stands for all."""

_PATCHES_AT_ONCE = _QUERIES_AT_ONCE = 256
_KEPT = 8
_VISUAL_TASKS = ("shapes", "tiles")


@dataclass(frozen=True, eq=False)
class Patches:
    """The positions of a tower that stand for pixels.

    Attributes:
        at: [patch] key positions, rising.
        places: [patch, 7] row of the tower, position in it, image, grid row, grid column, tile
            and frame.
        boxes: [patch, 4] left, top, right, bottom in pixels of the image as it was.
        sizes: width and height of each image.
        named: name to image and box.
        n: positions of the tower.
    """

    at: np.ndarray
    places: np.ndarray
    boxes: np.ndarray
    sizes: tuple[tuple[int, int], ...]
    named: Mapping[str, tuple[int, tuple[float, ...]]]
    n: int

    def touching(self, name: str) -> np.ndarray:
        """[patch] whether it overlaps a named box."""
        image, (left, top, right, bottom) = self.named[name]
        l, t, r, b = self.boxes.T  # noqa: E741
        over = (l < right) & (r > left) & (t < bottom) & (b > top)
        out: np.ndarray = over & (self.places[:, IMAGE] == image)
        return out

    def among(self, positions: Iterable[int]) -> np.ndarray:
        """Indices of the patches at some positions.

        Raises:
            InputError: one of them stands for no pixels.
        """
        index = {int(p): i for i, p in enumerate(self.at)}
        wrong = [p for p in positions if p not in index]
        if wrong:
            raise InputError(f"patches must stand for pixels; position {wrong[0]} stands for none")
        return np.array(sorted(index[p] for p in positions), dtype=np.int64)


def towers_of(trace: Trace) -> list[str]:
    """Towers of a trace whose positions stand for pixels; those of text first.

    Raises:
        RunError: the prompt has no images, or none of its towers was kept.
    """
    if not trace.has_pictures:
        raise RunError(
            f"prompt {trace.id} has no images in its trace",
            hint="choose another prompt, or make a trace of one with images",
        )
    arrays = trace.pictures[0]
    found = [n for n in trace.towers if f"{n}/boxes" in arrays and trace.towers[n].layers]
    if not found:
        raise RunError(
            f"no tower kept in the trace of {trace.id} has positions that stand for pixels",
            hint="capture it again with all towers",
        )
    return sorted(found, key=lambda n: (n != DEFAULT_TOWER, n))


def patches_of(trace: Trace, tower: str) -> Patches:
    """The patches of a tower.

    Raises:
        RunError: there are none, or the file is damaged.
        UnknownNameError: the tower was not kept.
    """
    arrays, facts = trace.pictures
    found = trace.tower(tower)
    try:
        places, boxes = arrays[f"{tower}/places"], arrays[f"{tower}/boxes"]
        sizes = tuple((int(w), int(h)) for w, h in facts["sizes"])
        named = {
            str(name): (int(box[0]), tuple(float(x) for x in box[1:5]))
            for name, box in facts.get("boxes", {}).items()
        }
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise RunError(
            f"positions of {tower} stand for no pixels in the trace of {trace.id}: {error!r}"
        ) from None
    if places.shape != (found.n_key, 7) or boxes.shape != (found.n_key, 4):
        raise RunError(
            f"the pictures of {trace.id} must place each of the {found.n_key} positions of "
            f"{tower}; they place {len(places)}",
            hint=f"delete {trace.folder} and capture the prompt again",
        )
    at = np.flatnonzero(np.isfinite(boxes).all(1))
    if not len(at):
        raise RunError(f"no position of {tower} stands for pixels in the trace of {trace.id}")
    return Patches(at, places[at], boxes[at], sizes, named, found.n_key)


def shift_of(tower: TowerTrace) -> int:
    """Keys before the first query, where queries are the last of the keys; else 0."""
    shift = max(0, tower.n_key - tower.n_query)
    same = tower.labels("query") == tower.labels("key")[shift:]
    return shift if same else 0


def own_query(trace: Trace, tower: str) -> int | None:
    """The query that is looked at first: the prompt's last token, in vision towers the class token.

    None, the mean of all, where a tower has no class token or several images one each.
    """
    found = trace.tower(tower)
    if found.about.get("query_labels") is None:  # these are the tokens of the prompt
        spans = trace.info["spans"].get("generated") or [[found.n_query + shift_of(found)]]
        return max(0, min(found.n_query, int(spans[0][0]) - shift_of(found)) - 1)
    labels = found.labels("query")
    classes = [i for i, label in enumerate(labels) if label == "cls"]
    if classes:
        return classes[0] if len(classes) == 1 else None
    patches = tower in towers_of(trace) and found.labels("key") == labels
    return None if patches else found.n_query - 1


def query_of(trace: Trace, tower: str, lock: str | None) -> int | None:
    """The query that the state locks (`r12`, or `all`); the tower's own if it locks none."""
    found = trace.tower(tower)
    if lock == ALL:
        return None
    if lock and lock[0] == "r" and lock[1:].isdigit():
        at = int(lock[1:]) - shift_of(found)
        if 0 <= at < found.n_query:
            return at
    return own_query(trace, tower)


def row_of(head: HeadTrace, query: int | None) -> np.ndarray:
    """[key] what a query gives to each key, 0 where it sees none; or the mean over all queries."""
    if query is not None:
        row: np.ndarray = np.nan_to_num(head.rows([query])[0])
        return row
    n = head.n_query
    if head.layer.form != EXACT:  # what is hidden here may be no range
        starts = range(0, n, _QUERIES_AT_ONCE)
        parts = [np.arange(i, min(n, i + _QUERIES_AT_ONCE)) for i in starts]
        total: np.ndarray = sum(np.nansum(head.rows(p), axis=0) for p in parts) / np.float32(n)
        return total
    low, high = head.layer.array("low"), head.layer.array("high")
    some = high > low
    edges = [np.bincount(x[some], minlength=head.n_key + 1) for x in (low, high)]
    seen = np.cumsum(edges[0] - edges[1])[: head.n_key]
    # The summary is the mean over the queries that see a key.
    return np.asarray(head.summary("received") * seen / n, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Looks:
    """One query's rows in every head of a tower, summed up.

    Attributes:
        heads: the heads.
        mass: [head, segment] mass on the keys of each segment.
        patches: [head, patch] mass of each patch.
    """

    heads: tuple[HeadId, ...]
    mass: np.ndarray
    patches: np.ndarray


_CACHE: "OrderedDict[tuple[Any, ...], Looks]" = OrderedDict()
_LOCK = threading.Lock()


def looks(trace: Trace, tower: str, query: int | None) -> Looks:
    """One query's rows in every head of a tower; the last few are kept.

    Raises:
        RunError: the trace is damaged.
        InputError: the query is outside the tower.
    """
    # A trace may have been made anew under its name.
    key = (str(trace.folder), (trace.folder / "trace.json").stat().st_mtime_ns, tower, query)
    with _LOCK:  # the second of two that ask for the same waits for the first
        if key not in _CACHE:
            _CACHE[key] = _looks(trace, tower, query)
            while len(_CACHE) > _KEPT:
                _CACHE.popitem(last=False)
        _CACHE.move_to_end(key)
        return _CACHE[key]


def _looks(trace: Trace, tower: str, query: int | None) -> Looks:
    found, patches = trace.tower(tower), patches_of(trace, tower)
    of = np.asarray(found.about["key_segments"])
    heads, mass, parts = [], [], []
    for index, layer in sorted(found.layers.items()):
        for h in range(layer.n_heads):
            row = row_of(HeadTrace(layer, h), query)
            heads.append(HeadId(index, h, tower))
            mass.append(np.bincount(of, row, len(found.segments)))
            parts.append(row[patches.at])
    return Looks(tuple(heads), np.array(mass), np.array(parts))


def budget(
    trace: Trace, tower: str, query: int | None, *, by_segment: bool = False
) -> tuple[tuple[HeadId, ...], np.ndarray]:
    """[head, segment] mass of the query on each segment, or the mean over the query's segment.

    Args:
        trace: the trace.
        tower: its tower.
        query: a query; None for the mean over all queries.
        by_segment: the mean over all queries of the same segment, from summaries of the trace.
    """
    found = trace.tower(tower)
    if not by_segment and query is not None:
        made = looks(trace, tower, query)
        return made.heads, made.mass
    of = np.bincount(np.asarray(found.about["query_segments"]), minlength=len(found.segments))
    weights = of / max(1, of.sum())
    if query is not None:
        weights = np.eye(len(of))[found.about["query_segments"][query]]
    heads, mass = [], []
    for index, layer in sorted(found.layers.items()):
        sums = np.asarray(layer.array("segments"), dtype=np.float64)
        heads += [HeadId(index, h, tower) for h in range(layer.n_heads)]
        mass.append(np.einsum("q,hqk->hk", weights, sums))
    return tuple(heads), np.concatenate(mass)


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
    order: Callable[[dict[str, Any]], Any] = lambda r: (-r["pointing"], -r["share"])  # noqa: E731
    return sorted(out, key=order)


def box_names(traces: Iterable[Trace]) -> list[str]:
    """Names of all boxes, those of most prompts first, `thing` before all others."""
    count: dict[str, int] = {}
    for trace in traces:
        if trace.has_pictures:
            for name in trace.pictures[1].get("boxes", {}):
                count[str(name)] = count.get(str(name), 0) + 1
    return sorted(count, key=lambda n: (n != "thing", -count[n], n))


def positions_of(text: str | None) -> tuple[int, ...]:
    """Positions written as ranges with both ends.

    >>> positions_of("5-7,12"), positions_of("")
    ((5, 6, 7, 12), ())

    Raises:
        InputError: it is written otherwise, or holds more than 16,384.
    """
    found: set[int] = set()
    for part in filter(None, (text or "").split(",")):
        low, _, high = part.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()) or len(part) > 20:
            raise InputError(f"patches must be positions and ranges, as 5-7,12; got {part[:20]!r}")
        first, last = int(low), int(high or low)
        if last < first or len(found) + last - first >= 16384:
            raise InputError(f"patches must be at most 16384 in rising ranges; got {part!r}")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
