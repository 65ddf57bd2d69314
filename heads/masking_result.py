"""What a masking experiment found: three arms, their difference, and how sure it is.

See `heads.masking` for the experiment and the sign of each number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.headid import HeadId
from interp.stats import bootstrap_interval, paired_test


@dataclass(frozen=True)
class MaskedArm:
    """What the model answered with some heads masked.

    Attributes:
        name: `base`, `masked`, or `control 1`, `control 2`, ….
        heads: the masked heads.
        correct: for each example, whether the answer was produced.
    """

    name: str
    heads: tuple[HeadId, ...]
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of examples answered."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return _wilson(self.accuracy, len(self.correct))


@dataclass(frozen=True)
class MaskingResult:
    """The three arms of a masking experiment; see `heads.masking`.

    Attributes:
        model: name of the model.
        detector: whose scores chose the heads.
        op: `uniform` or `zero`.
        phase: `decoding` or `all`: which rows were masked.
        threshold: score from which a head may not be a control.
        examples: ids of the prompts.
        base: nothing masked.
        masked: the strongest heads masked.
        controls: one arm per draw.
        params: task, seed and sizes.
    """

    model: str
    detector: str
    op: str
    phase: str
    threshold: float
    examples: tuple[str, ...]
    base: MaskedArm
    masked: MaskedArm
    controls: tuple[MaskedArm, ...]
    params: Mapping[str, Any]

    @property
    def effect(self) -> float:
        """Accuracy with the heads masked minus that of the model as it is."""
        return self.masked.accuracy - self.base.accuracy

    @property
    def control_accuracy(self) -> float:
        """Mean accuracy over the draws of controls."""
        return sum(arm.accuracy for arm in self.controls) / len(self.controls)

    @property
    def control_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of it, counting each example once, however many draws."""
        return _wilson(self.control_accuracy, len(self.examples))

    @property
    def difference(self) -> float:
        """Accuracy with the heads masked minus that of the controls; negative: the heads matter."""
        return self.masked.accuracy - self.control_accuracy

    @property
    def difference_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over examples of the difference; NaN with a single example."""
        masked, controls = self._paired()
        low, high = bootstrap_interval(masked - controls)
        return float(low[0]), float(high[0])

    @property
    def p(self) -> float:
        """One-sided paired p-value that masking these heads hurts more than the controls."""
        masked, controls = self._paired()
        return float(paired_test(controls, masked)[0])

    def _paired(self) -> tuple[np.ndarray, np.ndarray]:
        """Answers with the heads masked, and mean over control draws: both [example, 1]."""
        masked = np.array(self.masked.correct, dtype=np.float64)[:, None]
        controls = np.array([arm.correct for arm in self.controls], dtype=np.float64)
        return masked, controls.mean(0)[:, None]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, fit for JSON; what is undefined is None."""
        low, high = self.difference_interval

        def arm(a: MaskedArm) -> dict[str, Any]:
            return {
                "name": a.name,
                "heads": [str(h) for h in a.heads],
                "accuracy": a.accuracy,
                "interval": list(a.interval),
                "correct": list(a.correct),
            }

        return {
            "model": self.model,
            "detector": self.detector,
            "op": self.op,
            "phase": self.phase,
            "threshold": self.threshold,
            "params": dict(self.params),
            "examples": list(self.examples),
            "base": arm(self.base),
            "masked": arm(self.masked),
            "controls": [arm(a) for a in self.controls],
            "effect": self.effect,
            "control_accuracy": self.control_accuracy,
            "control_interval": list(self.control_interval),
            "difference": self.difference,
            "difference_interval": [None if math.isnan(x) else x for x in (low, high)],
            "p": self.p,
        }

    def __str__(self) -> str:
        k, draws = len(self.masked.heads), len(self.controls)
        spread = [arm.accuracy for arm in self.controls]
        drawn = f"{k} other heads, mean of {draws} draws ({min(spread):.2f} to {max(spread):.2f})"
        rows = [
            ("nothing masked", self.base.accuracy, self.base.interval),
            (f"{k} {self.detector} heads", self.masked.accuracy, self.masked.interval),
            (drawn, self.control_accuracy, self.control_interval),
        ]
        width = max(len(name) for name, _, _ in rows)
        title = f"{self.model}: {len(self.examples)} examples, op {self.op}, rows {self.phase}"
        lines = [title, f"{'masked':<{width}}  accuracy  95 % interval"]
        for name, accuracy, (low, high) in rows:
            lines.append(f"{name:<{width}}  {accuracy:8.2f}  {low:.2f} to {high:.2f}")
        low, high = self.difference_interval
        lines.append(
            f"difference {self.difference:+.2f} ({low:+.2f} to {high:+.2f}), p = {self.p:.2g}"
        )
        return "\n".join(lines)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of n examples (Wilson 1927)."""
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
