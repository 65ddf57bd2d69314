"""Reading files that others wrote: bounded, regular files only, numbers that are numbers."""

import contextlib
import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InputError
from interp.files import disk_errors

MB = 1 << 20
LAYERS = HEADS = 1024
"""Indices of layers and heads stay below; a grid of them is made."""


def read_bytes(path: Path, most: int, *, inside: bool = False) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file.
        most: bytes it may have.
        inside: whether it lies in a tree from elsewhere, where links are not followed.

    Raises:
        InputError: a link, a pipe, a device, or too large.
        RunError: it cannot be read.
    """
    with disk_errors(path, "read"):
        found = path.lstat() if inside else path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} must be a plain file")
        if found.st_size > most:
            raise InputError(
                f"{path} must be at most {most // MB} MB; it has {found.st_size // MB}"
            )
        with path.open("rb") as file:
            data = file.read(most + 1)
    if len(data) > most:  # it grew meanwhile
        raise InputError(f"{path} must be at most {most // MB} MB")
    return data


def parsed(data: bytes, path: Path, kind: type) -> Any:
    """JSON of a kind.

    Raises:
        InputError: no JSON, or of another kind.
    """
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refused, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON: {_brief(error)}") from error
    if not isinstance(content, kind):
        raise InputError(
            f"{path} must hold a JSON {_KINDS[kind]}; got {_KINDS.get(type(content), 'value')}"
        )
    return content


_KINDS = {dict: "object", list: "list", str: "text", int: "number", float: "number"}


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names something twice")
    return found


def _brief(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds.

    Raises:
        InputError: anything else.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        found = float(value) if good else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and low <= found <= high):
        bounds = "" if math.isinf(low) and math.isinf(high) else f" in {low:g}..{high:g}"
        raise InputError(f"{where} must be a finite number{bounds}; got {shown(value)}")
    return found


def whole(value: Any, where: str, below: int) -> int:
    """A whole number from 0 to below a bound.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise InputError(f"{where} must be a whole number in 0..{below - 1}; got {shown(value)}")
    return value


def numbers(values: list[Any], where: str, low: float, high: float) -> np.ndarray:
    """Finite numbers within bounds as an array, many at a time.

    Raises:
        InputError: one of them is anything else.
    """
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            found = np.array(values, np.float64)
            if ((found >= low) & (found <= high)).all():
                return found
    return np.array([number(x, where, low, high) for x in values], np.float64)


def wholes(values: list[Any], where: str, below: int) -> np.ndarray:
    """Whole numbers from 0 to below a bound as an array, many at a time.

    Raises:
        InputError: one of them is anything else.
    """
    if set(map(type, values)) <= {int}:
        with contextlib.suppress(OverflowError):
            found = np.array(values, np.int64)
            if ((found >= 0) & (found < below)).all():
                return found
    return np.array([whole(x, where, below) for x in values], np.int64)


def text(value: Any, where: str, most: int) -> str:
    """A text of at most so many characters.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, str) or len(value) > most:
        raise InputError(f"{where} must be a text of at most {most} characters; got {shown(value)}")
    return value


def listed(value: Any, where: str, most: int) -> list[Any]:
    """A list of at most so many entries.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, list) or len(value) > most:
        got = f"{len(value)} entries" if isinstance(value, list) else shown(value)
        raise InputError(f"{where} must be a list of at most {most} entries; got {got}")
    return value


def shown(value: Any) -> str:
    """A value in an error text, cut short."""
    found = repr(value) if isinstance(value, str | float | bool | None) else _named(value)
    return found if len(found) <= 60 else f"{found[:59]}…"


def _named(value: Any) -> str:
    # Digits of a huge whole number are not written out: that takes quadratic time.
    small = isinstance(value, int) and value.bit_length() < 200
    return str(value) if small else f"a {type(value).__name__}"
