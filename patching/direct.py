"""Direct effect of every head on the logits: along the residual stream, past all other heads.

A head's z at the last token is replaced and everything else keeps its value, so its effect is
m(unembed(norm(x + Δ))), with x the residual stream that leaves the last block, Δ = (z' − z)·W_O,
and no forward at all. With MLPs live, Δ also passes through the MLPs above at the last token, where
it meets no other head. Effect = m(changed) − m(base), per example.

Attribution of logits splits a metric that is linear in the logits into what each head, each MLP,
the embedding and the biases write, the final norm's scale being frozen; the parts add up to it.

Sources: Wang et al. 2211.00593, section 3.1 and appendix B; Elhage et al. 2021 (framework);
Lieberum et al. 2307.09458, section 2 (direct effect with a frozen norm).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.replay import Record, Replay
from interp.scores import HeadScores
from interp.seam.structure import Layer
from patching.effects import table
from patching.engine import (
    DIRECTIONS,
    SITES,
    base_run,
    by_layer,
    prepared,
    size_of_launch,
    units_of,
)
from patching.method import METHODS, Method
from patching.pairs import Pairs
from patching.readout import Readout, readout
from patching.references import REFERENCES

MLPS = ("frozen", "live")
_ADDS: "WeakKeyDictionary[Model, dict[str, bool]]" = WeakKeyDictionary()


def written(
    model: Model, layer: Layer, z: Float[Tensor, "... head d_v"]
) -> Float[Tensor, "... head d_model"]:
    """What each head writes: z·W_O."""
    return torch.einsum("...hv,hvd->...hd", z, model.w_o(layer).to(z))


@torch.no_grad()
def adds_up(base: Replay) -> bool:
    """Whether z·W_O of every head reaches the end of the stream as it is; found out once per model.

    It does not where a norm or a factor follows the output projection (Gemma 2, OLMo 2, Granite),
    or where the norm stands in the stream (post-norm).
    """
    known = _ADDS.setdefault(base.model, {})
    if base.tower.name not in known:
        known[base.tower.name] = all(_adds(base, layer) for layer in base.tower.layers)
    return known[base.tower.name]


def _adds(base: Replay, layer: Layer) -> bool:
    kept = base.kept[layer.name].z
    noise = torch.randn(kept[:, -1].shape, generator=torch.Generator().manual_seed(layer.index))
    delta = noise.to(kept) * kept.std()
    z = kept.clone()
    z[:, -1] += delta
    end = Record(blocks=(base.blocks[-1],))
    real = frozen_rerun(base, layer, z[None], record=end)[0]
    added = written(base.model, layer, delta).sum(-2)
    stream = base.leaving(-1)[:, -1]
    if bool(added.any()) and torch.equal(end.leaving[base.blocks[-1]][:, -1], stream):
        raise SiteError(
            f"what heads write must pass by frozen MLPs; on {base.model.name} "
            f"nothing of {layer.name} does",
            hint="mlps='live' lets what the blocks add pass it on",
        )
    if stream.shape != added.shape:  # several streams side by side
        return False
    resid = stream + added
    closed = base.finish(resid[None])[0]
    change = float((real - base.logits).abs().max())
    return float((real - closed).abs().max()) <= 1e-3 * change + 1e-5


def frozen_rerun(
    base: Replay,
    layer: Layer,
    z: Float[Tensor, "copy batch pos head d_v"],
    *,
    mlps: str = "frozen",
    record: Record | None = None,
) -> Float[Tensor, "copy batch d_vocab"]:
    """Logits with the z of one layer replaced at the last token, all other heads frozen."""
    start = base.n_pos - 1
    return base.rerun(
        {layer.name: z[:, :, start:]}, copies=z.shape[0], start=start, freeze=True,
        freeze_mlps=mlps == "frozen", record=record,
    )  # fmt: skip


@torch.no_grad()
def direct_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    mlps: str = "frozen",
    direction: str = "noise",
    reference: str = "other",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Effect of patching each head at the last token, through no other head.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        metric: name of a metric.
        mlps: `frozen`, or `live`: MLPs above the head pass the change on.
        direction: `noise` or `denoise`.
        reference: `other`, `zero`, `mean` or `resample`.
        heads: only these heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with heads done and heads in all.

    Raises:
        InputError: unknown `mlps` or direction.
        SiteError: all that heads write passes through what would be frozen.
    """
    if mlps not in MLPS:
        raise InputError(f"mlps must be frozen or live; got {mlps!r}")
    units, _ = units_of(model, tower, "z", heads)
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    out = np.full((len(data.pairs), len(units)), np.nan)
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.groups())
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        closed = mlps == "frozen" and adds_up(base)
        read = readout(base, batch)
        for layer, members in by_layer(model, units):
            new = SITES["z"](data, batch, direction, reference, layer)[:, -1]
            chosen = [m.head for m in members]
            if closed:
                effect = _closed(read, base, layer, new, chosen)
            else:
                effect = _rerun(read, base, layer, new, chosen, mlps)
            for i, unit in enumerate(members):
                out[places, column[unit]] = effect[i].cpu().numpy()
            done += len(members)
            if progress is not None:
                progress(done, total)
    return table(
        "direct", model, data, units, out, clean, corrupted,
        params={"mlps": mlps, "direction": direction, "reference": reference},
        strong="lower" if direction == "noise" else "higher",
    )  # fmt: skip


def _closed(
    read: Readout, base: Replay, layer: Layer, new: Tensor, heads: list[int]
) -> Float[Tensor, "head batch"]:
    delta = written(base.model, layer, new - base.kept[layer.name].z[:, -1])[:, heads]
    return read.effect(delta.transpose(0, 1))


def _rerun(
    read: Readout, base: Replay, layer: Layer, new: Tensor, heads: list[int], mlps: str
) -> Float[Tensor, "head batch"]:
    kept, start = base.kept[layer.name].z, base.n_pos - 1
    floor = read.batch.score(base.logits)
    size = size_of_launch(base, start if base.suffix_works else 0)
    effects = []
    for at in range(0, len(heads), size):
        some = heads[at : at + size]
        z = kept[None].expand(len(some), *kept.shape).clone()
        for i, head in enumerate(some):
            z[i, :, -1, head] = new[:, head].to(z)
        if mlps == "live" and read.direction is not None:  # no need of all the logits
            change = {layer.name: z[:, :, start:]}
            ends = base.ends(change, copies=len(some), start=start, freeze=True)
            effects.append(read.effect(ends - read.resid))
        else:
            effects.append(read.batch.score(frozen_rerun(base, layer, z, mlps=mlps)) - floor)
    return torch.cat(effects)


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """A metric split into what each part of the model writes.

    Attributes:
        parts: names: `embed`, heads, `bias L3` (of attention), `mlp L3` (all that a block adds
            beside attention), `bias` (of the final norm and the unembedding).
        per_example: [example, part]; rows add up to `total`.
        total: [example] the metric.
        examples: ids.
        metric: name of the metric.
    """

    parts: tuple[str, ...]
    per_example: Float[np.ndarray, "example part"]
    total: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    metric: str

    @property
    def values(self) -> dict[str, float]:
        """Mean over examples of each part."""
        return dict(zip(self.parts, map(float, self.per_example.mean(0)), strict=True))


@torch.no_grad()
def logit_attribution(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    batch_size: int = 8,
    tower: str = "text",
) -> LogitAttribution:
    """Split a metric of the clean prompts into parts that add up to it.

    Args:
        model: the model.
        pairs: prompts; only the clean ones are split.
        metric: name of a metric that is linear in the logits.
        batch_size: pairs at a time.
        tower: tower of the heads.

    Raises:
        InputError: the metric is not linear in the logits.
        SiteError: a norm or factor stands between heads and residual stream, or the logits are
            not linear in the normalised stream.
    """
    data = prepared(model, pairs, metric, batch_size, tower)
    if not data.metric.linear:
        raise InputError(
            f"only a metric that is linear in the logits splits into parts; got "
            f"{data.metric.name!r}",
            hint="use logit-difference or logit",
        )
    rows: dict[str, np.ndarray] = {}
    total = np.zeros(len(data.pairs))
    for places, batch in data.batches():
        base = batch.clean
        if not adds_up(base):
            raise SiteError(
                f"{model.name} rescales what its heads write, so logits do not split over heads",
                hint="use the direct effect, which is exact on any model",
            )
        read = readout(base, batch)
        names, vectors = zip(*_parts(base), strict=True)
        for name, share in zip(names, read.share(torch.stack(vectors)).cpu(), strict=True):
            rows.setdefault(name, np.zeros(len(data.pairs)))[places] = share
        rows.setdefault("bias", np.zeros(len(data.pairs)))[places] = read.constant().cpu()
        total[places] = batch.score(base.logits).cpu()
    return LogitAttribution(
        tuple(rows), np.stack(list(rows.values()), 1), total, data.ids, data.metric.name
    )


def _parts(base: Replay) -> "Iterable[tuple[str, Tensor]]":
    """Names and vectors [batch, d_model] that add up to the stream at the last token."""
    before = base.entry[:, -1]
    yield "embed", before
    layers = {x.index: x for x in base.tower.layers}
    for block in range(len(base.blocks)):
        after = base.leaving(block)[:, -1]
        attention = torch.zeros_like(after)
        if block in layers:
            layer = layers[block]
            z = base.kept[layer.name].z[:, -1]
            heads = written(base.model, layer, z)
            for h in range(layer.n_heads):
                yield str(HeadId(block, h, layer.tower)), heads[:, h]
            projection = base.model.hf.get_submodule(layer.projection)
            attention = projection(z.flatten(-2))
            yield f"bias L{block}", attention - heads.sum(1)
        yield f"mlp L{block}", after - before - attention
        before = after


@METHODS.register("direct")
@dataclass(frozen=True)
class Direct(Method):
    """Exact direct effect of each head on the metric.

    Attributes:
        mlps: `frozen`, or `live`.
        direction: `noise` or `denoise`.
        reference: `other`, `zero`, `mean` or `resample`.
    """

    mlps: str = "frozen"
    direction: str = "noise"
    reference: str = "other"

    name: ClassVar[str] = "direct"
    summary: ClassVar[str] = "effect on the logits through no other head; closed form"
    citation: ClassVar[str] = "Wang et al. 2022, arXiv 2211.00593, section 3.1"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {
        "mlps": MLPS, "direction": DIRECTIONS, "reference": REFERENCES,
    }  # fmt: skip

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return direct_effects(
            pairs.model, pairs, mlps=self.mlps, direction=self.direction,
            reference=self.reference, tower=pairs.tower, progress=progress,
        )  # fmt: skip


@METHODS.register("attribution")
@dataclass(frozen=True)
class Attribution(Method):
    """Share of each head in a linear metric of the clean prompts, the norm's scale frozen."""

    name: ClassVar[str] = "attribution"
    summary: ClassVar[str] = "what each head itself adds to the metric (direct logit attribution)"
    citation: ClassVar[str] = "Elhage et al. 2021, A Mathematical Framework"

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        split = logit_attribution(pairs.model, pairs, tower=pairs.tower)
        units = pairs.model.tower(pairs.tower).heads
        columns = [split.parts.index(str(h)) for h in units]
        return table(
            "attribution", pairs.model, pairs, units, split.per_example[:, columns],
            split.total, np.zeros_like(split.total), params={},
        )  # fmt: skip
