"""Published interventions on models whose attention rows are planted, against rows done by hand."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import fresh, handle
from torch import Tensor

from heads.makers import MAKERS, make_recipe
from heads.makers.act import make_act, search_heads
from heads.makers.function_vector import make_function_vector
from heads.makers.iti import make_iti
from heads.makers.sink_removal import make_sink_removal
from heads.makers.temperature import make_temperature
from heads.makers.var import make_var, sink_dims
from heads.makers.vhr import choose_vision_heads, make_vhr
from interp import load
from interp.engine import read
from interp.errors import HeadIdError, InputError, SpanError, UnknownNameError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Batch, Prompt
from interp.readings import KeyMass
from interp.recipe import Positions, Recipe
from interp.zoo.planted_llama import class_prompts, planted_llama
from interp.zoo.planted_parts import HeadPlan, Layout, Stream, assemble
from probes import fit_iti, function_vector

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
V = 16
TEXT_SINK, IMAGE_SINK, SEEN = 1, 2, 3
WEIGHTS = {TEXT_SINK: 5.0, IMAGE_SINK: 3.0, SEEN: 2.0}
"""Attention of the planted heads: weights by token, 1e-30 for all other tokens."""


def planted(
    *layers: Sequence[str],
    weights: Mapping[int, float] = WEIGHTS,
    sinks: Sequence[int] = (TEXT_SINK, IMAGE_SINK),
    strength: float = 1.0,
) -> Model:
    """Heads that attend by a weight of each token, or not at all to content.

    `read` carries the token and writes it to the logits, `mute` writes nothing, `bos` attends to
    token 0 and carries nothing, `loud` attends so and carries a vector of length 9, `echo` attends
    to itself and carries what was written before. Sinks have one huge dimension.
    """
    residual = Layout({"tok": V, "out": V, "one": 1, "w": 1, "bos": 1, "huge": 1}).widened(64)
    features, values = Layout({"w": 1, "bos": 1, "tok": V}).widened(64), Layout({"tok": V})
    tokens = torch.zeros(V, residual.width)
    tokens[:, residual["tok"]] = torch.eye(V)
    tokens[:, residual["one"]] = 1
    for token in range(V):
        w = math.log(weights.get(token, 1e-30))
        tokens[token, residual["w"]] = w / 64  # small, so that it is no sink dimension
    tokens[0, residual["bos"]] = 1
    tokens[list(sinks), residual["huge"]] = 100
    unembedding = torch.zeros(V, residual.width)
    unembedding[:, residual["out"]] = torch.eye(V)
    stream = Stream(
        residual, features, values, tokens, torch.zeros(64, residual.width), unembedding
    )
    by_weight = {("w", "one"): 64.0}
    key = {("w", "w"): 1.0, ("bos", "bos"): 1.0, ("tok", "tok"): 1.0}
    out = {("out", "tok"): 1.0}
    to_nine = torch.zeros(V, 1)
    to_nine[9] = 9
    plans = {
        "read": HeadPlan(by_weight, key, {("tok", "tok"): strength}, out),
        "mute": HeadPlan(by_weight, key, {("tok", "tok"): 1.0}),
        "bos": HeadPlan({("bos", "one"): 200.0}, key),
        "loud": HeadPlan(by_weight, key, {("tok", "bos"): to_nine}),
        "echo": HeadPlan({("tok", "tok"): 200.0}, key, {("tok", "out"): 1.0}),
    }
    hf = assemble(stream, [[plans[name] for name in names] for names in layers])
    return Model(hf, name="planted")


def pic(*tokens: int, image: tuple[int, int] = (2, 4), **more: Any) -> Prompt:
    return Prompt(tokens, {"image": (image,)}, **more)


PICTURE = pic(TEXT_SINK, 5, IMAGE_SINK, SEEN, 6)


@torch.no_grad()
def logits(model: Model, batch: Batch) -> list[Tensor]:
    """Per prompt, its own rows."""
    out = model.hf(**batch.inputs()).logits
    return [
        out[b, o : o + len(p)]
        for b, (p, o) in enumerate(zip(batch.prompts, batch.offsets, strict=True))
    ]


@torch.no_grad()
def stepwise(model: Model, recipe: Recipe, prompts: list[Prompt], extra: list[int]) -> Tensor:
    """Logits of the given next tokens [example, step, vocabulary], fed one by one with a cache."""
    batch = model.batch(prompts, side="left")
    mask, cache, out = batch.attention_mask, None, []
    ids = batch.input_ids
    with recipe.on(model):
        for step in range(len(extra) + 1):
            done = model.hf(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            cache = done.past_key_values
            out.append(done.logits[:, -1])
            if step < len(extra):
                ids = torch.full((len(prompts), 1), extra[step])
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.stack(out, 1)


def shares(tokens: Sequence[int], weights: Mapping[int, float] = WEIGHTS) -> list[list[float]]:
    """Rows of attention of a planted head, by hand."""
    w = [weights.get(t, 1e-30) for t in tokens]
    return [[x / sum(w[: i + 1]) for x in w[: i + 1]] for i in range(len(w))]


def moved(row: list[float], keys: Sequence[int], to: Sequence[int], share: float) -> list[float]:
    freed = sum((1 - share) * row[j] for j in keys if j < len(row))
    into = [j for j in to if j < len(row) and j not in keys]
    total = sum(row[j] for j in into)
    if total == 0:
        return row
    return [
        share * a if j in keys else a + (freed * a / total if j in into else 0)
        for j, a in enumerate(row)
    ]


def as_logits(rows: list[list[float]], tokens: Sequence[int]) -> Tensor:
    out = torch.zeros(len(rows), V)
    for i, row in enumerate(rows):
        for j, a in enumerate(row):
            out[i, tokens[j]] += a
    return out


# VAR ----------------------------------------------------------------------------------------


def test_var_moves_the_row_of_the_card() -> None:
    model = planted(["read", "mute"])
    recipe = make_var(model, [PICTURE], layers=0, rho=0.7)
    batch = model.batch([PICTURE])
    before = logits(model, batch)[0][-1]
    with recipe.on(model):
        after = logits(model, batch)[0][-1]
    places = [TEXT_SINK, IMAGE_SINK, SEEN]
    torch.testing.assert_close(before[places], torch.tensor([0.5, 0.3, 0.2]), **CLOSE)
    torch.testing.assert_close(after[places], torch.tensor([0.30, 0.18, 0.52]), **CLOSE)
    assert recipe.notes["sinks"] == {"0": [[0, 2]]}
    assert recipe.notes["visual"] == {"0": [[2]]}
    huge = 2 * V + 3
    assert recipe.notes["dims"] == [huge] == list(sink_dims(model, [PICTURE], layers=0))
    assert "2503.03321" in recipe.notes["citation"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_var_rows_by_hand(side: str) -> None:
    model = planted(["read"])
    prompts = [PICTURE, pic(7, SEEN, SEEN, IMAGE_SINK, TEXT_SINK, 6, 8, image=(1, 4))]
    recipe = make_var(model, prompts, layers=0, rho=0.7)
    batch = model.batch(prompts, side=side)
    with recipe.on(model):
        got = logits(model, batch)
    for prompt, sinks, mine in zip(prompts, [(0, 2), (3, 4)], got, strict=True):
        image, rows = prompt.positions("image"), shares(prompt.tokens)
        changed = 0
        for i in range(image[-1] + 1, len(rows)):
            inside = sum(rows[i][j] for j in image)
            if sum(rows[i][j] for j in image if j in sinks) <= 0.7 * inside >= 0.7 * 0.2:
                rows[i] = moved(rows[i], sinks, image, 0.6)
                changed += 1
        assert changed
        torch.testing.assert_close(mine, as_logits(rows, prompt.tokens), **CLOSE)


def test_var_leaves_rows_that_are_not_about_the_image() -> None:
    model, batch = planted(["read"]), [PICTURE]
    base = logits(model, model.batch(batch))[0]
    for params in ({"rho": 0.5}, {"rho": 0.7, "least": 0.51}):
        with make_var(model, batch, layers=0, **params).on(model):
            torch.testing.assert_close(logits(model, model.batch(batch))[0], base, **CLOSE)


def test_var_limits_belong_to_the_rows_about_the_image() -> None:
    # The row is (1/2, 1/4, 1/4): half of the image's mass of 1/2 is on its sink.
    model = planted(["read"], weights={TEXT_SINK: 2.0, IMAGE_SINK: 1.0, SEEN: 1.0})
    batch = model.batch([PICTURE])
    for params, row in (
        ({}, [0.30, 0.15, 0.55]), ({"least": 0.5}, [0.30, 0.15, 0.55]),
        ({"p": 0.0}, [0.0, 0.0, 1.0]), ({"rho": 0.49}, [0.5, 0.25, 0.25]),
        ({"least": 0.51}, [0.5, 0.25, 0.25]),
    ):  # fmt: skip
        with make_var(model, [PICTURE], layers=0, **params).on(model):
            got = logits(model, batch)[0][-1, [TEXT_SINK, IMAGE_SINK, SEEN]]
        torch.testing.assert_close(got, torch.tensor(row), **CLOSE)


def test_var_gives_to_the_image_alone() -> None:
    # The row is (4, 4, 1, 1)/10, its second token neither sink nor image: it keeps its 0.4.
    model = planted(["read"], weights={TEXT_SINK: 4.0, 5: 4.0, IMAGE_SINK: 1.0, SEEN: 1.0})
    with make_var(model, [PICTURE], layers=0, least=0.1).on(model):
        got = logits(model, model.batch([PICTURE]))[0][-1, [TEXT_SINK, 5, IMAGE_SINK, SEEN]]
    torch.testing.assert_close(got, torch.tensor([0.24, 0.4, 0.06, 0.3]), **CLOSE)


def test_var_sinks_by_hand() -> None:
    # Entry d of token j is s_j and all others are 1: φ = s/√((s² + 63)/64), 2.0158 for s = 2.
    model = planted(["read"])
    rows = model.hf.model.embed_tokens.weight.data
    rows.fill_(1.0)
    rows[TEXT_SINK, 40], rows[IMAGE_SINK, 41], rows[SEEN, 42] = 2.0, -3.0, 4.0
    sizes = [s / ((s * s + 63) / 64) ** 0.5 for s in (2.0, 3.0, 4.0)]
    for tau, want in ((1.9, [0, 2]), (sizes[0] + 1e-3, [2]), (sizes[1] - 1e-3, [2])):
        recipe = make_var(model, [PICTURE], layers=0, tau=tau, dims=(40, 41))
        assert recipe.notes["sinks"] == {"0": [want]} and recipe.notes["visual"] == {"0": [[2]]}
    with pytest.raises(InputError, match="no token is a sink"):
        make_var(model, [PICTURE], layers=0, tau=sizes[1] + 1e-3, dims=(40, 41))
    # The median entry is 1: dimensions come by their largest entry, none below a tenth of it.
    assert sink_dims(model, [PICTURE], layers=0, most=3) == (42, 41, 40)
    rows[SEEN, 42] = 25.0
    assert sink_dims(model, [PICTURE], layers=0, most=3) == (42, 41)
    assert sink_dims(model, [PICTURE], layers=0, most=1) == (42,)


def test_var_while_decoding() -> None:
    model = planted(["read"])
    extra = [7, SEEN, 8]
    prompts = [PICTURE, pic(7, 8, SEEN, IMAGE_SINK, TEXT_SINK, 6)]
    recipe = make_var(model, prompts, layers=0, rho=0.7)
    got = stepwise(model, recipe, prompts, extra)
    for prompt, sinks, mine in zip(prompts, [(0, 2), (3, 4)], got, strict=True):
        tokens = [*prompt.tokens, *extra]
        rows = shares(tokens)[len(prompt) - 1 :]
        rows = [moved(row, sinks, prompt.positions("image"), 0.6) for row in rows]
        torch.testing.assert_close(mine, as_logits(rows, tokens), **CLOSE)


def test_var_leaves_the_ends_of_the_model_alone() -> None:
    names = [["read", "mute"]] * 4
    recipe = make_var(planted(*names), [PICTURE])
    assert recipe.heads == (HeadId(2, 0), HeadId(2, 1))
    with pytest.raises(InputError, match="the published choice of layers is empty"):
        make_var(planted(["read"]), [PICTURE])


def test_var_takes_given_sinks_and_skips_an_image_of_sinks() -> None:
    model = planted(["read"])
    both = [PICTURE, pic(5, 6, IMAGE_SINK, IMAGE_SINK, 7)]
    recipe = make_var(model, both, layers=0, sinks=[(3,), (2, 3)], rho=1.0)
    assert [e.where.keys for e in recipe.edits] == [Positions(prompt=(3,))]
    with pytest.raises(InputError, match="sinks are given per prompt"):
        make_var(model, both, layers=0, sinks=[(3,)])
    with pytest.raises(InputError, match=r"a sink lies in 0\.\.4"):
        make_var(model, [PICTURE], layers=0, sinks=[(5,)])
    with pytest.raises(InputError, match="no token is a sink"):
        make_var(model, [both[1]], layers=0)


# ACT ----------------------------------------------------------------------------------------


def column_sinks(rows: list[list[float]], threshold: float) -> list[int]:
    n = len(rows)
    means = [sum(rows[q][j] for q in range(j, n)) / (n - j) for j in range(n)]
    return [j for j in range(1, n) if means[j] > threshold]


ACT_WEIGHTS = {0: 5.0, 1: 3.0, 2: 2.0}


def test_act_moves_the_row_in_proportion() -> None:
    model = planted(["read"], weights=ACT_WEIGHTS)
    prompt = Prompt((0, 1, 2, 5))
    recipe = make_act(model, [prompt], layers=0, threshold=0.25)
    assert recipe.notes["sinks"] == {"L0H0": [[1]]}
    with recipe.on(model):
        row = logits(model, model.batch([prompt]))[0][-1]
    want = [0.5 + 0.18 * 0.5 / 0.7, 0.12, 0.2 + 0.18 * 0.2 / 0.7]
    torch.testing.assert_close(row[:3], torch.tensor(want), **CLOSE)
    with recipe.on(model):  # the first row is what it was: one token sees itself alone
        torch.testing.assert_close(logits(model, model.batch([prompt]))[0][0, 0], torch.tensor(1.0))


def test_act_with_and_without_cache() -> None:
    model, extra = planted(["read"], weights=ACT_WEIGHTS), [1, 6, 2]
    prompts = [Prompt((0, 1, 2, 5, 1, 7)), Prompt((2, 5, 6, 1)), Prompt((1, 1, 2, 0, 5, 5, 2))]
    recipe = make_act(model, prompts, layers=0, threshold=0.2)
    cached = stepwise(model, recipe, prompts, extra)
    whole = []
    for prompt in prompts:
        longer = Prompt((*prompt.tokens, *extra))
        with make_act(model, [prompt], layers=0, threshold=0.2).on(model):
            whole.append(logits(model, model.batch([longer]))[0][len(prompt) - 1 :])
        sinks = column_sinks(shares(prompt.tokens, ACT_WEIGHTS), 0.2)
        assert sinks
        rows = [
            moved(row, sinks, range(len(row)), 0.4) for row in shares(longer.tokens, ACT_WEIGHTS)
        ]
        hand = as_logits(rows, longer.tokens)[len(prompt) - 1 :]
        torch.testing.assert_close(whole[-1], hand, **CLOSE)
    torch.testing.assert_close(cached, torch.stack(whole), **CLOSE)


def test_act_never_takes_the_first_token() -> None:
    model = planted(["read"], weights=ACT_WEIGHTS)
    with pytest.raises(InputError, match="no key but the first"):
        make_act(model, [Prompt((0, 5, 6, 7))], layers=0)
    # A sink in mid-text is one even if the first token is none. Rows: 1 | ½ ½ | 0 0 1 | 0 0 1 0,
    # so that c = (3/8, 1/6, 1, 0).
    sunk = Prompt((5, 6, 1, 7))
    for threshold, sinks in ((0.1, [1, 2]), (0.16, [1, 2]), (0.17, [2]), (0.9, [2])):
        recipe = make_act(model, [sunk], layers=0, threshold=threshold)
        assert recipe.notes["sinks"] == {"L0H0": [sinks]}
    with pytest.raises(InputError, match="no key but the first"):
        make_act(model, [sunk], layers=0, threshold=0.17, queries=3)


def test_act_takes_only_what_exceeds_the_threshold() -> None:
    model, equal = planted(["read"], weights={1: 1.0}), Prompt((1, 1))  # c = (3/4, 1/2)
    assert make_act(model, [equal], layers=0, threshold=0.499).notes["sinks"] == {"L0H0": [[1]]}
    with pytest.raises(InputError, match="no key but the first"):
        make_act(model, [equal], layers=0, threshold=0.5)
    found = make_sink_removal(model, [equal], epsilon=0.5, queries=1)  # sinks may reach theirs
    assert found.notes["sinks"] == {"L0H0": [[0, 1]]}
    found = make_sink_removal(model, [equal], epsilon=0.501, queries=1)
    assert found.notes["sinks"] == {"L0H0": [[0]]}


def test_act_judges_layers_on_calibrated_inputs() -> None:
    model = handle("llama")
    prompts = random_prompts(3)
    batch = model.batch(prompts, side="left")
    recipe = make_act(model, batch, layers=(0, 1), threshold=0.2)

    def sinks(alpha: Tensor) -> dict[str, list[list[int] | None]]:
        out = {}
        for h in range(4):
            rows = []
            for b, (p, o) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
                found = [j for j in range(1, len(p)) if float(alpha[b, h, o + j]) > 0.2]
                rows.append(found or None)
            out[f"H{h}"] = rows
        return out

    plain = read(model, batch, {"a": KeyMass()})["a"].values
    first = make_act(model, batch, layers=0, threshold=0.2)
    with first.on(model):
        later = read(model, batch, {"a": KeyMass()})["a"].values
    want = {0: sinks(plain[:, 0]), 1: sinks(later[:, 1])}
    got = recipe.notes["sinks"]
    for layer, h in itertools.product((0, 1), range(4)):
        assert got.get(f"L{layer}H{h}", [None] * 3) == want[layer][f"H{h}"]
    assert sinks(plain[:, 1]) != want[1]


def test_act_search_keeps_the_heads_that_help() -> None:
    # `read` says token 1 where token 2 is right: the last row of a hard prompt is (0, 5, 3, 0)/8,
    # and c of token 1 is (1 + 5/8 + 5/8)/3 = 3/4. Calibrated the row is (0, 1/4, 3/4, 0).
    # The answer takes no part: with its row (0, 5, 3, 0, 3)/11 the mean would be 0.68, below 0.7.
    # In the easy prompt no c but the first exceeds 0.7. `mute` has the same rows and is idle.
    weights = {0: 1e-30, 1: 5.0, 2: 3.0}
    model = planted(["mute", "read", "bos"], weights=weights)
    hard = [Prompt((0, 1, 2, n), answer=(2,), id=str(n)) for n in (5, 6)]
    easy = [Prompt((0, 2, 2, 1, 7), answer=(2,))]  # right as it is: 6 of 11
    found = search_heads(model, hard + easy, layers=0, threshold=0.7, batch_size=2)
    assert found.base == pytest.approx(1 / 3)
    assert found.accuracy[HeadId(0, 1)] == 1
    assert found.accuracy[HeadId(0, 0)] == found.accuracy[HeadId(0, 2)] == found.base
    assert found.heads == (HeadId(0, 1),)
    recipe = make_act(model, hard, layers=0, threshold=0.7, labelled=hard + easy)
    assert recipe.heads == (HeadId(0, 1),)
    assert recipe.notes["accuracy"]["base"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="no head raises the mean accuracy"):
        make_act(model, hard, heads=["0.0"], threshold=0.7, labelled=hard)


# VHR ----------------------------------------------------------------------------------------

LOOK = pic(0, 5, SEEN, SEEN, 6)


def test_vhd_is_exact() -> None:
    model = planted(["read", "bos", "mute", "bos"], weights={0: 1.0, SEEN: 1e30}, strength=3.0)
    recipe = make_vhr(model, [LOOK], layers=0)
    vhd = {h: v[0] for h, v in recipe.notes["vhd"].items()}
    # With the span `read` carries 3·onehot(SEEN), without it 3·onehot(BOS); so does `mute`, at 1.
    assert vhd == pytest.approx({"L0H0": 3 * 2**0.5, "L0H1": 0, "L0H2": 2**0.5, "L0H3": 0})
    assert vhd["L0H1"] == vhd["L0H3"] == 0.0
    # 3√2 lies beyond μ + σ = √2 + √3, and ‖z without‖² = 9 of (9, 0, 1, 0) beyond 2.5 + 3.77.
    assert recipe.notes["outliers"] == {"L0H0": [True]} and recipe.heads == (HeadId(0, 2),)
    every = make_vhr(model, [LOOK], layers=0, outliers=False)
    assert every.notes["vhd"] == recipe.notes["vhd"] and every.notes["outliers"] == {}
    assert every.heads == (HeadId(0, 0), HeadId(0, 2))
    blind = planted(["read", "bos"], weights={SEEN: 1e30, 6: 1e-4}, strength=3.0)
    blind.hf.model.layers[0].self_attn.v_proj.weight.data[6] = 0  # token 6 carries nothing
    exact = make_vhr(blind, [LOOK], layers=0)
    assert exact.notes["vhd"] == {"L0H0": [3.0], "L0H1": [0.0]}


def test_vhr_doubles_z() -> None:
    model = planted(["read", "bos"], weights={SEEN: 1.0, 6: 2.0})
    batch = model.batch([LOOK])
    base = logits(model, batch)[0]
    recipe = make_vhr(model, [LOOK], layers=0)
    with recipe.on(model):
        torch.testing.assert_close(logits(model, batch)[0], 2 * base, rtol=0, atol=0)
    with make_vhr(model, [LOOK], layers=0, alpha=3.0, positions=Positions(prompt=(-1,))).on(model):
        got = logits(model, batch)[0]
    torch.testing.assert_close(got[-1], 3 * base[-1], rtol=0, atol=0)
    torch.testing.assert_close(got[:-1], base[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("layered", [True, False])
def test_vhr_judges_layers_on_reinforced_inputs(layered: bool) -> None:
    model = planted(["read", "bos"], ["echo", "bos"], weights={SEEN: 1e30, 6: 1e-4})
    model.hf.model.layers[0].self_attn.v_proj.weight.data[6] = 0
    recipe = make_vhr(model, [LOOK], layers=(0, 1), layered=layered)
    # `echo` carries what `read` wrote at its own position: the reinforced 2·onehot, or 1·onehot.
    assert recipe.notes["vhd"]["L0H0"] == [1.0]
    assert recipe.notes["vhd"]["L1H0"] == [2.0 if layered else 1.0]
    assert recipe.heads == (HeadId(0, 0), HeadId(1, 0))


def test_vhr_drops_heads_that_are_loud_without_the_image() -> None:
    # `loud` carries 9 at BOS and nothing at the image: it changes most, and by what it lost.
    model = planted(["loud", "read", "bos", "bos"], weights={0: 1.0, SEEN: 1e30})
    with_rule = make_vhr(model, [LOOK], layers=0)
    without = make_vhr(model, [LOOK], layers=0, outliers=False)
    assert with_rule.notes["vhd"]["L0H0"] == [9.0]
    assert with_rule.heads == (HeadId(0, 1),)
    assert with_rule.notes["outliers"] == {"L0H0": [True]}
    assert without.heads == (HeadId(0, 0), HeadId(0, 1))


def test_vhr_outliers_are_judged_by_the_square() -> None:
    # ‖z without‖ of six heads is (5, 4, 0, 0, 0, 0), beyond μ + σ = 3.64 twice; so is VHD. Of the
    # squares only 25 lies beyond 6.83 + 10.02.
    model = planted(["loud", "loud", *["bos"] * 4], weights={0: 1.0, SEEN: 1e30})
    v = model.hf.model.layers[0].self_attn.v_proj.weight.data
    v[:V] *= 5 / 9
    v[V : 2 * V] *= 4 / 9
    recipe = make_vhr(model, [LOOK], layers=0)
    assert [recipe.notes["vhd"][f"L0H{h}"][0] for h in range(6)] == pytest.approx([5, 4, *[0] * 4])
    assert recipe.notes["outliers"] == {"L0H0": [True]} and recipe.heads == (HeadId(0, 1),)


def test_vision_heads_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    vhd, text = torch.rand(40, 7, generator=g) ** 3, torch.rand(40, 7, generator=g) ** 3
    chosen, dropped = choose_vision_heads(vhd, text)
    assert bool(dropped.any())
    for b in range(40):
        v, t = vhd[b].tolist(), text[b].tolist()
        far = []
        for x in (v, t):
            mean = sum(x) / 7
            sd = (sum((a - mean) ** 2 for a in x) / 7) ** 0.5
            far.append([a > mean + sd for a in x])
        out = [a and c for a, c in zip(*far, strict=True)]
        kept = [0 if o else a for a, o in zip(v, out, strict=True)]
        median = sorted(kept)[3]
        assert dropped[b].tolist() == out
        assert chosen[b].tolist() == [a > median for a in kept]


def test_vhr_shared_heads_hold_for_any_prompts() -> None:
    model, prompts = handle("llama"), random_prompts(3)
    recipe = make_vhr(model, prompts, layers=(0, 1), shared=True)
    assert isinstance(recipe.edits[0].strength, float) and recipe.edits[0].plain
    single = [make_vhr(model, [p], layers=0, layered=False) for p in prompts]
    for h in range(4):
        want = [s.notes["vhd"][f"L0H{h}"][0] for s in single]
        assert recipe.notes["vhd"][f"L0H{h}"] == pytest.approx(want, rel=1e-4)


def test_vhr_with_pixels() -> None:
    model = handle("llava")
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 16, 16, generator=g)
    n = 16
    prompts = [
        Prompt((1, 5, *[96] * n, 7, 8), {"image": ((2, 2 + n),)}),
        Prompt((1, *[96] * n, 9, 4, 3, 8), {"image": ((1, 1 + n),)}),
    ]
    plain = model.batch(prompts, side="left")

    def seen(*rows: int) -> Batch:
        b = model.batch([prompts[i] for i in rows], side="left")
        return Batch(b.prompts, b.input_ids, b.attention_mask, b.offsets,
                     {"pixel_values": pixels[list(rows)]})  # fmt: skip

    both = make_vhr(model, seen(0, 1), layers=(0, 1))
    for i in range(2):
        one = make_vhr(model, seen(i), layers=(0, 1))
        for head, values in one.notes["vhd"].items():
            assert both.notes["vhd"][head][i] == pytest.approx(values[0], rel=1e-3, abs=1e-4)
    assert min(v[0] for v in both.notes["vhd"].values()) > 0
    other = Batch(plain.prompts, plain.input_ids, plain.attention_mask, plain.offsets,
                  {"pixel_values": 2 * pixels})  # fmt: skip
    same = make_vhr(model, seen(0, 1), without=other, layers=0)
    assert max(map(max, same.notes["vhd"].values())) > 0
    with pytest.raises(InputError, match="more than the median of its layer"):
        make_vhr(model, seen(0, 1), without=seen(0, 1), layers=0)


# Temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["scores", "q"])
def test_temperature_is_dividing_scores(site: str) -> None:
    model = planted(["read"])
    for t in (0.5, 1.7):
        flat = {token: w ** (1 / t) for token, w in WEIGHTS.items()}
        with make_temperature(model, temperature=t, site=site).on(model):
            got = logits(model, model.batch([PICTURE]))[0]
        want = as_logits(shares(PICTURE.tokens, flat), PICTURE.tokens)
        torch.testing.assert_close(got[[0, 2, 3, 4]], want[[0, 2, 3, 4]], **CLOSE)


def test_temperature_by_hand() -> None:
    model, batch = planted(["read"]), [PICTURE]
    for t, row in ((0.5, [25 / 38, 9 / 38, 4 / 38]), (1.0, [0.5, 0.3, 0.2])):
        with make_temperature(model, temperature=t).on(model):
            got = logits(model, model.batch(batch))[0][-1]
        places = [TEXT_SINK, IMAGE_SINK, SEEN]
        torch.testing.assert_close(got[places], torch.tensor(row), **CLOSE)
    # c·log 5 = 1 at the fifth token: weights are squared, at the first they are what they are.
    with make_temperature(model, temperature=1.0, log_n=1 / math.log(5)).on(model):
        got = logits(model, model.batch(batch))[0]
    torch.testing.assert_close(got[-1][places], torch.tensor([25, 9, 4]) / 38, **CLOSE)
    torch.testing.assert_close(got[0][TEXT_SINK], torch.tensor(1.0), **CLOSE)


def test_temperature_per_head() -> None:
    model = planted(["read", "read"])
    heads = ["0.1", "0.0"]
    with make_temperature(model, temperature=(2.0, 0.5), heads=heads).on(model):
        got = logits(model, model.batch([PICTURE]))[0][-1]
    want = sum(
        as_logits(shares(PICTURE.tokens, {k: w ** (1 / t) for k, w in WEIGHTS.items()}),
                  PICTURE.tokens)[-1]
        for t in (2.0, 0.5)
    )  # fmt: skip
    torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(InputError, match="one per named head; got 2 for 1"):
        make_temperature(model, temperature=(2.0, 0.5), heads=["0.1"])
    with pytest.raises(InputError, match="must be above 0"):
        make_temperature(model, temperature=0.0)


@pytest.mark.parametrize("site", ["scores", "q"])
def test_log_n_follows_the_position(site: str) -> None:
    model, c = planted(["read"]), 0.3
    tokens = [SEEN, IMAGE_SINK, TEXT_SINK, *[5 + i % 8 for i in range(40)]]
    extra = [7, SEEN, 8]

    def want(step: float) -> Tensor:
        rows = []
        for n in range(1, len(tokens) + len(extra) + 1):
            scale = 1 + c * math.log(n)
            some = {token: w**scale for token, w in WEIGHTS.items()}
            rows.append(shares([*tokens, *extra][:n], some)[-1])
        return as_logits(rows, [*tokens, *extra])

    fine = make_temperature(model, temperature=1.0, log_n=c, step=1e-9, longest=60, site=site)
    coarse = make_temperature(model, temperature=1.0, log_n=c, step=0.05, longest=60, site=site)
    whole = model.batch([Prompt((*tokens, *extra))])
    with fine.on(model):
        torch.testing.assert_close(logits(model, whole)[0], want(0), **LOOSE)
    with coarse.on(model):
        got = logits(model, whole)[0]
    torch.testing.assert_close(got[:9], want(0)[:9], **LOOSE)  # single places
    assert 1e-5 < float((got - want(0)).abs().max()) < c * 0.05 * math.log(2.5)
    short = [Prompt(tuple(tokens)), Prompt(tuple(tokens[:30]))]
    steps = stepwise(model, fine, short, extra)
    torch.testing.assert_close(steps[0], want(0)[len(tokens) - 1 :], **LOOSE)


# Sink removal -------------------------------------------------------------------------------


def test_sink_removal_by_hand() -> None:
    # Rows 1 | 1 0 | 5/8 0 3/8 | .5 0 .3 .2 | .5 0 .3 .2 0: α of the first key is 3.625/5 = 0.725,
    # of the third (3/8 + .3 + .3)/3 = 0.325, of the fourth 0.2.
    model, batch = planted(["read"]), [PICTURE]
    wanted = {
        ("knockout", 0.5): ([0], [0, 0.6, 0.4]), ("drop", 0.5): ([0], [0, 0.3, 0.2]),
        ("knockout", 0.32): ([0, 2], [0, 0, 1]), ("drop", 0.32): ([0, 2], [0, 0, 0.2]),
        ("knockout", 0.33): ([0], [0, 0.6, 0.4]), ("drop", 0.73): (None, [0.5, 0.3, 0.2]),
    }  # fmt: skip
    for (op, epsilon), (sinks, row) in wanted.items():
        if sinks is None:
            with pytest.raises(InputError, match="no key receives"):
                make_sink_removal(model, batch, epsilon=epsilon, queries=1, op=op)
            continue
        recipe = make_sink_removal(model, batch, epsilon=epsilon, queries=1, op=op)
        assert recipe.notes["sinks"] == {"L0H0": [sinks]}
        with recipe.on(model):
            got = logits(model, model.batch(batch))[0]
        places = [TEXT_SINK, IMAGE_SINK, SEEN]
        torch.testing.assert_close(got[-1][places], torch.tensor(row, dtype=got.dtype), **CLOSE)
        torch.testing.assert_close(got[0][TEXT_SINK], torch.tensor(1.0), **CLOSE)


@pytest.mark.parametrize("op", ["knockout", "drop"])
def test_sink_removal_rows_by_hand(op: str) -> None:
    model = planted(["read", "mute"])
    prompts = [
        Prompt((TEXT_SINK, SEEN, 5, IMAGE_SINK, SEEN, 6)),
        Prompt((5, SEEN, TEXT_SINK, SEEN, SEEN, 6, 7, 8)),
    ]
    recipe = make_sink_removal(model, prompts, queries=1, op=op)
    assert recipe.notes["sinks"]["L0H0"] == [[0], [1, 2]]
    for side in ("left", "right"):
        with recipe.on(model):
            got = logits(model, model.batch(prompts, side=side))
        for prompt, sinks, mine in zip(prompts, [[0], [1, 2]], got, strict=True):
            rows = shares(prompt.tokens)
            for i, row in enumerate(rows):
                kept = [0 if j in sinks else a for j, a in enumerate(row)]
                if any(j not in sinks for j in range(i + 1)):
                    total = sum(kept) if op == "knockout" else 1
                    rows[i] = [a / total for a in kept]
            torch.testing.assert_close(mine, as_logits(rows, prompt.tokens), **CLOSE)


def test_sink_removal_while_decoding() -> None:
    model, extra = planted(["read"]), [SEEN, 7]
    prompts = [Prompt((TEXT_SINK, SEEN, 5, 6, 7)), Prompt((5, TEXT_SINK, SEEN, 8))]
    got = stepwise(model, make_sink_removal(model, prompts, queries=2), prompts, extra)
    for prompt, sink, mine in zip(prompts, (0, 1), got, strict=True):
        tokens = [*prompt.tokens, *extra]
        rows = []
        for row in shares(tokens)[len(prompt) - 1 :]:
            kept = [0 if j == sink else a for j, a in enumerate(row)]
            rows.append([a / sum(kept) for a in kept])
        torch.testing.assert_close(mine, as_logits(rows, tokens), **CLOSE)
    with pytest.raises(InputError, match="no key receives"):
        make_sink_removal(model, prompts)


# Fitted -------------------------------------------------------------------------------------

PLANTED = HeadId(1, 2)


@pytest.fixture(scope="module")
def classes() -> Model:
    """A model that answers with the class that L1H2 copies; no other head knows it."""
    zoo = planted_llama(norm="identity", n_kv_heads=4)
    return load(zoo.hf, tokenizer=zoo.tokenizer)


def test_iti_by_hand(classes: Model) -> None:
    prompts = [p for p in class_prompts(8, per_class=12, length=9) if p.meta["class"] < 2]
    labels = ",".join(str(p.meta["class"]) for p in prompts)
    texts = {"labels": labels, "k": "1", "alpha": "3.0", "draws": "0"}
    recipe = make_recipe("iti", classes, prompts, texts)
    assert recipe.heads == (PLANTED,)
    edit = recipe.edits[0]
    # z is the one-hot of the class, so θ = (−1, 1)/√2 and z·θ = ±1/√2 on twelve prompts each.
    theta = torch.zeros(1, 16, dtype=edit.tensors["vector"].dtype)
    theta[0, 0], theta[0, 1] = -(0.5**0.5), 0.5**0.5
    torch.testing.assert_close(edit.tensors["vector"], theta, rtol=0, atol=1e-6)
    width = z_of(classes, prompts[0]).norm()
    assert float(edit.strength[0]) == pytest.approx(3 * float(width) * (0.5 * 24 / 23) ** 0.5)
    # The label may be a fact of the prompt, and the prompts a batch; the fit is that of `probes`.
    marked = [replace(p, meta={"label": p.meta["class"]}) for p in prompts]
    fitted = fit_iti(classes, prompts, [p.meta["class"] for p in prompts], k=1, alpha=3, draws=0)
    for side in ("left", "right"):
        again = make_iti(classes, classes.batch(marked, side=side), k=1, alpha=3, draws=0)
        torch.testing.assert_close(again.edits[0].strength, fitted.edits[0].strength, **CLOSE)
        assert str(again.edits[0]) == str(fitted.edits[0])
    more: dict[str, Any] = {
        "k": 2, "alpha": -2.0, "towards": 0, "groups": [i // 2 for i in range(24)],
        "tuning": prompts[:7], "probe": "mean-difference", "folds": 3, "draws": 19,
        "span": "all", "positions": Positions(prompt=(0,)), "seed": 3,
    }  # fmt: skip
    fitted = fit_iti(classes, prompts, [p.meta["class"] for p in prompts], **more)
    again = make_iti(classes, marked, **more)
    assert str(again.edits[0]) == str(fitted.edits[0])
    for a, b in zip(again.edits, fitted.edits, strict=True):
        assert torch.equal(a.strength, b.strength)
        assert torch.equal(a.tensors["vector"], b.tensors["vector"])
    assert {k: again.notes[k] for k in fitted.notes} == dict(fitted.notes)
    # z + α·σ·θ at the last token decides the answer; α of the other sign gives the other.
    batch = classes.batch(prompts)
    for sign, said in ((1, 1), (-1, 0)):
        with (sign * recipe).on(classes):
            rows = classes.forward(batch.inputs()).logits[:, -1]
        assert bool((rows.argmax(-1) == said).all())
    with pytest.raises(InputError, match="need a label each"):
        make_iti(classes, prompts, k=1)
    with pytest.raises(InputError, match="takes values of Prompt"):
        make_recipe("iti", classes, marked, {"tuning": "prompts.jsonl"})
    with pytest.raises(InputError, match="takes values of Positions"):
        make_recipe("iti", classes, marked, {"positions": "all"})


@torch.no_grad()
def z_of(model: Model, prompt: Prompt) -> Tensor:
    """What the planted head carries at the last token, by a hook of torch alone."""
    seen: list[Tensor] = []
    hook = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda m, a: seen.append(a[0][0, -1, 32:48])
    )
    model.hf(input_ids=torch.tensor([prompt.tokens]))
    hook.remove()
    return seen[0]


def test_function_vector_by_hand(classes: Model) -> None:
    shown = [p for p in class_prompts(8, per_class=4, length=9) if p.meta["class"] == 3]
    others = [p for p in class_prompts(8, per_class=2, length=9, seed=4) if p.meta["class"] != 3]
    corrupted = [replace(p, answer=(3,)) for p in others]
    params = {"corrupted": corrupted, "top": "1", "layer": "1", "strength": "2.0"}
    recipe = make_recipe("function-vector", classes, shown, params)
    w_o = classes.hf.model.layers[1].self_attn.o_proj.weight.detach()[:, 32:48]
    vector = recipe.edits[0].tensors["vector"][0]
    torch.testing.assert_close(vector.float(), w_o @ z_of(classes, shown[0]), **CLOSE)
    assert recipe.edits[0].strength == 2 and recipe.notes["params"]["layer"] == 1
    assert list(recipe.notes["heads"]) == recipe.notes["claimed"] == [str(PLANTED)]
    batch = classes.batch(others)
    with recipe.on(classes):
        rows = classes.forward(batch.inputs()).logits[:, -1]
    assert bool((rows.argmax(-1) == 3).all())
    plain = function_vector(classes, shown, corrupted, top=1, layer=1, strength=2.0, control=False)
    quick = make_function_vector(
        classes, shown, corrupted=corrupted, top=1, layer=1, strength=2.0, control=False
    )
    assert quick.notes["heads"] == plain.recipe.notes["heads"] and "claimed" not in quick.notes
    with pytest.raises(InputError, match="do not show the task; got none"):
        make_function_vector(classes, shown)


# All ----------------------------------------------------------------------------------------


def random_prompts(seed: int, lengths: Sequence[int] = (11, 8, 14)) -> list[Prompt]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for row, n in enumerate(lengths):
        tokens = torch.randint(3, 90, (n,), generator=g).tolist()
        out.append(Prompt(tuple(tokens), {"image": ((1 + row, 5 + row),)}, id=f"p{row}"))
    return out


CASES: dict[str, dict[str, Any]] = {
    "vhr": {"layers": (0, 1)},
    "var": {"layers": (0, 1), "tau": 2.0, "dims": (3, 7, 11), "rho": 0.9, "least": 0.05},
    "act": {"layers": (0, 1), "threshold": 0.2, "queries": 2},
    "temperature": {"temperature": 0.7, "log_n": 0.2},
    "sink-removal": {"epsilon": 0.25, "queries": 2},
}


FITTED: dict[str, dict[str, Any]] = {
    "iti": {"labels": (0, 1, 1) * 4, "k": 3, "alpha": 4.0, "folds": 2, "draws": 0},
    "function-vector": {"top": 3, "layer": 0, "strength": 3.0, "control": False},
}
"""Makers that look at other prompts than those that are run."""
ALL = [*CASES, *FITTED]


def made(name: str, model: Model, prompts: list[Prompt], side: str = "") -> Recipe:
    """The recipe of a maker for some prompts; what it is fitted on as a batch, given a side."""
    if name in CASES:
        return make_recipe(name, model, prompts, CASES[name])
    other: Any = random_prompts(8, range(6, 18))
    other = model.batch(other, side=side) if side else other
    if name == "function-vector":
        wrong = [replace(p, answer=(5 + i,)) for i, p in enumerate(random_prompts(9))]
        return make_recipe(name, model, other, {**FITTED[name], "corrupted": wrong})
    return make_recipe(name, model, other, FITTED[name])


def test_every_maker_has_a_case() -> None:
    by_spans = ["boost", "lqcd", "vcd"]  # see test_heads_makers_sight
    assert sorted(MAKERS) == sorted([*ALL, *by_spans])
    for name in MAKERS:
        entry = MAKERS[name]
        assert entry.summary and "arXiv" in entry.citation and entry.make.__doc__
        assert set(CASES.get(name, FITTED.get(name, {}))) <= set(entry.params)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_as_each_prompt_alone(name: str, tmp_path: Any) -> None:
    model, prompts = handle("llama"), random_prompts(1)
    recipe = made(name, model, prompts)
    sides = [model.batch(prompts, side=side) for side in ("left", "right")]
    got = []
    for batch in sides:
        with recipe.on(model):
            got.append(logits(model, batch))
    plain = logits(model, sides[0])
    changed = 0
    for i, prompt in enumerate(prompts):
        alone = model.batch([prompt])
        try:
            with made(name, model, [prompt]).on(model):
                want = logits(model, alone)[0]
        except InputError:  # nothing was found on this prompt
            want = logits(model, alone)[0]
        changed += float((want - plain[i]).abs().max()) > 1e-3
        for rows in got:
            torch.testing.assert_close(rows[i], want, rtol=1e-3, atol=2e-4)
    assert changed >= 2
    # The notes have a form on disk, and a recipe from disk does the same.
    again = Recipe.load(recipe.save(tmp_path / "recipe"))
    assert again.notes["name"] == name and again.notes["params"]
    with again.on(model):
        for a, b in zip(logits(model, sides[0]), got[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_generation_with_a_cache_is_as_without(name: str) -> None:
    model, prompts = handle("llama"), random_prompts(2)
    recipe = made(name, model, prompts)
    batch = model.batch(prompts, side="left")
    kw: dict[str, Any] = {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with recipe.on(model):
        a, b = (model.hf.generate(**batch.inputs(), use_cache=c, **kw) for c in (True, False))
        beams = model.hf.generate(**batch.inputs(), num_beams=2, **{**kw, "output_logits": False})
    plain = model.hf.generate(**batch.inputs(), **kw)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), **LOOSE)
    assert float((a.logits[0] - plain.logits[0]).abs().max()) > 1e-3
    assert len(beams.sequences) == 3


@pytest.mark.parametrize("name", ALL)
def test_beams_of_a_batch_are_those_of_each_prompt_alone(name: str) -> None:
    model, prompts = handle("llama"), random_prompts(2)
    kw: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0,
        "num_beams": 3, "length_penalty": 0.0,
    }  # fmt: skip

    def said(recipe: Recipe | None, some: list[Prompt]) -> list[list[int]]:
        batch = model.batch(some, side="left")
        with recipe.on(model) if recipe is not None else nullcontext():
            return model.hf.generate(**batch.inputs(), **kw)[:, -5:].tolist()

    together = said(made(name, model, prompts), prompts)
    for prompt, mine in zip(prompts, together, strict=True):
        try:
            recipe = made(name, model, [prompt])
        except InputError:
            recipe = None
        assert [mine] == said(recipe, [prompt])
    assert together != said(None, prompts)


@pytest.mark.parametrize("name", ALL)
def test_padding_of_what_is_looked_at_does_not_matter(name: str) -> None:
    model, prompts = handle("llama"), random_prompts(1)
    if name in FITTED:
        one, other = made(name, model, prompts, side="left"), made(name, model, prompts)
    else:
        one, other = (
            make_recipe(name, model, model.batch(prompts, side=side), CASES[name])
            for side in ("left", "right")
        )
    assert list(map(str, one.edits)) == list(map(str, other.edits))
    for key in ("sinks", "visual", "chosen", "outliers"):
        assert one.notes.get(key) == other.notes.get(key)
    batch = model.batch(prompts, side="left")
    got = []
    for recipe in (one, other):
        with recipe.on(model):
            got.append(logits(model, batch))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, **LOOSE)


@pytest.mark.parametrize("name", ALL)
def test_eager_and_sdpa_do_the_same(name: str) -> None:
    fast, slow, prompts = handle("llama", "sdpa"), handle("llama", "eager"), random_prompts(4)
    assert fast.hf.config._attn_implementation == "sdpa"
    assert slow.hf.config._attn_implementation == "eager"
    batch, out = fast.batch(prompts, side="left"), []
    for model in (fast, slow):
        recipe = made(name, model, prompts)
        with recipe.on(model):
            out.append((recipe, logits(model, batch)))
        assert model.hf.config._attn_implementation == ("sdpa" if model is fast else "eager")
    (a, x), (b, y) = out
    assert list(map(str, a.edits)) == list(map(str, b.edits))
    for key in ("sinks", "visual", "chosen", "outliers"):
        assert a.notes.get(key) == b.notes.get(key)
    plain = logits(fast, batch)
    for i in range(3):
        torch.testing.assert_close(x[i], y[i], rtol=1e-4, atol=1e-4)
    assert max(float((x[i] - plain[i]).abs().max()) for i in range(3)) > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(name: str, dtype: torch.dtype) -> None:
    hf = fresh("llama").to(dtype)
    half, exact = Model(hf, name="half"), Model(fresh("llama").to(dtype).float(), name="exact")
    prompts = random_prompts(6)
    recipe = made(name, half, prompts)
    batch = half.batch(prompts, side="left")
    with recipe.on(half):
        got = logits(half, batch)
        tokens = hf.generate(**batch.inputs(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == batch.input_ids.shape[1] + 3
    with recipe.on(exact, force=True):
        want = logits(exact, batch)
    plain, before = logits(exact, batch), logits(half, batch)
    for i in range(3):
        assert got[i].dtype == dtype and bool(got[i].isfinite().all())
        # As near as the model itself is without a recipe, within a factor.
        near = float((before[i].float() - plain[i]).abs().max())
        assert float((got[i].float() - want[i]).abs().max()) < 4 * near
    assert max(float((want[i] - plain[i]).abs().max()) for i in range(3)) > 8 * near


@pytest.mark.parametrize("name", ["var", "act", "sink-removal"])
def test_models_that_compute_their_own_pattern(name: str) -> None:
    model, prompts = handle("bloom"), random_prompts(5)
    params = {**CASES[name], **({"tau": 1.5} if name == "var" else {})}
    recipe = make_recipe(name, model, prompts, params)
    batch = model.batch(prompts, side="left")
    with recipe.on(model):
        got = logits(model, batch)
    with make_recipe(name, model, prompts[:1], params).on(model):
        torch.testing.assert_close(
            got[0], logits(model, model.batch(prompts[:1]))[0], rtol=1e-3, atol=2e-4
        )
    assert float((got[0] - logits(model, batch)[0]).abs().max()) > 1e-4


def test_parameters_from_texts() -> None:
    model = planted(["read", "read"])
    recipe = make_recipe(
        "temperature", model, [PICTURE], {"temperature": "0.5", "heads": "0.1,L0H0"}
    )
    assert recipe.heads == (HeadId(0, 1), HeadId(0, 0)) and recipe.edits[0].strength == 0.5
    var = make_recipe("var", model, [PICTURE], {"layers": "0", "rho": "0.7", "tau": "2.5"})
    assert var.notes["params"]["tau"] == 2.5
    with pytest.raises(UnknownNameError, match="parameter of recipe maker 'var'"):
        make_recipe("var", model, [PICTURE], {"taw": 1})


REFUSED: list[tuple[Callable[..., Recipe], dict[str, Any], type[Exception], str]] = [
    (make_var, {"layers": 3}, HeadIdError, "has attention in layers 0; got 3"),
    (make_var, {"layers": 0, "heads": ["0.0"]}, InputError, "give heads or layers, not both"),
    (make_var, {"heads": ["4.0"]}, HeadIdError, "L4H0 is outside this model"),
    (make_var, {"layers": 0, "span": "needle"}, SpanError, "no span 'needle'"),
    (make_var, {"layers": 0, "p": 1.5}, InputError, "lie in"),
    (make_var, {"layers": 0, "tau": 9.0}, InputError, "tau lies in"),
    (make_var, {"layers": 0, "dims": (64,)}, InputError, "dimensions in 0..63"),
    (make_act, {"layers": 0, "beta": -0.1}, InputError, "beta in"),
    (make_vhr, {"layers": 0, "span": "all"}, InputError, "must go on after span 'all'"),
    (make_vhr, {"layers": 0, "without": [PICTURE, PICTURE]}, InputError, "as many inputs"),
    (make_sink_removal, {"op": "mask"}, InputError, "knockout or drop"),
    (make_sink_removal, {"epsilon": 1.0}, InputError, "epsilon lies in"),
    (make_temperature, {"site": "z"}, InputError, "scores or q"),
]


@pytest.mark.parametrize(("make", "params", "error", "text"), REFUSED)
def test_what_cannot_be_is_refused(
    make: Callable[..., Recipe], params: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make(planted(["read"]), [PICTURE], **params)
    if make is not make_temperature:
        with pytest.raises(InputError, match="at least one prompt"):
            make(planted(["read"]), [])


def test_makers_leave_nothing_behind() -> None:
    model = planted(["read", "bos"])
    hf = model.hf
    assert load(hf).hf is hf
    before = logits(model, model.batch([PICTURE]))[0]
    make_var(model, [PICTURE], layers=0)
    make_act(model, [PICTURE], layers=0)
    make_vhr(model, [PICTURE], layers=0)
    make_sink_removal(model, [PICTURE], queries=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    torch.testing.assert_close(logits(model, model.batch([PICTURE]))[0], before, rtol=0, atol=0)
