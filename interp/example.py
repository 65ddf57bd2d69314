"""A tiny input for any model, from its configuration alone: what the probe and doctor run on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import UnsupportedModelError


def example_inputs(model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Keyword inputs with which the model's forward runs.

    Args:
        model: a Hugging Face model; its `main_input_name` says what it reads.
        batch: number of examples.
        length: number of tokens, cut to the model's context.

    Raises:
        UnsupportedModelError: the kind of input is not known.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    if main == "input_ids":
        return text_inputs(model, batch=batch, length=length)
    gen = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        sub = getattr(config, "vision_config", config)
        size = getattr(sub, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(sub, "num_channels", 3)
        pixels = torch.randn(batch, channels, height, width, generator=gen)
        inputs = {"pixel_values": pixels.to(device, dtype)}
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", 80))
        frames = 2 * getattr(config, "max_source_positions", 100)
        inputs = {
            "input_features": torch.randn(batch, bins, frames, generator=gen).to(device, dtype)
        }
    elif main == "input_values":
        inputs = {"input_values": torch.randn(batch, 4000, generator=gen).to(device, dtype)}
    else:
        raise UnsupportedModelError(
            f"no example can be made for a model whose main input is {main!r}",
            hint="pass example={...} to interp.load",
        )
    if getattr(config, "is_encoder_decoder", False):
        ids = text_inputs(model, batch=batch, length=length)["input_ids"]
        inputs["decoder_input_ids"] = ids
    return inputs


def text_inputs(model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Random ids without special tokens; also decoder ids for encoder-decoders."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = special_ids(config)
    allowed = [i for i in range(int(text.vocab_size)) if i not in special][:5000]
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and context > 0:
        length = min(length, context)
    gen = torch.Generator().manual_seed(0)
    pick = torch.randint(len(allowed), (batch, length), generator=gen)
    device = next(model.parameters()).device
    ids = torch.tensor(allowed)[pick].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        # Another length than the encoder's, so that cross attention shows itself.
        inputs["decoder_input_ids"] = ids[:, : max(1, length - 3)]
    return inputs


def special_ids(config: Any) -> set[int]:
    """Every id that a configuration calls special: a stray image token would ask for an image."""
    found: set[int] = set()

    def walk(value: Mapping[str, Any]) -> None:
        for name, item in value.items():
            if isinstance(item, Mapping):
                walk(item)
            elif str(name).endswith(("token_id", "token_index", "token_ids")):
                items = item if isinstance(item, list | tuple) else [item]
                found.update(x for x in items if isinstance(x, int))

    walk(config.to_dict())
    return found
