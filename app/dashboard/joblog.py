"""What a job says: its thread's stdout and stderr, kept as lines instead of printed.

`Streams` stands over `sys.stdout` and `sys.stderr` and looks at each write whose thread it comes
from: one that holds a log (a ContextVar) writes there, every other prints as before.
"""

import contextlib
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

LINES = 200
"""Most lines of a log."""
_ANSWER = 100  # lines of stdout: the answer, whose first rows matter most
_WIDTH = 2000
_NAMES = ("stdout", "stderr")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LABELS = ("error: ", "internal error: ")
_HINT = "hint: "


class Log:
    """The lines of one job, written by its thread and read by any.

    The last lines of stderr are kept, and the first of stdout: a table of scores must not push out
    what was said about it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: deque[tuple[int, str]] = deque(maxlen=LINES - _ANSWER - 1)
        self._answer: list[tuple[int, str]] = []
        self._count = self._left = self._aside = 0
        self._open = dict.fromkeys(_NAMES, "")

    def write(self, stream: str, text: str) -> int:
        """Take text of `stdout` or `stderr`; a line counts once it ends."""
        with self._lock:
            stream = "stderr" if self._aside else stream
            *lines, rest = (self._open[stream] + text).split("\n")
            # Of a bar that is drawn over itself only the last state is of use.
            self._open[stream] = rest.rpartition("\r")[2][-_WIDTH:] if "\r" in rest[:-1] else rest
            for line in lines:
                self._add(stream, line)
        return len(text)

    def end(self) -> None:
        """Take what is left of lines that never ended."""
        with self._lock:
            for stream, rest in self._open.items():
                if rest:
                    self._add(stream, rest)
                self._open[stream] = ""

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it what comes from stdout counts as stderr."""
        with self._lock:
            self._aside += 1
        try:
            yield
        finally:
            with self._lock:
                self._aside -= 1

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines in the order in which they were written, `LINES` at most."""
        with self._lock:
            kept = [line for _, line in sorted([*self._answer, *self._said])]
            more = [f"… {self._left} more lines of the answer"] if self._left else []
        return (*kept, *more)

    def verdict(self) -> tuple[str | None, str | None]:
        """The error that was said last and the hint below it, as `app.exits.say` writes them."""
        with self._lock:
            said = [line for _, line in self._said]
        for i in range(len(said) - 1, -1, -1):
            if said[i].startswith(_LABELS):
                below = said[i + 1] if i + 1 < len(said) else ""
                hint = below.removeprefix(_HINT) if below.startswith(_HINT) else None
                return said[i].removeprefix(_LABELS[0]), hint
        return None, None

    def _add(self, stream: str, line: str) -> None:
        text = _ESCAPES.sub("", line.rstrip("\r")).rpartition("\r")[2]
        text = _CONTROL.sub("", text)[:_WIDTH]
        self._count += 1
        if stream == "stderr":
            self._said.append((self._count, text))
        elif len(self._answer) < _ANSWER:
            self._answer.append((self._count, text))
        else:
            self._left += 1


_LOG: ContextVar[Log | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def logged(log: Log) -> Iterator[None]:
    """Let a log take what this thread prints meanwhile, where `Streams` are open."""
    token = _LOG.set(log)
    try:
        yield
    finally:
        _LOG.reset(token)


class _Stream:
    """A stream that asks, at each write, whose it is."""

    def __init__(self, name: str, own: Any) -> None:
        self._name = name
        self._own = own

    @property
    def _printed(self) -> Any:
        # A library may keep this object for longer than the stream lives that it stood over.
        return getattr(sys, f"__{self._name}__") if getattr(self._own, "closed", 0) else self._own

    def write(self, text: str) -> int:
        log = _LOG.get()
        return int(self._printed.write(text) if log is None else log.write(self._name, text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if _LOG.get() is None:
            self._printed.flush()

    def isatty(self) -> bool:
        return _LOG.get() is None and bool(self._printed.isatty())

    @property
    def encoding(self) -> str:
        return "utf-8" if _LOG.get() is not None else self._printed.encoding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._printed, name)


class Streams:
    """Stands over `sys.stdout` and `sys.stderr` until it is closed."""

    def __init__(self) -> None:
        self._mine = {name: _Stream(name, getattr(sys, name)) for name in _NAMES}
        for name, stream in self._mine.items():
            setattr(sys, name, stream)

    def close(self) -> None:
        """Put back what was there; a stream that someone has set over ours is left alone."""
        for name, stream in self._mine.items():
            if getattr(sys, name) is stream:
                setattr(sys, name, stream._own)
