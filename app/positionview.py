"""A sweep over positions as it is shown: cells of one example, or means with their intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from app.positions import ROWS, PositionSweep, Spans
from interp.errors import InputError
from interp.stats import bootstrap_interval

OTHER = "(rest)"
VARIES = "(varies)"


@dataclass(frozen=True)
class Column:
    """One position, or one span.

    Attributes:
        name: position, or name of the span.
        clean: token of the clean prompt; spans at the position where examples differ in it.
        corrupted: token of the corrupted prompt likewise.
        differs: whether clean and corrupted prompts differ there, in any example.
    """

    name: str
    clean: str
    corrupted: str
    differs: bool


@dataclass(frozen=True, eq=False)
class View:
    """Cells as they are shown.

    Attributes:
        rows: names of heads or layers.
        columns: positions or spans.
        values: [row, column]; NaN where there is nothing.
        low, high: 95 % interval of the mean over examples; NaN for a single example.
        n: [column] examples that have it.
        floor: noise floor in the same unit.
        recovered: whether values are shares of the difference of the runs; else changes.
        unit: what the values are.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Float[np.ndarray, "row column"]
    low: Float[np.ndarray, "row column"]
    high: Float[np.ndarray, "row column"]
    n: Int[np.ndarray, " column"]
    floor: float
    recovered: bool
    unit: str

    def noise(self, threshold: float = 0.0) -> Bool[np.ndarray, "row column"]:
        """Cells that cannot be told from noise, or are no stronger than a threshold.

        Noise: at most the floor, or a mean whose interval holds 0.
        """
        with np.errstate(invalid="ignore"):
            weak = np.abs(self.values) <= max(self.floor, threshold)
            unsure: Bool[np.ndarray, "row column"] = (self.low <= 0) & (self.high >= 0)
        return np.asarray(weak | unsure)


def view_of(
    sweep: PositionSweep,
    rows: str = "head",
    *,
    example: int | None = None,
    by: str | None = None,
    recovered: bool = False,
    chosen: Sequence[int] | None = None,
) -> View:
    """What is shown of a sweep.

    Args:
        sweep: the sweep.
        rows: `head` or `layer`.
        example: only this one; the mean over all if None.
        by: `position` or `span`; the first of the sweep's `modes` if None. One example has
            positions in any case.
        recovered: shares of the difference between clean and corrupted runs instead of changes of
            the metric; of a mean, mean change over mean difference.
        chosen: only these rows.

    Raises:
        InputError: no such rows or example, positions or spans that the examples do not share, or
            runs that do not differ, so that there are no shares.
    """
    if rows not in ROWS:
        raise InputError(f"rows must be head or layer; got {rows!r}")
    cells = np.asarray(sweep.by_head if rows == "head" else sweep.by_layer, dtype=np.float64)
    names = sweep.names(rows)
    if chosen is not None:
        cells, names = cells[:, list(chosen)], tuple(names[i] for i in chosen)
    which = _examples(sweep, example)
    if by is None:
        by = "position" if example is not None else next(iter(sweep.modes()), "position")
    cells, columns = _shaped(sweep, cells[which], which, by)
    low = high = np.full(cells.shape[1:], np.nan)
    n = np.isfinite(cells).any(1).sum(0)
    if example is not None:
        values = cells[0]
    else:
        flat = cells.reshape(len(cells), -1)
        count = np.isfinite(flat).sum(0)
        total = np.where(np.isfinite(flat), flat, 0).sum(0)
        values = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(cells.shape[1:])
        low, high = (x.reshape(cells.shape[1:]) for x in bootstrap_interval(flat))
    found = View(
        names, columns, values, low, high, n, sweep.floor, False, f"change of {sweep.metric}"
    )
    return _shares(found, sweep, which) if recovered else found


def _examples(sweep: PositionSweep, example: int | None) -> list[int]:
    if example is None:
        return list(range(len(sweep.examples)))
    if not 0 <= example < len(sweep.examples):
        raise InputError(
            f"this sweep has {len(sweep.examples)} examples, from 0; got example {example}"
        )
    return [example]


def _shares(found: View, sweep: PositionSweep, which: list[int]) -> View:
    from patching.effects import normaliser

    gap = normaliser(sweep.clean[which], sweep.corrupted[which])
    ends = found.low / gap, found.high / gap
    return replace(
        found, values=found.values / gap, low=np.minimum(*ends), high=np.maximum(*ends),
        floor=found.floor / abs(gap), recovered=True, unit="share of the difference",
    )  # fmt: skip


def _shaped(
    sweep: PositionSweep, cells: np.ndarray, which: list[int], by: str
) -> tuple[np.ndarray, tuple[Column, ...]]:
    """Cells [example, row, column], and what the columns are."""
    if by == "span":
        return _by_span(sweep, cells, which)
    if by != "position":
        raise InputError(f"by must be position or span; got {by!r}")
    if len(which) > 1 and not sweep.aligned:
        raise InputError(
            "examples of several lengths or templates share no positions",
            hint="look at one example, or take means by span"
            if any(sweep.spans)
            else "look at one example: these name no spans either",
        )
    length = len(sweep.texts[which[0]][0])
    return cells[:, :, :length], tuple(_column(sweep, which, at) for at in range(length))


def _column(sweep: PositionSweep, which: list[int], at: int) -> Column:
    sides = [{sweep.texts[i][side][at] for i in which} for side in (0, 1)]
    shown = [next(iter(side)) if len(side) == 1 else "" for side in sides]
    if not all(shown):
        held = [{n for n, r in sweep.spans[i].items() if _inside(r, at)} for i in which]
        shared, any_ = set.intersection(*held), set.union(*held)
        name = "/".join(sorted(shared)) or ("|".join(sorted(any_)) if all(held) else VARIES)
        shown = [text if len(side) == 1 else name for text, side in zip(shown, sides, strict=True)]
    differs = any(sweep.texts[i][0][at] != sweep.texts[i][1][at] for i in which)
    return Column(str(at), shown[0], shown[1], differs)


def _inside(ranges: Sequence[Sequence[int]], at: int) -> bool:
    return any(a <= at < b for a, b in ranges)


def _by_span(
    sweep: PositionSweep, cells: np.ndarray, which: list[int]
) -> tuple[np.ndarray, tuple[Column, ...]]:
    places = [_places(sweep.spans[i], len(sweep.texts[i][0])) for i in which]
    first: dict[str, list[int]] = {}
    for at in places:
        for name, positions in at.items():
            first.setdefault(name, []).append(positions[0])
    names = sorted((n for n in first if n != OTHER), key=lambda n: float(np.mean(first[n])))
    if not names:
        raise InputError("these examples name no spans", hint="look at positions of one example")
    names += [OTHER] if OTHER in first else []
    out = np.full((*cells.shape[:2], len(names)), np.nan)
    columns = []
    for c, name in enumerate(names):
        differs = False
        for e, (i, at) in enumerate(zip(which, places, strict=True)):
            if name in at:
                out[e, :, c] = cells[e][:, at[name]].mean(-1)
                clean, corrupted = sweep.texts[i]
                differs |= any(clean[p] != corrupted[p] for p in at[name])
        columns.append(Column(name, name, name, differs))
    return out, tuple(columns)


def _places(spans: Spans, length: int) -> dict[str, list[int]]:
    """Positions of each span, and of all tokens that are in none."""
    out = {
        name: sorted({i for a, b in ranges for i in range(a, min(b, length))})
        for name, ranges in spans.items()
    }
    named = {i for at in out.values() for i in at}
    rest = [i for i in range(length) if i not in named]
    return {n: at for n, at in out.items() if at} | ({OTHER: rest} if rest else {})


def strongest(sweep: PositionSweep, rows: str, most: int) -> list[int]:
    """Rows with the largest mean effects of either sign at any position, in their own order."""
    cells = sweep.by_head if rows == "head" else sweep.by_layer
    if cells.shape[1] <= most:
        return list(range(cells.shape[1]))
    at = np.isfinite(cells)
    total = np.where(at, cells, 0).sum(0) / np.maximum(at.sum(0), 1)
    order = np.argsort(-np.abs(total).max(-1), kind="stable")[:most]
    return sorted(int(i) for i in order)


def cells(
    sweep: PositionSweep,
    rows: str,
    *,
    example: int | None = None,
    by: str | None = None,
    chosen: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """One mapping per cell: row, column, tokens, effect, interval, share, whether it is noise.

    Arguments and errors are those of `view_of`.
    """
    found = view_of(sweep, rows, example=example, by=by, chosen=chosen)
    try:
        shares = view_of(sweep, rows, example=example, by=by, chosen=chosen, recovered=True).values
    except InputError:
        shares = np.full(found.values.shape, np.nan)
    noise = found.noise()
    columns = ("effect", "ci_lo", "ci_hi", "recovered")
    numbers = np.stack([found.values, found.low, found.high, shares], -1)
    for r, c in np.ndindex(*found.values.shape):
        if np.isnan(found.values[r, c]):
            continue
        column = found.columns[c]
        named = {k: None if np.isnan(v) else float(v)
                 for k, v in zip(columns, numbers[r, c], strict=True)}  # fmt: skip
        yield {
            "rows": rows, "row": found.rows[r], "position": column.name, "clean": column.clean,
            "corrupted": column.corrupted, "differs": column.differs, **named,
            "n": int(found.n[c]), "noise": bool(noise[r, c]),
        }  # fmt: skip


COLUMNS = (
    "rows", "row", "position", "clean", "corrupted", "differs", "effect", "ci_lo", "ci_hi",
    "recovered", "n", "noise",
)  # fmt: skip
