"""Llama 3.2 Vision: tiles in the vision tower and as keys of cross attention.

Maps are judged as in `test_images_maps`: by the colours of a ramp, and by what changes when pixels
change. Readings of all towers are judged against whole matrices of an eager copy.
"""

import copy
import functools
import random
import sys
from dataclasses import replace

import images_kit as kit
import numpy as np
import pytest
import torch
from PIL import Image
from reference import Whole, naive
from test_images_maps import SIZES, differs, grown, scrambled, surely, touching
from test_interp_towers import noise, same

from heads import score
from interp import load
from interp import readings as rd
from interp.engine import Collector, read
from interp.errors import InputError, SiteError
from interp.images import image_prompt, prompt_from_tensors
from interp.images.plane import Settings

TOWERS = ("text", "vision", "vision-global_transformer", "cross")
KEYS = "cross/keys"
TEXT = "<|image|> the cat <|image|> what is this ?"


@functools.cache
def case():
    return kit.mllama()


@functools.cache
def made(attn="sdpa", dtype=torch.float64):
    hf = copy.deepcopy(case().model.hf).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.normal_(std=0.4)
    hf.set_attn_implementation(attn)
    return load(hf, tokenizer=case().model.tokenizer, processor=case().model.processor)


# ----------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("size", [*SIZES, (24, 24), (150, 20), (20, 150), (5, 9)], ids=str)
def test_boxes_are_where_the_colours_come_from(size):
    width, height = size
    model = case().model
    prompt = image_prompt(model, TEXT, [kit.ramp(64, 48), kit.ramp(width, height)])
    settings = Settings.of(model.processor)
    mean, std = (np.array(settings(x)) for x in ("image_mean", "image_std"))
    (tiles,) = prompt.inputs["pixel_values"][:, 1].float().numpy()
    _, view = prompt.views["vision"]
    (keys,) = prompt.views[KEYS]
    checked = 0
    for patches, image_step in ((view.patches, 24), (keys.patches, 17)):
        for p in patches:
            if p.image == 0:
                continue
            # Where it stands in the row is told by its tile: each begins with a class token.
            at = p.position - (0 if image_step == 24 else 4 * 17)
            assert at == p.tile * image_step + 1 + 4 * p.row + p.column
            y, x = 6 * p.row, 6 * p.column
            part = tiles[p.tile][:, y : y + 6, x : x + 6].transpose(1, 2, 0) * std + mean
            inside = (part * 255).reshape(-1, 3)
            inside = inside[inside[:, 2] > 250]
            left, top, right, bottom = p.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            if len(inside) < 6:
                continue
            red, green = inside[:, 0].mean() / 255 * width, inside[:, 1].mean() / 255 * height
            assert abs(red - (left + right) / 2) < 1.0 and abs(green - (top + bottom) / 2) < 1.0, p
            checked += 1
    # Nothing of the image is missing: beside the patches lies padding alone.
    pixels = ((tiles.transpose(0, 2, 3, 1) * std + mean)[..., 2] > 0.98).sum()
    areas = {
        (p.tile, p.row, p.column) for p in view.patches
    }  # fmt: skip
    assert pixels <= 36 * len(areas) and checked >= 6
    corners = np.array([p.box for p in view.patches])
    assert (*corners[:, :2].min(0), *corners[:, 2:].max(0)) == pytest.approx((0, 0, width, height))


def test_tiles_are_counted_as_the_processor_does():
    rng = random.Random(0)
    sizes = [(rng.randint(3, 150), rng.randint(3, 150)) for _ in range(150)]
    shapes = set()
    for size in [*sizes, (24, 24), (48, 24), (24, 48), (48, 48), (96, 24), (97, 25), (12, 12)]:
        prompt = image_prompt(case().model, "a cat ?", Image.new("RGB", size, "red"))
        (view,) = prompt.views["vision"]
        shown = view.patches.boxes
        corners = (*shown[:, :2].min(0), *shown[:, 2:].max(0))
        assert corners == pytest.approx((0, 0, *size))
        # Where the processor wrote colour, and nowhere else, patches have pixels.
        pixels = prompt.inputs["pixel_values"][0, 0, :, 0]
        red = (pixels > 0.9 * pixels.max()).unflatten(1, (4, 6)).unflatten(3, (4, 6))
        full = red.sum((2, 4)) > 0
        found = torch.zeros(4, 4, 4, dtype=torch.bool)
        for p in view.patches:
            found[p.tile, p.row, p.column] = True
        assert torch.equal(found, full)
        shapes.add(tuple(prompt.inputs["aspect_ratio_ids"].flatten().tolist()))
    assert len(shapes) == 8


def test_what_changes_with_pixels_touches_them():
    model, hf = case().model, case().model.hf
    settings = Settings.of(model.processor)
    old = settings.image_processor.resample
    settings.image_processor.resample = Image.Resampling.NEAREST
    rng = random.Random(0)
    hits = 0
    try:
        for size in SIZES:
            images = [kit.ramp(*size), kit.ramp(64, 48)]
            before = image_prompt(model, TEXT, images)
            base = reached(model, hf, before)
            for trial in range(6):
                which = trial % 2
                wide, high = images[which].size
                left, top = rng.randrange(wide * 3 // 4), rng.randrange(high * 3 // 4)
                box = (
                    left, top, min(left + rng.randint(9, 24), wide),
                    min(top + rng.randint(9, 24), high),
                )  # fmt: skip
                changed = list(images)
                changed[which] = scrambled(images[which], box, trial)
                after = image_prompt(model, TEXT, changed)
                found = reached(model, hf, after)
                views = [*before.views["vision"], before.views[KEYS][0]]
                for view, b, a in zip(views, base, found, strict=True):
                    most = touching(view.patches, grown(box, 1, (wide, high)), which)
                    least = surely(view.patches, box, which, 6)
                    assert least <= differs(a, b) <= most, (size, box, which)
                    hits += len(least)
    finally:
        settings.image_processor.resample = old
    assert hits > 60


def reached(model, hf, prompt):
    """Inputs of the tower's first layer, one an image, and what cross attention reads."""
    tower, keys = [], []
    layer = hf.get_submodule("model.vision_model.transformer.layers.0")
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: tower.append(k["hidden_states"].detach()), with_kwargs=True
        ),
        hf.get_submodule("model.language_model").register_forward_pre_hook(
            lambda m, a, k: keys.append(k["cross_attention_states"].detach()), with_kwargs=True
        ),
    ]
    try:
        model.forward(model.batch([prompt]).inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return [*tower[0], keys[0].flatten(0, 1)]


def test_spans_name_tiles_boxes_and_what_fills_up():
    boxes = {"needle": (0, 0, 101, 30), "other": (1, (0, 0, 20, 10))}
    images = [kit.ramp(101, 67), kit.ramp(20, 60)]
    prompt = image_prompt(case().model, TEXT, images, boxes=boxes)
    assert prompt.span("image") == prompt.span("placeholder") == ((0, 1), (4, 5))
    assert prompt.span("image-1") == ((4, 5),) and prompt.patches.patches == ()
    (keys,) = prompt.views[KEYS]
    first, second = prompt.views["vision"]
    assert prompt.views["vision-global_transformer"] == (first, second)
    assert [len(x) for x in (first, second, keys)] == [96, 96, 136]
    assert first.positions("cls") == [0, 24, 48, 72]
    assert second.positions("cls") == [0, 24, 48]
    assert keys.positions("cls") == [0, 17, 34, 51, 68, 85, 102]
    assert keys.positions("unused") == list(range(119, 136))
    fill = [24 * t + 17 + i for t in range(4) for i in range(7)]
    assert first.positions("unused") == fill
    assert second.positions("unused") == [*fill[:21], *range(72, 96)]
    apart = {*keys.positions("cls"), *keys.positions("unused")}
    assert set(keys.positions("image")) == set(range(136)) - apart
    assert set(keys.positions("needle")) == set(keys.patches.touching(boxes["needle"]))
    assert {p.image for p in keys.patches if p.position in keys.positions("other")} == {1}
    assert set(keys.positions("padding")) == set(keys.positions("image")) - set(
        keys.patches.positions()
    )


def test_without_sizes_boxes_are_in_pixels_of_the_tiles():
    model = case().model
    made = image_prompt(model, "a cat ?", kit.ramp(101, 67))
    ids = torch.tensor([made.tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made.inputs}
    prompt = prompt_from_tensors(model, inputs)
    (view,) = prompt.views["vision"]
    assert view.patches.sizes == ((48, 48),)
    assert view.patches.patches[5].box == (6, 6, 12, 12)
    assert prompt_from_tensors(model, inputs, sizes=[(101, 67)]).views == made.views


def test_padded_tensors_of_one_prompt_lose_their_padding():
    model = case().model
    made = image_prompt(model, TEXT, [kit.ramp(30, 30)] * 2)
    pad = lambda x, value: torch.cat([torch.full((1, 3, *x.shape[2:]), value), x], 1)  # noqa: E731
    ids = torch.tensor([made.tokens])
    inputs = {
        **made.inputs, "input_ids": pad(ids, 3), "attention_mask": pad(torch.ones_like(ids), 0),
        "cross_attention_mask": pad(made.inputs["cross_attention_mask"], 0),
    }  # fmt: skip
    prompt = prompt_from_tensors(model, inputs)
    assert prompt.tokens == made.tokens
    assert torch.equal(prompt.inputs["cross_attention_mask"], made.inputs["cross_attention_mask"])


@pytest.mark.parametrize(
    "change, match",
    [
        ({"sizes": [(30, 200)]}, "makes 4 x 1 tiles; aspect_ratio_ids say 2 x 2"),
        ({"sizes": []}, "there is an image 0; got 0 sizes"),
        ({"pixel_values": torch.zeros(4, 3, 24, 24)}, r"must be \[1, image, tile, channel"),
        ({"aspect_ratio_ids": torch.tensor([[0]])}, "tell of 0 images; there are 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    model = case().model
    made = image_prompt(model, "a cat ?", kit.ramp(101, 67))
    ids = torch.tensor([made.tokens])
    sizes = change.pop("sizes", None) if "sizes" in change else [(101, 67)]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made.inputs, **change}
    with pytest.raises(InputError, match=match):
        prompt_from_tensors(model, inputs, sizes=sizes)


# ------------------------------------------------------------------------------- readings

EVERYWHERE = {
    "few": rd.SpanMass("needle"), "many": rd.SpanMass("wide"), "distance": rd.Distance(),
    "entropy": rd.Entropy(), "z": rd.ZNorm(), "v": rd.ValueNorm("needle"),
    "late": rd.SpanMass("needle", query="late"), "all": rd.SpanMass("all"),
}  # fmt: skip
LISTS = {"keys": rd.KeyMass(), "rows": rd.Rows("late"), "top": rd.TopKey("late")}
WITHIN = {"back": rd.PairMass(rd.Offset(1))}


def prompts_of(texts=("", "a cat ?")):
    """Two prompts of two images and different lengths, with spans on every side."""
    out = []
    for i, more in enumerate(texts):
        images = [noise(60, 44, i), noise(20, 90, i + 5)]
        out.append(marked(image_prompt(made(), TEXT + f" {more}", images, id=str(i))))
    return out


def spans(n):
    return {
        "needle": ((n // 2 - 1, n // 2 + 1),), "wide": ((1, n // 4 + 2), (n // 2, n - 1)),
        "late": ((n - 3, n - 1), (2, 4)),
    }  # fmt: skip


def marked(prompt):
    views = {
        name: tuple(replace(row, spans=spans(len(row))) for row in rows)
        for name, rows in prompt.views.items()
    }
    return replace(prompt, spans=spans(len(prompt)), views=views)


def wholes(batch, dtype=torch.float64):
    """Whole matrices of every tower from an eager copy."""
    return matrices(made("eager", dtype), batch, TOWERS)


@torch.no_grad()
def matrices(eager, batch, towers):
    """Whole matrices of towers, noted at the eager functions of the model's own files."""
    hf = copy.deepcopy(eager.hf)
    names = {m: n for n, m in hf.named_modules()}
    notes, undo = {}, []
    for file in {type(m).__module__ for m in hf.modules()}:
        scope = vars(sys.modules[file])
        if (own := scope.get("eager_attention_forward")) is None:
            continue

        def noted(module, q, k, v, *args, own=own, **kw):
            z, weights = own(module, q, k, v, *args, **kw)
            assert names[module] not in notes
            notes[names[module]] = (weights, v, z.reshape(*z.shape[:2], q.shape[1], -1))
            return z, weights

        scope["eager_attention_forward"] = noted
        undo.append((scope, own))
    try:
        hf(**batch.inputs())
    finally:
        for scope, own in undo:
            scope["eager_attention_forward"] = own
    return Whole(
        *(
            {t: [notes[x.name][i].numpy() for x in eager.towers[t].layers] for t in towers}
            for i in range(3)
        )
    )


def asked(tower):
    if tower == "cross":
        return EVERYWHERE | LISTS
    return EVERYWHERE | WITHIN | (LISTS if tower == "text" else {})


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_all_towers_are_read_in_one_run_each_in_its_own_geometry(attn):
    model = made(attn)
    batch = model.batch(prompts_of())
    assert batch.padded
    full = wholes(batch)
    bare = model.forward(batch.inputs()).logits
    collectors = {t: Collector(model.towers[t], batch, asked(t)) for t in TOWERS}
    from contextlib import ExitStack

    with ExitStack() as stack:
        for c in collectors.values():
            stack.enter_context(model.observe(c, columns=c.columns))
        logits = model.forward(batch.inputs()).logits
    assert torch.equal(logits, bare)
    for tower, collector in collectors.items():
        answers = collector.answers()
        alone = read(model, batch, asked(tower), tower=tower)
        seen = batch.view(tower)
        queries = batch if seen is None else seen[0]
        keys = batch.view(KEYS)[0] if tower == "cross" else queries
        for name, reading in asked(tower).items():
            want = naive(reading, full, tower, queries, keys, causal=tower == "text")
            if seen is not None:  # the mean over the images of a prompt
                want = want.reshape(2, 2, *want.shape[1:]).mean(1)
            found = answers[name].values
            # Eager functions take the softmax in float32.
            same(found.numpy(), want, rtol=5e-5, atol=1e-5)
            torch.testing.assert_close(alone[name].values, found, rtol=0, atol=0, equal_nan=True)
            assert answers[name].how == alone[name].how
    widths = {t: collectors[t].answers()["keys"].values.shape[-1] for t in ("text", "cross")}
    assert widths == {"text": 12, "cross": 136}


def test_a_word_looks_at_the_image_before_it_alone():
    """As the processor says: each image is shown to the text up to the next."""
    model = made()
    prompt = image_prompt(model, TEXT, [noise(60, 44, 1), noise(20, 60, 2)])
    found = read(
        model, model.batch([prompt]), {"rows": rd.Rows("all"), "image": rd.SpanMass("image")},
        tower="cross",
    )  # fmt: skip
    rows = found["rows"].values[0]
    (keys,) = prompt.views[KEYS]
    first, second = (keys.positions(f"image-{i}") for i in (0, 1))
    assert (rows[:, :, 1:4][..., second] == 0).all() and (rows[:, :, 1:4][..., first] > 0).any()
    assert (rows[:, :, 5:][..., first] == 0).all()
    assert (rows[:, :, 1:][..., keys.positions("unused")] == 0).all()
    want = rows[..., keys.positions("image")].sum(-1).mean(-1)
    torch.testing.assert_close(found["image"].values[0], want)


def test_relations_between_text_and_patches_are_refused():
    model = made()
    batch = model.batch(prompts_of())
    for reading in (rd.PairMass(rd.Offset(1)), rd.BinMass(rd.Rings())):
        with pytest.raises(SiteError, match="both the prompt's tokens"):
            read(model, batch, {"x": reading}, tower="cross")


def test_prompts_of_different_numbers_of_images_share_a_batch_of_text_and_keys():
    model = made(dtype=torch.float32)
    images = [noise(60, 44, 3), noise(20, 90, 4)]
    one = marked(image_prompt(model, "<|image|> a cat", images[:1], id="one"))
    two = marked(image_prompt(model, TEXT, images, id="two"))
    batch = model.batch([one, two])
    full = wholes(batch, torch.float32)
    keys = batch.view(KEYS)[0]
    found = read(model, batch, EVERYWHERE | LISTS, tower="cross")
    for name, reading in (EVERYWHERE | LISTS).items():
        want = naive(reading, full, "cross", batch, keys, causal=False)
        same(found[name].values.numpy(), want, rtol=5e-5, atol=1e-5)
    with pytest.raises(SiteError, match="attends in 4 groups, not once per example"):
        read(model, batch, {"entropy": rd.Entropy()}, tower="vision")


def test_detectors_score_every_tower():
    model = made()
    prompts = [replace(p, spans=image_prompt_spans(p)) for p in prompts_of()]
    for tower in ("vision", "vision-global_transformer"):
        scores = score(model, "distance-profile", prompts, tower=tower)["distance-profile"]
        assert np.isfinite(scores.values).all()


def image_prompt_spans(prompt):
    return {**prompt.spans, "image": ((0, 1),)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_runs_as_its_prompts_alone(side):
    """Of other sizes and lengths, so of other numbers of tiles."""
    model = made()  # whose gates are open
    prompts = [
        image_prompt(model, f"<|image|> {text}", kit.ramp(*size))
        for text, size in (("a cat", (61, 47)), ("what is this dog ?", (30, 90)))
    ]
    together = model.batch(prompts, side=side)
    found = model.forward(together.inputs()).logits
    for row, (prompt, at) in enumerate(zip(prompts, together.offsets, strict=True)):
        alone = model.forward(model.batch([prompt]).inputs()).logits[0]
        assert torch.allclose(found[row, at : at + len(prompt)], alone, atol=1e-5)
