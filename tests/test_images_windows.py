"""Swin's windows put back on the image, against the models' own code.

The reference fills a grid with the numbers of its positions and lets the layer's own functions pad,
move and cut it; the weights that an eager copy returns are then written where these numbers say,
one by one, into an empty matrix over the stage's grid. Boxes are judged by what changes when
pixels change, stage by stage, in models whose attention adds nothing.
"""

import copy
import functools
import itertools
import random
import sys
from dataclasses import replace

import images_kit as kit
import numpy as np
import pytest
import torch
from PIL import Image
from reference import Whole, naive, registered
from test_images_maps import scrambled
from test_interp_towers import READINGS, _Largest, binned, by_name, noise, same

from heads import score
from interp import load
from interp import readings as rd
from interp.engine import Collector, read
from interp.errors import InputError, SiteError
from interp.images import PatchMap, image_prompt, prompt_from_tensors
from interp.images.patches import Windows
from interp.images.plane import Settings
from interp.kernels.places import index_of
from interp.prompts import Batch, Prompt

TOWER = "vision"
NAMES = ("swin", "swinv2")
# Height and width of pixel_values: the grid is not square, and the last patches are cut off.
SHAPES = ((56, 56), (58, 71), (80, 96), (96, 49))


@functools.cache
def made(name, attn="sdpa", dtype=torch.float64):
    case = kit.case(name)
    hf = copy.deepcopy(case.model.hf).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.5)
            elif "bias" in key:
                weight.normal_(std=0.3)  # what stands at padding
    if name == "swin":
        hf.set_attn_implementation(attn)
    model = load(hf, processor=case.model.processor)
    assert len(model.towers) == 1  # it has been run, after which some layers of Swin move no more
    return model


def tensors(model, shape, seed=0, id=""):
    gen = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, *shape, generator=gen).to(model.dtype)
    return marked(prompt_from_tensors(model, {"pixel_values": pixels}, id=id))


def marked(prompt):
    """The prompt with spans on its views, all over the grid, and tokens of which some are equal."""
    views, done = {}, {}
    for name, (view,) in prompt.views.items():
        if id(view) not in done:
            n = len(view)
            rng = random.Random(n)
            tokens = [rng.randrange(6) for _ in range(n)]
            tokens[n // 3] = 99
            spans = {
                "needle": ((n // 2 - 1, n // 2 + 1),),
                "wide": ((1, n // 4), (n // 3, n - 2)),
                "late": ((n - 5, n - 1), (n // 4, n // 4 + 3), (n // 2, n // 2 + 2)),
                "unlike": ((n // 3, n // 3 + 1),),
            }
            done[id(view)] = (replace(view, tokens=tuple(tokens), spans=spans),)
        views[name] = done[id(view)]
    return replace(prompt, views=views)


# ------------------------------------------------------------------------- the reference


def cut(block, grid, name):
    """Position + 1 at each place of each window, 0 at padding, by the layer's own functions."""
    high, wide = grid
    x = torch.arange(1.0, high * wide + 1).view(1, high, wide, 1)
    if name == "swin":
        block = copy.copy(block)
        block.set_shift_and_window_size(grid)
    x, _ = block.maybe_pad(x, high, wide)
    by = (-block.shift_size, -block.shift_size)
    x = torch.roll(x, by, (1, 2)) if block.shift_size else x
    parts = sys.modules[type(block).__module__].window_partition(x, block.window_size)
    return parts.long().view(len(parts), -1)


def grid_of(shape, stage):
    high, wide = (-(-n // 4) for n in shape)
    for _ in range(stage):
        high, wide = (high + 1) // 2, (wide + 1) // 2
    return high, wide


@torch.no_grad()
def matrices(name, prompt):
    """For each layer pattern [head, n, n], mass on padding [head, n], v and z over its grid."""
    model = made(name, "eager") if name == "swin" else made(name)
    hf = copy.deepcopy(model.hf)
    pixels = prompt.inputs["pixel_values"]
    out = []
    notes = {}

    def note(key, value):
        notes.setdefault(key, []).append(value)

    hooks = []
    for _, block in blocks_of(hf):
        inner = block.attention if name == "swin" else block.attention.self
        v = inner.v_proj if name == "swin" else inner.value
        last = inner.o_proj if name == "swin" else block.attention.output.dense
        key = id(block)
        if name == "swinv2":
            hooks.append(
                inner.register_forward_pre_hook(
                    lambda m, a, k: ((*a[:2], True), {}) if len(a) > 1 else None,
                    with_kwargs=True,
                )
            )
        hooks.append(inner.register_forward_hook(lambda m, a, o, k=key: note((k, "p"), o[1])))
        hooks.append(v.register_forward_hook(lambda m, a, o, k=key: note((k, "v"), o)))
        hooks.append(last.register_forward_pre_hook(lambda m, a, k=key: note((k, "z"), a[0])))
    hf(pixels)
    for stage, block in blocks_of(hf):
        grid = grid_of(pixels.shape[-2:], stage)
        n = grid[0] * grid[1]
        places = cut(block, grid, name).tolist()
        (weights,), (v,), (z,) = (notes[id(block), x] for x in "pvz")
        heads = weights.shape[1]
        p, lost = np.zeros((heads, n, n)), np.zeros((heads, n))
        vs, zs = np.zeros((heads, n, v.shape[-1] // heads)), np.zeros((n, heads, 8))
        for w, window in enumerate(places):
            for a, i in enumerate(window):
                if i == 0:
                    continue
                vs[:, i - 1] = v[w, a].view(heads, -1)
                zs[i - 1] = z[w, a].view(heads, -1)
                for b, j in enumerate(window):
                    if j:
                        p[:, i - 1, j - 1] = weights[w, :, a, b]
                    else:
                        lost[:, i - 1] += weights[w, :, a, b].numpy()
        out.append((p, lost, vs, zs))
    return out


def blocks_of(hf):
    inner = getattr(hf, hf.base_model_prefix)
    return [(s, b) for s, stage in enumerate(inner.encoder.layers) for b in stage.blocks]


def by_layer(name, prompts, layer):
    """Whole matrices of one layer, and its view of the prompts."""
    found = [matrices(name, p)[layer] for p in prompts]
    full = Whole(*({TOWER: [np.stack([x[i] for x in found])]} for i in (0, 2, 3)))
    return full, Batch.of([p.views[f"{TOWER}/{layer}"][0] for p in prompts])


# ------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_windows_are_cut_as_the_layers_cut_them(name, shape):
    model = made(name)
    prompt = tensors(model, shape)
    padded = 0
    for i, (stage, block) in enumerate(blocks_of(copy.deepcopy(model.hf))):
        (view,) = prompt.views[f"{TOWER}/{i}"]
        grid = grid_of(shape, stage)
        assert len(view) == grid[0] * grid[1]
        places = cut(block, grid, name) - 1
        assert torch.tensor(view.patches.windows.places).equal(places)
        padded += int((places < 0).sum())
    assert padded > 0
    assert prompt.views[TOWER][0].patches.grids() == {(0, None, 0): grid_of(shape, 0)}


# ------------------------------------------------------------------------------ readings


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "name, attn", [("swin", "sdpa"), ("swin", "eager"), ("swin", "opaque"), ("swinv2", "")]
)
def test_every_reading_is_that_of_the_whole_matrix(name, attn, shape):
    """A square of the size in the configuration also has a stage of a single window."""
    with registered("opaque", by_name, "eager"):
        agrees(name, attn, shape)


def agrees(name, attn, shape):
    model = made(name, attn or "sdpa")
    prompts = [tensors(model, shape, seed, f"p{seed}") for seed in (1, 2)]
    readings = dict(READINGS)
    if name == "swinv2":  # whose values are not reached
        readings = {k: v for k, v in readings.items() if not isinstance(v, rd.ValueNorm)}
    bins = {"rings": rd.BinMass(rd.Rings()), "cells": rd.BinMass(rd.Rings(), "late", per="entry")}
    found = read(model, model.batch(prompts), readings | bins, tower=TOWER)
    moved = lost = 0
    for layer in range(6):
        full, seen = by_layer(name, prompts, layer)
        heads = full.patterns[TOWER][0].shape[1]
        wanted = {k: naive(r, full, TOWER, seen, seen, causal=False) for k, r in readings.items()}
        wanted |= {k: binned(r, full.patterns[TOWER], seen) for k, r in bins.items()}
        for key, want in wanted.items():
            values = found[key].values[:, layer].numpy()
            inner = (slice(None), slice(heads), *(slice(n) for n in want.shape[3:]))
            # Swin takes the softmax of its eager function in float32.
            same(values[inner], want[:, 0], rtol=5e-5, atol=2e-5)
            rest = values.copy()
            rest[inner] = np.nan
            assert np.isnan(rest).all(), key
        moved += seen.prompts[0].patches.windows.shift > 0
        lost += sum(matrices(name, p)[layer][1].max() > 1e-3 for p in prompts)
    assert moved and lost
    assert set(found["rows"].how) <= {"sweep", "pattern", "pattern+sweep"}


@pytest.mark.parametrize("name", NAMES)
def test_mass_on_padding_is_what_rows_lack(name):
    model = made(name)
    prompt = tensors(model, (58, 71))
    found = read(model, model.batch([prompt]), {"rows": rd.Rows("all")}, tower=TOWER)["rows"]
    for layer, (p, lost, _, _) in enumerate(matrices(name, prompt)):
        rows = found.values[0, layer, : len(p), : p.shape[1], : p.shape[1]].numpy()
        np.testing.assert_allclose(rows.sum(-1) + lost, 1, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_borders_that_a_moved_window_joins_do_not_see_each_other(name):
    """Patches far apart on the image share a window once it is moved; the mask parts them."""
    model = made(name)
    prompt = tensors(model, (64, 96))
    found = read(model, model.batch([prompt]), {"rows": rd.Rows("all")}, tower=TOWER)["rows"]
    (view,) = prompt.views[f"{TOWER}/1"]
    places = {p.position: (p.row, p.column) for p in view.patches}
    joined = 0
    for window in view.patches.windows.places:
        for i, j in itertools.permutations([x for x in window if x >= 0], 2):
            far = max(abs(a - b) for a, b in zip(places[i], places[j], strict=True))
            if far >= 4:
                joined += 1
                assert found.values[0, 1, 0, i, j] < 1e-30
    assert joined > 100


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_those_of_the_same_rows(name):
    model = made(name)
    prompts = [tensors(model, (58, 71), seed) for seed in (3, 4)]
    readings = {"keys": rd.KeyMass(sample=14), "entropy": rd.Entropy(sample=14)}
    found = read(model, model.batch(prompts), readings, tower=TOWER)
    from interp.kernels.plan import Side, compile_plan

    parted = 0
    for layer in range(4):  # the last stage has no more rows than are sampled
        full, seen = by_layer(name, prompts, layer)
        (group,) = compile_plan(readings, Side(seen), Side(seen), causal=False).groups
        for b, pattern in enumerate(full.patterns[TOWER][0]):
            rows, w, c = (x[b].numpy() for x in (group.rows, group.weights, group.spread))
            p = pattern[:, rows]
            logs = np.log(p, out=np.zeros_like(p), where=p > 0)
            per_row = {"keys": p.transpose(0, 2, 1), "entropy": -(p * logs).sum(-1)[:, None]}
            for key, x in per_row.items():
                n = x.shape[1]
                shape = (len(p), -1)
                value = found[key].values[b, layer, : len(p)].reshape(shape)[:, :n].numpy()
                se = found[key].se[b, layer, : len(p)].reshape(shape)[:, :n].numpy()
                same(value, x @ w, rtol=5e-5, atol=2e-5)
                same(se, np.sqrt((x[..., ::2] - x[..., 1::2]) ** 2 @ c), rtol=5e-5, atol=2e-5)
            parted += sum((p[0, i] * p[0, i + 1]).max() < 1e-12 for i in range(0, 14, 2))
    assert parted


@pytest.mark.parametrize("name", NAMES)
def test_logits_keep_every_bit(name):
    model = made(name, dtype=torch.float32)
    batch = model.batch([tensors(model, (58, 71), seed) for seed in (1, 2)])
    inputs = {"pixel_values": batch.extra["pixel_values"]}
    bare = model.forward(inputs).logits
    collector = Collector(model.towers[TOWER], batch, {"all": rd.Entropy(), "at": rd.ZNorm()})
    with model.observe(collector, columns=collector.columns):
        logits = model.forward(inputs).logits
    assert torch.equal(logits, bare)
    assert collector.answers()["all"].values.isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_detectors_score_such_a_tower(name):
    model = made(name)
    images = [noise(60, 44, 1), noise(50, 70, 2)]
    prompts = [image_prompt(model, None, x, id=str(i)) for i, x in enumerate(images)]
    scores = score(model, "distance-profile", prompts, tower=TOWER)["distance-profile"]
    for layer in range(6):
        full, seen = by_layer(name, prompts, layer)
        parts = binned(rd.BinMass(rd.Rings()), full.patterns[TOWER], seen)
        near = np.nansum(parts[..., :2], axis=-1).mean(0)[0]
        heads = model.towers[TOWER].heads
        values = [v for h, v in zip(heads, scores.values, strict=True) if h.layer == layer]
        np.testing.assert_allclose(values, near, rtol=1e-4)


def test_windows_are_read_without_a_matrix_over_the_grid():
    model = made("swin", dtype=torch.float32)
    batch = model.batch([tensors(model, (256, 256))])
    n = 64 * 64
    readings = {
        "entropy": rd.Entropy(), "keys": rd.KeyMass(), "back": rd.PairMass(rd.Offset(1)),
        "few": rd.SpanMass("needle"), "top": rd.TopKey("all"), "v": rd.ValueNorm(),
    }  # fmt: skip
    collector = Collector(model.towers[TOWER], batch, readings)
    with _Largest() as largest, model.observe(collector):
        model.forward({"pixel_values": batch.extra["pixel_values"]})
    assert n < largest.elements < 128 * n
    assert collector.answers()["keys"].values.shape[-1] == n


# --------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("name", NAMES)
def test_what_changes_in_each_stage_touches_the_pixels(name):
    """Attention adds nothing, so that a merged patch hears of its own pixels alone."""
    case = kit.case(name)
    hf = copy.deepcopy(case.model.hf)
    with torch.no_grad():
        for key, value in hf.named_parameters():
            if "o_proj" in key or "attention.output.dense" in key:
                value.zero_()
            if name == "swinv2" and "layernorm_before" in key:  # which comes after attention
                value.zero_()
    model = load(hf, processor=case.model.processor)
    settings = Settings.of(model.processor)
    old = settings.image_processor.resample
    settings.image_processor.resample = Image.Resampling.NEAREST
    rng = random.Random(name)
    stages = getattr(hf, hf.base_model_prefix).encoder.layers
    hits = 0
    try:
        for size in ((101, 67), (53, 131)):
            image = kit.ramp(*size)
            before = image_prompt(model, None, image)
            base = inputs_of(stages, model, before)
            for trial in range(6):
                left, top = (rng.randrange(n * 3 // 4) for n in size)
                right, bottom = (
                    min(a + rng.randint(9, 24), n) for a, n in zip((left, top), size, strict=True)
                )
                box = (left, top, right, bottom)
                after = image_prompt(model, None, scrambled(image, box, trial), boxes={"b": box})
                found = inputs_of(stages, model, after)
                for stage, layer in enumerate((0, 2, 4)):
                    (view,) = after.views[f"{TOWER}/{layer}"]
                    gap = (base[stage] - found[stage]).abs().amax(-1)[0]
                    changed = set((gap > 1e-6).nonzero().flatten().tolist())
                    by = max(size) / 56 + 1e-6  # a pixel of the tower may be one beside
                    wide = (
                        max(left - by, 0), max(top - by, 0), min(right + by, size[0]),
                        min(bottom + by, size[1]),
                    )  # fmt: skip
                    inside = (left + by, top + by, right - by, bottom - by)
                    least = set()
                    if inside[0] < inside[2] and inside[1] < inside[3]:
                        least = set(view.patches.touching(inside))
                    assert least <= changed <= set(view.patches.touching(wide))
                    assert set(view.positions("b")) == set(view.patches.touching(box))
                    hits += len(least)
    finally:
        settings.image_processor.resample = old
    assert hits > 60


def inputs_of(stages, model, prompt):
    seen = []
    hooks = [
        stage.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach())) for stage in stages
    ]
    try:
        model.forward({"pixel_values": prompt.inputs["pixel_values"]})
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_covers_the_image(name):
    model = made(name)
    prompt = image_prompt(model, None, noise(101, 67))
    for layer, side in enumerate((14, 14, 7, 7, 4, 4)):
        (view,) = prompt.views[f"{TOWER}/{layer}"]
        assert view.patches.grids() == {(0, None, 0): (side, side)}
        total = np.zeros((67, 101))
        for left, top, right, bottom in view.patches.boxes:
            ys, xs = np.arange(67) + 0.5, np.arange(101) + 0.5
            total += ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))
        assert (total == 1).all()


# ------------------------------------------------------------------------------ refusals


def test_windows_must_hold_every_position_once():
    Windows(((0, 1), (2, -1)))
    for wrong in (((0, 1), (1, -1)), ((0, 1), (2,)), ((0, 3), (2, -1))):
        with pytest.raises(InputError, match="hold every position once"):
            Windows(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_windows_that_are_not_those_of_the_images_are_refused(name):
    model = made(name)
    prompt = tensors(model, (64, 96))
    other = tensors(model, (96, 64), 1)
    wrong = replace(other, inputs={"pixel_values": torch.randn(1, 3, 64, 64).to(model.dtype)})
    with pytest.raises(SiteError, match=r"attends in 16 windows of 16 places; the images make 24"):
        read(model, model.batch([wrong]), {"entropy": rd.Entropy()}, tower=TOWER)
    assert len(prompt.views[TOWER][0]) == 384


def test_a_model_that_no_longer_moves_its_windows_is_refused():
    """Once its grid was no larger than a window, a layer of Swin moves windows no more."""
    fine = made("swin")
    model = load(copy.deepcopy(fine.hf), processor=fine.processor)
    prompt = tensors(model, (64, 64))
    read(model, model.batch([prompt]), {"entropy": rd.Entropy()}, tower=TOWER)
    blocks_of(model.hf)[1][1].set_shift_and_window_size((4, 4))
    with pytest.raises(SiteError, match="does not move its windows"):
        read(model, model.batch([prompt]), {"entropy": rd.Entropy()}, tower=TOWER)


def test_places_are_a_slice_only_where_each_follows_the_last():
    assert index_of(torch.tensor([3, 4, 5])) == slice(3, 6)
    assert index_of(torch.tensor([7])) == slice(7, 8)
    for apart in ([0, 2, 1, 3], [1, 0], [0, 2], []):
        places = torch.tensor(apart, dtype=torch.long)
        assert index_of(places) is places


def test_a_prompt_without_views_is_refused():
    model = made("swin")
    prompt = tensors(model, (64, 64))
    bare = Prompt(prompt.tokens, inputs=prompt.inputs)
    with pytest.raises(SiteError, match="attends in 16 groups, not once per example"):
        read(model, model.batch([bare]), {"entropy": rd.Entropy()}, tower=TOWER)


def test_moved_patches_keep_their_windows():
    patches = tensors(made("swin"), (64, 64)).views["vision/1"][0].patches
    assert isinstance(patches, PatchMap) and patches.windows.shift == 2
