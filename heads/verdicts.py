"""From a score to a verdict in one call: does the head do it, and does it matter?

Scoring says which heads look as if they did something. Then each of them, and all of them
together, are ablated, beside random other heads of the same layers, and the effect on what the
model predicts decides:

    causal            ablating the head alone hurts more than ablating random heads of its layer
    redundant         alone it does not, but it does once other claimed heads are ablated
    correlated only   neither
    no evidence       the detector did not claim it in the first place

Effect = log-probability of the tokens to predict, ablated − unablated, per example, in nats;
negative means that ablation hurts. "Hurts more" takes three things: a mean effect of at least
`least` nats; the same beyond the mean of the controls; and q ≤ `fdr`, by the paired one-sided test
of the effect below the mean of the controls over examples, Benjamini–Hochberg over all tests of a
stage. The q speaks of further examples. Of further heads only the rank among the controls does,
which is reported beside it and with m controls cannot be below 1/(m + 1).

That a set breaks the model does not make each member redundant: one causal head is enough. The
heads R that are not causal are therefore ablated once more, as a group in the whole model and,
since a backup works only when its principal is gone, in the model without its causal heads; where
the group hurts, each is put back in turn. A head is redundant if taking it too hurts more than
taking a random head instead; where the group hurts but no single one is missed (two of three
suffice, say) all of the group are, and the sentence says that it is not resolved further. Heads
whose ablation helps are not part of the group.

Controls are all different; none is claimed, reaches the detector's threshold or lacks a score.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from heads.detector import Detector, make_detector
from heads.outcome import with_targets
from heads.scoring import score
from heads.verdict_lab import Heads, Lab, Progress, stage_one, stage_two
from heads.verdict_result import (
    CAUSAL,
    CORRELATED,
    NONE,
    REDUNDANT,
    Effect,
    HeadVerdict,
    Verdict,
    listed,
    span,
)
from interp.errors import InputError, UnknownNameError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.tasks import Task, make_task

if TYPE_CHECKING:
    from interp.model import Model

__all__ = [
    "CAUSAL", "CORRELATED", "NONE", "OPS", "REDUNDANT", "Effect", "HeadVerdict", "Verdict",
    "verdict",
]  # fmt: skip

OPS = ("zero", "uniform")


def verdict(
    model: "Model | str",
    task: "Task | str | None" = None,
    detector: "Detector | str | None" = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    scores: HeadScores | None = None,
    heads: Sequence[HeadId | str] | None = None,
    n: int = 20,
    most: int = 8,
    controls: int = 5,
    op: str = "zero",
    least: float = 0.1,
    fdr: float = 0.05,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Score heads, ablate those that are claimed, compare with matched random heads, and say.

    Args:
        model: a model in hand, or whatever `interp.load` takes.
        task: the detector's own task if None.
        detector: name of a detector, or a detector; that of the scores, or `retrieval`, if None.
        prompts: own prompts instead of a task.
        scores: scores made earlier, of any method with controls, instead of scoring now.
        heads: heads to ablate instead of the claimed ones; those that are not claimed stay "no
            evidence", whatever their effect.
        n: prompts of a task, for scoring and again for the effects (other ones).
        most: claimed heads that are ablated one by one; the strongest.
        controls: different draws of random matched heads for each effect; fewer where there are
            not as many.
        op: `zero` (the head writes nothing) or `uniform` (it attends evenly).
        least: effect in nats below which ablation counts as harmless; 0.1 is a tenth of the
            probability.
        fdr: false discovery rate, of the scores and of the effects.
        batch_size: prompts at a time.
        seed: seed of tasks and draws; effects are measured on the prompts of seed + 1.
        progress: called with runs done and runs in all.

    Raises:
        InputError: numbers out of range, prompts that have nothing to predict, no head named, or
            too few other heads for controls.
        UnknownNameError: no such task, detector or ablation.
        HeadIdError: a head lies outside the model.
        DoctorError: what would be read from this model is not true.
    """
    from interp.model import Model

    _check(n, most, controls, batch_size, least, fdr, op)
    named = _named(heads)
    if prompts is not None and (task is not None or not prompts):
        raise InputError("give prompts, at least one, or a task, not both")
    judge = make_detector(detector) if isinstance(detector, str) else detector
    if judge is None and scores is None:
        judge = make_detector("retrieval")
    if judge is not None and scores is not None and scores.detector != judge.name:
        raise InputError(
            f"the scores are of {scores.detector!r}; the detector is {judge.name!r}",
            hint="leave the detector out, or give its own scores",
        )
    made = make_task(task) if isinstance(task, str) else task
    if made is None and prompts is None:
        if judge is None:
            assert scores is not None
            judge = _judge_of(scores)
        made = make_task(judge.task, judge.task_params)
    if not isinstance(model, Model):
        from interp.loading import load

        model = load(model)
    model.check()
    _inside(model, named or ())
    if prompts is None:
        assert made is not None
        fresh, target = made.prompts(model, n, seed=seed + 1), made.target
    else:
        fresh, target = list(prompts), "all"
    data = with_targets(fresh, target)
    if scores is None:
        assert judge is not None
        scores = score(
            model, judge, prompts, task=made, n=n, batch_size=batch_size, seed=seed
        )[judge.name]  # fmt: skip
    _readable(model, scores, named or ())
    claimed = scores.select(fdr=fdr)
    chosen = claimed[:most] if named is None else named
    lab = Lab(model, data, scores, op, controls, seed, batch_size, chosen, claimed, progress)
    joint_heads = tuple(h for h in chosen if h in claimed)
    stage = stage_one(lab, chosen, joint_heads)
    backed, resolved = stage_two(lab, stage, joint_heads, least, fdr)
    found = tuple(
        _judge(scores, stage[(h,)], h in claimed, backed.get(h), h in resolved, least, fdr)
        for h in chosen
    )
    joint = stage[joint_heads] if joint_heads else None
    left = len(claimed) - len(joint_heads)
    return Verdict(
        detector=scores.detector,
        task=repr(made) if made is not None else "own prompts",
        scores=scores,
        examples=tuple(p.id or f"prompt-{i}" for i, p in enumerate(fresh)),
        base=lab.base,
        heads=found,
        joint=joint,
        message=_message(scores, judge, found, claimed, fdr),
        note=_note(model, lab, scores, stage, prompts is not None, left, least, fdr),
        params={
            "n": len(data), "most": most, "controls": controls, "op": op, "least": least,
            "fdr": fdr, "seed": seed, "heads": None if named is None else [str(h) for h in named],
        },
        provenance={
            "model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype),
            "device": str(model.device), "versions": scores.provenance.get("versions"),
        },
    )  # fmt: skip


def _judge_of(scores: HeadScores) -> Detector:
    """The detector that made scores, for the task it is run on."""
    try:
        return make_detector(scores.detector)
    except UnknownNameError:
        raise InputError(
            f"scores of {scores.detector!r} are of no detector, so they name no task",
            hint="give a task, or prompts",
        ) from None


def _check(
    n: int, most: int, controls: int, batch_size: int, least: float, fdr: float, op: str
) -> None:
    counts = {"n": n, "most": most, "controls": controls, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1; got {value}")
    if not (math.isfinite(least) and least >= 0):
        raise InputError(f"least must be a finite number of nats, at least 0; got {least}")
    if not 0 <= fdr <= 1:
        raise InputError(f"fdr must lie between 0 and 1; got {fdr}")
    if op not in OPS:
        raise UnknownNameError("ablation of a verdict", op, OPS)


def _named(heads: Sequence[HeadId | str] | None) -> Heads | None:
    """The heads asked for, each once."""
    if heads is None:
        return None
    if isinstance(heads, str) or not heads:
        raise InputError(
            f"heads must be a list of at least one head; got {heads!r}",
            hint="leave heads out to judge those that the detector claims",
        )
    return tuple(dict.fromkeys(HeadId.parse(h) if isinstance(h, str) else h for h in heads))


def _inside(model: "Model", heads: Iterable[HeadId]) -> None:
    for head in heads:
        model.layer_of(head)


def _readable(model: "Model", scores: HeadScores, named: Heads) -> None:
    """Refuse scores that are not of this model's query heads."""
    if scores.granularity != "query":
        raise InputError("a verdict is about query heads; the scores are of key-value groups")
    _inside(model, scores.heads)
    for head in named:
        if head not in scores.heads:
            raise InputError(f"{head} must have a score; the table of {scores.detector} lacks it")


def _judge(
    scores: HeadScores, effect: Effect, claimed: bool, backed: Effect | None, singly: bool,
    least: float, fdr: float,
) -> HeadVerdict:  # fmt: skip
    [head] = effect.heads
    word = CORRELATED if backed is None else REDUNDANT
    word = CAUSAL if effect.hurts(least, fdr) else word
    word = word if claimed else NONE
    i = scores.heads.index(head)
    value, null, q = (float(column[i]) for column in (scores.values, scores.null, scores.q))
    interval = float(scores.ci_lo[i]), float(scores.ci_hi[i])
    parts = [
        f"{head} is {word}: score {value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}], control "
        f"prompts {null:.2f}, q = {q:.2g}" if claimed else
        f"{head}: no evidence by its score {value:.2f} (control prompts {null:.2f}, q = {q:.2g})",
        f"ablated {effect.words()}",
    ]  # fmt: skip
    if backed is not None:
        what = "it" if singly else f"{listed(backed.heads)} together, not resolved further,"
        where = f"with {listed(backed.given)} ablated as well" if backed.given else "alone"
        parts.append(f"but {where}, ablating {what} does {backed.words()}")
    if effect.helps(least):
        parts.append("ablating it helps: it works against the answer")
    return HeadVerdict(head, word, value, interval, null, q, effect, backed, "; ".join(parts))


def _message(
    scores: HeadScores, judge: Detector | None, found: Sequence[HeadVerdict], claimed: Heads,
    fdr: float,
) -> str:  # fmt: skip
    """One line on the whole."""
    if claimed:
        counts = {w: [h.head for h in found if h.verdict == w]
                  for w in (CAUSAL, REDUNDANT, CORRELATED, NONE)}  # fmt: skip
        said = "; ".join(f"{word}: {listed(heads)}" for word, heads in counts.items() if heads)
        return f"{len(claimed)} of {len(scores.heads)} heads claimed. {said}"
    said = f"no evidence of {scores.detector} heads ({scores.message})"
    top = scores.top(1)
    if top:
        i = scores.heads.index(top[0])
        meaning = f": the best {judge.no_evidence}" if judge is not None else ""
        relation = "at least" if scores.direction == "higher" else "at most"
        need = "" if math.isinf(scores.threshold) else f"{relation} {scores.threshold:g} and "
        said += (
            f"; {top[0]} comes closest with {scores.values[i]:.3g} "
            f"{span((float(scores.ci_lo[i]), float(scores.ci_hi[i])))}, control prompts "
            f"{scores.null[i]:.3g}, q = {scores.q[i]:.2g}, where {need}q <= {fdr:g} is asked"
            f"{meaning}"
        )
    return said + ("" if found else "; nothing was ablated")


def _note(
    model: "Model", lab: Lab, scores: HeadScores, stage: Mapping[Heads, Effect], own: bool,
    left: int, least: float, fdr: float,
) -> str:  # fmt: skip
    """What to keep in mind, in sentences."""
    effects, n = list(stage.values()), len(lab.data)
    notes = []
    if effects:
        fewest = min(len(e.controls) for e in effects)
        notes.append(
            f"q is over {n} examples; among heads, {fewest} different controls cannot give a rank "
            f"p below {1 / (1 + fewest):.2g}."
        )
        if own:
            notes.append("Heads were chosen on the prompts on which effects were measured.")
    if not all(e.matched for e in effects):
        notes.append("Some layers have too few other heads: controls came from all layers.")
    if lab.drew_alike:
        notes.append(
            "Nearly all heads look like the detector's: so do the controls, whose effect may be "
            "theirs."
        )
    if effects and len(effects) * 2.0**-n > fdr and not any(e.hurts(least, fdr) for e in effects):
        enough = math.ceil(math.log2(len(effects) / fdr)) if fdr > 0 else math.inf
        notes.append(f"Too few examples for one effect among {len(effects)}: that takes {enough}.")
    accuracy = float(lab.base.correct.mean())
    if effects and accuracy < 0.2:
        notes.append(
            f"The model is right in {accuracy:.0%} only: little can break, and a missing effect "
            f"says little."
        )
    if left and effects:
        notes.append(
            f"{left} more heads were claimed and not ablated; they may back up those that were."
        )
    made_on = scores.provenance.get("fingerprint")
    if made_on is not None and made_on != model.fingerprint:
        notes.append(f"The scores are of other weights ({scores.provenance.get('model')}).")
    return " ".join(notes)
