"""From a score to a verdict in one call: does the head do it, and does it matter?

Scoring says which heads look as if they did something. Then each of them, and all of them
together, are ablated, beside as many random other heads of the same layers, and the effect on what
the model predicts decides:

    causal            ablating the head alone hurts more than ablating a random head of its layer
    redundant         alone it does not, but all of them together hurt more than matched sets do
    correlated only   neither
    no evidence       the detector did not claim it in the first place

Effect = log-probability of the tokens to predict, ablated − unablated, per example, in nats;
negative means that ablation hurts. "Hurts more" is the paired one-sided test over examples with
Benjamini–Hochberg over the heads tested, and an effect of at least `least` nats.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from heads.detector import Detector, make_detector
from heads.outcome import Outcome, outcome, with_targets
from heads.scoring import score
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.stats import bh_qvalues, bootstrap_interval, paired_test
from interp.tasks import Task, make_task

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe

CAUSAL, REDUNDANT, CORRELATED, NONE = "causal", "redundant", "correlated only", "no evidence"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Effect:
    """What ablating some heads did.

    Attributes:
        heads: the heads.
        per_example: change of log-probability, in nats.
        control: the same for random matched heads, averaged over draws.
        accuracy: accuracy with the heads ablated.
        control_accuracy: the same for the controls.
        q: of the paired test of `per_example` below `control`.
    """

    heads: tuple[HeadId, ...]
    per_example: np.ndarray
    control: np.ndarray
    accuracy: float
    control_accuracy: float
    q: float = math.nan

    @property
    def mean(self) -> float:
        """Mean effect in nats."""
        return float(self.per_example.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean."""
        lo, hi = bootstrap_interval(self.per_example[:, None])
        return float(lo[0]), float(hi[0])


@dataclass(frozen=True)
class HeadVerdict:
    """One head.

    Attributes:
        head: the head.
        verdict: `causal`, `redundant`, `correlated only` or `no evidence`.
        score: its detector score.
        interval: 95 % interval of the score.
        null: the score on control prompts.
        effect: of ablating it alone; None where it was not ablated.
        sentence: the verdict in words, with the numbers.
    """

    head: HeadId
    verdict: str
    score: float
    interval: tuple[float, float]
    null: float
    effect: Effect | None
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """The verdict on every head that a detector claims.

    Attributes:
        detector: its name.
        task: what the model was run on.
        scores: the table of scores of all heads.
        base: what the unablated model does.
        heads: one verdict per claimed head, best score first.
        joint: effect of ablating all of them; None if none was claimed.
        note: how controls were drawn, and what to keep in mind.
        params: parameters.
    """

    detector: str
    task: str
    scores: HeadScores
    base: Outcome
    heads: tuple[HeadVerdict, ...]
    joint: Effect | None
    note: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def of(self, head: "HeadId | str") -> str:
        """The verdict on a head: `no evidence` where the detector did not claim it."""
        head = HeadId.parse(head) if isinstance(head, str) else head
        return next((h.verdict for h in self.heads if h.head == head), NONE)

    def rows(self) -> list[dict[str, Any]]:
        """One row per claimed head, and one for all of them together."""
        out = []
        for h in self.heads:
            assert h.effect is not None
            out.append(
                {"head": str(h.head), "verdict": h.verdict, "score": h.score, "null": h.null}
                | _columns(h.effect)
            )
        if self.joint is not None and len(self.heads) > 1:
            joint = {"head": "all of them", "verdict": "", "score": math.nan, "null": math.nan}
            out.append(joint | _columns(self.joint))
        return out

    def __str__(self) -> str:
        accuracy = float(self.base.correct.mean())
        lines = [
            f"{self.detector} on {self.task}, n = {len(self.base.correct)}: the model is right in "
            f"{accuracy:.0%}"
        ]
        if not self.heads:
            lines.append(f"no head: {self.scores.message}")
        lines += [f"  {h.sentence}" for h in self.heads]
        if self.joint is not None and len(self.heads) > 1:
            lines.append(f"  together: {_words(self.joint, accuracy)}")
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


def _columns(e: Effect) -> dict[str, Any]:
    lo, hi = e.interval
    return {
        "effect": e.mean, "ci_lo": lo, "ci_hi": hi, "control": float(e.control.mean()), "q": e.q,
        "accuracy": e.accuracy, "control_accuracy": e.control_accuracy,
    }  # fmt: skip


def verdict(
    model: "Model | str",
    task: "Task | str | None" = None,
    detector: "Detector | str" = "retrieval",
    *,
    prompts: Sequence[Prompt] | None = None,
    scores: HeadScores | None = None,
    n: int = 20,
    most: int = 8,
    controls: int = 5,
    op: str = "zero",
    least: float = 0.01,
    fdr: float = 0.05,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Score heads, ablate those that are claimed, compare with matched random heads, and say.

    Args:
        model: a model in hand, or whatever `interp.load` takes.
        task: the detector's own task if None.
        detector: name of a detector, or a detector.
        prompts: own prompts instead of a task.
        scores: scores made earlier, instead of scoring now.
        n: prompts of a task, for scoring and again for the effects (other ones).
        most: claimed heads that are ablated one by one; the strongest.
        controls: draws of random matched heads for each effect.
        op: `zero` (the head writes nothing) or `uniform` (it attends evenly).
        least: effect in nats below which a head does not count as causal.
        fdr: false discovery rate.
        batch_size: prompts at a time.
        seed: seed of tasks and draws; effects are measured on the prompts of seed + 1.
        progress: called with runs done and runs in all.

    Raises:
        InputError: `op` is not an ablation, or prompts have nothing to predict.
    """
    from interp.model import Model

    if op not in ("zero", "uniform"):
        raise InputError(f"the ablation of a verdict is zero or uniform; got {op!r}")
    if controls < 1 or most < 1:
        raise InputError(f"controls and most must be at least 1; got {controls} and {most}")
    if not isinstance(model, Model):
        from interp.loading import load

        model = load(model)
    judge = make_detector(detector) if isinstance(detector, str) else detector
    made = make_task(task) if isinstance(task, str) else task
    if made is None and prompts is None:
        made = make_task(judge.task, judge.task_params)
    if scores is None:
        scores = score(
            model, judge, prompts, task=made, n=n, batch_size=batch_size, seed=seed
        )[judge.name]  # fmt: skip
    if prompts is None:
        assert made is not None
        fresh = made.prompts(model, n, seed=seed + 1)
        target = made.target
    else:
        fresh, target = list(prompts), "all"
    data = with_targets(fresh, target)
    claimed = [h for h in scores.top(len(scores.heads)) if h in set(scores.select(fdr=fdr))]
    lab = _Lab(model, data, op, controls, seed, batch_size, claimed)
    chosen = claimed[:most]
    runs = 1 + (controls + 1) * (len(chosen) + (len(chosen) > 1))
    lab.expect(runs, progress)
    base = lab.base()
    singles = [lab.effect((h,)) for h in chosen]
    joint = lab.effect(tuple(chosen)) if len(chosen) > 1 else (singles[0] if singles else None)
    singles, joint = _tested(singles, joint)
    heads = tuple(
        _judge(scores, h, e, joint, float(base.correct.mean()), least, fdr)
        for h, e in zip(chosen, singles, strict=True)
    )
    left = len(claimed) - len(chosen)
    note = lab.note + (f" {left} more heads were claimed and not ablated." if left else "")
    return Verdict(
        judge.name, repr(made) if made is not None else "own prompts", scores, base, heads, joint,
        note.strip(),
        {"n": n, "controls": controls, "op": op, "least": least, "fdr": fdr, "seed": seed},
    )  # fmt: skip


class _Lab:
    """Ablations on one set of prompts."""

    def __init__(
        self, model: "Model", data: list[Prompt], op: str, controls: int, seed: int, size: int,
        claimed: Sequence[HeadId],
    ) -> None:  # fmt: skip
        self.model, self.data, self.op = model, data, op
        self.controls, self.seed, self.size, self.claimed = controls, seed, size, tuple(claimed)
        self.note = ""
        self._done, self._total = 0, 1
        self._progress: Progress | None = None

    def expect(self, runs: int, progress: Progress | None) -> None:
        self._total, self._progress = runs, progress

    def run(self, recipe: "Recipe | None") -> Outcome:
        found = outcome(self.model, self.data, recipe, batch_size=self.size)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return found

    def base(self) -> Outcome:
        self._base = self.run(None)
        return self._base

    def recipe(self, heads: Sequence[HeadId]) -> "Recipe":
        from interp.recipe.edit import Edit
        from interp.recipe.recipe import Recipe
        from interp.recipe.where import Where

        return Recipe((Edit(self.op, Where(heads=tuple(heads))),))

    def effect(self, heads: tuple[HeadId, ...]) -> Effect:
        mine = self.run(self.recipe(heads))
        others = [self.run(self.recipe(self._draw(heads, i))) for i in range(self.controls)]
        return Effect(
            heads,
            mine.log_prob - self._base.log_prob,
            np.mean([o.log_prob - self._base.log_prob for o in others], axis=0),
            float(mine.correct.mean()),
            float(np.mean([o.correct.mean() for o in others])),
        )

    def _draw(self, heads: tuple[HeadId, ...], i: int) -> tuple[HeadId, ...]:
        """Random heads that the detector did not claim, as many in each layer where possible."""
        from interp.recipe.control import draw_matched

        rng = random.Random(f"{self.seed}/{i}/{'/'.join(map(str, heads))}")
        try:
            drawn = draw_matched(self.model, heads, rng=rng, exclude=self.claimed)
            return tuple(drawn.values())
        except InputError:
            tower = self.model.tower(heads[0].tower)
            free = [h for h in tower.heads if h not in set(self.claimed)]
            if len(free) < len(heads):
                raise InputError(
                    f"a control needs {len(heads)} heads that the detector does not claim; "
                    f"{len(free)} are left",
                    hint="ablate fewer heads: most=...",
                ) from None
            self.note = "Some layers have too few other heads: controls were drawn from all layers."
            return tuple(rng.sample(free, len(heads)))


def _tested(singles: list[Effect], joint: Effect | None) -> tuple[list[Effect], Effect | None]:
    """The effects with their q values."""
    from dataclasses import replace

    if joint is None:
        return [], None
    columns = [*singles, joint]
    # The test asks whether the first exceeds the second: a control that is hurt less.
    p = paired_test(
        np.stack([e.control for e in columns], axis=1),
        np.stack([e.per_example for e in columns], axis=1),
    )
    q = bh_qvalues(p)
    out = [replace(e, q=float(x)) for e, x in zip(columns, q, strict=True)]
    return out[:-1], out[-1]


def _judge(
    scores: HeadScores, head: HeadId, effect: Effect, joint: Effect | None, base: float,
    least: float, fdr: float,
) -> HeadVerdict:  # fmt: skip
    def hurts(e: Effect | None) -> bool:
        return e is not None and e.q <= fdr and e.mean <= -least

    word = CAUSAL if hurts(effect) else REDUNDANT if hurts(joint) else CORRELATED
    i = scores.heads.index(head)
    value, null = float(scores.values[i]), float(scores.null[i])
    lo, hi = float(scores.ci_lo[i]), float(scores.ci_hi[i])
    sentence = (
        f"{head} is {word}: score {value:.2f} [{lo:.2f}, {hi:.2f}] (control prompts {null:.2f}); "
        f"{_words(effect, base)}"
    )
    return HeadVerdict(head, word, value, (lo, hi), null, effect, sentence)


def _words(e: Effect, base: float) -> str:
    lo, hi = e.interval
    return (
        f"ablated {e.mean:+.3g} nats [{lo:+.3g}, {hi:+.3g}] and accuracy {base:.0%} → "
        f"{e.accuracy:.0%}; random matched heads {float(e.control.mean()):+.3g} nats and "
        f"{e.control_accuracy:.0%} (q = {e.q:.2g})"
    )
