"""Visual-sink heads: heads whose mass on the image goes to a few patches that hold nothing.

    φ(x_j) = max over sink dimensions d of |x_j[d] / rms(x_j)|,  x the input of the layer
    V      = {j in the image : φ(x_j) > tau_rel · √d_model},     the visual sinks of the layer
    score  = Σ_V A[last, j] / Σ_image A[last, j]                 in [0, 1]

The query is the last token of the prompt. A head that hardly looks at the image (less than `least`
of its mass) has the score 0. The null is the sinks' share of the image, which is what a head that
looks evenly at the image gives them. Extra: `image_centric`, whether the head looks at the image
(at least `least`) and not at its sinks (at most `rho` of it): the heads VAR moves attention in.

Sink dimensions are found on each example alone, so that they do not depend on the company it is
scored in: those whose largest entry, as a multiple of the median entry, is largest in the median
layer (`heads.massive`; of the layers between the first two and the last, where there are some), and
at least `massive`. A model without any has no sinks: all scores are then 0. `dims` gives the
dimensions instead.

The published threshold, 20 with 4096 dimensions, is here relative: no φ exceeds √d_model, so that
below 400 dimensions 20 would find no sink at all. The published code knows the sink dimensions of
two models by name, takes one example at a time and keeps its state between them, skips a layer that
has no visual sink and divides by zero where every image token is one.

Source: Kang et al. 2025 (ICLR), arXiv 2503.03321, sections 3 and 4; code seilk/VisAttnSink.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, Outcome, WatchingDetector
from heads.massive import heaviest, heaviness, inputs_of, outstanding
from heads.sight import last_row, reads_prompt
from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

FOUND = "found"


@DETECTORS.register("visual-sink")
@dataclass(frozen=True)
class VisualSink(WatchingDetector):
    """Share of image mass on visual sinks; see the module's docstring.

    Attributes:
        tau_rel: φ above which a token is a sink, as a part of √d_model.
        rho: share of image mass on sinks from which a head is a visual-sink head.
        least: image mass below which a head does not look at the image.
        dims: sink dimensions, such as `1415,2533`; `found` looks for them.
        most: how many are looked for.
        massive: least size of a sink dimension, as a multiple of the median entry.
        span: what counts as the image.
    """

    tau_rel: float = 0.3125
    rho: float = 0.5
    least: float = 0.2
    dims: str = FOUND
    most: int = 2
    massive: float = 1000.0
    span: str = "image"

    name: ClassVar[str] = "visual-sink"
    summary: ClassVar[str] = "looks at patches that are attention sinks, not at what is shown"
    citation: ClassVar[str] = "Kang et al. 2025, arXiv 2503.03321, sections 3 and 4"
    unit: ClassVar[str] = "share of the image mass on visual sinks"
    threshold: ClassVar[float] = 0.5
    no_evidence: ClassVar[str] = "gives visual sinks no more than their share of the image"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("least", self.least)):
            if not 0 <= value <= 1:
                raise InputError(f"visual-sink:{name} lies in 0..1; got {value}")
        if not 0 < self.tau_rel < 1 or self.most < 1:
            raise InputError(
                "visual-sink:tau_rel lies between 0 and 1 and most is at least 1; "
                f"got {self.tau_rel} and {self.most}"
            )
        self._given()

    @property
    def limit(self) -> float:
        """See `Detector`."""
        return self.rho

    @property
    def passes(self) -> int:
        """To find the sink dimensions, unless they are given, and to read."""
        return 2 if self._given() is None else 1

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `WatchingDetector`."""
        stack = model.tower(tower) if tower else next(iter(model.towers.values()))
        reads_prompt(stack, prompts, self.name)
        batch = model.batch(prompts)
        dims = self._dims(model, stack, batch)
        images = batch.positions(self.span)
        sinks: dict[int, list[Tensor]] = {}

        def look(layer: Layer, x: Tensor) -> None:
            tau = self.tau_rel * math.sqrt(x.shape[-1])
            if max((d for mine in dims for d in mine), default=0) >= x.shape[-1]:
                raise InputError(
                    f"visual-sink:dims lie in 0..{x.shape[-1] - 1}, the width of the residual "
                    f"stream; got {self.dims}"
                )
            sinks[layer.index] = [
                heaviness(x[b, places], dims[b]) > tau for b, places in enumerate(images)
            ]

        with inputs_of(model, stack, stack.layers, look):
            row = last_row(model, stack, batch)
        share = row.new_full(row.shape[:3], math.nan)
        null, centric = share.clone(), share.clone()
        for b, places in enumerate(images):
            seen = row[b][..., places]
            heavy = torch.stack([sinks[layer.index][b] for layer in stack.layers]).to(seen)
            mass, on_sinks = seen.sum(-1), (seen * heavy[:, None]).sum(-1)
            looks = mass >= self.least
            share[b] = (on_sinks / mass).clamp(max=1).where(looks, mass.new_zeros(()))
            centric[b] = (looks & (on_sinks <= self.rho * mass)).to(mass)
            null[b] = heavy.mean(-1, keepdim=True)
            for out in (share, null, centric):
                out[b].masked_fill_(seen.isnan().any(-1), math.nan)
        return Outcome(share, null, {"image_centric": centric})

    def _given(self) -> tuple[int, ...] | None:
        if self.dims == FOUND:
            return None
        try:
            given = tuple(int(d) for d in self.dims.split(","))
        except ValueError:
            given = (-1,)
        if min(given) < 0:
            raise InputError(
                f"visual-sink:dims must be {FOUND} or dimensions such as 1415,2533; "
                f"got {self.dims!r}"
            )
        return given

    def _dims(self, model: "Model", tower: Tower, batch: Batch) -> list[tuple[int, ...]]:
        """The sink dimensions of each example."""
        given = self._given()
        if given is not None:
            return [given] * len(batch)
        middle = tower.layers[2:-1] or tower.layers
        sizes: list[list[Tensor]] = [[] for _ in batch.prompts]
        real = batch.attention_mask.bool()

        def note(layer: Layer, x: Tensor) -> None:
            for mine, one, there in zip(sizes, x, real.to(x.device), strict=True):
                mine.append(outstanding(one[there]))

        with inputs_of(model, tower, middle, note):
            model.forward(batch.inputs())
        return [heaviest(mine, self.most, least=self.massive) for mine in sizes]
