"""Attention knockout: some queries may no longer look at some keys.

The keys are hidden before the softmax, so the rest of the row shares the attention; no other part
of the model is changed. In windows of layers, all heads at once, the effect is the relative change
of the probability of an answer, (p′ − p) / p, at least −1. Per head it is the change of the metric,
m(knocked out) − m(clean).

Token groups are names of spans, `last` (the last token), `all`, or `~name`: everything outside the
span but not the queries themselves, which keep themselves; `others` is every token but the query.

Source: Geva et al. 2304.14767, section 5, for the windows; per head, Wang et al. 2211.00593.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Batch, Prompt, PromptPair
from interp.recipe import Edit, Positions, Recipe, Where
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.calls import MASKED
from interp.seam.structure import Layer
from patching.effects import table
from patching.engine import by_layer, prepared, sweep, units_of
from patching.method import METHODS, Method
from patching.pairs import Pairs

TARGETS = ("predicted", "answer")
LAST = Positions(prompt=(-1,))


def group_positions(keys: str, queries: str) -> Positions:
    """The keys of a knockout as positions of a recipe."""
    if keys == "others":
        keys = f"~{queries}"
    if keys.startswith("~"):
        names = [n for n in dict.fromkeys((keys[1:], queries)) if n != "last"]
        last = (-1,) if "last" in (keys[1:], queries) else None
        return Positions(prompt="all", exclude=Positions(prompt=last, spans=tuple(names)))
    return query_positions(keys)


def query_positions(name: str) -> Positions:
    """A token group as positions of a recipe."""
    if name == "last":
        return LAST
    return Positions(prompt="all") if name == "all" else Positions(spans=tuple(name.split(",")))


def group_mask(batch: Batch, name: str, queries: str = "last") -> Bool[Tensor, "batch pos"]:
    """The same token group as columns of a batch.

    Raises:
        SpanError: a prompt has no such span.
    """
    mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    if name == "others":
        name = f"~{queries}"
    if name.startswith("~"):
        real = batch.attention_mask.bool()
        return real & ~group_mask(batch, name[1:]) & ~group_mask(batch, queries)
    for row, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        for part in name.split(","):
            places = [len(prompt) - 1] if part == "last" else prompt.positions(part)
            mask[row, [offset + i for i in places]] = True
    return mask


@dataclass(frozen=True, eq=False)
class WindowKnockout:
    """Relative change of a probability, by window of layers.

    Attributes:
        layers: layer at the centre of each window.
        per_example: [example, layer] (p′ − p) / p.
        probability: [example] p, without knockout.
        examples: ids.
        queries, keys, window: what was asked for.
    """

    layers: tuple[int, ...]
    per_example: Float[np.ndarray, "example layer"]
    probability: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    queries: str
    keys: str
    window: int

    @property
    def values(self) -> Float[np.ndarray, " layer"]:
        """Mean over examples."""
        return np.asarray(self.per_example.mean(0))


@torch.no_grad()
def window_knockout(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    queries: str = "last",
    keys: str = "others",
    window: int = 9,
    target: str = "predicted",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> WindowKnockout:
    """Knock attention out in a window of layers around each layer.

    Args:
        model: the model.
        prompts: prompts with the spans that are named.
        queries: token group that may no longer look.
        keys: token group that is hidden from it.
        window: number of layers; around layer l those from l − window // 2 on.
        target: `predicted` (the token the model itself predicts) or `answer`.
        heads: only these heads; all of the layers if None.
        batch_size: prompts at a time.
        tower: tower of the heads.
        progress: called with layers done and layers in all.

    Raises:
        InputError: no prompts, an unknown target, a window below 1, a row left without keys, or a
            target without probability.
        SpanError: a prompt has no such span.
    """
    if not prompts or window < 1:
        raise InputError(f"prompts and a window of at least 1 are needed; got {window}")
    if target not in TARGETS:
        raise InputError(f"target must be predicted or answer; got {target!r}")
    if target == "answer" and any(not p.answer for p in prompts):
        raise InputError("target 'answer' needs prompts with answers")
    units, _ = units_of(model, tower, "z", heads)
    layers = tuple(x.index for x in model.tower(tower).layers)
    where_q, where_k = query_positions(queries), group_positions(keys, queries)
    out = np.zeros((len(prompts), len(layers)))
    before = np.zeros(len(prompts))
    for column, layer in enumerate(layers):
        first = layer - window // 2
        chosen = [h for h in units if first <= h.layer < first + window]
        for at in range(0, len(prompts) if chosen else 0, batch_size):
            some = list(prompts[at : at + batch_size])
            batch = model.batch(some, side="left")
            plain = _probabilities(model, batch)
            token = plain.argmax(-1)
            if target == "answer":
                token = torch.tensor([p.answer[0] for p in some if p.answer], device=plain.device)
            index = token[:, None]
            edit = Edit("knockout", Where(heads=tuple(chosen), queries=where_q, keys=where_k))
            with Recipe((edit,)).on(model, spans=batch):
                cut = _probabilities(model, batch).gather(-1, index)[:, 0]
            p = plain.gather(-1, index)[:, 0]
            if not bool((p > 0).all()):
                lost = some[int((p == 0).nonzero()[0])].id
                raise InputError(
                    f"the target must have a probability above 0 without knockout; in prompt "
                    f"{lost or '?'} it is 0",
                    hint="target='predicted' follows the token that the model itself predicts",
                )
            out[at : at + len(some), column] = ((cut - p) / p).cpu()
            before[at : at + len(some)] = p.cpu()
        if progress is not None:
            progress(column + 1, len(layers))
    ids = tuple(p.id or f"prompt-{i}" for i, p in enumerate(prompts))
    return WindowKnockout(layers, out, before, ids, queries, keys, window)


def _probabilities(model: Model, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
    out = model.forward(batch.inputs())
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits[:, -1].double().softmax(-1)


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
        rows = group_mask(base.batch, queries)
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
        queries: `last`, a span, or several separated by commas.
        keys: likewise, or `~span`, or `others`.
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
