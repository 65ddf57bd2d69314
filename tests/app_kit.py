"""Command lines run in tests: in this process, or in one of their own that can be killed."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.cli import main

ROOT = Path(__file__).parents[1]
AFTER = "import atexit\natexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))"
"""Code before a command: the modules it imported are printed on stderr at its end."""
posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, str]]:
        """The rows of a TSV answer."""
        return list(csv.DictReader(io.StringIO(self.out), delimiter="\t"))


Run = Callable[..., Done]


def in_process(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def call(*args: str) -> Done:
        capsys.readouterr()
        code = main(args)
        seen = capsys.readouterr()
        return Done(code, seen.out, seen.err)

    return call


def process(args: Sequence[str], *, before: str = "", stdin: str | None = None) -> Done:
    """Run a command line in a process of its own, after some code."""
    code = f"import sys\n{before}\nfrom app.cli import main\nsys.exit(main({list(args)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """The environment of such a process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def only_run() -> Path:
    """The one run in `runs/`."""
    [folder] = Path("runs").iterdir()
    return folder


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def tokens_line(**more: object) -> str:
    """A line of a prompt file: tokens, repeated."""
    block = list(range(20, 32))
    return json.dumps({"tokens": [1, *block, *block], **more})


def assert_refused(done: Done, part: str) -> None:
    """A refusal of bad data: its code, nothing on stdout, and a line that says why."""
    assert (done.code, done.out) == (65, "") and part in done.err and "Traceback" not in done.err
