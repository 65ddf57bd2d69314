"""The score function of one attention call as a rule that can be kept: spans, biases, soft-cap.

What a layer adds to scale·q·k is one of a few things: nothing, a number per key (BLOOM's ALiBi), a
number per distance (ALiBi, T5's relative positions); and the keys that a query sees are one range
(causal, sliding window, a block of its own, a prefix). A mask that is something else has no rule,
and the layer is kept by its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.seam.calls import MASKED, AttnCall

_CLOSE = 1e-4


@dataclass(frozen=True)
class Rule:
    """How a layer turns q and k into its pattern.

    Attributes:
        scale: factor on q·k.
        softcap: s becomes softcap·tanh(s/softcap), or None.
        sinks: [head] learned sink logits, or None.
        low: [query] first key that each query sees.
        high: [query] the key after the last that it sees.
        bias_key: [head, key] added to scores, or None.
        bias_offset: [head, n_query + n_key − 1] added by j − i + n_query − 1, or None.
    """

    scale: float
    softcap: float | None
    sinks: Float[Tensor, " head"] | None
    low: Int[Tensor, " query"]
    high: Int[Tensor, " query"]
    bias_key: Float[Tensor, "head key"] | None = None
    bias_offset: Float[Tensor, "head offset"] | None = None

    def scores(
        self, q: Float[Tensor, "head row d"], k: Float[Tensor, "head key d"], start: int
    ) -> tuple[Float[Tensor, "head row key"], Tensor]:
        """Scores of rows from `start` on, −inf where a key is not seen; and what is seen."""
        s = q @ k.transpose(1, 2) * self.scale
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_().mul_(self.softcap)
        rows = torch.arange(start, start + q.shape[1], device=q.device)
        keys = torch.arange(k.shape[1], device=q.device)
        if self.bias_key is not None:
            s += self.bias_key[:, None].to(s)
        if self.bias_offset is not None:
            place = keys[None] - rows[:, None] + len(self.low) - 1
            s += self.bias_offset.to(s)[:, place]
        seen = (keys >= self.low[rows, None]) & (keys < self.high[rows, None])
        return s.masked_fill_(~seen, float("-inf")), seen

    def lse(self, s: Float[Tensor, "head row key"], heads: slice) -> Float[Tensor, "head row"]:
        """Log-sum-exp of whole rows, learned sinks included; 0 in rows that see no key."""
        out = torch.logsumexp(s, -1)
        if self.sinks is not None:
            out = torch.logaddexp(out, self.sinks[heads].to(out)[:, None])
        return torch.where(out.isfinite(), out, torch.zeros_like(out))

    def of(self, heads: slice) -> "Rule":
        """The rule of some heads."""
        part = {
            name: None if value is None else value[heads]
            for name, value in (("bias_key", self.bias_key), ("bias_offset", self.bias_offset))
        }
        return replace(self, **part)


@torch.no_grad()
def rule_of(call: AttnCall, b: int = 0) -> Rule | str:
    """The rule of one example of a call, or why there is none."""
    if call.q is None or call.k is None:
        return "only the pattern of this layer is reached, not its queries and keys"
    n_query, n_key = call.n_query, call.n_key
    device = call.z.device
    low = torch.zeros(n_query, dtype=torch.int32, device=device)
    high = torch.full_like(low, n_key)
    if call.causal:
        high = (torch.arange(n_query, device=device, dtype=torch.int32) + 1).clamp(max=n_key)
    rule = Rule(call.scale, call.softcap, call.sinks, low, high)
    if call.mask is None:
        return rule
    mask = call.mask[b if call.mask.shape[0] > 1 else 0]
    mask = mask.expand(mask.shape[0], n_query, n_key)
    seen = mask if mask.dtype == torch.bool else mask > MASKED / 2
    if mask.dtype != torch.bool:
        # Half precision masks by its own least number, which is far above MASKED.
        seen &= mask > torch.finfo(mask.dtype).min / 2
    if (seen != seen[:1]).any():
        return "its heads do not see the same keys"
    spans = _spans(seen[0])
    if spans is None:
        return "the keys that a query sees are not one range"
    rule = replace(rule, low=spans[0], high=torch.minimum(spans[1], high))
    if mask.dtype == torch.bool or not (mask * seen).any():
        return rule
    return _biased(rule, mask.float(), seen[0], call.n_heads)


def _spans(seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """First key and the one after the last of each row, if all between are seen."""
    count = seen.sum(-1, dtype=torch.int32)
    low = seen.to(torch.uint8).argmax(-1).to(torch.int32)
    last = seen.shape[-1] - seen.flip(-1).to(torch.uint8).argmax(-1).to(torch.int32)
    high = torch.where(count > 0, last, low)
    return (low, high) if bool((high - low == count).all()) else None


def _biased(rule: Rule, mask: Tensor, seen: Tensor, n_heads: int) -> Rule | str:
    """The rule with what the mask adds to the keys that are seen."""
    heads, n_query, n_key = mask.shape
    seen = seen & (torch.arange(n_key, device=mask.device) < rule.high[:, None])
    tolerance = _CLOSE * max(1.0, float(mask[:, seen].abs().max()))
    # The last query that sees a key has its number, if it depends on the key alone.
    reached = seen.any(0)
    last = n_query - 1 - seen.flip(0).to(torch.uint8).argmax(0)
    by_key = mask[:, last, torch.arange(n_key, device=mask.device)] * reached
    if bool((((mask - by_key[:, None]) * seen).abs() <= tolerance).all()):
        return replace(rule, bias_key=by_key.expand(n_heads, -1).contiguous())
    rows, keys = seen.nonzero(as_tuple=True)
    place = keys - rows + n_query - 1
    by_offset = mask.new_zeros(heads, n_query + n_key - 1)
    by_offset[:, place] = mask[:, rows, keys]
    if bool(((mask[:, rows, keys] - by_offset[:, place]).abs() <= tolerance).all()):
        return replace(rule, bias_offset=by_offset.expand(n_heads, -1).contiguous())
    return "what its mask adds depends on neither the key nor the distance alone"


def joined(calls: Sequence[AttnCall]) -> tuple[Tensor, Tensor, Tensor, Rule] | str:
    """Rows and calls one after another as one sequence, in which each sees only itself.

    Vision towers hold an image or tile a row, or call attention once a window.

    Returns:
        q [head, query, d], k [kv head, key, d], v [kv head, key, d] and the rule; or why not.
    """
    qs, ks, vs, rules = [], [], [], []
    for call in calls:
        for b in range(call.z.shape[0]):
            rule = rule_of(call, b)
            if isinstance(rule, str):
                return rule
            assert call.q is not None and call.k is not None and call.v is not None
            qs.append(call.q[b])
            ks.append(call.k[b])
            vs.append(call.v[b])
            rules.append(rule)
    first = rules[0]
    if len(rules) > 1 and any(r.bias_key is not None or r.bias_offset is not None for r in rules):
        return "rows of their own with position biases"
    starts = torch.tensor([0, *(k.shape[1] for k in ks)]).cumsum(0).tolist()
    low = torch.cat([r.low + at for r, at in zip(rules, starts, strict=False)])
    high = torch.cat([r.high + at for r, at in zip(rules, starts, strict=False)])
    return torch.cat(qs, 1), torch.cat(ks, 1), torch.cat(vs, 1), replace(first, low=low, high=high)
