"""Reading a HeadVis tree that somebody else wrote.

Only `config.json`, `scatter_data.json` and `heads/L{l}H{h}.json` of the heads in the scatter data
are opened, as plain files: no name or pattern of the tree is followed. All of them are checked
before a run is begun, so that a damaged tree leaves none behind.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.interchange import Found
from app.interchange.bounded import (
    HEADS,
    LAYERS,
    MB,
    listed,
    number,
    numbers,
    parsed,
    read_bytes,
    text,
    whole,
    wholes,
)
from app.interchange.examples import Example, packed
from interp.errors import HeadIdError, InputError
from interp.headid import DEFAULT_TOWER, HeadId
from interp.scores import HeadScores

SCATTER, HEAD_FILE, CONFIG = 64 * MB, 64 * MB, 64 * MB
N_METRICS, N_SEQUENCES, N_TOKENS, TOKEN = 256, 1024, 4096, 1000
_METRIC = re.compile(r"[A-Za-z][\w .+-]{0,79}")


@dataclass(frozen=True)
class _Metric:
    unit: str = ""
    range: tuple[float, float] = (-np.inf, np.inf)
    direction: str = "higher"


def read(folder: Path, model: str | None) -> Found:
    """A tree as one table of scores a metric, and examples of its heads.

    A metric has one number a head: its table has one example, no interval and no verdicts.

    Raises:
        InputError: no tree, or one that does not fit.
        RunError: a file cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"a HeadVis tree is a folder with config.json; got {folder}")
    digest = hashlib.sha256()
    raw = read_bytes(folder / "config.json", CONFIG, inside=True)
    digest.update(hashlib.sha256(raw).digest())
    config = parsed(raw, folder / "config.json", dict)
    path = folder / "scatter_data.json"
    raw = read_bytes(path, SCATTER, inside=True)
    digest.update(hashlib.sha256(raw).digest())
    rows = parsed(raw, path, list)
    own, tower = _own(config, folder / "config.json")
    names = _names(config, rows, folder)
    heads, values = _values(rows, names, tower, path)
    said = config.get("model_name")
    model = model or (text(said, f"{folder / 'config.json'}: model_name", 300) if said else "")
    if not model:
        raise InputError(
            f"a model must be named: {folder / 'config.json'} does not say whose it is",
            hint="--model NAME",
        )
    dataset = config.get("dataset_name")
    where = f"{folder / 'config.json'}: dataset_name"
    dataset = text(dataset, where, 300) if dataset is not None else ""
    with_examples = []
    for head in heads:
        found = _file(folder, head)
        if found is not None:
            digest.update(str(head).encode() + hashlib.sha256(found).digest())
            if _sequences(found, folder, head):
                with_examples.append(head)
    tables = tuple(
        HeadScores(
            detector=name,
            heads=heads,
            per_example=values[:, i][None],
            null_per_example=None,
            examples=(dataset or "mean of the tree",),
            unit=own.get(name, _Metric()).unit,
            range=own.get(name, _Metric()).range,
            direction=own.get(name, _Metric()).direction,
            provenance={"model": model, "imported": "headvis", "dataset": dataset},
        )
        for i, name in enumerate(names)
    )
    about = {"dataset": dataset, "examples": [str(h) for h in with_examples]}
    parts = partial(_parts, folder, with_examples)
    return Found(tables, model, digest.hexdigest(), about, len(with_examples), parts)


def _own(config: Mapping[str, Any], path: Path) -> tuple[dict[str, _Metric], str]:
    """What the program's own block says of metrics, and the tower."""
    block = config.get("headscope")
    if block is None:
        return {}, DEFAULT_TOWER
    where = f"{path}: headscope"
    if not isinstance(block, dict) or not isinstance(block.get("tables", {}), dict):
        raise InputError(f"{where} must be an object with tables")
    tower = text(block.get("tower", DEFAULT_TOWER), f"{where}.tower", 40)
    try:
        if HeadId.parse(f"{tower}.L0H0").tower != tower:
            raise HeadIdError(tower)
    except HeadIdError as error:
        raise InputError(f"{where}.tower must be a plain word; got {tower!r}") from error
    own = {}
    for name, about in block.get("tables", {}).items():
        if not isinstance(about, dict):
            raise InputError(f"{where}.tables must hold objects")
        ends = listed(about.get("range", []), f"{where}: range", 2)
        infinite = {"inf": np.inf, "-inf": -np.inf}
        low, high = (
            infinite[x] if x in ("inf", "-inf") else number(x, f"{where}: range")
            for x in (ends if len(ends) == 2 else ("-inf", "inf"))
        )
        direction = about.get("direction", "higher")
        if direction not in ("higher", "lower"):
            raise InputError(f"{where}: direction must be higher or lower")
        unit = text(about.get("unit", ""), f"{where}: unit", 300)
        own[name] = _Metric(unit, (low, high), direction)
    return own, tower


def _names(config: Mapping[str, Any], rows: list[Any], folder: Path) -> list[str]:
    """Metrics: those that the config lists, or the numbers of the first row."""
    said = config.get("metrics")
    if said is None:
        first = rows[0] if rows and isinstance(rows[0], dict) else {}
        said = [
            n for n, x in first.items()
            if n not in ("layer", "head") and isinstance(x, int | float | None)
        ]  # fmt: skip
    where = f"{folder / 'config.json'}: metrics"
    names = [text(n, where, 80) for n in listed(said, where, N_METRICS)]
    bad = [n for n in names if not _METRIC.fullmatch(n)]
    if bad or not names or len(set(names)) != len(names):
        got = repr(bad[0]) if bad else f"{len(names)}, {len(set(names))} of them different"
        raise InputError(f"{where} must be different plain names, one or more; got {got}")
    return names


def _values(
    rows: list[Any], names: list[str], tower: str, path: Path
) -> tuple[tuple[HeadId, ...], np.ndarray]:
    """Heads in the order of their ids, and [head, metric]."""
    found: dict[HeadId, list[float]] = {}
    if not rows or len(rows) > LAYERS * HEADS // 4:
        raise InputError(f"{path} must hold 1..{LAYERS * HEADS // 4} heads; it holds {len(rows)}")
    for i, row in enumerate(rows):
        where = f"{path}, row {i}"
        if not isinstance(row, dict):
            raise InputError(f"{where} must be an object")
        head = HeadId(
            whole(row.get("layer"), f"{where}: layer", LAYERS),
            whole(row.get("head"), f"{where}: head", HEADS),
            tower,
        )
        if head in found:
            raise InputError(f"{where}: {head} must be there once; it is there twice")
        found[head] = [
            np.nan if row.get(name) is None else number(row[name], f"{where}: {name}")
            for name in names
        ]
    heads = tuple(sorted(found))
    return heads, np.array([found[head] for head in heads])


def _file(folder: Path, head: HeadId) -> bytes | None:
    """The file of a head; None if there is none."""
    place = folder / "heads"
    if place.is_symlink():
        raise InputError(f"{place} must be a plain folder")
    path = place / f"L{head.layer}H{head.head}.json"
    if not path.is_symlink() and not path.exists():
        return None
    return read_bytes(path, HEAD_FILE, inside=True)


def _parts(
    folder: Path, heads: list[HeadId]
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    for head in heads:
        arrays, meta = packed(_sequences(_file(folder, head) or b"{}", folder, head))
        yield arrays, {"head": str(head), **meta}


def _sequences(data: bytes, folder: Path, head: HeadId) -> list[Example]:
    path = folder / "heads" / f"L{head.layer}H{head.head}.json"
    content = parsed(data, path, dict)
    entries = listed(content.get("sequences", []), f"{path}: sequences", N_SEQUENCES)
    return [_example(entry, f"{path}, sequence {i}", i) for i, entry in enumerate(entries)]


def _example(entry: Any, where: str, place: int) -> Example:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object")
    tokens = tuple(
        text(t, f"{where}: tokens", TOKEN)
        for t in listed(entry.get("tokens"), f"{where}: tokens", N_TOKENS)
    )
    n = len(tokens)
    if n == 0 or entry.get("seq_len", n) != n:
        raise InputError(f"{where} must have seq_len tokens, one or more; it has {n}")
    flat = listed(entry.get("attention_indices"), f"{where}: attention_indices", n * n)
    given = listed(entry.get("attention_values"), f"{where}: attention_values", n * n)
    if len(flat) != len(given):
        raise InputError(
            f"{where} must have as many attention_indices as attention_values; got {len(flat)} "
            f"and {len(given)}"
        )
    indices = wholes(flat, f"{where}: attention_indices", n * n)
    # A little above 1 is what half precision makes of 1.
    values = numbers(given, f"{where}: attention_values", 0.0, 1.01)
    order = np.argsort(indices, kind="stable")
    if (np.diff(indices[order]) == 0).any():
        raise InputError(f"{where}: attention_indices must be different")
    peak = entry.get("max_activation")
    return Example(
        whole(entry.get("sequence_id", place), f"{where}: sequence_id", 1 << 53),
        tokens, indices[order], values[order],
        np.nan if peak is None else number(peak, f"{where}: max_activation", 0.0, 1.01),
        whole(entry.get("interval", 0), f"{where}: interval", 1000),
    )  # fmt: skip
