"""Inactive visual heads: heads that leave the image alone all along the prompt.

    r = S_image / S_rest,   S = Σ over query rows of the mass on those keys
    score of an example: 1 if r ≤ ratio (the head is inactive there), else 0

The rest is all the text, the system's part included. A head is called inactive if it is so on at
least 1 − `vote` of the examples: by the authors' rule a head is kept if it is active on more than
40 of 100. All rows count, those of the image among them; `query` names others.

The null is the same of a head that attends evenly to all it can see. Where even that one is
inactive, the image is too small a part of the prompt for silence to mean anything, and no head is
called inactive. Extra: `image`, the mean mass on the image over the rows.

The published thresholds are tuned by model and by how much shall be pruned (0.2, 0.077 and 0.035
leave a quarter, half and three quarters of a model of 40 heads a layer); the default is the middle
one. The published code counts on 35 system tokens and 576 image tokens, keeps the first two layers
whatever they do, and judges Qwen2-VL and InternVL by one step of one sample; here the spans are
those of the prompt, and every layer and example counts.

Source: Zhang et al. 2024, arXiv 2410.06169 (YOPO); code ZhangAIPI/YOPO_MLLM_Pruning.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from interp.errors import InputError
from interp.prompts import Batch, Prompt, Range
from interp.readings import Reading, SpanMass

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

REST = "all but the "


@DETECTORS.register("inactive-visual")
@dataclass(frozen=True)
class InactiveVisual(ReadingDetector):
    """Votes for a head that ignores the image; see the module's docstring.

    Attributes:
        ratio: image mass, as a multiple of the rest, up to which a head is inactive.
        vote: share of examples on which a head may be active and still be called inactive.
        span: what counts as the image.
        query: span of the rows.
    """

    ratio: float = 0.077
    vote: float = 0.4
    span: str = "image"
    query: str = "all"

    name: ClassVar[str] = "inactive-visual"
    summary: ClassVar[str] = "leaves the image alone, though it is a good part of the prompt"
    citation: ClassVar[str] = "Zhang et al. 2024, arXiv 2410.06169, section 3"
    unit: ClassVar[str] = "share of examples on which it is inactive"
    threshold: ClassVar[float] = 0.6
    no_evidence: ClassVar[str] = "looks at the image, or the image is too small to tell"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if self.ratio < 0 or not 0 <= self.vote < 1:
            raise InputError(
                "inactive-visual:ratio must not be negative and vote lies in [0, 1); "
                f"got {self.ratio} and {self.vote}"
            )

    @property
    def limit(self) -> float:
        """See `Detector`."""
        return 1 - self.vote

    def prepare(self, prompt: Prompt) -> Prompt:
        """See `ReadingDetector`."""
        rest = _without(len(prompt), prompt.positions(self.span))
        return replace(prompt, spans={**prompt.spans, REST + self.span: rest})

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {
            "image": SpanMass(self.span, self.query),
            "rest": SpanMass(REST + self.span, self.query),
        }

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        image, rest = answers["image"], answers["rest"]
        undefined = image.isnan() | rest.isnan()
        # By products: a head that sees nothing but the image has no ratio.
        silent = (image <= self.ratio * rest).to(image).masked_fill(undefined, math.nan)
        null = silent.clone()
        for b, prompt in enumerate(batch.prompts):
            for at, layer in enumerate(tower.layers):
                seen = evenly(prompt, self.span, self.query, causal=layer.causal)
                null[b, at] = float(seen <= self.ratio * (1 - seen))
        return Outcome(silent, null.masked_fill(undefined, math.nan), {"image": image.clamp(max=1)})


def _without(n: int, gone: Sequence[int]) -> tuple[Range, ...]:
    """Ranges of the n positions that are not among some, which rise."""
    edges = [-1, *gone, n]
    return tuple((a + 1, b) for a, b in itertools.pairwise(edges) if b > a + 1)


def evenly(prompt: Prompt, span: str, query: str, *, causal: bool) -> float:
    """Mean over the rows of the share of visible keys that lie in a span; NaN without rows."""
    keys, rows = set(prompt.positions(span)), prompt.positions(query)
    before = [0]
    for i in range(len(prompt)):
        before.append(before[-1] + (i in keys))
    last = [i if causal else len(prompt) - 1 for i in rows]
    return sum(before[i + 1] / (i + 1) for i in last) / len(rows) if rows else math.nan
