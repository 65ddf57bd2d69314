"""Agreement of head scores with each other and with a known truth.

Ranks, not raw values, wherever two detectors or models may have different scales. Undefined heads
are left out of rank correlations; against a truth they stand below every scored head, because a
head without a score cannot be found.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from interp.errors import HeadIdError, InputError
from interp.headid import HeadId
from interp.stats import Overlap, overlap, spearman


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two tables of the same heads beside each other.

    Attributes:
        base, other: names of the two tables.
        heads: the heads, in the order of the base.
        spearman: rank correlation of the scores over heads defined in both; NaN if undefined.
        k: size of the top sets; smaller where fewer heads are defined.
        overlap: agreement of the top-k sets, with its chance level and p-value.
        differences: score in `other` minus score in `base`, per head; NaN if undefined in either.
        shared: heads in both top sets, best first by the base.
    """

    base: str
    other: str
    heads: tuple[HeadId, ...]
    spearman: float
    k: int
    overlap: Overlap
    differences: Float[np.ndarray, " head"]
    shared: tuple[HeadId, ...]

    def __repr__(self) -> str:
        o = self.overlap
        return (
            f"{self.base} and {self.other}: {len(self.heads)} heads\n"
            f"  Spearman {self.spearman:.3f}\n"
            f"  top {self.k}: {o.shared} shared, {o.expected:.2f} by chance, p {o.p:.2g}, "
            f"corrected {o.corrected:.3f}"
        )


def compare_scores(
    heads: Sequence[HeadId],
    base: Float[np.ndarray, " head"],
    other: Float[np.ndarray, " head"],
    *,
    k: int | None = None,
    names: tuple[str, str] = ("base", "other"),
    sign: float = 1.0,
) -> Comparison:
    """Compare two scores of the same heads.

    Args:
        heads: the heads both arrays are about.
        base: scores; NaN is undefined.
        other: scores of the same heads in the same order.
        k: size of the top sets; by default a tenth of the heads, at least one.
        names: names of the two tables.
        sign: 1 where a higher score is stronger, -1 where a lower one is.

    Raises:
        InputError: `k` is not between 1 and the number of heads.
    """
    if k is None:
        k = max(1, len(heads) // 10)
    if not 1 <= k <= len(heads):
        raise InputError(f"k must lie between 1 and the {len(heads)} heads; got {k}")
    tops = [[heads[i] for i in ranking(side, sign=sign)[:k]] for side in (base, other)]
    both = set(tops[1])
    return Comparison(
        base=names[0],
        other=names[1],
        heads=tuple(heads),
        spearman=spearman(base, other),
        k=k,
        overlap=overlap(*tops, total=len(heads)),
        differences=other - base,
        shared=tuple(head for head in tops[0] if head in both),
    )


def ranking(values: Float[np.ndarray, " head"], *, sign: float = 1.0) -> list[int]:
    """Indices of the defined heads, strongest first; ties keep the order of the heads."""
    order = np.argsort(-sign * values, kind="stable")
    return [int(i) for i in order if not np.isnan(values[i])]


@dataclass(frozen=True)
class Accuracy:
    """How well a table of scores finds the heads of a known truth.

    Attributes:
        precision: share of the claimed heads that are true; NaN if none is claimed.
        recall: share of the true heads that are claimed; NaN if there is none.
        f1: harmonic mean of the two; NaN if nothing is claimed and nothing true.
        auroc: chance that a true head outranks another, ties counting half; NaN with one class.
        average_precision: mean precision at the rank of each true head, tied heads together;
            NaN if there is no true head.
        false_positives: claimed and not true, strongest first.
        false_negatives: true and not claimed, strongest first.
    """

    precision: float
    recall: float
    f1: float
    auroc: float
    average_precision: float
    false_positives: tuple[HeadId, ...]
    false_negatives: tuple[HeadId, ...]


def accuracy(
    heads: Sequence[HeadId],
    values: Float[np.ndarray, " head"],
    claimed: Bool[np.ndarray, " head"],
    truth: Collection[HeadId],
    *,
    sign: float = 1.0,
) -> Accuracy:
    """Score a ranking and a set of claims against the true heads.

    Raises:
        HeadIdError: a true head is not among `heads`.
    """
    unknown = sorted(set(truth) - set(heads))
    if unknown:
        raise HeadIdError(
            f"the truth must name heads of the table; it has no {', '.join(map(str, unknown))}"
        )
    wanted = set(truth)
    true = np.array([head in wanted for head in heads], dtype=bool)
    strength = np.where(np.isnan(values), -np.inf, sign * values)
    order = np.argsort(-strength, kind="stable")
    hits, claims, positives = int((true & claimed).sum()), int(claimed.sum()), int(true.sum())
    return Accuracy(
        precision=_ratio(hits, claims),
        recall=_ratio(hits, positives),
        f1=_ratio(2 * hits, claims + positives),
        auroc=_auroc(strength, true),
        average_precision=_average_precision(strength, true),
        false_positives=tuple(heads[i] for i in order if claimed[i] and not true[i]),
        false_negatives=tuple(heads[i] for i in order if true[i] and not claimed[i]),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _auroc(strength: Float[np.ndarray, " head"], true: Bool[np.ndarray, " head"]) -> float:
    """Mann-Whitney: each pair of a true and another head, ties counting half."""
    others = np.sort(strength[~true])
    if not true.any() or not len(others):
        return math.nan
    below = np.searchsorted(others, strength[true], side="left")
    not_above = np.searchsorted(others, strength[true], side="right")
    return float((below + not_above).mean() / 2 / len(others))


def _average_precision(
    strength: Float[np.ndarray, " head"], true: Bool[np.ndarray, " head"]
) -> float:
    """Precision at each level of strength, weighted by the true heads that join there."""
    if not true.any():
        return math.nan
    _, level = np.unique(-strength, return_inverse=True)
    joined = np.bincount(level, weights=true)
    precision = np.cumsum(joined) / np.cumsum(np.bincount(level))
    return float((precision * joined).sum() / true.sum())
