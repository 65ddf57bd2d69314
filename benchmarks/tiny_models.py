"""A tiny random model of any transformers model type, built offline from its default configuration.

`tiny_model("llama")` takes the default configuration, makes every size in it small by the *name*
of the entry (`RULES`), sub-configurations included, and builds the class that the auto classes
name for it. What the names cannot tell (sizes that must divide each other) stands in
`benchmarks.tiny_overrides`. Nothing here is used by the library: these are its test animals.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.tiny_overrides import OVERRIDES

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 64, 4, 2, 16, 96, 256
MAX_PARAMETERS = 40_000_000

Value = Any
Rule = tuple[str, Callable[[Value], Value]]


def _to(size: int) -> Callable[[Value], Value]:
    """At most `size`; flags such as 0, -1 and None keep their meaning."""
    return lambda old: min(old, size) if isinstance(old, int) and old > 0 else old


def _each(size: int) -> Callable[[Value], Value]:
    def shrink(old: Value) -> Value:
        if isinstance(old, list | tuple):
            return [shrink(x) for x in old]
        return _to(size)(old)

    return shrink


def _keep(old: Value) -> Value:
    return old


# The first pattern that matches the whole name of an entry decides. Names, never model types.
RULES: tuple[Rule, ...] = (
    (r"type_vocab_size|num_channels|in_channels|num_labels|.*_type_ids?", _keep),
    (r"(.*_)?vocab_?size(_.*)?|n_?vocab|codebook_size|num_embeddings|vocab_offset", _to(VOCAB)),
    (r"num_feat_extract_layers|num_residual_layers|num_conv_layers", _keep),
    (r"num_nextn_predict_layers|num_mtp_layers|mtp_num_.*layers", lambda old: 0),
    (r"num_kv_shared_layers", lambda old: 0),
    (r"mamba_(n|num)_heads", _to(8)),
    (r"(.*_)?d_head|mamba_headdim", _to(HEAD_DIM)),
    (r"image_grid_pinpoints", lambda old: [[32, 32], [32, 64], [64, 32]]),
    (r"max_window_layers|first_k_dense_replace|moe_layer_start_index", _to(1)),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|n_)?(layers?|blocks|depth)(_num)?", _each(2)),
    (r"(.*_)?n_layers?|(.*_)?num_.*_layers|(.*_)?layers_num|depth", _each(2)),
    (r"depths|stage_numb_of_layers|stage_num_blocks", _each(2)),
    (r".*(num|n)_(experts?|moe|topk)?_?(per_tok|activated).*|(moe_)?top_?k|moe_k", _to(2)),
    (r".*shared_experts?", _to(1)),
    (r"(.*_)?(num|n)_.*experts?|num_experts_.*", _to(4)),
    (r"n_group|topk_group|num_expert_group", _to(1)),
    (r"index_topk", _to(8)),
    (
        r"(.*_)?(num_|n_)(key_value|kv)_?heads?|.*num_kv_heads|kv_heads|num_heads_kv|n_head_kv",
        _each(KV_HEADS),
    ),
    (r"(.*_)?(num_|n_)?(.*_)?heads?", _each(HEADS)),
    (r"qk_rope_head_dim|qk_nope_head_dim", _to(8)),
    (r"v_head_dim", _to(12)),
    (
        r"(.*_)?head_dim(_.*)?|(.*_)?head_size|d_kv|dim_head|d_head|dim_feedforward_head|.*_d_head",
        _to(HEAD_DIM),
    ),
    (r"query_pre_attn_scalar", _to(HEAD_DIM)),
    (r"rotary_dim", _to(8)),
    (r"mrope_section", lambda old: [2, 3, 3] if len(old) == 3 else [2] * len(old)),
    (r"(short|long)_factor", lambda old: [1.0] * (HEAD_DIM // 2)),
    (r".*lora_(rank|dim)|.*_low_rank.*|.*_rank", _to(16)),
    (
        r".*(intermediate|ffn|inner|feed_?forward|mlp)_?(size|dim|hidden_size|hidden_dim)?(_.*)?"
        r"|d_ff|d_inner|n_inner|.*_d_ff|dim_feedforward",
        lambda old: _to(FFN)(old) if isinstance(old, int) and old > 16 else old,
    ),
    (
        r".*(sliding|local|chunk).*(window|size|attention)?.*",
        lambda old: _to(8)(old) if isinstance(old, int) and old > 8 else old,
    ),
    (r"original_max_position_embeddings", _to(64)),
    (
        r"(max_(text_)?(sequence_length|seq_len(gth)?)|.*max_.*position.*|n_positions|n_ctx"
        r"|context_length|max_seq_len|.*max_.*len(gth)?|.*positions)",
        _to(256),
    ),
    (r"(.*_)?(image|img|crop|tile)_size|input_image_size|.*_image_size|.*resolution", _each(32)),
    (r"spatial_patch_size|patch_size|.*_patch_size|.*patch_height|.*patch_width", _each(8)),
    (r"temporal_patch_size|spatial_merge_size|merge_size", _keep),
    (
        r"(image_seq_len(gth)?|num_image_tokens|num_patches|mm_tokens_per_image|num_query_tokens)",
        _to(4),
    ),
    (r"num_position_embeddings", _to(16)),
    (r"num_frames|frames_per_clip", _to(4)),
    (r"num_queries|num_denoising|.*n_latents|num_latents", _to(8)),
    (r"window_size", lambda old: _each(4)(old) if not isinstance(old, int) or old < 32 else 16),
    (r"fullatt_block_indexes|deepstack_visual_indexes|global_attn_indexes", lambda old: [1]),
    (
        r".*(hidden|embed|embedding|model|emb|residual|projection|proj|out|output|fusion|text|vision"
        r"|encoder|decoder|audio|image|pooler|latent|channel|conv|units|neck|units)s?_?"
        r"(size|dims?|embd|channels?|width|dimension|units|embed)?(_global|_size)?"
        r"|n_embd|d_model|dim|hidden|width|d_rel|channels|linear_units|.*_dim|.*_units|.*_channels"
        r"|attention_hidden_size|.*hidden_size.*|.*_hid|upsample_.*channel",
        lambda old: WIDTH if isinstance(old, int) and old > 48 else old,
    ),
    (r"mamba_d_state|ssm_state_size|state_size|.*_d_state", _to(8)),
    (r"hidden_sizes|embed_dims|conv_dim|encoder_hidden_sizes|neck_hidden_sizes|dims", _each(WIDTH)),
    (r"tdnn_dim", _each(16)),
)
_DROPPED = {
    "transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype",
    "torch_dtype", "_attn_implementation_autoset", "stage_names", "problem_type",
}  # fmt: skip
_PER_LAYER = re.compile(r"layer_types|.*_layer_types|layers_block_type|layer_type_list|block_types")
_N_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")


def shrink(default: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's entries with every size made small, by the names of the entries."""
    small: dict[str, Any] = {}
    for name, old in default.items():
        if name in _DROPPED:
            continue
        if isinstance(old, Mapping):
            small[name] = shrink(old)
        elif isinstance(old, bool) or old is None or isinstance(old, str | float):
            small[name] = old
        else:
            rule = next((change for p, change in RULES if re.fullmatch(p, str(name))), _keep)
            small[name] = rule(old)
    _set_layers(default, small)
    _set_heads(default, small)
    for name in ("out_features", "out_indices"):
        if isinstance(default.get(name), list | tuple) and len(default[name]) == 1:
            small.pop(name)  # the last stage, which now has another number
    return small


def _set_layers(default: Mapping[str, Any], small: dict[str, Any]) -> None:
    """As many layers as show every kind of layer once, and lists per layer cut to that."""
    count = next((n for n in _N_LAYERS if isinstance(default.get(n), int)), None)
    if count is None:
        return
    lists = {
        name: list(value)
        for name, value in default.items()
        if isinstance(value, list | tuple)
        and (_PER_LAYER.fullmatch(name) or (len(value) == default[count] > 4))
    }
    kinds = {name: list(dict.fromkeys(map(_frozen, value))) for name, value in lists.items()}
    n = max([2, *(len(k) for name, k in kinds.items() if _PER_LAYER.fullmatch(name))])
    small[count] = min(n, max(default[count], 1))
    for name, value in lists.items():
        few = [next(x for x in value if _frozen(x) == kind) for kind in kinds[name]]
        small[name] = [few[i % len(few)] for i in range(small[count])]
    if isinstance(apart := default.get("per_layer_config"), Mapping):
        first = lists.get("layer_types", list(range(default[count])))
        places = [first.index(x) for x in small.get("layer_types", range(small[count]))]
        by_place = {int(k): v for k, v in apart.items()}
        small["per_layer_config"] = {
            str(i): shrink(by_place[p]) for i, p in enumerate(places) if p in by_place
        }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _set_heads(default: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Keep what a configuration says of its groups: as many as heads, fewer, or one."""
    if "head_dim" in default and default["head_dim"] is None:
        small["head_dim"] = HEAD_DIM
    if "num_key_value_heads" in default and default["num_key_value_heads"] is None:
        small["num_key_value_heads"] = KV_HEADS
    if "qk_rope_head_dim" in default and default.get("head_dim") == default["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    for name in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"):
        old, heads = default.get(name), default.get("num_attention_heads")
        if isinstance(old, int) and isinstance(heads, int):
            small[name] = HEADS if old >= heads else min(old, KV_HEADS)
            small["num_attention_heads"] = HEADS


def _set_special_ids(small: dict[str, Any]) -> None:
    """Special ids that lie outside the vocabulary move to its end, distinct ones apart."""
    moved: dict[int, int] = {}

    def move(old: Any) -> Any:
        if isinstance(old, list | tuple):
            return [move(x) for x in old]
        if isinstance(old, bool) or not isinstance(old, int) or old < VOCAB:
            return old
        return moved.setdefault(old, VOCAB - 1 - len(moved))

    def walk(entries: dict[str, Any]) -> None:
        for name, value in entries.items():
            if isinstance(value, dict):
                walk(value)
            elif re.search(r"token_(id|ids|index)$|_(start|end|bos|eos|pad)_id$", str(name)):
                entries[name] = move(value)

    walk(small)


def _merge(small: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Overrides by dotted names: `vision_config.depth`; the value `None` of `-name` drops it."""
    for dotted, value in extra.items():
        *path, last = dotted.split(".")
        target = small
        for piece in path:
            if not isinstance(target.get(piece), dict):
                target[piece] = {}
            target = target[piece]
        if last.startswith("-"):
            target.pop(last[1:], None)
        else:
            target[last] = value


def tiny_config(model_type: str) -> Any:
    """The small configuration of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    extra = OVERRIDES.get(model_type, {})
    start = {k[1:]: v for k, v in extra.items() if k.startswith("=")}
    small = shrink(cls(**start).to_dict())
    _set_special_ids(small)
    _merge(small, {k: v for k, v in extra.items() if not k.startswith("=")})
    return cls(**small)


def model_class(model_type: str) -> Any:
    """The class that stands for a model type: with its head, where it is a language model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for mapping in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        if model_type in mapping:
            name = mapping[model_type]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise KeyError(f"no auto class names a model for {model_type!r}")


def model_types() -> list[str]:
    """Every model type that an auto class can build."""
    from transformers.models.auto import modeling_auto as auto

    types = {
        *auto.MODEL_MAPPING_NAMES,
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    return sorted(types)


def tiny_model(model_type: str, *, attn: str | None = None) -> nn.Module:
    """A model of the type with seeded random weights, in evaluation mode.

    Args:
        model_type: as transformers names it.
        attn: attention implementation; the type's own choice if None. Weights do not depend on it.

    Raises:
        ValueError: the small configuration is not small; an override is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(model_type)
        cls = model_class(model_type)
        # On the meta device a size that no rule has met costs nothing.
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{cls.__name__} has {size / 1e6:.0f} million parameters, not tiny")
        torch.manual_seed(0)
        config = tiny_config(model_type)
        if attn is not None:
            # Some families ignore a change of mind after they are built.
            config._attn_implementation = attn
        model: nn.Module = cls(config)
    _spread(model)
    return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Larger matrices than a fresh model has: its patterns would be uniform to many digits."""
    gen = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not p.numel():
            continue
        if p.dim() >= 2 and p.is_floating_point():
            p.copy_(
                torch.randn(p.shape, generator=gen).to(p)
                * min(0.3, 1.5 * max(1, p[0].numel()) ** -0.5)
            )
        elif name.endswith("bias") and p.is_floating_point():
            p.copy_(torch.randn(p.shape, generator=gen).to(p) * 0.05)
        elif re.search(r"sinks?$", name):
            p.copy_(torch.randn(p.shape, generator=gen).to(p))
