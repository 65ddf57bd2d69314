"""Recipes that move heads along a direction: shared by the makers, and the plain mean shift.

`fit_mean_difference` adds s·(μ₁ − μ₀) to z of the chosen heads: at strength 1 the examples of one
class are moved so that their mean is that of the other (Marks and Tegmark, 2310.06824).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.recipe import Edit, Positions, Recipe, Where
from interp.recipe.where import read_heads
from interp.scores import HeadScores
from probes.direction import Directions, mean_difference
from probes.features import HeadFeatures, collect_features
from probes.validate import cross_validate

if TYPE_CHECKING:
    from interp.model import Model

DECISION = Positions(prompt=(-1,), generated="all")
"""The last token of the prompt and every produced token: where the next token is decided."""


def fit_mean_difference(
    model: "Model",
    prompts: Sequence[Prompt],
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    heads: Sequence[HeadId | str] | None = None,
    k: int = 10,
    strength: float = 1.0,
    towards: Any = None,
    probe: str = "ridge",
    groups: Sequence[Any] | np.ndarray | Tensor | None = None,
    folds: int = 5,
    draws: int = 99,
    span: str | None = None,
    positions: Positions = DECISION,
    batch_size: int = 8,
    tower: str | None = None,
    seed: int = 0,
) -> Recipe:
    """Fit the mean shift of some heads.

    Args:
        model: the model in hand.
        prompts: labelled prompts.
        labels: one per prompt.
        heads: heads to move; the `k` that classify best if None.
        k: number of heads.
        strength: 1 moves one class mean onto the other, −1 the other way about.
        towards: the class to move to; the last in sorted order if None.
        probe: name of the probe that ranks heads.
        groups: prompts that belong together, such as those of one question.
        folds: parts of the cross-validation.
        draws: permutations for the null of the best head.
        span: span whose mean is read; the last token if None.
        positions: where to add.
        batch_size: prompts at a time.
        tower: tower to work on; the model's first if None.
        seed: seed of the cross-validation.

    Returns:
        A recipe for this model; its notes hold the settings, and the scores if heads were ranked.

    Raises:
        InputError: `k` is larger than the number of heads, a named head is not in the tower, or
            the labels do not allow a fit.
    """
    found = collect_features(model, prompts, span=span, batch_size=batch_size, tower=tower)
    directions = mean_difference(found, labels, towards=towards)
    notes: dict[str, Any] = {"name": "mean-difference", "n": len(found), "span": span}
    if heads is None:
        scores = ranked(
            model, found, labels,
            probe=probe, groups=groups, k=k, folds=folds, draws=draws, seed=seed,
        )  # fmt: skip
        chosen = scores.top(k)
        notes |= ranking_notes(scores, chosen)
    else:
        chosen = read_heads(heads)
        if missing := [h for h in chosen if h not in found.heads]:
            raise InputError(f"{missing[0]} is not among the heads of tower {found.heads[0].tower}")
    place = {h: i for i, h in enumerate(found.heads)}
    gaps = directions.gap[[place[h] for h in chosen]]
    notes["gap"] = {str(h): float(g) for h, g in zip(chosen, gaps, strict=True)}
    return shifting(model, directions, chosen, strength * gaps, positions, notes)


def ranked(
    model: "Model",
    found: HeadFeatures,
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    probe: str,
    groups: Sequence[Any] | np.ndarray | Tensor | None,
    k: int,
    folds: int,
    draws: int,
    seed: int,
) -> HeadScores:
    """Held-out accuracy of every head, for a choice of `k`.

    Raises:
        InputError: `k` is not between 1 and the number of heads.
    """
    if not 1 <= k <= len(found.heads):
        raise InputError(
            f"k must be between 1 and the {len(found.heads)} heads of this tower; got {k}",
            hint=f"give k= at most {len(found.heads)}; a twentieth of the heads is usual",
        )
    about = {"model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype)}
    return cross_validate(
        found, labels, probe=probe, groups=groups, folds=folds, draws=draws, seed=seed,
        provenance=about,
    )  # fmt: skip


def ranking_notes(scores: HeadScores, chosen: Sequence[HeadId]) -> dict[str, Any]:
    """What a recipe should remember of how its heads were chosen."""
    place = {h: i for i, h in enumerate(scores.heads)}
    claimed = scores.verdict == scores.detector
    notes: dict[str, Any] = {
        "ranked_by": scores.detector,
        "scores": {str(h): float(scores.values[place[h]]) for h in chosen},
        "settings": dict(scores.params),
    }
    if scores.null_per_example is not None:
        notes["max_null"] = scores.params["max_null_quantile"]
        notes["claimed"] = [str(h) for h in chosen if claimed[place[h]]]
    return notes


def shifting(
    model: "Model",
    directions: Directions,
    chosen: Sequence[HeadId],
    strengths: Tensor,
    positions: Positions,
    notes: dict[str, Any],
) -> Recipe:
    """Z + strength·θ for each chosen head; one edit for each size of head.

    Raises:
        InputError: θ of a chosen head is undefined, its class means being equal.
    """
    place = {h: i for i, h in enumerate(directions.heads)}
    for head in chosen:
        if not float(directions.gap[place[head]]) > 0:
            raise InputError(
                f"{head} has equal class means, so it has no direction to be moved along",
                hint="choose fewer heads, or a position at which the heads differ",
            )
    edits = []
    for size in dict.fromkeys(directions.sizes[place[h]] for h in chosen):
        some = [i for i, h in enumerate(chosen) if directions.sizes[place[h]] == size]
        heads = tuple(chosen[i] for i in some)
        edits.append(
            Edit(
                "add",
                Where(heads=heads, queries=positions),
                strength=strengths[some].cpu(),
                tensors={"vector": torch.stack([directions.of(h) for h in heads]).cpu()},
            )
        )
    notes |= {"away": str(directions.away), "towards": str(directions.towards)}
    return Recipe(tuple(edits), fingerprint=model.fingerprint, notes=notes)
