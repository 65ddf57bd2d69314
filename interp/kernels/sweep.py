"""Blocks of query rows: the exact path that always applies, O(heads·block·key) memory.

For a block of rows and a few heads the scores are recomputed, turned into the pattern with the
row log-sum-exp (the kernel's, or the block's own: rows are complete), and reduced at once to
whatever the group wants. Rows of a causal layer stop at their last visible key.
"""

import torch
from torch import Tensor

from interp.kernels.plan import Group, Pairs
from interp.seam.calls import AttnCall

BLOCK = 64  # query rows at a time
_ELEMENTS = 1 << 20  # entries of the pattern held at once


def source(call: AttnCall) -> str:
    """Whence a sweep has its rows: `pattern` if the model made them itself, else `sweep`."""
    return "pattern" if call.pattern is not None else "sweep"


def rows(call: AttnCall, group: Group) -> dict[str, list[Tensor]]:
    """The per-row quantities of a group, for each example.

    Returns:
        Of those the group wants: `columns` [head, row, c], `entropy` [head, row], `top`
        [head, row], `rows` [head, row, key], `bins/NAME` [head, row, bin], `keymass` [head, key]
        (weighted sum over rows) and, for sampled groups, `keymass_se2` [head, key] (its squared
        standard error).
    """
    out: dict[str, list[Tensor]] = {}
    for b, listed in enumerate(group.rows):
        for name, value in _example(call, group, b, listed.to(call.z.device)).items():
            out.setdefault(name, []).append(value)
    return out


def pair_mass(call: AttnCall, pairs: Pairs) -> Tensor:
    """Weighted sums of single entries [batch, head], from blocks of rows."""
    out = call.z.new_full((call.z.shape[0], call.n_heads), float("nan"), dtype=call.dtype)
    for b, (q, k, w) in enumerate(pairs.per_example):
        if len(q) == 0:
            continue
        q, k, w = (x.to(call.z.device) for x in (q, k, w))
        unique, place = q.unique(return_inverse=True)
        total = out.new_zeros(call.n_heads)
        for at in range(0, len(unique), BLOCK):
            block = unique[at : at + BLOCK]
            inside = (place >= at) & (place < at + BLOCK)
            for heads in _head_chunks(call, len(block)):
                p = call.rows(b, heads, block)
                total[heads] += p[:, place[inside] - at, k[inside]] @ w[inside].to(p)
        out[b] = total
    return out


def _head_chunks(call: AttnCall, n_rows: int) -> list[slice]:
    """Heads at a time: whole key-value groups if they fit, else parts of one group."""
    n_kv = call.k.shape[1] if call.k is not None else call.n_heads
    per_group = call.n_heads // n_kv
    fit = max(1, _ELEMENTS // max(1, n_rows * call.n_key))
    if fit >= per_group:
        step = fit // per_group * per_group
    else:
        step = max(x for x in range(1, fit + 1) if per_group % x == 0)
    return [slice(h, min(h + step, call.n_heads)) for h in range(0, call.n_heads, step)]


class _Buffers:
    """Two blocks of memory that every step of a sweep writes into."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._held: list[Tensor] = [like.new_empty(0, dtype=dtype) for _ in range(2)]

    def take(self, which: int, shape: tuple[int, ...]) -> Tensor:
        n = 1
        for size in shape:
            n *= size
        if self._held[which].numel() < n:
            self._held[which] = self._like.new_empty(n, dtype=self._dtype)
        return self._held[which][:n].view(shape)


def _example(call: AttnCall, group: Group, b: int, listed: Tensor) -> dict[str, Tensor]:
    n_heads, n_rows, n_key = call.n_heads, len(listed), call.n_key
    new = lambda *shape: torch.zeros(*shape, dtype=call.dtype, device=call.z.device)  # noqa: E731
    out: dict[str, Tensor] = {}
    columns = None if group.columns is None else group.columns[b].to(call.z.device, call.dtype)
    if columns is not None:
        out["columns"] = new(n_heads, n_rows, columns.shape[-1])
    for name in ("entropy", "top"):
        if name in group.wants:
            out[name] = new(n_heads, n_rows)
    if "rows" in group.wants:
        out["rows"] = new(n_heads, n_rows, n_key)
    bins = {}
    for name, (listed_bins, n) in group.bins.items():
        out[f"bins/{name}"] = new(n_heads, n_rows, n)
        bins[name] = listed_bins[b].to(call.z.device)
    weights = group.weights[b].to(out_like := new(0))
    if "keymass" in group.wants:
        out["keymass"] = new(n_heads, n_key)
        if group.sample is not None:
            out["keymass_se2"] = new(n_heads, n_key)
            spread = group.spread[b].to(out_like)
    buffers = _Buffers(out_like, call.dtype)
    whole = n_rows == call.n_query
    for at in range(0, n_rows, BLOCK):
        stop = min(at + BLOCK, n_rows)
        block: slice | Tensor = slice(at, stop) if whole else listed[at:stop]
        last = stop if whole else int(listed[stop - 1]) + 1
        keys = min(last, n_key) if call.causal else n_key
        w = weights[at:stop]
        for heads in _head_chunks(call, stop - at):
            p, entropy = _pattern(call, b, heads, block, keys, "entropy" in group.wants, buffers)
            if entropy is not None:
                out["entropy"][heads, at:stop] = entropy
            if columns is not None:
                out["columns"][heads, at:stop] = p @ columns[:keys]
            if "keymass" in group.wants:
                out["keymass"][heads, :keys] += torch.matmul(w[None, None], p)[:, 0]
                if group.sample is not None:
                    n = (stop - at) // 2
                    diff = p[:, 0 : 2 * n : 2] - p[:, 1 : 2 * n : 2]
                    c = spread[at // 2 : at // 2 + n]
                    out["keymass_se2"][heads, :keys] += torch.einsum("hnk,n->hk", diff**2, c)
            if "top" in group.wants:
                out["top"][heads, at:stop] = p.argmax(-1).to(call.dtype)
            if "rows" in group.wants:
                out["rows"][heads, at:stop, :keys] = p
            for name, place in bins.items():
                to = out[f"bins/{name}"]
                held = p.new_zeros(*p.shape[:2], to.shape[-1] + 1)
                held.scatter_add_(2, place[None, at:stop, :keys].expand_as(p), p)
                to[heads, at:stop] = held[..., 1:]
    return out


def _pattern(
    call: AttnCall,
    b: int,
    heads: slice,
    block: slice | Tensor,
    keys: int,
    entropy: bool,
    buffers: _Buffers,
) -> tuple[Tensor, Tensor | None]:
    """The pattern [head, row, key] of a block and, if asked for, its row entropies [head, row]."""
    if call.pattern is not None:
        p = call.rows(b, heads, block)[..., :keys]
        return p, -torch.special.xlogy(p, p).sum(-1) if entropy else None
    s = call.scores(b, heads, block, keys=keys, out=lambda shape: buffers.take(0, shape))
    if call.lse is None:
        p = call.normalised(s, heads)
        return p, -torch.special.xlogy(p, p).sum(-1) if entropy else None
    lse = call.lse[b, heads][:, block].to(call.dtype)[..., None]
    p = torch.sub(s, lse, out=buffers.take(1, tuple(s.shape))).exp_()
    if not entropy:
        return p, None
    # H = LSE·Σp − Σp·s; both sums are over visible keys, hidden ones have p = 0 exactly.
    h = lse[..., 0] * p.sum(-1) - s.mul_(p).sum(-1)
    return p, h.clamp_(min=0)
