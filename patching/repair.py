"""Self-repair: heads that step in when others are ablated, and the same done by hand.

The effect of a set is set beside the sum of its heads' single effects: where it is larger, the
heads stand in for one another. Which later heads step in is seen from their direct effect, the
share of the metric that they themselves write, with and without the ablation; the direct effect of
the ablated head itself is what would be lost if nothing compensated.

`force_attention` repairs by hand: given heads attend from chosen queries to chosen keys only.

Sources: McGrath et al. 2307.15771; Rushing & Nanda 2402.15390; Merullo et al. 2310.08744,
section 5, for the intervention on attention.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.recipe import Edit, Recipe, Where
from interp.recipe.where import read_heads
from interp.replay import Overlay, Record, Replay
from patching.direct import written
from patching.engine import prepared
from patching.knockout import group_positions, query_positions
from patching.pairs import Pairs
from patching.prune import ablated_logits, replacements
from patching.readout import Readout, readout


@dataclass(frozen=True, eq=False)
class Repair:
    """What ablating a set of heads does, and which heads step in.

    Attributes:
        heads: the ablated set.
        joint: [example] effect of ablating all of them.
        singles: [example, head] effect of ablating each alone.
        lost: [example] direct effect of the set on the clean run: what it writes into the metric,
            with its sign turned, so that without any repair joint = lost.
        later: heads above the first ablated layer, outside the set.
        change: [example, later] change of what each of them writes into the metric.
        examples: ids.
        metric: name of the metric.
    """

    heads: tuple[HeadId, ...]
    joint: Float[np.ndarray, " example"]
    singles: Float[np.ndarray, "example head"]
    lost: Float[np.ndarray, " example"]
    later: tuple[HeadId, ...]
    change: Float[np.ndarray, "example later"]
    examples: tuple[str, ...]
    metric: str

    @property
    def excess(self) -> float:
        """Mean joint effect minus the sum of mean single ones; below 0: heads back each other."""
        return float(self.joint.mean() - self.singles.mean(0).sum())

    @property
    def repaired(self) -> float:
        """Mean joint effect minus what was lost: how much the rest of the model makes good."""
        return float(self.joint.mean() - self.lost.mean())

    def compensating(self, n: int = 10) -> list[tuple[HeadId, float]]:
        """Later heads by how much more they write into the metric, most first."""
        mean = self.change.mean(0)
        order = np.argsort(-mean, kind="stable")[:n]
        return [(self.later[i], float(mean[i])) for i in order]


@torch.no_grad()
def self_repair(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    heads: Iterable[HeadId | str],
    *,
    reference: str = "zero",
    metric: str = "logit-difference",
    batch_size: int = 8,
    tower: str = "text",
) -> Repair:
    """Ablate a set of heads and see what the rest of the model makes of it.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        heads: the set.
        reference: `zero`, `mean`, `resample` or `other`.
        metric: name of a metric that is linear in the logits.
        batch_size: pairs at a time.
        tower: tower of the heads.

    Raises:
        InputError: no heads, or a metric that is not linear in the logits.
        SiteError: what heads write cannot be read off on this model.
    """
    chosen = read_heads(tuple(heads))
    for head in chosen:
        model.layer_of(head)
    data = prepared(model, pairs, metric, batch_size, tower)
    if not data.metric.linear:
        raise InputError(
            f"direct effects need a metric that is linear in the logits; got {data.metric.name!r}",
            hint="use logit-difference or logit",
        )
    lowest = min(h.layer for h in chosen)
    later = tuple(
        h for h in model.tower(tower).heads if h.layer > lowest and h not in set(chosen)
    )  # fmt: skip
    n = len(data.pairs)
    joint, singles, lost = np.zeros(n), np.zeros((n, len(chosen))), np.zeros(n)
    change = np.zeros((n, len(later)))
    for places, batch in data.batches():
        base = batch.clean
        new = replacements(data, batch, reference, tower)
        values = batch.score(ablated_logits(base, new, [chosen, *((h,) for h in chosen)]))
        effects = (values - batch.score(base.logits)).cpu().numpy()
        joint[places], singles[places] = effects[0], effects[1:].T
        read = readout(base, batch)
        before = _shares(read, base, {x: k.z[:, -1] for x, k in base.kept.items()})
        z, resid = _ablated(base, new, chosen)
        after = _shares(_moved(read, resid), base, {x: v[:, -1] for x, v in z.items()})
        gone = _shares(read, base, {x: v[:, -1] for x, v in new.items()})
        lost[places] = torch.stack([gone[h] - before[h] for h in chosen]).sum(0).cpu()
        for i, head in enumerate(later):
            change[places, i] = (after[head] - before[head]).cpu()
    return Repair(chosen, joint, singles, lost, later, change, data.ids, data.metric.name)


def _ablated(
    base: Replay, new: Mapping[str, Tensor], heads: Iterable[HeadId]
) -> tuple[dict[str, Tensor], Tensor]:
    """Z of every layer, and the stream at the end, with heads ablated."""
    overlays: dict[str, Overlay] = {}
    for head in heads:
        layer = base.model.layer_of(head)
        if layer.name not in overlays:
            mask = torch.zeros(1, layer.n_heads, dtype=torch.bool, device=base.model.device)
            overlays[layer.name] = Overlay(new[layer.name][None], mask)
        overlays[layer.name].heads[0, head.head] = True
    record = Record(blocks=(base.blocks[-1],))
    base.rerun({}, copies=1, overlays=overlays, record=record)
    z = {name: kept.z for name, kept in base.kept.items()} | record.z
    return z, record.leaving[base.blocks[-1]][:, -1]


def _moved(read: Readout, resid: Tensor) -> Readout:
    return replace(read, resid=resid)


def _shares(read: Readout, base: Replay, z: Mapping[str, Tensor]) -> dict[HeadId, Tensor]:
    """What each head writes into the metric: [batch]."""
    out = {}
    for layer in base.tower.layers:
        parts = written(base.model, layer, z[layer.name]).transpose(0, 1)
        for h, share in enumerate(read.share(parts)):
            out[HeadId(layer.index, h, layer.tower)] = share
    return out


def force_attention(
    heads: Iterable[HeadId | str], *, keys: str, queries: str = "last", strength: float = 1.0
) -> Recipe:
    """A recipe that makes heads attend uniformly to some keys from some queries.

    Args:
        heads: the heads.
        keys: token group to attend to: spans, `all`, or `~span`; see `patching.knockout`.
        queries: token group that attends.
        strength: 1 replaces the row, 0 leaves it.
    """
    where = Where(
        heads=read_heads(tuple(heads)), queries=query_positions(queries),
        keys=group_positions(keys, queries),
    )  # fmt: skip
    return Recipe((Edit("override", where, strength),))
