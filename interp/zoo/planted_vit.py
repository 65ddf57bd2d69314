"""A planted vision transformer: eight heads on a 5 × 6 grid of coloured patches.

    L0H0  itself              L1H0  everything, evenly; writes the mean colour to the logits
    L0H1  right neighbour     L1H1  patches of the same colour, evenly, itself among them
    L0H2  3 × 3 around it     L1H2  the class token
    L0H3  ring 2 around it    L1H3  red patches, evenly; the class token where there is none

At the right border L0H1 looks at itself; rings and squares are cut at the border. The class token
looks at itself in all heads but L1H0 (evenly at everything) and L1H3 (as patches do). The class is
the colour nearest the mean.

The model is transformers' own ViT. Its layer norms do nothing, by construction: the residual
stream is [u, −u] with |u|² half its width, so that its mean is 0 and its variance 1 before any of
them finds out. A patch must be of one of eight colours for that, the corners of the colour cube,
which the processor makes −1 and 1. Values are small powers of two and patterns one-hot to
exp(−64).
"""

import math
from typing import Any

import torch
from torch import Tensor

from interp.headid import HeadId
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_kit import BETA
from interp.zoo.planted_parts import Layout, linked, untouched_rng

ROWS, COLUMNS, PATCH = 5, 6, 4
N = ROWS * COLUMNS
D_HEAD, WIDTH = 64, 128
TOWER = "vision"
COLOURS = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
"""Corners of the colour cube; bit 4 of the index is red, 2 green, 1 blue."""
SELF, RIGHT, SQUARE, RING = (HeadId(0, h, TOWER) for h in range(4))
UNIFORM, SAME, CLASS, RED = (HeadId(1, h, TOWER) for h in range(4))

# Sizes of the blocks of u: 4² for the place and 3 · 4² for the colour make |u|² = 64.
_SIZE = 4.0
_U = Layout({"here": 1 + N, "colour": 3, "class": 3, "out": 3}).widened(WIDTH // 2)
_FAINT = 2.0**-8
_KEY = Layout({"here": 1 + N, "colour": 3}).widened(D_HEAD)
_VALUE = Layout({"colour": 3}).widened(D_HEAD)


def codes() -> Tensor:
    """Colours [colour, channel] as the model reads them: −1 and 1."""
    index = torch.arange(len(COLOURS))[:, None] >> torch.tensor([2, 1, 0])
    return (index & 1) * 2.0 - 1


def allowed(head: HeadId) -> Tensor:
    """Which tokens a head that goes by place attends to, evenly: [query, key], class token first.

    Raises:
        KeyError: the head goes by content.
    """
    place = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))
    step = place[None] - place[:, None]
    far = step.abs().amax(-1)
    right = (step == torch.tensor([0, 1])).all(-1)
    right |= torch.diag(~right.any(-1))
    inside = {SELF: far == 0, RIGHT: right, SQUARE: far <= 1, RING: far == 2}
    seen = torch.zeros(1 + N, 1 + N, dtype=torch.bool)
    if head == UNIFORM:
        return ~seen
    seen[0, 0] = True
    if head == CLASS:
        seen[:, 0] = True
    else:
        seen[1:, 1:] = inside[head]
    return seen


def planted_vit(*, nothing: bool = False) -> ZooModel:
    """Build the model of the module docstring.

    Args:
        nothing: leave out all heads that go by place but not evenly: in their stead stand heads
            that look for one colour each. Nor does any head matter: logits are 2⁻⁸ of what they
            were.
    """
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        image_size=(ROWS * PATCH, COLUMNS * PATCH), patch_size=PATCH, num_labels=len(COLOURS),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-12,
        qkv_bias=False, head_dim=D_HEAD, id2label=dict(enumerate(COLOURS)),
        label2id={name: i for i, name in enumerate(COLOURS)},
    )  # fmt: skip
    with untouched_rng():
        model: Any = ViTForImageClassification(config)
    blank = [_seeks(name) for name in ("blue", "green", "yellow", "white")]
    near = [_place(head) for head in (SELF, RIGHT, SQUARE, RING)]
    far = [_place(UNIFORM), _same(), _seeks("cyan") if nothing else _place(CLASS), _seeks("red")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "layernorm" in name and name.endswith("weight") else 0)
        _embed(model.vit.embeddings)
        for layer, heads in zip(model.vit.layers, (blank if nothing else near, far), strict=True):
            _write(layer.attention, heads)
        # The mean colour leaves L1H0; logits are its products with the codes of all colours.
        output = linked(_U, _VALUE, {("out", "colour"): 1.0})
        model.vit.layers[1].attention.o_proj.weight[:, :D_HEAD] = torch.cat([output, -output])
        read = torch.zeros(len(COLOURS), _U.width)
        read[:, _U["out"]] = codes() * (_FAINT if nothing else 1)
        model.classifier.weight.copy_(torch.cat([read, -read], dim=1))
    return ZooModel(model.train(False), _truth(nothing), None, processor())


def processor() -> Any:
    """Images at the model's size, with 0 as −1 and 255 as 1."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=0,
        size={"height": ROWS * PATCH, "width": COLUMNS * PATCH},
    )  # fmt: skip


def _embed(embeddings: Any) -> None:
    pixels = torch.zeros(_U.width, 3)
    pixels[_U["colour"]] = _SIZE * torch.eye(3)
    whole = torch.cat([pixels, -pixels])[..., None, None] / PATCH**2
    embeddings.patch_embeddings.projection.weight.copy_(whole.expand(-1, -1, PATCH, PATCH))
    place = torch.zeros(1 + N, _U.width)
    place[:, _U["here"]] = _SIZE * torch.eye(1 + N)
    place[0, _U["class"]] = _SIZE  # as much as a colour
    embeddings.position_embeddings.copy_(torch.cat([place, -place], dim=1)[None])


Plan = tuple[Tensor, Tensor]
"""Query [feature, u] of a head for keys that hold place and colour; and its constant, if any."""


def _place(head: HeadId) -> Plan:
    """Evenly at the allowed tokens: their scores are 0, those of others −β."""
    query = torch.zeros(_KEY.width, _U.width)
    query[_KEY["here"], _U["here"]] = -BETA * (~allowed(head)).float().T
    return query, torch.zeros(_KEY.width)


def _same() -> Plan:
    """β/2 for each channel in which colours differ; the class token looks at itself."""
    query = torch.zeros(_KEY.width, _U.width)
    query[_KEY["colour"], _U["colour"]] = BETA / 2 * torch.eye(3)
    here = torch.full((1 + N, 1 + N), -1.5 * BETA)
    here[0, 0] = 0
    # The class token has no colour, so its key would come second to patches of the same.
    query[_KEY["here"], _U["here"]] = here
    return query, torch.zeros(_KEY.width)


def _seeks(colour: str) -> Plan:
    """At patches of one colour, else at the class token, half a match away."""
    constant = torch.zeros(_KEY.width)
    constant[_KEY["colour"]] = BETA / 2 * codes()[COLOURS.index(colour)]
    constant[_KEY["here"]] = -1.5 * BETA
    constant[_KEY["here"].start] = -0.5 * BETA
    return torch.zeros(_KEY.width, _U.width), constant


def _write(attention: Any, heads: list[Plan]) -> None:
    """Queries and keys; every key holds its place and colour, every value its colour."""
    key = linked(_KEY, _U, {("here", "here"): 1 / _SIZE, ("colour", "colour"): 1 / _SIZE})
    value = linked(_VALUE, _U, {("colour", "colour"): 1 / _SIZE})
    queries = []
    for query, constant in heads:
        whole = query.clone()
        # Each token stands at one place, so what all places ask for is asked for always.
        whole[:, _U["here"]] += constant[:, None]
        queries.append(whole / _SIZE * math.sqrt(D_HEAD))
    for projection, parts in (
        (attention.q_proj, queries), (attention.k_proj, [key] * 4), (attention.v_proj, [value] * 4),
    ):  # fmt: skip
        u = torch.cat(parts)
        # Half from u and half from −u: what layer norms would take for a mean cancels.
        projection.weight.copy_(torch.cat([u, -u], dim=1) / 2)


def _truth(nothing: bool) -> Truth:
    near = frozenset() if nothing else frozenset({SELF, RIGHT, SQUARE})
    fixed = frozenset() if nothing else frozenset({RIGHT, SQUARE, RING})
    matters = frozenset() if nothing else frozenset({UNIFORM})
    heads = {
        "distance-profile": near, "content-agnostic": fixed, "pruning-importance": matters
    }  # fmt: skip
    even = _even_share() * N / (1 + N)
    scores = {} if nothing else {
        "distance-profile": {SELF: 1.0, RIGHT: 1.0, SQUARE: 1.0, RING: 0.0, UNIFORM: even,
                             CLASS: 0.0},
        "content-agnostic": dict.fromkeys((SELF, RIGHT, SQUARE, RING), 1.0),
        "pruning-importance": dict.fromkeys(
            (SELF, RIGHT, SQUARE, RING, SAME, CLASS, RED), 0.0
        ),
    }  # fmt: skip
    return Truth(
        heads=heads, scores=scores, task=dict.fromkeys(heads, ("tiles", {})),
        note="weights written by formula; layer norms find mean 0 and variance 1",
    )  # fmt: skip


def _even_share() -> float:
    """Part of the grid within one step of a patch, the mean over patches."""
    return float(allowed(SQUARE)[1:, 1:].double().mean())


@ZOO.register("planted-vit")
def _default() -> ZooModel:
    """A vision transformer: self, neighbour, square, ring, even, same colour, class token, red."""
    return planted_vit()


@ZOO.register("planted-vit-nothing")
def _nothing() -> ZooModel:
    """The same without any head that goes by place, and with faint logits."""
    return planted_vit(nothing=True)
