"""Function vectors: what some heads write when a task is shown is added where it is not.

    v = Σ W_O ā over the heads of the highest causal score; resid + s·v after one layer, at the
    last token of the prompt

ā is the mean z of a head at the last token of prompts that show the task. The score of a head is
told in `probes.functions`, which does the work. Here the inputs are the prompts that show the task,
not those that will be run: the recipe is for any prompts.

Todd et al. 2024 (ICLR), arXiv 2310.15213.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from heads.makers import Inputs, maker
from heads.makers.shared import about, as_fitted, prompts_of, token_tower
from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe import Recipe
from probes.functions import function_vector

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Todd et al. 2024, arXiv 2310.15213"


@maker("function-vector", summary="add what heads write when a task is shown", citation=CITATION)
def make_function_vector(
    model: "Model",
    inputs: Inputs,
    *,
    corrupted: Sequence[Prompt] | None = None,
    top: int = 10,
    layer: int | None = None,
    strength: float = 1.0,
    control: bool = True,
    batch_size: int = 8,
) -> Recipe:
    """The function vector of a task; for any prompts.

    Args:
        model: the model in hand.
        inputs: prompts that show the task, such as ten demonstrations and a query.
        corrupted: prompts that do not, such as the same with shuffled answers, each with the
            `answer` that the task would give; needed.
        top: number of heads in the vector.
        layer: the vector is added after this layer; a third of the way up if None.
        strength: factor of the vector.
        control: also test the scores against averages that carry no task, at twice the cost.
        batch_size: prompts at a time.

    Returns:
        A recipe; its notes hold the score of each chosen head (`heads`) and, after a control,
        which of them pass the test (`claimed`).

    Raises:
        InputError: there are no corrupted prompts, one has no answer, or `top` exceeds the number
            of heads.
        HeadIdError: the layer lies outside the model.
    """
    prompts = prompts_of(inputs)
    if corrupted is None:
        raise InputError(
            "heads are scored on prompts that do not show the task; got none",
            hint="give corrupted=[…], each with the answer that the task would give",
        )
    found = function_vector(
        model, as_fitted(inputs), corrupted, top=top, layer=layer, strength=strength,
        control=control, batch_size=batch_size, tower=token_tower(model).name,
    )  # fmt: skip
    params = {"top": top, "layer": found.scores.params["layer"], "strength": strength}
    notes = {**found.recipe.notes, **about("function-vector", CITATION, model, prompts, params)}
    if control:
        passed = found.scores.select()
        notes["claimed"] = [str(h) for h in found.heads if h in passed]
    return replace(found.recipe, notes=notes)
