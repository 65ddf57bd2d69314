"""Verdicts: planted truths, a slow reference by plain hooks, tables of effects that are made up.

The reference never goes through the seam: it zeroes what the output projection reads, or the query
that the head projects, and reads log-probabilities of one unpadded prompt at a time.
"""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from images_kit import case, ramp
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import heads.verdict_lab
from heads.outcome import Performance, outcome, with_targets
from heads.scoring import score
from heads.verdict_lab import Lab
from heads.verdict_result import Effect, Verdict, number
from heads.verdicts import CAUSAL, CORRELATED, NONE, REDUNDANT, verdict
from interp import load
from interp.errors import HeadIdError, InputError, ModelError, RunError, UnknownNameError
from interp.headid import HeadId
from interp.images import image_prompt
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.tasks import make_task
from interp.zoo.planted_induction import planted_induction, planted_retrieval
from interp.zoo.planted_ioi import BACKUP, DUPLICATE, MOVER, PREVIOUS, SECOND
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_llama import class_prompts, planted_llama
from interp.zoo.planted_parts import assemble, numbered_words, word_tokenizer

NEEDLE = make_task("needle", {"lengths": (60, 110)})
H = HeadId
SHAPE = (3, 4)  # of both random models


def random_model(kind, attn=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "gpt2":
            config = GPT2Config(
                vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64,
                initializer_range=0.4, bos_token_id=0, eos_token_id=None, pad_token_id=0,
                attn_implementation=attn,
            )  # fmt: skip
            return load(GPT2LMHeadModel(config))
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.4,
            attn_implementation=attn,
        )  # fmt: skip
        return load(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


def table(model, claimed, *, weak=(), name="made-up", **changes):
    """Scores that claim the given heads, the first the most."""
    every = next(iter(model.towers.values())).heads
    values = np.zeros((10, len(every)))
    for rank, head in enumerate(claimed):
        values[:, every.index(head)] = 1 - 0.01 * rank
    for head in weak:  # reaches the threshold, by two examples of ten
        values[:2, every.index(head)] = 4
    given = {"threshold": 0.5, "provenance": {"fingerprint": model.fingerprint}} | changes
    return HeadScores(
        detector=name, heads=every, per_example=values, null_per_example=values * 0,
        examples=tuple(f"e{i}" for i in range(10)), **given,
    )  # fmt: skip


def prompts_of(lengths=(9, 14, 21, 11, 9, 30), answer=2):
    rng = np.random.default_rng(5)
    return [
        Prompt(
            (0, *rng.integers(1, 50, length - 1).tolist()), id=f"p{i}",
            answer=tuple(rng.integers(1, 50, answer).tolist()) if answer else None,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


@torch.no_grad()
def slow_outcome(hf, prompt, ablated, op):
    """Log-probability and correctness of one prompt by hooks on the plain projections."""
    is_llama = isinstance(hf, LlamaForCausalLM)
    hooks = []
    for head in ablated:
        block = hf.model.layers[head.layer] if is_llama else hf.transformer.h[head.layer]
        attention = block.self_attn if is_llama else block.attn
        cols = slice(head.head * 8, head.head * 8 + 8)

        def blank(x, cols=cols):
            x = x.clone()
            x[..., cols] = 0
            return x

        if op == "zero":
            reader = attention.o_proj if is_llama else attention.c_proj
            hooks.append(
                reader.register_forward_pre_hook(lambda _, args, blank=blank: (blank(args[0]),))
            )
        else:  # a query of zeros likes every key alike
            writer = attention.q_proj if is_llama else attention.c_attn
            hooks.append(writer.register_forward_hook(lambda _, args, out, b=blank: b(out)))
    tokens = [*prompt.tokens, *(prompt.answer or ())]
    logits = hf(torch.tensor([tokens])).logits[0].double()
    for hook in hooks:
        hook.remove()
    first = len(prompt.tokens) if prompt.answer else 1
    gains = [
        math.log(torch.softmax(logits[i - 1], 0)[tokens[i]]) for i in range(first, len(tokens))
    ]
    hits = [int(logits[i - 1].argmax()) == tokens[i] for i in range(first, len(tokens))]
    correct = float(all(hits)) if prompt.answer else sum(hits) / len(hits)
    return sum(gains) / len(gains), correct


@pytest.mark.parametrize("answer", [2, 0])
@pytest.mark.parametrize("op", ["zero", "uniform"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_effect_equals_that_of_plain_hooks(kind, op, answer):
    model = random_model(kind)
    claimed = [H(0, 1), H(1, 2), H(1, 3)]
    data = prompts_of(answer=answer)
    found = verdict(model, prompts=data, scores=table(model, claimed), op=op, batch_size=4)
    known = {}

    def slow(ablated):
        key = frozenset(ablated)
        if key not in known:
            known[key] = np.array([slow_outcome(model.hf, p, key, op) for p in data])
        return known[key]

    np.testing.assert_allclose(found.base.log_prob, slow(())[:, 0], atol=2e-5)
    np.testing.assert_array_equal(found.base.correct, slow(())[:, 1])
    effects = [h.effect for h in found.heads] + [h.backed for h in found.heads if h.backed]
    assert [e.heads for e in effects[:3]] == [(h,) for h in claimed]
    assert found.joint.heads == tuple(claimed)
    for e in [*effects, found.joint]:
        before, mine = slow(e.given), slow((*e.given, *e.heads))
        np.testing.assert_allclose(e.per_example, mine[:, 0] - before[:, 0], atol=5e-5)
        assert np.abs(e.per_example).max() > 1e-3
        assert (e.base_accuracy, e.accuracy) == (before[:, 1].mean(), mine[:, 1].mean())
        others = [slow((*e.given, *c)) for c in e.controls]
        for row, other in zip(e.control_per_example, others, strict=True):
            np.testing.assert_allclose(row, other[:, 0] - before[:, 0], atol=5e-5)
        assert e.control_accuracy == pytest.approx(np.mean([o[:, 1].mean() for o in others]))
        assert e.mean == pytest.approx(np.mean(e.per_example))
        assert e.difference == pytest.approx(
            np.mean(e.per_example - np.mean(e.control_per_example, 0))
        )


def slow_q(columns):
    """Benjamini-Hochberg over one-sided paired t tests, from their definitions."""
    n = len(columns[0][0])
    p = [max(stats.ttest_rel(m, c, alternative="less").pvalue, 2.0**-n) for m, c in columns]
    return [min(min(len(p) * x / sum(y <= x for y in p) for x in p if x >= mine), 1) for mine in p]


def test_q_values_are_paired_tests_over_examples_of_all_effects(llama):
    data = prompts_of((9, 10, 11, 12, 13, 14, 15, 16, 17, 18))
    found = verdict(llama, prompts=data, scores=table(llama, [H(0, 1), H(1, 2), H(2, 0)]))
    effects = [*(h.effect for h in found.heads), found.joint]
    expected = slow_q([(e.per_example, e.control_per_example.mean(0)) for e in effects])
    np.testing.assert_allclose([e.q for e in effects], expected, rtol=1e-9)
    assert len({round(q, 6) for q in expected}) > 1


@pytest.mark.parametrize("op", ["zero", "uniform"])
def test_kernel_batches_and_repeats_change_nothing(op):
    def run(attn, batch_size):
        model = random_model("llama", attn)
        return verdict(
            model, prompts=prompts_of(), scores=table(model, [H(0, 1), H(1, 2)]), op=op,
            batch_size=batch_size, seed=7,
        )  # fmt: skip

    first = run("sdpa", 4)
    again = run("sdpa", 4)
    assert str(first) == str(again)
    assert np.array_equal(first.joint.per_example, again.joint.per_example)
    for other in (run("eager", 4), run("sdpa", 1), run("sdpa", 9)):
        for mine, theirs in zip(first.heads, other.heads, strict=True):
            assert (mine.head, mine.verdict) == (theirs.head, theirs.verdict)
            assert mine.effect.controls == theirs.effect.controls
            np.testing.assert_allclose(
                mine.effect.per_example, theirs.effect.per_example, atol=5e-5
            )


def test_seed_decides_prompts_and_draws(llama):
    claims = table(llama, [H(0, 1)], name="induction")
    short = make_task("repeated-tokens", {"length": 8, "repeats": 3})
    runs = [verdict(llama, short, scores=claims, n=4, controls=2, seed=s) for s in range(4)]
    assert len({tuple(r.base.log_prob) for r in runs}) == 4
    assert len({r.joint.controls for r in runs}) > 1


def test_effects_are_measured_on_other_prompts_than_scores():
    model = load("zoo:planted-retrieval")
    found = verdict(model, NEEDLE, n=8)
    scored = NEEDLE.prompts(model, 8, seed=0)
    used = NEEDLE.prompts(model, 8, seed=1)
    again = outcome(model, with_targets(used, "all"))
    np.testing.assert_array_equal(found.base.log_prob, again.log_prob)
    assert not {p.tokens for p in scored} & {p.tokens for p in used}
    assert "chosen on the prompts" not in found.note


# Planted truth.


def test_planted_retrieval_head_is_causal_by_its_closed_form():
    found = verdict(planted_retrieval().hf, NEEDLE, "retrieval", n=8)
    [head] = found.heads
    assert (head.head, head.verdict, found.verdict) == (H(1, 0), CAUSAL, CAUSAL)
    exact = -math.log(128) + math.log1p(127 * math.exp(-10))
    # The first token of the answer follows the needle's key, as every other one does its own.
    np.testing.assert_allclose(head.effect.per_example, exact, atol=1e-4)
    assert (head.effect.base_accuracy, head.effect.accuracy) == (1.0, 0.0)
    np.testing.assert_allclose(head.effect.control_per_example, 0, atol=1e-5)
    assert head.effect.control_accuracy == 1.0
    assert sorted(head.effect.controls) == [(H(1, 1),), (H(1, 2),), (H(1, 3),)]
    assert head.effect.rank_p == 0.25 and "below 0.25" in found.note
    assert found.joint is not None and found.joint.q == head.effect.q == 2.0**-8
    for part in ("L1H0 is causal", "score 1.00 [1.00, 1.00]", "100% → 0%", "3 random matched heads",
                 f"{number(exact)} nats", "q = 0.0039"):  # fmt: skip
        assert part in head.sentence
    assert found.of("L1H0") == CAUSAL and found.of("0.0") == NONE


def two_of_a_kind(*extra):
    kit = Kit(128, 512)
    layers = [
        [kit.previous_token(), kit.bos_sink(), kit.uniform(), kit.self_token(), kit.uniform()],
        [kit.induction(), kit.induction(), *(extra or (kit.bos_sink(),)), kit.local_window(),
         kit.uniform()],
    ]  # fmt: skip
    return load(assemble(kit.stream, layers), tokenizer=word_tokenizer(numbered_words(128)))


def test_redundant_pair_is_told_from_a_head_that_only_looks():
    kit = Kit(128, 512)
    model = two_of_a_kind(kit.induction(writes=""))
    found = verdict(model, NEEDLE, n=8)
    assert set(found.named(REDUNDANT)) == {H(1, 0), H(1, 1)}
    # All three together break the model; the silent one has no part in it.
    assert found.named(CORRELATED) == (H(1, 2),) and found.verdict == CAUSAL
    one, none = (-math.log1p(127 * math.exp(-x)) + math.log1p(127 * math.exp(-20)) for x in (10, 0))
    for h in found.heads[:2]:
        if h.verdict == REDUNDANT:
            assert h.effect.mean == pytest.approx(one, abs=1e-4)
            assert h.backed.heads == (h.head,) and len(h.backed.given) == 2
            assert h.backed.mean == pytest.approx(none - one, abs=1e-4)
            assert "with L1H" in h.sentence and "ablated as well" in h.sentence
    assert found.joint.mean == pytest.approx(none, abs=1e-4)
    assert (found.joint.base_accuracy, found.joint.accuracy) == (1.0, 0.0)
    assert f"together causal: {number(none)} nats" in str(found)
    row = found.rows()[-1]
    assert (row["head"], row["verdict"]) == ("all of them", "together: causal")


def test_decoys_beside_a_causal_head_are_correlated_only():
    found = verdict(planted_induction().hf, NEEDLE, n=8)
    words = {h.head: h.verdict for h in found.heads}
    assert words == {H(1, 3): CAUSAL, H(1, 4): CORRELATED, H(1, 5): CORRELATED}
    helping = next(h for h in found.heads if h.head == H(1, 5))
    exact = math.log1p(63 * math.exp(-6)) - math.log1p(63 * math.exp(-10))
    assert helping.effect.mean == pytest.approx(exact, abs=1e-4)
    assert "ablating it helps" in helping.sentence
    assert not any("helps" in h.sentence for h in found.heads if h.head != H(1, 5))


def test_only_the_previous_token_head_that_is_read_is_causal():
    found = verdict("zoo:planted-heads", detector="previous-token", n=8)
    assert {h.head: h.verdict for h in found.heads} == {H(0, 0): CAUSAL, H(1, 4): CORRELATED}


@pytest.mark.parametrize("name", ["planted-ioi", "planted-ioi-rotated"])
def test_ioi_roles(name):
    model = load(f"zoo:{name}")
    dup = verdict(model, "ioi", "duplicate-token", n=16)
    assert [(h.head, h.verdict) for h in dup.heads] == [(DUPLICATE, CAUSAL)]
    prev = verdict(model, "ioi", "previous-token", n=16)
    assert [(h.head, h.verdict) for h in prev.heads] == [(PREVIOUS, CORRELATED)]
    assert prev.heads[0].effect.mean == pytest.approx(0, abs=1e-4) and prev.verdict == CORRELATED
    # The backup of the movers is silent in the whole model.
    claims = table(model, [MOVER, SECOND, BACKUP, PREVIOUS])
    movers = verdict(model, "ioi", scores=claims, n=16)
    expected = dict(zip((MOVER, SECOND, BACKUP, PREVIOUS), (5.4, 3.6, 6.6, 6.6), strict=True))
    for h in movers.heads:  # what is left of the logit of 6.6 over 14 tokens
        exact = math.log1p(13 * math.exp(-6.6)) - math.log1p(13 * math.exp(-expected[h.head]))
        assert h.effect.mean == pytest.approx(exact, abs=1e-3)
    words = {h.head: h.verdict for h in movers.heads}
    assert words == {MOVER: REDUNDANT, SECOND: CAUSAL, BACKUP: REDUNDANT, PREVIOUS: CORRELATED}


@pytest.mark.parametrize("norm", ["rms", "identity"])
def test_planted_llama_falls_to_chance_by_one_head_alone(norm):
    model = load(planted_llama(norm=norm).hf)
    claims = table(model, [H(1, 2), H(0, 1)])
    asked = ["L1H2", "L0H1", H(1, 0), H(1, 2)]
    found = verdict(model, prompts=class_prompts(8), scores=claims, heads=asked, controls=9)
    words = {h.head: h.verdict for h in found.heads}
    assert words == {H(1, 2): CAUSAL, H(0, 1): CORRELATED, H(1, 0): NONE}
    assert {h.head: h.effect.accuracy for h in found.heads} == {
        H(1, 2): 1 / 8, H(0, 1): 1.0, H(1, 0): 1.0
    }  # fmt: skip
    assert all(h.effect.control_accuracy == 1.0 for h in found.heads)
    assert found.joint.heads == (H(1, 2), H(0, 1)) and found.joint.accuracy == 1 / 8
    assert "L1H0: no evidence by its score 0.00" in str(found)
    assert "chosen on the prompts" in found.note


def test_trained_needle_model_loses_retrieval_by_its_retrieval_heads_only():
    found = verdict("zoo:needle", detector="retrieval", n=10)
    assert found.base.correct.mean() >= 0.9
    assert found.named(CAUSAL) and not found.named(CORRELATED)
    assert found.joint.accuracy <= 0.1 and found.joint.control_accuracy >= 0.8
    assert found.verdict == CAUSAL and found.joint.as_harmful == 0


# Nothing found.


def test_a_model_without_the_heads_is_told_so(llama):
    silent = verdict(llama, make_task("needle", {"lengths": (60,), "style": "ids"}), n=6)
    assert (silent.heads, silent.joint, silent.verdict) == ((), None, NONE)
    assert "no evidence of retrieval heads (no successful run: 0 of 6" in str(silent)
    assert "the answer was not produced" in silent.message and silent.rows() == []
    assert silent.of("L0H0") == NONE
    short = make_task("repeated-tokens", {"length": 10, "repeats": 3, "vary": False})
    some = verdict(llama, short, "induction", n=6)
    best = some.scores.top(1)[0]
    i = some.scores.heads.index(best)
    for part in (f"{best} comes closest with {some.scores.values[i]:.3g}", "at least 0.4",
                 "q <= 0.05", "does not copy", "nothing was ablated"):  # fmt: skip
        assert part in some.message
    assert some.heads == () and len(some.base.log_prob) == 6


def test_a_detector_without_any_score_on_the_model(llama):
    claims = table(llama, [])
    nothing = dataclasses.replace(
        claims, per_example=claims.per_example * np.nan, failures=(("e0", "too short"),)
    )
    found = verdict(llama, prompts=prompts_of(), scores=nothing)
    assert found.verdict == NONE and "0 of 10 examples gave a score (too short)" in found.message
    assert "nan" not in str(found)


# The logic, on effects that are made up.


@pytest.fixture
def made_up(monkeypatch, llama):
    """A verdict where the log-probability is a function of the ablated heads."""

    def run(claimed, log_prob, *, n=12, noise=0.001, wobble=1e-5, **settings):
        rng = np.random.default_rng(0)
        jitter = noise * rng.standard_normal(n)
        calls = []

        def fake(model, data, recipe=None, *, batch_size=4):
            gone = {h for e in (recipe.edits if recipe else ()) for h in e.where.heads}
            calls.append(frozenset(gone))
            value = log_prob(gone) + jitter * len(gone) + wobble * rng.standard_normal(n)
            return Performance(np.zeros(n) + value, np.ones(n))

        monkeypatch.setattr(heads.verdict_lab, "outcome", fake)
        found = verdict(
            llama, prompts=prompts_of((9,) * n), scores=table(llama, claimed), **settings
        )
        assert len(set(calls)) == len(calls)  # nothing is run twice
        return {str(h.head): h.verdict for h in found.heads}, found

    return run


A, B, C, D = H(0, 0), H(1, 0), H(1, 1), H(2, 0)


def test_two_of_three_are_redundant_as_a_group(made_up):
    words, found = made_up([A, B, C], lambda gone: -5.0 if len(gone & {A, B, C}) >= 2 else 0.0)
    assert set(words.values()) == {REDUNDANT}
    assert found.heads[0].backed.heads == (A, B, C)
    assert "L0H0, L1H0, L1H1 together, not resolved further" in found.heads[0].sentence


def test_a_pair_behind_a_causal_head_is_found_in_the_whole_model(made_up):
    def chain(gone):
        return -5.0 if A in gone or {B, C} <= gone else 0.0

    words, found = made_up([A, B, C, D], chain)
    assert words == {"L0H0": CAUSAL, "L1H0": REDUNDANT, "L1H1": REDUNDANT, "L2H0": CORRELATED}
    assert found.named(REDUNDANT) == (B, C)
    assert A not in found.heads[1].backed.given


def test_a_backup_is_found_without_its_principal(made_up):
    words, found = made_up([A, B], lambda gone: -(A in gone) * (1.0 + 4.0 * (B in gone)))
    assert words == {"L0H0": CAUSAL, "L1H0": REDUNDANT}
    assert found.heads[1].backed.given == (A,)
    assert found.heads[1].backed.mean == pytest.approx(-4, abs=0.01)


def test_a_helpful_ablation_does_not_hide_a_pair(made_up):
    def effect(gone):
        return -5.0 * ({A, B} <= gone) + 6.0 * (C in gone)

    words, found = made_up([A, B, C], effect)
    assert words == {"L0H0": REDUNDANT, "L1H0": REDUNDANT, "L1H1": CORRELATED}
    assert "works against the answer" in found.heads[2].sentence
    assert found.verdict == CORRELATED  # together they do no harm


@pytest.mark.parametrize(
    ("size", "word"), [(-0.11, CAUSAL), (-0.09, CORRELATED), (0.0, CORRELATED), (0.5, CORRELATED)]
)
def test_an_effect_must_be_large_enough(made_up, size, word):
    words, _ = made_up([A], lambda gone: size * (A in gone))
    assert words == {"L0H0": word}


def test_an_effect_must_exceed_that_of_the_controls(made_up):
    words, found = made_up([A], lambda gone: -0.5 * bool(gone), wobble=0, noise=0)
    assert words == {"L0H0": CORRELATED}
    assert found.heads[0].effect.as_harmful == 3 and found.heads[0].effect.rank_p == 1.0
    # A head that does nothing beside controls that help is not harmful either.
    words, _ = made_up([A], lambda gone: 0.5 * bool(gone - {A}))
    assert words == {"L0H0": CORRELATED}


def test_an_effect_must_be_significant(made_up):
    words, found = made_up([A], lambda gone: (A in gone) * np.tile([3.0, -4.0], 6))
    assert words == {"L0H0": CORRELATED} and found.heads[0].effect.q > 0.05


def test_too_few_examples_claim_nothing_and_say_so(made_up):
    words, found = made_up([A, B, C], lambda gone: -9.0 * (A in gone), n=4)
    assert set(words.values()) == {CORRELATED}
    assert "Too few examples for one effect among 4: that takes 7." in found.note
    _, one = made_up([A], lambda gone: -9.0 * (A in gone), n=1)
    assert "[no interval]" in one.heads[0].sentence and "nan" not in str(one).replace("nan]", "")


# Controls.


def test_controls_are_different_matched_and_never_suspect(llama):
    claimed, weak = (H(0, 0), H(1, 1)), H(1, 2)
    scores = table(llama, claimed, weak=[weak])
    assert set(scores.select()) == set(claimed)
    hidden = scores.per_example.copy()
    hidden[:, scores.heads.index(H(0, 3))] = np.nan
    scores = dataclasses.replace(scores, per_example=hidden)
    lab = Lab(llama, [], scores, "zero", 100, 0, 4, claimed, claimed, None)
    assert set(lab.draws((H(1, 1),))) == {(H(1, 0),), (H(1, 3),)}
    both = lab.draws(claimed)
    assert len(both) == len(set(both)) == 4  # {0.1, 0.2} x {1.0, 1.3}: all there are
    for heads_ in both:
        assert Counter(h.layer for h in heads_) == {0: 1, 1: 1}
        assert not {*claimed, weak, H(0, 3)} & set(heads_)
    few = Lab(llama, [], scores, "zero", 3, 0, 4, claimed, claimed, None).draws(claimed)
    assert len(set(few)) == 3 and set(few) < set(both)
    seen = {tuple(Lab(llama, [], scores, "zero", 1, s, 4, claimed, claimed, None).draws(claimed))
            for s in range(40)}  # fmt: skip
    assert len(seen) == 4


def test_controls_differ_as_sets_within_a_layer(llama):
    pair = (H(1, 0), H(1, 1))
    model = load("zoo:planted-induction")  # four other heads in that layer: six pairs
    for seed in range(20):
        found = Lab(model, [], table(model, []), "zero", 5, seed, 4, pair, pair, None).draws(pair)
        assert len({frozenset(c) for c in found}) == len(found) == 5


def test_a_model_that_is_not_read_truly_is_refused_also_with_scores_in_hand(monkeypatch):
    model = random_model("llama")

    def check():
        raise ModelError("an identity fails")

    monkeypatch.setattr(model, "check", check)
    with pytest.raises(ModelError, match="an identity fails"):
        verdict(model, prompts=prompts_of(), scores=table(model, [H(0, 1)]))


def test_layers_without_other_heads_borrow_controls_and_say_so(llama):
    claimed = [H(1, 0), H(1, 1), H(1, 2)]
    found = verdict(llama, prompts=prompts_of(), scores=table(llama, claimed))
    assert found.heads[0].effect.matched and not found.joint.matched
    assert "controls came from all layers" in found.note
    assert "random (other layers) sets" in str(found)
    assert not set(claimed) & {h for c in found.joint.controls for h in c}


def test_too_few_heads_for_controls_are_refused_before_anything_is_run(llama, monkeypatch):
    monkeypatch.setattr(heads.verdict_lab, "outcome", lambda *a, **k: pytest.fail("was run"))
    every = list(llama.tower("text").heads)
    scores = table(llama, every[:7])
    with pytest.raises(InputError, match=r"needs 7 heads that are not ablated") as caught:
        verdict(llama, prompts=prompts_of(), scores=scores)
    assert "most=" in caught.value.hint


def test_where_nearly_all_heads_are_claimed_others_of_them_are_controls_and_that_is_said(llama):
    every = list(llama.tower("text").heads)
    found = verdict(llama, prompts=prompts_of(), scores=table(llama, every[:-1]), most=3)
    used = {h for c in found.joint.controls for h in c}
    assert used and not used & {h.head for h in found.heads} and used & set(every[3:-1])
    assert "so do the controls" in found.note
    few = verdict(llama, prompts=prompts_of(), scores=table(llama, every[:3]))
    assert "so do the controls" not in few.note
    assert not {h for c in few.joint.controls for h in c} & set(every[:3])


def test_heads_beyond_most_have_no_verdict(llama):
    claimed = [H(0, 1), H(1, 2), H(2, 0)]
    found = verdict(llama, prompts=prompts_of(), scores=table(llama, claimed), most=1)
    assert [h.head for h in found.heads] == [H(0, 1)]
    assert "2 more heads were claimed and not ablated" in found.note
    with pytest.raises(InputError, match="claimed by made-up but not ablated"):
        found.of("L1H2")
    assert found.of("L1H1") == NONE
    with pytest.raises(InputError, match="L9H9"):
        found.of("L9H9")


def test_a_model_that_cannot_do_the_task_is_named(llama):
    found = verdict(llama, prompts=prompts_of(), scores=table(llama, [H(0, 1)]))
    assert found.base.correct.mean() == 0 and "right in 0% only" in found.note
    assert "other weights" not in found.note
    foreign = table(llama, [H(0, 1)], provenance={"fingerprint": "x", "model": "another"})
    note = verdict(llama, prompts=prompts_of(), scores=foreign).note
    assert "other weights (another)" in note


# Files, progress, bad input.


def same(a, b):
    if a is None or b is None:
        return a is b
    assert dataclasses.asdict(dataclasses.replace(a, per_example=0, control_per_example=0)) == (
        dataclasses.asdict(dataclasses.replace(b, per_example=0, control_per_example=0))
    )
    return np.array_equal(a.per_example, b.per_example) and np.array_equal(
        a.control_per_example, b.control_per_example
    )


def test_a_saved_verdict_loads_again(tmp_path):
    found = verdict(two_of_a_kind(), NEEDLE, n=8)
    assert all(h.backed for h in found.heads)
    assert found.save(tmp_path / "v") == tmp_path / "v"
    again = Verdict.load(tmp_path / "v")
    assert str(again) == str(found)
    assert json.dumps(again.rows()) == json.dumps(found.rows())
    for mine, theirs in zip(found.heads, again.heads, strict=True):
        assert same(mine.effect, theirs.effect) and same(mine.backed, theirs.backed)
        names = ("head", "verdict", "score", "interval", "null", "q", "sentence")
        assert all(getattr(mine, x) == getattr(theirs, x) for x in names)
    assert same(found.joint, again.joint)
    assert found.scores.same_values(again.scores)
    assert np.array_equal(found.base.log_prob, again.base.log_prob)
    assert (again.examples, again.params, again.verdict) == (
        found.examples, found.params, found.verdict
    )  # fmt: skip
    assert again.provenance["fingerprint"] == found.provenance["fingerprint"]
    first = (tmp_path / "v" / "verdict.safetensors").read_bytes()
    again.save(tmp_path / "w")
    assert (tmp_path / "w" / "verdict.safetensors").read_bytes() == first


def test_damaged_and_mixed_verdicts_are_refused(tmp_path, llama):
    empty = verdict(llama, prompts=prompts_of(), scores=table(llama, []))
    empty.save(tmp_path)
    assert Verdict.load(tmp_path).joint is None and str(Verdict.load(tmp_path)) == str(empty)
    table(llama, [H(0, 0)]).save(tmp_path / "scores")
    with pytest.raises(RunError, match="belongs to another verdict"):
        Verdict.load(tmp_path)
    (tmp_path / "verdict.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="damaged"):
        Verdict.load(tmp_path)
    with pytest.raises(RunError):
        Verdict.load(tmp_path / "nowhere")


def test_progress_counts_runs_up_to_their_number():
    seen = []
    verdict(two_of_a_kind(), NEEDLE, n=8, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= total for done, total in seen) and seen[-1][0] == seen[-1][1]
    # Whole model, two heads, both; three controls of one and of both, more with one gone.
    assert len(seen) == 1 + 2 + 1 + 3 + 3 + 2 * 3


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"task": "no-such"}, UnknownNameError, "no-such"),
        ({"detector": "no-such"}, UnknownNameError, "no-such"),
        ({"op": "mean"}, UnknownNameError, "mean"),
        ({"n": 0}, InputError, "n must be at least 1; got 0"),
        ({"most": 0}, InputError, "most must be at least 1; got 0"),
        ({"controls": 0}, InputError, "controls must be at least 1; got 0"),
        ({"batch_size": 0}, InputError, "batch_size must be at least 1; got 0"),
        ({"least": -0.1}, InputError, "least must be"),
        ({"least": math.nan}, InputError, "least must be"),
        ({"fdr": 1.5}, InputError, "fdr must lie between 0 and 1; got 1.5"),
        ({"heads": []}, InputError, "at least one head"),
        ({"heads": "L0H1"}, InputError, "must be a list"),
        ({"heads": ["nonsense"]}, HeadIdError, "nonsense"),
        ({"heads": ["L7H0"]}, HeadIdError, "L7H0 is outside this model"),
        ({"prompts": []}, InputError, "at least one"),
        ({"prompts": prompts_of(), "task": "text"}, InputError, "not both"),
        ({"prompts": [Prompt((3,))]}, InputError, "no token to predict"),
    ],
)
def test_bad_input_is_one_clear_error(llama, monkeypatch, settings, error, match):
    monkeypatch.setattr(heads.verdict_lab, "outcome", lambda *a, **k: pytest.fail("was run"))
    monkeypatch.setattr("heads.verdicts.score", lambda *a, **k: pytest.fail("was scored"))
    with pytest.raises(error, match=match):
        verdict(llama, **settings)


def test_scores_that_do_not_fit_are_refused(llama):
    data, claims = prompts_of(), table(llama, [H(0, 1)])
    with pytest.raises(InputError, match="scores are of 'made-up'; the detector is 'sink'"):
        verdict(llama, detector="sink", prompts=data, scores=claims)
    with pytest.raises(InputError, match="name no task"):
        verdict(llama, scores=claims)
    groups = dataclasses.replace(claims, granularity="kv")
    with pytest.raises(InputError, match="key-value groups"):
        verdict(llama, prompts=data, scores=groups)
    bare = dataclasses.replace(claims, null_per_example=None)
    with pytest.raises(InputError, match="needs controls"):
        verdict(llama, prompts=data, scores=bare)
    bigger = load("zoo:planted-heads")
    with pytest.raises(HeadIdError, match="outside this model"):
        verdict(llama, prompts=data, scores=table(bigger, [H(0, 1)]))
    part = dataclasses.replace(
        claims, heads=claims.heads[:4], per_example=claims.per_example[:, :4],
        null_per_example=claims.null_per_example[:, :4],
    )  # fmt: skip
    with pytest.raises(InputError, match="L1H1 must have a score"):
        verdict(llama, prompts=data, scores=part, heads=["L1H1"])


def test_scores_name_their_own_task():
    model = load("zoo:planted-heads")
    earlier = score(model, "previous-token", n=8)["previous-token"]
    found = verdict(model, scores=earlier, n=8)
    assert found.detector == "previous-token" and found.task.startswith("RepeatedTokens")
    now = verdict(model, detector="previous-token", n=8)
    assert str(found) == str(now)


def test_outcome_refuses_numbers_that_would_drop_out(llama, monkeypatch):
    data = with_targets(prompts_of(), "all")
    with pytest.raises(InputError, match="at least one prompt"):
        outcome(llama, [])
    with pytest.raises(InputError, match="at least one prompt"):
        outcome(llama, data, batch_size=0)
    real = type(llama).forward

    def broken(self, *args, **given):
        out = real(self, *args, **given)
        out.logits = out.logits * math.nan
        return out

    monkeypatch.setattr(type(llama), "forward", broken)
    with pytest.raises(ModelError, match="must be finite"):
        outcome(llama, data)


def test_as_harmful_counts_ties_and_the_interval_is_of_the_difference():
    mine = np.array([-1.0, -2.0, -3.0, -2.0])
    rows = np.array([mine, mine - 1, mine + 0.5])
    e = Effect((A,), (), mine, ((B,), (C,), (D,)), rows, 1.0, 0.5, 0.9)
    assert e.as_harmful == 2 and e.rank_p == 0.75
    assert e.difference == pytest.approx(1 / 6)
    lo, hi = e.difference_interval
    assert lo == pytest.approx(1 / 6) and hi == pytest.approx(1 / 6)
    assert e.interval[0] < -2 < e.interval[1] and not e.matched


def shown(answer=None):
    model = case("llava").model
    return image_prompt(model, "what is this red thing ?", ramp(40, 40), id="shown", answer=answer)


def test_the_tokens_of_an_image_are_never_predicted():
    model = case("llava").model
    # Whatever else the span holds.
    for target in ("all", "image", "image-0"):
        with pytest.raises(InputError, match=f"no answer, and its span '{target}' holds") as caught:
            with_targets([shown()], target)
        assert caught.value.hint and "answer" in caught.value.hint
    with pytest.raises(InputError, match="prompt shown has no answer"):
        verdict(model, prompts=[shown()], detector="sink")
    # Where images are tokens of their own, they are predicted like any other.
    [planted] = make_task("shapes").prompts(load("zoo:planted-vlm"), 1)
    bare = replace(planted, answer=None)
    [made] = with_targets([bare], "image")
    assert made.positions("tokens to predict") == bare.positions("image")


@torch.no_grad()
@pytest.mark.parametrize("answer", [None, "a cat"])
def test_text_beside_an_image_is_predicted_as_by_hand(answer):
    model = case("llava").model
    prompt = shown(answer)
    prompt = replace(prompt, spans={**prompt.spans, "words": ((len(prompt) - 3, len(prompt)),)})
    assert set(prompt.positions("words")).isdisjoint(prompt.positions("image"))
    found = outcome(model, with_targets([prompt], "words"))
    tokens = [*prompt.tokens, *(prompt.answer or ())]
    n = len(prompt.tokens)
    places = range(n, len(tokens)) if answer else prompt.positions("words")
    out = model.hf(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)).long(),
        pixel_values=prompt.inputs["pixel_values"],
    )  # fmt: skip
    logits = out.logits[0].double()
    want = [float(logits[i - 1].log_softmax(-1)[tokens[i]]) for i in places]
    assert len(want) > 1 and found.log_prob[0] == pytest.approx(np.mean(want), abs=1e-5)


def test_models_that_produce_no_tokens_are_not_asked_for_any():
    model = load("zoo:shapes-vit", device="cpu")
    data = with_targets(make_task("shapes").prompts(model, 2), "all")
    with pytest.raises(InputError, match="reads images alone and produces none") as caught:
        outcome(model, data)
    assert "pruning-importance" in (caught.value.hint or "")
