"""One writer per folder: a lock file that names its process, and outlives it harmlessly.

The file is created with O_EXCL and holds host, process id and the time the process started, so
that a lock whose process is dead, or whose id now belongs to another process, is taken over. On
POSIX, looking and taking are one step under an flock on the folder: without it two processes that
both see a dead lock could both take it.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp.errors import RunError
from interp.files import disk_errors

NAME = ".lock"


def acquire(folder: Path) -> Path:
    """Take the lock of a folder; returns the lock file, to be given to `release`.

    Raises:
        RunError: a living process holds it, or it cannot be written.
    """
    path = folder / NAME
    mine = _identity(os.getpid())
    with disk_errors(path, "write"), _guard(folder):
        if path.exists():
            owner = _read(path)
            if _alive(owner):
                raise RunError(
                    f"only one process may write the run in {folder}; process {owner['pid']} on "
                    f"{owner['host']} does",
                    hint=f"wait for it, choose another --out, or delete {path} if it is gone",
                )
            path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise RunError(f"another process has just taken the run in {folder}") from None
        try:
            os.write(handle, json.dumps(mine).encode())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
    return path


def release(path: Path) -> None:
    """Give a lock back; one that another process has taken since is left alone."""
    with contextlib.suppress(OSError):
        if _read(path) == _identity(os.getpid()):
            path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove the lock of a dead process, if there is one and the folder can be written."""
    path = folder / NAME
    with contextlib.suppress(OSError):
        if path.exists():
            with _guard(folder):
                if not _alive(_read(path)):
                    path.unlink(missing_ok=True)


def held(folder: Path) -> bool:
    """Whether a living process holds the lock of a folder."""
    path = folder / NAME
    with contextlib.suppress(OSError):
        return path.exists() and _alive(_read(path))
    return True


def _identity(pid: int) -> dict[str, Any]:
    return {"host": platform.node(), "pid": pid, "started": _started(pid)}


def _read(path: Path) -> dict[str, Any]:
    """The owner written in a lock; empty if its writer died before it wrote."""
    try:
        owner = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, where the system tells (Linux).

    Zombies, which are dead but not yet collected, count as having none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The program name stands in parentheses and may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _alive(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != platform.node() or os.name != "posix":
        return True  # it cannot be asked from here: the hint says what to do
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return owner.get("started") is None or owner["started"] == _started(pid)


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lock; the system frees it when the process dies."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no flock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
