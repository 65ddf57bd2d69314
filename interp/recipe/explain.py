"""What a recipe will do on a model, in words."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from interp.recipe.edit import Edit
from interp.recipe.table import compile_table

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


def explained(recipe: "Recipe", model: "Model") -> str:
    """One line per edit: what, where, and the path it takes.

    Raises:
        HeadIdError: a head or layer lies outside the model.
        SiteError: a site is not reached on this model.
    """
    compile_table(model, [recipe.edits])
    lines = []
    for i, edit in enumerate(recipe.edits):
        lines.append(f"{i}  {edit}")
        lines.append(f"   {edit.operation.formula}; {_PATHS[edit.site](edit, model)}")
        if edit.op == "add" and edit.site == "k" and edit.where.keys.everywhere:
            lines.append("   without effect: a vector added to every key cancels in the softmax")
    return "\n".join(lines)


def _recompute(edit: Edit, model: "Model") -> str:
    heads = edit.selected(model)
    layers = {(h.tower, h.layer) for h in heads}
    return (
        f"rows of {len(heads)} heads in {len(layers)} layers computed again beside the kernel, the "
        f"others untouched"
    )


def _before(edit: Edit, model: "Model") -> str:
    return f"{edit.site} as the kernel receives it (after rotation); any kernel"


_PATHS: dict[str, Callable[[Edit, "Model"], str]] = {
    "z": lambda e, m: "input of the output projection; any kernel",
    "q": _before,
    "k": _before,
    "v": _before,
    "scores": _recompute,
    "pattern": _recompute,
    "resid": lambda e, m: "hidden states between blocks",
    "attn_out": lambda e, m: "output of the output projection",
    "logits": lambda e, m: (
        "logits of each forward"
        + ("; the input runs a second time under the twin" if e.twin else "")
    ),
}
