"""Vision towers: the planted transformer, profiles by distance, maps that move, classes."""

import copy
import math
import random

import numpy as np
import patch_references as known
import pytest
import torch
from images_kit import case, ramp
from reference import handle
from reference import whole as full_matrices

from heads import score
from heads.content_agnostic import correlation, map_correlation, order_of, shuffled_patches
from heads.detector import make_detector
from heads.distance_profile import ring_profile
from heads.pattern_classes import RULES, Steps, pattern_classes
from heads.pruning_importance import jensen_shannon
from heads.pruning_importance import others as others_of_layer
from interp import load
from interp.engine import read
from interp.errors import HeadIdError, InputError, UnsupportedModelError
from interp.headid import HeadId
from interp.images import image_prompt
from interp.images.patches import PatchMap, grid_patches
from interp.prompts import Prompt
from interp.readings import BinMass, Distance, Entropy, Rings, SpanMass
from interp.recipe import Edit, Recipe, Where
from interp.tasks import make_task
from interp.tasks.tiles import draw, painted
from interp.zoo import ZOO
from interp.zoo.planted_vit import (
    CLASS,
    COLOURS,
    COLUMNS,
    RED,
    RIGHT,
    RING,
    ROWS,
    SAME,
    SELF,
    SQUARE,
    UNIFORM,
)

CELLS = [(r, c) for r in range(ROWS) for c in range(COLUMNS)]
TOKENS = range(1 + len(CELLS))


@pytest.fixture(scope="module")
def planted():
    return load("zoo:planted-vit", device="cpu")


@pytest.fixture(scope="module")
def nothing():
    return load("zoo:planted-vit-nothing", device="cpu")


def tiled(model, n=4, *, seed=0, **params):
    return make_task("tiles", params).prompts(model, n, seed=seed)


@torch.no_grad()
def whole(model, prompts, dtype=torch.float32):
    """Patterns [example, layer, head, query, key] of eager forwards."""
    hf = copy.deepcopy(model.hf).to(dtype)
    hf.set_attn_implementation("eager")
    pixels = torch.cat([p.inputs["pixel_values"] for p in prompts]).to(dtype)
    return torch.stack(hf(pixel_values=pixels, output_attentions=True).attentions, dim=1)


# ---------------------------------------------------------------- the planted model


def colours_of(prompt):
    """Name of the colour of each patch, from the middle of its pixels."""
    pixels = prompt.inputs["pixel_values"][0]
    out = []
    for r, c in CELLS:
        bits = (pixels[:, 4 * r + 1, 4 * c + 2] > 0).int().tolist()
        out.append(COLOURS[4 * bits[0] + 2 * bits[1] + bits[2]])
    return out


def looks(head, query, colours):
    """The tokens that a head attends to, evenly, by the words of the planted model's docstring."""
    if head == UNIFORM:
        return list(TOKENS)
    reds = [1 + j for j, x in enumerate(colours) if x == "red"]
    if head == RED:
        return reds or [0]
    if query == 0 or head == CLASS:
        return [0]
    r, c = CELLS[query - 1]
    if head == SELF:
        return [query]
    if head == RIGHT:
        return [query + 1 if c + 1 < COLUMNS else query]
    if head == SAME:
        return [1 + j for j, x in enumerate(colours) if x == colours[query - 1]]
    far = [max(abs(r - a), abs(c - b)) for a, b in CELLS]
    return [1 + j for j, x in enumerate(far) if (x <= 1 if head == SQUARE else x == 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("colours", [3, 8])
def test_planted_heads_look_where_the_docstring_says(planted, colours, dtype):
    prompts = tiled(planted, 3, colours=colours)
    found = whole(planted, prompts, dtype).double()
    # Variances are off by the last bit, and scores by that part of β; softmax is in float32.
    atol = {torch.bfloat16: 4e-3, torch.float32: 5e-6, torch.float64: 1e-8}[dtype]
    for example, prompt in enumerate(prompts):
        named = colours_of(prompt)
        assert 1 < len(set(named)) <= colours
        for head in planted.towers["vision"].heads:
            want = torch.zeros(len(TOKENS), len(TOKENS)).double()
            for query in TOKENS:
                keys = looks(head, query, named)
                want[query, keys] = 1 / len(keys)
            torch.testing.assert_close(
                found[example, head.layer, head.head], want, atol=atol, rtol=0
            )
    assert any("red" in colours_of(p) for p in tiled(planted, 9))
    assert not all("red" in colours_of(p) for p in tiled(planted, 9))


@torch.no_grad()
def test_layer_norms_of_the_planted_model_change_nothing(planted):
    pixels = planted.batch(tiled(planted)).extra["pixel_values"]
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
        for n, m in planted.hf.named_modules() if "layernorm_before" in n
    ]  # fmt: skip
    logits = planted.hf(pixel_values=pixels).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    for before, after in seen:
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    for row, image in zip(logits, pixels, strict=True):
        mean = image.mean((1, 2)).tolist()
        near = [sum((m - (2 * (i >> s & 1) - 1)) ** 2 for m, s in zip(mean, (2, 1, 0), strict=True))
                for i in range(8)]  # fmt: skip
        best = np.flatnonzero(row.numpy() >= float(row.max()) - 1e-5)
        assert best.tolist() == np.flatnonzero(np.array(near) <= min(near) + 1e-5).tolist()


@pytest.mark.parametrize("name", ["planted-vit", "planted-vit-nothing"])
def test_planted_models_are_built_alike_and_pass_the_doctor(name):
    state = torch.random.get_rng_state()
    first, second = ZOO[name](), ZOO[name]()
    assert torch.equal(state, torch.random.get_rng_state())
    ours, theirs = first.hf.state_dict(), second.hf.state_dict()
    assert all(torch.equal(x, theirs[n]) for n, x in ours.items())
    assert not first.hf.training and first.truth.note
    model = load(f"zoo:{name}", device="cpu")
    assert model.doctor().ok and list(model.towers) == ["vision"] and not model.reads_tokens
    for heads in first.truth.heads.values():
        assert heads <= set(model.towers["vision"].heads)


def test_an_image_of_any_size_is_read_at_the_size_of_the_model(planted):
    image = painted(draw(random.Random(1), ROWS, COLUMNS, 5), 12)
    large = image_prompt(planted, None, image)
    small = image_prompt(planted, None, image[::3, ::3])
    assert torch.equal(large.inputs["pixel_values"], small.inputs["pixel_values"])


# ---------------------------------------------------------------- the task


def test_tiles_have_one_patch_each_and_few_colours(planted):
    for prompt in tiled(planted, 5, colours=3):
        pixels = prompt.inputs["pixel_values"]
        assert pixels.shape == (1, 3, 4 * ROWS, 4 * COLUMNS)
        cut = pixels.unflatten(2, (ROWS, 4)).unflatten(4, (COLUMNS, 4))
        assert (cut == cut[:, :, :, :1, :, :1]).all() and set(pixels.unique().tolist()) == {-1, 1}
        assert len(set(colours_of(prompt))) <= 3
        assert prompt.spans["image"] == ((1, 31),) and prompt.spans["cls"] == ((0, 1),)
    assert len({tuple(colours_of(p)) for p in tiled(planted, 5)}) == 5
    again, other = tiled(planted, 2), tiled(planted, 2, seed=1)
    assert [colours_of(p) for p in again] == [colours_of(p) for p in tiled(planted, 2)]
    assert [colours_of(p) for p in again] != [colours_of(p) for p in other]


def test_tiles_follow_the_grid_of_other_models():
    (prompt,) = tiled(case("clip_vision").model, 1)
    assert next(iter(prompt.patches.grids().values())) == (8, 8)
    (prompt,) = tiled(case("llava").model, 1)
    assert prompt.views["vision"][0].patches.grids() == {(0, None, 0): (8, 8)}
    (prompt,) = tiled(case("qwen2_vl").model, 1, side=12, rows=3, columns=4)
    with pytest.raises(UnsupportedModelError, match="how large its images"):
        tiled(case("qwen2_vl").model, 1)
    with pytest.raises(InputError, match="reads no images"):
        tiled(load("zoo:planted-nothing"), 1, side=2, rows=2, columns=2)
    for wrong in ({"colours": 9}, {"colours": 1}, {"side": -1}):
        with pytest.raises(InputError):
            make_task("tiles", wrong)


# ---------------------------------------------------------------- the reading


def binned(a, bins, rows, per):
    """A bin's mass over some rows, by loops."""
    out = []
    rows = [i for i in rows if (bins[i] >= 0).any()]
    for k in range(bins.max() + 1):
        found = []
        for i in rows:
            keys = [j for j in range(len(a)) if bins[i, j] == k]
            if keys or per == "query":
                mass = sum(a[i, j] for j in keys)
                found.append(mass / len(keys) if per == "entry" else mass)
        out.append(np.mean(found) if (bins == k)[rows].any() else math.nan)
    return out


@pytest.mark.parametrize("span", ["all", "image", "half"])
@pytest.mark.parametrize("per", ["query", "entry"])
@pytest.mark.parametrize("binning", [Rings(), Steps()])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_mass_in_bins_equals_loops(per, span, binning, attn):
    model = load(copy.deepcopy(known.random_vit().hf))
    model.hf.set_attn_implementation(attn)
    prompts = known.images()
    if span == "half":
        prompts = [with_span(p, "half", ((0, 9),)) for p in prompts]
    readings = {
        "bins": BinMass(binning, query=span, per=per),
        "mass": SpanMass("image", query=span),
        "entropy": Entropy(span),
    }
    if span == "half":  # no reading but such as the model's own kernel answers by columns
        readings = {"bins": readings["bins"], "distance": Distance(span)}
    alone = {n: read(model, model.batch(prompts), {n: r})[n] for n, r in readings.items()}
    found = read(model, model.batch(prompts), readings)
    for name, answer in found.items():
        torch.testing.assert_close(
            answer.values, alone[name].values, atol=1e-5, rtol=1e-5, equal_nan=True
        )
    for b, prompt in enumerate(prompts):
        a, (seen,) = known.patterns(prompt), prompt.views["vision"]
        for at in np.ndindex(*a.shape[:2]):
            want = binned(a[at], binning.bins(seen), seen.positions(span), per)
            np.testing.assert_allclose(found["bins"].values[b][at], want, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per", ["query", "entry"])
def test_bins_of_padded_prompts_are_read_at_their_places(per, side):
    """On tokens of a text, causal and padded; patches lie in the middle of it."""
    model = handle("llama", "sdpa")
    prompts = []
    for i, length in enumerate((100, 30, 70)):
        rows, columns, first = 2 + i, 3, (59, 4, 50)[i]  # over two blocks of queries
        patches = grid_patches(rows, columns, area=(0, 0, 8, 8), first=first, step=1)
        tokens = torch.randint(2, 10, (length,), generator=torch.Generator().manual_seed(i))
        seen = PatchMap(tuple(patches), ((8, 8),), length)
        prompts.append(
            Prompt(
                tuple(tokens.tolist()), {"late": ((first + 2, first + 5),)}, f"{i}", patches=seen
            )
        )
    for span in ("all", "late"):
        reading = BinMass(Rings(), query=span, per=per)
        found = read(model, model.batch(prompts, side=side), {"x": reading})["x"].values
        for b, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.tokens])
            maps = full_matrices("llama", {"input_ids": ids}).patterns["text"]
            bins = Rings().bins(prompt)
            for layer, a in enumerate(maps):
                for head in range(a.shape[1]):
                    want = binned(a[0, head], bins, prompt.positions(span), per)
                    got = found[b, layer, head, : len(want)].numpy()
                    np.testing.assert_allclose(got, want, atol=2e-6)
            assert found[b, ..., bins.max() + 1 :].isnan().all()


def with_span(prompt, name, ranges):
    from dataclasses import replace

    (row,) = prompt.views["vision"]
    row = replace(row, spans={**row.spans, name: ranges})
    return replace(prompt, views={"vision": (row,)})


def test_rings_keep_grids_apart_and_leave_out_what_is_no_patch():
    area = (0, 0, 8, 8)
    patches = [
        *grid_patches(2, 3, area=area, first=1, step=1),  # a line end after each row
        *grid_patches(2, 2, area=area, first=10, tile=0),
        *grid_patches(1, 2, area=area, first=14, image=1),
    ]
    prompt = Prompt((0,) * 17, patches=PatchMap(tuple(patches), ((8, 8), (8, 8)), 17))
    bins = Rings().bins(prompt)
    at = {p.position: p for p in patches}
    for i in range(17):
        for j in range(17):
            p, q = at.get(i), at.get(j)
            same = p and q and (p.image, p.tile) == (q.image, q.tile)
            want = max(abs(p.row - q.row), abs(p.column - q.column)) if same else -1
            assert bins[i, j] == want
    with pytest.raises(InputError, match="has none"):
        Rings().bins(Prompt((0,) * 3))
    with pytest.raises(InputError, match="'query' or 'entry'"):
        BinMass(Rings(), per="ring")


def test_steps_to_neighbours_are_told_apart():
    patches = grid_patches(3, 4, area=(0, 0, 8, 8), first=1)
    bins = Steps().bins(Prompt((0,) * 13, patches=PatchMap(tuple(patches), ((8, 8),), 13)))
    middle = 1 + 4 + 1  # row 1, column 1
    around = {-5: 0, -4: 1, -3: 2, -1: 3, 0: 4, 1: 5, 3: 6, 4: 7, 5: 8}
    assert [bins[middle, j] for j in range(13)] == [
        around.get(j - middle, -1) if j else -1 for j in range(13)
    ]
    assert (bins[0] == -1).all() and bins[4, 5] == -1  # the end of a row and the next row


def test_an_example_of_several_tiles_has_the_mean_over_them():
    it = case("llava_next").model
    prompts = [image_prompt(it, "what is this ?", ramp(*size), id=str(i))
               for i, size in enumerate(((101, 67), (40, 120)))]  # fmt: skip
    rows = [len(p.views["vision"]) for p in prompts]
    assert rows[0] != rows[1] and max(rows) > 1
    found = read(it, it.batch(prompts), {"x": BinMass(Rings())}, tower="vision")["x"].values
    hf = copy.deepcopy(it.hf)
    hf.set_attn_implementation("eager")
    maps = []
    for name, module in hf.named_modules():
        if "vision" in name and name.endswith("self_attn"):
            module.register_forward_hook(lambda m, a, out: maps.append(out[1].double().numpy()))
    for b, prompt in enumerate(prompts):
        maps.clear()
        load(hf).forward(it.batch([prompt]).inputs())
        seen = prompt.views["vision"]
        assert len(maps) == len(it.towers["vision"].layers)
        for layer, a in enumerate(maps):
            for head in range(a.shape[1]):
                want = [
                    binned(a[i, head], Rings().bins(row), range(len(row)), "query")
                    for i, row in enumerate(seen)
                ]
                np.testing.assert_allclose(found[b, layer, head], np.mean(want, axis=0), atol=1e-6)
    table = score(it, "distance-profile", prompts, tower="vision")["distance-profile"]
    np.testing.assert_allclose(
        table.per_example[[table.examples.index(str(i)) for i in range(2)]],
        found[..., :2].sum(-1).flatten(1), atol=1e-6,
    )  # fmt: skip


# ---------------------------------------------------------------- profiles


def test_profiles_of_planted_heads_are_those_of_counting(planted):
    prompts = tiled(planted, 5)
    found = ring_profile(planted, prompts)
    by_patch = ring_profile(planted, prompts, per="patch")
    assert found.shape == (2, 4, COLUMNS)
    far = np.array([[max(abs(a - c), abs(b - d)) for c, d in CELLS] for a, b in CELLS])
    size = np.array([(far == k).sum(1) for k in range(COLUMNS)])  # [ring, patch]
    even = size.sum(1) / len(CELLS)
    border = 1 / COLUMNS
    near = 1 / (far <= 1).sum(1)
    want = {
        SELF: [1, 0, 0, 0, 0, 0],
        RIGHT: [border, 1 - border, 0, 0, 0, 0],
        SQUARE: [near.mean(), 1 - near.mean(), 0, 0, 0, 0],
        RING: [0, 0, 1, 0, 0, 0],
        UNIFORM: even / (1 + len(CELLS)),
        CLASS: [0] * 6,
    }
    for head, profile in want.items():
        np.testing.assert_allclose(found[head.layer, head.head], profile, atol=1e-6)
    np.testing.assert_allclose(by_patch[1, 0], 1 / (1 + len(CELLS)), atol=1e-7)
    np.testing.assert_allclose(by_patch[0, 3, 2], (1 / size[2]).mean(), atol=1e-6)
    np.testing.assert_allclose(by_patch[0, 2, 1], near.mean(), atol=1e-6)
    assert even.sum() == pytest.approx(len(CELLS)) and size[1].min() == 3 and size[1].max() == 8


@pytest.mark.parametrize("per", ["ring", "patch"])
def test_profiles_of_a_random_model_equal_loops_however_batches_are_cut(per):
    model, prompts = known.random_vit(), known.images()
    whole = ring_profile(model, prompts, per=per)
    for size in (1, 3):
        np.testing.assert_allclose(ring_profile(model, prompts, per=per, batch_size=size), whole,
                                   atol=1e-6)  # fmt: skip
    (seen,) = prompts[0].views["vision"]
    bins = Rings().bins(seen)
    how = "query" if per == "ring" else "entry"
    for at in np.ndindex(*whole.shape[:2]):
        want = np.mean(
            [binned(known.patterns(p)[at], bins, range(len(seen)), how) for p in prompts], axis=0
        )
        np.testing.assert_allclose(whole[at], want, atol=2e-6)


def test_profiles_say_what_they_cannot_do(planted):
    with pytest.raises(InputError, match="'ring' or 'patch'"):
        ring_profile(planted, tiled(planted, 1), per="key")
    with pytest.raises(InputError, match="at least one prompt"):
        ring_profile(planted, [])
    it = case("llava").model
    prompts = [image_prompt(it, "what is this ?", ramp(40, 40), id="a")]
    with pytest.raises(InputError, match="sees nothing but images; got 'text'"):
        score(it, "distance-profile", prompts)
    with pytest.raises(InputError, match="nearest and farthest"):
        make_detector("distance-profile", {"nearest": 2})


def test_a_range_of_rings_finds_the_ring_head(planted):
    ring = make_detector("distance-profile", {"nearest": 2, "farthest": 2})
    found = score(planted, ring, n=9)["distance-profile"]
    assert found.select() == (RING,)
    column = dict(zip(found.heads, found.column("distance"), strict=True))
    assert column[RING] == pytest.approx(2) and column[SELF] == pytest.approx(0)
    assert math.isnan(column[CLASS])
    assert column[UNIFORM] == pytest.approx(np.mean(
        [[max(abs(a - c), abs(b - d)) for c, d in CELLS] for a, b in CELLS]
    ))  # fmt: skip


# ---------------------------------------------------------------- content


def test_patches_trade_places_pixel_by_pixel():
    for prompt in known.images():
        order, want = known.traded(prompt)
        assert order == order_of(prompt) and sorted(order) == list(range(15))
        made = shuffled_patches(prompt, order)
        assert torch.equal(made.inputs["pixel_values"], want)
        assert not torch.equal(want, prompt.inputs["pixel_values"])
        same = shuffled_patches(prompt, list(range(15)))
        assert torch.equal(same.inputs["pixel_values"], prompt.inputs["pixel_values"])
    assert len({tuple(order_of(p)) for p in known.images()}) == 4


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_pixels_that_cannot_be_cut_along_patches_are_refused(name):
    it = case(name).model
    prompt = image_prompt(it, "what is this ?", ramp(101, 67), id="a")
    with pytest.raises(InputError, match=r"one image that tower|the patch grid divides"):
        score(it, "content-agnostic", [prompt], tower="vision", batch_size=1)


def test_a_head_that_goes_by_content_moves_with_the_patches(planted):
    found = score(planted, "content-agnostic", n=6)["content-agnostic"]
    at = found.heads.index(SAME)
    np.testing.assert_allclose(found.extras["content"][:, at], 1, atol=1e-6)
    np.testing.assert_allclose(found.per_example[:, at], found.null_per_example[:, at], atol=1e-6)
    assert found.per_example[:, at].max() < 0.3
    at = found.heads.index(RIGHT)
    np.testing.assert_allclose(found.extras["content"][:, at], found.null_per_example[:, at],
                               atol=1e-6)  # fmt: skip
    assert (found.null_per_example[:, found.heads.index(SELF)] > 1 - 1e-9).all()
    for head in (UNIFORM, CLASS):
        assert np.isnan(found.per_example[:, found.heads.index(head)]).all()


def test_content_is_told_from_place_in_the_tower_of_a_model_that_reads_text():
    it = case("llava").model
    prompts = tiled(it, 3)
    found = score(it, ["content-agnostic", "distance-profile"], prompts, tower="vision")
    a = found["content-agnostic"]
    assert a.heads == it.towers["vision"].heads and not np.isnan(a.per_example).any()
    assert found["distance-profile"].column("patches").max() <= 1


def test_maps_without_variation_but_for_rounding_have_no_correlation():
    gen = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 2, 6, 6, generator=gen).double()
    other = torch.rand(1, 2, 6, 6, generator=gen).double()
    for flat in (1 / 37 + 1e-9 * noise, 1e-12 * noise, 0 * noise):
        assert correlation(flat, other).isnan().all() and correlation(other, flat).isnan().all()
    faint = 1 / 37 + 1e-4 * noise
    assert correlation(faint, noise).tolist() == [[pytest.approx(1), pytest.approx(1)]]


def test_correlations_over_pairs_of_images_equal_loops():
    model, prompts = known.random_vit(), known.images()
    found = map_correlation(model, prompts, batch_size=3)
    maps = [known.patterns(p)[..., 1:, 1:] for p in prompts]
    heads = found.heads
    assert found.examples == tuple(p.id for p in prompts)
    for at, head in enumerate(heads):
        flat = [m[head.layer, head.head] for m in maps]
        pairs = [np.corrcoef(flat[i].ravel(), flat[j].ravel())[0, 1]
                 for i in range(4) for j in range(i)]  # fmt: skip
        assert found.values[at] == pytest.approx(np.mean(pairs), abs=1e-5)
        for i, prompt in enumerate(prompts):
            order = order_of(prompt)
            others = [flat[j] for j in range(4) if j != i]
            want = np.mean([np.corrcoef(flat[i].ravel(), m.ravel())[0, 1] for m in others])
            null = np.mean([np.corrcoef(flat[i].ravel(), m[order][:, order].ravel())[0, 1]
                            for m in others])  # fmt: skip
            assert found.per_example[i, at] == pytest.approx(want, abs=1e-5)
            assert found.null_per_example[i, at] == pytest.approx(null, abs=1e-5)
    for size in (1, 4):
        assert found.same_values(map_correlation(model, prompts, batch_size=size), atol=1e-6)


def test_correlations_over_pairs_find_the_planted_heads(planted):
    prompts = tiled(planted, 12)
    found = map_correlation(planted, prompts)
    assert set(found.select()) == planted.truth.heads["content-agnostic"]
    at = found.heads.index(RED)
    # Without red the map has no variation; those with red are compared among themselves.
    shown = ["red" in colours_of(p) for p in prompts]
    assert (~np.isnan(found.per_example[:, at])).tolist() == shown and 2 < sum(shown) < 12
    maps = whole(planted, [p for p, red in zip(prompts, shown, strict=True) if red])
    flat = maps[:, RED.layer, RED.head, 1:, 1:].flatten(1).double().numpy()
    np.testing.assert_allclose(
        found.per_example[shown, at], (np.corrcoef(flat).sum(1) - 1) / (sum(shown) - 1), atol=1e-6
    )
    with pytest.raises(InputError, match="at least two images"):
        map_correlation(planted, tiled(planted, 1))
    it = case("qwen2_vl").model
    other = [image_prompt(it, "what is this ?", ramp(*s), id=str(s)) for s in ((90, 90), (50, 90))]
    with pytest.raises(InputError, match="equal grids"):
        map_correlation(it, other)


# ---------------------------------------------------------------- classes


def test_planted_heads_fall_into_their_classes(planted, nothing):
    found = pattern_classes(planted, tiled(planted, 6, colours=8))
    want = {SELF: "self", RIGHT: "neighbour", SQUARE: "local", RING: "ring", UNIFORM: "uniform",
            SAME: "content", CLASS: "class", RED: "content"}  # fmt: skip
    assert dict(zip(found.heads, found.classes, strict=True)) == want
    assert found.of("vision.L0H3") == "ring" and found.heads_of("content") == (SAME, RED)
    frame = found.to_frame()
    assert list(frame["kind"]) == list(found.classes) and len(frame.columns) == 12
    np.testing.assert_allclose(found.features["self"][:4], [1, 1 / 6, np.mean(
        [1 / sum(max(abs(a - c), abs(b - d)) <= 1 for c, d in CELLS) for a, b in CELLS]), 0],
        atol=1e-6)  # fmt: skip
    with pytest.raises(HeadIdError, match="not in the table"):
        found.of("vision.L2H0")
    other = pattern_classes(nothing, tiled(nothing, 6, colours=8))
    assert set(other.classes) == {"uniform", "content"}
    for size in (1, 5):
        again = pattern_classes(planted, tiled(planted, 6, colours=8), batch_size=size)
        assert again.classes == found.classes


def test_features_of_a_random_model_equal_loops():
    model, prompts = known.random_vit(), known.images()
    found = pattern_classes(model, prompts)
    n = len(known.CELLS)
    for at, head in enumerate(found.heads):
        maps = [known.patterns(p)[head.layer, head.head] for p in prompts]
        mean = np.mean([m[1:, 1:] for m in maps], axis=0)
        mass = mean.sum() / n
        ring = [sum(mean[p, q] for p in range(n) for q in range(n) if known.ring(p, q) == k) / n
                for k in range(5)]  # fmt: skip
        steps = [
            sum(mean[p, q] for p in range(n) for q in range(n)
                if np.subtract(known.CELLS[q], known.CELLS[p]).tolist() == [i, j]) / n
            for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)
        ]  # fmt: skip
        entropy = np.mean([-(m[1:] * np.log(m[1:])).sum(1).mean() for m in maps])
        want = {
            "class": 1 - mass, "self": ring[0] / mass, "local": (ring[0] + ring[1]) / mass,
            "ring": max(ring[2:]) / mass, "neighbour": max(steps) / mass,
            "uniform": entropy / math.log(1 + n),
            "distance": sum(k * x for k, x in enumerate(ring)) / mass,
        }  # fmt: skip
        even = np.mean([[known.ring(p, q) == k for p in range(n) for q in range(n)]
                        for k in range(5)], axis=1)  # fmt: skip
        want["ring-even"] = even[2 + int(np.argmax(ring[2:]))]
        for name, value in want.items():
            assert found.features[name][at] == pytest.approx(value, abs=1e-5), (head, name)


def test_the_first_rule_that_holds_names_the_class():
    plain = {"class": 0.0, "uniform": 0.3, "self": 0.0, "content": 0.0, "place": 0.0,
             "neighbour": 0.0, "local": 0.0, "ring": 0.0, "ring-even": 0.3}  # fmt: skip
    cases = [
        ({}, "mixed"), ({"place": 0.5}, "place"), ({"ring": 0.5}, "mixed"),
        ({"ring": 0.6, "place": 0.4}, "ring"), ({"ring": 0.9, "ring-even": 0.5}, "mixed"),
        ({"local": 0.5, "ring": 0.7}, "local"), ({"neighbour": 0.5, "local": 0.9}, "neighbour"),
        ({"content": 0.5, "place": 0.25, "local": 0.9}, "content"),
        ({"content": 0.5, "place": 0.3, "local": 0.9}, "local"),
        ({"self": 0.5, "content": 1.0}, "self"), ({"uniform": 0.95, "self": 1.0}, "uniform"),
        ({"class": 0.5, "uniform": 1.0}, "class"),
        ({"place": math.nan, "content": math.nan, "local": math.nan}, "mixed"),
    ]  # fmt: skip
    for change, want in cases:
        features = plain | change
        assert next(k for k, rule in RULES.items() if rule(features)) == want, change
    assert {want for _, want in cases} == set(RULES)


def test_heads_are_named_in_the_vision_tower(planted):
    assert planted.towers["vision"].heads[0] == HeadId(0, 0, "vision") == SELF


# ---------------------------------------------------------------- pruning


def bits(p, q):
    """Jensen-Shannon divergence by its entropies."""

    def entropy(x):
        return -sum(a * math.log2(a) for a in x if a > 0)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


@torch.no_grad()
def test_without_the_head_that_sees_everything_all_classes_are_alike(planted, nothing):
    prompts = tiled(planted, 6)
    found = score(planted, "pruning-importance", prompts)["pruning-importance"]
    at = found.heads.index(UNIFORM)
    for prompt in prompts:
        logits = planted.hf(pixel_values=prompt.inputs["pixel_values"]).logits[0]
        p = logits.double().softmax(-1).numpy()
        row = found.examples.index(prompt.id)
        assert found.per_example[row, at] == pytest.approx(bits(p, np.full(8, 1 / 8)), abs=1e-6)
        assert found.extras["prob"][row, at] == pytest.approx(p.max() - 1 / 8, abs=1e-6)
        others = [h for h in found.heads if h.layer == 1 and h != UNIFORM]
        for head in others:
            null = found.null_per_example[row, found.heads.index(head)]
            assert null == pytest.approx(found.per_example[row, at] / 3)
    assert found.per_example[:, at].min() > 0.01 and set(found.select()) <= {UNIFORM}
    signed = score(planted, make_detector("pruning-importance", {"measure": "prob"}), prompts)
    np.testing.assert_array_equal(
        signed["pruning-importance"].per_example, found.extras["prob"][
            [found.examples.index(e) for e in signed["pruning-importance"].examples]]
    )  # fmt: skip
    faint = score(nothing, "pruning-importance", tiled(nothing, 6))["pruning-importance"]
    at = faint.heads.index(UNIFORM)
    assert 0 < faint.values[at] < 1e-4 and not faint.select()


@torch.no_grad()
@pytest.mark.parametrize(("name", "tower"), [("llava", "vision"), ("llava", "text")])
def test_heads_of_models_that_read_text_are_pruned_by_the_next_token(name, tower):
    it = case(name).model
    prompts = [image_prompt(it, text, ramp(40, 40 + i), id=text)
               for i, text in enumerate(("what is this ?", "is there a red thing ?"))]  # fmt: skip
    table = score(it, "pruning-importance", prompts, tower=tower, batch_size=2)
    found = table["pruning-importance"]
    assert found.heads == it.towers[tower].heads
    for prompt in prompts:
        inputs = it.batch([prompt]).inputs()
        p = it.forward(inputs).logits[0, -1].double().softmax(-1).numpy()
        for head in (found.heads[0], found.heads[-1]):
            with Recipe([Edit("zero", Where(heads=(head,)))]).on(it):
                q = it.forward(inputs).logits[0, -1].double().softmax(-1).numpy()
            place = found.examples.index(prompt.id), found.heads.index(head)
            assert found.per_example[place] == pytest.approx(bits(p, q), abs=1e-7)
            assert found.extras["prob"][place] == pytest.approx(max(p) - q[p.argmax()], abs=1e-6)
    assert found.extras["class"].max() > 1e-3 or tower == "vision"
    assert ((found.extras["class"] >= 0) & (found.extras["class"] <= 1)).all()


def test_what_pruning_cannot_tell_is_undefined_or_refused():
    it = case("llava_next").model
    prompts = [image_prompt(it, "what is this ?", ramp(101, 67), id="a")]
    assert len(prompts[0].views["vision"]) > 1
    found = score(it, "pruning-importance", prompts, tower="vision")["pruning-importance"]
    assert np.isnan(found.extras["class"]).all() and not np.isnan(found.per_example).any()
    bare = case("clip_vision").model
    with pytest.raises(InputError, match="has no logits") as caught:
        score(bare, "pruning-importance", tiled(bare, 1))
    assert caught.value.hint
    with pytest.raises(InputError, match="one of jsd, prob; got 'kl'"):
        make_detector("pruning-importance", {"measure": "kl"})
    lone = others_of_layer(torch.tensor([[[1.0, math.nan], [4.0, 2.0]]]))
    assert lone[0, 0].isnan().all() and lone[0, 1].tolist() == [2.0, 4.0]


def test_divergence_in_bits():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]).double()
    q = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]]).double()
    found = jensen_shannon(p, q)
    assert found[1] == 1 and found[2] == 0  # apart, and equal: to the last bit
    for a, b, want in zip(p.numpy(), q.numpy(), found.tolist(), strict=True):
        assert want == pytest.approx(bits(a, b), abs=1e-12)
    assert torch.equal(found, jensen_shannon(q, p))


def test_the_null_of_a_hierarchical_tower_is_that_of_each_stage():
    model = case("swin").model
    prompt = image_prompt(model, "", ramp(56, 56), id="one")
    table = score(model, "distance-profile", [prompt], tower="vision")["distance-profile"]
    patches = table.column("patches")
    for i, head in enumerate(table.heads):
        (view,) = prompt.views[f"vision/{head.layer}"]
        bins = Rings().bins(view)
        even = ((bins >= 0) & (bins <= 1)).sum() / (bins >= 0).sum()
        assert table.null[i] == pytest.approx(float(patches[i]) * even, rel=1e-5)


def test_maps_of_a_hierarchical_tower_are_not_compared():
    model = case("swin").model
    prompt = image_prompt(model, "", ramp(56, 56), id="one")
    with pytest.raises(InputError, match="stages of tower 'vision' have grids of their own"):
        score(model, "content-agnostic", [prompt], tower="vision")
