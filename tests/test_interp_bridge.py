"""Bridges of TransformerLens read as models, and TransformerLens as an oracle.

Everything is compared with the same Hugging Face model loaded directly, which a bridge never
touched: structure, readings on left-padded prompts, edits, decoding and scores.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp import oracle
from interp.bridge import BridgeModel, _heard, _layout
from interp.decode import decode
from interp.doctor import Check
from interp.engine import read
from interp.errors import DoctorError, SiteError
from interp.loading import load
from interp.model import Model
from interp.prompts import Batch, Prompt
from interp.readings import (
    Distance,
    Entropy,
    KeyMass,
    Offset,
    PairMass,
    Rows,
    SpanMass,
    TopKey,
    ValueNorm,
    ZNorm,
)
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer

COMMON: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 192,
}
GPT: dict[str, Any] = {
    "vocab_size": 60,
    "n_positions": 192,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**GPT))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, num_key_value_heads=2))


def bloom() -> nn.Module:
    config = tf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4)
    return tf.BloomForCausalLM(config)


def falcon() -> nn.Module:
    config = tf.FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        multi_query=True, new_decoder_architecture=False, alibi=False, bias=False,
    )  # fmt: skip
    return tf.FalconForCausalLM(config)


def gptj() -> nn.Module:
    return tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4))


def opt() -> nn.Module:
    common = {k: v for k, v in COMMON.items() if k != "intermediate_size"}
    return tf.OPTForCausalLM(tf.OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32))


def gpt_oss() -> nn.Module:
    config = tf.GptOssConfig(
        **COMMON, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    return tf.GptOssForCausalLM(config)


def deepseek() -> nn.Module:
    config = tf.DeepseekV3Config(
        **COMMON, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=2, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


# What reaches the layers under the bridge, and whether values are shown there.
REACHED: dict[Callable[[], nn.Module], tuple[str, bool]] = {
    gpt2: ("bridge", True),
    llama: ("bridge", True),
    bloom: ("bridge", True),
    falcon: ("bridge", True),
    gpt_oss: ("bridge", True),
    deepseek: ("bridge", False),
    gptj: ("functions", False),
    opt: ("interface", True),
}


def built(family: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    hf = family().eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            # Initial weights give nearly uniform patterns, which would hide most mistakes.
            if weight.dim() == 2 and "embed" not in name and "wte" not in name:
                weight.mul_(10)
            elif name.endswith("sinks"):
                weight.normal_()
    return hf


def bridged(hf: nn.Module, tokenizer: Any = None) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer, model_name="tiny"
    )


@dataclass
class Pair:
    name: str
    direct: Model
    bridge: Any
    model: Model
    reached: str
    values: bool


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=REACHED, ids=lambda f: f.__name__)
def pair(request: pytest.FixtureRequest) -> Pair:
    hf = built(request.param)
    bridge = bridged(copy.deepcopy(hf))
    reached, values = REACHED[request.param]
    name = request.param.__name__
    return Pair(name, load(hf), bridge, load(bridge), reached, values)


@pytest.fixture
def fresh_gpt2() -> BridgeModel:
    model = load(bridged(built(gpt2)))
    assert isinstance(model, BridgeModel)
    return model


def left_padded(model: Model) -> Batch:
    gen = torch.Generator().manual_seed(1)
    prompts = []
    for n in (17, 11, 5):
        tokens = tuple((torch.randint(55, (n,), generator=gen) + 4).tolist())
        prompts.append(Prompt(tokens, {"head": ((0, 2),), "tail": ((n - 3, n),)}))
    return model.batch(prompts, side="left")


def hooks_of(model: Model) -> tuple[Any, ...]:
    interfaces = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    counts = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
    return interfaces, counts


def test_structure_equals_that_of_the_model_itself(pair: Pair) -> None:
    assert isinstance(pair.model, BridgeModel)
    assert pair.model.hf is pair.bridge.original_model
    assert pair.model.name == "tiny"
    assert not pair.model.structure.unreached
    assert {layer.reached for layer in pair.model.structure.layers.values()} == {pair.reached}
    fields = ("tower", "index", "n_heads", "n_kv_heads", "d_v", "cross", "causal", "calls", "sinks")

    def table(model: Model) -> list[tuple[Any, ...]]:
        layers = model.structure.layers.values()
        # The plain seam cannot see how many key-value heads a pattern came from.
        skip = {"n_kv_heads"} if pair.name == "bloom" else set()
        return [tuple(getattr(x, f) for f in fields if f not in skip) for x in layers]

    assert table(pair.model) == table(pair.direct)
    ours, theirs = (list(m.structure.layers.values()) for m in (pair.model, pair.direct))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(pair.model.w_o(a), pair.direct.w_o(b))


def test_doctor_holds(pair: Pair) -> None:
    report = pair.model.doctor()
    assert report.ok, str(report)
    assert pair.model.doctor(left_padded(pair.model).inputs()).ok
    verdict = {check.name: check.ok for check in report.checks}
    assert verdict["pattern @ v equals z"] is (True if pair.values else None)
    assert verdict["heads through W_O plus bias equal attention output"] is True
    assert verdict["no mass on padding"] is True


def test_readings_equal_those_of_the_model_itself(pair: Pair) -> None:
    readings = {
        "span": SpanMass("head", query="tail"),
        "pairs": PairMass(Offset(1)),
        "distance": Distance(),
        "entropy": Entropy(),
        "keys": KeyMass(),
        "rows": Rows(query="tail"),
        "top": TopKey(query="tail"),
        "z": ZNorm(query="tail"),
    }
    direct_values = all(layer.d_qk for layer in pair.direct.structure.layers.values())
    if pair.values and direct_values:
        readings["values"] = ValueNorm("head")
    ours = read(pair.model, left_padded(pair.model), readings)
    theirs = read(pair.direct, left_padded(pair.direct), readings)
    for name in readings:
        torch.testing.assert_close(
            ours[name].values, theirs[name].values, rtol=0, atol=1e-5, equal_nan=True
        )
    if pair.reached == "bridge":
        assert set(ours["pairs"].how) == {"pattern"}
    assert float(ours["rows"].values.nan_to_num().amax()) > 0.5, "a flat pattern tests nothing"


def logits(model: Model, batch: Batch) -> Tensor:
    return model.forward(batch.inputs()).logits[batch.attention_mask.bool()]


def edited(model: Model, site: str) -> tuple[Tensor, Tensor]:
    """Logits before and while head 2 of the first layer writes nothing."""
    batch = left_padded(model)
    first = next(iter(model.structure.layers.values()))

    def z(call: AttnCall) -> Tensor | None:
        return without(call.z) if call.name == first.name else None

    def o_in(layer: Layer, x: Tensor) -> Tensor | None:
        return without(x) if layer == first else None

    def without(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 2, :] = 0
        return x

    base = logits(model, batch)
    with model.observe(z) if site == "z" else model.observe_output(o_in):
        changed = logits(model, batch)
    assert torch.equal(logits(model, batch), base)
    return base, changed


@pytest.mark.parametrize("site", ["z", "o_in"])
def test_edits_do_what_they_do_to_the_model_itself(pair: Pair, site: str) -> None:
    base, changed = edited(pair.model, site)
    direct_base, direct_changed = edited(pair.direct, site)
    torch.testing.assert_close(base, direct_base, rtol=0, atol=1e-4)
    torch.testing.assert_close(changed, direct_changed, rtol=0, atol=1e-4)
    assert float((changed - base).abs().max()) > 1e-2


def test_an_edited_z_is_what_the_output_projection_receives(pair: Pair) -> None:
    seen: list[Tensor] = []
    batch = left_padded(pair.model)
    opened = [
        pair.model.observe_output(lambda layer, x: seen.append(x) or None),
        pair.model.observe(lambda call: torch.full_like(call.z, 0.25)),
    ]
    if pair.reached == "functions":
        # There z and o_in are one site, heard in the order of opening.
        opened.reverse()
    with opened[0], opened[1]:
        pair.model.forward(batch.inputs())
    assert len(seen) == 2 and all(bool((x == 0.25).all()) for x in seen)


def test_an_edited_pattern_is_applied_and_shown(fresh_gpt2: BridgeModel) -> None:
    """Nested editors: the outer one first, and both observers see the pattern as applied."""
    batch = left_padded(fresh_gpt2)
    outer: list[AttnCall] = []
    inner: list[AttnCall] = []
    with (
        fresh_gpt2.observe(outer.append, weights=lambda name, p: p / 4),
        fresh_gpt2.observe(inner.append, weights=lambda name, p: (p - 0.5).abs()),
    ):
        fresh_gpt2.forward(batch.inputs())
    plain: list[AttnCall] = []
    with fresh_gpt2.observe(plain.append, weights=lambda name, p: None):
        fresh_gpt2.forward(batch.inputs())
    expected = (plain[0].pattern / 4 - 0.5).abs()  # type: ignore[operator]
    for call in (outer[0], inner[0]):
        assert torch.equal(call.pattern, expected)  # type: ignore[arg-type]
        torch.testing.assert_close(call.z, (expected @ call.v).transpose(1, 2))  # type: ignore[operator]
    names = list(fresh_gpt2.structure.layers)
    assert [call.name for call in plain] == names


def test_edits_reach_layers_of_the_plain_seam() -> None:
    def swapped(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v.flip(1)

    model = load(bridged(built(opt)))
    batch = left_padded(model)
    base = logits(model, batch)
    seen: list[AttnCall] = []
    with model.observe(seen.append, columns=lambda v: None, inputs=swapped):
        assert float((logits(model, batch) - base).abs().max()) > 1e-2
    assert len(seen) == 2
    model = load(bridged(built(gptj)))
    with model.observe(seen.append, weights=lambda name, p: p / 2):
        model.forward(batch.inputs())
    real = batch.attention_mask[0].bool()
    rows = seen[-1].pattern[0][:, real]  # type: ignore[index]
    torch.testing.assert_close(rows.sum(-1), torch.full_like(rows[..., 0], 0.5))


class Late(nn.Module):
    """As TransformerLens' delegating components: the pattern is shown after its use."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_pattern, self.o = nn.Identity(), nn.Module()
        self.o.hook_in = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.o.hook_in(x)
        self.hook_pattern(x)
        return x


def test_a_pattern_shown_too_late_is_not_taken_for_the_next_calls() -> None:
    component, heard = Late(), []
    with _heard(component, lambda *what: heard.append(what)):
        for _ in range(2):
            component(torch.zeros(1))
    assert not heard


@pytest.mark.parametrize("n_key", [5, 2])
def test_values_are_shown_only_in_a_layout_that_gives_z(n_key: int) -> None:
    gen = torch.Generator().manual_seed(0)
    pattern = torch.rand(3, 4, n_key, n_key, generator=gen)
    v = torch.randn(3, 2, n_key, 6, generator=gen)
    z = (pattern @ v.repeat_interleave(2, dim=1)).transpose(1, 2)
    shown = {
        "batch pos kv_head*d": v.transpose(1, 2).flatten(2),
        "batch pos kv_head d": v.transpose(1, 2),
        "batch kv_head pos d": v,
    }
    for layout, values in shown.items():
        assert _layout(pattern, values, z) == (layout, 2)
        # Behind an output gate z is another matter; the heads are still counted.
        assert _layout(pattern, values, z * 0.9) == (None, 2)
    assert _layout(pattern, None, z) == (None, 4)


def values_fit(call: AttnCall) -> None:
    """A decoding step projects one value, while the pattern has a column for every key."""
    assert call.v is None or call.v.shape[2] == call.n_key


def test_decoding_with_and_without_cache_equals_that_of_the_model_itself(pair: Pair) -> None:
    ours = decode(pair.model, left_padded(pair.model), max_new_tokens=4)
    with pair.model.observe(values_fit):
        pair.model.hf.generate(**left_padded(pair.model).inputs(), max_new_tokens=3)  # type: ignore[operator]
    again = decode(pair.model, left_padded(pair.model), max_new_tokens=4, use_cache=False)
    theirs = decode(pair.direct, left_padded(pair.direct), max_new_tokens=4)
    for other in (again, theirs):
        assert ours.tokens == other.tokens
        assert torch.equal(ours.top.nan_to_num(-1), other.top.nan_to_num(-1))
        torch.testing.assert_close(ours.mass, other.mass, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt])
def test_no_hook_is_left(pair: Pair, raised: type[BaseException] | None) -> None:
    batch = left_padded(pair.model)
    # TransformerLens adds hooks of its own during the first forward.
    base = logits(pair.model, batch)
    before = hooks_of(pair.model)

    def fail(*_: Any) -> None:
        if raised is not None:
            raise raised("inside a hook")

    for opened in (pair.model.observe(fail), pair.model.observe_output(fail)):
        if raised is None:
            with opened:
                pair.model.forward(batch.inputs())
        else:
            with pytest.raises(raised, match="inside a hook"), opened:
                pair.model.forward(batch.inputs())
        assert hooks_of(pair.model) == before
    assert torch.equal(logits(pair.model, batch), base)


def test_scores_equal_those_of_the_model_itself() -> None:
    import heads

    hf = built(llama)
    ours, theirs = load(bridged(copy.deepcopy(hf))), load(hf)
    names = ["previous-token", "induction", "sink"]
    found, expected = (heads.score(model, names, n=3) for model in (ours, theirs))
    for name in names:
        assert found[name].values.shape == (8,)
        torch.testing.assert_close(
            torch.as_tensor(found[name].values),
            torch.as_tensor(expected[name].values),
            rtol=0, atol=1e-5,
        )  # fmt: skip


def test_text_is_encoded_by_the_tokenizer_of_the_bridge(tmp_path: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "the", "cat", "sat"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(tmp_path)
    # TransformerLens reads a tokenizer's folder once more, so it must have one.
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    bridge = bridged(built(gpt2), tokenizer)
    model = load(bridge)
    assert model.tokenizer is bridge.tokenizer
    prompt = model.encode("the cat sat")
    assert list(prompt.tokens) == bridge.tokenizer("the cat sat").input_ids
    assert list(prompt.tokens)[-3:] == [2, 3, 4]
    assert model.batch([prompt]).input_ids.shape == (1, len(prompt))
    other = copy.deepcopy(tokenizer)
    assert load(bridge, tokenizer=other).tokenizer is other


def test_weights_folded_by_the_bridge_are_those_read() -> None:
    bridge = bridged(built(gpt2))
    bridge.enable_compatibility_mode()
    model = load(bridge)
    assert model.doctor().ok
    for i, layer in enumerate(model.structure.layers.values()):
        assert torch.equal(model.w_o(layer), bridge.W_O[i])


def test_hooks_of_the_user_stay_and_are_read(fresh_gpt2: BridgeModel) -> None:
    bridge = fresh_gpt2.bridge
    batch = left_padded(fresh_gpt2)
    plain: list[Tensor] = []
    with fresh_gpt2.observe(lambda call: plain.append(call.pattern)):  # type: ignore[arg-type]
        fresh_gpt2.forward(batch.inputs())
    halved: list[AttnCall] = []
    bridge.add_hook("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern / 2)
    with fresh_gpt2.observe(lambda call: halved.append(call)):
        fresh_gpt2.forward(batch.inputs())
        bridge.reset_hooks()
        fresh_gpt2.forward(batch.inputs())
    first, _, unhooked, _ = halved
    assert torch.equal(first.pattern, plain[0] / 2)  # type: ignore[arg-type]
    # Reset by the user while reading: her hook is gone, ours goes on.
    assert torch.equal(unhooked.pattern, plain[0])  # type: ignore[arg-type]
    real = batch.attention_mask[0].bool()
    expected = torch.einsum("hqk,hkd->qhd", first.pattern[0], first.v[0])  # type: ignore[index]
    torch.testing.assert_close(first.z[0][real], expected[real])


def test_per_head_results_of_the_bridge_are_refused(fresh_gpt2: BridgeModel) -> None:
    fresh_gpt2.bridge.set_use_attn_result(True)
    with pytest.raises(SiteError, match="use_attn_result"):
        with fresh_gpt2.observe_output(lambda layer, x: None):
            pass
    fresh_gpt2.bridge.set_use_attn_result(False)
    assert fresh_gpt2.doctor().ok


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pattern rows sum to one": lambda pattern: pattern * 0.99,
    "pattern @ v equals z": lambda pattern: pattern.flip(1),
    "no mass on later tokens (causal layers)": lambda pattern: pattern.flip(-1),
}


@pytest.mark.parametrize("check", FAULTS)
def test_doctor_sees_a_false_reading(
    fresh_gpt2: BridgeModel, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh_gpt2.doctor().ok

    def wrong(*args: Any, pattern: Tensor, how: str) -> AttnCall:
        return AttnCall(*args, pattern=FAULTS[check](pattern), how=how)

    monkeypatch.setattr("interp.bridge.AttnCall", wrong)
    failed = {c.name for c in fresh_gpt2.doctor().checks if c.ok is False}
    assert check in failed


def test_transformer_lens_is_imported_only_when_needed() -> None:
    code = """
import sys, torch
import interp.bridge, interp.doctor, interp.oracle
from interp.loading import load
from transformers import GPT2Config, GPT2LMHeadModel
hf = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=32, n_embd=8, n_layer=1, n_head=2))
assert load(hf).doctor().ok
assert not [m for m in sys.modules if m.startswith("transformer_lens")], "imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", [gpt2, llama, bloom, falcon, gptj, opt, gpt_oss, deepseek])
def test_oracle_agrees(family: Callable[[], nn.Module]) -> None:
    hf = built(family)
    model = load(hf)
    inputs = left_padded(model).inputs()
    before, implementation = model.forward(inputs).logits, hf.config._attn_implementation
    check = oracle.compare(model, inputs)
    assert check.ok is True, check
    assert check.worst is not None and check.worst <= 1e-5 == check.limit
    assert "2 of 2 layers" in check.note
    # The model itself was neither wrapped nor switched.
    assert torch.equal(model.forward(inputs).logits, before)
    assert hf.config._attn_implementation == implementation
    assert not any("Bridge" in type(module).__name__ for module in hf.modules())


def test_doctor_asks_the_oracle_only_when_told() -> None:
    model = load(built(llama))
    assert not [c for c in model.doctor().checks if c.name == oracle.NAME]
    report = model.doctor(oracle=True)
    assert report.ok
    assert [c.ok for c in report.checks if c.name == oracle.NAME] == [True]


def off_by_little(call: AttnCall, p: Tensor) -> Tensor:
    return p + (3e-5 if call.name.endswith("layers.1.self_attn") else 0)


def heads_swapped(call: AttnCall, p: Tensor) -> Tensor:
    return p.flip(0)


def one_late(call: AttnCall, p: Tensor) -> Tensor:
    return p.roll(1, -1)


def not_a_number(call: AttnCall, p: Tensor) -> Tensor:
    return p * float("nan")


@pytest.mark.parametrize("fault", [off_by_little, heads_swapped, one_late, not_a_number])
def test_oracle_sees_a_false_reading(
    fault: Callable[[AttnCall, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(built(llama))
    inputs = left_padded(model).inputs()
    assert oracle.compare(model, inputs).ok is True
    rows = AttnCall.rows
    monkeypatch.setattr(AttnCall, "rows", lambda self, *args: fault(self, rows(self, *args)))
    check = oracle.compare(model, inputs)
    assert check.ok is False
    assert "worst in model.layers" in check.note
    if fault is off_by_little:
        assert "model.layers.1.self_attn" in check.note


def test_oracle_sees_a_false_pattern_on_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPT-J's adapter shows is not what it computes with: only the pattern is wrong."""
    from transformer_lens.hook_points import HookPoint

    model = load(built(gptj))
    inputs = left_padded(model).inputs()
    assert oracle.compare(model, inputs).ok is True
    forward = HookPoint.forward

    def wrong(self: Any, x: Tensor) -> Tensor:
        return forward(self, x.flip(1) if str(self.name).endswith("hook_pattern") else x)

    monkeypatch.setattr(HookPoint, "forward", wrong)
    check = oracle.compare(model, inputs)
    assert check.ok is False and check.worst is not None and check.worst > 1e-2


def test_an_oracle_that_computes_something_else_is_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def another(model: Model) -> nn.Module:
        hf = copy.deepcopy(model.hf)
        with torch.no_grad():
            next(hf.parameters()).mul_(1.5)
        return hf

    model = load(built(llama))
    monkeypatch.setattr(oracle, "copy_of", another)
    check = oracle.compare(model, left_padded(model).inputs())
    assert check.ok is None and "another output" in check.note


def unsupported() -> Check:
    config = tf.DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    model = load(tf.DistilBertForMaskedLM(config).eval())
    report = model.doctor(oracle=True)
    assert report.ok
    return next(check for check in report.checks if check.name == oracle.NAME)


def without_ids() -> Check:
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = load(tf.ViTModel(config).eval())
    return oracle.compare(model, {"pixel_values": torch.zeros(1, 3, 16, 16)})


def a_bridge() -> Check:
    model = load(bridged(built(gpt2)))
    return oracle.compare(model, left_padded(model).inputs())


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (unsupported, "Unsupported architecture"),
        (without_ids, "token ids"),
        (a_bridge, "TransformerLens' already"),
    ],
)
def test_where_there_is_no_oracle_the_check_does_not_apply(
    case: Callable[[], Check], why: str
) -> None:
    check = case()
    assert check.ok is None and why in check.note


def test_a_disagreeing_oracle_refuses_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check(oracle.NAME, 1.0, 1e-5, False, "worst in here")
    monkeypatch.setattr(oracle, "compare", lambda model, inputs: wrong)
    with pytest.raises(DoctorError, match="TransformerLens"):
        load(built(gpt2)).doctor(oracle=True).raise_if_failed()
