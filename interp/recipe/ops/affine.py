"""Element-wise affine edits: (1 + s·gain) ⊙ x + s·shift; LoFiT and JoLA."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from interp.recipe.ops import OPS, VECTOR_SITES, VectorOp


class Affine(VectorOp):
    """x becomes (1 + s·gain) ⊙ x + s·shift."""

    name = "affine"
    summary = "scale and shift each coordinate"
    formula = "(1 + s·gain)*x + s·shift"
    sites = VECTOR_SITES
    neutral, default = 0.0, 1.0
    tensors: ClassVar[Mapping[str, str]] = {"gain": "d", "shift": "d"}
    optional = frozenset({"gain", "shift"})
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        out = x
        if "gain" in t:
            out = out + s * t["gain"] * x
        if "shift" in t:
            out = out + s * t["shift"]
        return out


OPS.register("affine")(Affine())
