"""Edits of the pattern, after the softmax: reweight, drop, move, split, override."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.recipe.ops import OPS, AttentionOp, Rows

_TINY = 1e-30


class Reweight(AttentionOp):
    """Attention to the keys is multiplied by s, then the row keeps its sum."""

    name = "reweight"
    summary = "multiply attention to keys, keeping the sum of the row"
    formula = "s·A on keys, row sum kept"
    sites = ("pattern",)
    neutral, default = 1.0, 1.0

    def refuses(self, s: Tensor) -> str:
        """See `Op`."""
        return "" if bool((s >= 0).all()) else "attention is multiplied by 0 or more"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        new = a + (s - 1) * a * rows.keys
        return new * a.sum(-1, keepdim=True) / new.sum(-1, keepdim=True).clamp_min(_TINY)


class Drop(AttentionOp):
    """Attention to the keys is multiplied by 1 − s and nothing else changes; rows sum to less.

    The masking of image columns in YOPO.
    """

    name = "drop"
    summary = "remove attention to keys without normalising (YOPO)"
    formula = "(1 - s)·A on keys"
    sites = ("pattern",)
    neutral, default = 0.0, 1.0
    keys = "optional"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        return a - s * a * rows.keys


class Move(AttentionOp):
    """Keys keep the share s of their mass; the rest goes to other keys in proportion.

    Parameters (all optional):
        to: keys that receive; all other visible keys if None.
        span, share, least: rows are left alone unless the mass on `span` is at least `least` and
            the keys' part of it at most `share` (the image-centric rows of VAR, where the edited
            keys are the sinks inside the span).

    VAR: Kang et al. 2503.03321; ACT: Yu et al. 2406.15765.
    """

    name = "move"
    summary = "take mass from keys and give it to others in proportion"
    formula = "s·A on keys; freed mass to `to`, in proportion"
    sites = ("pattern",)
    neutral, default = 1.0, 0.6
    params: ClassVar[Mapping[str, Any]] = {"to": None, "span": None, "share": None, "least": None}

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        to = rows.others.get("to", ~rows.keys)
        to = to & ~rows.keys
        mass = a * to
        total = mass.sum(-1, keepdim=True)
        freed = (1 - s) * (a * rows.keys).sum(-1, keepdim=True)
        # Receivers may hold 1e-31 in all and still take everything: only nothing takes nothing.
        least = torch.finfo(a.dtype).tiny
        new = a - (1 - s) * a * rows.keys + freed * (mass / total.clamp_min(least))
        ok = total >= least
        if "span" in rows.others:
            inside = (a * rows.others["span"]).sum(-1, keepdim=True)
            part = (a * (rows.keys & rows.others["span"])).sum(-1, keepdim=True) / inside.clamp_min(
                _TINY
            )
            if p["share"] is not None:
                ok = ok & (part <= p["share"])
            if p["least"] is not None:
                ok = ok & (inside >= p["least"])
        return ok * new + (~ok) * a


class Split(AttentionOp):
    """Split softmax: mass π on the keys becomes π^s, the rest shares 1 − π^s; 0 ≤ s ≤ 1.

    Li et al. 2024; the upper bound of focus directions (2503.23306).
    """

    name = "split"
    summary = "raise the mass on keys from π to π^s"
    formula = "A·π^s/π on keys, A·(1 - π^s)/(1 - π) elsewhere"
    sites = ("pattern",)
    neutral, default = 1.0, 0.5

    def refuses(self, s: Tensor) -> str:
        """See `Op`."""
        return "" if bool(((s >= 0) & (s <= 1)).all()) else "the exponent of split is within [0, 1]"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        total = a.sum(-1, keepdim=True)
        share = (a * rows.keys).sum(-1, keepdim=True) / total.clamp_min(_TINY)
        raised = share.clamp_min(_TINY) ** s
        up, down = raised / share.clamp_min(_TINY), (1 - raised) / (1 - share).clamp_min(_TINY)
        new = a * rows.keys * up + a * (~rows.keys) * down
        mixed = (share > 0) & (share < 1)
        return mixed * new + (~mixed) * a


class Override(AttentionOp):
    """The row becomes (1 − s)·A + s·(uniform over the visible keys of the edit), sum kept."""

    name = "override"
    summary = "attend uniformly to the given keys"
    formula = "(1 - s)·A + s·uniform(keys)"
    sites = ("pattern",)
    neutral, default = 0.0, 1.0
    keys = "optional"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        chosen = (rows.keys & rows.visible).to(a.dtype)
        count = chosen.sum(-1, keepdim=True)
        target = chosen / count.clamp_min(1) * a.sum(-1, keepdim=True)
        some = count > 0
        return some * ((1 - s) * a + s * target) + (~some) * a


for op in (Reweight(), Drop(), Move(), Split(), Override()):
    OPS.register(op.name)(op)
