"""When an edit acts: gates per example, and schedules of its strength over decoding steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError


@dataclass(frozen=True)
class Gate:
    """Act only on examples whose residual stream lies on one side of a threshold.

    The cosine of the axis and the stream before `layer`, at the last position of the forward, is
    compared with the threshold, per example. Edits of earlier layers see the decision from the
    next step on; until the first decision a gate is closed. A position follows the decision that
    was known when it was first run.

    Attributes:
        axis: [d_model].
        layer: layer whose input is measured.
        threshold: of the cosine, within [-1, 1].
        side: `above` or `below`.
        evaluate: `prompt` decides once, at the end of the prompt; `step` at every forward.

    Conditional activation steering: Lee et al. 2409.05907.
    """

    axis: Tensor
    layer: int
    threshold: float
    side: str = "above"
    evaluate: str = "prompt"

    def __post_init__(self) -> None:
        if self.axis.dim() != 1:
            raise InputError(f"the axis of a gate is one vector [d_model]; got {self.axis.shape}")
        if self.side not in ("above", "below"):
            raise InputError(f"the side of a gate is above or below; got {self.side!r}")
        if self.evaluate not in ("prompt", "step"):
            raise InputError(f"a gate is evaluated at prompt or step; got {self.evaluate!r}")
        if not -1 <= self.threshold <= 1:
            raise InputError(f"a cosine lies within [-1, 1]; got threshold {self.threshold}")

    @torch.no_grad()
    def decide(self, resid: Tensor) -> tuple[Tensor, Tensor]:
        """Whether it is open, and the cosine, for each row of resid [batch, d_model]."""
        axis = self.axis.to(resid.device, torch.float32)
        cosine = torch.nn.functional.cosine_similarity(resid.float(), axis[None], dim=-1)
        open_ = cosine > self.threshold if self.side == "above" else cosine < self.threshold
        return open_, cosine

    def to_json(self) -> dict[str, Any]:
        """All but the axis, as plain values."""
        return {
            "layer": self.layer, "threshold": self.threshold, "side": self.side,
            "evaluate": self.evaluate,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"if cosine at layer {self.layer} is {self.side} {self.threshold:g}"


@dataclass(frozen=True)
class Schedule:
    """How the strength changes with the decoding step; the prompt is step 0.

    The strength moves between the op's neutral value and its full value: at factor f an edit has
    strength neutral + f·(strength − neutral).

    Attributes:
        kind: `linear` rises from 0 to 1 over `steps`; `decay` falls by `rate` each step; `first`
            is 1 for the first `steps` steps and 0 after.
        steps: of `linear` and `first`.
        rate: of `decay`, within (0, 1).
    """

    kind: str
    steps: int = 10
    rate: float = 0.9

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "decay", "first"):
            raise InputError(f"a schedule is linear, decay or first; got {self.kind!r}")
        if self.steps < 1 or not 0 < self.rate < 1:
            raise InputError(
                f"a schedule needs steps >= 1 and a rate within (0, 1); got {self.steps} and "
                f"{self.rate}"
            )

    def factor(self, step: int) -> float:
        """The factor at a step."""
        if self.kind == "linear":
            return min(1.0, step / self.steps)
        if self.kind == "decay":
            return float(self.rate**step)
        return float(step < self.steps)

    def to_json(self) -> dict[str, Any]:
        """The schedule as plain values."""
        return {"kind": self.kind, "steps": self.steps, "rate": self.rate}

    def __str__(self) -> str:
        if self.kind == "decay":
            return f"decaying by {self.rate:g} a step"
        return f"{'rising over' if self.kind == 'linear' else 'for the first'} {self.steps} steps"


def schedule_from_json(data: Mapping[str, Any]) -> Schedule:
    """The reverse of `Schedule.to_json`."""
    return Schedule(**data)
