"""Direct effects, attribution and path patching against runs that hooks of torch freeze by hand."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from patching_kit import difference, logits_of, random_pairs, seen_z, tiny
from torch import Tensor

import interp
from interp.errors import HeadIdError, InputError, SiteError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Prompt, PromptPair
from interp.recipe import Edit, Recipe, Where
from interp.zoo.planted_ioi import ioi_pairs
from patching import Pairs, make_method
from patching.direct import adds_up, direct_effects, logit_attribution
from patching.path import Receiver, edge_effects, path_effects
from patching.readout import norm_of, readout, scale_at

EDGES = {
    ("embed", "L0H0.q"): -13.2,
    ("L0H0", "L1H0.v"): -13.2,
    ("L1H0", "L2H0.q"): -12.0,
    ("L1H0", "L2H1.q"): -6.0,
    ("L1H0", "L2H2.q"): 4.8,
    ("embed", "L2H0.k"): -6.0,
    ("embed", "L2H1.k"): -3.0,
    ("embed", "L2H2.k"): 2.4,
    ("L2H0", "logits"): -12.0,
    ("L2H1", "logits"): -6.0,
    ("L2H2", "logits"): 4.8,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def mlp_names(model: Model) -> list[str]:
    """The last module of each MLP, which writes into the stream alone."""
    last = {
        "GPT2": "mlp", "Llama": "mlp", "Mistral": "mlp", "Gemma2": "mlp", "GPTJ": "mlp",
        "GPTNeoX": "mlp", "OPT": "fc2", "Qwen3": "mlp", "Bloom": "mlp.dense_4h_to_h",
    }  # fmt: skip
    family = type(model.hf).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return [n for n, _ in model.hf.named_modules() if n.endswith("." + last[family])]


def frozen_logits(
    model: Model,
    prompt: Prompt,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    mlps: bool,
) -> Tensor:
    """Last logits with every head (and MLP) as in the clean run but for the changed z."""
    kept = seen_z(model, prompt)
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in mlp_names(model) if mlps else []:
        module = model.hf.get_submodule(name)
        note = module.register_forward_hook(
            lambda m, a, out, name=name: outputs.__setitem__(name, out)
        )
        logits_of(model, prompt)
        note.remove()
        handles.append(module.register_forward_hook(lambda m, a, out, name=name: outputs[name]))

    def put(name: str) -> Callable[[Tensor], Tensor]:
        change = changes.get(name, lambda z: z)
        return lambda z: change(kept[name].clone())

    try:
        return logits_of(model, prompt, {name: put(name) for name in kept})
    finally:
        for handle in handles:
            handle.remove()


KINDS = ["gpt2", "llama", "gemma2", "gptj", "bloom", "neox", "opt", "qwen3"]


@pytest.mark.parametrize("mlps", ["frozen", "live"])
@pytest.mark.parametrize("kind", KINDS)
def test_direct_effects_equal_frozen_runs(kind: str, mlps: str) -> None:
    model = tiny(kind)
    pairs = random_pairs(2)
    scores = direct_effects(model, pairs, mlps=mlps)
    assert np.abs(scores.values).max() > 0.05
    for i, pair in enumerate(pairs):
        other = seen_z(model, pair.corrupted)
        base = difference(logits_of(model, pair.clean), pair.clean)
        for j, head in list(enumerate(scores.heads))[::2]:
            name = model.layer_of(head).name

            def put(z: Tensor, n: str = name, h: int = head.head) -> Tensor:
                z[-1, h] = other[n][-1, h]
                return z

            want = frozen_logits(model, pair.clean, {name: put}, mlps=mlps == "frozen")
            assert scores.per_example[i, j] == pytest.approx(
                difference(want, pair.clean) - base, abs=3e-4
            )


def test_where_the_closed_form_holds() -> None:
    found = {}
    for kind in KINDS:
        _, batch = next(Pairs(tiny(kind), random_pairs(1)).batches())
        found[kind] = (adds_up(batch.clean), readout(batch.clean, batch).direction is not None)
    # Gemma 2 has a norm after the output projection, and soft-caps its logits.
    assert found == dict.fromkeys(KINDS, (True, True)) | {"gemma2": (False, False)}


@pytest.mark.parametrize("metric", ["logit", "log-prob", "accuracy"])
def test_direct_effects_on_other_metrics(metric: str) -> None:
    model = tiny("llama")
    (pair,) = pairs = random_pairs(1)
    scores = direct_effects(model, pairs, metric=metric, heads=["0.1", "2.2"])
    assert pair.clean.answer is not None
    answer = pair.clean.answer[0]

    def of(x: Tensor) -> float:
        return {
            "logit": float(x[answer] - x.mean()),
            "log-prob": float(x.log_softmax(-1)[answer]),
            "accuracy": float(x.argmax() == answer),
        }[metric]

    other = seen_z(model, pair.corrupted)
    for j, head in enumerate(scores.heads):
        name = model.layer_of(head).name

        def put(z: Tensor, n: str = name, h: int = head.head) -> Tensor:
            z[-1, h] = other[n][-1, h]
            return z

        want = of(frozen_logits(model, pair.clean, {name: put}, mlps=True))
        want -= of(logits_of(model, pair.clean))
        assert scores.values[j] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gemma2"])
def test_attribution_adds_up_to_the_metric(kind: str) -> None:
    model = tiny(kind)
    for metric in ("logit-difference", "logit"):
        split = logit_attribution(model, random_pairs(3), metric=metric)
        np.testing.assert_allclose(split.per_example.sum(1), split.total, atol=1e-4)
        assert np.abs(split.per_example).mean(0).max() > 0.1
    assert set(split.parts) == {
        "embed", "bias", *map(str, model.tower("text").heads),
        *(f"{x} L{i}" for x in ("mlp", "bias") for i in range(3)),
    }  # fmt: skip


def test_attribution_of_a_head_is_what_it_writes() -> None:
    """By hand on the last token of a Llama: z·W_O over the root mean square, times W_U."""
    model = tiny("llama")
    (pair,) = pairs = random_pairs(1)
    split = logit_attribution(model, pairs)
    assert pair.clean.answer is not None
    with torch.no_grad():
        hidden: list[Tensor] = []
        handle = model.hf.model.norm.register_forward_pre_hook(
            lambda m, args: hidden.append(args[0][0, -1])
        )
        z = seen_z(model, pair.clean)
        handle.remove()
        scale = hidden[0].pow(2).mean().add(1e-6).rsqrt()
        rows = model.hf.lm_head.weight
        direction = rows[pair.clean.answer[0]] - rows[pair.clean.meta["wrong"]]
        for layer in (0, 2):
            o = model.hf.model.layers[layer].self_attn.o_proj.weight
            for h in range(4):
                result = z[f"model.layers.{layer}.self_attn"][-1, h] @ o[:, 8 * h : 8 * h + 8].T
                want = float((result * scale * model.hf.model.norm.weight) @ direction)
                assert split.values[f"L{layer}H{h}"] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_planted_direct_effects(name: str) -> None:
    model = interp.load(name)
    assert model.truth is not None
    data = Pairs(model, ioi_pairs(8, corruption="flip"))
    truth = [model.truth.scores["direct-effect"][h] for h in model.tower("text").heads]
    np.testing.assert_allclose(make_method("attribution").scores(data).values, truth, atol=1e-3)
    zeroed = make_method("direct", {"reference": "zero"}).scores(data)
    np.testing.assert_allclose(zeroed.values, -np.array(truth), atol=1e-3)
    noised = direct_effects(model, data)
    np.testing.assert_allclose(noised.values, -2 * np.array(truth), atol=1e-3)
    assert noised.direction == path_effects(model, data).direction == "lower"
    assert str(noised.top(1)[0]) == "L2H0"
    live = direct_effects(model, data, mlps="live")
    np.testing.assert_allclose(live.per_example, noised.per_example, atol=1e-3)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_the_eleven_planted_edges(name: str) -> None:
    model = interp.load(name)
    effects = edge_effects(model, ioi_pairs(6, corruption="flip"))
    assert effects.senders[0] == "embed" and len(effects.senders) == 17
    assert len(effects.receivers) == 3 * 16 + 1
    assert effects.above(1e-3) == pytest.approx(EDGES, abs=1e-3)
    row, column = effects.senders.index("L1H0"), effects.receivers.index("L1H2.q")
    assert np.isnan(effects.values[row, column])  # not above its sender


def test_edges_and_paths_agree() -> None:
    model, pairs = tiny("llama"), random_pairs(2)
    edges = edge_effects(model, pairs)
    for receiver in ("L2H1.q", "L1H0.k", "L2H1.v", "logits"):
        scores = path_effects(model, pairs, receiver)
        column = edges.receivers.index(receiver)
        want = np.nan_to_num(edges.per_example[:, 1:, column])
        np.testing.assert_allclose(scores.per_example, want, atol=1e-4)
    assert np.nanmax(np.abs(edges.values)) > 0.05
    assert edges.unit == "logits" and edges.metric == "logit-difference"


def four_passes(
    model: Model, pair: PromptPair, sender: HeadId, receivers: list[Receiver], *, mlps: bool
) -> float:
    """Wang et al.'s algorithm on one unpadded prompt, by hooks and recipes; the effect."""
    clean = pair.clean
    kept, other = seen_z(model, clean), seen_z(model, pair.corrupted)
    name = model.layer_of(sender).name
    seen: dict[tuple[str, str], Tensor] = {}
    wanted = {model.layer_of(r.head).name for r in receivers}

    def observer(call):  # type: ignore[no-untyped-def]
        if call.name in wanted:
            for site in ("q", "k", "v"):
                seen[call.name, site] = getattr(call, site).clone()

    def put(z: Tensor) -> Tensor:
        z[:, sender.head] = other[name][:, sender.head]
        return z

    assert kept
    with model.observe(observer):
        frozen_logits(model, clean, {name: put}, mlps=mlps)
    edits = [
        Edit(
            "set", Where(heads=[r.head]), site=r.input,
            tensors={"value": seen[model.layer_of(r.head).name, r.input][:, r.head.head][None]},
        )
        for r in receivers
        if r.head.layer > sender.layer
    ]  # fmt: skip
    base = difference(logits_of(model, clean), clean)
    if not edits:
        return 0.0
    with Recipe(edits).on(model):
        return difference(logits_of(model, clean), clean) - base


@pytest.mark.parametrize("mlps", ["live", "frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-eager", "gemma2", "neox", "qwen3"])
def test_path_patching_equals_four_passes(kind: str, mlps: str) -> None:
    model = tiny(kind)
    pairs = random_pairs(2)
    texts = ["L1H1.q", "L2H1.k", "L2H0.v"]
    receivers = [Receiver.parse(t) for t in texts]
    scores = path_effects(model, pairs, texts, mlps=mlps)
    assert np.abs(scores.values).max() > 1e-2
    for i, pair in enumerate(pairs):
        for j, sender in list(enumerate(scores.heads))[::3]:
            want = four_passes(model, pair, sender, receivers, mlps=mlps == "frozen")
            assert scores.per_example[i, j] == pytest.approx(want, abs=3e-4)
    np.testing.assert_array_equal(scores.per_example[:, 8:], 0)  # no receiver above layer 2


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_paths_to_the_logits_are_direct_effects(kind: str) -> None:
    model, pairs = tiny(kind), random_pairs(2)
    for mlps in ("live", "frozen"):
        paths = path_effects(model, pairs, mlps=mlps)
        direct = direct_effects(model, pairs, mlps=mlps)
        np.testing.assert_allclose(paths.per_example, direct.per_example, atol=1e-4)


def test_norms_are_read_off() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LayerNorm(32)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    found = norm_of(layer, 32)
    assert found.centred and found.bias is not None
    torch.testing.assert_close(found.gain, layer.weight.detach(), rtol=1e-3, atol=1e-4)
    x = torch.randn(3, 32)
    want = (x.var(-1, unbiased=False) + 1e-5).rsqrt()
    with torch.no_grad():
        torch.testing.assert_close(scale_at(found, layer, x), want, rtol=1e-3, atol=1e-4)
    gemma = tiny("gemma2").hf.model.norm
    found = norm_of(gemma, 32)
    assert not found.centred and found.bias is None
    torch.testing.assert_close(found.gain, 1 + gemma.weight.detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(SiteError, match="no gain"):
        norm_of(torch.nn.Softmax(-1), 32)


def test_bad_input() -> None:
    model, pairs = tiny("llama"), random_pairs(1)
    with pytest.raises(InputError, match="frozen or live"):
        direct_effects(model, pairs, mlps="dead")
    with pytest.raises(InputError, match="live or frozen"):
        path_effects(model, pairs, mlps="dead")
    with pytest.raises(InputError, match="live or frozen"):
        edge_effects(model, pairs, mlps="dead")
    with pytest.raises(InputError, match="noise or denoise"):
        direct_effects(model, pairs, direction="up")
    with pytest.raises(InputError, match="linear"):
        logit_attribution(model, pairs, metric="prob")
    with pytest.raises(SiteError, match="rescales"):
        logit_attribution(tiny("gemma2"), pairs)
    with pytest.raises(InputError, match="a receiver is written"):
        path_effects(model, pairs, "L1H1.z")
    with pytest.raises(InputError, match="either 'logits' or inputs"):
        path_effects(model, pairs, "logits,L1H1.q")
    with pytest.raises(HeadIdError, match="outside this model"):
        path_effects(model, pairs, "L9H1.q")
    with pytest.raises(HeadIdError, match="key-value heads 0 to 1"):
        path_effects(model, pairs, "L1H3.k")
    with pytest.raises(InputError, match="not reached"):
        path_effects(tiny("bloom"), pairs, "L1H1.q")
