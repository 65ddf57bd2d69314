"""LLaVA and relatives: each image one row of the tower, its patches the image tokens, in order.

Also PaliGemma, and Gemma 3, whose tokens are means over squares of patches.
"""

import math

from interp.errors import InputError
from interp.images.families.pixtral import pixtral
from interp.images.layouts import Example, Layout, fitted, layout, patch_side, row_of, shown
from interp.images.plane import Plane, Settings, prepared, resized_and_cropped


@layout("llava", "vipllava", around=("", "\n"), runs=True)
def llava(example: Example) -> Layout:
    """Patches as they come, with or without the class token."""
    if example.config.vision_config.model_type == "pixtral":
        return pixtral(example)
    planes = shown(example, prepared)
    rows = tuple(row_of(p, example.config.vision_config) for p in planes)
    # ViP-LLaVA has no such entry and always leaves the first token out.
    default = getattr(example.config, "vision_feature_select_strategy", "default") == "default"
    cells = tuple(cell for row in rows for cell in (row[1:] if default else row))
    return Layout(_sizes(planes, example), ((example.config.image_token_id, cells),), rows)


@layout("paligemma")
def paligemma(example: Example) -> Layout:
    """Patches as they come."""
    planes = shown(example, prepared)
    rows = tuple(row_of(p, example.config.vision_config) for p in planes)
    cells = tuple(cell for row in rows for cell in row)
    return Layout(_sizes(planes, example), ((example.config.image_token_id, cells),), rows)


@layout("gemma3")
def gemma3(example: Example) -> Layout:
    """Squares of patches; wide or tall images may be followed by parts of them."""
    if example.sizes is None:
        planes = shown(example, resized_and_cropped)
        sizes = tuple(p.size for p in planes)
    else:
        settings = example.known_settings()
        settings.require("Gemma3ImageProcessor")
        sizes = example.sizes
        planes = [
            resized_and_cropped(part, settings)
            for i, size in enumerate(sizes)
            for part in _parts(Plane.of(size, i), settings)
        ]
        rows_of_planes(example, planes)
    tower = example.config.vision_config
    patch = patch_side(tower)
    a_side = tower.image_size // patch
    merge = a_side // math.isqrt(example.config.mm_tokens_per_image)
    cells = tuple(cell for p in planes for cell in p.cells(patch, merge=merge))
    rows = tuple(row_of(p, tower) for p in planes)
    return Layout(sizes, ((example.config.image_token_id, cells),), rows)


def rows_of_planes(example: Example, planes: list[Plane]) -> None:
    """Refuse planes that are not those of `pixel_values`."""
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 4 or len(pixels) != len(planes):
        raise InputError(
            f"the sizes make {len(planes)} images and parts of images; pixel_values is "
            f"{list(pixels.shape)}",
            hint="give the sizes and the processor with which the tensors were made",
        )
    for plane in planes:
        fitted(plane, pixels)


def _parts(whole: Plane, settings: Settings) -> list[Plane]:
    """The image, and the parts that pan-and-scan cuts out of an elongated one."""
    if not settings("do_pan_and_scan"):
        return [whole]
    width, height = whole.size
    least = settings("pan_and_scan_min_crop_size")
    long, short = max(whole.size), min(whole.size)
    if long / short < settings("pan_and_scan_min_ratio_to_activate"):
        return [whole]
    count = max(2, min(long // least, math.floor(long / short + 0.5)))
    count = min(settings("pan_and_scan_max_num_crops"), count)
    step = math.ceil(long / count)
    if min(step, short) < least:
        return [whole]
    parts = []
    for i in range(count):
        length = min(step, long - i * step)
        if width >= height:
            parts.append(whole.cut(i * step, 0, (length, height), tile=i))
        else:
            parts.append(whole.cut(0, i * step, (width, length), tile=i))
    return [whole, *parts]


def _sizes(planes: list[Plane], example: Example) -> tuple[tuple[int, int], ...]:
    return example.sizes or tuple(p.size for p in planes)
