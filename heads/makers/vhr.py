"""VHR: heads whose output depends on an image are made louder.

    VHD_i = ‖z_i(with the image) − z_i(without)‖₂ at the last token      ≥ 0, 0 is blind
    TA_i  = ‖z_i(without)‖²
    VHD_i counts as 0 if VHD_i > μ + σ and TA_i > μ + σ, each over the heads of the layer
    H     = {i : VHD_i > median of the layer}
    z_i becomes α·z_i for i in H

The image is a span of tokens: in the run without, these tokens and all further inputs (pixels) are
left out. A span of text does as well. Heads are chosen at the end of the prompt and kept while the
model answers.

Layers are judged in one pass, each on what the reinforced layers before it made of the image; the
run without the image is plain. `layered=False` judges all layers on a plain run instead.

The tokens after the image move up when it is left out, so that VHD holds an effect of position
beside that of the image; `without` takes other prompts, such as ones of equal length. Raw distances
favour heads with large outputs. σ is that of the population; a median between two heads is their
mean. The outlier rule drops heads that are loudest when they see no image.

He et al. 2025 (ACL), arXiv 2412.13949.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import (
    about,
    as_batch,
    frame_of,
    last_tokens,
    layers_of,
    token_tower,
    where_on,
)
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from interp.recipe import Edit, Positions, Recipe, Where
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "He et al. 2025, arXiv 2412.13949"
EVERYWHERE = Positions(prompt="all", generated="all")


@maker("vhr", summary="scale the heads whose output depends on an image", citation=CITATION)
def make_vhr(
    model: "Model",
    inputs: Inputs,
    *,
    span: str = "image",
    without: Inputs | None = None,
    alpha: float = 2.0,
    layers: Sequence[int] | int | None = None,
    outliers: bool = True,
    layered: bool = True,
    shared: bool = False,
    positions: Positions = EVERYWHERE,
) -> Recipe:
    """The reinforcement of the heads that see a span, on some prompts.

    Args:
        model: the model in hand.
        inputs: the prompts that will be run, with the span (and pixels, if the model has eyes).
        span: what is left out; any span of tokens.
        without: the inputs without the image, if not those with the span left out; as many, each
            at the same place.
        alpha: factor on z.
        layers: layers in which heads are chosen; the second and the last 14 of 32, or as many in
            proportion, if None.
        outliers: apply the outlier rule.
        layered: judge each layer on the reinforced layers before it.
        shared: choose the same heads for all prompts, by VHD and TA averaged over them; the recipe
            is then for any prompts.
        positions: where z is scaled.

    Returns:
        A recipe; its notes hold the VHD of every head on each prompt (`vhd`), which were taken for
        outliers (`outliers`) and which are scaled (`chosen`).

    Raises:
        SpanError: a prompt lacks the span.
        InputError: the span is all of a prompt or its last token, or no head depends on it.
    """
    batch, tower = as_batch(model, inputs), token_tower(model)
    other = _left_out(model, batch, span) if without is None else as_batch(model, without)
    if len(other) != len(batch):
        raise InputError(
            f"there must be as many inputs without the image as with it; got {len(other)} and "
            f"{len(batch)}"
        )
    reach = max(1, round(14 * tower.n_layers / 32))
    default = sorted({1, *range(max(0, tower.n_layers - reach), tower.n_layers)})
    chosen = layers_of(tower, layers, default)
    blind = _last_z(model, tower, other)
    judge = _Judge(batch, blind, alpha, outliers, shared, positions, layered)
    judge.run(model, tower, {layer.index for layer in chosen})
    heads = sorted(h for h, on in judge.chosen.items() if bool(on.any()))
    if not heads:
        raise InputError(
            f"a head must depend on span {span!r} more than the median of its layer; in the chosen "
            f"layers none does",
            hint="choose other layers, or check that the span holds what matters",
        )
    on = torch.stack([judge.chosen[h] for h in heads]).cpu()
    edit = Edit(
        "scale",
        Where(heads=tuple(heads), queries=positions),
        where_on(on, alpha, 1.0),
    )
    params = {
        "span": span, "alpha": alpha, "layers": [x.index for x in chosen], "outliers": outliers,
        "layered": layered, "shared": shared,
    }  # fmt: skip
    notes = about("vhr", CITATION, model, batch, params)
    found = {
        "vhd": {str(h): v.tolist() for h, v in judge.vhd.items()},
        "outliers": {str(h): v.tolist() for h, v in judge.outlying.items() if bool(v.any())},
        "chosen": {str(h): judge.chosen[h].tolist() for h in heads},
    }
    return Recipe((edit,), model.fingerprint, {**notes, **found})


def choose_vision_heads(
    vhd: Float[Tensor, "example head"],
    text: Float[Tensor, "example head"],
    *,
    outliers: bool = True,
) -> tuple[Bool[Tensor, "example head"], Bool[Tensor, "example head"]]:
    """The heads of one layer that are reinforced, and those that the outlier rule drops.

    Args:
        vhd: ‖z with − z without‖ of each head.
        text: ‖z without‖² of each head.
        outliers: whether the rule applies.

    >>> chosen, _ = choose_vision_heads(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), torch.ones(1, 4))
    >>> chosen.tolist()
    [[False, False, True, True]]
    """

    def far(x: Tensor) -> Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)

    dropped = far(vhd) & far(text) if outliers else torch.zeros_like(vhd, dtype=torch.bool)
    kept = vhd.masked_fill(dropped, 0)
    return kept > kept.quantile(0.5, dim=-1, keepdim=True), dropped


class _Judge:
    """One pass with the image: measures each layer, and reinforces it for those after it."""

    def __init__(
        self, batch: Batch, blind: Mapping[int, Tensor], alpha: float, outliers: bool,
        shared: bool, positions: Positions, layered: bool,
    ) -> None:  # fmt: skip
        self.batch, self.blind, self.alpha = batch, blind, alpha
        self.outliers, self.shared, self.layered = outliers, shared, layered
        width = batch.input_ids.shape[1]
        self.where = frame_of(batch).select(positions, 0, 0, width)
        self.last = last_tokens(batch)
        self.vhd: dict[HeadId, Tensor] = {}
        self.outlying: dict[HeadId, Tensor] = {}
        self.chosen: dict[HeadId, Tensor] = {}

    def run(self, model: "Model", tower: Tower, layers: set[int]) -> None:
        names = {layer.name for layer in tower.layers}

        def observer(layer: Layer, z: Tensor) -> Tensor | None:
            if layer.name not in names:
                return None
            on = self.measured(layer, z)
            if layer.index not in layers:
                return None
            for h in range(layer.n_heads):
                self.chosen[HeadId(layer.index, h, layer.tower)] = on[:, h]
            if not self.layered:
                return None
            louder = self.where[:, :, None] & on[:, None]
            return torch.where(louder[..., None], self.alpha * z, z)

        with model.observe_output(observer):
            model.forward(self.batch.inputs())

    def measured(self, layer: Layer, z: Tensor) -> Bool[Tensor, "example head"]:
        """Note the VHD of a layer; says which of its heads are to be reinforced."""
        blind = self.blind[layer.index]
        seen = z[torch.arange(len(z), device=z.device), self.last].to(blind.dtype)
        vhd, text = (seen - blind).norm(dim=-1), blind.square().sum(-1)
        for h in range(layer.n_heads):
            self.vhd[HeadId(layer.index, h, layer.tower)] = vhd[:, h]
        if self.shared:
            vhd, text = (x.mean(0, keepdim=True).expand_as(x) for x in (vhd, text))
        on, dropped = choose_vision_heads(vhd, text, outliers=self.outliers)
        for h in range(layer.n_heads):
            self.outlying[HeadId(layer.index, h, layer.tower)] = dropped[:, h]
        return on


def _last_z(model: "Model", tower: Tower, batch: Batch) -> dict[int, Tensor]:
    """The z at the last token of each prompt, by layer: [example, head, d]."""
    last, out = last_tokens(batch), {}
    names = {layer.name for layer in tower.layers}

    def observer(layer: Layer, z: Tensor) -> None:
        if layer.name in names:
            mine = z[torch.arange(len(z), device=z.device), last]
            out[layer.index] = mine if mine.dtype == torch.float64 else mine.float()

    with model.observe_output(observer):
        model.forward(batch.inputs())
    return out


def _left_out(model: "Model", batch: Batch, span: str) -> Batch:
    """The prompts without a span, and without any further inputs."""
    prompts = []
    for prompt in batch.prompts:
        gone = set(prompt.positions(span))
        left = [t for i, t in enumerate(prompt.tokens) if i not in gone]
        if not left or len(prompt) - 1 in gone:
            raise InputError(
                f"a prompt must go on after span {span!r}, whose effect is read at the last token; "
                f"prompt {prompt.id or '?'} ends with it"
            )
        prompts.append(Prompt(tuple(left), id=prompt.id))
    return model.batch(prompts, side="left")
