"""Every detector of the registry is held to the same rules; a new one is covered by existing.

Truth comes from the planted models: the entries of `Truth.heads` and `Truth.task` say what must be
found, on what. The numbers themselves are compared with formulas written out here as loops over
whole eager patterns of a random model, one per detector in `REFERENCES`.
"""

import copy
import functools
import inspect
import json
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import patch_references
import pytest
import sight_references
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp.decode
from heads.detector import (
    DETECTORS,
    DecodingDetector,
    Detector,
    ReadingDetector,
    WatchingDetector,
    make_detector,
)
from heads.scoring import score
from interp import load
from interp.example import example_inputs
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Prompt
from interp.scores import NO_EVIDENCE, UNDEFINED
from interp.tasks import TASKS, make_task
from interp.zoo import ZOO

NAMES = sorted(DETECTORS)
N = 9  # examples: 2**-9 is small enough to find one head among twenty


@functools.cache
def zoo(name, attn=None, dtype="auto"):
    return load(f"zoo:{name}", attn=attn, dtype=dtype, device="cpu")


def task_of(name, detector):
    """The task on which a zoo model's truth holds; None if there is no such task."""
    task, params = zoo(name).truth.task.get(detector, (DETECTORS[detector].task, None))
    if params is None:
        params = DETECTORS[detector].task_params
    return make_task(task, params) if task in TASKS else None


CASES = [
    (name, detector)
    for name in ZOO
    for detector in NAMES
    if detector in zoo(name).truth.heads and task_of(name, detector) is not None
]
FOUND = [(name, d) for name, d in CASES if zoo(name).truth.heads[d]]


def cheap(detector):
    """The case with something to find whose model is smallest, and takes prompts of any length."""
    mine = [name for name, d in FOUND if d == detector and not name.startswith("planted-ioi")]
    return min(mine, key=lambda m: (zoo(m).context or 0, m)) if mine else None


@functools.cache
def scored(name, detector, n=N, batch_size=4, seed=0, attn=None, dtype="auto"):
    model = zoo(name, attn, dtype)
    task = task_of(name, detector)
    return score(model, detector, task=task, n=n, batch_size=batch_size, seed=seed)[detector]


@pytest.mark.parametrize("detector", NAMES)
def test_every_detector_has_models_with_and_without_something_to_find(detector):
    found = {bool(zoo(name).truth.heads[d]) for name, d in CASES if d == detector}
    assert found == {True, False}
    assert detector in zoo("planted-nothing").truth.heads or cheap(detector) is not None


@pytest.mark.parametrize(("name", "detector"), CASES)
def test_planted_truth_is_found_and_nothing_else(name, detector):
    found, truth = scored(name, detector), zoo(name).truth.heads[detector]
    assert set(found.select()) == truth
    assert {h for h, v in zip(found.heads, found.verdict, strict=True) if v == detector} == truth
    if truth:
        accuracy = found.score_against(truth)
        assert accuracy.precision == accuracy.recall == 1.0
    else:
        assert set(found.verdict) <= {NO_EVIDENCE, UNDEFINED}


@pytest.mark.parametrize(("name", "detector"), CASES)
def test_scores_and_controls_lie_within_the_range(name, detector):
    found = scored(name, detector)
    low, high = DETECTORS[detector].range
    for values in (found.per_example, found.null_per_example):
        seen = values[~np.isnan(values)]
        assert ((seen >= low - 1e-5) & (seen <= high + 1e-5)).all()
    assert found.range == (low, high)
    assert found.per_example.shape == (N, len(found.heads))
    assert len(found.heads) == sum(x.n_heads for x in next(iter(zoo(name).towers.values())).layers)


EXACT = [
    (name, detector)
    for name, detector in CASES
    if detector in zoo(name).truth.scores and detector != "sink"
]


@pytest.mark.parametrize(("name", "detector"), EXACT)
def test_closed_forms_of_single_heads(name, detector):
    """Each example alone, to rounding. Heads that do not copy score 0 in induction."""
    found = scored(name, detector)
    column = found.extras["prefix"] if detector == "induction" else found.per_example
    for head, want in zoo(name).truth.scores[detector].items():
        mine = column[:, found.heads.index(head)]
        np.testing.assert_allclose(mine, want, atol=2e-6, err_msg=str(head))
        if detector == "induction":
            claimed = head in zoo(name).truth.heads[detector]
            mine = found.per_example[:, found.heads.index(head)]
            np.testing.assert_allclose(mine, want if claimed else 0, atol=2e-6)


@pytest.mark.parametrize(("repeats", "length"), [(2, 20), (3, 9), (4, 20)])
def test_prefix_matching_over_entries_is_two_over_the_repeats(repeats, length):
    model = zoo("planted-heads")
    task = make_task("repeated-tokens", {"length": length, "repeats": repeats})
    by_entry = score(model, make_detector("induction", {"per": "entry"}), task=task, n=3)
    by_query = score(model, "induction", task=task, n=3)
    place = by_query["induction"].heads.index(HeadId(1, 0))
    np.testing.assert_allclose(by_entry["induction"].per_example[:, place], 2 / repeats, atol=1e-6)
    np.testing.assert_allclose(by_query["induction"].per_example[:, place], 1, atol=1e-6)


@pytest.mark.parametrize("length", [16, 64, 81])
def test_sink_scores_of_textbook_heads_in_fractions(length):
    """α by counting, for heads that attend evenly to a known set of keys, on matchless tokens."""
    model = load("zoo:planted-heads") if length < 64 else zoo("planted-retrieval")
    rng = random.Random(length)
    prompts = [
        Prompt((0, *rng.sample(range(1, model.vocabulary), length - 1)), id=str(i))
        for i in range(2)
    ]
    found = score(model, "sink", prompts)["sink"]

    def alpha(keys):
        mass = [Fraction(0)] * length
        for i in range(length):
            for j in keys(i):
                mass[j] += Fraction(1, len(keys(i)))
        # Only keys that at least 16 queries see.
        return max(float(mass[k] / (length - k)) for k in range(length - 15))

    rules = {
        "uniform": lambda i: range(i + 1),
        "self": lambda i: [i],
        "previous": lambda i: [max(i - 1, 0)],
        "bos": lambda i: [0],
        "local": lambda i: range(max(0, i - 3), i + 1),
    }
    places = {"planted-heads": {(0, 0): "previous", (0, 1): "bos", (0, 2): "bos",
                                (0, 3): "uniform", (0, 4): "self", (1, 0): "bos",
                                (1, 1): "local", (1, 2): "bos", (1, 3): "uniform",
                                (1, 4): "previous"},
              "planted-retrieval": {(0, 0): "previous", (0, 1): "bos", (0, 2): "uniform",
                                    (0, 3): "self", (1, 0): "bos", (1, 1): "bos",
                                    (1, 2): "local", (1, 3): "uniform"}}  # fmt: skip
    for (layer, head), kind in places[model.name[4:]].items():
        mine = found.per_example[:, found.heads.index(HeadId(layer, head))]
        np.testing.assert_allclose(mine, alpha(rules[kind]), atol=1e-6, err_msg=kind)
    harmonic = sum(1 / n for n in range(1, length + 1))
    assert alpha(rules["uniform"]) == pytest.approx(harmonic / length)
    # The null of a head on BOS is what a uniform head has there.
    sink = found.heads.index(HeadId(0, 2) if length < 64 else HeadId(0, 1))
    np.testing.assert_allclose(found.null_per_example[:, sink], harmonic / length, atol=1e-9)


@pytest.mark.parametrize("detector", NAMES)
def test_the_way_batches_are_cut_changes_nothing(detector):
    name = cheap(detector)
    whole = scored(name, detector)
    for size in (1, 2, N):
        other = scored(name, detector, batch_size=size)
        assert set(other.examples) == set(whole.examples)
        assert by_example(other, atol=2e-6) == by_example(whole, atol=2e-6)


def by_example(found, *, atol):
    """Everything said of each example, rounded, whatever their order."""
    digits = round(-math.log10(atol)) - 1
    arrays = {k: np.round(a, digits) + 0.0 for k, a in found.arrays().items()}
    return {
        example: {k: [None if math.isnan(x) else x for x in a[i].tolist()]
                  for k, a in arrays.items()}
        for i, example in enumerate(found.examples)
    } | {"failures": dict(found.failures)}  # fmt: skip


# Images are not padded.
PADDED = [d for d in NAMES if cheap(d) is None or zoo(cheap(d)).reads_tokens]


@pytest.mark.parametrize("detector", PADDED)
def test_padding_on_either_side_changes_nothing(detector, monkeypatch):
    """Readings pad on the right by default and decoding on the left: force the other for both."""
    name = cheap(detector)
    prompts = uneven(name, detector)
    want = score(zoo(name), detector, prompts, batch_size=1)[detector]
    sides = ("left",) if issubclass(DETECTORS[detector], WatchingDetector) else ("left", "right")
    original = Model.batch
    for side in sides:
        used = []

        def forced(self, prompts, *, side="right", _to=side, _used=used):
            made = original(self, prompts, side=_to)
            _used.append(made.padded)
            return made

        monkeypatch.setattr(Model, "batch", forced)
        got = score(zoo(name), detector, prompts, batch_size=len(prompts))[detector]
        monkeypatch.undo()
        assert any(used)
        assert by_example(got, atol=2e-6) == by_example(want, atol=2e-6)


def uneven(name, detector):
    """Prompts of the task with lengths that differ."""
    model, task = zoo(name), task_of(name, detector)
    wide = {f: v for f, v in (("lengths", (60, 75, 90)),) if hasattr(task, f)}
    task = type(task)(**{**vars(task), **wide})
    prompts = task.prompts(model, 12, seed=3)[::4]
    if len({len(p) for p in prompts}) == 1 and hasattr(task, "length"):
        sizes = [task.length + 3 * i for i in range(3)]
        made = [type(task)(**{**vars(task), "length": x}).prompts(model, 1)[0] for x in sizes]
        prompts = [Prompt(p.tokens, p.spans, f"{i}", p.answer) for i, p in enumerate(made)]
    assert len({len(p) for p in prompts}) > 1
    return prompts


@pytest.mark.parametrize("detector", NAMES)
def test_kernels_agree(detector):
    name = cheap(detector)
    eager = scored(name, detector, attn="eager")
    assert zoo(name, "eager").hf.config._attn_implementation == "eager"
    assert zoo(name).hf.config._attn_implementation == "sdpa"
    assert by_example(eager, atol=1e-5) == by_example(scored(name, detector), atol=1e-5)
    assert eager.select() == scored(name, detector).select()


@pytest.mark.parametrize("detector", NAMES)
def test_double_precision_gives_the_same(detector):
    name = cheap(detector)
    assert next(zoo(name, dtype="float64").hf.parameters()).dtype == torch.float64
    assert by_example(scored(name, detector, dtype="float64"), atol=1e-5) == (
        by_example(scored(name, detector), atol=1e-5)
    )


@pytest.mark.parametrize("detector", NAMES)
def test_half_precision_is_read_to_two_hundredths_and_keeps_its_verdicts(detector):
    """Against the pattern that the bfloat16 model itself makes; weights round, so models differ."""
    name = cheap(detector)
    found = scored(name, detector, dtype="bfloat16")
    eager = scored(name, detector, attn="eager", dtype="bfloat16")
    assert next(zoo(name, dtype="bfloat16").hf.parameters()).dtype == torch.bfloat16
    np.testing.assert_allclose(found.per_example, eager.per_example, atol=0.02)
    np.testing.assert_allclose(found.null_per_example, eager.null_per_example, atol=0.02)
    assert set(found.select()) == zoo(name).truth.heads[detector]


def ungrouped(model):
    """The same heads with a key-value head each."""
    config = copy.deepcopy(model.hf.config)
    group = config.num_attention_heads // config.num_key_value_heads
    kv_heads, config.num_key_value_heads = config.num_key_value_heads, config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        hf = type(model.hf)(config).to(model.dtype).eval()
    state = model.hf.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.view(kv_heads, -1, weight.shape[-1])
            state[name] = heads.repeat_interleave(group, dim=0).flatten(0, 1)
    hf.load_state_dict(state)
    assert group > 1
    return Model(hf, model.tokenizer, name=model.name, truth=model.truth)


def grouped(model):
    """Whether several query heads share a key-value head."""
    config = model.text_config
    heads = config.num_attention_heads
    return getattr(config, "num_key_value_heads", heads) != heads


GROUPED = [name for name, _ in CASES if grouped(zoo(name))]


@pytest.mark.parametrize(("name", "detector"), [c for c in CASES if c[0] in GROUPED])
def test_grouped_heads_score_as_ungrouped_ones(name, detector):
    want = scored(name, detector)
    found = score(ungrouped(zoo(name)), detector, task=task_of(name, detector), n=N)[detector]
    assert by_example(found, atol=2e-6) == by_example(want, atol=2e-6)


@pytest.mark.parametrize(
    "detector", [d for d in NAMES if issubclass(DETECTORS[d], DecodingDetector)]
)
def test_decoding_without_a_cache_gives_the_same(detector, monkeypatch):
    name = cheap(detector)
    prompts = uneven(name, detector)
    want = score(zoo(name), detector, prompts)[detector]
    original, calls = interp.decode.generate, []

    def uncached(*args, **kwargs):
        calls.append(kwargs.get("use_cache"))
        return original(*args, **{**kwargs, "use_cache": False})

    monkeypatch.setattr(interp.decode, "generate", uncached)
    got = score(zoo(name), detector, prompts)[detector]
    assert calls and False not in calls
    assert by_example(got, atol=2e-6) == by_example(want, atol=2e-6)


WATCHERS = [
    name
    for name in NAMES
    if issubclass(DETECTORS[name], WatchingDetector)
    and not issubclass(DETECTORS[name], DecodingDetector)
]


@pytest.mark.parametrize("detector", WATCHERS)
def test_passes_are_as_many_as_said(detector, monkeypatch):
    name = cheap(detector)
    shown = not zoo(name).reads_tokens  # images have one length
    prompts = task_of(name, detector).prompts(zoo(name), 3) if shown else uneven(name, detector)
    score(zoo(name), detector, prompts, batch_size=len(prompts))
    original, calls = Model.forward, []

    def counted(self, inputs):
        calls.append(len(next(iter(inputs.values()))))
        return original(self, inputs)

    monkeypatch.setattr(Model, "forward", counted)
    score(zoo(name), detector, prompts, batch_size=len(prompts))
    made, heads = make_detector(detector), len(next(iter(zoo(name).towers.values())).heads)
    assert sum(calls) == len(prompts) * (made.passes + heads * made.per_head)


@pytest.mark.parametrize("detector", NAMES)
def test_one_seed_gives_one_table_and_another_seed_another_sample(detector):
    name = cheap(detector)
    task = task_of(name, detector)
    first, again = (score(zoo(name), detector, task=task, n=3)[detector] for _ in range(2))
    assert first.to_bytes() == again.to_bytes()
    other = score(zoo(name), detector, task=task, n=3, seed=1)[detector]
    assert first.provenance["tasks"] != other.provenance["tasks"]


@pytest.mark.parametrize("detector", NAMES)
def test_the_model_is_as_it_was(detector):
    name = cheap(detector)
    model = zoo(name)
    inputs = example_inputs(model.hf)
    before = model.forward(inputs).logits
    weights = {k: v.clone() for k, v in model.hf.state_dict().items()}
    score(model, detector, task=task_of(name, detector), n=2)
    assert torch.equal(model.forward(inputs).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.hf.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize("detector", NAMES)
def test_a_detector_says_what_it_is(detector):
    cls = DETECTORS[detector]
    assert cls.name == detector and issubclass(cls, ReadingDetector | WatchingDetector)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", detector)
    assert cls.summary and len(cls.summary) < 80 and "\n" not in cls.summary
    assert re.search(r"\b(19|20)\d\d\b", cls.citation)
    assert re.search(r"Sources?:", inspect.getmodule(cls).__doc__)
    assert cls.unit and cls.no_evidence
    low, high = cls.range
    assert low < high and low <= cls.threshold <= high
    task = make_task(cls.task, cls.task_params)
    assert set(cls.needs) <= {*task.spans, "all"}
    assert cls.__doc__ and cls.__dataclass_params__.frozen
    for field in cls().params:
        assert f"{field}:" in cls.__doc__, f"{field} is not explained"


@pytest.mark.parametrize("detector", NAMES)
def test_parameters_survive_json_and_the_command_line(detector):
    made = make_detector(detector)
    assert isinstance(made, Detector) and made == DETECTORS[detector]()
    params = json.loads(json.dumps(made.params, allow_nan=False))
    assert make_detector(detector, params) == made
    texts = {
        k: ",".join(map(str, v)) if isinstance(v, list | tuple) else str(v)
        for k, v in params.items()
    }
    assert make_detector(detector, texts) == made
    assert hash(made) == hash(make_detector(detector))
    assert dict(scored(cheap(detector), detector).params) == params


# ---------------------------------------------------------------- formulas, written out


@functools.cache
def random_llama():
    """Grouped queries, RMSNorm with weights, and scores large enough for peaked patterns."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=48, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        hf = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            hf.model.norm.weight.copy_(1 + 0.5 * torch.randn(48))
    return load(hf)


@functools.cache
def whole_copy():
    hf = copy.deepcopy(random_llama().hf).double()
    hf.set_attn_implementation("eager")
    return hf


@torch.no_grad()
def patterns(tokens):
    """[layer, head, query, key], float64, of one prompt alone."""
    out = whole_copy()(torch.tensor([tokens]), output_attentions=True)
    return torch.stack(out.attentions)[:, 0].numpy()


@torch.no_grad()
def results(tokens):
    """What each head writes, [layer, head, pos, d_model], from v_proj and o_proj by hand."""
    hf, values = whole_copy(), []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0]))
        for layer in hf.model.layers
    ]
    a = torch.tensor(patterns(tokens))
    for hook in hooks:
        hook.remove()
    n_heads, size = hf.config.num_attention_heads, hf.config.head_dim
    group = n_heads // hf.config.num_key_value_heads
    out = []
    for layer, v in zip(hf.model.layers, values, strict=True):
        w_o = layer.self_attn.o_proj.weight
        out.append([
            a[len(out), h] @ v[:, h // group * size : (h // group + 1) * size]
            @ w_o[:, h * size : (h + 1) * size].T
            for h in range(n_heads)
        ])  # fmt: skip
    return torch.stack([torch.stack(x) for x in out]).numpy()


def mean(values):
    return sum(values) / len(values) if values else math.nan


def control_of(detector, prompt):
    """The tokens of the engine's control: seeded by seed, detector and example."""
    rng = random.Random(f"0/{detector.name}/{prompt.id}")
    return detector.control(detector.prepare(prompt), rng).tokens


def ref_previous(detector, prompt):
    a = patterns(prompt.tokens)
    t = len(prompt)
    back = {n: np.array([[mean([m[i, i - n] for i in range(n, t)]) for m in row] for row in a])
            for n in (1, 2, 3, 4)}  # fmt: skip
    null = np.nanmax(np.stack([back[2] * 0 if t <= 1 else np.zeros_like(back[1]),
                               *[back[n] for n in (2, 3, 4) if n < t]]), axis=0)  # fmt: skip
    return back[1], null, {}


def copies(tokens, shift):
    """(query, keys after earlier copies) of every query that has some."""
    out = []
    for i in range(len(tokens)):
        keys = [j + shift for j in range(i) if tokens[j] == tokens[i] and j + shift < i]
        if keys:
            out.append((i, keys))
    return out


def on_pairs(a, pairs):
    return np.array([[mean([sum(m[i, j] for j in js) for i, js in pairs]) for m in row]
                     for row in a])  # fmt: skip


def ref_duplicate(detector, prompt):
    pairs = copies(prompt.tokens, 0)
    control = patterns(control_of(detector, prompt))
    return on_pairs(patterns(prompt.tokens), pairs), on_pairs(control, pairs), {}


def ref_induction(detector, prompt):
    pairs = copies(prompt.tokens, 1)
    prefix = on_pairs(patterns(prompt.tokens), pairs)
    null = on_pairs(patterns(control_of(detector, prompt)), pairs)
    hf = whole_copy()
    with torch.no_grad():
        gain, w_u = hf.model.norm.weight.numpy(), hf.lm_head.weight.numpy()
    # Queries on which copying is measured: from the last backwards, evenly spread.
    step = max(1, len(pairs) // detector.queries)
    chosen = pairs[::-1][::step][: detector.queries]
    wrote = results(prompt.tokens)
    copying = np.full(prefix.shape, np.nan)
    for layer, head in np.ndindex(*prefix.shape):
        shares = []
        for i, js in chosen:
            logits = w_u @ (gain * wrote[layer, head, i])
            logits = logits - logits.mean()
            target, sample = prompt.tokens[max(js)], set(prompt.tokens)
            up, down = ({s: max(sign * logits[s], 0) for s in sample} for sign in (1, -1))
            shares.append(up[target] / sum(up.values()) - down[target] / sum(down.values()))
        copying[layer, head] = mean(shares)
    found = np.where(copying >= detector.copies, prefix, 0.0)
    return found, null, {"prefix": prefix, "copying": copying}


def ref_sink(detector, prompt):
    a, t = patterns(prompt.tokens), len(prompt)
    best, null, place = (np.zeros(a.shape[:2]) for _ in range(3))
    for layer, head in np.ndindex(*a.shape[:2]):
        alpha = [mean([a[layer, head, i, k] for i in range(k, t)])
                 for k in range(t - detector.queries + 1)]  # fmt: skip
        k = int(np.argmax(alpha))
        best[layer, head], place[layer, head] = alpha[k], k
        null[layer, head] = mean([1 / (i + 1) for i in range(k, t)])
    return best, null, {"position": place, "token": np.array(prompt.tokens)[place.astype(int)]}


def ref_retrieval(detector, prompt):
    """Decoding by whole forwards, one row a step."""
    tokens, steps = list(prompt.tokens), []
    for _ in range(len(prompt.answer) + detector.extra):
        with torch.no_grad():
            out = whole_copy()(torch.tensor([tokens]), output_attentions=True)
        word = int(out.logits[0, -1].argmax())
        steps.append((word, np.stack([x[0, :, -1].numpy().argmax(-1) for x in out.attentions])))
        tokens.append(word)
    inside = {i for s, e in prompt.spans["needle"] for i in range(s, e)}
    found = np.zeros(steps[0][1].shape)
    null = np.zeros_like(found)
    decoys = prompt.spans["decoys"]
    for at in np.ndindex(*found.shape):
        tops = [(word, int(top[at])) for word, top in steps]
        hits = [word for word, j in tops if j in inside and prompt.tokens[j] == word]
        if detector.mode == "authors":
            found[at] = len(hits) / len(inside)
        else:
            found[at] = len(set(hits)) / len({prompt.tokens[i] for i in inside})
        strays = [j for _, j in tops if any(s <= j < e for s, e in decoys)]
        null[at] = min(1, len(strays) / (len(decoys) * len(inside)))
    return found, null, {}


def repeated(seed=0):
    """Uneven prompts with copies at several lags; the second has copies side by side."""
    rng = random.Random(seed)
    out = []
    for i, length in enumerate((30, 44, 61, 37)):
        tokens = [0, *(rng.randrange(1, 14) for _ in range(length - 1))]
        out.append(Prompt(tuple(tokens), {"bos": ((0, 1),)}, id=f"r{i}"))
    return out


def needles():
    """Needles that hold what the model says on them, so that there is something to hit."""
    out = []
    for i, length in enumerate((40, 64, 52, 33, 47, 58)):
        rng = random.Random(i)
        tokens = [0, *(rng.randrange(1, 40) for _ in range(length - 1))]
        spans = {"needle": ((5, 21),), "decoys": ((22, 26), (27, 32)), "question": ((32, 33),)}
        out.append(Prompt(tuple(tokens), spans, id=f"n{i}", answer=tuple(tokens[5 : 9 + i % 2])))
    return out


@torch.no_grad()
def last_outputs(tokens, mask=None):
    """What enters the output projection at the last token: [layer, head, d]."""
    hf, seen = whole_copy(), []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][0, -1]))
        for layer in hf.model.layers
    ]
    mask = None if mask is None else torch.tensor([mask])
    hf(torch.tensor([tokens]), attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).unflatten(-1, (hf.config.num_attention_heads, -1)).numpy()


def ref_divergence(detector, prompt):
    image = set(prompt.positions("image"))
    seen = last_outputs(prompt.tokens)
    blind = last_outputs([t for i, t in enumerate(prompt.tokens) if i not in image])
    masked = last_outputs(prompt.tokens, [int(i not in image) for i in range(len(prompt))])

    def distance(a, b):
        gap, size = np.linalg.norm(a - b), np.linalg.norm(a) + np.linalg.norm(b)
        if gap <= 1e-5 * size:
            return 0.0
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return {"raw": gap, "relative": gap / size, "cosine": 1 - cosine}[detector.measure]

    found, null, selected = (np.zeros(seen.shape[:2]) for _ in range(3))
    for layer in range(len(seen)):
        vhd = [np.linalg.norm(a - b) for a, b in zip(seen[layer], blind[layer], strict=True)]
        text = [b @ b for b in blind[layer]]
        for head in range(len(vhd)):
            found[layer, head] = distance(seen[layer, head], blind[layer, head])
            null[layer, head] = distance(masked[layer, head], blind[layer, head])
        far = [all(x[h] > np.mean(x) + np.std(x) for x in (vhd, text)) for h in range(len(vhd))]
        kept = [0 if f else x for f, x in zip(far, vhd, strict=True)]
        selected[layer] = [x > np.median(kept) for x in kept]
    return found, null, {"selected": selected}


def ref_visual(detector, prompt):
    row, image = patterns(prompt.tokens)[:, :, -1], prompt.positions("image")
    mass = row[..., image].sum(-1)
    narrow = np.zeros(mass.shape)
    for at in np.ndindex(*mass.shape):
        p = row[at][image] / mass[at]
        narrow[at] = 1 + sum(x * math.log(x) for x in p) / math.log(len(image))
    null = np.full(mass.shape, len(image) / len(prompt))
    return mass, null, {"concentration": narrow}


def ref_grounding(detector, prompt):
    row, image = patterns(prompt.tokens)[:, :, -1], prompt.positions("image")
    region = prompt.positions("thing")
    share, pointing = np.zeros(row.shape[:2]), np.zeros(row.shape[:2])
    for at in np.ndindex(*share.shape):
        seen = sum(row[at][j] for j in image)
        if seen >= detector.least:
            share[at] = sum(row[at][j] for j in region) / seen
            pointing[at] = max(image, key=lambda j: row[at][j]) in region
    null = np.full(share.shape, len(region) / len(image))
    if detector.measure == "pointing":
        return pointing, null, {"share": share}
    return share, null, {"pointing": pointing}


def pictures():
    """Prompts with an image of sixteen tokens in the middle and a thing in two pieces of it."""
    out = []
    for i, length in enumerate((40, 64, 33, 52)):
        rng = random.Random(i)
        first = rng.randrange(1, 9)
        spans = {
            "image": ((first, first + 16),),
            "thing": ((first + 2, first + 4), (first + 9, first + 10)),
        }
        tokens = (0, *(rng.randrange(1, 40) for _ in range(length - 1)))
        out.append(Prompt(tokens, spans, id=f"i{i}", answer=(5,)))
    return out


REFERENCES = {
    "vision-head-divergence": (
        ref_divergence,
        pictures,
        [{}, {"measure": "relative"}, {"measure": "cosine"}],
    ),
    "visual-attention": (ref_visual, pictures, [{}]),
    "region-grounding": (
        ref_grounding,
        pictures,
        [{}, {"measure": "pointing"}, {"least": 0.35}],
    ),
    "previous-token": (ref_previous, repeated, [{}]),
    "duplicate-token": (ref_duplicate, repeated, [{}]),
    "induction": (ref_induction, repeated, [{}, {"copies": -1.0, "queries": 3}]),
    "sink": (ref_sink, repeated, [{}, {"epsilon": 0.5, "queries": 5}]),
    "retrieval": (
        ref_retrieval,
        needles,
        [{"success": -1.0}, {"success": -1.0, "mode": "authors"}],
    ),
}
REFERENCES |= sight_references.references(patterns, last_outputs, whole_copy)


REFERENCES |= patch_references.REFERENCES


def random_model(detector):
    """The random model on whose patterns a formula is written out."""
    return patch_references.RANDOM.get(detector, random_llama)()


def test_every_detector_has_a_formula_written_out_here():
    assert sorted(REFERENCES) == NAMES


@pytest.mark.parametrize(
    ("detector", "params"), [(d, p) for d, (_, _, many) in REFERENCES.items() for p in many]
)
def test_scores_equal_loops_over_whole_patterns(detector, params):
    reference, prompts, _ = REFERENCES[detector]
    made, listed = make_detector(detector, params), prompts()
    found = score(random_model(detector), made, listed, batch_size=3)[detector]
    assert not found.failures
    for prompt in listed:
        row = found.examples.index(prompt.id)
        want, null, extras = reference(made, prompt)
        pairs = [("score", found.per_example, want), ("null", found.null_per_example, null)]
        pairs += [(name, found.extras[name], column) for name, column in extras.items()]
        assert set(extras) == set(found.extras)
        for what, got, expected in pairs:
            np.testing.assert_allclose(
                got[row],
                np.asarray(expected).ravel(),
                atol=2e-5,
                rtol=5e-5,
                err_msg=f"{prompt.id} {what}",
            )
    counts = Counter(np.round(found.per_example.ravel(), 6).tolist())
    assert len(counts) > 1 and found.per_example.max() > 0  # or nothing was compared


@pytest.mark.parametrize("detector", NAMES)
def test_the_random_model_scores_the_same_in_any_batch_and_kernel(detector):
    _, prompts, (params, *_) = REFERENCES[detector]
    made, listed = make_detector(detector, params), prompts()
    model = random_model(detector)
    want = score(model, made, listed, batch_size=1)[detector]
    eager = copy.deepcopy(model.hf)
    eager.set_attn_implementation("eager")
    double = copy.deepcopy(model.hf).double()
    others = [(model.hf, 4, 1e-4), (eager, 3, 1e-4), (double, 2, 1e-4)]
    if grouped(model):
        others.append((ungrouped(model).hf, 2, 1e-4))
    for hf, size, atol in others:
        found = score(load(hf), made, listed, batch_size=size)[detector]
        order = [found.examples.index(e) for e in want.examples]
        close = {"atol": atol, "rtol": 5e-5}
        np.testing.assert_allclose(found.per_example[order], want.per_example, **close)
        np.testing.assert_allclose(found.null_per_example[order], want.null_per_example, **close)
