"""Detectors of visual heads: what the conformance tests, which hold all detectors, do not say."""

import math
from dataclasses import replace
from types import SimpleNamespace

import images_kit
import numpy as np
import pytest
import torch

from heads.detector import make_detector
from heads.inactive_visual import evenly
from heads.localisation import elbow, scattered, spatial_score
from heads.makers.var import sink_dims
from heads.massive import heaviest, heaviness, inputs_of, outstanding
from heads.scoring import score
from heads.sight import last_row, last_z
from heads.visual_retrieval import regions_of
from interp import load
from interp.errors import InputError
from interp.headid import HeadId
from interp.images import image_prompt
from interp.images.patches import PatchMap, grid_patches
from interp.model import Model
from interp.prompts import Prompt
from interp.recipe.hide import unseen
from interp.scores import NO_EVIDENCE
from interp.zoo.planted_parts import word_tokenizer
from interp.zoo.planted_vlm import (
    BLIND,
    BOS,
    FIRST_KIND,
    IMAGE,
    OBJECT,
    PARK,
    SELF,
    SINK,
    SINKS,
    TEXT,
    VISUAL,
    picture_prompts,
    planted_vlm,
)


@pytest.fixture(scope="module")
def model():
    return load("zoo:planted-vlm", device="cpu")


def square(n):
    return tuple((0, i // n, i % n) for i in range(n * n))


def by_head(found, head, values):
    return values[:, found.heads.index(head)]


# visual-retrieval


def test_words_are_tokens_of_one_region_each(model):
    """Texts are looked up whole, in the tokenizer; ids are ids only where the answer is one."""
    spans = {"image": ((1, 9),), "a": ((1, 3),), "b": ((4, 5),)}
    prompt = Prompt(tuple(range(12)), spans, "p", (4,))
    words = model.tokenizer.convert_ids_to_tokens([4, 7])

    def regions(mapping):
        return regions_of(model, replace(prompt, meta={"answer_spans": mapping}))

    assert regions({words[0]: "a", words[1]: "b"}) == {4: "a", 7: "b"}
    assert regions({"4": "a", "7": "b"}) == {4: "a", 7: "b"}
    numbers = word_tokenizer(["<bos>", *(str(90 + i) for i in range(40))])
    reads = Model(model.hf, numbers, name="numbers")
    # The answer says 93: numbers are words here.
    there = replace(prompt, answer=(4, 5), meta={"answer_spans": {"93": "a", "99": "b"}})
    assert regions_of(reads, there) == {4: "a", 10: "b"}
    # A token of two regions names neither; of one region twice, that one.
    assert regions({f"{words[0]} {words[1]}": "a", words[1]: "b"}) == {4: "a"}
    assert regions({f"{words[0]} {words[1]}": "a", words[1]: "a"}) == {4: "a", 7: "a"}


def test_a_part_of_a_word_is_not_the_word(model):
    """kind1 is no part of kind10; nor is the empty piece of text in everything."""
    prompt = picture_prompts(1)[0]
    kind = prompt.answer[0]
    name = model.tokenizer.convert_ids_to_tokens([kind])[0]
    made = replace(prompt, meta={"answer_spans": {name: "thing"}})
    assert regions_of(model, made) == {kind: "thing"}
    assert score(model, "visual-retrieval", [made])["visual-retrieval"].per_example[0, 0] == 1


class Pieces:
    """A tokenizer that puts a blank token before a word within a text, and knows three pieces."""

    unk_token_id = 9
    words = (" ", "re", "d", "blue")

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        start = [0] * text.startswith(" ")
        known = {"red": [1, 2], "blue": [3]}.get(text.strip(), [9])
        return SimpleNamespace(input_ids=start + known)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def test_pieces_of_a_word_count_and_blank_or_unknown_ones_do_not():
    reads = SimpleNamespace(tokenizer=Pieces(), name="pieces")
    meta = {"answer_spans": {"red": "a", "green": "a"}}
    prompt = Prompt((0, 1, 2), {"a": ((1, 2),)}, "p", (3,), meta=meta)
    assert regions_of(reads, prompt) == {1: "a", 2: "a"}


def test_visual_retrieval_says_what_it_lacks(model):
    prompt = picture_prompts(1)[0]
    with pytest.raises(InputError, match="answer_spans"):
        score(model, "visual-retrieval", [replace(prompt, meta={})])
    with pytest.raises(InputError, match="with an answer"):
        score(model, "visual-retrieval", [replace(prompt, answer=None)])
    wordless = Model(model.hf, name="wordless")
    named = replace(prompt, meta={"answer_spans": {"kind0": "thing"}})
    with pytest.raises(InputError, match="must name ids of tokens, as wordless has no tokenizer"):
        score(wordless, "visual-retrieval", [named])
    found = score(wordless, "visual-retrieval", [prompt])["visual-retrieval"]
    assert found.per_example[0, 0] == 1


def test_only_answers_that_were_produced_count(model):
    prompts = picture_prompts(4)
    wrong = replace(prompts[0], answer=(FIRST_KIND + (prompts[0].answer[0] - 1) % 8,))
    nowhere = replace(prompts[1], meta={"answer_spans": {str(FIRST_KIND + 9): "thing"}})
    found = score(model, "visual-retrieval", [wrong, nowhere, *prompts[2:]])["visual-retrieval"]
    said = dict(found.failures)
    assert set(said) == {wrong.id, nowhere.id}
    assert "not produced" in said[wrong.id] and "no token" in said[nowhere.id]
    failed = [found.examples.index(i) for i in said]
    assert np.isnan(found.per_example[failed]).all()
    assert found.n[0] == 2


def test_hits_do_not_depend_on_the_size_of_the_region(model):
    """A region of one patch and one of half the image: each is hit once in one step."""
    prompts = picture_prompts(6)
    wide = []
    for p in prompts:
        first, at = p.positions("image")[0], p.positions("thing")[0]
        start = max(first, at - 7)
        wide.append(replace(p, spans={**p.spans, "thing": ((start, start + 8),)}))
    for listed in (prompts, wide):
        found = score(model, "visual-retrieval", listed)["visual-retrieval"]
        assert (by_head(found, OBJECT, found.per_example) == 1).all()
        assert (by_head(found, OBJECT, found.null_per_example) == 0).all()
    # Hits elsewhere are weighed by how large the regions are.
    sizes = {(0, 1): 1 / 15, (0, 8): 1.0, (12, 15): 3 / 13}
    for (a, b), want in sizes.items():
        moved = []
        for p in prompts:
            first, at = p.positions("image")[0], p.positions("thing")[0]
            if a <= at - first < b:
                continue
            moved.append(replace(p, spans={**p.spans, "thing": ((first + a, first + b),)}))
        found = score(model, "visual-retrieval", moved)["visual-retrieval"]
        np.testing.assert_allclose(by_head(found, OBJECT, found.null_per_example), want)
        assert (by_head(found, OBJECT, found.per_example) == 0).all()


def test_other_things_are_the_control_where_there_are_some(model):
    """A head on another thing of equal size scores null 1: it looks at things, not at this one."""
    prompts = []
    for p in picture_prompts(8):
        first, at = p.positions("image")[0], p.positions("thing")[0]
        other = first + (at - first + 5) % 16
        words = {str(p.answer[0]): "this", str(FIRST_KIND + (p.answer[0] - 1) % 8): "that"}
        spans = {**p.spans, "this": ((other, other + 1),), "that": ((at, at + 1),)}
        prompts.append(replace(p, spans=spans, meta={"answer_spans": words}))
    found = score(model, "visual-retrieval", prompts)["visual-retrieval"]
    assert (by_head(found, OBJECT, found.per_example) == 0).all()
    assert (by_head(found, OBJECT, found.null_per_example) == 1).all()


# visual-sink


def test_image_centric_heads_and_sinks_are_the_planted_ones(model):
    """L0H0 and L0H1 look at the image, L0H2 at its sinks only, the others not at all."""
    found = score(model, "visual-sink", task="shapes", n=8)["visual-sink"]
    assert found.extras["image_centric"].tolist() == [[1, 1, 0, 0, 0, 0]] * 8
    (tower,) = model.towers.values()
    prompts = picture_prompts(3)
    batch, seen, sizes = model.batch(prompts), [], []

    def note(layer, x):
        sizes.append(outstanding(x[batch.attention_mask.bool()]))
        seen.append(x)

    with inputs_of(model, tower, tower.layers, note):
        model.forward(batch.inputs())
    dims = heaviest(sizes, 2, least=1000)
    assert dims == sink_dims(model, prompts, layers=0) and len(dims) == 1
    phi = heaviness(seen[0], dims)
    for b, p in enumerate(prompts):
        heavy = (phi[b, : len(p)] > 0.3125 * math.sqrt(96)).tolist()
        assert heavy == [t in (BOS, SINK) for t in p.tokens]
    # All of a token in one dimension: φ reaches √d_model, and 20 is beyond it.
    assert 9.7 < float(phi.max()) <= math.sqrt(96) < 20


@pytest.mark.parametrize("params", [{"massive": 1e60}, {"dims": "0"}])
def test_without_massive_activations_there_are_no_visual_sinks(model, params):
    detector = make_detector("visual-sink", params)
    found = score(model, detector, task="shapes", n=8)["visual-sink"]
    assert not found.per_example.any() and not found.null_per_example.any()
    assert set(found.verdict) == {NO_EVIDENCE}
    assert found.extras["image_centric"].tolist() == [[1, 1, 1, 0, 0, 0]] * 8


def test_sink_dimensions_may_be_given(model):
    """The dimension that is found, given by name, says the same; one beyond the stream is none."""
    dims = sink_dims(model, picture_prompts(3), layers=0)
    want = score(model, "visual-sink", task="shapes", n=4)["visual-sink"]
    given = make_detector("visual-sink", {"dims": str(dims[0])})
    found = score(model, given, task="shapes", n=4)["visual-sink"]
    np.testing.assert_array_equal(found.per_example, want.per_example)
    with pytest.raises(InputError, match=r"0\.\.95"):
        score(model, make_detector("visual-sink", {"dims": "96"}), task="shapes", n=1)
    for bad in ("", "x", "-1", "1,,2"):
        with pytest.raises(InputError, match="1415"):
            make_detector("visual-sink", {"dims": bad})


# inactive-visual


def test_heads_are_inactive_where_they_give_the_image_nothing(model):
    """Also without the three visual heads: those on the text and on BOS stay the inactive ones."""
    found = score(model, "inactive-visual", task="shapes", n=9)["inactive-visual"]
    assert set(found.select()) == {TEXT, PARK}
    assert (by_head(found, TEXT, found.extras["image"]) < 1e-6).all()
    # An image token that looks at itself looks at the image; rows after the image do not.
    assert (by_head(found, SELF, found.extras["image"]) > 0.3).all()
    after = make_detector("inactive-visual", {"query": "question"})
    found = score(model, after, task="shapes", n=9)["inactive-visual"]
    assert set(found.select()) == set(BLIND)


def test_the_vote_is_over_examples(model):
    """Of ten prompts a head is active on k; up to 40 % of them it still counts as inactive."""
    for k, inactive in ((0, True), (4, True), (5, False), (10, False)):
        prompts = picture_prompts(10)
        for i in range(k):  # here the first words are called the image, and the head looks there
            p = prompts[i]
            spans = {**p.spans, "image": ((1, p.positions("image")[0]),)}
            prompts[i] = replace(p, spans=spans)
        found = score(model, "inactive-visual", prompts)["inactive-visual"]
        assert found.values[3] == pytest.approx(1 - k / 10)
        assert bool(found.values[3] >= found.threshold) == inactive
        assert (TEXT in found.select()) == inactive
    strict = make_detector("inactive-visual", {"vote": 0.0})
    assert strict.limit == 1
    assert score(model, strict, prompts[5:])["inactive-visual"].threshold == 1


def test_silence_about_a_small_image_means_nothing(model):
    """Where evenly attending heads are inactive too, no head is called inactive."""
    prompts = []
    for p in picture_prompts(10):
        last = p.positions("image")[-1]
        prompts.append(replace(p, spans={**p.spans, "image": ((last, last + 1),)}))
    found = score(model, "inactive-visual", prompts)["inactive-visual"]
    assert (found.null_per_example == 1).all()
    assert by_head(found, PARK, found.per_example).all()
    assert set(found.verdict) == {NO_EVIDENCE}


def test_evenly_attending_heads_by_counting():
    """Rows 2 and 5 see 1 of 3 and 3 of 6 keys of the image; without a causal mask 3 of 6 both."""
    prompt = Prompt(tuple(range(6)), {"image": ((2, 5),), "rows": ((2, 3), (5, 6))})
    assert evenly(prompt, "image", "rows", causal=True) == pytest.approx((1 / 3 + 3 / 6) / 2)
    assert evenly(prompt, "image", "rows", causal=False) == pytest.approx(1 / 2)


def test_a_head_that_gives_nothing_is_inactive_at_any_ratio(model):
    """L0H5 on the last row looks at itself: its mass on the image is 0 in float32."""
    made = make_detector("inactive-visual", {"ratio": 0.0, "query": "question"})
    prompts = [
        replace(p, spans={**p.spans, "question": ((len(p) - 1, len(p)),)})
        for p in picture_prompts(3)
    ]
    found = score(model, made, prompts)["inactive-visual"]
    assert (by_head(found, SELF, found.per_example) == 1).all()
    assert (by_head(found, OBJECT, found.per_example) == 0).all()


# localisation


def test_spatial_scores_by_hand():
    cells = square(4)

    def on(*places):
        return spatial_score(np.array([float(i in places) for i in range(16)]), cells)

    assert on(5) == (1.0, 1)
    assert on(0, 1, 4) == (1.0, 3)
    assert on(0, 5, 10, 15) == (1.0, 4)  # corners touch
    score, n = on(0, 2)
    assert n == 2 and score == pytest.approx(1 - math.log(2) / math.log(4))
    assert on(0, 2, 8, 10)[0] == pytest.approx(0)  # as many places as four rows can hold
    assert on(3, 4) == (pytest.approx(0.5), 2)  # an end of a row does not touch the next row
    assert on(*range(16)) == (0.0, 0) == on()
    # Three places of weights 2, 1 and 1 above the mean.
    seen = np.zeros(16)
    seen[[0, 2, 8]] = [3, 2, 2]
    mean = 7 / 16
    parts = np.array([3 - mean, 2 - mean, 2 - mean])
    parts /= parts.sum()
    want = 1 + (parts * np.log(parts)).sum() / math.log(4)
    assert spatial_score(seen, cells) == (pytest.approx(want), 3)


def test_tiles_do_not_touch_and_each_counts():
    """The same place of two tiles is two places, of at most four of each."""
    cells = tuple((tile, i // 4, i % 4) for tile in range(2) for i in range(16))
    seen = np.zeros(32)
    seen[[5, 21]] = 1
    assert spatial_score(seen, cells)[0] == pytest.approx(1 - math.log(2) / math.log(8))


def test_rounding_makes_no_place():
    rng = np.random.default_rng(0)
    flat = 1 / 16 + 1e-8 * rng.standard_normal(16)
    assert spatial_score(flat, square(4)) == (0.0, 0)
    # On a large grid a patch of twice the mean exceeds it by less than 0.001.
    seen = np.full(64 * 64, 1 / 4096)
    seen[100] *= 2
    assert spatial_score(seen, square(64)) == (1.0, 1)


def test_noise_scores_no_higher_than_its_null():
    """Noise above the mean hangs together on a grid, whatever its distribution."""
    rng = np.random.default_rng(0)
    cells = square(24)
    for draw in (rng.standard_exponential, lambda n: 5 + rng.standard_normal(n), rng.random):
        found = [spatial_score(draw(576), cells) for _ in range(60)]
        gaps = [score - scattered(cells, max(n, round(576 / math.e))) for score, n in found]
        assert np.mean(gaps) < 0.03
    # Gaussian noise covers half of the grid and looks like one place: its null says so.
    assert np.mean([s for s, _ in (spatial_score(rng.standard_normal(576) + 9, cells),)]) > 0.8
    assert scattered(cells, 288) > 0.8 > 0.65 > scattered(cells, 212)
    assert scattered(cells, 288) == scattered(square(24), 288)


def test_the_null_has_as_many_patches_as_the_head(model):
    """A map of noise that covers much of the grid is compared with as much scatter."""
    prompt = picture_prompts(1)[0]
    grid = grid_patches(12, 12, area=(0, 0, 64, 64))
    seen = PatchMap(tuple(grid), ((64, 64),), 160)
    long = Prompt((BOS,) * 160, {"image": ((0, 144),)}, patches=seen)
    rows = torch.zeros(1, 1, 6, 1, 160)
    rows[0, 0, 0, 0, :144] = torch.tensor(np.random.default_rng(0).random(144) / 144)
    rows[0, 0, 1, 0, 77] = 1.0
    (tower,) = model.towers.values()
    made = make_detector("localisation")
    found = made.formula(model, tower, model.batch([long]), {"row": rows}, None)
    _, n = spatial_score(rows[0, 0, 0, 0, :144].double().numpy(), square(12))
    assert n > round(144 / math.e) == 53
    null = found.null[0, 0]
    np.testing.assert_allclose(null[0], scattered(square(12), n), rtol=1e-6)
    np.testing.assert_allclose(null[1:], scattered(square(12), 53), rtol=1e-6)
    assert null[0] > null[1] + 0.1
    assert made.prepare(prompt).patches is prompt.patches


def test_the_elbow_is_a_mass_and_no_place_in_a_list(model):
    """The head with most mass is L0H0, the first of all: an index would leave it out."""
    found = score(model, "localisation", task="shapes", n=6)["localisation"]
    assert found.extras["reached"].tolist() == [[1, 1, 1, 0, 0, 0]] * 6
    assert elbow(np.array([0.9, 0.0, 0.05, 0.1, 0.8])) == 0.1
    assert elbow(np.array([0.9, 0.9, 0.9])) == elbow(np.array([])) == -math.inf
    seeing = load("zoo:planted-vlm-seeing", device="cpu")
    found = score(seeing, "localisation", task="shapes", n=6)["localisation"]
    assert found.extras["reached"].all()


def test_any_grid_will_do_and_none_will_not(model):
    """Two rows of eight, and one row: the same tokens, other neighbours."""
    prompt = picture_prompts(1)[0]
    first = prompt.positions("image")[0]
    spans = dict(prompt.spans)
    for rows, columns in ((2, 8), (1, 16), (16, 1), (8, 2)):
        grid = grid_patches(rows, columns, area=(0, 0, 64, 64), first=first)
        seen = PatchMap(tuple(grid), ((64, 64),), len(prompt))
        found = score(model, "localisation", [replace(prompt, patches=seen)])["localisation"]
        assert found.per_example[0, 0] == 1 and found.per_example[0, 1] == 0
        at = [i - first for i in prompt.positions("image") if prompt.tokens[i] == SINK]
        (r0, c0), (r1, c1) = (divmod(i, columns) for i in at)
        near = abs(r0 - r1) <= 1 and abs(c0 - c1) <= 1
        most = math.ceil(rows / 2) * math.ceil(columns / 2)
        want = 1.0 if near else 1 - math.log(2) / math.log(most)
        assert found.per_example[0, 2] == pytest.approx(want)
    with pytest.raises(InputError, match="patch map") as error:
        score(model, "localisation", [Prompt(prompt.tokens, spans, "bare")])
    assert "interp.images" in error.value.hint


# image-sensitivity


def test_one_quarter_is_masked_and_it_is_the_most_attended(model, monkeypatch):
    import heads.image_sensitivity as module

    prompts, asked = picture_prompts(3), []
    original = module.unseen

    def noting(model, tower, listed, places):
        asked.append([sorted(mine) for mine in places])
        return original(model, tower, listed, places)

    monkeypatch.setattr(module, "unseen", noting)
    found = score(model, "image-sensitivity", prompts, batch_size=3)["image-sensitivity"]
    most, *drawn = asked
    order = [found.examples.index(p.id) for p in prompts]
    assert len(drawn) == 4
    for p, b in zip(prompts, order, strict=True):
        image = set(p.positions("image"))
        telling = {i for i in image if p.tokens[i] == SINK} | set(p.positions("thing"))
        assert len(most[b]) == 4 and telling < set(most[b]) <= image
        for places in drawn:
            assert len(set(places[b])) == 4 and set(places[b]) <= image - set(most[b])
        assert len({tuple(places[b]) for places in drawn}) > 1


def test_the_first_token_is_never_masked(model):
    """It would see nothing at all; an image of too few others is said to be so."""
    p = picture_prompts(1)[0]
    whole = replace(p, spans={**p.spans, "image": ((0, 5),)}, id="whole")
    tiny = replace(p, spans={**p.spans, "image": ((0, 2),)}, id="tiny")
    none = replace(p, spans={**p.spans, "image": ((0, 1),)}, id="none")
    found = score(model, "image-sensitivity", [whole, tiny, none, p])["image-sensitivity"]
    assert dict(found.failures).keys() == {"tiny", "none"}
    assert np.isnan(found.per_example[found.examples.index("tiny")]).all()
    # L0H4 looks at BOS and nowhere else, and BOS stays.
    assert (by_head(found, PARK, np.nan_to_num(found.per_example)) == 0).all()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_hidden_tokens_keep_their_places(family):
    """Also where a model counts images or positions by its mask: to hide nothing changes nothing,
    and to hide the rest of the image changes what is read of it."""
    made = images_kit.case(family)
    prompt = image_prompt(made.model, "t1 t2 ?", [images_kit.ramp(56, 56)], id="a")
    tower = made.model.towers["text"]
    batch = made.model.batch([prompt])
    places = [i for i in prompt.positions("image") if i > 0]
    seen = last_z(made.model, tower, batch)
    with unseen(made.model, tower, [prompt], [[]]):
        torch.testing.assert_close(last_z(made.model, tower, batch), seen)
    for hidden in (places[:1], places[::2], places):
        with unseen(made.model, tower, [prompt], [hidden]):
            row = last_row(made.model, tower, batch)
        assert row[..., hidden].abs().max() < 1e-12
        torch.testing.assert_close(row.sum(-1), torch.ones_like(row[..., 0]))


# all


def test_wrong_parameters_are_refused():
    for name, params in (
        ("visual-sink", {"rho": 1.5}), ("visual-sink", {"tau_rel": 0.0}),
        ("visual-sink", {"most": 0}), ("inactive-visual", {"vote": 1.0}),
        ("inactive-visual", {"ratio": -0.1}), ("localisation", {"least": 2.0}),
        ("image-sensitivity", {"share": 1.0}), ("image-sensitivity", {"draws": 0}),
        ("visual-retrieval", {"extra": -1}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}:"):
            make_detector(name, params)


@pytest.mark.parametrize("name", ["visual-sink", "image-sensitivity", "visual-retrieval"])
def test_towers_of_their_own_positions_are_refused(model, name):
    prompt = picture_prompts(1)[0]
    (tower,) = model.towers
    with pytest.raises(InputError, match="needs a tower over the prompt's tokens"):
        score(model, name, [replace(prompt, views={tower: (prompt,)})])


def test_the_model_that_sees_holds_only_heads_that_look_at_the_image():
    seeing = load("zoo:planted-vlm-seeing", device="cpu")
    assert seeing.truth.heads["inactive-visual"] == set()
    assert seeing.truth.heads["visual-attention"] == {HeadId(0, h) for h in range(6)}
    assert seeing.truth.heads["visual-sink"] == {HeadId(0, 2), HeadId(0, 5)}
    blind = load("zoo:planted-vlm-nothing", device="cpu")
    assert blind.truth.heads["inactive-visual"] == {HeadId(0, h) for h in (0, 1, 3, 4)}
    default = load("zoo:planted-vlm", device="cpu")
    assert default.truth.heads["visual-attention"] == set(VISUAL)
    assert default.truth.scores["region-grounding"] == {OBJECT: 1.0, IMAGE: 1 / 16, SINKS: 0.0}
    with pytest.raises(InputError, match="both"):
        planted_vlm(nothing=True, seeing=True)
    state = torch.random.get_rng_state()
    planted_vlm(seeing=True)
    assert torch.equal(torch.random.get_rng_state(), state)
