"""Gradient importance of heads: how much the metric would change at first order.

Each head is given a gate ξ = 1 on its output; z·∂m/∂z summed over d_head is ∂m/∂ξ. Michel et al.
define the importance as E|∂m/∂ξ| with one gate per example; their published code takes the
absolute value at every position. Both are offered, and they differ. Unsigned, ≥ 0, first order: a
saturated softmax hides heads from it entirely, so a zero is no evidence.

Source: Michel et al. 2019, arXiv 1905.10650, section 4.1, and its code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError
from interp.headid import HeadId
from interp.metrics import Bound, bind
from interp.model import Model
from interp.prompts import PromptPair
from interp.scores import HeadScores
from interp.seam.structure import Layer
from patching.effects import table
from patching.engine import prepared
from patching.method import METHODS, Method
from patching.pairs import Pairs

PER = ("example", "position")


def head_importance(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    *,
    metric: str = "logit-difference",
    per: str = "example",
    normalise: bool = False,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Gradient importance of every head on the clean prompts.

    Args:
        model: the model.
        pairs: prompts; only the clean ones are run.
        metric: name of a differentiable metric.
        per: `example`: |Σ over positions|; `position`: mean over positions of the absolute value.
        normalise: divide each layer by the ℓ2 norm of its heads.
        batch_size: pairs at a time.
        tower: tower of the heads.
        progress: called with examples done and examples in all.

    Raises:
        InputError: unknown `per`, or a metric without a gradient.
    """
    if per not in PER:
        raise InputError(f"per must be example or position; got {per!r}")
    data = prepared(model, pairs, metric, batch_size, tower)
    units = model.tower(tower).heads
    out = np.zeros((len(data.pairs), len(units)))
    clean = np.zeros(len(data.pairs))
    done = 0
    for places in data.groups():
        values, slopes = _slopes(model, data, places, units, tower)
        share = slopes.sum(-1).abs() if per == "example" else slopes.abs().mean(-1)
        out[places], clean[places] = share.cpu().numpy(), values.cpu().numpy()
        done += len(places)
        if progress is not None:
            progress(done, len(data.pairs))
    if normalise:
        out = out / _layer_norms(units, out)
    scores = table(
        "importance", model, data, units, out, clean, np.zeros_like(clean),
        params={"per": per, "normalise": normalise},
    )  # fmt: skip
    return replace(scores, unit=f"|slope of {data.metric.name}|", range=(0.0, np.inf), extras={})


def _layer_norms(units: Sequence[HeadId], out: np.ndarray) -> Float[np.ndarray, " head"]:
    layers, mean = np.array([h.layer for h in units]), out.mean(0)
    norms = {x: np.sqrt((mean[layers == x] ** 2).sum()) + 1e-20 for x in set(layers.tolist())}
    return np.array([norms[x] for x in layers.tolist()])


def _slopes(
    model: Model, data: Pairs, places: list[int], units: Sequence[HeadId], tower: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch head pos"]]:
    """The metric, and its slope in a gate on every head's output at every position."""
    prompts = [data.pairs[i].clean for i in places]
    batch = model.batch(prompts, side="left")
    bound = bind(data.metric, prompts, model.device)
    gates: dict[str, Tensor] = {}

    def gate(layer: Layer, z: Tensor) -> Tensor | None:
        if layer.tower != tower:
            return None
        gates[layer.name] = torch.ones(z.shape[:3], device=z.device, dtype=z.dtype)
        gates[layer.name].requires_grad_()
        return z * gates[layer.name][..., None]

    with torch.enable_grad(), without_weights(model.hf), model.observe_output(gate):
        out = model.hf(**batch.inputs())
        logits = (out.logits if hasattr(out, "logits") else out[0])[:, -1]
        if data.metric.compares:
            bound = Bound(bound.answer, bound.wrong, logits.detach())
        values = data.metric.of(logits, bound)
        if not values.requires_grad:
            raise InputError(
                f"metric {data.metric.name!r} has no gradient",
                hint="choose logit-difference or log-prob",
            )
        slopes = torch.autograd.grad(values.sum(), list(gates.values()))
    by_name = dict(zip(gates, slopes, strict=True))
    columns = [by_name[model.layer_of(h).name][:, :, h.head] for h in units]
    return values.detach(), torch.stack(columns, 1)


@contextmanager
def without_weights(hf: nn.Module) -> Iterator[None]:
    """No graph for weights while the context is open."""
    weights = [p for p in hf.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


@METHODS.register("importance")
@dataclass(frozen=True)
class Importance(Method):
    """First-order importance of each head.

    Attributes:
        per: `example` (as the paper defines it) or `position` (as its code does).
        normalise: divide each layer by the ℓ2 norm of its heads.
    """

    per: str = "example"
    normalise: bool = False

    name: ClassVar[str] = "importance"
    summary: ClassVar[str] = "size of the metric's slope in a gate on each head; first order"
    citation: ClassVar[str] = "Michel et al. 2019, arXiv 1905.10650, section 4.1"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {"per": PER}
    exact: ClassVar[bool] = False

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return head_importance(
            pairs.model, pairs, per=self.per, normalise=self.normalise, tower=pairs.tower,
            progress=progress,
        )  # fmt: skip
