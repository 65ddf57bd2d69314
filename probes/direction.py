"""Mean-difference directions: from the mean z of one class to that of another.

The direction of Li et al. (2306.03341, "mass mean shift") and Marks and Tegmark (2310.06824,
"difference in means"): θ = (μ₁ − μ₀) / ‖μ₁ − μ₀‖ per head. σ is the standard deviation of z·θ
over all examples, of both classes: it turns a strength in units of σ into one in units of z.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from probes.features import HeadFeatures, read_labels
from probes.probe import PROBES, Probe
from probes.statistics import HeadStatistics, indicators


@dataclass(frozen=True, eq=False)
class Directions:
    """A direction per head.

    Attributes:
        heads: the heads.
        sizes: length of each head's own vector; what follows is zero.
        unit: θ, of length 1; zero for a head whose class means are equal.
        gap: ‖μ₁ − μ₀‖.
        sigma: standard deviation of z·θ (n − 1 below).
        away, towards: the classes that θ points from and to.
    """

    heads: tuple[HeadId, ...]
    sizes: tuple[int, ...]
    unit: Float[Tensor, "head d"]
    gap: Float[Tensor, " head"]
    sigma: Float[Tensor, " head"]
    away: Any
    towards: Any

    def of(self, head: HeadId) -> Float[Tensor, " d"]:
        """θ of one head, of the head's own length."""
        i = self.heads.index(head)
        return self.unit[i, : self.sizes[i]]

    def spread(self, features: HeadFeatures) -> Float[Tensor, " head"]:
        """σ over other examples, such as the tuning set of inference-time intervention.

        Raises:
            InputError: fewer than two examples, or other heads.
        """
        if features.heads != self.heads:
            raise InputError("σ must be taken over features of the same heads")
        if len(features) < 2:
            raise InputError(f"σ needs at least two examples; got {len(features)}")
        along = torch.einsum("nhd,hd->nh", features.x.double(), self.unit)
        return along.std(dim=0)


def mean_difference(
    features: HeadFeatures,
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    towards: Any = None,
) -> Directions:
    """Directions between class means.

    Args:
        features: z of all heads.
        labels: one per example.
        towards: the class that θ points to; the last in sorted order (True, 1) if None. With more
            than two classes it is set against all others together.

    Raises:
        InputError: there are fewer than two classes, or `towards` is none of them.
    """
    classes = read_labels(labels, len(features))
    statistics = HeadStatistics(
        features.heads, features.sizes, len(classes.names),
        classes=classes.names, device=features.x.device,
    )  # fmt: skip
    targets = indicators(list(classes.index), range(len(classes.names)))
    return directions_from_statistics(statistics.add(features, targets), towards=towards)


def directions_from_statistics(statistics: HeadStatistics, *, towards: Any = None) -> Directions:
    """The same from streamed statistics of classes.

    Raises:
        InputError: the statistics are not of classes, one is empty, or `towards` is none of them.
    """
    means, counts = statistics.class_means, statistics.class_counts
    names = statistics.classes
    if towards is None:
        towards = names[-1]
    if towards not in names:
        raise InputError(f"towards must be one of the classes {list(names)}; got {towards!r}")
    to = names.index(towards)
    rest = [i for i in range(len(names)) if i != to]
    share = counts[rest] / counts[rest].sum()
    step = means[to] - torch.einsum("c,chd->hd", share, means[rest])
    gap = step.norm(dim=1)
    unit = torch.where(gap[:, None] > 0, step / gap.clamp_min(1e-300)[:, None], 0.0)
    away = names[rest[0]] if len(rest) == 1 else [names[i] for i in rest]
    return Directions(
        statistics.heads, statistics.sizes, unit, gap, statistics.spread(unit), away, towards
    )


@PROBES.register("mean-difference")
@dataclass(frozen=True)
class NearestMean(Probe):
    """The class whose mean is nearest; for two classes the side of θ on which z lies."""

    name: ClassVar[str] = "mean-difference"
    summary: ClassVar[str] = "nearest class mean"
    citation: ClassVar[str] = "Marks and Tegmark (2310.06824), difference in means"

    def decide(
        self, train: Tensor, labels: Tensor, groups: Tensor, test: Tensor, *, n_classes: int
    ) -> Tensor:
        """See `Probe`."""
        one_hot = torch.nn.functional.one_hot(labels, n_classes).double()  # [example, set, class]
        counts = one_hot.sum(dim=0)
        centre = train.mean(dim=1, keepdim=True)
        sums = torch.einsum("hnd,nsc->hdsc", train - centre, one_hot)
        means = sums / counts.clamp_min(1)
        near = 2 * torch.einsum("hmd,hdsc->hmsc", test - centre, means)
        near = near - means.square().sum(dim=1)[:, None]
        # A class without examples is never the nearest.
        return near.masked_fill(counts == 0, -torch.inf).argmax(dim=-1)
