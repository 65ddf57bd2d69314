"""LLaVA-NeXT and LLaVA-OneVision: the image as a whole, then tiles of it as one large grid.

The image is fitted into one of a few large shapes and padded around; the shape is cut into tiles
that the tower reads one by one. Their patches are put together again into one grid, whose rows
and columns of padding are left out and whose every row ends with a `newline` token.
"""

import math
from collections.abc import Callable

from interp.errors import InputError, UnsupportedModelError
from interp.images.layouts import Example, Layout, fitted, layout, patch_side, row_of
from interp.images.patches import Box
from interp.images.plane import Cell, Plane, Size, resized_and_cropped, squared

_KINDS = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")


@layout("llava_next", around=("", "\n"), runs=True)
def llava_next(example: Example) -> Layout:
    """Tiles of every image."""
    sizes = _sizes(example)
    rows: list[tuple[Cell, ...]] = []
    cells: list[Cell] = []
    default = example.config.vision_feature_select_strategy == "default"
    for i, size in enumerate(sizes):
        planes, shape = _planes(example, size, i)
        made = [row_of(p, example.config.vision_config) for p in planes]
        _check_tiles(example, i, len(planes))
        rows += made
        kept = [row[1:] if default else row for row in made]
        cells += [*kept[0], *_with_newlines(_unpadded(_large(kept[1:], shape), size), i)]
    token = example.config.image_token_id
    return Layout(sizes, ((token, tuple(cells)),), tuple(rows))


@layout("llava_onevision", around=("", "\n"), runs=True)
def llava_onevision(example: Example) -> Layout:
    """Tiles of one image; several images each as a whole; a grid too large is made smaller."""
    if "pixel_values_videos" in example.inputs:
        raise UnsupportedModelError(
            "which pixels of a video each token of 'llava_onevision' stands for is not known; "
            "known: images"
        )
    sizes = _sizes(example)
    rows: list[tuple[Cell, ...]] = []
    cells: list[Cell] = []
    config = example.config
    default = config.vision_feature_select_strategy == "default"
    alone = [True] * len(sizes)
    if "batch_num_images" in example.inputs:
        counts = example.inputs["batch_num_images"].tolist()
        alone = [n == 1 for n in counts for _ in range(n)]
    if len(alone) != len(sizes):
        raise InputError(f"batch_num_images tells of {len(alone)} images; there are {len(sizes)}")
    for i, size in enumerate(sizes):
        if alone[i]:
            planes, shape = _planes(example, size, i)
            _check_tiles(example, i, len(planes))
        else:
            planes, shape = [_shown(example, squared(Plane.of(size, i)))], (0, 0)
        made = [row_of(p, config.vision_config) for p in planes]
        rows += made
        kept = [row[1:] if default else row for row in made]
        cells += kept[0]
        if not alone[i]:
            cells.append(Cell(i, name="newline"))
            continue
        grid = _unpadded(_large(kept[1:], shape), size)
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        a_side = config.vision_config.image_size // patch_side(config.vision_config)
        cells += _with_newlines(_smaller(grid, most, a_side), i)
    return Layout(sizes, ((config.image_token_id, tuple(cells)),), tuple(rows))


def _sizes(example: Example) -> tuple[Size, ...]:
    """Sizes of images, which are among the inputs."""
    found = tuple((int(w), int(h)) for h, w in example.tensor("image_sizes").tolist())
    if example.sizes is not None and example.sizes != found:
        raise InputError(f"sizes must be those in image_sizes, {found}; got {example.sizes}")
    return found


def _check_tiles(example: Example, image: int, count: int) -> None:
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 5 or image >= len(pixels) or pixels.shape[1] < count:
        raise InputError(
            f"image {image} makes {count} tiles; pixel_values is {list(pixels.shape)}, not "
            f"[image, tile, channel, height, width] with as many"
        )


def _shown(example: Example, plane: Plane) -> Plane:
    """The plane as the tower reads it."""
    side = int(example.config.vision_config.image_size)
    if example.settings is None:
        plane = plane.resized((side, side))
    else:
        example.settings.require(*_KINDS)
        plane = resized_and_cropped(plane, example.settings)
    return fitted(plane, example.tensor("pixel_values"))


def _planes(example: Example, size: Size, image: int) -> tuple[list[Plane], tuple[int, int]]:
    """The whole image and its tiles, and rows and columns of tiles."""
    side = int(example.config.vision_config.image_size)
    width, height = _best(size, example.config.image_grid_pinpoints)
    if width % side or height % side:
        raise UnsupportedModelError(
            f"shapes of tiles must be whole multiples of {side} pixels; got {width} x {height}"
        )
    whole = Plane.of(size, image)
    wide, high = _within(size, (width, height))
    large = whole.resized((wide, high)).cut(
        -((width - wide) // 2), -((height - high) // 2), (width, height)
    )
    rows, columns = height // side, width // side
    tiles = [
        large.cut(c * side, r * side, (side, side), tile=r * columns + c)
        for r in range(rows)
        for c in range(columns)
    ]
    # The whole image is stretched to a square before anything is cropped from it.
    first = whole.resized((side, side))
    return [_shown(example, plane) for plane in (first, *tiles)], (rows, columns)


def _best(size: Size, shapes: list[list[int]]) -> Size:
    """The shape that shows most of the image, and of those the one with least padding."""
    width, height = size

    def worth(shape: list[int]) -> tuple[int, int]:
        scale = min(shape[1] / width, shape[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - shape[0] * shape[1]

    best = max(shapes, key=worth)
    return int(best[1]), int(best[0])


def _within(size: Size, shape: Size) -> Size:
    """The image's size once it is fitted into a shape."""
    across, down = shape[0] / size[0], shape[1] / size[1]
    if across < down:
        return shape[0], min(math.ceil(size[1] * across), shape[1])
    return min(math.ceil(size[0] * down), shape[0]), shape[1]


def _large(tiles: list[tuple[Cell, ...]], shape: tuple[int, int]) -> list[list[Cell]]:
    """The grid of all tiles' patches."""
    rows, columns = shape
    n = math.isqrt(len(tiles[0]))
    if n * n != len(tiles[0]):
        raise UnsupportedModelError(
            f"a tile must have a square of patches; got {len(tiles[0])}: the class token is kept"
        )
    return [
        [tiles[r * columns + c][y * n + x] for c in range(columns) for x in range(n)]
        for r in range(rows)
        for y in range(n)
    ]


def _unpadded(grid: list[list[Cell]], size: Size) -> list[list[Cell]]:
    """The grid without rows or columns of padding, as many on either side."""
    width, height = size
    rows, columns = len(grid), len(grid[0])
    if width / height > columns / rows:
        gone = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[gone : rows - gone]
    gone = (columns - int(round(width * (rows / height), 7))) // 2
    return [row[gone : columns - gone] for row in grid]


def _with_newlines(grid: list[list[Cell]], image: int) -> list[Cell]:
    return [cell for row in grid for cell in (*row, Cell(image, name="newline"))]


def _smaller(grid: list[list[Cell]], most: int, side: int) -> list[list[Cell]]:
    """A grid of more than `most` squares of `side` patches, interpolated to so many."""
    rows, columns = len(grid), len(grid[0]) if grid else 0  # of a line, all may be padding
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio <= 1.1:
        return grid
    down, across = int(rows // ratio), int(columns // ratio)
    return [[_blend(grid, (r, down), (c, across)) for c in range(across)] for r in range(down)]


def _blend(grid: list[list[Cell]], row: tuple[int, int], column: tuple[int, int]) -> Cell:
    """A token interpolated between up to four patches stands for all of them."""
    ys, xs = _between(*row, len(grid)), _between(*column, len(grid[0]))
    parts = [grid[y][x] for y in ys for x in xs]
    boxes = [p.box for p in parts if p.box is not None]
    first = parts[0]
    if not boxes:
        return Cell(first.image, tile=first.tile, name="padding")
    edges: tuple[Callable[..., float], ...] = (min, min, max, max)
    left, top, right, bottom = (f(b[i] for b in boxes) for i, f in enumerate(edges))
    box: Box = (left, top, right, bottom)
    return Cell(first.image, box, row[0], column[0])


def _between(i: int, n: int, old: int) -> tuple[int, ...]:
    """The places that bilinear interpolation from `old` to `n` places mixes for place i."""
    at = max((i + 0.5) * old / n - 0.5, 0.0)
    low = min(int(at), old - 1)
    high = min(low + 1, old - 1)
    return (low,) if high == low or at == low else (low, high)
