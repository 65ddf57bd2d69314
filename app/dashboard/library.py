"""The runs under one folder, as pages read them: by name, kept open, never beyond the folder."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from interp.errors import InterpError, RunError, UnknownNameError
from interp.run import COMPLETE, Run
from interp.scores import HeadScores
from interp.traces.trace import Trace, traces_of

_OPEN = 16


@dataclass(frozen=True)
class Entry:
    """A run in the list of runs.

    Attributes:
        name: of its folder.
        run: the run, if it can be read.
        error: why it cannot.
        hint: what to do about that.
    """

    name: str
    run: Run | None
    error: str = ""
    hint: str = ""


@dataclass(frozen=True)
class OpenRun:
    """A run that somebody looks at.

    Attributes:
        name: of its folder.
        run: the run.
    """

    name: str
    run: Run

    @property
    def info(self) -> Mapping[str, Any]:
        """Contents of its `run.json`."""
        return self.run.info

    @cached_property
    def tables(self) -> dict[str, HeadScores]:
        """Tables of scores by name; empty while the run is not complete.

        Raises:
            RunError: a table is damaged.
        """
        return self.run.scores

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What commands other than `rank` kept beside the tables."""
        if self.run.status != COMPLETE or not self.info.get("view") or 0 not in self.run.finished:
            return {}
        return self.run.part(0).meta

    @cached_property
    def traces(self) -> dict[str, Trace]:
        """Traces of prompts by key."""
        return traces_of(self.run.folder)

    def table(self, name: str | None) -> HeadScores:
        """A table by name; the first if none is named.

        Raises:
            UnknownNameError: no such table.
            RunError: the run has none at all.
        """
        if not self.tables:
            if self.run.status == COMPLETE:
                raise RunError(
                    f"run {self.name} holds no scores of heads",
                    hint=f"headscope rank DETECTOR --model {self.info.get('model', 'MODEL')} "
                    "makes some",
                )
            raise RunError(
                f"run {self.name} is {self.run.status} and has no table of scores",
                hint=f"go on with: {self.info.get('command', 'the command that began it')}",
            )
        found = name or next(iter(self.tables))
        if found not in self.tables:
            raise UnknownNameError("table of scores in this run", found, self.tables)
        return self.tables[found]

    def trace(self, key: str | None) -> Trace:
        """A trace by key; the first if none is named.

        Raises:
            UnknownNameError: no such trace.
            RunError: the run has none at all.
        """
        if not self.traces:
            raise RunError(
                f"run {self.name} keeps no traces, so there are no maps to draw",
                hint=f"headscope capture --model {self.info.get('model', 'MODEL')} makes some",
            )
        found = key or next(iter(self.traces))
        if found not in self.traces:
            raise UnknownNameError("prompt with a trace in this run", found, self.traces)
        return self.traces[found]


def place_of(name: str, info: Mapping[str, Any]) -> str:
    """Address of the page on which most of a run is seen."""
    view = info.get("view")
    if info.get("scores") or info.get("status") != COMPLETE:
        page = "patch" if view == "positions" else "heads"
    elif view in ("sets", "sweep", "steer"):
        page = f"intervene?result={quote(name, safe='')}"
    else:
        page = {"windows": "patch", "capture": "head/0/0"}.get(str(view), "heads")
    return f"/r/{quote(name, safe='')}/{page}"


@dataclass
class Library:
    """All runs under a folder.

    Attributes:
        root: the folder; it may not exist yet.
    """

    root: Path
    _open: "OrderedDict[tuple[str, tuple[int, int]], OpenRun]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> list[str]:
        """Names of the folders that hold a run."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if (p / "run.json").is_file())

    def entries(self) -> list[Entry]:
        """Every run, the newest first; a damaged one says so and hides no other."""
        out = []
        for name in self.names():
            try:
                out.append(Entry(name, self.open(name).run))
            except InterpError as error:
                out.append(Entry(name, None, str(error), error.hint or ""))
        key = lambda e: str(e.run.info.get("created", "")) if e.run else ""  # noqa: E731
        return sorted(out, key=key, reverse=True)

    def open(self, name: str) -> OpenRun:
        """A run by the name of its folder.

        Raises:
            UnknownNameError: there is none under the root.
            RunError: it is damaged, or newer than this program.
        """
        # A name out of the list: nothing that a browser sends becomes a path by itself.
        if name not in self.names():
            raise UnknownNameError("run", name, self.names())
        folder = self.root / name
        seen = tuple(_stamp(p) for p in (folder / "run.json", folder / "traces"))
        key = (name, (seen[0], seen[1]))
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        made = OpenRun(name, Run.load(folder))
        if made.run.status == COMPLETE:
            with self._lock:
                self._open[key] = made
                while len(self._open) > _OPEN:
                    self._open.popitem(last=False)
        return made


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
