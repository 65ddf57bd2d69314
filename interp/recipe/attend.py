"""Attention of a few heads recomputed and edited, beside the model's own kernel.

The kernel runs for all heads. For the chosen heads the rows concerned are computed again from q and
k, edited before or after the softmax, and multiplied with v; only those rows of z are replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.recipe.ops import AttentionOp, Rows
from interp.seam.calls import MASKED, AttnCall

_BLOCK = 1 << 24


@dataclass(frozen=True)
class RowEdit:
    """One attention op on one layer, bound to a forward.

    Attributes:
        op: the operation.
        site: `scores` or `pattern`.
        units: query heads of the layer.
        strength: a number, or [batch or 1, unit].
        params: parameters of the op.
        rows: [batch, query] rows concerned, or None for all.
        keys: [batch, key] keys of the edit.
        others: further sets of keys, each [batch, key].
        factors: [query] factors of a schedule, or None.
    """

    op: AttentionOp
    site: str
    units: tuple[int, ...]
    strength: Tensor | float
    params: dict[str, object]
    rows: Tensor | None
    keys: Tensor
    others: dict[str, Tensor]
    factors: Tensor | None = None


def scores_of(
    call: AttnCall, heads: Sequence[int], rows: slice
) -> tuple[Float[Tensor, "batch unit row key"], Tensor]:
    """Masked scores of some heads and rows, and which keys each row sees; differentiable."""
    if call.q is None or call.k is None:
        raise SiteError(f"q and k of {call.name} are not reached, so its scores cannot be edited")
    index = torch.tensor(list(heads), device=call.q.device)
    group = call.q.shape[1] // call.k.shape[1]
    q = call.q[:, index, rows].to(call.dtype) * call.scale
    k = call.k[:, index // group].to(call.dtype)
    s = q @ k.transpose(-1, -2)
    if call.softcap is not None:
        s = torch.tanh(s / call.softcap) * call.softcap
    visible = torch.ones(1, 1, *s.shape[-2:], dtype=torch.bool, device=s.device)
    if call.mask is not None:
        m = call.mask.expand(-1, -1, call.n_query, -1)[:, :, rows]
        m = m[:, index] if m.shape[1] > 1 else m
        if m.dtype == torch.bool:
            visible = m
        else:
            visible = m > MASKED / 2
            if m.dtype != torch.float64:
                visible = m > torch.finfo(m.dtype).min / 2
            s = s + m.to(s.dtype).clamp_min(MASKED)
    if call.causal:
        i = torch.arange(call.n_query, device=s.device)[rows]
        j = torch.arange(call.n_key, device=s.device)
        visible = visible & (j[None] <= i[:, None])
    return s.masked_fill(~visible, MASKED), visible


def softmax_of(
    call: AttnCall, heads: Sequence[int], rows: slice, s: Tensor, visible: Tensor
) -> Tensor:
    """The pattern of complete rows of scores, learned sinks included; 0 where nothing is seen."""
    s = s.masked_fill(~visible, MASKED)
    seen = s.amax(-1, keepdim=True) > MASKED / 2
    if call.sinks is None:
        return torch.softmax(s, -1) * seen
    if call.sinks.dim() == 4:  # [batch, head, query, 1]: each query has sinks of its own
        sink = call.sinks[:, list(heads), rows].to(s.dtype)
    else:
        sink = call.sinks[list(heads)].to(s.dtype)[None, :, None, None]
    sink = sink.expand(s.shape[0], -1, s.shape[2], 1)
    return torch.softmax(torch.cat([s, sink], -1), -1)[..., :-1] * seen


def edited_z(call: AttnCall, edits: Sequence[RowEdit]) -> Float[Tensor, "batch query head d_v"]:
    """Z with the rows of the edited heads replaced."""
    if call.v is None:
        raise SiteError(f"v of {call.name} is not reached, so its attention cannot be edited")
    heads = sorted({h for e in edits for h in e.units})
    index = torch.tensor(heads, device=call.z.device)
    group = call.n_heads // call.v.shape[1]
    v = call.v[:, index // group].to(call.dtype)
    concerned = _concerned(call, heads, edits)
    out = call.z.clone()
    step = _rows_at_a_time(call, len(heads))
    for start in range(0, call.n_query, step):
        rows = slice(start, min(start + step, call.n_query))
        here = concerned[:, :, rows]
        if not bool(here.any()):
            continue
        p = edited_pattern(call, heads, rows, edits)
        new = (p @ v).transpose(1, 2).to(call.z.dtype)
        keep = here.transpose(1, 2)[..., None]
        old = out[:, rows][:, :, index]
        out[:, rows] = out[:, rows].index_copy(2, index, torch.where(keep, new, old))
    return out


def _rows_at_a_time(call: AttnCall, n_heads: int) -> int:
    if torch.is_grad_enabled():
        return max(call.n_query, 1)
    return max(1, _BLOCK // max(1, call.z.shape[0] * n_heads * call.n_key))


def _concerned(call: AttnCall, heads: Sequence[int], edits: Sequence[RowEdit]) -> Tensor:
    """[batch, unit, query] the rows that any edit is about."""
    out = torch.zeros(
        call.z.shape[0], len(heads), call.n_query, dtype=torch.bool, device=call.z.device
    )
    for e in edits:
        for h in e.units:
            place = heads.index(h)
            out[:, place] |= True if e.rows is None else e.rows
    return out


def edited_pattern(
    call: AttnCall, heads: Sequence[int], rows: slice, edits: Sequence[RowEdit]
) -> Float[Tensor, "batch unit row key"]:
    """Rows of the pattern of some heads after all edits: scores first, then pattern, in order."""
    s, visible = scores_of(call, heads, rows)
    visible = visible.expand(s.shape[0], s.shape[1], -1, -1)
    s, visible = score_edits(s, visible, heads, rows, edits, call.name)
    p = softmax_of(call, heads, rows, s, visible)
    return pattern_edits(p, visible, heads, rows, edits)


def score_edits(
    s: Tensor,
    visible: Tensor,
    heads: Sequence[int],
    rows: slice,
    edits: Sequence[RowEdit],
    name: str,
) -> tuple[Tensor, Tensor]:
    """Rows of scores after the edits of site scores, and what is still visible.

    Raises:
        InputError: a row lost all of its keys.
    """
    left = visible
    for e in (e for e in edits if e.site == "scores"):
        s = apply_rows(e, s, left, heads, rows)
        # What is knocked out stays so, whatever a later edit does to its score.
        left = left & (s > MASKED / 2)
        s = s.masked_fill(~left, MASKED)
    blocked = visible.any(-1) & ~left.any(-1)
    if bool(blocked.any()):
        b, _, i = (int(x[0]) for x in torch.nonzero(blocked, as_tuple=True))
        raise InputError(
            f"a row of attention must keep a key; every key that query {i + rows.start} of "
            f"example {b} sees in {name} is knocked out",
            hint="leave the first token or the query itself: keys=Positions(..., exclude=...)",
        )
    return s, left


def pattern_edits(
    p: Tensor, visible: Tensor, heads: Sequence[int], rows: slice, edits: Sequence[RowEdit]
) -> Tensor:
    """Rows of a pattern after the edits of site pattern."""
    for e in (e for e in edits if e.site == "pattern"):
        p = apply_rows(e, p, visible, heads, rows)
    return p


def apply_rows(e: RowEdit, a: Tensor, visible: Tensor, heads: Sequence[int], rows: slice) -> Tensor:
    """One edit of some rows."""
    places = [heads.index(h) for h in e.units]
    index = torch.tensor(places, device=a.device)
    part, seen = a[:, index], visible[:, index]
    known = Rows(
        e.keys[:, None, None],
        seen,
        {name: keys[:, None, None] for name, keys in e.others.items()},
    )
    s = e.strength
    if isinstance(s, Tensor):
        s = s.to(a)
        s = s[..., None, None] if s.dim() else s
    if e.factors is not None:
        s = e.op.neutral + e.factors.to(a)[rows, None] * (s - e.op.neutral)
    new = e.op.apply(part, s, known, e.params)
    if e.rows is not None:
        new = torch.where(e.rows[:, None, rows, None], new, part)
    if places == list(range(a.shape[1])):
        return new
    return a.index_copy(1, index, new.to(a.dtype))


def full_pattern(call: AttnCall, edits: Sequence[RowEdit]) -> Float[Tensor, "batch head query key"]:
    """The whole pattern of a layer after the edits, for readers of an edited layer."""
    heads = list(range(call.n_heads))
    return edited_pattern(call, heads, slice(0, call.n_query), edits)


def edited_weights(
    p: Float[Tensor, "batch head query key"], edits: Sequence[RowEdit], name: str
) -> Float[Tensor, "batch head query key"]:
    """A pattern that the model itself computed by softmax, edited.

    Edits of scores act on log p: the softmax does not see the constant by which it differs from
    the scores. A key whose weight has underflowed to 0 counts as one that is not seen.

    Raises:
        InputError: a row lost all of its keys.
    """
    heads = list(range(p.shape[1]))
    rows = slice(0, p.shape[2])
    visible = p > 0
    work = p if p.dtype == torch.float64 else p.float()
    if any(e.site == "scores" for e in edits):
        least = torch.finfo(work.dtype).tiny
        s = torch.where(visible, work.clamp_min(least).log(), MASKED)
        s, left = score_edits(s, visible, heads, rows, edits, name)
        touched = torch.zeros(p.shape[:3], dtype=torch.bool, device=p.device)
        for e in (e for e in edits if e.site == "scores"):
            for h in e.units:
                touched[:, h] |= True if e.rows is None else e.rows
        new = torch.softmax(s, -1) * left.any(-1, keepdim=True)
        work = torch.where(touched[..., None], new, work)
        visible = torch.where(touched[..., None], left, visible)
    return pattern_edits(work, visible, heads, rows, edits).to(p.dtype)
