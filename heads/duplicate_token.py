"""Duplicate-token heads: mass on earlier copies of the query's token.

    score = mean over queries with an earlier copy of Σ A[i, j] over all copies j < i
    null  = the same entries on the same prompt with its tokens shuffled

A perfect head scores 1. The shuffled control keeps positions and destroys repetition, so a head
that looks back by a fixed lag scores the same on both. Source: Wang et al. 2022, arXiv 2211.00593
(duplicate-token heads); TransformerLens's `detect_head` divides by all mass instead, so that its
perfect score depends on how many queries have a copy.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector, shuffled
from interp.prompts import Batch, Prompt
from interp.readings import PairMass, Reading, Same

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@DETECTORS.register("duplicate-token")
@dataclass(frozen=True)
class DuplicateToken(ReadingDetector):
    """Mass on earlier copies of the token; see the module's docstring."""

    name: ClassVar[str] = "duplicate-token"
    summary: ClassVar[str] = "attends to earlier copies of the same token"
    citation: ClassVar[str] = "Wang et al. 2022, arXiv 2211.00593, section 3"
    unit: ClassVar[str] = "mean mass on earlier copies"
    threshold: ClassVar[float] = 0.4
    no_evidence: ClassVar[str] = "no more mass on copies than on the same places without copies"
    task: ClassVar[str] = "repeated-tokens"
    task_params: ClassVar[Mapping[str, object]] = {"vary": True}

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"copies": PairMass(Same(0))}

    def control(self, prompt: Prompt, rng: random.Random) -> Prompt:
        """See `ReadingDetector`."""
        return shuffled(prompt, rng)

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        assert control is not None
        return Outcome(answers["copies"], control["copies"])
