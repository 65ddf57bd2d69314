"""A tiny input for any model, from its configuration and its forward's parameters alone.

What the probe and the doctor run on. Nothing here knows a model by name: parameters such as
`image_grid_thw` or `spatial_shapes` say in which form images are wanted. Where more than one form
is possible, the first with which the forward runs is taken.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import UnsupportedModelError

Inputs = dict[str, Tensor]
# What a forward raises when it is given inputs of another form than it wants.
_MISFIT = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_IMAGES = ("pixel_values", "pixel_values_images", "pixel_values_videos")


def example_inputs(model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Keyword inputs with which the model's forward runs; with an image where it reads images.

    Args:
        model: a Hugging Face model.
        batch: number of examples.
        length: number of text tokens, cut to the model's context; image tokens come on top.

    Raises:
        UnsupportedModelError: no form of input that is known fits.
    """
    forms = list(_forms(model, batch, length))
    if not forms:
        main = getattr(model, "main_input_name", "input_ids")
        raise UnsupportedModelError(
            f"no example can be made for a model whose main input is {main!r}",
            hint="pass example={...} to interp.load",
        )
    if len(forms) == 1:
        return forms[0]
    errors = []
    for inputs in forms:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(**inputs)
        except _MISFIT as error:
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
        else:
            return inputs
    raise UnsupportedModelError(
        f"no example could be made for {type(model).__name__}; tried {len(forms)} forms of its "
        f"inputs, first met {errors[0]}",
        hint="pass example={...} to interp.load",
    )


def _forms(model: nn.Module, batch: int, length: int) -> Iterator[Inputs]:
    """Candidate inputs, the likeliest first."""
    names = list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    text: Inputs = {}
    if "input_ids" in names and _vocabulary(model) is not None:
        text = text_inputs(model, batch=batch, length=length)
        if "bbox" in names:
            text["bbox"] = torch.tensor([1, 2, 3, 4]).expand(*text["input_ids"].shape, 4)
    for image in _image_forms(model, names, batch):
        image = {name: _placed(model, value) for name, value in image.items()}
        if not text:
            yield image | _decoder(model, names, batch, length)
        else:
            yield from _with_tokens(model, names, text, image, "image")
    if text and "pixel_values" not in names:
        for sound in _sound_forms(model, names, batch):
            sound = {name: _placed(model, value) for name, value in sound.items()}
            yield from _with_tokens(model, names, text, sound, "audio")
    if text and main != "pixel_values":
        yield text
    if not text:
        for sound in _sound_forms(model, names, batch):
            sound = {name: _placed(model, value) for name, value in sound.items()}
            yield sound | _decoder(model, names, batch, length)


def text_inputs(model: nn.Module, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Random ids without special tokens; also decoder ids for encoder-decoders."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    special = special_ids(config)
    allowed = [i for i in range(_vocabulary(model) or 2) if i not in special][:5000]
    context = getattr(text, "max_position_embeddings", None)
    if isinstance(context, int) and context > 0:
        length = min(length, context)
    gen = torch.Generator().manual_seed(0)
    pick = torch.randint(len(allowed), (batch, length), generator=gen)
    device = next(model.parameters()).device
    ids = torch.tensor(allowed)[pick].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in names:
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


def _configs(model: nn.Module) -> list[Any]:
    """The configuration of the text decoder, the model's own, and all its parts."""
    config: Any = getattr(model, "config", None)
    text = [config.get_text_config()] if hasattr(config, "get_text_config") else []
    return [*text, config, *_parts(config)]


def _parts(config: Any) -> list[Any]:
    """Every part of a configuration, at any depth."""
    parts = [x for x in vars(config).values() if hasattr(x, "to_dict")] if config else []
    return [*parts, *(deeper for part in parts for deeper in _parts(part))]


def _first(configs: list[Any], *names: str) -> Any:
    """The first of some entries that any of the configurations sets."""
    for config in configs:
        for name in names:
            if (value := getattr(config, name, None)) is not None:
                return value
    return None


def _vocabulary(model: nn.Module) -> int | None:
    size = _first(_configs(model), "vocab_size")
    if isinstance(size, int):
        return size
    embed = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return getattr(embed(), "num_embeddings", None)
    except NotImplementedError:
        return None


def _decoder(model: nn.Module, names: list[str], batch: int, length: int) -> Inputs:
    config = getattr(model, "config", None)
    if "decoder_input_ids" not in names and not getattr(config, "is_encoder_decoder", False):
        return {}
    if _vocabulary(model) is None:
        return {}
    return {"decoder_input_ids": text_inputs(model, batch=batch, length=length)["input_ids"]}


def _placed(model: nn.Module, value: Tensor) -> Tensor:
    first = next(model.parameters())
    return (
        value.to(first.device, first.dtype) if value.is_floating_point() else value.to(first.device)
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _image_forms(model: nn.Module, names: list[str], batch: int) -> Iterator[Inputs]:
    """Images in every form that the parameters of the forward allow."""
    config: Any = getattr(model, "config", None)
    vision = [x for n, x in vars(config).items() if "vision" in n and hasattr(x, "to_dict")]
    where = [*vision, *(y for x in vision for y in _parts(x)), config, *_configs(model)]
    pixels = next((n for n in _IMAGES if n in names), None)
    grid = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in names), None)
    if pixels is None and grid is not None:
        pixels = names[0]  # a vision tower by itself names its patches in its own way
    if pixels is None:
        return
    channels = _first(where, "num_channels", "in_channels", "in_chans") or 3
    patch = _first(where, "patch_size", "spatial_patch_size") or 16
    patch = patch if isinstance(patch, int) else patch[-1]
    size = _first(where, "image_size", "img_size", "input_size") or 8 * patch
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    if grid is not None:
        merge = _first(where, "spatial_merge_size", "merge_size") or 2
        side = merge * max(2, 4 // merge) if isinstance(merge, int) else 4
        depth = _first(where, "temporal_patch_size") or 1
        thw = [side, side] if grid.endswith("hw") and not grid.endswith("thw") else [1, side, side]
        n = batch * side * side
        more: Inputs = {str(grid): torch.tensor([thw] * batch)}
        if "merge_sizes" in names or "image_merge_sizes" in names:
            name = "merge_sizes" if "merge_sizes" in names else "image_merge_sizes"
            more[name] = torch.tensor([merge] * batch)
        yield {pixels: _random(n, channels * depth * patch * patch), **more}
        yield {pixels: _random(n, channels, patch, patch), **more}
    if "spatial_shapes" in names or "image_position_ids" in names:
        side = 2 * (_first(where, "pooling_kernel_size", "downsample_factor") or 2)
        flat = {pixels: _random(batch, side * side, channels * patch * patch)}
        flat["pixel_attention_mask"] = torch.ones(batch, side * side, dtype=torch.long)
        flat["spatial_shapes"] = torch.tensor([[side, side]] * batch)
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        flat["image_position_ids"] = cells.flip(-1).expand(batch, -1, -1)
        yield {name: value for name, value in flat.items() if name in names}
    plain = _random(batch, channels, height, width)
    sizes = {"image_sizes": torch.tensor([[height, width]] * batch)}
    sizes = sizes if "image_sizes" in names else {}
    yield {pixels: plain}
    if "aspect_ratio_ids" in names:
        tiles = int(_first(where, "max_num_tiles") or 1)
        mask = (torch.arange(tiles) == 0).long()
        yield {
            pixels: _random(batch, 1, tiles, channels, height, width),
            "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
            "aspect_ratio_mask": mask.expand(batch, 1, -1),
        }
    if sizes:
        yield {pixels: plain, **sizes}
    frames = int(_first(where, "num_frames", "frames_per_clip") or 2)
    yield {pixels: plain[:, None], **sizes}
    yield {pixels: plain[:, None].repeat(1, frames, 1, 1, 1), **sizes}
    yield {pixels: plain[:, None].repeat(1, 3, 1, 1, 1), **sizes}


def _with_tokens(
    model: nn.Module, names: list[str], text: Inputs, media: Inputs, kind: str
) -> Iterator[Inputs]:
    """Text and media together, with as many placeholder tokens as the model makes features."""
    both = text | media
    ids, mask = text["input_ids"], text["attention_mask"]
    config: Any = getattr(model, "config", None)
    token = _first([config, *_configs(model)], f"{kind}_token_id", f"{kind}_token_index")
    rows = _features(model, text, media, kind)
    if token is None or rows is None:
        yield _marked(names, both, torch.zeros_like(ids))
        return
    span = ids.new_full((len(ids), rows // len(ids)), token)
    both["input_ids"] = torch.cat([ids[:, :2], span, ids[:, 2:]], dim=1)
    both["attention_mask"] = torch.cat([mask[:, :2], torch.ones_like(span), mask[:, 2:]], dim=1)
    yield _marked(names, both, (both["input_ids"] == token).long())


def _marked(names: list[str], inputs: Inputs, where: Tensor) -> Inputs:
    """Add what some models want to be told of where images stand."""
    batch, length = where.shape
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = where
    if "token_type_ids" in names and bool(where.any()):
        inputs["token_type_ids"] = where
    if "image_attention_mask" in names and inputs["pixel_values"].dim() == 5:
        inputs["image_attention_mask"] = torch.ones(batch, length, 1, device=where.device)
    if "aspect_ratio_mask" in inputs:
        tiles = inputs["aspect_ratio_mask"].shape[-1]
        inputs["cross_attention_mask"] = where.new_ones(batch, length, 1, tiles)
    return inputs


def _features(model: nn.Module, text: Inputs, media: Inputs, kind: str) -> int | None:
    """How many token places the model fills with features of the media, over the whole batch."""
    inner = [model, getattr(model, "model", None)]
    get = next((g for m in inner if (g := getattr(m, f"get_{kind}_features", None))), None)
    count = _first(_configs(model), "image_seq_length", "mm_tokens_per_image", "num_image_tokens")
    spare = None if count is None else count * len(next(iter(media.values())))
    if get is None:
        return spare
    wanted = inspect.signature(get).parameters
    rest = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    given = {n: x for n, x in (text | media).items() if n in wanted or (rest and n in media)}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = get(**given)
    except _MISFIT:
        return spare
    for name in ("pooler_output", "last_hidden_state"):
        out = getattr(out, name, None) if getattr(out, name, None) is not None else out
    parts = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
    return sum(math.prod(x.shape[:-1]) for x in parts)


def _sound_forms(model: nn.Module, names: list[str], batch: int) -> Iterator[Inputs]:
    """Sound as features or as samples, in either order of its axes."""
    main = next((n for n in ("input_features", "input_values") if n in names), None)
    if main is None:
        return
    where = _configs(model)
    bins = _first(
        where, "num_mel_bins", "input_feat_per_channel", "n_mels", "feature_projection_input_dim",
        "input_dim", "mel_dim", "feature_size",
    ) or 80  # fmt: skip
    frames = 2 * int(_first(where, "max_source_positions") or 50)
    masks = [n for n in ("input_features_mask", "feature_attention_mask") if n in names]
    ones: Inputs = {str(n): torch.ones(batch, frames, dtype=torch.long) for n in masks}
    if main == "input_features":
        yield {main: _random(batch, bins, frames), **ones}
        yield {main: _random(batch, frames, bins), **ones}
    else:
        yield {main: _random(batch, 4000)}
        yield {main: _random(batch, 1, 4000)}
        length = _first(where, "max_length")
        yield {main: _random(batch, length if isinstance(length, int) else frames, bins)}
