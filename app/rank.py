"""`headscope rank`: score every head of a model and rank them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app import params
from app.catalog import check
from app.exits import INTERRUPTED, UsageError, say
from app.given import Given, made_prompts
from app.loading import Source, waiting
from app.subject import check_towers, read_towers
from app.tables import Format, Table, write

if TYPE_CHECKING:
    from app.sights import Sights
    from heads.detector import Detector
    from heads.scoring import Plan
    from interp.model import Model
    from interp.promptfile import Line
    from interp.prompts import Prompt
    from interp.run import Run
    from interp.scores import HeadScores
    from interp.tasks import Task


@dataclass(frozen=True)
class Request:
    """What the command line asks for, checked as far as it can be without a model."""

    source: Source
    detectors: Sequence[str]
    task: str | None
    lines: "Sequence[Line] | None"
    params: params.Params
    n: int
    batch_size: int
    seed: int
    towers: Sequence[str]
    command: str
    traces: int = 0


def rank(
    context: typer.Context,
    detectors: Annotated[
        list[str], typer.Argument(metavar="DETECTOR...", help="One or more; see list detectors.")
    ],
    model: o.Model = o.DEFAULT_MODEL,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Task for all; each its own if absent.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", "-p", allow_dash=True, help="Own prompts: text or JSONL file, - is stdin."
        ),
    ] = None,
    prompt: a.Texts = None,
    image: a.Images = None,
    top: o.Top = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; in runs/ if absent.")
    ] = None,
    save: Annotated[bool, typer.Option(help="Keep a run, so that it can go on.")] = True,
    format: o.Formatted = Format.auto,
    n: Annotated[int, typer.Option(min=1, help="Prompts of a task.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of tasks and controls.")] = 0,
    tower: Annotated[
        str | None,
        typer.Option(help="Tower to score, several as text,vision, or all; the first if absent."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(help="NAME:KEY=VALUE of a detector or task; may be given often."),
    ] = None,
    traces: Annotated[
        int, typer.Option(min=0, help="Keep the attention of the first N prompts; see capture.")
    ] = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take; tokens, memory, time.")
    ] = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Score every head of a model and rank them.

    Several detectors share one pass where they use the same prompts. Finished batches are kept:
    the same command goes on where it was stopped, and is answered from the run once that is
    complete. Heads of several towers share a table, and its q-values correct for all of them.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or ())
    _check(source, detectors, task, given)
    request = Request(
        source,
        detectors,
        task,
        given.lines(),
        params.read(param or (), detectors, task),
        n,
        batch_size,
        seed,
        read_towers(tower),
        shlex.join(["headscope", *(context.obj or ())]),
        traces,
    )
    if traces and not save:
        raise UsageError("--traces are kept in a run; got --no-save")
    if dry_run:
        from app.estimate import estimate

        estimate(request, format=format, quiet=quiet)
        return
    answer = _answer(request, save=save, out=out, top=top, quiet=quiet)
    drawn = write(answer, format)
    if not drawn and not quiet:
        for part in answer.parts:
            say(f"{part.title}: {part.note}")


def _check(source: Source, detectors: Sequence[str], task: str | None, given: Given) -> None:
    """Refuse names that do not exist before anything slow begins."""
    for name in detectors:
        check("detector", name)
    if len(set(detectors)) != len(detectors):
        raise UsageError(f"each detector may be asked for once; got {', '.join(detectors)}")
    if task is not None:
        check("task", task)
        if given.options:
            raise UsageError(f"{given.options[0]} and --task exclude each other; got both")
    source.check()


def prepared(
    request: Request, model: "Model"
) -> "tuple[list[Detector], list[Prompt] | None, Task | None]":
    """Detectors, own prompts and task of a request, for a model."""
    made = params.detectors_of(request.detectors, request.params)
    if request.lines is not None:
        return made, made_prompts(request.lines, model), None
    return made, None, params.task_of(request.task, made, request.params)


def _answer(
    request: Request, *, save: bool, out: Path | None, top: int | None, quiet: bool
) -> Table:
    from app.headtable import head_table

    model = request.source.load(quiet=quiet)
    with waiting("making prompts", quiet=quiet):
        from heads.scoring import plan

        towers = check_towers(model, request.towers)
        made, prompts, task = prepared(request, model)
        planned = plan(
            model, made, prompts, task=task, n=request.n, batch_size=request.batch_size,
            seed=request.seed, tower=towers,
        )  # fmt: skip
    if not save:
        return head_table(_compute(model, planned, None, request, quiet=quiet), top=top)
    run = _open(request, planned, out)
    with run:
        if run.status == "complete":
            scores: Mapping[str, HeadScores] = run.scores
            news = f"answered from the saved run {run.folder}; nothing was computed"
        else:
            if run.finished and not quiet:
                say(f"going on with {run.folder}: {_counted(run, planned)} are finished")
            scores = _compute(model, planned, run, request, quiet=quiet)
            news = f"saved: {run.folder}"
        shown = {n: scores[n] for n in request.detectors}
        _sights(model, planned, request, shown).keep(run, shown)
        if request.traces:
            _keep_traces(model, planned, run, request, quiet=quiet)
    if not quiet:
        say(news)
    return head_table({name: scores[name] for name in request.detectors}, run=run, top=top)


def _sights(
    model: "Model", planned: "Plan", request: Request, tables: "Mapping[str, HeadScores]"
) -> "Sights":
    from app.sights import Sights

    lines = request.lines

    def prompts() -> "list[Prompt]":
        every = {p.id: p for job in planned.jobs for p in job.prompts if p.inputs}
        # In the order of the file; batches are in that of lengths.
        return list(every.values()) if lines is None else [every[line.id] for line in lines]

    detectors = {d.name: d for job in planned.jobs for d in job.detectors}.values()
    wanted = [name for d in detectors for name in d.needs]
    # One tower looks: the first that any table has heads of.
    scored = {name for table in tables.values() for name in table.towers}
    tower = next(name for name in planned.towers if name in scored)
    return Sights(model, prompts, lines, tower, wanted)


def _keep_traces(
    model: "Model", planned: "Plan", run: "Run", request: Request, *, quiet: bool
) -> None:
    from app.capture import keep_traces

    lines = request.lines
    every = {p.id: p for job in planned.jobs for p in job.prompts}
    # In the order of the file; batches are in that of lengths.
    prompts = list(every.values()) if lines is None else [every[line.id] for line in lines]
    with waiting("keeping traces", quiet=quiet):
        keep_traces(model, run, prompts, lines, request.traces)


def _open(request: Request, planned: "Plan", out: Path | None) -> "Run":
    from app.folders import folder_for
    from app.reporter import opening
    from interp.run import Run

    folder = out or folder_for(request.detectors, request.source.name, planned.key)
    opening(folder)
    return Run.open_or_create(folder, planned.key, _about(request, planned))


def _about(request: Request, planned: "Plan") -> dict[str, Any]:
    import platform

    return {
        "command": request.command,
        "model": request.source.name,
        "revision": request.source.revision,
        "task": request.task,
        "seed": request.seed,
        "batches": len(planned.jobs),
        "tokens": planned.tokens,
        "python": platform.python_version(),
    }


def _compute(
    model: "Model", planned: "Plan", run: "Run | None", request: Request, *, quiet: bool
) -> "Mapping[str, HeadScores]":
    from app.progress import progress
    from app.reporter import aside
    from heads.scoring import execute

    finished = run.finished if run is not None else frozenset()
    done = sum(job.tokens for job in planned.jobs if job.index in finished)
    try:
        with progress(planned.tokens, done, quiet=quiet) as report:
            with aside():
                return execute(model, planned, run=run, seed=request.seed, progress=report)
    except KeyboardInterrupt:
        if run is None:
            say("interrupted; nothing was saved", hint="without --no-save it could go on")
        else:
            say(f"interrupted: {_counted(run, planned)} are saved in {run.folder}",
                hint=f"the same command goes on: {request.command}")  # fmt: skip
        raise typer.Exit(INTERRUPTED) from None


def _counted(run: "Run", planned: "Plan") -> str:
    return f"{len(run.finished)} of {len(planned.jobs)} batches"
