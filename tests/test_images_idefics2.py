"""Idefics2: parts of images in the tower, and the resampler that reads them.

Judged as in `test_images_maps` and `test_images_mllama`.
"""

import copy
import functools
import random
from dataclasses import replace

import images_kit as kit
import numpy as np
import pytest
import torch
from PIL import Image
from reference import naive
from test_images_maps import SIZES, differs, grown, scrambled, surely, touching
from test_images_mllama import EVERYWHERE, matrices, spans
from test_interp_towers import noise, same

from heads import score
from interp import load
from interp import readings as rd
from interp.engine import Collector, read
from interp.errors import InputError, SiteError
from interp.images import image_prompt, prompt_from_tensors
from interp.images.plane import Settings

TOWERS = ("text", "vision", "cross")
KEYS = "cross/keys"
TEXT = "<image> the cat <image> what is this ?"


@functools.cache
def case():
    return kit.idefics2()


@functools.cache
def made(attn="sdpa"):
    hf = copy.deepcopy(case().model.hf).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.normal_(std=0.4)
    hf.set_attn_implementation(attn)
    return load(hf, tokenizer=case().model.tokenizer, processor=case().model.processor)


class _Split:
    """The processor with images split or not, for a while."""

    def __init__(self, split, **more):
        self.set = {"do_image_splitting": split, **more}

    def __enter__(self):
        images = Settings.of(case().model.processor).image_processor
        self.old = {name: getattr(images, name) for name in self.set}
        vars(images).update(self.set)

    def __exit__(self, *_):
        vars(Settings.of(case().model.processor).image_processor).update(self.old)


# ----------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_are_where_the_colours_come_from(size, split):
    width, height = size
    with _Split(split):
        prompt = image_prompt(case().model, TEXT, [kit.ramp(*size), kit.ramp(64, 48)])
    pixels = prompt.inputs["pixel_values"][0].float().numpy() * 0.5 + 0.5
    views = prompt.views["vision"]
    assert len(views) == len(pixels) == len(prompt.views[KEYS]) == (10 if split else 2)
    columns = pixels.shape[-1] // 4
    checked = 0
    for levels, view, keys in zip(pixels, views, prompt.views[KEYS], strict=True):
        assert keys.patches.patches == view.patches.patches
        assert keys.positions("latent") == list(range(len(view), len(view) + 5))
        full = (levels[2] > 0.98)[: len(view) // columns * 4, : columns * 4]
        whole = full.reshape(-1, 4, columns, 4).all((1, 3)).flatten().nonzero()[0]
        assert list(view.patches.positions()) == whole.tolist()
        assert view.positions("unused") == sorted(set(range(len(view))) - set(whole.tolist()))
        for p in view.patches:
            assert p.position == p.row * columns + p.column
            if p.image:
                continue
            part = levels[:, 4 * p.row : 4 * p.row + 4, 4 * p.column : 4 * p.column + 4] * 255
            left, top, right, bottom = p.box
            assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
            assert abs(part[0].mean() / 255 * width - (left + right) / 2) < 1.0, p
            assert abs(part[1].mean() / 255 * height - (top + bottom) / 2) < 1.0, p
            checked += 1
    assert checked >= 24


@pytest.mark.parametrize("split", [False, True])
def test_what_changes_with_pixels_touches_them(split):
    model = case().model
    rng = random.Random(0)
    hits = 0
    with _Split(split, resample=Image.Resampling.NEAREST):
        for size in SIZES:
            images = [kit.ramp(*size), kit.ramp(64, 48)]
            before = image_prompt(model, TEXT, images)
            base = reached(model, before)
            for trial in range(4):
                which = trial % 2
                wide, high = images[which].size
                left, top = rng.randrange(wide * 3 // 4), rng.randrange(high * 3 // 4)
                box = (
                    left, top, min(left + rng.randint(9, 24), wide),
                    min(top + rng.randint(9, 24), high),
                )  # fmt: skip
                changed = list(images)
                changed[which] = scrambled(images[which], box, trial)
                found = reached(model, image_prompt(model, TEXT, changed))
                for at, name in enumerate(("vision", KEYS)):
                    for i, view in enumerate(before.views[name]):
                        most = touching(view.patches, grown(box, 1, (wide, high)), which)
                        least = surely(view.patches, box, which, 4)
                        # What is hidden may change with pixels, and is nobody's patch.
                        hidden = set(view.positions("unused"))
                        moved = differs(base[at][i], found[at][i]) - hidden
                        assert least <= moved <= most, (size, box, which)
                        hits += len(least)
    assert hits > 60


def reached(model, prompt):
    """Inputs of the tower's first layer and context of the resampler, a row a part."""
    seen = {}
    hooks = [
        model.hf.get_submodule("model.vision_model.encoder.layers.0").register_forward_pre_hook(
            lambda m, a: seen.update(tower=a[0].detach())
        ),
        model.hf.get_submodule(
            "model.connector.perceiver_resampler.layers.0"
        ).register_forward_pre_hook(
            lambda m, a, k: seen.update(keys=torch.cat([a[1], a[0]], 1).detach()), with_kwargs=True
        ),
    ]
    try:
        model.forward(model.batch([prompt]).inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return seen["tower"], seen["keys"]


def test_latents_of_the_text_are_in_the_order_of_the_parts():
    """Each stands for a part; which, is seen by the part whose pixels change it."""
    model = case().model
    images = [kit.ramp(60, 44), kit.ramp(64, 48)]
    before = image_prompt(model, TEXT, images)
    base = decoded(model, before)
    right = (32, 24, 64, 48)
    after = image_prompt(model, TEXT, [images[0], scrambled(images[1], right, 0)])
    moved = differs(base, decoded(model, after))
    want = {*before.positions("image-1/tile-3"), *before.positions("image-1/whole")}
    assert moved and moved <= want
    assert {
        min(before.positions("image-1/tile-3")),
        min(before.positions("image-1/whole")),
    } <= moved


def decoded(model, prompt):
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "perceiver" in name and weight.dim() == 2:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = hf.get_submodule("model.text_model").register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"][0].detach()), with_kwargs=True
    )
    with torch.no_grad():
        hf(**model.batch([prompt]).inputs())
    hook.remove()
    return seen[0]


def test_without_sizes_boxes_are_in_pixels_of_the_parts():
    model = case().model
    with _Split(False):
        made = image_prompt(model, "a cat ?", kit.ramp(101, 67))
    ids = torch.tensor([made.tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made.inputs}
    prompt = prompt_from_tensors(model, inputs)
    (view,) = prompt.views["vision"]
    assert view.patches.sizes == ((48, 31),) and view.patches.patches[13].box == (4, 4, 8, 8)
    assert prompt_from_tensors(model, inputs, sizes=[(101, 67)]).views == made.views
    with pytest.raises(InputError, match="2 images make 2 parts, or 10 where they are split"):
        prompt_from_tensors(model, inputs, sizes=[(101, 67)] * 2)
    with pytest.raises(InputError, match=r"must be \[1, part, channel, height, width\]"):
        prompt_from_tensors(model, {**inputs, "pixel_values": torch.zeros(1, 3, 48, 48)})


# ------------------------------------------------------------------------------- readings


def marked(prompt):
    views = {
        name: tuple(replace(row, spans=spans(len(row))) for row in rows)
        for name, rows in prompt.views.items()
    }
    return replace(prompt, spans=spans(len(prompt)), views=views)


def prompts_of(sizes=((60, 44), (48, 35))):
    """One part a prompt of the same places, of which not the same are hidden."""
    with _Split(False):
        return [
            marked(image_prompt(made(), f"a cat {'? ' * i}", noise(*size, i), id=str(i)))
            for i, size in enumerate(sizes)
        ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_all_towers_are_read_in_one_run_each_in_its_own_geometry(attn):
    model = made(attn)
    batch = model.batch(prompts_of())
    full = matrices(made("eager"), batch, TOWERS)
    bare = model.forward(batch.inputs()).logits
    readings = EVERYWHERE | {
        "keys": rd.KeyMass(),
        "rows": rd.Rows("late"),
        "top": rd.TopKey("late"),
    }
    within = {"back": rd.PairMass(rd.Offset(1))}
    asked = {t: readings if t == "cross" else readings | within for t in TOWERS}
    collectors = [Collector(model.towers[t], batch, asked[t]) for t in TOWERS]
    from contextlib import ExitStack

    with ExitStack() as stack:
        for c in collectors:
            stack.enter_context(model.observe(c, columns=c.columns))
        logits = model.forward(batch.inputs()).logits
    assert torch.equal(logits, bare)
    for collector in collectors:
        tower = collector.tower.name
        seen = batch.view(tower)
        queries = batch if seen is None else seen[0]
        keys = batch.view(KEYS)[0] if tower == "cross" else queries
        for name, answer in collector.answers().items():
            want = naive(asked[tower][name], full, tower, queries, keys, causal=tower == "text")
            same(answer.values.numpy(), want, rtol=5e-5, atol=1e-5)


def test_hidden_patches_are_seen_by_nobody():
    model = made()
    with _Split(False):
        prompt = image_prompt(model, TEXT, [noise(60, 44), noise(44, 60, 1)])
    batch = model.batch([prompt])
    assert all(view.span("unused") for view in prompt.views["vision"])
    spans = {name: rd.SpanMass(name) for name in ("unused", "image", "latent")}
    seen = read(model, batch, {x: spans[x] for x in ("unused", "image")}, tower="vision")
    assert (seen["unused"].values == 0).all()
    torch.testing.assert_close(seen["image"].values, torch.ones(1, 2, 2).double())
    seen = read(model, batch, spans, tower="cross")
    assert (seen["unused"].values == 0).all() and (seen["latent"].values > 0).all()
    total = seen["image"].values + seen["latent"].values
    torch.testing.assert_close(total, torch.ones(1, 2, 2).double())


def test_parts_are_averaged():
    model = made()
    prompt = image_prompt(model, "a cat ?", noise(60, 44))
    batch = model.batch([prompt])
    full = matrices(made("eager"), batch, TOWERS)
    found = read(model, batch, {"entropy": rd.Entropy()}, tower="cross")["entropy"].values
    queries, owners = batch.view("cross")
    keys = batch.view(KEYS)[0]
    assert owners == (0,) * 5
    want = naive(rd.Entropy(), full, "cross", queries, keys, causal=False)
    same(found.numpy(), want.mean(0, keepdims=True), rtol=5e-5, atol=1e-5)
    scores = score(model, "distance-profile", [replace(prompt, id="a")], tower="vision")
    assert np.isfinite(scores["distance-profile"].values).all()


@pytest.mark.parametrize("tower", ["vision", "cross"])
@pytest.mark.parametrize("sizes", [((48, 35), (35, 48)), ((48, 48), (48, 24))], ids=str)
def test_images_that_widen_each_other_are_not_read_in_one_batch(tower, sizes):
    """What is added beside a smaller image moves its patches to other places."""
    model = made()
    batch = model.batch(prompts_of(sizes))
    with pytest.raises(SiteError, match="the images make") as error:
        read(model, batch, {"entropy": rd.Entropy()}, tower=tower)
    assert "one size" in error.value.hint
    text = read(model, batch, {"entropy": rd.Entropy()}, tower="text")["entropy"]
    assert text.values.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_runs_as_its_prompts_alone(side):
    """Of other sizes and lengths, so that parts are padded further."""
    model = case().model
    prompts = [
        image_prompt(model, f"<image> {text}", kit.ramp(*size))
        for text, size in (("a cat", (61, 47)), ("what is this dog ?", (30, 90)))
    ]
    together = model.batch(prompts, side=side)
    found = model.forward(together.inputs()).logits
    for row, (prompt, offset) in enumerate(zip(prompts, together.offsets, strict=True)):
        alone = model.forward(model.batch([prompt]).inputs()).logits[0]
        assert torch.allclose(found[row, offset : offset + len(prompt)], alone, atol=1e-5)
