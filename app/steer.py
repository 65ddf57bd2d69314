"""`headscope steer`: change what heads do while the model answers."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app import steering as s
from app.exits import UsageError
from app.given import Given, check_speaks, made_prompts
from app.keep import Answer, Keeping, digest, kept, key_of
from app.loading import Source
from app.steered import write_steered, write_sweep
from app.steps import steps
from app.subject import Subject, subject
from app.tables import Format

if TYPE_CHECKING:
    from interp.model import Model
    from interp.prompts import Prompt

Neutral = Annotated[
    Path | None,
    typer.Option("--neutral", help="Prompt file of neutral text; task text if absent."),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of neutral text.")]
_STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)


def run(
    context: typer.Context,
    recipe: s.RecipeFile = None,
    op: s.Op = None,
    heads: a.Heads = None,
    strength: s.Strength = None,
    site: s.Site = "",
    at: s.At = "all",
    keys: s.Keys = "all",
    model: o.Model = o.DEFAULT_MODEL,
    prompt: a.Texts = None,
    prompts: a.Prompts = None,
    image: a.Images = None,
    task: a.Task = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to produce.")] = 20,
    neutral: Neutral = None,
    windows: Windows = 8,
    controls: a.Controls = 3,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
    n: a.N = 4,
    batch_size: a.BatchSize = 4,
    seed: a.Seed = 0,
    param: a.Param = None,
    force: a.Force = False,
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
    """Continue prompts with and without a recipe, side by side, and report side effects.

    Side effects: cross-entropy and KL on neutral text, and on the answers where prompts have any,
    beside the same recipe on random heads of the same layers.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or ())
    asked = _asked(given, task, param, n, batch_size, seed)
    plan = s.wanted(
        recipe, op=op, heads=heads, strength=strength, site=site, at=at, keys=keys
    )  # fmt: skip
    lines = Given(neutral).lines()
    source.check()

    def texts(model: "Model") -> "tuple[list[Prompt], list[Prompt]]":
        return asked.prompts(model)[0], neutral_text(model, lines, windows, seed)

    if dry_run:
        _dry(source, plan, texts, "steer run", batch_size, tokens, controls, 1, format, quiet)
        return
    loaded = source.load(quiet=quiet)
    check_speaks(loaded, "steer")
    made = s.for_any(plan.recipe(loaded), force=force)
    data, text = texts(loaded)
    size = s.check_examples(made, len(data)) or batch_size
    if plan.heads is not None and not quiet:
        plan.heads.say_models(source.name)
    key = key_of(
        loaded, "steer.run", **asked.key(data), **plan.about(made), tokens=tokens,
        controls=controls, neutral=digest(text),
    )  # fmt: skip
    # Word by word means one prompt at a time, which a recipe for several does not allow.
    live = format is Format.auto and sys.stdout.isatty() and plan.op != "contrast"
    live = live and not s.examples_of(made)

    def compute() -> Answer:
        from app.sidebyside import continued, rows_of, streamed
        from app.sideeffects import report

        if live:
            plain, steered = streamed(loaded, data, made, tokens=tokens)
        else:
            with steps("prompts", quiet=quiet) as told:
                plain, steered = (
                    continued(loaded, data, some, tokens=tokens, batch_size=size,
                              progress=told)
                    for some in (None, made)
                )  # fmt: skip
        with steps("runs", quiet=quiet) as told:
            effects, notes = report(
                loaded, made, data, text, controls=controls, seed=seed, batch_size=size,
                progress=told,
            )  # fmt: skip
        effects, draws = _apart(effects)
        facts = {
            "rows": rows_of(loaded, data, plain, steered),
            "side_effects": effects,
            "draws": draws,
            "notes": notes,
            "recipe": str(made).splitlines(),
        }
        return Answer({}, facts)

    keeping = Keeping(
        save, out, ["steer", plan.name], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "steer",
    )  # fmt: skip
    from app.sights import BOXES, Sights, heads_of

    looks = Sights(loaded, lambda: data, asked.lines, None, BOXES, heads_of(made, loaded))
    answer = kept(keeping, key, compute, looks, task=asked.name, seed=seed)
    if answer.folder is not None and not (answer.folder / s.RECIPE).exists():
        made.save(answer.folder / s.RECIPE)
    write_steered(
        answer, source.name, format=format, top=None, quiet=quiet, drawn=live and not answer.old
    )


def _dry(
    source: Source, plan: s.Wanted, texts: "Callable[[Model], tuple[list[Prompt], list[Prompt]]]",
    what: str, batch_size: int, tokens: int, controls: int, strengths: int, format: Format,
    quiet: bool,
) -> None:  # fmt: skip
    from app.counts import count_steering
    from app.outlook import Row, Work, forecast

    def count(model: "Model") -> tuple[Work, Sequence[Row]]:
        plan.recipe(model)  # says what does not fit
        return count_steering(
            *texts(model), batch_size=batch_size, tokens=tokens, controls=controls,
            strengths=strengths,
        )  # fmt: skip

    forecast(source, count, what, format=format, quiet=quiet, passes="with random controls")


def _asked(
    given: Given, task: str | None, param: Sequence[str] | None, n: int, batch_size: int, seed: int
) -> Subject:  # fmt: skip
    ways = [x for x in (*given.options, "--task" if task else "") if x]
    if len([x for x in ways if x != "--image"] or ways) != 1:
        raise UsageError(
            f"one of --prompt, --prompts and --task must be given; got {len(ways)}",
            hint="such as --task needle, which needs no text",
        )
    return subject(task, given, param=param, n=n, batch_size=batch_size, seed=seed)


def neutral_text(model: "Model", lines: Any, windows: int, seed: int) -> "list[Prompt]":
    """Neutral text for a model: own lines, or windows of the task `text`."""
    from app.sideeffects import halved, neutral

    if lines is not None:
        return halved(made_prompts(lines, model))
    return neutral(model, n=windows, seed=seed)


def sweep(
    context: typer.Context,
    recipe: s.RecipeFile = None,
    op: s.Op = None,
    heads: a.Heads = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers with commas: strengths of --op, factors on a RECIPE; of 0,0.5,1,2,4 "
            "those that fit if absent."
        ),
    ] = None,
    site: s.Site = "",
    at: s.At = "all",
    keys: s.Keys = "all",
    model: o.Model = o.DEFAULT_MODEL,
    prompt: a.Texts = None,
    prompts: a.Prompts = None,
    image: a.Images = None,
    task: a.Task = None,
    neutral: Neutral = None,
    windows: Windows = 8,
    controls: a.Controls = 3,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
    n: a.N = 20,
    batch_size: a.BatchSize = 8,
    seed: a.Seed = 0,
    param: a.Param = None,
    force: a.Force = False,
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
    """Measure a recipe at several strengths: effect on answers, side effects, random controls."""
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or ())
    asked = _asked(given, task, param, n, batch_size, seed)
    values = None if strengths is None else _numbers(strengths)
    plan = s.wanted(recipe, op=op, heads=heads, strength=None, site=site, at=at, keys=keys)
    values = plan.fitting(_STRENGTHS) if values is None else values
    lines = Given(neutral).lines()
    source.check()

    def texts(model: "Model") -> "tuple[list[Prompt], list[Prompt]]":
        return asked.prompts(model)[0], neutral_text(model, lines, windows, seed)

    if dry_run:
        many = len(values)
        _dry(source, plan, texts, "steer sweep", batch_size, 0, controls, many, format, quiet)
        return
    loaded = source.load(quiet=quiet)
    check_speaks(loaded, "steer")
    made = [s.for_any(plan.recipe(loaded, x), force=force) for x in values]
    data, text = texts(loaded)
    size = max(s.check_examples(x, len(data)) for x in made) or batch_size
    if plan.heads is not None and not quiet:
        plan.heads.say_models(source.name)
    key = key_of(
        loaded, "steer.sweep", **asked.key(data), **plan.about(plan.recipe(loaded, values[-1])),
        strengths=values, controls=controls, neutral=digest(text),
    )  # fmt: skip

    def compute() -> Answer:
        from app.sideeffects import report

        rows: list[dict[str, Any]] = []
        notes: dict[str, None] = {}
        with steps("strengths", quiet=quiet) as told:
            for i, (x, one) in enumerate(zip(values, made, strict=True)):
                effects, said = report(
                    loaded, one, data, text, controls=controls, seed=seed, batch_size=size
                )
                rows += [{"strength": x, **row} for row in effects]
                notes |= dict.fromkeys(said)
                told(i + 1, len(values))
        rows, draws = _apart(rows)
        return Answer({}, {"rows": rows, "draws": draws, "notes": list(notes), "name": plan.name,
                           "recipe": str(made[-1]).splitlines()})  # fmt: skip

    keeping = Keeping(
        save, out, ["steer-sweep", plan.name], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "sweep",
    )  # fmt: skip
    answer = kept(keeping, key, compute, task=asked.name, seed=seed)
    write_sweep(answer, source.name, format=format, top=None, quiet=quiet)


def _apart(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures of `app.sideeffects`, and the change by each random control beside them."""
    lists = ("control_changes",)
    plain = [{k: v for k, v in row.items() if k not in lists} for row in rows]
    draws = [{k: v for k, v in row.items() if k in ("strength", "measure", *lists)} for row in rows]
    return plain, draws


def _numbers(text: str) -> list[float]:
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)) or len(set(found)) != len(found):
        raise UsageError(f"--strengths must be different numbers with commas; got {text!r}")
    return found
