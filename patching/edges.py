"""Edges of the residual stream: who writes, who reads, and how much each edge carries.

Writers are the input of the first block (`input`), every head (`L0H1`) and what else each block
adds (`mlp0`). Readers are the query, key and value of every head (`L1H0.q`; k and v once per
key-value head), what else each block computes (`mlp0`) and what follows the last block (`logits`).
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from interp.errors import InputError, UnknownNameError
from interp.headid import HeadId

if TYPE_CHECKING:
    import pandas as pd

INPUT, LOGITS = "input", "logits"
HOWS = ("out", "in", "max")


@dataclass(frozen=True)
class Node:
    """A writer or a reader.

    Attributes:
        kind: `input`, `head`, `mlp` or `logits`.
        layer: block; -1 for the input, the number of blocks for the logits.
        head: the head, or for ports k and v the key-value head.
        port: `q`, `k` or `v` for readers that belong to a head.
        tower: tower of the head.
    """

    kind: str
    layer: int
    head: int = 0
    port: str = ""
    tower: str = "text"

    def __str__(self) -> str:
        if self.kind == "head":
            return str(HeadId(self.layer, self.head, self.tower)) + (
                f".{self.port}" if self.port else ""
            )
        return f"mlp{self.layer}" if self.kind == "mlp" else self.kind


@dataclass(frozen=True)
class EdgeAccuracy:
    """How well edge scores find the edges of a known circuit.

    Attributes:
        recall: share of the true edges among the strongest edges, `k` of them.
        k: how many were taken.
        auroc: chance that a true edge outranks another, ties counting half; NaN with one class.
        average_precision: mean precision at the rank of each true edge, ties at their worst rank.
    """

    recall: float
    k: int
    auroc: float
    average_precision: float


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Scores of all edges of a model.

    Attributes:
        method: name of the method.
        writers: rows.
        readers: columns.
        values: [writer, reader] mean effect over examples, in units of the metric; NaN where the
            reader does not come after the writer. Effect = m(edge patched) − m(base).
        examples: ids.
        params: parameters of the method.
    """

    method: str
    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    values: Float[np.ndarray, "writer reader"]
    examples: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.writers), len(self.readers))
        if self.values.shape != shape:
            raise InputError(
                f"values must have a row per writer and a column per reader, {list(shape)}; got "
                f"{list(self.values.shape)}"
            )
        values = np.array(self.values, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {str(node): i for i, node in enumerate(self.writers)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {str(node): i for i, node in enumerate(self.readers)}

    def __len__(self) -> int:
        """Number of edges."""
        return int((~np.isnan(self.values)).sum())

    def value(self, writer: str, reader: str) -> float:
        """The score of one edge, such as `value("L0H0", "L1H0.v")`.

        Raises:
            UnknownNameError: there is no such writer or reader.
            InputError: the reader does not come after the writer.
        """
        i, j = self._place(writer, reader)
        return float(self.values[i, j])

    def _place(self, writer: str, reader: str) -> tuple[int, int]:
        if writer not in self._rows:
            raise UnknownNameError("writer", writer, self._rows)
        if reader not in self._columns:
            raise UnknownNameError("reader", reader, self._columns)
        i, j = self._rows[writer], self._columns[reader]
        if np.isnan(self.values[i, j]):
            raise InputError(f"an edge must lead forward; {reader} does not come after {writer}")
        return i, j

    def top(self, n: int = 10) -> list[tuple[Node, Node, float]]:
        """The strongest edges, either sign: writer, reader, score."""
        size = np.where(np.isnan(self.values), -1.0, np.abs(self.values))
        order = np.argsort(-size, axis=None, kind="stable")[: min(n, len(self))]
        rows, columns = np.unravel_index(order, self.values.shape)
        return [
            (self.writers[int(i)], self.readers[int(j)], float(self.values[i, j]))
            for i, j in zip(rows, columns, strict=True)
        ]

    def to_heads(self, how: str = "out") -> dict[HeadId, float]:
        """One number per query head.

        Args:
            how: `out`: sum over the edges the head writes to, which for first-order methods is the
                head's own attribution; `in`: sum over the edges its q, k and v read, a key-value
                head's shared evenly by its group; `max`: the strongest edge of either side.

        Raises:
            InputError: none of these.
        """
        return dict(zip(self.heads, per_head(self, self.values, how).tolist(), strict=True))

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """The heads that write."""
        return tuple(HeadId(w.layer, w.head, w.tower) for w in self.writers if w.kind == "head")

    def score_against(
        self, truth: Collection[tuple[str, str]], *, k: int | None = None
    ) -> EdgeAccuracy:
        """Compare the ranking by absolute score with the edges of a known circuit.

        Args:
            truth: true edges, as texts of writer and reader.
            k: how many of the strongest edges to take; by default as many as are true.

        Raises:
            InputError: no true edge, or one that leads backwards.
            UnknownNameError: a true edge names a node that is not there.
        """
        if not truth:
            raise InputError("a truth needs at least one edge; got none")
        true = np.zeros(self.values.shape, dtype=bool)
        for writer, reader in truth:
            true[self._place(writer, reader)] = True
        there = ~np.isnan(self.values)
        size, hit = np.abs(self.values[there]), true[there]
        k = int(hit.sum()) if k is None else min(k, len(hit))
        chosen = np.argsort(-size, kind="stable")[:k]
        n_true, n_rest = int(hit.sum()), int((~hit).sum())
        ranks = rankdata(size)
        auroc = (ranks[hit].sum() - n_true * (n_true + 1) / 2) / (n_true * n_rest or np.nan)
        # Ties stand at their worst: an edge that cannot be told from others is not found.
        above = np.array([(size >= s).sum() for s in size[hit]])
        found = np.array([(size[hit] >= s).sum() for s in size[hit]])
        return EdgeAccuracy(
            float(hit[chosen].sum() / n_true), k, float(auroc), float((found / above).mean())
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row per edge, strongest first."""
        import pandas as pd

        rows = [
            {"method": self.method, "writer": str(w), "reader": str(r), "effect": x}
            for w, r, x in self.top(len(self))
        ]
        return pd.DataFrame(rows)


def per_head(
    edges: EdgeScores, values: Float[np.ndarray, "*rest writer reader"], how: str
) -> Float[np.ndarray, "*rest head"]:
    """One number per query head from scores of edges; see `EdgeScores.to_heads`."""
    if how not in HOWS:
        raise InputError(f"how must be one of {', '.join(HOWS)}; got {how!r}")
    rows = [i for i, w in enumerate(edges.writers) if w.kind == "head"]
    reads = _reads(edges)
    if how == "out":
        return np.asarray(np.nansum(values[..., rows, :], axis=-1))
    if how == "in":
        return np.asarray(np.nansum(values, axis=-2) @ reads)
    filled = np.nan_to_num(values)
    sides = [
        np.concatenate([filled[..., i, :], filled[..., :, reads[:, c] > 0].reshape(
            *filled.shape[:-2], -1)], axis=-1)
        for c, i in enumerate(rows)
    ]  # fmt: skip
    strongest = [
        np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], axis=-1)[..., 0] for x in sides
    ]
    return np.stack(strongest, axis=-1)


def _reads(edges: EdgeScores) -> Float[np.ndarray, "reader head"]:
    """The share each query head has in each reader."""
    count = Counter((r.layer, r.port) for r in edges.readers if r.kind == "head")
    reads = np.zeros((len(edges.readers), len(edges.heads)))
    for j, r in enumerate(edges.readers):
        if r.kind != "head":
            continue
        group = count[r.layer, "q"] // count[r.layer, r.port]
        for column, head in enumerate(edges.heads):
            if head.layer == r.layer and head.head // group == r.head:
                reads[j, column] = 1 / group
    return reads
