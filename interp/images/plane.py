"""The way from an image to the pixels a tower reads: every step keeps what they show.

A `Plane` is a rectangle of pixels and the part of the image that it shows, carried through
resizing, cropping and padding. Nothing is measured: each step is the rule by which processors of
Hugging Face's transformers choose sizes and offsets, and the last one must give the shape of
`pixel_values`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from interp.errors import InputError, UnsupportedModelError
from interp.images.patches import Box

Size = tuple[int, int]
"""Width and height in pixels."""


_ROUNDING = 1e-6
"""Pixels of the image; what overlaps it less is beside it but for the rounding of borders."""


@dataclass(frozen=True)
class Cell:
    """What one token stands for.

    Attributes:
        image: which image, from 0.
        box: pixels of the image as given, or None for a token that stands for none.
        row: row in its grid.
        column: column in its grid.
        tile: which tile; None for the image as a whole.
        frame: which frame of a video.
        name: what a token without pixels is: `cls`, `registers`, `newline`, `padding` of an image,
            `placeholder` of an image that cross attention reads, `latent` of a resampler, `unused`.
    """

    image: int
    box: Box | None = None
    row: int = 0
    column: int = 0
    tile: int | None = None
    frame: int = 0
    name: str = ""


@dataclass(frozen=True)
class Plane:
    """Pixels, and what they show.

    Attributes:
        size: width and height of the plane now.
        area: what the plane covers, in pixels of the image as given; reaches beyond it where the
            plane is padded.
        clip: the part of the image that is on the plane.
        image: which image.
        tile: which tile of it; None for the image as a whole.
    """

    size: Size
    area: Box
    clip: Box
    image: int = 0
    tile: int | None = None

    @classmethod
    def of(cls, size: Size, image: int = 0) -> "Plane":
        """A whole image as given."""
        whole = (0.0, 0.0, float(size[0]), float(size[1]))
        return cls(size, whole, whole, image)

    def resized(self, size: Size) -> "Plane":
        """Stretched to another width and height."""
        return replace(self, size=size)

    def cut(self, left: int, top: int, size: Size, *, tile: int | None = None) -> "Plane":
        """A window of the plane, in its own pixels; beyond its borders is padding."""
        x0, y0, x1, y1 = self.area
        wide, high = (x1 - x0) / self.size[0], (y1 - y0) / self.size[1]
        area = (
            x0 + left * wide, y0 + top * high,
            x0 + (left + size[0]) * wide, y0 + (top + size[1]) * high,
        )  # fmt: skip
        tile = self.tile if tile is None else tile
        return replace(self, size=size, area=area, clip=_common(self.clip, area), tile=tile)

    def cells(self, patch: int, *, merge: int = 1, frame: int = 0) -> list[Cell]:
        """One cell a patch, row by row; pixels that fill no whole patch are left out.

        Args:
            patch: side of a patch in pixels of the plane.
            merge: patches a side that become one token.
            frame: frame of a video.
        """
        x0, y0, x1, y1 = self.area
        columns, rows = (n // (patch * merge) for n in self.size)
        wide = (x1 - x0) / self.size[0] * patch * merge
        high = (y1 - y0) / self.size[1] * patch * merge
        out = []
        for row in range(rows):
            for column in range(columns):
                left, top = x0 + column * wide, y0 + row * high
                box = _common(self.clip, (left, top, left + wide, top + high))
                seen = min(box[2] - box[0], box[3] - box[1]) > _ROUNDING
                out.append(
                    Cell(
                        self.image, box if seen else None, row, column, self.tile, frame,
                        "" if seen else "padding",
                    )
                )  # fmt: skip
        return out


def _common(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


@dataclass(frozen=True)
class Settings:
    """How a processor is set.

    Attributes:
        image_processor: the part of it that prepares images.
        given: settings with which the whole processor calls that part.
    """

    image_processor: Any
    given: Mapping[str, Any]

    @classmethod
    def of(cls, processor: Any) -> "Settings":
        """Settings of a processor, or of an image processor by itself."""
        inner = getattr(processor, "image_processor", None)
        return cls(inner if inner is not None else processor, _given(processor))

    def __call__(self, name: str) -> Any:
        """One setting, or None."""
        value = self.given.get(name)
        return getattr(self.image_processor, name, None) if value is None else value

    @property
    def kind(self) -> str:
        """Class of the image processor, whatever library it computes with."""
        name = type(self.image_processor).__name__
        return name.removesuffix("Pil").removesuffix("Fast")

    def require(self, *kinds: str) -> None:
        """Refuse an image processor whose rules are not known.

        Raises:
            UnsupportedModelError: it is none of `kinds`.
        """
        if self.kind not in kinds:
            raise UnsupportedModelError(
                f"which pixels {self.kind} shows the model is not known; known here: "
                f"{', '.join(kinds)}",
                hint="pass what it returns to prompt_from_tensors without sizes: boxes are then in "
                "pixels of pixel_values",
            )


def _given(processor: Any) -> Mapping[str, Any]:
    given = getattr(processor, "images_kwargs", None)
    if isinstance(given, Mapping):
        return given
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    found = defaults.get("images_kwargs", {}) if isinstance(defaults, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def side(size: Any, name: str) -> int | None:
    """One entry of a size such as {"height": 224, "width": 224}."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)


STANDARD = (
    "CLIPImageProcessor",
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "BeitImageProcessor",
    "BitImageProcessor",
    "SiglipImageProcessor",
    "DINOv3ViTImageProcessor",
)
"""Image processors that resize, crop around the centre, and do nothing else to the geometry."""


def prepared(plane: Plane, settings: Settings) -> Plane:
    """An image as a standard image processor prepares it: resized, then cropped.

    Raises:
        UnsupportedModelError: the image processor is not one of `STANDARD`.
    """
    settings.require(*STANDARD, "LlavaImageProcessor")
    if settings.kind == "LlavaImageProcessor" and settings("do_pad"):
        plane = squared(plane)
    return resized_and_cropped(plane, settings)


def resized_and_cropped(plane: Plane, settings: Settings) -> Plane:
    """Resized and cropped around the centre, as far as the settings say so."""
    if settings("do_resize"):
        plane = plane.resized(_resized(plane.size, settings("size")))
    if settings("do_center_crop"):
        crop = settings("crop_size")
        width, height = side(crop, "width"), side(crop, "height")
        if width is None or height is None:
            raise InputError(f"crop_size must have a height and a width; got {crop}")
        backend = getattr(settings.image_processor, "backend", None)
        left = _offset(plane.size[0], width, backend)
        top = _offset(plane.size[1], height, backend)
        plane = plane.cut(left, top, (width, height))
    return plane


def squared(plane: Plane) -> Plane:
    """Padded to a square with the image in the middle."""
    width, height = plane.size
    most = max(plane.size)
    return plane.cut(-((most - width) // 2), -((most - height) // 2), (most, most))


def _offset(size: int, crop: int, backend: str | None) -> int:
    """Where a centre crop begins; the libraries pad odd differences on different sides."""
    if crop > size and backend == "torchvision":
        return -((crop - size) // 2)
    return (size - crop) // 2


def _resized(size: Size, target: Any) -> Size:
    width, height = size
    shortest, longest = side(target, "shortest_edge"), side(target, "longest_edge")
    wide, high = side(target, "width"), side(target, "height")
    if shortest is not None and longest is None:
        short, long = min(size), max(size)
        other = int(shortest * long / short)
        return (shortest, other) if width <= height else (other, shortest)
    if shortest is None and longest is None and wide is not None and high is not None:
        return wide, high
    raise UnsupportedModelError(
        f"a size must be a shortest edge, or a height and a width; the processor has {target}"
    )
