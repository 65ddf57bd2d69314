"""Which image tokens a model of each type makes of an image, and in which order.

`LAYOUTS` holds a function for each `model_type` of a Hugging Face configuration. Each file of
`interp.images.families` describes one family and registers itself; there is no other list. What a
function returns is checked against the prompt: as many tokens as the prompt has placeholders.

`TOWERS` says with which tokens the rows of a vision tower begin.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, UnsupportedModelError
from interp.images.patches import Windows
from interp.images.plane import Cell, Plane, Settings, Size
from interp.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One example as its model gets it.

    Attributes:
        config: configuration of the model.
        inputs: everything but the token ids, such as `pixel_values`.
        sizes: width and height of each image as given, then of each video; None if not known.
        settings: of the processor, if there is one.
    """

    config: Any
    inputs: "Mapping[str, Tensor]"
    sizes: tuple[Size, ...] | None
    settings: Settings | None

    @property
    def model_type(self) -> str:
        """What the configuration calls its model."""
        return str(self.config.model_type)

    def tensor(self, name: str) -> "Tensor":
        """One input.

        Raises:
            InputError: it is missing.
        """
        if name not in self.inputs:
            raise InputError(
                f"{self.model_type} needs {name!r}; the example has: "
                f"{', '.join(self.inputs) or 'none'}"
            )
        return self.inputs[name]

    def known_sizes(self) -> tuple[Size, ...]:
        """Sizes of the images.

        Raises:
            InputError: they are not known, and this model's tensors do not tell them.
        """
        if self.sizes is None:
            raise InputError(
                f"{self.model_type} cuts images into tiles by their size, which its tensors do not "
                "tell",
                hint="pass sizes=[(width, height), ...] of the images as they were",
            )
        return self.sizes

    def known_settings(self) -> Settings:
        """Settings of the processor.

        Raises:
            InputError: there is no processor.
        """
        if self.settings is None:
            raise InputError(
                f"what {self.model_type} was shown of an image is known to its processor alone",
                hint="pass processor=... to interp.load",
            )
        return self.settings


Rows = tuple[tuple[Cell, ...], ...]
"""What the tokens of each row of a tower stand for."""


@dataclass(frozen=True)
class Layout:
    """What each image token stands for.

    Attributes:
        sizes: width and height of each image, in whose pixels boxes are.
        text: id of a placeholder token, and what its tokens stand for in order; none for models
            whose text and images do not share a sequence.
        rows: what the tokens of each row of the vision tower stand for, in order.
        others: the same of other towers by name, of layers whose positions are not those of their
            tower by `TOWER/LAYER`, and of what a tower of cross attention reads by `TOWER/keys`.
        windows: how such layers cut their rows, by the same names.
    """

    sizes: tuple[Size, ...]
    text: tuple[tuple[int, tuple[Cell, ...]], ...]
    rows: Rows
    others: Mapping[str, Rows] = field(default_factory=dict)
    windows: Mapping[str, tuple[Windows, ...]] = field(default_factory=dict)


Reader = Callable[[Example], Layout]


@dataclass(frozen=True)
class Family:
    """Models whose images become tokens in the same way.

    Attributes:
        read: finds the layout of an example.
        around: what stands around a placeholder in a text.
        runs: whether a processor writes an image as a run of placeholders and nothing else.
    """

    read: Reader
    around: tuple[str, str] = ("", "")
    runs: bool = False


LAYOUTS: Registry[Family] = Registry("image layout", "interp.images.families")
TOWERS: Registry[Callable[[Any], tuple[str, ...]]] = Registry(
    "vision tower", "interp.images.families"
)
"""Type of a vision model to the names of the tokens before its patches."""


def layout(
    *types: str, around: tuple[str, str] = ("", ""), runs: bool = False
) -> Callable[[Reader], Reader]:
    """Decorator that registers a function for some model types."""

    def enter(read: Reader) -> Reader:
        for name in types:
            LAYOUTS.register(name)(Family(read, around, runs))
        return read

    return enter


def family_of(config: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: which pixels its tokens stand for is not known.
    """
    name = str(getattr(config, "model_type", "") or type(config).__name__)
    if name not in LAYOUTS:
        raise UnsupportedModelError(
            f"which pixels each image token of model type {name!r} stands for is not known; known: "
            f"{', '.join(LAYOUTS)}",
            hint="a file in interp/images/families describes a model type",
        )
    return LAYOUTS[name]


def row_of(plane: Plane, config: Any) -> tuple[Cell, ...]:
    """The tokens of one row of a plain vision tower: those before the patches, then the patches.

    Args:
        plane: the pixels it reads.
        config: configuration of the tower.

    Raises:
        UnsupportedModelError: the tower's type is not known.
    """
    name = str(config.model_type)
    if name not in TOWERS:
        raise UnsupportedModelError(
            f"with which tokens a vision tower of type {name!r} begins is not known; known: "
            f"{', '.join(TOWERS)}",
            hint="a file in interp/images/families describes a tower",
        )
    before = [Cell(plane.image, tile=plane.tile, name=x) for x in TOWERS[name](config)]
    return (*before, *plane.cells(patch_side(config)))


def patch_side(config: Any) -> int:
    """Side of a tower's patches in pixels.

    Raises:
        UnsupportedModelError: they are not square.
    """
    patch = config.patch_size
    sides = set(patch) if isinstance(patch, list | tuple) else {patch}
    if len(sides) != 1:
        raise UnsupportedModelError(f"patches must be square; {config.model_type} has {patch}")
    return int(sides.pop())


def fitted(plane: Plane, pixels: "Tensor") -> Plane:
    """The plane, if the tensor has its size.

    Args:
        plane: what the processor's settings make of an image.
        pixels: [..., height, width].

    Raises:
        InputError: it has another.
    """
    height, width = pixels.shape[-2:]
    if plane.size != (width, height):
        raise InputError(
            f"the processor makes {plane.size[0]} x {plane.size[1]} pixels of an image; "
            f"pixel_values has {width} x {height}",
            hint="give the sizes and the processor with which the tensors were made",
        )
    return plane


def shown(example: Example, prepare: Callable[[Plane, Settings], Plane]) -> list[Plane]:
    """Planes of images that each fill one row of `pixel_values`.

    Without sizes, an image is taken to be what `pixel_values` holds, and boxes are in its pixels.

    Raises:
        InputError: the number of images or their sizes do not fit `pixel_values`.
    """
    pixels = example.tensor("pixel_values")
    if pixels.dim() != 4:
        raise InputError(
            f"pixel_values of {example.model_type} must be [image, channel, height, width]; got "
            f"{list(pixels.shape)}"
        )
    if example.sizes is None:
        size = (pixels.shape[-1], pixels.shape[-2])
        return [Plane.of(size, i) for i in range(len(pixels))]
    if len(example.sizes) != len(pixels):
        raise InputError(f"there are {len(pixels)} images; got {len(example.sizes)} sizes")
    settings = example.known_settings()
    planes = [prepare(Plane.of(size, i), settings) for i, size in enumerate(example.sizes)]
    return [fitted(plane, pixels) for plane in planes]
