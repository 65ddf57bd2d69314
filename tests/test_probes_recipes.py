"""Capture and the makers of recipes on planted models, whose every effect is known."""

import numpy as np
import pytest
import torch

from interp import load
from interp.errors import HeadIdError, InputError, SpanError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from interp.recipe import Positions, Recipe
from interp.zoo.planted_llama import class_prompts, planted_llama
from probes import (
    capture,
    class_statistics,
    collect_features,
    cross_validate,
    fit_iti,
    fit_mean_difference,
    function_vector,
    mean_difference,
)
from probes.direction import directions_from_statistics
from probes.functions import answer_probability

PLANTED = HeadId(1, 2)
C = 8


def built(norm="identity", **more):
    zoo = planted_llama(norm=norm, n_kv_heads=4, **more)
    return load(zoo.hf, tokenizer=zoo.tokenizer)


@pytest.fixture(scope="module")
def model():
    return built()


@pytest.fixture(scope="module")
def prompts():
    return class_prompts(C, per_class=6, length=9)


def logits(model, prompts, recipe=None):
    batch = model.batch(list(prompts))
    if recipe is None:
        return model.forward(batch.inputs()).logits[:, -1]
    with recipe.on(model, spans=batch):
        return model.forward(batch.inputs()).logits[:, -1]


def reference_z(model, prompt):
    """z of every head at every position of one prompt, by hooks of torch alone."""
    found = []
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: found.append(a[0][0]))
        for block in model.hf.model.layers
    ]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([prompt.tokens]))
    for hook in hooks:
        hook.remove()
    return torch.cat([x.view(len(prompt), 4, 16) for x in found], dim=1)


def varied():
    """Prompts of different lengths with spans of different lengths."""
    made = []
    for i, prompt in enumerate(class_prompts(C, per_class=1, length=12)):
        n = 5 + i % 4
        tokens = prompt.tokens[:n]
        made.append(Prompt(tokens, {"tail": ((1, 2), (n - 2 - i % 2, n))}, id=f"v{i}"))
    return made


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_capture_equals_hooks_on_single_prompts(model, batch_size):
    items = varied()
    whole = [reference_z(model, p) for p in items]
    last = collect_features(model, items, batch_size=batch_size)
    torch.testing.assert_close(last.x, torch.stack([z[-1] for z in whole]), atol=1e-5, rtol=1e-5)
    assert last.ids == tuple(p.id for p in items) and last.owners == tuple(range(8))
    mean = collect_features(model, items, span="tail", batch_size=batch_size)
    rows = [p.positions("tail") for p in items]
    expected = torch.stack([z[r].mean(0) for z, r in zip(whole, rows, strict=True)])
    torch.testing.assert_close(mean.x, expected, atol=1e-5, rtol=1e-5)
    each = collect_features(model, items, span="tail", reduce="each", batch_size=batch_size)
    expected = torch.cat([z[r] for z, r in zip(whole, rows, strict=True)])
    torch.testing.assert_close(each.x, expected, atol=1e-5, rtol=1e-5)
    assert each.owners == tuple(i for i, r in enumerate(rows) for _ in r)
    assert each.heads == model.tower("text").heads
    left = collect_features(model, [Batch.of(items, side="left")])
    torch.testing.assert_close(left.x, last.x, atol=1e-5, rtol=1e-5)


def test_capture_streams_batch_by_batch(model):
    drawn = []

    def endless():
        for prompt in varied() * 10_000:
            drawn.append(prompt)
            yield prompt

    stream = capture(model, endless(), batch_size=4)
    next(stream)
    assert len(drawn) == 4
    assert next(stream).owners == (4, 5, 6, 7)


def test_streamed_statistics_equal_those_of_kept_features(model, prompts):
    labels = ["low" if p.meta["class"] < 4 else "high" for p in prompts]
    stream = class_statistics(
        model, zip(prompts, labels, strict=True), ["high", "low"], batch_size=7, span="question"
    )
    kept = mean_difference(collect_features(model, prompts, span="question"), labels)
    found = directions_from_statistics(stream)
    assert stream.n == len(prompts)
    torch.testing.assert_close(found.gap, kept.gap, atol=1e-6, rtol=1e-5)
    place = found.heads.index(PLANTED)
    torch.testing.assert_close(found.unit[place], kept.unit[place], atol=1e-6, rtol=1e-5)
    each = class_statistics(
        model, zip(prompts, labels, strict=True), ["high", "low"], batch_size=7, span="all",
        reduce="each",
    )  # fmt: skip
    assert each.n == sum(map(len, prompts))


def test_heads_of_different_sizes_share_an_array():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=16,
                   bos_token_id=0, eos_token_id=0)
    ).eval()  # fmt: skip
    model = load(hf)
    found = collect_features(model, [Prompt((1, 2, 3))])
    # A tower whose second layer has smaller heads, as in Gemma 3n and OpenELM.
    import probes.features as module

    stack = model.tower("text")
    parts = {stack.layers[0].name: torch.ones(1, 2, 4), stack.layers[1].name: torch.ones(1, 2, 3)}
    mixed = module._stacked(stack, parts, (0,), ("a",))
    assert mixed.sizes == (4, 4, 3, 3) and mixed.x.shape == (1, 4, 4)
    assert mixed.x[0, :, 3].tolist() == [1, 1, 0, 0]
    assert mixed.vector(mixed.x[0], HeadId(1, 0)).tolist() == [1, 1, 1]
    assert found.sizes == (4,) * 4


def test_iti_finds_the_planted_head_and_alpha_turns_the_answer(model):
    prompts = class_prompts(2 * 4, per_class=12, length=9)
    two = [p for p in prompts if p.meta["class"] < 2]
    labels = [p.meta["class"] for p in two]
    recipe = fit_iti(model, two, labels, k=1, alpha=1.0, draws=19)
    assert recipe.heads == (PLANTED,)
    notes = recipe.notes
    assert notes["scores"] == {"L1H2": 1.0} and notes["claimed"] == ["L1H2"]
    assert 0.4 < notes["max_null"] < 1 and notes["towards"] == "1"
    # θ lies on the difference of the two classes and nowhere else.
    theta = recipe.edits[0].tensors["vector"][0]
    expected = torch.zeros(16, dtype=theta.dtype)
    expected[0], expected[1] = -(0.5**0.5), 0.5**0.5
    torch.testing.assert_close(theta, expected, atol=1e-6, rtol=0)
    share = []
    for alpha in (-15, -5, 0, 5, 15):
        said = logits(model, two, alpha * recipe)[:, :2].argmax(-1)
        share.append(float(said.double().mean()))
    assert share == [0.0, 0.0, 0.5, 1.0, 1.0]
    # Between 0 and the first flip nothing moves the other way.
    small = [
        float(logits(model, two, a / 10 * recipe)[:, :2].softmax(-1)[:, 1].mean())
        for a in range(-30, 31, 5)
    ]
    assert small == sorted(small) and small[0] < 0.05 < 0.95 < small[-1]


def test_iti_ranks_no_head_but_the_planted_one(model, prompts):
    labels = [p.meta["class"] >= 4 for p in prompts]
    found = collect_features(model, prompts)
    for probe in ("ridge", "logistic", "mean-difference"):
        scores = cross_validate(found, labels, probe=probe, draws=19)
        place = found.heads.index(PLANTED)
        assert scores.values[place] == 1 and scores.select() == (PLANTED,)
        assert np.delete(scores.values, place).max() < 0.75


def test_sigma_is_taken_on_the_tuning_set(model, prompts):
    labels = [p.meta["class"] >= 4 for p in prompts]
    other = class_prompts(C, per_class=3, length=9, seed=5)[:13]
    recipe = fit_iti(model, prompts, labels, k=1, alpha=2.0, tuning=other, draws=0)
    theta = mean_difference(collect_features(model, prompts), labels).of(PLANTED)
    z = torch.stack([reference_z(model, p)[-1, 6] for p in other]).double()
    assert float(recipe.edits[0].strength[0]) == pytest.approx(2 * float((z @ theta).std()))
    assert recipe.notes["n_tuning"] == 13 and "max_null" not in recipe.notes


@pytest.mark.parametrize("norm", ["identity", "rms"])
def test_baked_equals_hooked(norm, prompts, tmp_path):
    model = built(norm)
    labels = [p.meta["class"] >= 4 for p in prompts]
    recipe = fit_iti(model, prompts, labels, k=3, alpha=3.0, draws=19, positions=Positions.all())
    hooked = logits(model, prompts, recipe)
    baked = logits(recipe.bake(model, new_bias=True), prompts)
    torch.testing.assert_close(hooked, baked, atol=1e-5, rtol=1e-6)
    assert float((hooked - logits(model, prompts)).abs().max()) > 0.1
    again = Recipe.load(recipe.save(tmp_path / "iti"))
    assert torch.equal(logits(model, prompts, again), hooked)
    assert again.notes["scores"] == recipe.notes["scores"]


def test_edits_act_where_the_next_token_is_decided(model, prompts):
    labels = [p.meta["class"] >= 4 for p in prompts]
    recipe = fit_iti(model, prompts, labels, k=1, alpha=5.0, draws=19)
    batch = model.batch(prompts[:4])
    plain = model.forward(batch.inputs()).logits
    with recipe.on(model, spans=batch):
        moved = model.forward(batch.inputs()).logits
    assert torch.equal(plain[:, :-1], moved[:, :-1])
    assert not torch.equal(plain[:, -1], moved[:, -1])


def test_mean_shift_moves_one_mean_onto_the_other(model, prompts):
    labels = [p.meta["class"] >= 4 for p in prompts]
    recipe = fit_mean_difference(model, prompts, labels, heads=["L1H2", "L0H1"])
    low = [p for p, high in zip(prompts, labels, strict=True) if not high]
    high = [p for p, is_high in zip(prompts, labels, strict=True) if is_high]
    target = collect_features(model, high).x.mean(0)
    batch = model.batch(low)
    with recipe.on(model, spans=batch):
        moved = collect_features(model, [batch]).x.mean(0)
    for head in (PLANTED, HeadId(0, 1)):
        place = model.tower("text").heads.index(head)
        torch.testing.assert_close(moved[place], target[place], atol=1e-5, rtol=1e-5)
    ranked = fit_mean_difference(model, prompts, labels, k=1, strength=-1, draws=19, towards=False)
    assert ranked.heads == (PLANTED,)
    assert float(ranked.edits[0].strength[0]) == pytest.approx(-ranked.notes["gap"]["L1H2"])


def test_function_vector_of_the_planted_model(model):
    shown = [p for p in class_prompts(C, per_class=4, length=9) if p.meta["class"] == 3]
    others = [p for p in class_prompts(C, per_class=2, length=9, seed=4) if p.meta["class"] != 3]
    corrupted = [Prompt(p.tokens, p.spans, id=p.id, answer=(3,)) for p in others]
    found = function_vector(model, shown, corrupted, top=1, layer=1)
    place = found.scores.heads.index(PLANTED)
    # Only the planted head carries the class: all others change nothing, to the last bit.
    assert (found.scores.per_example[:, place] > 0.5).all()
    assert (np.delete(found.scores.per_example, place, axis=1) == 0).all()
    assert found.heads == (PLANTED,) and found.scores.select() == (PLANTED,)
    # Its mean over the corrupted prompts is a mixture of the others: far less of the answer.
    assert found.scores.null[place] < 0.1 * found.scores.values[place]
    # IE by hand.
    batch = model.batch(corrupted)
    base = model.forward(batch.inputs()).logits[:, -1].double().softmax(-1)[:, 3]
    value = reference_z(model, shown[0])[-1, 6]
    hook = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda m, a: (a[0].index_copy(2, torch.arange(32, 48), value.expand(len(a[0]), 9, 16)),)
    )
    by_hand = model.forward(batch.inputs()).logits[:, -1].double().softmax(-1)[:, 3] - base
    hook.remove()
    np.testing.assert_allclose(found.scores.per_example[:, place], by_hand, atol=1e-5)
    # FV = W_O ā, exactly, and it does the task.
    w_o = model.hf.model.layers[1].self_attn.o_proj.weight[:, 32:48].double()
    torch.testing.assert_close(found.vector, (w_o @ found.means[place]).detach(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        found.vector.float(), (w_o.float() @ value).detach(), atol=1e-5, rtol=1e-5
    )
    stream = 2 * found.recipe
    assert (logits(model, corrupted, stream).argmax(-1) == 3).all()
    assert (answer_probability(model, corrupted, found.recipe, 4) > base.numpy() + 0.2).all()


def test_function_vector_is_added_after_the_layer_at_the_last_token(model):
    shown = [p for p in class_prompts(C, per_class=2, length=9) if p.meta["class"] == 3]
    corrupted = [Prompt(p.tokens, p.spans, id=p.id, answer=(3,)) for p in varied()[:5]]
    found = function_vector(model, shown, corrupted, top=2, layer=0, control=False)
    assert found.scores.null_per_example is None and len(found.heads) == 2
    seen = {}
    hooks = [
        model.hf.model.layers[i].input_layernorm.register_forward_pre_hook(
            lambda m, a, i=i: seen.__setitem__(i, a[0].clone())
        )
        for i in (0, 1)
    ]
    batch = model.batch(corrupted)
    model.forward(batch.inputs())
    before = dict(seen)
    with found.recipe.on(model, spans=batch):
        model.forward(batch.inputs())
    for hook in hooks:
        hook.remove()
    added = seen[1] - before[1]
    for row, prompt in enumerate(corrupted):
        last = len(prompt) - 1
        torch.testing.assert_close(added[row, last], found.vector.float(), atol=1e-5, rtol=1e-5)
        added[row, last] = 0
    assert not added.any() and torch.equal(before[0], seen[0])


def test_the_model_is_left_as_it_was(model, prompts):
    before = logits(model, prompts)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.hf.modules())
    fit_iti(model, prompts, [p.meta["class"] >= 4 for p in prompts], k=2, draws=0)
    function_vector(model, prompts[:3], prompts[3:5], top=1)
    after = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.hf.modules())
    assert hooks == after and torch.equal(before, logits(model, prompts))


def test_bad_input_is_refused(model, prompts):
    labels = [p.meta["class"] >= 4 for p in prompts]
    with pytest.raises(InputError, match="k must be between 1 and the 8 heads"):
        fit_iti(model, prompts, labels)
    with pytest.raises(InputError, match="at least two classes"):
        fit_iti(model, prompts, [1] * len(prompts), k=1)
    with pytest.raises(InputError, match="at least 5 groups; got 2"):
        fit_iti(model, prompts, labels, k=1, groups=[i % 2 for i in range(len(prompts))])
    with pytest.raises(InputError, match="got none"):
        fit_iti(model, [], [], k=1)
    with pytest.raises(SpanError, match="no span 'needle'"):
        fit_iti(model, prompts, labels, k=1, span="needle")
    with pytest.raises(InputError, match=r"vision\.L0H0 is not among"):
        fit_mean_difference(model, prompts, labels, heads=["vision.L0H0"])
    with pytest.raises(InputError, match="reduce must be one of"):
        collect_features(model, prompts, reduce="max")
    with pytest.raises(InputError, match="batch_size"):
        collect_features(model, prompts, batch_size=0)
    with pytest.raises(InputError, match="needs the answer"):
        function_vector(model, prompts, [Prompt((1, 2))])
    with pytest.raises(InputError, match="at least one corrupted"):
        function_vector(model, prompts, [])
    with pytest.raises(InputError, match="all be different"):
        function_vector(model, prompts, [prompts[0]] * 2)
    with pytest.raises(InputError, match="top must be between 1 and 8"):
        function_vector(model, prompts, prompts)
    with pytest.raises(InputError, match="different ones"):
        class_statistics(model, [], ["a", "a"])
    with pytest.raises(InputError, match="at least one prompt"):
        class_statistics(model, [], ["a", "b"])
    found = function_vector(model, prompts[:2], prompts[:2], top=1, layer=7, control=False)
    with pytest.raises(HeadIdError, match="layer 8 is outside"):
        logits(model, prompts, found.recipe)


def test_an_equal_head_has_no_direction(model):
    same = [Prompt((*p.tokens[:-2], 9, p.tokens[-1]), id=p.id) for p in varied()[:1]] * 10
    named = [Prompt(p.tokens, id=f"{i}") for i, p in enumerate(same)]
    with pytest.raises(InputError, match="equal class means"):
        fit_mean_difference(model, named, [0, 1] * 5, heads=["L0H0"])
