"""What a detector is: readings, a formula, and what it takes for evidence.

A detector is a frozen dataclass in a file of its own that registers itself; the command line, the
help and the conformance tests follow from the registry. Two kinds exist:

- a `ReadingDetector` declares readings and turns their answers into one score per example and
  head, beside the same on a matched control; the scoring engine answers the readings of all such
  detectors in one forward pass;
- a `WatchingDetector` runs the model itself, on as many inputs as it needs; a `DecodingDetector`
  is one that watches the model generate.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from interp.errors import InputError, UnknownNameError
from interp.prompts import Batch, Prompt
from interp.readings import Reading
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@dataclass(frozen=True)
class Outcome:
    """What a detector says of one batch.

    Attributes:
        values: [example, layer, head] score; NaN is undefined.
        null: the same on the matched control of each example.
        extras: further facts, each [example, layer, head].
        failures: place in the batch to the reason why an example gives no score.
    """

    values: Tensor
    null: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector(ABC):
    """Base of all detectors; the fields of a subclass are its parameters.

    Attributes:
        name: registry name, and the verdict of a head that shows it.
        summary: one line.
        citation: paper and section.
        unit: what the score counts.
        range: smallest and largest possible score.
        threshold: score a head must reach.
        no_evidence: what "no evidence" means for it.
        task: name of the task it is run on unless told otherwise.
        task_params: parameters of that task.
        needs: spans every prompt must have.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    unit: ClassVar[str]
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    threshold: ClassVar[float]
    no_evidence: ClassVar[str]
    task: ClassVar[str]
    task_params: ClassVar[Mapping[str, Any]] = {}
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, as plain values."""
        return asdict(self)

    @property
    def limit(self) -> float:
        """The score a head must reach under these parameters."""
        return self.threshold


class ReadingDetector(Detector):
    """A detector that needs one forward pass, and maybe one on control prompts."""

    @abstractmethod
    def readings(self) -> Mapping[str, Reading]:
        """Name to reading."""

    def prepare(self, prompt: Prompt) -> Prompt:
        """The prompt with whatever further spans the readings name."""
        return prompt

    def control(self, prompt: Prompt, rng: random.Random) -> Prompt | None:
        """A matched control prompt on which the same readings are taken, or None."""
        return None

    @abstractmethod
    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """Scores from the answers [example, layer, head, …] to the readings."""


class WatchingDetector(Detector):
    """A detector that runs the model itself.

    Attributes:
        per_head: forward passes over each prompt for each head of the tower, beside `passes`.
    """

    per_head: ClassVar[int] = 0

    @property
    def passes(self) -> int:
        """Forward passes over each prompt, for estimates of what a run takes."""
        return 1

    @abstractmethod
    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """Scores of a batch of prompts."""


class DecodingDetector(WatchingDetector):
    """A detector that watches the model generate."""


DETECTORS: Registry[type[Detector]] = Registry("detector", "heads")


def make_detector(name: str, params: Mapping[str, Any] | None = None) -> Detector:
    """A detector from its name and parameters, which may be texts from a command line.

    Raises:
        UnknownNameError: no such detector, or no such parameter.
        InputError: a value is not of the parameter's type.
    """
    from interp.tasks import read_like

    cls = DETECTORS[name]
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in (params or {}).items():
        if key not in known:
            raise UnknownNameError(f"parameter of detector {name!r}", key, known)
        if isinstance(value, str):
            value = read_like(known[key].default, value, f"{name}:{key}")
        values[key] = value
    return cls(**values)


def shuffled(prompt: Prompt, rng: random.Random) -> Prompt:
    """The prompt with its tokens in random order, read at the same places.

    BOS stays in place. What is left of a score then comes from positions, not from repetition.
    """
    kept = set(prompt.positions("bos")) if "bos" in prompt.spans else set()
    places = [i for i in range(len(prompt)) if i not in kept]
    order = places[:]
    rng.shuffle(order)
    tokens = list(prompt.tokens)
    for place, source in zip(places, order, strict=True):
        tokens[place] = prompt.tokens[source]
    return prompt.controlled_by(tokens)


def require(prompts: list[Prompt], spans: tuple[str, ...], detector: str) -> None:
    """Check that every prompt has the spans a detector needs.

    Raises:
        InputError: the first that does not, and what it has.
    """
    for prompt in prompts:
        missing = [s for s in spans if s != "all" and s not in prompt.spans]
        if missing:
            raise InputError(
                f"detector {detector!r} needs span {missing[0]!r}; prompt {prompt.id or '?'} has: "
                f"{', '.join([*prompt.spans, 'all'])}",
                hint="record the span in the prompt file, or choose the detector's own task",
            )
