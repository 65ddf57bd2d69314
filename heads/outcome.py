"""What a model does on prompts, with and without a recipe: log-probability and accuracy.

The tokens to predict are the answer, fed after the prompt, or for prompts without an answer those
of a span. Where a processor wrote an image into the text stand placeholders, which nobody predicts:
a span that holds such is refused. Per example:

    log-prob   mean over the tokens to predict of log p(token | what precedes it), in nats
    correct    1 if each of them is the most likely token, else 0 (without answer, their share)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from interp.errors import InputError, ModelError
from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe

TARGET = "tokens to predict"


@dataclass(frozen=True)
class Performance:
    """What a model did on some prompts.

    Attributes:
        log_prob: per example, in nats.
        correct: per example, within [0, 1].
    """

    log_prob: Float[np.ndarray, " example"]
    correct: Float[np.ndarray, " example"]


def with_targets(prompts: Sequence[Prompt], target: str) -> list[Prompt]:
    """Prompts with their answers appended and the tokens to predict as a span.

    Args:
        prompts: the prompts.
        target: span to predict of prompts that have no answer.

    Raises:
        InputError: a prompt has neither an answer nor a token to predict, or no answer and a span
            that holds tokens of an image.
        SpanError: a prompt has neither an answer nor such a span.
    """
    out = []
    for prompt in prompts:
        if prompt.answer:
            n = len(prompt)
            spans = {**prompt.spans, TARGET: ((n, n + len(prompt.answer)),)}
            out.append(replace(prompt, tokens=(*prompt.tokens, *prompt.answer), spans=spans))
            continue
        places = [i for i in prompt.positions(target) if i > 0]
        if not places:
            raise InputError(f"prompt {prompt.id or '?'} has no token to predict")
        if shown := _of_images(prompt) & set(places):
            raise InputError(
                f"what is predicted must be text, or the answer to an image; prompt "
                f"{prompt.id or '?'} has no answer, and its span {target!r} holds {len(shown)} "
                "tokens of an image",
                hint='give it an answer: --answer TEXT, or "answer": " word" in the line of a '
                "JSONL file",
            )
        spans = {**prompt.spans, TARGET: tuple((i, i + 1) for i in places)}
        out.append(replace(prompt, spans=spans))
    return out


def _of_images(prompt: Prompt) -> set[int]:
    """Places that a processor filled; where images are tokens themselves, there are none."""
    return set(prompt.positions("image")) if prompt.inputs and "image" in prompt.spans else set()


@torch.no_grad()
def outcome(
    model: "Model",
    prompts: Sequence[Prompt],
    recipe: "Recipe | None" = None,
    *,
    batch_size: int = 4,
) -> Performance:
    """Run prompts made by `with_targets`, under a recipe if one is given.

    Args:
        model: the model.
        prompts: prompts with the span of tokens to predict.
        recipe: switched on while they run.
        batch_size: prompts at a time.

    Raises:
        InputError: no prompts, no prompt at a time, or a model that reads images alone.
        ModelError: a log-probability is not finite.
    """
    if not prompts or batch_size < 1:
        raise InputError(
            f"at least one prompt, and one at a time, are needed; got {len(prompts)} and "
            f"{batch_size}"
        )
    if not model.reads_tokens:
        raise InputError(
            f"tokens are predicted by models that produce some; {model.name} reads images alone "
            "and produces none",
            hint="detector pruning-importance tells on which of its heads the class hangs",
        )
    log_prob, correct = np.zeros(len(prompts)), np.zeros(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch_size):
        places = order[at : at + batch_size]
        # On the right, where causal rows do not see it: models with learned positions (GPT-2) count
        # padding on the left.
        batch = model.batch([prompts[i] for i in places], side="right")
        with recipe.on(model, spans=batch) if recipe is not None else nullcontext():
            logits = model.forward(batch.inputs()).logits
        for row, (i, columns) in enumerate(zip(places, batch.positions(TARGET), strict=True)):
            index = torch.tensor(columns, device=logits.device)
            said = logits[row, index - 1].double()
            tokens = batch.input_ids[row, index]
            gained = said.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            hit = said.argmax(-1) == tokens
            log_prob[i] = float(gained.mean())
            if not np.isfinite(log_prob[i]):
                # A difference of such numbers is NaN, and would drop out of every mean unseen.
                raise ModelError(
                    f"log-probabilities must be finite; prompt {prompts[i].id or i} of "
                    f"{model.name} got {log_prob[i]}",
                    hint="load the model in float32 or bfloat16",
                )
            share = hit.double().mean()
            correct[i] = float(hit.all()) if prompts[i].answer else float(share)
    return Performance(log_prob, correct)
