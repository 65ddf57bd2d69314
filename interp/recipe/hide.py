"""Tokens hidden from all others, as if they were padding, but in their places."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from interp.prompts import Prompt
from interp.recipe.edit import Edit
from interp.recipe.recipe import Recipe
from interp.recipe.where import Positions, Where

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

HIDDEN = "hidden tokens"


@contextmanager
def unseen(
    model: "Model", tower: "Tower", prompts: Sequence[Prompt], places: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Hide some places of each prompt from all other rows of a tower while the context is open.

    Their scores are cut out of every row, in all layers. A mask of the model's inputs would do the
    same where the model only hides by it; some count positions and images by it too.
    """
    spans = [tuple((i, i + 1) for i in sorted(mine)) for mine in places]
    marked = [
        replace(p, spans={**p.spans, HIDDEN: mine}) for p, mine in zip(prompts, spans, strict=True)
    ]
    hidden = Positions(spans=(HIDDEN,))
    # The hidden rows themselves are read by nobody, and the first could not lose its only key.
    others = Positions(prompt="all", generated="all", exclude=hidden)
    cut = Edit("knockout", Where(tower=tower.name, queries=others, keys=hidden))
    with Recipe((cut,)).on(model, spans=marked):
        yield
