"""What the names of configuration entries cannot tell: data for `benchmarks.tiny_models`.

Keys are dotted entry names; a leading `=` is passed to the default configuration already, a
leading `-` drops an entry.
"""

from typing import Any

_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
_MROPE_GLM = {
    "rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}  # fmt: skip
_QWEN_TEXT = {"rope_parameters": _MROPE}
_QWEN_VL = {"text_config.rope_parameters": _MROPE}
_GLM_TEXT = {"rope_parameters": _MROPE | {"mrope_section": [2, 3, 3]}}
_GLM_VL = {"text_config.rope_parameters": _MROPE | {"mrope_section": [2, 3, 3]}}
_SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32,
         "patch_size": 2}  # fmt: skip
_TIME = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}

_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 10000.0}
    for kind in ("sliding_attention", "full_attention")
}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
            "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 16,
            "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config.width_coefficient": 0.1,
        "vision_config.depth_coefficient": 0.1,
        "vision_config.hidden_dim": 64,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}, "image_token_index": 250},
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 250},
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "text_config.rope_parameters": _ROPES,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": _ROPES,
    },
    "cvt": {"embed_dim": [16, 32, 64], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm5_next": {"text_config.index_topk": 16},
    "glm5_next_text": {"index_topk": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_vl_text": {"rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}},
    "hunyuan_vl": {"text_config.rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}},
    "llama4": {
        "vision_config.intermediate_size": 256,
        "vision_config.vision_output_dim": 64,
        "vision_config.projector_input_dim": 64,
        "vision_config.projector_output_dim": 64,
    },
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "mllama": {
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 192,
    },
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "qwen4_exp": {f"text_config.{k}": v for k, v in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "rf_detr": {"backbone_config.out_indices": [1, 2], "backbone_config.out_features": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_query_groups": 4,
        "kv_channels": 16,
        "hybrid_layer_ids": [1, 3],
        "num_key_value_heads": 4,
    },
    "autoformer": _TIME,
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bros": {
        "dim_bbox_sinusoid_emb_1d": 24,
        "dim_bbox_sinusoid_emb_2d": 192,
        "dim_bbox_projection": 16,
    },
    "chameleon": {"vocabulary_map": {"<image>": 250, "IMGIMGAZ": 249}},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4},
    "donut-swin": _SWIN,
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    },
    "emu3": {"vocabulary_map": {"<image>": 250}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _MROPE},
    "esm": {"vocab_size": 256, "pad_token_id": 1, "mask_token_id": 3},
    "florence2": {
        "vision_config.embed_dim": [16, 32],
        "vision_config.depths": [1, 1],
        "vision_config.num_heads": [2, 4],
        "vision_config.num_groups": [2, 4],
    },
    "glm46v": _GLM_VL,
    "glm4v": _GLM_VL,
    "glm4v_moe": {"text_config.rope_parameters": _MROPE_GLM},
    "glm4v_moe_text": {"rope_parameters": _MROPE_GLM},
    "glm4v_text": _GLM_TEXT,
    "glm_image": _GLM_VL,
    "glm_image_text": _GLM_TEXT,
    "glm_ocr": _GLM_VL,
    "glm_ocr_text": _GLM_TEXT,
    "glmga": _GLM_VL,
    "informer": _TIME,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 32, "visual_embed": True},
    "led": {
        "max_encoder_position_embeddings": 256,
        "max_decoder_position_embeddings": 256,
        "attention_window": [8, 8],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 4, "max_2d_position_embeddings": 1024},
    "longformer": {"attention_window": [8, 8]},
    "mask2former": {"backbone_config": {"model_type": "swin", **_SWIN, "out_indices": [1, 2]}},
    "maskformer-swin": _SWIN,
    "mixtral": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mobilebert": {
        "hidden_size": 64,
        "true_hidden_size": 64,
        "intra_bottleneck_size": 64,
        "embedding_size": 64,
    },
    "paddleocr_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_TEXT,
    "qwen2_vl": _QWEN_VL,
    "qwen2_vl_text": _QWEN_TEXT,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 6]},
    "swin": _SWIN,
    "swin2sr": _SWIN,
    "swinv2": _SWIN,
    "time_series_transformer": _TIME,
    "video_llama_3": {"image_token_id": 250, "video_token_id": 251},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xlnet": {"d_model": 64, "n_head": 4, "d_head": 16},
}

# Why a type whose model and input could be made is not read, or not wholly.
REASONS: dict[str, str] = {
    "deepseek_v4": "the output projection is grouped: no linear layer takes the heads' z",
    "diffllama": "one head's output is the difference of two attention calls; there is no z of one",
    "fsmt": "hidden states are [pos, batch, d_model]; heads' z has its positions before the batch",
    "hiera": "attends within mask units along a fifth axis: no [batch, head, query, key] pattern",
    "ibert": "quantised layers pass (value, scale) pairs",
    "jetmoe": "the output projection is a mixture of experts",
    "lilt": "text and layout attend in one module, each with the sum of both scores",
    "longformer": "a banded pattern in diagonals: no row of keys per query",
    "led": "the encoder's pattern is banded, in diagonals",
    "mlcd": "z has its positions before the batch",
    "mlcd_vision_model": "z has its positions before the batch",
    "mra": "a low-rank approximation of attention without a pattern",
    "reformer": "hashed and chunked attention without a pattern over keys",
    "rwkv": "a recurrence, not softmax attention",
    "sew-d": "softmax runs inside a custom autograd function, where z cannot be traced",
    "squeezebert": "projections are convolutions",
    "wavlm": "one fused torch function makes attention and output projection",
    "yoso": "a sampled approximation of attention without a pattern",
}
