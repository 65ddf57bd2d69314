"""`headscope patch` and `headscope attribute`: effects of heads on pairs of prompts."""

import shlex
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from app import actoptions as a
from app import options as o
from app.catalog import check
from app.effects import write_effects
from app.exits import UsageError
from app.given import ALWAYS, MAYBE, Given, check_speaks
from app.headset import parse
from app.keep import Keeping
from app.loading import Source
from app.pairwork import PairWork
from app.positionwork import check_positions, count_positions, run_positions, write_positions
from app.subject import Subject, check_tower, subject
from app.tables import Format
from app.windows import Cut, asked_cut, count_cut, cut_off, write_cut

if TYPE_CHECKING:
    from patching.method import Method

DEFAULT_MODEL, DEFAULT_TASK = "zoo:planted-ioi", "ioi"
_SITES = ("z", "q", "k", "v", "pattern")
_DIRECTIONS = ("noise", "denoise")


def patch(
    context: typer.Context,
    heads: a.Heads = None,
    model: o.Model = DEFAULT_MODEL,
    task: a.PairTask = None,
    prompts: a.Pairs = None,
    prompt: a.Texts = None,
    image: a.Images = None,
    corrupted_image: a.Corrupted = None,
    answer: a.Answer = None,
    wrong: a.Wrong = None,
    site: Annotated[str, typer.Option(help=f"One of {', '.join(_SITES)}.")] = "z",
    direction: Annotated[
        str,
        typer.Option(help="noise: corrupted into clean (necessary); denoise: the reverse."),
    ] = "noise",
    metric: a.Metric = "logit-difference",
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: cut attention off in windows of so many layers."),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="With --window: tokens that look no more: last, a SPAN, ~SPAN (the rest)."
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(help="With --window: tokens hidden from these, likewise; may be given often."),
    ] = None,
    positions: Annotated[
        bool,
        typer.Option("--positions", help="Patch heads, and whole layers, at single positions too."),
    ] = False,
    top: o.Top = None,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
    n: a.N = 20,
    batch_size: a.BatchSize = 8,
    seed: a.Seed = 0,
    tower: a.Tower = None,
    param: a.Param = None,
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
    """Replace a head's activation by that of the pair's other prompt; exact.

    The effect is the change of the metric in the patched run; `recovered` is its share of the
    difference between the two runs. Pairs come from a task, or from a file of your own.

    With --positions, the answer is what each head does at each token, and what all heads of a layer
    do; the table of heads is kept beside it.

    With --window, prompts need no pairs: attention from --queries to --keys is cut off in all heads
    of the layers around each layer, and the probability of the answer changes.
    """
    if site not in _SITES:
        raise UsageError(f"--site must be one of {', '.join(_SITES)}; got {site!r}")
    if direction not in _DIRECTIONS:
        raise UsageError(f"--direction must be noise or denoise; got {direction!r}")
    if positions:
        check_positions(site, window)
    given_too = {
        "--site": site != "z", "--direction": direction != "noise",
        "--metric": metric != "logit-difference",
    }  # fmt: skip
    cut = asked_cut(window, queries, keys, [name for name, there in given_too.items() if there])
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or (), corrupted_image or (), answer, wrong)
    asked = subject(
        _task(task, given), given, param=param, n=n, batch_size=batch_size, seed=seed,
        tower=tower, pairs=MAYBE if cut else ALWAYS,
    )  # fmt: skip
    chosen = parse(heads) if heads else None
    source.check()
    if cut is not None:
        if dry_run:
            _dry_cut(source, asked, cut, format=format, quiet=quiet)
            return
        keeping = Keeping(
            save, out, ["patch.window"], source.name,
            shlex.join(["headscope", *(context.obj or ())]), quiet, "windows",
        )  # fmt: skip
        loaded = source.load(quiet=quiet)
        check_tower(loaded, tower)
        check_speaks(loaded, "patch")
        ids = chosen.of(loaded, tower=tower) if chosen is not None else None
        found = cut_off(asked, cut, keeping, loaded, ids)
        write_cut(found, source.name, format=format, top=top, quiet=quiet)
        return
    work = PairWork(source, asked, chosen, "patch", metric, {"site": site, "direction": direction})
    made = work.check()
    if dry_run:
        if positions:
            _dry_positions(work, format=format, quiet=quiet)
        else:
            _dry(work, made, format=format, quiet=quiet)
        return
    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    check_speaks(loaded, "patch")
    ids = chosen.of(loaded, tower=tower, kv=site in ("k", "v")) if chosen else None
    if chosen is not None and not quiet:
        chosen.say_models(source.name)
    keeping = Keeping(
        save, out, [f"patch.{direction}", *(["positions"] if positions else [])], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet,
        "positions" if positions else "patch",
    )  # fmt: skip
    if positions:
        told, sweep = run_positions(work, keeping, loaded, ids)
        write_positions(
            told, source.name, format=format, top=top, quiet=quiet, sweep=sweep
        )  # fmt: skip
        return
    found = work.run(keeping, loaded, ids)
    write_effects(found, schema="headscope.patch", format=format, top=top, quiet=quiet)


def _task(task: str | None, given: Given) -> str | None:
    return DEFAULT_TASK if task is None and not given.options else task


def _dry(work: PairWork, method: "Method", *, format: Format, quiet: bool) -> None:
    from app.counts import AT_MOST, count_method
    from app.outlook import forecast

    forecast(
        work.source, partial(count_method, work.subject, method, work.heads), work.method,
        format=format, quiet=quiet, passes=AT_MOST,
    )  # fmt: skip


def _dry_positions(work: PairWork, *, format: Format, quiet: bool) -> None:
    from app.counts import AT_MOST
    from app.outlook import forecast

    forecast(
        work.source, partial(count_positions, work.subject, work.heads), "patch --positions",
        format=format, quiet=quiet, passes=AT_MOST,
    )  # fmt: skip


def _dry_cut(source: Source, asked: Subject, cut: Cut, *, format: Format, quiet: bool) -> None:
    from app.outlook import forecast

    forecast(source, partial(count_cut, asked, cut), "patch", format=format, quiet=quiet)


def attribute(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="One of list methods, such as atp.")
    ],
    model: o.Model = DEFAULT_MODEL,
    task: a.PairTask = None,
    prompts: a.Pairs = None,
    prompt: a.Texts = None,
    image: a.Images = None,
    corrupted_image: a.Corrupted = None,
    answer: a.Answer = None,
    wrong: a.Wrong = None,
    metric: a.Metric = "logit-difference",
    top: o.Top = None,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
    n: a.N = 20,
    batch_size: a.BatchSize = 8,
    seed: a.Seed = 0,
    tower: a.Tower = None,
    param: a.Param = None,
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
    """Score heads by any method of patching or attribution.

    Estimates are verified by exact patches where the method does so; see the column `exact`.
    Parameters: --param METHOD:KEY=VALUE.
    """
    check("method", method)
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or (), corrupted_image or (), answer, wrong)
    asked = subject(
        _task(task, given), given, param=param, method=method, n=n, batch_size=batch_size,
        seed=seed, tower=tower, pairs=ALWAYS,
    )  # fmt: skip
    source.check()
    work = PairWork(source, asked, None, method, metric, asked.params.get(method, {}))
    made = work.check()
    if dry_run:
        _dry(work, made, format=format, quiet=quiet)
        return
    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    check_speaks(loaded, method)
    keeping = Keeping(
        save, out, ["attribute", method], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "attribute",
    )  # fmt: skip
    found = work.run(keeping, loaded)
    write_effects(found, schema="headscope.attribute", format=format, top=top, quiet=quiet)
