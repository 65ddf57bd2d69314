"""Numpy's products on one thread: those of a window are too small to be worth more.

Where another thread of the process computes, as a model does beside a server, the threads of a
BLAS wait for each other by spinning: a window then takes fifty times as long as on one thread.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

_LOCK = threading.Lock()
_STATE: dict[str, Any] = {"inside": 0, "limit": None}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let numpy multiply on one thread; the setting is the process's, so threads share it."""
    with _LOCK:
        if _STATE["inside"] == 0:
            _STATE["limit"] = _controller().limit(limits=1)
        _STATE["inside"] += 1
    try:
        yield
    finally:
        with _LOCK:
            _STATE["inside"] -= 1
            if _STATE["inside"] == 0:
                _STATE["limit"].restore_original_limits()


def _controller() -> ThreadpoolController:
    if "controller" not in _STATE:
        # That of torch is its own, and a model may be computing with it.
        _STATE["controller"] = ThreadpoolController().select(internal_api="openblas")
    return _STATE["controller"]
