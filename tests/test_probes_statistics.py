"""Streamed sums: equal to all examples at once, however they are cut, ordered and merged."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import InputError
from interp.headid import HeadId
from probes import HeadFeatures, HeadStatistics, mean_difference
from probes.direction import directions_from_statistics
from probes.statistics import indicators

X = torch.randn(37, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
Y = torch.randn(37, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 8
HEADS = tuple(HeadId(0, h) for h in range(3))


def empty(targets=2, **more):
    return HeadStatistics(HEADS, (5, 5, 5), targets, **more)


def reference():
    x, y = X - X.mean(0), Y - Y.mean(0)
    return {
        "mean": X.mean(0),
        "scatter": torch.einsum("nhd,nhe->hde", x, x),
        "cross": torch.einsum("nhd,nt->hdt", x, y),
        "target_mean": Y.mean(0),
        "target_scatter": y.square().sum(0),
    }


def same(found, rtol=1e-10):
    assert found.n == 37
    for name, value in reference().items():
        torch.testing.assert_close(getattr(found, name), value, rtol=rtol, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 37), max_size=6), st.integers(0, 5))
def test_streamed_equals_all_at_once(cuts, where):
    bounds = [0, *sorted(cuts), 37]
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    shards = [empty(), empty()]
    for i, part in enumerate(parts):
        shards[i > where].add(HeadFeatures.of(X[part]), Y[part])
    same(shards[0].merge(shards[1]))
    other = empty().merge(empty())
    assert other.n == 0


def test_a_large_mean_costs_no_digits():
    shifted = X + 1e7
    found = empty()
    for i in range(37):
        found.add(HeadFeatures.of(shifted[i : i + 1]), Y[i : i + 1])
    expected = torch.einsum("nhd,nhe->hde", shifted - shifted.mean(0), shifted - shifted.mean(0))
    torch.testing.assert_close(found.scatter, expected, rtol=1e-6, atol=1e-6)
    plain = torch.einsum("nhd,nhe->hde", shifted, shifted)
    plain -= 37 * torch.einsum("hd,he->hde", shifted.mean(0), shifted.mean(0))
    assert float((plain - expected).abs().max()) > 100 * float(
        (found.scatter - expected).abs().max()
    )


def test_directions_from_the_stream_equal_those_from_the_features():
    labels = ["no", "yes", "yes"] * 12 + ["no"]
    stream = empty(classes=("no", "yes"))
    for at in range(0, 37, 10):
        part = slice(at, at + 10)
        stream.add(HeadFeatures.of(X[part]), indicators(labels[part], ("no", "yes")))
    found = directions_from_statistics(stream)
    direct = mean_difference(HeadFeatures.of(X), labels)
    chosen = torch.tensor([x == "yes" for x in labels])
    step = X[chosen].mean(0) - X[~chosen].mean(0)
    unit = step / step.norm(dim=1, keepdim=True)
    for each in (found, direct):
        torch.testing.assert_close(each.unit, unit)
        torch.testing.assert_close(each.gap, step.norm(dim=1))
        torch.testing.assert_close(each.sigma, torch.einsum("nhd,hd->nh", X, unit).std(0))
        assert (each.away, each.towards) == ("no", "yes")
    torch.testing.assert_close(
        direct.spread(HeadFeatures.of(X[:9])), torch.einsum("nhd,hd->nh", X[:9], unit).std(0)
    )
    back = directions_from_statistics(stream, towards="no")
    torch.testing.assert_close(back.unit, -unit)


def test_one_class_against_all_others():
    labels = [i % 3 for i in range(37)]
    found = mean_difference(HeadFeatures.of(X), labels, towards=1)
    chosen = torch.tensor([x == 1 for x in labels])
    step = X[chosen].mean(0) - X[~chosen].mean(0)
    torch.testing.assert_close(found.unit * found.gap[:, None], step)
    assert found.away == [0, 2]


def test_a_head_with_equal_means_has_no_direction():
    x = X[:4].clone()
    x[:, 1] = 2.0
    found = mean_difference(HeadFeatures.of(x), [0, 0, 1, 1])
    assert float(found.gap[1]) == 0 and bool((found.unit[1] == 0).all())
    assert float(found.unit[0].norm()) == pytest.approx(1)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="one row per example"):
        empty().add(HeadFeatures.of(X), Y[:3])
    with pytest.raises(InputError, match="must be finite"):
        empty().add(HeadFeatures.of(X[:1]), torch.full((1, 2), float("nan")))
    with pytest.raises(InputError, match="of the heads"):
        empty().add(HeadFeatures.of(X[:, :2]), Y)
    with pytest.raises(InputError, match="same heads"):
        empty().merge(empty(1))
    with pytest.raises(InputError, match="not of classes"):
        empty().add(HeadFeatures.of(X), Y).class_means
    with pytest.raises(InputError, match="'b' has none"):
        empty(classes=("a", "b")).add(
            HeadFeatures.of(X), indicators(["a"] * 37, ("a", "b"))
        ).class_means
    with pytest.raises(InputError, match="must be among"):
        indicators(["c"], ("a", "b"))
    with pytest.raises(InputError, match="two classes"):
        mean_difference(HeadFeatures.of(X), ["a"] * 37)
    with pytest.raises(InputError, match="one of the classes"):
        mean_difference(HeadFeatures.of(X[:2]), ["a", "b"], towards="c")
    with pytest.raises(InputError, match="label 1 is nan"):
        mean_difference(HeadFeatures.of(X[:2]), [0.0, float("nan")])
    with pytest.raises(InputError, match="one kind"):
        mean_difference(HeadFeatures.of(X[:2]), [0, "a"])
    with pytest.raises(InputError, match="needs a label"):
        mean_difference(HeadFeatures.of(X), [0, 1])
