"""`headscope ablate`: take heads away, one by one or all together beside random others."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from app import actoptions as a
from app import options as o
from app.effects import write_effects
from app.exits import UsageError, say
from app.given import MAYBE, Given, check_speaks
from app.headset import parse
from app.keep import Answer, Keeping, kept, key_of
from app.loading import Source
from app.pairwork import PairWork
from app.steps import steps
from app.subject import Subject, check_tower, subject
from app.tables import Format, Part, Table, write
from app.together import sets_of, together, zeroed

if TYPE_CHECKING:
    from interp.headid import HeadId
    from interp.model import Model
    from interp.prompts import Prompt

_REFERENCES = ("zero", "mean", "resample")
_COLUMNS = ("set", "heads", "effect", "ci_lo", "ci_hi", "n", "accuracy", "p")


def ablate(
    context: typer.Context,
    heads: a.Heads = None,
    model: o.Model = o.DEFAULT_MODEL,
    task: a.Task = None,
    prompts: a.PromptsOrPairs = None,
    prompt: a.Texts = None,
    image: a.Images = None,
    corrupted_image: a.Corrupted = None,
    answer: a.Answer = None,
    wrong: a.Wrong = None,
    reference: Annotated[
        str, typer.Option(help="zero; or, with pairs, mean or resample.")
    ] = "zero",
    joint: Annotated[
        bool, typer.Option("--joint", help="All of --heads together, beside random others.")
    ] = False,
    each: Annotated[
        bool,
        typer.Option("--each", help="With --joint: each of them alone too, and all but each."),
    ] = False,
    controls: a.Controls = 5,
    metric: Annotated[
        str | None, typer.Option(help="With pairs; logit-difference if absent. See list metrics.")
    ] = None,
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
    """Take heads away and measure what changes.

    Every head alone, or those of --heads; with --joint all of them together. With pairs (a task of
    pairs, or a file of them) the change of --metric, else of the log-probability of the tokens to
    predict. Negative: it hurts. With --each, each head alone beside its own random heads, and all
    of them but each.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    given = Given(prompts, prompt or (), image or (), corrupted_image or (), answer, wrong)
    task = "needle" if task is None and not given.options else task
    asked = subject(
        task, given, param=param, n=n, batch_size=batch_size, seed=seed, tower=tower, pairs=MAYBE
    )  # fmt: skip
    if reference not in _REFERENCES:
        raise UsageError(f"--reference must be one of {', '.join(_REFERENCES)}; got {reference!r}")
    if joint and not heads:
        raise UsageError("--joint needs --heads, the heads to take away together; got none")
    if each and not joint:
        raise UsageError("--each needs --joint; without it every head is taken away alone anyway")
    chosen = parse(heads) if heads else parse(["all"])
    source.check()
    paired = asked.paired
    if not paired and (reference != "zero" or metric is not None):
        what = f"--reference {reference}" if metric is None else f"--metric {metric}"
        raise UsageError(
            f"{what} needs pairs, clean and corrupted; {asked.name} has none",
            hint="--task ioi, or --prompts with pairs; without, the log-probability under zero "
            "ablation is measured",
        )
    work = PairWork(
        source, asked, chosen, "ablate", metric or "logit-difference", {"reference": reference}
    )
    if paired:
        work.check()
    if dry_run:
        from app.counts import AT_MOST, Counted, count_ablation
        from app.outlook import forecast

        def count(model: "Model") -> Counted:
            sets = sets_of(len(chosen.of(model, tower=tower)), controls, each) if joint else None
            return count_ablation(asked, chosen, sets, model)

        fewer = "at most: what comes twice is run once" if each else "with padding"
        forecast(
            source, count, "ablate", format=format, quiet=quiet,
            passes=AT_MOST if paired else fewer,
        )  # fmt: skip
        return
    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    check_speaks(loaded, "ablate")
    keeping = Keeping(
        save, out, ["ablate", reference], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "sets" if joint else "ablate",
    )  # fmt: skip
    ids = chosen.of(loaded, tower=tower)
    if not quiet:
        chosen.say_models(source.name)
    if joint:
        found = together(work, keeping, loaded, ids, controls=controls, each=each)
        write_sets(found, source.name, format=format, top=top, quiet=quiet)
        return
    found = work.run(keeping, loaded, ids) if paired else _alone(asked, keeping, loaded, ids)
    write_effects(found, schema="headscope.ablate", format=format, top=top, quiet=quiet)


def _alone(asked: Subject, keeping: Keeping, model: "Model", ids: "list[HeadId]") -> Answer:
    """Zero ablation of each head on prompts without pairs."""
    from heads.outcome import with_targets

    prompts, target = asked.prompts(model)
    data = with_targets(prompts, target)
    key = key_of(
        model, "ablate.zero", heads=[str(h) for h in ids], **asked.key(data)
    )  # fmt: skip

    def compute() -> Answer:
        import numpy as np

        from heads.outcome import outcome
        from interp.scores import HeadScores

        with steps("heads", quiet=keeping.quiet) as report:
            base = outcome(model, data, batch_size=asked.batch_size)
            changes, rights = [], []
            for i, head in enumerate(ids):
                found = outcome(model, data, zeroed([head]), batch_size=asked.batch_size)
                changes.append(found.log_prob - base.log_prob)
                rights.append(found.correct)
                report(i + 1, len(ids))
        table = HeadScores(
            detector="ablate.zero", heads=tuple(ids), per_example=np.stack(changes, axis=1),
            null_per_example=None, examples=_ids(data),
            unit="change of log-probability (nats)", direction="lower",
            params={"reference": "zero", "n": len(data)},
            provenance={
                "model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype),
                "task": asked.name, "seed": asked.seed,
            },
            extras={"accuracy": np.stack(rights, axis=1)},
        )  # fmt: skip
        right = float(base.correct.mean())
        facts = {"accuracy": right, "log_prob": float(base.log_prob.mean()),
                 "notes": [f"the model is right in {right:.0%}"]}  # fmt: skip
        return Answer({table.detector: table}, facts)

    from app.sights import BOXES, Sights

    looks = Sights(model, lambda: prompts, asked.lines, asked.tower, BOXES)
    return kept(keeping, key, compute, looks, task=asked.name, seed=asked.seed)


def _ids(data: "Sequence[Prompt]") -> tuple[str, ...]:
    return tuple(p.id or f"example-{i}" for i, p in enumerate(data))


def write_sets(answer: Answer, model: str, *, format: Format, top: int | None, quiet: bool) -> None:
    """Write what `ablate --joint` found: the chosen heads and the random sets."""
    facts = answer.facts
    rows = list(facts["rows"])[:top]
    title = f"ablated together: {facts['unit']} from {facts['base']:.4g}, {model}"
    hidden = frozenset({"accuracy"} if all(r["accuracy"] is None for r in rows) else ())
    folder = None if answer.folder is None else str(answer.folder)
    part = Part(title, rows, note="; ".join(facts["notes"]))
    made = Table("headscope.ablate.joint", _COLUMNS, [part], {"run": folder, **facts}, hidden,
                 limit=None)  # fmt: skip
    if not write(made, format) and not quiet:
        say(": ".join(filter(None, (title, part.note))))
