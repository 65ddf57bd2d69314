"""Deletion and insertion: tokens hidden in order of relevance, and what becomes of the target.

Deletion hides the most relevant first, insertion shows them first. Petsiuk et al. 2018, arXiv
1806.07421; for tokens of both sides of a model, Chefer et al. 2021, arXiv 2103.15679.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.prompts import Batch, Prompt
from interp.recipe.attend import scores_of, softmax_of
from interp.recipe.hide import unseen
from patching.relevance import Relevance
from patching.relevance_rules import SOURCE, TOKENS
from patching.relevance_run import inputs_of, longer
from patching.relevance_sides import Scope, scope_of, sides_of, takes_decoder

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.calls import AttnCall

SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Perturbation:
    """What is left of the target when tokens are hidden in an order.

    Attributes:
        shares: hidden share of the span's tokens.
        deletion: [example, share] probability of the target, the most relevant hidden first.
        insertion: [example, share] the same, the most relevant shown first: `shares` is then the
            shown share.
        random: [example, share] deletion in random order.
    """

    shares: Float[np.ndarray, " share"]
    deletion: Float[np.ndarray, "example share"]
    insertion: Float[np.ndarray, "example share"]
    random: Float[np.ndarray, "example share"]

    def area(self, name: str) -> Float[np.ndarray, " example"]:
        """Area under a curve; a good map has little under `deletion`, much under `insertion`."""
        return np.asarray(np.trapezoid(getattr(self, name), self.shares, axis=1))


def perturbation(
    model: "Model",
    found: Relevance,
    prompts: Sequence[Prompt],
    *,
    span: str = "image",
    side: str | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Perturbation:
    """Hide tokens in order of relevance and see what becomes of the target.

    Tokens are hidden from all others and keep their places, so that any prompt can be tested; of a
    plain vision transformer, in which every patch is read, its pixels are set to the mean (0). What
    was looked at across is hidden from all who look, and from its own side in the towers that the
    maps went through; cross-attention with nothing left to see gives 0.

    Args:
        model: the model.
        found: relevance of the prompts.
        prompts: the same prompts.
        span: whose tokens are hidden; a span of `found.sources` or of `found.prompts`.
        side: `source` to hide what was looked at across, `tokens` for what the deciding tower
            reads; if None, `source` where there is one.
        shares: shares to hide, rising from 0 to 1.
        seed: seed of the random order.

    Raises:
        InputError: other prompts than those of `found`, shares out of order, or no such side.
    """
    if len(prompts) != len(found.tokens):
        raise InputError(f"{len(found.tokens)} prompts were explained; got {len(prompts)}")
    asked = np.asarray(shares, dtype=float)
    if asked[0] != 0 or asked[-1] != 1 or (np.diff(asked) <= 0).any():
        raise InputError(f"shares must rise from 0 to 1; got {tuple(shares)}")
    if side not in (None, SOURCE, TOKENS):
        raise InputError(f"side must be {SOURCE} or {TOKENS}; got {side!r}")
    rng = np.random.default_rng(seed)
    out = {
        name: np.zeros((len(prompts), len(asked))) for name in ("deletion", "insertion", "random")
    }
    for i, prompt in enumerate(prompts):
        hider = _hider(model, found, i, prompt, side)
        places = np.array(hider.seen.positions(span))
        best = places[np.argsort(-hider.values[places], kind="stable")]
        for name, order in (
            ("deletion", best), ("insertion", best), ("random", rng.permutation(places))
        ):  # fmt: skip
            for j, share in enumerate(asked):
                count = round(share * len(places))
                gone = order[count:] if name == "insertion" else order[:count]
                out[name][i, j] = hider.probability(gone.tolist())
    return Perturbation(asked, **out)


def _hider(model: "Model", found: Relevance, i: int, prompt: Prompt, side: str | None) -> "_Hider":
    looked, read = found.sources[i], found.prompts[i]
    if side == SOURCE and looked is None:
        raise InputError(f"prompt {prompt.id or i} looked at nothing across")
    batch = model.batch([prompt])
    if takes_decoder(model):
        batch = replace(batch, decoder=model.batch([read]))
    scope = scope_of(model, found.through[0])
    width = len(read)
    if looked is not None and scope.mutual and len(looked) == width:
        batch, width = longer(batch), width + 1
    across = looked is not None and side != TOKENS
    return _Hider(
        model, scope, found.through, batch, width, read, found.target[i],
        looked if across and looked is not None else read,
        found.source[i] if across else found.tokens[i],
        None if looked is None else SOURCE if across else TOKENS,
    )  # fmt: skip


@dataclass(frozen=True)
class _Hider:
    """One prompt of which places can be hidden.

    Attributes:
        width: tokens that are fed, padding included.
        read: the prompt as the deciding tower sees it.
        seen: the prompt whose places are hidden.
        values: relevance of these.
        side: the side they are on; None if there is one side only.
    """

    model: "Model"
    scope: Scope
    through: tuple[str, ...]
    batch: Batch
    width: int
    read: Prompt
    target: int
    seen: Prompt
    values: np.ndarray
    side: str | None

    @torch.no_grad()
    def probability(self, gone: list[int]) -> float:
        """Probability of the target with some places hidden."""
        inputs = inputs_of(self.model, self.batch)
        hidden: AbstractContextManager[Any] = nullcontext()
        if gone and self.side is not None:
            cut = self.cut(gone)
            hidden = self.model.observe(cut.observer, weights=cut.weights)
        elif gone and self.model.reads_tokens:
            hidden = unseen(self.model, self.scope.own, [self.read], [gone])
        elif gone:
            inputs = {**inputs, "pixel_values": self.greyed(inputs["pixel_values"], gone)}
        with hidden:
            out: Any = self.model.forward(inputs)
        logits = out.logits if hasattr(out, "logits") else out[0]
        last = logits[0, len(self.read) - 1] if logits.dim() == 3 else logits[0]
        return float(last.double().softmax(-1)[self.target])

    def cut(self, gone: list[int]) -> "_Cut":
        """Places of one of two sides, to be hidden from both."""
        towers = (self.scope.own, *self.scope.cross, *self.scope.others)
        layers = {x.name for t in towers if t.name in self.through for x in t.layers}

        def visible(name: str, n_query: int, n_key: int) -> Tensor | None:
            if name not in layers:
                return None
            query, key = sides_of(self.scope, name, (n_query, n_key), self.width)
            if key != self.side:
                return None
            seen = torch.ones(n_query, n_key, dtype=torch.bool)
            seen[:, gone] = False
            if query == key:  # the hidden rows themselves are read by nobody
                seen[gone] = True
            return seen

        return _Cut(visible)

    def greyed(self, pixels: Tensor, gone: list[int]) -> Tensor:
        """The image with the pixels of some patches at their mean."""
        pixels = pixels.clone()
        assert self.seen.patches is not None
        rows, columns = next(iter(self.seen.patches.grids().values()))
        high, wide = pixels.shape[-2] // rows, pixels.shape[-1] // columns
        for p in self.seen.patches:
            if p.position in set(gone):
                y, x = p.row * high, p.column * wide
                pixels[..., y : y + high, x : x + wide] = 0
        return pixels


@dataclass(frozen=True)
class _Cut:
    """Scores cut out of attention calls, whatever their queries and keys stand for.

    Attributes:
        visible: given a module's name and its numbers of queries and keys, which key each row may
            read [query, key]; None to leave a call alone.
    """

    visible: Callable[[str, int, int], Tensor | None]

    def observer(self, call: "AttnCall") -> Tensor | None:
        """Z of the softmax over what is left; 0 in rows with nothing left."""
        seen = self.visible(call.name, call.n_query, call.n_key)
        if seen is None or call.q is None or call.v is None:
            return None
        heads, every = range(call.n_heads), slice(0, call.n_query)
        s, before = scores_of(call, heads, every)
        a = softmax_of(call, heads, every, s, before & seen.to(before.device))
        v = call.v.repeat_interleave(call.n_heads // call.v.shape[1], dim=1).to(a)
        return (a @ v).transpose(1, 2).to(call.z).contiguous()

    def weights(self, name: str, a: Tensor) -> Tensor | None:
        """The same where the model computes its pattern by softmax."""
        seen = self.visible(name, *a.shape[-2:])
        if seen is None:
            return None
        left = a * seen.to(a.device)
        total = left.sum(-1, keepdim=True)
        return torch.where(total > 0, left / torch.where(total > 0, total, 1), 0)
