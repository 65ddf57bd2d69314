"""Head scores as files, and shards of them as one table.

A table is one safetensors file: the arrays per example, and everything else as JSON in its header,
so that numbers and their meaning cannot come apart. Derived columns are not stored; they follow.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InputError, RunError
from interp.files import disk_errors, jsonable, read_table, table_bytes, write_atomic
from interp.headid import HeadId
from interp.scores import HeadScores

SCHEMA, VERSION = "headscope.scores", 1
_ALIKE = ("detector", "heads", "threshold", "alpha", "unit", "range", "direction", "granularity")
_META = (
    *("detector", "examples", "failures", "threshold", "alpha", "unit", "range"),
    *("direction", "params", "provenance", "granularity"),
)
_MODEL = ("model", "revision", "fingerprint", "dtype")
_EXTRA = "extras."


def file_stem(name: str) -> str:
    """A name, of a detector or a model, as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("._") or "scores"


def encode(scores: HeadScores) -> bytes:
    """A table as the bytes of one safetensors file; equal tables give equal bytes."""
    meta: dict[str, Any] = {"schema": SCHEMA, "version": VERSION}
    meta |= {name: getattr(scores, name) for name in _META}
    meta["heads"] = [[head.tower, head.layer, head.head] for head in scores.heads]
    return table_bytes(scores.arrays(), meta)


def save(scores: HeadScores, folder: Path) -> Path:
    """Write a table into a folder, which is made if need be; returns its file."""
    with disk_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(scores.detector)}.safetensors"
    write_atomic(path, encode(scores))
    return path


def load(path: Path) -> HeadScores:
    """Read a table from its file, or from a folder that holds exactly one.

    Raises:
        RunError: nothing there, several tables, a damaged file, or a newer version.
    """
    if path.is_dir():
        tables = sorted(path.glob("*.safetensors"))
        if len(tables) != 1:
            raise RunError(
                f"{path} must hold one table of scores; it holds {len(tables)}",
                hint="name the file, or load the run with Run.load",
            )
        path = tables[0]
    arrays, meta = read_table(path)
    if meta.get("schema") != SCHEMA:
        raise RunError(f"{path} is not a table of head scores")
    if meta.get("version") != VERSION:
        raise RunError(
            f"{path} is version {meta.get('version')} of the table of scores; this program reads "
            f"version {VERSION}",
            hint="update headscope",
        )
    try:
        given = {name: meta[name] for name in _META}
        given["examples"] = tuple(meta["examples"])
        given["failures"] = tuple((example, why) for example, why in meta["failures"])
        # An infinity stands as text in JSON.
        given["threshold"] = float(meta["threshold"])
        low, high = meta["range"]
        given["range"] = (float(low), float(high))
        given["heads"] = tuple(HeadId(layer, i, tower) for tower, layer, i in meta["heads"])
        given["extras"] = {
            name.removeprefix(_EXTRA): column
            for name, column in arrays.items()
            if name.startswith(_EXTRA)
        }
        return HeadScores(
            per_example=arrays["per_example"],
            null_per_example=arrays.get("null_per_example"),
            **given,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is a damaged table of scores: {error}") from error


def merged(first: HeadScores, second: HeadScores) -> HeadScores:
    """The table of both shards' examples; see `HeadScores.merge`."""
    for name in _ALIKE:
        _same(name, getattr(first, name), getattr(second, name))
    _same("params", jsonable(first.params), jsonable(second.params))
    for name in _MODEL:
        _same(name, first.provenance.get(name), second.provenance.get(name))
    _same("controls", first.null_per_example is None, second.null_per_example is None)
    _same("extras", sorted(first.extras), sorted(second.extras))
    ids, others = ({*s.examples, *(i for i, _ in s.failures)} for s in (first, second))
    if ids & others:
        raise InputError(
            f"shards to merge must have different examples; both have {min(ids & others)!r}"
        )
    null = None
    if first.null_per_example is not None and second.null_per_example is not None:
        null = np.concatenate([first.null_per_example, second.null_per_example])
    return replace(
        first,
        per_example=np.concatenate([first.per_example, second.per_example]),
        null_per_example=null,
        examples=first.examples + second.examples,
        failures=first.failures + second.failures,
        provenance=_provenance(first.provenance, second.provenance),
        extras={name: _extra(name, first, second) for name in first.extras},
    )


def _same(name: str, first: object, second: object) -> None:
    if first != second:
        shown = f"; got {first!r} and {second!r}" if len(f"{first}{second}") < 200 else ""
        raise InputError(f"shards to merge must have the same {name}{shown}")


def _provenance(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that agree are kept; those that differ become the list of all their values."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys([*first, *second]):
        values: list[Any] = []
        for side in (first.get(name), second.get(name)):
            shards = side["shards"] if isinstance(side, Mapping) and "shards" in side else [side]
            values += [value for value in shards if value not in values]
        merged[name] = values[0] if len(values) == 1 else {"shards": values}
    return merged


def _extra(name: str, first: HeadScores, second: HeadScores) -> np.ndarray:
    """Per-example columns are joined; facts on heads must agree, for they have no n to weigh by."""
    mine, theirs = first.extras[name], second.extras[name]
    if mine.ndim == theirs.ndim == 2:
        return np.concatenate([mine, theirs])
    if not np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
        raise InputError(
            f"shards to merge must agree on the column {name!r}, which is one value per head",
            hint="store it per example, [example, head], so that it can be merged",
        )
    return mine
