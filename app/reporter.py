"""Who is told how far a command is, and where its run lies, when that is not a person on stderr.

A command that runs inside a server is watched by a job instead of a terminal. The job is held in a
ContextVar: only code of its own thread meets it, and a command line on a terminal meets none.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol


class Reporter(Protocol):
    """What watches a command."""

    def begin(self, unit: str, done: int, total: int | None) -> Callable[[int, int], None]:
        """Work that is counted begins; what comes back is called with done and all.

        Args:
            unit: what is counted, such as `tokens`.
            done: what an earlier run has finished; it tells nothing of the speed.
            total: all, if that is known.
        """
        ...

    def opening(self, folder: Path) -> None:
        """The run of the command lies in this folder; told before the folder is made."""
        ...

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Within it what the thread prints on stdout counts as said on stderr."""
        ...


_CURRENT: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextlib.contextmanager
def reporting(to: Reporter) -> Iterator[None]:
    """Let a reporter watch the commands that this thread runs meanwhile."""
    token = _CURRENT.set(to)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def counted(
    unit: str, done: int = 0, total: int | None = None
) -> Callable[[int, int], None] | None:
    """The callback for progress of the reporter; None if people are told, on stderr."""
    to = _CURRENT.get()
    return None if to is None else to.begin(unit, done, total)


def opening(folder: Path) -> None:
    """Tell the reporter, if there is one, where the run lies that is about to be opened."""
    to = _CURRENT.get()
    if to is not None:
        to.opening(folder)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Whatever libraries print on stdout goes to stderr meanwhile."""
    to = _CURRENT.get()
    # Another stdout is one for the whole process: a watched thread must not set it for the others.
    with contextlib.redirect_stdout(sys.stderr) if to is None else to.aside():
        yield
