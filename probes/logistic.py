"""Logistic regression on every head at once, by Newton's method to the optimum.

For each head the fit minimises C·Σ_i log(1 + exp(−s_i(wᵀx_i + b))) + ‖w‖²/2 with s_i = ±1; the
intercept b is not penalised. This is the objective of scikit-learn's LogisticRegression, and C
means the same. The problem is convex; each step solves the Newton equations of all heads together
and is shortened until the objective falls, so the result is the optimum and not where an iteration
limit stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from probes.features import HeadFeatures, chunks, memory_on, read_labels
from probes.probe import PROBES, Probe

TOLERANCE = 1e-10


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """One logistic regression per head.

    Attributes:
        coef: weights on z itself, also if it was standardised for the fit.
        intercept: constants.
        classes: the classes; a positive score means the second.
        converged: whether the gradient vanished, per head.
        iterations: Newton steps taken, per head.
    """

    coef: Float[Tensor, "head d"]
    intercept: Float[Tensor, " head"]
    classes: tuple[Any, Any]
    converged: Bool[Tensor, " head"]
    iterations: Int[Tensor, " head"]

    def decision(self, x: Float[Tensor, "example head d"]) -> Float[Tensor, "example head"]:
        """Log odds of the second class."""
        return torch.einsum("nhd,hd->nh", x.to(self.coef), self.coef) + self.intercept


def fit_logistic(
    features: HeadFeatures,
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    C: float = 1.0,
    standardise: bool = False,
    tolerance: float = TOLERANCE,
    max_iterations: int = 100,
) -> LogisticFit:
    """Fit every head.

    Args:
        features: z of all heads.
        labels: one per example, of two classes.
        C: inverse strength of the penalty, as scikit-learn's.
        standardise: divide each feature by its standard deviation first, so that C means the same
            for heads of any scale; the coefficients returned are for z as it is.
        tolerance: largest entry of the gradient at the optimum, relative to C times the number of
            examples.
        max_iterations: Newton steps at most.

    Raises:
        InputError: C is not positive, or there are not exactly two classes.
    """
    classes = read_labels(labels, len(features))
    if len(classes.names) != 2:
        raise InputError(
            f"a logistic probe tells two classes apart; got {len(classes.names)}",
            hint="use the ridge probe, or one class against the rest",
        )
    _check_c(C)
    signs = torch.from_numpy(classes.index * 2.0 - 1)[:, None].to(features.x.device)
    n, d = len(features), features.x.shape[2]
    parts = []
    for part in chunks(features.x.shape[1], 8 * n * (d + 1), features.x.device):
        x = features.x[:, part].transpose(0, 1).double()
        parts.append(newton(x, signs, C, standardise, tolerance, max_iterations))
    coef, intercept, done, steps = (torch.cat(p) for p in zip(*parts, strict=True))
    names = (classes.names[0], classes.names[1])
    return LogisticFit(coef[:, 0], intercept[:, 0], names, done[:, 0], steps[:, 0])


def newton(
    x: Float[Tensor, "head example d"],
    signs: Float[Tensor, "example labelling"],
    C: float,
    standardise: bool,
    tolerance: float = TOLERANCE,
    max_iterations: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Optimum of every head under every labelling.

    Returns:
        coef [head, labelling, d], intercept, converged and iterations [head, labelling].
    """
    heads, n, d = x.shape
    mean = x.mean(dim=1, keepdim=True)
    scale = x.new_ones(heads, 1, d)
    if standardise:
        scale = x.std(dim=1, keepdim=True, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Centring only moves the intercept, which is free, and keeps the Newton equations well posed.
    rows = torch.cat([(x - mean) / scale, torch.ones_like(x[..., :1])], dim=-1)
    labellings = signs.shape[1]
    theta = x.new_zeros(heads * labellings, d + 1)
    done = torch.zeros(len(theta), dtype=torch.bool, device=x.device)
    steps = torch.zeros(len(theta), dtype=torch.long, device=x.device)
    width = max(1, memory_on(x.device) // (8 * n * (d + 1)))
    for _ in range(max_iterations):
        rest = (~done).nonzero()[:, 0]
        if not len(rest):
            break
        for some in rest.split(width):
            head, labelling = some // labellings, some % labellings
            own = rows if len(some) == heads and labellings == 1 else rows[head]
            theta[some], done[some] = _step(own, signs.T[labelling], theta[some], C, tolerance)
            steps[some] += (~done[some]).long()
    theta = theta.view(heads, labellings, d + 1)
    coef = theta[..., :d] / scale
    intercept = theta[..., d] - (coef * mean).sum(dim=-1)
    return coef, intercept, done.view(heads, -1), steps.view(heads, -1)


def _step(
    rows: Tensor, signs: Tensor, theta: Tensor, C: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """One Newton step of some problems; unchanged where the gradient has vanished.

    Args:
        rows: [problem, example, d + 1], the last column ones.
        signs: [problem, example].
        theta: [problem, d + 1], the last entry the intercept.
        C: inverse strength of the penalty.
        tolerance: largest gradient entry of an optimum, over C·n.
    """
    free = theta.clone()
    free[:, -1] = 0  # the intercept is not penalised
    margin = signs * (rows @ theta[..., None])[..., 0]
    wrong = torch.sigmoid(-margin)
    gradient = free - C * (rows.transpose(1, 2) @ (signs * wrong)[..., None])[..., 0]
    done = gradient.abs().amax(dim=1) <= tolerance * max(1.0, C * rows.shape[1])
    if bool(done.all()):
        return theta, done
    weight = (C * wrong * (1 - wrong)).sqrt()
    half = rows * weight[..., None]
    hessian = half.transpose(1, 2) @ half
    diagonal = torch.ones_like(theta)
    diagonal[:, -1] = 1e-12  # separable far-off points must not make it singular
    hessian.diagonal(dim1=1, dim2=2).add_(diagonal)
    step = torch.linalg.solve(hessian, gradient[..., None])[..., 0]
    along = signs * (rows @ step[..., None])[..., 0]
    slope = (gradient * step).sum(dim=1)
    before = _objective(margin, free, C)
    moved = free - 0.0
    length = torch.ones_like(slope)
    drop = step.clone()
    drop[:, -1] = 0
    for _ in range(40):
        moved = free - length[:, None] * drop
        after = _objective(margin - length[:, None] * along, moved, C)
        # Near the optimum the objective falls by less than its last digit.
        short = after > before - 1e-4 * length * slope + 1e-12 * before.abs()
        if not bool(short.any()):
            break
        length = torch.where(short, length / 2, length)
    new = theta - length[:, None] * step
    return torch.where(done[:, None], theta, new), done


def _objective(margin: Tensor, free: Tensor, C: float) -> Tensor:
    loss = torch.nn.functional.softplus(-margin).sum(dim=1)
    return C * loss + free.square().sum(dim=1) / 2


def _check_c(C: float) -> None:
    if not 0 < C < float("inf"):
        raise InputError(f"C must be a positive number; got {C}")


@PROBES.register("logistic")
@dataclass(frozen=True)
class Logistic(Probe):
    """L2-penalised logistic regression of two classes.

    Attributes:
        C: inverse strength of the penalty.
        standardise: divide features by their standard deviation in the training examples.
    """

    name: ClassVar[str] = "logistic"
    summary: ClassVar[str] = "logistic regression, equal to scikit-learn's optimum; two classes"
    citation: ClassVar[str] = "Li et al. (2306.03341), inference-time intervention, section 3"
    most_classes: ClassVar[int | None] = 2

    C: float = 1.0
    standardise: bool = True

    def __post_init__(self) -> None:
        _check_c(self.C)

    def decide(
        self, train: Tensor, labels: Tensor, groups: Tensor, test: Tensor, *, n_classes: int
    ) -> Tensor:
        """See `Probe`; where training examples are all of one class, that class."""
        first = labels[:1]
        mixed = (labels != first).any(dim=0)
        out = first.expand(test.shape[1], -1).repeat(len(train), 1, 1)
        if bool(mixed.any()):
            signs = labels[:, mixed].double() * 2 - 1
            coef, intercept, _, _ = newton(train, signs, self.C, self.standardise, 1e-6)
            score = test @ coef.transpose(1, 2) + intercept[:, None]
            out[:, :, mixed] = (score > 0).long()
        return out
