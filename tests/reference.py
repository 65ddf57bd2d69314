"""Slow and obvious: whole attention matrices from eager copies, readings by loops over rows.

Nothing here imports the code under test except the values that name what is wanted (readings,
relations, prompts). Patterns come from `output_attentions` of an eager copy; v and z are noted at
the eager function of the model's own file.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp import readings as rd
from interp.model import Model
from interp.prompts import Batch, Prompt

VOCABULARY = 97
WINDOW = 5

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=2304,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED))


def _llama_head8() -> nn.Module:
    """Heads of 8: columns appended to v change the order in which the CPU kernel adds."""
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**_GROUPED, "hidden_size": 32}))


def _mistral() -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED, sliding_window=WINDOW))


def _gemma2() -> nn.Module:
    return tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            **_GROUPED, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=2.0,
            query_pre_attn_scalar=16,
        )
    )  # fmt: skip


def _gpt_oss() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **_GROUPED, head_dim=16, sliding_window=WINDOW, num_local_experts=2,
            num_experts_per_tok=1, rope_parameters=rope,
        )
    )  # fmt: skip


def _bloom() -> nn.Module:
    return tf.BloomForCausalLM(
        tf.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def _deepseek_v2() -> nn.Module:
    return tf.DeepseekV2ForCausalLM(
        tf.DeepseekV2Config(**_SHAPE, num_key_value_heads=4, **_LATENT, **_EXPERTS)
    )


def _deepseek_v3() -> nn.Module:
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**_SHAPE, num_key_value_heads=4, **_LATENT, **_EXPERTS)
    )


def _bert() -> nn.Module:
    return tf.BertModel(tf.BertConfig(**_SHAPE))


def _vit() -> nn.Module:
    return tf.ViTModel(
        tf.ViTConfig(
            hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        )
    )  # fmt: skip


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, projection_dim=64,
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=vision, text_config=tf.LlamaConfig(**_GROUPED), image_token_index=96,
            vision_feature_layer=-1,
        )
    )  # fmt: skip


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "llama-head8": _llama_head8,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gpt-oss": _gpt_oss,
    "bloom": _bloom,
    "t5": _t5,
    "deepseek-v2": _deepseek_v2,
    "deepseek-v3": _deepseek_v3,
    "bert": _bert,
    "vit": _vit,
    "llava": _llava,
}


def fresh(family: str, attn: str = "", *, seed: int = 0) -> Any:
    """A new model of a family with weights large enough that patterns are far from uniform."""
    torch.manual_seed(seed)
    hf: Any = BUILDERS[family]().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() >= 2:
                # T5 does not scale its scores down: smaller weights give it patterns like others.
                weight.normal_(std=0.1 if family == "t5" else 0.2)
            elif "norm" not in name and "ln_" not in name:
                weight.normal_(std=0.5)
    if attn and attn != hf.config._attn_implementation:
        hf.set_attn_implementation(attn)
    return hf


@functools.cache
def handle(family: str, attn: str = "") -> Model:
    """One shared model of a family; tests that change a model take a `fresh` one."""
    return Model(fresh(family, attn), name=family)


@functools.cache
def _eager(family: str) -> Any:
    return fresh(family, "" if family == "bloom" else "eager")


@dataclass(frozen=True)
class Whole:
    """Whole matrices of one forward.

    Attributes:
        patterns: tower to, for each layer, [batch, head, query, key].
        v: tower to, for each layer, [batch, kv_head, key, d_v].
        z: tower to, for each layer, [batch, query, head, d_v].
    """

    patterns: dict[str, list[np.ndarray]]
    v: dict[str, list[np.ndarray]]
    z: dict[str, list[np.ndarray]]


@torch.no_grad()
def whole(family: str, inputs: Mapping[str, Tensor], hf: Any = None) -> Whole:
    """Run an eager copy and keep everything."""
    hf = _eager(family) if hf is None else hf
    if family == "gpt2" and "attention_mask" in inputs:  # its own forward counts padding
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        inputs = {**inputs, "position_ids": places}
    notes: list[tuple[bool, Tensor, Tensor]] = []
    with _noting(hf, notes):
        out = (
            hf(**inputs, output_attentions=True, use_cache=False)
            if _caches(hf)
            else hf(**inputs, output_attentions=True)
        )
    if family == "t5":
        shown = {
            "encoder": out.encoder_attentions,
            "text": out.decoder_attentions,
            "cross": out.cross_attentions,
        }
        n = len(out.encoder_attentions)
        split = {"encoder": notes[:n], "text": notes[n::2], "cross": notes[n + 1 :: 2]}
    else:
        tower = "vision" if family == "vit" else "text"
        shown, split = {tower: out.attentions}, {tower: notes[-len(out.attentions) :]}
    return Whole(
        {t: [a.double().numpy() for a in x] for t, x in shown.items()},
        {t: [v.double().numpy() for v, _ in x] for t, x in split.items()},
        {t: [z.double().numpy() for _, z in x] for t, x in split.items()},
    )


def _caches(hf: Any) -> bool:
    return hasattr(hf.config, "use_cache")


@contextmanager
def _noting(hf: nn.Module, notes: list[Any]) -> Iterator[None]:
    """Note v and z at `eager_attention_forward` of every file that defines a part of the model."""
    files = {type(m).__module__ for m in hf.modules()}
    undo = []
    for file in files:
        scope = vars(sys.modules[file])
        own = scope.get("eager_attention_forward")
        if own is None:
            continue

        def noted(
            module: Any, q: Any, k: Any, v: Any, *args: Any, own: Any = own, **kw: Any
        ) -> Any:
            out = own(module, q, k, v, *args, **kw)
            notes.append((v, out[0].reshape(*out[0].shape[:2], q.shape[1], -1)))
            return out

        scope["eager_attention_forward"] = noted
        undo.append((scope, own))
    hooks = []
    for module in hf.modules():
        if type(module).__name__ == "BloomAttention":
            n_heads = module.num_heads
            hooks.append(
                module.dense.register_forward_pre_hook(
                    lambda _, args, n=n_heads: notes.append(
                        (args[0].new_zeros(0), args[0].unflatten(-1, (n, -1)))
                    )
                )
            )
    try:
        yield
    finally:
        for scope, own in undo:
            scope["eager_attention_forward"] = own
        for hook in hooks:
            hook.remove()


def opaque(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The eager function of the model's own file, keeping its weights to itself."""
    for cls in type(module).__mro__:
        scope = getattr(vars(cls).get("forward"), "__globals__", {})
        if "eager_attention_forward" in scope:
            return scope["eager_attention_forward"](module, q, k, v, mask, **kwargs)[0], None
    raise AssertionError(type(module))


def fused(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    """As flash attention on a GPU: masks of padding or none, windows and causality by argument."""
    n, m = q.shape[2], k.shape[2]
    i = torch.arange(m - n, m)[:, None]
    j = torch.arange(m)[None]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    seen = j <= i if causal else torch.ones(n, m, dtype=torch.bool)
    if kwargs.get("sliding_window") is not None:
        seen = seen & (i - j < kwargs["sliding_window"])
    seen = seen[None, None]
    if mask is not None:
        seen = seen & mask.bool()[:, None, None, -m:]
    scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("bhqd,bhkd->bhqk", q * scale, k.repeat_interleave(group, 1))
    p = torch.softmax(s.masked_fill(~seen, -1e30), -1) * seen
    return torch.einsum("bhqk,bhkd->bqhd", p, v.repeat_interleave(group, 1)), None


@contextmanager
def registered(name: str, function: Any, mask: str) -> Iterator[None]:
    """An attention function known to transformers for a while, with the masks of another."""
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask])
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)


# Prompts ------------------------------------------------------------------------------------


def prompt(length: int, seed: int) -> Prompt:
    """Few different tokens, so that many repeat, and spans of several kinds."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 10, (length,), generator=gen).tolist()
    spans = {
        "bos": ((0, 1),),
        "needle": ((3, 5),),
        "wide": ((1, 3), (5, 9)),
        "late": ((length - 4, length - 1), (length // 2, length // 2 + 1)),
    }
    return Prompt(tuple(tokens), spans, id=f"p{seed}")


def batch_of(lengths: Sequence[int], side: str = "right", *, decoder: Sequence[int] = ()) -> Batch:
    """A batch of such prompts; with `decoder`, one for an encoder-decoder."""
    made = Batch.of([prompt(n, 10 + i) for i, n in enumerate(lengths)], side=side)
    if not decoder:
        return made
    inner = Batch.of([prompt(n, 50 + i) for i, n in enumerate(decoder)], side=side)
    return Batch(made.prompts, made.input_ids, made.attention_mask, made.offsets, decoder=inner)


# Readings by loops --------------------------------------------------------------------------


def related(relation: rd.Relation, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs (query, key) by the definition, over all pairs of positions."""
    pairs = []
    for i in range(len(tokens)):
        for j in range(len(tokens)):
            if isinstance(relation, rd.Offset):
                if i - j == relation.back:
                    pairs.append((i, j))
            elif isinstance(relation, rd.Same):
                copy_at = j - relation.shift
                if 0 <= copy_at < i and j < i and tokens[copy_at] == tokens[i]:
                    pairs.append((i, j))
    return pairs


def naive(
    reading: rd.Reading,
    full: Whole,
    tower: str,
    queries: Batch,
    keys: Batch,
    *,
    causal: bool,
) -> np.ndarray:
    """A reading over every example, layer and head: [batch, layer, head, …]."""
    layers = full.patterns[tower]
    out = []
    for b in range(len(queries)):
        per_layer = []
        for at, pattern in enumerate(layers):
            v, z = full.v[tower][at], full.z[tower][at]
            per_head = [
                _one(reading, pattern[b, h], v, z[b, :, h], b, h, pattern.shape[1], queries, keys,
                     causal)
                for h in range(pattern.shape[1])
            ]  # fmt: skip
            per_layer.append(per_head)
        out.append(per_layer)
    widest = max(np.shape(x)[2:] for x in out)
    result = np.full((len(out), *np.shape(out[0])[:2], *widest), np.nan)
    for b, x in enumerate(out):
        inner = tuple(slice(0, n) for n in np.shape(x)[2:])
        result[(b, slice(None), slice(None), *inner)] = x
    return result


def _one(
    reading: rd.Reading,
    p: np.ndarray,
    v: np.ndarray,
    z: np.ndarray,
    b: int,
    h: int,
    n_heads: int,
    queries: Batch,
    keys: Batch,
    causal: bool,
) -> Any:
    """A reading of one head on one example; p [query, key], z [query, d_v]."""

    def at(batch: Batch, span: str) -> list[int]:
        offset = batch.offsets[b]
        ranges = batch.prompts[b].spans.get(span, ((0, len(batch.prompts[b].tokens)),))
        return sorted({offset + i for start, stop in ranges for i in range(start, stop)})

    match reading:
        case rd.PairMass():
            offset, example = queries.offsets[b], queries.prompts[b]
            wanted = [i - offset for i in at(queries, reading.query)]
            by_query: dict[int, list[float]] = {}
            for i, j in related(reading.relation, example.reference or example.tokens):
                if i in wanted:
                    by_query.setdefault(i, []).append(p[i + offset, j + offset])
            if not by_query:
                return np.nan
            if reading.per == "entry":
                return np.mean([x for xs in by_query.values() for x in xs])
            return np.mean([sum(xs) for xs in by_query.values()])
        case rd.SpanMass():
            return np.mean(
                [sum(p[i, j] for j in at(keys, reading.key)) for i in at(queries, reading.query)]
            )
        case rd.Distance():
            return np.mean(
                [
                    sum(p[i, j] * (i - j) for j in range(p.shape[1]))
                    for i in at(queries, reading.query)
                ]
            )
        case rd.Entropy():
            return np.mean(
                [-sum(x * np.log(x) for x in p[i] if x > 0) for i in at(queries, reading.query)]
            )
        case rd.KeyMass():
            rows = at(queries, reading.query)
            real = at(keys, "all")
            values = []
            for j in range(p.shape[1]):
                able = [i for i in rows if i >= j or not causal] if j in real else []
                values.append(np.mean([p[i, j] for i in able]) if able else np.nan)
            return values
        case rd.TopKey():
            return [float(np.argmax(p[i])) for i in at(queries, reading.query)]
        case rd.Rows():
            return [p[i] for i in at(queries, reading.query)]
        case rd.ZNorm():
            return np.mean([np.linalg.norm(z[i]) for i in at(queries, reading.query)])
        case rd.ZValue():
            return [z[i] for i in at(queries, reading.query)]
        case rd.ValueNorm():
            group = h // (n_heads // v.shape[1])
            return np.mean([np.linalg.norm(v[b, group, j]) for j in at(keys, reading.key)])
    raise AssertionError(reading)


def clone(hf: Any) -> Any:
    """A copy that may be broken at will."""
    return copy.deepcopy(hf)
