"""`headscope ablate`: take heads away, one by one or all together beside random others."""

import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

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
    predict. Negative: it hurts.
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
        from app.counts import AT_MOST, count_ablation
        from app.outlook import forecast

        count = partial(count_ablation, asked, chosen, 1 + controls if joint else None)
        forecast(
            source, count, "ablate", format=format, quiet=quiet,
            passes=AT_MOST if paired else "with padding",
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
        found = _together(work, keeping, loaded, ids, controls, paired)
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


def zeroed(heads: "Sequence[HeadId]") -> Any:
    """The recipe that takes heads away."""
    from interp.recipe import Edit, Recipe, Where

    return Recipe((Edit("zero", Where(heads=tuple(heads))),))


def _together(
    work: PairWork, keeping: Keeping, model: "Model", ids: "list[HeadId]", controls: int,
    paired: bool,
) -> Answer:  # fmt: skip
    asked = work.subject
    from heads.outcome import with_targets

    pairs = asked.pairs(model) if paired else None
    prompts, target = ([], "all") if pairs is not None else asked.prompts(model)
    data = with_targets(prompts, target)
    key = key_of(
        model, "ablate.joint", heads=[str(h) for h in ids], controls=controls,
        settings=dict(work.settings), metric=work.metric,
        **asked.key(prompts or [p for pair in pairs or () for p in (pair.clean, pair.corrupted)]),
    )  # fmt: skip

    def compute() -> Answer:
        sets, note = drawn(model, ids, controls, asked.seed)
        sets = [ids, *sets]
        with steps("sets", quiet=keeping.quiet) as report:
            if pairs is not None:
                from patching.prune import joint_effects

                found = joint_effects(
                    model, pairs, sets, reference=work.settings["reference"], metric=work.metric,
                    batch_size=asked.batch_size, tower=asked.tower or next(iter(model.towers)),
                )  # fmt: skip
                columns = [found.per_example[:, i] for i in range(len(sets))]
                rights: list[float | None] = [None] * len(sets)
                unit, base = f"change of {found.metric}", float(found.clean.mean())
            else:
                from heads.outcome import outcome

                bare = outcome(model, data, batch_size=asked.batch_size)
                columns, rights = [], []
                for i, heads in enumerate(sets):
                    seen = outcome(model, data, zeroed(heads), batch_size=asked.batch_size)
                    columns.append(seen.log_prob - bare.log_prob)
                    rights.append(float(seen.correct.mean()))
                    report(i + 1, len(sets))
                unit, base = "change of log-probability (nats)", float(bare.log_prob.mean())
        rows = _set_rows(sets, columns, rights)
        facts = {"rows": rows, "unit": unit, "base": base, "notes": [note] if note else []}
        return Answer({}, facts)

    from app.sights import BOXES, HEADS, Sights

    seen = prompts if pairs is None else [pair.clean for pair in pairs]
    lines = asked.clean_lines
    looks = Sights(model, lambda: seen, lines, asked.tower, BOXES, ids[:HEADS])
    return kept(keeping, key, compute, looks, task=asked.name, seed=asked.seed)


def drawn(
    model: "Model", ids: "Sequence[HeadId]", controls: int, seed: int
) -> "tuple[list[list[HeadId]], str]":
    """Random other heads, as many in each layer where there are, and a note if there are not."""
    import random

    from interp.errors import InputError
    from interp.recipe.control import draw_matched

    sets: list[list[HeadId]] = []
    note = ""
    for i in range(controls):
        rng = random.Random(f"{seed}/{i}")
        try:
            sets.append(list(draw_matched(model, ids, rng=rng).values()))
        except InputError:
            free = [h for h in model.tower(ids[0].tower).heads if h not in set(ids)]
            if len(free) < len(ids):
                return [], f"no random matched sets: {len(free)} other heads are left"
            note = "some layers have too few other heads: random sets are drawn from all layers"
            sets.append(rng.sample(free, len(ids)))
    return sets, note


def _set_rows(
    sets: "list[list[HeadId]]", columns: list[Any], rights: list[float | None]
) -> list[dict[str, Any]]:
    import numpy as np

    from interp.stats import bootstrap_interval, paired_test

    chosen = columns[0]
    control = np.mean(columns[1:], axis=0) if len(columns) > 1 else None
    # One-sided: random heads are hurt less, so that their change exceeds that of the chosen.
    p = None if control is None else float(paired_test(control[:, None], chosen[:, None])[0])
    named = [("chosen", columns[0], " ".join(map(str, sets[0])), rights[0], p)]
    if control is not None:
        known = [r for r in rights[1:] if r is not None]
        right = float(np.mean(known)) if known else None
        named.append(("random, mean", control, "", right, None))
    for i, (heads, values) in enumerate(zip(sets[1:], columns[1:], strict=True), 1):
        named.append((f"random {i}", values, " ".join(map(str, heads)), rights[i], None))
    rows = []
    for name, values, heads_text, right, value in named:
        lo, hi = bootstrap_interval(values[:, None])
        rows.append({
            "set": name, "heads": heads_text, "effect": float(values.mean()),
            "ci_lo": float(lo[0]), "ci_hi": float(hi[0]), "n": len(values), "accuracy": right,
            "p": value,
        })  # fmt: skip
    return rows


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
