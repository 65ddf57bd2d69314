"""Weights read off by probing against the parameters; scores against whole products."""

import numpy as np
import pytest
import torch
from patching_kit import tiny
from torch import Tensor

import interp
from interp.errors import HeadIdError, InputError, SiteError
from interp.headid import HeadId
from interp.zoo.planted_ioi import NAMES, ioi_pairs
from patching import Pairs, make_method
from patching.composition import (
    attention_weights,
    composition_scores,
    copying_scores,
    ov_circuit,
    qk_circuit,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def parameters(kind: str, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V, W_O [head, …] of a layer from its parameters, norm folded in; float64."""
    hf = tiny(kind).hf
    with torch.no_grad():
        if kind == "gpt2":
            block = hf.transformer.h[layer]
            q, k, v = block.attn.c_attn.weight.double().split(32, dim=1)
            o, gain = block.attn.c_proj.weight.double(), block.ln_1.weight.double()
            centre = torch.eye(32, dtype=torch.float64) - 1 / 32
        elif kind == "neox":
            block = hf.gpt_neox.layers[layer]
            fused = block.attention.query_key_value.weight.double().T.view(32, 4, 24)
            q, k, v = (x.reshape(32, 32) for x in fused.split(8, dim=2))
            o, gain = block.attention.dense.weight.double().T, block.input_layernorm.weight.double()
            centre = torch.eye(32, dtype=torch.float64) - 1 / 32
        else:
            block = hf.model.layers[layer]
            a = block.self_attn
            q, k, v, o = (
                getattr(a, f"{x}_proj").weight.double().T for x in ("q", "k", "v", "o")
            )  # fmt: skip
            gain = block.input_layernorm.weight.double()
            gain = 1 + gain if kind == "gemma2" else gain
            centre = torch.eye(32, dtype=torch.float64)

        def heads(w: Tensor) -> Tensor:
            w = centre @ (gain[:, None] * w)
            w = w.view(32, -1, 8).transpose(0, 1)
            return w.repeat_interleave(4 // w.shape[0], 0)

        return heads(q), heads(k), heads(v), o.reshape(4, 8, 32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "neox", "mistral"])
def test_weights_equal_the_parameters(kind: str) -> None:
    weights = attention_weights(tiny(kind))
    assert sorted(weights) == [0, 1, 2]
    for layer, w in weights.items():
        for got, want in zip((w.q, w.k, w.v, w.o), parameters(kind, layer), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_composition_equals_whole_products(kind: str) -> None:
    model = tiny(kind)
    weights = [parameters(kind, i) for i in range(3)]
    for name in ("q", "k", "v"):
        found = composition_scores(model, kind=name)
        for i, u in enumerate(found.heads):
            for j, v in enumerate(found.heads):
                if u.layer >= v.layer:
                    assert np.isnan(found.values[i, j])
                    continue
                writes = weights[u.layer][2][u.head] @ weights[u.layer][3][u.head]
                q, k, val, o = (x[v.head] for x in weights[v.layer])
                reads = {"q": q @ k.T, "k": k @ q.T, "v": val @ o}[name]
                want = (writes @ reads).norm() / (writes.norm() * reads.norm())
                assert found.values[i, j] == pytest.approx(float(want), abs=1e-3)
        assert [x[2] for x in found.top(3)] == sorted(found.values[~np.isnan(found.values)])[:-4:-1]


def test_circuits_and_copying_equal_whole_products() -> None:
    model = tiny("llama")
    with torch.no_grad():
        embed = model.hf.model.embed_tokens.weight.double()
        after = (model.hf.model.norm.weight[:, None] * model.hf.lm_head.weight.T).double()
    scores = copying_scores(model)
    for head in (HeadId(0, 1), HeadId(2, 3)):
        q, k, v, o = (x[head.head] for x in parameters("llama", head.layer))
        ov = embed @ v @ o @ after
        torch.testing.assert_close(ov_circuit(model, head), ov, rtol=1e-3, atol=1e-2)
        qk = embed @ q @ k.T @ embed.T
        torch.testing.assert_close(qk_circuit(model, str(head)), qk, rtol=1e-3, atol=1e-2)
        values = torch.linalg.eigvals(ov)
        want = float(values.real.sum() / values.abs().sum())
        assert scores[head] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_planted_heads_copy_and_compose(name: str) -> None:
    model = interp.load(name)
    found = make_method("copying").scores(Pairs(model, ioi_pairs(2)))
    value = dict(zip(map(str, found.heads), found.values, strict=True))
    for head, sign in {"L2H0": 1, "L2H1": 1, "L3H0": 1, "L2H2": -1}.items():
        assert value[head] == pytest.approx(sign, abs=1e-4)  # the negative mover suppresses
    circuit = ov_circuit(model, "2.0")[list(NAMES)][:, list(NAMES)]
    want = 6 * torch.eye(len(NAMES), dtype=torch.float64)
    torch.testing.assert_close(circuit, want, rtol=0, atol=1e-3)
    pairs = {(str(a), str(b)) for a, b, _ in composition_scores(model, kind="q").top(4)}
    assert {("L1H0", "L2H0"), ("L1H0", "L2H1"), ("L1H0", "L2H2")} <= pairs
    first, second, _ = composition_scores(model, kind="v").top(1)[0]
    assert (str(first), str(second)) == ("L0H0", "L1H0")


def test_what_is_not_linear_is_refused() -> None:
    with pytest.raises(SiteError, match="not linear"):
        composition_scores(tiny("qwen3"))
    with pytest.raises(SiteError, match="not reached"):
        attention_weights(tiny("bloom"))
    with pytest.raises(InputError, match="q, k or v"):
        composition_scores(tiny("llama"), kind="z")
    with pytest.raises(HeadIdError):
        ov_circuit(tiny("llama"), "8.0")
