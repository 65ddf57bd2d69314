"""Pixtral towers under LLaVA, Mistral 3 and LightOnOCR: grids of any size, row by row.

An image is stretched to whole patches, its size among the inputs. All images run through the tower
as one row. Mistral 3 and LightOnOCR merge squares of patches.
"""

from interp.errors import InputError
from interp.images.layouts import Example, Layout, layout, patch_side
from interp.images.plane import Cell, Plane, Size


@layout("mistral3", "lighton_ocr")
def mistral3(example: Example) -> Layout:
    """Squares of patches."""
    return pixtral(example, int(example.config.spatial_merge_size))


def pixtral(example: Example, merge: int = 1) -> Layout:
    """Every patch, or square of patches, a token; the ends of rows are tokens of another kind."""
    tower = example.config.vision_config
    patch = patch_side(tower)
    planes = _planes(example, patch * merge)
    row = tuple(cell for p in planes for cell in p.cells(patch))
    cells: tuple[Cell, ...] = row
    if merge > 1:
        cells = tuple(cell for p in planes for cell in p.cells(patch, merge=merge))
    default = getattr(example.config, "vision_feature_select_strategy", "full") == "default"
    cells = cells[1:] if default else cells
    sizes = example.sizes or tuple(p.size for p in planes)
    return Layout(sizes, ((example.config.image_token_id, cells),), (row,))


def _planes(example: Example, side: int) -> list[Plane]:
    found: list[Size] = [(int(w), int(h)) for h, w in example.tensor("image_sizes").tolist()]
    height, width = example.tensor("pixel_values").shape[-2:]
    for w, h in found:
        if w % side or h % side or w > width or h > height:
            raise InputError(
                f"image_sizes must be whole squares of {side} pixels within the {width} x {height} "
                f"of pixel_values; got {w} x {h}"
            )
    if example.sizes is None:
        return [Plane.of(size, i) for i, size in enumerate(found)]
    if example.settings is not None:
        example.settings.require("PixtralImageProcessor")
    if len(example.sizes) != len(found):
        raise InputError(f"there are {len(found)} images; got {len(example.sizes)} sizes")
    return [
        Plane.of(size, i).resized(to)
        for i, (size, to) in enumerate(zip(example.sizes, found, strict=True))
    ]
