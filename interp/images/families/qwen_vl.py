"""Qwen2-VL to Qwen3.5, EXAONE 4.5 and GLM-4V: grids of any size, patches merged in squares.

Images are stretched to whole squares of patches, so that the grid alone says where a token looks.
All images run through the tower as one row, frame after frame, square after square, with the
patches of a square together; Qwen2.5-VL and EXAONE 4.5 put squares in order of windows first.
Frames of videos are merged in pairs. Videos run after the images, as a second row.
"""

from typing import Any

from interp.errors import InputError, UnsupportedModelError
from interp.images.layouts import Example, Layout, layout, patch_side
from interp.images.plane import Cell, Plane, Size

_AROUND = ("<|vision_start|>", "<|vision_end|>")
_GLM = ("<|begin_of_image|>", "<|end_of_image|>")
Grid = tuple[int, int, int]


@layout("glm4v", "glm4v_moe", "glm46v", "glm_ocr", around=_GLM, runs=True)
def glm(example: Example) -> Layout:
    """As Qwen's; frames of videos have the placeholder of images, so that images alone are read."""
    if "video_grid_thw" in example.inputs:
        raise UnsupportedModelError(
            f"which pixels of a video each token of {example.model_type!r} stands for is not "
            f"known; known: images"
        )
    return qwen_vl(example)


@layout("exaone4_5", runs=True)
@layout("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", around=_AROUND, runs=True)
@layout("qwen3_5", "qwen3_5_moe", around=_AROUND, runs=True)
def qwen_vl(example: Example) -> Layout:
    """Merged squares as text tokens, single patches as tokens of the tower."""
    config, tower = example.config, example.config.vision_config
    merge, patch = int(tower.spatial_merge_size), patch_side(tower)
    grids = [_grids(example, name) for name in ("image_grid_thw", "video_grid_thw")]
    if not any(grids):
        raise InputError(f"{example.model_type} needs image_grid_thw or video_grid_thw")
    sizes = _sizes(example, [grid for kind in grids for grid in kind], patch)
    text, rows, first = [], [], 0
    for kind, token in zip(grids, (config.image_token_id, config.video_token_id), strict=True):
        tokens: list[Cell] = []
        row: list[Cell] = []
        for image, grid in enumerate(kind, first):
            plane = Plane.of(sizes[image], image).resized((grid[2] * patch, grid[1] * patch))
            for t in range(grid[0]):
                frame = t * int(tower.temporal_patch_size)
                squares = plane.cells(patch, merge=merge, frame=frame)
                tokens += squares
                row += _in_tower(plane.cells(patch, frame=frame), squares, merge, tower)
        if kind:
            text.append((int(token), tuple(tokens)))
            rows.append(tuple(row))
        first += len(kind)
    return Layout(sizes, tuple(text), tuple(rows))


def _grids(example: Example, name: str) -> list[Grid]:
    value = example.inputs.get(name)
    if value is None:
        return []
    return [(int(t), int(h), int(w)) for t, h, w in value.tolist()]


def _sizes(example: Example, grids: list[Grid], patch: int) -> tuple[Size, ...]:
    if example.sizes is None:
        return tuple((w * patch, h * patch) for _, h, w in grids)
    if len(example.sizes) != len(grids):
        raise InputError(
            f"there are {len(grids)} images and videos; got {len(example.sizes)} sizes"
        )
    return example.sizes


def _in_tower(patches: list[Cell], squares: list[Cell], merge: int, tower: Any) -> list[Cell]:
    """Patches of one frame in the order of the tower."""
    columns = max(c.column for c in patches) + 1
    window = getattr(tower, "window_size", None)
    if window is not None:
        side = window // merge // patch_side(tower)
        squares = sorted(squares, key=lambda c: (c.row // side, c.column // side, c.row, c.column))
    return [
        patches[(merge * c.row + i) * columns + merge * c.column + j]
        for c in squares
        for i in range(merge)
        for j in range(merge)
    ]
