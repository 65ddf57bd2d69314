"""Path patching: the effect of a head along chosen edges only, exactly.

A sender's z is replaced and every other head keeps its z, so that the change reaches a receiver's
q, k or v input along the residual stream alone, through MLPs if they are live. The receiver is then
given that input in a run that is otherwise the base run, and all that follows from it is let
happen. With the logits as receiver this is the direct effect, over all positions.

Receivers are written `L9H6.q`; k and v are inputs of key-value heads, so under grouped-query
attention an edge to k or v reaches every query head of the group. Effect = m(patched) − m(base).

Sources: Wang et al. 2211.00593, appendix B; Goldowsky-Dill et al. 2304.05969.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import HeadIdError, InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.replay import Inputs, Record, Replay
from interp.scores import HeadScores
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer
from patching.direct import MLPS
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
from patching.pairs import PairBatch, Pairs
from patching.references import REFERENCES

LOGITS = "logits"
EMBED = "embed"


@dataclass(frozen=True, order=True)
class Receiver:
    """One input of one head.

    Attributes:
        head: a query head for q, a key-value head for k and v.
        input: `q`, `k` or `v`.
    """

    head: HeadId
    input: str

    def __str__(self) -> str:
        return f"{self.head}.{self.input}"

    @classmethod
    def parse(cls, text: str) -> "Receiver":
        """Read `L9H6.q`.

        Raises:
            InputError: the text is not a head and one of q, k, v.
        """
        match = re.fullmatch(r"(.+)\.([qkv])", text.strip())
        if match is None:
            raise InputError(
                f"a receiver is written L9H6.q, L9H6.k or L9H6.v, or is {LOGITS!r}; got {text!r}"
            )
        return cls(HeadId.parse(match[1]), match[2])

    def check(self, model: Model) -> None:
        """Raise HeadIdError unless the model has it."""
        layer = model.layer_of(self.head)
        if self.input != "q" and self.head.head >= layer.n_kv_heads:
            raise HeadIdError(
                f"{self.input} belongs to key-value heads 0 to {layer.n_kv_heads - 1}; got "
                f"{self.head}",
                hint=f"query head h reads key-value head h // {layer.n_heads // layer.n_kv_heads}",
            )


def read_receivers(model: Model, receivers: str | Iterable[str | Receiver]) -> tuple[Receiver, ...]:
    """Receivers of a model; none of them stands for the logits.

    Raises:
        InputError: the logits are named beside other receivers, or a text is no receiver.
        HeadIdError: a head lies outside the model.
    """
    out = _parsed(receivers)
    for receiver in out:
        receiver.check(model)
    return out


def _parsed(receivers: str | Iterable[str | Receiver]) -> tuple[Receiver, ...]:
    chosen = receivers.split(",") if isinstance(receivers, str) else list(receivers)
    if chosen == [LOGITS]:
        return ()
    if not chosen or LOGITS in chosen:
        raise InputError(f"receivers are either {LOGITS!r} or inputs of heads; got {chosen}")
    return tuple(r if isinstance(r, Receiver) else Receiver.parse(r) for r in chosen)


@torch.no_grad()
def path_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    receivers: str | Iterable[str | Receiver] = LOGITS,
    *,
    metric: str = "logit-difference",
    mlps: str = "live",
    direction: str = "noise",
    reference: str = "other",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Effect of each head along its direct paths to the receivers, all receivers together.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        receivers: `logits`, or inputs of heads such as `L9H6.q`; a text may name several,
            separated by commas.
        metric: name of a metric.
        mlps: `live` (paths may pass through MLPs) or `frozen`.
        direction: `noise` or `denoise`.
        reference: `other`, `zero`, `mean` or `resample`.
        heads: only these senders.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with senders done and senders in all.

    Returns:
        Effects per sender; exactly 0 for a sender that is not below any receiver.

    Raises:
        InputError: see `read_receivers`; unknown `mlps` or direction.
    """
    if mlps not in MLPS:
        raise InputError(f"mlps must be live or frozen; got {mlps!r}")
    wanted = read_receivers(model, receivers)
    units, _ = units_of(model, tower, "z", heads)
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    out = np.zeros((len(data.pairs), len(units)))
    clean, corrupted = np.zeros(len(data.pairs)), np.zeros(len(data.pairs))
    column = {unit: i for i, unit in enumerate(units)}
    done, total = 0, len(units) * len(data.groups())
    for places, batch in data.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        for layer, members in by_layer(model, units):
            above = tuple(r for r in wanted if r.head.layer > layer.index)
            if above or not wanted:
                new = SITES["z"](data, batch, direction, reference, layer)
                start = _start(base, batch, reference)
                if not wanted and base.suffix_works:
                    start = base.n_pos - 1  # what frozen heads see elsewhere reaches no logit
                for some in _portions(base, members, start):
                    sent = _send(base, layer, new, some, start, mlps, above)
                    cells = [(i, above) for i in range(len(some))]
                    logits = sent.logits if not wanted else receive(base, sent, cells)
                    for unit, effect in zip(some, batch.score(logits) - floor, strict=True):
                        out[places, column[unit]] = effect.cpu()
            done += len(members)
            if progress is not None:
                progress(done, total)
    return table(
        "path", model, data, units, out, clean, corrupted,
        params={"receivers": ",".join(map(str, wanted)) or LOGITS, "mlps": mlps,
                "direction": direction, "reference": reference},
        strong="lower" if direction == "noise" else "higher",
    )  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """What receivers see when senders are patched and all other heads frozen.

    Attributes:
        calls: attention module to q, k, v, rows being senders × batch.
        logits: [sender, batch, d_vocab].
        start: first position that was run.
    """

    calls: dict[str, AttnCall]
    logits: Tensor
    start: int


def _start(base: Replay, batch: PairBatch, reference: str) -> int:
    return batch.first if reference == "other" and base.suffix_works else 0


def _portions(base: Replay, members: list[HeadId], start: int) -> Iterable[list[HeadId]]:
    size = size_of_launch(base, start)
    return [members[at : at + size] for at in range(0, len(members), size)]


def _send(
    base: Replay, layer: Layer, new: Tensor, senders: Sequence[HeadId], start: int, mlps: str,
    receivers: Iterable[Receiver],
) -> Sent:  # fmt: skip
    """Patch each sender of a layer in a copy of its own, all other heads frozen."""
    z = base.kept[layer.name].z[:, start:]
    z = z[None].expand(len(senders), *z.shape).clone()
    for i, sender in enumerate(senders):
        z[i, :, :, sender.head] = new[:, start:, sender.head].to(z)
    names = {base.model.layer_of(r.head).name for r in receivers}
    record = Record(names)
    logits = base.rerun(
        {layer.name: z}, copies=len(senders), start=start, freeze=True, record=record,
        freeze_mlps=mlps == "frozen",
    )  # fmt: skip
    return Sent({n: record.calls[n] for n in names}, logits, start)


def _send_embedding(
    base: Replay, ids: Tensor, mlps: str, receivers: Iterable[Receiver], start: int
) -> Sent:
    """Put another prompt's embeddings in, all heads frozen."""
    names = {base.model.layer_of(r.head).name for r in receivers}
    record = Record(names)
    logits = base.rerun(
        {}, copies=1, start=start, freeze=True, record=record, freeze_mlps=mlps == "frozen", ids=ids
    )  # fmt: skip
    return Sent({n: record.calls[n] for n in names}, logits, start)


def receive(
    base: Replay, sent: Sent, cells: Sequence[tuple[int, Sequence[Receiver]]]
) -> Float[Tensor, "cell batch d_vocab"]:
    """Give receivers what a sender sent them, in runs that are otherwise the base run.

    Args:
        base: the base run.
        sent: what was sent.
        cells: sender's row in `sent`, and its receivers.
    """
    batch = len(base.batch)
    by_layer: dict[str, list[tuple[int, int, Receiver]]] = {}
    for i, (sender, receivers) in enumerate(cells):
        for receiver in receivers:
            name = base.model.layer_of(receiver.head).name
            by_layer.setdefault(name, []).append((i, sender, receiver))

    def editor(name: str) -> Inputs:
        call = sent.calls[name]
        if call.q is None or call.k is None or call.v is None:
            raise InputError(
                f"q, k and v of {name} are not reached on {base.model.name}",
                hint="patch to the logits instead",
            )
        given = {"q": call.q, "k": call.k, "v": call.v}

        def edit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            live = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
            for cell, sender, receiver in by_layer[name]:
                to = slice(cell * batch, (cell + 1) * batch)
                by = slice(sender * batch, (sender + 1) * batch)
                head = receiver.head.head
                live[receiver.input][to, head] = given[receiver.input][by, head]
            return live["q"], live["k"], live["v"]

        return edit

    return base.rerun(
        {}, copies=len(cells), start=sent.start, inputs={name: editor(name) for name in by_layer}
    )


@dataclass(frozen=True, eq=False)
class EdgeEffects:
    """Effect of every single edge.

    Attributes:
        senders: `embed` and heads.
        receivers: inputs of heads, and `logits`.
        per_example: [example, sender, receiver]; NaN where the receiver is not above the sender.
        examples: ids.
        metric: name of the metric.
        unit: its unit.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    per_example: Float[np.ndarray, "example sender receiver"]
    examples: tuple[str, ...]
    metric: str
    unit: str

    @property
    def values(self) -> Float[np.ndarray, "sender receiver"]:
        """Mean over examples."""
        return np.asarray(self.per_example.mean(0))

    def above(self, threshold: float) -> dict[tuple[str, str], float]:
        """Edges whose mean effect is larger than a threshold, either sign."""
        rows, columns = np.nonzero(np.abs(np.nan_to_num(self.values)) > threshold)
        return {
            (self.senders[i], self.receivers[j]): float(self.values[i, j])
            for i, j in zip(rows, columns, strict=True)
        }


@torch.no_grad()
def edge_effects(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    mlps: str = "live",
    direction: str = "noise",
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> EdgeEffects:
    """Effect of every edge from the embedding and each head to each later input and the logits.

    One run per edge whose message differs at all; for models of some hundred heads use gradients
    first (EAP) and verify.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        metric: name of a metric.
        mlps: `live` (an edge may pass through MLPs) or `frozen`.
        direction: `noise` or `denoise`.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with senders done and senders in all.
    """
    if mlps not in MLPS:
        raise InputError(f"mlps must be live or frozen; got {mlps!r}")
    data = prepared(model, pairs, metric, batch_size, tower, direction)
    layers, heads = model.tower(tower).layers, model.tower(tower).heads
    inputs = tuple(
        Receiver(HeadId(x.index, h, x.tower), name)
        for x in layers
        for name in ("q", "k", "v")
        for h in range(x.n_heads if name == "q" else x.n_kv_heads)
    )
    senders = (EMBED, *map(str, heads))
    out = np.full((len(data.pairs), len(senders), len(inputs) + 1), np.nan)
    done, total = 0, len(senders) * len(data.groups())
    for places, batch in data.batches():
        base = base_run(batch, direction)
        floor = batch.score(base.logits)
        start = _start(base, batch, "other")
        other = batch.corrupted if direction == "noise" else batch.clean
        messages = [(0, -1, _send_embedding(base, other.batch.input_ids, mlps, inputs, start))]
        for layer in layers:
            mine = [h for h in heads if h.layer == layer.index]
            above = [r for r in inputs if r.head.layer > layer.index]
            new = SITES["z"](data, batch, direction, "other", layer)
            sent = _send(base, layer, new, mine, start, mlps, above)
            messages.append((1 + heads.index(mine[0]), layer.index, sent))
        for row, below, sent in messages:
            effects = batch.score(sent.logits) - floor
            n = len(effects)
            out[places, row : row + n, -1] = effects.T.cpu()
            for layer in (x for x in layers if x.index > below):
                receivers = [r for r in inputs if r.head.layer == layer.index]
                values = _layer_edges(base, batch, sent, layer, receivers, n) - floor
                for j, receiver in enumerate(receivers):
                    out[places, row : row + n, inputs.index(receiver)] = values[:, j].T.cpu()
            done += n
            if progress is not None:
                progress(done, total)
    return EdgeEffects(
        senders, (*map(str, inputs), LOGITS), out, data.ids, data.metric.name, data.metric.unit
    )


def _layer_edges(
    base: Replay, batch: PairBatch, sent: Sent, layer: Layer, receivers: list[Receiver], n: int
) -> Float[Tensor, "sender receiver batch"]:
    """The metric for every edge from the senders to the inputs of one layer."""
    floor = batch.score(base.logits)
    values = floor.expand(n, len(receivers), -1).clone()
    kept, call, width = base.call(layer), sent.calls[layer.name], len(base.batch)
    cells = []
    for j, receiver in enumerate(receivers):
        was, now = getattr(kept, receiver.input), getattr(call, receiver.input)
        was = was[:, receiver.head.head, -now.shape[2] :]
        for i in range(n):
            # A message that is the same, bit for bit, changes nothing.
            if not torch.equal(now[i * width : (i + 1) * width, receiver.head.head], was):
                cells.append((i, j))
    size = size_of_launch(base, sent.start)
    for at in range(0, len(cells), size):
        some = cells[at : at + size]
        logits = receive(base, sent, [(i, (receivers[j],)) for i, j in some])
        for (i, j), value in zip(some, batch.score(logits), strict=True):
            values[i, j] = value
    return values


@METHODS.register("path")
@dataclass(frozen=True)
class Path(Method):
    """Exact effect of each head along its paths to receivers, past all other heads.

    Attributes:
        receivers: `logits`, or inputs such as `L9H6.q,L9H9.q`.
        mlps: `live` or `frozen`.
        direction: `noise` or `denoise`.
        reference: `other`, `zero`, `mean` or `resample`.
    """

    receivers: str = LOGITS
    mlps: str = "live"
    direction: str = "noise"
    reference: str = "other"

    name: ClassVar[str] = "path"
    summary: ClassVar[str] = "path patching from each head to the logits or inputs of heads; exact"
    citation: ClassVar[str] = "Wang et al. 2022, arXiv 2211.00593, appendix B"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {
        "mlps": MLPS, "direction": DIRECTIONS, "reference": REFERENCES,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        _parsed(self.receivers)

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return path_effects(
            pairs.model, pairs, self.receivers, mlps=self.mlps, direction=self.direction,
            reference=self.reference, tower=pairs.tower, progress=progress,
        )  # fmt: skip
