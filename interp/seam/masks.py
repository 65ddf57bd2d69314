"""What implementations without a mask [batch, head, query, key] are told instead.

Flash attention takes padding by key, causality, windows, and the ends of sequences that stand in
one row by argument. Here they become masks, so that what is recomputed is what the kernel did.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.errors import SiteError


def from_padding(mask: Any, name: str) -> Tensor:
    """The key-padding mask that flash implementations receive, as a boolean mask."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()[:, None, None, :]
    raise SiteError(
        f"the mask of {name} is a {type(mask).__name__}, which cannot be read",
        hint="load the model with attn_implementation='sdpa'",
    )


def within_sequences(
    mask: Tensor | None, query: Tensor, key: Tensor, kwargs: Mapping[str, Any], name: str
) -> Tensor | None:
    """The mask, and that flash implementations keep sequences in one row apart by their ends."""
    ends = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if ends[0] is None and ends[1] is None:
        return mask
    known = [x.tolist() if isinstance(x, Tensor) and x.dim() == 1 else None for x in ends]
    n = query.shape[2]
    if (
        known[0] is None
        or known[0] != known[1]
        or known[0] != sorted(known[0])
        or known[0][:1] + known[0][-1:] != [0, n]
        or len(query) != 1
        or key.shape[2] != n
    ):
        raise SiteError(
            f"the ends of sequences that {name} gives its kernel must divide the {n} queries and "
            f"{key.shape[2]} keys of a single row alike; got {known[0]} and {known[1]} for "
            f"{len(query)} rows",
            hint="load the model with attn_implementation='sdpa'",
        )
    if len(set(known[0])) <= 2:
        return mask
    inner = torch.tensor(known[0][1:-1], device=query.device)
    owner = torch.bucketize(torch.arange(n, device=query.device), inner, right=True)
    same = (owner[:, None] == owner[None])[None, None]
    if mask is None:
        return same
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def by_argument(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: Any
) -> tuple[Tensor | None, bool]:
    """Flash implementations take causality and window by argument, counted from the last key."""
    n_query, n_key = query.shape[2], key.shape[2]
    cached = causal and 1 < n_query < n_key
    if window is None and not cached:
        return mask, causal
    i = torch.arange(n_key - n_query, n_key, device=key.device)[:, None]
    j = torch.arange(n_key, device=key.device)[None]
    near = (i - j).abs() < int(window) if window is not None else i >= j
    if cached:
        near = near & (i >= j)
    near = near[None, None]
    return (near if mask is None else mask & near), causal and not cached
