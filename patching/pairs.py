"""Pairs of clean and corrupted prompts, cut into batches of one length."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.memory import fitting, halving
from interp.metrics import METRICS, Bound, Metric, bind, per_example
from interp.prompts import Prompt, PromptPair
from interp.replay import Replay

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one batch, with their kept runs.

    Attributes:
        pairs: the pairs; their clean prompts name the answers.
        clean: the kept run of the clean prompts.
        corrupted: the kept run of the corrupted prompts.
        metric: the metric.
        bound: its answers.
    """

    pairs: tuple[PromptPair, ...]
    clean: Replay
    corrupted: Replay
    metric: Metric
    bound: Bound

    def score(self, logits: Tensor) -> Tensor:
        """The metric of logits [..., batch, d_vocab]: [..., batch]."""
        return per_example(self.metric.of(logits, self.bound), logits)

    @property
    def first(self) -> int:
        """First column before which nothing can change.

        That is the first in which any pair differs, where every layer looks back only.
        """
        if not all(x.causal for x in self.clean.tower.layers) or self.clean.batch.extra:
            return 0
        a, b = self.clean.batch.input_ids, self.corrupted.batch.input_ids
        columns = (a != b).any(0).nonzero()
        return int(columns[0]) if len(columns) else 0


class Pairs:
    """Prompt pairs for a model and a metric.

    Args:
        model: the model.
        pairs: at least one; ids of clean prompts must differ.
        metric: name of a metric, or a metric.
        batch_size: pairs at a time; only pairs of equal length share a batch.
        tower: tower whose heads are patched.

    Raises:
        InputError: no pairs, ids that are not unique, or prompts without what the metric needs.
        UnknownNameError: no such metric.
    """

    def __init__(
        self,
        model: "Model",
        pairs: Sequence[PromptPair],
        *,
        metric: str | Metric = "logit-difference",
        batch_size: int = 8,
        tower: str = "text",
    ) -> None:
        if not pairs:
            raise InputError(
                "at least one pair is needed; got none", hint="take them from a task such as ioi"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {batch_size}")
        self.model, self.tower = model, tower
        self.metric = METRICS[metric] if isinstance(metric, str) else metric
        self.pairs = tuple(
            p if p.clean.id else PromptPair(_named(p.clean, i), p.corrupted)
            for i, p in enumerate(pairs)
        )
        if len(set(self.ids)) != len(self.pairs):
            raise InputError("ids of prompts must all be different")
        bind(self.metric, [p.clean for p in self.pairs], model.device)
        self.batch_size = batch_size
        self._means: dict[Any, dict[str, dict[tuple[int, Any], Tensor]]] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the clean prompts."""
        return tuple(p.clean.id for p in self.pairs)

    def groups(self) -> list[list[int]]:
        """Places of the pairs of each batch."""
        by_length: dict[int, list[int]] = {}
        for i, pair in enumerate(self.pairs):
            by_length.setdefault(len(pair.clean), []).append(i)
        return [
            places[at : at + self.batch_size]
            for _, places in sorted(by_length.items())
            for at in range(0, len(places), self.batch_size)
        ]

    def kind(self, pair: PromptPair) -> tuple[int, Any]:
        """What pairs share whose positions mean the same: length, and template where one is named.

        Templates are what a task notes in `meta["template"]`.
        """
        return len(pair.clean), pair.clean.meta.get("template")

    def means(
        self, direction: str, site: "Callable[[Replay, Layer], Tensor]", layer: "Layer"
    ) -> dict[tuple[int, Any], Tensor]:
        """Mean of a site of a layer over the prompts that activations are taken from, by kind.

        All pairs count, however they are cut into batches; one pass serves all layers.
        """
        key = (direction, site)
        if key not in self._means:
            total: dict[str, dict[tuple[int, Any], Tensor]] = {}
            for _, batch in self.batches():
                run = batch.corrupted if direction == "noise" else batch.clean
                for some in self.model.tower(self.tower).layers:
                    try:
                        value = site(run, some)
                    except SiteError:  # a layer that nobody may ask for
                        continue
                    sums = total.setdefault(some.name, {})
                    for pair, x in zip(batch.pairs, value, strict=True):
                        kind = self.kind(pair)
                        sums[kind] = sums[kind] + x if kind in sums else x.clone()
            count = Counter(self.kind(p) for p in self.pairs)
            self._means[key] = {
                name: {kind: x / count[kind] for kind, x in sums.items()}
                for name, sums in total.items()
            }
        if layer.name not in self._means[key]:
            site(self.batch(self.pairs[:1]).clean, layer)  # says why it is not reached
        return self._means[key][layer.name]

    def batches(self) -> Iterator[tuple[list[int], PairBatch]]:
        """Each batch with its kept runs, and the places of its pairs."""
        for places in self.groups():
            for some, made in halving(
                places, lambda p: self.batch(tuple(self.pairs[i] for i in p)), what="pairs"
            ):
                yield list(some), made

    def batch(self, chosen: tuple[PromptPair, ...]) -> PairBatch:
        """The kept runs of some pairs."""
        with fitting(f"{len(chosen)} pairs", "use shorter prompts, or dtype bfloat16"):
            return self._batch(chosen)

    def _batch(self, chosen: tuple[PromptPair, ...]) -> PairBatch:
        model = self.model
        clean = Replay(
            model, model.batch([p.clean for p in chosen], side="left"), tower=self.tower
        )  # fmt: skip
        other = Replay(
            model, model.batch([p.corrupted for p in chosen], side="left"), tower=self.tower
        )  # fmt: skip
        bound = bind(self.metric, [p.clean for p in chosen], model.device)
        if self.metric.compares:
            bound = Bound(bound.answer, bound.wrong, clean.logits)
        return PairBatch(chosen, clean, other, self.metric, bound)


def _named(prompt: Prompt, i: int) -> Prompt:
    from dataclasses import replace

    return replace(prompt, id=f"pair-{i}")


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """Mean over examples of tensors [batch, …]."""
    return torch.cat(list(tensors)).mean(0, keepdim=True)
