"""Windows of attention maps as bytes: square-root codes, pooled by their maximum.

    code 0          no pair of the cell is visible: masked is not the same as tiny
    code 1..255     p = ((code − 1) / 254)²

A cell covers `pool_q` queries and `pool_k` keys and holds the largest of its entries; a mean would
erase needles. Cells are aligned to multiples of their size, so that zooming does not shift them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

CELLS = 512
"""Cells a side that a window has at most."""

LEVELS = 254.0


@dataclass(frozen=True)
class Window:
    """A part of an attention map.

    Attributes:
        codes: [cell of queries, cell of keys].
        q0: first query; a multiple of `pool_q`.
        k0: first key; a multiple of `pool_k`.
        q1: query after the last.
        k1: key after the last.
        pool_q: queries a cell; the last cell may hold fewer.
        pool_k: keys a cell.
    """

    codes: UInt8[np.ndarray, "cq ck"]
    q0: int
    k0: int
    q1: int
    k1: int
    pool_q: int = 1
    pool_k: int = 1

    @property
    def exact(self) -> bool:
        """Whether each cell is one entry of the map."""
        return self.pool_q == self.pool_k == 1


def encode(p: Float[np.ndarray, "..."], seen: np.ndarray | bool = True) -> UInt8[np.ndarray, "..."]:
    """Probabilities as codes; 0 where nothing is seen."""
    codes = np.sqrt(np.clip(np.nan_to_num(p), 0.0, 1.0))
    codes *= LEVELS
    codes += 1.5  # cast truncates: this rounds
    out: np.ndarray = codes.astype(np.uint8)
    if seen is not True:
        out = np.where(seen, out, np.uint8(0))
    return out


def decode(codes: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Codes as probabilities; NaN where nothing is seen.

    >>> decode(encode(np.array([0.0, 0.25, 1.0]))).tolist()
    [0.0, 0.25, 1.0]
    """
    p = ((codes.astype(np.float32) - 1.0) / np.float32(LEVELS)) ** 2
    return np.where(codes == 0, np.float32(np.nan), p)


def aligned(start: int, stop: int, total: int, cells: int = CELLS) -> tuple[int, int, int]:
    """A range widened to whole cells: start, stop and entries a cell.

    >>> aligned(10, 1040, 4096), aligned(3, 9, 100)
    ((9, 1041, 3), (3, 9, 1))
    """
    start, stop = max(0, start), min(total, stop)
    pool = max(1, -(-(stop - start) // cells))
    while True:
        low, high = start // pool * pool, min(total, -(-stop // pool) * pool)
        if -(-(high - low) // pool) <= cells:
            return low, high, pool
        pool += 1


def pooled(x: np.ndarray, pool_q: int, pool_k: int) -> np.ndarray:
    """[..., q, k] to cells by their maximum; what does not fill a cell makes a smaller one."""
    if pool_k > 1:
        x = np.maximum.reduceat(x, np.arange(0, x.shape[-1], pool_k), axis=-1)
    if pool_q > 1:
        x = np.maximum.reduceat(x, np.arange(0, x.shape[-2], pool_q), axis=-2)
    return x
