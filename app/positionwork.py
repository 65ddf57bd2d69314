"""`headscope patch --positions`: makes, keeps and writes sweeps over positions."""

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from app.exits import UsageError, say
from app.keep import Answer
from app.pairwork import PairWork
from app.steps import steps
from app.tables import SHOWN, Format, Part, Table, write
from interp.errors import InputError, RunError

if TYPE_CHECKING:
    from app.counts import Counted
    from app.headset import HeadSet
    from app.keep import Keeping
    from app.positions import PositionSweep
    from app.subject import Subject
    from interp.headid import HeadId
    from interp.model import Model


def check_positions(site: str, window: int | None) -> None:
    """Refuse options that do not go with `--positions`.

    Raises:
        UsageError: another site than z, or a window.
    """
    if window is not None:
        raise UsageError("--positions and --window exclude each other; got both")
    if site != "z":
        raise UsageError(
            f"--positions patches z, of which each position has its own; got --site {site}",
            hint="leave --site away",
        )


def count_positions(asked: "Subject", chosen: "HeadSet | None", model: "Model") -> "Counted":
    """Each head, and each cell of a head or layer at a position, is a run; at most."""
    from app.headset import parse
    from app.outlook import Work, padded, row
    from app.subject import check_tower
    from patching.engine import TOKENS

    check_tower(model, asked.tower)
    heads = (chosen or parse(["all"])).of(model, tower=asked.tower)
    layers = len({(h.tower, h.layer) for h in heads})
    prompts = [p.clean for p in asked.pairs(model)]
    work, runs = Work(), 0
    for length in sorted({len(p) for p in prompts}):
        once = padded([p for p in prompts if len(p) == length], asked.batch_size, order="equal")
        # Each prompt and its other for the table, for the layers and for the heads.
        each = 6 + len(heads) + (len(heads) + 2 * layers) * length
        work, runs = work + once.run(each), runs + each * once.prompts
    widest = max(work.widest, min(TOKENS, work.passed))
    work = replace(work, prompts=2 * work.prompts, tokens=2 * work.tokens, widest=widest)
    longest = max(len(p) for p in prompts)
    return work, [
        row("heads", len(heads)), row("layers", layers),
        row("cells of a prompt", longest * (len(heads) + layers), "", "at most"),
        row("runs of a prompt", runs, "", "at most"),
    ]  # fmt: skip


def run_positions(
    work: PairWork, keeping: "Keeping", model: "Model", ids: "list[HeadId] | None" = None
) -> "tuple[Answer, PositionSweep]":
    """A table of heads and a sweep over positions, from a run if there is one.

    Args:
        work: the method on pairs, which is `patch`.
        keeping: where and whether both are kept.
        model: the model.
        ids: only these heads; every head if None.
    """
    from app.keep import kept, key_of
    from app.positions import EXTRA
    from app.positionsweep import sweep_positions
    from interp.run import Run
    from patching.pairs import Pairs

    asked = work.subject
    listed = asked.pairs(model)
    data = Pairs(
        model, listed, metric=work.metric, batch_size=asked.batch_size,
        tower=asked.tower or next(iter(model.towers)),
    )  # fmt: skip
    both = [p for pair in listed for p in (pair.clean, pair.corrupted)]
    key = key_of(
        model, "patch.positions", settings=dict(work.settings), metric=work.metric,
        heads=None if ids is None else [str(h) for h in ids], **asked.key(both),
    )  # fmt: skip
    direction = str(work.settings["direction"])
    made: list[PositionSweep] = []

    def sweep() -> "PositionSweep":
        with steps("cells", quiet=keeping.quiet) as report:
            made.append(sweep_positions(data, direction=direction, heads=ids, progress=report))
        return made[0]

    def compute() -> Answer:
        from patching.engine import head_effects

        notes = _said(sweep())
        with steps("heads", quiet=keeping.quiet) as report:
            table = head_effects(
                model, data, heads=ids, direction=direction, tower=data.tower, progress=report
            )
        return Answer({table.detector: table}, {"notes": notes})

    from app.sights import BOXES, Sights

    looks = Sights(model, lambda: [p.clean for p in listed], asked.clean_lines, asked.tower, BOXES)
    answer = kept(keeping, key, compute, looks, task=asked.name, seed=asked.seed)
    if answer.folder is None:
        return answer, made[0]
    run = Run.load(answer.folder)
    if made or run.extra(EXTRA) is None:  # it was killed between the tables and the sweep
        found = made[0] if made else sweep()
        run.put_extra(EXTRA, found.arrays(), found.meta())
    return answer, _kept(answer)


def _kept(answer: Answer) -> "PositionSweep":
    from app.positions import read_positions
    from interp.run import Run

    assert answer.folder is not None
    found = read_positions(Run.load(answer.folder))
    if found is None:
        raise RunError(f"{answer.folder} has lost its sweep over positions")
    return found


def _said(sweep: "PositionSweep") -> list[str]:
    clean, corrupted = float(sweep.clean.mean()), float(sweep.corrupted.mean())
    notes = [f"clean {clean:.4g}, corrupted {corrupted:.4g}"]
    notes += [f"rounding alone may change the metric by {sweep.floor:.2g}"]
    if not sweep.aligned:
        notes.append("prompts differ in length or template, so means are taken over named spans")
    return notes


def write_positions(
    answer: Answer,
    model: str,
    *,
    format: Format,
    top: int | None,
    quiet: bool,
    sweep: "PositionSweep | None" = None,
) -> None:
    """Write the cells of a sweep, strongest first: heads, then layers.

    Args:
        answer: the tables, and where they are kept.
        model: name of the model.
        format: of the output.
        top: most cells of either kind; all if None.
        quiet: say nothing on stderr.
        sweep: the sweep; read from the run if None.
    """
    from app.positions import ROWS
    from app.positionview import COLUMNS, cells

    sweep = sweep or _kept(answer)
    parts = []
    note = "; ".join(map(str, answer.facts.get("notes", ())))
    for rows in ROWS:
        found: list[dict[str, Any]] = []
        with suppress(InputError):  # no position or span that the examples share
            found = sorted(cells(sweep, rows), key=lambda row: -abs(row["effect"]))[:top]
        title = f"{sweep.method}: {rows} at a position, change of {sweep.metric}, {model}"
        parts.append(Part(title, found, note=note if rows == ROWS[-1] else ""))
    about: dict[str, Any] = {
        "run": None if answer.folder is None else str(answer.folder), **answer.facts,
        "method": sweep.method, "metric": sweep.metric, "floor": sweep.floor,
        "aligned": sweep.aligned, "examples": len(sweep.examples),
    }  # fmt: skip
    made = Table(
        "headscope.patch.positions", COLUMNS, parts, about, frozenset({"rows", "differs"}),
        SHOWN if top is None else None,
    )  # fmt: skip
    if not write(made, format) and not quiet and note:
        say(f"{parts[0].title}: {note}")
