"""Massive activations: the few dimensions of the residual stream that mark sink tokens.

    size of dimension d    max over tokens of |x[d]| / median over tokens and dimensions of |x|
    φ(x_j)                 max over the sink dimensions d of |x_j[d] / rms(x_j)|

x is the input of a layer; φ cannot exceed √d_model.

Source: Sun et al. 2024, arXiv 2402.17762; Kang et al. 2025, arXiv 2503.03321.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.seam.blocks import block_names, on_input
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

_SHARE, _EPS = 0.1, 1e-6


@contextmanager
def inputs_of(
    model: "Model", tower: Tower, layers: Sequence[Layer], note: Callable[[Layer, Tensor], None]
) -> Iterator[None]:
    """Show the residual stream at the input of some layers, in at least float32.

    Raises:
        SiteError: the tower's layers are not one list of modules.
    """
    blocks = block_names(model, tower)

    def hook(layer: Layer) -> Callable[[Tensor], None]:
        return lambda x: note(layer, x if x.dtype == torch.float64 else x.float())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(on_input(model.hf.get_submodule(blocks[layer.index]), hook(layer)))
        yield


def outstanding(x: Float[Tensor, "token d_model"]) -> Float[Tensor, " d_model"]:
    """Size of each dimension: its largest entry as a multiple of the median entry."""
    sizes = x.abs()
    typical = sizes.median().clamp_min(torch.finfo(sizes.dtype).tiny)
    return sizes.amax(0).double() / typical.double()


def heaviest(
    sizes: Sequence[Float[Tensor, " d_model"]], most: int, *, least: float = 0.0
) -> tuple[int, ...]:
    """The dimensions of the largest size in the median layer, largest first.

    Args:
        sizes: what `outstanding` says of each layer.
        most: how many at most; none below a tenth of the largest is taken.
        least: size below which none is taken; Sun et al. call entries of 1,000 medians massive.
    """
    size = torch.stack(list(sizes)).median(0).values
    best = size.argsort(descending=True, stable=True)[:most]
    enough = max(least, float(_SHARE * size[best[0]]))
    return tuple(int(d) for d in best if size[d] >= enough)


def heaviness(x: Float[Tensor, "*batch d_model"], dims: Sequence[int]) -> Float[Tensor, "*batch"]:
    """φ of each token; 0 without sink dimensions."""
    if not dims:
        return x.new_zeros(x.shape[:-1])
    rms = (x.square().mean(-1, keepdim=True) + _EPS).sqrt()
    return (x / rms)[..., list(dims)].abs().amax(-1)
