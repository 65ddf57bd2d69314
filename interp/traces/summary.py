"""What is summed up of each head while its rows pass by: overviews, budgets, distances.

overview   [head, ≤ 256, ≤ 256]   codes of the whole map, pooled by maximum
middle     [head, ≤ 1024, ≤ 1024] a finer level, for prompts longer than `LONG`
entropy    [head, query]          −Σ p log p, in nats
received   [head, key]            mean mass that a key gets from the queries that see it
distance   [head, bin]            mean mass by distance |i − j|: 0, 1, 2–3, 4–7, 8–15, …
segments   [head, segment, segment] mean mass from a query of one segment to keys of another
peak, peak_key [head, query]      the largest entry of each row, and where it is
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.prompts import Prompt
from interp.traces.pooling import encode

OVERVIEW, MIDDLE, LONG = 256, 1024, 2048
OTHER = "other"
# Of a token in several spans the first of these names it; then the shortest span does.
_FIRST = ("bos", "needle", "answer", "image", "question", "query", "generated", "system")


def partition(
    prompt: Prompt | None, n_query: int, n_key: int
) -> tuple[list[str], tuple[list[int], list[int]]]:
    """Segments of a prompt, each token in one: names, and the segment of each query and key."""
    n = 0 if prompt is None else len(prompt)
    if prompt is None or n_key != n or n_query > n:
        return [OTHER], ([0] * n_query, [0] * n_key)
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
    return names, (of[n - n_query :], of)


class Summary:
    """Sums over the rows of one layer.

    Args:
        entry: positions and segments of the tower.
        n_heads: query heads of the layer.
    """

    def __init__(self, entry: Mapping[str, Any], n_heads: int) -> None:
        self.n_query, self.n_key = int(entry["n_query"]), int(entry["n_key"])
        self.levels = {"overview": self._pool(OVERVIEW)}
        if max(self.n_query, self.n_key) > LONG:
            self.levels["middle"] = self._pool(MIDDLE)
        self.cells = {
            name: np.zeros((n_heads, -(-self.n_query // pq), -(-self.n_key // pk)), np.uint8)
            for name, (pq, pk) in self.levels.items()
        }
        self.query_segments = np.asarray(entry["query_segments"], np.int64)
        parts = len(entry["segments"])
        self.onehot = torch.zeros(self.n_key, parts)
        self.onehot[torch.arange(self.n_key), torch.as_tensor(entry["key_segments"])] = 1.0
        self.bins = 1 + int(np.ceil(np.log2(max(2, max(self.n_query, self.n_key)))))
        self.entropy = np.zeros((n_heads, self.n_query), np.float16)
        self.received = np.zeros((n_heads, self.n_key))
        self.distance = np.zeros((n_heads, self.bins))
        self.segments = np.zeros((n_heads, parts, parts))
        self.peak = np.zeros((n_heads, self.n_query), np.float16)
        self.peak_key = np.zeros((n_heads, self.n_query), np.int32)
        self.seen = np.zeros((n_heads, self.n_key), np.int64)
        self.at: tuple[int, int, int] | None = None

    def _pool(self, cells: int) -> tuple[int, int]:
        return max(1, -(-self.n_query // cells)), max(1, -(-self.n_key // cells))

    def step(self, block: int) -> int:
        """Rows at a time: about `block`, and whole cells of every level."""
        cell = int(np.lcm.reduce([pq for pq, _ in self.levels.values()]))
        return max(1, block // cell) * cell

    def add(self, head: int, at: int, p: Tensor, low: Tensor, high: Tensor) -> None:
        """Add rows [row, key] of a head from row `at` on; `low`, `high`: the keys each sees."""
        n = len(p)
        rows = slice(at, at + n)
        self.entropy[head, rows] = _np(torch.special.entr(p).sum(-1))
        top, key = p.max(-1)
        self.peak[head, rows], self.peak_key[head, rows] = _np(top), _np(key)
        self.received[head] += _np(p.sum(0, dtype=torch.float64))
        keys = torch.arange(self.n_key, device=p.device)
        seen = (keys >= low[:, None]) & (keys < high[:, None])
        self.seen[head] += _np(seen.sum(0))
        by_segment = _np(p @ self.onehot.to(p))
        np.add.at(self.segments[head], self.query_segments[rows], by_segment)
        self.distance[head] += _np(self._distances(p, at))
        top_of_cell = torch.where(seen, p, torch.full_like(p, -1.0))
        for name, (pq, pk) in self.levels.items():
            self._pooled(name, head, at, top_of_cell, pq, pk)

    def _distances(self, p: Tensor, at: int) -> Tensor:
        """Σ over rows of the mass in each bin of |i − j|, in double precision."""
        n, n_key = p.shape
        total = torch.zeros(n, n_key + 1, dtype=torch.float64, device=p.device)
        torch.cumsum(p, 1, dtype=torch.float64, out=total[:, 1:])
        rows = torch.arange(at, at + n, device=p.device)
        edges = torch.tensor([0, *(2**b for b in range(self.bins - 1)), 1 << 40], device=p.device)
        edges[-1] = n_key + self.n_query
        after = total.gather(1, (rows[:, None] + edges[None]).clamp(0, n_key))
        before = total.gather(1, (rows[:, None] + 1 - edges[None]).clamp(0, n_key))
        forward = after[:, 1:] - after[:, :-1]
        backward = before[:, :-1] - before[:, 1:]
        # Distance 0 is one entry, not one on each side.
        backward[:, 0] = 0.0
        return (forward + backward).sum(0)

    def _pooled(self, name: str, head: int, at: int, p: Tensor, pq: int, pk: int) -> None:
        n, n_key = p.shape
        up = torch.nn.functional.pad(p, (0, -n_key % pk, 0, -n % pq), value=-1.0)
        cells = up.view(up.shape[0] // pq, pq, -1, pk).amax((1, 3))
        codes = encode(_np(cells), _np(cells) >= 0)
        place = self.cells[name][head, at // pq : at // pq + len(codes)]
        # A block may begin within a cell, where rows of several images follow each other.
        np.maximum(place, codes, out=place)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the layer's file."""
        count = np.bincount(self.query_segments, minlength=self.onehot.shape[1])
        return {
            **self.cells,
            "entropy": self.entropy, "peak": self.peak, "peak_key": self.peak_key,
            "received": (self.received / np.maximum(1, self.seen)).astype(np.float32),
            "distance": (self.distance / self.n_query).astype(np.float32),
            "segments": (self.segments / np.maximum(1, count)[None, :, None]).astype(np.float32),
        }  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Entries of the levels: queries and keys a cell."""
        return {name: list(pools) for name, pools in self.levels.items()}


def _np(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
