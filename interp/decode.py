"""Greedy decoding with the seam open: which key each head looks at while each token is produced.

The model's own `generate` runs; for every step only one row per head is recomputed, that of the
token just fed, from the step's q against the cached k. The prompt's own rows are not read.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ModelError, SiteError
from interp.prompts import Batch
from interp.seam.calls import MASKED, AttnCall
from interp.seam.structure import Tower

if TYPE_CHECKING:
    from interp.model import Model


@dataclass(frozen=True)
class Decoded:
    """What was produced and where each head looked.

    Attributes:
        tokens: for each example the produced ids, up to and including the first stop token.
        top: [example, layer, head, step] the key with the most mass, as a position of the prompt
            and its continuation (padding not counted); the query is the token fed at that step.
            NaN after an example's end.
        mass: the mass on that key, same shape.
    """

    tokens: tuple[tuple[int, ...], ...]
    top: Float[Tensor, "batch layer head step"]
    mass: Float[Tensor, "batch layer head step"]


class StepReader:
    """An observer that keeps the top key of the last query row of every call."""

    def __init__(self, tower: Tower, batch: Batch) -> None:
        self.names = {layer.name: i for i, layer in enumerate(tower.layers)}
        self.tower, self.batch = tower, batch
        self.steps: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tower.layers]
        self._offsets = torch.tensor(batch.offsets)

    def __call__(self, call: AttnCall) -> None:
        """Read one row of one layer."""
        place = self.names.get(call.name)
        if place is None:
            return
        step = len(self.steps[place])
        total = self.batch.input_ids.shape[1] + step
        top, mass = top_key(call)
        # A sliding window's cache begins later than the prompt.
        shift = max(0, total - call.n_key) - self._offsets.to(top.device)
        self.steps[place].append((top + shift[:, None], mass))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Positions and masses as [batch, layer, head, step]."""
        counts = {len(s) for s in self.steps}
        if len(counts) != 1 or 0 in counts:
            raise SiteError(f"layers were called {sorted(counts)} times while decoding")
        heads = self.tower.n_heads
        out = []
        for which in (0, 1):
            layers = []
            for steps in self.steps:
                x = torch.stack([s[which].float() for s in steps], dim=-1)
                pad = x.new_full((x.shape[0], heads - x.shape[1], x.shape[2]), math.nan)
                layers.append(torch.cat([x, pad], dim=1))
            out.append(torch.stack(layers, dim=1))
        return out[0], out[1]


@torch.no_grad()
def top_key(call: AttnCall) -> tuple[Tensor, Tensor]:
    """Key with the most mass in the last query row, and that mass: both [batch, head]."""
    if call.pattern is not None:
        mass, top = call.pattern[:, :, -1].max(-1)
        return top, mass.float()
    assert call.q is not None and call.k is not None
    n_kv = call.k.shape[1]
    q = call.q[:, :, -1].to(call.dtype).unflatten(1, (n_kv, -1)) * call.scale
    s = torch.matmul(q, call.k.to(call.dtype).transpose(-1, -2)).flatten(1, 2)
    if call.softcap is not None:
        s = torch.tanh(s / call.softcap) * call.softcap
    if call.mask is not None:
        m = call.mask[:, :, -1]
        s = s.masked_fill(~m, MASKED) if m.dtype == torch.bool else s + m.to(s)
    best, top = s.max(-1)
    if call.lse is not None:
        lse = call.lse[:, :, -1].to(s)
    else:
        lse = s.logsumexp(-1)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks.to(s))
    return top, torch.exp(best - lse)


def decode(
    model: "Model",
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    tower: str | None = None,
    use_cache: bool = True,
) -> Decoded:
    """Decode greedily and read one row per head and step.

    Args:
        model: a model that can `generate`.
        batch: prompts, padded on the left.
        max_new_tokens: most tokens to produce.
        stop_ids: ids that end an example, beside the model's own end of text.
        tower: tower to read; the model's first if None.
        use_cache: keep keys and values from step to step (the same numbers either way).

    Raises:
        InputError: the batch is padded on the right, or too long for the model.
        ModelError: the model does not continue its prompt.
    """
    _refuse_unless_decoder(model)
    width = batch.input_ids.shape[1]
    if any(width != off + len(p) for off, p in zip(batch.offsets, batch.prompts, strict=True)):
        raise InputError("decoding needs a batch padded on the left; use batch(..., side='left')")
    if model.context is not None and width + max_new_tokens > model.context:
        raise InputError(
            f"prompt and answer must fit the {model.context} positions of {model.name}; got "
            f"{width} + {max_new_tokens}"
        )
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    reader = StepReader(stack, batch)
    produced = generate(
        model, batch, max_new_tokens=max_new_tokens, stop_ids=stop_ids, observer=reader,
        use_cache=use_cache,
    )  # fmt: skip
    top, mass = reader.stacked()
    steps = torch.arange(top.shape[-1], device=top.device)
    ends = torch.tensor([len(t) for t in produced], device=top.device)
    over = (steps[None] >= ends[:, None])[:, None, None]
    return Decoded(produced, top.masked_fill(over, math.nan), mass.masked_fill(over, math.nan))


@torch.no_grad()
def generate(
    model: "Model",
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    observer: Any = None,
    use_cache: bool = True,
) -> tuple[tuple[int, ...], ...]:
    """Greedy continuation of each example by the model's own `generate`.

    Args:
        model: the model in hand.
        batch: prompts, padded on the left.
        max_new_tokens: most tokens to produce.
        stop_ids: ids that end an example, beside the model's own end of text.
        observer: shown every attention call, if given.
        use_cache: keep keys and values from step to step.

    Returns:
        For each example the produced ids, up to and including the first stop id.

    Raises:
        ModelError: the model does not continue its prompt.
    """
    from transformers import GenerationConfig

    _refuse_unless_decoder(model)
    own = getattr(model.hf, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    stops = {*stop_ids, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        pad_token_id=model.pad_id,
        eos_token_id=sorted(stops) or None,
        bos_token_id=getattr(own, "bos_token_id", None),
    )
    seam = nullcontext() if observer is None else model.observe(observer)
    with _preferring(model.hf, config), seam:
        out = model.hf.generate(**batch.inputs(), generation_config=config)  # type: ignore[operator]
    rows = []
    for row in out[:, batch.input_ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append(tuple(row[:end]))
    return tuple(rows)


@contextmanager
def _preferring(hf: Any, config: Any) -> Iterator[None]:
    """Hide what the checkpoint prefers, such as a penalty on repetitions, for a while.

    Whatever a given configuration leaves open, `generate` fills in from the checkpoint's own.
    """
    own = getattr(hf, "generation_config", None)
    if own is None:
        yield
        return
    hf.generation_config = config
    try:
        yield
    finally:
        hf.generation_config = own


def _refuse_unless_decoder(model: "Model") -> None:
    if not hasattr(model.hf, "generate"):
        raise ModelError(f"{model.name} cannot generate, so nothing can be read while decoding")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"decoding reads models that continue their prompt; {model.name} answers it in a "
            f"decoder of its own"
        )
