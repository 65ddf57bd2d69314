"""Content-agnostic heads of vision towers: the same map whatever is on the image.

    π      a random order of the image's own patches, fixed by the prompt's id
    A, A'  the head's maps [patch, patch] on the image, and on the image with its patches in order π
    place    corr(A, A')             in [−1, 1], the score: 1 if the map stays where it was
    content  corr(A', π A πᵀ)        1 if the map moves with the patches; a column

Correlations are over all entries of a map. The class token and registers are left out; rows are not
renormalised for that, which a correlation of whole maps hardly feels. The null is corr(A, π A πᵀ):
what a head that goes by content alone would score on the same map. A head that looks at itself goes
by both and scores 1 beside a null of 1: no evidence of either. A map without any variation (even
attention; all mass on the class token) has no correlation: undefined.

Comparing an image with its own shuffled self keeps a score per image, whatever other images are in
the batch, and gives both maps the same patches. The published statistic, the mean correlation
of a head's maps over pairs of images, is `map_correlation`.

Source: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", arXiv 2303.13731 (the split into content-agnostic and content-relevant heads).
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from interp.engine import read
from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.readings import Reading, Rows
from interp.scores import HeadScores

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

# Deviations below this part of the largest entry are rounding, not a pattern.
_ROUNDING = 1e-5
TOWER = "vision"


@DETECTORS.register("content-agnostic")
@dataclass(frozen=True)
class ContentAgnostic(ReadingDetector):
    """A map that stays where it was when patches trade places; see the module's docstring."""

    name: ClassVar[str] = "content-agnostic"
    summary: ClassVar[str] = "looks at the same places whatever is on the image (vision towers)"
    citation: ClassVar[str] = "Li et al. 2023, arXiv 2303.13731"
    unit: ClassVar[str] = "correlation of maps"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    threshold: ClassVar[float] = 0.5
    no_evidence: ClassVar[str] = "its map moves with what is on the image, or looks at itself"
    task: ClassVar[str] = "tiles"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def prepare(self, prompt: Prompt) -> Prompt:
        """See `ReadingDetector`.

        Raises:
            InputError: the vision tower does not see one image as a whole.
        """
        only_row(prompt, TOWER)
        return prompt

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"maps": Rows("image")}

    def control(self, prompt: Prompt, rng: random.Random) -> Prompt | None:
        """The image with its patches in another order.

        Raises:
            InputError: the prompt's pixels cannot be cut along its patches.
        """
        return shuffled_patches(prompt, order_of(prompt))

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        assert control is not None
        maps = answers["maps"]
        place = maps.new_full(maps.shape[:3], math.nan)
        null, content = place.clone(), place.clone()
        for b, prompt in enumerate(batch.prompts):
            row = only_row(prompt, tower.name)
            order = order_of(prompt)
            here, there = (patch_map(x["maps"][b], row) for x in (answers, control))
            moved = here[..., order, :][..., order]
            place[b] = correlation(here, there)
            content[b] = correlation(there, moved)
            null[b] = correlation(here, moved)
        for values in (null, content):  # one map may be flat where the other is not
            values.masked_fill_(place.isnan(), math.nan)
        return Outcome(place, null.masked_fill(place.isnan(), math.nan), {"content": content})


def only_row(prompt: Prompt, tower: str) -> Prompt:
    """The one image of a prompt, as a tower sees it.

    Raises:
        InputError: the tower sees none, or several, or has a grid of its own in each stage.
    """
    rows = prompt.views.get(tower, ())
    if any(
        name.startswith(f"{tower}/") and name[len(tower) + 1 :].isdigit() for name in prompt.views
    ):
        raise InputError(
            f"maps are compared on one grid; the stages of tower {tower!r} have grids of their own",
            hint="distance-profile serves such towers",
        )
    if len(rows) != 1 or rows[0].patches is None or not len(rows[0].patches):
        raise InputError(
            f"one image that tower {tower!r} sees as a whole is needed; prompt {prompt.id or '?'} "
            f"shows it {len(rows)}",
            hint="choose tower vision, and prompts of one image without tiles",
        )
    return rows[0]


def patch_map(
    rows: Float[Tensor, "layer head image key"], seen: Prompt
) -> Float[Tensor, "layer head patch patch"]:
    """Rows of span `image` without what stands for no pixels, in double precision."""
    assert seen.patches is not None
    places = list(seen.patches.positions())
    index = {place: i for i, place in enumerate(seen.positions("image"))}
    chosen: Tensor = rows[..., [index[p] for p in places], :][..., places]
    return chosen.double()


def order_of(prompt: Prompt) -> list[int]:
    """π: which patch comes to each place. The same for one prompt in any batch."""
    n = len(only_row(prompt, TOWER).patches or ())
    return random.Random(f"patches/{prompt.id}").sample(range(n), n)


def shuffled_patches(prompt: Prompt, order: list[int]) -> Prompt:
    """The prompt with patches of its image in another order: place i shows patch `order[i]`.

    Raises:
        InputError: its pixels are not one image [1, channel, height, width] that the patch grid
            divides.
    """
    seen = only_row(prompt, TOWER)
    assert seen.patches is not None
    grids_of = list(seen.patches.grids().values())
    pixels = prompt.inputs.get("pixel_values")
    shape = () if pixels is None else tuple(pixels.shape)
    rows, columns = grids_of[0]
    whole = len(grids_of) == 1 and rows * columns == len(seen.patches) == len(order)
    if pixels is None or len(shape) != 4 or shape[0] != 1 or not whole or (
        shape[2] % rows or shape[3] % columns
    ):  # fmt: skip
        raise InputError(
            "patches trade places on one image whose pixels the patch grid divides; prompt "
            f"{prompt.id or '?'} has pixel_values {list(shape)} and "
            f"{len(seen.patches)} patches in {len(grids_of)} grids of {rows} x {columns}",
            hint="heads.content_agnostic.map_correlation compares different images instead",
        )
    cut = pixels.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))
    flat = cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)[order].unflatten(0, (rows, columns))
    new = flat.permute(2, 3, 0, 4, 1, 5).reshape(shape)
    return replace(prompt, inputs={**prompt.inputs, "pixel_values": new})


def correlation(
    a: Float[Tensor, "layer head patch patch"], b: Float[Tensor, "layer head patch patch"]
) -> Float[Tensor, "layer head"]:
    """Pearson correlation over all entries; NaN where a map has no variation."""
    return (standard(a) * standard(b)).sum(-1).clamp(-1, 1)


def standard(maps: Float[Tensor, "layer head patch patch"]) -> Float[Tensor, "layer head entry"]:
    """Maps with mean 0 and norm 1; NaN where one has no variation."""
    x = maps.flatten(-2)
    size = x.abs().amax(-1, keepdim=True)
    x = x - x.mean(-1, keepdim=True)
    flat = (x.abs().amax(-1, keepdim=True) <= _ROUNDING * size) | (size <= _ROUNDING / x.shape[-1])
    scaled: Tensor = x / x.norm(dim=-1, keepdim=True)
    return scaled.masked_fill(flat, math.nan)


def map_correlation(
    model: "Model", prompts: Sequence[Prompt], *, tower: str = TOWER, batch_size: int = 4
) -> HeadScores:
    """The mean correlation of a head's maps over pairs of images, as published.

    The score of an image is the mean correlation of its map with those of all other images, so that
    the mean over images is the mean over pairs. The null is the same with the other images' maps
    carried along by a random order of the patches, as a head that goes by content would have them
    if the images were shuffles of one another. Images are read twice; what is kept is one map a
    head, the sum.

    Args:
        model: a model with a vision tower.
        prompts: at least two prompts of one image each, on equal grids.
        tower: its name.
        batch_size: prompts at a time.

    Raises:
        InputError: fewer than two prompts, or grids that differ.
    """
    if len(prompts) < 2 or batch_size < 1:
        raise InputError(
            "at least two images to compare, and one at a time, are needed; got "
            f"{len(prompts)} and {batch_size}"
        )
    listed = [p if p.id else replace(p, id=f"prompt-{i}") for i, p in enumerate(prompts)]
    sizes = {tuple(only_row(p, tower).patches.grids().values()) for p in listed}  # type: ignore[union-attr]
    if len(sizes) > 1:
        raise InputError(
            f"maps can be compared on equal grids; got {sorted(sizes)}",
            hint="resize the images to one size",
        )
    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    for _, x in _standard_maps(model, listed, tower, batch_size):
        total, count = total + x.nan_to_num(), count + (~x.isnan().all(-1)).double()
    values, null = [], []
    for prompt, x in _standard_maps(model, listed, tower, batch_size):
        rest = total - x
        n = round(math.sqrt(x.shape[-1]))
        order = order_of(prompt)
        moved = rest.unflatten(-1, (n, n))[..., order, :][..., order].flatten(-2)
        pairs = torch.as_tensor(count - 1)
        pairs = pairs.masked_fill(pairs < 1, math.nan)
        values.append((x * rest).sum(-1) / pairs)
        null.append((x * moved).sum(-1) / pairs)
    stack = model.tower(tower)

    def flat(parts: list[Tensor]) -> np.ndarray:
        whole = torch.stack(parts)
        rows = [whole[:, i, : layer.n_heads] for i, layer in enumerate(stack.layers)]
        return torch.cat(rows, dim=1).cpu().numpy()

    return HeadScores(
        detector="map-correlation",
        heads=stack.heads,
        per_example=flat(values),
        null_per_example=flat(null),
        examples=tuple(p.id for p in listed),
        threshold=ContentAgnostic.threshold,
        unit=ContentAgnostic.unit,
        range=ContentAgnostic.range,
        provenance={"model": model.name, "fingerprint": model.fingerprint, "tower": tower},
    )


def _standard_maps(
    model: "Model", prompts: Sequence[Prompt], tower: str, batch_size: int
) -> Iterator[tuple[Prompt, Float[Tensor, "layer head entry"]]]:
    """The standardised maps of each prompt."""
    for at in range(0, len(prompts), batch_size):
        part = list(prompts[at : at + batch_size])
        found = read(model, model.batch(part), {"maps": Rows("image")}, tower=tower)["maps"]
        for prompt, rows in zip(part, found.values, strict=True):
            yield prompt, standard(patch_map(rows, only_row(prompt, tower)))
