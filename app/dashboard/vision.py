"""Where heads look on images, from traces: patches, rows of heads over them, budgets.

Everything is read from arrays of the trace with numpy alone. Which pixels a position stands for is
taken from `pictures.safetensors`, so that any grid will do: merged patches, tiles, video frames.

query   a position of the tower, or None for the mean over all queries
mass    attention of one row that falls on some positions, 0..1
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InputError, RunError
from interp.headid import DEFAULT_TOWER, HeadId
from interp.traces.trace import EXACT, HeadTrace, TowerTrace, Trace

IMAGE, TILE, FRAME = 2, 5, 6
"""Columns of `places`."""
ALL, OTHER = "all", "other"
"""The query that stands for all; the segment of what is in no other."""

_QUERIES_AT_ONCE = 256
_KEPT = 8


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
        raise RunError(f"prompt {trace.id} has no images, or its trace was made without them")
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
    """[key] what a query gives to each key, NaN where it sees none; or the mean over all queries.

    Args:
        head: the head.
        query: a query; None for the mean over all, to which one that sees no key adds 0.
    """
    if query is not None:
        row: np.ndarray = head.rows([query])[0]
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


def groups_of(trace: Trace, tower: str) -> tuple[list[str], np.ndarray]:
    """Names and [key] index of what a budget parts the keys into.

    The segments of the trace; several images one each; and where no segment of the tower is known,
    images and what its other positions are called.
    """
    found, patches = trace.tower(tower), patches_of(trace, tower)
    names = [found.segments[i] for i in found.about["key_segments"]]
    if set(names) == {OTHER}:
        labels = found.labels("key")
        names = [x if x.isalpha() else OTHER for x in labels]
        for p in patches.at:
            names[p] = "image"
    if len(patches.sizes) > 1:
        for p, image in zip(patches.at, patches.places[:, IMAGE], strict=True):
            names[p] = f"image {image + 1}"
    known = list(dict.fromkeys(names))
    return known, np.array([known.index(name) for name in names])


@dataclass(frozen=True, eq=False)
class Looks:
    """One query's rows in every head of a tower, summed up.

    Attributes:
        heads: the heads.
        groups: names of what the keys are parted into.
        mass: [head, group] mass on the keys of each.
        patches: [head, patch] mass of each patch.
    """

    heads: tuple[HeadId, ...]
    groups: tuple[str, ...]
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
    groups, of = groups_of(trace, tower)
    heads, mass, parts = [], [], []
    for index, layer in sorted(found.layers.items()):
        for h in range(layer.n_heads):
            row = np.nan_to_num(row_of(HeadTrace(layer, h), query))
            heads.append(HeadId(index, h, tower))
            mass.append(np.bincount(of, row, len(groups)))
            parts.append(row[patches.at])
    return Looks(tuple(heads), tuple(groups), np.array(mass), np.array(parts))


def budget(
    trace: Trace, tower: str, query: int | None, *, by_segment: bool = False
) -> tuple[tuple[HeadId, ...], tuple[str, ...], np.ndarray]:
    """Heads, names of groups of keys, and [head, group] mass of a query on each group.

    Args:
        trace: the trace.
        tower: its tower.
        query: a query; None for the mean over all queries.
        by_segment: the mean over all queries of the same segment instead, on the keys of each
            segment, from summaries of the trace.
    """
    if not by_segment or query is None:
        made = looks(trace, tower, query)
        return made.heads, made.groups, made.mass
    found = trace.tower(tower)
    of = found.about["query_segments"][query]
    layers = sorted(found.layers.items())
    heads = tuple(HeadId(i, h, tower) for i, layer in layers for h in range(layer.n_heads))
    mass = [np.asarray(layer.array("segments"))[:, of] for _, layer in layers]
    return heads, found.segments, np.concatenate(mass)


def positions_of(text: str | None) -> tuple[int, ...]:
    """Positions written as ranges with both ends.

    >>> positions_of("5-7,12"), positions_of("")
    ((5, 6, 7, 12), ())

    Raises:
        InputError: it is written otherwise, or holds more than 16,384.
    """
    found: set[int] = set()
    for part in filter(None, (text or "").split(",")):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if match is None:
            raise InputError(f"patches must be positions and ranges, as 5-7,12; got {part[:20]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or len(found) + last - first >= 16384:
            raise InputError(f"patches must be at most 16384 in rising ranges; got {part!r}")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))
