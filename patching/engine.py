"""Exact activation patching of every head: many patched runs at once, replayed from the middle.

Each head is patched in a copy of the batch of its own, and the copies of all layers share a pass
in which the batch grows from block to block (`interp.staircase`); blocks before the first patched
layer answer from memory, and so do keys and values of positions before the first one that differs
(`interp.replay`). Patches of q, k, v and the pattern become patches of z: the head's
attention is computed again from what was kept.

Effect = m(patched) − m(base), per example. Noising patches the corrupted activation into the clean
run (what is necessary), denoising the reverse (what is sufficient).

Sources: Meng et al. 2202.05262; Wang et al. 2211.00593; Heimersheim & Nanda 2404.15255.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.memory import fitting, halving
from interp.model import Model
from interp.prompts import PromptPair
from interp.registry import Registry
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.structure import Layer
from interp.staircase import Step, possible, staircase
from patching.effects import PositionEffects, table
from patching.pairs import PairBatch, Pairs
from patching.references import REFERENCES

Progress = Callable[[int, int], None]

DIRECTIONS = ("noise", "denoise")
TOKENS = 8192
"""Tokens of all patched runs of one launch; more does not run faster on a CPU."""

Site = Callable[[Pairs, PairBatch, str, str, Layer], Tensor]
"""z of every head [batch, pos, head, d_v] under that head's own patch of the site."""

SITES: Registry[Site] = Registry("site", "patching")


def base_run(batch: PairBatch, direction: str) -> Replay:
    """The run that is patched."""
    return batch.clean if direction == "noise" else batch.corrupted


def _read_z(run: Replay, layer: Layer) -> Tensor:
    return run.kept[layer.name].z


def _z(pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer) -> Tensor:
    return REFERENCES[reference](pairs, batch, direction, _read_z, layer)


def _through(name: str) -> Site:
    """A site of the kernel's inputs, brought to z."""

    def read(run: Replay, layer: Layer) -> Tensor:
        value: Tensor = getattr(run.call(layer), name)
        return value

    def site(
        pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer
    ) -> Tensor:
        value = REFERENCES[reference](pairs, batch, direction, read, layer)
        heads = slice(0, layer.n_heads)
        return base_run(batch, direction).z_under(layer, heads, **{name: value})

    return site


def _read_pattern(run: Replay, layer: Layer) -> Tensor:
    call, heads = run.call(layer), slice(0, layer.n_heads)
    rows = slice(0, call.n_query)
    return torch.stack([call.rows(b, heads, rows) for b in range(call.z.shape[0])])


def _pattern(
    pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer
) -> Tensor:
    heads = slice(0, layer.n_heads)
    value = REFERENCES[reference](pairs, batch, direction, _read_pattern, layer)
    return base_run(batch, direction).z_under(layer, heads, pattern=value)


SITES.register("z")(_z)
for _name in ("q", "k", "v"):
    SITES.register(_name)(_through(_name))
SITES.register("pattern")(_pattern)


def head_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    site: str = "z",
    direction: str = "noise",
    reference: str = "other",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Progress | None = None,
) -> HeadScores:
    """Effect of patching each head at all positions.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        metric: name of a metric.
        site: `z`, `q`, `k`, `v` or `pattern`; k and v are patched per key-value head.
        direction: `noise` or `denoise`.
        reference: `other` (the other prompt of the pair), `zero`, `mean` (of the other prompts of
            equal length and template, per position) or `resample`.
        heads: only these heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with patched runs done and in all, one a head and pair.

    Returns:
        Per-example effects; extras `recovered`: mean effect over the mean difference of the runs,
        left out where the runs do not differ.

    Raises:
        InputError: an unknown direction, no pairs, or a head that is not one of the site's.
    """
    units, granularity = units_of(model, tower, site, heads)
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    out = np.full((len(data.pairs), len(units)), np.nan)
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.pairs)
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        start = batch.first if reference == "other" else 0
        new, cells = {}, []
        for layer, members in by_layer(model, units):
            new[layer.name] = SITES[site](data, batch, direction, reference, layer)
            cells += [Cell(layer, _heads_of(layer, u, granularity), u) for u in members]
        for ran, logits in run_cells(base, cells, new, start):
            effect = (batch.score(logits) - floor).cpu().numpy()
            for cell, values in zip(ran, effect, strict=True):
                out[places, column[cell.unit]] = values
            done += len(ran) * len(places)
            if progress is not None:
                progress(done, total)
    return table(
        f"patch.{direction}" if reference == "other" else f"ablate.{reference}",
        model, data, units, out, clean, corrupted,
        params={"site": site, "direction": direction, "reference": reference},
        granularity=granularity,
    )  # fmt: skip


def head_position_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    direction: str = "noise",
    reference: str = "other",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Progress | None = None,
) -> PositionEffects:
    """Effect of patching each head at each single position; pairs must have one length.

    Args:
        model: the model.
        pairs: clean and corrupted prompts, all of equal length.
        metric: name of a metric.
        direction: `noise` or `denoise`.
        reference: `other`, `zero`, `mean` or `resample`.
        heads: only these heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with patched runs done and in all, one a head, position and pair.

    Raises:
        PairError: pairs of different lengths.
    """
    from interp.errors import PairError

    units, _ = units_of(model, tower, "z", heads)
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    lengths = {len(p.clean) for p in data.pairs}
    if len(lengths) != 1:
        raise PairError(
            f"positions are compared across pairs, so all must have one length; got "
            f"{', '.join(map(str, sorted(lengths)))} tokens",
            hint="choose the pairs of one length",
        )
    n_pos = lengths.pop()
    out = np.zeros((len(data.pairs), len(units), n_pos))
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * n_pos * len(data.pairs)
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        new = {
            layer.name: SITES["z"](data, batch, direction, reference, layer)
            for layer, _ in by_layer(model, units)
        }
        first = batch.first if reference == "other" else 0
        for position in range(n_pos):
            cells = [
                Cell(layer, (unit.head,), unit, position)
                for layer, members in by_layer(model, units)
                for unit in members
                if position >= first and _reaches(base, layer, position)
            ]
            for ran, logits in run_cells(base, cells, new, position):
                effect = (batch.score(logits) - floor).cpu().numpy()
                for cell, values in zip(ran, effect, strict=True):
                    out[places, column[cell.unit], position] = values
            done += len(units) * len(places)
            if progress is not None:
                progress(done, total)
    return PositionEffects(
        method=f"patch.{direction}" if reference == "other" else f"ablate.{reference}",
        heads=units,
        per_example=out,
        examples=data.ids,
        clean=clean,
        corrupted=corrupted,
        metric=data.metric.name,
        unit=data.metric.unit,
    )


def sweep(
    base: Replay, layer: Layer, new: Tensor, groups: list[tuple[int, ...]], start: int
) -> Iterator[tuple[int, Tensor]]:
    """Logits [copy, batch, d_vocab] with each group of heads patched in a copy of its own."""
    if layer.causal and layer.index == len(base.blocks) - 1:
        start = base.n_pos - 1  # what the last block does elsewhere reaches no logit
    start = start if base.suffix_works else 0
    size = size_of_launch(base, start)

    def patched(chosen: Sequence[tuple[int, ...]]) -> Tensor:
        z = base.kept[layer.name].z[:, start:]
        z = z[None].expand(len(chosen), *z.shape).clone()
        for i, heads in enumerate(chosen):
            z[i][:, :, list(heads)] = new[:, start:, list(heads)].to(z)
        return base.rerun({layer.name: z}, copies=len(chosen), start=start)

    at = 0
    while at < len(groups):
        for ran, logits in halving(groups[at : at + size], patched, what="patched runs"):
            yield at, logits
            at += len(ran)


def size_of_launch(base: Replay, start: int) -> int:
    """Patched runs to make at once, of positions from `start` on."""
    return max(1, TOKENS // (len(base.batch) * (base.n_pos - start)))


@dataclass(frozen=True)
class Cell:
    """One patched run.

    Attributes:
        layer: layer of the patch.
        heads: heads that are patched.
        unit: the head (or key-value head) the run stands for.
        position: the only position that is patched; None for all.
    """

    layer: Layer
    heads: tuple[int, ...]
    unit: HeadId
    position: int | None = None


def _reaches(base: Replay, layer: Layer, position: int) -> bool:
    """In the last block only the last position reaches the logits.

    That is so where positions meet in keys and values alone; a convolution or a state-space layer
    behind the attention carries earlier ones on.
    """
    last = base.suffix_works and layer.index == len(base.blocks) - 1
    return not last or position == base.n_pos - 1


def run_cells(
    base: Replay, cells: Sequence[Cell], new: Mapping[str, Tensor], start: int
) -> Iterator[tuple[list[Cell], Tensor]]:
    """Logits [cell, batch, d_vocab] of patched runs, as many at once as are worth it.

    Args:
        base: the run that is patched.
        cells: the patched runs.
        new: attention module to the z that is put in, [batch, pos, head, d_v].
        start: first position that any of them changes.
    """
    start = start if base.suffix_works else 0
    # Runs of all layers share a launch, so that each block works on as many as fit.
    launches = max(1, -(-len(cells) // size_of_launch(base, start)))
    if not possible(base):
        for layer in {c.layer.name: c.layer for c in cells}.values():
            mine = [c for c in cells if c.layer.name == layer.name]
            step = size_of_launch(base, start)
            for at in range(0, len(mine), step):
                yield from _launch(base, mine[at : at + step], new, start)
        return
    for i in range(launches):
        if chosen := list(cells[i::launches]):
            yield from _launch(base, chosen, new, start)


def _launch(
    base: Replay, cells: list[Cell], new: Mapping[str, Tensor], start: int
) -> Iterator[tuple[list[Cell], Tensor]]:
    """One launch, cut in two where it does not fit into memory."""

    def patched(chosen: Sequence[Cell]) -> Tensor:
        with fitting(f"{len(chosen)} patched runs", "use a smaller batch"):
            if not possible(base):
                z = _patched_z(base, chosen, new, start)
                return base.rerun({chosen[0].layer.name: z}, copies=len(chosen), start=start)
            steps = [
                Step(layer, _patched_z(base, [c for c in chosen if c.layer is layer], new, start))
                for layer in {c.layer.name: c.layer for c in chosen}.values()
            ]
            return staircase(base, steps, start=start)

    in_order = sorted(cells, key=lambda c: c.layer.index)
    for ran, logits in halving(in_order, patched, what="patched runs"):
        yield list(ran), logits


def _patched_z(
    base: Replay, cells: Sequence[Cell], new: Mapping[str, Tensor], start: int
) -> Tensor:
    """The z of each run from `start` on: [cell, batch, pos, head, d_v]."""
    name = cells[0].layer.name
    z = base.kept[name].z[:, start:]
    z = z[None].expand(len(cells), *z.shape).clone()
    for i, cell in enumerate(cells):
        heads = list(cell.heads)
        if cell.position is None:
            z[i][:, :, heads] = new[name][:, start:, heads].to(z)
        else:
            z[i][:, cell.position - start, heads] = new[name][:, cell.position, heads].to(z)
    return z


def _heads_of(layer: Layer, unit: HeadId, granularity: str) -> tuple[int, ...]:
    if granularity == "query":
        return (unit.head,)
    size = layer.n_heads // layer.n_kv_heads
    return tuple(range(unit.head * size, (unit.head + 1) * size))


def units_of(
    model: Model, tower: str, site: str, heads: Iterable[HeadId | str] | None
) -> tuple[tuple[HeadId, ...], str]:
    """The heads of a tower, or those chosen, in order; and whether they are query or kv heads."""
    from interp.recipe.where import read_heads

    SITES[site]  # an unknown site is refused before anything runs
    granularity = "kv" if site in ("k", "v") else "query"
    layers = model.tower(tower).layers
    every = tuple(
        HeadId(x.index, h, x.tower)
        for x in layers
        for h in range(x.n_kv_heads if granularity == "kv" else x.n_heads)
    )
    if heads is None:
        return every, granularity
    chosen = read_heads(tuple(heads))
    for head in chosen:
        model.layer_of(head)
        if head not in every:
            raise InputError(
                f"{head} is not a head of site {site!r} of tower {tower!r}, whose last is "
                f"{every[-1]}",
                hint="k and v are patched per key-value head"
                if granularity == "kv"
                else "name heads of this tower",
            )
    return tuple(h for h in every if h in set(chosen)), granularity


def by_layer(model: Model, units: Sequence[HeadId]) -> Iterator[tuple[Layer, list[HeadId]]]:
    """Heads layer by layer."""
    groups: dict[int, list[HeadId]] = {}
    for unit in units:
        groups.setdefault(unit.layer, []).append(unit)
    for members in groups.values():
        yield model.layer_of(HeadId(members[0].layer, 0, members[0].tower)), members


def prepared(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    metric: str,
    batch_size: int,
    tower: str,
    direction: str = "noise",
) -> Pairs:
    """Pairs as `Pairs`, with the direction checked.

    Raises:
        InputError: an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise InputError(
            f"direction must be noise or denoise; got {direction!r}",
            hint="noise patches the corrupted activation into the clean run, denoise the reverse",
        )
    if isinstance(pairs, Pairs):
        return pairs
    return Pairs(model, pairs, metric=metric, batch_size=batch_size, tower=tower)
