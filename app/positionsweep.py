"""The sweep of `headscope patch --positions`: every head and layer at every position, exactly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from app.positions import PositionSweep
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.headid import HeadId
    from interp.seam.structure import Layer
    from patching.pairs import Pairs

Progress = Callable[[int, int], None]


def sweep_positions(
    data: "Pairs",
    *,
    direction: str = "noise",
    heads: "Sequence[HeadId | str] | None" = None,
    progress: Progress | None = None,
) -> PositionSweep:
    """Effect of every head, and of all heads of every layer at once, at every position.

    Args:
        data: pairs, of one length or of several.
        direction: `noise` or `denoise`.
        heads: only these heads, and their layers.
        progress: called with patched runs done and in all.

    Raises:
        InputError: an unknown direction, a head that the model does not have, or a tower whose
            positions are not those of the prompt.
    """
    from interp.traces.recording import words
    from patching.engine import by_layer, prepared, units_of
    from patching.pairs import Pairs

    model = data.model
    prepared(model, data, data.metric.name, data.batch_size, data.tower, direction)
    units, _ = units_of(model, data.tower, "z", heads)
    layers = [layer for layer, _ in by_layer(model, units)]
    lengths = [len(p.clean) for p in data.pairs]
    n, widest = len(data.pairs), max(lengths)
    by_head = np.full((n, len(units), widest), np.nan)
    by_layer_ = np.full((n, len(layers), widest), np.nan)
    clean, corrupted, floor = np.zeros(n), np.zeros(n), 0.0
    count = _Count(sum(lengths) * (len(units) + 2 * len(layers)), progress)
    for length in sorted(set(lengths)):
        places = [i for i, x in enumerate(lengths) if x == length]
        part = Pairs(
            model, [data.pairs[i] for i in places], metric=data.metric,
            batch_size=data.batch_size, tower=data.tower,
        )  # fmt: skip
        for at, values, own in _layers(part, direction, layers, count):
            by_layer_[np.array(places)[at], :, :length] = values
            floor = max(floor, own)
        by_head[places, :, :length], clean[places], corrupted[places] = _heads(
            part, direction, units, count
        )
    return PositionSweep(
        f"patch.{direction}", data.tower, data.metric.name, tuple(map(str, units)),
        tuple(x.index for x in layers), by_head, by_layer_, clean, corrupted, data.ids,
        tuple((tuple(words(model, p.clean.tokens)), tuple(words(model, p.corrupted.tokens)))
              for p in data.pairs),
        tuple({k: [list(r) for r in v] for k, v in p.clean.spans.items()} for p in data.pairs),
        len({data.kind(p) for p in data.pairs}) == 1, floor,
    )  # fmt: skip


@dataclass
class _Count:
    """Patched runs done, of several stages."""

    total: int
    progress: Progress | None
    done: int = 0

    def add(self, n: int) -> None:
        self.done += n
        if self.progress is not None:
            self.progress(self.done, self.total)


def _heads(
    part: "Pairs", direction: str, units: "Sequence[HeadId]", count: _Count
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from patching.engine import head_position_effects

    seen = 0

    def told(done: int, total: int) -> None:
        nonlocal seen
        count.add(done - seen)
        seen = done

    found = head_position_effects(
        part.model, part, direction=direction, heads=units, tower=part.tower, progress=told
    )
    return found.per_example, found.clean, found.corrupted


def _layers(
    part: "Pairs", direction: str, layers: "Sequence[Layer]", count: _Count
) -> Iterator[tuple[list[int], np.ndarray, float]]:
    """Places, [example, layer, pos] effects of all heads at once, and what rounding makes."""
    import torch

    from interp.headid import HeadId
    from patching.engine import SITES, Cell, base_run, run_cells

    for places, batch in part.batches():
        base = base_run(batch, direction)
        still = batch.score(base.logits)
        own = {layer.name: base.kept[layer.name].z for layer in layers}
        if odd := next((x for x in layers if own[x.name].shape[1] != base.n_pos), None):
            raise InputError(
                f"positions are those of the prompt, {base.n_pos} here; {odd.name} has "
                f"{own[odd.name].shape[1]}",
                hint="choose a tower that reads the prompt, or leave --positions away",
            )
        new = {layer.name: SITES["z"](part, batch, direction, "other", layer) for layer in layers}
        out = np.zeros((len(places), len(layers), base.n_pos))
        row = {layer.index: i for i, layer in enumerate(layers)}
        # Logits are known to a step of their precision, if rounding happens to agree.
        floor = float(torch.finfo(part.model.dtype).eps * base.logits.abs().max())
        for position in range(batch.first, base.n_pos):
            cells = [
                Cell(layer, tuple(range(layer.n_heads)), HeadId(layer.index, 0, layer.tower),
                     position)
                for layer in layers
            ]  # fmt: skip
            for ran, logits in run_cells(base, cells, new, position):
                effect = (batch.score(logits) - still).cpu().numpy()
                for cell, values in zip(ran, effect, strict=True):
                    out[:, row[cell.layer.index], position] = values
            for _, logits in run_cells(base, cells, own, position):
                floor = max(floor, float((batch.score(logits) - still).abs().max()))
            count.add(2 * len(layers) * len(places))
        count.add(2 * len(layers) * len(places) * batch.first)
        yield places, out, floor
