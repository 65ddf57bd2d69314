"""Train `zoo:shapes-vlm`: a LLaVA that answers questions about scenes of coloured shapes.

    python -m interp.zoo.train.shapes_vlm --out /tmp/first
    python -m interp.zoo.train.shapes_vlm --start /tmp/first --out interp/zoo/weights/shapes-vlm
    python -m interp.zoo.train.shapes_vlm --evaluate interp/zoo/weights/shapes-vlm

A CLIP tower (3 layers, 64 patches of 8 × 8 pixels) and a Llama (4 layers, grouped queries). The
loss on answers alone teaches colours in minutes and shapes not at all: a shape spans four patches,
and the decoder sends the tower no usable gradient before it can read it. So the tower first learns
by itself to say of each patch what is on it, which is a dense signal, and the whole model is
trained after that. Training scenes come from the skewed world, tests from all of them.

What ships has been through the first two commands. The first leaves a model that misplaces one
thing in twenty. The second goes on from its weights at a lower rate, with scenes it has not met,
more faint things in every second scene and more descriptions, since a model that has met few faint
things leaves some out. How right anyone can be about faint things is in `shapes_ceiling`.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.scenes import CELL, COLOURS, HABITS, SHAPES, SIZE, WORLDS, Scene, make_scene
from interp.tasks.shapes import KINDS, WORDS, ask
from interp.zoo.train.common import BOS, EOS, PAD, train, word_tokenizer
from interp.zoo.train.shapes_ceiling import ceiling

PATCH = 8
GRID = SIZE // PATCH
MEAN, STD = 0.2, 0.25
IMAGE = "<image>"
WEIGHTS = {"color": 3, "shape": 2, "where": 2, "exists": 3, "describe": 2}
LATE_WEIGHTS = {**WEIGHTS, "describe": 4}
"""How often each kind is asked, in the first run and in the second."""
FAINT, LATE_FAINT = (0.1,), (0.1, 0.4)
"""Share of faint things, scene after scene in turn."""
TURNS = 5


def tokenizer() -> Any:
    """The words of the task and the image token."""
    made = word_tokenizer([*WORDS, IMAGE])
    made.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return made


def build(vocab_size: int, image_id: int) -> Any:
    """The untrained model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIZE, patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_id,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID, pad_token_id=PAD,
    )  # fmt: skip
    model = Llava(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embedding" in name:
                parameter.normal_(std=0.1)  # the default leaves the image fainter than positions
            elif parameter.dim() == 2 and "position" not in name:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5)
    return model


def pixels_of(scenes: list[Scene]) -> Tensor:
    """[scene, 3, 64, 64], normalised."""
    stack = np.stack([s.pixels for s in scenes]).astype(np.float32) / 255
    return torch.from_numpy((stack - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


class Seeds:
    """Scenes and questions that never repeat."""

    def __init__(self, seed: int) -> None:
        self.rng, self.at, self.seed = random.Random(seed), 0, seed

    def scenes(self, n: int, faint: Sequence[float] = FAINT) -> list[Scene]:
        """The next scenes of the skewed world, with these shares of faint things in turn."""
        self.at += n
        return [
            make_scene(f"train/{self.seed}/{self.at - i}", faint=faint[i % len(faint)])
            for i in range(n)
        ]


def patches(seeds: Seeds, size: int) -> tuple[Tensor, Tensor]:
    """Pixels, and per patch the colour and the shape whose cell it lies in; 0 is nothing."""
    scenes = seeds.scenes(size)
    labels = torch.zeros(size, GRID, GRID, 2, dtype=torch.long)
    per = CELL // PATCH
    for i, scene in enumerate(scenes):
        for t in scene.things:
            at = (
                slice(t.row * per, (t.row + 1) * per),
                slice(t.column * per, (t.column + 1) * per),
            )
            labels[i][at] = torch.tensor(
                [1 + list(COLOURS).index(t.colour), 1 + SHAPES.index(t.shape)]
            )
    return pixels_of(scenes), labels.flatten(1, 2)


class Eye(nn.Module):
    """The tower with a reader of patches on top."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.colour, self.shape = nn.Linear(128, 7), nn.Linear(128, 7)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of colour and shape of each patch."""
        seen = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        loss = torch.zeros(())
        for i, read in enumerate((self.colour, self.shape)):
            guess = read(seen).flatten(0, 1)
            at = labels[..., i].flatten()
            weight = torch.tensor([0.3, *[1.0] * 6])
            loss = loss + nn.functional.cross_entropy(guess, at, weight)
        return loss


def dialogues(
    seeds: Seeds,
    words: Any,
    size: int,
    often: Mapping[str, int] = WEIGHTS,
    faint: Sequence[float] = FAINT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, weights of the answers' tokens, and pixels; some questions a scene."""
    scenes = seeds.scenes(size, faint)
    rows, weights = [], []
    for scene in scenes:
        ids = [BOS, *[words.convert_tokens_to_ids(IMAGE)] * (GRID * GRID)]
        weight = [0.0] * len(ids)
        kinds = seeds.rng.choices(KINDS, [often[k] for k in KINDS], k=TURNS)
        if "describe" in kinds:
            kinds = kinds[: kinds.index("describe") + 1]  # a description gives all else away
        for kind in kinds:
            asked = ask(scene, kind, seeds.rng)
            question = words(asked.text, add_special_tokens=False).input_ids
            answer = [*words(asked.answer, add_special_tokens=False).input_ids, EOS]
            ids += [*question, *answer]
            weight += [0.0] * len(question) + [1.0] * len(answer)
        rows.append(ids)
        weights.append(weight)
    width = max(map(len, rows))
    for ids, weight in zip(rows, weights, strict=True):
        ids += [PAD] * (width - len(ids))
        weight += [0.0] * (width - len(weight))
    return torch.tensor(rows), torch.tensor(weights), pixels_of(scenes)


def dialogue_loss(model: Any, ids: Tensor, weight: Tensor, pixels: Tensor) -> Tensor:
    """Cross-entropy of the tokens of answers."""
    logits = model(input_ids=ids, pixel_values=pixels).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weight[:, 1:].flatten()
    return (loss * w).sum() / w.sum()


@torch.no_grad()
def answers(
    model: Any, words: Any, kind: str, *, world: str, faint: float, n: int, habitual: bool = False
) -> tuple[float, float]:
    """Share of questions answered right word for word, and share answered by habit."""
    rng = random.Random(f"test/{kind}/{world}/{faint}")
    right = habit = 0
    image = [words.convert_tokens_to_ids(IMAGE)] * (GRID * GRID)
    for at in range(0, n, 50):
        scenes = [make_scene(f"test/{at + i}", world=world, faint=faint) for i in range(50)]
        asked = [ask(s, kind, rng, habitual=habitual) for s in scenes]
        texts = [words(q.text, add_special_tokens=False).input_ids for q in asked]
        width = max(map(len, texts))
        rows = [[PAD] * (width - len(t)) + [BOS, *image, *t] for t in texts]
        ids = torch.tensor(rows)
        said = model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=pixels_of(scenes),
            max_new_tokens=24, do_sample=False,
        )[:, ids.shape[1] :]  # fmt: skip
        for q, row in zip(asked, said.tolist(), strict=True):
            text = words.decode(row[: row.index(EOS)] if EOS in row else row)
            right += text == q.answer
            habit += bool(q.habit) and text == q.habit
    return right / n, habit / n


def table(model: Any, words: Any, n: int = 400) -> str:
    """Accuracy by kind and world, clear and faint, and hallucination by habit, as Markdown."""
    lines = ["| question | world | faint | right | answered by habit |", "|---|---|---|---|---|"]
    cells = [(k, w, f, False) for w in ("skewed", "even") for f in (0.0, 0.1) for k in KINDS]
    cells += [("color", "conflict", f, True) for f in (0.0, 0.1, 0.5, 1.0)]
    cells += [("exists", "conflict", f, True) for f in (0.0, 0.5)]
    for kind, world, faint, habitual in cells:
        good, bad = answers(model, words, kind, world=world, faint=faint, n=n, habitual=habitual)
        lines.append(f"| {kind} | {world} | {faint:g} | {good:.3f} | {bad:.3f} |")
    best = {world: ceiling(world, 0.1) for world in ("skewed", "even")}
    lines += ["", "A perfect observer, at faint 0.1, expects to get right:", ""]
    lines += [f"- {world} world: {found.words()}" for world, found in best.items()]
    return "\n".join(lines)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--start", type=Path, help="go on from the weights of this folder")
    parser.add_argument("--eye-steps", type=int, default=900)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--late-steps", type=int, default=600, help="steps after --start")
    parser.add_argument("--late-rate", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    words = tokenizer()
    if args.evaluate:
        print(table(loaded(args.evaluate), words))
        return
    torch.manual_seed(args.seed)
    model = build(len(words), words.vocab[IMAGE])
    if args.start:
        model.load_state_dict(loaded(args.start).state_dict())
    made = go_on(model, words, args) if args.start else begin(model, words, args)
    if args.out:
        save(model, words, args.out)
        model = loaded(args.out)  # what is stored is what is measured
    found = table(model, words)
    print(found)
    if args.out:
        (args.out / "README.md").write_text(card(model, found, made))


def reporter() -> Callable[[int, float], None]:
    """Prints how training goes."""
    start = time.time()

    def report(step: int, loss: float) -> None:
        print(f"{time.time() - start:6.0f} s  step {step:5d}  loss {loss:.3f}", flush=True)

    return report


def begin(model: Any, words: Any, args: argparse.Namespace) -> str:
    """Train the tower alone, then all of the model; returns what was done."""
    seeds, report = Seeds(args.seed), reporter()
    train(
        Eye(model.model.vision_tower), [(args.eye_steps, lambda: patches(seeds, 64), 1e-3)],
        report=report, loss_of=lambda m, *batch: m(*batch),
    )  # fmt: skip
    stage = (args.steps, lambda: dialogues(seeds, words, args.batch), 1e-3)
    train(model, [stage], report=report, loss_of=dialogue_loss)
    return (
        f"Made by `python -m interp.zoo.train.shapes_vlm --out DIR` ({args.eye_steps} steps of the "
        f"tower\nalone, {args.steps} steps of the model, batches of {args.batch}, "
        f"seed {args.seed})."
    )


def go_on(model: Any, words: Any, args: argparse.Namespace) -> str:
    """Train a trained model further; returns what was done, and what before."""
    seeds = Seeds(args.seed + 1)  # the first run has met the scenes of its own seed

    def make() -> tuple[Tensor, Tensor, Tensor]:
        return dialogues(seeds, words, args.batch, LATE_WEIGHTS, LATE_FAINT)

    stage = (args.late_steps, make, args.late_rate)
    train(model, [stage], report=reporter(), loss_of=dialogue_loss)
    told = args.start / "README.md"
    parts = told.read_text().split("\n\n") if told.exists() else []
    before = [part for part in parts if part.startswith("Made by ")]
    now = (
        f"Then `--start DIR --out NEW`: {args.late_steps} more steps at a peak rate of "
        f"{args.late_rate:g}, batches of\n{args.batch}, new scenes, shares of faint things "
        f"{LATE_FAINT}, descriptions twice as often."
    )
    return "\n\n".join([*before, now])


def loaded(folder: Path) -> Any:
    """The model of a folder, in single precision whatever it is stored in."""
    from transformers import LlavaForConditionalGeneration as Llava

    return Llava.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def processor(words: Any) -> Any:
    """Pixels as they are, normalised, and an image token for every patch."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3,
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE},
    )  # fmt: skip
    return LlavaProcessor(
        pixels, words, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def save(model: Any, words: Any, folder: Path) -> None:
    """Weights in half precision, tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    small = copy.deepcopy(model).half()
    small.save_pretrained(folder)
    small.config.dtype = "float32"  # stored small, but meant to run in single precision
    small.config.save_pretrained(folder)
    processor(words).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def card(model: Any, found: str, made: str) -> str:
    """What the weights are and how they came to be."""
    size = sum(p.numel() for p in model.parameters())
    habits = ", ".join(f"{s} {c}" for s, c in HABITS.items())
    return f"""# zoo:shapes-vlm

A LLaVA with {size:,} parameters that answers questions about scenes of coloured shapes
(`interp.scenes`, worlds {", ".join(WORLDS)}; habits: {habits}).

{made}

{found}
"""


if __name__ == "__main__":
    main()
