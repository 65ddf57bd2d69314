"""The direct path from a head's output to logits: final norm (linearised) and unembedding.

The last module before the unembedding is found by running the model once and asking which module
made the memory that the unembedding received: models slice out the positions whose logits they
keep, so it is not the same tensor. A norm is linearised at a fixed scale: its weight is kept and,
for layer norms, the mean over d_model is removed; ratios of logits do not depend on the scale.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import SiteError

if TYPE_CHECKING:
    from interp.model import Model


@dataclass(frozen=True)
class Unembedding:
    """What turns the residual stream into logits.

    Attributes:
        weight: [d_vocab, d_model].
        gain: [d_model], the final norm's weight, or None.
        centred: whether the final norm removes the mean over d_model.
    """

    weight: Tensor
    gain: Tensor | None
    centred: bool

    def logits(
        self, result: Float[Tensor, "... d_model"], tokens: Tensor
    ) -> Float[Tensor, "... token"]:
        """Direct effect of residual-stream vectors on the logits of some tokens.

        The mean logit over the vocabulary is subtracted: only differences matter.
        """
        x = result
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if self.gain is not None:
            x = x * self.gain.to(x)
        rows = self.weight[tokens].to(x) - self.weight.mean(0).to(x)
        return x @ rows.T


@torch.no_grad()
def unembedding(model: "Model") -> Unembedding:
    """Find the unembedding of a model and the norm before it.

    Raises:
        SiteError: the model has no output embeddings.
    """
    from interp.example import example_inputs

    get = getattr(model.hf, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise SiteError(
            f"{model.name} has no unembedding, so the direct effect on logits is not defined",
            hint="load the class with a language-model head",
        )
    made: dict[int | None, nn.Module] = {}
    norm: list[nn.Module] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            # Dropout and the like hand on what they were given: the first maker counts.
            made.setdefault(output.untyped_storage().data_ptr(), module)
            kept.append(output)  # memory is one tensor's own only while that tensor lives

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        place = args[0].untyped_storage().data_ptr() if args else None
        if place in made:
            norm.append(made[place])

    kept: list[Tensor] = []
    leaves = [m for m in model.hf.modules() if next(m.children(), None) is None]
    handles = [m.register_forward_hook(after) for m in leaves if m is not head]
    handles.append(head.register_forward_pre_hook(before))
    try:
        model.forward(model._example or example_inputs(model.hf))
    finally:
        for handle in handles:
            handle.remove()
    gain, centred = None, False
    if norm and "norm" in type(norm[-1]).__name__.lower():
        weight = getattr(norm[-1], "weight", None)
        if isinstance(weight, Tensor):
            # Gemma-like norms multiply by 1 + weight: take the gain from what the norm does.
            ones = torch.ones(1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype)
            ones[..., ::2] *= -1
            bias = getattr(norm[-1], "bias", None)
            out = norm[-1](ones) - (0 if bias is None else bias)
            gain = (out * ones)[0, 0]
        centred = isinstance(norm[-1], nn.LayerNorm)
    return Unembedding(head.weight, gain, centred)
