"""The blocks of a tower: where the residual stream enters and leaves each layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interp.errors import SiteError
from interp.seam.structure import Tower, stack_of

if TYPE_CHECKING:
    from interp.model import Model

Change = Callable[[Tensor], Tensor | None]
"""Given hidden states [batch, pos, d_model]; returns others, or None."""


def block_names(model: "Model", tower: Tower) -> tuple[str, ...]:
    """Qualified names of a tower's blocks in order, those without attention included.

    Raises:
        SiteError: the tower's layers are not elements of one list of modules.
    """
    stacks = {stack_of(model.hf, layer.name) for layer in tower.layers}
    stack = next(iter(stacks))
    container = model.hf.get_submodule(stack)
    if len(stacks) != 1 or not isinstance(container, nn.ModuleList):
        raise SiteError(f"the layers of tower {tower.name!r} of {model.name} are not one list")
    for layer in tower.layers:
        if not layer.name.startswith(f"{stack}.{layer.index}."):
            raise SiteError(
                f"layer {layer.index} of tower {tower.name!r} is not block {layer.index} of {stack}"
            )
    return tuple(f"{stack}.{i}" for i in range(len(container)))


def on_input(module: nn.Module, change: Change) -> Callable[[], None]:
    """Show a block's incoming hidden states; gives the function that stops it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = change(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = change(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def on_output(module: nn.Module, change: Change) -> Callable[[], None]:
    """Show what a module puts out first; gives the function that stops it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        new = change(output[0])
        return None if new is None else (new, *output[1:])

    return module.register_forward_hook(hook).remove
