"""How relevance spreads through attention calls: self-, cross- and co-attention.

A model has a side of `tokens`, whose positions decide, and where it looks across a side of `source`
(encoder tokens, patches, frames, boxes). R^xy [n_x, n_y] is what the positions of side y are to
those of side x: I for one side and 0 across at first. Calls are taken in the order in which they
ran. With Ā = mean over heads of relu(∇A ⊙ A), queries of side s and keys of side q:

    self-attention, s = q     R^sx ← R^sx + Ā R^sx                     x: both sides
    across, s ≠ q             R^sq ← R^sq + (R̄^ss)ᵀ Ā R̄^qq
                              R^ss ← R^ss + Ā R^qs
    R̄^xx = (R^xx − I, each row divided by its sum) + I; rows of sum 0 stay 0

In an encoder-decoder the source never looks back, R^qs = 0, and the last rule does nothing. Where
both sides look at each other in one block, both calls read what was before the block.

The transpose in (R̄^ss)ᵀ is the paper's. Under a causal mask it leaves of the deciding, last row
only that row's own cross-attention: what earlier tokens have read arrives by later self-attention.
The authors' code for LXMERT sets what the class token is to itself to 0 at the end; here it stays.

Beside it, in the same two sides: `rollout` takes each sublayer as the mean of what it reads and of
the residual stream, rows of sum one over both sides; `attention` is the last pattern of each pair.

Chefer et al. 2021 (ICCV), arXiv 2103.15679, equations 5 to 11; rollout: Abnar & Zuidema 2020, arXiv
2005.00928, which has one side only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOKENS, SOURCE = "tokens", "source"

Maps = Mapping[tuple[str, str], Tensor]
"""R^xy by (x, y), each [batch, n_x, n_y]."""


@dataclass(frozen=True, eq=False)
class Step:
    """One attention call, mean over heads.

    Attributes:
        query: side of its queries.
        key: side of its keys.
        weights: [batch, query, key] Ā for `gradient`, else the mean pattern.
        block: calls of one number, one after another, read the maps before any of them.
    """

    query: str
    key: str
    weights: Float[Tensor, "batch query key"]
    block: int


def normalised(own: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch n n"]:
    """R̄: what was gained over I, in rows of sum one, and I again."""
    one = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    gained = own - one
    total = gained.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, gained / torch.where(total == 0, 1.0, total)) + one


def _gradient(maps: Maps, step: Step) -> Maps:
    s, q, a = step.query, step.key, step.weights
    if s == q:
        return {(x, y): m + a @ m for (x, y), m in maps.items() if x == s}
    read = normalised(maps[s, s]).mT @ a @ normalised(maps[q, q])
    return {(s, q): maps[s, q] + read, (s, s): maps[s, s] + a @ maps[q, s]}


def _rollout(maps: Maps, step: Step) -> Maps:
    s, q, a = step.query, step.key, step.weights
    total = 1 + a.sum(-1, keepdim=True)
    return {(x, y): (m + a @ maps[q, y]) / total for (x, y), m in maps.items() if x == s}


def _attention(maps: Maps, step: Step) -> Maps:
    return {(step.query, step.key): step.weights}


RULES: Mapping[str, Callable[[Maps, Step], Maps]] = {
    "gradient": _gradient,
    "rollout": _rollout,
    "attention": _attention,
}


def spread(steps: Sequence[Step], method: str) -> Maps:
    """The maps after all calls.

    Args:
        steps: the calls, in the order in which they ran; at least one.
        method: a key of `RULES`.

    Returns:
        R^xy by (x, y), each [batch, n_x, n_y], for the sides that the calls have.
    """
    sizes: dict[str, int] = {}
    for step in steps:
        sizes[step.query], sizes[step.key] = step.weights.shape[1:]
    like = steps[0].weights
    maps: dict[tuple[str, str], Tensor] = {}
    for x, n in sizes.items():
        for y, m in sizes.items():
            start = torch.eye(n, m) if x == y else torch.zeros(n, m)
            maps[x, y] = start.to(like).expand(len(like), n, m)
    at = 0
    while at < len(steps):
        stop = at + 1
        while stop < len(steps) and steps[stop].block == steps[at].block:
            stop += 1
        # Of one block each call writes the rows of its own side: none overwrites another's.
        new = [RULES[method](maps, step) for step in steps[at:stop]]
        for written in new:
            maps.update(written)
        at = stop
    return maps
