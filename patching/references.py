"""What a head's activation is replaced with: the other run's, zero, a mean, another example's."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.errors import InputError
from interp.registry import Registry
from interp.replay import Replay
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from patching.pairs import PairBatch, Pairs

Activation = Callable[[Replay, Layer], Tensor]
"""The activations of one site of one layer in a kept run: [batch, …]."""

Reference = Callable[["Pairs", "PairBatch", str, Activation, Layer], Tensor]
"""What to put in place: given pairs, the batch, the direction, the site and the layer."""

REFERENCES: Registry[Reference] = Registry("reference", "patching")


def other_run(batch: "PairBatch", direction: str) -> Replay:
    """The run from which activations are taken."""
    return batch.corrupted if direction == "noise" else batch.clean


@REFERENCES.register("other")
def _other(
    pairs: "Pairs", batch: "PairBatch", direction: str, site: Activation, layer: Layer
) -> Tensor:
    """The same activation of the other prompt of the pair."""
    return site(other_run(batch, direction), layer)


@REFERENCES.register("zero")
def _zero(
    pairs: "Pairs", batch: "PairBatch", direction: str, site: Activation, layer: Layer
) -> Tensor:
    """Zero."""
    return torch.zeros_like(site(other_run(batch, direction), layer))


@REFERENCES.register("mean")
def _mean(
    pairs: "Pairs", batch: "PairBatch", direction: str, site: Activation, layer: Layer
) -> Tensor:
    """Mean over all other prompts of the same length and template, per position."""
    means = pairs.means(direction, site, layer)
    return torch.stack([means[pairs.kind(p)] for p in batch.pairs])


@REFERENCES.register("resample")
def _resample(
    pairs: "Pairs", batch: "PairBatch", direction: str, site: Activation, layer: Layer
) -> Tensor:
    """The activation of another pair of the batch, drawn at random; never the example's own."""
    n = len(batch.pairs)
    if n < 2:
        raise InputError(
            "resampling needs at least 2 pairs of equal length; got 1 in a batch",
            hint="raise batch_size, or choose reference mean or zero",
        )
    rng = random.Random("/".join(p.clean.id for p in batch.pairs))
    shift = rng.randrange(1, n)
    mine = site(other_run(batch, direction), layer)
    return mine.roll(shift, dims=0)
