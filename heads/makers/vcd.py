"""Contrastive decoding against a run that does not see the image.

    ℓ = (1 + α)·ℓ(y | image, text) − α·ℓ′(y),     only over tokens with ℓ(y | image) ≥ log β + max

What the model would say anyway, from its habits, is in ℓ′ and is taken away. ℓ′ is a second run of
the same tokens with a cache of its own, in which no token after the image sees it (`knockout`), or
whose image was diffused with noise (`noise`, the published form: step 500 of 1000 of a sigmoid
schedule of β from 1e-5 to 5e-3). Hiding needs no pixels and holds for any prompts; noise is drawn
for the prompts in hand, and hides an image only as well as the tower cannot see through it.

The published evaluation samples; this recipe edits logits and leaves the choice to `generate`.

Leng et al. 2024 (CVPR), arXiv 2311.16922, equation 3.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import about, as_batch, token_tower
from interp.errors import InputError
from interp.prompts import Batch
from interp.recipe import Edit, Positions, Recipe, Where
from interp.recipe.where import span as named_span

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Leng et al. 2024, arXiv 2311.16922"
BLINDS = ("knockout", "noise")
STEPS = 1000


@maker("vcd", summary="push logits away from what is said without the image", citation=CITATION)
def make_vcd(
    model: "Model",
    inputs: Inputs,
    *,
    span: str = "image",
    alpha: float = 1.0,
    beta: float = 0.1,
    blind: str = "knockout",
    step: int = 500,
    seed: int = 0,
) -> Recipe:
    """The contrast with a blind run.

    Args:
        model: the model in hand.
        inputs: the prompts that will be run; looked at for `noise` only.
        span: what the second run does not see.
        alpha: strength of the contrast.
        beta: plausibility: tokens below β of the likeliest are ruled out.
        blind: `knockout` or `noise`.
        step: of the diffusion, 0 (the image itself) to 1000.
        seed: seed of the noise.

    Returns:
        A recipe whose positions are spans: give them by `recipe.on(model, spans=batch)`.

    Raises:
        InputError: an unknown way to blind, a step out of range, or prompts without pixels.
    """
    if blind not in BLINDS:
        raise InputError(f"blind must be one of {', '.join(BLINDS)}; got {blind!r}")
    if not 0 <= step <= STEPS:
        raise InputError(f"step lies in 0..{STEPS}; got {step}")
    if blind == "knockout":
        tower = token_tower(model)
        others = Positions(prompt="all", generated="all", exclude=named_span(span))
        where = Where(tower=tower.name, queries=others, keys=named_span(span))
        twin = Recipe((Edit("knockout", where),))
        batch = None
    else:
        batch = as_batch(model, inputs)
        seen = _embedded(model, noised(batch, step, seed))
        where = Where(layers=(0,), queries=named_span(span))
        twin = Recipe((Edit("set", where, site="resid", tensors={"value": seen[None]}),))
    edit = Edit("contrast", Where(), alpha, params={"beta": beta}, twin=twin)
    params = {
        "span": span, "alpha": alpha, "beta": beta, "blind": blind, "step": step, "seed": seed
    }  # fmt: skip
    return Recipe((edit,), model.fingerprint, about("vcd", CITATION, model, batch, params))


def noised(batch: Batch, step: int, seed: int) -> Batch:
    """The batch with its pixels diffused: x ← √ᾱ·x + √(1 − ᾱ)·ε, ᾱ = Π (1 − β) up to `step`.

    Raises:
        InputError: the prompts have no pixels.
    """
    if "pixel_values" not in batch.extra:
        raise InputError(
            "noise needs pixels; the prompts have none", hint="use blind=knockout, or image prompts"
        )
    rate = torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - rate[:step]).prod())
    pixels = batch.extra["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels)
    mixed = kept**0.5 * pixels + (1 - kept) ** 0.5 * noise
    return replace(batch, extra={**batch.extra, "pixel_values": mixed})


def _embedded(model: "Model", batch: Batch) -> Tensor:
    """What enters the first block: [batch, pos, d_model]."""
    from interp.seam.blocks import block_names, on_input

    seen: list[Tensor] = []
    first = model.hf.get_submodule(block_names(model, token_tower(model))[0])
    remove = on_input(first, lambda x: seen.append(x.detach().clone()))
    try:
        model.forward(batch.inputs())
    finally:
        remove()
    return seen[0]
