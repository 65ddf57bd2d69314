"""Several towers in one run: the columns of each are those of a run of its own."""

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import images_kit as kit
import numpy as np
import pytest
import torch

import heads.scoring as scoring
from heads import score
from heads.detector import Outcome, ReadingDetector
from heads.scoring import execute, plan
from interp.engine import read
from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.images import image_prompt
from interp.loading import load
from interp.prompts import Prompt
from interp.readings import KeyMass, Rows
from interp.run import Run

MANY = ("region-grounding", "visual-attention", "localisation", "image-sensitivity",
        "content-agnostic", "distance-profile")  # fmt: skip
BOTH = ("text", "vision")
APPLY = {
    "region-grounding": BOTH, "visual-attention": BOTH, "localisation": BOTH,
    "image-sensitivity": ("text",), "content-agnostic": ("vision",),
    "distance-profile": ("vision",),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load("zoo:shapes-vlm")


def same(ours, theirs):
    return ours.shape == theirs.shape and (
        ours.astype(np.float64).tobytes() == theirs.astype(np.float64).tobytes()
    )


def assert_columns(table, alone):
    """Every number of a table is that of the tables of its towers alone, side by side."""
    assert table.towers == tuple(t for one in alone for t in one.towers)
    assert table.heads == tuple(h for one in alone for h in one.heads)
    for one in alone:
        mine = [table.heads.index(h) for h in one.heads]
        assert table.examples == one.examples and table.extras.keys() == one.extras.keys()
        assert same(table.per_example[:, mine], one.per_example)
        assert same(table.null_per_example[:, mine], one.null_per_example)
        for name in one.extras:
            assert same(table.extras[name][:, mine], one.extras[name]), name
        for name in ("score", "null", "p"):
            assert same(table.grid(one.towers[0], name), one.grid(one.towers[0], name))


def corrected(p):
    """Benjamini and Hochberg over all p that are defined, by its definition."""
    defined = [x for x in p if x == x]
    return [
        min(len(defined) * x / sum(z <= x for z in defined) for x in defined if x >= own)
        if own == own else np.nan
        for own in p
    ]  # fmt: skip


# ----------------------------------------------------------------------- against single towers


def test_text_and_vision_in_one_run_are_the_two_runs_column_by_column(model):
    made = score(model, MANY, task="shapes", n=5, batch_size=2, tower=BOTH)
    assert list(made) == list(MANY)
    for name, table in made.items():
        alone = [
            score(model, name, task="shapes", n=5, batch_size=2, tower=t)[name] for t in APPLY[name]
        ]
        assert_columns(table, alone)
        assert np.allclose(table.q, corrected([x for one in alone for x in one.p]), equal_nan=True)
    both = made["region-grounding"]
    assert [h.tower for h in both.heads] == ["text"] * 32 + ["vision"] * 12
    single = score(model, "region-grounding", task="shapes", n=5, batch_size=2)["region-grounding"]
    # More heads are tested: the same p is worth less.
    assert (both.q[:32] >= single.q).all() and (both.q[:32] > single.q).any()


def test_a_tower_that_a_detector_does_not_apply_to_is_left_out_and_that_is_said(model):
    made = score(model, ["content-agnostic", "image-sensitivity", "visual-attention"],
                 task="shapes", n=3, tower=BOTH)  # fmt: skip
    for name, other, why in (
        ("content-agnostic", "text", "one image that tower 'text' sees as a whole"),
        ("image-sensitivity", "vision", "needs a tower over the prompt's tokens; got 'vision'"),
    ):
        table = made[name]
        assert other not in table.towers
        assert list(table.provenance["left_out"]) == [other]
        assert why in table.provenance["left_out"][other]
        [(example, said)] = table.failures
        assert example == table.examples[0] and said.startswith(f"tower {other} is left out: ")
        assert why in said and "3 of 3 examples" in table.message
    whole = made["visual-attention"]
    assert whole.towers == BOTH and whole.failures == () and "left_out" not in whole.provenance


def test_a_detector_that_applies_to_no_tower_is_an_error_before_anything_is_measured(
    model, monkeypatch
):
    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(scoring, "_measure", never)
    four = kit.mllama().model
    seen = [image_prompt(four, "<|image|> the cat what is this ?", [kit.ramp(24, 24)])]
    with pytest.raises(InputError, match="distances between patches"):
        score(four, ["visual-attention", "distance-profile"], seen, tower=("cross", "text"))
    # The last of several groups of prompts.
    with pytest.raises(InputError, match="needs a tower over the prompt's tokens"):
        score(load("zoo:shapes-vlm"), ["region-grounding", Never()], n=2, tower=BOTH)


@dataclass(frozen=True)
class Never(ReadingDetector):
    """Applies to nothing."""

    name: ClassVar[str] = "never"
    unit: ClassVar[str] = "none"
    threshold: ClassVar[float] = 0.0
    task: ClassVar[str] = "tiles"

    def readings(self):
        return {"mass": KeyMass()}

    def formula(self, model, tower, batch, answers, control):
        raise InputError("detector 'never' needs a tower over the prompt's tokens")


def test_text_vision_and_cross_attention_heads_of_one_model_are_read_in_one_run():
    model = kit.mllama().model
    prompts = [
        image_prompt(model, "<|image|> the cat what is this ?", [kit.ramp(24, 24)], id=str(i))
        for i in range(3)
    ]
    towers = tuple(model.towers)
    assert towers == ("text", "vision", "vision-global_transformer", "cross")
    detectors = ["visual-attention", "distance-profile", "previous-token"]
    made = score(model, detectors, prompts, batch_size=2, tower=towers)
    for name, apply in zip(detectors, (towers, towers[1:3], towers[:1]), strict=True):
        alone = [score(model, name, prompts, batch_size=2, tower=t)[name] for t in apply]
        assert_columns(made[name], alone)
        assert set(made[name].provenance.get("left_out", ())) == {*towers} - {*apply}
    table = made["visual-attention"]
    assert str(table.heads[-1]) == "cross.L3H1"
    # Keys of cross attention are patches, class tokens and what fills up, not the prompt's tokens.
    (row,) = prompts[0].views["cross/keys"]
    assert table.null[-1] == pytest.approx(len(row.positions("image")) / len(row))
    last = len(prompts[0]) - 1
    batch = model.batch(
        [replace(prompts[0], spans={**prompts[0].spans, "at": ((last, last + 1),)})]
    )
    whole = read(model, batch, {"row": Rows("at")}, tower="cross")["row"].values[0, -1, -1, 0]
    want = float(whole[row.positions("image")].sum())
    assert table.per_example[0, -1] == pytest.approx(want, abs=1e-6)


# ----------------------------------------------------------------------------- a planted model


@functools.cache
def planted():
    """One head of the text and one of the vision tower look at the image; the others at the rest.

    Dimension 0 tells the image from the rest: in the vision tower the class token from patches, in
    the text patches from words. Keys read it with one sign or the other, queries are constant.
    """
    case = kit.llava()
    hf = copy.deepcopy(case.model.hf)
    eye, words = hf.model.vision_tower, hf.model.language_model
    with torch.no_grad():
        for layer in [*eye.encoder.layers, *words.layers]:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.zero_()
            for name, weight in layer.named_parameters():  # nothing is written to the stream
                if any(x in name for x in ("out_proj", "o_proj", "fc2", "down_proj")):
                    weight.zero_()
        eye.embeddings.class_embedding.zero_()[0] = 100.0
        eye.embeddings.patch_embedding.weight[0].zero_()
        eye.embeddings.position_embedding.weight.zero_()
        for i, layer in enumerate(eye.encoder.layers):
            layer.self_attn.q_proj.bias.fill_(0.0)
            layer.self_attn.k_proj.bias.fill_(0.0)
            for head in range(2):
                layer.self_attn.q_proj.bias[8 * head] = 10.0
                layer.self_attn.k_proj.weight[8 * head, 0] = -10.0 if (i, head) == (1, 0) else 10.0
        projector = hf.model.multi_modal_projector.linear_2
        projector.bias.zero_()[0] = 100.0
        words.embed_tokens.weight[:, 0] = -100.0
        for head in range(2):
            # The slowest pair of the rotation hardly turns over so few tokens. A query is of a
            # word, whose dimension 0 is negative.
            words.layers[0].self_attn.q_proj.weight[8 * head + 3, 0] = -10.0
            words.layers[0].self_attn.k_proj.weight[8 * head + 3, 0] = 10.0 if head else -10.0
    plain = case.model
    return load(hf, tokenizer=plain.tokenizer, processor=plain.processor), case.mark


TRUTH = {HeadId(0, 1), HeadId(1, 0, "vision")}


def test_planted_heads_of_both_towers_are_found_in_one_table_and_no_other():
    model, mark = planted()
    rng = np.random.default_rng(0)
    prompts = [
        image_prompt(model, f"{mark} the cat what is this ?",
                     [rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)], id=str(i))
        for i in range(9)
    ]  # fmt: skip
    table = score(model, "visual-attention", prompts, tower=BOTH)["visual-attention"]
    assert set(table.select()) == TRUTH and len(table.heads) == 6
    for head, value in zip(table.heads, table.values, strict=True):
        assert value == pytest.approx(1.0 if head in TRUTH else 0.0, abs=1e-3), head
    found = dict(zip(table.heads, table.null, strict=True))
    # Each tower has a null of its own: 64 of its 65 places, and of the prompt's 70.
    assert found[HeadId(0, 0)] == pytest.approx(64 / 70)
    assert found[HeadId(0, 0, "vision")] == pytest.approx(64 / 65)


# ------------------------------------------------------------------------------------ failures


@dataclass(frozen=True)
class Odd(ReadingDetector):
    """Fails on one prompt in each tower, on another in one, with a column in one tower alone."""

    name: ClassVar[str] = "odd"
    unit: ClassVar[str] = "attention"
    threshold: ClassVar[float] = 0.0
    needs: ClassVar[tuple[str, ...]] = ("image",)
    task: ClassVar[str] = "shapes"

    def readings(self):
        return {"mass": KeyMass()}

    def formula(self, model, tower, batch, answers, control):
        values = answers["mass"][..., 0].double()
        failures = {}
        for b, prompt in enumerate(batch.prompts):
            if prompt.id == "shapes-0-1" or (prompt.id, tower.name) == ("shapes-0-2", "vision"):
                failures[b] = f"no {tower.name}"
                values[b] = np.nan
        extras = {"seen": 2 * values} if tower.name == "vision" else {}
        return Outcome(values, 0 * values, extras, failures)


def test_failures_name_their_tower_and_a_column_of_one_tower_is_empty_in_the_other(model):
    table = score(model, [Odd()], n=4, batch_size=2, tower=BOTH)["odd"]
    assert dict(table.failures) == {
        "shapes-0-1": "tower text: no text; tower vision: no vision",
        "shapes-0-2": "tower vision: no vision",
    }
    assert np.isnan(table.extras["seen"][:, :32]).all()
    assert same(table.extras["seen"][:, 32:], 2 * table.per_example[:, 32:])
    rows = [table.examples.index(f"shapes-0-{i}") for i in (1, 2)]
    assert np.isnan(table.per_example[rows[0]]).all()
    assert np.isfinite(table.per_example[rows[1], :32]).all()
    assert np.isnan(table.per_example[rows[1], 32:]).all()
    alone = score(model, [Odd()], n=4, batch_size=2, tower="vision")["odd"]
    assert dict(alone.failures) == {"shapes-0-1": "no vision", "shapes-0-2": "no vision"}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_later_prompt_that_cannot_be_read_is_an_error(model, batch_size):
    """The first prompt settles which towers apply; nothing is left out half-way."""

    @dataclass(frozen=True)
    class Late(Odd):
        name: ClassVar[str] = "late"

        def formula(self, model, tower, batch, answers, control):
            if tower.name == "vision" and any(p.id == "shapes-0-1" for p in batch.prompts):
                raise InputError("prompt shapes-0-1 is odd")
            return super().formula(model, tower, batch, answers, control)

    with pytest.raises(InputError, match="shapes-0-1 is odd"):
        score(model, [Late()], n=4, batch_size=batch_size, tower=BOTH)


# -------------------------------------------------------------------------------- keys and runs


def test_a_single_tower_has_the_key_and_the_bytes_it_always_had(model):
    named = plan(model, "visual-attention", n=2, tower="text")
    assert named.key["tower"] == "text" and named.tower == "text"
    for tower in (None, ("text",), ["text"]):
        assert plan(model, "visual-attention", n=2, tower=tower).key == named.key
    one = score(model, "visual-attention", n=2, tower="vision")["visual-attention"]
    of_a_list = score(model, "visual-attention", n=2, tower=["vision"])["visual-attention"]
    assert one.to_bytes() == of_a_list.to_bytes() and one.provenance["tower"] == "vision"


def test_towers_have_one_order_and_a_key_of_their_own(model):
    both = plan(model, "visual-attention", n=2, tower=("vision", "text"))
    assert both.towers == BOTH and both.key["tower"] == "text,vision"
    assert both.key == plan(model, "visual-attention", n=2, tower=BOTH).key
    for tower, error, text in (
        ((), InputError, "at least one tower"),
        (("text", "text"), InputError, "each tower may be asked for once"),
        (("text", "audio"), SiteError, "no tower 'audio'; it has: text, vision"),
    ):
        with pytest.raises(error, match=text):
            plan(model, "visual-attention", n=2, tower=tower)


class Kill(Exception):
    pass


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.safetensors")}


@pytest.mark.parametrize("after", [1, 3, 4, 5])
def test_a_killed_run_of_several_towers_goes_on_and_ends_byte_equal(
    model, tmp_path, monkeypatch, after
):
    """Batches of two groups of prompts, in the second of which a tower is left out."""
    detectors = ["region-grounding", "image-sensitivity", "content-agnostic"]

    def planned():
        return plan(model, detectors, n=5, batch_size=2, tower=BOTH)

    made = planned()
    assert [len(j.detectors) for j in made.jobs] == [2, 2, 2, 1, 1, 1]
    with Run.open_or_create(tmp_path / "whole", made.key) as run:
        whole = execute(model, made, run=run)
    measured, tried = [], []
    measure, applying = scoring._measure, scoring.applying

    def counted(model, towers, job, seed):
        measured.append(job.index)
        return measure(model, towers, job, seed)

    def noted(model, towers, job, seed):
        tried.append(job.index)
        return applying(model, towers, job, seed)

    monkeypatch.setattr(scoring, "_measure", counted)
    monkeypatch.setattr(scoring, "applying", noted)
    ticks = []

    def stop(done, total):
        ticks.append(done)
        if len(ticks) == after:
            raise Kill

    with pytest.raises(Kill), Run.open_or_create(tmp_path / "cut", made.key) as run:
        execute(model, made, run=run, progress=stop)
    assert tried == [0, 3]
    again = planned()
    with Run.open_or_create(tmp_path / "cut", again.key) as run:
        resumed = execute(model, again, run=run)
    assert measured == list(range(6))  # each batch once
    assert tried == ([0, 3, 3] if after < 4 else [0, 3])  # what a part tells is not tried again
    for name in detectors:
        assert resumed[name].to_bytes() == whole[name].to_bytes()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert resumed["content-agnostic"].towers == ("vision",)
    read = Run.load(tmp_path / "cut").scores
    assert read["region-grounding"].to_bytes() == whole["region-grounding"].to_bytes()
    # Complete: from its parts, and nothing is run.
    last = execute(model, planned(), run=Run.open_or_create(tmp_path / "cut", made.key))
    assert last["image-sensitivity"].to_bytes() == whole["image-sensitivity"].to_bytes()
    assert measured == list(range(6)) and len(tried) <= 3


def test_readings_of_a_tower_share_a_forward_pass(model):
    """Two detectors: a pass for each batch and tower, and one for each that is tried."""
    passes = []
    handle = model.hf.register_forward_hook(lambda *_: passes.append(1))
    try:
        score(model, ["visual-attention", "region-grounding"], n=4, batch_size=2, tower=BOTH)
        assert len(passes) == 2 * 2 + 2 * 2
        passes.clear()
        score(model, ["visual-attention", "region-grounding"], n=4, batch_size=2, tower="vision")
        assert len(passes) == 2
    finally:
        handle.remove()


def test_own_prompts_keep_their_ids(model):
    task = [Prompt(p.tokens, inputs=p.inputs, views=p.views, spans=p.spans, patches=p.patches)
            for p in shapes(model, 3)]  # fmt: skip
    table = score(model, "visual-attention", task, tower=BOTH)["visual-attention"]
    assert sorted(table.examples) == ["prompt-0", "prompt-1", "prompt-2"]


def shapes(model, n):
    from interp.tasks import make_task

    return make_task("shapes").prompts(model, n, seed=0)
