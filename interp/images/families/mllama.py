"""Llama 3.2 Vision: tiles row by row, read by cross attention from layers of the text decoder.

The image is fitted into an arrangement of tiles and padded at its right and bottom; all its tiles
are one row of the tower, each with a class token first and filled up to a multiple of eight
positions. There is always room for the most tiles there may be. The text holds one placeholder an
image and no patch: layers of tower `cross` have as keys the class token and patches of all tiles
of all images, without what fills up. Positions that fill up are called `unused`.
"""

from interp.errors import InputError
from interp.images.layouts import TOWERS, Example, Layout, layout, patch_side, row_of
from interp.images.plane import Cell, Plane, Size

Tiles = tuple[int, int]
"""Rows and columns of tiles."""

_MULTIPLE = 8


@TOWERS.register("mllama_vision_model")
def _class_first(config: object) -> tuple[str, ...]:
    return ("cls",)


@layout("mllama")
def mllama(example: Example) -> Layout:
    """Tiles of every image, in the tower and as keys of the text's cross attention."""
    tower = example.config.vision_config
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 6 or len(pixels) != 1 or pixels.shape[-1] != pixels.shape[-2]:
        raise InputError(
            f"pixel_values of mllama must be [1, image, tile, channel, side, side]; got "
            f"{list(pixels.shape)}"
        )
    count, most, side = int(pixels.shape[1]), int(pixels.shape[2]), int(pixels.shape[-1])
    shapes = _shapes(most)
    given = [shapes[i - 1] for i in example.tensor("aspect_ratio_ids").flatten().tolist() if i > 0]
    if len(given) != count:
        raise InputError(f"aspect_ratio_ids tell of {len(given)} images; there are {count}")
    planes = [_plane(example, i, given[i], (most, side)) for i in range(count)]
    rows, keys = [], []
    for i, (plane, (down, across)) in enumerate(zip(planes, given, strict=True)):
        tiles = [
            row_of(plane.cut(c * side, r * side, (side, side), tile=r * across + c), tower)
            for r in range(down)
            for c in range(across)
        ]
        n = 1 + (side // patch_side(tower)) ** 2
        unused = Cell(i, name="unused")
        tiles += [(unused,) * n] * (most - len(tiles))
        rows.append(tuple(x for tile in tiles for x in (*tile, *[unused] * (-n % _MULTIPLE))))
        keys += [cell for tile in tiles for cell in tile]
    sizes = example.sizes or tuple(p.size for p in planes)
    marks = tuple(Cell(i, name="placeholder") for i in range(count))
    every = tuple(rows)
    return Layout(
        sizes, ((int(example.config.image_token_id), marks),), every,
        {"vision-global_transformer": every, "cross/keys": (tuple(keys),)},
    )  # fmt: skip


def _plane(example: Example, image: int, given: Tiles, room: tuple[int, int]) -> Plane:
    """The arrangement of tiles, and what of it shows the image."""
    most, side = room
    canvas = given[1] * side, given[0] * side
    if example.sizes is None:
        return Plane.of(canvas, image)
    if example.settings is not None:
        example.settings.require("MllamaImageProcessor")
    if image >= len(example.sizes):
        raise InputError(f"there is an image {image}; got {len(example.sizes)} sizes")
    size = example.sizes[image]
    if _arrangement(size, most, side) != given:
        raise InputError(
            f"image {image} of {size[0]} x {size[1]} makes "
            f"{' x '.join(map(str, _arrangement(size, most, side)))} tiles; aspect_ratio_ids say "
            f"{' x '.join(map(str, given))}",
            hint="give the sizes of the images as they were",
        )
    return Plane.of(size, image).resized(_within(size, canvas, side)).cut(0, 0, canvas)


def _shapes(most: int) -> list[Tiles]:
    """All arrangements, in the order in which models number them from 1."""
    numbers = range(1, most + 1)
    return [(a, b) for a in numbers for b in numbers if a * b <= most]


def _arrangement(size: Size, most: int, side: int) -> Tiles:
    """The one that enlarges the image least; if none is large enough, shrinks it least."""
    width, height = size
    scales = {
        shape: min(shape[0] * side / height, shape[1] * side / width) for shape in _shapes(most)
    }
    larger = [x for x in scales.values() if x >= 1]
    best = min(larger) if larger else max(scales.values())
    return min((s for s in scales if scales[s] == best), key=lambda s: s[0] * s[1])


def _within(size: Size, canvas: Size, side: int) -> Size:
    """The image's size on the canvas: made larger up to one tile, and smaller where it must be."""
    width, height = size
    wide, high = (min(max(n, side), most) for n, most in zip(size, canvas, strict=True))
    across, down = wide / width, high / height
    if across < down:
        return wide, min(int(height * across) or 1, high)
    return min(int(width * down) or 1, wide), high
