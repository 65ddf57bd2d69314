"""Inference-time intervention (Li et al., NeurIPS 2023, 2306.03341, section 3).

Heads are ranked by how well a probe on their z tells two classes of prompts apart, on questions
it was not fitted on. In the best K, z becomes z + α·σ·θ while the model answers: θ is the unit
direction between the class means, σ the standard deviation of z·θ on a tuning set, α a strength.

The edit acts at the last token of the prompt and at every produced token. Differences from the
published code: the ranking is a full grouped cross-validation with a permuted null instead of two
folds; the probe is ridge regression unless told otherwise (the paper's is logistic regression);
ties go to the earlier head.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe import Positions, Recipe
from interp.scores import HeadScores
from probes.direction import mean_difference
from probes.features import HeadFeatures, collect_features
from probes.shift import DECISION, ranked, ranking_notes, shifting

if TYPE_CHECKING:
    from interp.model import Model


def fit_iti(
    model: "Model",
    prompts: Sequence[Prompt],
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    k: int = 48,
    alpha: float = 15.0,
    towards: Any = None,
    groups: Sequence[Any] | np.ndarray | Tensor | None = None,
    tuning: Sequence[Prompt] | None = None,
    probe: str = "ridge",
    folds: int = 5,
    draws: int = 99,
    span: str | None = None,
    positions: Positions = DECISION,
    batch_size: int = 8,
    tower: str | None = None,
    seed: int = 0,
) -> Recipe:
    """Fit the intervention.

    Args:
        model: the model in hand.
        prompts: a question with an answer each, read at the last token.
        labels: one per prompt, such as whether the answer is true.
        k: number of heads.
        alpha: strength in standard deviations; negative moves away from `towards`.
        towards: the class to move to; the last in sorted order (True, 1) if None.
        groups: the question of each prompt; answers to one question are then never on both sides.
        tuning: prompts on which σ is taken; the labelled ones if None.
        probe: name of the probe that ranks heads.
        folds: parts of the cross-validation.
        draws: permutations for the null of the best head; 0 runs none.
        span: span whose mean is read instead of the last token.
        positions: where to add.
        batch_size: prompts at a time.
        tower: tower to work on; the model's first if None.
        seed: seed of the cross-validation.

    Returns:
        A recipe for this model. Its notes hold the settings, the score of each head, what the
        best head reaches by luck (`max_null`), and which heads exceed that (`claimed`).

    Raises:
        InputError: `k` is larger than the number of heads, or the labels do not allow a fit.
    """
    found = collect_features(model, prompts, span=span, batch_size=batch_size, tower=tower)
    scores = ranked(
        model, found, labels,
        probe=probe, groups=groups, k=k, folds=folds, draws=draws, seed=seed,
    )  # fmt: skip
    other = None
    if tuning is not None:
        other = collect_features(model, tuning, span=span, batch_size=batch_size, tower=tower)
    return iti_recipe(
        model, found, labels, scores,
        k=k, alpha=alpha, towards=towards, tuning=other, positions=positions,
    )  # fmt: skip


def iti_recipe(
    model: "Model",
    found: HeadFeatures,
    labels: Sequence[Any] | np.ndarray | Tensor,
    scores: HeadScores,
    *,
    k: int = 48,
    alpha: float = 15.0,
    towards: Any = None,
    tuning: HeadFeatures | None = None,
    positions: Positions = DECISION,
) -> Recipe:
    """The recipe from features and scores at hand; see `fit_iti`.

    Raises:
        InputError: there are fewer than `k` scored heads, or one has no direction.
    """
    chosen = scores.top(k)
    if not 1 <= k == len(chosen):
        raise InputError(
            f"k must be between 1 and the {len(scores.top(10**9))} scored heads; got {k}"
        )
    directions = mean_difference(found, labels, towards=towards)
    sigma = directions.sigma if tuning is None else directions.spread(tuning)
    place = {h: i for i, h in enumerate(found.heads)}
    sigma = sigma[[place[h] for h in chosen]]
    notes = {
        "name": "iti", "k": k, "alpha": alpha, "n": len(found),
        "n_tuning": len(found if tuning is None else tuning),
        "sigma": {str(h): float(s) for h, s in zip(chosen, sigma, strict=True)},
        **ranking_notes(scores, chosen),
    }  # fmt: skip
    return shifting(model, directions, chosen, alpha * sigma, positions, notes)
