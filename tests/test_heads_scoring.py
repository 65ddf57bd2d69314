"""The scoring engine: one pass for many detectors, runs that go on, statistics, and refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

import heads.measuring as measuring
import heads.scoring as scoring
from heads.detector import DETECTORS, make_detector
from heads.scoring import execute, plan, score
from interp import load
from interp.errors import (
    InputError,
    RunError,
    SiteError,
    SmallerBatchWarning,
    SpanError,
    TooLargeError,
    UnknownNameError,
)
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Prompt
from interp.run import Run
from interp.stats import bh_qvalues
from interp.tasks import make_task

READERS = ["previous-token", "duplicate-token", "induction", "sink"]
REPEATED = make_task("repeated-tokens", {"length": 12, "repeats": 3, "vary": True})


@pytest.fixture(scope="module")
def model():
    return load("zoo:planted-heads")


@pytest.fixture(scope="module")
def retrieval():
    return load("zoo:planted-retrieval")


@pytest.fixture
def forwards(monkeypatch):
    """Number of prompts in each forward pass that reads."""
    original, seen = Model.forward, []

    def counted(self, inputs):
        seen.append(len(inputs["input_ids"]))
        return original(self, inputs)

    monkeypatch.setattr(Model, "forward", counted)
    return seen


def arrays_by_example(found):
    order = np.argsort(found.examples)
    return {name: array[order] for name, array in found.arrays().items()}


def assert_same(a, b, atol=1e-6):
    assert sorted(a.examples) == sorted(b.examples) and dict(a.failures) == dict(b.failures)
    mine, theirs = arrays_by_example(a), arrays_by_example(b)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], atol=atol)


def test_one_pass_for_all_detectors_gives_what_each_gives_alone(model):
    prompts = REPEATED.prompts(model, 5)
    together = score(model, READERS, prompts)
    assert list(together) == READERS
    for name in READERS:
        alone = score(model, name, prompts)[name]
        assert_same(together[name], alone)
        assert alone.verdict.tolist() == together[name].verdict.tolist()
    backwards = score(model, READERS[::-1], prompts)
    for name in READERS:
        assert_same(together[name], backwards[name])


def test_detectors_share_their_forward_passes(model, forwards):
    prompts = REPEATED.prompts(model, 5)
    model.check()
    made = plan(model, ["previous-token", "sink"], prompts, batch_size=2)
    forwards.clear()
    execute(model, made)
    assert forwards == [2, 2, 1]
    forwards.clear()
    execute(model, plan(model, ["previous-token", "sink", "duplicate-token"], prompts))
    assert forwards == [4, 4, 1, 1]  # and one more on the controls of duplicate-token


def test_detectors_with_one_task_are_scored_on_the_same_prompts(model):
    found = score(model, READERS, n=3)
    assert found["duplicate-token"].examples == found["induction"].examples
    assert set(found["previous-token"].examples) == {"repeated-0", "repeated-1", "repeated-2"}
    assert set(found["sink"].examples) == {"text-0", "text-1", "text-2"}
    for name in READERS:
        detector = DETECTORS[name]
        task = make_task(detector.task, detector.task_params)
        assert_same(found[name], score(model, name, task=task, n=3)[name])


def test_reading_and_decoding_detectors_share_a_call(retrieval):
    prompts = make_task("needle", {"lengths": (60, 90)}).prompts(retrieval, 4)
    both = score(retrieval, ["sink", "retrieval"], prompts, batch_size=3)
    for name in both:
        assert_same(both[name], score(retrieval, name, prompts)[name])


def test_batches_hold_prompts_of_similar_length(model):
    prompts = [Prompt((0, *range(1, n)), id=str(n)) for n in (40, 20, 39, 21, 38, 22)]
    made = plan(model, "sink", prompts, batch_size=3)
    assert [[len(p) for p in job.prompts] for job in made.jobs] == [[20, 21, 22], [38, 39, 40]]
    assert [job.tokens for job in made.jobs] == [63, 117] and made.tokens == 180
    assert [job.index for job in made.jobs] == [0, 1]


def test_examples_that_give_no_score_are_counted_not_zero(model, retrieval):
    prompts = [Prompt((0, *range(1, n)), id=f"p{n}") for n in (10, 15, 16, 30)]
    found = score(model, "sink", prompts)["sink"]
    assert dict(found.failures).keys() == {"p10", "p15"}
    assert dict(found.failures)["p10"] == "10 tokens, fewer than the 16 queries needed"
    assert found.n.tolist() == [2] * 10
    for example, row in zip(found.examples, found.per_example, strict=True):
        assert np.isnan(row).all() == (example in ("p10", "p15"))
    assert "2 of 4 examples" in found.message
    asked = make_task("needle", {"lengths": (60,)}).prompts(retrieval, 5)
    asked[1] = Prompt(asked[1].tokens, asked[1].spans, id="wrong", answer=(1,) * 6)
    found = score(retrieval, "retrieval", asked)["retrieval"]
    assert [i for i, _ in found.failures] == ["wrong"] and found.n.tolist() == [4] * 8
    assert found.values[found.heads.index(HeadId(1, 0))] == 1.0


def test_nothing_scored_is_undefined_and_says_why():
    model = load("zoo:planted-retrieval-broken")
    task = make_task("needle", {"lengths": (60,)})
    found = score(model, "retrieval", task=task, n=5)["retrieval"]
    assert np.isnan(found.values).all() and set(found.verdict) == {"undefined"}
    assert found.message.startswith("no successful run: 0 of 5") and not found.select()


def test_verdicts_follow_from_paired_tests_over_all_heads(model):
    found = score(model, "previous-token", task="text", n=12)["previous-token"]
    score_, null = found.per_example, found.null_per_example
    assert found.values.tolist() == pytest.approx(score_.mean(0).tolist())
    assert found.null.tolist() == pytest.approx(null.mean(0).tolist())
    for i in range(len(found.heads)):
        d = score_[:, i] - null[:, i]
        if (d == d[0]).all():
            want = 2.0**-12 if d[0] > 0 else 1.0
        else:
            want = max(ttest_rel(score_[:, i], null[:, i], alternative="greater").pvalue, 2.0**-12)
        assert found.p[i] == pytest.approx(want)
    # Benjamini and Hochberg by the definition: the smallest rate at which a head is rejected.
    p = found.p
    m = len(p)
    for i in range(m):
        rates = [p[j] * m / sum(p <= p[j]) for j in range(m) if p[j] >= p[i]]
        assert found.q[i] == pytest.approx(min(1.0, *rates))
    np.testing.assert_array_equal(found.q, bh_qvalues(p))
    claimed = (found.q <= 0.05) & (found.values >= found.threshold)
    assert (found.verdict == "previous-token").tolist() == claimed.tolist()
    # The local window has mass on the token before, but as much on those before that.
    local = found.heads.index(HeadId(1, 1))
    assert found.values[local] > 0.2 and found.verdict[local] == "no evidence"


def test_too_few_examples_find_nothing_and_say_so(model):
    found = score(model, "previous-token", n=3)["previous-token"]
    assert not found.select() and "too few" in found.message
    assert found.values[found.heads.index(HeadId(0, 0))] == pytest.approx(1)


def test_a_table_says_how_it_was_made(model):
    detector = make_detector("sink", {"epsilon": 0.4, "queries": 20})
    found = score(model, detector, task="text", n=2, seed=5)["sink"]
    assert found.threshold == 0.4 and found.params == {"epsilon": 0.4, "queries": 20}
    about = found.provenance
    assert about["model"] == "zoo:planted-heads" and about["seed"] == 5
    assert about["detectors"] == {"sink": {"epsilon": 0.4, "queries": 20}}
    assert about["dtype"] == "torch.float32" and about["attention"] == "sdpa"
    assert about["fingerprint"] == model.fingerprint and about["tower"] == "text"
    assert about["tasks"][0]["task"] == repr(make_task("text"))
    assert {"python", "torch", "transformers"} <= about["versions"].keys()
    assert found.unit == detector.unit and found.range == detector.range


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"n": 5}, {"batch_size": 3}, {"task": "text"}, {"detectors": ["sink"]},
     {"detectors": [make_detector("previous-token"), make_detector("sink", {"queries": 17})]}],
)  # fmt: skip
def test_the_key_of_a_plan_changes_with_all_that_numbers_depend_on(model, changes):
    base = {"detectors": ["previous-token", "sink"], "task": REPEATED, "n": 4, "seed": 0}

    def key(**kwargs):
        kwargs = base | kwargs
        return json.dumps(plan(model, kwargs.pop("detectors"), **kwargs).key, sort_keys=True)

    assert key() == key() and key(**changes) != key()


def test_the_key_changes_with_the_tokens_of_prompts(model):
    one, other = ([Prompt((0, 1, 2, i), id="a")] for i in (3, 4))
    assert plan(model, "sink", one).key != plan(model, "sink", other).key
    moved = [Prompt((0, 1, 2, 3), {"x": ((0, 1),)}, id="a")]
    assert plan(model, "sink", one).key != plan(model, "sink", moved).key


class Kill(Exception):
    pass


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*.safetensors")
    }


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_run_that_was_killed_goes_on_and_ends_byte_equal(model, tmp_path, monkeypatch, after):
    made = plan(model, [*READERS, "retrieval"], n=6, batch_size=2)
    assert len(made.jobs) > 5
    with Run.open_or_create(tmp_path / "whole", made.key) as run:
        whole = execute(model, made, run=run)

    calls, original = [], scoring._measure

    def counted(model, tower, job, seed):
        calls.append(job.index)
        return original(model, tower, job, seed)

    monkeypatch.setattr(scoring, "_measure", counted)
    ticks = []

    def stop(done, total):
        ticks.append(done)
        if len(ticks) == after:
            raise Kill

    with pytest.raises(Kill), Run.open_or_create(tmp_path / "cut", made.key) as run:
        execute(model, made, run=run, progress=stop)
    assert Run.load(tmp_path / "cut").status == "interrupted"
    assert len(calls) == after
    again = plan(load("zoo:planted-heads"), [*READERS, "retrieval"], n=6, batch_size=2)
    assert again.key == made.key
    with Run.open_or_create(tmp_path / "cut", again.key) as run:
        assert run.finished == frozenset(range(after))
        resumed = execute(model, again, run=run)
        assert run.status == "complete"
    assert calls == [job.index for job in made.jobs]  # each batch once
    assert {d: t.to_bytes() for d, t in resumed.items()} == {
        d: t.to_bytes() for d, t in whole.items()
    }
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(files(tmp_path / "cut")) == len(made.jobs) + 5
    # A complete run is read, not computed.
    run = Run.open_or_create(tmp_path / "cut", made.key)
    assert {d: t.to_bytes() for d, t in execute(model, made, run=run).items()} == {
        d: t.to_bytes() for d, t in whole.items()
    }
    assert len(calls) == len(made.jobs)


def test_a_run_keeps_failures_and_equals_a_call_without_one(model, tmp_path):
    prompts = [Prompt((0, *range(1, n)), id=f"p{n}") for n in (10, 30, 31, 12)]
    made = plan(model, ["sink", "previous-token"], prompts, batch_size=2)
    plain = execute(model, made)
    with Run.open_or_create(tmp_path, made.key) as run:
        kept = execute(model, made, run=run)
    assert {d: t.to_bytes() for d, t in kept.items()} == {d: t.to_bytes() for d, t in plain.items()}
    read = Run.load(tmp_path).scores
    assert {d: t.to_bytes() for d, t in read.items()} == {d: t.to_bytes() for d, t in plain.items()}
    assert dict(read["sink"].failures).keys() == {"p10", "p12"}
    again = execute(model, made, run=Run.open_or_create(tmp_path, made.key))  # from its parts
    assert {d: t.to_bytes() for d, t in again.items()} == {
        d: t.to_bytes() for d, t in plain.items()
    }


def test_another_plan_does_not_go_on_in_the_same_folder(model, tmp_path):
    made = plan(model, "sink", n=2)
    with Run.open_or_create(tmp_path, made.key) as run:
        execute(model, made, run=run)
    with pytest.raises(RunError, match="seed"):
        Run.open_or_create(tmp_path, plan(model, "sink", n=2, seed=1).key)


def test_progress_rises_to_the_number_of_tokens(model, tmp_path):
    made = plan(model, READERS, n=5, batch_size=2)
    for _ in range(2):  # the second time from the run's parts
        seen = []
        run = Run.open_or_create(tmp_path, made.key)
        execute(model, made, run=run, progress=lambda done, total: seen.append((done, total)))
        assert len(seen) == len(made.jobs)
        assert {total for _, total in seen} == {made.tokens}
        steps = np.diff([0, *(done for done, _ in seen)])
        assert steps.tolist() == [job.tokens for job in made.jobs] and (steps > 0).all()
        assert seen[-1][0] == made.tokens


GOOD = Prompt((0, *range(1, 30)), id="a")


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"detectors": "snik"}, UnknownNameError, "no detector named 'snik'"),
        ({"detectors": []}, InputError, "at least one detector"),
        ({"detectors": ["sink", make_detector("sink")]}, InputError, "asked for once"),
        ({"prompts": []}, InputError, "at least one prompt"),
        ({"prompts": [GOOD, GOOD]}, InputError, "ids of prompts must all be different"),
        ({"prompts": [GOOD], "task": "text"}, InputError, "not both"),
        ({"prompts": [Prompt((0,) * 513, id="long")]}, InputError, "512 positions.*prompt long"),
        ({"prompts": [Prompt((0, 64), id="odd")]}, InputError, "0..63.*prompt odd has 64"),
        ({"detectors": "retrieval", "prompts": [GOOD]}, InputError, "span 'needle'; prompt a has"),
        ({"n": 0}, InputError, "at least 1; got 0"),
        ({"batch_size": 0}, InputError, "at least 1"),
        ({"task": "texts"}, UnknownNameError, "no task named 'texts'"),
        ({"tower": "vision"}, SiteError, "no tower 'vision'; it has: text"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_runs(model, forwards, kwargs, error, text):
    kwargs = {"detectors": "sink"} | kwargs
    forwards.clear()
    with pytest.raises(error, match=text):
        score(model, kwargs.pop("detectors"), kwargs.pop("prompts", None), **kwargs)
    assert not forwards


def test_unknown_detectors_and_parameters_are_told_what_is_near():
    with pytest.raises(UnknownNameError) as caught:
        make_detector("previous-tokn")
    assert "previous-token" in caught.value.hint
    with pytest.raises(UnknownNameError) as caught:
        make_detector("sink", {"epsilom": 1})
    assert "epsilon" in caught.value.hint
    with pytest.raises(InputError, match="sink:queries must be a int"):
        make_detector("sink", {"queries": "many"})
    assert make_detector("sink", {"queries": "20", "epsilon": "0.25"}).queries == 20


def test_prompts_without_a_name_get_one_by_their_place(model):
    prompts = [Prompt((0, *range(1, n))) for n in (30, 20, 25)]
    found = score(model, "sink", prompts)["sink"]
    assert found.examples == ("prompt-1", "prompt-2", "prompt-0")
    assert [p.id for p in prompts] == ["", "", ""]


def test_a_model_may_be_named(model):
    found = score("zoo:planted-heads", "sink", n=2)["sink"]
    assert found.to_bytes() == score(model, "sink", n=2)["sink"].to_bytes()


def test_a_batch_that_does_not_fit_is_halved_and_that_is_said(model, monkeypatch):
    want = score(model, "sink", n=7)["sink"]
    sizes, read = [], measuring.read

    def small(model, batch, *args, **kwargs):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return read(model, batch, *args, **kwargs)

    monkeypatch.setattr(measuring, "read", small)
    with pytest.warns(SmallerBatchWarning) as said:
        got = score(model, "sink", n=7, batch_size=8)["sink"]
    assert sizes == [7, 4, 2, 2, 3, 2, 1]
    assert str(said[0].message) == "7 prompts at once do not fit into memory; going on with 4"
    np.testing.assert_array_equal(got.per_example, want.per_example)
    np.testing.assert_array_equal(got.null_per_example, want.null_per_example)
    assert got.examples == want.examples


def test_a_prompt_that_does_not_fit_is_an_error_with_a_way_out(model, monkeypatch):
    def starved(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "read", starved)
    with (
        pytest.warns(SmallerBatchWarning),
        pytest.raises(TooLargeError, match="1 prompts of up to 64 tokens do not fit") as caught,
    ):
        score(model, "sink", n=2)
    assert "shorter prompts" in caught.value.hint

    def faulty(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(measuring, "read", faulty)
    with pytest.raises(RuntimeError, match="shapes differ"):
        score(model, "sink", n=2)


def test_controls_are_seeded_by_the_call(model):
    prompts = REPEATED.prompts(model, 4)
    tables = [
        score(model, "duplicate-token", prompts, seed=s)["duplicate-token"] for s in (0, 0, 1)
    ]
    np.testing.assert_array_equal(tables[0].null_per_example, tables[1].null_per_example)
    assert (tables[0].null_per_example != tables[2].null_per_example).any()
    np.testing.assert_array_equal(tables[0].per_example, tables[2].per_example)


def test_spans_that_a_reading_names_must_be_there(model):
    from interp.engine import read
    from interp.readings import SpanMass

    with pytest.raises(SpanError, match="no span 'image'"):
        read(model, model.batch([GOOD]), {"x": SpanMass("image")})


def test_unscored_heads_are_not_numbers(model):
    """A head is scored on its defined examples alone."""
    prompts = [Prompt((0, *range(1, 20)), id="plain"), *REPEATED.prompts(model, 3)]
    found = score(model, "duplicate-token", prompts)["duplicate-token"]
    row = found.examples.index("plain")
    assert np.isnan(found.per_example[row]).all() and found.n.tolist() == [3] * 10
    assert found.values[found.heads.index(HeadId(0, 1))] == pytest.approx(1.0)
    assert not any(math.isnan(x) for x in found.values)
