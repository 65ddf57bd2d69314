"""Causal effects of heads: patch, ablate, attribute; see `patching.method`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patching.engine import head_effects as head_effects
    from patching.engine import head_position_effects as head_position_effects
    from patching.method import METHODS as METHODS
    from patching.method import make_method as make_method
    from patching.pairs import Pairs as Pairs

_HOMES = {
    "METHODS": "patching.method",
    "Pairs": "patching.pairs",
    "head_effects": "patching.engine",
    "head_position_effects": "patching.engine",
    "make_method": "patching.method",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'patching' has no attribute {name!r}")
