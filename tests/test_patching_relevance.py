"""Relevance by attention against the full matrices that an eager model returns."""

import copy
import functools

import numpy as np
import pytest
import torch
from reference import handle

from interp import load
from interp.errors import InputError
from interp.model import Model
from interp.prompts import Prompt
from interp.tasks import make_task
from patching.relevance import relevance_maps
from patching.relevance_hiding import perturbation


@functools.cache
def shapes(name: str) -> Model:
    return load(f"zoo:{name}", device="cpu")


def by_hand(hf: torch.nn.Module, inputs: dict, target: int | None, at: int, method: str, which):
    """From `output_attentions` of an eager copy."""
    hf = copy.deepcopy(hf)
    hf.set_attn_implementation("eager")
    out = hf(**inputs, output_attentions=True)
    logits = out.logits[0, -1] if out.logits.dim() == 3 else out.logits[0]
    target = int(logits.argmax()) if target is None else target
    maps = list(getattr(out, which))
    n = maps[0].shape[-1]
    total = torch.eye(n)
    if method == "gradient":
        slopes = torch.autograd.grad(logits[target], maps)
        for a, g in zip(maps, slopes, strict=True):
            mean = (g[0] * a[0]).clamp(min=0).mean(0)
            total = total + mean @ total
    elif method == "rollout":
        for a in maps:
            mixed = a[0].mean(0) + torch.eye(n)
            total = mixed / mixed.sum(-1, keepdim=True) @ total
    else:
        total = maps[-1][0].mean(0)
    return target, total[at].detach().numpy()


@pytest.mark.parametrize("method", ["gradient", "rollout", "attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_equal_eager_matrices(family: str, method: str) -> None:
    model = handle(family)
    gen = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(tuple(torch.randint(3, 90, (n,), generator=gen).tolist()), id=str(n), answer=(7,))
        for n in (9, 14, 9)
    ]
    for target in ("top", "answer"):
        found = relevance_maps(model, prompts, method=method, target=target, batch_size=2)
        for i, prompt in enumerate(prompts):
            inputs = {"input_ids": torch.tensor([prompt.tokens])}
            want_target = 7 if target == "answer" else None
            said, want = by_hand(
                model.hf, inputs, want_target, len(prompt) - 1, method, "attentions"
            )
            assert found.target[i] == said
            np.testing.assert_allclose(found.tokens[i], want, atol=2e-5, rtol=1e-4)
    assert np.isnan(found.by_head).all() == (method != "gradient")


def test_vision_transformers_are_explained_from_the_class_token() -> None:
    model = shapes("shapes-vit")
    prompts = make_task("shapes").prompts(model, 3)
    found = relevance_maps(model, prompts)
    for i, prompt in enumerate(prompts):
        said, want = by_hand(
            model.hf, {"pixel_values": prompt.inputs["pixel_values"]}, None, 0, "gradient",
            "attentions",
        )  # fmt: skip
        assert found.target[i] == said
        np.testing.assert_allclose(found.tokens[i], want, atol=2e-5, rtol=1e-3)
        assert found.heat(i).shape == (64, 64)


@pytest.mark.parametrize("name", ["shapes-vlm", "shapes-vit"])
def test_relevance_lies_on_the_thing_and_hiding_it_hurts(name: str) -> None:
    model = shapes(name)
    prompts = make_task("shapes").prompts(model, 12)
    found = relevance_maps(model, prompts)
    inside, chance = [], []
    for i, prompt in enumerate(found.prompts):
        image, thing = prompt.positions("image"), set(prompt.positions("thing"))
        share = found.tokens[i][image] / found.tokens[i][image].sum()
        inside.append(sum(s for s, p in zip(share, image, strict=True) if p in thing))
        chance.append(len(thing) / len(image))
    assert np.mean(inside) > 4 * np.mean(chance)
    curves = perturbation(model, found, prompts, shares=(0.0, 0.1, 0.3, 1.0))
    assert curves.deletion[:, 0] == pytest.approx(curves.insertion[:, -1], abs=1e-6)
    assert curves.area("deletion").mean() < curves.area("random").mean()
    assert curves.area("insertion").mean() > curves.area("random").mean()


def test_batches_change_nothing() -> None:
    model = shapes("shapes-vlm")
    prompts = make_task("shapes").prompts(model, 5)
    one, many = (
        relevance_maps(model, prompts, batch_size=1),
        relevance_maps(model, prompts, batch_size=4),
    )
    for a, b in zip(one.tokens, many.tokens, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3)
    np.testing.assert_allclose(one.by_head, many.by_head, atol=1e-4, rtol=1e-3)
    assert all(p.requires_grad for p in model.hf.parameters())


def test_bad_input() -> None:
    model, prompts = handle("llama"), [Prompt((3, 4, 5), id="a")]
    for options, said in (
        ({"method": "magic"}, "method must be one of"),
        ({"target": "answer"}, "needs an answer"),
        ({"target": [1, 2]}, "one token for each"),
    ):
        with pytest.raises(InputError, match=said):
            relevance_maps(model, prompts, **options)
    found = relevance_maps(model, prompts)
    with pytest.raises(InputError, match="which pixels"):
        found.heat(0)
    with pytest.raises(InputError, match="shares must rise"):
        perturbation(model, found, prompts, span="all", shares=(0.5, 1.0))


def test_towers_that_decide_nothing_by_themselves_are_refused() -> None:
    prompts = make_task("shapes").prompts(shapes("shapes-vlm"), 1)
    with pytest.raises(InputError, match="decides nothing by itself"):
        relevance_maps(shapes("shapes-vlm"), prompts, tower="vision")
    with pytest.raises(InputError, match="decides nothing by itself"):
        relevance_maps(handle("t5"), [Prompt((3, 4, 5), id="a")], tower="encoder")


def test_hiding_is_masking_where_positions_do_not_follow_the_mask() -> None:
    model = shapes("shapes-vlm")
    prompts = make_task("shapes").prompts(model, 2)
    found = relevance_maps(model, prompts)
    curves = perturbation(model, found, prompts, shares=(0.0, 0.5, 1.0))
    for i, prompt in enumerate(prompts):
        places = np.array(prompt.positions("image"))
        order = places[np.argsort(-found.tokens[i][places], kind="stable")]
        for j, count in enumerate((0, 32, 64)):
            batch = model.batch([prompt])
            mask = batch.attention_mask.clone()
            mask[0, order[:count].tolist()] = 0
            inputs = {**batch.inputs(), "attention_mask": mask}
            want = model.forward(inputs).logits[0, -1].softmax(-1)[found.target[i]]
            assert curves.deletion[i, j] == pytest.approx(float(want), abs=1e-5)
