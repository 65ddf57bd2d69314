"""Edge attribution patching: every edge of the residual stream from one forward and backward.

    S[u, v] = Σ_pos (a_src(u) − a_dst(u)) · ∂m/∂(input of v), the gradient taken in the dst run

Writers u put a_u into the residual stream; readers v take their input from it. The gradient of the
query input of one head is the derivative of that head's query with respect to the stream, applied
to ∂m/∂q of that head; keys and values likewise, once per key-value head. Autograd goes that way
through the block's own norm, projection and rotation, so nothing is written for a model family and
no copy of the stream per head is made. "mlp" is whatever else a block adds.

Since the readers of a stream are all that depends on it, the edges of a writer add up to its own
attribution: Σ_v S[u, v] = AtP(u), to rounding. That needs a block to add its attention's projected
output to the stream as it is; whether it does is measured in every run, by gradients.

Sources: Syed et al. 2310.10348; Hanna et al. 2403.17806.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import SiteError
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.structure import Layer
from patching.atp import check_choice, estimates
from patching.edges import HOWS, EdgeScores, Node, per_head
from patching.engine import DIRECTIONS, base_run
from patching.gradients import Trace, backward, check_slope, trace
from patching.method import METHODS, Method
from patching.pairs import PairBatch, Pairs
from patching.references import other_run
from patching.verify import verified

Progress = Callable[[int, int], None]
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
LOOSE = 5e-2


@METHODS.register("eap")
@dataclass(frozen=True)
class EdgeAttributionPatching(Method):
    """First-order estimate of the effect of patching each edge, and of each head by its edges.

    Attributes:
        direction: `noise` or `denoise`.
        how: how edges make a head's number: `out`, `in` or `max`; see `EdgeScores.to_heads`.
        verify: how many top heads, and how many random others, to measure exactly; 0 for none.
    """

    direction: str = "noise"
    how: str = "out"
    verify: int = 10

    name: ClassVar[str] = "eap"
    summary: ClassVar[str] = "estimate effects of edges between heads from one gradient"
    citation: ClassVar[str] = "Syed et al. 2023, arXiv 2310.10348, section 2"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {"direction": DIRECTIONS, "how": HOWS}
    least: ClassVar[Mapping[str, int]] = {"verify": 0}
    exact: ClassVar[bool] = False

    def slopes(self, batch: PairBatch) -> list[tuple[float, Tensor | None]]:
        """Where on the way between the runs gradients are taken: weight and first stream."""
        check_slope(batch, base_run(batch, self.direction))
        return [(1.0, None)]

    def edges(self, pairs: Pairs, *, progress: Progress | None = None) -> EdgeScores:
        """Mean scores of all edges.

        Raises:
            InputError: an unknown direction, or a metric without gradient.
            SiteError: heads do not write to the residual stream as they are, or q, k and v are
                not reached.
        """
        check_choice("direction", self.direction, DIRECTIONS)
        total: Float[np.ndarray, "writer reader"] | None = None
        done = 0
        for places, batch in pairs.batches():
            graph, values = self.of_batch(batch)
            part = values.sum(0).cpu().numpy()
            total = part if total is None else total + part
            done += len(places)
            if progress is not None:
                progress(done, len(pairs.pairs))
        assert total is not None
        return EdgeScores(
            f"{self.name}.{self.direction}", graph.writers, graph.readers,
            np.where(graph.forward, total / done, np.nan), pairs.ids,
            {"direction": self.direction, "metric": pairs.metric.name},
        )  # fmt: skip

    def of_batch(self, batch: PairBatch) -> tuple["Graph", Float[Tensor, "batch writer reader"]]:
        """Scores of a batch, per example; 0 where there is no edge."""
        base = base_run(batch, self.direction)
        changes = differences(base, other_run(batch, self.direction))
        out: tuple[Graph, Tensor] | None = None
        for weight, start in self.slopes(batch):
            graph, values = edge_values(batch, base, changes, start)
            out = (graph, weight * values if out is None else out[1] + weight * values)
        assert out is not None
        return out

    def scores(self, pairs: Pairs, *, progress: Progress | None = None) -> HeadScores:
        """See `Method` and `edges`."""
        check_choice("how", self.how, HOWS)

        def of(batch: PairBatch) -> Tensor:
            graph, values = self.of_batch(batch)
            one = EdgeScores(self.name, graph.writers, graph.readers, graph.forward * 1.0)
            return torch.from_numpy(per_head(one, values.cpu().numpy(), self.how))

        params: dict[str, object] = {"site": "z", "direction": self.direction, "how": self.how}
        out = estimates(self.name, pairs, of, "z", self.direction, params, progress)
        return verified(out, pairs, self.verify)


@dataclass(frozen=True)
class Changes:
    """What each writer puts in differently in the other run.

    Attributes:
        start: [batch, pos, d_model] at the first block.
        z: attention module to [batch, pos, head, d_v].
        rest: block to what else it adds, where that is anything.
    """

    start: Tensor
    z: dict[str, Tensor]
    rest: dict[int, Tensor]


@dataclass(frozen=True)
class Graph:
    """Writers, readers, and [writer, reader] which edges there are."""

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    forward: Float[np.ndarray, "writer reader"]


@torch.no_grad()
def differences(base: Replay, other: Replay) -> Changes:
    """What each writer puts in differently in another run."""
    (a, _), (b, _) = trace(base), trace(other)
    names = {layer.index: layer.name for layer in base.tower.layers}
    rest = {}
    for i in range(len(base.blocks)):
        parts = []
        for seen in (a, b):
            added = seen.streams[i + 1] - seen.streams[i]
            parts.append(added - seen.written[names[i]] if i in names else added)
        # What is left of rounding where a block holds attention alone is no writer.
        scale = max(float(a.streams[j].abs().max()) for j in (i, i + 1))
        eps = torch.finfo(parts[0].dtype).eps
        if max(float(p.abs().max()) for p in parts) > 16 * eps * scale:
            rest[i] = parts[1] - parts[0]
    return Changes(b.streams[0] - a.streams[0], {n: b.z[n] - a.z[n] for n in names.values()}, rest)


def edge_values(
    batch: PairBatch, base: Replay, changes: Changes, start: Tensor | None
) -> tuple[Graph, Float[Tensor, "batch writer reader"]]:
    """Scores of all edges with gradients in one run, from its end to its beginning.

    Readers are made one block at a time, and the writers before them one block at a time, so that
    of all pairs only the scores are held.
    """
    layers = {layer.index: layer for layer in base.tower.layers}
    last = len(base.blocks)
    with torch.enable_grad():
        seen, logits = trace(base, start=start)
        slope = backward(seen, batch.score(logits), keep=True)
    readers: list[tuple[Node, bool]] = []
    columns: list[Tensor] = []

    def read(nodes: list[Node], grads: Tensor, *, same_block: bool = False) -> None:
        columns.append(
            torch.cat(list(_against(base, changes, grads, nodes[0].layer, same_block)), dim=1)
        )
        readers.extend((node, same_block) for node in nodes)

    for i in range(last):
        passed = slope.streams[i + 1]
        rest = slope.streams[i] - passed
        also = False
        if i in layers:
            nodes, grads = head_readers(base, layers[i], seen, slope, i)
            read(nodes, grads)
            rest = rest - grads.sum(0)
            also = _reads_attention(base, layers[i], rest, passed, slope)
        if i in changes.rest:
            read([Node("mlp", i)], rest[None], same_block=also)
    read([Node("logits", last)], slope.streams[last][None])
    writers = tuple(_writers(base, changes))
    forward = np.array(
        [
            [w.layer < r.layer or (same and w.layer == r.layer and w.kind == "head")
             for r, same in readers]
            for w in writers
        ]
    )  # fmt: skip
    return Graph(writers, tuple(r for r, _ in readers), forward), torch.cat(columns, dim=2)


def _writers(base: Replay, changes: Changes) -> Iterator[Node]:
    layers = {layer.index: layer for layer in base.tower.layers}
    yield Node("input", -1)
    for i in range(len(base.blocks)):
        if i in layers:
            yield from (Node("head", i, h, "", layers[i].tower) for h in range(layers[i].n_heads))
        if i in changes.rest:
            yield Node("mlp", i)


def _against(
    base: Replay,
    changes: Changes,
    grads: Float[Tensor, "reader batch pos d_model"],
    block: int,
    same_block: bool,
) -> Iterator[Float[Tensor, "batch writer reader"]]:
    """What the writers have in common with readers of a block, group of writers by group.

    Zero for writers that do not come before; heads of the readers' own block do if `same_block`.
    """
    layers = {layer.index: layer for layer in base.tower.layers}
    none = grads.new_zeros(grads.shape[1], 1, grads.shape[0])

    def common(written: Float[Tensor, "batch pos writer d_model"]) -> Tensor:
        return torch.einsum("bpud,vbpd->buv", written.to(grads), grads)

    yield common(changes.start[:, :, None])
    for i in range(len(base.blocks)):
        if i in layers:
            layer = layers[i]
            if i < block or (same_block and i == block):
                w_o = base.model.w_o(layer).detach()
                z = changes.z[layer.name]
                yield common(torch.einsum("bphe,hed->bphd", z.to(w_o), w_o))
            else:
                yield none.expand(-1, layer.n_heads, -1)
        if i in changes.rest:
            yield common(changes.rest[i][:, :, None]) if i < block else none


def head_readers(
    base: Replay, layer: Layer, seen: Trace, slope: Trace, block: int
) -> tuple[list[Node], Float[Tensor, "reader batch pos d_model"]]:
    """Gradients of the stream at a block through each head's q, k and v alone.

    Raises:
        SiteError: q, k and v are not reached on this model.
    """
    if layer.name not in seen.q:
        raise SiteError(
            f"edges need q, k and v; those of {layer.name} are not reached on {base.model.name}",
            hint="use method atp with site z",
        )
    nodes, grads = [], []
    for port in ("q", "k", "v"):
        value, grad = getattr(seen, port)[layer.name], getattr(slope, port)[layer.name]
        for head in range(value.shape[1]):
            alone = torch.zeros_like(grad)
            alone[:, head] = grad[:, head]
            (back,) = torch.autograd.grad(value, seen.streams[block], alone, retain_graph=True)
            nodes.append(Node("head", block, head, port, layer.tower))
            grads.append(back)
    return nodes, torch.stack(grads)


def _reads_attention(
    base: Replay, layer: Layer, rest: Tensor, passed: Tensor, slope: Trace
) -> bool:
    """Whether the rest of a block reads the stream after its attention, rather than beside it.

    With stream x and projected output a, a block is x + a + M(x + a) or x + a + M(x). In the first
    the gradient at a is that of the stream after the block plus M's, in the second it is the former
    alone. A block that puts a norm or a factor between a and the stream is neither.

    Raises:
        SiteError: neither holds in this run.
    """
    at = slope.written[layer.name]
    allowed = TOLERANCE.get(at.dtype, LOOSE) * float(at.norm() + passed.norm())
    if float((at - passed - rest).norm()) <= allowed:
        return True
    if float((at - passed).norm()) <= allowed:
        return False
    raise SiteError(
        f"edges need heads that write to the residual stream as they are; on {base.model.name} "
        f"something stands between {layer.projection} and the stream",
        hint="use method atp, which needs no edges",
    )
