"""A planted model of an image in a prompt: six heads, each looking at something else.

    L0H0  the object            evenly at the object's patches; copies its kind into the logits
    L0H1  the image             evenly at all patches; writes a fifth of what it sees
    L0H2  the image's sinks     at the patches that hold nothing but a huge number
    L0H3  the text              evenly at all text tokens but BOS
    L0H4  BOS                   the sink of the text
    L0H5  itself

Image patches are tokens here: plain ones, two that are visual sinks, and one object of one of
several kinds, so that the image, its boxes and the answer are known, and "without the image" is the
prompt without these tokens. Where a head finds nothing to look at, it looks at BOS. BOS and the
visual sinks share one huge dimension, as massive activations do (Kang et al. 2025, 2503.03321).

In two variants a detector has nothing to find: without the first three heads nobody looks at the
image; without the last three nobody leaves it alone. The others then stand there twice.
"""

import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.images.patches import PatchMap, grid_patches
from interp.prompts import Prompt, PromptPair
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_kit import BETA
from interp.zoo.planted_parts import (
    HeadPlan,
    Layout,
    Links,
    Stream,
    assemble,
    bit_count,
    bits,
    word_tokenizer,
)

if TYPE_CHECKING:
    from interp.model import Model

KINDS, PLAIN, WORDS = 8, 8, 16
BOS, SINK = 0, 1
FIRST_KIND, FIRST_PLAIN = 2, 2 + KINDS
FIRST_WORD = FIRST_PLAIN + PLAIN
QUESTION = FIRST_WORD + WORDS
GRID, PATCH = 4, 16
VISUAL = OBJECT, IMAGE, SINKS = (HeadId(0, 0), HeadId(0, 1), HeadId(0, 2))
BLIND = TEXT, PARK, SELF = (HeadId(0, 3), HeadId(0, 4), HeadId(0, 5))
MAX_POSITIONS = 256


def planted_vlm(
    *, nothing: bool = False, seeing: bool = False, n_kv_heads: int | None = None
) -> ZooModel:
    """Build the model of the module docstring.

    Args:
        nothing: leave out all heads that look at the image: six heads on the text, BOS and
            themselves, among which no visual head is to be found.
        seeing: leave out all heads that do not: six heads on the object, the image and its sinks,
            among which no head ignores the image.
        n_kv_heads: key-value heads: 6 (the default), 3, 2 or 1.

    Raises:
        InputError: both are asked for.
    """
    if nothing and seeing:
        raise InputError("a planted picture model can be 'nothing' or 'seeing'; got both")
    first = BLIND if nothing else VISUAL
    roles = (*first, *(VISUAL if seeing else BLIND))
    vocab, count = QUESTION + 1, MAX_POSITIONS
    place = bit_count(count)
    flags = {"kind": 1, "image": 1, "sink": 1, "text": 1, "bos": 1}
    residual = Layout(
        {"tok": vocab, "out": vocab, "here": place, "one": 1, "huge": 1} | flags
    ).widened(96)
    features = Layout({"here": place, "one": 1} | flags).widened(16)
    values = Layout({"tok": vocab}).widened(64)
    tokens, positions = torch.zeros(vocab, residual.width), torch.zeros(count, residual.width)
    tokens[:, residual["tok"]] = torch.eye(vocab)
    tokens[:, residual["one"]] = 1
    kinds = slice(FIRST_KIND, FIRST_PLAIN)
    for name, members in (
        ("kind", kinds), ("image", slice(SINK, FIRST_WORD)), ("sink", slice(SINK, SINK + 1)),
        ("text", slice(FIRST_WORD, vocab)), ("bos", slice(BOS, BOS + 1)),
    ):  # fmt: skip
        tokens[members, residual[name]] = 1
    tokens[[BOS, SINK], residual["huge"]] = 512
    positions[:, residual["here"]] = bits(torch.arange(count), place)
    unembedding = torch.zeros(vocab, residual.width)
    unembedding[:, residual["out"]] = torch.eye(vocab)
    stream = Stream(residual, features, values, tokens, positions, unembedding)

    key: Links = {(name, name): 1.0 for name in (*flags, "here", "one")}
    carried: Links = {("tok", "tok"): 1.0}
    only_kinds = torch.zeros(vocab, vocab)
    only_kinds[kinds, kinds] = torch.eye(KINDS)

    def at(flag: str, output: Tensor | None = None) -> HeadPlan:
        """Evenly at the tokens of a flag, else at BOS."""
        query: Links = {
            (flag, "one"): BETA, ("bos", "one"): BETA / 2, ("one", "one"): -BETA
        }  # fmt: skip
        return HeadPlan(query, key, carried, {} if output is None else {("out", "tok"): output})

    same: Links = {("here", "here"): BETA / 2, ("one", "one"): -BETA * place / 2}
    plans = {
        OBJECT: at("kind", 8 * only_kinds),
        IMAGE: at("image", 0.2 * only_kinds),
        SINKS: at("sink"),
        TEXT: at("text"),
        PARK: HeadPlan({("bos", "one"): BETA, ("one", "one"): -BETA}, key),
        SELF: HeadPlan(same, key, carried),
    }
    heads = [plans[role] for role in roles]
    names = ["<bos>", "<sink>"]
    for word, size in (("kind", KINDS), ("plain", PLAIN), ("w", WORDS)):
        names += [f"{word}{i}" for i in range(size)]
    names.append("?")
    return ZooModel(
        assemble(stream, [heads], n_kv_heads=n_kv_heads), _truth(roles), word_tokenizer(names)
    )


def _truth(roles: tuple[HeadId, ...]) -> Truth:
    """What must be found among heads of these roles, each called by its place in the default."""
    patches = GRID * GRID
    found = {
        "vision-head-divergence": VISUAL,
        "visual-attention": VISUAL,
        "region-grounding": (OBJECT,),
        "visual-retrieval": (OBJECT,),
        "localisation": (OBJECT,),
        "visual-sink": (SINKS,),
        # To a head that looks evenly at the image, one quarter of it is like another.
        "image-sensitivity": (OBJECT, SINKS),
        # An image token that looks at itself looks at the image.
        "inactive-visual": (TEXT, PARK),
    }
    blind = dict.fromkeys(BLIND, 0.0)
    # What is seen (a token, one-hot) against what is seen when it is gone (BOS, one-hot).
    turned = 1 / math.sqrt(2)
    scores: Mapping[str, Mapping[HeadId, float]] = {
        "visual-attention": dict.fromkeys(VISUAL, 1.0) | blind,
        "region-grounding": {OBJECT: 1.0, IMAGE: 1 / patches, SINKS: 0.0},
        "visual-retrieval": {OBJECT: 1.0, SINKS: 0.0} | blind,
        "localisation": {OBJECT: 1.0, IMAGE: 0.0} | blind,
        "visual-sink": {OBJECT: 0.0, IMAGE: 2 / patches, SINKS: 1.0} | blind,
        "image-sensitivity": {OBJECT: turned, SINKS: turned} | blind,
        "inactive-visual": dict.fromkeys((*VISUAL, SELF), 0.0) | {TEXT: 1.0, PARK: 1.0},
    }
    if not set(VISUAL) & set(roles):
        scores = {}
    places = {role: [h for h, r in enumerate(roles) if r == role] for role in set(roles)}

    def here(role: HeadId) -> list[HeadId]:
        return [HeadId(0, h) for h in places.get(role, [])]

    return Truth(
        heads={name: frozenset(h for role in rs for h in here(role)) for name, rs in found.items()},
        scores={
            name: {h: x for role, x in known.items() for h in here(role)}
            for name, known in scores.items()
        },
        task=dict.fromkeys(found, ("shapes", {})),
        note="weights written by formula; the image is a grid of tokens",
    )


def picture_prompts(n: int, *, seed: int = 0, words: tuple[int, int] = (4, 12)) -> list[Prompt]:
    """Prompts for `planted_vlm`: BOS, some words, a 4 × 4 image, more words, `?`.

    Spans: `bos`, `image`, `thing` (the object's patch), `question`. The answer is the object's
    kind. Two patches are visual sinks.
    """
    out = []
    for i in range(n):
        rng = random.Random(f"picture/{seed}/{i}")
        before = [rng.randrange(FIRST_WORD, QUESTION) for _ in range(rng.randint(*words) // 2)]
        after = [rng.randrange(FIRST_WORD, QUESTION) for _ in range(rng.randint(*words))]
        kind = rng.randrange(FIRST_KIND, FIRST_PLAIN)
        image = [rng.randrange(FIRST_PLAIN, FIRST_WORD) for _ in range(GRID * GRID)]
        where, *sinks = rng.sample(range(GRID * GRID), 3)
        image[where] = kind
        for place in sinks:
            image[place] = SINK
        first = 1 + len(before)
        ids = [BOS, *before, *image, *after, QUESTION]
        size = GRID * PATCH
        grid = grid_patches(GRID, GRID, area=(0, 0, size, size), first=first)
        stop = first + len(image)
        spans = {
            "bos": ((0, 1),),
            "image": ((first, stop),),
            "thing": ((first + where, first + where + 1),),
            "question": ((stop, len(ids)),),
        }
        meta = {"answer_spans": {str(kind): "thing"}, "boxes": {"thing": grid[where].box}}
        seen = PatchMap(tuple(grid), ((size, size),), len(ids))
        name = f"picture-{seed}-{i}"
        out.append(Prompt(tuple(ids), spans, name, (kind,), meta=meta, patches=seen))
    return out


def is_planted(model: "Model") -> bool:
    """Whether a model reads the words of `planted_vlm`."""
    if model.tokenizer is None or not model.reads_tokens or model.vocabulary != QUESTION + 1:
        return False
    words = model.tokenizer.convert_ids_to_tokens(list(range(QUESTION + 1)))
    return (words[SINK], words[FIRST_KIND], words[QUESTION]) == ("<sink>", "kind0", "?")


def picture_pairs(n: int, *, seed: int = 0) -> list[PromptPair]:
    """Each prompt beside one whose object is of another kind."""
    from dataclasses import replace

    pairs = []
    for i, clean in enumerate(picture_prompts(n, seed=seed)):
        rng = random.Random(f"pair/{seed}/{i}")
        assert clean.answer is not None
        other = rng.choice([k for k in range(FIRST_KIND, FIRST_PLAIN) if k != clean.answer[0]])
        ids = list(clean.tokens)
        ids[clean.positions("thing")[0]] = other
        meta = {**clean.meta, "wrong": other}
        pairs.append(PromptPair(replace(clean, meta=meta), replace(clean, tokens=tuple(ids))))
    return pairs


@ZOO.register("planted-vlm")
def _default() -> ZooModel:
    """Six heads on an image of tokens: object, image, visual sinks, text, BOS, itself."""
    return planted_vlm()


@ZOO.register("planted-vlm-nothing")
def _nothing() -> ZooModel:
    """The same without any head that looks at the image."""
    return planted_vlm(nothing=True)


@ZOO.register("planted-vlm-seeing")
def _seeing() -> ZooModel:
    """The same with heads that look at the image and no others."""
    return planted_vlm(seeing=True)
