"""Attention knockout: some queries may no longer look at some keys.

The keys are hidden before the softmax, so the rest of the row shares the attention; no other part
of the model is changed. Per head the effect is the change of the metric, m(knocked out) − m(clean);
for all heads of windows of layers see `patching.windows`.

A token group is the name of a span, `last` (the last token), `all`, or several with commas; with
`~` before it, every token outside of these. Keys with `~` leave out the queries too, which so keep
themselves; as keys, `others` is every token but the queries.

Sources: Geva et al. 2304.14767, section 5; per head, Wang et al. 2211.00593.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Batch, PromptPair
from interp.recipe import Edit, Positions, Recipe, Where
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.calls import MASKED
from interp.seam.structure import Layer
from patching.effects import table
from patching.engine import by_layer, prepared, sweep, units_of
from patching.method import METHODS, Method
from patching.pairs import Pairs


def _named(group: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a group is all that lies outside of the names, and the names."""
    return group.startswith("~"), tuple(dict.fromkeys(group.removeprefix("~").split(",")))


def _inside(names: Sequence[str]) -> Positions:
    if "all" in names:
        return Positions(prompt="all")
    last = (-1,) if "last" in names else None
    return Positions(prompt=last, spans=tuple(n for n in names if n != "last"))


def query_positions(group: str) -> Positions:
    """A token group as positions of a recipe."""
    outside, names = _named(group)
    return Positions(prompt="all", exclude=_inside(names)) if outside else _inside(names)


def group_positions(keys: str, queries: str) -> Positions:
    """The keys of a knockout as positions of a recipe."""
    outside, names = _named(queries)
    if keys == "others":
        return _inside(names) if outside else Positions(prompt="all", exclude=_inside(names))
    around, mine = _named(keys)
    if not around:
        return _inside(mine)
    if outside:
        return replace(_inside(names), exclude=_inside(mine))
    return Positions(prompt="all", exclude=_inside(tuple(dict.fromkeys((*mine, *names)))))


def query_mask(batch: Batch, group: str) -> Bool[Tensor, "batch pos"]:
    """A token group as columns of a batch.

    Raises:
        SpanError: a prompt has no such span.
    """
    outside, names = _named(group)
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        for part in names:
            places = [len(prompt) - 1] if part == "last" else prompt.positions(part)
            mask[row, [offset + i for i in places]] = True
    return batch.attention_mask.bool() & ~mask if outside else mask


def group_mask(batch: Batch, keys: str, queries: str) -> Bool[Tensor, "batch pos"]:
    """The keys of a knockout as columns of a batch.

    Raises:
        SpanError: a prompt has no such span.
    """
    rows = query_mask(batch, queries)
    if keys == "others":
        return batch.attention_mask.bool() & ~rows
    mask = query_mask(batch, keys)
    return mask & ~rows if keys.startswith("~") else mask


@torch.no_grad()
def head_knockout(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    queries: str = "last",
    keys: str = "others",
    metric: str = "logit-difference",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Effect of knocking attention out in each head of the clean runs.

    Args:
        model: the model.
        pairs: prompts; corrupted ones only give the scale of `recovered`.
        queries: token group that may no longer look.
        keys: token group that is hidden from it.
        metric: name of a metric.
        heads: only these heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with heads done and heads in all.

    Raises:
        InputError: a row is left without keys.
        SpanError: a prompt has no such span.
    """
    units, _ = units_of(model, tower, "z", heads)
    data = prepared(model, pairs, metric, batch_size, tower)
    out = np.zeros((len(data.pairs), len(units)))
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.groups())
    for places, batch in data.batches():
        base = batch.clean
        floor = batch.score(base.logits)
        clean[places] = floor.cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        rows = query_mask(base.batch, queries)
        hidden = group_mask(base.batch, keys, queries)
        start = int(rows.any(0).nonzero()[0])
        for layer, members in by_layer(model, units):
            if layer.reached == "interface":
                new = knocked_out(base, layer, rows, hidden)
                groups: list[tuple[int, ...]] = [(m.head,) for m in members]
                runs = sweep(base, layer, new, groups, start)
            else:
                runs = _by_recipe(base, members, queries, keys)
            for at, logits in runs:
                effect = (batch.score(logits) - floor).cpu().numpy()
                for i, unit in enumerate(members[at : at + len(effect)]):
                    out[places, column[unit]] = effect[i]
            done += len(members)
            if progress is not None:
                progress(done, total)
    return table(
        "knockout", model, data, units, out, clean, corrupted,
        params={"queries": queries, "keys": keys},
    )  # fmt: skip


def _by_recipe(
    base: Replay, members: Sequence[HeadId], queries: str, keys: str
) -> Iterator[tuple[int, Tensor]]:
    """Whole runs, where q and k are not reached but the pattern is."""
    where_q, where_k = query_positions(queries), group_positions(keys, queries)
    for at, head in enumerate(members):
        edit = Edit("knockout", Where(heads=(head,), queries=where_q, keys=where_k))
        with Recipe((edit,)).on(base.model, spans=base.batch):
            out = base.model.forward(base.batch.inputs())
        logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
        yield at, logits[None, :, -1].float()


def knocked_out(
    base: Replay, layer: Layer, rows: Bool[Tensor, "batch pos"], hidden: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos head d_v"]:
    """Z of every head had the rows not seen the hidden keys.

    Raises:
        InputError: a row is left without keys.
    """
    call, heads = base.call(layer), slice(0, layer.n_heads)
    patterns = []
    for b in range(len(base.batch)):
        scores = call.scores(b, heads, slice(0, call.n_query))
        seen = scores > MASKED / 2
        cut = (rows[b][:, None] & hidden[b][None, :])[None]
        empty = (seen.any(-1) & ~(seen & ~cut).any(-1)).any(0)
        if bool(empty.any()):
            raise InputError(
                f"a row of attention must keep a key; query {int(empty.nonzero()[0])} of prompt "
                f"{base.batch.prompts[b].id or b} loses all of them in {layer.name}",
                hint="leave the query itself: keys='others', or a smaller span",
            )
        patterns.append(call.normalised(scores.masked_fill(cut, MASKED), heads))
    new = base.z_under(layer, heads, pattern=torch.stack(patterns))
    return torch.where(rows[:, :, None, None], new, base.kept[layer.name].z)


@METHODS.register("knockout")
@dataclass(frozen=True)
class Knockout(Method):
    """Exact effect of hiding keys from queries in each head.

    Attributes:
        queries: token group that may no longer look; see the module's docstring.
        keys: token group that is hidden from it, or `others`.
    """

    queries: str = "last"
    keys: str = "others"

    name: ClassVar[str] = "knockout"
    summary: ClassVar[str] = "hide keys from queries in one head; exact"
    citation: ClassVar[str] = "Geva et al. 2023, arXiv 2304.14767, section 5"

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return head_knockout(
            pairs.model, pairs, queries=self.queries, keys=self.keys, tower=pairs.tower,
            progress=progress,
        )  # fmt: skip
