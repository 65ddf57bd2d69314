"""Contrast of logits with a second run: VCD, LQCD, and head-level contrastive decoding."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp.recipe.ops import OPS, VectorOp


class Contrast(VectorOp):
    """Logits become (1 + s)·ℓ − s·ℓ′, and tokens that ℓ itself finds implausible are ruled out.

    ℓ′ are the logits of the same input under another recipe (`Edit.twin`), with a cache of its
    own. Tokens with ℓ < log β + max ℓ become −inf (β = 0: none).

    Leng et al. 2311.16922 (VCD), equation 3 and the plausibility constraint.
    """

    name = "contrast"
    summary = "push logits away from those of a second run"
    formula = "(1 + s)·l - s·l'"
    sites = ("logits",)
    neutral, default = 0.0, 1.0
    params: ClassVar[Mapping[str, Any]] = {"beta": 0.1}

    def apply(
        self, x: Tensor, s: Tensor | float, t: Mapping[str, Tensor], p: Mapping[str, Any]
    ) -> Tensor:
        """See `VectorOp`; the engine puts ℓ′ into `t["other"]`."""
        new = (1 + s) * x - s * t["other"]
        if p["beta"]:
            least = math.log(p["beta"]) + x.amax(-1, keepdim=True)
            new = new.masked_fill((x < least) & (torch.as_tensor(s) != 0), -math.inf)
        return new


OPS.register("contrast")(Contrast())
