"""Exact patches of the heads that a gradient method ranks first, and of a random sample.

A gradient sees the run it is taken in and no further: behind a saturated softmax it is zero, and a
head on which everything depends gets the score of one that does nothing. So an estimate is a
screening, and what it puts first is measured, together with heads drawn from the rest, which show
what it misses (Kramár et al. 2403.00745 section 4 diagnose AtP in the same way, by sampling).
"""

import random
from dataclasses import dataclass, replace

import numpy as np

from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores
from interp.stats import spearman
from patching.engine import head_effects
from patching.pairs import Pairs

FACTOR = 2.0
"""An estimate is off when it differs from the exact effect by more than this factor."""
FLOOR = 0.05
"""Effects smaller than this share of the largest are not compared: none of them matters."""


@dataclass(frozen=True, eq=False)
class Verified:
    """Estimates beside exact effects.

    Attributes:
        heads: the heads measured: the top ones, strongest first, then the sample.
        top: how many of them are top heads.
        total: heads of the table.
        exact: exact effects of these heads.
        estimate: their estimates, mean over examples.
        spearman: rank correlation of the two; NaN where one side is constant.
        agree: share of the heads with a notable exact effect whose estimate has its sign; NaN
            where no head has one.
        missed: heads whose estimate is off by more than `FACTOR`, the worst first: head, exact
            effect, estimate.
    """

    heads: tuple[HeadId, ...]
    top: int
    total: int
    exact: HeadScores
    estimate: np.ndarray
    spearman: float
    agree: float
    missed: tuple[tuple[HeadId, float, float], ...]

    @property
    def worst(self) -> tuple[HeadId, float, float] | None:
        """The head whose estimate is furthest off, or None."""
        return self.missed[0] if self.missed else None

    def __str__(self) -> str:
        text = (
            f"{len(self.heads)} of {self.total} heads measured ({self.top} top, "
            f"{len(self.heads) - self.top} random)"
        )
        if not np.isnan(self.spearman):
            text += f", Spearman {self.spearman:.2f}"
        if not np.isnan(self.agree):
            text += f", same sign {self.agree:.0%}"
        if not self.missed:
            return f"{text}; no estimate is off by more than a factor of {FACTOR:g}"
        shown = "; ".join(
            f"{head} exact {exact:.3g}, estimate {guess:.3g}"
            for head, exact, guess in self.missed[:3]
        )
        more = f" and {len(self.missed) - 3} more" if len(self.missed) > 3 else ""
        return f"{text}; gradients miss: {shown}{more}"


def verify_top(
    scores: HeadScores, pairs: Pairs, *, k: int = 10, sample: int = 10, seed: int = 0
) -> Verified:
    """Measure the top heads of estimated effects, and a random sample of the rest.

    Args:
        scores: estimated effects; `params` names their site and direction.
        pairs: the pairs they were estimated on.
        k: strongest heads, either sign, to measure.
        sample: heads to draw from the rest.
        seed: seed of the draw.

    Raises:
        InputError: nothing is to be measured, or other pairs than those of the table.
    """
    if k < 0 or sample < 0 or k + sample == 0:
        raise InputError(f"at least one head must be measured; got k={k}, sample={sample}")
    if scores.examples != pairs.ids:
        raise InputError("estimates are verified on the pairs they were made on; got others")
    values = scores.values
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")
    top = [scores.heads[i] for i in order[:k]]
    rest = sorted(scores.heads[i] for i in order[k:])
    chosen = (*top, *random.Random(seed).sample(rest, min(sample, len(rest))))
    exact = head_effects(
        pairs.model, pairs, site=scores.params.get("site", "z"),
        direction=scores.params.get("direction", "noise"), heads=chosen, tower=pairs.tower,
    )  # fmt: skip
    place = {head: i for i, head in enumerate(scores.heads)}
    found = {head: float(x) for head, x in zip(exact.heads, exact.values, strict=True)}
    guess = np.array([values[place[head]] for head in chosen])
    truth = np.array([found[head] for head in chosen])
    floor = FLOOR * max(np.abs(truth).max(), np.abs(guess).max())
    notable = np.abs(truth) > floor
    missed = [
        (head, float(t), float(g))
        for head, t, g in zip(chosen, truth, guess, strict=True)
        if max(abs(t), abs(g)) > floor and _off(t, g)
    ]
    missed.sort(key=lambda item: -abs(item[1] - item[2]))
    return Verified(
        heads=chosen,
        top=len(top),
        total=len(scores.heads),
        exact=exact,
        estimate=guess,
        spearman=spearman(guess, truth),
        agree=float((np.sign(guess) == np.sign(truth))[notable].mean())
        if notable.any()
        else float("nan"),
        missed=tuple(missed),
    )


def _off(truth: float, guess: float) -> bool:
    small, large = sorted((abs(truth), abs(guess)))
    return truth * guess < 0 or large > FACTOR * small


def verified(scores: HeadScores, pairs: Pairs, n: int) -> HeadScores:
    """The table with a column `exact`, NaN for heads that were not measured.

    What was found stands in `provenance["verified"]`, and the heads that were missed in
    `provenance["missed"]`.

    Args:
        scores: estimated effects.
        pairs: the pairs they were estimated on.
        n: how many top heads and how many others to measure; 0 for none.

    Raises:
        InputError: n is negative.
    """
    if n < 0:
        raise InputError(f"the number of heads to verify must not be negative; got {n}")
    if n == 0:
        return replace(scores, provenance={**scores.provenance, "verified": "not verified"})
    seen = verify_top(scores, pairs, k=n, sample=n)
    place = {head: i for i, head in enumerate(scores.heads)}
    exact = np.full(scores.per_example.shape, np.nan)
    exact[:, [place[head] for head in seen.exact.heads]] = seen.exact.per_example
    return replace(
        scores,
        extras={**scores.extras, "exact": exact},
        provenance={
            **scores.provenance,
            "verified": str(seen),
            "missed": [[str(head), t, g] for head, t, g in seen.missed],
        },
    )
