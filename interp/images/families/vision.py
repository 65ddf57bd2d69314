"""Vision transformers by themselves, such as ViT, BEiT and DINOv3, and CLIP's kind of two towers.

Every image is one row of the tower. Text of the models of two towers holds no image tokens.
"""

from typing import Any

from interp.images.layouts import TOWERS, Example, Layout, layout, row_of, shown
from interp.images.plane import prepared


@TOWERS.register("clip_vision_model")
@TOWERS.register("internvl_vision")
@TOWERS.register("vit")
@TOWERS.register("vit_msn")
@TOWERS.register("beit")
@TOWERS.register("data2vec-vision")
@TOWERS.register("metaclip_2_vision_model")
@TOWERS.register("dinov2")
def _class_first(config: Any) -> tuple[str, ...]:
    return ("cls",)


@TOWERS.register("ijepa")
@TOWERS.register("siglip_vision_model")
@TOWERS.register("idefics3_vision")
@TOWERS.register("smolvlm_vision")
def _patches_alone(config: Any) -> tuple[str, ...]:
    return ()


@TOWERS.register("deit")
def _class_and_teacher(config: Any) -> tuple[str, ...]:
    return ("cls", "distillation")


@TOWERS.register("dinov2_with_registers")
@TOWERS.register("dinov3_vit")
def _class_and_registers(config: Any) -> tuple[str, ...]:
    return ("cls", *["registers"] * int(config.num_register_tokens))


@layout("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")
@layout("beit", "data2vec-vision", "ijepa", "vit_msn")
@layout("clip_vision_model", "metaclip_2_vision_model", "siglip_vision_model")
def plain(example: Example) -> Layout:
    """One tower and nothing else."""
    planes = shown(example, prepared)
    return Layout(_sizes(planes, example), (), tuple(row_of(p, example.config) for p in planes))


@layout("clip", "metaclip_2", "siglip")
def dual(example: Example) -> Layout:
    """A tower for images beside one for text."""
    planes = shown(example, prepared)
    tower = example.config.vision_config
    return Layout(_sizes(planes, example), (), tuple(row_of(p, tower) for p in planes))


def _sizes(planes: list[Any], example: Example) -> tuple[tuple[int, int], ...]:
    return example.sizes or tuple(p.size for p in planes)
