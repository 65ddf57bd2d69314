"""Vision-aware heads: heads whose output differs when the image is taken away.

    VHD_i = ‖z_i(with the image) − z_i(without)‖₂ at the last token        raw, the published form
            ‖z_i − z_i′‖ / (‖z_i‖ + ‖z_i′‖)                                 relative, in [0, 1]
            1 − cos(z_i, z_i′)                                              cosine, in [0, 2]

Raw distances favour heads with large outputs. Leaving the image out moves the tokens after it up,
so that VHD holds an effect of position beside that of the image. The null is that effect alone: the
same distance between the prompt without the image and the prompt whose image is hidden from all
other tokens but keeps its place. In layers after the first every head that reads a changed stream
diverges a little; what matters is how much, and whether ablating the head changes the answer.

Differences below 1e-5 of the outputs' size are rounding and count as 0.

Extras: `selected`, whether VHR would reinforce the head on that example: VHD above the median of
its layer, where VHD counts as 0 for outliers (VHD and ‖z_i′‖² both above mean + σ of the layer).

Source: He et al. 2025, arXiv 2412.13949, equations 3 to 8.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, WatchingDetector
from heads.sight import last_z, left_out
from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe.hide import unseen
from interp.scores import HeadScores

if TYPE_CHECKING:
    from interp.model import Model

MEASURES = ("raw", "relative", "cosine")


@DETECTORS.register("vision-head-divergence")
@dataclass(frozen=True)
class VisionHeadDivergence(WatchingDetector):
    """Change of a head's output when the image is left out; see the module's docstring.

    Attributes:
        measure: `raw`, `relative` or `cosine`.
        span: what is left out.
    """

    measure: str = "raw"
    span: str = "image"

    name: ClassVar[str] = "vision-head-divergence"
    summary: ClassVar[str] = "puts out something else when the image is taken away"
    citation: ClassVar[str] = "He et al. 2025, arXiv 2412.13949, section 3"
    unit: ClassVar[str] = "distance of z with and without the image"
    range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    threshold: ClassVar[float] = 1e-3
    no_evidence: ClassVar[str] = "changes no more than the shift of positions explains"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(
                f"vision-head-divergence:measure must be one of {', '.join(MEASURES)}; "
                f"got {self.measure!r}"
            )

    @property
    def passes(self) -> int:
        """With the image, without it, and with it hidden."""
        return 3

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `WatchingDetector`."""
        stack = model.tower(tower) if tower else next(iter(model.towers.values()))
        whole = model.batch(prompts, side="left")
        bare = model.batch([left_out(p, self.span) for p in prompts], side="left")
        seen, blind = last_z(model, stack, whole), last_z(model, stack, bare)
        with unseen(model, stack, prompts, [p.positions(self.span) for p in prompts]):
            masked = last_z(model, stack, whole)
        distance = divergence(seen, blind, self.measure)
        raw = divergence(seen, blind, "raw")
        selected = torch.stack(
            [
                chosen_heads(raw[:, at], blind[:, at].square().sum(-1))[0]
                for at in range(raw.shape[1])
            ],
            dim=1,
        )
        return Outcome(
            distance,
            divergence(masked, blind, self.measure),
            {"selected": selected.to(distance).masked_fill(distance.isnan(), math.nan)},
        )


def divergence(a: Tensor, b: Tensor, measure: str) -> Tensor:
    """Distance of outputs [..., d_v] by one of `MEASURES`; 0 where it is rounding."""
    size, gap = a.norm(dim=-1) + b.norm(dim=-1), (a - b).norm(dim=-1)
    same = gap <= 1e-5 * size
    match measure:
        case "raw":
            value = gap
        case "relative":
            value = gap / size.clamp_min(torch.finfo(size.dtype).tiny)
        case _:
            value = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    out: Tensor = value.masked_fill(same, 0.0).masked_fill(size.isnan(), math.nan)
    return out


def chosen_heads(vhd: Tensor, blind: Tensor, *, outliers: bool = True) -> tuple[Tensor, Tensor]:
    """The heads of one layer above its median, and those that the outlier rule drops.

    Args:
        vhd: ‖z with − z without‖ of each head, [example, head]; NaN where there is no head.
        blind: ‖z without‖², [example, head].
        outliers: whether the rule applies; σ is that of the population.

    >>> chosen, _ = chosen_heads(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), torch.ones(1, 4))
    >>> chosen.tolist()
    [[False, False, True, True]]
    """

    def far(x: Tensor) -> Tensor:
        mean = x.nanmean(-1, keepdim=True)
        return x > mean + (x - mean).square().nanmean(-1, keepdim=True).sqrt()

    dropped = far(vhd) & far(blind) if outliers else torch.zeros_like(vhd, dtype=torch.bool)
    kept = vhd.masked_fill(dropped, 0)
    return kept > kept.nanquantile(0.5, dim=-1, keepdim=True), dropped


def t_vhd(scores: HeadScores, *, k: int = 4) -> np.ndarray:
    """T-VHD of each example: the sum over layers of the k largest divergences.

    Args:
        scores: what the detector returned, `raw`.
        k: heads a layer; the paper leaves it open.

    Returns:
        [example] ≥ 0.
    """
    if k < 1:
        raise InputError(f"k must be at least 1; got {k}")
    total = np.zeros(len(scores.examples))
    layers = np.array([h.layer for h in scores.heads])
    for layer in sorted(set(layers)):
        mine = np.sort(np.nan_to_num(scores.per_example[:, layers == layer]), axis=1)
        total += mine[:, -k:].sum(1)
    return total
