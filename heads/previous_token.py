"""Previous-token heads: mass on the token just before the query.

    score = mean over queries i ≥ 1 of A[i, i−1]
    null  = the largest of the same means at 2, 3 and 4 tokens back

A perfect head scores 1, a head that spreads over its last w tokens 1/w and is no better than its
null. Sources: Olsson et al. 2022, "In-context Learning and Induction Heads", head activation
evaluators (previous token: mean A[i, i−1]); Wang et al. 2022, arXiv 2211.00593, appendix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from interp.prompts import Batch
from interp.readings import Offset, PairMass, Reading

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@DETECTORS.register("previous-token")
@dataclass(frozen=True)
class PreviousToken(ReadingDetector):
    """Mass on the token before the query; see the module's docstring."""

    name: ClassVar[str] = "previous-token"
    summary: ClassVar[str] = "attends to the token just before"
    citation: ClassVar[str] = "Olsson et al. 2022, head activation evaluators"
    unit: ClassVar[str] = "mean mass on the previous token"
    threshold: ClassVar[float] = 0.4
    no_evidence: ClassVar[str] = "no more mass on the previous token than on nearby ones"
    task: ClassVar[str] = "repeated-tokens"

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {f"back{n}": PairMass(Offset(n)) for n in (1, 2, 3, 4)}

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        others = torch.stack([answers[f"back{n}"].nan_to_num(-1) for n in (2, 3, 4)])
        return Outcome(answers["back1"], others.amax(0).clamp_min(0))
