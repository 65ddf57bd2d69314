"""Files that are whole or not there: atomic writes, tables of arrays, JSON without NaN.

A write goes to a temporary file in the same folder, is flushed to the disk, and takes its name by
one atomic rename. A process killed at any moment leaves the old file or the new one, and at worst
a temporary file, which `remove_temporaries` clears. Arrays are safetensors with a JSON header;
nothing is ever unpickled. Every failure is a `RunError` that names the file.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InputError, RunError

TEMPORARY = ".headscope-tmp"
_HEADER = "headscope"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a RunError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            message = f"no space left to {doing} {path}"
            hint = "free some space and run the same command again: finished batches are kept"
        elif error.errno in _DENIED:
            message, hint = f"no permission to {doing} {path}", "choose another --out"
        else:
            message, hint = f"cannot {doing} {path}: {error.strerror or error}", None
        raise RunError(message, hint=hint) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is seen whole or not at all.

    Raises:
        RunError: no space, no permission, or another failure of the disk; no temporary file
            is left and a file that was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with disk_errors(path, "write"):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
            handle = os.open(temporary, flags, 0o666)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can do so."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot
            raise
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Clear what killed writers left in `folder`; only for the one who holds its lock."""
    if folder.is_dir():
        with disk_errors(folder, "clean"):
            for leftover in folder.glob(f".*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)


def jsonable(value: Any, where: str = "value") -> Any:
    """A value as JSON can hold it: NaN becomes null, an infinity the string "inf" or "-inf".

    Arrays and tuples become lists, numpy scalars Python numbers, paths text. Finite floats keep
    every bit.

    Raises:
        InputError: something JSON has no form for; the message says where it stands.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        # A plain value also for subclasses, such as the members of a StrEnum.
        return str(value) if isinstance(value, str) else value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist(), where)
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise InputError(
        f"{where} must be made of numbers, text, lists and mappings; got {type(value).__name__}"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically."""
    text = json.dumps(jsonable(content, path.name), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode("utf-8", "surrogatepass"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        RunError: the file cannot be read, or does not hold a JSON mapping.
    """
    with disk_errors(path, "read"):
        data = path.read_bytes()
    try:
        content = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} must be JSON; it is damaged: {error}", hint="use another copy of the run"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} must hold a JSON mapping; got {type(content).__name__}")
    return content


def table_bytes(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """Arrays and their JSON header as the bytes of one safetensors file."""
    from safetensors.numpy import save

    # safetensors stores the memory as it lies, so an array that is not in C order would come
    # back scrambled. `order="C"` copies exactly those, and keeps zero-dimensional arrays.
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    for name, array in whole.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"array {name!r} must hold numbers or booleans; got {array.dtype}")
    header = json.dumps(jsonable(meta, "meta"), allow_nan=False)
    return bytes(save(whole, metadata={_HEADER: header}))


def write_table(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write named arrays with a JSON header as one safetensors file, atomically.

    Raises:
        InputError: an array is not numeric, or the header has no JSON form.
        RunError: the file cannot be written.
    """
    write_atomic(path, table_bytes(arrays, meta))


def read_table(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and JSON header of a file written by `write_table`.

    Raises:
        RunError: the file is missing, cut short, damaged, or not one of ours.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with disk_errors(path, "read"):
        data = path.read_bytes()
    try:
        return load(data), _header(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} must be a whole table of arrays; it is damaged: {error}",
            hint="delete this file and run the same command again to compute it anew",
        ) from error


def read_part(path: Path, name: str, *at: int | slice) -> np.ndarray:
    """One array of a table, or a part of it; no other part of the file is read.

    Args:
        path: a file written by `write_table`.
        name: the array.
        at: an index or a slice for each of its first axes.

    Raises:
        RunError: the file is missing or damaged, or has no such array.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with disk_errors(path, "read"), safe_open(path, framework="numpy") as table:
            if name not in table.keys():  # noqa: SIM118 - it is no mapping
                raise RunError(f"{path} has no array {name!r}")
            part: np.ndarray = table.get_slice(name)[at if at else slice(None)]
            return part
    except (SafetensorError, ValueError, IndexError) as error:
        raise RunError(
            f"{path} must be a whole table of arrays; it is damaged: {error}",
            hint="delete this file and run the same command again to compute it anew",
        ) from error


def check_table(path: Path) -> None:
    """Check that a table is whole by its header and length, without reading its arrays.

    Raises:
        RunError: as `read_table`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with disk_errors(path, "read"), safe_open(path, framework="numpy") as table:
            if _HEADER not in (table.metadata() or {}):
                raise ValueError("it has no headscope header")
    except (SafetensorError, ValueError) as error:
        raise RunError(
            f"{path} must be a whole table of arrays; it is damaged: {error}",
            hint="delete this file and run the same command again to compute it anew",
        ) from error


def _header(data: bytes) -> dict[str, Any]:
    """Our JSON header inside the bytes of a safetensors file that has been parsed once."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])["__metadata__"][_HEADER]
    content = json.loads(header)
    if not isinstance(content, dict):
        raise ValueError("its headscope header is not a mapping")
    return content
