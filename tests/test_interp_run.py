"""Runs: resumed after any kill, refused when damaged, never half-written, one writer at a time."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from interp import lock
from interp.errors import InputError, RunError
from interp.files import TEMPORARY, read_json, write_atomic
from interp.headid import HeadId
from interp.run import Run, content_key, default_folder
from interp.scores import HeadScores

ROOT = Path(__file__).parents[1]
KEY = {"model": "zoo:tiny", "task": "needle", "detectors": ["sink"], "seed": 0, "eps": 0.1}
META = {"command": "headscope rank sink", "versions": {"numpy": np.__version__}}
posix = pytest.mark.skipif(os.name != "posix", reason="kills and limits are POSIX")

WORKER = """
import sys
import numpy as np
from interp.headid import HeadId
from interp.run import Run
from interp.scores import HeadScores

folder, batches = sys.argv[1], int(sys.argv[2])
key = {"model": "zoo:tiny", "seed": 0, "batches": batches}

def say(*words):
    print(*words, flush=True)

def measure(i):
    return {"scores": np.random.default_rng(i).random((2, 300))}

with Run.open_or_create(folder, key, {"command": "worker"}) as run:
    if run.status != "complete":
        for i in range(batches):
            if i not in run.finished:
                say("start", i)
                run.put_part(i, measure(i), {"batch": i})
                say("done", i)
        values = np.concatenate([run.part(i).arrays["scores"] for i in range(batches)])
        heads = tuple(HeadId(layer, head) for layer in range(10) for head in range(30))
        ids = tuple(map(str, range(len(values))))
        say("finish", 0)
        run.finish([HeadScores("sink", heads, values, 0 * values, ids, threshold=0.3)])
say("end", 0)
"""


def scores(detector: str = "sink", n: int = 6) -> HeadScores:
    values = np.random.default_rng(0).random((n, 4))
    heads = tuple(HeadId(0, i) for i in range(4))
    return HeadScores(detector, heads, values, values / 2, tuple(map(str, range(n))))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# the ordinary way


def test_a_run_is_written_and_read_again(tmp_path):
    folder = tmp_path / "runs" / "one"
    with Run.open_or_create(folder, KEY, META) as run:
        assert run.status == "running"
        run.put_part(0, {"x": np.arange(3.0), "flag": np.array(True)}, {"n": 3})
        assert run.finished == {0}
        part = run.part(0)
        np.testing.assert_array_equal(part.arrays["x"], np.arange(3.0))
        assert part.arrays["flag"].shape == ()
        assert part.meta == {"n": 3}
        run.finish([scores("sink"), scores("previous/token")])
        assert run.status == "complete"
    loaded = Run.load(folder)
    assert loaded.status == "complete"
    assert list(loaded.scores) == ["sink", "previous/token"]
    assert loaded.scores["sink"].same_values(scores("sink"))
    assert loaded.scores["sink"].rows() == scores("sink").rows()
    assert files(folder) == {
        "run.json",
        "parts/00000.safetensors",
        "scores/sink.safetensors",
        "scores/previous_token.safetensors",
    }
    info = json.loads((folder / "run.json").read_text(), parse_constant=pytest.fail)
    assert (info["schema"], info["version"]) == ("headscope.run", 1)
    assert (info["key"], info["content_key"]) == (KEY, content_key(KEY))
    assert info["command"] == META["command"]
    assert info["scores"]["sink"]["heads"] == 4


def test_a_complete_run_is_opened_for_reading(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        run.finish([scores()])
    before = (tmp_path / "run.json").read_bytes()
    with Run.open_or_create(tmp_path, KEY) as again:
        assert again.status == "complete"
        assert again.scores["sink"].same_values(scores())
        with pytest.raises(RunError, match="open for reading only"):
            again.put_part(7, {})
        with pytest.raises(RunError, match="open for reading only"):
            again.finish([])
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_error_inside_leaves_an_interrupted_run_that_goes_on(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("interp.run._now", lambda: str(next(clock)))
    with pytest.raises(KeyboardInterrupt), Run.open_or_create(tmp_path, KEY, META) as run:
        created = run.info["created"]
        run.put_part(0, {"x": np.ones(2)})
        raise KeyboardInterrupt
    stopped = Run.load(tmp_path)
    assert (stopped.status, stopped.finished, stopped.scores) == ("interrupted", {0}, {})
    assert stopped.info["status"] == "interrupted"
    with Run.open_or_create(tmp_path, KEY, META) as again:
        assert again.finished == {0}
        assert again.status == Run.load(tmp_path).status == "running"
        assert again.info["created"] == created
        again.put_part(1, {"x": np.ones(2)})
    assert Run.load(tmp_path).finished == {0, 1}


def test_parts_are_written_once_and_known_by_number(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        run.put_part(123_456, {"x": np.zeros(1)})
        with pytest.raises(RunError, match=r"batch 123456 .* must be new"):
            run.put_part(123_456, {})
        with pytest.raises(RunError, match="batch -1"):
            run.put_part(-1, {})
        with pytest.raises(RunError, match=r"batch 3 .* is not finished"):
            run.part(3)
        with pytest.raises(InputError, match="must hold numbers"):
            run.put_part(4, {"x": np.array(["text"])})
        with pytest.raises(InputError, match=r"meta.meta.f must be made of"):
            run.put_part(4, {}, {"f": object()})
    assert Run.load(tmp_path).finished == {123_456}


def test_two_tables_of_one_name_are_refused_before_anything_is_written(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        with pytest.raises(InputError, match="different detectors"):
            run.finish([scores("a/b"), scores("a_b")])
        assert not (tmp_path / "scores").exists()


def test_the_same_command_finds_its_folder():
    folder = default_folder("runs", KEY)
    assert folder.name.startswith("sink-tiny-needle-")
    assert folder == default_folder("runs", dict(reversed(KEY.items())))
    others = [KEY | {"seed": 1}, KEY | {"eps": 0.2}, KEY | {"eps": None}, KEY | {"more": 1}]
    assert len({default_folder("runs", key) for key in [KEY, *others]}) == 5
    assert default_folder("r", {"model": "/a/b c/../Mödel/"}).name.startswith("Mödel-")
    assert default_folder("r", {}).name.startswith("run-")


def test_keys_are_compared_as_they_are_stored(tmp_path):
    key = {"eps": np.float32(0.1), "heads": (1, 2), "path": Path("x"), "nan": np.nan}
    Run.open_or_create(tmp_path, key).close()
    Run.open_or_create(tmp_path, key).close()
    with pytest.raises(InputError, match=r"key.f must be made of"):
        Run.open_or_create(tmp_path / "b", {"f": object()})
    with pytest.raises(InputError, match="own names; got 'status'"):
        Run.open_or_create(tmp_path / "b", KEY, {"status": "fine"})
    assert not (tmp_path / "b").exists()


# refusals


def test_another_run_is_refused_by_what_differs(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        run.put_part(0, {"x": np.ones(1)})
    before = files(tmp_path)
    other = {**KEY, "seed": 1, "dtype": "float32"}
    with pytest.raises(RunError) as caught:
        Run.open_or_create(tmp_path, other)
    text = str(caught.value)
    assert "holds another run: seed is 0 there and 1 here, dtype is absent there" in text
    assert caught.value.hint == "choose another --out, or delete the folder"
    assert files(tmp_path) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"is not a run and holds 'thesis.tex'"):
        Run.open_or_create(tmp_path, KEY)
    assert files(tmp_path) == {"thesis.tex"}
    with pytest.raises(RunError, match=r"thesis.tex is a file"):
        Run.open_or_create(tmp_path / "thesis.tex", KEY)
    with pytest.raises(RunError, match=r"is not a run folder: it has no run.json"):
        Run.load(tmp_path)
    with pytest.raises(RunError, match="there is no run folder"):
        Run.load(tmp_path / "nowhere")


@pytest.fixture
def complete(tmp_path) -> Path:
    with Run.open_or_create(tmp_path / "run", KEY, META) as run:
        run.put_part(0, {"x": np.ones(100)})
        run.finish([scores()])
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is a run of version 2; this program reads version 1"),
        ({"schema": "other"}, "has no schema 'headscope.run'"),
        ({"version": "x"}, r"run.json is damaged: 'version' must be a int"),
        ({"status": None}, r"run.json is damaged: 'status' must be a str"),
        ({"key": []}, r"run.json is damaged: 'key' must be a dict"),
        ({"scores": {"sink": "x"}}, r"run.json is damaged: 'scores' must be"),
    ],
)
def test_a_run_json_that_is_not_understood_is_refused(complete, change, message):
    path = complete / "run.json"
    path.write_text(json.dumps(read_json(path) | change))
    for reopen in (Run.load, lambda folder: Run.open_or_create(folder, KEY)):
        with pytest.raises(RunError, match=message):
            reopen(complete)


@pytest.mark.parametrize("text", [b"", b'{"schema": "headsc', b"\xff\xfe", b"[" * 100_000, b"[1]"])
def test_a_broken_run_json_is_named(complete, text):
    (complete / "run.json").write_bytes(text)
    with pytest.raises(RunError, match=r"run.json must"):
        Run.load(complete)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "sink.safetensors must be a whole table"),
        (lambda p: p.write_bytes(b""), "sink.safetensors must be a whole table"),
        (lambda p: p.unlink(), "cannot read .*sink.safetensors: No such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x01"), "sink.safetensors is damaged"),
    ],
)
def test_a_damaged_table_is_named(complete, harm, message):
    harm(complete / "scores" / "sink.safetensors")
    run = Run.load(complete)
    with pytest.raises(RunError, match=message):
        assert run.scores


def test_a_run_cannot_point_outside_its_folder(complete):
    scores().save(complete.parent)
    path = complete / "run.json"
    info = read_json(path)
    info["scores"]["sink"]["file"] = "../../sink.safetensors"
    path.write_text(json.dumps(info))
    (complete / "scores" / "sink.safetensors").unlink()
    with pytest.raises(RunError, match=r"cannot read .*scores/sink.safetensors"):
        assert Run.load(complete).scores


def test_a_damaged_part_is_an_error_when_the_run_goes_on(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        run.put_part(0, {"x": np.ones(100)})
        run.put_part(1, {"x": np.ones(100)})
    part = tmp_path / "parts" / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(RunError, match=r"00001.safetensors must be a whole table") as caught:
        Run.open_or_create(tmp_path, KEY)
    assert "delete this file and run the same command again" in str(caught.value.hint)
    assert not (tmp_path / lock.NAME).exists()
    part.unlink()
    with Run.open_or_create(tmp_path, KEY) as run:
        assert run.finished == {0}


# disks


def full_after(monkeypatch, writes: int, name: str = "write") -> None:
    """Let the first few writes of `os` pass and refuse the rest, halfway through their bytes."""
    real = getattr(os, name)
    left = [writes]

    def failing(handle, *data):
        if left[0]:
            left[0] -= 1
            return real(handle, *data)
        if data:
            real(handle, bytes(data[0])[: len(data[0]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, failing)


# The lock, run.json, two parts, a table and run.json; every file but the lock is synced, and so
# is its folder.
FAULTS = [("write", i) for i in range(6)] + [("fsync", i) for i in range(10)]


@pytest.mark.parametrize(("name", "passing"), FAULTS)
def test_a_full_disk_loses_nothing_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, name, passing
):
    folder = tmp_path / "run"

    def work() -> None:
        with Run.open_or_create(folder, KEY) as run:
            for i in sorted({0, 1} - run.finished):
                run.put_part(i, {"x": np.full(1000, float(i))})
            run.finish([scores()])

    with monkeypatch.context() as patch:
        full_after(patch, passing, name)
        with pytest.raises(RunError, match="no space left to write") as caught:
            work()
    assert "free some space" in str(caught.value.hint)
    if folder.exists():
        assert not [name for name in files(folder) if TEMPORARY in name or lock.NAME in name]
        stopped = Run.load(folder)
        assert stopped.status in ("interrupted", "complete")
        for i in stopped.finished:
            assert (stopped.part(i).arrays["x"] == i).all()
    if not folder.exists() or Run.load(folder).status != "complete":
        work()
    done = Run.load(folder)
    assert done.scores["sink"].same_values(scores())
    assert done.finished == {0, 1}


def test_a_full_disk_is_reported_where_it_was_met(tmp_path, monkeypatch):
    # Marking the run interrupted fails as well; that must not hide what was being written.
    run = Run.open_or_create(tmp_path, KEY)
    full_after(monkeypatch, 0)
    with pytest.raises(RunError, match=r"parts/00000\.safetensors"), run:
        run.put_part(0, {"x": np.ones(1)})
    assert files(tmp_path) == {"run.json"}
    assert Run.load(tmp_path).status == "interrupted"


def test_a_full_disk_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        full_after(patch, 0)
        with pytest.raises(RunError):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == {"file"}


@posix
def test_a_disk_that_really_takes_no_more_bytes(tmp_path):
    code = (
        "import resource, sys, numpy as np\n"
        "from interp.run import Run\n"
        "from interp.errors import RunError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "with Run.open_or_create(sys.argv[1], {'k': 1}) as run:\n"
        "    run.put_part(0, {'x': np.zeros(1000)})\n"
        "    try:\n"
        "        run.put_part(1, {'x': np.zeros(100_000)})\n"
        "    except RunError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "no space left to write" in done.stdout
    assert files(tmp_path / "run") == {"run.json", "parts/00000.safetensors"}
    assert Run.load(tmp_path / "run").finished == {0}


def test_a_forbidden_folder_is_one_clear_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RunError, match="no permission to write") as caught:
            Run.open_or_create(tmp_path / "run", KEY)
    assert caught.value.hint == "choose another --out"
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot"):
        Run.open_or_create(tmp_path / "file" / "run", KEY)


def test_leftovers_of_killed_writers_are_cleared(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        run.put_part(0, {"x": np.ones(1)})
    (tmp_path / "scores").mkdir()
    for place in (tmp_path, tmp_path / "parts", tmp_path / "scores"):
        (place / f".00001.safetensors.99{TEMPORARY}").write_bytes(b"half")
    assert Run.load(tmp_path).finished == {0}
    with Run.open_or_create(tmp_path, KEY) as run:
        assert run.finished == {0}
        assert not any(TEMPORARY in name for name in files(tmp_path))


def test_a_run_killed_while_it_began_can_begin_again(tmp_path):
    (tmp_path / lock.NAME).write_text("")
    (tmp_path / f".run.json.99{TEMPORARY}").write_text("{")
    (tmp_path / "parts").mkdir()
    with Run.open_or_create(tmp_path, KEY) as run:
        run.put_part(0, {"x": np.ones(1)})
    assert files(tmp_path) == {"run.json", "parts/00000.safetensors"}


# locks


def owner(**changes: object) -> str:
    mine = lock._identity(os.getpid())
    return json.dumps(mine | changes)


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_has_one_writer(tmp_path):
    with Run.open_or_create(tmp_path, KEY) as run:
        with pytest.raises(RunError, match=f"process {os.getpid()} on") as caught:
            Run.open_or_create(tmp_path, KEY)
        assert ".lock" in str(caught.value.hint)
        run.put_part(0, {"x": np.ones(1)})
        assert Run.load(tmp_path).status == "running"
    Run.open_or_create(tmp_path, KEY).close()
    assert not (tmp_path / lock.NAME).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    Run.open_or_create(tmp_path, KEY).close()
    info = read_json(tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps(info | {"status": "running"}))
    (tmp_path / lock.NAME).write_text(owner(pid=dead_pid()))
    assert Run.load(tmp_path).status == "interrupted"
    with Run.open_or_create(tmp_path, KEY) as run:
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
        run.put_part(0, {"x": np.ones(1)})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": -1}'])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    Run.open_or_create(tmp_path, KEY).close()


linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="states and start times come from /proc"
)


@linux
def test_a_killed_child_that_nobody_collected_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / lock.NAME).write_text(json.dumps(lock._identity(child.pid)))
    with pytest.raises(RunError, match=f"process {child.pid} on"):
        Run.open_or_create(tmp_path, KEY)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    Run.open_or_create(tmp_path, KEY).close()
    child.communicate()


@linux
def test_a_process_id_used_again_is_not_the_owner(tmp_path):
    (tmp_path / lock.NAME).write_text(owner(started=1))
    Run.open_or_create(tmp_path, KEY).close()


def test_the_lock_of_another_machine_is_respected(tmp_path):
    (tmp_path / lock.NAME).write_text(owner(host="elsewhere", pid=dead_pid()))
    with pytest.raises(RunError, match="on elsewhere does"):
        Run.open_or_create(tmp_path, KEY)
    assert (tmp_path / lock.NAME).exists()


def test_a_lock_that_was_taken_over_is_not_released_by_its_old_owner(tmp_path):
    path = lock.acquire(tmp_path)
    path.write_text(owner(pid=dead_pid()))
    lock.release(path)
    assert path.exists()


def race(folder: Path, gate, wins) -> None:
    gate.wait()
    with contextlib.suppress(RunError):
        lock.acquire(folder)
        with wins.get_lock():
            wins.value += 1
    gate.wait()


@posix
def test_of_many_processes_one_takes_over_a_dead_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / lock.NAME).write_text(owner(pid=2**22 + 1))
        gate, wins = context.Barrier(4), context.Value("i", 0)
        racers = [context.Process(target=race, args=(folder, gate, wins)) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert wins.value == 1


# kills


def start(folder: Path, batches: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(batches)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@posix
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    batches, kills = 40, 6
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start(whole, batches)
    assert reference.communicate()[0].endswith("end 0\n")

    chance = random.Random(0)
    begun: list[int] = []
    done: set[int] = set()

    def hear(line: str) -> None:
        word, number = line.split()
        if word == "start":
            begun.append(int(number))
        elif word == "done":
            done.add(int(number))

    for _ in range(kills):
        worker = start(broken, batches)
        for _ in range(chance.randint(1, 10)):
            hear(worker.stdout.readline())
        time.sleep(chance.random() * 0.003)
        os.kill(worker.pid, signal.SIGKILL)
        for line in worker.stdout:
            hear(line)
        assert worker.wait() == -signal.SIGKILL
        worker.stdout.close()
        left = Run.load(broken)
        assert left.status == "interrupted"
        # What was reported is there; beside it at most the batch that had just been renamed.
        assert done <= left.finished
        assert len(left.finished - done) <= 1
        done = set(left.finished)

    worker = start(broken, batches)
    for line in worker.communicate()[0].splitlines():
        hear(line)
    assert worker.returncode == 0
    # Every kill cost at most one batch computed twice.
    assert set(begun) == set(range(batches))
    assert len(begun) <= batches + kills

    assert files(broken) == files(whole)
    for name in files(whole) - {"run.json"}:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    times = ("created", "finished")
    infos = [read_json(folder / "run.json") for folder in (whole, broken)]
    assert [{k: v for k, v in info.items() if k not in times} for info in infos[:1]] == [
        {k: v for k, v in info.items() if k not in times} for info in infos[1:]
    ]
    assert Run.load(broken).scores["sink"].same_values(Run.load(whole).scores["sink"])


@posix
@pytest.mark.parametrize("steps", range(7))
def test_a_kill_before_each_rename_and_after_it_is_survived(tmp_path, steps):
    # Deterministic: the process kills itself at its n-th rename, before or after it takes place.
    for before in (True, False):
        folder = tmp_path / f"{before}"
        code = WORKER.replace(
            "folder, batches =",
            "import os, signal\n"
            "real, left = os.replace, [int(sys.argv[3])]\n"
            "def replace(a, b):\n"
            "    left[0] -= 1\n"
            f"    if {before} and left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    real(a, b)\n"
            "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.replace = replace\n"
            "folder, batches =",
            1,
        )
        killed = subprocess.run(
            [sys.executable, "-c", code, folder, "3", str(steps)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=False,
        )
        # Renames: run.json, three parts, the table, run.json.
        assert killed.returncode == (-signal.SIGKILL if steps < 6 else 0)
        again = start(folder, 3)
        assert again.communicate()[0].endswith("end 0\n")
        assert again.returncode == 0
        assert files(folder) == {
            "run.json",
            "scores/sink.safetensors",
            *(f"parts/0000{i}.safetensors" for i in range(3)),
        }
        assert Run.load(folder).status == "complete"
        shutil.rmtree(folder)
