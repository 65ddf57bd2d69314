"""Removal of a subspace: x − s·U Uᵀ x; s = 2 reflects (Basile et al., Head Pursuit)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.recipe.ops import OPS, VECTOR_SITES, VectorOp


class Project(VectorOp):
    """x becomes x − s·U Uᵀ x with U = basis, [d, k] with orthonormal columns."""

    name = "project"
    summary = "remove a subspace; 2 reflects"
    formula = "x - s·U Uᵀ x"
    sites = VECTOR_SITES
    neutral, default = 0.0, 1.0
    tensors: ClassVar[Mapping[str, str]] = {"basis": "d k"}
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        basis = t["basis"]
        inside = torch.einsum("bpud,udk->bpuk", x, basis)
        return x - s * torch.einsum("bpuk,udk->bpud", inside, basis)


OPS.register("project")(Project())
