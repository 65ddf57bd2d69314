"""Ridge regression on every head at once, with exact leave-one-out predictions.

For each head the fit minimises Σ_i ‖y_i − b − Wᵀx_i‖² + λ‖W‖²; the intercept b is not penalised.
With X centred and XᵀX = V S Vᵀ, one eigendecomposition per head serves every λ and every target.
Nothing is refitted to predict an example without itself. With the hat matrix
H = 11ᵀ/n + X (XᵀX + λ)⁻¹ Xᵀ and residuals r = y − Hy, the residuals of a fit without the group g
are (I − H_gg)⁻¹ r_g, exactly (for one example r_i / (1 − h_ii): Allen 1974, PRESS; Hastie et al.,
The Elements of Statistical Learning, 7.10). λ is the same number in all these fits.

λ is chosen per head from a grid by the mean squared leave-one-out (or leave-one-group-out) error.
A penalty is by default a multiple of the head's mean eigenvalue tr(XᵀX)/d, so that it means the
same for heads of any scale (d counts the features that vary).

From streamed statistics there are no residuals of single examples, hence no leave-one-out: the
fit is the same closed form, and λ is chosen by generalised cross-validation (Golub, Heath and
Wahba 1979), which needs sums only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from probes.features import HeadFeatures, chunks, read_groups
from probes.probe import PROBES, Probe

if TYPE_CHECKING:
    from probes.statistics import HeadStatistics

GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """One ridge regression per head.

    Attributes:
        coef: weights on z.
        intercept: constants.
        penalty: λ of each head, absolute.
        error: mean squared error by which λ was chosen, for each penalty of the grid.
        held_out: prediction of each example by the fit without its group; None from statistics.
        criterion: what `error` is: "leave-one-out", "leave-one-group-out" or "generalised
            cross-validation".
    """

    coef: Float[Tensor, "head d target"]
    intercept: Float[Tensor, "head target"]
    penalty: Float[Tensor, " head"]
    error: Float[Tensor, "head penalty"]
    held_out: Float[Tensor, "example head target"] | None
    criterion: str

    def predict(self, x: Float[Tensor, "example head d"]) -> Float[Tensor, "example head target"]:
        """Predictions for further examples."""
        return torch.einsum("nhd,hdt->nht", x.to(self.coef), self.coef) + self.intercept


def fit_ridge(
    features: HeadFeatures,
    targets: Float[Tensor, "example target"] | Float[Tensor, " example"],
    *,
    penalties: Sequence[float] = GRID,
    relative: bool = True,
    groups: Sequence[Any] | np.ndarray | Tensor | None = None,
) -> RidgeFit:
    """Fit every head and predict every example without itself.

    Args:
        features: z of all heads.
        targets: numbers to predict; several columns share one λ per head.
        penalties: grid from which λ is chosen; one number fixes it.
        relative: penalties are multiples of the head's mean eigenvalue tr(XᵀX)/d, X centred; else
            they are λ itself, as scikit-learn's `alpha`.
        groups: examples to leave out together; each on its own if None.

    Raises:
        InputError: a penalty is not positive, a target is not finite, or there are fewer than two
            examples or groups.
    """
    y = targets.double() if targets.dim() == 2 else targets.double()[:, None]
    y = y.to(features.x.device)
    if len(y) != len(features):
        raise InputError(f"{len(features)} examples need as many targets; got {len(y)}")
    if not bool(torch.isfinite(y).all()):
        raise InputError("targets must be finite")
    names, codes = read_groups(range(len(y)) if groups is None else groups, len(y))
    if len(names) < 2:
        raise InputError(f"leaving one out needs at least two examples or groups; got {len(names)}")
    criterion = "leave-one-out" if len(names) == len(y) else "leave-one-group-out"
    parts = []
    n, d = len(features), features.x.shape[2]
    for part in chunks(features.x.shape[1], 8 * n * d, features.x.device):
        x = features.x[:, part].transpose(0, 1).double()
        parts.append(
            solve(x, y[:, None], torch.from_numpy(codes), check_penalties(penalties), relative)
        )
    coef, intercept, penalty, error, held = (torch.cat(p) for p in zip(*parts, strict=True))
    return RidgeFit(
        coef[:, :, 0], intercept[:, 0], penalty[:, 0], error[:, 0], held[:, :, 0].transpose(0, 1),
        criterion,
    )  # fmt: skip


def ridge_from_statistics(
    statistics: "HeadStatistics", *, penalties: Sequence[float] = GRID, relative: bool = True
) -> RidgeFit:
    """The same fit from streamed statistics; λ by generalised cross-validation.

    Args:
        statistics: of all examples.
        penalties: see `fit_ridge`; with one number the fit equals that of `fit_ridge`.
        relative: see `fit_ridge`.

    Raises:
        InputError: a penalty is not positive, or there are fewer than two examples.
    """
    grid, n = check_penalties(penalties), statistics.n
    if n < 2:
        raise InputError(f"a fit needs at least two examples; got {n}")
    s, v = _spectrum(statistics.scatter)
    lam = _absolute(grid, statistics.scatter, relative)
    b = v.transpose(1, 2) @ statistics.cross  # [head, d, target]
    shrink = 1 / (s[:, :, None] + lam[:, None])  # [head, d, penalty]
    # ‖y − fit‖² = yᵀy − 2 bᵀ(S + λ)⁻¹b + bᵀ(S + λ)⁻¹ S (S + λ)⁻¹b, target by target.
    energy = b.square().sum(2)[:, :, None]
    rss = statistics.target_scatter.sum() - (energy * shrink * (2 - s[:, :, None] * shrink)).sum(1)
    freedom = 1 + (s[:, :, None] * shrink).sum(1)
    count = statistics.cross.shape[2]
    error = rss.clamp_min(0) / (n * count) / (1 - freedom / n).square()
    error = torch.where(freedom < n, error, torch.inf)
    best = error.argmin(1)
    chosen = lam.gather(1, best[:, None])[:, 0]
    coef = v @ (b * shrink.gather(2, best[:, None, None].expand(-1, shrink.shape[1], 1)))
    shift = torch.einsum("hd,hdt->ht", statistics.mean, coef)
    return RidgeFit(
        coef, statistics.target_mean - shift, chosen, error, None, "generalised cross-validation"
    )


Solved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def solve(
    x: Float[Tensor, "head example d"],
    y: Float[Tensor, "example set target"],
    groups: Int[Tensor, " example"],
    penalties: Float[Tensor, " penalty"],
    relative: bool,
    *,
    held: bool = True,
) -> Solved:
    """Ridge fits of some heads to several sets of targets; each set has a λ of its own.

    Returns:
        coef [head, d, set, target], intercept [head, set, target], penalty [head, set], error
        [head, set, penalty], held-out predictions [head, example, set, target] (empty if not
        `held`).
    """
    heads, n, _ = x.shape
    mean = x.mean(dim=1, keepdim=True)
    centred = x - mean
    gram = centred.transpose(1, 2) @ centred
    s, v = _spectrum(gram)
    axes = centred @ v  # [head, example, d], columns orthogonal
    lam = _absolute(penalties.to(x), gram, relative)
    leave = _Leave(axes, 1 / (s[:, :, None] + lam[:, None]), groups.to(x.device))
    offset = y.mean(dim=0)
    parts = []
    each = 8 * heads * n * y.shape[2] * len(penalties) * 2
    for some in chunks(y.shape[1], each, x.device, factor=16):
        parts.append(leave.fitted(y[:, some] - offset[some], held=held))
    best, error, weights, residual = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    coef = torch.einsum("hde,hset->hdst", v, weights)
    intercept = offset - torch.einsum("hd,hdst->hst", mean[:, 0], coef)
    out = y - residual.transpose(1, 2) if held else residual
    return coef, intercept, lam.gather(1, best), error, out


class _Leave:
    """Leave-one-group-out errors of some heads on the axes of their Gram matrix.

    Args:
        axes: centred features on the eigenvectors [head, example, d].
        shrink: 1 / (eigenvalue + λ) [head, d, penalty].
        groups: [example].
    """

    def __init__(self, axes: Tensor, shrink: Tensor, groups: Tensor) -> None:
        self.axes, self.shrink = axes, shrink
        _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
        order = index.argsort(stable=True)
        starts = sizes.cumsum(0) - sizes
        # Groups of equal size are solved together: rows [group, member].
        self.rows = [
            order[starts[sizes == m][:, None] + torch.arange(int(m), device=order.device)]
            for m in sizes.unique().tolist()
        ]
        self.single = axes.square() @ shrink + 1 / axes.shape[1]  # h_ii, [head, example, penalty]

    def fitted(self, y: Tensor, *, held: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best penalty, errors, weights and held-out residuals for centred targets.

        Args:
            y: [example, set, target].
            held: whether residuals are wanted.
        """
        (heads, n, d), k = self.axes.shape, self.shrink.shape[2]
        sets, targets = y.shape[1:]
        flat = y.reshape(n, -1)
        b = self.axes.transpose(1, 2) @ flat  # [head, d, set·target]
        scaled = self.shrink[:, :, :, None] * b[:, :, None]  # [head, d, penalty, set·target]
        fit = (self.axes @ scaled.reshape(heads, d, -1)).view(heads, n, k, -1)
        residual = self._left_out(flat[None, :, None] - fit).view(heads, n, k, sets, targets)
        error = residual.square().mean(dim=(1, 4)).transpose(1, 2)  # [head, set, penalty]
        best = error.argmin(dim=2)
        pick = best[:, None, None, :, None]
        weights = scaled.view(heads, d, k, sets, targets)
        weights = weights.gather(2, pick.expand(-1, d, 1, -1, targets))[:, :, 0]
        kept = residual.new_empty(heads, sets, 0, targets)
        if held:
            kept = residual.gather(2, pick.expand(-1, n, 1, -1, targets))[:, :, 0].transpose(1, 2)
        return best, error, weights.transpose(1, 2), kept

    def _left_out(self, residual: Tensor) -> Tensor:
        """(I − H_gg)⁻¹ r_g for every group; [head, example, penalty, column]."""
        if len(self.rows) == 1 and self.rows[0].shape[1] == 1:
            return residual / (1 - self.single)[..., None]
        out = torch.empty_like(residual)
        for rows in self.rows:
            m = rows.shape[1]
            if m == 1:
                i = rows[:, 0]
                out[:, i] = residual[:, i] / (1 - self.single[:, i])[..., None]
                continue
            for k in range(self.shrink.shape[2]):
                out[:, rows, k] = self._block(rows, k, residual[:, rows, k])
        return out

    def _block(self, rows: Tensor, k: int, r: Tensor) -> Tensor:
        """Groups of one size and one penalty; r is [head, group, member, column]."""
        root = self.shrink[:, None, None, :, k].sqrt()
        a = self.axes[:, rows] * root  # H_gg = a aᵀ + 1/n
        a = torch.cat([a, torch.full_like(a[..., :1], 1 / math.sqrt(self.axes.shape[1]))], dim=-1)
        if rows.shape[1] <= a.shape[-1]:
            solved: Tensor = torch.linalg.solve(_eye_minus(a @ a.transpose(-1, -2)), r)
            return solved
        # A large group: the same inverse through a matrix of d + 1 rows (Woodbury).
        inner = torch.linalg.solve(_eye_minus(a.transpose(-1, -2) @ a), a.transpose(-1, -2) @ r)
        out: Tensor = r + a @ inner
        return out


def _eye_minus(h: Tensor) -> Tensor:
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return eye - h


def _spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    s, v = torch.linalg.eigh(gram)
    return s.clamp_min(0), v


def _absolute(penalties: Tensor, gram: Tensor, relative: bool) -> Tensor:
    """λ [head, penalty]; a head whose z never varies gets the plain number."""
    if not relative:
        return penalties.to(gram)[None].expand(len(gram), -1)
    variances = gram.diagonal(dim1=1, dim2=2)
    # Zeros behind the vectors of small heads must not count as dimensions.
    count = (variances > 0).sum(dim=1).clamp_min(1)
    scale = (variances.sum(dim=1) / count)[:, None]
    return torch.where(scale > 0, scale, torch.ones_like(scale)) * penalties.to(gram)


def check_penalties(penalties: Sequence[float]) -> Float[Tensor, " penalty"]:
    """The grid as a tensor.

    Raises:
        InputError: it is empty, or a penalty is not positive and finite.
    """
    grid = torch.tensor([float(p) for p in penalties], dtype=torch.float64)
    if not len(grid) or not bool((torch.isfinite(grid) & (grid > 0)).all()):
        raise InputError(f"penalties must be positive numbers; got {list(penalties)}")
    return grid


@PROBES.register("ridge")
@dataclass(frozen=True)
class Ridge(Probe):
    """Regression on ±1 per class; the class of the largest prediction.

    Attributes:
        penalties: grid of multiples of the head's mean eigenvalue, chosen from by the error of
            leaving out one group of the training examples.
    """

    name: ClassVar[str] = "ridge"
    summary: ClassVar[str] = "ridge regression on ±1, penalty by leave-one-group-out"
    citation: ClassVar[str] = "Hoerl and Kennard (1970); leave-one-out: Allen (1974)"

    penalties: tuple[float, ...] = GRID

    def __post_init__(self) -> None:
        check_penalties(self.penalties)

    def decide(
        self, train: Tensor, labels: Tensor, groups: Tensor, test: Tensor, *, n_classes: int
    ) -> Tensor:
        """See `Probe`."""
        classes = torch.arange(1 if n_classes == 2 else 0, n_classes, device=labels.device)
        y = torch.where(labels[:, :, None] == classes, 1.0, -1.0).double()
        coef, intercept, _, _, _ = solve(
            train, y, groups, check_penalties(self.penalties), True, held=False
        )
        heads, d = coef.shape[:2]
        found = (test @ coef.reshape(heads, d, -1)).view(heads, -1, *coef.shape[2:])
        found = found + intercept[:, None]
        return (found[..., 0] > 0).long() if n_classes == 2 else found.argmax(dim=-1)
