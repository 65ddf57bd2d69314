"""`headscope show RUN --overlay`: where heads look, drawn over the images with pillow alone."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from app.exits import UsageError
from app.overlay import Sight
from interp.files import disk_errors, write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Dark blue, blue, teal, green, yellow: equal steps of lightness, told apart by colour-blind eyes.
_STOPS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float
)
_ALPHA = 0.85
"""How much of the image the patch with the most mass covers up."""
_COLOUR = 0.5
"""How much of its colour the image keeps, so that a yellow thing is not taken for mass."""
_GAP, _LINE, _PAPER, _INK, _FAINT = 12, 17, (255, 255, 255), (20, 20, 20), (110, 110, 110)


def check_suffix(path: Path) -> None:
    """Refuse files that no image can be written to.

    Raises:
        UsageError: another suffix, or a folder.
    """
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise UsageError(f"--overlay must end in {', '.join(SUFFIXES)}; got {path}")


def save(picture: "Image", path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    out = io.BytesIO()
    picture.save(out, SUFFIXES[path.suffix.lower()])
    with disk_errors(path.parent, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, out.getvalue())


def heat(
    sight: Sight, head: str, image: int, size: tuple[int, int]
) -> "tuple[np.ndarray, np.ndarray]":
    """Mass of each pixel's patches, on an image drawn at a size.

    Returns:
        [height, width] mean mass over the patches on each pixel; and where there are any.
    """
    width, height = size
    across, down = width / sight.sizes[image][0], height / sight.sizes[image][1]
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for box, mass, on in zip(sight.boxes, sight.rows[head], sight.image, strict=True):
        if on == image and np.isfinite(mass):
            left, right = (round(float(x) * across) for x in box[[0, 2]])
            top, bottom = (round(float(x) * down) for x in box[[1, 3]])
            total[top:bottom, left:right] += mass
            count[top:bottom, left:right] += 1
    return total / np.maximum(count, 1), count > 0


def colours(values: np.ndarray) -> np.ndarray:
    """Values in 0..1 as colours [..., 3] in 0..255, from dark blue over green to yellow."""
    at = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    low = np.minimum(at.astype(int), len(_STOPS) - 2)
    part = (at - low)[..., None]
    mixed: np.ndarray = _STOPS[low] * (1 - part) + _STOPS[low + 1] * part
    return mixed


def panel(sight: Sight, head: str, size: int) -> "Image":
    """The images of a prompt side by side, with the mass of a head on them and the named boxes.

    Args:
        sight: what was kept.
        head: the head.
        size: pixels of the longer side of each image.
    """
    from PIL import Image, ImageDraw, ImageEnhance

    drawn: list[Image.Image] = []
    maps = []
    for j, image in enumerate(sight.images):
        width, height = sight.sizes[j]
        scale = size / max(width, height)
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        # Few pixels are shown as such, many are averaged.
        few = max(shape) >= 2 * max(image.size)
        way = Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS
        drawn.append(ImageEnhance.Color(image.resize(shape, way)).enhance(_COLOUR))
        maps.append(heat(sight, head, j, shape))
    most = max((float(values.max()) for values, _ in maps), default=0.0) or 1.0
    for j, (values, there) in enumerate(maps):
        share = values / most
        cover = (_ALPHA * share * there)[..., None]
        mixed = np.asarray(drawn[j]) * (1 - cover) + colours(share) * cover
        drawn[j] = Image.fromarray(mixed.round().astype(np.uint8))
        pen = ImageDraw.Draw(drawn[j])
        for on, box in sight.named.values():
            if on == j:
                _outline(pen, box, sight.sizes[j], drawn[j].size)
    out = Image.new("RGB", (sum(x.width for x in drawn) + _GAP * (len(drawn) - 1),
                            max(x.height for x in drawn)), _PAPER)  # fmt: skip
    at = 0
    for x in drawn:
        out.paste(x, (at, 0))
        at += x.width + _GAP
    return out


def _outline(
    pen: "ImageDraw", box: Sequence[float], size: tuple[int, int], shape: tuple[int, int]
) -> None:
    """A white frame between two dark ones: seen on any image."""
    across, down = shape[0] / size[0], shape[1] / size[1]
    left, top, right, bottom = (
        round(x * f) for x, f in zip(box, (across, down, across, down), strict=True)
    )
    for grow, colour in ((2, (0, 0, 0)), (1, (255, 255, 255)), (0, (255, 255, 255)),
                         (-1, (0, 0, 0))):  # fmt: skip
        corners = (left - grow, top - grow, right - 1 + grow, bottom - 1 + grow)
        if corners[0] <= corners[2] and corners[1] <= corners[3]:
            pen.rectangle(corners, outline=colour)


def draw(sight: Sight) -> "Image":
    """All heads of a sight as a grid of panels with captions, and a line on the prompt above."""
    from PIL import Image, ImageDraw

    heads = list(sight.rows)
    columns = min(len(heads), 4)
    size = 640 if len(heads) == 1 else 320 if len(heads) > 2 else 448
    panels = [panel(sight, head, size) for head in heads]
    wide, high = panels[0].size
    wide = max(wide, 240)
    head, below = 2 * _LINE + _GAP, 2 * _LINE + _GAP
    rows = math.ceil(len(heads) / columns)
    out = Image.new(
        "RGB", (columns * (wide + _GAP) + _GAP, head + rows * (high + below) + _GAP), _PAPER
    )
    pen = ImageDraw.Draw(out)
    whole = columns * (wide + _GAP) - _GAP
    title = f"{sight.id}: {sight.text}" if sight.text else sight.id
    _write(pen, (_GAP, _GAP), title, whole, _INK)
    bar = colours(np.tile(np.linspace(0, 1, 96), (9, 1))).round().astype(np.uint8)
    out.paste(Image.fromarray(bar), (_GAP, _GAP + _LINE + 4))
    legend = f"mass from the {sight.query}, up to each head's hottest patch"
    _write(pen, (_GAP + 96 + 8, _GAP + _LINE), legend, whole - 104, _FAINT)
    for i, name in enumerate(heads):
        left = _GAP + (i % columns) * (wide + _GAP)
        top = head + _GAP + (i // columns) * (high + below)
        out.paste(panels[i], (left, top))
        facts = sight.row(name)
        _write(pen, (left, top + high + 2), f"{name}: image mass {facts['mass']:.2f}", wide, _INK)
        share = "" if facts["in_box"] is None else f", {facts['in_box']:.0%} in the box"
        line = f"hottest patch {facts['patch_mass']:.2f}{share}"
        _write(pen, (left, top + high + 2 + _LINE), line, wide, _FAINT)
    return out


def _write(
    pen: "ImageDraw", at: tuple[int, int], text: str, wide: int, colour: tuple[int, int, int]
) -> None:
    """One line of text, cut where it would not fit."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=_LINE - 4)
    text = " ".join(text.split())
    if pen.textlength(text, font=font) > wide:
        while text and pen.textlength(f"{text}…", font=font) > wide:
            text = text[:-1]
        text = f"{text}…"
    pen.text(at, text, fill=colour, font=font)
