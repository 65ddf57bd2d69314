"""What a head writes when it looks at the keys it likes most: tokens raised and lowered.

For the keys with the most mass of a head (the first key left out, on which heads park; each token
once), the value it reads there goes through its part of the output projection, the final norm at a
fixed scale and the unembedding:

    logits = W_U norm(v_j W_O^h)

The tokens with the largest and the smallest of these are kept, and at which place among them the
token that was read stands: 1 means that the head would copy it.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from interp.errors import InterpError
from interp.unembed import Unembedding, unembedding

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer

KEYS, TOKENS = 4, 6
_LARGEST = 1 << 31  # multiplications of one layer beyond which nothing is written down


def unembedding_of(model: "Model") -> Unembedding | None:
    """The unembedding, or None for models that have none."""
    try:
        return unembedding(model)
    except (InterpError, AttributeError, RuntimeError):
        return None


@torch.no_grad()
def written(
    model: "Model",
    layer: "Layer",
    v: Tensor,
    mass: np.ndarray,
    tokens: tuple[int, ...],
    out: Unembedding | None,
) -> dict[str, np.ndarray]:
    """Arrays of a layer's file; empty where the layer does not write to the logits.

    Args:
        model: the model in hand.
        layer: the layer.
        v: [kv head, key, d_v] values.
        mass: [head, key] mass that each key gets from all queries.
        tokens: token id of each key.
        out: the model's unembedding.

    Returns:
        `write_key` [head, KEYS] positions (−1 is none), `write_rank` [head, KEYS] place of the
        token itself, `write_up` and `write_down` [head, KEYS, TOKENS] token ids.
    """
    if out is None or len(tokens) != v.shape[1]:
        return {}
    work = layer.n_heads * KEYS * out.weight.shape[0] * out.weight.shape[1]
    if work > _LARGEST * (32 if v.is_cuda else 1):
        return {}
    try:
        w = model.w_o(layer).float()
    except (InterpError, AttributeError, RuntimeError):
        return {}
    if w.shape[1] != v.shape[-1] or w.shape[2] != out.weight.shape[1]:
        return {}
    keys = np.full((layer.n_heads, KEYS), -1, np.int32)
    for head in range(layer.n_heads):
        seen: set[int] = set()
        for j in np.argsort(-mass[head], kind="stable"):
            if j == 0 or tokens[j] in seen or not mass[head, j] > 0:
                continue
            keys[head, len(seen)] = j
            seen.add(tokens[j])
            if len(seen) == KEYS:
                break
    group = layer.n_heads // v.shape[0]
    places = torch.as_tensor(np.maximum(keys, 0), dtype=torch.long, device=v.device)
    values = torch.stack([v[h // group][places[h]].float() for h in range(layer.n_heads)])
    logits = out.logits(values @ w, torch.arange(len(out.weight), device=v.device))
    own = torch.tensor([[tokens[j] for j in row] for row in np.maximum(keys, 0)], device=v.device)
    mine = logits.gather(-1, own[..., None])
    rank = (logits > mine).sum(-1) + 1
    return {
        "write_key": keys,
        "write_rank": rank.cpu().numpy().astype(np.int32),
        "write_up": logits.topk(TOKENS).indices.cpu().numpy().astype(np.int32),
        "write_down": (-logits).topk(TOKENS).indices.cpu().numpy().astype(np.int32),
    }
