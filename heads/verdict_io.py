"""Verdicts as files: the table of scores in a folder of its own, and everything else beside it.

    scores/<detector>.safetensors   see `interp.scoreio`
    verdict.safetensors             effects per example; heads, words and parameters as JSON

The verdict is written last and holds the hash of its scores, so that halves of two verdicts are
never read as one.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heads.outcome import Performance
from heads.verdict_result import Effect, HeadVerdict, Verdict
from interp.errors import RunError
from interp.files import disk_errors, read_table, write_table
from interp.headid import HeadId
from interp.scoreio import file_stem
from interp.scores import HeadScores

SCHEMA, VERSION = "headscope.verdict", 1
NAME = "verdict.safetensors"
_NUMBERS = ("base_accuracy", "accuracy", "control_accuracy", "q")
_TEXTS = ("detector", "task", "message", "note", "params", "provenance")


def save(found: Verdict, folder: Path) -> Path:
    """Write a verdict into a folder, which is made if need be; returns the folder."""
    scores = found.scores.save(folder / "scores")
    arrays: dict[str, np.ndarray] = {
        "base.log_prob": found.base.log_prob,
        "base.correct": found.base.correct,
    }
    meta: dict[str, Any] = {"schema": SCHEMA, "version": VERSION}
    meta |= {name: getattr(found, name) for name in _TEXTS}
    meta["examples"] = found.examples
    meta["scores"] = {"file": scores.name, "sha256": _hash(scores)}
    meta["joint"] = _put(arrays, "joint", found.joint)
    meta["heads"] = [
        {
            "head": str(h.head), "verdict": h.verdict, "score": h.score, "interval": h.interval,
            "null": h.null, "q": h.q, "sentence": h.sentence,
            "effect": _put(arrays, f"{h.head}.effect", h.effect),
            "backed": _put(arrays, f"{h.head}.backed", h.backed),
        }
        for h in found.heads
    ]  # fmt: skip
    write_table(folder / NAME, arrays, meta)
    return folder


def load(folder: Path) -> Verdict:
    """Read what `save` wrote.

    Raises:
        RunError: nothing there, a damaged file, or a newer version.
    """
    path = folder / NAME
    arrays, meta = read_table(path)
    if meta.get("schema") != SCHEMA:
        raise RunError(f"{path} is not a verdict")
    if meta.get("version") != VERSION:
        raise RunError(
            f"{path} is version {meta.get('version')} of a verdict; this program reads version "
            f"{VERSION}",
            hint="update headscope",
        )
    try:
        # Only the name: a verdict from elsewhere must not point outside its folder.
        place = folder / "scores" / f"{file_stem(str(meta['detector']))}.safetensors"
        if _hash(place) != meta["scores"]["sha256"]:
            raise RunError(f"{place} is damaged, or belongs to another verdict than {path}")
        return Verdict(
            scores=HeadScores.load(place),
            examples=tuple(meta["examples"]),
            base=Performance(arrays["base.log_prob"], arrays["base.correct"]),
            heads=tuple(_head(arrays, h) for h in meta["heads"]),
            joint=_get(arrays, "joint", meta["joint"]),
            **{name: meta[name] for name in _TEXTS},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is a damaged verdict: {error}") from error


def _hash(path: Path) -> str:
    with disk_errors(path, "read"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _put(arrays: dict[str, np.ndarray], name: str, e: Effect | None) -> dict[str, Any] | None:
    if e is None:
        return None
    arrays[f"{name}.per_example"] = e.per_example
    arrays[f"{name}.control_per_example"] = e.control_per_example
    numbers = {key: getattr(e, key) for key in _NUMBERS}
    controls = [_texts(heads) for heads in e.controls]
    return {"heads": _texts(e.heads), "given": _texts(e.given), "controls": controls} | numbers


def _get(arrays: Mapping[str, np.ndarray], name: str, meta: Any) -> Effect | None:
    if meta is None:
        return None
    return Effect(
        heads=_heads(meta["heads"]),
        given=_heads(meta["given"]),
        per_example=arrays[f"{name}.per_example"],
        controls=tuple(_heads(heads) for heads in meta["controls"]),
        control_per_example=arrays[f"{name}.control_per_example"],
        **{key: _number(meta[key]) for key in _NUMBERS},
    )


def _head(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> HeadVerdict:
    head = HeadId.parse(meta["head"])
    effect = _get(arrays, f"{head}.effect", meta["effect"])
    if effect is None:
        raise ValueError(f"{head} has no effect")
    lo, hi = meta["interval"]
    return HeadVerdict(
        head, meta["verdict"], _number(meta["score"]), (_number(lo), _number(hi)),
        _number(meta["null"]), _number(meta["q"]), effect,
        _get(arrays, f"{head}.backed", meta["backed"]), meta["sentence"],
    )  # fmt: skip


def _texts(heads: Sequence[HeadId]) -> list[str]:
    return [str(h) for h in heads]


def _heads(texts: Sequence[str]) -> tuple[HeadId, ...]:
    return tuple(HeadId.parse(t) for t in texts)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
