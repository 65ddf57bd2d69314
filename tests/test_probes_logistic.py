"""Batched logistic regression: scikit-learn's optimum, whatever the scale and the penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from interp.errors import InputError
from probes import HeadFeatures, fit_logistic
from probes.logistic import newton


def made(n=120, heads=4, d=6, gap=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=rng)
    x = torch.randn(n, heads, d, generator=rng, dtype=torch.float64)
    x[:, 0, 0] += gap * y
    x = x * torch.tensor([1.0, 0.1, 5.0, 1.0])[:, None] + torch.tensor([0.0, 0, 3, -2])[:, None]
    return HeadFeatures.of(x), y.tolist()


def fitted(x, y, C):
    return LogisticRegression(C=C, tol=1e-12, max_iter=100_000, solver="newton-cholesky").fit(x, y)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("gap", [0.0, 1.0, 20.0])
def test_equals_scikit_learn(C, gap):
    found, y = made(gap=gap)
    fit = fit_logistic(found, y, C=C)
    assert bool(fit.converged.all()) and int(fit.iterations.max()) < 30
    for h in range(4):
        reference = fitted(found.x[:, h].numpy(), y, C)
        np.testing.assert_allclose(fit.coef[h], reference.coef_[0], atol=1e-5)
        np.testing.assert_allclose(fit.intercept[h], reference.intercept_[0], atol=1e-4)
        np.testing.assert_allclose(
            fit.decision(found.x)[:, h], reference.decision_function(found.x[:, h]), atol=1e-4
        )


def test_standardised_equals_a_scaler_before_it():
    found, y = made()
    fit = fit_logistic(found, y, C=0.5, standardise=True)
    for h in range(4):
        scaled = StandardScaler().fit_transform(found.x[:, h].numpy())
        reference = fitted(scaled, y, 0.5)
        np.testing.assert_allclose(
            fit.decision(found.x)[:, h], reference.decision_function(scaled), atol=1e-5
        )


def test_the_gradient_vanishes_on_hard_problems():
    # Separable, badly scaled and with a far-off point; the objective's own gradient is the judge.
    found, y = made(n=40, gap=50.0, seed=3)
    x = found.x * torch.logspace(-3, 3, 6, dtype=torch.float64)
    x[0] *= 1000
    fit = fit_logistic(HeadFeatures.of(x), y, C=1.0)
    assert bool(fit.converged.all())
    sign = torch.tensor(y) * 2.0 - 1
    for h in range(4):
        w = fit.coef[h].clone().requires_grad_()
        b = fit.intercept[h].clone().requires_grad_()
        loss = torch.nn.functional.softplus(-sign * (x[:, h] @ w + b)).sum() + w @ w / 2
        loss.backward()
        # By the size of the features that the gradient sums over.
        size = x[:, h].abs().sum(0)
        assert bool((w.grad.abs() <= 1e-6 * (1 + size)).all()) and abs(float(b.grad)) < 1e-6


@pytest.mark.parametrize("seed", [13, 180, 281])
def test_full_steps_that_would_diverge_are_shortened(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 1, 2, generator=rng, dtype=torch.float64)
    x[0] *= 100
    y = torch.randint(0, 2, (8,), generator=rng).tolist()
    fit = fit_logistic(HeadFeatures.of(x), y, C=1e4)
    assert bool(fit.converged.all())
    # The loss of scikit-learn's own solution is no lower.
    reference = fitted(x[:, 0].numpy(), y, 1e4)

    def loss(w, b):
        signed = (torch.tensor(y) * 2.0 - 1) * (x[:, 0] @ w + b)
        return float(1e4 * torch.nn.functional.softplus(-signed).sum() + w @ w / 2)

    ours = loss(fit.coef[0], fit.intercept[0])
    assert ours <= loss(torch.tensor(reference.coef_[0]), reference.intercept_[0]) * (1 + 1e-9)


def test_labellings_are_independent_of_each_other(monkeypatch):
    import probes.features as module

    found, _ = made(n=50)
    rng = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (50, 7), generator=rng).double() * 2 - 1
    x = found.x.transpose(0, 1)
    together = newton(x, signs, 1.0, False)
    monkeypatch.setattr(module, "MEMORY", {"cpu": 8 * 50 * 7 * 3})  # three problems at a time
    cut = newton(x, signs, 1.0, False)
    for i in range(7):
        alone = newton(x, signs[:, i : i + 1], 1.0, False)
        for a, b, c in zip(together[:2], alone[:2], cut[:2], strict=True):
            torch.testing.assert_close(a[:, i], b[:, 0], rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(c[:, i], b[:, 0], rtol=1e-8, atol=1e-8)


def test_zero_columns_get_no_weight():
    found, y = made()
    x = torch.nn.functional.pad(found.x, (0, 2))
    for standardise in (False, True):
        a = fit_logistic(found, y, standardise=standardise)
        b = fit_logistic(HeadFeatures.of(x), y, standardise=standardise)
        torch.testing.assert_close(b.coef[:, :6], a.coef)
        assert bool((b.coef[:, 6:] == 0).all())


def test_bad_input_is_refused():
    found, y = made(n=9)
    with pytest.raises(InputError, match="two classes apart; got 3"):
        fit_logistic(found, [0, 1, 2] * 3)
    with pytest.raises(InputError, match="at least two classes; all 9 labels are 1"):
        fit_logistic(found, [1] * 9)
    for C in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="C must be a positive"):
            fit_logistic(found, y, C=C)
