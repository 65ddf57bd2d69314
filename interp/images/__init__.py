"""Images as spans: where on an image each token looks; see `interp.images.patches`."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from interp.images.patches import Patch as Patch
    from interp.images.patches import PatchMap as PatchMap

_HOMES = {"Patch": "interp.images.patches", "PatchMap": "interp.images.patches"}
__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
