"""VAR: attention that rows about the image spend on sink tokens goes to the image instead.

    φ(x_j) = max over sink dimensions d of |x_j[d] / rms(x_j)|,  x the input of a layer
    S      = {j : φ(x_j) > τ}, the sinks of the layer;  I the image,  V = S ∩ I
    a row is image-centric if Σ_V a ≤ ρ·Σ_I a and Σ_I a ≥ least
    image-centric rows: a[S] becomes p·a[S], and the mass freed goes to I − S in proportion

The image is a span of tokens, of text too. Rows concerned are those of the tokens after the image
and of all produced tokens; the last layer and the first two are left alone. Sinks are found on the
prompt, layer after layer in one pass, and kept while the model answers. A layer without sinks in
the image still gives the mass of its other sinks to the image: Σ_V a is 0 there.

Sink dimensions differ by model. They are found by the size of activations (Sun et al. 2024, arXiv
2402.17762): the dimensions whose largest entry over tokens, as a multiple of the median entry, is
largest in the median layer; at most `most`, and none below a tenth of the largest.

τ = 20 is for wide models: no entry of x/rms(x) exceeds √d_model. Below 4096 dimensions it shrinks
with √d_model unless it is given.

Kang et al. 2025 (ICLR), arXiv 2503.03321. Differences from the published code: dimensions are
found, not written down by model; any number of examples; the last layer is really left alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import (
    about,
    after,
    as_batch,
    at,
    grouped,
    heads_of,
    in_order,
    layers_of,
    middle,
    token_tower,
    where_on,
)
from heads.massive import heaviest, heaviness, inputs_of, outstanding
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Batch
from interp.recipe import Edit, Positions, Recipe, Where
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Kang et al. 2025, arXiv 2503.03321"
_TAU, _WIDTH = 20.0, 4096


@dataclass(frozen=True)
class _Plan:
    """What is moved on one example: the sinks, and the places of the image."""

    sinks: tuple[int, ...]
    image: tuple[int, ...]


@maker("var", summary="move attention from sinks to the image, in rows about it", citation=CITATION)
def make_var(
    model: "Model",
    inputs: Inputs,
    *,
    span: str = "image",
    p: float = 0.6,
    rho: float = 0.5,
    least: float = 0.2,
    tau: float | None = None,
    dims: Sequence[int] | int | None = None,
    most: int = 2,
    sinks: Sequence[Sequence[int]] | None = None,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
) -> Recipe:
    """The redistribution on some prompts.

    Args:
        model: the model in hand.
        inputs: the prompts that will be run, with the span.
        span: the image; any span of tokens.
        p: share that sinks keep.
        rho: largest part of the image's mass that its sinks may hold in a row about the image.
        least: least mass on the image in such a row.
        tau: size from which an entry makes a sink; 20, or 20·√(d_model/4096) if less, if None.
        dims: sink dimensions, if known.
        most: how many are looked for otherwise.
        sinks: for each prompt the places of its sinks, in all layers, instead of looking for them.
        heads: heads concerned; all of `layers` if None.
        layers: whose heads; the third to the one before the last if None.

    Returns:
        A recipe; its notes hold the sinks of each layer on each prompt (`sinks`), those inside the
        image (`visual`), and the sink dimensions (`dims`).

    Raises:
        SpanError: a prompt lacks the span.
        InputError: there is no sink, or a parameter is impossible.
        HeadIdError: a head or layer outside the model.
    """
    batch, tower = as_batch(model, inputs), token_tower(model)
    if not 0 <= p <= 1 or not 0 <= rho <= 1 or not 0 <= least <= 1:
        raise InputError(f"p, rho and least lie in [0, 1]; got {p}, {rho} and {least}")
    chosen = heads_of(model, tower, heads, layers, middle(tower))
    wanted = layers_of(tower, [h.layer for h in chosen], ())
    images = [tuple(prompt.positions(span)) for prompt in batch.prompts]
    finder = _Finder(model, batch, tower, wanted, tau, dims, most, sinks)

    def choose(layer: Layer, call: AttnCall) -> dict[HeadId, list[_Plan | None]]:
        plans = [
            _Plan(found, image) if found and set(image) - set(found) else None
            for found, image in zip(finder.of(layer), images, strict=True)
        ]
        return {h: plans for h in chosen if h.layer == layer.index}

    def build(plan: _Plan, named: tuple[HeadId, ...], on: Tensor) -> Edit:
        image: Positions = at(plan.image)
        return Edit(
            "move",
            Where(heads=named, queries=after(max(plan.image) + 1), keys=at(plan.sinks)),
            where_on(on, p, 1.0),
            params={"to": image, "span": image, "share": rho, "least": least},
        )

    with finder.watching():
        found = in_order(model, batch, wanted, choose, build)
    edits = [build(*g) for g in grouped(found)]
    if not edits:
        raise InputError(
            "no token is a sink in these layers, or the image is all sinks",
            hint="give sinks=[(0,), …], dims=… or a smaller tau=…",
        )
    held = {str(layer.index): finder.of(layer) for layer in wanted}
    visual = {
        name: [[j for j in s if j in image] for s, image in zip(ss, images, strict=True)]
        for name, ss in held.items()
    }
    params = {"span": span, "p": p, "rho": rho, "least": least, "tau": finder.tau}
    notes = about("var", CITATION, model, batch, params)
    sinks_of = {name: [list(s) for s in ss] for name, ss in held.items()}
    extra = {"dims": finder.dims, "sinks": sinks_of, "visual": visual}
    return Recipe(tuple(edits), model.fingerprint, {**notes, **extra})


def sink_dims(
    model: "Model",
    inputs: Inputs,
    *,
    most: int = 2,
    layers: Sequence[int] | int | None = None,
) -> tuple[int, ...]:
    """The dimensions of the residual stream that mark sinks, largest first.

    Args:
        model: the model in hand.
        inputs: a few texts.
        most: how many at most.
        layers: layers at whose input they are looked for; the third to the one before the last if
            None.

    Raises:
        InputError: `most` is not positive.
    """
    batch, tower = as_batch(model, inputs), token_tower(model)
    return _sink_dims(model, batch, tower, layers_of(tower, layers, middle(tower)), most)


def _sink_dims(
    model: "Model", batch: Batch, tower: Tower, layers: Sequence[Layer], most: int
) -> tuple[int, ...]:
    if most < 1:
        raise InputError(f"most must be at least 1; got {most}")
    ratios: list[Tensor] = []
    real = batch.attention_mask.bool()

    def note(layer: Layer, x: Tensor) -> None:
        ratios.append(outstanding(x[real.to(x.device)]))

    with inputs_of(model, tower, layers, note):
        model.forward(batch.inputs())
    return heaviest(ratios, most)


class _Finder:
    """The sinks of each layer on each example, while a batch runs."""

    def __init__(
        self, model: "Model", batch: Batch, tower: Tower, layers: Sequence[Layer],
        tau: float | None, dims: Sequence[int] | int | None, most: int,
        sinks: Sequence[Sequence[int]] | None,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.tower, self.layers = model, batch, tower, layers
        self.tau, self._found = tau, dict[int, list[tuple[int, ...]]]()
        self.dims: list[int] = []
        self._given = None if sinks is None else _given(sinks, batch)
        if self._given is not None:
            return
        if dims is None:
            self.dims = list(_sink_dims(model, batch, tower, layers, most))
        else:
            self.dims = [dims] if isinstance(dims, int) else list(dims)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look for sinks while the context is open."""
        if self._given is not None:
            yield
            return
        with inputs_of(self.model, self.tower, self.layers, self._look):
            yield

    def of(self, layer: Layer) -> list[tuple[int, ...]]:
        """The sinks of a layer for each example, as places of its prompt."""
        return self._given if self._given is not None else self._found[layer.index]

    def _look(self, layer: Layer, x: Float[Tensor, "example pos d_model"]) -> None:
        width = x.shape[-1]
        tau = min(_TAU, _TAU * (width / _WIDTH) ** 0.5) if self.tau is None else self.tau
        if not 0 < tau < width**0.5 or not all(0 <= d < width for d in self.dims):
            raise InputError(
                f"tau lies in (0, √{width}) and dimensions in 0..{width - 1}, the width of the "
                f"residual stream; got tau {tau:g} and dimensions {self.dims}"
            )
        self.tau = tau
        heavy = (heaviness(x, self.dims) > tau) & self._real.to(x.device)
        self._found[layer.index] = [
            tuple(int(j) - offset for j in row.nonzero()[:, 0])
            for row, offset in zip(heavy, self.batch.offsets, strict=True)
        ]

    @property
    def _real(self) -> Tensor:
        return self.batch.attention_mask.bool()


def _given(sinks: Sequence[Sequence[int]], batch: Batch) -> list[tuple[int, ...]]:
    """Sinks named by the user, checked.

    Raises:
        InputError: not as many as prompts, or a place outside its prompt.
    """
    if len(sinks) != len(batch):
        raise InputError(f"sinks are given per prompt; got {len(sinks)} for {len(batch)} prompts")
    for places, prompt in zip(sinks, batch.prompts, strict=True):
        wrong = next((j for j in places if not 0 <= j < len(prompt)), None)
        if wrong is not None:
            raise InputError(
                f"a sink lies in 0..{len(prompt) - 1} of prompt {prompt.id or '?'}; got {wrong}"
            )
    return [tuple(sorted(set(places))) for places in sinks]
