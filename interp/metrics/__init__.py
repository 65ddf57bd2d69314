"""Metrics: logits of a batch to one number per example. One file per family, registering itself.

A metric is bound to prompts once (their answers become tensors) and then applied to the logits at
the last token, with any number of leading axes: [..., batch, d_vocab] to [..., batch].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from interp.errors import InputError
from interp.prompts import Prompt
from interp.registry import Registry


@dataclass(frozen=True)
class Bound:
    """Answers of a batch as tensors.

    Attributes:
        answer: [batch] first token of each answer; 0 where a prompt has none and none is needed.
        wrong: [batch] token each answer is compared with, or None where a prompt names none.
        reference: [batch, d_vocab] logits of the unedited run, for metrics that compare.
    """

    answer: Tensor
    wrong: Tensor | None
    reference: Tensor | None = None


class Metric(ABC):
    """Base of all metrics.

    Attributes:
        summary: one line.
        unit: of the number.
        linear: whether it is linear in the logits.
        needs_answer: whether each prompt must have an answer.
        needs_wrong: whether each prompt must name a wrong answer (`meta["wrong"]`).
        compares: whether it compares with the logits of the unedited run.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    unit: ClassVar[str]
    linear: ClassVar[bool] = False
    needs_answer: ClassVar[bool] = True
    needs_wrong: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    @abstractmethod
    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """One number per example: [..., batch, d_vocab] to [..., batch]."""


METRICS: Registry[Metric] = Registry("metric", "interp.metrics")


def bind(metric: Metric, prompts: Sequence[Prompt], device: "torch.device | str") -> Bound:
    """The answers of prompts as tensors.

    Raises:
        InputError: a prompt has no answer, or no wrong one where the metric needs it.
    """
    answers, wrongs = [], []
    for prompt in prompts:
        if metric.needs_answer and not prompt.answer:
            raise InputError(
                f"metric {metric.name!r} needs an answer; prompt {prompt.id or '?'} has none",
                hint="give prompts an answer, or choose a task with answers",
            )
        # What no metric looks at may be any token.
        answers.append(prompt.answer[0] if prompt.answer else 0)
        wrong = prompt.meta.get("wrong")
        wrong = wrong[0] if isinstance(wrong, tuple | list) and wrong else wrong
        if metric.needs_wrong and wrong is None:
            raise InputError(
                f"metric {metric.name!r} needs a wrong answer; prompt {prompt.id or '?'} names "
                f"none in meta['wrong']",
                hint="choose metric log-prob, or a task with wrong answers such as ioi",
            )
        wrongs.append(wrong)
    known = all(w is not None for w in wrongs)
    return Bound(
        torch.tensor(answers, device=device),
        torch.tensor(wrongs, device=device) if known else None,
    )


def per_example(values: Tensor, logits: Tensor) -> Tensor:
    """Check that a metric gave one number per example of logits [..., batch, d_vocab].

    Raises:
        InputError: it gave something else.
    """
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if got != tuple(logits.shape[:-1]):
        raise InputError(
            f"a metric gives one number per example, shape {tuple(logits.shape[:-1])} here; got "
            f"{got}",
            hint="reduce over the vocabulary only: logits [..., batch, d_vocab] to [..., batch]",
        )
    return values


__all__ = ["METRICS", "Bound", "Metric", "bind", "per_example"]
