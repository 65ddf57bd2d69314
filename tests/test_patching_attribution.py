"""Gradient attributions against exact patches, finite differences, TransformerLens, naive loops."""

import functools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import interp
from interp.errors import InputError, SiteError, UnknownNameError
from interp.headid import HeadId
from interp.prompts import Prompt, PromptPair
from interp.seam.blocks import on_input
from interp.zoo.planted_ioi import ioi_pairs
from patching import Pairs, head_effects, make_method
from patching.atp import AttributionPatching, column_changes, one_key_at_a_time
from patching.eap import EdgeAttributionPatching
from patching.eap_ig import EdgeIntegratedGradients, IntegratedGradients
from patching.edges import EdgeScores, Node
from patching.gradients import gradients
from patching.verify import verify_top

V = 40
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, **ENDS,
}  # fmt: skip
GPT = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4, **ENDS}
HEADS = {k: x for k, x in SIZES.items() if k != "num_key_value_heads"}
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(**GPT),
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=8),
    "neox": lambda: tf.GPTNeoXConfig(**HEADS),
    "cohere": lambda: tf.CohereConfig(**SIZES),
    "gptoss": lambda: tf.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    ),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8),
    "olmo2": lambda: tf.Olmo2Config(**SIZES),
    "granite": lambda: tf.GraniteConfig(**SIZES, residual_multiplier=0.5),
}
EAGER_ONLY = ("gptoss", "gptj", "gemma2")
# Each of them, by the code of transformers, adds attention to the stream as it is.
PARALLEL = ("neox", "cohere")
EDGES = ("gpt2", "llama", "qwen3", "gptoss", *PARALLEL)


@functools.cache
def tiny(kind: str, attn: str = "sdpa", double: bool = False) -> interp.Model:
    torch.manual_seed(0)
    attn = "eager" if kind in EAGER_ONLY else attn
    hf = tf.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attn).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() > 1:
                p.normal_(std=0.25)
    return interp.load(hf.double() if double else hf)


def random_pairs(*lengths: int) -> list[PromptPair]:
    draw = np.random.default_rng(1)
    out = []
    for i, n in enumerate(lengths):
        clean, new = draw.integers(3, V, n), draw.integers(3, V, 3)
        other = clean.copy()
        other[2:5] = new
        meta = {"wrong": int(draw.integers(3, V))}
        out.append(
            PromptPair(
                Prompt(tuple(clean.tolist()), id=f"p{i}", answer=(int(draw.integers(3, V)),),
                       meta=meta),
                Prompt(tuple(other.tolist())),
            )
        )  # fmt: skip
    return out


def atp(pairs: Pairs, **params: Any) -> Any:
    return AttributionPatching(**{"verify": 0, **params}).scores(pairs)


@functools.cache
def ioi(beta: float = 30.0) -> interp.Model:
    model = interp.load("zoo:planted-ioi")
    with torch.no_grad():
        for layer in model.hf.get_submodule("model.layers"):  # every query carries β
            layer.get_submodule("self_attn.q_proj").weight.mul_(beta / 30)
    return model


def flips(n: int = 4, beta: float = 30.0) -> Pairs:
    return Pairs(ioi(beta), ioi_pairs(n, corruption="flip"))


def at(scores: Any, head: str) -> float:
    return float(scores.values[scores.heads.index(HeadId.parse(head))])


MOVERS = {"L2H0": -12.0, "L2H1": -6.0, "L2H2": 4.8}
TRUE_EDGES = {
    ("input", "L0H0.q"), ("L0H0", "L1H0.v"), ("L1H0", "L2H0.q"), ("L1H0", "L2H1.q"),
    ("L1H0", "L2H2.q"), ("input", "L2H0.k"), ("input", "L2H1.k"), ("input", "L2H2.k"),
    ("L2H0", "logits"), ("L2H1", "logits"), ("L2H2", "logits"),
}  # fmt: skip


# --- the planted circuit: saturation, and what it takes to see through it


def test_the_query_of_a_mover_is_invisible_to_gradients_and_exact_with_the_fix():
    pairs = flips()
    exact = head_effects(pairs.model, pairs, site="q")
    plain, fixed = atp(pairs, site="q", qk_fix=False), atp(pairs, site="q")
    for head, effect in MOVERS.items():
        assert at(exact, head) == pytest.approx(effect, abs=1e-3)
        assert abs(at(plain, head)) < 1e-3
        assert at(fixed, head) == pytest.approx(effect, abs=1e-4)
    assert at(plain, "L2H0") == pytest.approx(-1e-4, abs=5e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_keys_of_movers_are_exact_with_the_fix(joint):
    pairs = flips()
    exact = head_effects(pairs.model, pairs, site="k")
    plain, fixed = (atp(pairs, site="k", qk_fix=fix, joint_keys=joint) for fix in (False, True))
    for head in MOVERS:
        assert at(fixed, head) == pytest.approx(at(exact, head), abs=1e-3)
        assert abs(at(exact, head)) > 2 and abs(at(plain, head)) < 1e-3


def test_saturated_heads_get_no_estimate_and_verification_says_so():
    pairs = flips()
    table = AttributionPatching(verify=10).scores(pairs)
    for head in ("L0H0", "L1H0"):
        i = table.heads.index(HeadId.parse(head))
        assert abs(table.values[i]) < 1e-3
        assert table.column("exact")[i] == pytest.approx(-13.2, abs=1e-3)
        assert head in {name for name, *_ in table.provenance["missed"]}
    assert "gradients miss: " in table.provenance["verified"]
    assert "L0H0 exact -13.2, estimate -0.000" in table.provenance["verified"]
    assert len(table.provenance["missed"]) == 2  # z of the movers is estimated right
    assert table.direction == "lower"


def test_verification_measures_the_top_and_a_sample_and_can_be_turned_off():
    pairs = flips(2)
    table = AttributionPatching(verify=2).scores(pairs)
    measured = ~np.isnan(table.column("exact"))
    assert measured.sum() == 4
    assert measured[[table.heads.index(HeadId(2, 0)), table.heads.index(HeadId(2, 1))]].all()
    off = AttributionPatching(verify=0).scores(pairs)
    assert "exact" not in off.extras and off.provenance["verified"] == "not verified"
    seen = verify_top(off, pairs, k=3, sample=0)
    assert seen.heads == (HeadId(2, 0), HeadId(2, 1), HeadId(2, 2))
    assert seen.missed == () and seen.worst is None
    assert seen.spearman == pytest.approx(1.0) and seen.agree == 1.0
    every = verify_top(off, pairs, k=3, sample=99)
    assert set(every.heads) == set(off.heads) and every.worst is not None
    assert {head for head, *_ in every.missed} == {HeadId(0, 0), HeadId(1, 0)}
    again = [verify_top(off, pairs, k=0, sample=5, seed=s).heads for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    wrong = replace(off, per_example=-off.per_example)
    seen = verify_top(wrong, pairs, k=3, sample=0)
    assert seen.agree == 0.0 and len(seen.missed) == 3
    noisy = verify_top(replace(off, per_example=off.per_example - 1e-9), pairs, k=3, sample=99)
    assert noisy.agree == 1.0  # heads without effect have no sign to agree with
    with pytest.raises(InputError, match="at least one head"):
        verify_top(off, pairs, k=0, sample=0)
    with pytest.raises(InputError, match="pairs they were made on"):
        verify_top(off, flips(3))
    with pytest.raises(InputError, match="verify must be at least 0"):
        AttributionPatching(verify=-1).scores(pairs)


def test_verification_patches_the_site_and_direction_of_the_estimates():
    pairs = flips(2)
    table = AttributionPatching(site="q", direction="denoise", qk_fix=False).scores(pairs)
    exact = dict(zip(map(str, table.heads), table.column("exact"), strict=True))
    assert exact["L2H0"] == pytest.approx(12, abs=1e-3) and abs(exact["L1H0"]) < 1e-3
    sizes = [abs(t - g) for _, t, g in table.provenance["missed"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 13 > sizes[-1]


def test_softer_attention_is_underestimated_and_less_so_along_the_way():
    pairs = flips(8, 4.0)  # prompts differ in the third digit
    exact = head_effects(pairs.model, pairs)
    assert at(exact, "L0H0") == pytest.approx(-10.8, abs=0.1)
    assert at(atp(pairs), "L0H0") == pytest.approx(-6.65, abs=0.1)
    ig = IntegratedGradients(steps=30, verify=0).scores(pairs)
    assert at(ig, "L0H0") == pytest.approx(-9.2, abs=0.1)


def test_integrated_gradients_of_the_input_add_up_to_the_whole_difference():
    pairs = flips(1, 4.0)
    _, batch = next(pairs.batches())
    gap = float(batch.score(batch.corrupted.logits) - batch.score(batch.clean.logits))
    assert gap == pytest.approx(-9.87080, abs=1e-5)
    for steps, sum_of_edges in ((5, -9.960), (30, -9.8733), (200, -9.87085)):
        edges = EdgeIntegratedGradients(steps=steps).edges(pairs)
        tolerance = 1e-3 if steps == 5 else 5e-5
        assert np.nansum(edges.values[0]) == pytest.approx(sum_of_edges, abs=tolerance)
    denoised = EdgeIntegratedGradients(steps=200, direction="denoise").edges(pairs)
    np.testing.assert_allclose(denoised.values, -edges.values, atol=1e-5)


def test_steps_stand_where_their_rule_says():
    pairs = flips(2, 4.0)

    def ig(rule: str, steps: int = 1) -> np.ndarray:
        return IntegratedGradients(steps=steps, rule=rule, verify=0).scores(pairs).per_example

    clean, corrupted = atp(pairs).per_example, -atp(pairs, direction="denoise").per_example
    assert np.abs(clean - corrupted).max() > 0.1
    np.testing.assert_allclose(ig("right"), clean, atol=1e-5)
    np.testing.assert_allclose(ig("left"), corrupted, atol=1e-5)
    np.testing.assert_allclose(ig("ends", 7), (clean + corrupted) / 2, atol=1e-5)
    np.testing.assert_allclose(ig("left", 2), (ig("left") + ig("midpoint")) / 2, atol=1e-5)
    with pytest.raises(InputError, match="rule must be one of"):
        ig("trapezium")
    with pytest.raises(InputError, match="at least 1; got 0"):
        ig("left", 0)


def test_edges_of_the_circuit_come_first_where_attention_is_soft():
    edges = EdgeIntegratedGradients(steps=30).edges(flips(2, 4.0))
    found = edges.score_against(TRUE_EDGES)
    assert found.auroc > 0.99 and found.recall >= 0.8 and found.k == 11
    assert len(edges) == 353 and not any(w.kind == "mlp" for w in edges.writers)
    hard = EdgeAttributionPatching().edges(flips(2)).score_against(TRUE_EDGES, k=3)
    assert hard.recall == pytest.approx(3 / 11)  # the edges to the logits alone


# --- sums, differences, loops


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize(
    ("kind", "attn"), [(k, a) for k in EDGES for a in ("sdpa", "eager")[k in EAGER_ONLY :]]
)
def test_edges_of_a_head_add_up_to_its_attribution(kind, direction, attn):
    pairs = Pairs(tiny(kind, attn), random_pairs(9, 9))
    heads = atp(pairs, direction=direction)
    edges = EdgeAttributionPatching(direction, verify=0).scores(pairs)
    scale = np.abs(heads.per_example).max()
    assert scale > 1e-3
    np.testing.assert_allclose(edges.per_example, heads.per_example, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_integrated_edges_add_up_to_integrated_heads(kind):
    pairs = Pairs(tiny(kind), random_pairs(8, 9))
    heads = IntegratedGradients(steps=3, verify=0).scores(pairs)
    edges = EdgeIntegratedGradients(steps=3, verify=0).scores(pairs)
    scale = np.abs(heads.per_example).max()
    np.testing.assert_allclose(edges.per_example, heads.per_example, atol=1e-5 * scale)


def test_the_input_and_what_blocks_add_besides_sum_like_heads():
    pairs = Pairs(tiny("gpt2", "sdpa", True), random_pairs(7))
    edges = EdgeAttributionPatching().edges(pairs)
    assert [str(w) for w in edges.writers if w.kind != "head"] == ["input", "mlp0", "mlp1", "mlp2"]
    assert len(edges) == sum(1 + 5 * i for i in range(3)) * 12 + (5 + 10 + 15) + 16
    _, batch = next(pairs.batches())
    slope = gradients(batch, batch.clean)
    with torch.no_grad():
        a, b = (
            pairs.model.hf.get_submodule("transformer").wte.weight[r.batch.input_ids]
            for r in (batch.clean, batch.corrupted)
        )
    assert np.nansum(edges.values[0]) == pytest.approx(float(((b - a) * slope.streams[0]).sum()))


def finite_difference(pairs: Pairs, writer: str, reader: str, eps: float) -> float:
    """The slope of the metric along one edge: a second run with that port alone replaced."""
    model, (_, batch) = pairs.model, next(pairs.batches())
    run = batch.clean
    change = writer_change(pairs, batch, writer)
    port = reader.split(".")[-1]
    block = int(reader[1]) if port in "qkv" else 0

    def score(size: float) -> float:
        kept: dict[str, Any] = {}
        name = run.tower.layers[block].name

        def record(other: str, *qkv: Any) -> None:
            if other == name:
                kept.update(zip("qkv", qkv, strict=True))

        def put(other: str, *qkv: Any) -> Any:
            if other != name:
                return None
            new = dict(zip("qkv", (x.clone() for x in qkv), strict=True))
            head = int(reader.split(".")[0][3:])
            new[port][:, head] = kept[port][:, head]
            return tuple(new.values())

        with torch.no_grad(), ExitStack() as stack:
            if port in "qkv":
                with ExitStack() as moved:
                    here = model.hf.get_submodule(run.blocks[block])
                    moved.callback(on_input(here, lambda x: x + size * change))
                    moved.enter_context(model.observe(lambda call: None, inputs=record))
                    model.hf(**run.batch.inputs())
                stack.enter_context(model.observe(lambda call: None, inputs=put))
            else:
                stack.callback(
                    on_input(model.hf.get_submodule(reader), lambda x: x + size * change)
                )
            return float(batch.score(model.hf(**run.batch.inputs()).logits[:, -1]).mean())

    return (score(eps) - score(-eps)) / (2 * eps)


def writer_change(pairs: Pairs, batch: Any, writer: str) -> torch.Tensor:
    model = pairs.model
    if writer == "input":
        return embedded(model, batch.corrupted) - embedded(model, batch.clean)
    layer = batch.clean.tower.layers[int(writer[1])]
    z = [run.kept[layer.name].z for run in (batch.clean, batch.corrupted)]
    head = int(writer[3:])
    return (z[1] - z[0])[:, :, head] @ model.w_o(layer)[head].detach()


def embedded(model: Any, run: Any) -> torch.Tensor:
    table = model.hf.get_input_embeddings().weight.detach()
    return table[run.batch.input_ids]


FINAL = {"gpt2": "transformer.ln_f", "llama": "model.norm"}
MLP = {"gpt2": "transformer.h.1.ln_2", "llama": "model.layers.1.post_attention_layernorm"}
SOME_EDGES = [
    ("input", "L0H1.q"), ("input", "L0H1.k"), ("L0H2", "L1H0.q"), ("L0H1", "L2H1.k"),
    ("L0H3", "L1H1.v"), ("L1H2", "L2H3.q"), ("L0H0", "mlp1"), ("L1H3", "mlp1"), ("L1H1", "logits"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_single_edges_are_the_slopes_of_single_edges(kind):
    # Llama's norm and softmax compute in float32 whatever the model: wider steps, looser limits.
    eps, rtol = (1e-4, 1e-5) if kind == "gpt2" else (2e-3, 1e-2)
    pairs = Pairs(tiny(kind, "eager", True), random_pairs(8, 8))
    edges = EdgeAttributionPatching().edges(pairs)
    scale = float(np.nanmax(np.abs(edges.values)))
    for writer, reader in SOME_EDGES:
        module = {"mlp1": MLP[kind], "logits": FINAL[kind]}.get(reader, reader)
        slope = finite_difference(pairs, writer, module, eps)
        assert edges.value(writer, reader) == pytest.approx(slope, rel=rtol, abs=1e-5 * scale)


@pytest.mark.parametrize("how", ["out", "in", "max"])
def test_a_table_of_heads_is_the_mean_of_its_edges(how):
    pairs = Pairs(tiny("llama"), random_pairs(8))
    heads = EdgeAttributionPatching(how=how, verify=0).scores(pairs)
    edges = EdgeAttributionPatching().edges(pairs).to_heads(how)
    np.testing.assert_allclose(heads.values, list(edges.values()), rtol=1e-6)


def test_no_edge_leads_backwards_or_to_itself():
    edges = EdgeAttributionPatching().edges(Pairs(tiny("llama"), random_pairs(8)))
    assert not np.isnan(edges.value("L1H0", "mlp1"))
    for writer, reader in (("L1H0", "L1H1.q"), ("L1H0", "L0H0.v"), ("mlp1", "mlp1")):
        with pytest.raises(InputError, match="must lead forward"):
            edges.value(writer, reader)
    beside = EdgeAttributionPatching().edges(Pairs(tiny("neox"), random_pairs(8)))
    with pytest.raises(InputError, match="must lead forward"):
        beside.value("L1H0", "mlp1")  # a parallel block: its MLP does not read its heads
    assert not np.isnan(beside.value("L0H0", "mlp1"))


@pytest.mark.parametrize("site", ["z", "q", "k", "v"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptoss"])
def test_a_batch_gives_each_pair_what_it_gets_alone(kind, site):
    model, pairs = tiny(kind), random_pairs(9, 9, 9)
    params = {"site": site, "joint_keys": False}
    together = atp(Pairs(model, pairs), **params)
    alone = [atp(Pairs(model, [p]), **params).per_example[0] for p in pairs]
    scale = np.abs(together.per_example).max()
    np.testing.assert_allclose(together.per_example, alone, atol=1e-5 * scale)
    if site == "z":
        together = EdgeAttributionPatching(how="max", verify=0).scores(Pairs(model, pairs))
        alone = [
            EdgeAttributionPatching(how="max", verify=0).scores(Pairs(model, [p])).per_example[0]
            for p in pairs
        ]
        np.testing.assert_allclose(together.per_example, alone, atol=1e-5 * scale)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "neox"])  # GPT-2 itself counts padding as positions
def test_padding_on_the_left_changes_nothing(kind, attn):
    model, (short, long) = tiny(kind, attn), random_pairs(7, 11)
    pairs = Pairs(model, [short, long])
    mixed, alone = pairs.batch((short, long)), pairs.batch((short,))
    for site in ("z", "q", "k"):
        for joint in (True, False):
            method = AttributionPatching(site=site, joint_keys=joint)
            padded, bare = (
                method.estimate(pairs, b, gradients(b, b.clean))[0] for b in (mixed, alone)
            )
            assert torch.allclose(padded, bare, atol=1e-5 * float(bare.abs().max()))
    for method in (EdgeAttributionPatching(), EdgeIntegratedGradients(steps=2)):
        padded, bare = (method.of_batch(b)[1][0] for b in (mixed, alone))
        assert torch.allclose(padded, bare, atol=1e-5 * float(bare.abs().max()))


def test_small_changes_are_estimated_right():
    """With a small difference between the runs, first order is all there is."""
    model = tiny("llama", "sdpa", True)
    pairs = Pairs(model, random_pairs(8, 8))
    embedding = model.hf.get_input_embeddings().weight
    kept = embedding.detach().clone()
    try:
        with torch.no_grad():  # all tokens nearly alike
            embedding.copy_(kept.mean(0) + 1e-3 * kept)
        for site in ("z", "q", "k", "v"):
            exact = head_effects(model, pairs, site=site).per_example
            for fix in (True, False):
                guess = atp(pairs, site=site, qk_fix=fix).per_example
                scale = np.abs(exact).max()
                assert scale > 0
                np.testing.assert_allclose(guess, exact, atol=0.05 * scale)
    finally:
        with torch.no_grad():
            embedding.copy_(kept)


def test_attention_loaded_in_another_way_gives_the_same_estimates():
    pairs = random_pairs(9, 9)
    for site in ("z", "q", "k", "v"):
        sdpa, eager = (atp(Pairs(tiny("llama", a), pairs), site=site) for a in ("sdpa", "eager"))
        np.testing.assert_allclose(sdpa.per_example, eager.per_example, atol=2e-5)
        assert sdpa.granularity == ("kv" if site in "kv" else "query")
        assert np.abs(sdpa.per_example).max() > 1e-3


def test_nothing_is_left_on_the_model():
    model = tiny("gpt2")
    weights = list(model.hf.parameters())
    weights[0].requires_grad_(False)
    try:
        EdgeIntegratedGradients(steps=2).scores(Pairs(model, random_pairs(7)))
        assert [p.requires_grad for p in weights] == [False] + [True] * (len(weights) - 1)
        assert all(p.grad is None for p in weights)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    finally:
        weights[0].requires_grad_(True)


# --- keys one position at a time


def test_one_key_at_a_time_is_a_softmax_per_key():
    torch.manual_seed(0)
    old, new = (6 * torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(2))
    new[0, 0, 0, 0], old[0, 0, 1, 0] = 80.0, 70.0  # saturated before and after
    g = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    visible = torch.ones(5, 5).tril().bool()[None, None]
    old, new = (x.masked_fill(~visible, -1e30) for x in (old, new))
    for sinks in (None, torch.tensor([0.5, -1.0, 3.0], dtype=torch.float64)):
        got = column_changes(old, new, visible, g, sinks)

        def softmax(s: torch.Tensor, sinks: Any = sinks) -> torch.Tensor:
            if sinks is None:
                return s.softmax(-1)
            column = sinks[None, :, None, None].expand(2, 3, 5, 1)
            return torch.cat([s, column], -1).softmax(-1)[..., :-1]

        for t in range(5):
            one = old.clone()
            one[..., t] = new[..., t]
            slow = ((softmax(one) - softmax(old)) * g).sum(-1)
            assert torch.allclose(got[..., t], slow, rtol=1e-9, atol=1e-12)


def test_a_row_that_sees_nothing_changes_nothing():
    s, g = torch.full((1, 1, 1, 3), -1e30, dtype=torch.float64), torch.ones(1, 1, 1, 3)
    hidden = torch.zeros(1, 1, 1, 3).bool()
    assert not column_changes(s, s, hidden, g, None).any()


def test_a_saturated_row_keeps_its_digits():
    old = torch.tensor([[[[40.0, 0.0, -2.0]]]], dtype=torch.float64)
    new = torch.tensor([[[[-40.0, 0.0, -2.0]]]], dtype=torch.float64)
    g = torch.tensor([[[[0.0, 1.0, 3.0]]]], dtype=torch.float64)
    got = column_changes(old, new, torch.ones(1, 1, 1, 3).bool(), g, None)
    rest = torch.tensor([0.0, -2.0], dtype=torch.float64).softmax(-1)
    assert float(got[0, 0, 0, 0]) == pytest.approx(float(rest[0] + 3 * rest[1]), rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gptoss"])
def test_one_key_at_a_time_in_a_model_is_a_patch_of_one_key(kind):
    pairs = Pairs(tiny(kind, "sdpa"), random_pairs(8))
    _, batch = next(pairs.batches())
    slope = gradients(batch, batch.clean)
    layer = pairs.model.tower("text").layers[1]
    got = one_key_at_a_time(batch, "noise", layer, slope)[0]
    assert got.dtype == torch.float64  # saturated weights of a float32 model need its digits
    call = replace(batch.clean.call(layer), pattern=None)
    other = batch.corrupted.call(layer)
    heads = slice(0, layer.n_heads)
    before = call.rows(0, heads, slice(0, 8))
    v = call.v[0].repeat_interleave(2, 0)
    for t in range(8):
        k = call.k.clone()
        k[:, :, t] = other.k[:, :, t]
        change = (replace(call, k=k).rows(0, heads, slice(0, 8)) - before) @ v
        effect = (change.transpose(0, 1) * slope.mixed[layer.name][0]).sum((0, 2))
        assert torch.allclose(got[:, t].float(), effect.view(2, 2).sum(1), atol=1e-6)


# --- refusals


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "granite"])
def test_models_that_change_what_heads_write_have_no_edges(kind):
    pairs = Pairs(tiny(kind), random_pairs(8))
    with pytest.raises(SiteError, match="write to the residual stream as they are"):
        EdgeAttributionPatching().edges(pairs)
    assert np.abs(atp(pairs).values).max() > 0


def test_models_whose_queries_are_not_reached_have_no_edges():
    pairs = Pairs(tiny("gptj"), random_pairs(8))
    with pytest.raises(SiteError, match="edges need q, k and v"):
        EdgeAttributionPatching().edges(pairs)
    with pytest.raises(InputError, match="not reached"):
        atp(pairs, site="q")
    exact = AttributionPatching(verify=3).scores(pairs)
    assert (~np.isnan(exact.column("exact"))).sum() == 6


def test_bad_words_are_refused():
    pairs = flips(1)
    for params, text in (
        ({"site": "pattern"}, "site must be one of z, q, k, v; got 'pattern'"),
        ({"direction": "sideways"}, "direction must be one of noise, denoise"),
    ):
        with pytest.raises(InputError, match=text):
            atp(pairs, **params)
    with pytest.raises(InputError, match="how must be one of"):
        EdgeAttributionPatching(how="up").scores(pairs)
    counting = Pairs(ioi(), ioi_pairs(1, corruption="flip"), metric="accuracy")
    with pytest.raises(InputError, match="metric with a gradient"):
        atp(counting)
    flat = Pairs(ioi(4.0), ioi_pairs(1, corruption="flip"), metric="kl")
    with pytest.raises(InputError, match="smallest in the clean run"):
        atp(flat)
    with pytest.raises(InputError, match="smallest in the clean run"):
        EdgeAttributionPatching().edges(flat)
    assert np.abs(atp(flat, direction="denoise").values).max() > 0.1
    assert np.abs(IntegratedGradients(verify=0).scores(flat).values).max() > 0.1


def test_methods_are_made_by_name_from_texts():
    for name in ("atp", "eap", "atp-ig", "eap-ig"):
        method = make_method(name, {"direction": "denoise", "verify": "0"})
        assert not method.exact and method.name == name and method.summary and method.citation
        table = method.scores(flips(1, 4.0))
        assert table.detector == f"{name}.denoise" and table.direction == "higher"
    assert make_method("atp", {"qk_fix": "no"}).qk_fix is False


# --- tables of edges


def table(values: list[list[float]]) -> EdgeScores:
    writers = (Node("input", -1), Node("head", 0, 0), Node("head", 0, 1))
    readers = (
        Node("head", 0, 0, "q"), Node("head", 0, 1, "q"), Node("head", 0, 0, "k"),
        Node("head", 0, 0, "v"), Node("logits", 1),
    )  # fmt: skip
    return EdgeScores("made", writers, readers, np.array(values))


def test_an_edge_table_counts_ranks_and_sums():
    nan = float("nan")
    edges = table([[1, 2, -6, 4, 0.5], [nan, nan, nan, nan, -5], [nan, nan, nan, nan, 3]])
    assert len(edges) == 7
    assert [(str(a), str(b), x) for a, b, x in edges.top(2)] == [
        ("input", "L0H0.k", -6.0), ("L0H0", "logits", -5.0),
    ]  # fmt: skip
    assert edges.value("input", "L0H0.v") == 4
    assert edges.to_heads() == {HeadId(0, 0): -5, HeadId(0, 1): 3}
    assert edges.to_heads("in") == {HeadId(0, 0): 1 - 3 + 2, HeadId(0, 1): 2 - 3 + 2}
    assert edges.to_heads("max") == {HeadId(0, 0): -6, HeadId(0, 1): -6}
    assert len(edges.to_frame()) == 7 and edges.to_frame()["effect"][0] == -6
    truth = {("input", "L0H0.k"), ("L0H1", "logits")}
    found = edges.score_against(truth)
    # By size: k 6 (true), -5, v 4, 3 (true), 2, 1, 0.5.
    assert found.recall == 0.5 and found.k == 2
    assert found.auroc == pytest.approx((5 + 3) / 10)
    assert found.average_precision == pytest.approx((1 + 2 / 4) / 2)
    assert edges.score_against(truth, k=4).recall == 1
    tied = table([[1, 1, 1, 1, 1], [nan, nan, nan, nan, 1], [nan, nan, nan, nan, 1]])
    assert tied.score_against(truth).auroc == 0.5
    assert tied.score_against(truth).average_precision == pytest.approx(2 / 7)


def test_an_edge_table_refuses_what_is_not_there():
    nan = float("nan")
    edges = table([[1, 2, -6, 4, 0.5], [nan, nan, nan, nan, -5], [nan, nan, nan, nan, 3]])
    with pytest.raises(UnknownNameError, match="no writer named 'L7H0'"):
        edges.value("L7H0", "logits")
    with pytest.raises(UnknownNameError, match="no reader named 'L0H0'"):
        edges.score_against({("input", "L0H0")})
    with pytest.raises(InputError, match="at least one edge"):
        edges.score_against(set())
    with pytest.raises(InputError, match="how must be one of"):
        edges.to_heads("sideways")
    with pytest.raises(InputError, match="a row per writer"):
        table([[1.0]])


# --- TransformerLens


def test_heads_and_edges_equal_those_of_transformer_lens():
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
    )

    config = tf.GPT2Config(**{**GPT, "n_layer": 2, "n_head": 2}, attn_implementation="eager")
    torch.manual_seed(0)
    hf = tf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(std=0.25)
    (pair,) = random_pairs(6)
    pairs = Pairs(interp.load(hf), [pair])
    ours = atp(pairs, direction="denoise")
    edges = EdgeAttributionPatching("denoise").edges(pairs)
    clean, corrupted = (torch.tensor([p.tokens]) for p in (pair.clean, pair.corrupted))
    right, wrong = pair.clean.answer[0], pair.clean.meta["wrong"]
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    theirs = attribution_patch(
        bridge, clean, corrupted, lambda x: x[0, -1, right] - x[0, -1, wrong],
        EdgeAttributionConfig(granularity="edge"),
    )  # fmt: skip
    heads = dict.fromkeys(ours.heads, 0.0)
    for node, score in theirs.node_scores.items():
        if node.kind == "attn_head_out":
            heads[HeadId(node.layer, node.head)] += score
    np.testing.assert_allclose(ours.values, list(heads.values()), atol=1e-5)
    assert np.abs(ours.values).max() > 0.01

    def ours_of(node: Any) -> str:
        port = node.kind[0]
        if node.kind in ("q_input", "k_input", "v_input"):
            return f"L{node.layer}H{node.head}.{port}"
        if node.kind == "attn_head_out":
            return f"L{node.layer}H{node.head}"
        return {"embed": "input", "logits": "logits"}.get(node.kind, f"mlp{node.layer}")

    sums: dict[tuple[str, str], float] = {}
    for (writer, reader), score in theirs.edge_scores.items():
        key = ours_of(writer), ours_of(reader)
        sums[key] = sums.get(key, 0.0) + score
    assert len(sums) == len(edges)
    for (writer, reader), score in sums.items():
        assert edges.value(writer, reader) == pytest.approx(score, abs=1e-5)
