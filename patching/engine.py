"""Exact activation patching of every head: many patched runs at once, replayed from the middle.

All heads of a layer are patched in one launch, each in a copy of the batch of its own; blocks
before the layer answer from memory, and so do keys and values of positions before the first one
that differs (`interp.replay`). Patches of q, k, v and the pattern become patches of z: the head's
attention is computed again from what was kept.

Effect = m(patched) − m(base), per example. Noising patches the corrupted activation into the clean
run (what is necessary), denoising the reverse (what is sufficient).

Sources: Meng et al. 2202.05262; Wang et al. 2211.00593; Heimersheim & Nanda 2404.15255.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from interp.errors import DeviceError, InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.registry import Registry
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.structure import Layer
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


def _z(pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer) -> Tensor:
    return REFERENCES[reference](
        pairs, batch, direction, lambda run, x: run.kept[x.name].z, layer
    )  # fmt: skip


def _through(name: str) -> Site:
    """A site of the kernel's inputs, brought to z."""

    def site(
        pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer
    ) -> Tensor:
        def read(run: Replay, x: Layer) -> Tensor:
            value: Tensor = getattr(run.call(x), name)
            return value

        value = REFERENCES[reference](pairs, batch, direction, read, layer)
        heads = slice(0, layer.n_heads)
        return base_run(batch, direction).z_under(layer, heads, **{name: value})

    return site


def _pattern(
    pairs: Pairs, batch: PairBatch, direction: str, reference: str, layer: Layer
) -> Tensor:
    heads = slice(0, layer.n_heads)

    def read(run: Replay, x: Layer) -> Tensor:
        call = run.call(x)
        rows = slice(0, call.n_query)
        return torch.stack([call.rows(b, heads, rows) for b in range(call.z.shape[0])])

    value = REFERENCES[reference](pairs, batch, direction, read, layer)
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
        reference: `other` (the other prompt of the pair), `zero`, `mean` or `resample`.
        heads: only these heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with heads done and heads in all.

    Returns:
        Per-example effects; extras `recovered`: mean effect over the mean difference of the runs.

    Raises:
        InputError: an unknown direction, or clean and corrupted runs with equal metric.
    """
    units, granularity = units_of(model, tower, site, heads)
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    out = np.full((len(data.pairs), len(units)), np.nan)
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.groups())
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        start = batch.first if reference == "other" else 0
        for layer, members in by_layer(model, units):
            new = SITES[site](data, batch, direction, reference, layer)
            groups = [_heads_of(layer, u, granularity) for u in members]
            for at, logits in sweep(base, layer, new, groups, start):
                effect = (batch.score(logits) - floor).cpu().numpy()
                for i, unit in enumerate(members[at : at + len(effect)]):
                    out[places, column[unit]] = effect[i]
            done += len(members)
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
        progress: called with cells done and cells in all.

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
            f"{', '.join(map(str, sorted(lengths)))} tokens"
        )
    n_pos = lengths.pop()
    out = np.zeros((len(data.pairs), len(units), n_pos))
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.groups())
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        first = batch.first if reference == "other" else 0
        for layer, members in by_layer(model, units):
            new = SITES["z"](data, batch, direction, reference, layer)
            # In the last block of a causal model only the last position reaches the logits.
            last = layer.causal and layer.index == len(base.blocks) - 1
            begin = n_pos - 1 if last else first
            for cells, logits in _cell_sweep(base, layer, new, members, begin, n_pos):
                effect = (batch.score(logits) - floor).cpu().numpy()
                for (unit, position), values in zip(cells, effect, strict=True):
                    out[places, column[unit], position] = values
            done += len(members)
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
    at = 0
    while at < len(groups):
        chosen = groups[at : at + size]
        z = base.kept[layer.name].z[:, start:]
        z = z[None].expand(len(chosen), *z.shape).clone()
        for i, heads in enumerate(chosen):
            z[i][:, :, list(heads)] = new[:, start:, list(heads)].to(z)
        try:
            logits = base.rerun({layer.name: z}, copies=len(chosen), start=start)
        except (DeviceError, RuntimeError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
            size = max(1, size // 2)
            continue
        yield at, logits
        at += len(chosen)


def size_of_launch(base: Replay, start: int) -> int:
    """Patched runs to make at once, of positions from `start` on."""
    return max(1, TOKENS // (len(base.batch) * (base.n_pos - start)))


def _cell_sweep(
    base: Replay, layer: Layer, new: Tensor, members: Sequence[HeadId], begin: int, n_pos: int
) -> Iterator[tuple[list[tuple[HeadId, int]], Tensor]]:
    """Logits with each head patched at each position from `begin` on, some cells at a time."""
    kept = base.kept[layer.name].z
    position = begin
    while position < n_pos:
        start = position if base.suffix_works else 0
        room = max(len(members), TOKENS // 2 // (len(base.batch) * (n_pos - start)))
        upto = min(n_pos, position + max(1, room // len(members)))
        cells = [(unit, p) for p in range(position, upto) for unit in members]
        z = kept[None, :, start:].expand(len(cells), -1, -1, -1, -1).clone()
        for i, (unit, p) in enumerate(cells):
            z[i, :, p - start, unit.head] = new[:, p, unit.head].to(z)
        yield cells, base.rerun({layer.name: z}, copies=len(cells), start=start)
        position = upto


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, DeviceError) or "allocate memory" in str(error)


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
            raise InputError(f"{head} is not a head of site {site!r} of tower {tower!r}")
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
        raise InputError(f"direction must be noise or denoise; got {direction!r}")
    if isinstance(pairs, Pairs):
        return pairs
    return Pairs(model, pairs, metric=metric, batch_size=batch_size, tower=tower)
