"""Single entries of the pattern: A_ij = exp(s_ij − LSE_i), O(d) each, in float32 or wider."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from interp.kernels.plan import Pairs, Strip
from interp.seam.calls import MASKED, AttnCall

_CHUNK = 1 << 22  # elements of gathered q held at once


def serves(call: AttnCall) -> bool:
    """Whether the model's kernel left all that single entries need."""
    return call.lse is not None and call.softcap is None and call.sinks is None


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
    q = _at(call.q[b], i, 1).to(call.dtype).unflatten(0, (n_kv, -1))
    k = _at(call.k[b], j, 1).to(call.dtype)
    s = torch.einsum("grnd,gnd->grn", q, k).flatten(0, 1) * call.scale
    if call.mask is not None:
        m = call.mask[b if call.mask.shape[0] > 1 else 0]
        m = m[:, i if m.shape[1] > 1 else torch.zeros_like(i), j]
        s = s.masked_fill(~m, MASKED) if m.dtype == torch.bool else s + m.to(s.dtype)
    if call.causal:
        s = s.masked_fill(j > i, MASKED)
    return torch.exp(s - _at(call.lse[b], i, 1).to(s.dtype))


def strip_mass(call: AttnCall, strip: Strip) -> Float[Tensor, "batch head"]:
    """Mean over some rows of the mass on a few keys; NaN for an example without rows.

    A product of all rows with the few keys: the keys are read once, no row is copied.
    """
    assert call.q is not None and call.k is not None and call.lse is not None
    out = call.z.new_full((call.z.shape[0], call.n_heads), math.nan, dtype=call.dtype)
    n_kv = call.k.shape[1]
    for b, (rows, keys) in enumerate(zip(strip.rows, strip.keys, strict=True)):
        if len(rows) == 0:
            continue
        rows, keys = rows.to(call.z.device), keys.to(call.z.device)
        q = _at(call.q[b], rows, 1).to(call.dtype).unflatten(0, (n_kv, -1))
        k = call.k[b].index_select(1, keys).to(call.dtype) * call.scale
        s = torch.matmul(q, k.transpose(1, 2)[:, None]).flatten(0, 1)
        if call.mask is not None:
            m = call.mask[b if call.mask.shape[0] > 1 else 0]
            m = m.index_select(-1, keys)
            m = m if m.shape[1] == 1 else m.index_select(1, rows)
            s = s.masked_fill(~m, MASKED) if m.dtype == torch.bool else s + m.to(s.dtype)
        if call.causal:
            s = s.masked_fill(keys[None, :] > rows[:, None], MASKED)
        lse = _at(call.lse[b], rows, 1).to(s.dtype)
        out[b] = s.sub_(lse[..., None]).exp_().sum((1, 2)) / len(rows)
    return out


def _at(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of one axis, as a view where they follow each other."""
    first, n = int(index[0]), len(index)
    if int(index[-1]) - first == n - 1 and (n < 3 or bool((index.diff() == 1).all())):
        return x.narrow(dim, first, n)
    return x.index_select(dim, index)
