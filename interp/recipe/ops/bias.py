"""Edits of scores, before the softmax: bias, temperature, uniform, knockout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.recipe.ops import OPS, AttentionOp, Rows
from interp.seam.calls import MASKED


class Bias(AttentionOp):
    """Scores of the keys rise by s.

    s = log w multiplies their attention by w before the row is normalised (PASTA, PAI).
    """

    name = "bias"
    summary = "add to the scores of keys; log w multiplies their attention by w"
    formula = "scores + s on keys"
    sites = ("scores",)
    neutral, default = 0.0, 1.0

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        return a + s * rows.keys


class Temperature(AttentionOp):
    """Scores are divided by s: below 1 sharpens, above 1 flattens (TempScale)."""

    name = "temperature"
    summary = "divide the scores; below 1 sharpens"
    formula = "scores / s"
    sites = ("scores",)
    neutral, default = 1.0, 1.0
    keys = "none"

    def refuses(self, s: Tensor) -> str:
        """See `Op`."""
        return "" if bool((s > 0).all()) else "a temperature must be above 0"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        return a / s


class Uniform(AttentionOp):
    """Scores shrink to (1 − s)·scores: at s = 1 attention is uniform over the visible keys.

    This is what a query of zeros does, the masking of retrieval-head work (Wu et al. 2404.15574).
    """

    name = "uniform"
    summary = "attend uniformly to what is visible (Wu et al. 2024)"
    formula = "(1 - s)·scores"
    sites = ("scores",)
    neutral, default = 0.0, 1.0
    keys = "none"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        return (1 - s) * a


class Knockout(AttentionOp):
    """Keys are hidden before the softmax, so what is left of the row is normalised anew.

    Attention knockout of Geva et al. 2304.14767; equal to setting the pattern to 0 and normalising.
    """

    name = "knockout"
    summary = "hide keys before the softmax (Geva et al. 2023)"
    formula = "scores = -inf on keys"
    sites = ("scores",)
    neutral, default = 0.0, 1.0
    stepwise = True

    def refuses(self, s: Tensor) -> str:
        """See `Op`."""
        done = bool(((s == 0) | (s == 1)).all())
        return "" if done else "knockout is done or not: its strength must be 0 or 1"

    def apply(self, a: Tensor, s: Tensor | float, rows: Rows, p: Mapping[str, Any]) -> Tensor:
        """See `AttentionOp`."""
        return a.masked_fill(rows.keys & (torch.as_tensor(s, device=a.device) != 0), MASKED)


for op in (Bias(), Temperature(), Uniform(), Knockout()):
    OPS.register(op.name)(op)
