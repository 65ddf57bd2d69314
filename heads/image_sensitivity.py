"""Image-sensitive heads: heads whose output hangs on the part of the image that is looked at.

    score = ‖z − z′‖ / (‖z‖ + ‖z′‖) at the last token,   in [0, 1]

z′ is the output when the quarter of the image's tokens that the last token attends to most, over
all heads together, is hidden from every row of every layer; all tokens keep their places. The null
is the mean of the same over `draws` random choices of equally many of the image's other tokens: how
much a head changes when anything of the image goes.

One quarter is hidden for all heads at once, so that a few forward passes serve every head. The
first token of a prompt is never hidden, since its own row would see nothing. In layers after the
first, a head that reads a changed stream changes too; whether it matters is for ablation to say.

The paper's abstract speaks of a head-wise analysis of sensitivity to the image; its code has none:
every head of the layers it works on is treated alike, and what it calls local tokens is the quarter
that the class token of the image encoder attends to most. The score here is our reading of the
abstract, with the language model's own attention in place of the encoder's.

Source: Arif et al. 2025, arXiv 2501.12206 (PAINT); code hasanar1f/PAINT.
"""

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from heads.detector import DETECTORS, Outcome, WatchingDetector
from heads.sight import last_row, last_z, reads_prompt
from heads.vision_head_divergence import divergence
from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe.hide import unseen

if TYPE_CHECKING:
    from interp.model import Model


@DETECTORS.register("image-sensitivity")
@dataclass(frozen=True)
class ImageSensitivity(WatchingDetector):
    """Change of z when what is looked at is masked; see the module's docstring.

    Attributes:
        share: part of the image's tokens that is masked.
        draws: random choices that make the null.
        span: what counts as the image.
    """

    share: float = 0.25
    draws: int = 4
    span: str = "image"

    name: ClassVar[str] = "image-sensitivity"
    summary: ClassVar[str] = "changes when the most attended part of the image is masked"
    citation: ClassVar[str] = "Arif et al. 2025, arXiv 2501.12206, abstract"
    unit: ClassVar[str] = "relative change of z"
    threshold: ClassVar[float] = 0.3
    no_evidence: ClassVar[str] = "changes no more than when other parts of the image are masked"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.draws < 1:
            raise InputError(
                "image-sensitivity:share lies between 0 and 1 and draws is at least 1; "
                f"got {self.share} and {self.draws}"
            )

    @property
    def passes(self) -> int:
        """Outputs, rows, the most attended quarter hidden, and each random one."""
        return 3 + self.draws

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `WatchingDetector`."""
        stack = model.tower(tower) if tower else next(iter(model.towers.values()))
        reads_prompt(stack, prompts, self.name)
        batch = model.batch(prompts)
        seen, row = last_z(model, stack, batch), last_row(model, stack, batch)
        mass = row.flatten(1, 2).nanmean(1).cpu()
        most: list[list[int]] = []
        others: list[list[list[int]]] = []
        failures = {}
        for b, prompt in enumerate(prompts):
            image = [i for i in prompt.positions(self.span) if i > 0]
            if len(image) < 2:
                failures[b] = "an image needs two tokens after the first for one to be masked"
            n = max(1, round(self.share * len(image)))
            seen_at = mass[b, [i + batch.offsets[b] for i in image]]
            order = seen_at.argsort(descending=True, stable=True).tolist()
            chosen, rest = [image[i] for i in order[:n]], sorted(image[i] for i in order[n:])
            rngs = [random.Random(f"masked/{i}/{prompt.id}") for i in range(self.draws)]
            most.append(chosen)
            others.append([rng.sample(rest, min(n, len(rest))) for rng in rngs])

        def change(places: list[list[int]]) -> torch.Tensor:
            with unseen(model, stack, prompts, places):
                return divergence(seen, last_z(model, stack, batch), "relative")

        values = change(most)
        drawn = [change([mine[i] for mine in others]) for i in range(self.draws)]
        null = torch.stack(drawn).mean(0)
        for b in failures:
            values[b], null[b] = math.nan, math.nan
        return Outcome(values, null, {}, failures)
