"""Operations: pure tensor functions with a name; one file per family.

Two kinds exist. A *vector op* changes vectors of a site (z, q, k, v, resid, attn_out, logits), an
*attention op* changes rows of scores or of the pattern. Both are functions of tensors only, so
gradients flow through them to strengths and tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from interp.registry import Registry

HEAD_SITES = ("z", "q", "k", "v")
LAYER_SITES = ("resid", "attn_out", "logits")
VECTOR_SITES = HEAD_SITES + LAYER_SITES
ATTENTION_SITES = ("scores", "pattern")
SITES = VECTOR_SITES + ATTENTION_SITES


class Op(ABC):
    """Base of all operations.

    Attributes:
        name: registry name.
        summary: one line.
        formula: the formula, with s the strength.
        sites: sites it works on; the first is the default.
        neutral: strength at which nothing changes.
        default: strength unless told otherwise.
        tensors: name to shape, in words, of the tensors it takes, one per head or layer.
        optional: those of `tensors` that may be left out.
        params: name to default of its further parameters.
        bakes: whether it folds exactly into an output projection at site z.
        stepwise: whether it is done or not, with nothing in between.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    neutral: ClassVar[float]
    default: ClassVar[float]
    tensors: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    params: ClassVar[Mapping[str, Any]] = {}
    bakes: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False

    def refuses(self, s: Tensor) -> str:
        """Why some strengths are impossible, in words; empty if they are not."""
        return ""


class VectorOp(Op):
    """An operation on vectors."""

    @abstractmethod
    def apply(
        self,
        x: Float[Tensor, "batch pos unit d"],
        s: Tensor | float,
        t: Mapping[str, Tensor],
        p: Mapping[str, Any],
    ) -> Float[Tensor, "batch pos unit d"]:
        """New vectors.

        Args:
            x: one vector per unit: a head, or the whole stream at a layer site.
            s: strength, a number or broadcastable to x.
            t: tensors, each [unit, …].
            p: parameters.
        """


@dataclass(frozen=True)
class Rows:
    """Some rows of attention, and what is known about their keys.

    Attributes:
        keys: [batch, 1, 1, key] the keys of the edit.
        visible: [batch, 1 or unit, row, key] which keys each row sees.
        others: name to further sets of keys, shaped as `keys`.
    """

    keys: Bool[Tensor, "batch 1 1 key"]
    visible: Bool[Tensor, "batch unit row key"]
    others: Mapping[str, Tensor]


class AttentionOp(Op):
    """An operation on rows of scores or pattern.

    Attributes:
        keys: whether keys are `needed`, `optional` (all of them unless told otherwise) or `none`.
    """

    keys: ClassVar[str] = "needed"

    @abstractmethod
    def apply(
        self,
        a: Float[Tensor, "batch unit row key"],
        s: Tensor | float,
        rows: Rows,
        p: Mapping[str, Any],
    ) -> Float[Tensor, "batch unit row key"]:
        """New rows.

        Args:
            a: scores or pattern of the chosen heads; hidden keys hold a very low score, or 0.
            s: strength, a number or broadcastable to a.
            rows: what is known about keys.
            p: parameters.
        """


OPS: Registry[Op] = Registry("op", "interp.recipe.ops")
