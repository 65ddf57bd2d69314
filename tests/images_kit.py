"""Tiny random models that read images, each with its real processor, built from configurations."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from interp.loading import load
from interp.model import Model

WORDS = ("<unk>", "<s>", "</s>", "<pad>", "what", "is", "this", "the", "a", "cat", "dog", "?", ".")
MARKS = (
    "<image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<start_of_image>", "<end_of_image>",
    "<|image|>", "<|python_tag|>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>",
    "TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 13)), "<|begin_of_image|>", "<|end_of_image|>",
    "<image_soft_token>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)  # fmt: skip


def tokenizer(**extra: str) -> Any:
    """Words and marks; `extra` names the marks that a processor asks for."""
    vocabulary = {w: i for i, w in enumerate([*WORDS, *MARKS, "\n"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS])
    inner.add_tokens([AddedToken("\n", normalized=False)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=extra,
    )  # fmt: skip


def mark(name: str) -> int:
    return (*WORDS, *MARKS).index(name)


@dataclass(frozen=True)
class Case:
    """A model, the module that reads text and images together, and the first layer of the tower."""

    model: Model
    decoder: str
    tower: str
    mark: str = ""


TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 1400, "max_position_embeddings": 4096, "head_dim": 8,
}  # fmt: skip
EYE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def without_mixing(hf: torch.nn.Module) -> torch.nn.Module:
    """Attention of the tower adds nothing, so that a patch is read at its own place alone."""
    with torch.no_grad():
        for name, value in hf.named_parameters():
            if any(x in name for x in ("out_proj", "attn.proj", "projection_layer", "o_proj")) and (
                "vision" in name or "visual" in name
            ):
                value.zero_()
            if "mm_input_projection" in name:  # zeros unless trained
                value.normal_()
    return hf.eval()


def _clip(size: int, patch: int, **more: Any) -> Any:
    return tf.CLIPVisionConfig(**EYE, image_size=size, patch_size=patch, projection_dim=16, **more)


def _clip_images(size: int) -> Any:
    return tf.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def llava() -> Case:
    config = tf.LlavaConfig(
        vision_config=_clip(40, 5), text_config=tf.LlamaConfig(**TEXT),
        image_token_id=mark("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    words = tokenizer(image_token="<image>")
    processor = tf.LlavaProcessor(
        _clip_images(40), words, patch_size=5, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _case(tf.LlavaForConditionalGeneration, config, words, processor, "<image>")


def llava_full() -> Case:
    """With the class token as an image token, padded to a square."""
    config = tf.LlavaConfig(
        vision_config=_clip(40, 5), text_config=tf.LlamaConfig(**TEXT),
        image_token_id=mark("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    words = tokenizer(image_token="<image>")
    images = tf.LlavaImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}, do_pad=True
    )
    processor = tf.LlavaProcessor(
        images, words, patch_size=5, vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _case(tf.LlavaForConditionalGeneration, config, words, processor, "<image>")


SIDES = ("height", "width")


@dataclass
class PixtralProcessor:
    """Does as the one of transformers, which needs torchvision."""

    image_processor: Any
    tokenizer: Any
    square: int
    image_token: str = "[IMG]"

    def __call__(self, *, text: Any, images: Any, return_tensors: str, **options: Any) -> Any:
        images = images if isinstance(images, list) else [images]
        made = self.image_processor(
            images, return_tensors=return_tensors, patch_size=dict.fromkeys(SIDES, self.square)
        )
        whole = text if isinstance(text, str) else text[0]
        replaced = []
        for height, width in made["image_sizes"].tolist():
            row = "[IMG]" * (width // self.square) + "[IMG_BREAK]"
            new = (row * (height // self.square)).removesuffix("[IMG_BREAK]") + "[IMG_END]"
            start = whole.index("[IMG]", replaced[-1]["new_span"][1] if replaced else 0)
            replaced.append({"new_span": (start, start + len(new))})
            whole = whole[:start] + new + whole[start + 5 :]
        offsets = options.pop("return_offsets_mapping", False)
        words = self.tokenizer(
            [whole], return_tensors=return_tensors, return_offsets_mapping=offsets
        )
        return {**words, **made, "text_replacement_offsets": [replaced]}


def _pixtral(cls: Any, config: Any, merge: int) -> Case:
    words = tokenizer(image_token="[IMG]")
    images = tf.PixtralImageProcessorPil(
        size={"longest_edge": 48}, patch_size={"height": 4, "width": 4}
    )
    processor = PixtralProcessor(images, words, 4 * merge)
    return _case(cls, config, words, processor, "[IMG]")


def llava_pixtral() -> Case:
    tower = tf.PixtralVisionConfig(**EYE, head_dim=8, image_size=48, patch_size=4)
    config = tf.LlavaConfig(
        vision_config=tower, text_config=tf.LlamaConfig(**TEXT), image_token_id=mark("[IMG]"),
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return _pixtral(tf.LlavaForConditionalGeneration, config, 1)


def mistral3() -> Case:
    tower = tf.PixtralVisionConfig(**EYE, head_dim=8, image_size=48, patch_size=4)
    config = tf.Mistral3Config(
        vision_config=tower, text_config=tf.MistralConfig(**TEXT), image_token_id=mark("[IMG]"),
        vision_feature_layer=-1, spatial_merge_size=2,
    )  # fmt: skip
    return _pixtral(tf.Mistral3ForConditionalGeneration, config, 2)


def vipllava() -> Case:
    config = tf.VipLlavaConfig(
        vision_config=_clip(40, 5), text_config=tf.LlamaConfig(**TEXT),
        image_token_id=mark("<image>"), vision_feature_layers=[-1, -2],
    )  # fmt: skip
    words = tokenizer(image_token="<image>")
    processor = tf.LlavaProcessor(
        _clip_images(40), words, patch_size=5, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _case(tf.VipLlavaForConditionalGeneration, config, words, processor, "<image>")


def siglip() -> Case:
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    config = tf.SiglipConfig(
        text_config=text, vision_config={**EYE, "image_size": 28, "patch_size": 4}
    )
    images = tf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    words = tokenizer()
    processor = tf.SiglipProcessor(images, words)
    return _case(tf.SiglipModel, config, words, processor, "", decoder="")


PINPOINTS = [[48, 48], [72, 24], [24, 48], [48, 24], [24, 72]]


def llava_next() -> Case:
    config = tf.LlavaNextConfig(
        vision_config=_clip(24, 4), text_config=tf.LlamaConfig(**TEXT),
        image_token_id=mark("<image>"), vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    words = tokenizer(image_token="<image>")
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    processor = tf.LlavaNextProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return _case(tf.LlavaNextForConditionalGeneration, config, words, processor, "<image>")


def llava_onevision() -> Case:
    tower = tf.SiglipVisionConfig(**EYE, image_size=24, patch_size=4)
    points = [[a, b] for a in (24, 48, 72) for b in (24, 48, 72)]
    config = tf.LlavaOnevisionConfig(
        vision_config=tower, text_config=tf.Qwen2Config(**TEXT), image_token_id=mark("<image>"),
        video_token_id=mark("<video>"), vision_feature_layer=-1, image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    words = tokenizer(image_token="<image>", video_token="<video>")
    images = tf.LlavaOnevisionImageProcessorPil(
        size={"height": 24, "width": 24}, image_grid_pinpoints=points
    )
    processor = object.__new__(tf.LlavaOnevisionProcessor)
    # Its video part needs torchvision; images do not.
    processor.__dict__ |= {
        "image_processor": images, "tokenizer": words, "video_processor": None,
        "chat_template": None, "num_image_tokens": 36, "vision_feature_select_strategy": "full",
        "image_token": "<image>", "video_token": "<video>", "image_token_id": mark("<image>"),
        "video_token_id": mark("<video>"), "vision_aspect_ratio": "anyres_max_4",
    }  # fmt: skip
    return _case(tf.LlavaOnevisionForConditionalGeneration, config, words, processor, "<image>")


def _qwen(
    name: str, tower: dict[str, Any], text: dict[str, Any], processor_type: Any = None
) -> Case:
    config_type, model_type = (
        getattr(tf, f"{name}{x}") for x in ("Config", "ForConditionalGeneration")
    )
    processor_type = processor_type or getattr(tf, f"{name}Processor")
    config = config_type(
        vision_config=tower, text_config={**TEXT, **text}, image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"), vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )  # fmt: skip
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    images = tf.Qwen2VLImageProcessorPil(
        patch_size=tower["patch_size"], merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
    )  # fmt: skip
    processor = object.__new__(processor_type)
    # Its video part needs torchvision; images do not.
    processor.__dict__ |= {
        "image_processor": images, "tokenizer": words, "video_processor": None,
        "chat_template": None, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "image_token_id": mark("<|image_pad|>"), "video_token_id": mark("<|video_pad|>"),
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config.text_config.rope_parameters = rope
    return _case(model_type, config, words, processor, "<|image_pad|>")


def qwen2_vl() -> Case:
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1}
    return _qwen("Qwen2VL", {**tower, "patch_size": 6, "in_channels": 3}, {})


def qwen2_5_vl() -> Case:
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "patch_size": 6, "window_size": 36, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen("Qwen2_5_VL", tower, {})


def qwen3_vl() -> Case:
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "patch_size": 6, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen("Qwen3VL", tower, {})


def qwen3_5() -> Case:
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "patch_size": 6, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    return _qwen("Qwen3_5", tower, _LINEAR, tf.Qwen3VLProcessor)


def qwen3_5_moe() -> Case:
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "patch_size": 6, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    experts = {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    return _qwen("Qwen3_5Moe", tower, {**_LINEAR, **experts}, tf.Qwen3VLProcessor)


_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["full_attention"],
}  # fmt: skip


def exaone4_5() -> Case:
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "num_key_value_heads": 2, "out_hidden_size": 16, "patch_size": 6, "window_size": 36,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {"model_type": "exaone4", "layer_types": ["full_attention"], "sliding_window": None}
    return _qwen("Exaone4_5_", tower, text)


def _glm(name: str, text: dict[str, Any]) -> Case:
    config_type, model_type = (
        getattr(tf, f"{name}{x}") for x in ("Config", "ForConditionalGeneration")
    )
    tower = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "image_size": 24,
        "out_hidden_size": 16, "patch_size": 6, "spatial_merge_size": 2,
    }  # fmt: skip
    rope = {
        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }  # fmt: skip
    config = config_type(
        vision_config=tower, text_config={**TEXT, **text, "rope_parameters": rope},
        image_token_id=mark("<|image|>"), video_token_id=mark("<|video_pad|>"),
        image_start_token_id=mark("<|begin_of_image|>"),
        image_end_token_id=mark("<|end_of_image|>"),
        video_start_token_id=mark("<|vision_start|>"), video_end_token_id=mark("<|vision_end|>"),
    )  # fmt: skip
    words = tokenizer(image_token="<|image|>", video_token="<|video_pad|>")
    images = tf.Glm4vImageProcessorPil(
        patch_size=6, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 2 * 96 * 96}
    )
    processor = object.__new__(tf.Glm4vProcessor)
    # Its video part needs torchvision; images do not.
    processor.__dict__ |= {
        "image_processor": images, "tokenizer": words, "video_processor": None,
        "chat_template": None, "image_token": "<|image|>", "video_token": "<|video_pad|>",
        "image_token_id": mark("<|image|>"), "video_token_id": mark("<|video_pad|>"),
        "video_start_id": mark("<|vision_start|>"), "video_end_id": mark("<|vision_end|>"),
    }  # fmt: skip
    return _case(model_type, config, words, processor, "<|image|>")


def glm4v() -> Case:
    return _glm("Glm4v", {"pad_token_id": 3})


def glm4v_moe() -> Case:
    experts = {
        "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    return _glm("Glm4vMoe", {"pad_token_id": 3, **experts})


def glm46v() -> Case:
    return _glm("Glm46V", {"pad_token_id": 3})


def glm_ocr() -> Case:
    return _glm("GlmOcr", {"pad_token_id": 3})


def paligemma() -> Case:
    tower = tf.SiglipVisionConfig(**EYE, image_size=28, patch_size=4, projection_dim=16)
    config = tf.PaliGemmaConfig(
        vision_config=tower, text_config=tf.GemmaConfig(**TEXT), image_token_id=mark("<image>"),
        projection_dim=16,
    )  # fmt: skip
    words = tokenizer(image_token="<image>")
    images = tf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 49
    processor = tf.PaliGemmaProcessor(images, words)
    return _case(tf.PaliGemmaForConditionalGeneration, config, words, processor, "<image>")


def gemma3() -> Case:
    tower = tf.SiglipVisionConfig(**EYE, image_size=32, patch_size=4)
    config = tf.Gemma3Config(
        vision_config=tower, text_config=tf.Gemma3TextConfig(**TEXT), mm_tokens_per_image=16,
        image_token_index=mark("<image_soft_token>"), boi_token_index=mark("<start_of_image>"),
        eoi_token_index=mark("<end_of_image>"),
    )  # fmt: skip
    words = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    images = tf.Gemma3ImageProcessorPil(
        size={"height": 32, "width": 32}, do_pan_and_scan=True, pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=3, pan_and_scan_min_ratio_to_activate=1.3,
    )  # fmt: skip
    processor = tf.Gemma3Processor(images, words, image_seq_length=16)
    return _case(tf.Gemma3ForConditionalGeneration, config, words, processor, "<start_of_image>")


def internvl() -> Case:
    tower = tf.InternVLVisionConfig(**EYE, image_size=[24, 24], patch_size=[4, 4])
    config = tf.InternVLConfig(
        vision_config=tower, text_config=tf.Qwen2Config(**TEXT), vision_feature_layer=-1,
        image_token_id=mark("<IMG_CONTEXT>"), image_seq_length=9,
    )  # fmt: skip
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    images = tf.GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, max_patches=6)
    processor = _internvl_processor(images, words)
    return _case(tf.InternVLForConditionalGeneration, config, words, processor, "<IMG_CONTEXT>")


def _internvl_processor(images: Any, words: Any) -> Any:
    import re

    processor = object.__new__(tf.InternVLProcessor)
    # Its video part needs torchvision; images do not.
    processor.__dict__ |= {
        "image_processor": images, "tokenizer": words, "video_processor": None,
        "chat_template": None, "image_seq_length": 9, "start_image_token": "<img>",
        "end_image_token": "</img>", "start_image_token_id": mark("<img>"),
        "end_image_token_id": mark("</img>"), "image_token": "<IMG_CONTEXT>",
        "video_token": "<video>", "image_token_id": mark("<IMG_CONTEXT>"),
        "multimodal_pattern": re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)"),
    }  # fmt: skip
    return processor


def aya_vision() -> Case:
    tower = tf.SiglipVisionConfig(**EYE, image_size=24, patch_size=4)
    config = tf.AyaVisionConfig(
        vision_config=tower, text_config=tf.Cohere2Config(**TEXT), downsample_factor=2,
        image_token_id=mark("<|IMG_PATCH|>"), vision_feature_layer=-1,
    )  # fmt: skip
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": 24, "width": 24}, max_patches=6, crop_to_patches=True
    )
    processor = tf.AyaVisionProcessor(
        images, tokenizer(), patch_size=4, img_size=24, downsample_factor=2
    )
    cls = tf.AyaVisionForConditionalGeneration
    return _case(cls, config, processor.tokenizer, processor, "<image>")


def lighton_ocr() -> Case:
    tower = tf.PixtralVisionConfig(**EYE, head_dim=8, image_size=48, patch_size=4)
    config = tf.LightOnOcrConfig(
        vision_config=tower, text_config=tf.Qwen3Config(**TEXT), image_token_id=mark("[IMG]"),
        spatial_merge_size=2,
    )  # fmt: skip
    return _pixtral(tf.LightOnOcrForConditionalGeneration, config, 2)


def idefics3() -> Case:
    tower = {**EYE, "image_size": 24, "patch_size": 4}
    config = tf.Idefics3Config(
        vision_config=tower, text_config=tf.LlamaConfig(**TEXT), image_token_id=mark("<image>"),
        scale_factor=2,
    )  # fmt: skip
    words = tokenizer()
    images = tf.Idefics3ImageProcessorPil(
        size={"longest_edge": 72}, max_image_size={"longest_edge": 24}
    )
    processor = tf.Idefics3Processor(images, words, image_seq_len=9)
    cls = tf.Idefics3ForConditionalGeneration
    return _case(cls, config, words, processor, "<image>", decoder="model.text_model")


def smolvlm() -> Case:
    tower = {**EYE, "image_size": 24, "patch_size": 4}
    config = tf.SmolVLMConfig(
        vision_config=tower, text_config=tf.LlamaConfig(**TEXT), image_token_id=mark("<image>"),
        scale_factor=2,
    )  # fmt: skip
    words = tokenizer()
    images = tf.SmolVLMImageProcessorPil(
        size={"longest_edge": 68}, max_image_size={"longest_edge": 24}
    )
    processor = tf.Idefics3Processor(images, words, image_seq_len=9)
    cls = tf.SmolVLMForConditionalGeneration
    return _case(cls, config, words, processor, "<image>", decoder="model.text_model")


def clip() -> Case:
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 100, "eos_token_id": 2,
    }  # fmt: skip
    tower = {**EYE, "image_size": 40, "patch_size": 5}
    config = tf.CLIPConfig(text_config=text, vision_config=tower, projection_dim=16)
    words = tokenizer()
    processor = tf.CLIPProcessor(_clip_images(40), words)
    return _case(tf.CLIPModel, config, words, processor, "", decoder="")


def clip_vision() -> Case:
    return _case(tf.CLIPVisionModel, _clip(40, 5), None, _clip_images(40), "", decoder="")


def siglip_vision() -> Case:
    config = tf.SiglipVisionConfig(**EYE, image_size=28, patch_size=4)
    images = tf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.SiglipVisionModel, config, None, images, "", decoder="")


def vit() -> Case:
    config = tf.ViTConfig(**EYE, image_size=28, patch_size=4)
    images = tf.ViTImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.ViTForImageClassification, config, None, images, "", decoder="")


def deit() -> Case:
    config = tf.DeiTConfig(**EYE, image_size=28, patch_size=4)
    images = tf.DeiTImageProcessorPil(
        size={"height": 33, "width": 33}, crop_size={"height": 28, "width": 28}
    )
    return _case(tf.DeiTModel, config, None, images, "", decoder="")


def vit_msn() -> Case:
    config = tf.ViTMSNConfig(**EYE, image_size=28, patch_size=4)
    images = tf.ViTImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.ViTMSNModel, config, None, images, "", decoder="")


def ijepa() -> Case:
    config = tf.IJepaConfig(**EYE, image_size=28, patch_size=4)
    images = tf.ViTImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.IJepaModel, config, None, images, "", decoder="")


def beit() -> Case:
    config = tf.BeitConfig(**EYE, image_size=28, patch_size=4)
    images = tf.BeitImageProcessorPil(
        size={"height": 33, "width": 33}, do_center_crop=True, crop_size={"height": 28, "width": 28}
    )
    return _case(tf.BeitModel, config, None, images, "", decoder="")


def data2vec_vision() -> Case:
    config = tf.Data2VecVisionConfig(**EYE, image_size=28, patch_size=4)
    images = tf.BeitImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.Data2VecVisionModel, config, None, images, "", decoder="")


def metaclip_2() -> Case:
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 100, "eos_token_id": 2,
    }  # fmt: skip
    tower = {**EYE, "image_size": 40, "patch_size": 5}
    config = tf.MetaClip2Config(text_config=text, vision_config=tower, projection_dim=16)
    words = tokenizer()
    processor = tf.CLIPProcessor(_clip_images(40), words)
    return _case(tf.MetaClip2Model, config, words, processor, "", decoder="")


def metaclip_2_vision() -> Case:
    config = tf.MetaClip2VisionConfig(**EYE, image_size=40, patch_size=5, projection_dim=16)
    return _case(tf.MetaClip2VisionModel, config, None, _clip_images(40), "", decoder="")


def dinov2() -> Case:
    config = tf.Dinov2Config(**EYE, mlp_ratio=1, image_size=28, patch_size=4)
    images = tf.BitImageProcessorPil(
        size={"shortest_edge": 33}, crop_size={"height": 28, "width": 28}
    )
    return _case(tf.Dinov2Model, config, None, images, "", decoder="")


def dinov2_with_registers() -> Case:
    config = tf.Dinov2WithRegistersConfig(
        **EYE, mlp_ratio=1, image_size=28, patch_size=4, num_register_tokens=3
    )
    images = tf.BitImageProcessorPil(
        size={"shortest_edge": 33}, crop_size={"height": 28, "width": 28}
    )
    return _case(tf.Dinov2WithRegistersModel, config, None, images, "", decoder="")


def dinov3_vit() -> Case:
    config = tf.DINOv3ViTConfig(**EYE, image_size=28, patch_size=4, num_register_tokens=4)
    images = tf.ViTImageProcessorPil(size={"height": 28, "width": 28})
    return _case(tf.DINOv3ViTModel, config, None, images, "", decoder="")


def mllama() -> Case:
    """Tiles of 4 x 4 patches and a class token, filled up from 17 to 24 positions."""
    tower = tf.MllamaVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_global_layers=1,
        attention_heads=2, image_size=24, patch_size=6, vision_output_dim=32,
        intermediate_layers_indices=[0], max_num_tiles=4,
        supported_aspect_ratios=[
            [a, b] for a in range(1, 5) for b in range(1, 5) if a * b <= 4
        ],
    )  # fmt: skip
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    language = tf.MllamaTextConfig(
        **text | {"num_hidden_layers": 4}, cross_attention_layers=[1, 3], rope_parameters=rope,
        pad_token_id=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = tf.MllamaConfig(
        vision_config=tower, text_config=language, image_token_id=mark("<|image|>")
    )
    images = tf.MllamaImageProcessorPil(size={"height": 24, "width": 24}, max_image_tiles=4)
    processor = tf.MllamaProcessor(images, tokenizer(image_token="<|image|>"))
    cls = tf.MllamaForConditionalGeneration
    return _case(cls, config, processor.tokenizer, processor, "<|image|>")


def idefics2() -> Case:
    tower = tf.Idefics2VisionConfig(**EYE, image_size=48, patch_size=4)
    perceiver = tf.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=16, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=2,
        resampler_head_dim=8, num_key_value_heads=1,
    )  # fmt: skip
    config = tf.Idefics2Config(
        vision_config=tower, perceiver_config=perceiver, text_config=tf.MistralConfig(**TEXT),
        image_token_id=mark("<image>"),
    )  # fmt: skip
    images = tf.Idefics2ImageProcessorPil(
        size={"shortest_edge": 20, "longest_edge": 48}, do_image_splitting=True
    )
    processor = tf.Idefics2Processor(images, tokenizer(), image_seq_len=5)
    cls = tf.Idefics2ForConditionalGeneration
    return _case(cls, config, processor.tokenizer, processor, "<image>")


def _swin(name: str, window: int, side: int) -> Case:
    config = getattr(tf, f"{name}Config")(
        image_size=side, patch_size=4, embed_dim=8, depths=[2, 2, 2], num_heads=[1, 2, 4],
        window_size=window, mlp_ratio=1.0,
    )  # fmt: skip
    images = tf.ViTImageProcessorPil(size={"height": side, "width": side})
    model = getattr(tf, f"{name}ForImageClassification")
    return _case(model, config, None, images, "", decoder="")


def swin() -> Case:
    """Grids of 14, 7 and 4 patches a side: padding, and a last stage of one window."""
    return _swin("Swin", 4, 56)


def swinv2() -> Case:
    return _swin("Swinv2", 4, 56)


def _case(
    cls: Any, config: Any, words: Any, processor: Any, mark: str,
    *, decoder: str = "model.language_model",
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    hf = without_mixing(cls(config))
    names = [n for n, _ in hf.named_modules()]
    first = next(
        n for n in names
        if n.rsplit(".", 2)[-2:] in (["layers", "0"], ["layer", "0"], ["blocks", "0"])
        and ("vision" in n or "visual" in n or not decoder) and "text" not in n
    )  # fmt: skip
    return Case(load(hf, tokenizer=words, processor=processor), decoder, first, mark)


TEXTUAL = {
    "llava": llava, "llava_full": llava_full, "vipllava": vipllava,
    "llava_pixtral": llava_pixtral, "mistral3": mistral3, "llava_next": llava_next,
    "llava_onevision": llava_onevision, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl, "paligemma": paligemma, "gemma3": gemma3, "internvl": internvl,
    "idefics3": idefics3, "smolvlm": smolvlm, "qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe,
    "exaone4_5": exaone4_5, "glm4v": glm4v, "glm4v_moe": glm4v_moe, "glm46v": glm46v,
    "glm_ocr": glm_ocr, "aya_vision": aya_vision, "lighton_ocr": lighton_ocr,
}  # fmt: skip
ALONE = {
    "vit": vit, "clip_vision": clip_vision, "siglip_vision": siglip_vision, "deit": deit,
    "dinov2": dinov2, "dinov2_with_registers": dinov2_with_registers, "dinov3_vit": dinov3_vit,
    "swin": swin, "swinv2": swinv2, "vit_msn": vit_msn, "ijepa": ijepa, "beit": beit,
    "data2vec_vision": data2vec_vision, "metaclip_2_vision": metaclip_2_vision,
}  # fmt: skip
ALL = {**TEXTUAL, **ALONE, "clip": clip, "siglip": siglip, "metaclip_2": metaclip_2}


@cache
def case(name: str) -> Case:
    return ALL[name]()


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row; blue is full, which no padding is."""
    out = np.full((height, width, 3), 255, dtype=np.uint8)
    out[..., 0] = ((np.arange(width) + 0.5) / width * 255).round()
    out[..., 1] = ((np.arange(height) + 0.5) / height * 255).round()[:, None]
    return Image.fromarray(out)
