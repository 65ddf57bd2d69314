"""Two prompts beside each other: which tokens belong together, and one head's map minus another's.

The map of A is compared with the map of B where both a query and a key of A have a counterpart in
B. Prompts of one length are compared position by position; of others, what both have is found, as
`diff` does it, and what only one of them has is left out and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from interp.errors import InputError
from interp.traces.pooling import CELLS, aligned
from interp.traces.trace import HeadTrace, TowerTrace

WHOLE = 4096
"""Most pairs a side that a difference is worked out for at once."""
_MATCHED = 1 << 24
"""Most products of lengths that are searched for what both sides have."""
_ENTRIES = 1 << 20
_GAP = 64


@dataclass(frozen=True)
class Alignment:
    """Which positions of two sequences belong together.

    Attributes:
        pairs: [pair, 2] position in A and in B, both rising.
        differs: [pair] whether the tokens of a pair are different.
        only_a: positions of A without a counterpart.
        only_b: positions of B without a counterpart.
        searched: whether all of both was searched; if not, too much differed.
    """

    pairs: Int[np.ndarray, "pair 2"]
    differs: np.ndarray
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    searched: bool = True

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class Difference:
    """A window of A − B over pairs of positions.

    Attributes:
        values: [cell of queries, cell of keys] in -1..1: of the entries of a cell the one of the
            largest absolute value, with its sign; NaN where neither map sees a key.
        r0: first pair of the queries.
        c0: first pair of the keys.
        r1: pair after the last of the queries.
        c1: pair after the last of the keys.
        pool_r: pairs a cell of queries; the last cell may hold fewer.
        pool_c: pairs a cell of keys.
    """

    values: Float[np.ndarray, "cr cc"]
    r0: int
    c0: int
    r1: int
    c1: int
    pool_r: int = 1
    pool_c: int = 1

    @property
    def exact(self) -> bool:
        """Whether each cell is one entry."""
        return self.pool_r == self.pool_c == 1


def align(a: Sequence[object], b: Sequence[object]) -> Alignment:
    """Pair the tokens of two prompts.

    Of prompts of one length every position is paired with its own. Else what begins and what ends
    both alike is paired, and between them what `difflib` finds in both; a stretch that is replaced
    by one as long is paired too, as tokens that differ.

    >>> found = align("the cat sat".split(), "the old dog sat".split())
    >>> found.pairs.tolist(), found.only_a, found.only_b
    ([[0, 0], [2, 3]], (1,), (1, 2))
    """
    if len(a) == len(b):
        at = np.arange(len(a))
        return _made(a, b, np.stack([at, at], 1), searched=True)
    same = min(len(a), len(b))
    head = next((i for i in range(same) if a[i] != b[i]), same)
    tail = next((i for i in range(same - head) if a[-1 - i] != b[-1 - i]), same - head)
    middle_a, middle_b = a[head : len(a) - tail], b[head : len(b) - tail]
    pairs = [(i, i) for i in range(head)]
    searched = len(middle_a) * len(middle_b) <= _MATCHED
    if searched:
        matcher = SequenceMatcher(None, middle_a, middle_b, autojunk=False)
        for kind, a0, a1, b0, b1 in matcher.get_opcodes():
            if kind == "equal" or a1 - a0 == b1 - b0:
                pairs += zip(range(head + a0, head + a1), range(head + b0, head + b1), strict=True)
    pairs += zip(range(len(a) - tail, len(a)), range(len(b) - tail, len(b)), strict=True)
    return _made(a, b, np.array(pairs, dtype=np.int64).reshape(-1, 2), searched=searched)


def _made(
    a: Sequence[object], b: Sequence[object], pairs: np.ndarray, *, searched: bool
) -> Alignment:
    differs = np.array([a[i] != b[j] for i, j in pairs.tolist()], dtype=bool)
    mine, theirs = set(pairs[:, 0].tolist()), set(pairs[:, 1].tolist())
    return Alignment(
        pairs, differs, tuple(i for i in range(len(a)) if i not in mine),
        tuple(j for j in range(len(b)) if j not in theirs), searched,
    )  # fmt: skip


def align_towers(a: TowerTrace, b: TowerTrace) -> Alignment:
    """Pair the positions of a tower in two traces, by token where its positions are tokens.

    Raises:
        InputError: queries are not keys, or the positions are not tokens and differ in number.
    """
    for tower in (a, b):
        if tower.n_query != tower.n_key:
            raise InputError(
                f"a difference needs a map whose queries are its keys; {tower.name} of "
                f"{tower.trace.id} has {tower.n_query} and {tower.n_key}"
            )
    names = [_tokens(tower) for tower in (a, b)]
    words = all(tower.trace.tokens == tower.labels("key") for tower in (a, b))
    if a.n_key != b.n_key and not words:
        raise InputError(
            f"positions of {a.name} are no tokens, so both prompts must have as many; they have "
            f"{a.n_key} and {b.n_key}"
        )
    return align(*names)


def _tokens(tower: TowerTrace) -> Sequence[object]:
    """Ids where there are any: two tokens may be written alike."""
    ids = tower.trace.info.get("ids")
    own = tower.about.get("key_labels") is None
    return ids if own and isinstance(ids, list) and len(ids) == tower.n_key else tower.labels("key")


def window_of(
    rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The window that can be worked out at once: the last pairs of one that is larger."""
    return (max(rows[0], rows[1] - WHOLE), rows[1]), (max(columns[0], columns[1] - WHOLE),
                                                      columns[1])  # fmt: skip


def difference(
    a: HeadTrace,
    b: HeadTrace,
    found: Alignment,
    rows: tuple[int, int],
    columns: tuple[int, int],
    *,
    cells: int = CELLS,
) -> Difference:
    """A − B over a window of pairs, as at most `cells` cells a side.

    A key that one of two paired queries does not see counts as 0 there; where neither sees it there
    is no entry. A cell of several entries holds the one of the largest absolute value: a mean would
    let a gain and a loss cancel each other.

    Args:
        a: the head in one trace.
        b: the head in the other; it may be another model's.
        found: which positions belong together.
        rows: first pair of the queries and the one after the last.
        columns: the same of the keys.
        cells: most cells a side.

    Raises:
        InputError: the window is empty, outside the pairs, or has more than `WHOLE` pairs a side.
    """
    for name, (start, stop) in (("queries", rows), ("keys", columns)):
        if not 0 <= start < stop <= len(found):
            raise InputError(
                f"{name} of a difference must lie within the {len(found)} pairs; got {start}:{stop}"
            )
        if stop - start > WHOLE:
            raise InputError(
                f"a difference is worked out for at most {WHOLE} pairs a side; got {stop - start}"
            )
    r0, r1, pool_r = aligned(*rows, len(found), cells)
    c0, c1, pool_c = aligned(*columns, len(found), cells)
    step = max(1, _ENTRIES // (c1 - c0) // pool_r) * pool_r
    parts = []
    for at in range(r0, r1, step):
        part = found.pairs[at : min(at + step, r1)]
        one, other = (
            _entries(head, part[:, side], found.pairs[c0:c1, side])
            for side, head in enumerate((a, b))
        )
        parts.append(pooled_signed(_minus(one, other), pool_r, pool_c))
    return Difference(np.concatenate(parts), r0, c0, r1, c1, pool_r, pool_c)


def row_difference(
    a: HeadTrace, b: HeadTrace, found: Alignment, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[pair] the row of a pair of queries in A, in B, and A − B; NaN as in `difference`.

    Raises:
        InputError: there is no such pair.
    """
    if not 0 <= row < len(found):
        raise InputError(f"a row must be one of the {len(found)} pairs; got {row}")
    i, j = found.pairs[row].tolist()
    one, other = a.rows([i])[0][found.pairs[:, 0]], b.rows([j])[0][found.pairs[:, 1]]
    return one, other, _minus(one, other)


def _entries(head: HeadTrace, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[query, key] entries at rising positions, by the blocks that span them."""
    out = np.empty((len(queries), len(keys)), np.float32)
    for q in _stretches(queries):
        rows = queries[q] - queries[q.start]
        for k in _stretches(keys):
            columns = keys[k] - keys[k.start]
            block = head.block(
                (int(queries[q.start]), int(queries[q.stop - 1]) + 1),
                (int(keys[k.start]), int(keys[k.stop - 1]) + 1),
            )
            out[q, k] = block[np.ix_(rows, columns)]
    return out


def _stretches(places: np.ndarray) -> list[slice]:
    """Rising positions in stretches without wide gaps: what lies in a gap is not worked out."""
    edges = [0, *(1 + np.flatnonzero(np.diff(places) > _GAP)).tolist(), len(places)]
    return [slice(x, y) for x, y in pairwise(edges)]


def _minus(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    unseen = np.isnan(one) & np.isnan(other)
    out: np.ndarray = np.nan_to_num(one) - np.nan_to_num(other)
    out[unseen] = np.nan
    return out


def pooled_signed(x: np.ndarray, pool_r: int, pool_c: int) -> np.ndarray:
    """[row, column] to cells by the entry of the largest absolute value; NaN only if all are.

    >>> pooled_signed(np.array([[1.0, -3.0], [2.0, np.nan]]), 2, 2).tolist()
    [[-3.0]]
    """
    if pool_r == pool_c == 1:
        return x
    rows, columns = np.arange(0, x.shape[0], pool_r), np.arange(0, x.shape[1], pool_c)

    def pooled(which: np.ufunc, empty: float) -> np.ndarray:
        filled = np.where(np.isnan(x), np.float32(empty), x)
        out: np.ndarray = which.reduceat(which.reduceat(filled, columns, axis=1), rows, axis=0)
        return out

    high, low = pooled(np.maximum, -np.inf), pooled(np.minimum, np.inf)
    found: np.ndarray = np.where(high >= -low, high, low)
    return np.where(np.isinf(high), np.float32(np.nan), found)
