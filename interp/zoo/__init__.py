"""Models whose truth is known: planted by formula, or trained by our own scripts.

`zoo:NAME` loads one offline. Each file of this package registers its entries; an entry is a
function without arguments that builds the model and says what is true of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from interp.headid import HeadId
from interp.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Truth:
    """What is known of a zoo model.

    Attributes:
        heads: detector name to the heads that it must find, and no others.
        scores: detector name to exact expected scores of single heads, where a closed form exists.
        task: detector name to the task (and its parameters) on which this truth holds.
        note: one line on how the truth is known.
    """

    heads: Mapping[str, frozenset[HeadId]] = field(default_factory=dict)
    scores: Mapping[str, Mapping[HeadId, float]] = field(default_factory=dict)
    task: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ZooModel:
    """A built zoo model: a Hugging Face model in eval mode, its truth, and what it reads with."""

    hf: "PreTrainedModel"
    truth: Truth
    tokenizer: Any = None
    processor: Any = None


ZOO: Registry[Callable[[], ZooModel]] = Registry("zoo model", "interp.zoo")

__all__ = ["ZOO", "Truth", "ZooModel"]
