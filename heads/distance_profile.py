"""Local heads of vision towers: how far from its own patch a patch looks.

    s_k    mean over patches p of Σ_q A[p, q],  q on ring k of p (Chebyshev distance k on the grid)
    local  Σ_k s_k for k from `nearest` to `farthest`                       in [0, 1], the score
    far    Σ_k k·s_k / Σ_k s_k                                              mean distance, a column

The class token and registers are no patches: they are left out as queries and as keys. Rows are not
renormalised for that, so Σ_k s_k is the mass on patches (the column `patches`), and a head that
looks at the class token is not local. Rings are cut at the border of the grid, where patches have
fewer neighbours; `ring_profile(per="patch")` gives the mean mass per existing neighbour instead of
the sum. Of an example with several images or tiles, the mean over them counts.

The null of a head is its mass on patches, spread evenly over the grid.

Source: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", arXiv 2303.13731.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from interp.engine import read
from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.readings import BinMass, Reading, Rings

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower


@DETECTORS.register("distance-profile")
@dataclass(frozen=True)
class DistanceProfile(ReadingDetector):
    """Mass on near patches; see the module's docstring.

    Attributes:
        nearest: first ring that counts; 0 is the patch itself.
        farthest: last ring that counts.
    """

    nearest: int = 0
    farthest: int = 1

    name: ClassVar[str] = "distance-profile"
    summary: ClassVar[str] = "looks at the patches around its own (vision towers)"
    citation: ClassVar[str] = "Li et al. 2023, arXiv 2303.13731"
    unit: ClassVar[str] = "mass on near patches"
    threshold: ClassVar[float] = 0.5
    no_evidence: ClassVar[str] = "looks no nearer than evenly over the grid"
    task: ClassVar[str] = "tiles"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if not 0 <= self.nearest <= self.farthest:
            raise InputError(
                "distance-profile:nearest and farthest must be rings from 0 on, in order; got "
                f"{self.nearest} and {self.farthest}"
            )

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"rings": BinMass(Rings())}

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        rings = answers["rings"]
        absent = rings.isnan().all(-1)
        mass = rings.nan_to_num()
        steps = torch.arange(mass.shape[-1], device=mass.device, dtype=mass.dtype)
        counted = (steps >= self.nearest) & (steps <= self.farthest)
        patches = mass.sum(-1).clamp(max=1)
        even = mass.new_tensor(self._even_by_layer(batch, tower))
        columns = {
            "distance": (mass @ steps) / patches.masked_fill(patches < 1e-6, math.nan),
            "patches": patches,
        }
        score, null = (mass * counted).sum(-1).clamp(max=1), patches * even[..., None]
        for values in (score, null, *columns.values()):
            values.masked_fill_(absent, math.nan)
        return Outcome(score, null, columns)

    def _even_by_layer(self, batch: Batch, tower: "Tower") -> list[list[float]]:
        """[example, layer]: stages of a hierarchical tower have grids of their own."""
        whole = [self._even(rows) for rows in grids(batch, tower.name)]
        columns = []
        for layer in tower.layers:
            own = f"{tower.name}/{layer.index}"
            staged = any(own in p.views for p in batch.prompts)
            columns.append([self._even(x) for x in grids(batch, own)] if staged else whole)
        return [list(row) for row in zip(*columns, strict=True)]

    def _even(self, rows: list[Prompt]) -> float:
        """Share of the grid that counts, the mean over patches; then over an example's images."""
        found = [Rings().bins(row) for row in rows]
        shares = [
            ((bins >= self.nearest) & (bins <= self.farthest)).sum() / (bins >= 0).sum()
            for bins in found
        ]
        return float(np.mean(shares))


def grids(batch: Batch, tower: str) -> list[list[Prompt]]:
    """What a vision tower sees of each example: its rows, one per image or tile.

    Raises:
        InputError: the tower does not see patches alone, or an example has no image.
    """
    seen = batch.view(tower)
    if seen is None or set(seen[1]) != set(range(len(batch))):
        raise InputError(
            f"distances between patches need a tower that sees nothing but images; got {tower!r}, "
            f"to which prompt {batch.prompts[0].id or '?'} shows none",
            hint="choose tower vision, and prompts made by interp.images.image_prompt",
        )
    rows, owners = seen
    out: list[list[Prompt]] = [[] for _ in range(len(batch))]
    for row, owner in zip(rows.prompts, owners, strict=True):
        out[owner].append(row)
    return out


def ring_profile(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    tower: str = "vision",
    per: str = "ring",
    batch_size: int = 4,
) -> Float[np.ndarray, "layer head ring"]:
    """Mean mass at each distance, for every head.

    Args:
        model: a model with a vision tower.
        prompts: prompts with images.
        tower: its name.
        per: `ring` sums a ring, so that a profile sums to the head's mass on patches; `patch` takes
            the mean over the neighbours that exist, over the patches that have any.
        batch_size: prompts at a time.

    Returns:
        Means over prompts; NaN where there is no such head. Ring 0 is the patch itself.

    Raises:
        InputError: no prompts, an unknown `per`, or a tower that does not see patches.
    """
    if per not in ("ring", "patch"):
        raise InputError(f"per must be 'ring' or 'patch'; got {per!r}")
    if not prompts or batch_size < 1:
        raise InputError(
            "at least one prompt, and one at a time, are needed; got "
            f"{len(prompts)} and {batch_size}"
        )
    reading = BinMass(Rings(), per="query" if per == "ring" else "entry")
    parts = []
    for at in range(0, len(prompts), batch_size):
        batch = model.batch(list(prompts[at : at + batch_size]))
        grids(batch, tower)
        answer = read(model, batch, {"rings": reading}, tower=tower)["rings"]
        parts += list(answer.values.double().cpu().numpy())
    whole = np.full((len(parts), *parts[0].shape[:2], max(x.shape[-1] for x in parts)), np.nan)
    for row, x in zip(whole, parts, strict=True):
        row[..., : x.shape[-1]] = x
    count = (~np.isnan(whole)).sum(0)
    total: Float[np.ndarray, "layer head ring"] = np.nansum(whole, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
