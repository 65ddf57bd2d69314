"""The doctor: holds on healthy models, and each check fails on a model broken for it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from reference import fresh, fused, handle, opaque, registered
from torch import Tensor, nn

from interp.doctor import Report
from interp.errors import DoctorError
from interp.model import Model
from interp.seam import kernel

SAME = "output with reading equals output without, bit for bit"
AFTER = "output afterwards is unchanged"
CALLS = "every attention layer called as often as expected"
SUMS = "pattern rows sum to one"
SINKS = "pattern rows sum to at most one (learned sinks)"
Z = "pattern @ v equals z"
HEADS = "heads through W_O plus bias equal attention output"
FUTURE = "no mass on later tokens (causal layers)"
PADDING = "no mass on padding"
LSE = "kernel's log-sum-exp equals the scores'"
APPENDED = "columns appended to v give pattern @ columns"
EVERY = {SAME, AFTER, CALLS, SUMS, Z, HEADS, FUTURE, PADDING, LSE, APPENDED}


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    with registered("opaque", opaque, "eager"), registered("fused", fused, "flash_attention_2"):
        yield


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.ok is False}


def held(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.ok}


@pytest.mark.parametrize(
    ("family", "attn"),
    [
        ("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("llama", "opaque"),
        ("llama", "fused"), ("llama-head8", "sdpa"), ("mistral", "sdpa"), ("mistral", "fused"),
        ("gemma2", "eager"), ("gemma2", "opaque"), ("gpt-oss", "eager"), ("gpt-oss", "opaque"),
        ("bloom", ""), ("t5", "sdpa"), ("t5", "opaque"), ("deepseek-v2", "sdpa"),
        ("deepseek-v3", "eager"), ("bert", "sdpa"), ("vit", "sdpa"),
    ],
)  # fmt: skip
def test_healthy_models_pass(family: str, attn: str) -> None:
    report = handle(family, attn).doctor()
    assert report.ok and not failed(report), str(report)
    report.raise_if_failed()
    assert {SAME, AFTER, CALLS, HEADS} <= held(report)
    assert (SINKS if family == "gpt-oss" else SUMS) in held(report)
    assert (Z in held(report)) == (family != "bloom")
    assert (FUTURE in held(report)) == (family not in ("bert", "vit"))
    assert (PADDING in held(report)) == (family != "vit")
    assert "all checks hold" in str(report) and not report.unreached


def test_every_check_runs_where_the_kernel_is_the_fast_one() -> None:
    report = handle("llama", "sdpa").doctor()
    assert held(report) == EVERY
    assert all(c.worst is not None for c in report.checks if c.limit is not None)
    assert {how for _, _, how in report.layers.values()} == {"kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass(dtype: torch.dtype) -> None:
    report = Model(fresh("llama", "sdpa").to(dtype), name="other").doctor()
    assert report.ok, str(report)


# Broken models ----------------------------------------------------------------------------------


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, share: float = 1
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    p = torch.softmax(q @ k.mT * scaling + mask, -1) * share
    return (p @ v).transpose(1, 2), p


def wrong_scale(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    return _attend(module, q, k, v, mask, 1.01 * kw["scaling"])[0], None


def wrong_values(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    z, p = _attend(module, q, k, v, mask, kw["scaling"])
    return z.roll(1, dims=2), p


def wrong_sum(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    return _attend(module, q, k, v, mask, kw["scaling"], 1.001)


def sees_the_next_token(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    mask = mask.clone()
    mask.diagonal(1, dim1=-2, dim2=-1)[:] = mask.diagonal(0, dim1=-2, dim2=-1)[..., :-1]
    # Padding stays hidden from real rows: the last real token does not look ahead.
    mask[1, :, -4, -3] = torch.finfo(mask.dtype).min
    return _attend(module, q, k, v, mask, kw["scaling"])


def sees_the_next_token_later(*args: Any, **kw: Any) -> Any:
    """Only in the last layer."""
    module, q, k, v, mask = args
    if module.layer_idx == 0:
        return _attend(module, q, k, v, mask, kw["scaling"])
    return sees_the_next_token(*args, **kw)


def sees_padding(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    return _attend(module, q, k, v, torch.zeros_like(mask), kw["scaling"])


@pytest.mark.parametrize(
    ("family", "function", "expected"),
    [
        ("llama", wrong_scale, {Z}),
        ("llama", wrong_values, {Z}),
        ("llama", wrong_sum, {SUMS}),
        ("gpt-oss", wrong_sum, {SINKS}),
        ("llama", sees_the_next_token, {FUTURE}),
        ("llama", sees_the_next_token_later, {FUTURE}),
        ("bert", sees_padding, {PADDING}),
    ],
)
def test_a_broken_attention_is_named(
    family: str, function: Callable[..., Any], expected: set[str]
) -> None:
    hf = fresh(family, "eager")
    model = Model(hf, name="broken")
    assert model.doctor().ok
    with registered("broken", function, "eager"):
        hf.set_attn_implementation("broken")
        report = model.doctor()
        with pytest.raises(DoctorError, match="readings of broken would not be true"):
            model.check()
    assert failed(report) == expected, str(report)


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.self_attn.o_proj"])
def test_nan_in_the_weights_are_named(where: str) -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="nan")
    assert model.towers
    with torch.no_grad():
        hf.model.get_submodule(where).weight[:] = float("nan")
    report = model.doctor()
    assert {SAME, AFTER} <= failed(report)
    assert "NaN in the weights" in str(report) and "FAILED" in str(report)
    with pytest.raises(DoctorError, match="NaN"):
        report.raise_if_failed()


class Bent(nn.Linear):
    """An output projection that is not linear in its heads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * x.square().sum(-1, keepdim=True)


def test_a_projection_that_mixes_heads_is_named() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="bent")
    assert model.towers
    hf.model.layers[1].self_attn.o_proj.__class__ = Bent
    report = model.doctor()
    assert failed(report) == {HEADS}
    assert "model.layers.1.self_attn.o_proj" in next(c.note for c in report.checks if not c.ok)


def test_a_wrong_split_of_w_o_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.w_o
    monkeypatch.setattr(Model, "w_o", lambda self, layer: original(self, layer).roll(1, 0))
    assert failed(Model(fresh("gpt2", "sdpa"), name="split").doctor()) == {HEADS}


def test_a_bias_forgotten_is_named() -> None:
    """GPT-2's projection has one; a copy of it that its class adds twice does not pass."""

    class Twice(type(fresh("gpt2").transformer.h[0].attn.c_proj)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.bias

    hf = fresh("gpt2", "sdpa")
    model = Model(hf, name="twice")
    assert model.towers
    hf.transformer.h[0].attn.c_proj.__class__ = Twice
    assert HEADS in failed(model.doctor())


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("z", {SAME}),
        ("lse", {LSE}),
        ("first lse", {LSE}),
        ("nan lse", {LSE}),
        ("extra", {APPENDED}),
    ],
)
def test_a_kernel_that_lies_is_named(
    what: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN or a large gap in one layer must not be forgotten over a later good one."""
    model = Model(fresh("llama", "sdpa"), name="lies")
    assert model.towers
    honest = kernel.flash
    calls = []

    def lying(*args: Any) -> Any:
        z, lse, extras = honest(*args)
        if args[0].shape[1] > 1:  # not the trial run on one head
            calls.append(what)
            if what == "z":
                z = z * (1 + 2**-22)
            if what == "lse" or (what == "first lse" and len(calls) == 1):
                lse = lse + 1e-3
            if what == "nan lse" and len(calls) == 1:
                lse = lse * float("nan")
            if what == "extra":
                extras = [None if x is None else x * 1.001 for x in extras]
        return z, lse, extras

    monkeypatch.setattr(kernel, "flash", lying)
    report = model.doctor()
    assert calls and failed(report) == expected, str(report)


def test_a_layer_left_out_or_run_twice_is_named() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="odd")
    assert model.towers
    layers = hf.model.layers
    hf.config.num_hidden_layers = 1
    assert failed(model.doctor()) == {CALLS}
    hf.config.num_hidden_layers = 2
    hf.config.use_cache = False
    hf.model.layers = nn.ModuleList([layers[0], layers[1], layers[1]])
    hf.config.num_hidden_layers = 3
    hf.config.layer_types = None
    report = model.doctor()
    assert failed(report) == {CALLS}
    assert "1 of 2" in next(c.note for c in report.checks if c.ok is False)


def test_a_model_that_remembers_is_named() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="remembers")
    assert model.towers
    count = [0]

    def drift(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        count[0] += 1
        return out + 1e-3 * (count[0] > 2)

    with ExitStack() as stack:
        stack.callback(hf.model.embed_tokens.register_forward_hook(drift).remove)
        assert failed(model.doctor()) == {AFTER}


def test_check_looks_once_and_remembers() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="once")
    model.check()
    forwards = []
    hook = hf.register_forward_hook(lambda *_: forwards.append(1))
    model.check()
    hook.remove()
    assert not forwards


def test_the_users_random_numbers_are_left_alone() -> None:
    model = handle("llama", "sdpa")
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    model.doctor()
    assert torch.equal(torch.rand(3), want)
