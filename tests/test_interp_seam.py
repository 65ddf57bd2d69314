"""The seam: every bit of the output kept, nothing left behind, any nesting and closing order."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from reference import batch_of, fresh, fused, handle, opaque, registered
from test_interp_engine import READINGS
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp import load
from interp import readings as rd
from interp.engine import read, read_with_output
from interp.model import Model
from interp.prompts import Prompt
from interp.seam import kernel
from interp.seam.calls import AttnCall

KINDS = [
    ("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("llama", "eager"),
    ("llama", "opaque"), ("llama", "fused"), ("llama-head8", "sdpa"), ("mistral", "sdpa"),
    ("mistral", "fused"), ("gemma2", "eager"), ("gpt-oss", "eager"), ("bloom", ""),
    ("deepseek-v3", "sdpa"), ("deepseek-v2", "eager"), ("bert", "sdpa"), ("t5", "sdpa"),
    ("t5", "eager"),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    with registered("opaque", opaque, "eager"), registered("fused", fused, "flash_attention_2"):
        yield


def traces(hf: nn.Module) -> dict[str, Any]:
    """Everything that a seam touches: hooks of every module, the interfaces, the configuration."""
    hooks = {
        f"{name}.{kind}": tuple(vars(module)[kind].items())
        for name, module in hf.named_modules()
        for kind in vars(module)
        if ("hooks" in kind) and isinstance(vars(module)[kind], dict)
    }
    flags = {
        name: (module.training, getattr(module, "gradient_checkpointing", None))
        for name, module in hf.named_modules()
    }
    return {
        "hooks": hooks,
        "forwards": {n: m.forward for n, m in hf.named_modules() if "forward" in vars(m)},
        "flags": flags,
        "grads": {n: (p.requires_grad, p.grad is None) for n, p in hf.named_parameters()},
        "local": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "global": dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        "masks": dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
        "implementation": hf.config._attn_implementation,
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "config": hf.config.to_dict(),
    }


def logits(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def inputs_of(family: str, side: str = "right") -> Any:
    return batch_of((20, 13), side, decoder=(11, 9) if family == "t5" else ())


def run(model: Model) -> Tensor:
    return logits(model.forward(inputs_of(model.name).inputs()))


# Every bit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attn"), KINDS)
def test_output_keeps_every_bit_while_read(family: str, attn: str, side: str) -> None:
    model = handle(family, attn)
    batch = inputs_of(family, side)
    before = traces(model.hf)
    plain = logits(model.forward(batch.inputs()))
    tower = next(iter(model.towers))
    some = {n: r for n, r in READINGS.items() if not isinstance(r, rd.ValueNorm)}
    for wanted in (some, {"columns": rd.Distance()}, {"top": rd.TopKey("late")}):
        _, output = read_with_output(model, batch, wanted, tower=tower)
        assert torch.equal(logits(output), plain)
    assert torch.equal(logits(model.forward(batch.inputs())), plain)
    assert traces(model.hf) == before


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130, 257, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_at_every_length(n: int, dtype: torch.dtype) -> None:
    model = Model(fresh("llama", "sdpa").to(dtype), name="llama")
    ids = torch.randint(2, 90, (1, n), generator=torch.Generator().manual_seed(n))
    plain = model.forward({"input_ids": ids}).logits
    wide = torch.rand(1, n, 11, generator=torch.Generator().manual_seed(0))
    calls: list[AttnCall] = []
    with model.observe(calls.append, columns=lambda v: wide):
        assert torch.equal(model.forward({"input_ids": ids}).logits, plain)
    assert len(calls) == 2
    if n in (64, 130) and dtype == torch.float32:
        assert all(call.extra is not None for call in calls)


def _placed(gen: torch.Generator, heads: int, n: int, d: int, style: int) -> Tensor:
    """A tensor [1, head, n, d] laid out as models do, or (styles 3 on) as views may be."""
    if style == 0:
        return torch.randn(1, heads, n, d, generator=gen)
    if style == 1:
        return torch.randn(1, n, heads, d, generator=gen).transpose(1, 2)
    x = torch.randn(1, n, 3 * heads * d + 8, generator=gen)
    at = {2: heads * d, 3: 1, 4: 3, 5: 8}[style]
    return x[..., at : at + heads * d].unflatten(-1, (heads, d)).transpose(1, 2)


def test_columns_are_appended_only_where_no_layout_changes_a_bit() -> None:
    """Shapes around the kernel's blocks, tensors at even and odd places in memory."""
    pick = random.Random(0)
    gen = torch.Generator().manual_seed(0)
    used = 0
    for _ in range(600):
        d = pick.choice([8, 12, 16, 24, 32, 64, 80, 128])
        n = pick.choice([5, 9, 17, 31, 33, 64, 65, 66, 67, 70, 97, 129, 193, 194, 257, 258])
        style, heads, width = pick.randrange(6), pick.choice([1, 2, 3]), pick.choice([1, 3, 8])
        q, k, v = (_placed(gen, heads, n, d, style) for _ in range(3))
        columns = torch.rand(1, n, width, generator=gen)
        plain, lse, _ = kernel.flash(q, k, v, None, True, d**-0.5, [])
        out, same, _ = kernel.flash(q, k, v, None, True, d**-0.5, [columns])
        equal = torch.equal(plain, out) and torch.equal(lse, same)
        shape = (d, width, n, n, True, False, torch.float32, torch.get_num_threads())
        if kernel.in_whole_vectors(q, k, v) and kernel.appending_keeps_bits(*shape):
            used += 1
            assert equal, (d, n, style, heads, width)
    assert used > 100


def test_gradients_keep_every_bit() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="llama")
    batch = batch_of((20, 13))
    assert model.towers

    def grads() -> list[Tensor]:
        hf.zero_grad()
        hf(**batch.inputs()).logits.square().mean().backward()
        return [p.grad.clone() for p in hf.parameters()]

    plain = grads()
    with model.observe(lambda call: None, columns=lambda v: torch.ones(2, 20, 3)):
        watched = grads()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    hf.zero_grad()


# Nothing left ---------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Stands in for a user's Ctrl-C."""


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted, GeneratorExit])
@pytest.mark.parametrize("site", ["call", "columns", "output", "outside"])
def test_nothing_is_left_after_an_error(family: str, error: type, site: str) -> None:
    model = handle(family, "" if family == "bloom" else "sdpa")
    plain = run(model)
    before = traces(model.hf)
    reached = []

    def fail(*_: Any) -> None:
        reached.append(site)
        raise error("on purpose")

    def idle(*_: Any) -> None:
        return None

    columns = fail if site == "columns" and family != "bloom" else None
    with pytest.raises(error):
        with (
            model.observe(fail if site == "call" else idle, columns=columns),
            model.observe_output(fail if site == "output" else idle),
        ):
            run(model)
            fail()
    assert len(reached) == 1
    assert traces(model.hf) == before
    assert torch.equal(run(model), plain)


def test_an_error_while_opening_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = handle("llama", "sdpa")
    assert model.towers
    before = traces(model.hf)
    from interp.seam import interface

    made: list[object] = []

    class Second(interface._Wrapper):
        def __init__(self, *args: Any) -> None:
            if made:
                raise MemoryError
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(interface, "_Wrapper", Second)
    with pytest.raises(MemoryError):
        with model.observe(lambda call: None):
            pass
    monkeypatch.undo()
    assert made and traces(model.hf) == before


def test_finding_the_structure_leaves_nothing_and_needs_no_gradient() -> None:
    for family in ("llama", "bloom", "t5", "bert"):
        hf = fresh(family)
        before = traces(hf)
        with torch.no_grad():
            assert Model(hf, name=family).towers
        assert traces(hf) == before, family


def test_training_mode_and_checkpointing_are_untouched() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="llama")
    assert model.towers
    hf.train()
    hf.gradient_checkpointing_enable()
    before = traces(hf)
    with torch.enable_grad():
        read(model, batch_of((12, 12)), {"x": rd.Entropy()})
    assert traces(hf) == before
    assert hf.training and hf.model.gradient_checkpointing


def test_a_function_of_the_users_own_is_given_back() -> None:
    """An implementation registered over "sdpa" in the local table is run, and stays."""
    calls = []

    def own(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, *args, **kwargs
        )

    model = handle("llama", "sdpa")
    assert model.towers
    ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] = own
    try:
        read(model, batch_of((12,)), {"x": rd.Entropy()})
        assert len(calls) == 2
        assert ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"]


# Nesting, order, threads ------------------------------------------------------------------------


def heard(into: list[tuple[str, str]], who: str) -> Callable[[AttnCall], None]:
    return lambda call: into.append((who, call.name))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_nested_seams_all_see_the_same_call(family: str) -> None:
    model = handle(family, "" if family == "bloom" else "sdpa")
    plain = run(model)
    calls: dict[str, list[AttnCall]] = {"a": [], "b": [], "c": []}
    wide = {"a": torch.rand(2, 20, 2), "b": torch.rand(2, 20, 5)}
    with (
        model.observe(calls["a"].append, columns=lambda v: wide["a"]),
        model.observe(calls["b"].append, columns=lambda v: wide["b"]),
        model.observe(calls["c"].append),
    ):
        assert torch.equal(run(model), plain)
    names = [c.name for c in calls["a"]]
    assert len(names) == 2
    for who in "bc":
        assert [c.name for c in calls[who]] == names
        for one, other in zip(calls["a"], calls[who], strict=True):
            assert torch.equal(one.z, other.z)
    if family == "llama":
        for who in "ab":
            for call in calls[who]:
                p = torch.stack([call.rows(b, slice(0, 4), slice(0, 20)) for b in range(2)])
                want = torch.einsum("bhqk,bkc->bqhc", p, wide[who])
                torch.testing.assert_close(call.extra, want, atol=1e-5, rtol=0)
        assert calls["c"][0].extra is None and calls["c"][0].lse is not None


FAMILY_PAIRS = [("llama", "mistral"), ("llama", "llama"), ("bloom", "llama"), ("bloom", "bloom")]


@pytest.mark.parametrize("families", FAMILY_PAIRS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_seams_close_in_any_order(families: tuple[str, str], order: tuple[int, ...]) -> None:
    """Of three seams on two models, each hears its own model for as long as it is open."""
    models = []
    for i in (0, 1, 0):
        family = families[i]
        models.append(handle(family, "" if family == "bloom" else "sdpa"))
    if families[0] == families[1]:
        models[1] = Model(fresh(families[1], seed=5), name=families[1])
        assert models[1].towers
    before = [traces(m.hf) for m in models]
    plain = [run(m) for m in models]
    log: list[tuple[str, str]] = []
    seams = [m.observe(heard(log, str(i))) for i, m in enumerate(models)]
    for seam in seams:
        seam.__enter__()
    still = {0, 1, 2}
    for closing in (None, *order):
        if closing is not None:
            seams[closing].__exit__(None, None, None)
            still.discard(closing)
        for i, model in enumerate(models):
            log.clear()
            assert torch.equal(run(model), plain[i])
            listening = {j for j in still if models[j] is model}
            assert {int(who) for who, _ in log} == listening, (closing, i)
            assert len(log) == 2 * len(listening)
    assert [traces(m.hf) for m in models] == before


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_an_observer_computes_is_not_heard(family: str) -> None:
    """Neither by its own seam nor by others: a softmax of its own is no pattern of the model's."""
    model = handle(family, "" if family == "bloom" else "sdpa")
    ids = {"input_ids": batch_of((20,)).input_ids}
    quiet: list[AttnCall] = []
    with model.observe(quiet.append):
        plain = model.forward(ids).logits
    calls: dict[str, list[AttnCall]] = {"outer": [], "inner": []}

    def busy(who: str) -> Callable[[AttnCall], None]:
        def observer(call: AttnCall) -> None:
            x = torch.randn(1, 4, 20, 20)
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            torch.softmax(x, -1)
            calls[who].append(call)

        return observer

    with model.observe(busy("outer")), model.observe(busy("inner")):
        assert torch.equal(model.forward(ids).logits, plain)
    for who in calls:
        assert len(calls[who]) == 2
        for one, other in zip(calls[who], quiet, strict=True):
            every = slice(0, 4), slice(0, 20)
            assert torch.equal(one.rows(0, *every), other.rows(0, *every)), who


@pytest.mark.parametrize("families", [("llama", "gpt2"), ("bloom", "bloom")])
def test_one_model_is_read_from_inside_an_observer_of_another(families: tuple[str, str]) -> None:
    outer = handle(families[0], "" if families[0] == "bloom" else "sdpa")
    inner = Model(fresh(families[1], seed=3), name=families[1])
    batch = batch_of((20, 13))
    alone = read(inner, batch, {"x": rd.Entropy()})["x"].values
    plain, direct = run(outer), read(outer, batch, {"x": rd.Entropy()})["x"].values
    found, rows = [], []

    def observer(call: AttnCall) -> None:
        found.append(read(inner, batch, {"x": rd.Entropy()})["x"].values)
        p = call.rows(0, slice(0, 4), slice(0, 20))
        rows.append(-torch.special.xlogy(p, p).sum(-1).mean(-1))

    with outer.observe(observer):
        assert torch.equal(run(outer), plain)
    assert len(found) == 2 and all(torch.equal(x, alone) for x in found)
    torch.testing.assert_close(torch.stack(rows), direct[0], atol=1e-5, rtol=0)


def test_a_seam_abandoned_half_way_is_closed_with_its_generator() -> None:
    model = handle("llama", "sdpa")
    before = traces(model.hf)

    def steps() -> Iterator[int]:
        with model.observe(lambda call: None):
            yield 1
            yield 2

    walk = steps()
    next(walk)
    assert traces(model.hf) != before
    walk.close()
    assert traces(model.hf) == before


def test_threads_read_their_own_models() -> None:
    made = [Model(fresh("llama", "sdpa", seed=i), name="llama") for i in range(3)]
    batch = batch_of((20, 13))
    wanted = {"d": rd.Distance(), "e": rd.Entropy(), "s": rd.SpanMass("bos")}
    alone = [read(m, batch, wanted) for m in made]
    before = traces(made[0].hf)
    found: list[Any] = [None] * 3
    start = threading.Barrier(3)

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            found[i] = read(made[i], batch, wanted)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, found, strict=True):
        for name, answer in one.items():
            torch.testing.assert_close(answer.values, other[name].values, atol=1e-6, rtol=0)
    assert traces(made[0].hf) == before


# What is seen and replaced ----------------------------------------------------------------------


def test_a_module_called_twice_is_shown_twice() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="llama")
    assert model.towers
    first = hf.model.layers[0]
    hf.model.layers = nn.ModuleList([first, first])
    calls: list[AttnCall] = []
    with model.observe(calls.append):
        model.forward({**batch_of((20,)).inputs(), "use_cache": False})
    assert [c.name for c in calls] == ["model.layers.0.self_attn"] * 2
    assert not torch.equal(calls[0].z, calls[1].z)


def test_a_call_that_fails_half_way_is_not_heard_by_the_next() -> None:
    """Softmaxes of a forward that broke off must not be taken for those of the next."""
    hf = fresh("bloom")
    model = Model(hf, name="bloom")
    assert model.towers
    plain = run(model)
    calls: list[AttnCall] = []
    dense = hf.transformer.h[1].self_attention.dense
    with model.observe(calls.append):
        broken = dense.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            run(model)
        broken.remove()
        calls.clear()
        assert torch.equal(run(model), plain)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "deepseek-v3", "gpt-oss"])
def test_replacing_z_equals_replacing_the_projections_input(family: str) -> None:
    model = handle(family)
    plain = run(model)
    layer = model.towers["text"].layers[0]

    def cut(call: AttnCall) -> Tensor | None:
        if call.name != layer.name:
            return None
        z = call.z.clone()
        z[:, :, 1] = 0
        return z

    def cut_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        x[..., layer.d_v : 2 * layer.d_v] = 0
        return (x, *args[1:])

    def cut_output(seen: Any, site: Tensor) -> Tensor | None:
        if seen.name != layer.name:
            return None
        new = site.clone()
        new[:, :, 1] = 0
        return new

    projection = model.hf.get_submodule(layer.projection)
    hook = projection.register_forward_pre_hook(cut_input)
    want = run(model)
    hook.remove()
    with model.observe(cut):
        by_call = run(model)
    with model.observe_output(cut_output):
        by_output = run(model)
    assert not torch.equal(want, plain)
    assert torch.equal(by_call, want) and torch.equal(by_output, want)
    assert torch.equal(run(model), plain)


def test_an_inner_seam_sees_what_an_outer_one_wrote() -> None:
    """So a reading made under an edit is a reading of the edited model."""
    model = handle("llama", "sdpa")
    seen: dict[str, list[AttnCall]] = {"outer": [], "inner": []}

    def zero(call: AttnCall) -> Tensor:
        seen["outer"].append(call)
        return torch.zeros_like(call.z)

    with model.observe(zero), model.observe(seen["inner"].append):
        run(model)
    assert len(seen["inner"]) == 2 and all(not c.z.any() for c in seen["inner"])
    assert len(seen["outer"]) == 2 and all(c.z.any() for c in seen["outer"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "bloom", "deepseek-v3"])
def test_heads_through_w_o_sum_to_the_projections_output(family: str) -> None:
    model = handle(family)
    for layer in model.structure.layers.values():
        projection = model.hf.get_submodule(layer.projection)
        weight = model.w_o(layer)
        assert weight.shape[:2] == (layer.n_heads, layer.d_v)
        gen = torch.Generator().manual_seed(0)
        z = torch.randn(3, layer.n_heads, layer.d_v, generator=gen)
        bias = getattr(projection, "bias", None)
        total = sum(z[:, h] @ weight[h] for h in range(layer.n_heads))
        total = total if bias is None else total + bias
        torch.testing.assert_close(total, projection(z.flatten(1)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "towers"),
    [
        ("gpt2", {"text": (4, 4, 16, True)}),
        ("llama", {"text": (4, 2, 16, True)}),
        ("gpt-oss", {"text": (4, 2, 16, True)}),
        ("deepseek-v3", {"text": (4, 4, 24, True)}),
        ("bert", {"text": (4, 4, 16, False)}),
        ("vit", {"vision": (4, 4, 16, False)}),
        ("bloom", {"text": (4, 4, 16, True)}),
        (
            "t5",
            {
                "text": (4, 4, 16, True),
                "encoder": (4, 4, 16, False),
                "cross": (4, 4, 16, False),
            },
        ),
    ],
)
def test_towers_are_found(family: str, towers: dict[str, tuple[int, int, int, bool]]) -> None:
    found = handle(family).towers
    assert found.keys() == towers.keys()
    for name, (heads, groups, d_v, causal) in towers.items():
        assert len(found[name].layers) == found[name].n_layers == 2
        for i, layer in enumerate(found[name].layers):
            assert (layer.n_heads, layer.n_kv_heads, layer.d_v) == (heads, groups, d_v)
            assert (layer.index, layer.tower, layer.calls) == (i, name, 1)
            assert layer.causal is causal and layer.cross is (name == "cross")
            assert layer.sinks is (family == "gpt-oss")
            assert layer.reached == ("functions" if family == "bloom" else "interface")


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mistral", "gemma2", "gpt-oss", "deepseek-v2", "t5", "bert"]
)
@pytest.mark.parametrize("attn", ["sdpa", "eager", "opaque"])
def test_rows_times_values_give_z(family: str, attn: str) -> None:
    """P·V = z for each call, from q and k alone where the kernel keeps its weights to itself."""
    if attn == "sdpa" and family in ("gemma2", "gpt-oss"):
        pytest.skip("the family has no sdpa")
    model = handle(family, attn)
    batch = inputs_of(family)
    seen: list[str] = []

    def check(call: AttnCall) -> None:
        seen.append(call.how)
        if call.name in {x.name for t in model.towers.values() for x in t.layers}:
            assert call.v is not None
            group = call.n_heads // call.v.shape[1]
            for h in range(call.n_heads):
                p = call.rows(0, slice(h, h + 1), slice(0, call.n_query))[0]
                z = p @ call.v[0, h // group]
                torch.testing.assert_close(z, call.z[0, :, h], atol=2e-5, rtol=1e-4)

    with model.observe(check):
        model.forward(batch.inputs())
    expected = {"eager": "pattern", "opaque": "recomputed"}.get(attn)
    if expected is None:
        expected = "recomputed" if family == "deepseek-v2" else "kernel"
    assert set(seen) == {expected}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("attn", ["sdpa", "eager", "fused"])
@pytest.mark.parametrize("cut", [1, 3, 19])
def test_a_cached_prefix_is_seen_as_keys(family: str, attn: str, cut: int) -> None:
    """The rest of a prompt run after its first tokens reads the same rows as the whole."""
    model = handle(family, attn)
    ids = batch_of((20,)).input_ids
    whole: list[AttnCall] = []
    with model.observe(whole.append):
        model.forward({"input_ids": ids})
    parts: list[AttnCall] = []
    with torch.no_grad():
        cache = model.hf(ids[:, :-cut], use_cache=True).past_key_values
        with model.observe(parts.append):
            model.hf(ids[:, -cut:], past_key_values=cache, use_cache=True)
    assert len(parts) == len(whole) == 2
    for part, full in zip(parts, whole, strict=True):
        got = part.rows(0, slice(0, 4), slice(0, cut))
        want = full.rows(0, slice(0, 4), slice(20 - cut, 20))[..., -part.n_key :]
        assert part.n_query == cut
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_many_seams_at_once_close_with_one_stack() -> None:
    model = handle("llama", "sdpa")
    before = traces(model.hf)
    log: list[tuple[str, str]] = []
    with ExitStack() as stack:
        for i in range(10):
            stack.enter_context(model.observe(heard(log, str(i))))
        run(model)
    assert len(log) == 20 and {who for who, _ in log} == set(map(str, range(10)))
    assert traces(model.hf) == before


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama", "bloom", "gptj"])
def test_left_padding_changes_no_position(family):
    """Learned positions above all: GPT-2's own forward counts the padding."""
    torch.manual_seed(0)
    name, sizes = {
        "gpt2": ("GPT2LMHead", {"n_embd": 32, "n_head": 4, "n_positions": 64}),
        "opt": ("OPTForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
        "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 32}),
        "llama": ("LlamaForCausalLM", {"intermediate_size": 32}),
        "bloom": ("BloomForCausalLM", {}),
        "gptj": ("GPTJForCausalLM", {"n_embd": 32, "n_head": 4, "rotary_dim": 4}),
    }[family]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, **sizes}
    if "n_embd" in sizes:
        sizes = {k: v for k, v in sizes.items() if k.startswith("n_") or k == "rotary_dim"}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=60, bos_token_id=1, eos_token_id=None, pad_token_id=0, **sizes
    )
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert name in type(hf).__name__
    model = load(hf)
    prompts = [Prompt(tuple(range(2, 2 + n))) for n in (5, 11, 8)]
    batch = model.batch(prompts, side="left")
    out = model.forward(batch.inputs()).logits[:, -1]
    for row, prompt in zip(out, prompts, strict=True):
        alone = hf(torch.tensor([prompt.tokens])).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
