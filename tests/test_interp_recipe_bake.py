"""Recipes folded into weights: the same numbers as hooks, or a refusal that names the edit."""

import itertools
from typing import Any

import pytest
import torch
from reference import fresh, handle
from torch import Tensor

from interp.errors import InputError
from interp.model import Model
from interp.recipe import Edit, Gate, Positions, Recipe, Schedule, Where, span


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(*heads: str, **kw: Any) -> Where:
    return Where(heads=heads, **kw)


IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
HEADS = ("0.1", "1.2")
LINEAR = [
    Edit("zero", at(*HEADS)),
    Edit("scale", at(*HEADS), torch.tensor([-1.0, 3.0])),
    Edit("project", at(*HEADS), 2.0, tensors={"basis": torch.linalg.qr(noise(2, 16, 3))[0]}),
    Edit("affine", at(*HEADS), 0.8, tensors={"gain": noise(2, 16)}),
]
SHIFTING = [
    Edit("add", at(*HEADS), 1.5, tensors={"vector": noise(2, 16)}),
    Edit("set", at(*HEADS), 0.4, tensors={"value": noise(2, 16)}),
    Edit("affine", at(*HEADS), 0.8, tensors={"gain": noise(2, 16), "shift": noise(2, 16, seed=1)}),
    Edit("affine", at(*HEADS), 0.8, tensors={"shift": noise(2, 16)}),
]


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.hf(input_ids=IDS).logits  # type: ignore[no-any-return]


def compare(family: str, edits: list[Edit], *, new_bias: bool) -> None:
    model, recipe = handle(family), Recipe(edits)
    state = {n: t.clone() for n, t in model.hf.state_dict().items()}
    baked = recipe.bake(model, new_bias=new_bias)
    with recipe.on(model):
        hooked = logits(model)
    assert float((hooked - logits(model)).abs().max()) > 1e-3
    torch.testing.assert_close(logits(baked), hooked, rtol=1e-5, atol=2e-5)
    after = model.hf.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[n], state[n]) for n in state)


@pytest.mark.parametrize("edit", LINEAR, ids=lambda e: e.op)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_linear_edits_need_no_bias(family: str, edit: Edit) -> None:
    compare(family, [edit], new_bias=False)
    if family == "llama":
        assert Recipe(edit).bake(handle(family)).hf.model.layers[0].self_attn.o_proj.bias is None


@pytest.mark.parametrize("edit", SHIFTING, ids=lambda e: "+".join([e.op, *e.tensors]))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shifts_go_into_the_bias(family: str, edit: Edit) -> None:
    compare(family, [edit], new_bias=family == "llama")
    if family == "llama":
        with pytest.raises(InputError, match=r"shifts the output of model\.layers\.0.*no bias"):
            Recipe(edit).bake(handle(family))


@pytest.mark.parametrize("pair", list(itertools.permutations(range(4), 2)))
def test_edits_that_share_heads_keep_their_order(pair: tuple[int, int]) -> None:
    edits = [SHIFTING[0], LINEAR[1], LINEAR[2], SHIFTING[2]]
    compare("gpt2", [edits[i] for i in pair], new_bias=False)


def test_a_baked_model_takes_further_recipes_and_generates() -> None:
    model = handle("gpt2")
    first, second = Recipe(SHIFTING[0]), Recipe(Edit("temperature", at("1.0"), 0.3))
    baked = first.bake(model)
    assert baked.name == "gpt2 baked" and baked.fingerprint != model.fingerprint
    with (first + second).on(model):
        want = logits(model)
    with second.on(baked):
        torch.testing.assert_close(logits(baked), want, rtol=1e-5, atol=2e-5)


def test_bfloat16_weights_stay_so() -> None:
    model = Model(fresh("gpt2").to(torch.bfloat16), name="half")
    baked = Recipe(SHIFTING[2]).bake(model)
    assert {p.dtype for p in baked.hf.parameters()} == {torch.bfloat16}


REFUSED: list[tuple[Edit, str]] = [
    (Edit("zero", at("0.1"), site="v"), "site 'v' does not fold"),
    (Edit("scale", Where(layers=(1,)), 2.0, site="resid"), "site 'resid' does not fold"),
    (Edit("temperature", at("0.1"), 0.5), "site 'scores' does not fold"),
    (Edit("drop", at("0.1", keys=span("img"))), "site 'pattern' does not fold"),
    (Edit("zero", at("0.1", queries=Positions(prompt=(-1,)))), "some positions only"),
    (Edit("zero", at("0.1", queries=Positions(generated="all"))), "some positions only"),
    (Edit("zero", at("0.1"), gate=Gate(torch.ones(64), 0, 0.0)), "depends on the input"),
    (Edit("scale", at("0.1"), 2.0, schedule=Schedule("decay")), "depends on the input or the step"),
    (Edit("set", at("0.1"), tensors={"value": torch.zeros(1, 1, 9, 16)}), "differ by example"),
    (Edit("scale", at("0.1"), torch.ones(1, 2)), "differs by example"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_the_rest_is_refused_by_name(case: int) -> None:
    edit, why = REFUSED[case]
    with pytest.raises(InputError, match=why) as caught:
        Recipe([Edit("zero", at("0.0")), edit]).bake(handle("llama"))
    assert str(caught.value).startswith(f"edit 1 ({edit})")


def test_tensors_of_the_wrong_size_are_refused() -> None:
    wrong = Recipe(Edit("add", at("0.1"), tensors={"vector": noise(1, 15)}))
    with pytest.raises(InputError, match="16 numbers"):
        wrong.bake(handle("gpt2"))
