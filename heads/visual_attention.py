"""Visual heads: heads that look at the image, and how narrowly.

    w = Σ_{j in the image} A[last, j]                            image mass, the score, in [0, 1]
    c = 1 − H(p) / log n,   p = A[last, image] / w               concentration, in [0, 1]

The query is the last token of the prompt, from which the first token of the answer is decided; in a
vision tower, the class token. The null is the image's share of the tokens that this query sees,
which is what a head that looks at nothing in particular gives it.

The paper's scripts read precomputed sums and hold no formula for the concentration; this one is 1
for a single patch and 0 for an even spread. Their region heat is in `region-grounding`.

Source: Bi et al. 2025 (CVPR), "Unveiling Visual Perception in Language Models".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from heads.sight import LAST, seen_by, with_last
from interp.prompts import Batch, Prompt
from interp.readings import Reading, Rows

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@DETECTORS.register("visual-attention")
@dataclass(frozen=True)
class VisualAttention(ReadingDetector):
    """Mass on the image; see the module's docstring.

    Attributes:
        span: what counts as the image.
    """

    span: str = "image"

    name: ClassVar[str] = "visual-attention"
    summary: ClassVar[str] = "looks at the image when the answer begins"
    citation: ClassVar[str] = "Bi et al. 2025, CVPR, section 3"
    unit: ClassVar[str] = "mass on the image"
    threshold: ClassVar[float] = 0.2
    no_evidence: ClassVar[str] = "looks at the image no more than its share of the tokens"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

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
        mass = row.new_full(row.shape[:3], math.nan)
        narrow, null = mass.clone(), mass.clone()
        batch = seen_by(batch, tower)
        for b, places in enumerate(batch.positions(self.span)):
            seen = row[b][..., places]
            mass[b] = seen.sum(-1).clamp(max=1)
            narrow[b] = concentration(seen)
            null[b] = len(places) / len(batch.prompts[b])
        return Outcome(mass, null.masked_fill(mass.isnan(), math.nan), {"concentration": narrow})


def concentration(mass: Tensor) -> Tensor:
    """1 − entropy / log n of masses [..., n]; NaN where there is no mass or only one place."""
    n = mass.shape[-1]
    total = mass.sum(-1, keepdim=True)
    p = mass / total
    entropy = -torch.special.xlogy(p, p).sum(-1)
    value = 1 - entropy / math.log(n) if n > 1 else torch.full_like(entropy, math.nan)
    return value.clamp(0, 1).masked_fill(total[..., 0] <= 1e-12, math.nan)
