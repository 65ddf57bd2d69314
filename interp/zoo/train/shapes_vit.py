"""Train `zoo:shapes-vit`: a vision transformer that names the shape of the red thing.

    python -m interp.zoo.train.shapes_vit --out interp/zoo/weights/shapes-vit
    python -m interp.zoo.train.shapes_vit --evaluate interp/zoo/weights/shapes-vit

Every scene of the even world holds exactly one red thing among others; its shape is the class. The
class token has to find it by colour and read its shape, so that there is a box it should look at.
As with `shapes_vlm`, the tower first learns to say of each patch what is on it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp.scenes import SHAPES, SIZE, Scene, make_scene
from interp.zoo.train.common import train
from interp.zoo.train.shapes_vlm import MEAN, PATCH, STD, Eye, Seeds, patches, pixels_of

COLOUR = "red"


def build() -> Any:
    """The untrained model."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, num_labels=len(SHAPES), add_pooling_layer=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(SHAPES)), label2id={s: i for i, s in enumerate(SHAPES)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embeddings" in name and parameter.dim() > 1:
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5)
    return model


def processor() -> Any:
    """Pixels as they are, normalised."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        do_resize=False, image_mean=[MEAN] * 3, image_std=[STD] * 3,
        size={"height": SIZE, "width": SIZE},
    )  # fmt: skip


def scene_of(place: str) -> Scene:
    """A scene with exactly one red thing."""
    return make_scene(place, world="even", faint=0.0, needs=(COLOUR,))


def label_of(scene: Scene) -> int:
    """The class of a scene."""
    found = scene.find(COLOUR)
    assert found is not None
    return SHAPES.index(found.shape)


def pictures(seeds: Seeds, size: int) -> tuple[Tensor, Tensor]:
    """Pixels and classes."""
    seeds.at += size
    scenes = [scene_of(f"vit/{seeds.seed}/{seeds.at - i}") for i in range(size)]
    return pixels_of(scenes), torch.tensor([label_of(s) for s in scenes])


def class_loss(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the class."""
    logits = model(pixel_values=pixels).logits
    return nn.functional.cross_entropy(logits, labels)


@torch.no_grad()
def accuracy(model: Any, n: int = 1000) -> float:
    """Share of held-out scenes named right."""
    scenes = [scene_of(f"vit/test/{i}") for i in range(n)]
    guess = model(pixel_values=pixels_of(scenes)).logits.argmax(-1)
    return float((guess == torch.tensor([label_of(s) for s in scenes])).float().mean())


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--eye-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from transformers import ViTForImageClassification

        print(f"right: {accuracy(ViTForImageClassification.from_pretrained(args.evaluate)):.3f}")
        return
    torch.manual_seed(args.seed)
    model = build()
    start, seeds = time.time(), Seeds(args.seed)

    def report(step: int, loss: float) -> None:
        print(f"{time.time() - start:6.0f} s  step {step:5d}  loss {loss:.3f}", flush=True)

    train(
        Eye(model.vit), [(args.eye_steps, lambda: patches(seeds, 64), 1e-3)], report=report,
        loss_of=lambda m, *batch: m(*batch),
    )  # fmt: skip
    train(
        model, [(args.steps, lambda: pictures(seeds, 96), 1e-3)], report=report,
        loss_of=class_loss,
    )  # fmt: skip
    right = accuracy(model)
    print(f"right: {right:.3f}")
    if args.out:
        model.half().save_pretrained(args.out)
        processor().save_pretrained(args.out)
        size = sum(p.numel() for p in model.parameters())
        (args.out / "README.md").write_text(
            f"# zoo:shapes-vit\n\nA ViT with {size:,} parameters that names the shape of the "
            f"{COLOUR} thing in a scene (`interp.scenes`, even world).\n\nMade by `python -m "
            f"interp.zoo.train.shapes_vit --out DIR` ({args.eye_steps} steps of the tower alone, "
            f"{args.steps} steps of the model, seed {args.seed}). Right on 1,000 held-out scenes: "
            f"{right:.3f}.\n"
        )
        for file in args.out.iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
