"""Traces against whole attention matrices of eager copies in double precision."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import images_kit as kit
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import fresh, fused, prompt, registered
from test_interp_seam import traces as everything_touched

from benchmarks.tiny_models import tiny_model
from interp import load
from interp.errors import HeadIdError, InputError, RunError, SiteError, UnknownNameError
from interp.images import image_prompt
from interp.prompts import Prompt
from interp.traces import Trace, capture, decode, encode, sweeps, trace_key, traces_of
from interp.traces.calm import _STATE, one_thread
from interp.traces.pooling import aligned
from interp.traces.recent import Recent

MODULE = sys.modules["interp.traces.recording"]
ROOT = Path(__file__).resolve().parents[1]


# ---- the reference: weights as the model's own eager code returns them, in double precision


@dataclass
class Dense:
    """Whole matrices of one layer: pattern [head, query, key], v [kv head, key, d]."""

    p: np.ndarray
    v: np.ndarray | None

    @property
    def seen(self):
        # In double precision only what a mask hides is exactly zero.
        return (self.p > 0).any(0)


@torch.no_grad()
def dense(model, one):
    """(tower, layer) to `Dense`; calls and rows one after another on the diagonal."""
    # The experts of some families multiply in single precision only.
    wide = torch.float32 if "Experts" in str(model.hf) else torch.float64
    hf = copy.deepcopy(model.hf).to(wide)
    names = {m: n for n, m in hf.named_modules()}
    notes, undo = {}, []
    inputs = {
        n: x.to(wide) if torch.is_tensor(x) and x.is_floating_point() else x
        for n, x in MODULE._inputs(model, one)[0].items()
    }
    inputs.pop("logits_to_keep", None)
    if "Falcon" in type(hf).__name__:
        return falcon(hf, inputs)
    if hasattr(hf, "set_attn_implementation"):
        hf.set_attn_implementation("eager")
    for file in {type(m).__module__ for m in hf.modules()}:
        scope = vars(sys.modules[file])
        if (own := scope.get("eager_attention_forward")) is None:
            continue

        def noted(module, q, k, v, *args, own=own, **kw):
            out = own(module, q, k, v, *args, **kw)
            notes.setdefault(names[module], []).append((out[1], v))
            return out

        scope["eager_attention_forward"] = noted
        undo.append((scope, own))
    try:
        if one.inputs or not model.reads_tokens or "attentions" in str(one.meta):
            hf(**inputs)
        else:
            out = hf(
                **inputs,
                output_attentions=True,
                **({"use_cache": False} if hasattr(hf.config, "use_cache") else {}),
            )
    finally:
        for scope, own in undo:
            scope["eager_attention_forward"] = own
    found = {}
    for tower in model.towers.values():
        for at, layer in enumerate(tower.layers):
            calls = notes.get(layer.name)
            if calls is None:  # families without an eager function of that name
                calls = [(out.attentions[at], None)]
            blocks = [(w, None if v is None else v[b]) for ws, v in calls for b, w in enumerate(ws)]
            p = np.zeros(
                (
                    layer.n_heads,
                    sum(w.shape[1] for w, _ in blocks),
                    sum(w.shape[2] for w, _ in blocks),
                )
            )
            i = j = 0
            for w, _ in blocks:
                p[:, i : i + w.shape[1], j : j + w.shape[2]] = w[..., : w.shape[2]]
                i, j = i + w.shape[1], j + w.shape[2]
            v = None if blocks[0][1] is None else torch.cat([v for _, v in blocks], 1).numpy()
            found[tower.name, layer.index] = Dense(p, v)
    return found


def falcon(hf, inputs):
    """Its eager code adds position biases twice: what its fused kernel is given counts."""
    found = {}
    own = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, attn_mask, *args, **kw):
        s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + attn_mask
        p = torch.softmax(s, -1) * (attn_mask > -1e30)
        found["text", len(found)] = Dense(p[0].numpy(), v[0].numpy())
        return own(q, k, v, attn_mask, *args, **kw)

    torch.nn.functional.scaled_dot_product_attention = noted
    try:
        hf(**inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
    return found


# ---- models


def words(n, seed=3, **more):
    made = prompt(n, seed)
    return Prompt(made.tokens, made.spans, id="x", **more)


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def spread(hf, std=0.3):
    """Weights large enough that patterns are far from even."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=std)
    return hf


def family(name, n=40, attn="", **more):
    return load(fresh(name, attn)), words(n, **more)


def t5():
    decoder = torch.tensor([[0, *words(23, 5).tokens]])
    return load(fresh("t5")), words(40, inputs={"decoder_input_ids": decoder})


def seen_through(name, *images, text="what is this ?"):
    case = kit.case(name)
    hf = spread(copy.deepcopy(case.model.hf))
    model = load(hf, tokenizer=case.model.tokenizer, processor=case.model.processor)
    body = "".join(f"{case.mark} the cat " for _ in images) + text if case.mark else ""
    return model, image_prompt(model, body, list(images), id="x")


def alibi(name, **config):
    torch.manual_seed(0)
    hf = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(vocab_size=97, **config))
    return load(spread(hf, 0.2).eval()), words(40)


def holes():
    """A mask that no range of keys says."""
    rng = np.random.default_rng(0)
    seen = np.tril(rng.random((40, 40)) < 0.6) | np.eye(40, dtype=bool)
    mask = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)[None, None]
    return load(fresh("llama")), words(40, inputs={"attention_mask": mask}), seen


CASES = {
    "mha": lambda: family("gpt2"),
    "mha eager": lambda: family("gpt2", attn="eager"),
    "gqa": lambda: family("llama"),
    "gqa pooled": lambda: family("llama", 300),
    "two levels": lambda: family("gpt2", 2100),
    "window": lambda: family("mistral"),
    "window pooled": lambda: family("mistral", 600),
    "soft-cap": lambda: family("gemma2"),
    "sinks": lambda: family("gpt-oss"),
    "latent": lambda: family("deepseek-v3"),
    "bert": lambda: family("bert"),
    "bloom": lambda: family("bloom"),
    "falcon": lambda: alibi(
        "Falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False, multi_query=False, eos_token_id=1, bos_token_id=1,
    ),
    "mpt": lambda: alibi("Mpt", d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    "t5": t5,
    "bart": lambda: (load(tiny_model("bart")), words(30, answer=tuple(range(5, 17)))),
    "prefix": lambda: seen_through("paligemma", noise(40, 30)),
    "clip tower": lambda: seen_through("clip_vision", noise(50, 40)),
    "vit": lambda: seen_through("vit", noise(50, 40)),
    "packed": lambda: seen_through("qwen2_5_vl", noise(60, 44, 1), noise(40, 52, 2)),
    "two images": lambda: seen_through("llava", noise(60, 44, 1), noise(40, 52, 2)),
    "holes": lambda: holes()[:2],
}  # fmt: skip
# How layers are kept; `exact` where nothing is said.
FORMS = {"bloom": "rows", "mpt": "rows", "holes": "rows"}


@cache
def made(name):
    model, one = CASES[name]()
    return model, one, dense(model, one)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Traces by the name of their case, made once."""
    held = {}

    def get(name):
        if name not in held:
            model, one, _ = made(name)
            held[name] = capture(model, one, tmp_path_factory.mktemp("run"))
        return held[name]

    return get


def heads_of(trace, found):
    for (tower, index), layer in found.items():
        for h in range(len(layer.p)):
            prefix = "" if tower == "text" else f"{tower}."
            yield trace.head(f"{prefix}L{index}H{h}"), layer.p[h], layer.seen, (tower, index, h)


def close(got, p, seen, atol=3e-3):
    assert (np.isnan(got) == ~seen).all()
    assert np.abs(np.nan_to_num(got) - p).max() <= atol


# ---- what is read


@pytest.mark.parametrize("name", CASES)
def test_blocks_rows_and_columns_are_those_of_the_model(name, kept):
    trace, found = kept(name), made(name)[2]
    assert {(t, i) for t in trace.towers for i in trace.tower(t).layers} == set(found)
    for head, p, seen, where in heads_of(trace, found):
        assert head.layer.form == FORMS.get(name, "exact"), (where, head.layer.note)
        if head.layer.form == "exact":
            assert head.layer.error <= 1e-3 and head.layer.note == ""
        else:
            assert head.layer.error is None and head.layer.note
        n, m = p.shape
        assert (head.n_query, head.n_key) == (n, m)
        whole = head.block((0, n), (0, m))
        close(whole, p, seen)
        q, k = (n // 3, n // 3 + 5), (m // 4, m // 4 + 7)
        assert np.array_equal(
            head.block(q, k), whole[q[0] : q[1], k[0] : k[1]], equal_nan=True
        ) or (np.nanmax(np.abs(head.block(q, k) - whole[q[0] : q[1], k[0] : k[1]])) < 1e-6)
        some = [n - 1, 2, 0, n // 2, 2]
        close(head.rows(some), p[some], seen[some])
        close(head.rows(list(range(3, 9))), p[3:9], seen[3:9])
        some = [m - 1, 0, m // 2]
        close(head.columns(some), p[:, some].T, seen[:, some].T)


@pytest.mark.parametrize("name", CASES)
def test_overviews_and_windows_are_maxima_of_the_model(name, kept):
    trace, found = kept(name), made(name)[2]
    for head, p, seen, _ in heads_of(trace, found):
        n, m = p.shape
        views = [head.overview(), head.window((0, n), (0, m)), head.window((n // 2, n), (0, m))]
        views += [head.window((0, n), (0, m), cells=c) for c in (7, 64)]
        for w in views:
            assert w.q1 <= n and w.k1 <= m
            assert max(w.codes.shape) <= 512
            check_cells(w, p, seen)


def check_cells(w, p, seen, atol=3e-3):
    shown = np.where(seen, p, -1.0)[w.q0 : w.q1, w.k0 : w.k1]
    at = (np.arange(0, s, c) for s, c in zip(shown.shape, (w.pool_q, w.pool_k), strict=True))
    rows, columns = at
    want = np.maximum.reduceat(np.maximum.reduceat(shown, rows, axis=0), columns, axis=1)
    assert w.codes.shape == want.shape
    assert ((w.codes == 0) == (want < 0)).all()
    # sqrt(p) in 254 steps: half a step, and what half precision rounds.
    got = np.sqrt(np.nan_to_num(decode(w.codes)))
    assert np.abs(got**2 - np.clip(want, 0, 1)).max() <= 2 * 0.5 / 254 + atol


@pytest.mark.parametrize("name", CASES)
def test_summaries_are_those_of_the_model(name, kept):
    trace, found = kept(name), made(name)[2]
    model = made(name)[0]
    for head, p, seen, (tower, index, h) in heads_of(trace, found):
        n, m = p.shape
        about = head.layer.tower.about
        got = {s: head.summary(s) for s in ("entropy", "received", "distance", "segments", "peak")}
        logs = np.log(np.where(p > 0, p, 1))
        assert np.abs(got["entropy"] - -(p * logs).sum(1)).max() <= 0.02
        count = np.maximum(1, seen.sum(0))
        assert np.abs(got["received"] - p.sum(0) / count).max() <= 2e-3
        bins = np.zeros_like(got["distance"], dtype=float)
        for i in range(n):
            for j in np.nonzero(p[i])[0]:
                d = abs(int(i) - int(j))
                bins[d.bit_length()] += p[i, j] / n
        assert np.abs(got["distance"] - bins).max() <= 2e-3
        assert np.abs(got["peak"] - p.max(1)).max() <= 3e-3
        at = head.summary("peak_key")
        assert np.abs(p[np.arange(n), at] - p.max(1)).max() <= 6e-3
        names = head.layer.tower.segments
        queries, keys = np.array(about["query_segments"]), np.array(about["key_segments"])
        assert len(queries) == n and len(keys) == m and max(queries.max(), keys.max()) < len(names)
        for a in range(len(names)):
            for b in range(len(names)):
                rows = p[queries == a][:, keys == b]
                want = rows.sum(1).mean() if len(rows) else 0.0
                assert abs(got["segments"][a, b] - want) <= 2e-3
        layer = found[tower, index]
        if "value_norm" in head.layer.names() and layer.v is not None:
            w = model.w_o(model.tower(tower).layers[index]).detach().double().numpy()[h]
            v = layer.v[h // (len(layer.p) // len(layer.v))]
            want = np.linalg.norm(v @ w, axis=-1)
            assert np.abs(head.summary("value_norm") / np.maximum(want, 1e-6) - 1).max() <= 1e-3
    if name in ("gqa", "t5", "clip tower"):
        assert "value_norm" in head.layer.names()


def test_segments_name_each_token_once(kept):
    tower = kept("gqa").tower("text")
    one = made("gqa")[1]
    for i, at in enumerate(tower.about["key_segments"]):
        name = tower.segments[at]
        if name == "other":
            assert not any(i in one.positions(s) for s in one.spans)
        else:
            assert i in one.positions(name)
    assert tower.segments[tower.about["key_segments"][0]] == "bos"
    # A needle within a wider span is a needle.
    assert tower.segments[tower.about["key_segments"][3]] == "needle"


def test_axes_of_an_encoder_decoder_are_labelled_by_what_they_read(kept):
    trace, one = kept("t5"), made("t5")[1]
    read = [str(t) for t in one.inputs["decoder_input_ids"][0].tolist()]
    tokens = [str(t) for t in one.tokens]
    assert trace.tokens == tokens and trace.info["decoder"] == read
    for tower, query, key in (
        ("encoder", tokens, tokens), ("text", read, read), ("cross", read, tokens)
    ):  # fmt: skip
        assert trace.tower(tower).labels("query") == query
        assert trace.tower(tower).labels("key") == key
    assert "needle" in trace.tower("cross").segments
    # Without decoder ids the decoder reads its start and the answer.
    assert kept("bart").info["decoder"][1:] == [str(i) for i in range(5, 17)]


def test_axes_of_towers_are_labelled_by_patches(kept):
    for name, tower in (("packed", "vision"), ("two images", "vision"), ("vit", "vision")):
        trace, one = kept(name), made(name)[1]
        labels = trace.tower(tower).labels("key")
        assert len(labels) == trace.tower(tower).n_key
        at = 0
        for row in one.views[tower]:
            for patch in row.patches:
                assert labels[at + patch.position].endswith(f"{patch.row},{patch.column}")
            at += len(row)


# ---- windows of any place and size


def long_one(tmp):
    if "long" not in long_one.__dict__:
        model, one, found = made("two levels")
        long_one.long = capture(model, one, tmp), found["text", 1].p[2]
    return long_one.long


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_pooled_window_is_the_maximum_of_its_exact_block(tmp_path_factory, data):
    trace, _ = long_one(tmp_path_factory.getbasetemp() / "long")
    head = trace.head("L1H2")
    n = head.n_query
    sides = []
    for _ in "qk":
        start = data.draw(st.integers(0, n - 1))
        sides.append((start, data.draw(st.integers(start + 1, n))))
    cells = data.draw(st.sampled_from([512, 100, 37, 5]))
    w = head.window(*sides, cells=cells)
    assert w.q0 <= sides[0][0] and w.q1 >= sides[0][1] and w.q0 % w.pool_q == 0
    assert w.k0 <= sides[1][0] and w.k1 >= sides[1][1] and w.k0 % w.pool_k == 0
    assert max(w.codes.shape) <= cells
    # A level that was kept answers only where it is as fine.
    assert w.pool_q < 2 * aligned(*sides[0], n, cells)[2]
    assert w.pool_k < 2 * aligned(*sides[1], n, cells)[2]
    block = head.block((w.q0, w.q1), (w.k0, w.k1))
    want = np.where(np.isnan(block), -1.0, block)
    want = np.maximum.reduceat(want, np.arange(0, len(want), w.pool_q), axis=0)
    want = np.maximum.reduceat(want, np.arange(0, want.shape[1], w.pool_k), axis=1)
    codes = encode(np.maximum(want, 0), want >= 0)
    off = w.codes.astype(int) - codes
    # A number between two codes may fall on either side.
    assert ((codes == 0) == (w.codes == 0)).all() and np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.01 or np.abs(off).sum() <= 2


def test_a_wide_window_of_few_rows_is_exact(tmp_path_factory, monkeypatch):
    trace, p = long_one(tmp_path_factory.getbasetemp() / "long")
    head = trace.head("L1H2")
    w = head.window((1000, 1010), (0, 2100))
    assert w.pool_q == 1 and w.pool_k == 5
    monkeypatch.setattr("interp.traces.trace.LARGEST", 100)
    coarse = head.window((1000, 1010), (0, 2100))
    assert (coarse.pool_q, coarse.pool_k) == (3, 6)
    for view in (w, coarse):
        check_cells(view, p, np.tril(np.ones_like(p, bool)))


def test_windows_are_the_same_in_several_pieces(tmp_path_factory, monkeypatch):
    trace, _ = long_one(tmp_path_factory.getbasetemp() / "long")
    head = trace.head("L1H2")
    whole = head.window((3, 900), (700, 1500))
    assert whole.pool_q == 2  # finer than what was kept
    monkeypatch.setattr("interp.traces.trace._ENTRIES", 10500)
    pieces = head.window((3, 900), (700, 1500))
    assert np.abs(whole.codes.astype(int) - pieces.codes).max() <= 1
    assert (whole.codes != pieces.codes).mean() < 1e-3


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_aligned_windows_hold_what_was_asked_for(start, width, cells):
    total = 3000
    start = min(start, total - 1)
    stop = min(total, start + width)
    low, high, pool = aligned(start, stop, total, cells)
    assert low <= start and stop <= high <= total and low % pool == 0
    assert high % pool == 0 or high == total
    assert -(-(high - low) // pool) <= cells


def test_codes_are_square_roots_and_zero_is_hidden():
    codes = np.arange(1, 256, dtype=np.uint8)
    assert (encode(decode(codes)) == codes).all()
    assert np.isnan(decode(np.zeros(1, np.uint8))).all()
    tiny = encode(np.array([0.0, 1e-12, 1.0]), np.array([True, True, False]))
    assert tiny.tolist() == [1, 1, 0]
    p = np.linspace(0, 1, 999)
    assert np.abs(np.sqrt(decode(encode(p))) - np.sqrt(p)).max() <= 0.5 / 254 + 1e-6


@pytest.mark.parametrize(("q", "k"), [((3, 3), (0, 2)), ((0, 41), (0, 2)), ((-1, 2), (0, 2))])
def test_windows_outside_are_refused(q, k, kept):
    head = kept("gqa").head("L0H1")
    for ask in (head.block, head.window):
        with pytest.raises(InputError, match=r"0\.\.40"):
            ask(q, k)
    with pytest.raises(InputError, match=r"0\.\.39"):
        head.rows([0, 40])
    with pytest.raises(InputError, match=r"0\.\.39"):
        head.columns([-1])


# ---- forms


@pytest.mark.parametrize("name", ["gqa", "window", "sinks", "packed", "t5", "two images", "prefix"])
@pytest.mark.parametrize("whole", [True, False])
def test_layers_without_a_rule_are_kept_by_their_rows(name, whole, tmp_path, monkeypatch):
    model, one, found = made(name)
    monkeypatch.setattr(MODULE, "joined", lambda calls: "no rule")
    if not whole:
        monkeypatch.setattr(sweeps, "WHOLE", 8)
    trace = capture(model, one, tmp_path)
    for head, p, seen, _ in heads_of(trace, found):
        assert head.layer.form == ("rows" if whole else "top") and head.layer.note == "no rule"
        check_cells(head.overview(), p, seen)
        if not whole:  # what is not among the largest of its row is zero
            floor = np.sort(p, axis=1)[:, -min(64, p.shape[1])]
            p = np.where(p >= floor[:, None], p, 0)
        close(head.block((0, len(p)), (0, p.shape[1])), p, seen)
        close(head.rows([7, 1]), p[[7, 1]], seen[[7, 1]])
        close(head.columns([7, 1]), p[:, [7, 1]].T, seen[:, [7, 1]].T)


def test_cells_of_several_images_do_not_shift(tmp_path, monkeypatch):
    """Rows of a second image begin within a cell of the overview."""
    model, one, found = made("packed")
    monkeypatch.setattr(MODULE, "joined", lambda calls: "no rule")
    monkeypatch.setattr("interp.traces.summary.OVERVIEW", 11)
    trace = capture(model, one, tmp_path)
    pools = set()
    for head, p, seen, _ in heads_of(trace, found):
        if head.layer.tower.name == "vision":
            check_cells(head.overview(), p, seen)
            pools.add(head.overview().pool_q)
    [pool] = pools
    assert all(len(row) % pool for row in one.views["vision"][:1])


def test_a_layer_of_which_only_the_pattern_is_reached(tmp_path, kept):
    assert "not its queries and keys" in kept("bloom").layer("text", 0).note


def test_holes_in_a_mask_are_hidden(kept):
    seen = holes()[2]
    head = kept("holes").head("L1H3")
    assert (np.isnan(head.block((0, 40), (0, 40))) == ~seen).all()
    assert ((head.window((0, 40), (0, 40)).codes == 0) == ~seen).all()
    assert "one range" in head.layer.note


@pytest.mark.parametrize(("factor", "other"), [(3e5, 3e-5), (5.0, 5.0)])
def test_what_half_precision_does_not_hold_is_kept_in_single(factor, other, tmp_path):
    hf = fresh("llama")
    with torch.no_grad():
        attn = hf.model.layers[0].self_attn
        attn.q_proj.weight *= factor
        attn.k_proj.weight *= other / (10 if factor > 1e5 else 1)
    model, one = load(hf), words(40)
    trace = capture(model, one, tmp_path)
    first, second = (trace.layer("text", i) for i in (0, 1))
    assert (first.form, first.about["precision"]) == ("exact", "float32")
    assert second.about["precision"] == "float16"
    for head, p, seen, where in heads_of(trace, dense(model, one)):
        if where[1] == 0:
            got = head.block((0, 40), (0, 40))
            assert np.abs(np.nan_to_num(got) - p).max() <= 1e-3


def test_queries_that_are_not_finite_do_not_pass_as_exact(tmp_path, monkeypatch):
    model, one, _ = made("gqa")
    own = sweeps.compared
    monkeypatch.setattr(
        MODULE, "compared", lambda *args: own(*args[:3], args[3] * float("nan"), args[4])
    )
    trace = capture(model, one, tmp_path)
    assert trace.layer("text", 0).form == "rows" and "inf" in trace.layer("text", 0).note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_other_precisions(name, dtype, tmp_path):
    if (name, dtype) == ("gpt-oss", torch.float64):
        pytest.skip("its experts multiply in single precision at most")
    model = load(fresh(name).to(dtype))
    one = words(40)
    noted = {}

    def observer(call):
        noted[call.name] = call.rows(0, slice(0, 4), slice(0, 40)).double().numpy()

    with model.observe(observer):
        model.forward(model.batch([one]).inputs())
    trace = capture(model, one, tmp_path)
    for layer in model.tower("text").layers:
        assert trace.layer("text", layer.index).form == "exact"
        for h in range(4):
            p = noted[layer.name][h]
            got = trace.head(f"L{layer.index}H{h}").block((0, 40), (0, 40))
            seen = np.tril(np.ones((40, 40), bool))
            if name == "mistral" or (name == "gpt-oss" and layer.index == 0):
                seen &= np.triu(np.ones((40, 40), bool), -4)
            # Sinks are run by eager code, which rounds scores and patterns to 16 bits.
            eager = name == "gpt-oss"
            close(got, p, seen, atol=max(1e-3, 4 * torch.finfo(dtype).eps * eager))
            if eager:
                assert trace.layer("text", layer.index).error <= 4 * torch.finfo(dtype).eps


def test_fused_kernels(tmp_path):
    with registered("fused", fused, "flash_attention_2"):
        hf = fresh("mistral", "fused")
        trace = capture(load(hf), words(40), tmp_path)
    for head, p, seen, _ in heads_of(trace, made("window")[2]):
        close(head.block((0, 40), (0, 40)), p, seen)


@pytest.mark.parametrize("d", [64, 128])
def test_windows_of_8192_tokens_are_those_of_the_model(d, tmp_path):
    length = 8192
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=16, num_hidden_layers=1, head_dim=d,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length,
    )  # fmt: skip
    model = load(spread(tf.LlamaForCausalLM(config), 0.2).eval())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 97, (length,), generator=generator).tolist()
    one = Prompt(tuple(tokens), {"needle": ((3000, 3040),)}, id="x")
    picked = [0, 1, 700, 2047, 4100, 4101, 6000, 8190, 8191]
    noted = []

    def observer(call):
        noted.append(call.rows(0, slice(0, 2), torch.tensor(picked)).numpy())

    with model.observe(observer):
        model.forward(model.batch([one]).inputs())
    trace = capture(model, one, tmp_path)
    assert trace.layer("text", 0).form == "exact"
    later = np.arange(length)[None] > np.array(picked)[:, None]
    for h in range(2):
        head = trace.head(f"L0H{h}")
        want = noted[0][h]
        assert want.max() > 0.2  # far from even
        close(head.rows(picked), want, ~later, atol=1e-3)
        for i, at in enumerate(picked):
            start = max(0, min(at - 100, length - 400))
            block = head.block((at, at + 1), (start, start + 400))[0]
            hidden = later[i, start : start + 400]
            assert (np.isnan(block) == hidden).all()
            assert np.abs(np.nan_to_num(block) - want[i, start : start + 400]).max() <= 1e-3
            assert abs(head.summary("peak")[at] - want[i].max()) <= 2e-3
        assert np.nansum(head.rows([8191])) == pytest.approx(1, abs=1e-4)
        assert head.overview().codes.shape == (256, 256)
        assert head.window((0, length), (0, length)).pool_q == 16


# ---- what capture leaves behind


def test_the_model_is_left_as_it_was_and_computes_the_same(tmp_path):
    model = load(fresh("llama"))
    one = words(40)
    assert model.towers  # finds them by a forward of its own
    inputs = {**model.batch([one]).inputs(), "logits_to_keep": 1}
    before, plain = everything_touched(model.hf), model.forward(inputs).logits
    noted = []
    hook = model.hf.register_forward_hook(lambda *a: noted.append(a[-1].logits))
    capture(model, one, tmp_path)
    hook.remove()
    # The unembedding is looked for by a short forward of its own, before.
    assert torch.equal(noted[-1], plain)
    assert torch.equal(model.forward(inputs).logits, plain)
    assert everything_touched(model.hf) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_kill_leaves_no_trace_and_the_next_capture_makes_one(error, tmp_path, monkeypatch):
    model, one, found = made("gqa")
    before = everything_touched(model.hf)
    own, count = MODULE.write_table, []

    def dying(path, *rest):
        count.append(path)
        if len(count) == 2:
            path.with_name(f".{path.name}.1.headscope-tmp").write_bytes(b"half")
            raise error
        own(path, *rest)

    monkeypatch.setattr(MODULE, "write_table", dying)
    with pytest.raises(error):
        capture(model, one, tmp_path)
    assert not list(tmp_path.rglob("trace.json")) and traces_of(tmp_path) == {}
    assert everything_touched(model.hf) == before
    monkeypatch.undo()
    trace = capture(model, one, tmp_path)
    assert not list(tmp_path.rglob("*tmp")) and list(traces_of(tmp_path)) == [trace.key]
    for head, p, seen, _ in heads_of(trace, found):
        close(head.block((0, 40), (0, 40)), p, seen)


def test_a_trace_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    model, one, _ = made("gqa")
    first = capture(model, one, tmp_path)
    monkeypatch.setattr(type(model), "forward", None)
    assert capture(model, one, tmp_path).key == first.key


def test_layers_and_towers_are_chosen(tmp_path):
    model, one, _ = made("two images")
    told = []
    trace = capture(
        model, one, tmp_path, towers=["vision"], layers=[1], progress=lambda *a: told.append(a)
    )
    assert list(trace.towers) == ["vision"] and list(trace.tower("vision").layers) == [1]
    assert told == [(1, 1)]
    assert {p.name for p in trace.folder.iterdir()} == {"trace.json", "vision-1.safetensors"}
    with pytest.raises(UnknownNameError, match="vision"):
        trace.tower("text")
    with pytest.raises(HeadIdError, match="kept: 1"):
        trace.head("vision.L0H0")
    with pytest.raises(HeadIdError, match="2 heads"):
        trace.head("vision.L1H2")
    with pytest.raises(SiteError, match="none that was named"):
        capture(model, one, tmp_path, layers=[7])


def test_windows_of_a_grid_are_left_out_and_said(tmp_path):
    model, one = seen_through("swin", noise(56, 56))
    with pytest.raises(SiteError, match="windows of its grid"):
        capture(model, one, tmp_path)
    assert traces_of(tmp_path) == {}


def test_keys_tell_prompts_apart():
    one = words(40)
    pixels = {"pixel_values": torch.zeros(1, 3)}
    others = [
        one, words(40, seed=4), Prompt(one.tokens, {}, id="x"),
        Prompt(one.tokens, one.spans, id="y"),
        Prompt(one.tokens, one.spans, id="x", answer=(3,)),
        Prompt(one.tokens, one.spans, id="x", inputs=pixels),
        Prompt(one.tokens, one.spans, id="x", inputs={"pixel_values": torch.ones(1, 3)}),
    ]  # fmt: skip
    assert len({trace_key(p, {"a": 1}) for p in others} | {trace_key(one, {"a": 2})}) == 8
    assert trace_key(one, {"a": 1}) == trace_key(words(40), {"a": 1})


def test_pictures_come_back(tmp_path):
    model, one, _ = made("vit")
    arrays = {"image-0": np.arange(9, dtype=np.uint8), "vision/boxes": np.full((2, 4), np.nan)}
    trace = capture(model, one, tmp_path, pictures=arrays, picture_facts={"sizes": [[5, 4]]})
    got, facts = trace.pictures
    assert trace.has_pictures and facts == {"sizes": [[5, 4]]}
    assert all(np.array_equal(got[n], x, equal_nan=x.dtype != np.uint8) for n, x in arrays.items())
    assert not capture(*made("gqa")[:2], tmp_path).has_pictures


# ---- reading


@pytest.fixture
def changed(tmp_path):
    """A trace whose folder may be damaged."""
    model, one, _ = made("gqa")
    trace = capture(model, one, tmp_path)
    info = trace.folder / "trace.json"

    def change(**entries):
        info.write_text(json.dumps({**json.loads(info.read_text()), **entries}))

    return SimpleNamespace(folder=trace.folder, info=info, change=change)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"version": 99}, "version 99"), ({"version": "x"}, "damaged"),
        ({"schema": "other"}, "schema"), ({"tokens": 3}, "tokens"), ({"towers": []}, "towers"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(entries, says, changed):
    changed.change(**entries)
    with pytest.raises(RunError, match=says):
        Trace(changed.folder)


def test_damage_is_told_with_the_file(changed):
    trace = Trace(changed.folder)
    path = trace.layer("text", 1).path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match=r"text-1\.safetensors"):
        trace.head("L1H0").rows([3])
    path.unlink()
    with pytest.raises(RunError, match=r"text-1\.safetensors"):
        Trace(changed.folder).head("L1H0").block((0, 2), (0, 2))
    with pytest.raises(RunError, match="no array 'nothing'"):
        trace.head("L0H0").summary("nothing")
    changed.info.write_text("{half")
    with pytest.raises(RunError, match="damaged"):
        Trace(changed.folder)


def test_only_files_of_the_trace_are_read(changed):
    info = json.loads(changed.info.read_text())
    info["towers"]["text"]["layers"]["0"]["file"] = "../../../secret.safetensors"
    changed.change(towers=info["towers"])
    assert Trace(changed.folder).layer("text", 0).path.parent == changed.folder


def test_reading_needs_no_torch(tmp_path, kept):
    trace = kept("gqa")
    code = (
        "import sys\nfrom interp.traces import Trace\n"
        f"t = Trace({str(trace.folder)!r})\nh = t.head('L1H2')\n"
        "h.rows([3]); h.columns([1]); h.window((0, 40), (0, 40)); h.overview(); h.summary('peak')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch'"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_keys_that_were_read_are_held_within_bounds():
    recent = Recent(100)
    made_of = []

    def make(n):
        def inner():
            made_of.append(n)
            return np.full(n, n, np.uint8)

        return inner

    for n in (40, 50, 40, 30, 50, 40):
        assert (recent.get(n, make(n)) == n).all()
    assert made_of == [40, 50, 30, 40] or recent.held <= 100
    assert made_of == [40, 50, 30, 50, 40] or made_of == [40, 50, 30, 40]
    recent.get(200, make(200))
    assert recent.held <= 100
    with pytest.raises(ValueError):
        recent.get(40, make(40))[0] = 1


def test_another_trace_at_the_same_place_is_read_anew(changed, tmp_path):
    trace = Trace(changed.folder)
    before = trace.head("L0H0").rows([30])
    hf = fresh("llama", seed=5)
    other = capture(load(hf), words(40), tmp_path / "other")
    for name in ("text-0.safetensors", "text-1.safetensors"):
        (changed.folder / name).write_bytes((other.folder / name).read_bytes())
    after = Trace(changed.folder).head("L0H0").rows([30])
    assert np.allclose(after, other.head("L0H0").rows([30]), equal_nan=True)
    assert not np.allclose(after, before, equal_nan=True)


def test_threads_of_numpy_are_given_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    def now():
        return [x["num_threads"] for x in threadpool_info() if x["internal_api"] == "openblas"]

    with threadpool_limits(2, user_api="blas"):
        before = now()
        assert 2 in before
        with one_thread():
            with one_thread():
                assert set(now()) == {1}
            assert set(now()) == {1}
        assert now() == before and _STATE["inside"] == 0
