"""The command line and the dashboard: the only place that reads arguments or draws a page."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from app.headview import show_head as show_head

_HOMES = {"show_head": "app.headview"}
__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
