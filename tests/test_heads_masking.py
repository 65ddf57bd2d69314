"""Masking heads while decoding: against weights and hooks that do the same, and on planted truth.

The references never go through the seam: they zero rows of W_O or of W_Q, or hook the projections
of the plain model and decode by one whole forward per token.
"""

import copy
import json
import math
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heads.head_mask import HeadMask, visible
from heads.masking import _draws, _right, masking_experiment
from heads.masking_result import MaskedArm, MaskingResult, _wilson
from heads.scoring import score
from interp import load
from interp.decode import generate
from interp.errors import HeadIdError, InputError, InterpError, SiteError, UnknownNameError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.seam.calls import AttnCall
from interp.tasks import make_task

OPS = ["uniform", "zero"]
NEEDLE = make_task("needle", {"lengths": (60, 110)})
PLANTED = ["planted-retrieval", "planted-heads", "planted-induction-gqa"]


@pytest.fixture(scope="module")
def llama():
    """Random weights, grouped queries, large enough to make answers depend on every head."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return load(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def planted():
    models = {}

    def get(name):
        if name not in models:
            model = load(f"zoo:{name}")
            models[name] = model, score(model, "retrieval", task=NEEDLE, n=8)["retrieval"]
        return models[name]

    return get


@contextmanager
def zeroed(hf, heads, *, op, first):
    """Mask rows from `first` on by hooks on the plain Llama's projections.

    A zero query scores every key alike, before and after rotation.
    """
    config = hf.config
    size = config.hidden_size // config.num_attention_heads

    def edit(x, head):
        x = x.clone()
        x[:, first:, head * size : (head + 1) * size] = 0
        return x

    with ExitStack() as stack:
        for head in heads:
            attention = hf.model.layers[head.layer].self_attn
            if op == "zero":
                hook = attention.o_proj.register_forward_pre_hook(
                    lambda _, args, h=head.head: (edit(args[0], h),)
                )
            else:
                hook = attention.q_proj.register_forward_hook(
                    lambda _, args, out, h=head.head: edit(out, h)
                )
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def slow_decode(hf, prompt, heads, *, op, steps, phase):
    """Greedy decoding of one prompt by whole forwards, masked by hooks."""
    tokens = list(prompt.tokens)
    first = len(prompt) - 1 if phase == "decoding" else 0
    for _ in range(steps):
        with zeroed(hf, heads, op=op, first=first):
            logits = hf(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tuple(tokens[len(prompt) :])


def prompts_of(lengths, *, vocabulary=50, answer=2):
    rng = np.random.default_rng(5)
    return [
        Prompt(
            (0, *rng.integers(1, vocabulary, length - 1).tolist()),
            id=f"p{length}",
            answer=tuple(rng.integers(1, vocabulary, answer).tolist()),
        )
        for length in lengths
    ]


HEADS = (HeadId(0, 1), HeadId(1, 2), HeadId(1, 3), HeadId(2, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("phase", ["decoding", "all"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_equals_whole_forwards_with_hooks(llama, op, phase, use_cache, attention):
    """Grouped queries, padding on the left, with and without a cache, on both kernels."""
    prompts = prompts_of([5, 17, 9, 1])
    batch = llama.batch(prompts, side="left")
    mask = HeadMask(llama, HEADS, op=op, phase=phase, prompt=batch.input_ids.shape[1])
    llama.hf.set_attn_implementation(attention)
    try:
        got = generate(llama, batch, max_new_tokens=6, observer=mask, use_cache=use_cache)
    finally:
        llama.hf.set_attn_implementation("sdpa")
    want = [slow_decode(llama.hf, p, HEADS, op=op, steps=6, phase=phase) for p in prompts]
    assert list(got) == want
    plain = generate(llama, batch, max_new_tokens=6)
    assert sum(a != b for a, b in zip(plain, got, strict=True)) >= 3


def test_phases_and_ops_differ(llama):
    """Or the test above would not tell them apart."""
    prompt = prompts_of([17])[0]
    seen = {
        slow_decode(llama.hf, prompt, HEADS, op=op, steps=6, phase=phase)
        for op in OPS
        for phase in ("decoding", "all")
    }
    assert len(seen) == 4


@torch.no_grad()
@pytest.mark.parametrize("name", [*PLANTED, "planted-nothing", "planted-llama"])
@pytest.mark.parametrize("lengths", [[40, 23], [31]])
def test_zero_is_zero_rows_of_w_o_and_uniform_is_zero_rows_of_w_q(name, lengths):
    model = load(f"zoo:{name}")
    config = model.hf.config
    heads = [HeadId(0, 0), HeadId(1, config.num_attention_heads - 1)]
    prompts = prompts_of(lengths, vocabulary=model.vocabulary)
    batch = model.batch(prompts)
    real = batch.attention_mask.bool()
    for op, projection in (("zero", "o_proj"), ("uniform", "q_proj")):
        edited = copy.deepcopy(model.hf)
        for head in heads:
            weight = edited.model.layers[head.layer].self_attn.get_submodule(projection).weight
            size = weight.shape[op == "zero"] // config.num_attention_heads
            rows = slice(head.head * size, (head.head + 1) * size)
            if op == "zero":
                weight[:, rows] = 0
            else:
                weight[rows] = 0
        want = edited(**batch.inputs()).logits[real]
        mask = HeadMask(model, heads, op=op, phase="all", prompt=batch.input_ids.shape[1])
        with model.observe(mask):
            got = model.forward(batch.inputs()).logits[real]
        if op == "zero":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_silent_head_ties_and_a_uniform_one_says_something_wrong(planted):
    """Zero leaves no logit; uniform leaves a wrong word with a small one: they are different."""
    model, _ = planted("planted-retrieval")
    prompt = make_task("needle", {"lengths": (64,)}).prompts(model, 1)[0]
    batch = model.batch([prompt])
    found = {}
    for op in OPS:
        mask = HeadMask(model, [HeadId(1, 0)], op=op, phase="decoding", prompt=len(prompt))
        with model.observe(mask):
            found[op] = model.forward(batch.inputs()).logits[0, -1]
    assert found["zero"].abs().max() == 0
    counts = np.bincount(prompt.tokens[1:], minlength=model.vocabulary)
    want = torch.tensor(10.0 * counts / len(prompt))  # gain × share of each token but BOS
    torch.testing.assert_close(found["uniform"], want.float(), atol=1e-5, rtol=1e-5)


def call_of(**changes):
    z = torch.ones(2, 3, 2, 4)
    values = {
        "name": "x",
        "module": torch.nn.Identity(),
        "q": torch.zeros(2, 2, 3, 4),
        "k": torch.zeros(2, 1, 3, 4),
        "v": torch.arange(24.0).reshape(2, 1, 3, 4),
        "z": z,
    }
    return AttnCall(**(values | changes))


def test_visible_keys_follow_the_mask_whatever_its_dtype():
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()[None, None]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        lowest = torch.zeros(1, 1, 3, 3, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        assert torch.equal(visible(call_of(mask=lowest), [0], 0), seen)
        # A bias that is no mask (such as ALiBi's) hides nothing.
        biased = torch.where(seen, torch.tensor(-900.0, dtype=dtype), lowest)
        assert torch.equal(visible(call_of(mask=biased), [0], 0), seen)
    infinite = torch.zeros(1, 1, 3, 3).masked_fill(~seen, -math.inf)
    assert torch.equal(visible(call_of(mask=infinite), [0], 1), seen[:, :, 1:])
    assert visible(call_of(causal=True), [0], 1)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    last = torch.tensor([0, 1, 1]).bool()[None, None, None]  # of keys only, as flash kernels get
    both = visible(call_of(mask=last, causal=True), [0], 0)
    assert both[0, 0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    per_head = torch.stack([seen[0, 0], ~seen[0, 0]])[None]
    assert torch.equal(visible(call_of(mask=per_head), [1], 0), ~seen)


def test_rows_without_a_visible_key_write_nothing():
    hidden = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    hidden[1] = True
    model = load("zoo:planted-nothing")
    mask = HeadMask(model, [], op="uniform", phase="all", prompt=3)
    mask.heads = {"x": [1]}
    call = call_of(mask=hidden)
    z = mask(call)
    assert (z[0, :, 1] == 0).all()
    assert torch.equal(z[1, :, 1], call.v[1, 0].mean(0).expand(3, 4))
    assert (z[:, :, 0] == 1).all() and (call.z == 1).all()


def test_uniform_needs_values_and_zero_does_not():
    model = load("zoo:planted-nothing")
    for op in OPS:
        mask = HeadMask(model, [], op=op, phase="all", prompt=3)
        mask.heads = {"x": [0]}
        call = call_of(q=None, k=None, v=None, pattern=torch.ones(2, 2, 3, 3))
        if op == "zero":
            assert (mask(call)[:, :, 0] == 0).all()
        else:
            with pytest.raises(SiteError, match="values of x"):
                mask(call)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", PLANTED)
def test_masking_retrieval_heads_breaks_answers_and_controls_do_not(planted, name, op):
    model, scores = planted(name)
    truth = model.truth.heads["retrieval"]
    # In planted-induction the score reads attention alone: two of its three heads copy nothing,
    # and no control is left in their layer but the three others.
    found = masking_experiment(model, scores, task=NEEDLE, n=10, op=op)
    assert set(found.masked.heads) == truth
    assert found.base.accuracy == found.control_accuracy == 1.0
    assert found.masked.accuracy == 0.0
    assert found.effect == found.difference == -1.0
    assert found.p == 2.0**-10
    assert found.difference_interval == (-1.0, -1.0)
    for arm in found.controls:
        assert not set(arm.heads) & truth
        assert [h.layer for h in arm.heads] == [h.layer for h in found.masked.heads]
    assert f"{len(truth)} retrieval heads" in str(found)


def test_masking_what_does_not_matter_changes_nothing(planted):
    """The silent decoy reads the needle and writes nothing: a retrieval score, but no effect."""
    model, scores = planted("planted-induction-gqa")
    values = scores.per_example.copy()
    values[:, [scores.heads.index(HeadId(1, h)) for h in (3, 5)]] -= 0.5
    decoy = HeadScores(
        "retrieval", scores.heads, values, scores.null_per_example, scores.examples, threshold=0.1
    )
    found = masking_experiment(model, decoy, task=NEEDLE, n=6, k=1, op="zero")
    assert found.masked.heads == (HeadId(1, 4),)
    assert found.masked.accuracy == 1.0 and found.difference == 0.0 and found.p == 1.0


def test_a_model_that_cannot_answer_loses_nothing(planted):
    _, scores = planted("planted-retrieval")
    broken, own = planted("planted-retrieval-broken")
    found = masking_experiment(broken, scores, task=NEEDLE, n=6)
    assert found.base.accuracy == found.masked.accuracy == found.control_accuracy == 0.0
    assert found.p == 1.0 and found.effect == 0.0
    with pytest.raises(InputError, match="no head has a positive verdict") as caught:
        masking_experiment(broken, own)
    assert "no successful run" in str(caught.value) and "k" in caught.value.hint
    with pytest.raises(InputError, match="between 1 and the 0 heads"):
        masking_experiment(broken, own, k=1)


def test_a_model_with_nothing_to_find_is_refused(planted):
    model, scores = planted("planted-nothing")
    with pytest.raises(InputError, match="none to mask"):
        masking_experiment(model, scores)


def table(values, *, layers=2, threshold=0.5, direction="higher"):
    per = np.array([values] * 3, dtype=float)
    heads = [HeadId(i, h) for i in range(layers) for h in range(len(values) // layers)]
    return HeadScores(
        "retrieval", tuple(heads), per, per * 0, ("a", "b", "c"), threshold=threshold,
        direction=direction,
    )  # fmt: skip


def test_controls_are_drawn_from_heads_below_the_threshold_in_the_same_layers():
    values = [0.9, 0.5, 0.1, 0.2, math.nan, 0.49, 0.0, 0.1, 0.6, 0.7, 0.8, 0.3]
    scores = table(values)
    chosen = (HeadId(0, 0), HeadId(1, 2), HeadId(1, 3))
    allowed = {HeadId(0, 2), HeadId(0, 3), HeadId(0, 5), HeadId(1, 0), HeadId(1, 1), HeadId(1, 5)}
    drawn = _draws(scores, chosen, 0.5, 300, 0)
    for heads in drawn:
        assert len(set(heads)) == 3
        assert sorted(h.layer for h in heads) == [0, 1, 1]
    assert {h for heads in drawn for h in heads} == allowed
    assert _draws(scores, chosen, 0.5, 300, 0) == drawn
    assert _draws(scores, chosen, 0.5, 300, 1) != drawn
    # A masked head below the threshold is no control of itself.
    assert all(HeadId(1, 5) not in d for d in _draws(scores, (HeadId(1, 5),), 0.5, 50, 0))


def test_controls_of_scores_where_low_is_strong():
    scores = table([-3.0, -0.1, -0.2, -2.0], layers=1, threshold=-1.0, direction="lower")
    drawn = _draws(scores, (HeadId(0, 0),), -1.0, 50, 0)
    assert {h for heads in drawn for h in heads} == {HeadId(0, 1), HeadId(0, 2)}


def test_too_few_controls_in_a_layer_are_refused_by_name():
    scores = table([0.9, 0.8, 0.1, 0.9, 0.1, 0.1])
    with pytest.raises(InputError, match=r"2 heads of layer 0 \(text\).*it has 1") as caught:
        _draws(scores, (HeadId(0, 0), HeadId(0, 1), HeadId(1, 0)), 0.5, 5, 0)
    assert caught.value.hint
    assert _draws(scores, (HeadId(0, 0), HeadId(1, 0)), 0.5, 5, 0)


@pytest.mark.parametrize("name", PLANTED)
def test_no_draw_holds_a_retrieval_head_on_real_scores(planted, name):
    model, scores = planted(name)
    chosen = tuple(sorted(model.truth.heads["retrieval"]))[:1]
    for heads in _draws(scores, chosen, scores.threshold, 200, 4):
        assert not set(heads) & model.truth.heads["retrieval"]


def test_batches_caches_and_order_of_prompts_change_nothing(planted):
    model, scores = planted("planted-induction-gqa")
    # Some answers are wrong on purpose, so that accuracies are not all alike.
    prompts = make_task("needle", {"lengths": (64, 90, 40)}).prompts(model, 6)
    prompts[2] = Prompt(prompts[2].tokens, prompts[2].spans, id="wrong", answer=(1, 1, 1))
    first = masking_experiment(model, scores, prompts, controls=2)
    assert first.base.correct == (True, True, False, True, True, True)
    for changes in ({"batch_size": 1}, {"batch_size": 6, "use_cache": False}, {"batch_size": 2}):
        again = masking_experiment(model, scores, prompts, controls=2, **changes)
        assert again.to_dict() == first.to_dict()
    back = masking_experiment(model, scores, prompts[::-1], controls=2)
    assert back.base.correct == first.base.correct[::-1]
    assert back.examples == first.examples[::-1]
    assert masking_experiment(model, scores, task=NEEDLE, n=4, seed=7).to_dict() == (
        masking_experiment(model, scores, task=NEEDLE, n=4, seed=7).to_dict()
    )


def test_progress_counts_each_batch_of_each_different_arm(planted):
    model, scores = planted("planted-heads")
    seen = []
    masking_experiment(
        model,
        scores,
        task=NEEDLE,
        n=5,
        batch_size=2,
        controls=30,
        progress=lambda a, b: seen.append((a, b)),
    )
    # Four other heads in the layer: base, masked and at most four different controls.
    assert seen == [(i + 1, 3 * 6) for i in range(18)]


def test_nothing_is_left_on_the_model_also_after_an_error(planted):
    model, scores = planted("planted-heads")
    ids = torch.arange(1, 30)[None]
    before = model.hf(ids).logits

    class StopHere(Exception):
        pass

    def stop(done, total):
        raise StopHere

    with pytest.raises(StopHere):
        masking_experiment(model, scores, task=NEEDLE, n=2, progress=stop)
    masking_experiment(model, scores, task=NEEDLE, n=2)
    assert torch.equal(model.hf(ids).logits, before)
    batch = model.batch([Prompt((0, 1, 2))], side="left")

    def broken(call):
        raise StopHere

    with pytest.raises(StopHere):
        generate(model, batch, max_new_tokens=1, observer=broken)
    assert torch.equal(model.hf(ids).logits, before)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"op": "zer"}, UnknownNameError, "masking op"),
        ({"phase": "prefill"}, UnknownNameError, "phase"),
        ({"k": 0}, InputError, "k must be between 1"),
        ({"k": 99}, InputError, "k must be between 1 and the 10"),
        ({"controls": 0}, InputError, "at least 1"),
        ({"n": 0}, InputError, "at least 1"),
        ({"batch_size": 0}, InputError, "at least 1"),
        ({"prompts": []}, InputError, "at least one prompt"),
        ({"prompts": [Prompt((0, 1), id="mute")]}, InputError, "prompt mute has none"),
        ({"prompts": [Prompt((0,) * 510, answer=(1,))]}, InputError, "512 positions.*510 \\+ 5"),
        ({"task": "needles"}, UnknownNameError, "task"),
    ],
)
def test_what_cannot_be_done_is_said(planted, changes, error, text):
    model, scores = planted("planted-heads")
    with pytest.raises(error, match=text) as caught:
        masking_experiment(model, scores, **changes)
    assert isinstance(caught.value, InterpError)


def test_scores_of_another_model_are_refused(planted):
    _, scores = planted("planted-induction-gqa")
    small, _ = planted("planted-retrieval")
    with pytest.raises(HeadIdError, match="outside this model"):
        masking_experiment(small, scores)


def test_an_answer_stands_in_a_row_within_its_own_room():
    prompt = Prompt((0,), answer=(5, 6))
    assert _right(prompt, (5, 6, 9, 9), 2) and _right(prompt, (9, 9, 5, 6), 2)
    assert not _right(prompt, (5, 9, 6), 2) and not _right(prompt, (6, 5), 2)
    # Its batch may decode longer for the sake of another prompt.
    assert not _right(prompt, (9, 9, 9, 5, 6), 2) and not _right(prompt, (5,), 2)


def result(base, masked, controls):
    arms = [MaskedArm("base", (), base), MaskedArm("masked", (HeadId(0, 0),), masked)]
    arms += [MaskedArm(f"control {i}", (HeadId(0, 1),), c) for i, c in enumerate(controls)]
    names = tuple(f"e{i}" for i in range(len(base)))
    return MaskingResult(
        "m", "retrieval", "zero", "decoding", 0.1, names, arms[0], arms[1], tuple(arms[2:]), {}
    )


def test_numbers_of_a_result_by_hand():
    yes, no = True, False
    found = result((yes, yes, yes, no), (yes, no, no, no), [(yes, yes, no, no), (yes,) * 4])
    assert found.effect == 0.25 - 0.75
    assert found.control_accuracy == 0.75
    assert found.difference == -0.5
    # Controls minus masked per example: 0, 1, 0.5, 0.5.
    d = np.array([0, 1, 0.5, 0.5])
    from scipy.stats import ttest_1samp

    assert found.p == pytest.approx(max(ttest_1samp(d, 0, alternative="greater").pvalue, 2**-4))
    low, high = found.difference_interval
    assert -1 <= low < -0.5 < high <= 0
    better = result((yes,) * 4, (yes,) * 4, [(yes, no, no, no)])
    assert better.difference == 0.75 and better.p > 0.9


def test_a_result_goes_into_json_and_into_a_table(planted):
    model, scores = planted("planted-heads")
    found = masking_experiment(model, scores, n=1)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain == found.to_dict()
    assert plain["difference_interval"] == [None, None]  # one example has no spread
    assert plain["masked"]["heads"] == ["L1H0"] and plain["base"]["heads"] == []
    assert plain["base"]["accuracy"] == 1.0 and plain["op"] == "uniform"
    assert plain["params"]["seed"] == 1 and "Needle" in plain["params"]["task"]
    lines = str(found).splitlines()
    assert len(lines) == 6 and "planted-heads" in lines[0] and "p = 0.5" in lines[-1]


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 10), (7, 20), (500, 1000)])
def test_wilson_ends_are_where_the_score_test_just_rejects(hits, n):
    share = hits / n
    for end in _wilson(share, n):
        gap = abs(share - end)
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / n)
        assert gap == pytest.approx(error, abs=1e-9)
    low, high = _wilson(share, n)
    assert 0 <= low <= share <= high <= 1 and low < high
