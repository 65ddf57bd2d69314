"""Swin and Swin v2: windows that attend by themselves, and stages with grids of their own.

Every image is one row. Each stage after the first merges squares of 2 x 2 patches, so that its
positions are those of a coarser grid. A layer fills its grid up to whole windows at the right and
at the bottom; every second layer of a stage moves its windows by half their side, around the
border (Liu et al., "Swin Transformer", 2021, section 3.2). Padding is no position of the image:
heads may look at it, and what they spend there is missing from the sum of their row.
"""

import itertools
from collections.abc import Callable

from interp.images.layouts import Example, Layout, Rows, layout, patch_side, shown
from interp.images.patches import Windows
from interp.images.plane import Plane, prepared

Grid = tuple[int, int]
"""Rows and columns of patches."""

Cut = tuple[int, int]
"""Side of a window and how far windows are moved, in patches."""


@layout("swin")
def swin(example: Example) -> Layout:
    """Windows as the image and the image size of the configuration allow them.

    A layer whose grid was once no larger than a window moves its windows no more, and reading a
    model begins with an image of the size in its configuration.
    """
    window, usual = int(example.config.window_size), _height(example)

    def cut(grid: Grid, stage: int) -> Cut:
        if min(*grid, -(-usual // 2**stage)) <= window:
            return min(*grid, window), 0
        return window, window // 2

    return _stages(example, cut)


@layout("swinv2")
def swinv2(example: Example) -> Layout:
    """Windows as the image size of the configuration allows them, whatever the image."""
    window, usual = int(example.config.window_size), _height(example)

    def cut(grid: Grid, stage: int) -> Cut:
        side = usual // 2**stage
        return (side, 0) if side <= window else (window, window // 2)

    return _stages(example, cut)


def _height(example: Example) -> int:
    """Rows of patches of an image of the size in the configuration."""
    size = example.config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size) // patch_side(example.config)


def _stages(example: Example, cut: Callable[[Grid, int], Cut]) -> Layout:
    config = example.config
    patch = patch_side(config)
    planes = shown(example, prepared)
    others: dict[str, Rows] = {}
    windows: dict[str, tuple[Windows, ...]] = {}
    layers = itertools.count()
    for stage, depth in enumerate(config.depths):
        filled = [_filled(plane, patch * 2**stage) for plane in planes]
        rows = tuple(tuple(plane.cells(patch, merge=2**stage)) for plane in filled)
        grids = [(p.size[1] // (patch * 2**stage), p.size[0] // (patch * 2**stage)) for p in filled]
        still, moved = (
            tuple(
                _windows(grid, side, shift * block)
                for grid in grids
                for side, shift in [cut(grid, stage)]
            )
            for block in (0, 1)
        )
        for block in range(depth):
            name = f"vision/{next(layers)}"
            others[name], windows[name] = rows, moved if block % 2 else still
    sizes = example.sizes or tuple(p.size for p in planes)
    return Layout(sizes, (), others["vision/0"], others, windows)


def _filled(plane: Plane, side: int) -> Plane:
    """The plane with padding at its right and bottom up to whole squares."""
    width, height = (-(-n // side) * side for n in plane.size)
    return plane.cut(0, 0, (width, height))


def _windows(grid: Grid, side: int, shift: int) -> Windows:
    """Windows row by row, as a layer cuts them out of the moved grid."""
    rows, columns = grid
    high, wide = (-(-n // side) * side for n in grid)

    def position(row: int, column: int) -> int:
        row, column = (row + shift) % high, (column + shift) % wide
        return row * columns + column if row < rows and column < columns else -1

    return Windows(
        tuple(
            tuple(position(top + i, left + j) for i, j in itertools.product(range(side), repeat=2))
            for top, left in itertools.product(range(0, high, side), range(0, wide, side))
        ),
        shift,
    )
