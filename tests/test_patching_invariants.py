"""Invariants of patching: post-norm and two-way models, TransformerLens, rotations, bad input."""

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from patching_kit import difference, logits_of, random_pairs, seen_z, tiny
from torch import Tensor

import interp
from interp.errors import InputError, InterpError, PairError, SiteError
from interp.headid import HeadId
from interp.metrics import METRICS, Bound, Metric
from interp.model import Model
from interp.prompts import Prompt, PromptPair
from interp.recipe import Edit, Recipe, Where
from interp.staircase import Step, possible, staircase
from interp.zoo.planted_ioi import ioi_pairs
from patching import Pairs, head_effects, head_position_effects
from patching.atp import AttributionPatching
from patching.circuit import circuit_curve
from patching.composition import composition_scores
from patching.direct import direct_effects, logit_attribution
from patching.knockout import head_knockout
from patching.path import Receiver, path_effects
from patching.prune import joint_effects
from patching.repair import self_repair
from patching.windows import window_knockout

_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_BERT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, **_ENDS,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_OPT = {
    "vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_ENDS,
}  # fmt: skip
# Family: its maker, and the last module of each MLP, which holds no part of the residual stream.
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
             "bert.encoder.layer.{}.output.dense"),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT)),
                "roberta.encoder.layer.{}.output.dense"),
    "gpt1": (lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(
                vocab_size=60, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
             "transformer.h.{}.mlp"),
    "opt post-norm": (lambda: tf.OPTForCausalLM(tf.OPTConfig(**_OPT, do_layer_norm_before=False)),
                      "model.decoder.layers.{}.fc2"),
    "gpt-oss": (lambda: tf.GptOssForCausalLM(tf.GptOssConfig(
                    **_LLAMA, head_dim=8, num_local_experts=2, num_experts_per_tok=1)),
                "model.layers.{}.mlp.experts"),
    "mixtral": (lambda: tf.MixtralForCausalLM(tf.MixtralConfig(
                    **_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
                "model.layers.{}.mlp"),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def odd(kind: str) -> Model:
    torch.manual_seed(0)
    hf = ODD[kind][0]().eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() > 1:
                p.normal_(std=0.25)
            else:
                p.add_(0.2 * torch.randn_like(p))
    return interp.load(hf)


def base_of(model: Model, pair: PromptPair) -> float:
    return difference(logits_of(model, pair.clean), pair.clean)


def frozen(
    model: Model, kind: str, prompt: Prompt, name: str, change: Callable[[Tensor], Tensor],
    *, mlps: bool,
) -> Tensor:  # fmt: skip
    """Last logits with all heads (and MLPs) as in the clean run, but for one z; hooks of torch."""
    kept, handles = seen_z(model, prompt), []
    for i in range(3) if mlps else ():
        outputs: list[Any] = []
        module = model.hf.get_submodule(ODD[kind][1].format(i))
        note = module.register_forward_hook(lambda m, a, out, keep=outputs: keep.append(out))
        logits_of(model, prompt)
        note.remove()
        handles.append(module.register_forward_hook(lambda m, a, out, keep=outputs: keep[0]))

    def put(other: str) -> Callable[[Tensor], Tensor]:
        return lambda z: change(kept[other].clone()) if other == name else kept[other]

    try:
        return logits_of(model, prompt, {other: put(other) for other in kept})
    finally:
        for handle in handles:
            handle.remove()


# Two-way and post-norm models ---------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ODD))
def test_heads_at_single_positions_equal_whole_runs(kind: str) -> None:
    """In a model that looks both ways a head changes before the first token that differs, too."""
    model = odd(kind)
    (pair,) = pairs = random_pairs(1, first=5)
    effects = head_position_effects(model, pairs)
    whole = head_effects(model, pairs)
    other, base = seen_z(model, pair.corrupted), base_of(model, pair)
    early = 0.0
    for column, head in list(enumerate(effects.heads))[::3]:
        name = model.layer_of(head).name
        for position in (0, 2, 5, 6, 9, None):

            def put(z: Tensor, p: Any = position, h: int = head.head, n: str = name) -> Tensor:
                where = slice(None) if p is None else p
                z[where, h] = other[n][where, h]
                return z

            want = difference(logits_of(model, pair.clean, {name: put}), pair.clean) - base
            if position is None:
                assert whole.per_example[0, column] == pytest.approx(want, abs=2e-4)
                continue
            assert effects.per_example[0, column, position] == pytest.approx(want, abs=2e-4)
            early = max(early, abs(want) if position < 5 else 0)
    assert (early > 1e-2) == (kind in ("bert", "roberta"))
    assert np.abs(effects.values).max() > 0.05


@pytest.mark.parametrize("mlps", ["frozen", "live"])
@pytest.mark.parametrize("kind", list(ODD))
def test_direct_effects_past_norms_and_experts_equal_frozen_runs(kind: str, mlps: str) -> None:
    model = odd(kind)
    pairs = random_pairs(2, first=7)
    scores = direct_effects(model, pairs, mlps=mlps)
    assert np.abs(scores.values).max() > 0.02
    for i, pair in enumerate(pairs):
        other, base = seen_z(model, pair.corrupted), base_of(model, pair)
        for j, head in enumerate(scores.heads):
            name = model.layer_of(head).name

            def put(z: Tensor, n: str = name, h: int = head.head) -> Tensor:
                z[-1, h] = other[n][-1, h]
                return z

            logits = frozen(model, kind, pair.clean, name, put, mlps=mlps == "frozen")
            want = difference(logits, pair.clean) - base
            assert scores.per_example[i, j] == pytest.approx(want, abs=3e-4)
    assert np.abs(scores.per_example[:, :4]).max() > 1e-3  # also of the first layer


@pytest.mark.parametrize("mlps", ["frozen", "live"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "opt post-norm", "mixtral"])
def test_paths_past_norms_and_experts_equal_four_passes(kind: str, mlps: str) -> None:
    model = odd(kind)
    (pair,) = pairs = random_pairs(1)
    receivers = [Receiver.parse(t) for t in ("L1H1.q", "L2H1.k", "L2H0.v")]
    scores = path_effects(model, pairs, ["L1H1.q", "L2H1.k", "L2H0.v"], mlps=mlps)
    other, base = seen_z(model, pair.corrupted), base_of(model, pair)
    found = []
    for j, sender in list(enumerate(scores.heads))[:8]:
        name = model.layer_of(sender).name
        seen: dict[tuple[str, str], Tensor] = {}

        def note(call: Any, seen: dict[tuple[str, str], Tensor] = seen) -> None:
            for site in ("q", "k", "v"):
                seen[call.name, site] = getattr(call, site).clone()

        def put(z: Tensor, n: str = name, h: int = sender.head) -> Tensor:
            z[:, h] = other[n][:, h]
            return z

        with model.observe(note):
            frozen(model, kind, pair.clean, name, put, mlps=mlps == "frozen")
        edits = [
            Edit("set", Where(heads=[r.head]), site=r.input, tensors={
                "value": seen[model.layer_of(r.head).name, r.input][:, r.head.head][None]})
            for r in receivers if r.head.layer > sender.layer
        ]  # fmt: skip
        with Recipe(edits).on(model):
            want = base_of(model, pair) - base
        assert scores.per_example[0, j] == pytest.approx(want, abs=3e-4)
        found.append(abs(want))
    assert max(found) > 1e-3


def built(kind: str) -> tuple[Model, list[PromptPair]]:
    """A tiny random model of any type of transformers, and pairs in its vocabulary."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.tiny_models import tiny_model

    torch.manual_seed(0)
    hf: Any = tiny_model(kind).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() > 1 and p.is_floating_point():
                p.normal_(std=0.2)
    return interp.load(hf), random_pairs(2, first=4)


@pytest.mark.parametrize(
    "kind",
    [
        "gpt_neox_japanese",  # the attention module hands its bias to the block
        "ibert",  # its projection returns two values
        "zamba2",  # a state-space layer behind the attention of a block
        "inkling_text",  # a convolution there
        "openai-gpt",  # lists for tuples, and a view by the number of rows that went in
        "qwen4_exp_text",  # several residual streams
    ],
)
def test_unusual_blocks_are_patched_exactly(kind: str) -> None:
    model, pairs = built(kind)
    whole, single = head_effects(model, pairs), head_position_effects(model, pairs)
    direct = direct_effects(model, pairs, mlps="live")
    size = float(np.abs(whole.per_example).max())
    for i, pair in enumerate(pairs):
        other, kept = seen_z(model, pair.corrupted), seen_z(model, pair.clean)
        base = base_of(model, pair)
        for j, head in list(enumerate(whole.heads))[:: max(1, len(whole.heads) // 3)]:
            name = model.layer_of(head).name

            def of(rows: Any, n: str = name, h: int = head.head, freeze: bool = False) -> float:
                def put(z: Tensor) -> Tensor:
                    z = kept[n].clone() if freeze else z
                    z[rows, h] = other[n][rows, h]
                    return z

                own = {x.name for x in model.tower("text").layers}
                hold = {x: (lambda z, x=x: kept[x]) for x in own} if freeze else {}
                logits = logits_of(model, pair.clean, {**hold, n: put})
                return difference(logits, pair.clean) - base

            near = {"abs": 2e-4 * size}
            assert whole.per_example[i, j] == pytest.approx(of(slice(None)), **near)
            assert direct.per_example[i, j] == pytest.approx(of(-1, freeze=True), **near)
            for p in (4, 5, 9):
                assert single.per_example[i, j, p] == pytest.approx(of(p), **near)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("albert", "must run once in a forward to be replayed; .* runs [0-9]+ times"),
        ("gemma3n_text", "must be the same when it is replayed"),
        ("hy_v4", "must be the same when it is replayed"),
    ],
)
def test_models_that_cannot_be_replayed_are_refused_by_name(kind: str, text: str) -> None:
    model, pairs = built(kind)
    with pytest.raises(SiteError, match=text) as caught:
        head_effects(model, pairs)
    assert "recipe" in str(caught.value.hint) and "\n" not in str(caught.value)
    prompt = pairs[0].clean  # what the hint says does work
    head = model.tower("text").heads[-1]
    with torch.no_grad(), Recipe(Edit("zero", Where(heads=[head]))).on(model):
        got = model.hf(torch.tensor([prompt.tokens])).logits[0, -1].float()

    def silent(z: Tensor) -> Tensor:
        z[:, head.head] = 0
        return z

    want = logits_of(model, prompt, {model.layer_of(head).name: silent})
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_direct_effects_that_frozen_blocks_would_cut_are_refused() -> None:
    model, pairs = built("mobilebert")  # heads write through a bottleneck of the block
    with pytest.raises(SiteError, match="must pass by frozen MLPs") as caught:
        direct_effects(model, pairs)
    assert "mlps='live'" in str(caught.value.hint)
    assert np.abs(direct_effects(model, pairs, mlps="live").values).max() > 0


# What changes nothing, and what changes everything -------------------------------------------


@pytest.mark.parametrize("site", ["z", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_mean_of_equal_prompts_changes_nothing(kind: str, site: str) -> None:
    (pair,) = random_pairs(1)
    equal = [PromptPair(replace(pair.clean, id=str(i)), pair.clean) for i in range(3)]
    scores = head_effects(tiny(kind), equal, site=site, reference="mean")
    assert np.abs(scores.per_example).max() < 1e-5
    again = head_effects(tiny(kind), equal, site=site, reference="resample")
    assert np.abs(again.per_example).max() < 1e-5
    zero = head_effects(tiny(kind), equal, site=site, reference="zero")
    assert np.abs(zero.per_example).max() > 0.01  # so the test can fail


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_a_growing_batch_gives_kept_runs_back_bit_by_bit(kind: str) -> None:
    model = tiny(kind)
    _, batch = next(Pairs(model, random_pairs(2)).batches())
    assert possible(batch.clean)
    for layer in model.tower("text").layers:
        z = batch.clean.kept[layer.name].z
        same = staircase(batch.clean, [Step(layer, z[None])])
        assert torch.equal(same[0], batch.clean.logits)
    steps = [
        Step(x, batch.corrupted.kept[x.name].z[None].repeat(2, 1, 1, 1, 1))
        for x in model.tower("text").layers
    ]
    together = staircase(batch.clean, steps)
    for i, step in enumerate(steps):
        alone = batch.clean.rerun({step.layer.name: step.z}, copies=2)
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_planted_sets_and_repair_hold_under_rotation(name: str) -> None:
    model, pairs = interp.load(name), ioi_pairs(6)
    sets = [["2.0"], ["2.0", "2.1"], ["2.0", "2.1", "3.0"], ["2.0", "2.1", "2.2", "3.0"]]
    found = joint_effects(model, pairs, sets)
    np.testing.assert_allclose(found.values, [-1.2, -4.2, -9.0, -6.6], atol=1e-3)
    repair = self_repair(model, pairs, ["2.0"])
    assert repair.repaired == pytest.approx(4.8, abs=1e-3)
    assert str(repair.compensating(1)[0][0]) == "L3H0"


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_saturated_gradients_fail_are_caught_and_mended(name: str) -> None:
    pairs = Pairs(interp.load(name), ioi_pairs(3, corruption="flip"))
    movers = {"L2H0": -12.0, "L2H1": -6.0, "L2H2": 4.8}
    missed = {"L0H0": -13.2, "L1H0": -13.2}
    for site, blind, fix in (("z", missed, True), ("q", movers, False)):
        table = AttributionPatching(site=site, qk_fix=fix, verify=16).scores(pairs)
        value = dict(zip(map(str, table.heads), table.values, strict=True))
        exact = dict(zip(map(str, table.heads), table.column("exact"), strict=True))
        named = {head: truth for head, truth, _ in table.provenance["missed"]}
        for head, effect in blind.items():
            assert abs(value[head]) < 2e-3
            assert exact[head] == pytest.approx(effect, abs=1e-3)
            assert named[head] == pytest.approx(effect, abs=1e-3)
    fixed = AttributionPatching(site="q", verify=16).scores(pairs)
    value = dict(zip(map(str, fixed.heads), fixed.values, strict=True))
    for head, effect in movers.items():
        assert value[head] == pytest.approx(effect, abs=1e-3)
    # What is left unseen is the duplicate-token head: it acts through a later, saturated row.
    assert {head for head, *_ in fixed.provenance["missed"]} == {"L0H0"}


# TransformerLens as a second opinion --------------------------------------------------------


@functools.cache
def bridge(kind: str) -> Any:
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf: Any = copy.deepcopy(tiny(kind).hf)
    hf.set_attn_implementation("eager")
    return build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=None, model_name="tiny"
    )


@functools.cache
def folded(kind: str) -> Any:
    """Norms folded into the weights, nothing centred: the coordinates of the Framework paper."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf: Any = copy.deepcopy(tiny(kind).hf)
    hf.set_attn_implementation("eager")
    out = build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=None, model_name="tiny"
    )
    out.enable_compatibility_mode(
        disable_warnings=True, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return out


PAIRS = random_pairs(2)
CLEAN = torch.tensor([p.clean.tokens for p in PAIRS])
CORRUPTED = torch.tensor([p.corrupted.tokens for p in PAIRS])


def mean_difference(logits: Tensor) -> Tensor:
    each = [difference(x[-1], p.clean) for x, p in zip(logits, PAIRS, strict=True)]
    return torch.tensor(each).mean()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_sweep_of_zero_ablations_in_transformer_lens_agrees(kind: str) -> None:
    model = bridge(kind)
    base = mean_difference(model(CLEAN))
    want = np.zeros((3, 4))
    for layer in range(3):
        for head in range(4):

            def silent(z: Tensor, hook: Any, head: int = head) -> Tensor:
                return z.index_fill(2, torch.tensor([head]), 0)

            name = f"blocks.{layer}.attn.hook_z"
            want[layer, head] = (
                mean_difference(model.run_with_hooks(CLEAN, fwd_hooks=[(name, silent)])) - base
            )
    ours = head_effects(tiny(kind), PAIRS, reference="zero").grid()
    np.testing.assert_allclose(ours, want, atol=2e-5)
    assert np.abs(want).min() > 1e-3
    for place in np.ndindex(3, 4):  # and the same as a recipe
        with Recipe(Edit("zero", Where(heads=[HeadId(*place)]))).on(tiny(kind)):
            out = tiny(kind).hf(CLEAN).logits
        assert float(mean_difference(out) - base) == pytest.approx(want[place], abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("site", ["out", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_activation_patching_of_transformer_lens_agrees(kind: str, site: str) -> None:
    model = bridge(kind)
    import transformer_lens.patching as theirs

    _, cache = model.run_with_cache(CLEAN)
    base = mean_difference(model(CORRUPTED))
    patch = getattr(theirs, f"get_act_patch_attn_head_{site}_all_pos")
    want = np.asarray(patch(model, CORRUPTED, cache, mean_difference) - base)
    ours = head_effects(
        tiny(kind), PAIRS, direction="denoise", site="z" if site == "out" else site
    ).grid()
    assert ours.shape == want.shape == (3, 2 if kind == "llama" and site in "kv" else 4)
    np.testing.assert_allclose(ours, want, atol=2e-5)
    assert np.abs(want).max() > 0.05
    if site == "out":
        patch = theirs.get_act_patch_attn_head_out_by_pos
        want = np.asarray(patch(model, CORRUPTED, cache, mean_difference) - base)
        ours = head_position_effects(tiny(kind), PAIRS, direction="denoise").values
        np.testing.assert_allclose(ours.reshape(3, 4, 10), want.transpose(0, 2, 1), atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_direct_logit_attribution_of_transformer_lens_agrees(kind: str) -> None:
    model = folded(kind)
    from transformer_lens.tools.analysis.direct_logit_attribution import (
        direct_logit_attribution,
    )

    answers = torch.tensor([p.clean.answer[0] for p in PAIRS if p.clean.answer])
    wrong = torch.tensor([p.clean.meta["wrong"] for p in PAIRS])
    want = direct_logit_attribution(model, CLEAN, answers, wrong, unit="head")
    ours = logit_attribution(tiny(kind), PAIRS)
    assert list(want.labels[:12]) == [str(h) for h in tiny(kind).tower("text").heads]
    for label, row in zip(want.labels[:12], want.attribution[:12], strict=True):
        got = ours.per_example[:, ours.parts.index(label)]
        np.testing.assert_allclose(got, row, atol=2e-5)
    assert np.abs(want.attribution[:12]).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["q", "k", "v"])
def test_composition_scores_of_transformer_lens_agree(kind: str, how: str) -> None:
    want = folded(kind).all_composition_scores(how.upper()).scores.reshape(12, 12).numpy()
    ours = composition_scores(tiny(kind), kind=how).values
    later = ~np.isnan(ours)
    assert later.sum() == 3 * 16
    np.testing.assert_allclose(ours[later], want[later], atol=1e-5)
    assert not want[~later].any() and want[later].min() > 0.05


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sites"), [("gpt2", "qkv"), ("llama", "q")])
def test_direct_paths_of_transformer_lens_agree(kind: str, sites: str) -> None:
    model = bridge(kind)
    from transformer_lens.patching import get_act_patch_direct_path

    swapped = [
        PromptPair(replace(p.corrupted, id=p.clean.id, answer=p.clean.answer, meta=p.clean.meta),
                   p.clean)
        for p in PAIRS
    ]  # fmt: skip
    clean, corrupted = (model.run_with_cache(x)[1] for x in (CLEAN, CORRUPTED))
    base = mean_difference(model(CORRUPTED))
    for site in sites:
        want = get_act_patch_direct_path(
            model, CORRUPTED, clean, corrupted, mean_difference, 0, 1, site, verbose=False
        ) - base  # fmt: skip
        for layer, head in ((1, 0), (2, 3)):
            ours = path_effects(tiny(kind), swapped, f"L{layer}H{head}.{site}", mlps="frozen")
            assert ours.values[1] == pytest.approx(float(want[layer, head]), abs=2e-5)
        assert float(want[1:].abs().max()) > 1e-3


# Numbers that would mean nothing ------------------------------------------------------------


class _Bad(Metric):
    name, summary, unit = "bad", "not one number per example", "none"

    def __init__(self, of: Callable[[Tensor], Any]) -> None:
        self._of = of

    def of(self, logits: Tensor, bound: Bound) -> Any:
        return self._of(logits)


SHAPES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one for all": (lambda x: x.mean(), r"\(\)"),
    # As long as the batch here, so a look at the last axis would not see it.
    "two per example": (lambda x: x[..., :2], r"\(2, 2\)"),
    "one per copy": (lambda x: x.mean((-1, -2)).expand(2) if x.dim() == 2 else x.mean((-1, -2)),
                     r"\(1[0-9]*,\)"),
    "a number": (lambda x: float(x.mean()), "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_metric_gives_one_number_per_example_of_every_run(name: str) -> None:
    of, came = SHAPES[name]
    with pytest.raises(InputError, match=f"one number per example.*got {came}") as caught:
        head_effects(tiny("llama"), Pairs(tiny("llama"), random_pairs(2), metric=_Bad(of)))
    assert "\n" not in str(caught.value) and "vocabulary" in str(caught.value.hint)


def test_every_metric_of_the_library_gives_one_number_per_example() -> None:
    logits, bound = torch.randn(5, 3, 60), Bound(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    bound = replace(bound, reference=torch.randn(3, 60))
    for name in METRICS:
        assert METRICS[name].of(logits, bound).shape == (5, 3)


def nearly_equal(rounding: float) -> tuple[Model, list[PromptPair]]:
    """Pairs whose runs differ in the metric by rounding only: the toy does not read fillers."""
    model = interp.load("zoo:planted-ioi")
    with torch.no_grad():  # one filler reaches the answer, very weakly
        weight = model.hf.lm_head.weight
        weight[2:8] += rounding * torch.arange(6)[:, None] * weight.new_ones(88)
    pairs = []
    for p in ioi_pairs(4):
        tokens = list(p.clean.tokens)
        tokens[7] = 8 if tokens[7] != 8 else 9
        pairs.append(PromptPair(p.clean, replace(p.clean, tokens=tuple(tokens))))
    return model, pairs


def test_runs_that_differ_by_rounding_have_no_share_of_their_difference() -> None:
    from patching.effects import normaliser

    clean = np.array([6.6, 6.6])
    for other in (clean, clean + 4e-6, clean - np.array([3e-6, 5e-6])):
        with pytest.raises(
            InputError, match=r"must differ in the metric; both have 6\.6"
        ) as caught:
            normaliser(clean, other)
        assert caught.value.hint
    assert normaliser(clean, clean - 1e-3) == pytest.approx(1e-3)
    assert normaliser(np.array([3e-7]), np.array([1e-7])) == pytest.approx(2e-7)  # probabilities
    model, pairs = nearly_equal(0.0)
    scores = head_effects(model, pairs)
    assert "recovered" not in scores.extras
    with pytest.raises(InputError, match="must differ in the metric"):
        _ = head_position_effects(model, pairs).recovered
    for p in random_pairs(1):
        assert "recovered" in head_effects(tiny("llama"), [p]).extras


def test_a_target_without_probability_has_no_relative_change() -> None:
    model = tiny("llama")
    hf: Any = copy.deepcopy(model.hf)
    with torch.no_grad():
        hf.lm_head.weight.mul_(1e4)
    prompts = [p.clean for p in random_pairs(2)]
    with pytest.raises(InputError, match="must have a probability above 0") as caught:
        window_knockout(interp.load(hf), prompts, keys="early", target="answer")
    assert caught.value.hint and prompts[0].id in str(caught.value)
    found = window_knockout(interp.load(hf), prompts, keys="early")
    assert np.isfinite(found.values).all()


def _llama() -> tuple[Model, list[PromptPair]]:
    return tiny("llama"), random_pairs(2)


SAME = [PromptPair(p.clean, p.clean) for p in random_pairs(2)]
BAD: dict[str, tuple[Callable[[], Any], type[InterpError], str]] = {
    "unequal lengths": (lambda: PromptPair(Prompt((1, 2), id="a"), Prompt((1,))), PairError,
                        "equally many tokens; pair a has 2 and 1"),
    "no pairs": (lambda: head_effects(tiny("llama"), []), InputError, "at least one pair"),
    "no heads": (lambda: head_effects(*_llama(), heads=[]), InputError, "at least one head"),
    "not of the site": (lambda: head_effects(*_llama(), heads=["0.3"], site="k"), InputError,
                        "L0H3 is not a head of site 'k'"),
    "site out of reach": (lambda: head_effects(tiny("bloom"), random_pairs(2), site="q"),
                          InputError, "are not reached on"),
    "unknown site": (lambda: head_effects(*_llama(), site="zz"), InterpError, "no site named"),
    "unknown metric": (lambda: head_effects(*_llama(), metric="zz"), InterpError, "no metric"),
    "unknown reference": (lambda: head_effects(*_llama(), reference="zz"), InterpError,
                          "no reference named"),
    "unknown direction": (lambda: head_effects(*_llama(), direction="zz"), InputError,
                          "noise or denoise; got 'zz'"),
    "every key blocked": (lambda: head_knockout(*_llama(), keys="all"), InputError,
                          "a row of attention must keep a key"),
    "every key of a window": (
        lambda: window_knockout(tiny("llama"), [p.clean for p in random_pairs(2)], keys="all"),
        InputError, "a row of attention must keep a key"),
    "equal runs": (lambda: head_position_effects(tiny("llama"), SAME).recovered, InputError,
                   "must differ in the metric"),
    "equal circuits": (lambda: circuit_curve(tiny("llama"), SAME, ["0.1"]).faithfulness,
                       InputError, "must differ with and without heads"),
    "lengths that differ": (
        lambda: head_position_effects(tiny("llama"), [*random_pairs(1), *random_pairs(
            1, length=8)]), PairError, "must have one length; got 8, 10 tokens"),
    "nothing to draw from": (
        lambda: head_effects(tiny("llama"), random_pairs(1), reference="resample"), InputError,
        "at least 2 pairs of equal length; got 1"),
    "no wrong answer": (
        lambda: head_effects(tiny("llama"), [PromptPair(Prompt((5, 6), answer=(1,)),
                                                        Prompt((5, 7)))]),
        InputError, "needs a wrong answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_clear_line_with_a_hint(name: str) -> None:
    act, error, text = BAD[name]
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert text in message and "\n" not in message
    assert caught.value.hint and "\n" not in caught.value.hint, message
