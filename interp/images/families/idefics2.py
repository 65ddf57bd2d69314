"""Idefics2: images of any size, read by latents that a resampler gives to the text.

An image may be followed by itself in quarters; each part is stretched, padded at its right and
bottom to the largest part of the prompt, and one row of the tower. Patches that are not wholly
within their part are hidden: they are called `unused`. Tower `cross` has the latents of a part as
queries, and as keys its patches and then the latents; the image tokens of the text are latents,
which stand for no pixels of their own.
"""

from interp.errors import InputError
from interp.images.layouts import Example, Layout, Rows, layout, patch_side
from interp.images.patches import Windows
from interp.images.plane import Cell, Plane, Size


@layout("idefics2")
def idefics2(example: Example) -> Layout:
    """Parts of every image."""
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 5 or len(pixels) != 1:
        raise InputError(
            f"pixel_values of idefics2 must be [1, part, channel, height, width]; got "
            f"{list(pixels.shape)}"
        )
    shown = _extents(example)
    parts = _parts(example, shown)
    patch = patch_side(example.config.vision_config)
    count = int(example.config.perceiver_config.resampler_n_latents)
    canvas = (pixels.shape[-1] // patch * patch, pixels.shape[-2] // patch * patch)
    rows = tuple(
        _row(part.resized(size), size, canvas, patch)
        for part, size in zip(parts, shown, strict=True)
    )
    latents = tuple((Cell(p.image, tile=p.tile, name="latent"),) * count for p in parts)
    keys = tuple((*row, *more) for row, more in zip(rows, latents, strict=True))
    sizes = example.sizes or tuple(p.size for p in parts)
    text = tuple(cell for row in latents for cell in row)
    return Layout(
        sizes, ((int(example.config.image_token_id), text),), rows,
        {"cross": latents, "cross/keys": keys},
        # Parts of a larger prompt in the same batch would move all places.
        {"vision": _fixed(rows), "cross/keys": _fixed(keys)},
    )  # fmt: skip


def _extents(example: Example) -> list[Size]:
    """What of each row of `pixel_values` is no padding."""
    pixels = example.tensor("pixel_values")[0]
    mask = example.inputs.get("pixel_attention_mask")
    if mask is None:
        return [(int(pixels.shape[-1]), int(pixels.shape[-2]))] * len(pixels)
    return [(int(x[0].sum()), int(x[:, 0].sum())) for x in mask[0]]


def _parts(example: Example, shown: list[Size]) -> list[Plane]:
    """Parts of the images as they were, in the order of the rows."""
    if example.sizes is None:
        return [Plane.of(size, i) for i, size in enumerate(shown)]
    if example.settings is not None:
        example.settings.require("Idefics2ImageProcessor")
    n = len(example.sizes)
    if len(shown) not in (n, 5 * n):
        raise InputError(
            f"{n} images make {n} parts, or {5 * n} where they are split; pixel_values has "
            f"{len(shown)}"
        )
    wholes = [Plane.of(size, i) for i, size in enumerate(example.sizes)]
    if len(shown) == n:
        return wholes
    return [part for whole in wholes for part in (*_quarters(whole), whole)]


def _quarters(whole: Plane) -> list[Plane]:
    width, height = whole.size
    x, y = width // 2, height // 2
    return [
        whole.cut(left, top, (wide, high), tile=tile)
        for tile, (left, top, wide, high) in enumerate(
            [
                (0, 0, x, y), (x, 0, width - x, y), (0, y, x, height - y),
                (x, y, width - x, height - y),
            ]
        )
    ]  # fmt: skip


def _row(plane: Plane, size: Size, canvas: Size, patch: int) -> tuple[Cell, ...]:
    """Patches of a part, those that are not wholly within it as `unused`."""
    return tuple(
        cell
        if (cell.column + 1) * patch <= size[0] and (cell.row + 1) * patch <= size[1]
        else Cell(plane.image, tile=plane.tile, name="unused")
        for cell in plane.cut(0, 0, canvas).cells(patch)
    )


def _fixed(rows: Rows) -> tuple[Windows, ...]:
    return tuple(Windows((tuple(range(len(row))),)) for row in rows)
