"""Induction heads: attend to what followed an earlier copy of the token, and copy it.

    prefix  = mean over queries with an earlier copy of Σ A[i, j+1] over all copies j < i
    copying = mean over some of these queries of
              relu(l_t) / Σ_s relu(l_s)  −  relu(−l_t) / Σ_s relu(−l_s)
    score   = prefix where copying ≥ `copies`, else 0, per example
    null    = prefix at the same entries on the shuffled prompt

l are the logits that the head's own output reaches on the direct path (through the weight of the
final norm; minus the mean logit), s runs over the tokens of the sample and t is the token that
followed the latest copy. Copying lies in [−1, 1]: 1 if the output raises t alone, −1 if it lowers
t alone, 0 if it writes nothing. A head that attends without copying is thereby told apart.

Source: Olsson et al. 2022, head activation evaluators. Their prefix matching averages over
matching entries, where a perfect head scores 2/R on R copies; `per="entry"` gives that. The sign
of the key's offset is +1, as in their erratum.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector, shuffled
from interp.prompts import Batch, Prompt
from interp.readings import PairMass, Reading, Same, ZValue
from interp.unembed import unembedding

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

_QUERIES = "induction-queries"


@DETECTORS.register("induction")
@dataclass(frozen=True)
class Induction(ReadingDetector):
    """Prefix matching and copying; see the module's docstring.

    Attributes:
        copies: copying score that an example must reach for its prefix score to count.
        queries: queries of each prompt on which copying is measured.
        per: `query` (a perfect head scores 1) or `entry` (2/R on R copies).
    """

    copies: float = 0.05
    queries: int = 8
    per: str = "query"

    name: ClassVar[str] = "induction"
    summary: ClassVar[str] = "attends to what followed an earlier copy, and copies it"
    citation: ClassVar[str] = "Olsson et al. 2022, head activation evaluators"
    unit: ClassVar[str] = "mean mass on the tokens after earlier copies"
    threshold: ClassVar[float] = 0.4
    no_evidence: ClassVar[str] = "does not look after earlier copies, or does not copy"
    task: ClassVar[str] = "repeated-tokens"
    task_params: ClassVar[Mapping[str, object]] = {"vary": True}

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {
            "prefix": PairMass(Same(1), per=self.per),
            "z": ZValue(f"{_QUERIES}-{self.queries}"),
        }

    def prepare(self, prompt: Prompt) -> Prompt:
        """The prompt with the queries on which copying is measured as a span."""
        pairs = Same(1).pairs(prompt)
        rows = sorted(set(pairs[:, 0].tolist()))
        # Spread over the prompt; the last query has seen most copies.
        step = max(1, len(rows) // self.queries)
        chosen = rows[::-1][::step][: self.queries] or [0]
        spans = {**prompt.spans, f"{_QUERIES}-{self.queries}": tuple((i, i + 1) for i in chosen)}
        return replace(prompt, spans=spans)

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
        copying = self._copying(model, tower, batch, answers["z"])
        prefix = answers["prefix"]
        score = torch.where(copying >= self.copies, prefix, prefix * 0)
        score = score.masked_fill(copying.isnan(), float("nan"))  # nothing to copy from: no score
        return Outcome(score, control["prefix"], {"prefix": prefix, "copying": copying})

    def _copying(self, model: "Model", tower: "Tower", batch: Batch, z: Tensor) -> Tensor:
        """Mean copying score [example, layer, head] over the chosen queries."""
        out = unembedding(model)
        layers = tower.layers
        result = z.new_zeros(z.shape[:3])
        for b, prompt in enumerate(batch.prompts):
            pairs = Same(1).pairs(prompt)
            # Pairs are sorted: the last one of a query belongs to its latest copy.
            latest = {int(q): int(k) for q, k in pairs}
            rows = [i for i in prompt.positions(f"{_QUERIES}-{self.queries}") if i in latest]
            if not rows:
                result[b] = float("nan")
                continue
            sample = sorted(set(prompt.tokens))
            place = {token: i for i, token in enumerate(sample)}
            target = torch.tensor([place[prompt.tokens[latest[i]]] for i in rows], device=z.device)
            ids = torch.tensor(sample, device=z.device)
            for at, layer in enumerate(layers):
                w_o = model.w_o(layer).to(z)
                mine = z[b, at, : layer.n_heads, : len(rows), : w_o.shape[1]]
                logits = out.logits(torch.einsum("hne,hed->hnd", mine, w_o), ids)
                share = _share(logits, target) - _share(-logits, target)
                result[b, at, : layer.n_heads] = share.mean(-1)
        return result


def _share(logits: Tensor, target: Tensor) -> Tensor:
    """relu(l_t) / Σ relu(l): [head, query]; 0 where nothing is raised."""
    raised = logits.clamp_min(0)
    total = raised.sum(-1)
    # Rounding noise of a head that writes nothing is not a raised logit.
    mine = raised[:, torch.arange(len(target)), target]
    return torch.where(total > 1e-6, mine / total.clamp_min(1e-6), 0.0)
