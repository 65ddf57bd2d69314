"""Cross-validation, permutations and control tasks against plain loops and planted probes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores
from probes import (
    HeadFeatures,
    control_labels,
    cross_validate,
    make_probe,
    mean_difference,
)
from probes.control import control_draws, permutations
from probes.features import read_labels
from probes.probe import PROBES
from probes.ridge import Ridge, fit_ridge
from probes.validate import _folds


def planted(n=200, heads=40, d=8, informed=5, snr=1.0, seed=0):
    """Heads 0, 8, 16, … hold the label along a direction of their own, the others noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randn(n, heads, d, generator=rng, dtype=torch.float64)
    theta = torch.randn(informed, d, generator=rng, dtype=torch.float64)
    theta /= theta.norm(dim=1, keepdim=True)
    places = [8 * i for i in range(informed)]
    side = labels.double()[:, None] * 2 - 1
    for i, place in enumerate(places):
        x[:, place] += snr * side * theta[i]
    return HeadFeatures.of(x), labels.tolist(), places, theta


@pytest.mark.parametrize("name", sorted(PROBES))
def test_finds_the_planted_heads_and_no_others(name):
    found, labels, places, _ = planted()
    scores = cross_validate(found, labels, probe=name, draws=39 if name != "logistic" else 19)
    planted_heads = {HeadId(0, p) for p in places}
    assert set(scores.top(5)) == planted_heads
    assert set(scores.select()) == planted_heads
    assert scores.detector == f"probe.{name}"
    assert float(scores.column("p_max")[places].max()) <= 0.05
    # About Φ(1) of the examples lie on the right side of the best boundary.
    assert scores.values[places].min() > 0.75
    assert abs(np.delete(scores.values, places).mean() - 0.5) < 0.02
    assert abs(scores.null.mean() - 0.5) < 0.02
    assert scores.ci_lo[places].min() > 0.65


def test_directions_of_planted_heads_come_out():
    found, labels, places, theta = planted(n=4000, heads=40, snr=1.0)
    directions = mean_difference(found, labels)
    for i, place in enumerate(places):
        assert float(directions.unit[place] @ theta[i]) > 0.99
        assert float(directions.gap[place]) == pytest.approx(2, abs=0.15)
        assert float(directions.sigma[place]) == pytest.approx(2**0.5, abs=0.1)
    ridge = fit_ridge(found, torch.tensor(labels, dtype=torch.float64))
    for i, place in enumerate(places):
        w = ridge.coef[place, :, 0]
        assert float(w @ theta[i] / w.norm()) > 0.99


def test_null_heads_are_not_claimed_more_often_than_the_level():
    claimed, alone = 0, 0
    smallest = []
    for seed in range(40):
        found, labels, _, _ = planted(n=60, heads=24, d=4, informed=0, seed=seed)
        scores = cross_validate(found, labels, probe="mean-difference", draws=39, seed=seed)
        claimed += len(scores.select()) > 0
        alone += float(scores.params["best_p_max"]) <= 0.05
        smallest.append(scores.params["best_p_max"])
    # Binomial(40, .05): more than six happen once in 300.
    assert claimed <= 6 and alone <= 6
    # And the test is no more timid than ties make it: p of the best null head is near uniform.
    assert 0.4 < np.mean(smallest) < 0.7 and np.mean(np.array(smallest) <= 0.5) > 0.25


def test_equals_a_loop_of_scikit_learn_fits():
    found, labels, _, _ = planted(n=60, heads=3, d=4, informed=1)
    groups = np.arange(60) // 3
    labels = np.array(labels)[np.random.default_rng(1).permutation(60)]
    scores = cross_validate(found, labels, probe="logistic", groups=groups, draws=0)
    nearest = cross_validate(found, labels, probe="mean-difference", groups=groups, draws=0)
    fold = _folds(labels, groups, 5, 0)
    right = np.zeros((2, 60, 3))
    for f in range(5):
        out = fold == f
        assert not set(groups[out]) & set(groups[~out])
        for h in range(3):
            x = found.x[:, h].numpy()
            scaler = StandardScaler().fit(x[~out])
            model = LogisticRegression(tol=1e-10, max_iter=10_000)
            model.fit(scaler.transform(x[~out]), labels[~out])
            right[0, out, h] = model.predict(scaler.transform(x[out])) == labels[out]
            centroid = NearestCentroid().fit(x[~out], labels[~out])
            right[1, out, h] = centroid.predict(x[out]) == labels[out]
    by_group = right.reshape(2, 20, 3, 3).mean(axis=2)
    np.testing.assert_allclose(scores.per_example, by_group[0])
    np.testing.assert_allclose(nearest.per_example, by_group[1])
    assert scores.null_per_example is None and scores.n.tolist() == [20] * 3


def test_ridge_chooses_its_penalty_within_the_training_part_and_by_groups():
    # Prints of groups reward small penalties if a group may be on both sides.
    found, labels, _, _ = planted(n=40, heads=4, d=6, informed=1, snr=0.5)
    groups, labels = np.arange(40) // 4, np.array(labels)[np.arange(40) // 4 * 3]
    prints = torch.randn(10, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = HeadFeatures.of(0.3 * found.x + 2 * prints[groups])
    each = [f"{i}" for i in range(40)]
    y = torch.tensor(labels, dtype=torch.float64) * 2 - 1
    fold = _folds(labels, groups, 5, 0)
    scores = cross_validate(found, labels, groups=groups, draws=0)
    differs = 0
    for f in range(5):
        out = np.flatnonzero(fold == f)
        rest = np.flatnonzero(fold != f)
        fit = fit_ridge(found.rows(rest), y[rest], groups=groups[rest])
        alone = fit_ridge(found.rows(rest), y[rest], groups=np.array(each)[rest])
        said = fit.predict(found.rows(out).x)[:, :, 0] > 0
        differs += int(((alone.predict(found.rows(out).x)[:, :, 0] > 0) != said).sum())
        right = (said == (y[out] > 0)[:, None]).double()
        for g in np.unique(groups[out]):
            np.testing.assert_allclose(scores.per_example[g], right[groups[out] == g].mean(dim=0))
    assert differs > 0, "the choice by single examples should say something else"


def test_nearest_mean_with_unequal_and_missing_classes():
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 30 + [1] * 6 + [3] * 4)
    x = torch.randn(40, 3, 2, generator=rng, dtype=torch.float64)
    x = x + labels[:, None, None] * torch.tensor([1.0, 0.5, 0.0])[:, None] + 5
    test = 3 * torch.randn(50, 3, 2, generator=rng, dtype=torch.float64) + 5
    said = make_probe("mean-difference").decide(
        x.transpose(0, 1), labels[:, None], torch.arange(40), test.transpose(0, 1), n_classes=4
    )
    for h in range(3):
        reference = NearestCentroid().fit(x[:, h].numpy(), labels).predict(test[:, h].numpy())
        np.testing.assert_array_equal(said[h, :, 0], reference)


def test_null_is_the_same_procedure_on_permuted_labels(monkeypatch):
    import probes.validate as module

    found, labels, _, _ = planted(n=40, heads=3, d=4, informed=1, snr=0.3)
    scores = cross_validate(found, labels, draws=19, seed=3)
    codes = np.arange(40)
    folds = _folds(np.array(labels), codes, 5, 3)
    drawn = permutations(np.array(labels), codes, folds, 19, seed=3)
    # The folds are those of the real labels, and every permutation is just as balanced.
    monkeypatch.setattr(module, "_folds", lambda *_: folds)
    by_draw = np.stack(
        [cross_validate(found, drawn[:, i], draws=0, seed=3).per_example for i in range(19)], -1
    )
    np.testing.assert_allclose(scores.null_per_example, by_draw.mean(axis=-1))
    null = by_draw.mean(axis=0)
    best = np.sort(null.max(axis=0))
    p = [(1 + (null[h] >= scores.values[h] - 1e-12).sum()) / 20 for h in range(3)]
    p_max = [(1 + (best >= scores.values[h] - 1e-12).sum()) / 20 for h in range(3)]
    np.testing.assert_allclose(scores.column("p_perm"), p)
    np.testing.assert_allclose(scores.column("p_max"), p_max)
    assert scores.params["max_null_quantile"] == pytest.approx(best[-1])
    np.testing.assert_array_equal(scores.values >= scores.threshold, np.array(p_max) <= 0.05)


def test_groups_stay_together_and_memory_of_a_group_is_worth_nothing():
    # Every group has a fingerprint and a label; without grouping a probe would know it by heart.
    rng = torch.Generator().manual_seed(0)
    prints = torch.randn(40, 1, 30, generator=rng, dtype=torch.float64)
    groups = torch.arange(40).repeat_interleave(6)
    x = prints[groups] + 0.01 * torch.randn(240, 1, 30, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 2, (40,), generator=rng)[groups]
    apart = cross_validate(HeadFeatures.of(x), labels, draws=0)
    together = cross_validate(HeadFeatures.of(x), labels, groups=groups, draws=19)
    assert float(apart.values[0]) > 0.9
    assert float(together.values[0]) < 0.7 and together.select() == ()
    assert together.n.tolist() == [40]


def test_permutations_respect_groups_and_folds():
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1])
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 5])
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1])
    between = permutations(labels, groups, folds, 80, seed=0)
    by_group = between[[0, 2, 4, 6, 9, 10]]
    assert (by_group[groups] == between).all()
    own = labels[[0, 2, 4, 6, 9, 10]]
    for members in ([0, 1, 4], [2, 3, 5]):
        assert (by_group[members].sum(0) == own[members].sum()).all()
    assert len(np.unique(by_group, axis=1).T) == 9  # 3 x 3 arrangements, all of them drawn
    mixed = np.array([0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1])
    within = permutations(mixed, groups, folds, 400, seed=0)
    for g in range(6):
        assert (within[groups == g].sum(0) == mixed[groups == g].sum()).all()
    assert len(np.unique(within, axis=1).T) == 2 * 2 * 2 * 3


def test_folds_hold_whole_groups_and_are_balanced():
    groups = np.arange(90) // 2
    labels = (groups % 3 == 0).astype(int)
    fold = _folds(labels, groups, 5, 0)
    assert (fold[::2] == fold[1::2]).all()
    for f in range(5):
        assert (fold == f).sum() == 18 and labels[fold == f].sum() == 6
    assert (_folds(labels, groups, 5, 1) != fold).any()


def test_control_task_shows_what_is_learned_by_heart():
    # Head 0 holds the label, head 1 the identity of the word: both classify, one is selective.
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(0, 20, (400,), generator=rng)
    meaning = torch.arange(20) % 2
    labels = meaning[words]
    x = 0.3 * torch.randn(400, 2, 20, generator=rng, dtype=torch.float64)
    x[:, 0, 0] += labels * 2
    x[torch.arange(400), 1, words] += 3
    scores = cross_validate(HeadFeatures.of(x), labels, types=words, draws=0, control_tasks=10)
    assert scores.values.min() > 0.95
    selective = scores.column("selectivity")
    assert selective[0] > 0.3 and abs(selective[1]) < 0.05
    np.testing.assert_allclose(scores.column("control"), scores.values - selective)


def test_control_labels_are_one_per_type_and_follow_the_labels():
    labels = np.array([0] * 300 + [1] * 100)
    types = np.arange(400) // 2
    drawn = control_labels(types, labels, seed=1)
    assert (drawn[::2] == drawn[1::2]).all()
    assert 0.15 < drawn.mean() < 0.35
    assert (control_labels(types, labels, seed=1) == drawn).all()
    assert (control_labels(types, labels, seed=2) != drawn).any()


@pytest.mark.parametrize("name", ["ridge", "mean-difference"])
def test_more_than_two_classes(name):
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    x = torch.randn(150, 2, 5, generator=rng, dtype=torch.float64)
    x[torch.arange(150), 0, labels] += 4
    scores = cross_validate(
        HeadFeatures.of(x), [f"c{i}" for i in labels.tolist()], probe=name, draws=19
    )
    assert scores.values[0] > 0.9 and abs(scores.values[1] - 1 / 3) < 0.12
    assert scores.select() == (HeadId(0, 0),)
    with pytest.raises(InputError, match="tells 2 classes apart; got 3"):
        cross_validate(HeadFeatures.of(x), labels, probe="logistic")


@pytest.mark.parametrize("name", sorted(PROBES))
def test_chunks_zeros_and_settings_do_not_matter(name, monkeypatch):
    import probes.features as module

    found, labels, _, _ = planted(n=40, heads=5, d=4, informed=1)
    whole = cross_validate(found, labels, probe=name, draws=19)
    monkeypatch.setattr(module, "MEMORY", {"cpu": 1})
    calls = []
    padded = HeadFeatures(
        torch.nn.functional.pad(found.x, (0, 2)), found.heads, found.sizes, found.owners, found.ids
    )
    cut = cross_validate(
        padded, labels, probe=name, draws=19, progress=lambda a, b: calls.append((a, b))
    )
    assert whole.same_values(cut, atol=1e-12)
    assert calls == [(i, 5) for i in range(1, 6)]
    assert PROBES[name]().params == {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in whole.params.items() if k in PROBES[name]().params
    }  # fmt: skip


def test_a_class_missing_from_a_training_part_is_no_crash():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, generator=rng, dtype=torch.float64)
    labels = [0, 0, 0, 0, 1, 1]
    for name in PROBES:
        for seed in range(8):
            scores = cross_validate(
                HeadFeatures.of(x), labels, probe=name, folds=2, draws=19, seed=seed
            )
            assert not np.isnan(scores.values).any()


def test_rows_are_prompts_where_a_prompt_gave_several_examples(tmp_path):
    found, labels, _, _ = planted(n=60, heads=3, d=4, informed=1)
    owners = tuple(i // 4 for i in range(60))
    several = HeadFeatures(
        found.x, found.heads, found.sizes, owners, tuple(f"p{i}" for i in owners)
    )
    scores = cross_validate(several, labels, draws=19)
    assert scores.examples == tuple(f"p{i}" for i in range(15))
    back = HeadScores.load(scores.save(tmp_path))
    assert back.same_values(scores) and back.params["max_null_quantile"] > 0.4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": [1] * 20}, "at least two classes; all 20 labels are 1"),
        ({"labels": [0, 1]}, "20 examples and 2 labels"),
        ({"labels": [0, 1] * 9 + [0, float("nan")]}, "label 19 is nan"),
        ({"labels": [0, 1] * 9 + [0, None]}, "label 19 is None"),
        ({"labels": [0] * 19 + [1]}, "1 is in one only"),
        ({"groups": [0, 1, 2, 3] * 5}, "at least 5 groups; got 4"),
        ({"groups": [0]}, "every example needs a group"),
        ({"folds": 1}, "at least 2 folds"),
        ({"draws": 18}, "at least 19 draws"),
        ({"draws": 19, "alpha": 0.01}, "at least 99 draws"),
        ({"types": range(20)}, "several groups"),
        ({"types": [0] * 20}, "at least two types"),
    ],
)
def test_bad_input_is_refused(change, text):
    x = torch.randn(20, 2, 3)
    given = {"labels": [0, 1] * 10} | change
    with pytest.raises(InputError, match=text):
        cross_validate(HeadFeatures.of(x), given.pop("labels"), **given)


def test_control_draws_all_have_two_classes():
    classes = read_labels([0, 1] * 10, 20)
    draws = control_draws([0, 1] * 10, classes, np.arange(20), 6, seed=0)
    assert draws.shape == (20, 6) and (draws.min(0) != draws.max(0)).all()


def test_probe_settings_are_checked():
    with pytest.raises(InputError, match="positive"):
        Ridge(penalties=(0.0,))
