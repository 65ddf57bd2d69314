"""`headscope verdict`: do the heads that a detector claims matter?"""

import hashlib
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app import params
from app.catalog import check
from app.exits import UsageError, say
from app.given import Given, check_speaks
from app.headset import parse
from app.keep import Answer, Keeping, kept, key_of
from app.loading import Source
from app.steps import steps
from app.subject import Subject, check_tower, subject
from app.tables import Format, Part, Table, write

if TYPE_CHECKING:
    from heads.verdicts import Verdict
    from interp.model import Model
    from interp.prompts import Prompt
    from interp.scores import HeadScores

_COLUMNS = (
    "head", "verdict", "score", "null", "effect", "ci_lo", "ci_hi", "control", "q", "accuracy",
    "control_accuracy", "controls", "as_harmful",
)  # fmt: skip
_OPS = ("zero", "uniform")


def verdict(
    context: typer.Context,
    detector: Annotated[
        str, typer.Argument(metavar="DETECTOR", help="What the heads do; see list detectors.")
    ],
    heads: a.Heads = None,
    model: o.Model = o.DEFAULT_MODEL,
    task: a.Task = None,
    prompts: a.Prompts = None,
    prompt: a.Texts = None,
    image: a.Images = None,
    answer: a.Answer = None,
    most: Annotated[int, typer.Option(min=1, help="Claimed heads to ablate, best first.")] = 8,
    controls: Annotated[int, typer.Option(min=1, help="Draws of random matched heads.")] = 5,
    op: Annotated[str, typer.Option(help="Ablation: zero, or uniform attention.")] = "zero",
    least: Annotated[
        float, typer.Option(min=0, help="Effect in nats below which ablation is harmless.")
    ] = 0.1,
    fdr: Annotated[float, typer.Option(min=0, max=1, help="False discovery rate.")] = 0.05,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Run whose scores are used, instead of scoring.")
    ] = None,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
    n: a.N = 20,
    batch_size: a.BatchSize = 4,
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
    """Say of each head that a detector claims whether it matters.

    Each claimed head, or each of --heads, and the claimed ones together, are ablated beside random
    heads of the same layers: causal, redundant, correlated only; or no evidence where a head is not
    claimed.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    check("detector", detector)
    if op not in _OPS:
        raise UsageError(f"--op of a verdict must be zero or uniform; got {op!r}")
    given = Given(prompts, prompt or (), image or (), (), answer)
    asked = subject(
        task, given, param=param, detector=detector, n=n, batch_size=batch_size, seed=seed,
        tower=tower,
    )  # fmt: skip
    chosen = parse(heads) if heads else None
    source.check()
    made_earlier = None if scores is None else _scores(scores, detector)
    settings = {
        "most": most, "controls": controls, "op": op, "least": least, "fdr": fdr,
        "scores": None if made_earlier is None else _content(made_earlier),
    }  # fmt: skip
    [judge] = params.detectors_of([detector], asked.params)
    made = None if asked.lines is not None else params.task_of(task, [judge], asked.params)
    if dry_run:
        from app.counts import count_verdict
        from app.outlook import forecast

        count = partial(
            count_verdict, asked, judge, made, chosen, scores is not None, most, controls
        )
        forecast(source, count, f"a verdict on {detector}", format=format, quiet=quiet,
                 passes="at most, before the further sets")  # fmt: skip
        return
    from heads.outcome import with_targets

    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    ids = None if chosen is None else chosen.of(loaded, tower=tower)
    if chosen is not None and not quiet:
        chosen.say_models(source.name)
    check_speaks(loaded, "a verdict")
    own = asked.prompts(loaded)[0] if asked.lines is not None else None
    with_targets(own or (), "all")  # refuses what has nothing to predict before a run is begun
    key = key_of(
        loaded, "verdict", detector=detector, detector_params=judge.params, settings=settings,
        heads=None if ids is None else [str(h) for h in ids],
        **(asked.key(own or ()) | {"task": _task_name(asked, judge.task)}),
    )  # fmt: skip
    keeping = Keeping(
        save, out, ["verdict", detector], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "verdict",
    )  # fmt: skip

    def compute() -> Answer:
        from heads.verdicts import verdict as judged

        with steps("runs", quiet=quiet) as report:
            found = judged(
                loaded, made, judge, prompts=own, scores=made_earlier, heads=ids, n=n, most=most,
                controls=controls, op=op, least=least, fdr=fdr, batch_size=batch_size, seed=seed,
                progress=report,
            )  # fmt: skip
        return _answer(found, loaded, op)

    def seen() -> "Sequence[Prompt]":
        from app.sights import PROMPTS
        from interp.tasks import make_task

        task = made or make_task(judge.task, judge.task_params)
        return task.prompts(loaded, PROMPTS, seed=seed) if own is None else own

    from app.sights import Sights

    looks = Sights(loaded, seen, asked.lines, tower, judge.needs)
    found = kept(
        keeping, key, compute, looks, first=detector, seed=seed, task=key["task"]
    )  # fmt: skip
    write_verdict(found, source.name, format=format, top=None, quiet=quiet)


def _task_name(asked: Subject, own: str) -> str:
    return own if asked.task is None and asked.lines is None else asked.name


def _scores(place: Path, detector: str) -> "HeadScores":
    from app.runtables import table_named, tables_of

    return table_named(tables_of(place)[0], detector)


def _content(table: "HeadScores") -> str:
    from interp.scoreio import encode

    return hashlib.sha256(encode(table)).hexdigest()[:16]


def _answer(found: "Verdict", model: "Model", op: str) -> Answer:
    tables = {found.scores.detector: found.scores}
    if found.heads:
        effects = _effects(found, model, op)
        tables[effects.detector] = effects
    accuracy = float(found.base.correct.mean())
    sentences = str(found).splitlines()
    facts = {
        "detector": found.detector,
        "task": found.task,
        "n": len(found.base.correct),
        "accuracy": accuracy,
        "log_prob": float(found.base.log_prob.mean()),
        "rows": found.rows(),
        "sentences": [line.strip() for line in sentences],
        "message": found.message,
        "note": found.note,
        "params": dict(found.params),
        "draws": _draws(found),
    }
    return Answer(tables, facts)


def _draws(found: "Verdict") -> dict[str, list[dict[str, Any]]]:
    """The random heads beside each row of the verdict, and what ablating them did."""
    effects = {str(h.head): h.effect for h in found.heads}
    if found.joint is not None:
        effects["all of them"] = found.joint
    return {
        name: [
            {"heads": " ".join(map(str, heads)), "effect": float(change.mean())}
            for heads, change in zip(e.controls, e.control_per_example, strict=True)
        ]
        for name, e in effects.items()
    }


def _effects(found: "Verdict", model: "Model", op: str) -> "HeadScores":
    """The effects of the single heads, so that `show` and the dashboard can read them."""
    import numpy as np

    from interp.scores import HeadScores

    effects = [h.effect for h in found.heads]
    return HeadScores(
        detector=f"verdict.{op}",
        heads=tuple(h.head for h in found.heads),
        per_example=np.stack([e.per_example for e in effects], axis=1),
        null_per_example=np.stack([e.control for e in effects], axis=1),
        examples=found.examples,
        unit="change of log-probability (nats)",
        direction="lower",
        params=dict(found.params),
        provenance={"model": model.name, "fingerprint": model.fingerprint, "task": found.task},
        extras={"accuracy": np.array([e.accuracy for e in effects])},
    )


def write_verdict(
    answer: Answer, model: str, *, format: Format, top: int | None, quiet: bool
) -> None:
    """Write a verdict: a row for each head that was claimed, sentences on stderr."""
    facts = answer.facts
    detector = facts["detector"]
    rows: list[dict[str, Any]] = list(facts["rows"])[:top]
    strong = frozenset(i for i, row in enumerate(rows) if row["verdict"] == "causal")
    title = f"verdict on {detector}: {model}, right in {facts['accuracy']:.0%}, n = {facts['n']}"
    folder = None if answer.folder is None else str(answer.folder)
    note = " ".join(filter(None, (facts["message"], facts["note"])))
    part = Part(title, rows, strong, note)
    made = Table("headscope.verdict", _COLUMNS, [part], {"run": folder, "model": model, **facts},
                 limit=None)  # fmt: skip
    drawn = write(made, format)
    if not quiet:
        for line in facts["sentences"]:
            if not (drawn and line in (facts["message"], facts["note"])):  # below the table already
                say(line)
