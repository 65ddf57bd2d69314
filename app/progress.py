"""Progress on stderr: a bar with the time left on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from app.exits import say
from app.reporter import counted

EVERY = 10.0
"""Seconds between two lines where there is no terminal; a short run prints none."""


@contextlib.contextmanager
def progress(
    total: int, done: int = 0, *, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A callback for `heads.scoring.execute` that shows how far it is.

    Args:
        total: tokens in all.
        done: tokens of batches that an earlier run has finished; they tell nothing of the speed.
        quiet: show nothing.
    """
    told = counted("tokens", done, total)
    if told is not None:
        yield told
    elif quiet:
        yield lambda now, all: None
    elif sys.stderr.isatty():
        with _bar(total, done) as update:
            yield update
    else:
        yield _Lines(done)


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("scoring"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, left"),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda now, all: bar.update(task, completed=max(now, done))


class _Lines:
    """A line every few seconds."""

    def __init__(self, done: int) -> None:
        self.first = done
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """See `heads.scoring.Progress`."""
        now = time.monotonic()
        if now - self.last < EVERY or done <= self.first or done >= total:
            return
        self.last = now
        left = (now - self.start) / (done - self.first) * (total - done)
        say(f"{done:,} of {total:,} tokens, about {seconds(left)} left")


def seconds(value: float) -> str:
    """A duration for people.

    >>> seconds(0.2), seconds(75), seconds(7200)
    ('less than a second', '1 min 15 s', '2 h 0 min')
    """
    if value < 1:
        return "less than a second"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
