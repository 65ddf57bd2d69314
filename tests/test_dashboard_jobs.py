"""Jobs of the dashboard: command lines on one worker thread, watched, cancelled, gone on with."""

import contextlib
import json
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_kit import AFTER, files, in_process, posix, process

from app import exits, loading, reporter
from app.cli import main
from app.dashboard import jobs as queue
from app.dashboard import jobs_interrupt
from app.dashboard.joblog import LINES, Log, Streams, logged
from app.dashboard.jobs import BusyError, Job, Jobs
from app.dashboard.jobs_entry import Entry
from app.dashboard.jobs_interrupt import Interrupt
from app.dashboard.jobs_models import Models, state_of
from app.exits import UsageError
from app.folders import base, within
from app.loading import Source
from interp import lock
from interp.errors import UnknownNameError
from interp.run import Run

MODEL = "zoo:planted-induction"
SOURCE = Source(MODEL)
RANK = ("rank", "induction", "-m", MODEL, "--n", "8", "--batch-size", "1")
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "served"


class Opened:
    """A queue opened when it is first asked: pytest sets streams of its own before a test."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, None

    def __getattr__(self, name: str) -> object:
        self._made = self._made or Jobs(self._root)
        return getattr(self._made, name)

    def end(self) -> None:
        if self._made is not None:
            self._made.close()


@pytest.fixture
def jobs(root) -> Iterator[Opened]:
    made = Opened(root)
    yield made
    made.end()


def until(condition: Callable[[], object]) -> None:
    """Wait for something that must come; how long it takes does not matter."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def ended(jobs: Jobs, job: Job) -> Job:
    until(lambda: jobs.get(job.id).finished)
    return jobs.get(job.id)


def did(jobs: Jobs, *argv: str) -> Job:
    return ended(jobs, jobs.submit(argv))


def scores(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in files(folder / "scores")}


def told(folder: Path) -> object:
    """What a run says, scores and facts, without the tables."""
    run = Run.load(folder)
    facts = run.part(0).meta if run.info.get("view") else None
    return run.info["key"], run.info.get("view"), facts


def in_terminal(*argv: str) -> Path:
    """The same command as a process of its own would run it: nothing held, runs in `plain/`."""
    before = set(Path("plain").glob("*"))
    with within(Path("plain")):
        assert main(list(argv)) == 0
    [folder] = set(Path("plain").glob("*")) - before
    return folder


def logits(jobs: Jobs) -> bytes:
    def work() -> bytes:
        import torch

        model = jobs.model(SOURCE)
        with torch.no_grad():
            return bytes(model.hf(input_ids=torch.arange(2, 18)[None]).logits.numpy().tobytes())

    return jobs.call(work, PATIENCE)


def labelled() -> None:
    """A file of labelled prompts."""
    lines = [
        {"tokens": [1, *range(20 + i, 32 + i)], "label": "ab"[i % 2], "group": f"g{i}"}
        for i in range(8)
    ]
    Path("labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Brake:
    """Stops `rank` before a batch until it is let go; an interrupt gets through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        from heads import scoring

        self.reached, self.free, self.seen = threading.Event(), threading.Event(), 0
        measure = scoring._measure

        def braked(*args: object) -> object:
            if self.seen == at:
                self.reached.set()
                while not self.free.is_set():
                    time.sleep(0.001)
            self.seen += 1
            return measure(*args)

        monkeypatch.setattr(scoring, "_measure", braked)

    def hit(self) -> None:
        assert self.reached.wait(PATIENCE)


@pytest.fixture
def brake(monkeypatch) -> Iterator[Brake]:
    made = Brake(monkeypatch, at=2)
    yield made
    made.free.set()


# ---- a job is a command line, its result the run


def test_a_job_gives_the_run_that_the_command_gives(jobs, root, monkeypatch) -> None:
    monkeypatch.setenv("HEADSCOPE_RUNS", "elsewhere")
    new = jobs.submit(RANK, "induction heads")
    assert (new.title, new.status in ("queued", "running"), new.code) == (
        "induction heads", True, None,
    )  # fmt: skip
    job = ended(jobs, new)
    assert (job.status, job.code, job.error, job.hint) == ("done", 0, None, None)
    assert shlex.split(job.command) == ["headscope", *RANK]
    assert job.unit == "tokens" and job.done == job.total > 0 and job.eta_s is None
    assert job.created <= job.started <= job.finished
    [folder] = root.iterdir()
    assert job.run == folder.name and not Path("elsewhere").exists() and not Path("runs").exists()
    plain = in_terminal(*RANK)
    assert plain.name == job.run
    assert scores(folder) == scores(plain) and len(scores(folder)) == 1
    assert Run.load(folder).info["command"] == job.command
    assert json.loads(json.dumps(job.to_json()))["log"] == list(job.log)


def test_what_is_answered_from_a_run_names_it(jobs) -> None:
    first, again = did(jobs, *RANK), did(jobs, *RANK)
    assert first.run == again.run is not None and "answered from" in " ".join(again.log)


@pytest.mark.parametrize(
    "argv",
    [
        ["probe", "--probe", "ridge", "-m", MODEL, "-p", "labelled.jsonl", "--folds", "2",
         "--draws", "0"],
        ["ablate", "-m", MODEL, "-t", "repeated-tokens", "--n", "2", "--heads", "L1"],
        ["patch", "-m", "zoo:planted-ioi", "--n", "2"],
        ["attribute", "atp", "-m", "zoo:planted-ioi", "--n", "2"],
        ["verdict", "induction", "-m", MODEL, "--n", "6", "--controls", "1", "--most", "1"],
        ["steer", "run", "-m", MODEL, "-t", "repeated-tokens", "--op", "zero", "--heads", "L1H0",
         "--n", "2", "--tokens", "2", "--windows", "2", "--controls", "1"],
        ["steer", "sweep", "-m", MODEL, "-t", "repeated-tokens", "--op", "scale", "--heads", "L1H0",
         "--n", "2", "--windows", "2", "--controls", "1", "--strengths", "0,1"],
    ],
    ids=lambda argv: "-".join(argv[:2]),
)  # fmt: skip
def test_a_held_model_answers_as_a_fresh_one(jobs, root, argv) -> None:
    # The model has been worked on by another command before, and is looked at after.
    labelled()
    model = argv[argv.index("-m") + 1]
    source = Source(model)
    before = jobs.call(lambda: state_of(jobs.model(source)), PATIENCE)
    did(jobs, "doctor", "-m", model)
    job = did(jobs, *argv)
    assert job.status == "done", job.log
    assert jobs.call(lambda: state_of(jobs.model(source)), PATIENCE) == before
    plain = in_terminal(*argv)
    assert job.run == plain.name and job.total == job.done > 0
    assert scores(root / job.run) == scores(plain) and told(root / job.run) == told(plain)


def test_a_job_may_write_a_recipe(jobs, root) -> None:
    labelled()
    line = ("steer", "fit", "mean-difference", "-m", MODEL, "-p", "labelled.jsonl", "--folds", "2",
            "--draws", "0", "--k", "2", "--out")  # fmt: skip
    job = did(jobs, *line, "served/made/a.safetensors")
    assert (job.status, job.run) == ("done", None), job.log
    assert main([*line, "b.safetensors"]) == 0
    made = root / "made" / "a.safetensors"
    assert made.read_bytes() == Path("b.safetensors").read_bytes()


@pytest.mark.slow
def test_models_are_held_and_the_one_used_last_stays(root, monkeypatch) -> None:
    loaded = []
    own = Source._load
    monkeypatch.setattr(
        Source, "_load", lambda self, **more: (loaded.append(self.name), own(self, **more))[1]
    )
    other = "zoo:planted-ioi"
    with Jobs(root) as jobs:
        for model in (MODEL, MODEL, other, MODEL):
            assert did(jobs, "doctor", "-m", model).status == "done"
        assert loaded == [MODEL, other, MODEL]
    loaded.clear()
    with Jobs(root, models=2) as jobs:
        for model in (MODEL, other, MODEL, "zoo:planted-sink", MODEL, other):
            assert did(jobs, "doctor", "-m", model).status == "done"
    assert loaded == [MODEL, other, "zoo:planted-sink", other]
    assert SOURCE.load() is not SOURCE.load()  # outside the worker nothing is held


def test_a_folder_of_other_weights_is_loaded_again(tmp_path) -> None:
    made = []

    def load() -> object:
        made.append(SOURCE.load())
        return made[-1]

    source = Source(str(tmp_path))
    models = Models(1)
    (tmp_path / "weights").write_text("a")
    assert models.get(source, load) is models.get(source, load)
    (tmp_path / "weights").write_text("ab")
    models.get(source, load)
    assert len(made) == 2


def test_a_model_that_was_changed_is_dropped(jobs) -> None:
    first = logits(jobs)

    def spoil() -> None:
        import torch

        with torch.no_grad():
            next(jobs.model(SOURCE).hf.parameters()).mul_(2)

    jobs.call(spoil, PATIENCE)
    assert logits(jobs) == first
    jobs.call(lambda: jobs.model(SOURCE).hf.register_forward_hook(lambda *_: None), PATIENCE)
    jobs.call(lambda: None, PATIENCE)
    assert not jobs.call(lambda: jobs.model(SOURCE).hf._forward_hooks, PATIENCE)


# ---- what may be a job


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "a job must be one of"),
        (["list", "zoo"], "a job must be one of"),
        (["show", "x"], "a job must be one of"),
        (["serve"], "a job must be one of"),
        (["steer"], "a job must be one of"),
        (["steer", "bake", "x", "--out", "served/x"], "a job must be one of"),
        (["--debug", "rank", "induction"], "a job must be one of"),
        (["rank", "induction", "--debug"], "--debug"),
        (["doctor", "--trust-remote-code"], "--trust-remote-code"),
        (["rank", "induction", "--prompts", "-"], "got -"),
        (["rank", "induction", "-p-"], "got -"),
        (["rank", "induction", "-qp", "./-"], "got -"),
        (["steer", "run", "-", "--prompt", "a"], "got -"),
        (["ablate", "--prompt", "a", "--image", "-"], "got -"),
        (["rank", "induction", "--out", "/etc/x"], "must lie in"),
        (["rank", "induction", "-o", "runs/x"], "must lie in"),
        (["rank", "induction", "-qoserved/../x"], "must lie in"),
        (["rank", "induction", "--out=served/link/x"], "must lie in"),
        (["rank", "induction", "--out", "served"], "must lie in"),
        (["steer", "fit", "iti", "--out", "served/run/run.json"], "folder of a run"),
        (["rank", "induction", "--n", "0"], "--n"),
        (["rank", "induction", "--nonsense"], "--nonsense"),
        (["rank"], "DETECTOR"),
        (["rank", "--help"], "a question about it"),
        (["rank", "indu\0ction"], "NUL"),
    ],
)
def test_other_command_lines_are_refused(jobs, root, capsys, argv, part) -> None:
    (root / "run").mkdir(parents=True)
    (root / "run" / "run.json").write_text("{}")
    (root / "link").symlink_to(root.parent)
    with pytest.raises(UsageError) as error:
        jobs.submit(argv)
    assert part.lower() in str(error.value).lower()
    assert jobs.list() == () and capsys.readouterr() == ("", "")


def test_out_inside_the_root_is_where_the_run_lies(jobs, root) -> None:
    job = did(jobs, *RANK, "--out", "served/mine/first")
    assert (job.status, job.run) == ("done", "mine/first")
    assert Run.load(root / "mine" / "first").status == "complete"


def test_jobs_run_in_order_and_old_ones_are_forgotten(root, brake) -> None:
    with Jobs(root, limit=2) as jobs:
        first = jobs.submit(RANK)
        brake.hit()
        second = jobs.submit(["doctor", "-m", MODEL])
        assert [j.id for j in jobs.list()] == [second.id, first.id]
        assert (jobs.get(first.id).status, jobs.get(second.id).status) == ("running", "queued")
        with pytest.raises(UsageError, match="at most 2 jobs"):
            jobs.submit(["doctor"])
        brake.free.set()
        a, b = ended(jobs, first), ended(jobs, second)
        assert a.finished <= b.started
        third = jobs.submit(["doctor", "-m", MODEL])
        assert [j.id for j in jobs.list()] == [third.id, second.id]
        with pytest.raises(UnknownNameError):
            jobs.get(first.id)


# ---- progress and the log


def test_progress_counts_what_is_left(jobs, brake) -> None:
    job = jobs.submit(RANK)
    brake.hit()
    now = jobs.get(job.id)
    assert 0 < now.done < now.total and now.unit == "tokens" and now.eta_s >= 0
    assert now.run is not None and now.finished is None
    jobs.cancel(job.id)
    kept = ended(jobs, job).done
    brake.free.set()
    brake.reached.clear()
    again = ended(jobs, jobs.submit(RANK))
    assert again.done == again.total > kept


def test_the_time_left_leaves_out_what_was_finished_before(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    entry = Entry(("doctor",), "", Path("r"))
    entry.status = "running"
    entry.begin("tokens", 500, 1000)
    assert entry.snapshot().eta_s is None
    clock[0] += 10
    entry.step(600, 1000)
    assert entry.snapshot().eta_s == pytest.approx(40)
    clock[0] += 5
    assert entry.snapshot().eta_s == pytest.approx(35)


def test_only_the_worker_is_logged(jobs, brake, capsys) -> None:
    job = jobs.submit([*RANK, "--format", "tsv"])
    brake.hit()  # the worker now sends its stdout aside
    print("of another thread")
    print("and its stderr", file=sys.stderr)
    seen = capsys.readouterr()
    assert seen == ("of another thread\n", "and its stderr\n")
    brake.free.set()
    log = ended(jobs, job).log
    assert capsys.readouterr() == ("", "")
    assert any(line.startswith("saved: ") for line in log)
    assert any(line.startswith("induction\tL") for line in log)
    assert not any("thread" in line for line in log)


def test_streams_are_given_back(root) -> None:
    before = sys.stdout, sys.stderr, base()
    with Jobs(root):
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr, base()) == before


def test_a_stream_set_over_ours_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    streams, mine = Streams(), object()
    sys.stdout = mine  # type: ignore[assignment]
    streams.close()
    assert sys.stdout is mine


def test_a_log_is_plain_text_of_few_lines() -> None:
    log = Log()
    log.write("stderr", "\x1b[1;31merror:\x1b[0m bad\x07 thing\nhint: mend it\n")
    log.write("stderr", "10%\r20%\r")
    log.write("stderr", "100%\nlast, without an end")
    assert log.lines == ("error: bad thing", "hint: mend it", "100%")
    log.end()
    assert log.lines[-1] == "last, without an end"
    assert log.verdict() == ("bad thing", "mend it")
    for i in range(500):
        log.write("stdout", f"row {i}\n")
        log.write("stderr", f"said {i}\n")
    assert len(log.lines) == LINES
    assert "row 0" in log.lines and "row 400" not in log.lines
    assert "said 499" in log.lines and "said 0" not in log.lines
    assert log.lines[-1].startswith("… 400 more")
    with log.aside():
        log.write("stdout", "of a library\n")
    assert "of a library" in log.lines


def test_streams_ask_whose_thread_writes(capsys) -> None:
    log, streams = Log(), Streams()
    try:
        with logged(log):
            print("mine")
            assert not sys.stdout.isatty()
            other = threading.Thread(target=print, args=["theirs"])
            other.start()
            other.join()
        print("printed")
    finally:
        streams.close()
    assert log.lines == ("mine",) and capsys.readouterr().out == "theirs\nprinted\n"


def test_without_a_job_progress_and_stdout_go_where_they_went(capsys) -> None:
    assert reporter.counted("tokens") is None
    with reporter.aside():
        print("of a library")
    assert capsys.readouterr() == ("", "of a library\n")


# ---- cancelling


def test_a_waiting_job_is_taken_out(jobs, brake) -> None:
    first, second = jobs.submit(RANK), jobs.submit(["doctor", "-m", MODEL])
    brake.hit()
    gone = jobs.cancel(second.id)
    assert (gone.status, gone.started, gone.code) == ("cancelled", None, None)
    brake.free.set()
    assert ended(jobs, first).status == "done"
    assert did(jobs, "doctor", "-m", MODEL).status == "done"  # and it was not run meanwhile
    assert jobs.cancel(second.id) == gone and jobs.cancel(first.id).status == "done"


def test_a_cancelled_job_goes_on_to_the_same_end(jobs, root, brake) -> None:
    clean = logits(jobs)
    held = jobs.call(lambda: jobs.model(SOURCE), PATIENCE)
    job = jobs.submit(RANK)
    brake.hit()
    assert jobs.cancel(job.id).cancelling
    stopped = ended(jobs, job)
    assert (stopped.status, stopped.code, stopped.error) == ("cancelled", 130, None)
    run = Run.load(root / stopped.run)
    assert run.status == "interrupted" and len(run.finished) == 2
    assert not lock.held(run.folder)
    assert logits(jobs) == clean
    assert jobs.call(lambda: jobs.model(SOURCE), PATIENCE) is held
    brake.free.set()
    seen = brake.seen
    again = did(jobs, *RANK)
    assert (again.status, again.run) == ("done", stopped.run)
    assert brake.seen - seen == 6  # of eight batches; two were kept
    assert "going on with" in " ".join(again.log)
    assert scores(root / again.run) == scores(in_terminal(*RANK))


@pytest.mark.slow
def test_jobs_cancelled_at_any_moment_leave_all_in_order(jobs, root) -> None:
    line = (*RANK[:-3], "40", *RANK[-2:])
    clean, states = logits(jobs), []
    for i in range(12):
        job = jobs.submit(line)
        until(lambda job=job: jobs.get(job.id).status != "queued")
        time.sleep(0.004 * i)
        jobs.cancel(job.id)
        done = ended(jobs, job)
        states.append(done.status)
        assert done.status in ("cancelled", "done"), done.log
        assert logits(jobs) == clean
    assert "cancelled" in states
    done = did(jobs, *line)
    assert done.status == "done", done.log
    assert scores(root / done.run) == scores(in_terminal(*line))
    assert jobs.call(lambda: threading.current_thread().name, PATIENCE) == "headscope-jobs"


def test_an_interrupt_that_a_library_swallows_comes_again(jobs, monkeypatch) -> None:
    from heads import scoring

    reached, measure, swallowed = threading.Event(), scoring._measure, []

    def deaf(*args: object) -> object:
        reached.set()
        end = time.monotonic() + PATIENCE
        try:
            while time.monotonic() < end:
                time.sleep(0.001)
        except BaseException as error:  # noqa: BLE001 - that is the point
            swallowed.append(type(error))
        return measure(*args)

    monkeypatch.setattr(scoring, "_measure", deaf)
    job = jobs.submit(RANK)
    assert reached.wait(PATIENCE)
    jobs.cancel(job.id)
    assert ended(jobs, job).status == "cancelled"
    assert swallowed == [KeyboardInterrupt]


def test_a_lock_that_an_interrupt_left_is_given_back(jobs, root, monkeypatch) -> None:
    own = Run.open_or_create

    def cut(*args: object) -> Run:
        own(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "open_or_create", cut)
        job = did(jobs, *RANK)
    assert job.status == "cancelled" and not lock.held(root / job.run)
    assert did(jobs, *RANK).status == "done"


def test_closing_cancels_what_runs_and_waits(root, brake) -> None:
    jobs = Jobs(root)
    first, second = jobs.submit(RANK), jobs.submit(["doctor"])
    brake.hit()
    jobs.close()
    assert jobs.get(first.id).status == jobs.get(second.id).status == "cancelled"
    assert not jobs._thread.is_alive()
    for ask in (lambda: jobs.submit(["doctor"]), lambda: jobs.call(lambda: 1)):
        with pytest.raises(UsageError, match="closed"):
            ask()


# ---- the interrupt itself


class Guarded:
    """A thread that runs functions under an `Interrupt`, one after another."""

    def __init__(
        self, work: Callable[[], object], times: int = 1, interrupt: Interrupt | None = None
    ) -> None:
        self.interrupt, self.ends, self.stray = interrupt or Interrupt(), [], []
        self._work, self._times = work, times
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            for i in range(self._times):
                try:
                    self.ends.append(self.interrupt.run(str(i), self._work))
                except KeyboardInterrupt:
                    self.ends.append("interrupted")
        except BaseException as error:  # noqa: BLE001 - none may come
            self.stray.append(error)


@pytest.mark.parametrize("aimed", [True, False])
def test_an_interrupt_never_leaves_its_function(aimed, monkeypatch) -> None:
    def work() -> int:
        return sum(i for i in range(3000 if aimed else 1))

    before = sys.getswitchinterval()
    if not aimed:  # it then also strikes while the function is entered and left
        monkeypatch.setattr(jobs_interrupt, "_between", lambda *_: True)
        sys.setswitchinterval(1e-6)
    try:
        guarded = _struck(work)
    finally:
        sys.setswitchinterval(before)
    assert guarded.stray == [] and len(guarded.ends) == 3000
    assert set(guarded.ends) <= {"interrupted", work()}


def _struck(work: Callable[[], int]) -> Guarded:
    guarded = Guarded(work, times=3000)
    while guarded.thread.is_alive():
        for i in range(len(guarded.ends), len(guarded.ends) + 2):
            guarded.interrupt.strike(str(i))
    guarded.thread.join()
    return guarded


def test_an_interrupt_for_what_has_ended_does_nothing() -> None:
    interrupt = Interrupt()
    assert interrupt.strike("0") is True
    guarded = Guarded(lambda: interrupt.strike("other"), times=2, interrupt=interrupt)
    guarded.thread.join()
    assert guarded.ends == [True, True] and guarded.stray == []
    assert interrupt.strike("1") is True


@pytest.mark.parametrize("place", ["enter", "exit", "generator", "import"])
def test_an_interrupt_waits_where_nothing_may_be_cut(place, tmp_path, monkeypatch) -> None:
    inside, free = threading.Event(), []

    def hold() -> None:
        inside.set()
        while not free:  # without a frame of `threading`, where it waits anyway
            time.sleep(0.001)

    class Context:
        def __enter__(self) -> None:
            if place == "enter":
                hold()

        def __exit__(self, *error: object) -> None:
            if place == "exit":
                hold()

    @contextlib.contextmanager
    def generated() -> Iterator[None]:
        try:
            yield
        finally:
            hold()

    finished = []

    def work() -> None:
        if place == "import":
            import held_import  # type: ignore[import-not-found]  # noqa: F401
        else:
            with generated() if place == "generator" else Context():
                pass
        finished.append(place)
        while True:
            time.sleep(0.001)

    (tmp_path / "held_import.py").write_text("import hold_here\nhold_here.hold()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "hold_here", type("M", (), {"hold": staticmethod(hold)}))
    guarded = Guarded(work)
    assert inside.wait(PATIENCE)
    time.sleep(0.01)
    at_once = guarded.interrupt.strike("0")
    free.append(True)
    until(lambda: guarded.interrupt.strike("0"))
    guarded.thread.join(PATIENCE)
    assert (at_once, finished, guarded.ends) == (False, [place], ["interrupted"])


# ---- failures


@pytest.mark.parametrize(
    ("error", "code", "said", "hint"),
    [
        (MemoryError("no"), exits.UNAVAILABLE, "do not fit into memory", "--batch-size"),
        (RuntimeError("odd"), exits.INTERNAL, "internal error: RuntimeError: odd", "--debug"),
        (GeneratorExit("odder"), exits.INTERNAL, "internal error: GeneratorExit: odder", "bug"),
    ],
)
def test_after_a_failure_the_next_job_runs(jobs, monkeypatch, error, code, said, hint) -> None:
    from heads import scoring

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "_measure", fail)
        job = did(jobs, *RANK)
    assert (job.status, job.code) == ("failed", code)
    assert said in job.error and hint in job.hint
    assert did(jobs, *RANK).status == "done"


def test_a_failure_says_what_the_command_says(jobs, capsys) -> None:
    line = ("rank", "induction", "-m", MODEL, "--prompts", "none.jsonl")
    job = did(jobs, *line)
    done = in_process(capsys)(*line)
    assert job.status == "failed" and job.code == done.code == 66 and job.run is None
    said = [f"error: {job.error}", *([f"hint: {job.hint}"] if job.hint else [])]
    assert done.err.splitlines() == said == list(job.log)


def test_an_answer_that_is_no_is_no_failure(jobs, monkeypatch) -> None:
    from interp.doctor import Report

    monkeypatch.setattr(Report, "ok", False)
    job = did(jobs, "doctor", "-m", MODEL)
    assert (job.status, job.code, job.error) == ("done", 1, None)
    assert any("unchanged" in line for line in job.log)


def test_a_job_leaves_the_warnings_of_the_process_alone(jobs, monkeypatch) -> None:
    before = warnings.filters[:], warnings.showwarning

    def cut(argv: object) -> int:
        warnings.simplefilter("ignore")
        warnings.showwarning = print
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "_main", cut)
    assert did(jobs, *RANK).status == "cancelled"
    assert (warnings.filters[:], warnings.showwarning) == before


@posix
def test_the_peak_is_of_the_job(jobs) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    job = did(jobs, *RANK)
    assert 1000 * page < job.peak_rss < os.sysconf("SC_PHYS_PAGES") * page


# ---- short questions between jobs


def test_a_call_returns_or_raises_what_the_function_does(jobs, capsys) -> None:
    def tokens() -> list[int]:
        print("not on the terminal")
        return list(jobs.model(Source("zoo:needle")).tokenizer("a needle").input_ids)

    assert (
        jobs.call(tokens, PATIENCE) == Source("zoo:needle").load().tokenizer("a needle").input_ids
    )
    assert "terminal" not in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        jobs.call(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="call"):
        jobs.model(SOURCE)


def test_a_call_is_refused_while_a_job_runs_and_is_not_made_later(jobs, brake) -> None:
    job = jobs.submit(RANK, "the long one")
    brake.hit()
    late = []
    with pytest.raises(BusyError, match="the long one is running"):
        jobs.call(lambda: late.append(1), 0.01)
    brake.free.set()
    ended(jobs, job)
    assert jobs.call(lambda: 5, PATIENCE) == 5 and late == []


def test_a_call_goes_before_the_jobs_that_wait(jobs, brake) -> None:
    first, second = jobs.submit(RANK), jobs.submit(["doctor", "-m", MODEL])
    brake.hit()
    seen = []
    asked = threading.Thread(
        target=lambda: jobs.call(lambda: seen.append(jobs.get(second.id).status), PATIENCE)
    )
    asked.start()
    until(lambda: jobs._calls)
    brake.free.set()
    asked.join()
    assert seen == ["queued"] and ended(jobs, second).status == ended(jobs, first).status == "done"


# ---- what is imported


def test_nothing_heavy_is_imported_before_the_first_job() -> None:
    code = (
        f"{AFTER}\nfrom pathlib import Path\nfrom app.dashboard.jobs import Jobs\n"
        "jobs = Jobs(Path('served'))\n"
        "try:\n    jobs.submit(['rank', 'induction', '--nonsense'])\n"
        "except Exception as error: print(error)\n"
        "print(jobs.list())\njobs.close()\n"
    )
    done = process(["list"], before=code)
    assert done.code == 0 and "nonsense" in done.out
    assert "app.dashboard.jobs" in done.err.split()
    assert not {"torch", "transformers", "dash"} & set(done.err.split())


def test_the_cache_is_for_the_thread_that_set_it(jobs) -> None:
    jobs.call(lambda: jobs.model(SOURCE), PATIENCE)
    assert loading._CACHE.get() is None and reporter._CURRENT.get() is None
