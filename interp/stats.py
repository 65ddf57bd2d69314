"""Statistics over examples, for all heads at once.

Every function takes arrays `[example, head]` in which NaN means "this example is undefined for
this head", and never lets an undefined example stand for a zero.

- interval: percentile bootstrap over examples (Efron 1979);
- test: one-sided paired Student t of score against null, floored at `2**-n`, the smallest p-value
  that flipping the signs of n differences can give, so that a spread which happens to be tiny
  cannot claim more than n examples are worth;
- many heads: Benjamini and Hochberg (1995), step-up q-values;
- streaming: Welford's update and the merge of Chan, Golub and LeVeque (1979);
- agreement of two tables: overlap of top-k sets against the hypergeometric chance, and Spearman.

numpy alone is imported here; scipy is reached inside the functions that need it.
"""

import math
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from interp.errors import InputError

EXACT_SIGN_FLIPS = 14
_BLOCK = 4_000_000


def _by_count(
    values: Float[np.ndarray, "example head"],
) -> Iterator[tuple[int, Int[np.ndarray, " some"], Float[np.ndarray, "defined some"]]]:
    """Groups of heads with equally many defined examples: count, columns, values without NaN."""
    missing = np.isnan(values)
    counts = len(values) - missing.sum(axis=0)
    for count in np.unique(counts):
        columns = np.flatnonzero(counts == count)
        order = np.argsort(missing[:, columns], axis=0, kind="stable")[:count]
        yield int(count), columns, np.take_along_axis(values[:, columns], order, axis=0)


def _mean(defined: Float[np.ndarray, "defined some"]) -> Float[np.ndarray, " some"]:
    """Mean of each column, whatever columns stand beside it; of equal numbers, that number."""
    # numpy adds in another order where numbers lie apart in memory: one layout for all.
    mean: Float[np.ndarray, " some"] = np.ascontiguousarray(defined.T).mean(axis=1)
    return np.where((defined == defined[0]).all(axis=0), defined[0], mean)


def mean_and_count(
    values: Float[np.ndarray, "example head"],
) -> tuple[Float[np.ndarray, " head"], Int[np.ndarray, " head"]]:
    """Mean over the defined examples (NaN where there is none), and how many there are."""
    mean = np.full(values.shape[1], np.nan)
    n = np.zeros(values.shape[1], dtype=np.int64)
    for count, columns, defined in _by_count(np.asarray(values, dtype=np.float64)):
        n[columns] = count
        if count:
            mean[columns] = _mean(defined)
    return mean, n


def bootstrap_interval(
    values: Float[np.ndarray, "example head"],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " head"], Float[np.ndarray, " head"]]:
    """Percentile bootstrap interval of each head's mean, resampling examples.

    A head's defined examples are resampled, so n is held fixed. Heads with equally many defined
    examples share their resamples, and a head's interval does not depend on the other heads.

    Args:
        values: score per example and head; NaN is undefined.
        level: coverage aimed at, in (0, 1).
        resamples: number of bootstrap samples.
        seed: seed of the resampling.

    Returns:
        Lower and upper end per head; NaN for heads with fewer than two defined examples, of whose
        spread nothing is known.

    Raises:
        InputError: `level` is not within (0, 1), or `resamples` is not positive.
    """
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie between 0 and 1; got {level}")
    if resamples < 1:
        raise InputError(f"a bootstrap needs at least one resample; got {resamples}")
    ends = np.full((2, values.shape[1]), np.nan)
    tails = [(1 - level) / 2, (1 + level) / 2]
    for count, columns, defined in _by_count(np.asarray(values, dtype=np.float64)):
        if count < 2:
            continue
        weights = _resample_weights(count, resamples, seed)
        # Centred, so that a head with equal scores gets exactly its score as both ends.
        centre = _mean(defined)
        width = max(1, _BLOCK // resamples)
        for start in range(0, len(columns), width):
            part = slice(start, start + width)
            means = weights @ (defined[:, part] - centre[part])
            found = centre[part] + np.quantile(means, tails, axis=0)
            # A mean lies within the data; rounding must not carry an end outside.
            lowest, highest = defined[:, part].min(axis=0), defined[:, part].max(axis=0)
            ends[:, columns[part]] = np.clip(found, lowest, highest)
    return ends[0], ends[1]


def _resample_weights(count: int, resamples: int, seed: int) -> Float[np.ndarray, "resample count"]:
    """Share of each example in each bootstrap sample; rows sum to one."""
    rng = np.random.default_rng([seed, count])
    weights = np.empty((resamples, count))
    rows = max(1, _BLOCK // count)
    for start in range(0, resamples, rows):
        block = weights[start : start + rows]
        block[:] = rng.multinomial(count, np.full(count, 1 / count), size=len(block))
    weights /= count
    return weights


def paired_test(
    score: Float[np.ndarray, "example head"], null: Float[np.ndarray, "example head"]
) -> Float[np.ndarray, " head"]:
    """One-sided paired test that the score is above its null.

    Student's t on the differences of the n examples where both are defined, floored at `2**-n`.
    Differences that are all equal give `2**-n` when positive and 1 otherwise; a single example
    gives 0.5 or 1.

    Returns:
        p-value per head; NaN where no example has both.
    """
    from scipy.special import stdtr

    differences = np.asarray(score, dtype=np.float64) - np.asarray(null, dtype=np.float64)
    p = np.full(differences.shape[1], np.nan)
    for n, columns, d in _by_count(differences):
        if n == 0:
            continue
        rows = np.ascontiguousarray(d.T)
        mean = rows.mean(axis=1)
        constant = (rows == rows[:, :1]).all(axis=1)
        found = np.where(rows[:, 0] > 0, 0.0, 1.0)
        if not constant.all():
            varied = rows[~constant]
            error = varied.std(axis=1, ddof=1) / math.sqrt(n)
            # Differences near the smallest float can have a spread that rounds to zero.
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                t = mean[~constant] / error
            found[~constant] = np.where(np.isnan(t), 1.0, stdtr(n - 1, -t))
        p[columns] = np.maximum(found, 2.0**-n)
    return p


def sign_flip_test(
    score: Float[np.ndarray, "example head"],
    null: Float[np.ndarray, "example head"],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Float[np.ndarray, " head"]:
    """The permutation test that `paired_test` approximates, slow and free of assumptions.

    Under the null hypothesis each example's difference is as likely negative as positive. The
    p-value is the share of sign choices whose sum reaches the observed one: all `2**n` of them up
    to n = 14, beyond that `resamples` random ones with the observed choice counted in.

    Returns:
        p-value per head; NaN where no example has both.
    """
    differences = np.asarray(score, dtype=np.float64) - np.asarray(null, dtype=np.float64)
    p = np.full(differences.shape[1], np.nan)
    for n, columns, d in _by_count(differences):
        if n == 0:
            continue
        exact = n <= EXACT_SIGN_FLIPS
        if exact:
            bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        else:
            bits = np.random.default_rng([seed, n]).integers(0, 2, size=(resamples, n))
        signs = 1.0 - 2.0 * bits
        # Ties must count as reached although the sums are rounded.
        reached = d.sum(axis=0) - 1e-12 * np.abs(d).sum(axis=0)
        width = max(1, _BLOCK // len(signs))
        for start in range(0, len(columns), width):
            part = slice(start, start + width)
            hits = (signs @ d[:, part] >= reached[part]).sum(axis=0)
            p[columns[part]] = hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)
    return p


def bh_qvalues(p: Float[np.ndarray, " head"]) -> Float[np.ndarray, " head"]:
    """Benjamini-Hochberg q-values: the smallest false discovery rate at which a head is kept.

    Undefined p-values stay NaN and do not count as tests.

    Raises:
        InputError: a p-value lies outside [0, 1].
    """
    p = np.asarray(p, dtype=np.float64)
    q = np.full_like(p, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise InputError("p-values must lie between 0 and 1")
    order = tested[np.argsort(p[tested], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations per head, merged without keeping the examples.

    Attributes:
        n: defined examples per head.
        mean: their mean; 0 where n is 0, so that merging needs no special case.
        m2: sum of squared deviations from the mean.

    >>> a = Moments.empty(1).add(np.array([[1.0], [2.0]]))
    >>> both = a.merge(Moments.empty(1).add(np.array([[6.0], [np.nan]])))
    >>> both.n.item(), both.mean.item(), both.variance.item()
    (3, 3.0, 7.0)
    """

    n: Int[np.ndarray, " head"]
    mean: Float[np.ndarray, " head"]
    m2: Float[np.ndarray, " head"]

    @classmethod
    def empty(cls, heads: int) -> "Moments":
        """Moments of no example."""
        return cls(np.zeros(heads, dtype=np.int64), np.zeros(heads), np.zeros(heads))

    def add(self, values: Float[np.ndarray, "example head"]) -> "Moments":
        """Moments with further examples; NaN entries are left out, head by head."""
        values = np.asarray(values, dtype=np.float64)
        mean, n = mean_and_count(values)
        mean = np.where(n > 0, mean, 0.0)
        m2 = np.square(np.where(np.isnan(values), 0.0, values - mean)).sum(axis=0)
        return self.merge(Moments(n, mean, m2))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of examples.

        Raises:
            InputError: the two hold different numbers of heads.
        """
        if self.n.shape != other.n.shape:
            raise InputError(
                f"moments to merge must have equally many heads; got {len(self.n)} "
                f"and {len(other.n)}"
            )
        n = self.n + other.n
        share = other.n / np.maximum(n, 1)
        step = other.mean - self.mean
        return Moments(n, self.mean + step * share, self.m2 + other.m2 + step**2 * (self.n * share))

    @property
    def variance(self) -> Float[np.ndarray, " head"]:
        """Sample variance (n - 1 below); NaN with fewer than two examples."""
        return np.where(self.n > 1, self.m2 / np.maximum(self.n - 1, 1), np.nan)

    @property
    def std_error(self) -> Float[np.ndarray, " head"]:
        """Standard error of the mean; NaN with fewer than two examples."""
        error: Float[np.ndarray, " head"] = np.sqrt(self.variance / np.maximum(self.n, 1))
        return error


@dataclass(frozen=True)
class Overlap:
    """How far two sets of heads agree, beside what chance would give.

    Attributes:
        shared: heads in both sets.
        sizes: heads in each set.
        total: heads to choose from.
        expected: shared heads of two random sets of these sizes, `size * size / total`.
        corrected: `(shared - expected) / (largest possible - expected)`: 1 for the best possible
            agreement, 0 for chance, negative below; Cohen's kappa when the sizes are equal. NaN
            where a set is empty or holds every head, for then no other outcome was possible.
        p: chance of at least as many shared heads, from the hypergeometric distribution.
    """

    shared: int
    sizes: tuple[int, int]
    total: int
    expected: float
    corrected: float
    p: float


def overlap(a: Collection[Hashable], b: Collection[Hashable], *, total: int) -> Overlap:
    """Compare two sets of heads drawn from `total` heads.

    Raises:
        InputError: a set is larger than `total`.
    """
    from scipy.stats import hypergeom

    first, second = set(a), set(b)
    if len(first | second) > total:
        raise InputError(f"{total} heads were declared, but the two sets hold more")
    shared, sizes = len(first & second), (len(first), len(second))
    expected = sizes[0] * sizes[1] / total if total else 0.0
    room = min(sizes) - expected
    return Overlap(
        shared=shared,
        sizes=sizes,
        total=total,
        expected=expected,
        corrected=(shared - expected) / room if room > 0 else math.nan,
        p=float(hypergeom.sf(shared - 1, total, *sizes)) if total else 1.0,
    )


def spearman(a: Shaped[np.ndarray, " head"], b: Shaped[np.ndarray, " head"]) -> float:
    """Spearman's rank correlation over the heads defined in both, ties at their mean rank.

    Returns:
        A value in [-1, 1]; NaN with fewer than two such heads or where one side is constant.
    """
    from scipy.stats import rankdata

    both: Bool[np.ndarray, " head"] = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 2:
        return math.nan
    x, y = (rankdata(side[both]) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale else math.nan
