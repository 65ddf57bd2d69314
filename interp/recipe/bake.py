"""Recipes folded into weights, where that is exact.

An edit x ↦ A x + c of a head's z at every position is the projection with the head's columns
multiplied by A and its bias raised by W_O^h c. Everything else is refused by name.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interp.errors import InputError, SiteError
from interp.recipe.act import check_sizes
from interp.recipe.edit import Edit
from interp.recipe.ops import VectorOp
from interp.recipe.table import compile_table

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


@torch.no_grad()
def baked(recipe: "Recipe", model: "Model", *, new_bias: bool) -> "Model":
    """A copy of the model whose weights do what the recipe does.

    Args:
        recipe: edits of z at every position, without gate or schedule.
        model: the model; it stays as it is.
        new_bias: give a projection without bias one where an edit needs it. Such a model works as
            it is, but its class will not load the bias from disk.

    Raises:
        InputError: an edit cannot be folded in exactly; the message names it.
        SiteError: the model is a bridge, whose projections are not those of its class.
    """
    from interp.model import Model

    if getattr(model, "bridge", None) is not None:
        raise SiteError(
            f"weights are changed in the model itself; {model.name} is a bridge",
            hint="bake a model loaded without TransformerLens",
        )
    for i, edit in enumerate(recipe.edits):
        why = _refused(edit)
        if why:
            raise InputError(f"edit {i} ({edit}) cannot be baked: {why}")
    table = compile_table(model, [recipe.edits])
    hf = copy.deepcopy(model.hf)
    for name, parts in table.heads.get("z", {}).items():
        layer = model.structure.layers[name]
        module = hf.get_submodule(layer.projection)
        weight = module.weight
        assert isinstance(weight, Tensor)
        turned = type(module).__name__ != "Conv1D"
        work = (weight.T if turned else weight).double().clone()  # [in, out]
        shift = torch.zeros(work.shape[1], dtype=torch.float64, device=work.device)
        heads = work.view(layer.n_heads, -1, work.shape[1])
        # Row vectors: z A1ᵀ A2ᵀ W, so the edit that comes last is folded in first.
        for part in reversed(parts):
            for unit, entry in zip(part.units, part.entries, strict=True):
                a, c = _affine(part.edit, entry, heads.shape[1], work.device)
                shift += c @ heads[unit]
                heads[unit] = a.T @ heads[unit]
        weight.copy_((work.T if turned else work).to(weight))
        if bool(shift.any()):
            _raise_bias(module, shift, new_bias, layer.projection)
    made = Model(hf, model.tokenizer, model.processor, name=f"{model.name} baked",
                 example=model._example)  # fmt: skip
    return made


def _refused(edit: Edit) -> str:
    if edit.site != "z":
        return f"site {edit.site!r} does not fold into the output projection"
    if not edit.operation.bakes:
        return f"op {edit.op!r} is not affine"
    if not edit.where.queries.everywhere:
        return "it acts at some positions only"
    if edit.gate is not None or edit.schedule is not None:
        return "it depends on the input or the step"
    if any(t.dim() == 4 for t in edit.tensors.values()) and edit.op == "set":
        return "its values differ by example and position"
    if isinstance(edit.strength, Tensor) and edit.strength.dim() > 1:
        return "its strength differs by example"
    return ""


def _affine(edit: Edit, entry: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [d, d] and c [d] with x ↦ A x + c, read off the op itself."""
    op = edit.operation
    assert isinstance(op, VectorOp)
    s = edit.strength
    assert s is not None
    if isinstance(s, Tensor):
        s = (s[entry] if s.dim() else s).double()
    check_sizes(edit, d)
    tensors = {n: t[entry : entry + 1].double().to(device) for n, t in edit.tensors.items()}
    params = {n: edit.setting(n) for n in op.params}
    basis = torch.eye(d, dtype=torch.float64, device=device)[:, None, None]  # batch of unit vectors
    origin = torch.zeros(1, 1, 1, d, dtype=torch.float64, device=device)
    c = op.apply(origin, s, tensors, params)[0, 0, 0]
    columns = op.apply(basis, s, tensors, params)[:, 0, 0] - c
    return columns.T, c


def _raise_bias(module: nn.Module, shift: Tensor, new_bias: bool, name: str) -> None:
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_((bias.double() + shift).to(bias))
        return
    if not new_bias:
        raise InputError(
            f"this recipe shifts the output of {name}, which has no bias to take it",
            hint="new_bias=True gives it one (the model's class will not load it from disk)",
        )
    module.bias = nn.Parameter(shift.to(module.weight))  # type: ignore[arg-type]
