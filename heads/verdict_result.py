"""What a verdict found: effects beside matched controls, one word and one sentence per head.

See `heads.verdicts` for how the words are decided and for the sign of each number.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from heads.outcome import Performance
from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores
from interp.stats import bootstrap_interval

CAUSAL, REDUNDANT, CORRELATED, NONE = "causal", "redundant", "correlated only", "no evidence"


@dataclass(frozen=True, eq=False)
class Effect:
    """What ablating some heads did, beside random other heads.

    Attributes:
        heads: the heads.
        given: heads that were ablated before and after; none where the model is whole.
        per_example: change of log-probability, in nats; negative: ablation hurts.
        controls: the sets of random heads, all different.
        control_per_example: the same change for each of them.
        base_accuracy: accuracy with `given` ablated, within [0, 1].
        accuracy: accuracy with the heads ablated as well.
        control_accuracy: the same for the controls, averaged.
        q: Benjamini-Hochberg value of the paired test over examples that the heads hurt more than
            the mean of the controls.
    """

    heads: tuple[HeadId, ...]
    given: tuple[HeadId, ...]
    per_example: Float[np.ndarray, " example"]
    controls: tuple[tuple[HeadId, ...], ...]
    control_per_example: Float[np.ndarray, "draw example"]
    base_accuracy: float
    accuracy: float
    control_accuracy: float
    q: float = math.nan

    @property
    def mean(self) -> float:
        """Mean effect in nats."""
        return float(self.per_example.mean())

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over examples of the mean; NaN with one example."""
        return _interval(self.per_example)

    @property
    def control(self) -> Float[np.ndarray, " example"]:
        """Effect of the controls per example, averaged over them."""
        mean: Float[np.ndarray, " example"] = self.control_per_example.mean(axis=0)
        return mean

    @property
    def difference(self) -> float:
        """Mean effect beyond that of the controls, in nats; negative: these heads hurt more."""
        return float((self.per_example - self.control).mean())

    @cached_property
    def difference_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over examples of the difference; NaN with one example."""
        return _interval(self.per_example - self.control)

    @property
    def as_harmful(self) -> int:
        """Number of controls whose mean effect is at least as harmful."""
        # Sets that do the same must count as reached although sums are rounded.
        return int((self.control_per_example.mean(axis=1) <= self.mean + 1e-9).sum())

    @property
    def rank_p(self) -> float:
        """Chance of a rank as good among the controls, (1 + as harmful) / (1 + controls).

        This is what speaks of heads rather than examples: m controls cannot give less than
        1 / (m + 1).
        """
        return (1 + self.as_harmful) / (1 + len(self.controls))

    @property
    def matched(self) -> bool:
        """Whether every control has as many heads in each layer as were ablated."""
        places = Counter((h.tower, h.layer) for h in self.heads)
        return all(Counter((h.tower, h.layer) for h in c) == places for c in self.controls)

    def hurts(self, least: float, fdr: float) -> bool:
        """Whether it hurts by at least `least` nats, also beyond the controls, with `q <= fdr`."""
        return self.q <= fdr and self.mean <= -least and self.difference <= -least

    def helps(self, least: float) -> bool:
        """Whether ablation helps by at least `least` nats, beyond the controls, on any resample."""
        return self.mean >= least and self.difference_interval[0] >= least

    def words(self) -> str:
        """The numbers as text."""
        m = len(self.controls)
        kind = "matched" if self.matched else "(other layers)"
        sets = "head" if len(self.heads) == 1 else "set"
        return (
            f"{number(self.mean)} nats {span(self.interval)}, accuracy {self.base_accuracy:.0%} → "
            f"{self.accuracy:.0%}; {m} random {kind} {sets}{'' if m == 1 else 's'} "
            f"{number(float(self.control.mean()))} nats, accuracy {self.control_accuracy:.0%}, "
            f"{self.as_harmful} as harmful; q = {self.q:.2g}"
        )


@dataclass(frozen=True, eq=False)
class HeadVerdict:
    """One head.

    Attributes:
        head: the head.
        verdict: `causal`, `redundant`, `correlated only` or `no evidence`.
        score: its detector score.
        interval: 95 % interval of the score.
        null: the score on control prompts.
        q: Benjamini-Hochberg value of the score against that null.
        effect: of ablating it alone.
        backed: for a redundant head, the effect that shows it: that of the head, or of the group
            it belongs to, with other heads ablated before; else None.
        sentence: the verdict in words, with the numbers.
    """

    head: HeadId
    verdict: str
    score: float
    interval: tuple[float, float]
    null: float
    q: float
    effect: Effect
    backed: Effect | None
    sentence: str


@dataclass(frozen=True, eq=False)
class Verdict:
    """The verdict on the heads that a detector claims.

    Attributes:
        detector: its name.
        task: what the model was run on.
        scores: the table of scores of all heads.
        examples: ids of the prompts on which effects were measured.
        base: what the unablated model does on them.
        heads: one verdict per ablated head, best score first.
        joint: effect of ablating all claimed ones of them; None if none was claimed.
        message: one line on the whole: which heads are what, or why nothing is claimed.
        note: how controls were drawn, and what to keep in mind.
        params: parameters.
        provenance: model, fingerprint, dtype, versions.
    """

    detector: str
    task: str
    scores: HeadScores
    examples: tuple[str, ...]
    base: Performance
    heads: tuple[HeadVerdict, ...]
    joint: Effect | None
    message: str
    note: str
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The verdict on all claimed heads together: causal, correlated only or no evidence."""
        if self.joint is None:
            return NONE
        hurts = self.joint.hurts(self.params["least"], self.params["fdr"])
        return CAUSAL if hurts else CORRELATED

    def of(self, head: HeadId | str) -> str:
        """The verdict on a head: `no evidence` where the detector did not claim it.

        Raises:
            InputError: the head has no score here, or was claimed but not ablated.
        """
        head = HeadId.parse(head) if isinstance(head, str) else head
        found = next((h.verdict for h in self.heads if h.head == head), None)
        if found is not None:
            return found
        if head not in self.scores.heads:
            raise InputError(f"{head} must be a head of the table of {self.detector}; it is none")
        if head in self.scores.select(fdr=self.params["fdr"]):
            raise InputError(
                f"{head} was claimed by {self.detector} but not ablated, so there is no verdict",
                hint="ablate more heads: most=..., or name it: heads=[...]",
            )
        return NONE

    def named(self, word: str) -> tuple[HeadId, ...]:
        """The heads of one verdict, best score first."""
        return tuple(h.head for h in self.heads if h.verdict == word)

    def rows(self) -> list[dict[str, Any]]:
        """One row per ablated head, and one for the claimed ones together."""
        out = [
            {"head": str(h.head), "verdict": h.verdict, "score": h.score, "null": h.null}
            | _columns(h.effect)
            for h in self.heads
        ]
        if self.joint is not None and len(self.joint.heads) > 1:
            joint = {"head": "all of them", "verdict": f"together: {self.verdict}"}
            out.append(joint | {"score": math.nan, "null": math.nan} | _columns(self.joint))
        return out

    def save(self, folder: str | Path) -> Path:
        """Write the verdict and its scores into a folder, atomically; returns the folder.

        Raises:
            RunError: the folder or a file cannot be written.
        """
        from heads.verdict_io import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> "Verdict":
        """Read what `save` wrote.

        Raises:
            RunError: nothing there, a damaged file, or a newer version.
        """
        from heads.verdict_io import load

        return load(Path(folder))

    def __str__(self) -> str:
        lines = [
            f"{self.detector} on {self.task}, n = {len(self.base.correct)}: the model is right in "
            f"{float(self.base.correct.mean()):.0%}",
            self.message,
            *(f"  {h.sentence}" for h in self.heads),
        ]
        if self.joint is not None and len(self.joint.heads) > 1:
            lines.append(f"  together {self.verdict}: {self.joint.words()}")
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


def number(value: float) -> str:
    """Three figures with a sign, and no negative zero."""
    return f"{round(value, 6) + 0.0:+.3g}"


def span(interval: tuple[float, float]) -> str:
    """An interval, or that there is none."""
    lo, hi = interval
    return "[no interval]" if math.isnan(lo) else f"[{number(lo)}, {number(hi)}]"


def listed(heads: Sequence[HeadId]) -> str:
    """The names of heads."""
    return ", ".join(map(str, heads))


def _interval(values: Float[np.ndarray, " example"]) -> tuple[float, float]:
    lo, hi = bootstrap_interval(values[:, None])
    return float(lo[0]), float(hi[0])


def _columns(e: Effect) -> dict[str, Any]:
    lo, hi = e.interval
    return {
        "effect": e.mean, "ci_lo": lo, "ci_hi": hi, "control": float(e.control.mean()), "q": e.q,
        "accuracy": e.accuracy, "control_accuracy": e.control_accuracy,
        "controls": len(e.controls), "as_harmful": e.as_harmful,
    }  # fmt: skip
