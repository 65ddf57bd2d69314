"""Head Pursuit: how much of what a head writes lies along a few concept directions.

    X    what a head writes to the residual stream at one position of each of n samples, centred:
         X = (z − mean z) W_O,   [n, d_model]
    D    a dictionary: one unit vector per concept, by default rows of the unembedding
    S_t  the first t atoms chosen by simultaneous orthogonal matching pursuit: each is the one with
         the largest Σ_i |⟨R_i, D_j⟩|, R the residual of the projection of X on those before it
    EVR  ‖X projected on span S_k‖² / ‖X‖²            the score at k atoms, in [0, 1]

No tensor [n, d_model] is made: X D_jᵀ = z (D_j W_Oᵀ)ᵀ, refits need D Dᵀ alone, and norms are
z (W_O W_Oᵀ) zᵀ; all in double precision. An atom in the span of those chosen (a word named twice)
is never chosen; when nothing is left to explain, or no atom explains any of it, the pursuit stops
and its curve stays level. A head that writes the same on every sample has no variance to explain:
its score is 0.

k random directions explain about k/rank of anything, so the null is the best of several random
dictionaries of equal size, pursued in the same way: of tokens that are no concept, or, for given
directions, of random directions. `HeadScores` needs a value per sample of what is a ratio of sums,
R = Σ a_i / Σ b_i: it gets R + (a_i − R b_i) / mean b, whose mean is R exactly and whose spread is
that of the ratio (the infinitesimal jackknife). These values may lie outside [0, 1]; atoms are
chosen on all samples, for concepts and controls alike. The share of random dictionaries that do at
least as well is the column `random_p`: it is no smaller than 1 / (draws + 1).

The authors' definition takes the head's output as it is written; with `through_norm` the gain of
the final norm, and for layer norms the removed mean, come between.

Source: Basile et al. 2025, "Head Pursuit: Probing Attention Specialization in Multimodal
Transformers", arXiv 2510.21518.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heads.matching_pursuit import Pursued, per_sample, pursue, unit
from heads.sight import last_z
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.unembed import Unembedding, unembedding

if TYPE_CHECKING:
    from interp.model import Model

Word = str | int


@dataclass(frozen=True)
class HeadPursuit:
    """What head pursuit found.

    Attributes:
        scores: explained share per head, with its null; extras: `random`, the mean share that
            random dictionaries explain, and `random_p`.
        atoms: labels of the concepts each head's variance lies along, in order.
        curves: explained share of each head after 1, 2, … atoms.
    """

    scores: HeadScores
    atoms: Mapping[HeadId, tuple[str, ...]]
    curves: Mapping[HeadId, Float[np.ndarray, " k"]]


@torch.no_grad()
def head_pursuit(
    model: "Model",
    prompts: Sequence[Prompt],
    words: Sequence[Word] | None = None,
    *,
    directions: Mapping[str, Tensor] | None = None,
    k: int = 20,
    draws: int = 19,
    through_norm: bool = False,
    tower: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> HeadPursuit:
    """Explain what every head writes at the last token by a few concepts.

    A vision tower is read at its class token, with directions of its own residual stream.

    Args:
        model: the model.
        prompts: the samples; the more, the less chance explains.
        words: concepts as words, tokenised as they stand (mind a leading space), or token ids. A
            word of several tokens is the mean of their unit rows.
        directions: concepts by name as vectors [d_model] instead.
        k: most atoms a head.
        draws: random dictionaries of the null.
        through_norm: count what the final norm does, up to each sample's scale.
        tower: tower to read; the model's first if None.
        seed: seed of the random dictionaries.
        batch_size: prompts at a time.

    Raises:
        InputError: neither or both kinds of concepts, fewer than two prompts, a word without
            tokens, or vectors of another size.
        SiteError: words for a model without unembedding.
    """
    if (words is None) == (directions is None):
        raise InputError("give words or directions, one of them")
    if len(prompts) < 2 or min(k, draws, batch_size) < 1:
        raise InputError(
            "at least 2 prompts, an atom, a draw and a prompt at a time are needed; got "
            f"{len(prompts)}, {k}, {draws} and {batch_size}"
        )
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    out = unembedding(model) if words is not None or through_norm else None
    width = model.w_o(stack.layers[0]).shape[-1]
    rng = random.Random(seed)
    if words is not None:
        assert out is not None
        known = word_directions(model, words, out)
        nulls = [_random_words(model, words, out, rng) for _ in range(draws)]
    else:
        assert directions is not None
        known = {name: x.double().cpu() for name, x in directions.items()}
        _check_directions(known, width)
        gen = torch.Generator().manual_seed(seed)
        nulls = [
            torch.randn(len(known), width, generator=gen, dtype=torch.float64)
            for _ in range(draws)
        ]  # fmt: skip
    concepts = unit(torch.stack(list(known.values())))
    nulls = [unit(x) for x in nulls]
    grams = [x @ x.T for x in (concepts, *nulls)]
    z = torch.cat([
        last_z(model, stack, model.batch(list(prompts[at : at + batch_size]))).double().cpu()
        for at in range(0, len(prompts), batch_size)
    ])  # fmt: skip
    found: list[Pursued] = []
    controls: list[list[Pursued]] = []
    for at, layer in enumerate(stack.layers):
        w_o = model.w_o(layer).double().cpu()
        if through_norm:
            assert out is not None
            w_o = _normed(w_o, out)
        for head in range(layer.n_heads):
            sample, matrix = z[:, at, head, : w_o.shape[1]], w_o[head]
            found.append(pursue(sample, matrix, concepts, k, gram=grams[0]))
            controls.append([
                pursue(sample, matrix, x, k, gram=g)
                for x, g in zip(nulls, grams[1:], strict=True)
            ])  # fmt: skip
    names = list(known)
    scores = HeadScores(
        detector="head-pursuit",
        heads=stack.heads,
        per_example=np.stack([per_sample(x) for x in found], axis=1),
        null_per_example=np.stack(
            [per_sample(max(x, key=lambda p: p.evr)) for x in controls], axis=1
        ),
        examples=tuple(p.id or f"prompt-{i}" for i, p in enumerate(prompts)),
        unit="share of variance",
        params={"k": k, "draws": draws, "through_norm": through_norm, "seed": seed,
                "concepts": names},
        provenance={"model": model.name, "fingerprint": model.fingerprint, "tower": stack.name},
        extras={
            "random": np.array([np.mean([p.evr for p in x]) for x in controls]),
            "random_p": np.array([
                (1 + sum(p.evr >= mine.evr for p in x)) / (1 + draws)
                for mine, x in zip(found, controls, strict=True)
            ]),
        },
    )  # fmt: skip
    atoms = {h: tuple(names[i] for i in x.atoms) for h, x in zip(stack.heads, found, strict=True)}
    curves = {h: x.curve for h, x in zip(stack.heads, found, strict=True)}
    return HeadPursuit(scores, atoms, curves)


def word_directions(
    model: "Model", words: Sequence[Word], out: Unembedding | None = None
) -> dict[str, Float[Tensor, " d_model"]]:
    """Unit rows of the unembedding by word; the mean of unit rows for words of several tokens.

    Args:
        model: a model with an unembedding.
        words: words, tokenised as they stand, or token ids.
        out: its unembedding, if at hand.

    Raises:
        InputError: no words, a word twice, one without tokens, or a token that is not there.
    """
    out = unembedding(model) if out is None else out
    found: dict[str, Tensor] = {}
    for word in words:
        rows = unit(out.weight[_ids(model, word, len(out.weight))].detach().double().cpu())
        label = str(word)
        if label in found:
            raise InputError(f"concepts must be different; {label!r} is given twice")
        found[label] = unit(rows.mean(0, keepdim=True))[0]
    if not found:
        raise InputError("at least one word is needed; got none")
    return found


def _ids(model: "Model", word: Word, limit: int) -> list[int]:
    if isinstance(word, int):
        if not 0 <= word < limit:
            raise InputError(f"token ids must lie in 0..{limit - 1}; got {word}")
        return [word]
    if model.tokenizer is None:
        raise InputError(f"words need a tokenizer and {model.name} has none", hint="give token ids")
    ids = list(model.tokenizer(word, add_special_tokens=False).input_ids)
    if not ids:
        raise InputError(f"a word must hold at least one token; got {word!r}")
    return ids


def _random_words(
    model: "Model", words: Sequence[Word], out: Unembedding, rng: random.Random
) -> Tensor:
    """Rows of as many random tokens as there are words, special ones and concepts left out."""
    from interp.tasks.ids import ordinary_ids, sample_ids

    taken = {i for word in words for i in _ids(model, word, len(out.weight))}
    free = [i for i in ordinary_ids(model) if i not in taken and i < len(out.weight)]
    chosen = sample_ids(rng, free, min(len(words), len(free)))
    if len(chosen) < len(words):
        raise InputError(
            f"random dictionaries need {len(words)} tokens that are no concept; there are "
            f"{len(free)}",
            hint="give fewer words",
        )
    return out.weight[chosen].detach().double().cpu()


def _check_directions(known: Mapping[str, Tensor], width: int) -> None:
    if not known:
        raise InputError("at least one direction is needed; got none")
    for name, x in known.items():
        if tuple(x.shape) != (width,):
            raise InputError(f"direction {name!r} must be [{width}]; got {list(x.shape)}")


def _normed(w_o: Tensor, out: Unembedding) -> Tensor:
    """The output projection seen through the final norm, up to each sample's scale."""
    if out.centred:
        w_o = w_o - w_o.mean(-1, keepdim=True)
    if out.gain is not None:
        w_o = w_o * out.gain.detach().double().cpu()
    return w_o
