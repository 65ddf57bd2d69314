"""Boosted visual tokens: scores on the image rise for tokens that come after it.

    s ← s + log w on the image: its mass is multiplied by w before the row is normalised

The published form adds α·|s| instead. That depends on the scale of the scores, and on a constant
added to a whole row, which no softmax sees; it is not offered.

Liu et al. 2024 (ECCV), arXiv 2407.21771 (PAI); variants: arXiv 2501.12206.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heads.makers import Inputs, maker
from heads.makers.shared import about, heads_of, token_tower
from interp.errors import InputError
from interp.headid import HeadId
from interp.recipe import Edit, Positions, Recipe, Where
from interp.recipe.where import span as named_span

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Liu et al. 2024, arXiv 2407.21771"


@maker("boost", summary="multiply the attention that answers pay to the image", citation=CITATION)
def make_boost(
    model: "Model",
    inputs: Inputs | None = None,
    *,
    span: str = "image",
    factor: float = 2.0,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
) -> Recipe:
    """More attention to the image at the last token of the prompt and all that follow.

    Args:
        model: the model in hand.
        inputs: not looked at.
        span: what is looked at more.
        factor: w above; 1 changes nothing.
        heads: heads concerned; all of `layers` if None.
        layers: whose heads; from the third layer on if None.

    Raises:
        InputError: the factor is not positive, or no layer is chosen.
        HeadIdError: a head or layer outside the model.
    """
    if not factor > 0:
        raise InputError(f"factor must be positive; got {factor}")
    tower = token_tower(model)
    named = heads_of(model, tower, heads, layers, range(2, tower.n_layers))
    where = Where(
        heads=named, queries=Positions(prompt=(-1,), generated="all"), keys=named_span(span)
    )
    params = {"span": span, "factor": factor, "heads": [str(h) for h in named]}
    edit = Edit("bias", where, math.log(factor))
    return Recipe((edit,), model.fingerprint, about("boost", CITATION, model, None, params))
