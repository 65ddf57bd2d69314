"""Function vectors (Todd et al., ICLR 2024, 2310.15213, sections 2.2 and 2.3).

On prompts that show a task, ā is the mean z of each head at the last token. On corrupted prompts,
whose demonstrations do not show the task, the causal score of a head is

    IE = p(answer | z of the head at the last token := ā) − p(answer)

averaged over prompts; it is positive for a head that carries the task. The function vector is
Σ W_O ā over the heads with the highest score. Added to the residual stream after one layer, at the
last token of the prompt, it makes the model do the task without being shown it.

The control of each corrupted prompt sets the same head to its mean over the corrupted prompts: an
average that carries no task. What remains of a score then is not due to averaging alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.recipe import Edit, Positions, Recipe, Where
from interp.scores import HeadScores
from probes.features import HeadFeatures, collect_features

if TYPE_CHECKING:
    from interp.model import Model

LAST = Positions(prompt=(-1,))


@dataclass(frozen=True, eq=False)
class FunctionVector:
    """A function vector, the scores of the heads, and how to use it.

    Attributes:
        scores: indirect effect of each head on each corrupted prompt.
        recipe: adds the vector to the residual stream.
        vector: Σ W_O ā of the chosen heads.
        heads: the chosen heads, strongest first.
        means: ā of every head; zero beyond the size of the head.
    """

    scores: HeadScores
    recipe: Recipe
    vector: Float[Tensor, " d_model"]
    heads: tuple[HeadId, ...]
    means: Float[Tensor, "head d"]


def function_vector(
    model: "Model",
    prompts: Sequence[Prompt],
    corrupted: Sequence[Prompt],
    *,
    top: int = 10,
    layer: int | None = None,
    strength: float = 1.0,
    control: bool = True,
    batch_size: int = 8,
    tower: str | None = None,
) -> FunctionVector:
    """Score every head and build the vector.

    Args:
        model: the model in hand.
        prompts: prompts that show the task, such as ten demonstrations and a query.
        corrupted: prompts that do not, such as the same with shuffled answers; each with the
            `answer` that the task would give (its first token counts).
        top: number of heads in the vector.
        layer: the vector is added after this layer; a third of the way up if None.
        strength: factor of the vector.
        control: also run the control, at twice the cost; without it nothing is tested.
        batch_size: prompts at a time.
        tower: tower to work on; the model's first if None.

    Raises:
        InputError: `top` exceeds the number of heads, an id comes twice, or a corrupted prompt
            has no answer.
        HeadIdError: the layer lies outside the model.
    """
    corrupted = _named(corrupted)
    found = collect_features(model, prompts, batch_size=batch_size, tower=tower)
    if not 1 <= top <= len(found.heads):
        raise InputError(f"top must be between 1 and {len(found.heads)} heads; got {top}")
    means = found.x.double().mean(dim=0)
    plain = collect_features(model, corrupted, batch_size=batch_size, tower=tower)
    base = answer_probability(model, corrupted, None, batch_size)
    effect, null = [], []
    for i, head in enumerate(found.heads):
        effect.append(_effect(model, corrupted, found, means[i], head, base, batch_size))
        if control:
            other = plain.x[:, i].double().mean(dim=0)
            null.append(_effect(model, corrupted, found, other, head, base, batch_size))
    stack = model.tower(found.heads[0].tower)
    layer = stack.n_layers // 3 if layer is None else layer
    scores = HeadScores(
        detector="function-vector",
        heads=found.heads,
        per_example=np.stack(effect, axis=1),
        null_per_example=np.stack(null, axis=1) if control else None,
        examples=tuple(p.id for p in corrupted),
        unit="change of the answer's probability",
        range=(-1.0, 1.0),
        params={"top": top, "layer": layer, "n_prompts": len(found), "n_corrupted": len(plain)},
        provenance={"model": model.name, "fingerprint": model.fingerprint},
        extras={"base": np.repeat(base[:, None], len(found.heads), axis=1)},
    )
    heads = scores.top(top)
    vector = sum_of_writes(model, found, means, heads)
    recipe = Recipe(
        (
            Edit(
                "add",
                Where(layers=(layer + 1,), tower=stack.name, queries=LAST),
                strength=strength,
                site="resid",
                tensors={"vector": vector[None].cpu()},
            ),
        ),
        fingerprint=model.fingerprint,
        notes={
            "name": "function-vector",
            "heads": {str(h): float(scores.values[found.heads.index(h)]) for h in heads},
            **scores.params,
        },
    )
    return FunctionVector(scores, recipe, vector, heads, means)


def sum_of_writes(
    model: "Model", found: HeadFeatures, means: Float[Tensor, "head d"], heads: Sequence[HeadId]
) -> Float[Tensor, " d_model"]:
    """What some heads write into the residual stream when their z is the mean: Σ W_O ā."""
    total: Tensor | None = None
    for head in heads:
        w_o = model.w_o(model.layer_of(head))[head.head].detach().double()
        write = found.vector(means, head).to(w_o) @ w_o
        total = write if total is None else total + write
    assert total is not None
    return total


@torch.no_grad()
def answer_probability(
    model: "Model", prompts: Sequence[Prompt], recipe: Recipe | None, batch_size: int
) -> Float[np.ndarray, " example"]:
    """Probability of the first token of each prompt's answer, under a recipe or none."""
    out = []
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        batch = model.batch(some)
        if recipe is None:
            logits = model.forward(batch.inputs()).logits
        else:
            with recipe.on(model, spans=batch, force=True):
                logits = model.forward(batch.inputs()).logits
        rows = torch.arange(len(some), device=logits.device)
        last = torch.tensor([len(p) - 1 for p in some], device=logits.device)
        answers = torch.tensor([(p.answer or (0,))[0] for p in some], device=logits.device)
        chances = logits[rows, last].double().softmax(dim=-1)
        out.append(chances[rows, answers].cpu().numpy())
    return np.concatenate(out)


def _effect(
    model: "Model",
    prompts: Sequence[Prompt],
    found: HeadFeatures,
    mean: Tensor,
    head: HeadId,
    base: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    size = found.sizes[found.heads.index(head)]
    edit = Edit("set", Where(heads=(head,), queries=LAST), tensors={"value": mean[None, :size]})
    changed = answer_probability(model, prompts, Recipe((edit,)), batch_size)
    return np.asarray(changed - base)


def _named(prompts: Sequence[Prompt]) -> list[Prompt]:
    from dataclasses import replace

    if not prompts:
        raise InputError("function vectors need at least one corrupted prompt; got none")
    named = [p if p.id else replace(p, id=f"prompt-{i}") for i, p in enumerate(prompts)]
    for prompt in named:
        if not prompt.answer:
            raise InputError(
                f"a corrupted prompt needs the answer that the task would give; prompt "
                f"{prompt.id} has none"
            )
    if len({p.id for p in named}) != len(named):
        raise InputError("ids of prompts must all be different")
    return named
