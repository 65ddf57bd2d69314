"""`headscope capture`: keep the attention of chosen prompts, of which any map can then be drawn."""

import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app.exits import INTERRUPTED, UsageError, say
from app.given import Given, check_speaks
from app.loading import Source, waiting
from app.subject import Subject, check_tower, subject
from app.tables import Format, Part, Table, write
from interp.errors import InputError, InterpError

if TYPE_CHECKING:
    from app.outlook import Row, Work
    from interp.model import Model
    from interp.promptfile import Line
    from interp.prompts import Prompt
    from interp.run import Run
    from interp.traces import Trace

_COLUMNS = ("prompt", "tower", "layer", "heads", "form", "error", "bytes", "note", "trace")
_HIDDEN = frozenset({"trace"})


@dataclass(frozen=True)
class Request:
    """What the command line asks for, checked as far as it can be without a model.

    Attributes:
        source: the model.
        asked: the prompts.
        towers: towers to keep; all if there are none.
        layers: layers to keep of each; all if None.
        generate: tokens to continue each prompt by.
        command: the command line.
    """

    source: Source
    asked: Subject
    towers: tuple[str, ...]
    layers: tuple[int, ...] | None
    generate: int
    command: str


def capture(
    context: typer.Context,
    model: o.Model = o.DEFAULT_MODEL,
    prompt: a.Texts = None,
    prompts: a.Prompts = None,
    image: a.Images = None,
    task: a.Task = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts of a task.")] = 4,
    tower: Annotated[
        str | None, typer.Option(help="Towers to keep, with commas; all if absent.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to keep, such as 0,3-5; all if absent.")
    ] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="Continue each prompt by so many tokens first.")
    ] = 0,
    param: a.Param = None,
    out: a.Out = None,
    format: o.Formatted = Format.auto,
    seed: a.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    dry_run: a.DryRun = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Keep the attention of prompts: queries and keys, from which any map is recomputed.

    No matrix of all tokens by all tokens is written. Each layer is compared with the model's own
    rows; one that cannot be recomputed is kept by its rows, and said to be. Traces that are
    finished are kept: the same command goes on where it was stopped.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or ())
    if task is None and not given.options:
        raise UsageError(
            "capture needs prompts; got none", hint="--prompt TEXT, --prompts FILE or --task NAME"
        )
    asked = subject(task, given, param=param, n=n, seed=seed)
    source.check()
    request = Request(
        source, asked, tuple(filter(None, (tower or "").split(","))), read_layers(layers), generate,
        shlex.join(["headscope", *(context.obj or ())]),
    )  # fmt: skip
    if dry_run:
        from functools import partial

        from app.outlook import forecast

        forecast(source, partial(count_capture, request), "capture", format=format, quiet=quiet)
        return
    run, traces = _captured(request, out=out, quiet=quiet)
    made = capture_table(traces, request.source.name, run)
    drawn = write(made, format)
    if not drawn and not quiet:
        say(f"{made.parts[0].title}: {made.parts[0].note}")


def read_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers such as `0,3-5`.

    Raises:
        UsageError: it is written otherwise.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*L?(\d+)(?:-L?(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--layers must be numbers and ranges, such as 0,3-5; got {text!r}")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def check_layers(model: "Model", towers: Collection[str], layers: Sequence[int] | None) -> None:
    """Refuse towers and layers that a model does not have.

    Raises:
        UnknownNameError: no such tower.
        UsageError: no such layer.
    """
    for tower in towers:
        check_tower(model, tower)
    chosen = [t for name, t in model.towers.items() if not towers or name in towers]
    known = {layer.index for t in chosen for layer in t.layers}
    missing = [i for i in layers or () if i not in known]
    if missing:
        raise UsageError(
            f"--layers must name layers with attention; {model.name} has none of number "
            f"{missing[0]}, only {min(known)} to {max(known)}"
        )


def _captured(request: Request, *, out: Path | None, quiet: bool) -> "tuple[Run, list[Trace]]":
    from app.keep import digest, key_of

    model = request.source.load(quiet=quiet)
    with waiting("making prompts", quiet=quiet):
        check_layers(model, request.towers, request.layers)
        prompts = request.asked.prompts(model)[0]
        if request.generate:
            check_continued(model, prompts, request.generate)
    asked = request.asked
    key = key_of(
        model, "capture", task=asked.name, prompts=digest(prompts), towers=list(request.towers),
        spans=[[p.id, sorted(p.spans)] for p in prompts], layers=request.layers,
        generate=request.generate,
    )  # fmt: skip
    with _open(request, key, len(prompts), out) as run:
        if run.finished and run.status != "complete" and not quiet:
            say(f"going on with {run.folder}: {_counted(run, prompts)} are finished")
        traces = _made(model, prompts, request, run, quiet=quiet)
        if run.status == "complete":
            news = f"answered from the saved run {run.folder}; nothing was computed"
        else:
            run.finish([])
            news = f"saved: {run.folder}"
    if not quiet:
        say(news)
    return run, traces


def _open(request: Request, key: Mapping[str, Any], n: int, out: Path | None) -> "Run":
    import platform

    from app.folders import folder_for
    from app.reporter import opening
    from interp.run import Run

    folder = out or folder_for(("capture",), request.source.name, key)
    opening(folder)
    about = {
        "command": request.command, "model": request.source.name, "view": "capture",
        "revision": request.source.revision, "task": request.asked.name, "batches": n,
        "seed": request.asked.seed, "python": platform.python_version(),
    }  # fmt: skip
    return Run.open_or_create(folder, key, about)


def _made(
    model: "Model", prompts: "Sequence[Prompt]", request: Request, run: "Run", *, quiet: bool
) -> "list[Trace]":
    """The trace of each prompt; those of finished parts are opened."""
    from app.steps import steps
    from interp.traces import Trace

    traces = []
    lines = request.asked.lines
    try:
        with steps("layers", quiet=quiet) as report:
            for i, one in enumerate(prompts):
                if i in run.finished:
                    traces.append(Trace(run.folder / "traces" / str(run.part(i).meta["trace"])))
                    continue

                def told(done: int, total: int, i: int = i) -> None:
                    report(i * total + done, len(prompts) * total)

                trace = captured(
                    model, continued(model, one, request.generate), run.folder,
                    None if lines is None else lines[i], request.towers, request.layers, told,
                )  # fmt: skip
                run.put_part(i, {}, {"trace": trace.key, "prompt": trace.id})
                traces.append(trace)
    except KeyboardInterrupt:
        say(f"interrupted: {_counted(run, prompts)} are saved in {run.folder}",
            hint=f"the same command goes on: {request.command}")  # fmt: skip
        raise typer.Exit(INTERRUPTED) from None
    return traces


def _counted(run: "Run", prompts: "Sequence[Prompt]") -> str:
    return f"{len(run.finished)} of {len(prompts)} traces"


def captured(
    model: "Model",
    prompt: "Prompt",
    folder: Path,
    line: "Line | None" = None,
    towers: Collection[str] = (),
    layers: Collection[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "Trace":
    """The trace of a prompt in a run's folder, its images beside it.

    Args:
        model: the model.
        prompt: the prompt.
        folder: of the run.
        line: where the prompt comes from, if it is an own one.
        towers: towers to keep; all if there are none.
        layers: layers to keep; all if None.
        progress: called with layers done and all.
    """
    from app.sights import pictures_of
    from interp.memory import fitting
    from interp.traces import capture as kept

    pictures, facts = pictures_of(model, prompt, line)
    text = line.text if line is not None else prompt.meta.get("question")
    with fitting("the attention of a prompt", "choose a shorter prompt"):
        return kept(
            model, prompt, folder, text=str(text or ""), towers=towers or None, layers=layers,
            pictures=pictures, picture_facts=facts, progress=progress,
        )  # fmt: skip


def keep_traces(
    model: "Model", run: "Run", prompts: "Sequence[Prompt]", lines: "Sequence[Line] | None", n: int
) -> None:
    """Keep traces of the first prompts of a complete run; says why if that fails.

    The numbers of the run are on the disk already: nothing that fails here takes them away.
    """
    try:
        for i, one in enumerate(prompts[:n]):
            captured(model, one, run.folder, None if lines is None else lines[i])
    except InterpError as error:
        say(f"not all traces are kept: {error}", label="note", hint=error.hint)


def check_continued(model: "Model", prompts: "Sequence[Prompt]", n: int) -> None:
    """Refuse what cannot be continued, or not be read again in one pass.

    Raises:
        InputError: the model produces no tokens, looks ahead, or has no room for more.
    """
    check_speaks(model, "--generate")
    tower = next(iter(model.towers.values()))
    if not all(layer.causal for layer in tower.layers) or model.text_config is None:
        raise InputError(
            f"--generate needs a model whose tokens look back only; those of {model.name} do not",
            hint="capture without --generate",
        )
    longest = max(map(len, prompts))
    if model.context is not None and longest + n > model.context:
        raise InputError(
            f"prompt and continuation must fit the {model.context} positions of {model.name}; got "
            f"{longest} + {n}"
        )


def continued(model: "Model", prompt: "Prompt", n: int) -> "Prompt":
    """The prompt with the model's own greedy continuation, a span `generated`."""
    from dataclasses import replace

    import torch

    from interp.decode import generate

    if n == 0:
        return prompt
    [new] = generate(model, model.batch([prompt], side="left"), max_new_tokens=n)
    at, total = len(prompt), len(prompt) + len(new)
    inputs = {
        # One number a token: those of words, which are 0, follow.
        name: torch.cat([x.reshape(1, -1), x.new_zeros(1, len(new))], dim=1)
        if name.endswith("token_type_ids")
        else x
        for name, x in prompt.inputs.items()
    }
    patches = None if prompt.patches is None else replace(prompt.patches, n=total)
    spans = {**prompt.spans, "generated": ((at, total),)}
    tokens = (*prompt.tokens, *new)
    return replace(prompt, tokens=tokens, spans=spans, inputs=inputs, patches=patches)


def capture_table(traces: "Sequence[Trace]", model: str, run: "Run") -> Table:
    """Prompts by layers: how each is kept, the worst error, the bytes."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": trace.id, "tower": tower.name, "layer": layer.index, "heads": layer.n_heads,
            "form": layer.form, "error": layer.error, "bytes": layer.path.stat().st_size,
            "note": layer.note or None, "trace": trace.key,
        }
        for trace in traces
        for tower in trace.towers.values()
        for layer in tower.layers.values()
    ]  # fmt: skip
    errors = [row["error"] for row in rows if row["error"] is not None]
    others = sum(row["form"] != "exact" for row in rows)
    total = sum(row["bytes"] for row in rows)
    worst = f"worst error {max(errors):.1e}; " if errors else ""
    kept = f"{others} of {len(rows)} layers by their rows; " if others else ""
    note = f"{worst}{kept}{total / 1e6:.3g} MB in all"
    title = f"attention of {len(traces)} prompts, {model}"
    facts = {"run": str(run.folder), "model": model, "bytes": total}
    return Table(
        "headscope.capture", _COLUMNS, [Part(title, rows, note=note)], facts, _HIDDEN, limit=None
    )


def count_capture(request: Request, model: "Model") -> "tuple[Work, list[Row]]":
    """One pass over each prompt, and the sweep over the rows of every head."""
    from dataclasses import replace

    from app.outlook import padded, row

    check_layers(model, request.towers, request.layers)
    prompts = request.asked.prompts(model)[0]
    if request.generate:
        check_continued(model, prompts, request.generate)
    work = padded(prompts, 1, order="given")
    more = request.generate * len(prompts)
    # Of the sweep: once more the products of queries and keys, about as long again for the rest.
    work = replace(work, passed=work.passed + more, steps=more, squares=3 * work.squares)
    layers = sorted(layer_bytes(request, model, prompts).items())
    return work, [
        row("layers", len(layers)),
        *(row(f"file of {name}", size, "bytes", "estimate") for name, size in layers),
        row("files", sum(size for _, size in layers), "bytes", "estimate"),
    ]


def layer_bytes(request: Request, model: "Model", prompts: "Sequence[Prompt]") -> dict[str, int]:
    """Bytes of each layer over all prompts, if its maps can be recomputed; else it is larger."""
    from interp.traces.recording import layer_size

    out: dict[str, int] = {}
    for tower in model.towers.values():
        if request.towers and tower.name not in request.towers:
            continue
        for layer in tower.layers:
            if request.layers is not None and layer.index not in request.layers:
                continue
            for one in prompts:
                views = one.views.get(tower.name)
                own = sum(map(len, views)) if views is not None else len(one) + request.generate
                name = f"{tower.name} layer {layer.index:03}"
                out[name] = out.get(name, 0) + layer_size(layer, own)
    return {re.sub(r" 0+(?=\d)", " ", name): size for name, size in out.items()}
