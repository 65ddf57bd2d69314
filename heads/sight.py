"""What detectors of visual heads share: where the image is, and the prompt without it."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.prompts import Batch, Prompt

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Tower

LAST = "last token"


def with_last(prompt: Prompt) -> Prompt:
    """The prompt with a span of its last token, from which the next one is decided."""
    n = len(prompt)
    return replace(prompt, spans={**prompt.spans, LAST: ((n - 1, n),)})


def left_out(prompt: Prompt, span: str) -> Prompt:
    """The prompt without a span's tokens and without any image.

    Raises:
        InputError: nothing is left, or the last token is in the span.
    """
    gone = set(prompt.positions(span))
    kept = tuple(t for i, t in enumerate(prompt.tokens) if i not in gone)
    if not kept or len(prompt) - 1 in gone:
        raise InputError(
            f"a prompt must go on after span {span!r}, whose effect is read at the last token; "
            f"prompt {prompt.id or '?'} ends with it"
        )
    return Prompt(kept, id=prompt.id)


def hidden_by_mask(batch: Batch, span: str) -> Batch:
    """The batch with a span's tokens masked like padding: unseen, but in their places."""
    mask = batch.attention_mask.clone()
    for row, places in enumerate(batch.positions(span)):
        mask[row, places] = 0
    return replace(batch, attention_mask=mask)


@torch.no_grad()
def last_z(model: "Model", tower: "Tower", batch: Batch) -> Float[Tensor, "example layer head d_v"]:
    """The z of every head at the last token of each prompt; NaN where there is no such head."""
    from interp.engine import read
    from interp.readings import ZValue

    prompts = tuple(with_last(p) for p in batch.prompts)
    found = read(
        model, replace(batch, prompts=prompts), {"z": ZValue(LAST)}, tower=tower.name
    )  # fmt: skip
    return found["z"].values[..., 0, :]
