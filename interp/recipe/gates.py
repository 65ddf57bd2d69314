"""What gates decide while a recipe is on, and which positions their decisions are about.

Decisions are kept by decoding step, and a position follows the decision that was known when it was
first run. So a run without a cache, where every forward sees all positions again, gives the same
numbers as one with a cache.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.errors import InputError
from interp.recipe.when import Gate

if TYPE_CHECKING:
    from interp.recipe.place import Frame

Key = tuple[int, str]
"""A gate, by identity, and the tower whose stream it measures."""


@dataclass(frozen=True)
class Decision:
    """What a gate decided for one forward.

    Attributes:
        step: decoding step; 0 is the prompt.
        layer: layer measured.
        cosine: per example.
        open: per example.
    """

    step: int
    layer: int
    cosine: tuple[float, ...]
    open: tuple[bool, ...]


class Gates:
    """The decisions of all gates of one session.

    Attributes:
        log: every decision, in order.
    """

    def __init__(self) -> None:
        self.log: list[Decision] = []
        self._open: dict[Key, dict[int, Tensor]] = {}

    def clear(self) -> None:
        """Forget all decisions, for a new prompt; the log stays."""
        self._open.clear()

    def reorder(self, order: Tensor) -> None:
        """Row i goes on with what row order[i] was."""
        for steps in self._open.values():
            for step, rows in steps.items():
                steps[step] = rows[order.to(rows.device)]

    def decide(self, gate: Gate, tower: str, x: Tensor, frame: "Frame") -> None:
        """Measure the stream x [batch, pos, d_model] before the gate's layer.

        Raises:
            InputError: the axis does not fit the stream.
        """
        if gate.axis.shape[0] != x.shape[-1]:
            raise InputError(
                f"the axis of a gate must have the {x.shape[-1]} numbers of the residual stream; "
                f"got {gate.axis.shape[0]}"
            )
        if gate.evaluate == "prompt" and frame.step > 0:
            return
        last = torch.full((x.shape[0],), x.shape[1] - 1, device=x.device)
        if frame.step == 0 and frame.past == 0:  # on the right, padding follows the last token
            last = (frame.offsets + frame.lengths - 1).clamp(max=x.shape[1] - 1)
        open_, cosine = gate.decide(x[torch.arange(x.shape[0], device=x.device), last])
        self._open.setdefault((id(gate), tower), {})[frame.step] = open_
        self.log.append(
            Decision(frame.step, gate.layer, tuple(cosine.tolist()), tuple(open_.tolist()))
        )

    def mask(
        self, gate: Gate, tower: str, steps: list[int], *, now: bool, rows: int, like: Tensor
    ) -> Tensor:
        """[batch, pos] at which positions the gate is open.

        Args:
            gate: the gate.
            tower: whose stream it measures.
            steps: the step at which each position was first run.
            now: whether the edit comes after the measurement in a forward.
            rows: examples.
            like: where the answer lives.
        """
        made = self._open.get((id(gate), tower), {})
        closed = torch.zeros(rows, dtype=torch.bool, device=like.device)
        columns = {}
        for step in set(steps):
            upto = step if now else step - 1
            known = [s for s in made if s <= upto]
            columns[step] = made[max(known)].to(like.device) if known else closed
        return torch.stack([columns[step] for step in steps], 1)
