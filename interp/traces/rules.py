"""The score function of one attention call as a rule that can be kept: spans, biases, soft-cap.

What a layer adds to scale·q·k is one of a few things: nothing, a number per key (BLOOM's ALiBi), a
number per distance (ALiBi, T5's relative positions); and the keys that a query sees are one range
(causal, sliding window, a block of its own, a prefix). A mask that is something else has no rule,
and the layer is kept by its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
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
        keys: number of keys.
        low: [query] first key that each query sees.
        high: [query] the key after the last that it sees.
        bias_key: [head, key] added to scores, or None.
        bias_offset: [head, n_query + n_key − 1] added by j − i + n_query − 1, or None.
    """

    scale: float
    softcap: float | None
    sinks: Float[Tensor, " head"] | None
    keys: int
    low: Int[Tensor, " query"]
    high: Int[Tensor, " query"]
    bias_key: Float[Tensor, "head key"] | None = None
    bias_offset: Float[Tensor, "head offset"] | None = None

    def block(self, rows: Int[Tensor, " row"], cell: int = 1) -> "Block":
        """Some rows, and the keys that any of them sees, widened to whole cells of keys."""
        low, high = self.low[rows], self.high[rows]
        some = high > low
        if not bool(some.any()):
            none = torch.zeros(len(rows), 0, dtype=torch.bool, device=rows.device)
            return Block(rows, slice(0, 0), none, (0, 0))
        first = int(low[some].min()) // cell * cell
        last = min(self.keys, -(-int(high[some].max()) // cell) * cell)
        keys = torch.arange(first, last, device=rows.device)
        seen = (keys >= low[:, None]) & (keys < high[:, None])
        start, stop = int(low.max()) - first, int(high.min()) - first
        return Block(rows, slice(first, last), seen, (start, stop) if start < stop else (0, 0))

    def scores(
        self, head: int, q: Float[Tensor, "row d"], k: Float[Tensor, "key d"], block: "Block"
    ) -> Float[Tensor, "row key"]:
        """Scores of a block's rows over its keys; `MASKED` where a key is not seen.

        Args:
            head: query head of the layer.
            q: queries of these rows, in single precision.
            k: keys of the whole prompt, in single precision.
            block: the rows and keys.
        """
        s = (q * self.scale) @ k[block.keys].T
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias_key is not None:
            s += self.bias_key[head, block.keys].to(s)
        if self.bias_offset is not None:
            # Entry j − i + n_query − 1 belongs to the pair (i, j).
            first = block.keys.start - block.rows.long() + len(self.low) - 1
            s += self.bias_offset[head].to(s).unfold(0, s.shape[1], 1)[first]
        start, stop = block.free
        hidden = ~block.seen
        for part in (slice(0, start), slice(stop, None)):
            s[:, part].masked_fill_(hidden[:, part], MASKED)
        return s

    def lse(
        self, head: int, s: Float[Tensor, "row key"], block: "Block"
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "row key"], Float[Tensor, " row"]]:
        """Log-sum-exp of whole rows of scores, learned sinks included; p; and its entropy.

        Rows that see no key have log-sum-exp 0 and no mass. Scores are overwritten.
        """
        top = s.amax(-1)
        s -= top[:, None]
        p = torch.exp(s)
        total = p.sum(-1)
        lse = top + total.log()
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks[head].to(lse))
        some = block.seen.any(-1)
        factor = torch.exp(top - lse) * some
        # −Σ p log p with log p = s − (LSE − top): no logarithm is taken of any entry.
        entropy = factor * (total * (lse - top) - torch.linalg.vecdot(p, s))
        return lse * some, p.mul_(factor[:, None]), entropy


@dataclass(frozen=True)
class Block:
    """Some rows of a map and the keys they are looked up in.

    Attributes:
        rows: [row] queries.
        keys: the keys.
        seen: [row, key] which of them each row sees.
        free: columns of the block that all rows see: first, and the one after the last.
    """

    rows: Int[Tensor, " row"]
    keys: slice
    seen: Bool[Tensor, "row key"]
    free: tuple[int, int]


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
    rule = Rule(call.scale, call.softcap, call.sinks, n_key, low, high)
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
    whole = replace(first, keys=starts[-1], low=low, high=high)
    return torch.cat(qs, 1), torch.cat(ks, 1), torch.cat(vs, 1), whole
