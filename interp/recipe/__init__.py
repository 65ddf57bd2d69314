"""Interventions as values: where, what, how much; see `interp.recipe.recipe`."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from interp.recipe.edit import Edit as Edit
    from interp.recipe.ops import OPS as OPS
    from interp.recipe.recipe import Recipe as Recipe
    from interp.recipe.when import Gate as Gate
    from interp.recipe.when import Schedule as Schedule
    from interp.recipe.where import Positions as Positions
    from interp.recipe.where import Where as Where
    from interp.recipe.where import span as span

_HOMES = {
    "Edit": "interp.recipe.edit",
    "Gate": "interp.recipe.when",
    "OPS": "interp.recipe.ops",
    "Positions": "interp.recipe.where",
    "Recipe": "interp.recipe.recipe",
    "Schedule": "interp.recipe.when",
    "Where": "interp.recipe.where",
    "span": "interp.recipe.where",
}
__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, _HOMES)
