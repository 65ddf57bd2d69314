"""The second run of `contrast`: the same input under another recipe, with a cache of its own."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp.errors import InputError, SiteError
from interp.recipe.place import cached
from interp.recipe.table import Table, compile_table

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


class Twin:
    """A recipe run beside the one that is on.

    Args:
        model: the model.
        recipe: the second run's recipe.
        owner: which of the recipes that are on contrasts with it; their spans are the same.

    Attributes:
        table: the second run's edits.
    """

    def __init__(self, model: "Model", recipe: "Recipe", owner: int) -> None:
        self.model = model
        self.table: Table = compile_table(model, [*([()] * owner), recipe.edits])
        self._main: Any = None
        self._own: Any = None

    def before(self, cache: Any) -> None:
        """Hear of the first run's cache, before it is filled further.

        Raises:
            InputError: tokens were taken out of the first run's cache.
        """
        if cache is None:
            self._main = self._own = None
        elif cache is not self._main or not cached(cache):
            # What a cache holds already was run before the recipe, the same for both.
            self._main, self._own = cache, copy.deepcopy(cache)
            vars(self._own).pop("reorder_cache", None)
        elif cached(cache) != cached(self._own):
            raise InputError(
                f"both runs of contrast must have cached the same tokens; got {cached(cache)} and "
                f"{cached(self._own)}",
                hint="assisted generation, which takes tokens back, does not go with contrast",
            )

    def run(self, given: Mapping[str, Any], first: Any) -> Tensor:
        """Logits of the second run.

        Args:
            given: arguments of the first run, by name.
            first: the first run's output.
        """
        given = dict(given)
        if self._own is not None:
            given["past_key_values"] = self._own
        output = self.model.hf(**given)
        if self._own is None:
            # The model made its caches itself; the caller will hand in the first run's.
            self._main = getattr(first, "past_key_values", None)
            self._own = getattr(output, "past_key_values", None)
        return logits_of(output, self.model.name)

    def reorder(self, order: Tensor) -> None:
        """Beams were chosen: row i goes on with what row order[i] was."""
        if self._own is not None:
            self._own.reorder_cache(order)


def logits_of(output: Any, name: str) -> Tensor:
    """The logits [batch, pos, d_vocab] of a model's output.

    Raises:
        SiteError: it has none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise SiteError(
            f"{name} gives no logits [batch, pos, d_vocab] to edit",
            hint="load the model with its language-model head",
        )
    return logits
