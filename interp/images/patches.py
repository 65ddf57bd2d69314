"""Which pixels of which image each token stands for.

A `PatchMap` is a list of patches: one token, and the box of original pixels it was made from. A
token may stand for a patch of the whole image, for one of a tile cut out of it, for one of a video
frame, or for several patches merged. Tokens that stand for no pixels (the class token, registers,
line ends between rows, separators) have no patch.

Boxes are left, top, right, bottom in pixels of the image as it was given, before any resizing,
cropping or padding; they are fractions where a patch of the resized image does not fall on whole
pixels, and are cut at the border where padding begins. Right and bottom are outside.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from interp.errors import InputError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Patch:
    """One token and the pixels it stands for.

    Attributes:
        position: place of the token, padding not counted.
        box: left, top, right, bottom in pixels of the image as given.
        row: row in its grid, 0 at the top.
        column: column in its grid, 0 at the left.
        image: which image, from 0.
        tile: which tile of the image, from 0; None for the image as a whole.
        frame: which frame of a video, from 0; merged frames have the first.
    """

    position: int
    box: Box
    row: int
    column: int
    image: int = 0
    tile: int | None = None
    frame: int = 0


@dataclass(frozen=True)
class Windows:
    """How a layer cuts a row of patches into windows, each of which attends by itself.

    A single window says that the row has these places and no more, whatever else is in a batch.

    Attributes:
        places: for each window in the order in which the layer runs them, the position at each of
            its places, -1 at those that hold padding.
        shift: how far windows are moved on the grid; a window may then join opposite borders,
            whose patches the layer keeps from each other. None where that cannot be told by the
            layer's mask.

    Raises:
        InputError: windows differ in size, or a position is in none or in several.
    """

    places: tuple[tuple[int, ...], ...]
    shift: int | None = None

    def __post_init__(self) -> None:
        held = sorted(i for window in self.places for i in window if i >= 0)
        if len(set(map(len, self.places))) != 1 or held != list(range(len(held))):
            raise InputError("windows must be of one size and hold every position once")


@dataclass(frozen=True)
class PatchMap:
    """All patches of a prompt, or of one row of a vision tower.

    Attributes:
        patches: in order of position.
        sizes: width and height in pixels of each image.
        n: number of tokens in all, so that positions lie in 0..n-1.
        windows: how a layer cuts the row; None where it attends over all of it.

    Raises:
        InputError: a position is repeated or outside, or a patch names an image that is not there.
    """

    patches: tuple[Patch, ...]
    sizes: tuple[tuple[int, int], ...]
    n: int
    windows: Windows | None = None

    def __post_init__(self) -> None:
        places = [p.position for p in self.patches]
        if any(b <= a for a, b in itertools.pairwise(places)) or (
            places and not 0 <= places[0] <= places[-1] < self.n
        ):
            raise InputError(f"patches must stand at rising positions within 0..{self.n - 1}")
        if any(not 0 <= p.image < len(self.sizes) for p in self.patches):
            raise InputError(f"a patch names an image beyond the {len(self.sizes)} there are")

    def __len__(self) -> int:
        return len(self.patches)

    def __iter__(self) -> Iterator[Patch]:
        return iter(self.patches)

    @cached_property
    def boxes(self) -> Float[np.ndarray, "patch 4"]:
        """Boxes of all patches."""
        return np.array([p.box for p in self.patches], dtype=np.float64).reshape(-1, 4)

    def grids(self) -> dict[tuple[int, int | None, int], tuple[int, int]]:
        """Rows and columns of every grid, by image, tile and frame."""
        out: dict[tuple[int, int | None, int], tuple[int, int]] = {}
        for p in self.patches:
            rows, columns = out.get((p.image, p.tile, p.frame), (0, 0))
            out[p.image, p.tile, p.frame] = max(rows, p.row + 1), max(columns, p.column + 1)
        return out

    def positions(
        self, *, image: int | None = None, tile: int | None = None, frame: int | None = None
    ) -> tuple[int, ...]:
        """Positions of the patches of an image, tile or frame; of all if none is named."""
        return tuple(
            p.position
            for p in self.patches
            if image in (None, p.image) and tile in (None, p.tile) and frame in (None, p.frame)
        )

    def touching(self, box: Box, *, image: int = 0, share: float = 0.0) -> tuple[int, ...]:
        """Positions of the patches that overlap a box.

        Args:
            box: left, top, right, bottom in pixels of the image.
            image: which image.
            share: least part of the patch that must lie in the box; any overlap if 0.

        Raises:
            InputError: the box is empty or reaches beyond the image.
        """
        self.check(box, image)
        return tuple(
            p.position
            for p, part in zip(self.patches, self.overlap(box), strict=True)
            if p.image == image and part > 0 and part >= share
        )

    def overlap(self, box: Box) -> Float[np.ndarray, " patch"]:
        """The part of each patch that lies in a box, in 0..1, whatever its image."""
        left, top, right, bottom = self.boxes.T
        wide = np.minimum(right, box[2]) - np.maximum(left, box[0])
        high = np.minimum(bottom, box[3]) - np.maximum(top, box[1])
        area = np.maximum((right - left) * (bottom - top), 1e-12)
        found: np.ndarray = np.maximum(wide, 0) * np.maximum(high, 0) / area
        return found

    def check(self, box: Box, image: int = 0) -> None:
        """Refuse a box that is empty or reaches beyond an image."""
        if not 0 <= image < len(self.sizes):
            raise InputError(f"there are {len(self.sizes)} images; got a box on image {image}")
        width, height = self.sizes[image]
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"a box is left, top, right, bottom within the {width} x {height} pixels of its "
                f"image; got {', '.join(f'{x:g}' for x in box)}"
            )

    def heat(
        self, values: Sequence[float] | np.ndarray, *, image: int = 0, frame: int = 0
    ) -> Float[np.ndarray, "height width"]:
        """Values of tokens as a picture: each pixel has the mean over the patches on it.

        Args:
            values: one per patch, in order of `patches`.
            image: which image.
            frame: which frame.

        Returns:
            NaN where no patch lies.
        """
        if len(values) != len(self.patches):
            raise InputError(f"a value per patch is needed: {len(self)}; got {len(values)}")
        width, height = self.sizes[image]
        total, count = np.zeros((height, width)), np.zeros((height, width))
        for p, value in zip(self.patches, values, strict=True):
            if (p.image, p.frame) == (image, frame):
                left, top, right, bottom = (round(x) for x in p.box)
                total[top:bottom, left:right] += value
                count[top:bottom, left:right] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def moved(self, by: int, n: int) -> "PatchMap":
        """The same patches `by` positions later, among `n` tokens."""
        from dataclasses import replace

        return PatchMap(
            tuple(replace(p, position=p.position + by) for p in self.patches), self.sizes, n
        )


def grid_patches(
    rows: int,
    columns: int,
    *,
    area: Box,
    first: int = 0,
    step: int = 0,
    image: int = 0,
    tile: int | None = None,
    frame: int = 0,
    clip: Box | None = None,
) -> list[Patch]:
    """A grid of equal patches over an area of the image.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        area: what the grid covers, in pixels of the image; may reach beyond it where it is padded.
        first: position of the first patch.
        step: tokens between rows that stand for no pixels, such as line ends.
        image: which image.
        tile: which tile.
        frame: which frame.
        clip: boxes are cut at its borders; patches wholly outside are left out.
    """
    left, top, right, bottom = area
    high, wide = (bottom - top) / rows, (right - left) / columns
    out = []
    for row in range(rows):
        for column in range(columns):
            box = (
                left + column * wide, top + row * high,
                left + (column + 1) * wide, top + (row + 1) * high,
            )  # fmt: skip
            if clip is not None:
                box = (
                    max(box[0], clip[0]), max(box[1], clip[1]),
                    min(box[2], clip[2]), min(box[3], clip[3]),
                )  # fmt: skip
                if box[0] >= box[2] or box[1] >= box[3]:
                    continue
            position = first + row * (columns + step) + column
            out.append(Patch(position, box, row, column, image, tile, frame))
    return out
