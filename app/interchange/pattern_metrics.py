"""The six metrics of a HeadVis tree, from whole maps; sums over sequences, then means.

    self_attention_score   mean of A[i, i]
    prev_token_score       mean of A[i, i−1], over i ≥ 1
    pattern_entropy        mean of −Σ_j A[i, j] ln A[i, j]
    qk_distance            mean over queries of Σ_j A[i, j] |i − j|
    qk_distance_variance   the same of |i − j|², less the square of qk_distance
    induction_score        what a query gives to tokens that followed an earlier copy of it, entries
                           below 0.01 left out; mean over queries that have an earlier copy

Means run over all queries of all sequences, so a long prompt weighs more than a short one. Source:
Luger, Kamath et al. 2026, as implemented in the pipeline of Neuronpedia.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

INDUCTION_LEAST = 0.01
METRICS = {
    "self_attention_score": "Mean attention of each query to itself.",
    "prev_token_score": "Mean attention of each query to the token before it.",
    "pattern_entropy": "Mean entropy of the rows of the map, in nats.",
    "qk_distance": "Mean distance from query to key, weighted by attention.",
    "qk_distance_variance": "Variance of that distance.",
    "induction_score": "Mean attention to what followed an earlier copy of the query's token.",
}


@dataclass
class Sums:
    """Sums over the sequences of one head."""

    queries: int = 0
    later: int = 0
    repeated: int = 0
    itself: float = 0.0
    before: float = 0.0
    entropy: float = 0.0
    distance: float = 0.0
    square: float = 0.0
    induction: float = 0.0

    def add(self, p: Float[np.ndarray, "query key"], ids: Sequence[int]) -> None:
        """Add a sequence: its square map, NaN where unseen, and what makes tokens equal."""
        p = np.nan_to_num(p.astype(np.float64), nan=0.0)
        n = len(p)
        apart = np.abs(np.arange(n)[:, None] - np.arange(n))
        self.queries += n
        self.later += n - 1
        self.itself += float(np.trace(p))
        self.before += float(np.trace(p, offset=-1))
        logs = np.log(p, where=p > 0, out=np.zeros_like(p))
        self.entropy -= float((p * logs).sum())
        self.distance += float((p * apart).sum())
        self.square += float((p * apart**2).sum())
        queries, keys, repeated = copies(ids)
        found = p[queries, keys]
        self.induction += float(found[found >= INDUCTION_LEAST].sum())
        self.repeated += repeated

    def means(self) -> dict[str, float]:
        """The metrics; NaN where nothing was counted."""
        distance = _over(self.distance, self.queries)
        return {
            "self_attention_score": _over(self.itself, self.queries),
            "prev_token_score": _over(self.before, self.later),
            "pattern_entropy": _over(self.entropy, self.queries),
            "qk_distance": distance,
            "qk_distance_variance": _over(self.square, self.queries) - distance**2,
            "induction_score": _over(self.induction, self.repeated),
        }


def copies(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Queries and the keys after earlier copies of them, pair by pair; and queries with a copy.

    >>> queries, keys, n = copies([5, 6, 5])
    >>> queries.tolist(), keys.tolist(), n
    ([2], [1], 1)
    """
    token = np.asarray(ids)
    same = np.tril(token[:, None] == token[None, :], k=-1)
    queries, earlier = np.nonzero(same)
    return queries, earlier + 1, int(same.any(axis=1).sum())


def _over(total: float, count: int) -> float:
    return total / count if count else float("nan")
