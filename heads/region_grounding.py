"""Grounded heads: of what a head sees of the image, how much lies where the answer is.

    share    Σ_{j in the box} A[last, j] / Σ_{j in the image} A[last, j]      in [0, 1], the score
    pointing 1 if the strongest patch of the image touches the box, else 0

A patch belongs to the box if it overlaps it at all (as in the published heat maps). The query is
the last token of the prompt. The null is the box's share of the image's patches. Heads that hardly
look at the image (less than `least` of their mass) point at nothing: both are 0 for them.

With `measure=pointing` the score is the pointing accuracy; the other number is among the extras.

Source: Bi et al. 2025 (CVPR), region heat; Zhang et al. 2018 (IJCV), pointing game.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from heads.sight import LAST, seen_by, with_last
from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.readings import Reading, Rows

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

MEASURES = ("share", "pointing")


@DETECTORS.register("region-grounding")
@dataclass(frozen=True)
class RegionGrounding(ReadingDetector):
    """Share of image mass in the box that matters; see the module's docstring.

    Attributes:
        measure: `share` or `pointing`.
        region: span of the patches that touch the box.
        span: span of the image.
        least: image mass below which a head does not look at the image.
    """

    measure: str = "share"
    region: str = "thing"
    span: str = "image"
    least: float = 0.05

    name: ClassVar[str] = "region-grounding"
    summary: ClassVar[str] = "looks at the part of the image that holds the answer"
    citation: ClassVar[str] = "Bi et al. 2025, CVPR; Zhang et al. 2018, IJCV"
    unit: ClassVar[str] = "share of the image mass in the box"
    threshold: ClassVar[float] = 0.5
    no_evidence: ClassVar[str] = "gives the box no more than its share of the patches"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image", "thing")

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(
                f"region-grounding:measure must be share or pointing; got {self.measure!r}"
            )
        if not 0 <= self.least <= 1:
            raise InputError(f"region-grounding:least lies in 0..1; got {self.least}")

    def prepare(self, prompt: Prompt) -> Prompt:
        """See `ReadingDetector`."""
        return with_last(prompt)

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"row": Rows(LAST)}

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        row = answers["row"][..., 0, :]
        share = row.new_full(row.shape[:3], math.nan)
        pointing, null = share.clone(), share.clone()
        batch = seen_by(batch, tower)
        regions = batch.positions(self.region)
        for b, (image, region) in enumerate(zip(batch.positions(self.span), regions, strict=True)):
            inside = [place in set(region) for place in image]
            seen = row[b][..., image]
            hit = seen.new_tensor(inside)
            looks = seen.sum(-1) >= self.least
            share[b] = ((seen * hit).sum(-1) / seen.sum(-1)).where(looks, seen.new_zeros(()))
            pointing[b] = hit[seen.argmax(-1)].where(looks, seen.new_zeros(()))
            null[b] = sum(inside) / len(image)
            for out in (share, pointing, null):
                out[b].masked_fill_(seen.isnan().any(-1), math.nan)
        if self.measure == "pointing":
            return Outcome(pointing, null, {"share": share})
        return Outcome(share, null, {"pointing": pointing})
