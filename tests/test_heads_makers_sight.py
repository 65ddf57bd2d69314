"""Recipes against hallucination on the trained model of shapes, against two runs done by hand."""

import dataclasses
import functools
import math

import pytest
import torch

from heads.makers import make_recipe
from heads.makers.vcd import noised
from interp import load
from interp.errors import InputError
from interp.prompts import Prompt
from interp.recipe import Edit, Recipe, Where, span
from interp.tasks import make_task

CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@functools.cache
def model():
    return load("zoo:shapes-vlm", device="cpu")


@functools.cache
def batch():
    """Prompts of two lengths, padded on the left."""
    prompts = [
        make_task("shapes", {"kind": kind}).prompts(model(), 2, seed=s)[1]
        for s, kind in enumerate(("color", "exists", "shape"))
    ]
    assert len({len(p) for p in prompts}) > 1
    return model().batch(prompts, side="left")


def hidden_by_mask(of, span_name):
    """The batch with a span masked like padding: unseen, but in its places."""
    mask = of.attention_mask.clone()
    for row, places in enumerate(of.positions(span_name)):
        mask[row, places] = 0
    return dataclasses.replace(of, attention_mask=mask)


def last(of, recipe=None, **options):
    if recipe is None:
        return model().forward(of.inputs()).logits[:, -1]
    with recipe.on(model(), spans=of, **options):
        return model().forward(of.inputs()).logits[:, -1]


def contrasted(seen, blind, alpha, beta):
    out = (1 + alpha) * seen - alpha * blind
    return out.masked_fill(seen < math.log(beta) + seen.amax(-1, keepdim=True), -math.inf)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.5, 1e-6)])
def test_vcd_is_two_runs(alpha: float, beta: float) -> None:
    recipe = make_recipe("vcd", model(), batch(), {"alpha": alpha, "beta": beta})
    seen, blind = last(batch()), last(hidden_by_mask(batch(), "image"))
    assert (seen - blind).abs().max() > 1
    torch.testing.assert_close(last(batch(), recipe), contrasted(seen, blind, alpha, beta), **CLOSE)


def test_vcd_with_noise_is_two_runs() -> None:
    recipe = make_recipe("vcd", model(), batch(), {"blind": "noise", "step": 600, "beta": 1e-6})
    other = noised(batch(), 600, 0)
    seen, blind = last(batch()), last(other)
    assert (seen - blind).abs().max() > 0.1
    torch.testing.assert_close(last(batch(), recipe), contrasted(seen, blind, 1.0, 1e-6), **CLOSE)
    still = noised(batch(), 0, 0).extra["pixel_values"]
    torch.testing.assert_close(still, batch().extra["pixel_values"])
    gone = noised(batch(), 1000, 0).extra["pixel_values"]
    x, y = batch().extra["pixel_values"].flatten(), gone.flatten()
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.35


def test_vcd_generates_with_and_without_cache() -> None:
    recipe = make_recipe("vcd", model(), batch(), {"alpha": 2.0})
    out = []
    for cache in (True, False):
        with recipe.on(model(), spans=batch()):
            made = model().hf.generate(
                **batch().inputs(), max_new_tokens=3, do_sample=False, use_cache=cache
            )
        out.append(made)
    assert torch.equal(*out)


def test_lqcd_contrasts_hidden_with_visible_words() -> None:
    plain = batch().prompts
    led = [
        Prompt(p.tokens, {**p.spans, "leading": ((66, 68),)}, p.id, p.answer, inputs=p.inputs)
        for p in plain
    ]
    leading = model().batch(led, side="left")
    recipe = make_recipe("lqcd", model(), leading, {"alpha": 1.0, "beta": 1e-6})
    hidden = last(hidden_by_mask(leading, "leading"))
    want = contrasted(hidden, last(leading), 1.0, 1e-6)
    torch.testing.assert_close(last(leading, recipe), want, **CLOSE)
    assert (hidden - last(leading)).abs().max() > 0.1


def test_boost_multiplies_the_odds_of_the_image() -> None:
    from interp.engine import read
    from interp.readings import Rows

    recipe = make_recipe("boost", model(), batch(), {"factor": 3.0, "layers": (0,)})
    from dataclasses import replace

    from heads.sight import LAST, with_last

    marked = replace(batch(), prompts=tuple(with_last(p) for p in batch().prompts))
    want = {"row": Rows(LAST)}
    plain = read(model(), marked, want)["row"].values[:, 0, :, 0]
    with recipe.on(model(), spans=batch()):
        found = read(model(), marked, want)["row"].values[:, 0, :, 0]
    for b, places in enumerate(batch().positions("image")):
        was, now = plain[b][:, places].sum(-1), found[b][:, places].sum(-1)
        torch.testing.assert_close(now / (1 - now), 3 * was / (1 - was), rtol=2e-3, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    text = [Prompt((1, 40 % 38, 5), {"image": ((1, 2),)})]
    for name, params, said in (
        ("vcd", {"blind": "blur"}, "knockout, noise"),
        ("vcd", {"step": 2000}, "step lies in"),
        ("boost", {"factor": 0.0}, "must be positive"),
    ):
        with pytest.raises(InputError, match=said):
            make_recipe(name, model(), batch(), params)
    with pytest.raises(InputError, match="noise needs pixels"):
        make_recipe("vcd", model(), text, {"blind": "noise"})


def test_strength_nothing_changes_nothing() -> None:
    seen = last(batch())
    for name, params in (("vcd", {"alpha": 0.0}), ("boost", {"factor": 1.0})):
        torch.testing.assert_close(last(batch(), make_recipe(name, model(), batch(), params)), seen)
    other = Recipe((Edit("bias", Where(heads=("L2H0",), keys=span("image")), 9.0),))
    assert (last(batch(), other) - seen).abs().max() > 1e-3
