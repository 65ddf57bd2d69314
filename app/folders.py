"""Where runs lie: the folder of a new one, and the folder that a name means."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from interp.errors import RunError

BASE = "HEADSCOPE_RUNS"
"""Environment variable that names another place than `runs/`."""

_WITHIN: ContextVar[Path | None] = ContextVar("runs", default=None)


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """Let runs of this thread lie in a folder meanwhile, whatever the environment says."""
    token = _WITHIN.set(folder)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def base() -> Path:
    """The folder of all runs."""
    return _WITHIN.get() or Path(os.environ.get(BASE) or "runs")


def folder_for(detectors: Iterable[str], model: str, key: Mapping[str, Any]) -> Path:
    """The folder of a run: readable, and the same for the same key."""
    from interp.run import default_folder

    return default_folder(base(), {**key, "detectors": list(detectors), "model": model})


def find(run: Path) -> Path:
    """The folder or file that a command line names: a path, or a name under `runs/`.

    Raises:
        RunError: there is neither.
    """
    for place in (run, base() / run):
        if place.exists():
            return place
    names = sorted(p.name for p in base().iterdir()) if base().is_dir() else []
    import difflib

    near = difflib.get_close_matches(run.name, names, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "headscope rank makes one"
    raise RunError(f"there is no run {str(run)!r}, here or in {base()}/", hint=hint) from (
        FileNotFoundError(str(run))
    )
