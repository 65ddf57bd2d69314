"""What a recipe does beside what it is for: on answers, on neutral text, against random heads.

Texts are fed as if the model had produced them: the first tokens as the prompt, the others after
it with a KV cache, so that an edit that acts on produced tokens acts here as it does there.

    cross-entropy    of the tokens after the prompt, mean over them, in nats
    KL               of the steered prediction from the unsteered one, mean over the same, in nats
    accuracy         share of texts all of whose tokens after the prompt are the most likely ones

A control is the same recipe on random other heads of the same layers.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from app.steering import examples_of
from interp.errors import InputError, SpanError
from interp.prompts import Prompt
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe import Recipe


@dataclass(frozen=True)
class Measured:
    """What a model said of texts, one row per recipe, the first without any.

    Attributes:
        cross_entropy: [recipe, example] nats a token.
        kl: [recipe, example] nats a token, from the first row.
        correct: [recipe, example] 1 where every token was the most likely.
    """

    cross_entropy: np.ndarray
    kl: np.ndarray
    correct: np.ndarray


@torch.no_grad()
def measure(
    model: "Model",
    prompts: Sequence[Prompt],
    recipes: "Sequence[Recipe]",
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run texts without and with each recipe.

    Args:
        model: the model.
        prompts: prompts with what follows them as `answer`.
        recipes: the recipes; a run without any comes first.
        batch_size: prompts at a time.
        progress: called with runs done and in all.

    Raises:
        SpanError: a recipe names a span that a prompt lacks.
    """
    shape = (1 + len(recipes), len(prompts))
    entropy, kl, correct = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        # Of one length, so that nothing is padded and positions are what they are alone.
        groups.setdefault((len(prompt), len(prompt.answer or ())), []).append(i)
    batches = [
        places[at : at + batch_size]
        for places in groups.values()
        for at in range(0, len(places), batch_size)
    ]
    done = 0
    for places in batches:
        some = [prompts[i] for i in places]
        target = torch.tensor([p.answer for p in some], device=model.device)
        base: Tensor | None = None
        for row, recipe in enumerate((None, *recipes)):
            said = _said(model, some, target, recipe)
            base = said if base is None else base
            entropy[row, places] = -said.gather(-1, target[..., None])[..., 0].mean(1).cpu()
            kl[row, places] = (base.exp() * (base - said)).sum(-1).mean(1).cpu()
            correct[row, places] = (said.argmax(-1) == target).all(1).double().cpu()
            done += 1
            if progress is not None:
                progress(done, len(batches) * shape[0])
    return Measured(entropy, kl, correct)


def _said(
    model: "Model", prompts: Sequence[Prompt], target: Tensor, recipe: "Recipe | None"
) -> Tensor:
    """Log-probabilities [batch, token, d_vocab] before each token that follows the prompts."""
    batch = model.batch(list(prompts))
    with recipe.on(model, spans=batch) if recipe is not None else nullcontext():
        first: Any = model.hf(**batch.inputs(), use_cache=True)
        last: Tensor = first.logits[:, -1:]
        if target.shape[1] > 1:
            mask = torch.cat([batch.attention_mask, torch.ones_like(target[:, 1:])], 1)
            rest: Any = model.hf(
                input_ids=target[:, :-1], attention_mask=mask, use_cache=True,
                past_key_values=first.past_key_values,
            )  # fmt: skip
            last = torch.cat([last, rest.logits], 1)
    return last.double().log_softmax(-1)


def neutral(model: "Model", *, n: int = 8, seed: int = 0) -> list[Prompt]:
    """Windows of ordinary text, the second half of each to be predicted."""
    from interp.tasks import make_task

    return halved(make_task("text").prompts(model, n, seed=seed))


def halved(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Texts of at least two tokens with their second half as what follows.

    Raises:
        InputError: a text is a single token.
    """
    out = []
    for p in prompts:
        if len(p) < 2:
            raise InputError(f"neutral text needs at least 2 tokens; prompt {p.id or '?'} has 1")
        half = max(1, len(p) // 2)
        spans = {k: r for k, r in p.spans.items() if all(stop <= half for _, stop in r)}
        out.append(replace(p, tokens=p.tokens[:half], answer=p.tokens[half:], spans=spans))
    return out


def controls_of(
    recipe: "Recipe", model: "Model", n: int, seed: int
) -> "tuple[tuple[Recipe, ...], str]":
    """Controls of a recipe, and why there are none."""
    if n == 0:
        return (), ""
    try:
        return recipe.control(model, n, seed=seed), ""
    except InputError as error:
        return (), f"no control on random heads: {error}"


def report(
    model: "Model",
    recipe: "Recipe",
    prompts: Sequence[Prompt],
    text: Sequence[Prompt],
    *,
    controls: int,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each measure, and notes on what could not be measured.

    Args:
        model: the model.
        recipe: the recipe.
        prompts: what it is for; measured where all have answers.
        text: neutral text, see `halved`.
        controls: number of random controls.
        seed: of the controls.
        batch_size: prompts at a time.
        progress: called with runs done and in all.
    """
    others, note = controls_of(recipe, model, controls, seed)
    rows: list[dict[str, Any]] = []
    notes = [note] if note else []
    answered = prompts if prompts and all(p.answer for p in prompts) else ()
    # Of a recipe that differs between examples each prompt must meet its own.
    bound = examples_of(recipe)
    alike = len({(len(p), len(p.answer or ())) for p in answered}) == 1
    for what, texts in (("answers", answered), ("neutral text", text)):
        if not texts:
            continue
        verb = "is" if texts is text else "are"
        if bound and (texts is text or not alike):
            why = "prompts of its own" if texts is text else "prompts of different lengths"
            notes.append(f"{what} {verb} not measured: the recipe is for {bound} {why}")
            continue
        try:
            found = measure(
                model, texts, (recipe, *others), batch_size=bound or batch_size, progress=progress
            )
        except SpanError as error:
            notes.append(f"{what} {verb} not measured: {error}")
            continue
        rows.append(_row(f"cross-entropy of {what}", found.cross_entropy))
        if what == "answers":
            rows.append(_row(f"accuracy on {what}", found.correct))
        rows.append(_row(f"KL on {what}", found.kl))
    return rows, notes


def _row(name: str, values: np.ndarray) -> dict[str, Any]:
    """A measure; its interval is that of the change, over examples."""
    mean = values.mean(1)
    low, high = bootstrap_interval((values[1] - values[0])[:, None])
    return {
        "measure": name, "without": float(mean[0]), "with": float(mean[1]),
        "change": float(mean[1] - mean[0]),
        "control_change": float(mean[2:].mean() - mean[0]) if len(mean) > 2 else None,
        "n": values.shape[1], "ci_lo": float(low[0]), "ci_hi": float(high[0]),
        "control_changes": (mean[2:] - mean[0]).tolist(),
    }  # fmt: skip
