"""Attention sinks: a key that nearly every later query attends to.

    α_k   = (1/(T − k)) Σ_{i ≥ k} A[i, k]          the mean over queries that can see k
    score = max over keys k of α_k
    null  = α of a uniform causal head at that key, (1/(T − k)) Σ_{i ≥ k} 1/(i + 1)

A head is a sink head if its mean score reaches ε. α of the last keys rests on a handful of
queries, so that a head that attends to itself has α = 1/(T − k) > ε on the last 1/ε of them; keys
seen by fewer than `queries` queries are therefore left out. The sink may stand anywhere: position
and token are reported beside the score. Content heads that park on BOS when nothing matches are
sinks too, on text without matches: that is what they do there.

Source: Gu et al. 2024, arXiv 2410.10781 (ε = 0.3 on 64 tokens, strictly greater; here ≥).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Batch
from interp.readings import KeyMass, Reading
from interp.scores import HeadScores

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@DETECTORS.register("sink")
@dataclass(frozen=True)
class Sink(ReadingDetector):
    """The largest mean mass that one key receives; see the module's docstring.

    Attributes:
        epsilon: score from which a head is a sink head.
        queries: least number of queries that must see a key for it to count.
    """

    epsilon: float = 0.3
    queries: int = 16

    name: ClassVar[str] = "sink"
    summary: ClassVar[str] = "parks its attention on one key, often the first"
    citation: ClassVar[str] = "Gu et al. 2024, arXiv 2410.10781, section 3"
    unit: ClassVar[str] = "mean mass on the strongest key"
    threshold: ClassVar[float] = 0.3
    no_evidence: ClassVar[str] = "no key receives ε of the mass of those who see it"
    task: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise InputError(f"sink:epsilon must lie in (0, 1); got {self.epsilon}")
        if self.queries < 1 / self.epsilon:
            raise InputError(
                f"sink:queries must be at least 1/epsilon = {1 / self.epsilon:.1f}, or a head that "
                f"attends to itself is a sink; got {self.queries}"
            )

    @property
    def limit(self) -> float:
        """See `Detector`."""
        return self.epsilon

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"alpha": KeyMass()}

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        alpha = answers["alpha"].clone()
        position = alpha.new_full(alpha.shape[:3], math.nan)
        null, best = position.clone(), position.clone()
        failures = {}
        for b, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
            keys = len(prompt) - self.queries + 1
            if keys < 1:
                failures[b] = f"{len(prompt)} tokens, fewer than the {self.queries} queries needed"
                continue
            mine = alpha[b, ..., offset : offset + keys]
            best[b], at = mine.max(-1)
            position[b] = at.to(alpha).masked_fill(best[b].isnan(), math.nan)
            null[b] = _uniform(len(prompt)).to(alpha)[at]
        tokens = position.clone()
        for b, prompt in enumerate(batch.prompts):
            ids = torch.tensor(prompt.tokens, device=tokens.device, dtype=tokens.dtype)
            tokens[b] = ids[position[b].nan_to_num(0).long()].masked_fill(
                position[b].isnan(), math.nan
            )
        return Outcome(best, null, {"position": position, "token": tokens}, failures)


def _uniform(n: int) -> Tensor:
    """α_k of a head that spreads evenly over the keys it sees: [key]."""
    share = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return share.flip(0).cumsum(0).flip(0) / torch.arange(n, 0, -1)


def sink_tokens(scores: HeadScores, model: "Model") -> dict[HeadId, dict[str, int]]:
    """The tokens that each sink head parks on, and on how many examples.

    Args:
        scores: what the sink detector returned.
        model: the model it was run on, for the tokens' texts.

    Returns:
        For each head with a sink verdict: token text (or id, without tokenizer) to count.
    """
    out = {}
    for i, (head, verdict) in enumerate(zip(scores.heads, scores.verdict, strict=True)):
        if verdict != scores.detector:
            continue
        ids = [int(x) for x in scores.extras["token"][:, i] if not math.isnan(x)]
        names = Counter(ids)
        decode = model.tokenizer.convert_ids_to_tokens if model.tokenizer is not None else str
        out[head] = {str(decode(token)): count for token, count in names.most_common()}
    return out
