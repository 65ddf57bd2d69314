"""Retrieval heads: while the model copies a needle out, the head's top key is the token copied.

At decoding step t the token w_t is produced; a_t is the head's row of the token just fed. A step
is a hit if j* = argmax a_t lies in the needle and holds w_t.

    published   |distinct needle tokens hit| / |distinct needle tokens|           in [0, 1]
    authors     number of hits / length of the needle                             may exceed 1

The authors' code counts every hit, so that copying one position twice counts twice; the paper's
formula is over sets. Only examples whose answer was produced count (unigram recall of the answer
above `success`); if none succeeds the result is undefined, not zero.

The null is the same count on the decoys: steps whose top key lies in the value of another fact,
per decoy and divided by the length of the needle. A head that looks at whatever is fact-like scores
as high there. Without decoys, a window of filler of the same length takes their place.

Source: Wu et al. 2024, arXiv 2404.15574, section 2; code nightdessert/Retrieval_Head.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from heads.detector import DETECTORS, DecodingDetector, Outcome
from interp.decode import decode
from interp.errors import InputError
from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.model import Model


@DETECTORS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(DecodingDetector):
    """Copying hits while decoding; see the module's docstring.

    Attributes:
        mode: `published` or `authors`.
        success: unigram recall of the answer above which an example counts.
        extra: tokens decoded beyond the length of the answer.
    """

    mode: str = "published"
    success: float = 0.5
    extra: int = 4

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "looks at the token it copies out of a long context"
    citation: ClassVar[str] = "Wu et al. 2024, arXiv 2404.15574, section 2"
    unit: ClassVar[str] = "share of the needle copied by looking at it"
    range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    threshold: ClassVar[float] = 0.1
    no_evidence: ClassVar[str] = "does not look at the needle while it is copied"
    task: ClassVar[str] = "needle"
    needs: ClassVar[tuple[str, ...]] = ("needle",)

    def __post_init__(self) -> None:
        if self.mode not in ("published", "authors"):
            raise InputError(f"retrieval:mode must be published or authors; got {self.mode!r}")

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `DecodingDetector`."""
        answers = [self._answer(p) for p in prompts]
        batch = model.batch(prompts, side="left")
        seen = decode(model, batch, max_new_tokens=max(map(len, answers)) + self.extra, tower=tower)
        values = torch.full(seen.top.shape[:3], math.nan)
        null = values.clone()
        failures = {}
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            produced = seen.tokens[b][: len(answer) + self.extra]
            recall = recall_of(produced, answer)
            if recall <= self.success:
                failures[b] = f"the answer was not produced (recall {recall:.2f})"
                continue
            top = seen.top[b, :, :, : len(produced)].cpu()
            missing = top.isnan().any(-1)
            place = top.nan_to_num(-1).long()
            values[b] = self._hits(prompt, produced, place).masked_fill(missing, math.nan)
            null[b] = _misses(prompt, place, len(prompt.positions("needle"))).masked_fill(
                missing, math.nan
            )
        return Outcome(values, null, {}, failures)

    def _answer(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.answer is not None:
            return prompt.answer
        return tuple(prompt.tokens[i] for i in prompt.positions("needle"))

    def _hits(self, prompt: Prompt, produced: tuple[int, ...], top: torch.Tensor) -> torch.Tensor:
        """Score [layer, head] from the top keys [layer, head, step]."""
        needle = prompt.positions("needle")
        ids = torch.full((len(prompt) + len(produced) + 1,), -1)
        ids[needle] = torch.tensor([prompt.tokens[i] for i in needle])
        hit = ids[top] == torch.tensor(produced)
        if self.mode == "authors":
            return hit.sum(-1).float() / len(needle)
        tokens = sorted({prompt.tokens[i] for i in needle})
        found = [(hit & (torch.tensor(produced) == token)).any(-1) for token in tokens]
        return torch.stack(found).sum(0).float() / len(tokens)


def recall_of(produced: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Share of the answer's tokens, repeats counted, that were produced."""
    common = Counter(produced) & Counter(answer)
    return sum(common.values()) / len(answer)


def _misses(prompt: Prompt, top: torch.Tensor, length: int) -> torch.Tensor:
    """Steps whose top key lies in a decoy, per decoy and over the needle's length, at most 1."""
    if "decoys" in prompt.spans:
        decoys = prompt.spans["decoys"]
    else:
        rng = random.Random(f"{prompt.id}/{len(prompt)}")
        taken = {i for name in ("needle", "question") if name in prompt.spans
                 for i in prompt.positions(name)}  # fmt: skip
        starts = [
            s for s in range(1, len(prompt) - length) if not taken & set(range(s, s + length))
        ]
        start = rng.choice(starts) if starts else 0
        decoys = ((start, start + length),)
    inside = torch.zeros_like(top, dtype=torch.bool)
    for start, stop in decoys:
        inside |= (top >= start) & (top < stop)
    return (inside.sum(-1).float() / (len(decoys) * length)).clamp_max(1)
