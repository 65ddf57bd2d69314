"""Random token ids without the special ones, for tasks that need no text."""

import random
from typing import TYPE_CHECKING

from interp.errors import InputError

if TYPE_CHECKING:
    from interp.model import Model


def ordinary_ids(model: "Model") -> list[int]:
    """Ids that are neither special tokens of the tokenizer nor named by the configuration."""
    from interp.example import special_ids

    special = special_ids(model.config)
    if model.tokenizer is not None:
        special |= set(model.tokenizer.all_special_ids)
    return [i for i in range(model.vocabulary) if i not in special]


def sample_ids(rng: random.Random, ids: list[int], n: int) -> list[int]:
    """`n` different ids.

    Raises:
        InputError: there are not so many.
    """
    if len(ids) < n:
        raise InputError(f"{n} different tokens are needed; the vocabulary offers {len(ids)}")
    return rng.sample(ids, n)


def opening(model: "Model") -> list[int]:
    """The beginning-of-text token, or nothing for models that have none."""
    return [] if model.bos_id is None else [model.bos_id]


def speaks(model: "Model", text: str) -> bool:
    """Whether the model's tokenizer knows every word of a text."""
    if model.tokenizer is None:
        return False
    try:
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
    except Exception:  # noqa: BLE001 - word-level tokenizers without <unk> raise a bare Exception
        return False
    return bool(ids) and model.tokenizer.unk_token_id not in ids
