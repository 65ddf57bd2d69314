"""Traps of single detectors: what naive code, or the published code, gets wrong."""

import random

import numpy as np
import pytest
import torch

import heads.retrieval
from heads.detector import make_detector, shuffled
from heads.scoring import score
from heads.sink import sink_tokens
from interp import load
from interp.decode import Decoded
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.readings import Same
from interp.tasks import make_task
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_parts import assemble


@pytest.fixture(scope="module")
def model():
    return load("zoo:planted-heads")


def said(monkeypatch, produced, top):
    """Let decoding produce these tokens, with these top keys [example][head][step]."""
    steps = max(map(len, produced))
    keys = torch.full((len(produced), 1, len(top[0]), steps), float("nan"))
    for b, rows in enumerate(top):
        for h, row in enumerate(rows):
            keys[b, 0, h, : len(row)] = torch.tensor(row, dtype=torch.float)
    decoded = Decoded(tuple(map(tuple, produced)), keys, keys)
    monkeypatch.setattr(heads.retrieval, "decode", lambda *args, **kwargs: decoded)


def watch(model, prompts, **params):
    return make_detector("retrieval", params).watch(model, prompts, tower=None)


# BOS, filler, needle 7 8 7 9 at 3..6, filler, decoy 5 5 at 9..10, question.
NEEDLE = Prompt(
    (0, 1, 2, 7, 8, 7, 9, 3, 4, 5, 5, 6),
    {"needle": ((3, 7),), "decoys": ((9, 11),)},
    id="n",
    answer=(7, 8, 7, 9),
)


def test_a_needle_with_a_repeated_token(model, monkeypatch):
    """The paper counts sets of tokens, its code counts hits, and so goes beyond one."""
    rows = [
        [3, 4, 5, 6],  # all four places: 7 8 7 9
        [5, 4, 3, 6],  # each 7 from the place of the other: still hits
        [3, 3, 3, 3],  # one place: 7 twice, 8 and 9 are misses
        [4, 3, 6, 5],  # in the needle, but never at the token produced
        [9, 10, 9, 1],  # the decoy
    ]
    said(monkeypatch, [NEEDLE.answer], [rows])
    published = watch(model, [NEEDLE])
    assert published.values[0, 0].tolist() == pytest.approx([1, 1, 1 / 3, 0, 0])
    assert published.null[0, 0].tolist() == pytest.approx([0, 0, 0, 0, 3 / 4])
    authors = watch(model, [NEEDLE], mode="authors")
    assert authors.values[0, 0].tolist() == pytest.approx([1, 1, 2 / 4, 0, 0])
    # Going on copying the same place: more hits than the needle is long.
    # The control has a ceiling of one in both.
    said(monkeypatch, [(7, 8, 7, 9, 9, 9, 9)], [[[3, 4, 5, 6, 6, 6, 6], [9] * 7]])
    published, authors = watch(model, [NEEDLE]), watch(model, [NEEDLE], mode="authors")
    assert published.values[0, 0].tolist() == [1.0, 0.0]
    assert authors.values[0, 0].tolist() == [7 / 4, 0.0]
    assert published.null[0, 0].tolist() == authors.null[0, 0].tolist() == [0.0, 1.0]


def test_copies_outside_the_needle_and_the_continuation_are_no_hits(model, monkeypatch):
    twice = Prompt(
        (0, 7, 8, 1, 7, 8, 2), {"needle": ((4, 6),), "decoys": ((1, 3),)}, id="t", answer=(7, 8)
    )
    said(monkeypatch, [(7, 8)], [[[4, 5], [1, 2], [4, 7], [7, 8]]])
    out = watch(model, [twice])
    assert out.values[0, 0].tolist() == [1, 0, 0.5, 0]
    assert out.null[0, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("produced", "kept"),
    [
        ((7, 8, 7, 9), True),
        ((7, 8, 7, 1), True),  # three of four
        ((7, 8, 1, 1), False),  # a half is not above a half
        ((8, 8, 8, 8), False),  # repeats beyond the answer's own do not count
        ((9, 7, 8, 7), True),  # unigrams: order does not count
        ((1, 1, 1, 1, 7, 8, 7, 9), True),  # within the room of answer + 4
        ((1, 1, 1, 1, 1, 1, 1, 1, 7, 8, 7, 9), False),  # beyond it: room of a batch mate
    ],
)
def test_only_produced_answers_count(model, monkeypatch, produced, kept):
    said(monkeypatch, [produced], [[[0] * len(produced)]])
    out = watch(model, [NEEDLE])
    assert (out.failures == {}) == kept
    assert out.values.isnan().all().item() == (not kept)
    if not kept:
        assert out.failures[0].startswith("the answer was not produced (recall")
    assert not watch(model, [NEEDLE], success=-1.0).failures


def test_one_example_fails_and_its_batch_mate_does_not(model, monkeypatch):
    said(monkeypatch, [(1, 1, 1, 1), NEEDLE.answer], [[[0] * 4], [[3, 4, 5, 6]]])
    out = watch(model, [NEEDLE, NEEDLE])
    assert list(out.failures) == [0] and out.values[1].item() == 1.0
    assert out.values[0].isnan().all() and out.null[0].isnan().all()


def test_heads_that_are_not_there_are_undefined(model, monkeypatch):
    said(monkeypatch, [NEEDLE.answer], [[[3, 4, 5, 6], [3, 4, 5]]])  # NaN at the last step
    out = watch(model, [NEEDLE])
    assert out.values[0, 0, 0] == 1 and out.values[0, 0, 1].isnan() and out.null[0, 0, 1].isnan()


def test_without_decoys_a_window_of_filler_is_the_control(model, monkeypatch):
    bare = Prompt(NEEDLE.tokens, {"needle": ((3, 7),)}, id="x", answer=NEEDLE.answer)
    # The only window of four beside the needle that leaves out BOS: 7..10 (or 8..11 with 11).
    counts = set()
    for i in range(20):
        prompt = Prompt(bare.tokens, bare.spans, id=f"x{i}", answer=bare.answer)
        said(monkeypatch, [NEEDLE.answer], [[[3, 4, 5, 6], [7, 8, 9, 10], [0, 1, 2, 0]]])
        null = watch(model, [prompt]).null[0, 0].tolist()
        assert null[0] == null[2] == 0
        assert watch(model, [prompt]).null[0, 0].tolist() == null
        counts.add(null[1])
    assert counts == {1.0}
    late = {"needle": ((8, 10),), "question": ((11, 12),)}
    share = {0: [], 1: [], 6: [], 10: []}
    for i in range(60):
        for place, found in share.items():
            said(monkeypatch, [(3, 4)], [[[place, place]]])
            prompt = Prompt((*NEEDLE.tokens[:8], 3, 4, 5, 6), late, id=f"y{i}", answer=(3, 4))
            found.append(watch(model, [prompt]).null.item())
    # Never BOS; any other place of the filler now and then.
    assert {place: sorted(set(found)) for place, found in share.items()} == {
        0: [0.0], 1: [0.0, 1.0], 6: [0.0, 1.0], 10: [0.0]
    }  # fmt: skip


def test_success_is_judged_by_the_answer_and_hits_by_the_needle(model, monkeypatch):
    """The needle may hold more than what is asked for."""
    short = Prompt(NEEDLE.tokens, NEEDLE.spans, id="s", answer=(7, 8))
    said(monkeypatch, [(7, 8)], [[[3, 4]]])
    out = watch(model, [short])
    assert not out.failures and out.values.item() == pytest.approx(2 / 3)
    assert watch(model, [NEEDLE]).failures  # two of its four
    other = Prompt(NEEDLE.tokens, NEEDLE.spans, id="o", answer=(1, 2))
    assert watch(model, [other]).failures


def test_retrieval_needs_no_answer_beside_its_needle(model, monkeypatch):
    mute = Prompt(NEEDLE.tokens, NEEDLE.spans, id="m")
    said(monkeypatch, [NEEDLE.answer], [[[3, 4, 5, 6]]])
    assert watch(model, [mute]).values.item() == 1.0


def test_a_needle_in_the_middle_of_real_decoding():
    """Padding, two needles of different places, a retrieval head and one that copies nothing."""
    planted = load("zoo:planted-induction")
    task = make_task("needle", {"lengths": (50, 80), "depths": (0.0, 0.4, 1.0)})
    found = score(planted, "retrieval", task=task, n=8, batch_size=8)["retrieval"]
    want = [float(h in planted.truth.heads["retrieval"]) for h in found.heads]
    np.testing.assert_array_equal(found.per_example, [want] * 8)


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("sink", {"epsilon": 0.0}, "epsilon must lie in"),
        ("sink", {"epsilon": 1.0}, "epsilon must lie in"),
        ("sink", {"queries": 3}, "at least 1/epsilon = 3.3"),
        ("sink", {"epsilon": 0.05, "queries": 19}, "at least 1/epsilon = 20"),
        ("retrieval", {"mode": "paper"}, "published or authors; got 'paper'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, text):
    with pytest.raises(InputError, match=text):
        make_detector(name, params)


def test_the_last_keys_are_no_sinks_of_a_head_that_looks_at_itself():
    """α of the last few keys is 1/1, 1/2, 1/3 > ε for self and previous-token heads."""
    planted = load("zoo:planted-sink")
    found = score(planted, "sink", task="text", n=8)["sink"]
    for head in (HeadId(1, 1), HeadId(1, 2)):
        at = found.heads.index(head)
        np.testing.assert_allclose(found.per_example[:, at], 1 / 16, atol=1e-6)
        assert found.verdict[at] == "no evidence"


def test_sinks_are_told_where_they_are_and_on_what():
    planted = load("zoo:planted-sink")
    prompts = [Prompt((0, *range(2, 6), 1, *range(6, 40)), id="a"),
               Prompt((0, 7, 1, *range(8, 45)), id="b")]  # fmt: skip
    found = score(planted, "sink", prompts * 1, batch_size=2)["sink"]
    rows = [found.examples.index(x) for x in "ab"]
    place = {h: found.extras["position"][rows, i].tolist() for i, h in enumerate(found.heads)}
    token = {h: found.extras["token"][rows, i].tolist() for i, h in enumerate(found.heads)}
    assert place[HeadId(0, 0)] == place[HeadId(0, 1)] == [0, 0]
    assert place[HeadId(0, 2)] == [4, 4] and token[HeadId(0, 2)] == [5, 9]
    assert place[HeadId(0, 3)] == [5, 2] and token[HeadId(0, 3)] == [1, 1]
    np.testing.assert_allclose(found.per_example[:, :4], 1.0, atol=1e-6)
    many = score(planted, "sink", task="text", n=8)["sink"]
    parked = sink_tokens(many, planted)
    assert parked[HeadId(0, 0)] == {"<bos>": 8}
    assert sum(parked[HeadId(0, 2)].values()) == 8
    assert HeadId(1, 0) not in parked


def test_content_heads_without_a_match_are_sinks_too(model):
    rng = random.Random(0)
    prompts = [Prompt((0, *rng.sample(range(1, 64), 50)), id=str(i)) for i in range(9)]
    found = score(model, "sink", prompts)["sink"]
    assert set(found.select()) == {HeadId(*x) for x in ((0, 1), (0, 2), (1, 0), (1, 2))}


def test_a_shuffled_control_moves_all_but_bos_and_is_read_at_the_same_places():
    prompt = Prompt((0, *range(1, 21), *range(1, 21)), {"bos": ((0, 1),), "x": ((3, 9),)}, id="s")
    control = shuffled(prompt, random.Random(1))
    assert control.tokens[0] == 0 and sorted(control.tokens) == sorted(prompt.tokens)
    assert control.tokens != prompt.tokens and control.spans == prompt.spans
    assert control.reference == prompt.tokens
    np.testing.assert_array_equal(Same(1).pairs(control), Same(1).pairs(prompt))
    assert shuffled(prompt, random.Random(1)) == control
    assert shuffled(prompt, random.Random(2)) != control
    again = shuffled(control, random.Random(3))
    assert again.reference == prompt.tokens
    bare = Prompt(prompt.tokens)
    assert {shuffled(bare, random.Random(i)).tokens[0] for i in range(20)} != {0}


def test_a_head_that_looks_back_by_a_fixed_lag_is_no_induction_head():
    """On blocks of two the previous token is what followed an earlier copy, and it is copied."""
    kit = Kit()
    hf = assemble(kit.stream, [[kit.previous_token(writes="out"), kit.bos_sink()]])
    lagging = load(hf)
    task = make_task("repeated-tokens", {"length": 2, "repeats": 12})
    found = score(lagging, "induction", task=task, n=9)["induction"]
    assert found.extras["copying"][:, 0].tolist() == pytest.approx([1.0] * 9)
    assert found.values[0] > 0.9  # prefix matching and copying alone are deceived
    assert found.null[0] == pytest.approx(found.values[0]) and not found.select()


def test_decoys_match_prefixes_but_do_not_copy():
    planted = load("zoo:planted-induction")
    found = score(planted, "induction", n=9)["induction"]
    real, silent, lowering = (found.heads.index(HeadId(1, h)) for h in (3, 4, 5))
    for at, copying in ((real, 1.0), (silent, 0.0), (lowering, -1.0)):
        np.testing.assert_allclose(found.extras["prefix"][:, at], 1.0, atol=1e-6)
        np.testing.assert_allclose(found.extras["copying"][:, at], copying, atol=1e-6)
    assert found.select() == (HeadId(1, 3),)
    everything = make_detector("induction", {"copies": -1.0})
    found = score(planted, everything, n=9)["induction"]
    assert set(found.select()) == {HeadId(1, h) for h in (3, 4, 5)}


def test_a_local_window_is_no_previous_token_head(model):
    """It has 1/4 on the token before and, by its null, as much on those before that."""
    found = score(model, make_detector("previous-token"), n=9)["previous-token"]
    local = found.heads.index(HeadId(1, 1))
    assert found.values[local] == pytest.approx(found.null[local], abs=0.01)
    assert found.values[local] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("tokens", [(0,), (0, 1), (0, 1, 2), (0, 1, 1, 2)])
@pytest.mark.parametrize("name", ["previous-token", "duplicate-token", "induction", "sink"])
def test_prompts_of_a_few_tokens_give_a_score_or_none_but_no_error(model, name, tokens):
    found = score(model, name, [Prompt(tokens, id="short")])[name]
    defined = {
        "previous-token": len(tokens) > 1,
        "duplicate-token": tokens == (0, 1, 1, 2),
        # The only token after a copy is the query itself: nothing to copy from.
        "induction": False,
        "sink": False,
    }[name]
    assert (found.n > 0).tolist() == [defined] * 10
    assert not found.select()


@pytest.fixture(scope="module")
def needle():
    trained = load("zoo:needle")
    task = make_task("needle", {"lengths": (160, 320)})
    return trained, task, score(trained, "retrieval", task=task, n=12)["retrieval"]


def test_a_trained_model_has_few_retrieval_heads_and_they_matter(needle):
    from heads.masking import masking_experiment

    trained, task, scores = needle
    found = scores.select()
    assert 1 <= len(found) <= 6 and len(scores.heads) == 16
    assert len(scores.failures) <= 2 and scores.values.max() > 0.5
    result = masking_experiment(trained, scores, task=task, n=12, k=1, controls=3, batch_size=6)
    assert result.base.accuracy >= 0.8
    assert result.masked.accuracy <= 0.2
    assert result.control_accuracy >= 0.6
    assert result.p < 0.01
