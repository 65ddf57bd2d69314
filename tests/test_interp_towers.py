"""Vision towers that run all images as one sequence, against whole matrices put together by hand.

The reference runs an eager copy on each prompt alone, notes the weights of every attention call at
the eager function of the model's own file, and puts them on the diagonal of an empty matrix over
all positions of the prompt's images. Readings are then loops over that matrix.
"""

import copy
import functools
import itertools
import math
import random
import sys
from dataclasses import replace

import images_kit as kit
import numpy as np
import pytest
import torch
from PIL import Image
from reference import Whole, fused, naive, opaque, registered
from torch.utils._python_dispatch import TorchDispatchMode

from heads import score
from interp import load
from interp import readings as rd
from interp.engine import Collector, read, read_rows
from interp.errors import SiteError
from interp.images import image_prompt, prompt_from_tensors
from interp.kernels.plan import Side, compile_plan
from interp.prompts import Batch, Prompt
from interp.seam.calls import AttnCall
from interp.seam.interface import describe
from interp.seam.kernel import KernelTap

TOWER = "vision"
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_pixtral", "mistral3")
FAMILIES = (*PACKED, "llava")

READINGS = {
    "back": rd.PairMass(rd.Offset(1)),
    "far": rd.PairMass(rd.Offset(9), query="late"),
    "ahead": rd.PairMass(rd.Offset(-2)),
    "copies": rd.PairMass(rd.Same()),
    "entries": rd.PairMass(rd.Same(1), per="entry"),
    "none": rd.PairMass(rd.Same(), query="unlike"),
    "few": rd.SpanMass("needle"),
    "few-late": rd.SpanMass("needle", query="late"),
    "many": rd.SpanMass("wide"),
    "many-late": rd.SpanMass("wide", query="late"),
    "everything": rd.SpanMass("all"),
    "distance": rd.Distance(),
    "distance-late": rd.Distance(query="late"),
    "entropy": rd.Entropy(),
    "entropy-late": rd.Entropy(query="late"),
    "keys": rd.KeyMass(),
    "keys-late": rd.KeyMass(query="late"),
    "top": rd.TopKey("late"),
    "top-all": rd.TopKey("all"),
    "rows": rd.Rows("late"),
    "z": rd.ZNorm(),
    "z-late": rd.ZNorm(query="late"),
    "z-rows": rd.ZValue("late"),
    "v": rd.ValueNorm("needle"),
    "v-all": rd.ValueNorm(),
}
BINS = {"rings": rd.BinMass(rd.Rings()), "cells": rd.BinMass(rd.Rings(), "late", per="entry")}


@functools.cache
def made(name, attn="sdpa", dtype=torch.float64):
    """A model whose patterns are far from even, and whose layers build on each other."""
    case = kit.case(name)
    hf = copy.deepcopy(case.model.hf).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.3)
    hf.set_attn_implementation(attn)
    return load(hf, tokenizer=case.model.tokenizer, processor=case.model.processor)


def by_name(module, q, k, v, attention_mask=None, **kwargs):
    """`opaque`, whose mask may be given by name."""
    return opaque(module, q, k, v, attention_mask, **kwargs)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def marked(prompt):
    """The prompt with spans on its views, across whatever pieces there are, and equal tokens."""
    rows = []
    for view in prompt.views[TOWER]:
        n = len(view)
        rng = random.Random(n)
        unlike = n // 3
        tokens = [rng.randrange(6) for _ in range(n)]
        tokens[unlike] = 99
        spans = {  # without `image`, whose tokens are never the same
            "needle": ((n // 2 - 1, n // 2 + 1),),
            "wide": ((1, n // 4), (n // 3, n - 2)),
            "late": ((n - 5, n - 1), (n // 4, n // 4 + 3), (n // 2, n // 2 + 2)),
            "unlike": ((unlike, unlike + 1),),
        }
        rows.append(replace(view, tokens=tuple(tokens), spans=spans))
    return replace(prompt, views={TOWER: tuple(rows)})


def prompt(name, *images, id="", model=None):
    model = made(name) if model is None else model
    text = "".join(f"{kit.case(name).mark} the cat " for _ in images)
    return marked(image_prompt(model, f"{text}what is this ?", list(images), id=id))


def of_different_sizes(name):
    """Two images in one prompt where a row holds both, then a larger and a smaller one."""
    first = [noise(60, 44, 1), noise(40, 52, 2)] if name in PACKED else [noise(60, 44, 1)]
    return [
        prompt(name, *first, id="two"), prompt(name, noise(88, 50, 3), id="large"),
        prompt(name, noise(42, 40, 4), id="small"),
    ]  # fmt: skip


# ------------------------------------------------------------------------- the reference


@torch.no_grad()
def calls_of(model, prompts):
    """(weights, v, z) of every call of each layer of the tower, from an eager copy."""
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    names = {m: n for n, m in hf.named_modules()}
    notes, undo = {}, []
    for file in {type(m).__module__ for m in hf.modules()}:
        scope = vars(sys.modules[file])
        if (own := scope.get("eager_attention_forward")) is None:
            continue

        def noted(module, q, k, v, *args, own=own, **kw):
            z, weights = own(module, q, k, v, *args, **kw)
            notes.setdefault(names[module], []).append((weights, v, z))
            return z, weights

        scope["eager_attention_forward"] = noted
        undo.append((scope, own))
    try:
        hf(**model.batch(prompts).inputs())
    finally:
        for scope, own in undo:
            scope["eager_attention_forward"] = own
    return [notes[layer.name] for layer in model.towers[TOWER].layers]


def reference(model, prompts):
    """Whole matrices of every row of the tower, each prompt run by itself."""
    rows = [[] for _ in model.towers[TOWER].layers]
    for one in prompts:
        lengths = [len(view) for view in one.views[TOWER]]
        for layer, calls in enumerate(calls_of(model, [one])):
            total = sum(w.shape[0] * w.shape[-1] for w, _, _ in calls)
            assert total == sum(lengths)
            heads = calls[0][0].shape[1]
            p = np.zeros((heads, total, total))
            v = np.zeros((heads, total, calls[0][1].shape[-1]))
            z = np.zeros((total, heads, calls[0][1].shape[-1]))
            at = 0
            for weights, values, outputs in calls:
                for w, x, y in zip(weights, values, outputs, strict=True):
                    to = slice(at, at + w.shape[-1])
                    p[:, to, to], v[:, to], z[to] = w, x, y.reshape(w.shape[-1], heads, -1)
                    at = to.stop
            at = 0
            for n in lengths:
                to = slice(at, at + n)
                assert not p[:, to, : to.start].any() and not p[:, to, to.stop :].any()
                rows[layer].append((p[:, to, to], v[:, to], z[to]))
                at = to.stop
    return rows


def padded(rows):
    """The rows of each layer as arrays of one width."""

    def stacked(parts, axes):
        width = max(x.shape[axes[0]] for x in parts)
        out = []
        for x in parts:
            by = [(0, width - n if i in axes else 0) for i, n in enumerate(x.shape)]
            out.append(np.pad(x, by))
        return np.stack(out)

    axes = ((1, 2), (1,), (0,))
    parts = [[stacked([row[i] for row in layer], axes[i]) for layer in rows] for i in range(3)]
    return Whole(*({TOWER: x} for x in parts))


def expected(model, prompts):
    """Every reading by loops, over rows of the tower."""
    seen, _ = model.batch(prompts).view(TOWER)
    matrices = reference(model, prompts)
    full = padded(matrices)
    out = {
        name: naive(reading, full, TOWER, seen, seen, causal=False)
        for name, reading in READINGS.items()
    }
    for name, reading in BINS.items():
        out[name] = binned(reading, full.patterns[TOWER], seen)
    return out


def binned(reading, patterns, seen):
    """Mass by distance on the grid, patch by patch."""
    values = {}
    for b, view in enumerate(seen.prompts):
        patches = {p.position: p for p in view.patches}
        span = view.positions(reading.query)
        for layer, pattern in enumerate(patterns):
            for head in range(pattern.shape[1]):
                mass, count = {}, {}
                asked = 0
                for i in span:
                    if (p := patches.get(i)) is None:
                        continue
                    asked += 1
                    own = {}
                    for j, q in patches.items():
                        if (p.image, p.tile, p.frame) == (q.image, q.tile, q.frame):
                            ring = max(abs(p.row - q.row), abs(p.column - q.column))
                            own.setdefault(ring, []).append(pattern[b, head, i, j])
                    for ring, x in own.items():
                        at = b, layer, head, ring
                        value = np.mean(x) if reading.per == "entry" else np.sum(x)
                        mass[at] = mass.get(at, 0) + value
                        count[at] = count.get(at, 0) + 1
                for at, total in mass.items():
                    values[at] = total / (count[at] if reading.per == "entry" else asked)
    shape = [max(at[i] for at in values) + 1 for i in range(4)]
    out = np.full(shape, np.nan)
    for at, value in values.items():
        out[at] = value
    return out


def same(found, wanted, *, rtol=1e-5, atol=1e-6):
    """Equal values; NaN, also beyond the last of an example, in the same places.

    Eager functions take the softmax in float32, whatever the model's dtype.
    """
    assert found.shape == wanted.shape
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def agree(found, wanted):
    for name, value in wanted.items():
        same(found[name].values.numpy(), value)


# ----------------------------------------------------------------------------- readings


@pytest.mark.parametrize("attn", ["sdpa", "eager", "opaque"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_reading_is_that_of_the_whole_matrix(name, attn):
    model, prompts = made(name), of_different_sizes(name)
    with registered("opaque", by_name, "eager"):
        other = made(name, attn)
        found = read(other, other.batch(prompts), READINGS | BINS, tower=TOWER)
    agree(found, expected(model, prompts))
    how = {"sdpa": "gather", "eager": "pattern", "opaque": "sweep"}[attn]
    assert set(found["few"].how) == set(found["back"].how) == {how}
    assert found["z"].how == ("z", "z") and found["entropy"].exact
    assert np.isnan(found["none"].values.numpy()).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_alone_is_as_in_a_batch(name):
    model, prompts = made(name), of_different_sizes(name)
    whole = read(model, model.batch(prompts), READINGS | BINS, tower=TOWER)
    for i, one in enumerate(prompts):
        alone = read(model, model.batch([one]), READINGS | BINS, tower=TOWER)
        for key, answer in alone.items():
            value = answer.values[0]
            within = whole[key].values[i][tuple(slice(n) for n in value.shape)]
            same(within.numpy(), value.numpy(), rtol=1e-9, atol=1e-12)


def test_keys_of_other_windows_have_no_mass_at_all():
    model = made("qwen2_5_vl")
    one = prompt("qwen2_5_vl", noise(88, 50))
    (windows, full) = reference(model, [one])
    found = read(model, model.batch([one]), {"rows": rd.Rows("all")}, tower=TOWER)["rows"].values
    outside = windows[0][0] == 0
    assert outside.mean() > 0.5 and (full[0][0] > 0).all()
    assert (found[0, 0].numpy() == 0).tolist() == outside.tolist()
    assert (found[0, 1] > 0).all()


def test_a_window_is_a_square_of_the_image():
    """What a patch sees are the patches of its own square of 36 pixels, wherever it stands."""
    model = made("qwen2_5_vl")
    one = prompt("qwen2_5_vl", noise(96, 60))
    found = read(model, model.batch([one]), {"rows": rd.Rows("all")}, tower=TOWER)["rows"].values
    places = {p.position: (p.row // 6, p.column // 6) for p in one.views[TOWER][0].patches}
    assert len(set(places.values())) > 4
    for i, row in enumerate(found[0, 0, 0]):
        seen = set(row.nonzero().flatten().tolist())
        assert seen == {j for j, place in places.items() if place == places[i]}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "llava_pixtral"])
def test_estimates_are_those_of_the_same_rows_of_the_whole_matrix(name):
    model, prompts = made(name), of_different_sizes(name)
    readings = {
        "keys": rd.KeyMass(sample=14), "entropy": rd.Entropy(sample=14),
        "far": rd.Distance(sample=14), "wide": rd.SpanMass("wide", sample=14),
    }  # fmt: skip
    batch = model.batch(prompts)
    found = read(model, batch, readings, tower=TOWER)
    seen, _ = batch.view(TOWER)
    (group,) = compile_plan(readings, Side(seen), Side(seen), causal=False).groups
    patterns = padded(reference(model, prompts)).patterns[TOWER]
    halved = 0
    for layer, pattern in enumerate(patterns):
        for b, view in enumerate(seen.prompts):
            rows, w, c = (x[b].numpy() for x in (group.rows, group.weights, group.spread))
            assert len(rows) == 14 < len(view)
            p = pattern[b][:, rows]
            logs = np.log(p, out=np.zeros_like(p), where=p > 0)
            per_row = {
                "keys": p.transpose(0, 2, 1)[:, : len(view)],
                "entropy": -(p * logs).sum(-1)[:, None],
                "far": (p * (rows[:, None] - np.arange(p.shape[-1]))).sum(-1)[:, None],
                "wide": p[..., view.positions("wide")].sum(-1)[:, None],
            }
            for key, x in per_row.items():
                answer = found[key]
                n = x.shape[1]
                value = answer.values[b, layer].reshape(len(p), -1)[:, :n].numpy()
                se = answer.se[b, layer].reshape(len(p), -1)[:, :n].numpy()
                assert not answer.exact and set(answer.how) == {"sampled"}
                same(value, x @ w)
                error = np.sqrt((x[..., ::2] - x[..., 1::2]) ** 2 @ c)
                same(se, error)
            seen_by = pattern[b, 0][rows] > 0
            halved += sum((seen_by[i] & ~seen_by[i + 1]).any() for i in range(0, 14, 2))
    assert name == "llava_pixtral" or halved > 0  # some pairs of rows lie in two pieces


def test_a_sample_of_all_rows_is_no_estimate():
    """Nine rows, so that the last has no partner."""
    model, prompts = made("qwen2_5_vl"), of_different_sizes("qwen2_5_vl")
    readings = {"keys": rd.KeyMass("late", sample=10), "exact": rd.KeyMass("late")}
    found = read(model, model.batch(prompts), readings, tower=TOWER)
    same(found["keys"].values.numpy(), found["exact"].values.numpy(), rtol=1e-12, atol=0)
    assert np.nanmax(found["keys"].se.numpy()) == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_run_after_the_images_of_all_prompts(name):
    """The first prompt has a video alone, the second both, the third an image alone."""
    model = made(name)
    gen = torch.Generator().manual_seed(3)
    image, film = kit.mark("<|image_pad|>"), kit.mark("<|video_pad|>")
    between = [5] if name == "qwen3_vl" else []

    def tensors(pictures, frames):
        ids, inputs = [5], {}
        if pictures:
            ids += [image] * (pictures[0] * pictures[1] // 4)
            inputs["image_grid_thw"] = torch.tensor([[1, *pictures]])
            n = pictures[0] * pictures[1]
            inputs["pixel_values"] = torch.randn(n, 216, generator=gen, dtype=torch.float64)
        if frames:
            one = [film] * (frames[1] * frames[2] // 4)
            ids += [6, *[*one, *between] * (frames[0] - 1), *one]
            inputs["video_grid_thw"] = torch.tensor([frames])
            pixels = torch.randn(frames[0] * frames[1] * frames[2], 216, generator=gen)
            inputs["pixel_values_videos"] = pixels.double()
        ids = torch.tensor([[*ids, 7]])
        kinds = (ids == image).long() + 2 * (ids == film).long()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
        return marked(prompt_from_tensors(model, {**given, "mm_token_type_ids": kinds}))

    prompts = [
        tensors((), [2, 4, 8]), tensors((4, 6), [3, 4, 4]), tensors((8, 8), ()),
    ]  # fmt: skip
    assert [len(p.views[TOWER]) for p in prompts] == [1, 2, 1]
    scalars = {k: v for k, v in READINGS.items() if k not in _LISTS}
    found = read(model, model.batch(prompts), scalars | BINS, tower=TOWER)
    wanted = expected(model, prompts)
    for key in scalars | BINS:
        x = wanted[key]
        rows = [x[:1], x[1:3], x[3:]]  # the mean over both rows of the second
        if key in BINS:
            both = [v[np.isfinite(v)] for v in rows[1].reshape(2, -1).T]
            middle = np.array([v.mean() if len(v) else np.nan for v in both])
            rows[1] = middle.reshape(rows[1][:1].shape)
        else:
            rows[1] = rows[1].mean(0, keepdims=True)
        same(found[key].values.numpy(), np.concatenate(rows))
    with pytest.raises(SiteError, match="several images"):
        read(model, model.batch(prompts), {"keys": rd.KeyMass()}, tower=TOWER)
    by_row, owners = read_rows(model, model.batch(prompts), READINGS | BINS, tower=TOWER)
    assert owners == (0, 1, 1, 2)
    agree(by_row, wanted)


_LISTS = {"keys", "keys-late", "top", "top-all", "rows", "z-rows"}


@pytest.mark.parametrize("name", ["llava", "llava_pixtral"])
def test_every_image_is_read_by_itself_where_it_is_a_row(name):
    """Lists too, which have no mean over images."""
    model = made(name)
    images = [[noise(60, 44, 1), noise(40, 52, 2)], [noise(42, 40, 4)]]
    batch = model.batch(prompts := [prompt(name, *x, id=str(i)) for i, x in enumerate(images)])
    found, owners = read_rows(model, batch, READINGS | BINS, tower=TOWER)
    assert owners == ((0, 0, 1) if name == "llava" else (0, 1)) == batch.view(TOWER)[1]
    agree(found, expected(model, prompts))


def test_errors_of_a_mean_over_images_are_the_mean_of_theirs():
    model = made("llava")
    images = [noise(60, 44, 1), noise(40, 52, 2)]
    both = prompt("llava", *images)
    spans = [((3, 40),), ()]  # on the first image alone
    views = tuple(
        replace(row, spans={**row.spans, "solo": at})
        for row, at in zip(both.views[TOWER], spans, strict=True)
    )
    one = prompt("llava", images[0])
    alone = replace(one, views={TOWER: views[:1]})
    batch = model.batch([replace(both, views={TOWER: views}), alone])
    readings = {
        "wide": rd.SpanMass("wide", sample=8), "far": rd.Distance(sample=8),
        "solo": rd.Entropy("solo", sample=8),
    }  # fmt: skip
    rows, _ = read_rows(model, batch, readings, tower=TOWER)
    solo = read(model, batch, {"x": readings["solo"]}, tower=TOWER)["x"]
    same(solo.se[0].numpy(), solo.se[1].numpy())
    same(solo.values[0].numpy(), solo.values[1].numpy())
    assert rows.pop("solo").values[1].isnan().all() and readings.pop("solo")
    for name, answer in read(model, batch, readings, tower=TOWER).items():
        assert answer.values.shape == answer.se.shape == (2, 2, 2)
        same(answer.se[0].numpy(), rows[name].se[:2].mean(0).numpy())
        same(answer.se[1].numpy(), rows[name].se[2].numpy())
        same(answer.values[0].numpy(), rows[name].values[:2].mean(0).numpy())
        assert (answer.se > 0).all()


# ---------------------------------------------------------------- beside other towers


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_tower_is_read_at_the_same_time(name):
    model, prompts = made(name, dtype=torch.float32), of_different_sizes(name)
    batch = model.batch([as_float(p) for p in prompts])
    text, vision = model.towers["text"], model.towers[TOWER]
    both = {"entropy": rd.Entropy(), "keys": rd.KeyMass(), "rows": rd.Distance()}
    asked = {
        "text": both | {"span": rd.SpanMass("image")},
        TOWER: both | {"span": rd.SpanMass("wide")},
    }
    bare = model.forward(batch.inputs()).logits
    alone = {t.name: read(model, batch, asked[t.name], tower=t.name) for t in (text, vision)}
    one, other = (Collector(t, batch, asked[t.name]) for t in (text, vision))
    with (
        model.observe(one, columns=one.columns),
        model.observe(other, columns=other.columns),
    ):
        logits = model.forward(batch.inputs()).logits
    assert torch.equal(logits, bare)
    for collector in (one, other):
        for key, answer in collector.answers().items():
            first = alone[collector.tower.name][key]
            assert answer.how == first.how
            torch.testing.assert_close(answer.values, first.values, rtol=0, atol=0, equal_nan=True)
    assert one.answers()["keys"].values.shape != other.answers()["keys"].values.shape


def as_float(prompt):
    """The prompt with inputs in float32."""
    inputs = {n: x.float() if x.is_floating_point() else x for n, x in prompt.inputs.items()}
    return replace(prompt, inputs=inputs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_pixtral"])
def test_detectors_score_such_a_tower(name):
    model, prompts = made(name), of_different_sizes(name)
    parts = expected(model, prompts)["rings"]
    for batch_size in (1, 3):
        scores = score(
            model, "distance-profile", prompts, tower=TOWER, batch_size=batch_size
        )["distance-profile"]  # fmt: skip
        near = np.nansum(parts[..., :2], axis=-1).mean(0)
        np.testing.assert_allclose(scores.values, near.flatten(), rtol=1e-6)


# --------------------------------------------------------------------------- refusals


def call_of(layer, n, *, groups=1, mask=None, heads=2):
    gen = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(groups, heads, n, 8, generator=gen) for _ in range(3))
    z = torch.randn(groups, n, heads, 8, generator=gen)
    return AttnCall(layer.name, torch.nn.Identity(), q, k, v, z, mask=mask)


@pytest.fixture
def pair():
    """A collector for two prompts of 20 and 12 positions, and its first layer."""
    model = made("llava_pixtral")
    prompts = [prompt("llava_pixtral", noise(*size)) for size in ((20, 16), (16, 12))]
    assert [len(p.views[TOWER][0]) for p in prompts] == [20, 12]
    tower = model.towers[TOWER]
    return Collector(tower, model.batch(prompts), {"entropy": rd.Entropy()}), tower.layers[0]


def owners(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def blocks(*lengths):
    owner = owners(*lengths)
    return (owner[:, None] == owner[None])[None, None]


def one_way(*lengths):
    """Each block sees itself and those before it."""
    owner = owners(*lengths)
    return (owner[:, None] >= owner[None])[None, None]


HIDES = {
    torch.float64: (-1e30, -math.inf), torch.float32: (-1e30, -3.4e38), torch.float16: (-65504.0,),
    torch.bfloat16: (-3.38e38, -1e30),
}  # fmt: skip


@pytest.mark.parametrize("kind, hidden", [(k, x) for k, xs in HIDES.items() for x in xs])
def test_masks_of_any_kind_keep_rows_apart(pair, kind, hidden):
    collector, layer = pair
    seen = blocks(20, 12)
    mask = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, hidden)
    collector(call := call_of(layer, 32, mask=mask))
    found = collector._found["entropy"].values[layer.name]
    s = (call.q @ call.k.transpose(-1, -2)).masked_fill(~seen, -1e30)
    p = torch.softmax(s[0], -1)
    rows = -torch.special.xlogy(p, p).sum(-1)
    wanted = torch.stack([rows[:, :20].mean(1), rows[:, 20:].mean(1)])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("as_pattern", [False, True])
@pytest.mark.parametrize(
    "seen", [blocks(32), blocks(19, 13), blocks(21, 11), one_way(20, 12), one_way(20, 12).mT]
)
def test_prompts_that_see_each_other_are_refused(pair, seen, as_pattern):
    collector, layer = pair
    call = call_of(layer, 32, mask=seen)
    if as_pattern:
        pattern = (seen / seen.sum(-1, keepdim=True)).expand(1, 2, -1, -1)
        call = replace(call_of(layer, 32, mask=blocks(20, 12)), pattern=pattern)
    with pytest.raises(SiteError, match="lets images of one prompt see"):
        collector(call)


def test_prompts_that_nothing_keeps_apart_are_refused(pair):
    collector, layer = pair
    with pytest.raises(SiteError, match="lets images of one prompt see"):
        collector(call_of(layer, 32))


def test_calls_must_be_as_many_positions_as_the_images_have(pair):
    collector, layer = pair
    collector(call_of(layer, 20))
    with pytest.raises(SiteError, match="attended over 20 positions; the images have 32"):
        collector.answers()
    with pytest.raises(SiteError, match="at least 33 positions; the images have 32"):
        collector(call_of(layer, 13))
    collector(call_of(layer, 5))
    collector(call_of(layer, 7))
    with pytest.raises(SiteError, match="did not reach 1 of 2 attention layers"):
        collector.answers()
    with pytest.raises(SiteError, match="called twice"):
        collector(call_of(layer, 7))


def test_windows_in_the_batch_axis_are_refused(pair):
    collector, layer = pair
    with pytest.raises(SiteError, match="attends in 8 groups, not once per example"):
        collector(call_of(layer, 4, groups=8))


def test_rows_that_may_be_images_or_videos_are_refused():
    model = made("qwen2_vl")
    one = prompt("qwen2_vl", noise(60, 44))
    both = {**one.inputs, "pixel_values_videos": one.inputs["pixel_values"]}
    batch = model.batch([one, one])
    batch = replace(batch, prompts=(replace(one, inputs=both), one))
    tower = model.towers[TOWER]
    collector = Collector(tower, batch, {"entropy": rd.Entropy()})
    with pytest.raises(SiteError, match="runs images and videos apart"):
        collector(call_of(tower.layers[0], 8))


# ----------------------------------------------------------------------------- memory


class _Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("sizes", [(64,) * 48, (2048, 1024)])
def test_nothing_of_all_rows_by_all_keys_is_made(sizes):
    n = sum(sizes)
    view = Prompt(tuple(range(n)), {"few": ((5, 9),), "wide": ((3, n - 3),)})
    tower = made("qwen2_5_vl").towers[TOWER]
    tower = replace(tower, layers=tower.layers[:1])
    batch = Batch.of([Prompt((1,), views={TOWER: (view,)})] * 2)
    readings = {
        "entropy": rd.Entropy(), "distance": rd.Distance(), "keys": rd.KeyMass(),
        "few": rd.SpanMass("few"), "wide": rd.SpanMass("wide"), "back": rd.PairMass(rd.Offset(1)),
        "top": rd.TopKey("all"), "rows": rd.Rows("few"), "z": rd.ZNorm(), "v": rd.ValueNorm(),
        "sampled": rd.KeyMass(sample=8),
    }  # fmt: skip
    collector = Collector(tower, batch, readings)
    calls = [call_of(tower.layers[0], size) for size in (*sizes, *sizes)]
    with _Largest() as largest:
        for call in calls:
            collector(call)
    assert n < largest.elements < 128 * n
    assert collector.answers()["keys"].values.shape == (2, 1, 2, n)


# ------------------------------------------------------- sequences of one row, by their ends


def by_ends(module, q, k, v, attention_mask=None, **kwargs):
    """As flash attention on a GPU: rows that follow one another, told apart by where they end."""
    ends = kwargs.get("cu_seq_lens_q")
    ends = [0, q.shape[2]] if ends is None else ends.tolist()
    if attention_mask is not None:  # the text tower's, of padding
        return fused(module, q, k, v, attention_mask, **kwargs)
    parts = [
        fused(module, *(x[:, :, a:b] for x in (q, k, v)), None, **kwargs)[0]
        for a, b in itertools.pairwise(ends) if b > a
    ]  # fmt: skip
    return torch.cat(parts, dim=1), None


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_of_one_call_are_told_apart_by_their_ends(name):
    """All windows and images of a layer in one call without a mask, as on a GPU."""
    model, prompts = made(name), of_different_sizes(name)
    wanted = expected(model, prompts)
    with registered("flash_attention_fake", by_ends, "flash_attention_2"):
        other = load(copy.deepcopy(model.hf), processor=kit.case(name).model.processor)
        for part in other.hf.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "flash_attention_fake"
        found = read(other, other.batch(prompts), READINGS | BINS, tower=TOWER)
        alone = read(other, other.batch(prompts[1:2]), {"rows": rd.Rows("all")}, tower=TOWER)
    agree(found, wanted)
    assert set(found["few"].how) == {"sweep"}
    if name == "qwen2_5_vl":
        assert (alone["rows"].values[0, 0] == 0).float().mean() > 0.5


def described(q, k, mask=None, **kwargs):
    out = (torch.zeros(len(q), q.shape[2], *q.shape[1::2]), None)
    module = torch.nn.Identity()
    return describe(
        "layer", module, q, k, k, mask, {"is_causal": False, **kwargs}, out, KernelTap()
    )


def test_ends_of_sequences_become_a_mask():
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    ends = torch.tensor([0, 4, 4, 7, 9])
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    seen = blocks(4, 3, 2)
    assert torch.equal(described(q, k, **given).mask, seen)
    assert described(q, k).mask is None
    whole = torch.tensor([0, 9])
    assert described(q, k, cu_seq_lens_q=whole, cu_seq_lens_k=whole).mask is None
    padding = torch.tensor([[1] * 8 + [0]])
    assert torch.equal(described(q, k, padding, **given).mask, seen & padding.bool())
    added = torch.randn(1, 1, 9, 9)
    mask = described(q, k, added, **given).mask
    assert torch.equal(mask[seen], added[seen]) and (mask[~seen] < -1e30).all()
    call = described(q, k, is_causal=True, **given)
    assert call.causal and torch.equal(call.mask, seen)
    p = call.rows(0, slice(0, 4), slice(0, 9))
    assert (p.bool() == (seen[0] & torch.ones(9, 9).tril().bool())).all()


@pytest.mark.parametrize(
    "ends",
    [
        ([0, 4, 9], [0, 5, 9]), ([0, 4, 9], None), ([0, 4, 8], [0, 4, 8]), ([1, 4, 9], [1, 4, 9]),
        ([0, 6, 4, 9], [0, 6, 4, 9]), ([], []),
    ],
)  # fmt: skip
def test_ends_that_do_not_divide_a_row_are_refused(ends):
    q = torch.randn(1, 2, 9, 8)
    ends = [None if x is None else torch.tensor(x) for x in ends]
    with pytest.raises(SiteError, match="must divide the 9 queries and 9 keys of a single row"):
        described(q, q, cu_seq_lens_q=ends[0], cu_seq_lens_k=ends[1])


def test_ends_of_sequences_in_several_rows_are_refused():
    q, ends = torch.randn(2, 2, 9, 8), torch.tensor([0, 4, 9])
    with pytest.raises(SiteError, match="for 2 rows"):
        described(q, q, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    with pytest.raises(SiteError, match="9 queries and 5 keys"):
        described(q[:1], q[:1, :, :5], cu_seq_lens_q=ends, cu_seq_lens_k=ends)
