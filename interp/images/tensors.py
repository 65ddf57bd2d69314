"""Tensors of one example, from a processor or ready."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from interp.model import Model


def token_ids(tensors: "Mapping[str, Tensor]") -> tuple[int, ...]:
    """Token ids of the one example, padding left out."""
    if "input_ids" not in tensors:
        raise InputError(f"input_ids are needed; got {', '.join(tensors) or 'nothing'}")
    ids = tensors["input_ids"]
    if ids.dim() != 2 or len(ids) != 1:
        raise InputError(
            f"tensors must be of one example, input_ids [1, pos]; got {list(ids.shape)}",
            hint="make a prompt of each example",
        )
    return tuple(ids[0][_real(tensors)].tolist())


def _real(tensors: "Mapping[str, Tensor]") -> "Tensor":
    import torch

    mask = tensors.get("attention_mask")
    return torch.ones_like(tensors["input_ids"][0]).bool() if mask is None else mask[0].bool()


def model_inputs(model: "Model", tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """What the model takes beside token ids: no padding, floats in its own dtype."""
    import torch

    taken = inspect.signature(model.hf.forward).parameters
    out = {}
    for name, value in tensors.items():
        if name in ("input_ids", "attention_mask", "labels") or name not in taken:
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"every input must be one tensor; {name!r} is {type(value).__name__}",
                hint='call the processor with return_tensors="pt"',
            )
        by_token = name.endswith("token_type_ids") or name == "cross_attention_mask"
        if by_token and "input_ids" in tensors:
            value = value[:, _real(tensors)]
        out[name] = value.to(model.dtype) if value.is_floating_point() else value
    return out


def processed(model: "Model", processor: Any, given: Mapping[str, Any]) -> "dict[str, Tensor]":
    """What a processor makes of a text and images.

    Raises:
        InputError: it refuses them.
    """
    try:
        return dict(processor(return_tensors="pt", **given))
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"the processor of {model.name} must take the text and the images; it says: {said}"
        ) from error
