"""Recipes on models against the same edits made by hand in a slow eager attention."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import fresh, handle, registered
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import interp
from interp import readings as rd
from interp.engine import read
from interp.errors import HeadIdError, InputError, ModelError, SiteError, SpanError
from interp.model import Model
from interp.prompts import Batch, Prompt
from interp.recipe import Edit, Gate, Positions, Recipe, Schedule, Where, span
from interp.zoo.planted_llama import class_prompts, planted_llama

EVERY = Positions.all()
LAST = Positions(prompt=(-1,), generated="all")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def prompts(seed: int = 0, lengths: tuple[int, ...] = (9, 12, 7)) -> list[Prompt]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for row, n in enumerate(lengths):
        tokens = torch.randint(3, 90, (n,), generator=g).tolist()
        at = 1 + row % 3
        out.append(Prompt(tuple(tokens), {"bos": ((0, 1),), "img": ((at, at + 3),)}, id=str(n)))
    return out


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(*heads: str, queries: Positions = EVERY, keys: Positions = EVERY) -> Where:
    return Where(heads=heads, queries=queries, keys=keys)


def generated(model: Model, batch: Batch, n: int = 4, **kw: Any) -> Tensor:
    """Logits [step, row, vocabulary] of greedy generation."""
    out = model.hf.generate(
        **batch.inputs(), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kw,
    )  # fmt: skip
    return torch.stack(out.logits)


@torch.no_grad()
def logits(model: Model, batch: Batch) -> Tensor:
    out = model.hf(**batch.inputs())
    real = batch.attention_mask.bool()
    return torch.where(real[..., None], out.logits, 0)


def hooks(hf: Any) -> list[Any]:
    kept = [
        [dict(getattr(m, name)) for name in vars(m) if "hook" in name and isinstance(
            getattr(m, name), dict
        )]
        for m in hf.modules()
    ]  # fmt: skip
    return [kept, dict(ALL_ATTENTION_FUNCTIONS._local_mapping), hf.config._attn_implementation]


# By hand ------------------------------------------------------------------------------------

Change = Callable[[Tensor, Tensor, float], Tensor]
"""Given one row over its visible keys, which of these are chosen, and the strength."""


def _proportional(a: Tensor, to: Tensor, mass: Tensor) -> Tensor:
    return a + mass * a * to / (a * to).sum() if bool((a * to).sum() > 0) else a


def _reweight(a: Tensor, k: Tensor, s: float) -> Tensor:
    new = torch.where(k, s * a, a)
    return new / new.sum() * a.sum()


def _move(a: Tensor, k: Tensor, s: float) -> Tensor:
    if not bool((a * ~k).sum() > 0):
        return a
    new = torch.where(k, s * a, a)
    return torch.where(k, new, new + (a.sum() - new.sum()) * a / (a * ~k).sum())


def _split(a: Tensor, k: Tensor, s: float) -> Tensor:
    pi = (a * k).sum() / a.sum()
    if not 0 < float(pi) < 1:
        return a
    return torch.where(k, a * pi ** (s - 1), a * (1 - pi**s) / (1 - pi))


def _override(a: Tensor, k: Tensor, s: float) -> Tensor:
    return (1 - s) * a + s * k * a.sum() / k.sum() if bool(k.any()) else a


SCORES: dict[str, tuple[Change, float]] = {
    "bias": (lambda a, k, s: a + s * k, 1.7),
    "temperature": (lambda a, k, s: a / s, 0.4),
    "uniform": (lambda a, k, s: a * (1 - s), 0.8),
    "knockout": (lambda a, k, s: a.masked_fill(k, -1e30), 1.0),
}
PATTERN: dict[str, tuple[Change, float]] = {
    "reweight": (_reweight, 5.0),
    "drop": (lambda a, k, s: torch.where(k, (1 - s) * a, a), 0.9),
    "move": (_move, 0.3),
    "split": (_split, 0.4),
    "override": (_override, 0.7),
}


def by_hand(
    units: list[tuple[int, int]], change: Change, s: float, site: str, rows: Tensor, keys: Tensor
) -> Callable[..., Any]:
    """Eager attention that changes rows of some heads one by one."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = kw["scaling"] if kw.get("scaling") else q.shape[-1] ** -0.5
        a = q @ k.transpose(-1, -2) * scale
        if kw.get("softcap"):
            a = torch.tanh(a / kw["softcap"]) * kw["softcap"]
        seen = torch.ones(a.shape, dtype=torch.bool)
        if mask is not None:
            seen = (mask > -1e30).expand(a.shape)
        elif a.shape[-2] > 1:
            seen = seen.tril()
        heads = [h for layer, h in units if layer == module.layer_idx]
        p = torch.zeros_like(a)
        sinks = kw.get("s_aux")
        for b, h, i in itertools.product(*map(range, a.shape[:3])):
            vis = seen[b, h, i]
            if not bool(vis.any()):
                continue
            row, chosen = a[b, h, i][vis], keys[b][vis]
            on = h in heads and bool(rows[b, i])
            if on and site == "scores":
                row = change(row, chosen, s)
            whole = row if sinks is None else torch.cat([row, sinks[h : h + 1]])
            row = torch.softmax(whole, 0)[: len(row)]
            if on and site == "pattern":
                row = change(row, chosen, s)
            p[b, h, i][vis] = row
        return (p @ v).transpose(1, 2).contiguous(), p

    return attention


def expected(
    family: str, batch: Batch, op: str, units: list[tuple[int, int]], rows: Tensor, keys: Tensor
) -> Tensor:
    site = "scores" if op in SCORES else "pattern"
    change, s = (SCORES | PATTERN)[op]
    hf = fresh(family, "eager")
    with registered("by-hand", by_hand(units, change, s, site, rows, keys), "eager"):
        hf.set_attn_implementation("by-hand")
        return logits(Model(hf, name=family), batch)


FAMILIES = ["llama", "gpt2", "mistral", "gemma2", "gpt-oss"]


@pytest.mark.parametrize("op", [*SCORES, *PATTERN])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_ops_equal_editing_by_hand(family: str, op: str) -> None:
    model = handle(family)
    batch = model.batch(prompts(lengths=(6, 8)), side="left")
    rows, keys = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    for b, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        rows[b, [offset + 4, offset + len(prompt) - 1]] = True
        for i in prompt.positions("img"):
            keys[b, offset + i] = True
    whole = op in ("temperature", "uniform")
    # Heads in no order, and more than one of a layer.
    where = at("1.3", "1.0", "0.2", queries=Positions(prompt=(4, -1)),
               keys=EVERY if whole else span("img"))  # fmt: skip
    recipe = Recipe(Edit(op, where, (SCORES | PATTERN)[op][1]))
    with recipe.on(model, spans=batch):
        got = logits(model, batch)
    want = expected(family, batch, op, [(1, 3), (1, 0), (0, 2)], rows, keys)
    assert float((want - logits(model, batch)).abs().max()) > 1e-3
    torch.testing.assert_close(got, want, **CLOSE)


VECTOR_OPS: dict[str, Edit] = {
    "zero": Edit("zero", at("1.2", "0.1")),
    "scale": Edit("scale", at("1.2", "0.1"), -2.5),
    "add": Edit("add", at("1.2", "0.1"), 1.5, tensors={"vector": noise(2, 16)}),
    "set": Edit("set", at("1.2", "0.1"), 0.6, tensors={"value": noise(2, 16)}),
    "affine": Edit(
        "affine", at("1.2", "0.1"), 0.7, tensors={"gain": noise(2, 16), "shift": noise(2, 16)}
    ),
    "project": Edit(
        "project",
        at("1.2", "0.1"),
        2.0,
        tensors={"basis": torch.linalg.qr(noise(2, 16, 3))[0]},
    ),
}
BY_HAND: dict[str, Callable[[Tensor, int], Tensor]] = {
    "zero": lambda x, i: torch.zeros_like(x),
    "scale": lambda x, i: -2.5 * x,
    "add": lambda x, i: x + 1.5 * noise(2, 16)[i],
    "set": lambda x, i: 0.4 * x + 0.6 * noise(2, 16)[i],
    "affine": lambda x, i: x * (1 + 0.7 * noise(2, 16)[i]) + 0.7 * noise(2, 16)[i],
    "project": lambda x, i: (
        x - 2 * sum((x @ u)[..., None] * u for u in torch.linalg.qr(noise(2, 16, 3))[0][i].T)
    ),
}


@pytest.mark.parametrize("op", list(VECTOR_OPS))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vector_ops_equal_editing_by_hand(family: str, op: str) -> None:
    model = handle(family)
    batch = model.batch(prompts(), side="left")
    removes = []
    for entry, (layer, head) in enumerate(((1, 2), (0, 1))):
        name = next(
            x.projection for x in model.tower("text").layers if x.index == layer
        )  # fmt: skip

        def hand(module: Any, args: Any, entry: int = entry, head: int = head) -> Any:
            x = args[0].clone()
            part = slice(16 * head, 16 * head + 16)
            x[..., part] = BY_HAND[op](x[..., part], entry)
            return (x,)

        removes.append(model.hf.get_submodule(name).register_forward_pre_hook(hand))
    want = logits(model, batch)
    for handle_ in removes:
        handle_.remove()
    with Recipe(VECTOR_OPS[op]).on(model):
        got = logits(model, batch)
    assert float((want - logits(model, batch)).abs().max()) > 1e-3
    torch.testing.assert_close(got, want, **CLOSE)


# Invariants ---------------------------------------------------------------------------------


def mixture(family: str) -> Recipe:
    """Many edits at once: on different sites, positions and steps, some sharing heads."""
    qkv = [] if family == "bloom" else [
        Edit("scale", at("1.0", queries=LAST), 2.0, site="q"),
        Edit("scale", at("1.0", keys=span("img")), 1.5, site="k"),
        Edit("add", at("0.1", keys=Positions(window=(2, 20))), 0.5, site="v",
             tensors={"vector": noise(1, 16)}),
    ]  # fmt: skip
    return Recipe([
        *qkv,
        Edit("zero", at("0.0", queries=Positions(generated=(0, 2)))),
        Edit("add", at("1.2", "0.1", queries=LAST), tensors={"vector": noise(2, 16)}),
        Edit("bias", at("0.2", "1.1", keys=span("img"), queries=Positions(generated="all")), 2.0),
        Edit("reweight", at("1.1", keys=span("bos", "img")), 3.0),
        Edit("knockout", at("0.3", keys=Positions(prompt=(1, 2)), queries=LAST)),
        Edit("temperature", at("1.3"), 0.5, schedule=Schedule("linear", 3)),
        Edit("move", at("1.3", keys=Positions(prompt=(-1,))), 0.2),
        Edit("scale", Where(layers=(1,), queries=Positions(window=(3, 30))), 1.4, site="resid"),
        Edit("scale", Where(layers=(0,)), 0.5, site="attn_out", schedule=Schedule("decay")),
        Edit("zero", at("1.0", queries=Positions(tokens=tuple(range(3, 50))))),
            Edit("bias", at("0.3", keys=Positions(tokens=tuple(range(3, 99, 2)))), 3.0),
    ])  # fmt: skip


SEVERAL = [*FAMILIES, "bloom"]


@pytest.mark.parametrize("family", SEVERAL)
def test_cache_padding_and_kernel_change_nothing(family: str) -> None:
    model, recipe = handle(family), mixture(family)
    batch = model.batch(prompts(), side="left")
    base = generated(model, batch)
    with recipe.on(model, spans=batch):
        cached = generated(model, batch)
        whole = generated(model, batch, use_cache=False)
    assert float((cached - base).abs().max()) > 0.1
    torch.testing.assert_close(whole, cached, **CLOSE)
    for row, prompt in enumerate(batch.prompts):
        alone = model.batch([prompt], side="left")
        with recipe.on(model, spans=[prompt]):
            torch.testing.assert_close(generated(model, alone)[:, 0], cached[:, row], **CLOSE)
    if family != "bloom":
        eager = handle(family, "eager")
        with recipe.on(eager, spans=batch):
            torch.testing.assert_close(generated(eager, batch), cached, **CLOSE)
    torch.testing.assert_close(generated(model, batch), base, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_right_padding_is_as_none(family: str) -> None:
    model, recipe = handle(family), mixture(family)
    batch = model.batch(prompts())
    with recipe.on(model, spans=batch):
        got = logits(model, batch)
    for row, prompt in enumerate(batch.prompts):
        with recipe.on(model, spans=[prompt]):
            alone = logits(model, model.batch([prompt]))
        torch.testing.assert_close(got[row, : len(prompt)], alone[0], **CLOSE)


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_other_caches_change_nothing(family: str, cache: dict[str, Any]) -> None:
    model, recipe = handle(family), mixture(family)
    batch = model.batch(prompts(), side="left")
    with recipe.on(model, spans=batch):
        want = generated(model, batch)
        torch.testing.assert_close(generated(model, batch, **cache), want, **CLOSE)


@pytest.mark.parametrize("gate", [False, True])
def test_beams_equal_no_cache_and_eager(gate: bool) -> None:
    model, eager = handle("llama"), handle("llama", "eager")
    batch = model.batch(prompts(), side="left")
    recipe = mixture("llama")
    if gate:
        axis = noise(64, seed=9)
        recipe += Recipe(Edit("scale", at("0.3"), 4.0, gate=Gate(axis, 1, 0.0, evaluate="step")))

    def beams(m: Model, **kw: Any) -> Any:
        return m.hf.generate(
            **batch.inputs(), max_new_tokens=6, min_new_tokens=6, num_beams=3, pad_token_id=0,
            num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **kw,
        )  # fmt: skip

    plain = beams(model)
    with recipe.on(model, spans=batch):
        got = beams(model)
        whole = beams(model, use_cache=False)
    with recipe.on(eager, spans=batch):
        other = beams(eager)
    assert not torch.equal(plain.sequences, got.sequences)
    # Beams did change places, so the test can see whether their history followed.
    assert any(i != j for row in got.beam_indices.tolist() for i, j in itertools.pairwise(row)
               if i >= 0 and j >= 0)  # fmt: skip
    for x in (whole, other):
        assert torch.equal(x.sequences, got.sequences)
        torch.testing.assert_close(x.sequences_scores, got.sequences_scores, **CLOSE)
    after = beams(model)
    assert torch.equal(after.sequences, plain.sequences)
    assert "reorder_cache" not in vars(got.past_key_values)


def test_sampled_returns_follow_their_prompt() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    kw: dict[str, Any] = {
        "max_new_tokens": 3, "min_new_tokens": 3, "num_return_sequences": 2, "do_sample": True,
        "top_k": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with mixture("llama").on(model, spans=batch):
        want = generated(model, batch, n=3)
        got = torch.stack(model.hf.generate(**batch.inputs(), **kw).logits)
    torch.testing.assert_close(got, want.repeat_interleave(2, 1), **CLOSE)


IDLE = {
    "scale": 1.0, "zero": 0.0, "add": 0.0, "set": 0.0, "affine": 0.0, "project": 0.0, "bias": 0.0,
    "temperature": 1.0, "uniform": 0.0, "knockout": 0.0, "reweight": 1.0, "drop": 0.0, "move": 1.0,
    "split": 1.0, "override": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("op", list(IDLE))
def test_neutral_strengths_change_nothing(op: str) -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    base = logits(model, batch)
    if op in VECTOR_OPS:
        edit = VECTOR_OPS[op]
    else:
        keys = EVERY if op in ("temperature", "uniform") else span("img")
        edit = Edit(op, at("0.1", "1.2", keys=keys))
    recipes = [Recipe(edit) * 0, Recipe(edit) * torch.tensor(0.0)]
    assert recipes[0].edits[0].strength == IDLE[op]
    with recipes[0].on(model, spans=batch):
        torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=0)
    with recipes[1].on(model, spans=batch):
        torch.testing.assert_close(logits(model, batch), base, **CLOSE)


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5", "gpt-oss"])
@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt, _Stop])
def test_nothing_is_left_behind(family: str, end: type[BaseException] | None) -> None:
    model = handle(family)
    batch = model.batch(prompts(), side="left")
    inputs = batch.inputs()
    if family == "t5":
        inputs["decoder_input_ids"] = torch.full((3, 2), 4)
    with torch.no_grad():
        base = model.hf(**inputs).logits
    before = hooks(model.hf)
    edits = list(mixture("bloom").edits)
    if family == "t5":
        edits = [
            Edit("bias", at("0.1", keys=Positions(window=(0, 1))), 2.0),
            Edit("zero", at("0.0")),
        ]
    recipe = Recipe([*edits, Edit("scale", Where(), 2.0, site="logits")])

    def fail(*_: Any) -> None:
        if end is not None:
            raise end("inside")

    last = [x.name for x in model.tower("text").layers][-1]
    broken = model.hf.get_submodule(last).register_forward_hook(fail)
    try:
        with recipe.on(model, spans=batch), Recipe(Edit("zero", at("1.1"))).on(model):
            assert hooks(model.hf) != before
            with torch.no_grad():
                changed = model.hf(**inputs).logits
            assert not torch.equal(changed, base)
    except (RuntimeError, KeyboardInterrupt, _Stop):
        assert end is not None
    finally:
        broken.remove()
    assert hooks(model.hf) == before
    with torch.no_grad():
        torch.testing.assert_close(model.hf(**inputs).logits, base, rtol=0, atol=0)


def test_a_recipe_that_cannot_be_switched_on_leaves_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = handle("llama")

    def broken(*args: Any, **kw: Any) -> Any:
        raise SiteError("not here")

    batch = model.batch(prompts(), side="left")
    before = hooks(model.hf)
    with Recipe(Edit("zero", at("0.1"))).on(model):
        want = logits(model, batch)
        with pytest.raises(HeadIdError), Recipe(Edit("zero", at("7.1"))).on(model):
            pass
        monkeypatch.setattr(model, "observe", broken)
        with pytest.raises(SiteError, match="not here"):
            with Recipe(Edit("temperature", at("1.1"), 0.5)).on(model):
                pass
        torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=0)
    assert hooks(model.hf) == before


def test_contexts_may_be_closed_in_any_order() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    before = hooks(model.hf)
    a, b = (Recipe(Edit("zero", at(h))).on(model) for h in ("0.1", "1.2"))
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    got = logits(model, batch)
    b.__exit__(None, None, None)
    with Recipe(Edit("zero", at("1.2"))).on(model):
        torch.testing.assert_close(got, logits(model, batch), rtol=0, atol=0)
    assert hooks(model.hf) == before


def test_nested_recipes_are_their_sum() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    a = Recipe([Edit("add", at("0.1"), tensors={"vector": noise(1, 16)}),
                Edit("bias", at("0.2", keys=span("img")), 1.0)])  # fmt: skip
    b = Recipe([Edit("scale", at("0.1"), 2.0),
                Edit("temperature", at("0.2"), 0.5)])  # fmt: skip
    with b.on(model, spans=batch), a.on(model):
        nested = logits(model, batch)
    with (b + a).on(model, spans=batch):
        torch.testing.assert_close(nested, logits(model, batch), rtol=0, atol=0)
    with (a + b).on(model, spans=batch):
        assert float((nested - logits(model, batch)).abs().max()) > 1e-3  # they do not commute


def test_nested_recipes_keep_their_own_spans() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    first = Recipe(Edit("zero", at("0.1", queries=span("img"))))
    second = Recipe(Edit("zero", at("1.1", queries=span("img"))))
    one = Recipe([Edit("zero", at("0.1", queries=Positions(window=(0, 2)))),
                  Edit("zero", at("1.1", queries=Positions(window=(4, 6))))])  # fmt: skip
    with first.on(model, spans={"img": (0, 2)}), second.on(model, spans={"img": [(4, 6)]}):
        got = logits(model, batch)
    with one.on(model):
        torch.testing.assert_close(got, logits(model, batch), rtol=0, atol=0)


def test_commuting_edits_may_change_places() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    edits = [Edit("zero", at("0.1")), Edit("temperature", at("0.2"), 0.4),
             Edit("drop", at("0.2", keys=span("img"))),
             Edit("scale", at("1.0"), 2.0, site="q")]  # fmt: skip
    answers = []
    for order in itertools.permutations(edits):
        with Recipe(order).on(model, spans=batch):
            answers.append(logits(model, batch))
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=0, atol=0)


def test_two_models_at_once_do_not_interfere() -> None:
    one, two = handle("llama"), Model(fresh("llama", seed=3), name="other")
    batch = one.batch(prompts(), side="left")
    a, b = mixture("llama"), Recipe([Edit("zero", at("1.1")), Edit("temperature", at("0.1"), 0.3)])
    alone = []
    for model, recipe in ((one, a), (two, b)):
        with recipe.on(model, spans=batch):
            alone.append(logits(model, batch))
    with a.on(one, spans=batch), b.on(two, spans=batch):
        torch.testing.assert_close(logits(one, batch), alone[0], rtol=0, atol=0)
        torch.testing.assert_close(logits(two, batch), alone[1], rtol=0, atol=0)
        torch.testing.assert_close(logits(one, batch), alone[0], rtol=0, atol=0)


def test_a_saved_recipe_gives_the_same_bits(tmp_path: Any) -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe = mixture("llama") + Recipe(
        Edit("scale", at("0.3"), torch.tensor([3.0]), gate=Gate(noise(64), 1, 0.0))
    )
    again = Recipe.load(recipe.save(tmp_path / "mix"))
    with recipe.on(model, spans=batch):
        want = generated(model, batch)
    with again.on(model, spans=batch):
        torch.testing.assert_close(generated(model, batch), want, rtol=0, atol=0)


# Strengths ----------------------------------------------------------------------------------


def test_a_strength_per_head_and_example_is_that_of_single_runs() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    s = torch.tensor([[0.0, 1.5, -2.0], [3.0, 0.5, 1.0]])
    for op, keys in (("scale", EVERY), ("bias", span("img"))):
        with Recipe(Edit(op, at("1.2", "0.3", keys=keys), s)).on(model, spans=batch):
            got = logits(model, batch)
        for row in range(3):
            edits = [Edit(op, at(h, keys=keys), float(s[i, row]))
                     for i, h in enumerate(("1.2", "0.3"))]  # fmt: skip
            with Recipe(edits).on(model, spans=batch):
                torch.testing.assert_close(got[row], logits(model, batch)[row], **CLOSE)
    with pytest.raises(InputError, match="3 examples; 2 are run"):
        with Recipe(Edit("scale", at("1.2", "0.3"), s)).on(model):
            logits(model, model.batch(prompts(lengths=(5, 5))))


def test_patching_with_values_of_another_run() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    other = model.batch(prompts(seed=1), side="left")
    seen = {}

    def keep(layer: Any, z: Tensor) -> None:
        seen[layer.index] = z.clone()

    with torch.no_grad(), model.observe_output(keep):
        model.hf(**other.inputs())
    values = torch.stack([seen[layer][:, :, h] for layer in (0, 1) for h in range(4)])
    heads = [f"{layer}.{h}" for layer in (0, 1) for h in range(4)]
    patch = Recipe(Edit("set", at(*heads), tensors={"value": values}))
    patched = {}
    with torch.no_grad(), patch.on(model), model.observe_output(
        lambda layer, z: patched.update({layer.index: z.clone()})
    ):  # fmt: skip
        model.hf(**batch.inputs())
    assert all(torch.equal(patched[i], seen[i]) for i in (0, 1))
    # Prompt positions only, while generating: values end where the prompt does.
    prompt = Recipe(
        Edit("set", at(*heads, queries=Positions(prompt="all")), tensors={"value": values})
    )
    with prompt.on(model):
        want = generated(model, batch)
        torch.testing.assert_close(generated(model, batch, use_cache=False), want, **CLOSE)
        alone = model.batch([batch.prompts[1]])
        with pytest.raises(InputError, match="3 examples; 1 are run"):
            logits(model, alone)
    with patch.on(model), pytest.raises(InputError, match="12 positions; position 12 is run"):
        generated(model, batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_stays_bfloat16_and_close(family: str) -> None:
    hf = fresh(family).to(torch.bfloat16)
    model, wide = Model(hf, name="half"), Model(copy.deepcopy(hf).float(), name="wide")
    batch = model.batch(prompts(), side="left")
    recipe = mixture(family)
    with recipe.on(model, spans=batch):
        got = logits(model, batch)
    with recipe.on(wide, spans=batch):
        want = logits(wide, batch)
    assert got.dtype == torch.bfloat16
    gap, effect = (got.float() - want).abs().mean(), (want - logits(wide, batch)).abs().mean()
    assert float(gap) < 0.25 * float(effect)


SITES: dict[str, Callable[[Tensor, Tensor], Edit]] = {
    "z": lambda s, v: Edit("add", at("0.1", "1.2"), s, tensors={"vector": v}),
    "q": lambda s, v: Edit("add", at("0.1", "1.2"), s, site="q", tensors={"vector": v}),
    "resid": lambda s, v: Edit("add", Where(layers=(0, 1)), s, site="resid",
                               tensors={"vector": v}),
    "reweight": lambda s, v: Edit("reweight", at("1.2", "0.1", keys=span("img")), 1 + s**2),
    "bias": lambda s, v: Edit("bias", at("1.2", "0.1", keys=span("img")), s),
    "temperature": lambda s, v: Edit("temperature", at("1.2", "0.1"), 1 + s**2),
    "split": lambda s, v: Edit("split", at("1.2", "0.1", keys=span("img")), torch.sigmoid(s)),
}  # fmt: skip


@pytest.mark.parametrize("site", list(SITES))
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_gradients_equal_finite_differences(family: str, site: str) -> None:
    if family == "bloom" and site == "q":
        pytest.skip("q is not reached")
    model = Model(fresh(family).double(), name=family)
    batch = model.batch(prompts(lengths=(6, 6)), side="left")
    d = 64 if site == "resid" else 16
    s = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    v = noise(2, d).double().requires_grad_()

    def loss(s: Tensor, v: Tensor) -> Tensor:
        with Recipe(SITES[site](s, v)).on(model, spans=batch):
            out = model.hf(**batch.inputs(), use_cache=False).logits
        return torch.log_softmax(out[:, -1], -1)[:, 7].sum()

    loss(s, v).backward()
    # The others round to single precision in their norms, rotation or softmax.
    eps, near = (1e-5, 1e-6) if family == "gpt2" else (1e-2, 5e-3)
    for x, places in ((s, [0, 1]), (v, [3, d + 5])):
        if x is v and site not in ("z", "q", "resid"):
            continue
        for i in places:
            step = torch.zeros_like(x).reshape(-1)
            step[i] = eps
            step = step.view_as(x)
            with torch.no_grad():
                up = loss(s + step, v) if x is s else loss(s, v + step)
                down = loss(s - step, v) if x is s else loss(s, v - step)
            want = float((up - down) / (2 * eps))
            assert abs(want) > near
            assert x.grad is not None
            assert float(x.grad.reshape(-1)[i]) == pytest.approx(want, rel=near, abs=near / 100)


# Equivalences -------------------------------------------------------------------------------


PAIRS: dict[str, tuple[Edit, Edit]] = {
    "reweight is a log bias": (
        Edit("reweight", at("0.1", "1.2", keys=span("img")), 4.0),
        Edit("bias", at("0.1", "1.2", keys=span("img")), float(torch.tensor(4.0).log())),
    ),
    "temperature scales q": (
        Edit("temperature", at("0.1", "1.2"), 0.4),
        Edit("scale", at("0.1", "1.2"), 2.5, site="q"),
    ),
    "knockout is weight 0": (
        Edit("knockout", at("0.1", "1.2", keys=span("img"), queries=Positions(prompt=(-1,)))),
        Edit("reweight", at("0.1", "1.2", keys=span("img"), queries=Positions(prompt=(-1,))), 0.0),
    ),
    "uniform is a query of zeros": (
        Edit("uniform", at("0.1", "1.2")),
        Edit("zero", at("0.1", "1.2"), site="q"),
    ),
    "kv heads are those of their group": (
        Edit("zero", at("0.0", "1.1"), site="v"),
        Edit("zero", at("0.0", "0.1", "1.2", "1.3")),
    ),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_equivalent_edits_agree(name: str) -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    answers = []
    for edit in PAIRS[name]:
        with Recipe(edit).on(model, spans=batch):
            answers.append(generated(model, batch, n=3))
    assert float((answers[0] - generated(model, batch, n=3)).abs().max()) > 1e-3
    torch.testing.assert_close(answers[0], answers[1], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_is_knocked_out_stays_so(family: str) -> None:
    model = handle(family)
    batch = model.batch(prompts(), side="left")
    rows = Positions(prompt=(-1,))
    hide = Edit("knockout", at("0.1", "1.2", keys=span("img"), queries=rows))
    rest = Positions(prompt="all", exclude=span("img"))
    for after in (
        Edit("uniform", at("1.2", "0.1", queries=rows)),
        Edit("override", at("1.2", "0.1", queries=rows)),
    ):
        with Recipe([hide, after]).on(model, spans=batch):
            got = logits(model, batch)
        with Recipe(Edit("override", at("0.1", "1.2", keys=rest, queries=rows))).on(
            model, spans=batch
        ):
            torch.testing.assert_close(got, logits(model, batch), **CLOSE)


def test_a_vector_added_to_every_key_cancels() -> None:
    model = handle("gpt2")
    batch = model.batch(prompts(), side="left")
    base = logits(model, batch)
    add = Edit("add", at("0.1"), site="k", tensors={"vector": noise(1, 16)})
    with Recipe(add).on(model):
        torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=2e-5)


# Contrast -----------------------------------------------------------------------------------


def contrast(beta: float = 0.1, s: float = 0.8) -> tuple[Recipe, Recipe]:
    twin = Recipe([Edit("zero", at("0.1")), Edit("knockout", at("1.2", keys=span("img"),
                   queries=LAST))])  # fmt: skip
    return Recipe(Edit("contrast", strength=s, params={"beta": beta}, twin=twin)), twin


def contrasted(a: Tensor, b: Tensor, beta: float, s: float) -> Tensor:
    out = (1 + s) * a - s * b
    p = torch.softmax(a, -1)
    return torch.where(p >= beta * p.amax(-1, keepdim=True), out, -torch.inf)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_contrast_is_two_passes(beta: float) -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe, twin = contrast(beta)
    ids, mask = batch.input_ids, batch.attention_mask
    made = []
    for _ in range(4):  # by hand: two runs without a cache for each token
        whole = Batch(batch.prompts, ids, mask, batch.offsets)
        a = logits(model, whole)[:, -1]
        with twin.on(model, spans=batch):
            b = logits(model, whole)[:, -1]
        made.append(contrasted(a, b, beta, 0.8))
        ids = torch.cat([ids, made[-1].argmax(-1)[:, None]], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
    want = torch.stack(made)
    with recipe.on(model, spans=batch):
        first = model.hf.generate(**batch.inputs(), max_new_tokens=4, min_new_tokens=4,
                                  do_sample=False, pad_token_id=0)  # fmt: skip
        got = generated(model, batch)
        torch.testing.assert_close(generated(model, batch, use_cache=False), got, **CLOSE)
    torch.testing.assert_close(first, ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_contrast_follows_beams_and_loops_of_ones_own() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe, _ = contrast(beta=0.0)

    def beams(**kw: Any) -> Any:
        return model.hf.generate(**batch.inputs(), max_new_tokens=5, min_new_tokens=5, num_beams=3,
                                 pad_token_id=0, return_dict_in_generate=True, **kw)  # fmt: skip

    with recipe.on(model, spans=batch):
        got, whole = beams(), beams(use_cache=False)
    assert torch.equal(got.sequences, whole.sequences)
    assert not torch.equal(got.sequences, beams().sequences)
    one = model.batch(prompts()[:1])
    with recipe.on(model, spans=one), torch.no_grad():
        want = generated(model, one, n=3)[:, 0]
        out = model.hf(input_ids=one.input_ids, use_cache=True)
        steps = [out.logits[0, -1]]
        for _ in range(2):
            token = steps[-1].argmax()[None, None]
            out = model.hf(input_ids=token, past_key_values=out.past_key_values)
            steps.append(out.logits[0, -1])
    torch.testing.assert_close(torch.stack(steps), want, rtol=0, atol=1e-5)


def test_contrast_inside_another_recipe_knows_its_spans() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe, _ = contrast()
    idle = Recipe(Edit("scale", at("0.0"), 1.0))
    with recipe.on(model, spans=batch):
        want = logits(model, batch)
    with idle.on(model), recipe.on(model, spans=batch):
        torch.testing.assert_close(logits(model, batch), want, rtol=0, atol=0)


def test_contrast_goes_on_when_another_recipe_comes_and_goes() -> None:
    model = handle("llama")
    batch = model.batch(prompts()[:1])
    recipe, _ = contrast(beta=0.0)

    def two_steps(*, nested: bool) -> Tensor:
        with recipe.on(model, spans=batch), torch.no_grad():
            out = model.hf(input_ids=batch.input_ids)
            if nested:
                with Recipe(Edit("zero", at("0.0"))).on(model):
                    pass
            return model.hf(
                input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values
            ).logits  # type: ignore[no-any-return]

    torch.testing.assert_close(two_steps(nested=True), two_steps(nested=False), rtol=0, atol=0)


@pytest.mark.parametrize("head", ["0.1", "cross.1.2"])
def test_contrast_in_an_encoder_decoder(head: str) -> None:
    model = handle("t5")
    batch, inputs = _t5_inputs(model)
    twin = Recipe(Edit("zero", at(head)))
    recipe = Recipe(Edit("contrast", strength=0.8, params={"beta": 0.0}, twin=twin))
    with torch.no_grad():
        a = model.hf(**inputs).logits
        with twin.on(model):
            b = model.hf(**inputs).logits
        with recipe.on(model):
            got = model.hf(**inputs).logits
    torch.testing.assert_close(got, contrasted(a, b, 0.0, 0.8), rtol=0, atol=1e-5)
    with recipe.on(model):
        cached = generated(model, batch)
        torch.testing.assert_close(generated(model, batch, use_cache=False), cached, **CLOSE)
    encoder = Recipe(Edit("contrast", twin=Recipe(Edit("zero", at("encoder.0.1")))))
    with pytest.raises(InputError, match="share what the encoder put out"), encoder.on(model):
        pass


def test_contrast_refuses_what_it_cannot_do() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe, _ = contrast()
    with recipe.on(model, spans=batch), pytest.raises(InputError, match="labels"):
        model.hf(**batch.inputs(), labels=batch.input_ids)
    bert = handle("bert")
    with Recipe(Edit("scale", Where(), 2.0, site="logits")).on(bert):
        with pytest.raises(SiteError, match="gives no logits"):
            bert.hf(**bert.batch(prompts()).inputs())


# Gates and schedules ------------------------------------------------------------------------


def cosines(model: Model, batch: Batch, axis: Tensor, layer: int) -> Tensor:
    with torch.no_grad():
        out = model.hf(**batch.inputs(), output_hidden_states=True)
    return torch.cosine_similarity(out.hidden_states[layer][:, -1], axis[None], dim=-1)


@pytest.mark.parametrize("evaluate", ["prompt", "step"])
def test_gates_decide_by_row_and_say_so(evaluate: str) -> None:
    model, axis = handle("llama"), noise(64, seed=11)
    batch = model.batch(prompts(), side="left")
    seen = cosines(model, batch, axis, 1)
    threshold = float(seen.sort().values[:2].mean())  # two of three rows are open
    gate = Gate(axis, 1, threshold, evaluate=evaluate)
    early, late = Edit("scale", at("0.2"), 3.0, gate=gate), Edit("zero", at("1.2"), gate=gate)
    recipe = Recipe([early, late])
    base = generated(model, batch)
    with recipe.on(model) as session:
        got = generated(model, batch)
        log = list(session.log)
        torch.testing.assert_close(generated(model, batch, use_cache=False), got, **CLOSE)
    assert [d.step for d in log] == ([0] if evaluate == "prompt" else [0, 1, 2, 3])
    assert log[0].open == tuple((seen > threshold).tolist())
    assert log[0].cosine == pytest.approx(seen.tolist(), abs=1e-6)
    shut = log[0].open.index(False)
    with Recipe(Edit("zero", at("1.2"))).on(model):
        zeroed = generated(model, batch)[0]
    for row in range(3):  # at the prompt the early edit does not know the decision yet
        want = base[0, row] if row == shut else zeroed[row]
        torch.testing.assert_close(got[0, row], want, **CLOSE)
    if evaluate == "prompt":
        torch.testing.assert_close(got[:, shut], base[:, shut], **CLOSE)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(got[:, 1 - shut], base[:, 1 - shut], **CLOSE)


def test_gates_on_attention_and_right_padding() -> None:
    model, axis = handle("llama"), noise(64, seed=11)
    batch = model.batch(prompts())
    seen = torch.stack([cosines(model, model.batch([p]), axis, 0)[0] for p in batch.prompts])
    gate = Gate(axis, 0, float(seen.sort().values[:2].mean()), "below")
    edit = Edit("temperature", at("1.1"), 0.2, gate=gate)
    base = logits(model, batch)
    with Recipe(Edit("temperature", at("1.1"), 0.2)).on(model):
        full = logits(model, batch)
    with Recipe(edit).on(model) as session:
        got = logits(model, batch)
    assert session.log[0].cosine == pytest.approx(seen.tolist(), abs=1e-6)
    for row, open_ in enumerate(session.log[0].open):
        torch.testing.assert_close(got[row], full[row] if open_ else base[row], **CLOSE)
    assert sum(session.log[0].open) == 1
    with Recipe(Edit("zero", at("0.1"), gate=Gate(noise(63), 0, 0.0))).on(model):
        with pytest.raises(InputError, match="must have the 64 numbers"):
            logits(model, batch)


def test_a_schedule_follows_the_step() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    edit = Edit("knockout", at("1.2", "0.1", keys=span("img"), queries=LAST),
                schedule=Schedule("first", 2))  # fmt: skip
    window = Positions(prompt=(-1,), generated=(0, 1))
    with Recipe(edit).on(model, spans=batch):
        got = generated(model, batch)
    same = Edit("knockout", at("1.2", "0.1", keys=span("img"), queries=window))
    with Recipe(same).on(model, spans=batch):
        torch.testing.assert_close(got, generated(model, batch), **CLOSE)


# Truth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_only_the_planted_head_matters(attn: str) -> None:
    zoo = planted_llama(C=4)
    zoo.hf.set_attn_implementation(attn)
    model = Model(zoo.hf, name="planted")
    asked = class_prompts(4, per_class=2)
    batch = model.batch(asked, side="left")
    want = torch.tensor([p.answer[0] for p in asked if p.answer])

    def accuracy(recipe: Recipe) -> float:
        with recipe.on(model, spans=batch):
            first = model.hf.generate(**batch.inputs(), max_new_tokens=2, do_sample=False,
                                      pad_token_id=0)[:, len(asked[0])]  # fmt: skip
            out = logits(model, batch)[:, -1, :4]
        if recipe.edits[0].where.heads == planted:
            assert bool((out == out[:, :1]).all())  # all classes alike to the last bit
        else:
            assert torch.equal(first, out.argmax(-1))
        return float((out.argmax(-1) == want).double().mean())

    planted = Where(heads="1.2").heads
    for layer, head in itertools.product(range(2), range(4)):
        truth = 0.25 if (layer, head) == (1, 2) else 1.0
        for edit in (Edit("zero", at(f"{layer}.{head}")),
                     Edit("drop", at(f"{layer}.{head}", keys=span("symbol")))):  # fmt: skip
            assert accuracy(Recipe(edit)) == truth
    with Recipe(Edit("scale", at("1.2"), -1.0)).on(model):
        assert not bool((logits(model, batch)[:, -1, :4].argmax(-1) == want).any())


# Readings while a recipe is on --------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt-oss"])
@pytest.mark.parametrize("attn", ["", "eager"])
def test_readings_see_the_edited_pattern(family: str, attn: str) -> None:
    if family == "bloom" and attn:
        pytest.skip("it has one kernel only")
    model = handle(family, attn)
    batch = model.batch(prompts(), side="left")
    want = {"mass": rd.SpanMass("img"), "plain": rd.SpanMass("bos")}
    before = read(model, batch, want)
    edits = [Edit("drop", at("1.2", keys=span("img")))]
    if family != "bloom":
        edits.append(Edit("zero", at("1.1"), site="q"))
    with Recipe(edits).on(model, spans=batch):
        during = read(model, batch, want)
        again = read(model, batch, want)
    layer = 1
    torch.testing.assert_close(during["mass"].values, again["mass"].values, rtol=0, atol=0)
    assert bool((during["mass"].values[:, layer, 2] == 0).all())
    torch.testing.assert_close(
        during["plain"].values[:, layer, 2], before["plain"].values[:, layer, 2], **CLOSE
    )
    for name in want:
        torch.testing.assert_close(during[name].values[:, 0], before[name].values[:, 0], **CLOSE)
        torch.testing.assert_close(
            during[name].values[:, layer, 0], before[name].values[:, layer, 0], **CLOSE
        )
    if family in ("llama", "gpt2"):  # a query of zeros attends uniformly
        for row, prompt in enumerate(batch.prompts):
            uniform = sum(1 / (i + 1) for i in range(len(prompt))) / len(prompt)
            got = float(during["plain"].values[row, layer, 1])
            assert got == pytest.approx(uniform, rel=1e-5)
    after = read(model, batch, want)
    torch.testing.assert_close(after["mass"].values, before["mass"].values, rtol=0, atol=0)


# Other architectures ------------------------------------------------------------------------


def _t5_inputs(model: Model, side: str = "left") -> tuple[Batch, dict[str, Any]]:
    batch = model.batch(prompts(), side=side)
    return batch, {**batch.inputs(), "decoder_input_ids": torch.tensor([[0, 5, 6]] * 3)}


T5_EDITS: dict[str, Edit] = {
    "encoder z": Edit("zero", at("encoder.0.1", queries=span("img"))),
    "encoder bias": Edit("bias", at("encoder.1.2", keys=span("img"), queries=span("bos")), 3.0),
    "encoder q": Edit("scale", at("encoder.1.0", queries=Positions(prompt=(-1,))), 3.0, site="q"),
    "text temperature": Edit("temperature", at("0.1", queries=Positions(window=(1, 9))), 0.2),
    "text knockout": Edit("knockout", at("1.1", queries=Positions(window=(1, 9)),
                                         keys=Positions(prompt=(0,)))),
    "cross knockout": Edit("knockout", at("cross.1.2", keys=span("img"), queries=LAST)),
    "cross override": Edit("override", at("cross.0.2", keys=Positions(prompt=(-1,))), 0.5),
    "cross v": Edit("zero", at("cross.0.1", keys=span("bos")), site="v"),
    "encoder resid": Edit("scale", Where(layers=(1,), tower="encoder", queries=span("img")), 2.0,
                          site="resid"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(T5_EDITS))
def test_encoder_decoders(name: str) -> None:
    model, eager = handle("t5"), handle("t5", "eager")
    recipe = Recipe(T5_EDITS[name])
    batch, inputs = _t5_inputs(model)
    with torch.no_grad():
        base = model.hf(**inputs).logits
        with recipe.on(model, spans=batch):
            got = model.hf(**inputs).logits
        with recipe.on(eager, spans=batch):
            torch.testing.assert_close(eager.hf(**inputs).logits, got, **CLOSE)
        assert float((got - base).abs().max()) > 1e-4
        for row, prompt in enumerate(batch.prompts):
            alone = model.batch([prompt])
            with recipe.on(model, spans=[prompt]):
                one = model.hf(**alone.inputs(), decoder_input_ids=torch.tensor([[0, 5, 6]])).logits
            torch.testing.assert_close(one[0], got[row], **CLOSE)
    kw: dict[str, Any] = {
        "num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True,
        "max_new_tokens": 4, "min_new_tokens": 4, "output_scores": True,
    }  # fmt: skip
    with recipe.on(model, spans=batch):
        cached = generated(model, batch)
        torch.testing.assert_close(generated(model, batch, use_cache=False), cached, **CLOSE)
        a = model.hf.generate(**batch.inputs(), **kw)
        b = model.hf.generate(**batch.inputs(), use_cache=False, **kw)
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(a.sequences_scores, b.sequences_scores, **CLOSE)


def test_an_encoder_decoder_by_hand() -> None:
    model = handle("t5")
    batch, inputs = _t5_inputs(model)
    edit = Edit("drop", at("cross.1.2", keys=span("img"), queries=Positions(prompt=(-1,))))
    patterns: dict[str, Tensor] = {}

    def keep(call: Any) -> None:
        heads = slice(0, call.n_heads)
        rows = [call.rows(b, heads, slice(0, call.n_query)) for b in range(3)]
        patterns[call.name] = torch.stack(rows)

    cross = model.tower("cross").layers[1].name
    with torch.no_grad():
        with model.observe(keep):
            model.hf(**inputs)
        plain = patterns[cross].clone()
        with Recipe(edit).on(model, spans=batch), model.observe(keep):
            model.hf(**inputs)
    for row, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        for i in prompt.positions("img"):
            plain[row, 2, -1, offset + i] = 0
    torch.testing.assert_close(patterns[cross], plain, **CLOSE)


@pytest.mark.parametrize("family", ["bloom"])
def test_families_that_compute_their_own_pattern(family: str) -> None:
    model = handle(family)
    for site in ("q", "k", "v"):
        with pytest.raises(SiteError, match=f"site '{site}' is not reached"):
            with Recipe(Edit("scale", at("0.1"), 2.0, site=site)).on(model):
                pass


@pytest.mark.parametrize("op", [*SCORES, *PATTERN])
def test_a_pattern_that_the_model_computes_is_edited_by_hand(op: str) -> None:
    model = handle("bloom")
    batch = model.batch(prompts(lengths=(7, 7)))
    whole = op in ("temperature", "uniform")
    where = at(
        "1.3", "1.0", queries=Positions(prompt=(4, -1)), keys=EVERY if whole else span("img")
    )
    change, s = (SCORES | PATTERN)[op]
    patterns: list[Tensor] = []
    name = model.tower("text").layers[1].name

    def keep(call: Any) -> None:
        if call.name == name:
            patterns.append(call.pattern.clone())

    with torch.no_grad():
        with model.observe(keep):
            model.hf(**batch.inputs())
        with Recipe(Edit(op, where, s)).on(model, spans=batch), model.observe(keep):
            model.hf(**batch.inputs())
    want, got = patterns
    for b, h, i in itertools.product(range(2), (3, 0), (4, 6)):
        keys = torch.zeros(7, dtype=torch.bool)
        keys[batch.prompts[b].positions("img")] = True
        row, chosen = want[b, h, i, : i + 1], keys[: i + 1]
        if op in SCORES:
            want[b, h, i, : i + 1] = torch.softmax(change(row.log(), chosen, s), 0)
        else:
            want[b, h, i, : i + 1] = change(row, chosen, s)
    torch.testing.assert_close(got, want, **CLOSE)
    for i in (0, 1, 2, 3, 5):  # other rows keep every bit
        assert torch.equal(got[:, :, i], want[:, :, i])


def test_a_decoder_has_spans_of_its_own() -> None:
    model = handle("t5")
    batch = model.batch(prompts())
    decoder = Batch.of([Prompt((0, 5, 6, 7), {"img": ((2, 4),)}) for _ in range(3)])
    both = Batch(batch.prompts, batch.input_ids, batch.attention_mask, batch.offsets,
                 decoder=decoder)  # fmt: skip
    by_span = Recipe(Edit("zero", at("0.1", queries=span("img"))))
    with torch.no_grad():
        with by_span.on(model, spans=both):
            got = model.hf(**both.inputs()).logits
        with Recipe(Edit("zero", at("0.1", queries=Positions(window=(2, 4))))).on(model):
            torch.testing.assert_close(got, model.hf(**both.inputs()).logits, rtol=0, atol=0)
        with by_span.on(model, spans=batch), pytest.raises(SpanError, match="must be bound"):
            model.hf(**both.inputs())


def test_a_vision_tower() -> None:
    model = handle("llava")
    image = noise(1, 3, 16, 16)
    tokens = (1, *[96] * 16, 7, 8, 9)
    batch = model.batch([Prompt(tokens, {"image": ((1, 17),)})])
    inputs = {**batch.inputs(), "pixel_values": image}
    heads = tuple(f"vision.0.{h}" for h in range(4))
    with torch.no_grad():
        base = model.hf(**inputs).logits
        with Recipe(Edit("zero", at(*heads))).on(model):
            got = model.hf(**inputs).logits
        layer = model.tower("vision").layers[0]
        zero = model.hf.get_submodule(layer.projection).register_forward_pre_hook(
            lambda m, args: (torch.zeros_like(args[0]),)
        )
        want = model.hf(**inputs).logits
        zero.remove()
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert float((got - base).abs().max()) > 1e-4
        drop = Edit("reweight", at("0.1", "1.1", keys=span("image"), queries=LAST), 8.0)
        with Recipe(drop).on(model, spans=batch):
            a = model.hf(**inputs).logits
        torch.testing.assert_close(a[:, :-1], base[:, :-1], rtol=0, atol=0)
        assert float((a - base)[:, -1].abs().max()) > 1e-4
        with Recipe(Edit("zero", at("vision.0.1", queries=span("image")))).on(model, spans=batch):
            with pytest.raises(SpanError, match="must be bound"):
                model.hf(**inputs)


# Mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")

    def runs(edit: Edit, **kw: Any) -> Iterator[None]:
        with Recipe(edit).on(model, **kw):
            logits(model, batch)

    for edit, error, text in (
        (Edit("zero", at("2.0")), HeadIdError, "L2H0 is outside this model"),
        (Edit("zero", at("0.4")), HeadIdError, "L0H4 is outside this model"),
        (Edit("zero", at("vision.0.0")), HeadIdError, "outside this model"),
        (Edit("zero", at("0.2"), site="k"), HeadIdError, "key-value heads 0 to 1; got L0H2"),
        (Edit("zero", Where(layers=(3,)), site="resid"), HeadIdError, "layer 3 is outside"),
        (Edit("zero", Where(layers=(2,)), site="attn_out"), HeadIdError, "layer 2 of"),
        (Edit("zero", at("0.1"), gate=Gate(noise(64), 2, 0.0)), HeadIdError, "layer 2 is outside"),
        (Edit("zero", Where(tower="vision")), SiteError, "has no tower 'vision'"),
        (Edit("zero", at("0.1", queries=span("img"))), SpanError, "must be bound"),
        (Edit("zero", at("0.1", queries=Positions(prompt=(12,)))), InputError, "got 12"),
        (Edit("zero", at("0.1", queries=Positions(prompt=(-13,)))), InputError, "got -13"),
        (Edit("add", at("0.1"), tensors={"vector": noise(1, 15)}), InputError, "16 numbers"),
        (Edit("project", at("0.1"), tensors={"basis": noise(1, 8, 2)}), InputError, "16 numbers"),
        (Edit("knockout", at("0.1", keys=Positions(prompt="all", exclude=Positions(prompt=(3,))))),
         InputError, "query 3 of example 0 sees in"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            runs(edit)
    with pytest.raises(SpanError, match="has no span 'nope'; it has: bos, img, all"):
        runs(Edit("zero", at("0.1", queries=span("nope"))), spans=batch)
    with pytest.raises(InputError, match="3 rows are run, but spans are bound for 2 prompts"):
        runs(Edit("zero", at("0.1", queries=span("img"))), spans=batch.prompts[:2])
    with pytest.raises(InputError, match="switched on on a Model; got LlamaForCausalLM"):
        with Recipe(Edit("zero", at("0.1"))).on(model.hf):
            pass
    with pytest.raises(InputError, match="got embeddings"):
        with Recipe(Edit("zero", at("0.1", queries=Positions(tokens=(5,))))).on(model):
            model.hf(inputs_embeds=noise(1, 4, 64))
    with pytest.raises(SiteError, match="called by itself"):
        with Recipe(Edit("zero", at("0.1", queries=LAST))).on(model):
            model.hf.model(**batch.inputs())
    with Recipe(Edit("zero", at("0.1"))).on(model):  # everywhere needs no positions
        model.hf.model(**batch.inputs())
    assert hooks(model.hf) == hooks(handle("llama").hf)


def test_a_recipe_for_another_model_is_refused() -> None:
    one, two = handle("llama"), Model(fresh("llama", seed=3), name="other")
    recipe = Recipe(Edit("zero", at("0.1")), fingerprint=one.fingerprint)
    with recipe.on(one), recipe.on(two, force=True):
        pass
    with pytest.raises(ModelError, match="made for the model with fingerprint"):
        with recipe.on(two):
            pass


def test_an_edit_that_is_not_reached_is_an_error() -> None:
    model = Model(fresh("llama"), name="broken")
    assert model.towers
    layer = model.hf.model.layers[1]
    layer.forward = lambda hidden_states, **kw: hidden_states
    batch = model.batch(prompts())
    with Recipe(Edit("temperature", at("1.0"), 0.5)).on(model):
        with pytest.raises(SiteError, match="was not reached in this forward"):
            logits(model, batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bridge(family: str) -> None:
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf = fresh(family, "eager")
    bridge = build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=None, model_name="tiny"
    )
    model, plain = interp.load(bridge), handle(family)
    batch = model.batch(prompts(), side="left")
    edits = [e for e in mixture(family).edits if e.site not in ("q", "k", "v")]
    near = {"rtol": 1e-4, "atol": 1e-4}
    for edit in edits:
        recipe = Recipe(edit)
        with recipe.on(plain, spans=batch):
            want = generated(plain, batch, n=2)
        with recipe.on(model, spans=batch):
            torch.testing.assert_close(generated(model, batch, n=2), want, **near)
    with pytest.raises(SiteError, match="site 'q' is not reached"):
        with Recipe(Edit("scale", at("1.0"), 2.0, site="q")).on(model):
            pass
    assert len(edits) > 8
    with pytest.raises(SiteError, match="is a bridge"):
        Recipe(Edit("zero", at("0.1"))).bake(model)
