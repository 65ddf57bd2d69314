"""Images as spans: where on an image each token looks; see `interp.images.patches`."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from interp.images.files import open_image as open_image
    from interp.images.patches import Patch as Patch
    from interp.images.patches import PatchMap as PatchMap
    from interp.images.prompt import image_prompt as image_prompt
    from interp.images.prompt import prompt_from_tensors as prompt_from_tensors

_HOMES = {
    "Patch": "interp.images.patches",
    "PatchMap": "interp.images.patches",
    "image_prompt": "interp.images.prompt",
    "open_image": "interp.images.files",
    "prompt_from_tensors": "interp.images.prompt",
}
__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
