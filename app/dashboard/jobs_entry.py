"""One job: what readers see of it, and what its thread knows of it."""

import contextlib
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.dashboard.joblog import Log
from app.dashboard.jobs_interrupt import Interrupt

QUEUED, RUNNING = "queued", "running"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"


@dataclass(frozen=True)
class Job:
    """A job at one moment.

    Attributes:
        id: letters and digits; for addresses.
        title: what people call it.
        argv: the arguments after the program's name.
        command: the command line that gives the same in a terminal.
        status: `queued`, `running`, `done`, `failed` or `cancelled`.
        done: how much is finished, in `unit`; of the stage that runs.
        total: how much there is; None while that is not known.
        unit: what is counted: tokens, heads, runs, …; empty before anything is.
        eta_s: seconds left in this stage; None while that cannot be said.
        created: when it was submitted, in seconds since 1970; so `started` and `finished`.
        started: when it began, or None.
        finished: when it ended, or None.
        log: what it said, and the first rows of what it answered.
        error: why it failed, in one line, or None.
        hint: what to do about that, or None.
        run: its run: a path below the folder of all runs, from when the run begins; None if it has
            none. Only that of a job that is `done` is complete.
        peak_rss: most memory of the process while it ran, in bytes; 0 if that is not known.
        cancelling: whether it is about to end because it was asked to.
        code: exit code of the command, see `app.exits`; 1 is done, and the answer is no.
    """

    id: str
    title: str
    argv: tuple[str, ...]
    command: str
    status: str
    done: int
    total: int | None
    unit: str
    eta_s: float | None
    created: float
    started: float | None
    finished: float | None
    log: tuple[str, ...]
    error: str | None
    hint: str | None
    run: str | None
    peak_rss: int
    cancelling: bool
    code: int | None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON holds it."""
        return asdict(self) | {"argv": list(self.argv), "log": list(self.log)}


class Entry:
    """A job as it changes; written by its thread, and by others only under the queue's lock."""

    def __init__(self, argv: tuple[str, ...], title: str, root: Path) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.argv, self.title, self.root = argv, title, root
        self.status = QUEUED
        self.cancelling = False
        self.log = Log()
        self.created = time.time()
        self.started: float | None = None
        self.finished: float | None = None
        self.error: str | None = None
        self.hint: str | None = None
        self.folder: Path | None = None
        self.peak = 0
        self.code: int | None = None
        self._stage = _Stage("", 0, 0, None, time.monotonic(), time.monotonic())

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status not in (QUEUED, RUNNING)

    def begin(self, unit: str, done: int, total: int | None) -> None:
        """A stage of the work begins."""
        now = time.monotonic()
        self._stage = _Stage(unit, done, done, total, now, now)

    def step(self, done: int, total: int) -> None:
        """The stage is this far."""
        old = self._stage
        self._stage = _Stage(old.unit, old.first, done, total, old.start, time.monotonic())

    def snapshot(self) -> Job:
        """The job as it is now."""
        stage = self._stage  # replaced as a whole, never changed
        return Job(
            self.id, self.title, self.argv, shlex.join(["headscope", *self.argv]), self.status,
            stage.done, stage.total, stage.unit,
            stage.left() if self.status == RUNNING else None,
            self.created, self.started, self.finished, self.log.lines, self.error, self.hint,
            self._run(), self.peak, self.cancelling and self.status == RUNNING, self.code,
        )  # fmt: skip

    def _run(self) -> str | None:
        folder, root = self.folder, self.root.resolve()
        if folder is None or not (folder / "run.json").exists():
            return None
        place = folder.resolve()
        return place.relative_to(root).as_posix() if root in place.parents else None


@dataclass(frozen=True)
class _Stage:
    unit: str
    first: int
    done: int
    total: int | None
    start: float
    last: float

    def left(self) -> float | None:
        """Seconds left, from the speed so far."""
        if self.total is None or self.done <= self.first:
            return None
        each = (self.last - self.start) / (self.done - self.first)
        return max(0.0, each * (self.total - self.done) - (time.monotonic() - self.last))


class Watch:
    """The `app.reporter.Reporter` of a job; used by its thread alone."""

    def __init__(self, entry: Entry, interrupt: Interrupt) -> None:
        self._entry = entry
        self._interrupt = interrupt

    def begin(self, unit: str, done: int, total: int | None) -> Callable[[int, int], None]:
        """See `app.reporter.Reporter`."""
        self._stop()
        self._entry.begin(unit, done, total)
        return self._step

    def opening(self, folder: Path) -> None:
        """See `app.reporter.Reporter`."""
        self._entry.folder = folder

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """See `app.reporter.Reporter`."""
        return self._entry.log.aside()

    def _step(self, done: int, total: int) -> None:
        self._entry.step(done, total)
        self._stop()

    def _stop(self) -> None:
        # Library code may swallow an interrupt, in a destructor or a bare `except`: asked again.
        if self._entry.cancelling:
            self._interrupt.check()


class Call:
    """A function that waits for its turn on the worker."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self.begun = False
        self.ended = threading.Event()

    def run(self) -> None:
        """Call it; for the worker."""
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._error = error
        finally:
            self.ended.set()

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


def reset_peak() -> None:
    """Let the peak of memory begin anew, where the system can do so (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most memory that the process has had, in bytes; 0 if that is not known."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most * (1 if sys.platform == "darwin" else 1024))


def strike(interrupt: Interrupt, name: str) -> None:
    """Interrupt the function of this name as soon as that is safe; returns at once."""
    threading.Thread(
        target=partial(_until_struck, interrupt, name), name="headscope-cancel", daemon=True
    ).start()


def _until_struck(interrupt: Interrupt, name: str) -> None:
    while not interrupt.strike(name):
        time.sleep(0.005)
