"""What detectors of visual heads share: where the image is, and the prompt without it."""

from collections.abc import Sequence
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
    """The prompt with a span of its last token, from which the next one is decided.

    A vision tower decides from its class token; its views get the span there if they have one.
    """
    n = len(prompt)
    views = {
        tower: tuple(
            replace(row, spans={**row.spans, LAST: row.spans["cls"]}) if "cls" in row.spans else row
            for row in rows
        )
        for tower, rows in prompt.views.items()
    }
    return replace(prompt, spans={**prompt.spans, LAST: ((n - 1, n),)}, views=views)


def seen_by(batch: Batch, tower: "Tower") -> Batch:
    """The batch in positions of a tower; of cross-attention, in those of its keys.

    Raises:
        InputError: an example has several images or tiles, of which each is a row of the tower.
    """
    seen = batch.view(f"{tower.name}/keys") or batch.view(tower.name)
    if seen is None:
        return batch
    rows, owners = seen
    if owners != tuple(range(len(batch))):
        raise InputError(
            f"tower {tower.name!r} must see one image a prompt here; got {len(owners)} rows for "
            f"{len(batch)} prompts",
            hint="give prompts with one image each, or read the text tower",
        )
    return rows


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


def reads_prompt(tower: "Tower", prompts: Sequence[Prompt], detector: str) -> None:
    """Check that a tower's positions are those of the prompts.

    Raises:
        InputError: the tower attends over patches or frames of its own.
    """
    if any(name in p.views for p in prompts for name in (tower.name, f"{tower.name}/keys")):
        raise InputError(
            f"detector {detector!r} needs a tower over the prompt's tokens; got {tower.name!r}",
            hint="choose the tower that reads the text",
        )


@torch.no_grad()
def last_row(model: "Model", tower: "Tower", batch: Batch) -> Float[Tensor, "example layer head k"]:
    """Where every head looks at the last token of each prompt; NaN where there is no such head."""
    from interp.engine import read
    from interp.readings import Rows

    prompts = tuple(with_last(p) for p in batch.prompts)
    found = read(model, replace(batch, prompts=prompts), {"row": Rows(LAST)}, tower=tower.name)
    return found["row"].values[..., 0, :]


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
