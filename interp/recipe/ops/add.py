"""Addition of a vector: x + s·v; inference-time intervention and function vectors."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from interp.recipe.ops import OPS, VECTOR_SITES, VectorOp


class Add(VectorOp):
    """x becomes x + s·v.

    At site k a vector added to every key is without effect: it adds q·v to each score of a row,
    which the softmax cancels.
    """

    name = "add"
    summary = "add a vector"
    formula = "x + s·vector"
    sites = VECTOR_SITES
    neutral, default = 0.0, 1.0
    tensors: ClassVar[Mapping[str, str]] = {"vector": "d"}
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        return x + s * t["vector"]


OPS.register("add")(Add())
