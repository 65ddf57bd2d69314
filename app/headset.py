"""Heads on a command line, in one language for every command.

    L9H6, 9.6, vision.L3H2    single heads
    L3, vision.L3, L3-L5      every head of a layer, of layers
    all                       every head of the tower
    top:20@RUN                the 20 strongest of a run's scores
    claimed@RUN               those that the run claims
    causal@RUN                those that a verdict calls causal
    FILE                      a text file with any of these, `#` begins a comment

Several are separated by commas. RUN is a run folder, its name in `runs/`, or one file of scores;
where a run has several tables, `RUN#DETECTOR` names one. Runs are read without torch.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.exits import UsageError, say, usage
from interp.errors import HeadIdError, InputError, RunError, UnknownNameError
from interp.headid import HeadId

if TYPE_CHECKING:
    from interp.model import Model
    from interp.run import Run
    from interp.scores import HeadScores

_LAYERS = re.compile(r"(?:(?P<tower>[A-Za-z_][\w-]*)\.)?[Ll](?P<first>\d+)(?:-[Ll]?(?P<last>\d+))?")
_FORMS = "write L9H6, 9.6, L3, all, top:20@RUN, claimed@RUN or the name of a file"


@dataclass(frozen=True)
class Layers:
    """Every head of some layers; of every layer if `last` is None."""

    tower: str | None
    first: int
    last: int | None


@dataclass(frozen=True)
class HeadSet:
    """Heads as asked for; those of layers are known once there is a model.

    Attributes:
        items: heads and layers, in order.
        text: as it was written.
        models: models of the runs that heads were taken from.
        grouped: whether the runs speak of key-value heads.
    """

    items: tuple[HeadId | Layers, ...]
    text: str
    models: frozenset[str] = frozenset()
    grouped: bool = False

    def of(self, model: "Model", *, tower: str | None = None, kv: bool = False) -> list[HeadId]:
        """The heads on a model, each once, in the order asked for.

        Args:
            model: the model.
            tower: tower of layers that name none; the model's first if None.
            kv: key-value heads instead of query heads.

        Raises:
            UsageError: a head or layer lies outside the model, or heads are of the other kind.
        """
        if self.grouped and not kv:
            raise UsageError(
                f"query heads are asked for; the scores behind {self.text!r} are of key-value heads"
            )
        found: dict[HeadId, None] = {}
        for item in self.items:
            try:
                heads = [item] if isinstance(item, HeadId) else _expanded(item, model, tower, kv)
                for head in heads:
                    model.layer_of(head)
            except HeadIdError as error:
                raise usage(error) from error
            found |= dict.fromkeys(heads)
        return list(found)

    def say_models(self, model: str) -> None:
        """Say so where heads were found on another model than they are used on."""
        for name in sorted(self.models - {model, ""}):
            say(f"the heads of {self.text} were found on {name}, and are used on {model}")

    def layers(self) -> tuple[int, ...]:
        """The layers, for sites without heads.

        Raises:
            UsageError: single heads are named, or `all`.
        """
        found: dict[int, None] = {}
        for item in self.items:
            if isinstance(item, HeadId) or item.last is None:
                raise UsageError(f"this site has layers, not heads: write L3; got {self.text!r}")
            found |= dict.fromkeys(range(item.first, item.last + 1))
        return tuple(found)


def parse(texts: Sequence[str]) -> HeadSet:
    """Read heads as a command line names them; nothing heavy is imported.

    Raises:
        UsageError: a text that is none of the forms.
        RunError: a run that is not there or cannot be read.
    """
    found = _Reading()
    for text in texts:
        for piece in [text] if Path(text).is_file() else text.split(","):
            found.read(piece.strip(), files=True)
    if not found.items:
        raise UsageError(f"--heads must name at least one head; got {', '.join(texts)!r}",
                         hint=_FORMS)  # fmt: skip
    return HeadSet(
        tuple(found.items), ",".join(texts), frozenset(found.models), found.kinds == {"kv"}
    )


class _Reading:
    def __init__(self) -> None:
        self.items: list[HeadId | Layers] = []
        self.models: set[str] = set()
        self.kinds: set[str] = set()

    def read(self, text: str, *, files: bool, place: str = "") -> None:
        if not text:
            return
        if text == "all":
            self.items.append(Layers(None, 0, None))
        elif match := _LAYERS.fullmatch(text):
            first = int(match["first"])
            last = int(match["last"] or first)
            if last < first:
                raise UsageError(f"{place}layers go from the lower to the higher; got {text!r}")
            self.items.append(Layers(match["tower"], first, last))
        elif "@" in text:
            self._from_run(text)
        elif files and Path(text).is_file():
            for number, piece in _pieces(Path(text)):
                self.read(piece, files=False, place=f"{text}, line {number}: ")
        else:
            try:
                self.items.append(HeadId.parse(text))
            except HeadIdError as error:
                raise UsageError(f"{place}{error}", hint=_FORMS) from error

    def _from_run(self, text: str) -> None:
        how, _, where = text.partition("@")
        name, _, count = how.partition(":")
        if name not in _CHOICES:
            raise UnknownNameError("choice of heads of a run", name, _CHOICES)
        if (name == "top") != bool(count) or not (count or "1").isdigit() or not where:
            raise UsageError(
                f"heads of a run are top:N@RUN, claimed@RUN or causal@RUN; got {text!r}"
            )
        if count and int(count) == 0:
            raise UsageError(f"top:N@RUN needs N of at least 1; got {text!r}")
        folder, _, detector = where.partition("#")
        table, run = _table(Path(folder), detector)
        heads = _CHOICES[name](table, run, int(count or 0))
        if not heads:
            raise InputError(
                f"{text} must name at least one head; {table.detector} has none there",
                hint=f"the scores say: {table.message}" if table.message else None,
            )
        self.items += heads
        self.kinds.add(table.granularity)
        self.models.add(str(table.provenance.get("model", "")))


def _pieces(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"heads must be in a text file; {path} cannot be read as one",
            hint="for scores write top:20@FILE",
        ) from error
    for number, line in enumerate(lines, 1):
        for piece in line.partition("#")[0].replace(",", " ").split():
            yield number, piece


def _expanded(item: Layers, model: "Model", tower: str | None, kv: bool) -> list[HeadId]:
    stack = model.tower(item.tower or tower or next(iter(model.towers)))
    last = stack.layers[-1].index if item.last is None else item.last
    by_index = {layer.index: layer for layer in stack.layers}
    for index in range(item.first, last + 1):
        if index not in by_index and item.last is not None:
            raise HeadIdError(
                f"layer {index} is outside this model: {model.name} has layers "
                f"{min(by_index)} to {max(by_index)} in tower {stack.name}"
            )
    return [
        HeadId(layer.index, head, stack.name)
        for index, layer in sorted(by_index.items())
        if item.first <= index <= last
        for head in range(layer.n_kv_heads if kv else layer.n_heads)
    ]


def _table(place: Path, detector: str) -> "tuple[HeadScores, Run | None]":
    from app.runtables import tables_of

    tables, run = tables_of(place)
    if detector:
        if detector not in tables:
            raise UnknownNameError("table of scores in this run", detector, tables)
        return tables[detector], run
    if len(tables) != 1 and run is not None and run.info.get("first") in tables:
        return tables[str(run.info["first"])], run
    if len(tables) != 1:
        raise UsageError(
            f"{place} must have one table of scores; it has {', '.join(tables) or 'none'}",
            hint=f"write {place}#{next(iter(tables), 'DETECTOR')}",
        )
    return next(iter(tables.values())), run


def _top(table: "HeadScores", run: "Run | None", n: int) -> list[HeadId]:
    return list(table.top(n))


def _claimed(table: "HeadScores", run: "Run | None", n: int) -> list[HeadId]:
    claimed = table.verdict == table.detector
    return [h for h in table.top(len(table.heads)) if claimed[table.heads.index(h)]]


def _causal(table: "HeadScores", run: "Run | None", n: int) -> list[HeadId]:
    rows = run.part(0).meta.get("rows") if run is not None and 0 in run.finished else None
    if not rows or "verdict" not in rows[0]:
        raise RunError("causal@RUN needs a run of headscope verdict; this is none")
    return [HeadId.parse(row["head"]) for row in rows if row["verdict"] == "causal"]


_CHOICES: Mapping[str, "Callable[[HeadScores, Run | None, int], list[HeadId]]"] = {
    "top": _top,
    "claimed": _claimed,
    "causal": _causal,
}
