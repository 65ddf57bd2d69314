"""Images of coloured tiles, one a patch of the model: places without meaning, contents that match.

What a head of a vision tower looks at in them is a matter of place or of colour, and each image has
its own colours. The tower's patch grid comes from the configuration.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from interp.errors import InputError, UnsupportedModelError
from interp.prompts import Prompt
from interp.tasks import TASKS, Task

if TYPE_CHECKING:
    from interp.model import Model


@TASKS.register("tiles")
@dataclass(frozen=True)
class Tiles(Task):
    """Random tiles of a few colours, others in each image.

    Attributes:
        colours: how many colours an image has, of the eight corners of the colour cube.
        side: tile side in pixels; 0 for that of the model's patches.
        rows: rows of tiles; 0 for as many as the model has.
        columns: columns of tiles; 0 for as many as the model has.
        text: what a model that reads text is given beside the image.
    """

    colours: int = 4
    side: int = 0
    rows: int = 0
    columns: int = 0
    text: str = "describe the image ."

    summary: ClassVar[str] = "coloured tiles, one a patch (heads of vision towers)"
    spans: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if not 2 <= self.colours <= 8:
            raise InputError(f"tiles:colours must lie in 2..8; got {self.colours}")
        if min(self.side, self.rows, self.columns) < 0:
            raise InputError(
                f"tiles:side, rows and columns must not be negative; got {self.side}, "
                f"{self.rows} and {self.columns}"
            )

    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> list[Prompt]:
        """See `Task.prompts`.

        Raises:
            InputError: the model reads no images.
            UnsupportedModelError: it does not say how large its images and patches are.
        """
        from interp.images import image_prompt

        side, rows, columns = self._grid(model)
        text = self.text if model.reads_tokens else None
        out = []
        for i in range(n):
            tiles = draw(random.Random(f"tiles/{seed}/{i}"), rows, columns, self.colours)
            out.append(image_prompt(model, text, [painted(tiles, side)], id=f"tiles-{seed}-{i}"))
        return out

    def _grid(self, model: "Model") -> tuple[int, int, int]:
        """Side, rows and columns of the tiles."""
        if self.side and self.rows and self.columns:
            return self.side, self.rows, self.columns
        config: Any = getattr(model.config, "vision_config", None) or model.config
        image, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        if image is None or patch is None:
            raise UnsupportedModelError(
                f"{model.name} does not say how large its images and patches are",
                hint="choose a model that reads images, or give the task side, rows and columns",
            )
        high, wide = _pair(image)
        side = self.side or _pair(patch)[0]
        return side, self.rows or high // side, self.columns or wide // side


def draw(rng: random.Random, rows: int, columns: int, colours: int) -> list[list[int]]:
    """Colours [row][column] as numbers: bit 4 is red, 2 green, 1 blue."""
    chosen = rng.sample(range(8), colours)
    return [[rng.choice(chosen) for _ in range(columns)] for _ in range(rows)]


def painted(tiles: Sequence[Sequence[int]], side: int) -> np.ndarray:
    """Tiles as an image [height, width, 3] of 8 bits."""
    index = np.asarray(tiles)[..., None] >> np.array([2, 1, 0])
    pixels: np.ndarray = ((index & 1) * 255).astype(np.uint8)
    return pixels.repeat(side, axis=0).repeat(side, axis=1)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[1])
