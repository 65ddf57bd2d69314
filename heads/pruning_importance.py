"""Heads of vision transformers that the class hangs on: what pruning each of them alone changes.

    p, p⁻ʰ   class distribution as it is, and with the head's output set to zero at all tokens
    jsd      ½ Σ p log₂(p / m) + ½ Σ p⁻ʰ log₂(p⁻ʰ / m),  m = ½ (p + p⁻ʰ)      in [0, 1] bit
    prob     p_y − p⁻ʰ_y                                                     in [−1, 1]
    class    ‖r − r⁻ʰ‖ / (‖r‖ + ‖r⁻ʰ‖)                                       in [0, 1]

y is the prompt's answer, or the class with the largest p where it has none; r is what leaves the
tower's last block at the class token, or the mean over all tokens of a tower without one. The score
is `jsd` or `prob`, as `measure` says; all three are columns. Positive `prob` means that the model
is less sure of y without the head; `jsd` has no sign and sees changes among other classes too.
`class` is undefined where a prompt is several rows of the tower, or shares a row with others.

The null is the mean of the same over the other heads of the layer: what pruning a random one of
them changes. A layer of a single head has none, and its head is not tested. Heads that stand in for
one another show nothing here, since each is pruned alone: see `heads.verdict`.

It works on any model whose output has logits and that reads images; of text models the next token
is the class. One forward pass for each head, and one without pruning.

Source: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", arXiv 2303.13731 (head importance by leave-one-out; formulas are ours).
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from heads.detector import DETECTORS, Outcome, WatchingDetector
from heads.sight import LAST, with_last
from heads.vision_head_divergence import divergence
from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.seam.blocks import block_names, on_output
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

MEASURES = ("jsd", "prob")


@DETECTORS.register("pruning-importance")
@dataclass(frozen=True)
class PruningImportance(WatchingDetector):
    """Change of the class distribution without a head; see the module's docstring.

    Attributes:
        measure: `jsd` or `prob`.
    """

    measure: str = "jsd"

    name: ClassVar[str] = "pruning-importance"
    summary: ClassVar[str] = "changes the class when it is pruned (vision towers)"
    citation: ClassVar[str] = "Li et al. 2023, arXiv 2303.13731"
    unit: ClassVar[str] = "change of the class distribution"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    threshold: ClassVar[float] = 0.01
    no_evidence: ClassVar[str] = "changes no more than the other heads of its layer"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)
    per_head: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(
                f"pruning-importance:measure must be one of {', '.join(MEASURES)}; "
                f"got {self.measure!r}"
            )

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `WatchingDetector`."""
        stack = model.tower(tower) if tower else next(iter(model.towers.values()))
        batch = model.batch([with_last(p) for p in prompts], side="left")
        before, at = _run(model, stack, batch)
        right = torch.tensor(
            [p.answer[0] if p.answer else int(row.argmax())
             for p, row in zip(prompts, before, strict=True)]
        )[:, None].to(before.device)  # fmt: skip
        shape = (len(prompts), len(stack.layers), max(x.n_heads for x in stack.layers))
        found = {
            name: torch.full(shape, math.nan, dtype=torch.float64)
            for name in ("jsd", "prob", "class")
        }
        for i, layer in enumerate(stack.layers):
            for head in range(layer.n_heads):
                after, there = _run(model, stack, batch, _pruned(layer, head))
                found["jsd"][:, i, head] = jensen_shannon(before, after).cpu()
                found["prob"][:, i, head] = (before - after).gather(1, right)[:, 0].cpu()
                found["class"][:, i, head] = divergence(at, there, "relative").cpu()
        score = found[self.measure].clone()
        return Outcome(score, others(score), found)


def jensen_shannon(
    p: Float[Tensor, "*batch outcome"], q: Float[Tensor, "*batch outcome"]
) -> Float[Tensor, "*batch"]:
    """Jensen–Shannon divergence of distributions, in bits: 0 where they are equal, at most 1.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item()
    1.0
    """
    m = (p + q) / 2
    nats = sum((torch.xlogy(x, x) - torch.xlogy(x, m)).sum(-1) for x in (p, q))
    assert isinstance(nats, Tensor)
    return (nats / (2 * math.log(2))).clamp(0, 1)


def others(values: Float[Tensor, "example layer head"]) -> Float[Tensor, "example layer head"]:
    """Mean over the other heads of the layer; NaN where there is no head, or no other.

    >>> others(torch.tensor([[[3.0, 1.0, 2.0]]])).tolist()
    [[[1.5, 2.5, 2.0]]]
    """
    there = ~values.isnan()
    count = there.sum(-1, keepdim=True) - 1
    rest = values.nansum(-1, keepdim=True) - values
    return rest / count.to(values).masked_fill(count < 1, math.nan)


def _pruned(layer: Layer, head: int) -> Callable[[Layer, Tensor], Tensor | None]:
    def change(some: Layer, z: Tensor) -> Tensor | None:
        if some.name != layer.name:
            return None
        z = z.clone()
        z[:, :, head] = 0
        return z

    return change


@torch.no_grad()
def _run(
    model: "Model",
    stack: Tower,
    batch: Batch,
    change: Callable[[Layer, Tensor], Tensor | None] | None = None,
) -> tuple[Float[Tensor, "batch outcome"], Float[Tensor, "batch d"]]:
    """The class distribution, and what leaves the last block at the class token.

    Raises:
        InputError: the output has no logits.
    """
    left: list[Tensor] = []
    inputs = batch.inputs()
    if not model.reads_tokens:  # it may take a mask of tokens all the same, and mask patches by it
        inputs = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}

    def note(x: Tensor) -> None:
        left.append(x.detach())

    with ExitStack() as hooks:
        last = model.hf.get_submodule(block_names(model, stack)[-1])
        hooks.callback(on_output(last, note))
        if change is not None:
            hooks.enter_context(model.observe_output(change))
        out = model.forward(inputs)
    logits = getattr(out, "logits", None)
    if logits is None:
        raise InputError(
            f"pruning is judged by classes; the output of {model.name} "
            f"({type(model.hf).__name__}) has no logits",
            hint="load the model with its head, such as ViTForImageClassification",
        )
    logits = logits[:, -1] if logits.dim() == 3 else logits
    return logits.double().softmax(-1), _represented(stack, batch, left).double()


def _represented(stack: Tower, batch: Batch, left: list[Tensor]) -> Float[Tensor, "batch d"]:
    """What left the last block at the class token of each prompt, or NaN."""
    view = batch.view(stack.name)
    seen, owners = (batch, tuple(range(len(batch)))) if view is None else view
    x = left[0]
    single = len(left) == 1 and owners == tuple(range(len(batch)))
    if not single or x.dim() != 3 or x.shape[:2] != seen.input_ids.shape:
        return x.new_full((len(batch), 1), math.nan)
    marked = all(LAST in p.spans for p in seen.prompts)
    places = seen.positions(LAST if marked else "all")
    return torch.stack([row[mine].mean(0) for row, mine in zip(x, places, strict=True)])
