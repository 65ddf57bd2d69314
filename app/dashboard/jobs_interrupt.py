"""Ctrl-C for one thread: a KeyboardInterrupt inside a function that a worker runs, never outside.

Python can raise an exception in another thread, at that thread's next step. Three rules make this
safe for a thread that lives on:

    inside    it strikes only while the guarded function runs; one that comes late is taken back
              or caught before the worker goes on
    once      it strikes at most once a run, so that cleaning up is not interrupted again
    between   it waits while modules are imported or registered, contexts are entered or left, or
              locks are taken: cut there, hooks, locks or half a module would stay behind
"""

import ctypes
import logging
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import TypeVar

from interp import files, lock, registry

T = TypeVar("T")

_NAMES = frozenset({"__enter__", "__exit__", "__del__"})
_FILES = frozenset(str(m.__file__) for m in (logging, threading, registry, files, lock))
_IMPORTS = "<frozen importlib"


class Interrupt:
    """Runs functions of one thread so that others can interrupt them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: str | None = None
        self._thread = 0
        self._struck = False

    def run(self, name: str, function: Callable[[], T]) -> T:
        """Run a function; `strike` with this name interrupts it.

        Raises:
            KeyboardInterrupt: it was interrupted; or whatever the function raises.
        """
        try:
            self._open(name)
            return self._inside(function)
        finally:
            self._close()  # should it strike in here, then it will not come again

    def strike(self, name: str) -> bool:
        """Interrupt the function of this name; for other threads.

        Returns:
            False if that must wait, so that the caller tries again; True if it is done, or the
            function has ended.
        """
        with self._lock:
            if self._running != name or self._struck:
                return True
            if not _between(self._thread, Interrupt._inside.__code__):
                return False
            self._raise(ctypes.py_object(KeyboardInterrupt))
            self._struck = True
            return True

    def check(self) -> None:
        """Interrupt the function from within; for its own thread, where a strike was swallowed.

        Raises:
            KeyboardInterrupt: always.
        """
        with self._lock:
            self._raise(None)
            self._struck = True
        raise KeyboardInterrupt

    def _inside(self, function: Callable[[], T]) -> T:
        return function()

    def _open(self, name: str) -> None:
        with self._lock:
            self._running, self._thread, self._struck = name, threading.get_ident(), False

    def _close(self) -> None:
        with self._lock:
            if self._running is not None:
                self._raise(None)
                self._running = None

    def _raise(self, error: "ctypes.py_object[type[BaseException]] | None") -> None:
        """Set the exception that the thread raises next; None takes one back."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), error)


def _between(thread: int, inside: CodeType) -> bool:
    """Whether a thread is in the guarded function, and at no place that must not be cut.

    Both this and the strike that follows take far less than the time after which Python lets
    another thread go on, so that what is seen here still holds.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code is inside:
            return True
        if (
            code.co_name in _NAMES
            or code.co_filename in _FILES
            or code.co_filename.startswith(_IMPORTS)
        ):
            return False
        frame = frame.f_back
    return False
