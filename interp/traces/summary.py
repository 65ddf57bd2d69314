"""What is summed up of each head while its rows pass by: overviews, budgets, distances.

overview   [head, ≤ 256, ≤ 256]   codes of the whole map, pooled by maximum
thumb      [head, ≤ 32, ≤ 32]     codes of the whole map, coarser still
middle     [head, ≤ 1024, ≤ 1024] a finer level, for prompts longer than `LONG`
entropy    [head, query]          −Σ p log p, in nats
received   [head, key]            mean mass that a key gets from the queries that see it
distance   [head, bin]            mean mass by distance |i − j|: 0, 1, 2–3, 4–7, 8–15, …
segments   [head, segment, segment] mean mass from a query of one segment to keys of another
peak, peak_key [head, query]      the largest entry of each row, and where it is
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.prompts import Prompt
from interp.traces.pooling import encode, pooled

OVERVIEW, MIDDLE, LONG, THUMB = 256, 1024, 2048, 32
OTHER = "other"
# Of a token in several spans the first of these names it; then the shortest span does.
_FIRST = ("bos", "needle", "answer", "image", "question", "query", "generated", "system")


def partition(prompt: Prompt | None, n: int) -> tuple[list[str], list[int]]:
    """Segments of a prompt, each position in one: names, and the segment of each position.

    Args:
        prompt: the prompt, or None where none of these positions is known.
        n: number of positions.
    """
    if prompt is None or len(prompt) != n:
        return [OTHER], [0] * n
    sizes = {name: len(prompt.positions(name)) for name in prompt.spans if name != "all"}
    ranked = [name for name in _FIRST if name in sizes]
    ranked += sorted((s for s in sizes if s not in _FIRST), key=lambda s: (sizes[s], s))
    of = [-1] * n
    names: list[str] = []
    for name in ranked[:12]:
        free = [i for i in prompt.positions(name) if of[i] < 0]
        if free:
            for i in free:
                of[i] = len(names)
            names.append(name)
    if -1 in of:
        of = [len(names) if x < 0 else x for x in of]
        names.append(OTHER)
    return names, of


class Summary:
    """Sums over the rows of one layer.

    Args:
        entry: positions and segments of the tower.
        n_heads: query heads of the layer.
    """

    def __init__(self, entry: Mapping[str, Any], n_heads: int) -> None:
        self.n_query, self.n_key = int(entry["n_query"]), int(entry["n_key"])
        self.levels = levels(self.n_query, self.n_key)
        self.cells = {
            name: np.zeros((n_heads, -(-self.n_query // pq), -(-self.n_key // pk)), np.uint8)
            for name, (pq, pk) in self.levels.items()
        }
        self.visible = {name: np.zeros(cells.shape[1:], bool) for name, cells in self.cells.items()}
        self.parts = len(entry["segments"])
        self.query_segments = torch.as_tensor(entry["query_segments"])
        self.key_segments = torch.as_tensor(entry["key_segments"])
        self.seen = np.zeros(self.n_key, np.int64)
        self.entropy = np.zeros((n_heads, self.n_query), np.float16)
        self.peak = np.zeros((n_heads, self.n_query), np.float16)
        self.peak_key = np.zeros((n_heads, self.n_query), np.int32)
        self.received = np.zeros((n_heads, self.n_key))
        # By j − i + n_query − 1.
        self.diagonals = np.zeros((n_heads, self.n_query + self.n_key - 1))
        self.segments = np.zeros((n_heads, self.parts, self.parts))

    @property
    def cell(self) -> tuple[int, int]:
        """Queries and keys of the coarsest cell, of which the finer are parts."""
        return self.levels["overview"]

    def step(self, block: int) -> int:
        """Rows at a time: about `block`, and whole cells."""
        return max(1, block // self.cell[0]) * self.cell[0]

    def see(self, at: int, first: int, seen: Tensor) -> None:
        """Note which pairs of rows from `at` and keys from `first` on any head sees."""
        keys = slice(first, first + seen.shape[1])
        self.seen[keys] += _np(seen.sum(0))
        for name, part, place in self._pooled(at, first, seen.float()):
            self.visible[name][place] |= _np(part) > 0

    def add(self, head: int, at: int, first: int, p: Tensor, entropy: Tensor) -> None:
        """Add some rows of a head.

        Args:
            head: query head.
            at: the first row.
            first: the first key; masses of keys before it and after the last are zero.
            p: [row, key] pattern.
            entropy: [row] in nats.
        """
        n, width = p.shape
        rows, keys = slice(at, at + n), slice(first, first + width)
        self.entropy[head, rows] = _np(entropy)
        top, key = p.max(-1)
        self.peak[head, rows], self.peak_key[head, rows] = _np(top), _np(key) + first
        # Sums over the rows of each segment answer two questions with one pass.
        by_segment = self._onehot(self.query_segments[rows], p).T @ p
        self.received[head, keys] += _np(by_segment.sum(0))
        self.segments[head] += _np(by_segment @ self._onehot(self.key_segments[keys], p))
        start = first - (at + n - 1) + self.n_query - 1
        self.diagonals[head, start : start + n + width - 1] += _np(_diagonals(p))
        for name, part, place in self._pooled(at, first, p):
            cells = self.cells[name][head][place]
            np.maximum(cells, encode(_np(part)), out=cells)

    def _onehot(self, segments: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(segments.to(like.device), self.parts).to(like)

    def _pooled(
        self, at: int, first: int, x: Tensor
    ) -> Iterator[tuple[str, Tensor, tuple[slice, slice]]]:
        """Largest entry of each cell, for each level, and where the cells stand."""
        done_q = done_k = 1
        # The finest first: coarser cells are made of finer ones.
        for name, (pool_q, pool_k) in reversed(self.levels.items()):
            pq, pk = pool_q // done_q, pool_k // done_k
            before = at // done_q % pq, first // done_k % pk
            after = (-(before[0] + x.shape[0]) % pq, -(before[1] + x.shape[1]) % pk)
            # A block may begin within a cell, where rows of several images follow each other.
            x = torch.nn.functional.pad(x, (before[1], after[1], before[0], after[0]))
            x = x.view(-1, pq, x.shape[1]).amax(1)
            x = x.view(len(x), -1, pk).amax(-1)
            q, k = at // pool_q, first // pool_k
            yield name, x, (slice(q, q + len(x)), slice(k, k + x.shape[1]))
            done_q, done_k = pool_q, pool_k

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the layer's file."""
        count = np.bincount(_np(self.query_segments), minlength=self.parts)
        far = np.abs(np.arange(1 - self.n_query, self.n_key))
        bins = np.where(far == 0, 0, 1 + np.log2(np.maximum(far, 1)).astype(np.int64))
        n_bins = 1 + int(np.ceil(np.log2(max(2, self.n_query, self.n_key))))
        distance = np.stack([np.bincount(bins, row, n_bins) for row in self.diagonals])
        return {
            **{
                name: np.where(self.visible[name], np.maximum(cells, 1), 0).astype(np.uint8)
                for name, cells in self.cells.items()
            },
            "thumb": self._thumbs(),
            "entropy": self.entropy, "peak": self.peak, "peak_key": self.peak_key,
            "received": (self.received / np.maximum(1, self.seen)).astype(np.float32),
            "distance": (distance / self.n_query).astype(np.float32),
            "segments": (self.segments / np.maximum(1, count)[None, :, None]).astype(np.float32),
        }  # fmt: skip

    def _thumbs(self) -> np.ndarray:
        """Whole cells of the overview, pooled once more."""
        visible = np.maximum(self.cells["overview"], 1) * self.visible["overview"]
        step = [max(1, -(-n // THUMB)) for n in visible.shape[1:]]
        return pooled(visible.astype(np.uint8), *step)

    def about(self) -> dict[str, Any]:
        """Entries of the levels: queries and keys a cell."""
        return {name: list(pools) for name, pools in self.levels.items()}


def levels(n_query: int, n_key: int) -> dict[str, tuple[int, int]]:
    """Queries and keys a cell of each level; cells of a coarser one are made of finer ones."""

    def pool(n: int, cells: int, part: int) -> int:
        return part * max(1, -(-n // (part * cells)))

    if max(n_query, n_key) <= LONG:
        return {"overview": (pool(n_query, OVERVIEW, 1), pool(n_key, OVERVIEW, 1))}
    q, k = pool(n_query, MIDDLE, 1), pool(n_key, MIDDLE, 1)
    return {"overview": (pool(n_query, OVERVIEW, q), pool(n_key, OVERVIEW, k)), "middle": (q, k)}


def _diagonals(p: Tensor) -> Tensor:
    """[row, key] to the sum of each diagonal, from that of the last row and first key on."""
    n, width = p.shape
    # With n zeros before every row, entry (i, j) lies width + n + 1 after entry (i − 1, j − 1):
    # rows of that stride hold a diagonal in each column.
    padded = torch.nn.functional.pad(p, (n, 0, 0, 1))
    return padded.as_strided((n, width + n - 1), (width + n + 1, 1), 1).sum(0)


def _np(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
