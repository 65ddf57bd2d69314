"""Patch maps against two references: a ramp of colours, and what changes when pixels change.

The ramp: an image whose red tells the column and whose green tells the row goes through the real
processor; the colours of a patch in `pixel_values`, undone, must be those at the middle of its box.

The change: pixels of one box get other values; the image tokens that reach the decoder otherwise,
and the patches that reach the tower otherwise, must be those whose boxes touch it. The towers of
these models have attention that adds nothing, so that no patch hears of another.
"""

import random

import images_kit as kit
import numpy as np
import pytest
import torch
from images_kit import ALL, ALONE, TEXTUAL, case, ramp
from PIL import Image

from interp.engine import _inputs
from interp.images import image_prompt, prompt_from_tensors
from interp.images.patches import PatchMap
from interp.images.plane import Settings
from interp.prompts import Prompt

SIZES = ((101, 67), (53, 131), (90, 90), (37, 29))
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "exaone4_5")
GRIDS = (*QWEN, "glm4v", "glm4v_moe", "glm46v", "glm_ocr")  # which read no videos here


def made(name: str, images, **options) -> Prompt:
    text = None if name in ALONE else "what is this ?"
    return image_prompt(case(name).model, text, images, **options)


def planes(prompt: Prompt, name: str) -> dict[tuple[int, int | None], np.ndarray]:
    """Pixels 0..255 that the tower reads, [height, width, 3], by image and tile, in its order.

    Read off the tensors alone: the order of tiles is that of the rows, named by the first patch.
    """
    settings = Settings.of(case(name).model.processor)
    mean, std = (np.array(settings(x)) for x in ("image_mean", "image_std"))
    pixels = prompt.inputs["pixel_values"].float().numpy()
    out = {}
    if name in GRIDS:
        start = 0
        for image, (_, high, wide) in enumerate(prompt.inputs["image_grid_thw"].tolist()):
            plane = np.zeros((high * 6, wide * 6, 3))
            at = start
            for row in range(high // 2):
                for column in range(wide // 2):
                    for i in range(2):
                        for j in range(2):
                            y, x = (2 * row + i) * 6, (2 * column + j) * 6
                            patch = pixels[at].reshape(3, 2, 6, 6)
                            assert np.array_equal(patch[:, 0], patch[:, 1])
                            plane[y : y + 6, x : x + 6] = patch[:, 0].transpose(1, 2, 0)
                            at += 1
            out[image, None] = (plane * std + mean) * 255
            start = at
        assert start == len(pixels)
        return out
    if name in ("llava_pixtral", "mistral3", "lighton_ocr"):
        return {(i, None): (x.transpose(1, 2, 0) * std + mean) * 255 for i, x in enumerate(pixels)}
    sides = pixels.shape[-3:]
    for row, seen in zip(pixels.reshape(-1, *sides), prompt.views["vision"], strict=False):
        first = seen.patches.patches[0]
        out[first.image, first.tile] = (row.transpose(1, 2, 0) * std + mean) * 255
    return out


def side_of(name: str) -> int:
    config = case(name).model.config
    patch = getattr(config, "vision_config", config).patch_size
    return patch if isinstance(patch, int) else patch[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_boxes_of_the_tower_are_where_the_colours_come_from(name, size):
    width, height = size
    prompt = made(name, ramp(width, height))
    found = planes(prompt, name)
    side = side_of(name)
    checked = slivers = 0
    for seen in prompt.views["vision"]:
        for p in seen.patches:
            y, x = p.row * side, p.column * side
            pixels = found[p.image, p.tile][y : y + side, x : x + side].reshape(-1, 3)
            assert len(pixels) == side**2
            inside = pixels[pixels[:, 2] > 250]
            left, top, right, bottom = p.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            if len(inside) < side:  # a sliver beside the padding, which the kernel mixes
                slivers += 1
                continue
            red, green = inside[:, 0].mean() / 255 * width, inside[:, 1].mean() / 255 * height
            assert abs(red - (left + right) / 2) < 1.0, p
            assert abs(green - (top + bottom) / 2) < 1.0, p
            checked += 1
    assert checked >= 24 and slivers <= 0.4 * checked


def merge_of(name: str) -> int:
    squares = ("aya_vision", "gemma3", "internvl", "idefics3", "lighton_ocr", "mistral3", "smolvlm")
    return 2 if name in (*GRIDS, *squares) else 1


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [n for n in TEXTUAL if n != "llava_onevision"])
def test_boxes_of_text_tokens_are_those_of_their_patches(name, size):
    prompt = two(name, size) if several(name) else made(name, ramp(*size))
    merge = merge_of(name)
    boxes = {
        (p.image, p.tile, p.row, p.column): p.box
        for seen in prompt.views["vision"] for p in seen.patches
    }  # fmt: skip
    for p in prompt.patches:
        parts = [
            boxes[p.image, p.tile, p.row * merge + i, p.column * merge + j]
            for i in range(merge) for j in range(merge)
        ]  # fmt: skip
        union = [f(b[k] for b in parts) for k, f in enumerate((min, min, max, max))]
        assert p.box == pytest.approx(union)


def several(name: str) -> bool:
    """Whether its processor takes more than one image a prompt."""
    return name in TEXTUAL


def two(name: str, size: tuple[int, int]) -> Prompt:
    mark = case(name).mark
    images = [ramp(*size), ramp(64, 48)]
    return image_prompt(case(name).model, f"{mark} the cat {mark} what is this ?", images)


def reached(name: str, prompt: Prompt) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What reaches the decoder [pos, d] and the first layer of the tower [row, pos, d]."""
    it = case(name)
    seen = {}

    def keep(key):
        def hook(module, args, options):
            value = options.get("inputs_embeds") if key == "decoder" else None
            value = args[0] if value is None and args else value
            value = options.get("hidden_states") if value is None else value
            seen.setdefault(key, []).append(value.detach())

        return hook

    hf = it.model.hf
    hooks = [
        hf.get_submodule(path).register_forward_pre_hook(keep(key), with_kwargs=True)
        for key, path in (("decoder", it.decoder), ("tower", it.tower)) if path
    ]  # fmt: skip
    try:
        it.model.forward(_inputs(it.model, it.model.batch([prompt])))
    finally:
        for hook in hooks:
            hook.remove()
    (tower,) = seen["tower"]
    tower = tower if tower.dim() == 3 else tower[None]
    return (seen["decoder"][0][0] if it.decoder else None), tower


def differs(a: torch.Tensor, b: torch.Tensor) -> set[int]:
    return set(((a - b).abs().amax(-1) > 1e-5).nonzero().flatten().tolist())


def grown(box, by, size):
    left, top, right, bottom = box
    return max(left - by, 0), max(top - by, 0), min(right + by, size[0]), min(bottom + by, size[1])


def touching(patches: PatchMap, box, image: int) -> set[int]:
    return set(patches.touching(box, image=image))


def surely(patches: PatchMap, box, image: int, side: int) -> set[int]:
    """Patches that share so much with a box that one of their `side`² pixels is picked from it."""
    out = set()
    for p in patches:
        like = [q.box for q in patches if (q.image, q.tile) == (p.image, p.tile)]
        across, down = (max(b[i + 2] - b[i] for b in like) / side * 1.01 + 1 for i in (0, 1))
        wide = min(p.box[2], box[2]) - max(p.box[0], box[0])
        high = min(p.box[3], box[3]) - max(p.box[1], box[1])
        if p.image == image and wide >= across and high >= down:
            out.add(p.position)
    return out


def scrambled(image: Image.Image, box, seed: int) -> Image.Image:
    levels = np.asarray(image).copy()
    left, top, right, bottom = box
    rng = np.random.default_rng(seed)
    part = levels[top:bottom, left:right]
    levels[top:bottom, left:right] = np.where(part > 127, part // 4, 255 - part // 4)
    levels[top:bottom, left:right] ^= rng.integers(0, 8, part.shape, dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("name", ALL)
def test_what_changes_with_pixels_touches_them(name):
    """Nearest neighbour, so that a pixel of the tower is one of the image: changes do not bleed."""
    rng = random.Random(name)
    it = case(name)
    settings = Settings.of(it.model.processor)
    old = settings.image_processor.resample
    settings.image_processor.resample = Image.Resampling.NEAREST
    text = (
        f"{it.mark} the cat {it.mark} ?" if several(name) else None if name in ALONE else "a cat ?"
    )
    hits = 0
    try:
        for size in SIZES:
            images = [ramp(*size), ramp(64, 48)] if several(name) else [ramp(*size)]
            before = image_prompt(it.model, text, images)
            base = reached(name, before)
            for trial in range(4):
                which = trial % len(images)
                wide, high = images[which].size
                left, top = rng.randrange(wide * 3 // 4), rng.randrange(high * 3 // 4)
                box = (
                    left,
                    top,
                    min(left + rng.randint(9, 24), wide),
                    min(top + rng.randint(9, 24), high),
                )
                changed = list(images)
                changed[which] = scrambled(images[which], box, trial)
                after = image_prompt(it.model, text, changed)
                assert after.patches == before.patches and after.spans == before.spans
                found = reached(name, after)
                pairs = [
                    (v.patches, b, a)
                    for v, b, a in zip(before.views["vision"], base[1], found[1], strict=True)
                ]
                if before.patches is not None and base[0] is not None:
                    pairs.append((before.patches, base[0], found[0]))
                for patches, b, a in pairs:
                    # Resized twice, a pixel may be picked for the middle of one next to it.
                    most = touching(patches, grown(box, 1, (wide, high)), which)
                    least = surely(patches, box, which, side_of(name))
                    moved = differs(a, b)
                    assert least <= moved <= most, (size, box, which)
                    hits += len(least)
    finally:
        settings.image_processor.resample = old
    assert hits > 60


@pytest.mark.parametrize(
    "name",
    [
        "llava_next",
        "llava_onevision",
        "idefics3",
        "smolvlm",
        "internvl",
        "qwen2_vl",
        "glm4v",
        "aya_vision",
    ],
)
def test_tiles_are_counted_as_the_processor_does(name):
    """Any size: were a rule of another count, tensors and tokens would not fit the map."""
    rng = random.Random(name)
    sizes = [(rng.randint(6, 150), rng.randint(6, 150)) for _ in range(40)]
    for width, height in [*sizes, (6, 150), (150, 6), (24, 24), (48, 24), (12, 24), (9, 11)]:
        prompt = made(name, Image.new("RGB", (width, height), "red"))
        shown = np.array([p.box for p in prompt.patches])
        corners = (*shown[:, :2].min(0), *shown[:, 2:].max(0))
        assert corners == pytest.approx((0, 0, width, height), abs=1.01)


def test_parts_of_elongated_images_are_mapped():
    it = kit.gemma3()
    it.model.processor.images_kwargs = {"do_pan_and_scan": True}
    prompt = image_prompt(it.model, "a cat ?", ramp(112, 37))
    assert len(prompt.views["vision"]) == 4
    first, second = (prompt.patches.positions(image=0, tile=i) for i in (0, 1))
    assert prompt.positions("image-0/tile-0") == list(first)
    assert len(first) == len(second) == 16
    mean, std = np.full(3, 0.5), np.full(3, 0.5)
    for seen, pixels in zip(prompt.views["vision"], prompt.inputs["pixel_values"], strict=True):
        levels = (pixels.permute(1, 2, 0).numpy() * std + mean) * 255
        for p in seen.patches:
            part = levels[p.row * 4 : p.row * 4 + 4, p.column * 4 : p.column * 4 + 4].mean((0, 1))
            assert abs(part[0] / 255 * 112 - (p.box[0] + p.box[2]) / 2) < 1
            assert abs(part[1] / 255 * 37 - (p.box[1] + p.box[3]) / 2) < 1


@pytest.mark.parametrize("name", QWEN)
def test_frames_of_videos_follow_the_images(name):
    """Two images beside a video of four frames, as tensors: frames change one by one."""
    it = case(name)
    gen = torch.Generator().manual_seed(0)
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
    video = torch.tensor([[2, 4, 8]])
    mark, film = kit.mark("<|image_pad|>"), kit.mark("<|video_pad|>")
    between = [5] if name.startswith("qwen3") else []  # which writes the time between frames
    ids = [5, *[mark] * 6, 6, *[film] * 8, *between, *[film] * 8, *[mark] * 2, 7]
    ids = torch.tensor([ids])
    inputs = {
        "input_ids": ids, "image_grid_thw": grids, "video_grid_thw": video,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 3 * 2 * 36, generator=gen),
        "pixel_values_videos": torch.randn(64, 3 * 2 * 36, generator=gen),
        "mm_token_type_ids": (ids == mark).long() + 2 * (ids == film).long(),
    }  # fmt: skip
    sizes = [(60, 41), (25, 12), (96, 48)]
    prompt = prompt_from_tensors(it.model, inputs, sizes=sizes)
    assert prompt.positions("image-2/frame-0") == list(range(8, 16))
    by = len(between)
    assert prompt.positions("image-2/frame-2") == list(range(16 + by, 24 + by))
    assert prompt.span("image-1") == ((24 + by, 26 + by),)
    assert prompt.positions("image") == [i for i, t in enumerate(ids[0]) if t in (mark, film)]
    assert prompt.patches.grids()[2, None, 2] == (2, 4)
    images, frames = prompt.views["vision"]
    assert frames.positions("image-2/frame-2") == list(range(32, 64)) and len(images) == 32
    assert images.span("image-2") == () and "image-0" in frames.spans
    base = _decoded(it, prompt)
    for image, frame in ((0, 0), (1, 0), (2, 0), (2, 2)):
        for p in prompt.patches:
            if (p.image, p.frame) != (image, frame):
                continue
            changed = {k: v.clone() for k, v in inputs.items()}
            key = "pixel_values_videos" if image == 2 else "pixel_values"
            columns = {0: 3, 1: 2, 2: 4}[image]
            start = {0: 0, 1: 24, 2: 0}[image] + 32 * (frame // 2)
            at = start + 4 * (p.row * columns + p.column)
            changed[key][at : at + 4] += 1.0
            other = prompt_from_tensors(it.model, changed, sizes=sizes)
            assert differs(base, _decoded(it, other)) == {p.position}


def _decoded(it, prompt: Prompt) -> torch.Tensor:
    seen = []
    hook = it.model.hf.get_submodule(it.decoder).register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"][0].detach()), with_kwargs=True
    )
    try:
        it.model.forward(it.model.batch([prompt]).inputs())
    finally:
        hook.remove()
    return seen[0]
