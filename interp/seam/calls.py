"""One attention call as an observer sees it, and the exact block recomputation of its pattern.

Let s_ij = scale·q_i·k_j after rotation, soft-cap and additive mask, and LSE_i = log Σ_j exp s_ij
over the visible keys (and over the layer's learned sink, where it has one). Then the pattern is
A_ij = exp(s_ij − LSE_i). `rows` evaluates this for chosen query rows only, in float32 or wider,
and is the reference that every faster kernel is measured against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Stands in for −inf in scores: exp() of it is exactly 0 and 0·MASKED is 0, not NaN.
MASKED = -1e30


@dataclass(frozen=True)
class AttnCall:
    """One call of one attention layer.

    Attributes:
        name: qualified name of the attention module.
        module: the module.
        q: [batch, head, query, d_qk], after rotation.
        k: [batch, kv_head, key, d_qk]; query head h reads group h // (head / kv_head).
        v: [batch, kv_head, key, d_v].
        z: [batch, query, head, d_v] as the model computed it.
        scale: factor on q·k.
        mask: additive (float) or boolean (True = visible) [batch|1, head|1, query, key], or None.
        causal: query i sees keys j ≤ i (both counted from the start of the call).
        softcap: s becomes softcap·tanh(s/softcap), or None.
        sinks: [head] learned sink logits that join each row's normaliser, or None.
        lse: [batch, head, query] row log-sum-exp from the model's kernel, or None.
        extra: [batch, query, head, c]: pattern @ appended columns, if an observer asked for them.
        pattern: [batch, head, query, key] if the model itself materialised it, or None.
        how: where the numbers come from: `kernel`, `pattern` or `recomputed`.
    """

    name: str
    module: nn.Module
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    z: Tensor
    scale: float = 1.0
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    lse: Tensor | None = None
    extra: Tensor | None = None
    pattern: Tensor | None = None
    how: str = "recomputed"

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.z.shape[2]

    @property
    def n_query(self) -> int:
        """Number of query positions of this call."""
        return self.z.shape[1]

    @property
    def n_key(self) -> int:
        """Number of key positions of this call."""
        if self.pattern is not None:
            return self.pattern.shape[-1]
        assert self.k is not None
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which statistics are computed: float64 for float64 models, else float32."""
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32

    def scores(
        self,
        b: int,
        heads: slice,
        rows: slice | Tensor,
        *,
        keys: int | None = None,
        out: Callable[[tuple[int, ...]], Tensor] | None = None,
    ) -> Float[Tensor, "head query key"]:
        """Masked scores of some rows of one example; hidden keys hold `MASKED`.

        Args:
            b: example of the batch.
            heads: query heads; a slice within one kv group, or spanning whole groups.
            rows: query positions.
            keys: only the first so many keys (all if None).
            out: makes the buffer to write into, for callers that re-use one.
        """
        assert self.q is not None and self.k is not None
        q = self.q[b, heads][:, rows].to(self.dtype)
        n_keys = self.n_key if keys is None else keys
        group = self.q.shape[1] // self.k.shape[1]
        first, last = heads.start // group, (heads.stop - 1) // group + 1
        k = self.k[b, first:last, :n_keys].to(self.dtype)
        n_rows = q.shape[1]
        # Heads of one group share k: fold them into rows, so that k is never repeated.
        folded = q.reshape(last - first, -1, q.shape[-1]) * self.scale
        buffer = out((*folded.shape[:2], n_keys)) if out is not None else None
        s = torch.matmul(folded, k.transpose(1, 2), out=buffer).view(-1, n_rows, n_keys)
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.mask is not None:
            m = self.mask[b if self.mask.shape[0] > 1 else 0]
            m = (m[heads] if m.shape[0] > 1 else m).expand(-1, self.n_query, -1)
            m = m[:, rows, :n_keys]
            if m.dtype == torch.bool:
                s.masked_fill_(~m, MASKED)
            else:
                s.add_(m.to(self.dtype).clamp_min(MASKED)).clamp_(min=MASKED)
        if self.causal:
            hide_future(s, rows)
        return s

    def row_lse(
        self, s: Float[Tensor, "head query key"], heads: slice
    ) -> Float[Tensor, "head query"]:
        """Row log-sum-exp of complete rows of scores, the layer's learned sinks included."""
        lse = torch.logsumexp(s, dim=-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks[heads].to(lse.dtype)[:, None])
        return lse

    def rows(self, b: int, heads: slice, rows: slice | Tensor) -> Float[Tensor, "head query key"]:
        """The pattern of some query rows of one example, in the statistics dtype.

        Rows that see no key are all zero.
        """
        if self.pattern is not None:
            return self.pattern[b, heads][:, rows].to(self.dtype)
        return self.normalised(self.scores(b, heads, rows), heads)

    def normalised(
        self, s: Float[Tensor, "head query key"], heads: slice
    ) -> Float[Tensor, "head query key"]:
        """The pattern of complete rows of scores; all zero in rows that see no key."""
        # A row without any visible key holds only MASKED: its softmax would be uniform.
        seen = s.amax(-1, keepdim=True) > MASKED / 2
        if self.sinks is None:
            # Not exp(s − LSE): at large scores their difference has lost its last digits.
            return torch.softmax(s, dim=-1) * seen
        sink = self.sinks[heads].to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)
        return torch.softmax(torch.cat([s, sink], dim=-1), dim=-1)[..., :-1] * seen


def hide_future(s: Float[Tensor, "head query key"], rows: slice | Tensor) -> None:
    """Write `MASKED` over the keys after each query, in place."""
    n_rows, n_keys = s.shape[-2:]
    if isinstance(rows, slice):
        # Keys before the block are visible to all its rows: only its own square needs a mask.
        start = rows.start
        width = n_keys - start
        if width > 1:
            square = torch.ones(n_rows, width, dtype=torch.bool, device=s.device).triu_(1)
            s[..., start:].masked_fill_(square, MASKED)
    else:
        later = torch.arange(n_keys, device=s.device)[None, :] > rows[:, None].to(s.device)
        s.masked_fill_(later, MASKED)


Observer = Callable[[AttnCall], "Tensor | Edited | None"]
"""Sees each call; returns what replaces the model's z (same shape), or None."""

InputEditor = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]
"""Given a module's name and its q, k, v (as in `AttnCall`), other q, k, v of the same shapes."""

WeightEditor = Callable[[str, Tensor], Tensor | None]
"""Given a module's name and its pattern [batch, head, query, key], another pattern."""


@dataclass(frozen=True)
class Edited:
    """A z that came from an edited pattern.

    Attributes:
        z: [batch, query, head, d_v].
        pattern: [batch, head, query, key] of all heads, if another observer will read it; else
            None.
    """

    z: Tensor
    pattern: Tensor | None = None
