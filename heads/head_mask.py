"""Masking heads while a model runs: an observer of attention calls that replaces their z.

Published work means different things by "masking a head"; the two that leave the model's other
heads exactly as they are, seen from the head's own z:

    uniform    z_i = mean of v_j over the keys j that row i can see
    zero       z_i = 0

`uniform` is what a query (or all visible scores) set to zero gives; learned sinks get no share.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import SiteError, UnknownNameError
from interp.headid import HeadId
from interp.seam.calls import MASKED, AttnCall

if TYPE_CHECKING:
    from interp.model import Model

PHASES = ("decoding", "all")


class HeadMask:
    """An observer that masks heads.

    Args:
        model: the model whose heads they are.
        heads: the heads; none leaves the model as it is.
        op: `uniform` or `zero`.
        phase: `decoding` masks the rows of the tokens fed while decoding, the last token of the
            prompt among them; `all` masks the rows of the prompt too.
        prompt: positions of the padded prompt, the padding included.

    Raises:
        HeadIdError: a head lies outside the model.
        UnknownNameError: no such op or phase.
    """

    def __init__(
        self, model: "Model", heads: Iterable[HeadId], *, op: str, phase: str, prompt: int
    ) -> None:
        check_names(op, phase)
        self.op, self.phase, self.prompt = OPS[op], phase, prompt
        self.heads: dict[str, list[int]] = {}
        for head in heads:
            self.heads.setdefault(model.layer_of(head).name, []).append(head.head)

    @torch.no_grad()
    def __call__(self, call: AttnCall) -> Tensor | None:
        """The call's z with the masked heads' rows replaced, or None where there are none."""
        heads = self.heads.get(call.name)
        if heads is None:
            return None
        # A call with a whole prompt in it begins at position 0; with a cache each further call
        # holds the fed token alone, without one it holds everything once more.
        first = self.prompt - 1 if self.phase == "decoding" and call.n_query >= self.prompt else 0
        z = call.z.clone()
        z[:, first:, heads] = self.op(call, heads, first).to(z)
        return z


Op = Callable[[AttnCall, list[int], int], Tensor]
"""New z [batch, row, head, d_v] of some heads of a call, for the rows from the first on."""


def _zero(call: AttnCall, heads: list[int], first: int) -> Tensor:
    return torch.zeros_like(call.z[:, first:, heads])


def _uniform(call: AttnCall, heads: list[int], first: int) -> Tensor:
    """The mean of v over the visible keys; zero in rows that see no key."""
    if call.v is None:
        raise SiteError(
            f"the values of {call.name} are not reached, so uniform attention is not defined",
            hint="mask with op='zero', or load the model with attn='sdpa'",
        )
    group = call.n_heads // call.v.shape[1]
    values = call.v[:, [h // group for h in heads]].to(call.dtype)
    seen = visible(call, heads, first).to(call.dtype)
    share = seen / seen.sum(-1, keepdim=True).clamp_min(1)
    return torch.matmul(share, values).transpose(1, 2)


OPS: dict[str, Op] = {"uniform": _uniform, "zero": _zero}


def check_names(op: str, phase: str) -> None:
    """Refuse unknown ops and phases.

    Raises:
        UnknownNameError: the nearest known name is in its hint.
    """
    if op not in OPS:
        raise UnknownNameError("masking op", op, OPS)
    if phase not in PHASES:
        raise UnknownNameError("phase", phase, PHASES)


def visible(call: AttnCall, heads: list[int], first: int) -> Bool[Tensor, "_ _ row key"]:
    """Which keys the rows from the first on can see, by mask and causality.

    Not by the pattern: the weight of a key that is seen may well round to zero.
    """
    rows = call.n_query - first
    seen = torch.ones(1, 1, rows, call.n_key, dtype=torch.bool, device=call.z.device)
    if call.mask is not None:
        mask = call.mask[:, :, first:] if call.mask.shape[2] > 1 else call.mask
        if mask.shape[1] > 1:
            mask = mask[:, heads]
        if mask.dtype != torch.bool:
            # Additive masks hide by the lowest number of their dtype, or by −inf.
            mask = mask > max(MASKED, torch.finfo(mask.dtype).min) / 2
        seen = seen & mask[..., : call.n_key]
    if call.causal:
        seen = seen & torch.ones(rows, call.n_key, dtype=torch.bool, device=seen.device).tril(first)
    return seen
