"""Relevance maps: which tokens, and so which patches, an answer came from, by attention.

    Ā    = mean over heads of relu(∇A ⊙ A)          ∇A = ∂ y / ∂A, y the logit of the target
    R    ← R + Ā R                                  R = I at first; layer by layer

This is the rule of self-attention, which serves decoders that read images as tokens and vision
transformers. Models that look across have two sides with maps from each to each, by the rules of
`patching.relevance_rules`: encoder-decoders of texts, images and sounds, decoders with layers of
cross-attention to an image, and co-attention, where text and image look at each other in one block.
The relevance of a token is its entry in the row of the deciding position (the last token of a
prompt, the class token of a vision transformer); that of an encoder token or a patch looked at is
its entry in the same row of the map across. `rollout` multiplies (mean A + I) of all layers, rows
normalised; `attention` is the mean row of the last layer. Both know nothing of the target.

What is looked at counts as its maker's input where the maker is a reached self-attention tower of
as many positions, else as it is; `Relevance.through` says which. Mllama's vision towers have padded
positions and stay out. Models in which sides meet over more than one chain of layers are refused:
BridgeTower, which mixes the text tower into each of its cross-modal layers.

relu drops what speaks against the target, so a map is no causal statement: `perturbation` hides
tokens by relevance, and `head_effects` patches heads. Whole patterns of all layers and their
gradients are kept, 2 · layers · heads · T² numbers an example: for prompts of a few hundred tokens.

Chefer et al. 2021 (ICCV), arXiv 2103.15679; rollout: Abnar & Zuidema 2020, arXiv 2005.00928.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from patching.relevance_rules import RULES, SOURCE, TOKENS, Step, spread
from patching.relevance_run import Traced, run
from patching.relevance_sides import Call, Scope, scope_of, takes_decoder

if TYPE_CHECKING:
    from interp.model import Model

METHODS = tuple(RULES)


@dataclass(frozen=True)
class Relevance:
    """Relevance of each token of each prompt.

    Attributes:
        method: one of `METHODS`.
        prompts: the prompts as the deciding tower sees them: of an encoder-decoder, what its
            decoder read.
        tokens: for each prompt its tokens' relevance ≥ 0 at the deciding position.
        target: for each prompt the token or class whose logit was explained.
        heads: heads whose queries are the tokens, those that look across included.
        by_head: [example, head] Σ relu(∇A ⊙ A) in the row of the deciding position; NaN but for
            `gradient`, and for heads that did not run.
        source: for each prompt the relevance ≥ 0 at the deciding position of what was looked at
            across: encoder tokens, patches, frames. Empty where nothing was.
        sources: for each prompt what was looked at: the encoder's prompt or the prompt's view of
            that length, else as many nameless positions; None where nothing was.
        through: towers that the maps went through.
    """

    method: str
    prompts: tuple[Prompt, ...]
    tokens: tuple[Float[np.ndarray, " pos"], ...]
    target: tuple[int, ...]
    heads: tuple[HeadId, ...]
    by_head: Float[np.ndarray, "example head"]
    source: tuple[Float[np.ndarray, " key"], ...]
    sources: tuple[Prompt | None, ...]
    through: tuple[str, ...]

    def patches(self, i: int) -> Float[np.ndarray, " patch"]:
        """Relevance of the patches of a prompt's image.

        Raises:
            InputError: it has no patch map.
        """
        seen, values = self._mapped(i)
        assert seen.patches is not None
        return values[[p.position for p in seen.patches]]

    def heat(self, i: int, *, image: int = 0) -> Float[np.ndarray, "height width"]:
        """Relevance drawn on an image of a prompt; NaN where no patch lies."""
        seen, _ = self._mapped(i)
        assert seen.patches is not None
        return seen.patches.heat(self.patches(i), image=image)

    def _mapped(self, i: int) -> tuple[Prompt, Float[np.ndarray, " pos"]]:
        """The side of a prompt whose tokens stand for pixels."""
        for seen, values in ((self.prompts[i], self.tokens[i]), (self.sources[i], self.source[i])):
            # The text of a prompt with an image looked at has a map without any patch.
            if seen is not None and seen.patches is not None and seen.patches.patches:
                return seen, values
        raise InputError(
            f"a map needs to know which pixels tokens stand for; prompt "
            f"{self.prompts[i].id or i} does not say",
            hint="make prompts with interp.images.image_prompt",
        )


def relevance_maps(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    method: str = "gradient",
    target: str | Sequence[int] = "top",
    tower: str | None = None,
    decoder: Sequence[Prompt] | None = None,
    batch_size: int = 4,
) -> Relevance:
    """Relevance of all tokens for the next token, or for the class.

    Args:
        model: the model.
        prompts: the prompts; of an encoder-decoder, what its encoder reads.
        method: `gradient`, `rollout` or `attention`.
        target: `top` (what the model says), `answer` (first token of each prompt's answer; the
            decoder's prompt goes first), or a token or class for each prompt.
        tower: tower to explain through, or the one by which it looks across; the model's first
            that decides if None.
        decoder: of an encoder-decoder, what its decoder has read of each answer, start token
            included; the prompt's input `decoder_input_ids`, or the start token alone, if None.
        batch_size: prompts at a time.

    Raises:
        InputError: an unknown method, no target, prompts with several images in a tower, or a
            tower that decides nothing by itself.
        SiteError: a layer whose pattern is not reached.
    """
    if method not in RULES:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not prompts:
        raise InputError("at least one prompt is needed; got none")
    listed = list(prompts)
    scope = scope_of(model, tower)
    if model.reads_tokens and any(scope.own.name in p.views for p in listed):
        raise InputError(
            f"tower {scope.own.name!r} decides nothing by itself: a decoder reads what it makes of "
            "all its patches",
            hint="explain through the tower that reads the text; its image tokens are patches",
        )
    inner = _decoders(model, listed, decoder)
    rows: dict[int, _Row] = {}
    for group in _groups(listed, inner, batch_size):
        some = [listed[i] for i in group]
        batch = model.batch(some)
        if inner is not None:
            batch = replace(batch, decoder=model.batch([inner[i] for i in group]))
        wanted = _targets(target, listed, inner, group)
        traced = run(model, scope, batch, _read(batch, scope), wanted, method == "gradient")
        rows |= dict(zip(group, _rows(scope, batch, traced, method), strict=True))
    ordered = [rows[i] for i in range(len(listed))]
    ran = {name for row in ordered for name in row.masses}
    towers = (scope.own, *scope.cross, *scope.others)
    layers = [layer for t in towers for layer in t.layers if layer.name in ran]
    silent = {x.name: np.full(x.n_heads, np.nan) for x in layers}
    masses = [{**silent, **row.masses} for row in ordered]
    return Relevance(
        method=method,
        prompts=tuple(row.prompt for row in ordered),
        tokens=tuple(row.tokens for row in ordered),
        target=tuple(row.target for row in ordered),
        heads=tuple(HeadId(x.index, h, x.tower) for x in layers for h in range(x.n_heads)),
        by_head=np.stack([np.concatenate([mass[x.name] for x in layers]) for mass in masses]),
        source=tuple(row.source for row in ordered),
        sources=tuple(row.looked for row in ordered),
        through=tuple(t.name for t in towers if any(t.name in row.through for row in ordered)),
    )


def _groups(
    prompts: Sequence[Prompt], inner: Sequence[Prompt] | None, size: int
) -> list[list[int]]:
    """Prompts of one form at a time: no padding, and rows are whole."""
    alike: dict[object, list[int]] = {}
    for i, p in enumerate(prompts):
        shapes = frozenset((name, tuple(x.shape)) for name, x in p.inputs.items())
        alike.setdefault((len(p), len(inner[i]) if inner else 0, shapes), []).append(i)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def _decoders(
    model: "Model", prompts: Sequence[Prompt], decoder: Sequence[Prompt] | None
) -> list[Prompt] | None:
    """What the decoder reads for each prompt; None without a decoder that reads by itself."""
    if not takes_decoder(model):
        if decoder is not None:
            raise InputError(f"{model.name} has no decoder beside an encoder; got decoder prompts")
        return None
    if decoder is not None:
        if len(decoder) != len(prompts):
            raise InputError(
                f"the decoder reads one prompt for each of {len(prompts)}; got {len(decoder)}"
            )
        return list(decoder)
    out = []
    for p in prompts:
        ids = p.inputs.get("decoder_input_ids")
        read = _start(model) if ids is None else tuple(ids.reshape(-1).tolist())
        out.append(Prompt(read, id=p.id))
    return out


def _start(model: "Model") -> tuple[int, ...]:
    for config in (getattr(model.hf, "generation_config", None), model.config, model.text_config):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int):
            return (start,)
    raise InputError(
        f"{model.name} does not say with which token its decoder starts",
        hint="decoder=[Prompt((start, …)), …] says what it has read",
    )


def _targets(
    target: str | Sequence[int],
    prompts: Sequence[Prompt],
    inner: Sequence[Prompt] | None,
    group: Sequence[int],
) -> list[int] | None:
    if target == "top":
        return None
    if target == "answer":
        answers = [(inner[i].answer if inner else None) or prompts[i].answer for i in group]
        if None in answers:
            raise InputError(
                f"target 'answer' needs an answer; prompt "
                f"{prompts[group[answers.index(None)]].id or '?'} has none",
                hint="target='top' explains what the model says",
            )
        return [answer[0] for answer in answers if answer]
    if isinstance(target, str) or len(target) != len(prompts):
        raise InputError(
            f"target must be top, answer, or one token for each of {len(prompts)} prompts; "
            f"got {target!r}"
        )
    return [int(target[i]) for i in group]


def _read(batch: Batch, scope: Scope) -> Batch:
    """The batch as the deciding tower sees it."""
    if batch.decoder is not None:
        return batch.decoder
    shown = batch.view(scope.own.name)
    views = batch if shown is None else shown[0]
    if len(views) != len(batch):
        raise InputError(f"tower {scope.own.name!r} must see one image a prompt")
    return views


@dataclass(frozen=True)
class _Row:
    """The deciding row of one example."""

    prompt: Prompt
    tokens: np.ndarray
    target: int
    masses: dict[str, np.ndarray]
    source: np.ndarray
    looked: Prompt | None
    through: frozenset[str]


def _rows(scope: Scope, batch: Batch, traced: Traced, method: str) -> list[_Row]:
    weights = [_weights(c) for c in traced.calls]
    # In double: what is gained over I may be far smaller than 1, and is divided by its sum.
    steps = [
        Step(c.query, c.key, a.mean(1).cpu().double(), c.block)
        for c, a in zip(traced.calls, weights, strict=True)
    ]
    maps = spread(steps, method)
    across = maps.get((TOKENS, SOURCE))
    through = frozenset(c.layer.tower for c in traced.calls)
    out = []
    for b, (prompt, at) in enumerate(zip(_read(batch, scope).prompts, traced.at, strict=True)):
        masses: dict[str, np.ndarray] = {}
        for c, a in zip(traced.calls, weights, strict=True):
            if c.query == TOKENS:
                mass = (
                    a[b, :, at].sum(-1)
                    if method == "gradient"
                    else a.new_full(a.shape[1:2], np.nan)
                )
                masses[c.layer.name] = masses.get(c.layer.name, 0) + mass.double().cpu().numpy()
        tokens = maps[TOKENS, TOKENS][b, at, : len(prompt)].numpy()
        source, looked = np.zeros(0), None
        if across is not None:
            source = across[b, at].numpy()
            looked = _looked(batch, scope, b, len(source))
        out.append(_Row(prompt, tokens, int(traced.target[b]), masses, source, looked, through))
    return out


def _weights(call: Call) -> Float[Tensor, "batch head query key"]:
    """relu(∇A ⊙ A) of each head; A itself if no gradient was asked for."""
    return call.pattern if call.slope is None else (call.slope * call.pattern).clamp(min=0)


def _looked(batch: Batch, scope: Scope, b: int, n: int) -> Prompt:
    """What one example looked at: its encoder's prompt, its view of n positions, or no names."""
    prompt = batch.prompts[b]
    keys = [seen for t in scope.cross for seen in prompt.views.get(f"{t.name}/keys", ())]
    if batch.decoder is not None and not keys and len(prompt) == n:
        return prompt
    rows = [seen[0] for seen in prompt.views.values() if len(seen) == 1]
    fits = [seen for seen in (*keys, *rows) if len(seen) == n]
    return fits[0] if fits else Prompt((0,) * n, id=prompt.id)
