"""Contrast of a neutral question with a leading one.

    ℓ = (1 + α)·ℓ(y | neutral, image) − α·ℓ(y | leading, image)

The prompt holds the leading words as a span; the main run does not see them (`knockout` of the span
for every later token), the second run does. So one prompt serves both, and the words keep their
places: a rewritten neutral question would be shorter, and could not share positions with its twin.

The method is known to us from summaries; what is neutral about a prompt without its leading words
is the user's to judge.
"""

from typing import TYPE_CHECKING

from heads.makers import Inputs, maker
from heads.makers.shared import about, token_tower
from interp.recipe import Edit, Positions, Recipe, Where
from interp.recipe.where import span as named_span

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "leading-query contrastive decoding; Leng et al. 2024, arXiv 2311.16922, for the rule"


@maker("lqcd", summary="push logits away from what a leading question suggests", citation=CITATION)
def make_lqcd(
    model: "Model",
    inputs: Inputs | None = None,
    *,
    span: str = "leading",
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Recipe:
    """The contrast of hidden with visible leading words; for any prompts that have the span.

    Args:
        model: the model in hand.
        inputs: not looked at.
        span: the leading words.
        alpha: strength of the contrast.
        beta: plausibility: tokens below β of the likeliest are ruled out.

    Returns:
        A recipe whose positions are spans: give them by `recipe.on(model, spans=batch)`.
    """
    others = Positions(prompt="all", generated="all", exclude=named_span(span))
    tower = token_tower(model)
    where = Where(tower=tower.name, queries=others, keys=named_span(span))
    plain = Recipe((Edit("scale", Where(heads=tower.heads[:1]), 1.0),))  # changes nothing
    edits = (
        Edit("knockout", where),
        Edit("contrast", Where(), alpha, params={"beta": beta}, twin=plain),
    )
    params = {"span": span, "alpha": alpha, "beta": beta}
    return Recipe(edits, model.fingerprint, about("lqcd", CITATION, model, None, params))
