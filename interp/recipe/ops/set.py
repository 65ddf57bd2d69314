"""Replacement: (1 − s)·x + s·value; patching, mean and resample ablation, soft injection."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from interp.recipe.ops import OPS, VECTOR_SITES, VectorOp


class Set(VectorOp):
    """x becomes (1 − s)·x + s·value.

    The value is one vector per head, or one per head, example and position ([batch, pos, d], or
    [1, pos, d] for all examples alike), for patching with the activations of another run.
    """

    name = "set"
    summary = "replace by a value: patch, mean, resample; strength mixes"
    formula = "(1 - s)·x + s·value"
    sites = VECTOR_SITES
    neutral, default = 0.0, 1.0
    tensors: ClassVar[Mapping[str, str]] = {"value": "d, or batch pos d"}
    bakes = True

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`."""
        value = t["value"]
        if value.dim() == 4:  # [unit, batch, pos, d]
            value = value.permute(1, 2, 0, 3)
        # Written so that s = 1 gives the value itself, bit for bit.
        return (1 - s) * x + s * value if not _one(s) else value.expand_as(x)


def _one(s: Tensor | float) -> bool:
    return not isinstance(s, Tensor) and s == 1


OPS.register("set")(Set())
