"""Scaling: s·x. Zero is ablation; the head output of VHR and Head Pursuit is scaled this way."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from interp.recipe.ops import OPS, VECTOR_SITES, VectorOp


class Scale(VectorOp):
    """x becomes s·x."""

    name = "scale"
    summary = "multiply by the strength; 0 removes"
    formula = "s·x"
    sites = VECTOR_SITES
    neutral, default = 1.0, 0.0
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        return s * x


class Zero(VectorOp):
    """x becomes (1 − s)·x: the masking of Michel et al., a head whose output is zero."""

    name = "zero"
    summary = "remove a head's output (Michel et al. 2019)"
    formula = "(1 - s)·x"
    sites = VECTOR_SITES
    neutral, default = 0.0, 1.0
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        return (1 - s) * x


OPS.register("scale")(Scale())
OPS.register("zero")(Zero())
