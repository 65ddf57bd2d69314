"""ITI: heads that tell two labels apart are moved towards one of them while the model answers.

    z of each of the K best heads becomes z + α·σ·θ, at the last token of the prompt and after

How heads are ranked and θ and σ are fitted is told in `probes.iti`, which does it. Here the inputs
are the labelled prompts of the fit, not those that will be run: the recipe is for any prompts.

Li et al. 2023 (NeurIPS), arXiv 2306.03341.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from heads.makers import Inputs, maker
from heads.makers.shared import about, as_fitted, prompts_of, token_tower
from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe import Positions, Recipe
from probes.iti import fit_iti
from probes.shift import DECISION

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Li et al. 2023, arXiv 2306.03341"


@maker("iti", summary="move the heads that tell two labels apart", citation=CITATION)
def make_iti(
    model: "Model",
    inputs: Inputs,
    *,
    labels: Sequence[Any] | None = None,
    k: int = 48,
    alpha: float = 15.0,
    towards: Any = None,
    groups: Sequence[Any] | None = None,
    tuning: Sequence[Prompt] | None = None,
    probe: str = "ridge",
    folds: int = 5,
    draws: int = 99,
    span: str | None = None,
    positions: Positions = DECISION,
    batch_size: int = 8,
    seed: int = 0,
) -> Recipe:
    """The intervention fitted on labelled prompts; for any prompts.

    Args:
        model: the model in hand.
        inputs: the labelled prompts.
        labels: one per prompt; the fact `label` of each prompt's `meta` if None.
        k: number of heads.
        alpha: strength in standard deviations; negative moves away from `towards`.
        towards: the label to move to; the last in sorted order if None.
        groups: prompts that are no independent evidence, such as the answers to one question.
        tuning: prompts on which σ is taken; the labelled ones if None.
        probe: name of the probe that ranks heads.
        folds: parts of the cross-validation.
        draws: permutations for the null of the best head; 0 runs none.
        span: span whose mean is read instead of the last token.
        positions: where to add.
        batch_size: prompts at a time, where the inputs are no batch.
        seed: seed of the cross-validation.

    Returns:
        A recipe; its notes hold the score of each head (`scores`), σ (`sigma`), what the best head
        reaches by luck (`max_null`) and which heads exceed that (`claimed`).

    Raises:
        InputError: a prompt has no label, `k` exceeds the number of heads, or the labels do not
            allow a fit.
    """
    prompts = prompts_of(inputs)
    if labels is None:
        bare = next((p for p in prompts if "label" not in p.meta), None)
        if bare is not None:
            raise InputError(
                f"prompts to fit on need a label each; prompt {bare.id or '?'} has none",
                hint="give labels=[…], one per prompt, or meta={'label': …}",
            )
        labels = [p.meta["label"] for p in prompts]
    tower = token_tower(model)
    recipe = fit_iti(
        model, as_fitted(inputs), labels, k=k, alpha=alpha, towards=towards, groups=groups,
        tuning=tuning, probe=probe, folds=folds, draws=draws, span=span, positions=positions,
        batch_size=batch_size, tower=tower.name, seed=seed,
    )  # fmt: skip
    params = {
        "k": k, "alpha": alpha, "probe": probe, "folds": folds, "draws": draws, "span": span,
        "seed": seed,
    }  # fmt: skip
    notes = about("iti", CITATION, model, prompts, params)
    return replace(recipe, notes={**recipe.notes, **notes})
