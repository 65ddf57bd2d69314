"""Runs: folders that hold what was computed, from what, and enough to go on after a kill.

    run.json                    what was run, on what, with which versions and seeds; the status
    scores/<detector>.safetensors   one table of head scores per detector, once complete
    parts/<number>.safetensors  one file per finished batch
    extra/<name>.safetensors    what is shown beside the tables, such as maps on images
    .lock                       the process that writes

Every file is written whole or not at all (`interp.files`), so a process killed at any moment loses
at most the batch in flight. A run is known by its *key*: all that its numbers depend on. The same
key finds the same folder and goes on; another key in the same folder is refused.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from interp import lock
from interp.errors import InputError, RunError
from interp.files import (
    TEMPORARY,
    check_table,
    disk_errors,
    jsonable,
    read_json,
    read_table,
    remove_temporaries,
    write_atomic,
    write_json,
    write_table,
)
from interp.scoreio import encode, file_stem, load
from interp.scores import HeadScores

SCHEMA, VERSION = "headscope.run", 1
RUNNING, COMPLETE, INTERRUPTED = "running", "complete", "interrupted"
_OWN = ("schema", "version", "created", "finished", "status", "key", "content_key", "scores")
_PART = re.compile(r"(\d{5,})\.safetensors")
_NAME = re.compile(r"[a-z][a-z-]*")


@dataclass(frozen=True, eq=False)
class Part:
    """What one finished batch left: its arrays, and facts about it."""

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]


class Run:
    """A run folder, opened for writing by `open_or_create` or for reading by `load`.

    As a context manager it gives its lock back, and a run that was left before `finish` is marked
    interrupted:

        with Run.open_or_create(folder, key, meta) as run:
            for i, batch in enumerate(batches):
                if i not in run.finished:
                    run.put_part(i, measure(batch), {})
            run.finish(scores)

    Attributes:
        folder: where it lies.
        info: contents of `run.json`.
    """

    def __init__(self, folder: Path, info: Mapping[str, Any], *, locked: Path | None) -> None:
        self.folder = folder
        self.info: Mapping[str, Any] = MappingProxyType(dict(info))
        self._lock = locked
        self._finished = _finished(folder / "parts", check=locked is not None)
        self._scores: dict[str, HeadScores] | None = None

    @classmethod
    def open_or_create(
        cls, folder: str | Path, key: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> "Run":
        """Begin a run, or go on with the one of the same key.

        A complete run is opened for reading: look at `status` before computing anything.

        Args:
            folder: made if need be; must be empty or hold a run of the same key.
            key: everything the numbers depend on: model, revision, task, detectors, parameters,
                seed, …
            meta: further facts for `run.json`: command, model, task, seed, versions, …

        Raises:
            InputError: key or meta have no JSON form, or meta uses a name of the run's own.
            RunError: another run, a folder of something else, a damaged or newer run, a run that
                another process is writing, or a disk that is full or not ours to write.
        """
        folder = Path(folder)
        key = jsonable(key, "key")
        about = jsonable(meta or {}, "meta")
        taken = sorted(set(about) & set(_OWN))
        if taken:
            raise InputError(f"meta of a run must not use the run's own names; got {taken[0]!r}")
        known = _inspect(folder, key)
        if known is not None and known["status"] == COMPLETE:
            lock.clear(folder)  # of a process killed between its last write and its release
            return cls(folder, known, locked=None)
        fresh = not folder.exists()
        with disk_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
        held: Path | None = None
        try:
            held = lock.acquire(folder)
            known = _inspect(folder, key)  # another process may have been faster
            if known is not None and known["status"] == COMPLETE:
                lock.release(held)
                return cls(folder, known, locked=None)
            for place in (folder, folder / "parts", folder / "scores", folder / "extra"):
                remove_temporaries(place)
            info = dict(about) | (known or {"created": _now()})
            info |= {"schema": SCHEMA, "version": VERSION, "status": RUNNING}
            info |= {"key": key, "content_key": content_key(key)}
            with disk_errors(folder, "create"):
                (folder / "parts").mkdir(exist_ok=True)
            run = cls(folder, info, locked=held)
            run._write()
            return run
        except BaseException:
            if held is not None:
                lock.release(held)
            if fresh:
                _remove_if_empty(folder)
            raise

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """Open a run for reading, complete or not.

        Raises:
            RunError: no such folder, no run in it, or a damaged or newer one.
        """
        folder = Path(folder)
        with disk_errors(folder, "read"):
            if not folder.is_dir():
                raise RunError(f"there is no run folder {folder}")
            if not (folder / "run.json").exists():
                raise RunError(f"{folder} is not a run folder: it has no run.json")
        return cls(folder, _read_info(folder), locked=None)

    @property
    def status(self) -> str:
        """`complete`, `running` while a living process writes it, else `interrupted`."""
        status = str(self.info["status"])
        if status == RUNNING and self._lock is None and not lock.held(self.folder):
            return INTERRUPTED
        return status

    @property
    def finished(self) -> frozenset[int]:
        """Numbers of the finished batches."""
        return frozenset(self._finished)

    def put_part(
        self, i: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what batch `i` gave; once this returns, a kill does not lose it.

        Raises:
            InputError: arrays or meta have no form on disk.
            RunError: the batch is finished already, the run is open for reading only, or the disk
                is full.
        """
        self._must_write()
        if i < 0 or i in self._finished:
            raise RunError(f"batch {i} of {self.folder} must be new and not negative")
        write_table(self._part_path(i), arrays, {"part": i, "meta": meta or {}})
        self._finished.add(i)

    def part(self, i: int) -> Part:
        """What batch `i` gave.

        Raises:
            RunError: it is not finished, or its file is damaged.
        """
        if i not in self._finished:
            raise RunError(f"batch {i} of {self.folder} is not finished")
        arrays, header = read_table(self._part_path(i))
        return Part(arrays, header.get("meta", {}))

    def put_extra(
        self, name: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Keep something beside the tables, whole or not at all; an older one is replaced.

        No number of the run depends on it, so a complete run takes it too, whoever opened it.

        Raises:
            InputError: the name is no plain word, or arrays or meta have no form on disk.
            RunError: the run is neither complete nor open for writing, or the disk is full.
        """
        if self.info["status"] != COMPLETE:
            self._must_write()
        path = self._extra_path(name)
        with disk_errors(path.parent, "create"):
            path.parent.mkdir(exist_ok=True)
        write_table(path, arrays, {"extra": name, "meta": meta or {}})

    def extra(self, name: str) -> Part | None:
        """What was kept beside the tables under a name; None if nothing was.

        Raises:
            InputError: the name is no plain word.
            RunError: its file is damaged.
        """
        path = self._extra_path(name)
        if not path.exists():
            return None
        arrays, header = read_table(path)
        return Part(arrays, header.get("meta", {}))

    def finish(self, scores: Sequence[HeadScores]) -> None:
        """Write the tables of scores, mark the run complete and give the lock back.

        Raises:
            InputError: two tables are of one detector.
            RunError: the run is open for reading only, or the disk is full; the parts are kept.
        """
        self._must_write()
        stems = [file_stem(table.detector) for table in scores]
        if len(set(stems)) != len(stems):
            raise InputError(f"tables of a run must be of different detectors; got {stems}")
        place = self.folder / "scores"
        with disk_errors(place, "create"):
            place.mkdir(exist_ok=True)
        listed = {}
        for table, stem in zip(scores, stems, strict=True):
            data = encode(table)
            write_atomic(place / f"{stem}.safetensors", data)
            listed[table.detector] = {
                "file": f"{stem}.safetensors",
                "sha256": hashlib.sha256(data).hexdigest(),
                "heads": len(table.heads),
                "claimed": int((table.verdict == table.detector).sum()),
                "message": table.message,
            }
        self._write(status=COMPLETE, finished=_now(), scores=listed)
        self._scores = {table.detector: table for table in scores}
        self.close()

    @property
    def scores(self) -> dict[str, HeadScores]:
        """Tables of scores by detector; empty until the run is complete.

        Raises:
            RunError: a table is missing or damaged; the message names the file.
        """
        if self._scores is None:
            listed = self.info.get("scores") or {}
            self._scores = {name: self._table(entry) for name, entry in listed.items()}
        return dict(self._scores)

    def _table(self, entry: Mapping[str, Any]) -> HeadScores:
        # Only the name: a run from elsewhere must not point outside its folder.
        path = self.folder / "scores" / Path(str(entry.get("file"))).name
        with disk_errors(path, "read"):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        table = load(path)
        if found != entry.get("sha256"):
            raise RunError(
                f"{path} is damaged: its contents are not those the run wrote",
                hint="use another copy of the run, or compute it anew with another --out",
            )
        return table

    def close(self) -> None:
        """Give the lock back; a run that is not complete is marked interrupted."""
        if self._lock is None:
            return
        try:
            if self.info["status"] == RUNNING:
                self._write(status=INTERRUPTED)
        finally:
            lock.release(self._lock)
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except RunError:
            if error is None:  # a full disk has been reported already: do not hide the first error
                raise

    def __repr__(self) -> str:
        return (
            f"Run({str(self.folder)!r}): {self.status}, {len(self._finished)} parts, "
            f"scores: {', '.join(self.info.get('scores') or {}) or 'none'}"
        )

    def _must_write(self) -> None:
        if self._lock is None:
            raise RunError(f"the run in {self.folder} is open for reading only")

    def _part_path(self, i: int) -> Path:
        return self.folder / "parts" / f"{i:05d}.safetensors"

    def _extra_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InputError(f"an extra of a run is named by lower-case letters; got {name!r}")
        return self.folder / "extra" / f"{name}.safetensors"

    def _write(self, **changes: Any) -> None:
        info = {**self.info, **changes}
        write_json(self.folder / "run.json", info)
        self.info = MappingProxyType(jsonable(info))


def content_key(key: Mapping[str, Any]) -> str:
    """Hash of a run's key; the order of its entries does not matter."""
    text = json.dumps(jsonable(key, "key"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def default_folder(base: str | Path, key: Mapping[str, Any]) -> Path:
    """The folder under `base` for a key: readable, and the same for the same key.

    >>> default_folder("runs", {"detectors": ["sink"], "model": "org/gpt2", "task": "text"}).name
    'sink-gpt2-text-4f5d0dbc71'
    """
    words: list[str] = []
    for name in ("detectors", "model", "task"):
        value = key.get(name)
        entries = list(value) if isinstance(value, list | tuple | Mapping) else [value]
        words += [
            file_stem(str(e).rstrip("/").rpartition("/")[2].removeprefix("zoo:"))
            for e in entries
            if e
        ]
    prefix = "-".join(words)[:80].strip("-.") or "run"
    return Path(base) / f"{prefix}-{content_key(key)[:10]}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _inspect(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `run.json` of a folder says; None if a run may begin there.

    Raises:
        RunError: the folder holds another run, or something that is no run.
    """
    with disk_errors(folder, "read"):
        if folder.exists() and not folder.is_dir():
            raise RunError(f"a run needs a folder; {folder} is a file", hint="choose another --out")
        if not folder.is_dir():
            return None
        if not (folder / "run.json").exists():
            # A run killed while it began leaves its lock, temporaries or an empty parts folder.
            foreign = [p.name for p in folder.iterdir() if not _left_by_a_begin(p)]
            if foreign:
                raise RunError(
                    f"a run needs a folder of its own; {folder} is not a run and holds "
                    f"{min(foreign)!r}",
                    hint="choose another --out",
                )
            return None
    info = _read_info(folder)
    if info["content_key"] != content_key(key):
        raise RunError(
            f"{folder} holds another run: {_difference(info['key'], key)}",
            hint="choose another --out, or delete the folder",
        )
    return info


def _left_by_a_begin(path: Path) -> bool:
    if path.name == "parts":
        return path.is_dir() and not any(path.iterdir())
    return path.name == lock.NAME or path.name.endswith(TEMPORARY)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    info = read_json(path)
    if info.get("schema") != SCHEMA:
        raise RunError(f"{folder} is not a run folder: its run.json has no schema {SCHEMA!r}")
    version = info.get("version")
    if isinstance(version, int) and version > VERSION:
        raise RunError(
            f"{folder} is a run of version {version}; this program reads version {VERSION}",
            hint="update headscope",
        )
    shapes = {"version": int, "status": str, "key": dict, "content_key": str}
    for name, kind in shapes.items():
        if not isinstance(info.get(name), kind):
            raise RunError(f"{path} is damaged: {name!r} must be a {kind.__name__}")
    scores = info.get("scores") or {}
    if not isinstance(scores, dict) or not all(isinstance(e, dict) for e in scores.values()):
        raise RunError(f"{path} is damaged: 'scores' must be a mapping of mappings")
    return info


def _finished(parts: Path, *, check: bool) -> set[int]:
    """Numbers of the parts; with `check` a damaged one is an error now, not at the end."""
    finished = set()
    with disk_errors(parts, "read"):
        paths: Iterable[Path] = sorted(parts.iterdir()) if parts.is_dir() else ()
    for path in paths:
        match = _PART.fullmatch(path.name)
        if match:
            if check:
                check_table(path)
            finished.add(int(match[1]))
    return finished


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first entries in which two keys differ, in words."""
    absent = object()
    differing = [
        name
        for name in dict.fromkeys([*there, *here])
        if content_key({"v": there[name]} if name in there else {})
        != content_key({"v": here[name]} if name in here else {})
    ]
    shown = []
    for name in differing[:3]:
        sides = [
            "absent" if side.get(name, absent) is absent else _brief(side[name])
            for side in (there, here)
        ]
        shown.append(f"{name} is {sides[0]} there and {sides[1]} here")
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return ", ".join(shown) + more if shown else "its key does not match its hash"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _remove_if_empty(folder: Path) -> None:
    """Take back a folder that was made for a run which could not begin."""
    for place in (folder / "parts", folder):
        try:
            place.rmdir()
        except OSError:
            continue
