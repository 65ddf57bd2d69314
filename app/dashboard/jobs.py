"""The job queue: command lines that run in this process, one after another, on one thread.

A job is a headscope command line and its result is the run which that command saves, so the same
line in a terminal gives the same run. The thread holds the models, so that the next job on the
same model does not load it again. The table of jobs lives in memory; what they computed is on the
disk, batch by batch, whatever becomes of the process.
"""

import contextlib
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from app import exits
from app.dashboard.joblog import Log, Streams, logged
from app.dashboard.jobs_entry import (
    CANCELLED,
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    Call,
    Entry,
    Job,
    Watch,
    peak,
    reset_peak,
    strike,
)
from app.dashboard.jobs_interrupt import Interrupt
from app.dashboard.jobs_line import check_line
from app.dashboard.jobs_models import Models, collect
from app.exits import UsageError
from app.folders import within
from app.loading import Source, cached
from app.reporter import reporting
from interp.errors import InterpError, UnknownNameError

if TYPE_CHECKING:
    from interp.model import Model

__all__ = ["BusyError", "Job", "Jobs"]

T = TypeVar("T")


class BusyError(InterpError):
    """The worker has no time for a short question."""


class Jobs:
    """The queue and its worker; open until `close`, also as a context manager.

    Meanwhile `sys.stdout` and `sys.stderr` are streams that give what the worker prints to the log
    of its job, and print what other threads print.

    Args:
        root: folder of all runs; made when the first run is.
        limit: jobs that are remembered; those that ended first are forgotten first.
        models: models that are held; the one not used for longest is dropped for another.
    """

    def __init__(self, root: Path, *, limit: int = 50, models: int = 1) -> None:
        if min(limit, models) < 1:
            raise ValueError(f"limit and models must be at least 1; got {limit} and {models}")
        self.root = root
        self._limit = limit
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._queue: deque[Entry] = deque()
        self._calls: deque[Call] = deque()
        self._running: Entry | None = None
        self._closed = False
        self._wake = threading.Condition()
        self._interrupt = Interrupt()
        self._models = Models(models)
        self._streams = Streams()
        self._thread = threading.Thread(target=self._work, name="headscope-jobs", daemon=True)
        self._thread.start()

    def submit(self, argv: Sequence[str], title: str = "") -> Job:
        """Queue a command line.

        Args:
            argv: the arguments after the program's name, such as `["rank", "retrieval"]`.
            title: what people call it.

        Raises:
            UsageError: it cannot run as a job, see `jobs_line`; too many jobs wait; or the queue is
                closed.
        """
        line = tuple(argv)
        check_line(line, self.root)
        entry = Entry(line, title, self.root)
        with self._wake:
            self._must_be_open()
            self._forget()
            self._entries[entry.id] = entry
            self._queue.append(entry)
            self._wake.notify_all()
            return entry.snapshot()

    def cancel(self, id: str) -> Job:
        """Take a job out of the queue, or interrupt it as Ctrl-C does; no matter if it has ended.

        An interrupted job ends soon after: see its status. What it has finished is kept, and the
        same command goes on from there.

        Raises:
            UnknownNameError: no such job.
        """
        with self._wake:
            entry = self._entry(id)
            if entry.status == QUEUED:
                self._queue.remove(entry)
                entry.status, entry.finished = CANCELLED, time.time()
            elif entry.status == RUNNING and not entry.cancelling:
                entry.cancelling = True
                strike(self._interrupt, entry.id)
            return entry.snapshot()

    def get(self, id: str) -> Job:
        """A job as it is now.

        Raises:
            UnknownNameError: no such job.
        """
        with self._wake:
            return self._entry(id).snapshot()

    def list(self) -> tuple[Job, ...]:
        """The jobs, newest first."""
        with self._wake:
            return tuple(entry.snapshot() for entry in reversed(self._entries.values()))

    def call(self, function: Callable[[], T], timeout: float = 10.0) -> T:
        """Run a short function on the worker, before the jobs that wait.

        Args:
            function: may use `model`; must leave the model as it is.
            timeout: seconds to wait for its turn and its value.

        Returns:
            What the function returns; what it raises is raised.

        Raises:
            BusyError: no value in this time, most likely because a job runs.
            UsageError: the queue is closed.
        """
        call = Call(function)
        with self._wake:
            self._must_be_open()
            self._calls.append(call)
            self._wake.notify_all()
        if call.ended.wait(timeout):
            return cast(T, call.result())
        with self._wake:
            with contextlib.suppress(ValueError):
                self._calls.remove(call)
            running = self._running
        if call.ended.is_set():
            return cast(T, call.result())
        if running is None:
            raise BusyError(f"the model gave no answer within {timeout:g} s", hint="try again")
        what = running.title or running.argv[0]
        raise BusyError(
            f"the model is busy: {what} is running; waited {timeout:g} s",
            hint="wait for the job, or cancel it",
        )

    def model(self, source: Source) -> "Model":
        """The model of a source, held for the next job; only in functions of `call`.

        Raises:
            ModelError: it cannot be loaded.
            RuntimeError: asked from another thread.
        """
        if threading.current_thread() is not self._thread:
            raise RuntimeError("a model belongs to the worker: ask for it in a function of `call`")
        return source.load(quiet=True)

    def close(self, timeout: float = 60.0) -> None:
        """Cancel what runs and waits, end the worker, and give the streams back.

        Args:
            timeout: seconds to wait for the job that runs.
        """
        with self._wake:
            self._closed = True
            for id in [e.id for e in self._entries.values() if not e.over]:
                self.cancel(id)
            self._wake.notify_all()
        self._thread.join(timeout)
        self._streams.close()

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _entry(self, id: str) -> Entry:
        if id not in self._entries:
            raise UnknownNameError("job", id, self._entries)
        return self._entries[id]

    def _must_be_open(self) -> None:
        if self._closed:
            raise UsageError("the job queue is closed: the server is about to end")

    def _forget(self) -> None:
        """Make room in the table for one more."""
        over = [id for id, entry in self._entries.items() if entry.over]
        if len(self._entries) - len(over) >= self._limit:
            raise UsageError(
                f"at most {self._limit} jobs may wait", hint="wait for some, or cancel some"
            )
        for id in over[: len(self._entries) + 1 - self._limit]:
            del self._entries[id]

    def _work(self) -> None:
        with within(self.root), cached(self._models):
            while (task := self._next()) is not None:
                if isinstance(task, Call):
                    with logged(Log()):
                        task.run()
                    self._models.settle()
                else:
                    self._carry_out(task)
                    collect()
                del task  # its value may be large
            self._models.clear()

    def _next(self) -> Call | Entry | None:
        with self._wake:
            self._running = None
            while not (self._closed or self._calls or self._queue):
                self._wake.wait()
            if self._calls:
                return self._calls.popleft()
            if self._closed:
                return None
            entry = self._queue.popleft()
            entry.status, entry.started = RUNNING, time.time()
            self._running = entry
            return entry

    def _carry_out(self, entry: Entry) -> None:
        """Run a job to whatever end."""
        reset_peak()
        # Its own filters are put back even if the command was interrupted while it did so.
        with logged(entry.log), warnings.catch_warnings():
            try:
                with reporting(Watch(entry, self._interrupt)):
                    code = self._interrupt.run(entry.id, lambda: _main(entry.argv))
            except KeyboardInterrupt:
                code = exits.INTERRUPTED
            except BaseException as error:  # noqa: BLE001 - the worker outlives every job
                exits.explain(error)
                code = exits.code_of(error)
            _release(entry)
            for name in self._models.settle():
                exits.say(f"{name} was left changed and is loaded again when it is needed")
        entry.log.end()
        said, hint = entry.log.verdict()
        with self._wake:
            entry.peak, entry.code, entry.finished = peak(), code, time.time()
            entry.status = _STATUS.get(code, FAILED)
            if entry.status == FAILED:
                entry.error = said or f"the command ended with exit code {code}"
                entry.hint = hint
            self._running = None


_STATUS = {exits.OK: DONE, exits.FAILED: DONE, exits.INTERRUPTED: CANCELLED}


def _main(argv: tuple[str, ...]) -> int:
    from app.commands import main

    return main(list(argv))


def _release(entry: Entry) -> None:
    """Give the lock of a job's run back, should an interrupt have left it.

    For a command of its own process the end of the process does that; this one lives on, and no
    other thread of it writes runs.
    """
    from interp import lock

    if entry.folder is not None:
        lock.release(entry.folder / lock.NAME)
