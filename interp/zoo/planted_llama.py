"""A stock Llama (RMSNorm, rotary positions, grouped-query attention) with one head that matters.

On `BOS … symbol … ?` the model answers with the symbol, one of `classes`, because one head looks
from `?` to the marked position and copies its class; every other head is random but blind to the
classes and writes where nothing reads. Without the planted head all classes are equally likely to
the last bit: accuracy on balanced prompts is exactly 1 / classes.

The match uses the slowest pair of rotary dimensions at a huge base, where the rotation is below
1e-7 at any position, so that content decides and not distance.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_parts import Layout, untouched_rng, word_tokenizer

D_HEAD = 16
FILLERS = 16
DECOYS = 16
MATCH = 24.0


def planted_llama(
    layer: int = 1,
    head: int = 2,
    C: int = 8,
    *,
    norm: str = "rms",
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    max_positions: int = 512,
    seed: int = 0,
) -> ZooModel:
    """Build the model of the module docstring.

    Token ids: the classes are 0 … C - 1, then 16 fillers, `?` and BOS (see `class_prompts`).

    Args:
        layer: layer of the planted head.
        head: its index in the layer.
        C: number of classes, 2 to 16.
        norm: `rms` for RMSNorm, which couples heads through the scale of the stream; `identity`
            for none, where the other heads change no class logit at all.
        n_layers: layers.
        n_heads: query heads of a layer.
        n_kv_heads: key-value heads of a layer; half of `n_heads` when None. The planted head's
            siblings share its keys and values, but not its query and output.
        max_positions: longest prompt.
        seed: seed of the random heads.

    Raises:
        InputError: the planted head lies outside the model, or `norm` or C is out of range.
    """
    if norm not in ("rms", "identity"):
        raise InputError(f"norm must be 'rms' or 'identity'; got {norm!r}")
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise InputError(
            f"the planted head must lie within {n_layers} x {n_heads} heads; got L{layer}H{head}"
        )
    if not 2 <= C <= D_HEAD:
        raise InputError(f"C must be between 2 and {D_HEAD} classes; got {C}")
    n_kv_heads = n_kv_heads or max(1, n_heads // 2)
    blocks = {"class": C, "marked": 1, "query": 1, "filler": FILLERS, "bos": 1}
    blocks |= {"out": C, "decoy": DECOYS}
    width = math.ceil(sum(blocks.values()) / 16) * 16
    residual = Layout(blocks, width)
    words = [*(f"s{i}" for i in range(C)), *(f"f{i}" for i in range(FILLERS)), "?", "<bos>"]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=D_HEAD,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        bos_token_id=len(words) - 1,
        eos_token_id=None,
        pad_token_id=len(words) - 1,
        tie_word_embeddings=False,
    )
    with untouched_rng():
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _embed(model, residual, C)
        for decoder in model.model.layers:
            for parameter in decoder.mlp.parameters():
                parameter.zero_()
            _blind(decoder.self_attn, residual, generator)
        _plant(model.model.layers[layer].self_attn, residual, head, C)
    if norm == "identity":
        _drop_norms(model)
    model.train(False)
    planted = HeadId(layer, head)
    every = [HeadId(i, j) for i in range(n_layers) for j in range(n_heads)]
    truth = Truth(
        heads={"class-copying": frozenset({planted})},
        scores={
            "zero-ablation-accuracy": dict.fromkeys(every, 1.0) | {planted: 1 / C},
            "negation-accuracy": dict.fromkeys(every, 1.0) | {planted: 0.0},
        },
        task={"class-copying": ("class-prompts", {"C": C})},
        note="accuracies on prompts with equally many of each class; clean accuracy is 1",
    )
    return ZooModel(model, truth, word_tokenizer(words, bos=len(words) - 1))


def _embed(model: LlamaForCausalLM, residual: Layout, n_classes: int) -> None:
    """Embeddings of equal norm, sqrt(d_model), so that the first RMSNorm changes nothing."""
    width = residual.width
    tokens = torch.zeros(model.config.vocab_size, width)
    both = math.sqrt(width / 2)
    tokens[:n_classes, residual["class"]] = both * torch.eye(n_classes)
    tokens[:n_classes, residual["marked"]] = both
    fillers = slice(n_classes, n_classes + FILLERS)
    tokens[fillers, residual["filler"]] = math.sqrt(width) * torch.eye(FILLERS)
    tokens[-2, residual["query"]] = math.sqrt(width)
    tokens[-1, residual["bos"]] = math.sqrt(width)
    model.model.embed_tokens.weight.copy_(tokens)
    head = torch.zeros_like(tokens)
    head[:n_classes, residual["out"]] = torch.eye(n_classes)
    # At `?` only classes are likely, also when the planted head is silent and they tie at zero.
    head[n_classes:, residual["query"]] = -1
    model.lm_head.weight.copy_(head)


def _blind(attention: nn.Module, residual: Layout, generator: torch.Generator) -> None:
    """Random heads that cannot tell the classes apart and write to the decoy block only.

    Queries, keys and values all ignore the class: a key that saw it would leak it through the
    pattern even if the values are blind. They also read no `out`, where the class is written.
    """

    def noise(name: str) -> Tensor:
        weight = attention.get_submodule(name).get_parameter("weight")
        return torch.randn(weight.shape, generator=generator) / math.sqrt(residual.width)

    for name in ("q_proj", "k_proj", "v_proj"):
        reader = noise(name)
        reader[:, residual["class"]] = 0
        reader[:, residual["out"]] = 0
        attention.get_submodule(name).get_parameter("weight").copy_(reader)
    writer = torch.zeros_like(noise("o_proj"))
    writer[residual["decoy"]] = noise("o_proj")[residual["decoy"]]
    attention.get_submodule("o_proj").get_parameter("weight").copy_(writer)


def _plant(attention: Any, residual: Layout, head: int, n_classes: int) -> None:
    """Write the planted head over a random one; its key-value head is shared by its group."""
    rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
    group = head // attention.num_key_value_groups
    kv_rows = slice(group * D_HEAD, (group + 1) * D_HEAD)
    # Rotary dimensions i and i + d_head/2 turn together; the last pair is the slowest.
    slow = D_HEAD // 2 - 1
    width = residual.width
    for weight, where in ((attention.q_proj.weight, rows), (attention.k_proj.weight, kv_rows)):
        weight[where] = 0
    # Features have sizes sqrt(width) and sqrt(width / 2): the score of a match is MATCH.
    gain = math.sqrt(MATCH * math.sqrt(D_HEAD))
    attention.q_proj.weight[rows][slow, residual["query"]] = gain / math.sqrt(width)
    attention.k_proj.weight[kv_rows][slow, residual["marked"]] = gain / math.sqrt(width / 2)
    value = torch.zeros(D_HEAD, width)
    value[:n_classes, residual["class"]] = torch.eye(n_classes)
    attention.v_proj.weight[kv_rows] = value
    output = torch.zeros(width, D_HEAD)
    output[residual["out"], :n_classes] = torch.eye(n_classes)
    attention.o_proj.weight[:, rows] = output


def _drop_norms(model: LlamaForCausalLM) -> None:
    for decoder in model.model.layers:
        decoder.input_layernorm = nn.Identity()
        decoder.post_attention_layernorm = nn.Identity()
    model.model.norm = nn.Identity()


def class_prompts(
    classes: int = 8, *, per_class: int = 4, length: int = 12, seed: int = 0
) -> list[Prompt]:
    """Balanced prompts for `planted_llama`: BOS, fillers with one symbol among them, and `?`.

    Spans: `bos`, `symbol`, `question`. The answer is the symbol, whose id is its class.

    Args:
        classes: number of classes of the model.
        per_class: prompts of each class.
        length: tokens of a prompt, at least 3.
        seed: seed of fillers and places.
    """
    if length < 3:
        raise InputError(f"length must be at least 3 tokens; got {length}")
    draw = random.Random(seed)
    fillers: Sequence[int] = range(classes, classes + FILLERS)
    prompts = []
    for i in range(classes * per_class):
        symbol = i % classes
        middle = draw.choices(fillers, k=length - 2)
        place = draw.randrange(length - 2)
        middle[place] = symbol
        tokens = (fillers[-1] + 2, *middle, fillers[-1] + 1)
        spans = {"bos": ((0, 1),), "symbol": ((place + 1, place + 2),)}
        spans["question"] = ((length - 1, length),)
        prompts.append(Prompt(tokens, spans, id=f"{i}", answer=(symbol,), meta={"class": symbol}))
    return prompts


@ZOO.register("planted-llama")
def _default() -> ZooModel:
    """A stock Llama (RMSNorm, rotary, grouped queries) with one head that matters."""
    return planted_llama()
