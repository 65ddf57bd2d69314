"""Spans and patch maps from what each token stands for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from interp.errors import InputError
from interp.images.patches import Box, Patch, PatchMap, Windows
from interp.images.plane import Cell, Size
from interp.prompts import Prompt, Range

Boxes = Mapping[str, tuple[int, Box]]
"""Name to image and box."""

_TAKEN = (
    "all", "bos", "cls", "distillation", "image", "latent", "newline", "padding",
    "placeholder", "registers", "text", "unused",
)  # fmt: skip


_APART = ("cls", "distillation", "latent", "registers", "unused")


def check_boxes(boxes: Mapping[str, Box | tuple[int, Box]] | None, sizes: Sequence[Size]) -> Boxes:
    """Boxes with their images.

    Raises:
        InputError: a name that spans of images have, or a box that is none of its image.
    """
    out: dict[str, tuple[int, Box]] = {}
    whole = PatchMap((), tuple(sizes), 0)
    for name, given in (boxes or {}).items():
        if name in ("", *_TAKEN) or name.startswith("image-"):
            raise InputError(
                f"a box cannot be called {name!r}: spans of that name are made for every image",
                hint="choose another name",
            )
        image, box = _split(name, given)
        try:
            whole.check(box, image)
        except InputError as error:
            raise InputError(f"box {name!r}: {error}", hint=error.hint) from None
        out[name] = image, box
    return out


def _split(name: str, given: object) -> tuple[int, Box]:
    image: object = 0
    if isinstance(given, list | tuple) and len(given) == 2:
        image, given = given
    fine = isinstance(given, list | tuple) and len(given) == 4 and all(map(_number, given))
    if not fine or not isinstance(image, int) or isinstance(image, bool):
        raise InputError(
            f"box {name!r} must be four numbers, or an image and four numbers; got {given!r}",
            hint="left, top, right, bottom in pixels",
        )
    assert isinstance(given, list | tuple)
    left, top, right, bottom = map(float, given)
    return image, (left, top, right, bottom)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def described(
    cells: Sequence[Cell], places: Sequence[int], n: int, sizes: Sequence[Size], *, tower: bool
) -> tuple[dict[str, tuple[Range, ...]], PatchMap]:
    """Spans and patch map of tokens.

    Args:
        cells: what each image token stands for.
        places: their positions, rising.
        n: number of tokens in all.
        sizes: of the images.
        tower: whether these are tokens of a tower, whose class token, registers, latents and
            positions that fill up are no part of the image.

    Returns:
        Spans: `image`, `image-N`, `image-N/tile-N` with `image-N/whole`, `image-N/frame-N`, and
        what tokens without pixels are called.
    """
    found: dict[str, list[int]] = {"image": []}
    tiled = {c.image for c in cells if c.tile is not None}
    moving = {c.image for c in cells if c.frame}
    for cell, place in zip(cells, places, strict=True):
        if cell.name:
            found.setdefault(cell.name, []).append(place)
        if not (tower and cell.name in _APART):
            for name in _names(cell, tiled, moving):
                found.setdefault(name, []).append(place)
    patches = tuple(
        Patch(place, c.box, c.row, c.column, c.image, c.tile, c.frame)
        for c, place in zip(cells, places, strict=True)
        if c.box is not None
    )
    spans = {name: ranges(where) for name, where in found.items()}
    return spans, PatchMap(patches, tuple(sizes), n)


def _names(cell: Cell, tiled: set[int], moving: set[int]) -> Iterable[str]:
    yield "image"
    yield f"image-{cell.image}"
    if cell.name in ("", "latent", "padding"):
        if cell.image in tiled:
            part = "whole" if cell.tile is None else f"tile-{cell.tile}"
            yield f"image-{cell.image}/{part}"
        if cell.image in moving:
            yield f"image-{cell.image}/frame-{cell.frame}"


def ranges(positions: Iterable[int]) -> tuple[Range, ...]:
    """Rising positions as ranges."""
    out: list[Range] = []
    for i in positions:
        if out and out[-1][1] == i:
            out[-1] = out[-1][0], i + 1
        else:
            out.append((i, i + 1))
    return tuple(out)


def boxed(patches: PatchMap, boxes: Boxes) -> dict[str, tuple[Range, ...]]:
    """A span for each box: the tokens that touch it."""
    return {
        name: ranges(patches.touching(box, image=image)) for name, (image, box) in boxes.items()
    }


def tower_views(
    rows: Sequence[Sequence[Cell]],
    sizes: Sequence[Size],
    boxes: Boxes,
    *,
    id: str,
    windows: Sequence[Windows] | None = None,
) -> tuple[Prompt, ...]:
    """The rows of a vision tower as prompts, whose tokens are their positions.

    Every row has all spans of the tower, so that all can be read at once; those that lie on other
    rows are empty.
    """
    made = []
    for i, row in enumerate(rows):
        spans, patches = described(row, range(len(row)), len(row), sizes, tower=True)
        if windows is not None:
            patches = replace(patches, windows=windows[i])
        spans |= boxed(patches, boxes)
        name = f"{id}/{i}" if len(rows) > 1 else id
        made.append(Prompt(tuple(range(len(row))), spans, name, patches=patches))
    names = dict.fromkeys(name for p in made for name in p.spans)
    return tuple(replace(p, spans={n: p.spans.get(n, ()) for n in names}) for p in made)


def check_seen(boxes: Boxes, prompt: Prompt) -> None:
    """Refuse a box that no token touches.

    Raises:
        InputError: the model was not shown these pixels.
    """
    views = [seen for rows in prompt.views.values() for seen in rows]
    for name in boxes:
        if not any(p.spans.get(name) for p in (prompt, *views)):
            raise InputError(
                f"box {name!r} must touch a patch; the processor cropped these pixels away",
                hint="choose a box nearer the middle, or a processor that does not crop",
            )
