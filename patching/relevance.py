"""Relevance maps: which tokens, and so which patches, an answer came from, by attention.

    Ā    = mean over heads of relu(∇A ⊙ A)          ∇A = ∂ y / ∂A, y the logit of the target
    R    ← R + Ā R                                  R = I at first; layer by layer

This is the rule of self-attention, which serves decoders that read images as tokens and vision
transformers; cross-attention has other rules, which are not here.
The relevance of a token is its entry in the row of the deciding position (the last token of a
prompt, the class token of a vision transformer). `rollout` multiplies (mean A + I) of all layers,
rows normalised; `attention` is the mean row of the last layer. Both know nothing of the target.

relu drops what speaks against the target, so a map is no causal statement: `perturbation` hides
tokens by relevance, and `head_effects` patches heads. Whole patterns of all layers and their
gradients are kept, 2 · layers · heads · T² numbers an example: for prompts of a few hundred tokens.

Chefer et al. 2021 (ICCV), arXiv 2103.15679; rollout: Abnar & Zuidema 2020, arXiv 2005.00928.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from interp.recipe.hide import unseen
from patching.gradients import frozen

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.calls import AttnCall
    from interp.seam.structure import Layer, Tower

METHODS = ("gradient", "rollout", "attention")


@dataclass(frozen=True)
class Relevance:
    """Relevance of each token of each prompt.

    Attributes:
        method: one of `METHODS`.
        prompts: the prompts, as the tower sees them.
        tokens: for each prompt its tokens' relevance ≥ 0 at the deciding position.
        target: for each prompt the token or class whose logit was explained.
        heads: heads of the tower.
        by_head: [example, head] Σ relu(∇A ⊙ A) in the row of the deciding position; NaN but for
            `gradient`.
    """

    method: str
    prompts: tuple[Prompt, ...]
    tokens: tuple[Float[np.ndarray, " pos"], ...]
    target: tuple[int, ...]
    heads: tuple[HeadId, ...]
    by_head: Float[np.ndarray, "example head"]

    def patches(self, i: int) -> Float[np.ndarray, " patch"]:
        """Relevance of the patches of a prompt's image.

        Raises:
            InputError: it has no patch map.
        """
        seen = self.prompts[i].patches
        if seen is None:
            raise InputError(
                f"a map needs to know which pixels tokens stand for; prompt "
                f"{self.prompts[i].id or i} does not say",
                hint="make prompts with interp.images.image_prompt",
            )
        return self.tokens[i][[p.position for p in seen]]

    def heat(self, i: int, *, image: int = 0) -> Float[np.ndarray, "height width"]:
        """Relevance drawn on an image of a prompt; NaN where no patch lies."""
        seen = self.prompts[i].patches
        values = self.patches(i)
        assert seen is not None
        return seen.heat(values, image=image)


def relevance_maps(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    method: str = "gradient",
    target: str | Sequence[int] = "top",
    tower: str | None = None,
    batch_size: int = 4,
) -> Relevance:
    """Relevance of all tokens for the next token, or for the class.

    Args:
        model: the model.
        prompts: the prompts.
        method: `gradient`, `rollout` or `attention`.
        target: `top` (what the model says), `answer` (first token of each prompt's answer), or a
            token or class for each prompt.
        tower: tower to explain through; the model's first if None.
        batch_size: prompts at a time.

    Raises:
        InputError: an unknown method, no target, prompts with several images in a tower, or a
            tower that looks across or decides nothing by itself.
        SiteError: a layer whose pattern is not reached.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not prompts:
        raise InputError("at least one prompt is needed; got none")
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    _check_tower(model, stack, prompts)
    listed = list(prompts)
    seen_prompts: list[Prompt] = []
    rows: list[np.ndarray] = []
    targets: list[int] = []
    masses: list[np.ndarray] = []
    # Of one length at a time: no padding, and rows are whole.
    order = sorted(range(len(listed)), key=lambda i: len(listed[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < batch_size and len(listed[groups[-1][0]]) == len(listed[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    place: dict[int, int] = {}
    for group in groups:
        some = [listed[i] for i in group]
        batch = model.batch(some)
        wanted = _targets(target, listed, group)
        patterns, grads, chosen = _run(model, stack.layers, batch, wanted, method == "gradient")
        shown = batch.view(stack.name)
        views = batch if shown is None else shown[0]
        if len(views) != len(batch):
            raise InputError(f"tower {stack.name!r} must see one image a prompt")
        for b, prompt in enumerate(views.prompts):
            at = _deciding(prompt)
            maps = {n: a[b] for n, a in patterns.items()}
            slopes = {n: g[b] for n, g in grads.items()}
            row, mass = _propagated(stack.layers, maps, slopes, at, method)
            place[group[b]] = len(rows)
            seen_prompts.append(prompt)
            rows.append(row.double().cpu().numpy()[: len(prompt)])
            targets.append(int(chosen[b]))
            masses.append(mass.double().cpu().numpy())
    ordered = [place[i] for i in range(len(listed))]
    return Relevance(
        method,
        tuple(seen_prompts[i] for i in ordered),
        tuple(rows[i] for i in ordered),
        tuple(targets[i] for i in ordered),
        stack.heads,
        np.stack([masses[i] for i in ordered]),
    )


def _check_tower(model: "Model", tower: "Tower", prompts: Sequence[Prompt]) -> None:
    """Refuse towers for which the rule of self-attention says nothing of the answer."""
    if any(layer.cross for layer in tower.layers):
        raise InputError(f"relevance needs self-attention; tower {tower.name!r} looks across")
    if model.reads_tokens and any(tower.name in p.views for p in prompts):
        raise InputError(
            f"tower {tower.name!r} decides nothing by itself: a decoder reads what it makes of all "
            "its patches",
            hint="explain through the tower that reads the text; its image tokens are patches",
        )


def _deciding(prompt: Prompt) -> int:
    return prompt.positions("cls")[0] if "cls" in prompt.spans else len(prompt) - 1


def _targets(
    target: str | Sequence[int], prompts: Sequence[Prompt], group: Sequence[int]
) -> list[int] | None:
    if target == "top":
        return None
    if target == "answer":
        lacking = [prompts[i] for i in group if not prompts[i].answer]
        if lacking:
            raise InputError(
                f"target 'answer' needs an answer; prompt {lacking[0].id or '?'} has none",
                hint="target='top' explains what the model says",
            )
        return [(prompts[i].answer or (0,))[0] for i in group]
    if isinstance(target, str) or len(target) != len(prompts):
        raise InputError(
            f"target must be top, answer, or one token for each of {len(prompts)} prompts; "
            f"got {target!r}"
        )
    return [int(target[i]) for i in group]


Maps = Mapping[str, Tensor]


def _run(
    model: "Model", layers: "Sequence[Layer]", batch: Batch, wanted: list[int] | None, slopes: bool
) -> tuple[Maps, Maps, Tensor]:
    """Patterns [batch, head, query, key] of each layer, their gradients, and the targets."""
    patterns: dict[str, Tensor] = {}
    names = {layer.name for layer in layers}

    def kept(a: Tensor) -> Tensor:
        return a if a.requires_grad or not slopes else a.detach().requires_grad_()

    def observer(call: "AttnCall") -> Tensor | None:
        if call.name not in names:
            return None
        if call.q is None or call.v is None:
            return None
        if call.z.shape[0] != len(batch):
            raise SiteError(f"{call.name} attends in groups; its patterns are of no whole prompt")
        every, heads = slice(0, call.n_query), slice(0, call.n_heads)
        a = kept(torch.stack([call.rows(b, heads, every) for b in range(len(batch))]))
        patterns[call.name] = a
        v = call.v.repeat_interleave(call.n_heads // call.v.shape[1], dim=1).to(a)
        return (a @ v).transpose(1, 2).to(call.z)

    def weights(name: str, a: Tensor) -> Tensor | None:
        if name not in names:
            return None
        patterns[name] = kept(a)
        return patterns[name]

    with torch.set_grad_enabled(slopes), frozen(model), model.observe(observer, weights=weights):
        inputs = batch.inputs()
        if not model.reads_tokens:
            inputs = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}
        out: Any = model.hf(**inputs)
        logits = out.logits if hasattr(out, "logits") else out[0]
        if logits.dim() == 3:
            logits = logits[torch.arange(len(batch)), [len(p) - 1 for p in batch.prompts]]
        chosen = logits.argmax(-1) if wanted is None else torch.tensor(wanted).to(logits.device)
        missing = [n for n in names if n not in patterns]
        if missing:
            raise SiteError(
                f"relevance needs the pattern of every layer of the tower; {missing[0]} gives none"
            )
        if not slopes:
            return patterns, {}, chosen
        score = logits.gather(-1, chosen[:, None]).sum()
        found = torch.autograd.grad(score, list(patterns.values()), allow_unused=True)
    grads = {
        n: torch.zeros_like(a) if g is None else g
        for (n, a), g in zip(patterns.items(), found, strict=True)
    }
    return {n: a.detach() for n, a in patterns.items()}, grads, chosen


def _propagated(
    layers: "Sequence[Layer]", maps: Maps, slopes: Maps, at: int, method: str
) -> tuple[Tensor, Tensor]:
    """The row of the deciding position, and each head's mass in it."""
    first = maps[layers[0].name]
    n = first.shape[-1]
    total = torch.eye(n, dtype=first.dtype, device=first.device)
    masses = []
    for layer in layers:
        a = maps[layer.name]
        if method == "gradient":
            pulled = (slopes[layer.name] * a).clamp(min=0)
            masses.append(pulled[:, at].sum(-1))
            total = total + pulled.mean(0) @ total
        else:
            masses.append(a.new_full((a.shape[0],), torch.nan))
            if method == "rollout":
                mixed = a.mean(0) + torch.eye(n, dtype=a.dtype, device=a.device)
                total = mixed / mixed.sum(-1, keepdim=True) @ total
            else:
                total = a.mean(0)
    return total[at], torch.cat(masses)


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


SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.75, 1.0)


def perturbation(
    model: "Model",
    found: Relevance,
    prompts: Sequence[Prompt],
    *,
    span: str = "image",
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Perturbation:
    """Hide tokens in order of relevance and see what becomes of the target.

    Tokens are hidden from all others and keep their places, so that any prompt can be tested; of a
    plain vision transformer, in which every patch is read, its pixels are set to the mean (0).

    Args:
        model: the model.
        found: relevance of the prompts.
        prompts: the same prompts.
        span: whose tokens are hidden.
        shares: shares to hide, rising from 0 to 1.
        seed: seed of the random order.

    Raises:
        InputError: other prompts than those of `found`, or shares out of order.
    """
    if len(prompts) != len(found.tokens):
        raise InputError(f"{len(found.tokens)} prompts were explained; got {len(prompts)}")
    asked = np.asarray(shares, dtype=float)
    if asked[0] != 0 or asked[-1] != 1 or (np.diff(asked) <= 0).any():
        raise InputError(f"shares must rise from 0 to 1; got {tuple(shares)}")
    rng = np.random.default_rng(seed)
    out = {
        name: np.zeros((len(prompts), len(asked))) for name in ("deletion", "insertion", "random")
    }
    for i, prompt in enumerate(prompts):
        seen = found.prompts[i]
        places = np.array(seen.positions(span))
        best = places[np.argsort(-found.tokens[i][places], kind="stable")]
        for name, order in (
            ("deletion", best), ("insertion", best), ("random", rng.permutation(places))
        ):  # fmt: skip
            for j, share in enumerate(asked):
                count = round(share * len(places))
                gone = order[count:] if name == "insertion" else order[:count]
                out[name][i, j] = _probability(model, prompt, seen, gone, found.target[i])
    return Perturbation(asked, **out)


@torch.no_grad()
def _probability(
    model: "Model", prompt: Prompt, seen: Prompt, gone: np.ndarray, target: int
) -> float:
    batch = model.batch([prompt])
    inputs: dict[str, Any] = batch.inputs()
    hidden: AbstractContextManager[None] = nullcontext()
    if model.reads_tokens:
        if len(gone):
            tower = next(iter(model.towers.values()))
            hidden = unseen(model, tower, [prompt], [gone.tolist()])
    else:
        pixels = batch.extra["pixel_values"].clone()
        assert seen.patches is not None
        rows, columns = next(iter(seen.patches.grids().values()))
        high, wide = pixels.shape[-2] // rows, pixels.shape[-1] // columns
        for p in seen.patches:
            if p.position in set(gone.tolist()):
                y, x = p.row * high, p.column * wide
                pixels[..., y : y + high, x : x + wide] = 0
        inputs = {"pixel_values": pixels}
    with hidden:
        out: Any = model.forward(inputs)
    logits = out.logits if hasattr(out, "logits") else out[0]
    last = logits[0, -1] if logits.dim() == 3 else logits[0]
    return float(last.double().softmax(-1)[target])
