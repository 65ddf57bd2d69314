"""Matched controls: the same edits on random heads of the same layers.

A recipe's own heads, and any to exclude, are never drawn. Published controls that drew from all
heads compared a set with itself in part.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.headid import HeadId

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


def draw_matched(
    model: "Model",
    heads: Sequence[HeadId],
    *,
    rng: random.Random,
    exclude: Sequence[HeadId] = (),
    grouped: bool = False,
) -> dict[HeadId, HeadId]:
    """Other heads, as many in each layer, drawn without replacement.

    Raises:
        InputError: a layer has too few heads left.
    """
    taken = {*heads, *exclude}
    out: dict[HeadId, HeadId] = {}
    for layer_key in sorted({(h.tower, h.layer) for h in heads}):
        mine = [h for h in heads if (h.tower, h.layer) == layer_key]
        layer = model.layer_of(mine[0])
        count = layer.n_kv_heads if grouped else layer.n_heads
        free = [
            h for h in (HeadId(layer.index, i, layer.tower) for i in range(count)) if h not in taken
        ]
        if len(free) < len(mine):
            raise InputError(
                f"a control needs {len(mine)} other heads of layer {layer.index}; of its {count} "
                f"heads {len(free)} are left",
                hint="control a smaller set of heads, or exclude fewer",
            )
        out.update(zip(mine, rng.sample(free, len(mine)), strict=True))
    return out


def controls(
    recipe: "Recipe", model: "Model", n: int, *, seed: int, exclude: Sequence[HeadId]
) -> tuple["Recipe", ...]:
    """`n` recipes on random heads matched by layer.

    Raises:
        InputError: an edit names no heads, a layer has too few others, or n is below 1.
    """
    from dataclasses import replace

    if n < 1:
        raise InputError(f"the number of controls must be at least 1; got {n}", hint="n=10")
    for edit in recipe.edits:
        if edit.where.heads is None:
            raise InputError(f"a control moves heads; this edit names none: {edit}")
    out = []
    for i in range(n):
        rng = random.Random(f"{seed}/{i}")
        query = [h for e in recipe.edits if e.site not in ("k", "v") for h in e.where.heads or ()]
        groups = [h for e in recipe.edits if e.site in ("k", "v") for h in e.where.heads or ()]
        moved = draw_matched(model, list(dict.fromkeys(query)), rng=rng, exclude=exclude)
        moved_groups = draw_matched(model, list(dict.fromkeys(groups)), rng=rng, grouped=True)
        edits = []
        for edit in recipe.edits:
            to = moved_groups if edit.site in ("k", "v") else moved
            edits.append(edit.moved(tuple(to[h] for h in edit.where.heads or ())))
        notes = {"control_of": recipe.notes.get("name", ""), "draw": i, "seed": seed}
        out.append(replace(recipe, edits=tuple(edits), notes=notes))
    return tuple(out)
