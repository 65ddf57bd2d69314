"""Patched runs of several layers in one pass: the batch grows from block to block.

A run patched at layer l is the kept run up to there. So one pass carries them all: it starts with
the runs of the first patched layer, and each further layer adds its own, with the hidden states
that the kept run had before it. Every block then runs once, on a batch large enough to be worth its
weights, instead of once for each earlier layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import TooLargeError
from interp.memory import fitting
from interp.replay import Replay, _expand, _first, _forward_as, _instead_of, _map
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model

_TRIED: "WeakKeyDictionary[Model, dict[tuple[str, int], bool]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Step:
    """The runs that are patched at one layer.

    Attributes:
        layer: the layer.
        z: [copy, batch, pos, head, d_v] from the first changed position on.
    """

    layer: Layer
    z: Tensor


def possible(replay: Replay) -> bool:
    """Whether the batch may grow on its way through the model.

    Its attention modules must put out the projection of z and nothing else, and nothing after the
    blocks may count on the number of rows that went in (GPT-1 does). The latter is tried, once for
    each model and size of batch.
    """
    batch = replay.batch
    if (
        not all(kept.plain for kept in replay.kept.values())
        or batch.extra
        or batch.decoder is not None
    ):
        return False
    known = _TRIED.setdefault(replay.model, {})
    key = replay.tower.name, len(batch)
    if key not in known:
        try:
            known[key] = _gives_kept(replay)
        except TooLargeError:  # one run at a time may fit
            return False
    return known[key]


def _gives_kept(replay: Replay) -> bool:
    """Whether runs that begin at the first and last layer, unchanged, end as the kept run."""
    ends = {x.name: x for x in (replay.tower.layers[0], replay.tower.layers[-1])}
    steps = [Step(x, replay.kept[x.name].z[None]) for x in ends.values()]
    try:
        logits = staircase(replay, steps)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return False
    scale = float(replay.logits.abs().max().clamp_min(1))
    return bool((logits - replay.logits).abs().max() < 1e-4 * scale)


@torch.no_grad()
def staircase(
    replay: Replay, steps: Sequence[Step], *, start: int = 0
) -> Float[Tensor, "copy batch d_vocab"]:
    """Logits at the last token of the runs of all steps, in their order.

    Args:
        replay: the kept run; `possible(replay)` must hold.
        steps: at most one per layer, by rising layer.
        start: first position that differs from the kept run; 0 unless `replay.suffix_works`.

    Raises:
        TooLargeError: the runs do not fit into memory.
    """
    hf, size = replay.model.hf, len(replay.batch)
    by_block = {s.layer.index: s for s in steps}
    first = min(by_block)
    before = {}  # runs that are on their way when a block begins
    count = 0
    for i in range(len(replay.blocks)):
        before[i] = count
        count += by_block[i].z.shape[0] if i in by_block else 0
    what = f"{count} patched runs of {size} prompts"
    with fitting(what, "use a smaller batch"), ExitStack() as stack:
        for i, name in enumerate(replay.blocks):
            module = hf.get_submodule(name)
            if i < first:
                value = _map(replay._outputs[i], lambda x: _cut(x, replay, start))
                stack.enter_context(_forward_as(module, lambda *a, _v=value, **k: _v))
                continue
            step = by_block.get(i)
            stack.enter_context(
                _forward_as(module, _block(replay, i, before[i], step, start, module))
            )
            if step is not None:
                attention = hf.get_submodule(step.layer.name)
                stack.enter_context(
                    _forward_as(attention, _attention(replay, step, before[i], attention))
                )
        inputs: dict[str, Any] = dict(replay.batch.inputs())
        if start:
            inputs["input_ids"] = inputs["input_ids"][:, start:]
            inputs["past_key_values"] = _cache(replay, before, start)
        logits = replay._forward(inputs)
    return logits.view(count, size, -1)


def _cut(x: Tensor, replay: Replay, start: int) -> Tensor:
    n_pos = replay.n_pos
    return x[:, start:] if x.dim() >= 2 and x.shape[1] == n_pos and start else x


def _block(
    replay: Replay, i: int, before: int, step: Step | None, start: int, module: nn.Module
) -> Callable[..., Any]:
    """A block that runs all runs on their way, and those that begin here."""
    own, size = module.forward, len(replay.batch)
    new = step.z.shape[0] if step is not None else 0

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if new:
            # Before the first block stands the embedding, which the model itself computed.
            kept = hidden[:size] if i == 0 else _cut(_first(replay._outputs[i - 1]), replay, start)
            fresh = _expand(kept, new).flatten(0, 1)
            hidden = torch.cat([hidden[: before * size], fresh]) if before else fresh
        rows = (before + new) * size
        return own(
            hidden,
            *(_map(a, lambda x: _rows(x, size, rows)) for a in args),
            **{k: v if k == "past_key_values" else _map(v, lambda x: _rows(x, size, rows))
               for k, v in kwargs.items()},
        )  # fmt: skip

    def by_keyword(*args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(*args, **kwargs)
        return forward(kwargs.pop("hidden_states"), **kwargs)

    return by_keyword


def _attention(replay: Replay, step: Step, before: int, module: nn.Module) -> Callable[..., Any]:
    """Attention of the runs on their way, and the given z for those that begin here."""
    own, size = module.forward, len(replay.batch)
    projection = replay.model.hf.get_submodule(step.layer.projection)
    kept = replay.kept[step.layer.name].output
    rows = (before + step.z.shape[0]) * size

    def forward(*args: Any, **kwargs: Any) -> Any:
        made = projection(step.z.flatten(0, 1).flatten(-2))
        if not before:
            return _instead_of(kept, made)

        def cut(x: Tensor) -> Tensor:
            return x[: before * size] if x.dim() and x.shape[0] == rows else x

        live = own(
            *(_map(a, cut) for a in args),
            **{k: v if k == "past_key_values" else _map(v, cut) for k, v in kwargs.items()},
        )
        first = live if isinstance(live, Tensor) else live[0]
        return _instead_of(live, torch.cat([first, made]))

    return forward


def _rows(x: Tensor, size: int, rows: int) -> Tensor:
    """What a block is told of each example, for each run; what holds for all stays as it is."""
    if x.dim() == 0 or x.shape[0] != size or (size == 1 and x.dim() > 0):
        return x
    return _expand(x, rows // size).flatten(0, 1)


def _cache(replay: Replay, before: Mapping[int, int], start: int) -> Any:
    """A cache of what came before `start`, for as many runs as each block has on its way."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in replay.tower.layers:
        call = replay.kept[layer.name].call
        assert call is not None and call.k is not None and call.v is not None
        # A cache without rows would count as empty: where none is read, the kept ones stand in.
        copies = max(1, before[layer.index])
        cache.update(
            _expand(call.k[:, :, :start], copies).flatten(0, 1),
            _expand(call.v[:, :, :start], copies).flatten(0, 1),
            layer.index,
        )
    return cache
