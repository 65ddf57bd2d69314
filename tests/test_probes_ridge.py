"""Ridge on all heads: equal to scikit-learn, to refits without each example, and to the stream."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SkRidge
from sklearn.linear_model import RidgeCV

from interp.errors import InputError, UnknownNameError
from interp.headid import HeadId
from probes import HeadFeatures, HeadStatistics, fit_ridge, make_probe, ridge_from_statistics
from probes.ridge import GRID, solve


def made(n=60, heads=3, d=7, targets=2, seed=0, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, heads, d, generator=rng, dtype=torch.float64)
    x = x * torch.logspace(-2, 2, heads, dtype=torch.float64)[:, None] + shift
    w = torch.randn(d, targets, generator=rng, dtype=torch.float64)
    noise = torch.randn(n, targets, generator=rng, dtype=torch.float64)
    return HeadFeatures.of(x), x[:, 0] @ w * 100 + noise + 3


def test_equals_scikit_learn_ridge_for_one_penalty():
    found, y = made(shift=5.0)
    fit = fit_ridge(found, y, penalties=[0.7], relative=False)
    assert fit.held_out is not None
    for h in range(3):
        reference = SkRidge(alpha=0.7).fit(found.x[:, h].numpy(), y.numpy())
        np.testing.assert_allclose(fit.coef[h].T, reference.coef_, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(fit.intercept[h], reference.intercept_, rtol=1e-8)
    ours = fit.predict(found.x)[:, 1]
    theirs = SkRidge(alpha=0.7).fit(found.x[:, 1].numpy(), y.numpy()).predict(found.x[:, 1])
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(40, 5), (12, 20)])
def test_leave_one_out_equals_a_refit_without_each_example(n, d):
    found, y = made(n=n, d=d)
    fit = fit_ridge(found, y, penalties=[0.3], relative=False)
    assert fit.criterion == "leave-one-out"
    for h in range(3):
        x = found.x[:, h].numpy()
        for i in range(n):
            rest = np.arange(n) != i
            reference = SkRidge(alpha=0.3, solver="svd").fit(x[rest], y[rest].numpy())
            np.testing.assert_allclose(
                fit.held_out[i, h], reference.predict(x[i : i + 1])[0], rtol=1e-6, atol=1e-7
            )
    error = (fit.held_out - y[:, None]).square().mean(dim=(0, 2))
    torch.testing.assert_close(error, fit.error[:, 0])


def test_leave_one_group_out_equals_refits_for_small_single_and_large_groups():
    # d = 4: groups of 1, 2, 3 go through their own matrix, those of 11 through one of d + 1 rows.
    sizes = [1, 2, 2, 3, 1, 11, 11, 3]
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(0).permutation(len(groups))
    groups = groups[order]
    found, y = made(n=len(groups), d=4)
    fit = fit_ridge(found, y, penalties=[0.05, 2.0], relative=False, groups=groups)
    assert fit.criterion == "leave-one-group-out"
    errors = np.zeros((3, 2))
    held = np.zeros((2, len(groups), 3, 2))
    for k, penalty in enumerate([0.05, 2.0]):
        for h in range(3):
            x = found.x[:, h].numpy()
            for g in range(len(sizes)):
                out = groups == g
                reference = SkRidge(alpha=penalty).fit(x[~out], y[~out].numpy())
                held[k, out, h] = reference.predict(x[out])
            errors[h, k] = ((held[k, :, h] - y.numpy()) ** 2).mean()
    np.testing.assert_allclose(fit.error, errors, rtol=1e-8)
    best = errors.argmin(axis=1)
    assert len(set(best)) == 2, "both penalties should be chosen by some head"
    for h in range(3):
        assert float(fit.penalty[h]) == [0.05, 2.0][best[h]]
        np.testing.assert_allclose(fit.held_out[:, h], held[best[h], :, h], rtol=1e-6, atol=1e-8)


def test_choice_of_penalty_equals_scikit_learn():
    grid = [1e-4, 1e-2, 1.0, 100.0, 1e4]
    found, y = made(n=80, targets=1)
    fit = fit_ridge(found, y, penalties=grid, relative=False)
    for h in range(3):
        reference = RidgeCV(alphas=grid).fit(found.x[:, h].numpy(), y[:, 0].numpy())
        assert float(fit.penalty[h]) == reference.alpha_
        np.testing.assert_allclose(fit.coef[h, :, 0], reference.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(fit.error[h].min(), -reference.best_score_, rtol=1e-7)
    assert len(set(fit.penalty.tolist())) > 1


def test_relative_penalties_do_not_see_the_scale_of_a_head():
    x = torch.randn(50, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x[:, 0, 0] + 0.5 * torch.randn(50, dtype=torch.float64, generator=torch.manual_seed(2))
    found = HeadFeatures.of(torch.cat([x, 1000 * x], dim=1))
    fit = fit_ridge(found, y)
    torch.testing.assert_close(fit.held_out[:, 0], fit.held_out[:, 1])
    centred = x[:, 0] - x[:, 0].mean(0)
    scale = float((centred.T @ centred).trace() / 6)
    assert float(fit.penalty[0]) / scale == pytest.approx(GRID[int(fit.error[0].argmin())])


def test_statistics_give_the_same_fit_and_generalised_cross_validation():
    found, y = made(n=70, shift=50.0)
    stream = HeadStatistics(found.heads, found.sizes, 2).add(found, y)
    one = ridge_from_statistics(stream, penalties=[0.4], relative=False)
    exact = fit_ridge(found, y, penalties=[0.4], relative=False)
    torch.testing.assert_close(one.coef, exact.coef, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one.intercept, exact.intercept, rtol=1e-8, atol=1e-8)
    assert one.held_out is None and one.criterion == "generalised cross-validation"
    many = ridge_from_statistics(stream, penalties=[0.1, 10.0], relative=False)
    for h in range(3):
        for k, penalty in enumerate([0.1, 10.0]):
            x = found.x[:, h] - found.x[:, h].mean(0)
            hat = x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(7), x.T) + 1 / 70
            rss = (y - hat @ y).square().sum() / (70 * 2)
            expected = rss / (1 - hat.trace() / 70) ** 2
            torch.testing.assert_close(many.error[h, k], expected, rtol=1e-7, atol=0)


def test_many_target_sets_choose_each_for_themselves():
    found, y = made(n=30, targets=3)
    x = found.x.transpose(0, 1)
    grid = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    groups = torch.arange(30) // 2
    together = solve(x, y[:, :, None], groups, grid, True)
    for t in range(3):
        alone = solve(x, y[:, t : t + 1, None], groups, grid, True)
        torch.testing.assert_close(together[0][:, :, t], alone[0][:, :, 0])
        torch.testing.assert_close(together[2][:, t], alone[2][:, 0])
        torch.testing.assert_close(together[4][:, :, t], alone[4][:, :, 0])


def test_zeros_behind_small_heads_change_nothing():
    found, y = made(d=4)
    padded = HeadFeatures(
        torch.nn.functional.pad(found.x, (0, 3)), found.heads, found.sizes, found.owners, found.ids
    )
    a, b = (fit_ridge(f, y, penalties=[0.5, 5.0], relative=False) for f in (found, padded))
    torch.testing.assert_close(a.held_out, b.held_out)
    assert bool((b.coef[:, 4:] == 0).all())


def test_chunks_of_heads_and_of_targets_do_not_matter(monkeypatch):
    import probes.features as module

    found, y = made(heads=5)
    whole = fit_ridge(found, y)
    sets = torch.randn(60, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grid, groups = torch.tensor([0.1, 10.0], dtype=torch.float64), torch.arange(60) // 2
    together = solve(found.x.transpose(0, 1), sets, groups, grid, True)
    monkeypatch.setattr(module, "MEMORY", {"cpu": 1})
    single = fit_ridge(found, y)
    torch.testing.assert_close(whole.coef, single.coef)
    torch.testing.assert_close(whole.held_out, single.held_out)
    for a, b in zip(
        together, solve(found.x.transpose(0, 1), sets, groups, grid, True), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_head_that_never_varies_predicts_the_mean():
    found, y = made(targets=1)
    found.x[:, 1] = 4.0
    fit = fit_ridge(found, y)
    n = len(y)
    torch.testing.assert_close(fit.held_out[:, 1], (y.sum() - y) / (n - 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"penalties": []}, "positive"),
        ({"penalties": [0.0]}, "positive"),
        ({"penalties": [float("nan")]}, "positive"),
        ({"groups": [0] * 60}, "at least two examples or groups"),
        ({"groups": [0, 1]}, "every example needs a group"),
    ],
)
def test_bad_settings_are_refused(change, text):
    found, y = made()
    with pytest.raises(InputError, match=text):
        fit_ridge(found, y, **change)


def test_bad_numbers_are_refused():
    found, y = made()
    with pytest.raises(InputError, match="as many targets"):
        fit_ridge(found, y[:5])
    y[3, 0] = float("nan")
    with pytest.raises(InputError, match="targets must be finite"):
        fit_ridge(found, y)
    x = found.x.clone()
    x[2, 1, 0] = float("inf")
    with pytest.raises(InputError, match="example 2 is not at L0H1"):
        HeadFeatures(x, found.heads, found.sizes, found.owners, found.ids)
    with pytest.raises(InputError, match="two examples"):
        ridge_from_statistics(HeadStatistics([HeadId(0, 0)], [7], 1))
    with pytest.raises(UnknownNameError, match="setting of probe 'ridge'"):
        make_probe("ridge", {"lambda": 1})
    with pytest.raises(UnknownNameError, match="no probe named"):
        make_probe("rigde")
