"""Idefics3 and SmolVLM: tiles row by row, then the image as a whole; squares of patches a token.

The image is stretched until whole tiles fill it, so that nothing is cropped or padded.
"""

import math

from interp.errors import InputError
from interp.images.layouts import Example, Layout, fitted, layout, patch_side, row_of
from interp.images.plane import Cell, Plane, Settings, Size, side

_LARGEST = 4096
"""No image is ever made larger than this."""


@layout("idefics3", "smolvlm")
def idefics3(example: Example) -> Layout:
    """Tiles and whole of every image."""
    sizes, settings = example.known_sizes(), example.known_settings()
    settings.require("Idefics3ImageProcessor", "SmolVLMImageProcessor")
    planes = [p for i, size in enumerate(sizes) for p in _planes(Plane.of(size, i), settings)]
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 5 or pixels.shape[:2] != (1, len(planes)):
        raise InputError(
            f"{len(sizes)} images of these sizes make {len(planes)} tiles; pixel_values is "
            f"{list(pixels.shape)}, not [1, tile, channel, height, width] with as many",
            hint="give the sizes and the processor with which the tensors were made",
        )
    planes = [fitted(plane, pixels) for plane in planes]
    tower = example.config.vision_config
    patch = patch_side(tower)
    merge = int(example.config.scale_factor)
    cells: list[Cell] = []
    for plane in planes:
        if any(n // patch % merge for n in plane.size):
            raise InputError(
                f"tiles of {example.model_type} must be whole squares of {patch * merge} pixels; "
                f"got {plane.size[0]} x {plane.size[1]}"
            )
        cells += plane.cells(patch, merge=merge)
    rows = tuple(row_of(p, tower) for p in planes)
    return Layout(sizes, ((example.config.image_token_id, tuple(cells)),), rows)


def _planes(whole: Plane, settings: Settings) -> list[Plane]:
    tile = side(settings("max_image_size"), "longest_edge")
    if tile is None:
        raise InputError("max_image_size must have a longest_edge")
    square = whole.resized((tile, tile))
    if not settings("do_image_splitting"):
        return [square]
    size = whole.size
    if settings("do_resize"):
        longest = side(settings("size"), "longest_edge")
        if longest is None:
            raise InputError(f"size must have a longest_edge; got {settings('size')}")
        size = _at_most(_with_longest(size, longest))
    width, height = _filled(size, tile)
    if max(width, height) <= tile:
        return [whole.resized((width, height))]
    large = whole.resized((width, height))
    rows, columns = height // tile, width // tile
    tiles = [
        large.cut(c * tile, r * tile, (tile, tile), tile=r * columns + c)
        for r in range(rows)
        for c in range(columns)
    ]
    return [*tiles, square]


def _with_longest(size: Size, longest: int) -> Size:
    """The longer side as asked for; the shorter in proportion, and even."""
    width, height = size
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(short + short % 2, 1)
    short = int(longest * ratio)
    return max(short + short % 2, 1), longest


def _at_most(size: Size) -> Size:
    width, height = size
    ratio = width / height
    if width >= height and width > _LARGEST:
        return _LARGEST, max(int(_LARGEST / ratio), 1)
    if height > width and height > _LARGEST:
        return max(int(_LARGEST * ratio), 1), _LARGEST
    return size


def _filled(size: Size, tile: int) -> Size:
    """The size stretched to whole tiles."""
    width, height = size
    ratio = width / height
    if width >= height:
        wide = math.ceil(width / tile) * tile
        return wide, math.ceil(int(wide / ratio) / tile) * tile
    high = math.ceil(height / tile) * tile
    return math.ceil(int(high * ratio) / tile) * tile, high
