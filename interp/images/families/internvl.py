"""InternVL and Aya Vision: tiles row by row, then the image as a whole; squares of patches a token.

The image is stretched to the arrangement of tiles whose shape is nearest to its own; a single tile
is the image as a whole. Frames of a video are images of one tile each.
"""

from interp.errors import InputError, UnsupportedModelError
from interp.images.layouts import Example, Layout, fitted, layout, patch_side, row_of
from interp.images.plane import Plane, Settings, Size, side


@layout("internvl")
def internvl(example: Example) -> Layout:
    """Squares of as many patches as the resolution falls by."""
    if example.config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError("InternVL with the class token as an image token is not known")
    return _tiled(example, round(1 / example.config.downsample_ratio))


@layout("aya_vision")
def aya_vision(example: Example) -> Layout:
    """Squares of patches of a tower without class token."""
    if example.config.vision_feature_select_strategy != "full":
        raise UnsupportedModelError("Aya Vision without its first patch is not known")
    return _tiled(example, int(example.config.downsample_factor))


def _tiled(example: Example, merge: int) -> Layout:
    """Tiles and whole of every image."""
    sizes, settings = example.known_sizes(), example.known_settings()
    settings.require("GotOcr2ImageProcessor")
    planes = [p for i, size in enumerate(sizes) for p in _planes(Plane.of(size, i), settings)]
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 4 or len(pixels) != len(planes):
        raise InputError(
            f"{len(sizes)} images of these sizes make {len(planes)} tiles; pixel_values is "
            f"{list(pixels.shape)}, not [tile, channel, height, width] with as many",
            hint="give the sizes and the processor with which the tensors were made",
        )
    planes = [fitted(plane, pixels) for plane in planes]
    tower = example.config.vision_config
    cells = tuple(c for p in planes for c in p.cells(patch_side(tower), merge=merge))
    rows = tuple(row_of(p, tower) for p in planes)
    return Layout(sizes, ((example.config.image_token_id, cells),), rows)


def _planes(whole: Plane, settings: Settings) -> list[Plane]:
    size = settings("size")
    wide, high = side(size, "width"), side(size, "height")
    if wide is None or high is None:
        raise InputError(f"size must have a height and a width; got {size}")
    square = whole.resized((wide, high))
    most = settings("max_patches")
    if not settings("crop_to_patches") or most <= 1:
        return [square]
    columns, rows = _arrangement(whole.size, (wide, high), settings("min_patches"), most)
    if columns * rows == 1:
        return [square]
    large = whole.resized((columns * wide, rows * high))
    tiles = [
        large.cut(c * wide, r * high, (wide, high), tile=r * columns + c)
        for r in range(rows)
        for c in range(columns)
    ]
    return [*tiles, square]


def _arrangement(size: Size, tile: Size, least: int, most: int) -> Size:
    """Columns and rows of tiles nearest to the image's shape; more if the image is large."""
    width, height = size
    # By number of tiles, then columns: of equally good arrangements the order decides.
    shapes = sorted(
        (
            (columns, rows)
            for columns in range(1, most + 1)
            for rows in range(1, most + 1)
            if least <= columns * rows <= most
        ),
        key=lambda shape: shape[0] * shape[1],
    )
    best, nearest = (1, 1), float("inf")
    for columns, rows in shapes:
        away = abs(width / height - columns / rows)
        larger = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if away < nearest or (away == nearest and larger):
            best, nearest = (columns, rows), away
    return best
