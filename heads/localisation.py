"""Localisation heads: heads that look at the image, and at one place of it.

    mass     Σ over the image's patches of A[last, j]
    elbow    the mass of the sorted heads (of all layers, on one example) farthest below the line
             from the least to the largest; a head must reach it
    map      S_j = A[last, j] on the grid; W = ReLU(S − mean S); components are the patches with
             W > 0 that touch one another, corners included
    H        −Σ_n P_n log P_n,  P_n = Σ_{component n} W / Σ W         spatial entropy
    score    1 − H / log(most components the grid can hold),          in [0, 1]

The score is 1 if all that stands out lies in one place and 0 if it is scattered as far as can be;
below the elbow, for less than `least` of image mass, and for a map in which nothing stands out, it
is 0. Where all heads have the same mass there is no elbow, and all reach it. Patches of different
images, tiles or frames do not touch.

The null is the mean score of equal patches at random places, as many as stand out in the head's own
map but no fewer than noise has above its mean (1/e of the patches). Maps of noise with many patches
above the mean hang together and have a low entropy too: they score no higher than their null.

Extras: `mass`, and `reached`, whether the head reached the elbow.

The published code sorts the masses, takes the *index* of the elbow and keeps heads whose index is
at least that; here masses are compared. It also assumes a square grid, and that a patch stands out
by more than 0.001, which few do on a large grid; here rounding (a thousandth of the mean) is what
must be exceeded. The weights P_n are those of the spatial entropy it follows.

Source: Kang et al. 2025 (CVPR), arXiv 2503.06287, section 3; spatial entropy: Peruzzo et al. 2022,
arXiv 2206.04636.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from heads.detector import DETECTORS, Outcome, ReadingDetector
from heads.sight import LAST, seen_by, with_last
from interp.errors import InputError
from interp.images.patches import PatchMap
from interp.prompts import Batch, Prompt
from interp.readings import Reading, Rows

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

Cells = tuple[tuple[int, int, int], ...]
"""Grid, row and column of each patch."""

_ROUNDING, _DRAWS = 1e-3, 64


@DETECTORS.register("localisation")
@dataclass(frozen=True)
class Localisation(ReadingDetector):
    """Image mass in one place; see the module's docstring.

    Attributes:
        least: image mass below which a head does not look at the image.
    """

    least: float = 0.05

    name: ClassVar[str] = "localisation"
    summary: ClassVar[str] = "looks at one place of the image, and hard"
    citation: ClassVar[str] = "Kang et al. 2025, arXiv 2503.06287, section 3"
    unit: ClassVar[str] = "1 - spatial entropy, as a share of the largest"
    threshold: ClassVar[float] = 0.8
    no_evidence: ClassVar[str] = "looks too little at the image, or at scattered parts of it"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise InputError(f"localisation:least lies in 0..1; got {self.least}")

    def prepare(self, prompt: Prompt) -> Prompt:
        """See `ReadingDetector`.

        Raises:
            InputError: nobody says which pixels the prompt's tokens stand for.
        """
        if prompt.patches is None or not len(prompt.patches):
            raise InputError(
                "detector 'localisation' needs the patch map of the image; prompt "
                f"{prompt.id or '?'} has none",
                hint="make prompts by interp.images, which knows the grids of many models",
            )
        return with_last(prompt)

    def readings(self) -> Mapping[str, Reading]:
        """See `ReadingDetector`."""
        return {"row": Rows(LAST)}

    def formula(
        self,
        model: "Model",
        tower: "Tower",
        batch: Batch,
        answers: Mapping[str, Tensor],
        control: Mapping[str, Tensor] | None,
    ) -> Outcome:
        """See `ReadingDetector`."""
        row = answers["row"][..., 0, :]
        score = row.new_full(row.shape[:3], math.nan)
        null, mass, reached = score.clone(), score.clone(), score.clone()
        batch = seen_by(batch, tower)
        for b, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
            assert prompt.patches is not None
            cells = cells_of(prompt.patches)
            places = [offset + p.position for p in prompt.patches]
            seen = row[b][..., places].cpu().double().numpy()
            total = seen.sum(-1)
            enough = total >= max(elbow(total[~np.isnan(total)]), self.least)
            for at in np.argwhere(~np.isnan(total)):
                layer, head = (int(i) for i in at)
                found = spatial_score(seen[layer, head], cells) if enough[layer, head] else (0.0, 0)
                score[b, layer, head] = found[0]
                null[b, layer, head] = scattered(cells, max(found[1], _noise(len(cells))))
                mass[b, layer, head] = min(total[layer, head], 1.0)
                reached[b, layer, head] = float(enough[layer, head])
        return Outcome(score, null, {"mass": mass, "reached": reached})


def cells_of(patches: PatchMap) -> Cells:
    """Where each patch lies, grids numbered."""
    numbers = {grid: i for i, grid in enumerate(patches.grids())}
    return tuple((numbers[p.image, p.tile, p.frame], p.row, p.column) for p in patches)


def elbow(values: Float[np.ndarray, " head"]) -> float:
    """The value, of sorted ones, farthest below the line from the least to the largest.

    −inf if they are all alike, or there is none.

    >>> elbow(np.array([0.9, 0.0, 0.1, 0.2]))
    0.2
    """
    if len(values) == 0 or np.ptp(values) < 1e-6:
        return -math.inf
    y = np.sort(values)
    below = y[0] + np.ptp(y) * np.arange(len(y)) / (len(y) - 1) - y
    return float(y[below.argmax()])


def spatial_score(seen: Float[np.ndarray, " patch"], cells: Cells) -> tuple[float, int]:
    """1 − spatial entropy over the largest possible, and how many patches stand out.

    Args:
        seen: the mass of each patch.
        cells: grid, row and column of each patch.
    """
    mean = seen.mean()
    above = np.where(seen > mean * (1 + _ROUNDING), seen - mean, 0.0)
    if not above.any():
        return 0.0, 0
    parts = _components(above, cells)
    entropy = -float((parts * np.log(parts)).sum())
    most = _most(cells)
    value = 1 - entropy / math.log(most) if most > 1 else 1.0
    return min(max(value, 0.0), 1.0), int((above > 0).sum())


@functools.lru_cache(maxsize=4096)
def scattered(cells: Cells, n: int) -> float:
    """Mean score of n equal patches at random places of the grids; the same for the same grids."""
    n = min(n, len(cells))
    rng = np.random.default_rng([len(cells), n])
    total = 0.0
    for _ in range(_DRAWS):
        seen = np.zeros(len(cells))
        seen[rng.choice(len(cells), n, replace=False)] = 1.0
        # Patches everywhere are a flat map, in which nothing stands out.
        total += spatial_score(seen, cells)[0]
    return total / _DRAWS


def _noise(patches: int) -> int:
    return max(1, round(patches / math.e))


def _components(weights: np.ndarray, cells: Cells) -> np.ndarray:
    """Shares of the total weight that lie in each connected component."""
    from scipy.ndimage import label

    grid, row, column = np.array(cells).T
    field = np.zeros((grid.max() + 1, row.max() + 1, column.max() + 1))
    field[grid, row, column] = weights
    touching = np.zeros((3, 3, 3))
    touching[1] = 1  # within a grid only
    names, count = label(field > 0, touching)
    sums = np.bincount(names.ravel(), field.ravel(), minlength=count + 1)[1:]
    shares: np.ndarray = sums / sums.sum()
    return shares


def _most(cells: Sequence[tuple[int, int, int]]) -> int:
    """Most components that the grids can hold: every other row and column."""
    sizes: dict[int, tuple[int, int]] = {}
    for grid, row, column in cells:
        rows, columns = sizes.get(grid, (0, 0))
        sizes[grid] = max(rows, row + 1), max(columns, column + 1)
    return sum(((r + 1) // 2) * ((c + 1) // 2) for r, c in sizes.values())
