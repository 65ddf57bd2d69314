"""Attention patterns of mit-han-lab/duo-attention (Xiao et al. 2410.10819).

A folder holds `full_attention_heads.tsv`, layers × key-value heads of gates α between 0 (the head
needs only sinks and recent tokens) and 1 (it needs the whole context), as training left them; and
`config.json` with how they were trained. Gates a little outside 0..1 are clipped, as their reader
does. A row is a key-value head: the table has granularity `kv`.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from app.interchange import FORMATS, Found, Interchange
from app.interchange.bounded import HEADS, LAYERS, MB, number, parsed, read_bytes, shown, text
from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"
SIZE, OUTSIDE = 32 * MB, 0.5
_FACTS = (
    *("dataset_format", "supervision", "sink_size", "recent_size", "lr", "reg_weight"),
    *("num_steps", "batch_size", "context_length_min", "context_length_max", "num_passkeys"),
    *("seed",),
)


def read(path: Path, model: str | None) -> Found:
    """A pattern as a table of scores: its folder, or the table in it.

    Raises:
        InputError: not such a table, or neither the caller nor a `config.json` beside the table
            names the model.
        RunError: it cannot be read.
    """
    given = path.is_dir()
    table_path = path / TABLE if given else path
    data = read_bytes(table_path, SIZE, inside=given)
    gates = _gates(data, table_path)
    config_path = table_path.with_name(CONFIG)
    config: dict[str, Any] = {}
    raw = b""
    # Beside a table that was named by itself, a file of this name may be anybody's.
    if config_path.is_file() and (given or table_path.name == TABLE):
        raw = read_bytes(config_path, MB, inside=True)
        config = parsed(raw, config_path, dict)
    if not model:
        named = config.get("model_name")
        model = text(named, f"{config_path}: model_name", 300).rpartition("/")[2] if named else ""
    if not model:
        raise InputError(
            f"a model must be named: {path.name} does not say whose pattern it holds",
            hint="--model NAME",
        )
    facts = {n: config[n] for n in _FACTS if isinstance(config.get(n), str | int | float)}
    for name, value in facts.items():
        if isinstance(value, str):
            text(value, f"{config_path}: {name}", 300)
        else:
            number(value, f"{config_path}: {name}")
    n_layers, n_heads = gates.shape
    table = HeadScores(
        detector="duo-attention",
        heads=tuple(HeadId(layer, head) for layer in range(n_layers) for head in range(n_heads)),
        per_example=gates.clip(0.0, 1.0).reshape(1, -1),
        null_per_example=None,
        examples=("trained gates",),
        unit="gate of full attention",
        range=(0.0, 1.0),
        params=facts,
        provenance={"model": model, "imported": "duo-attention"},
        granularity="kv",
    )
    digest = hashlib.sha256(hashlib.sha256(data).digest() + raw).hexdigest()
    return Found((table,), model, digest, {"file": table_path.name, "config": facts})


def _gates(data: bytes, path: Path) -> np.ndarray:
    """Gates [layer, key-value head]."""
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be a table of numbers; it is no text") from error
    rows: list[list[float]] = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {i}"
        cells = line.split()
        if len(cells) > HEADS or len(rows) >= LAYERS:
            raise InputError(f"{where}: at most {LAYERS} layers of {HEADS} heads are read")
        if rows and len(cells) != len(rows[0]):
            raise InputError(f"{where} must have {len(rows[0])} numbers; got {len(cells)}")
        rows.append([_gate(cell, where) for cell in cells])
    if not rows:
        raise InputError(f"{path} must hold gates of layers × key-value heads; it holds none")
    return np.array(rows)


def _gate(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not -OUTSIDE <= value <= 1.0 + OUTSIDE:
        raise InputError(f"{where} must hold gates about 0..1; got {shown(cell)}")
    return value


FORMATS.register("duo-attention")(
    Interchange("gates of key-value heads, from mit-han-lab/duo-attention", read=read)
)
