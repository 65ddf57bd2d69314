"""What a probe is: a classifier fitted on one head's z, for all heads at once.

Each kind of probe is a frozen dataclass in a file of its own that registers itself; its fields are
its settings. It is asked for decisions on held-out examples under many labellings of the same
training examples in one go: the real labels, permuted ones and those of control tasks share the
work that depends on the features alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UnknownNameError
from interp.registry import Registry


@dataclass(frozen=True)
class Probe(ABC):
    """Base of all probes; the fields of a subclass are its settings.

    Attributes:
        name: registry name.
        summary: one line.
        citation: where it comes from.
        most_classes: most classes it can tell apart, or None.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    most_classes: ClassVar[int | None] = None

    @property
    def params(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return asdict(self)

    @abstractmethod
    def decide(
        self,
        train: Float[Tensor, "head example d"],
        labels: Int[Tensor, "example labelling"],
        groups: Int[Tensor, " example"],
        test: Float[Tensor, "head held d"],
        *,
        n_classes: int,
    ) -> Int[Tensor, "head held labelling"]:
        """Fit on the training examples and say the class of the held-out ones.

        Args:
            train: features in float64.
            labels: class numbers from 0, one column per labelling; a class may be missing.
            groups: examples of one group are not independent; inner choices keep them together.
            test: features of held-out examples.
            n_classes: number of classes.
        """


PROBES: Registry[type[Probe]] = Registry("probe", "probes")


def make_probe(name: str, params: Mapping[str, Any] | None = None) -> Probe:
    """A probe from its name and settings.

    Raises:
        UnknownNameError: no such probe, or no such setting.
    """
    cls = PROBES[name]
    known = [f.name for f in fields(cls)]
    for key in params or {}:
        if key not in known:
            raise UnknownNameError(f"setting of probe {name!r}", key, known)
    return cls(**dict(params or {}))
