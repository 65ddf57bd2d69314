"""Ablating sets of heads: one at a time, jointly, and greedily, always measured.

Many sets are run at once, each in a copy of the batch of its own, from the first layer that any of
them touches. Effect of a set = m(set ablated) − m(clean). The effect of a set is not the sum of the
effects of its heads: redundant heads stand in for one another.

Source: Michel et al. 2019, arXiv 1905.10650, section 4 (pruning; here exact, not by gradient).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.recipe.where import read_heads
from interp.replay import Overlay, Replay
from interp.scores import HeadScores
from patching.engine import SITES, head_effects, prepared, size_of_launch, units_of
from patching.pairs import PairBatch, Pairs

if TYPE_CHECKING:
    import plotly.graph_objects as go

Heads = Iterable[HeadId | str]


def leave_one_out(
    model: Model, pairs: Sequence[PromptPair] | Pairs, *, reference: str = "zero",
    metric: str = "logit-difference", heads: Heads | None = None, batch_size: int = 8,
    tower: str = "text",
) -> HeadScores:  # fmt: skip
    """Effect of ablating each head alone; see `patching.engine.head_effects`."""
    return head_effects(
        model, pairs, reference=reference, metric=metric, heads=heads, batch_size=batch_size,
        tower=tower,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SetEffects:
    """Effects of ablating sets of heads.

    Attributes:
        sets: the sets.
        per_example: [example, set] m(set ablated) − m(clean).
        clean: [example] m(clean).
        examples: ids.
        metric: name of the metric.
    """

    sets: tuple[tuple[HeadId, ...], ...]
    per_example: Float[np.ndarray, "example set"]
    clean: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    metric: str

    @property
    def values(self) -> Float[np.ndarray, " set"]:
        """Mean over examples."""
        return np.asarray(self.per_example.mean(0))


def replacements(
    data: Pairs, batch: PairBatch, reference: str, tower: str
) -> dict[str, Float[Tensor, "batch pos head d_v"]]:
    """What ablated heads put out, by attention module."""
    layers = data.model.tower(tower).layers
    return {x.name: SITES["z"](data, batch, "noise", reference, x) for x in layers}


@torch.no_grad()
def ablated_logits(
    base: Replay, new: Mapping[str, Tensor], sets: Sequence[Iterable[HeadId]]
) -> Float[Tensor, "set batch d_vocab"]:
    """Logits at the last token with each set of heads replaced, in copies of the batch."""
    model, size = base.model, size_of_launch(base, 0)
    out: list[Tensor] = []
    for at in range(0, len(sets), size):
        some = [list(heads) for heads in sets[at : at + size]]
        masks: dict[str, Tensor] = {}
        for i, heads in enumerate(some):
            for head in heads:
                layer = model.layer_of(head)
                mask = masks.setdefault(
                    layer.name,
                    torch.zeros(len(some), layer.n_heads, dtype=torch.bool, device=model.device),
                )
                mask[i, head.head] = True
        if not masks:
            out.extend(base.logits for _ in some)
            continue
        overlays = {
            name: Overlay(new[name][None].expand(len(some), *new[name].shape), mask)
            for name, mask in masks.items()
        }
        out.extend(base.rerun({}, copies=len(some), overlays=overlays))
    return torch.stack(out)


@torch.no_grad()
def joint_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    sets: Sequence[Heads],
    *,
    reference: str = "zero",
    metric: str = "logit-difference",
    batch_size: int = 8,
    tower: str = "text",
) -> SetEffects:
    """Effect of ablating each set of heads.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        sets: sets of heads; an empty one changes nothing.
        reference: `zero`, `mean`, `resample` or `other`.
        metric: name of a metric.
        batch_size: pairs at a time.
        tower: tower of the heads.

    Raises:
        InputError: there is no set.
        HeadIdError: a head lies outside the model.
    """
    chosen = tuple(_read(model, heads, tower) for heads in sets)
    if not chosen:
        raise InputError("at least one set of heads is needed; got none")
    data = prepared(model, pairs, metric, batch_size, tower)
    out = np.zeros((len(data.pairs), len(chosen)))
    clean = np.zeros(len(data.pairs))
    for places, batch in data.batches():
        floor = batch.score(batch.clean.logits)
        clean[places] = floor.cpu()
        new = replacements(data, batch, reference, tower)
        logits = ablated_logits(batch.clean, new, chosen)
        out[places] = (batch.score(logits) - floor).T.cpu()
    return SetEffects(chosen, out, clean, data.ids, data.metric.name)


def _read(model: Model, heads: Heads, tower: str) -> tuple[HeadId, ...]:
    given = tuple(heads)
    return units_of(model, tower, "z", given)[0] if given else ()


@dataclass(frozen=True, eq=False)
class PruneCurve:
    """Heads in the order in which they were pruned.

    Attributes:
        order: heads, first pruned first.
        per_example: [example, step] the metric with the first step + 1 heads ablated.
        clean: [example] the metric with none ablated.
        examples: ids.
        metric: name of the metric.
        reference: what pruned heads put out.
    """

    order: tuple[HeadId, ...]
    per_example: Float[np.ndarray, "example step"]
    clean: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    metric: str
    reference: str

    @property
    def values(self) -> Float[np.ndarray, " step"]:
        """Mean metric after each step."""
        return np.asarray(self.per_example.mean(0))

    def kept(self, share: float) -> int:
        """Most heads that can be pruned with the metric at least `share` of the clean one."""
        good = np.nonzero(self.values >= share * self.clean.mean())[0]
        return int(good[-1]) + 1 if len(good) else 0

    def plot(self) -> "go.Figure":
        """The metric over the number of pruned heads."""
        import plotly.graph_objects as go

        line = [float(self.clean.mean()), *map(float, self.values)]
        names = ["none", *map(str, self.order)]
        figure = go.Figure(go.Scatter(x=list(range(len(line))), y=line, text=names))
        figure.update_layout(xaxis_title="heads pruned", yaxis_title=self.metric)
        return figure


@torch.no_grad()
def greedy_prune(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    steps: int | None = None,
    reference: str = "zero",
    metric: str = "logit-difference",
    heads: Heads | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> PruneCurve:
    """At each step ablate the head whose loss costs the metric least, and measure anew.

    About n²/2 runs for n heads, many at once; ties go to the first head.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        steps: number of heads to prune; all of them if None.
        reference: `zero`, `mean`, `resample` or `other`.
        metric: name of a metric of which more is better.
        heads: candidates; all heads if None.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with steps done and steps in all.

    Raises:
        InputError: more steps than candidates, or fewer than one.
    """
    every = model.tower(tower).heads if heads is None else read_heads(tuple(heads))
    left = list(_read(model, every, tower))
    steps = len(left) if steps is None else steps
    if not 1 <= steps <= len(left):
        raise InputError(f"steps must lie between 1 and the {len(left)} heads; got {steps}")
    data = prepared(model, pairs, metric, batch_size, tower)
    kept = [(p, b, replacements(data, b, reference, tower)) for p, b in data.batches()]
    clean = np.zeros(len(data.pairs))
    for places, batch, _ in kept:
        clean[places] = batch.score(batch.clean.logits).cpu()
    order: list[HeadId] = []
    curve = []
    for step in range(steps):
        values = np.zeros((len(data.pairs), len(left)))
        for places, batch, new in kept:
            logits = ablated_logits(batch.clean, new, [(*order, head) for head in left])
            values[places] = batch.score(logits).T.cpu()
        best = int(values.mean(0).argmax())
        order.append(left.pop(best))
        curve.append(values[:, best])
        if progress is not None:
            progress(step + 1, steps)
    return PruneCurve(
        tuple(order), np.stack(curve, 1), clean, data.ids, data.metric.name, reference
    )
