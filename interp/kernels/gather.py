"""Single entries of the pattern: A_ij = exp(s_ij − LSE_i), O(d) each, in float32 or wider."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from interp.kernels.plan import Pairs
from interp.seam.calls import MASKED, AttnCall

_CHUNK = 1 << 22  # elements of gathered q held at once


def pair_mass(call: AttnCall, pairs: Pairs) -> Float[Tensor, "batch head"]:
    """Weighted sums of single entries for each example; NaN where it has none."""
    out = call.z.new_full((call.z.shape[0], call.n_heads), math.nan, dtype=call.dtype)
    for b, (q, k, w) in enumerate(pairs.per_example):
        if len(q) == 0:
            continue
        step = max(1, _CHUNK // (call.n_heads * call.z.shape[-1]))
        device = call.z.device
        parts = [
            entries(call, b, i.to(device), j.to(device)) @ weight.to(device, call.dtype)
            for i, j, weight in zip(q.split(step), k.split(step), w.split(step), strict=True)
        ]
        out[b] = torch.stack(parts).sum(0)
    return out


def entries(call: AttnCall, b: int, i: Tensor, j: Tensor) -> Float[Tensor, "head pair"]:
    """A[b, :, i, j] from q, k and the row log-sum-exp."""
    assert call.q is not None and call.k is not None and call.lse is not None
    n_kv = call.k.shape[1]
    q = call.q[b].index_select(1, i).to(call.dtype).unflatten(0, (n_kv, -1))
    k = call.k[b].index_select(1, j).to(call.dtype)
    s = torch.einsum("grnd,gnd->grn", q, k).flatten(0, 1) * call.scale
    if call.mask is not None:
        m = call.mask[b if call.mask.shape[0] > 1 else 0]
        m = m[:, i if m.shape[1] > 1 else torch.zeros_like(i), j]
        s = s.masked_fill(~m, MASKED) if m.dtype == torch.bool else s + m.to(s.dtype)
    if call.causal:
        s = s.masked_fill(j > i, MASKED)
    return torch.exp(s - call.lse[b].index_select(1, i).to(s.dtype))
