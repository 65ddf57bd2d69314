"""Statistics over examples: closed forms, slow references, scipy and scikit-learn as oracles."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from sklearn.metrics import cohen_kappa_score

from interp.errors import InputError
from interp.stats import (
    Moments,
    bh_qvalues,
    bootstrap_interval,
    mean_and_count,
    overlap,
    paired_test,
    sign_flip_test,
    spearman,
)

NAN = math.nan
scores = st.floats(-100, 100, width=32)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_mean_skips_undefined_examples_and_counts_the_rest():
    mean, n = mean_and_count(np.array([[1.0, NAN, NAN], [2.0, 5.0, NAN]]))
    np.testing.assert_array_equal(mean, [1.5, 5.0, NAN])
    np.testing.assert_array_equal(n, [2, 1, 0])


def test_a_heads_mean_does_not_depend_on_the_heads_beside_it():
    values = np.random.default_rng(0).random((1000, 6))
    alone = [mean_and_count(values[:, [i]])[0][0] for i in range(6)]
    np.testing.assert_array_equal(mean_and_count(values)[0], alone)


# bootstrap


def slow_bootstrap(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, size=len(values)).mean() for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_bootstrap_agrees_with_the_plain_loop():
    values = np.random.default_rng(0).gamma(2.0, size=30)
    lo, hi = bootstrap_interval(values[:, None], resamples=20_000)
    slow_lo, slow_hi = slow_bootstrap(values, 20_000, seed=1)
    assert lo[0] == pytest.approx(slow_lo, abs=0.02)
    assert hi[0] == pytest.approx(slow_hi, abs=0.02)


def test_bootstrap_of_two_examples_is_their_range():
    # Of the four resamples a quarter are all-low and a quarter all-high: beyond both tails.
    lo, hi = bootstrap_interval(column(0.0, 1.0))
    assert (lo[0], hi[0]) == (0.0, 1.0)


@pytest.mark.parametrize("n", [3, 6, 10, 11, 100])
def test_equal_scores_have_exactly_that_score_as_mean_and_interval(n):
    # Adding 0.1 up and dividing again misses 0.1 by a bit for some n, and with it a threshold.
    values = np.full((n, 1), 0.1)
    lo, hi = bootstrap_interval(values)
    assert lo[0] == hi[0] == mean_and_count(values)[0][0] == 0.1


def test_bootstrap_is_undefined_below_two_examples():
    values = np.array([[1.0, NAN, 1.0], [NAN, NAN, 2.0]])
    lo, hi = bootstrap_interval(values)
    assert np.isnan(lo[:2]).all()
    assert np.isnan(hi[:2]).all()
    assert np.isfinite([lo[2], hi[2]]).all()


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    # 3000 heads are 3000 independent experiments; the percentile interval is a little short
    # at n = 40 (about 0.94), and far from 0.90 or 0.98.
    values = np.random.default_rng(3).normal(0.3, 1.0, size=(40, 3000))
    lo, hi = bootstrap_interval(values, resamples=1000)
    covered = float(((lo <= 0.3) & (hi >= 0.3)).mean())
    assert 0.92 < covered < 0.96


@settings(deadline=None, max_examples=50)
@given(arrays(np.float64, (6, 4), elements=st.one_of(scores, st.just(NAN))))
def test_a_heads_interval_depends_on_its_own_defined_scores_only(values):
    lo, hi = bootstrap_interval(values, resamples=200)
    for head in range(4):
        own = values[~np.isnan(values[:, head]), head]
        own_lo, own_hi = bootstrap_interval(own[:, None], resamples=200)
        np.testing.assert_allclose([lo[head], hi[head]], [own_lo[0], own_hi[0]], atol=1e-9)
        if len(own) > 1:
            assert own.min() - 1e-9 <= lo[head] <= hi[head] <= own.max() + 1e-9


def test_bootstrap_repeats_itself_by_its_seed():
    values = np.random.default_rng(0).normal(size=(9, 3))
    first, again = bootstrap_interval(values, seed=5), bootstrap_interval(values, seed=5)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, bootstrap_interval(values, seed=6))


def test_blocks_of_resamples_and_heads_change_nothing(monkeypatch):
    values = np.random.default_rng(0).normal(size=(9, 50))
    whole = bootstrap_interval(values, resamples=300), sign_flip_test(values, 0 * values)
    monkeypatch.setattr("interp.stats._BLOCK", 2000)
    parts = bootstrap_interval(values, resamples=300), sign_flip_test(values, 0 * values)
    np.testing.assert_allclose(whole[0], parts[0], atol=1e-12)
    np.testing.assert_array_equal(whole[1], parts[1])


@pytest.mark.parametrize("bad", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_bootstrap_refuses_impossible_settings(bad):
    with pytest.raises(InputError):
        bootstrap_interval(column(1.0, 2.0), **bad)


# tests against a null


def test_paired_test_is_students_t_where_the_floor_is_not_reached():
    rng = np.random.default_rng(1)
    score, null = rng.normal(0.3, 1, (20, 30)), rng.normal(size=(20, 30))
    expected = scipy_stats.ttest_rel(score, null, axis=0, alternative="greater").pvalue
    assert expected.min() > 2.0**-20
    np.testing.assert_allclose(paired_test(score, null), expected, rtol=1e-9)


def test_paired_test_never_claims_more_than_sign_flips_of_n_examples_could():
    score = np.array([[1.0, 1.0], [1.0001, 1.0], [0.9999, NAN]])
    np.testing.assert_array_equal(paired_test(score, np.zeros((3, 2))), [2.0**-3, 2.0**-2])


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.5, 0.5, 0.5], 2.0**-3),
        ([0.0, 0.0, 0.0], 1.0),
        ([-0.5, -0.5], 1.0),
        ([0.5], 0.5),
        ([0.0], 1.0),
        ([-0.5], 1.0),
        ([NAN, NAN], NAN),
        ([5e-324, 1e-323], 2.0**-2),
    ],
)
def test_paired_test_without_spread(differences, expected):
    p = paired_test(column(*differences), np.zeros((len(differences), 1)))
    np.testing.assert_array_equal(p, [expected])


def test_a_pair_with_an_undefined_side_is_left_out():
    score = np.array([[1.0], [2.0], [NAN], [4.0]])
    null = np.array([[0.5], [NAN], [1.0], [0.1]])
    expected = paired_test(column(1.0, 4.0), column(0.5, 0.1))
    np.testing.assert_array_equal(paired_test(score, null), expected)


def slow_sign_flips(differences: list[float]) -> float:
    observed = sum(differences)
    flips = list(itertools.product([1, -1], repeat=len(differences)))
    reached = sum(
        sum(s * d for s, d in zip(f, differences, strict=True)) >= observed for f in flips
    )
    return reached / len(flips)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
def test_sign_flips_equal_their_enumeration(differences):
    values = column(*differences)
    p = sign_flip_test(values, np.zeros_like(values))
    assert p[0] == slow_sign_flips(differences)


def test_sign_flips_count_ties_that_rounding_hides():
    # 0.1 + 0.2 + 0.3 sums differently in another order; every sign choice that only flips the
    # zero still ties with the observed one.
    p = sign_flip_test(column(0.1, 0.2, 0.3, 0.0), np.zeros((4, 1)))
    assert p[0] == 2 / 16


def test_many_sign_flips_are_drawn_and_the_observed_one_counts():
    values = np.random.default_rng(2).normal(0.25, 1, size=(16, 5))
    drawn = sign_flip_test(values, np.zeros_like(values), resamples=20_000)
    exact = [slow_sign_flips(values[:, i].tolist()) for i in range(5)]
    np.testing.assert_allclose(drawn, exact, atol=0.015)
    certain = sign_flip_test(np.ones((40, 1)), np.zeros((40, 1)), resamples=999)
    assert certain[0] == pytest.approx(1 / 1000)


def test_paired_test_is_near_the_permutation_test():
    values = np.random.default_rng(4).normal(0.4, 1, size=(12, 200))
    null = np.zeros_like(values)
    exact, quick = sign_flip_test(values, null), paired_test(values, null)
    decisive = exact < 0.2
    assert 20 < decisive.sum() < 200
    np.testing.assert_allclose(quick[decisive], exact[decisive], atol=0.02)
    np.testing.assert_allclose(quick, exact, atol=0.06)


# false discovery rate


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)))
def test_q_values_equal_scipy(p):
    np.testing.assert_allclose(
        bh_qvalues(p), scipy_stats.false_discovery_control(p), rtol=1e-12, atol=0
    )


def test_undefined_p_values_are_no_tests():
    p = np.array([0.01, NAN, 0.04, NAN, 0.5])
    q = bh_qvalues(p)
    np.testing.assert_array_equal(np.isnan(q), np.isnan(p))
    expected = scipy_stats.false_discovery_control(p[[0, 2, 4]])
    np.testing.assert_allclose(q[[0, 2, 4]], expected)


def test_q_values_of_nothing_are_nothing():
    assert bh_qvalues(np.array([])).shape == (0,)
    assert np.isnan(bh_qvalues(np.array([NAN]))).all()


def test_p_values_outside_their_range_are_refused():
    with pytest.raises(InputError, match="between 0 and 1"):
        bh_qvalues(np.array([0.1, 1.2]))


# moments

shards = st.lists(
    arrays(np.float64, st.tuples(st.integers(0, 5), st.just(3)), elements=scores | st.just(NAN)),
    min_size=3,
    max_size=3,
)


def close(a: Moments, b: Moments) -> None:
    np.testing.assert_array_equal(a.n, b.n)
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-9)
    np.testing.assert_allclose(a.m2, b.m2, atol=1e-6)


@given(shards)
def test_merging_moments_is_associative_and_equals_one_go(parts):
    a, b, c = (Moments.empty(3).add(part) for part in parts)
    whole = Moments.empty(3).add(np.concatenate(parts))
    close(a.merge(b).merge(c), a.merge(b.merge(c)))
    close(a.merge(b).merge(c), whole)
    close(a.merge(b), b.merge(a))


@given(arrays(np.float64, (5, 2), elements=scores))
def test_moments_equal_numpy(values):
    one_by_one = Moments.empty(2)
    for row in values:
        one_by_one = one_by_one.add(row[None])
    np.testing.assert_allclose(one_by_one.mean, values.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(one_by_one.variance, values.var(axis=0, ddof=1), atol=1e-6)
    expected = scipy_stats.sem(values, axis=0)
    np.testing.assert_allclose(one_by_one.std_error, expected, atol=1e-5)


def test_moments_keep_a_small_spread_beside_a_large_mean():
    values = 1e9 + np.array([[0.0], [1.0], [2.0]])
    merged = Moments.empty(1).add(values[:1]).add(values[1:])
    assert merged.variance[0] == pytest.approx(1.0)


def test_moments_of_different_models_do_not_merge():
    with pytest.raises(InputError, match="equally many heads; got 2 and 3"):
        Moments.empty(2).merge(Moments.empty(3))


# agreement


def test_overlap_has_its_chance_level():
    found = overlap("abcd", "cdef", total=12)
    assert (found.shared, found.sizes, found.total) == (2, (4, 4), 12)
    assert found.expected == pytest.approx(4 * 4 / 12)
    choices = list(itertools.combinations(range(12), 4))
    at_least = sum(len({0, 1, 2, 3} & set(c)) >= 2 for c in choices) / len(choices)
    assert found.p == pytest.approx(at_least)


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.just(n), st.permutations(range(n)), st.permutations(range(n)), st.integers(1, n - 1)
        )
    )
)
def test_corrected_overlap_is_cohens_kappa_for_equal_sizes(case):
    total, a, b, k = case
    first, second = a[:k], b[:k]
    labels = [[int(i in side) for i in range(total)] for side in (first, second)]
    found = overlap(first, second, total=total)
    assert found.corrected == pytest.approx(cohen_kappa_score(*labels))


def test_random_sets_overlap_as_expected():
    rng = np.random.default_rng(0)
    draws = [
        overlap(rng.choice(30, 6, replace=False).tolist(), range(10), total=30) for _ in range(2000)
    ]
    assert np.mean([d.shared for d in draws]) == pytest.approx(draws[0].expected, abs=0.1)
    assert np.mean([d.corrected for d in draws]) == pytest.approx(0, abs=0.03)


def test_overlap_without_choice_is_undefined():
    assert math.isnan(overlap(range(3), range(3), total=3).corrected)
    empty = overlap([], [], total=3)
    assert math.isnan(empty.corrected)
    assert empty.p == 1.0
    with pytest.raises(InputError, match="2 heads were declared"):
        overlap("abc", "a", total=2)


@settings(max_examples=50)
@given(arrays(np.float64, (2, 8), elements=st.integers(-4, 4).map(float) | st.just(NAN)))
def test_spearman_equals_scipy(pair):
    a, b = pair
    both = ~np.isnan(a + b)
    found = spearman(a, b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(scipy_stats.spearmanr(a[both], b[both]).statistic)
