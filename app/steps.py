"""Progress of work that is counted in steps: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from app.exits import say
from app.progress import EVERY, seconds
from app.reporter import aside, counted


@contextlib.contextmanager
def steps(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback for done and all; libraries that print do so on stderr meanwhile.

    Args:
        what: what is counted, such as `heads`.
        quiet: show nothing.
    """
    with aside():
        told = counted(what)
        if told is not None:
            yield told
        elif quiet:
            yield lambda done, total: None
        elif sys.stderr.isatty():
            with _bar(what) as update:
                yield update
        else:
            yield _Lines(what)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{what}, left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(file=sys.stderr), transient=True, redirect_stdout=False
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, what: str) -> None:
        self.what = what
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < EVERY or not 0 < done < total:
            return
        self.last = now
        left = (now - self.start) / done * (total - done)
        say(f"{done:,} of {total:,} {self.what}, about {seconds(left)} left")
