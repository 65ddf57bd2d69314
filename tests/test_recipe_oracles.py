"""Recipes against oracles written without them: loops, hooks of torch, and planted truth."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fresh, handle
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp import load
from interp.errors import HeadIdError, InputError, InterpError, ModelError, SiteError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Batch, Prompt, PromptPair
from interp.recipe import OPS, Edit, Gate, Positions, Recipe, Schedule, Where, span
from interp.zoo.planted_llama import class_prompts, planted_llama
from probes import collect_features

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EVERY, LAST = Positions.all(), Positions(prompt=(-1,), generated="all")
PLANTED = HeadId(1, 2)
OTHERS = [HeadId(i, j) for i in range(2) for j in range(4) if (i, j) != (1, 2)]


def prompts(lengths: tuple[int, ...] = (9, 12, 7)) -> list[Prompt]:
    """Prompts of unequal length, each with the span `img` somewhere else."""
    draw = random.Random(0)
    out = []
    for row, n in enumerate(lengths):
        at = 1 + row % 3
        tokens = tuple(draw.randrange(3, 90) for _ in range(n))
        out.append(Prompt(tokens, {"bos": ((0, 1),), "img": ((at, at + 3),)}, id=str(n)))
    return out


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(*heads: str | HeadId, queries: Positions = EVERY, keys: Positions = EVERY) -> Where:
    return Where(heads=heads, queries=queries, keys=keys)  # type: ignore[arg-type]


def generated(model: Model, batch: Batch, n: int = 5, **kw: Any) -> Tensor:
    """Logits [step, row, vocabulary] of greedy generation."""
    out = model.hf.generate(
        **batch.inputs(), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kw,
    )  # fmt: skip
    return torch.stack(out.logits)


def hooks(hf: Any) -> list[Any]:
    """Everything that could be left behind on a model."""
    kept = [
        [dict(value) for name, value in vars(m).items() if "hook" in name and isinstance(
            value, dict)] + [x for x in vars(m) if x == "forward"]
        for m in hf.modules()
    ]  # fmt: skip
    return [kept, dict(ALL_ATTENTION_FUNCTIONS._local_mapping), hf.config._attn_implementation]


@contextmanager
def heads_zeroed(
    model: Model, heads: list[tuple[int, int]], where: Callable[[Tensor], Tensor] | None = None
) -> Iterator[None]:
    """Heads silent by hooks of torch; `where` gives [batch, pos] for a z of that many."""
    removes = []
    for layer, head in heads:

        def hook(module: Any, args: Any, head: int = head) -> Any:
            x = args[0].clone()
            part = x[..., 16 * head : 16 * head + 16]
            keep = torch.ones(x.shape[:2], dtype=torch.bool) if where is None else where(x)
            part.mul_(~keep[..., None])
            return (x,)

        name = next(x.projection for x in model.tower("text").layers if x.index == layer)
        removes.append(model.hf.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for remove in removes:
            remove.remove()


# Contrast under beams -----------------------------------------------------------------------


class ByHand(LogitsProcessor):
    """Contrast as two whole runs without a cache at every step, the second with hooks of torch."""

    def __init__(self, model: Model, batch: Batch, beams: int, s: float, beta: float) -> None:
        self.model, self.s, self.beta, self.steps = model, s, beta, 0
        self.mask = batch.attention_mask.repeat_interleave(beams, 0)
        # The twin loses L0H1 everywhere, and L1H2 on the tokens of each prompt's own span.
        self.span = torch.zeros_like(self.mask, dtype=torch.bool)
        for i in range(len(self.span)):
            row = i // beams
            for p in batch.prompts[row].positions("img"):
                self.span[i, batch.offsets[row] + p] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        new = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, torch.ones(len(input_ids), new, dtype=self.mask.dtype)], 1)
        places = torch.nn.functional.pad(self.span, (0, new))
        given = {
            "input_ids": input_ids, "attention_mask": mask, "use_cache": False,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }  # fmt: skip
        with torch.no_grad():
            a = self.model.hf(**given).logits[:, -1]
            with heads_zeroed(self.model, [(0, 1)]):
                with heads_zeroed(self.model, [(1, 2)], lambda x: places):
                    b = self.model.hf(**given).logits[:, -1]
        out = (1 + self.s) * a - self.s * b
        if self.beta:
            p = a.softmax(-1)
            out = out.masked_fill(p < self.beta * p.amax(-1, keepdim=True), -torch.inf)
        return out.log_softmax(-1)  # what beam search adds up


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_contrast_under_beams_is_two_runs_by_hand(
    family: str, use_cache: bool, beta: float
) -> None:
    model, beams = handle(family), 3
    batch = model.batch(prompts(), side="left")
    twin = Recipe([Edit("zero", at("0.1")), Edit("zero", at("1.2", queries=span("img")))])
    recipe = Recipe(Edit("contrast", strength=1.5, params={"beta": beta}, twin=twin))

    def search(processor: LogitsProcessor | None, **kw: Any) -> Any:
        more = {} if processor is None else {"logits_processor": LogitsProcessorList([processor])}
        return model.hf.generate(
            **batch.inputs(), max_new_tokens=6, min_new_tokens=6, num_beams=beams, pad_token_id=0,
            num_return_sequences=beams, return_dict_in_generate=True, output_scores=True,
            do_sample=False, **more, **kw,
        )  # fmt: skip

    by_hand = ByHand(model, batch, beams, 1.5, beta)
    want = search(by_hand)
    with recipe.on(model, spans=batch):
        got = search(None, use_cache=use_cache)
    assert by_hand.steps == 6
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=0, atol=1e-4)
    assert not torch.equal(search(None).sequences, want.sequences)  # contrast did something
    # Beams changed places, so that a second cache that did not follow would show.
    swapped = [i != j for row in got.beam_indices.tolist() for i, j in itertools.pairwise(row)
               if i >= 0 and j >= 0]  # fmt: skip
    assert any(swapped)


def test_beams_of_a_batch_are_the_beams_of_each_prompt_alone() -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    gate = Gate(noise(64, seed=11), 1, 0.0, evaluate="step")
    recipe = Recipe([
        Edit("bias", at("0.2", "1.1", keys=span("img"), queries=LAST), 3.0),
        Edit("scale", at("0.3", "1.0", queries=LAST), 4.0, gate=gate),
        Edit("scale", at("1.3"), 3.0, schedule=Schedule("linear", 3)),
    ])  # fmt: skip
    kw: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "num_return_sequences": 3,
        "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    with recipe.on(model, spans=batch):
        got = model.hf.generate(**batch.inputs(), **kw)
    made = got.sequences[:, batch.input_ids.shape[1] :].view(3, 3, 5)
    for row, prompt in enumerate(batch.prompts):
        one = model.batch([prompt])
        with recipe.on(model, spans=one):
            alone = model.hf.generate(**one.inputs(), **kw)
        assert torch.equal(alone.sequences[:, len(prompt) :], made[row])
        torch.testing.assert_close(
            alone.sequences_scores, got.sequences_scores.view(3, 3)[row], **CLOSE
        )


def test_a_cache_that_is_repeated_goes_on_with_each_prompt_s_own_spans() -> None:
    """Each prompt is run once, then continued by two tokens side by side."""
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    recipe = Recipe([
        Edit("bias", at("0.2", "1.1", keys=span("img")), 3.0),
        Edit("scale", at("0.1"), torch.tensor([[2.0, 3.0, 0.0]])),
    ])  # fmt: skip
    tokens = torch.tensor([[11], [12]] * 3)
    mask = torch.cat([batch.attention_mask, torch.ones(3, 1, dtype=torch.long)], 1)
    with recipe.on(model, spans=batch), torch.no_grad():
        first = model.hf(**batch.inputs(), use_cache=True)
        first.past_key_values.batch_repeat_interleave(2)
        twice = mask.repeat_interleave(2, 0)
        got = model.hf(
            input_ids=tokens, attention_mask=twice, past_key_values=first.past_key_values
        ).logits[:, -1]  # fmt: skip
    for row, prompt in enumerate(batch.prompts):
        for side in range(2):
            new = Prompt((*prompt.tokens, 11 + side), prompt.spans)
            one = Recipe([
                recipe.edits[0],
                Edit("scale", at("0.1"), float(recipe.edits[1].strength[0, row])),  # type: ignore[index]
            ])  # fmt: skip
            with one.on(model, spans=[new]), torch.no_grad():
                want = model.hf(torch.tensor([new.tokens])).logits[0, -1]
            torch.testing.assert_close(got[2 * row + side], want, **CLOSE)


# Gates and schedules, row by row ------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Schedule("linear", 3), Schedule("decay", rate=0.5),
                                      Schedule("first", 2)])  # fmt: skip
@pytest.mark.parametrize("op", ["scale", "bias"])
def test_schedules_are_a_strength_for_each_token_fed(schedule: Schedule, op: str) -> None:
    """The same strengths as edits of single positions; the prompt is step 0, token i step i + 1."""
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    s, neutral, keys = (2.5, 1.0, EVERY) if op == "scale" else (3.0, 0.0, span("img"))
    factors = {
        "linear": [0, 1 / 3, 2 / 3, 1, 1, 1],
        "decay": [1, 0.5, 0.25, 0.125, 0.0625, 0.03125],
        "first": [1, 1, 0, 0, 0, 0],
    }[schedule.kind]
    places = [Positions(prompt="all"), *(Positions(generated=(i, i + 1)) for i in range(5))]
    by_hand = Recipe([
        Edit(op, at("0.1", "1.2", queries=where, keys=keys), neutral + f * (s - neutral))
        for where, f in zip(places, factors, strict=True)
    ])  # fmt: skip
    recipe = Recipe(Edit(op, at("0.1", "1.2", keys=keys), s, schedule=schedule))
    with by_hand.on(model, spans=batch):
        want = generated(model, batch)
    for cache in (True, False):
        with recipe.on(model, spans=batch):
            torch.testing.assert_close(generated(model, batch, use_cache=cache), want, **CLOSE)
    with Recipe(Edit(op, at("0.1", "1.2", keys=keys), s)).on(model, spans=batch):
        assert float((generated(model, batch) - want).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("evaluate", ["prompt", "step"])
def test_gates_and_schedules_of_a_row_are_those_of_the_row_alone(
    family: str, evaluate: str
) -> None:
    model, axis = handle(family), noise(64, seed=11)
    batch = model.batch(prompts(), side="left")
    with torch.no_grad():
        states = model.hf(**batch.inputs(), output_hidden_states=True).hidden_states[1][:, -1]
    cosine = torch.cosine_similarity(states, axis[None], dim=-1)
    middle = float(cosine.sort().values[1:].mean())  # opens for one row of three
    gate = Gate(axis, 1, middle, evaluate=evaluate)
    recipe = Recipe([
        Edit("scale", at("1.2"), 5.0, gate=gate, schedule=Schedule("decay", rate=0.7)),
        Edit("override", at("1.0", keys=span("img")), gate=gate),
        Edit("add", at("0.1", queries=LAST), tensors={"vector": noise(1, 16)}, gate=gate),
    ])  # fmt: skip
    logs = []
    for cache in (True, False):
        with recipe.on(model, spans=batch) as session:
            got = generated(model, batch, use_cache=cache)
            logs.append(list(session.log))
        for row, prompt in enumerate(batch.prompts):
            with recipe.on(model, spans=[prompt]) as session:
                alone = generated(model, model.batch([prompt]), use_cache=cache)
                torch.testing.assert_close(alone[:, 0], got[:, row], **CLOSE)
                assert [d.open[0] for d in session.log] == [d.open[row] for d in logs[-1]]
    assert [d.open for d in logs[0]] == [d.open for d in logs[1]]
    assert sum(logs[0][0].open) == 1 and len(logs[0]) == (1 if evaluate == "prompt" else 5)


def test_a_gate_on_a_planted_class_fires_for_that_class_and_says_so() -> None:
    """The class is written into the stream at layer 0; a gate before layer 1 reads it there."""
    model = load(planted_llama(0, 2, C=4).hf)
    asked = class_prompts(4, per_class=3)
    batch = model.batch(asked, side="left")
    classes = torch.tensor([p.meta["class"] for p in asked])
    axis = model.hf.lm_head.weight[3].detach().clone().clamp(min=0)  # where class 3 is written
    gate = Gate(axis, 1, 0.1)
    recipe = Recipe(Edit("scale", Where(layers=(2,)), 0.0, site="resid", gate=gate))
    with torch.no_grad(), recipe.on(model, spans=batch) as session:
        out = model.hf(**batch.inputs()).logits[:, -1, :4]
    hit = classes == 3
    assert session.log[0].open == tuple(hit.tolist()) and len(session.log) == 1
    assert bool((out[hit] == out[hit][:, :1]).all())  # silenced: all classes alike to the bit
    assert torch.equal(out[~hit].argmax(-1), classes[~hit])


# Planted truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", ["rms", "identity"])
def test_zero_mean_and_projection_of_the_planted_head_leave_chance(attn: str, norm: str) -> None:
    zoo = planted_llama(C=4, norm=norm)
    zoo.hf.set_attn_implementation(attn)
    model = load(zoo.hf)
    asked = class_prompts(4, per_class=3, length=9)
    batch = model.batch(asked, side="left")
    truth = torch.tensor([p.answer[0] for p in asked if p.answer])
    means = collect_features(model, asked, reduce="mean", span="question").x.mean(0).float()
    heads = model.tower("text").heads

    def classes(recipe: Recipe | None) -> Tensor:
        with torch.no_grad():
            if recipe is None:
                return model.hf(**batch.inputs()).logits[:, -1, :4]  # type: ignore[no-any-return]
            with recipe.on(model, spans=batch):
                return model.hf(**batch.inputs()).logits[:, -1, :4]  # type: ignore[no-any-return]

    plain = classes(None)
    for i, head in enumerate(heads):
        basis = torch.eye(16)[None, :, :4]  # where the planted head holds the class
        for edit in (
            Edit("zero", at(head)),
            Edit("set", at(head), tensors={"value": means[i : i + 1]}),
            Edit("project", at(head), tensors={"basis": basis}),
        ):
            out = classes(Recipe(edit))
            accuracy = float((out.argmax(-1) == truth).double().mean())
            assert accuracy == (0.25 if head == PLANTED else 1.0), (edit.op, head)
            if head == PLANTED:  # one answer to every prompt
                assert len(out.argmax(-1).unique()) == 1
                if norm == "identity" or edit.op != "set":
                    assert float(out.amax(-1).sub(out.amin(-1)).max()) < 1e-5
            elif norm == "identity":  # nothing couples the heads: not a bit of a class changes
                assert torch.equal(out, plain)


FOUR = {"uniform": "scores", "zero": "z", "drop": "pattern", "knockout": "scores"}


def test_the_four_published_maskings_are_four_operations() -> None:
    """On the planted Llama attention is on the symbol alone, so each has a known value of z."""
    assert {name: OPS[name].sites[0] for name in FOUR} == FOUR
    model = load(planted_llama(C=4, norm="identity").hf)
    asked = class_prompts(4, per_class=2, length=10)
    batch = model.batch(asked, side="left")
    seen: dict[str, Tensor] = {}

    def z_of(edit: Edit | None) -> Tensor:
        def note(layer: Any, z: Tensor) -> None:
            if layer.index == 1:
                seen["z"] = z[:, -1, 2].clone()

        with torch.no_grad():
            if edit is None:
                with model.observe_output(note):
                    model.hf(**batch.inputs())
            else:
                with Recipe(edit).on(model, spans=batch), model.observe_output(note):
                    model.hf(**batch.inputs())
        return seen["z"]

    symbols = span("symbol")
    z = {
        "none": z_of(None),
        "uniform": z_of(Edit("uniform", at(PLANTED))),
        "zero": z_of(Edit("zero", at(PLANTED))),
        "drop": z_of(Edit("drop", at(PLANTED, keys=symbols))),
        "knockout": z_of(Edit("knockout", at(PLANTED, keys=symbols, queries=LAST))),
        "mean": z_of(Edit("set", at(PLANTED), tensors={"value": z_of(None).mean(0)[None]})),
        "scale": z_of(Edit("scale", at(PLANTED), -2.0)),
    }
    one = torch.nn.functional.one_hot(torch.tensor([p.meta["class"] for p in asked]), 16)
    size = float(z["none"].max())
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(z["none"], size * one, **near)
    torch.testing.assert_close(z["uniform"], size * one / 10, **near)  # all ten visible keys
    assert not z["zero"].any()
    torch.testing.assert_close(z["drop"], torch.zeros(8, 16), **near)
    torch.testing.assert_close(z["knockout"], torch.zeros(8, 16), **near)
    torch.testing.assert_close(z["mean"], (size * one).mean(0).expand(8, -1), **near)
    torch.testing.assert_close(z["scale"], -2 * size * one, **near)
    uniform = z_of(Edit("uniform", at("1.3")))
    torch.testing.assert_close(uniform, z["none"], **near)  # another head's masking is not its own


def test_masked_rows_have_the_sums_their_names_promise() -> None:
    """A random head, read back from z with values of ones: z is then the sum of its row."""
    model = Model(fresh("gpt2"), name="sums")
    batch = model.batch(prompts(lengths=(8, 8)))
    seen: list[Tensor] = []

    def ones(name: str, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return q, k, torch.ones_like(v)

    def row_sum(edit: Edit) -> Tensor:
        seen.clear()
        with torch.no_grad(), Recipe(edit).on(model, spans=batch):
            with model.observe_output(lambda x, z: seen.append(z[:, -1, 1, 0].clone())):
                model.hf(**batch.inputs())
        return seen[0]

    v = Edit("set", at("0.1"), site="v", tensors={"value": torch.ones(1, 16)})
    img = span("img")

    def sums(edit: Edit) -> Tensor:
        with Recipe(v).on(model, spans=batch):
            return row_sum(edit)

    torch.testing.assert_close(sums(Edit("uniform", at("0.1"))), torch.ones(2), **CLOSE)
    torch.testing.assert_close(
        sums(Edit("knockout", at("0.1", keys=img, queries=LAST))), torch.ones(2), **CLOSE
    )
    assert not sums(Edit("zero", at("0.1"))).any()
    dropped = sums(Edit("drop", at("0.1", keys=img)))
    assert bool((dropped < 0.99).all()) and bool((dropped > 0.01).all())
    # By hand: one minus what the span had.
    with torch.no_grad():
        eager = fresh("gpt2", "eager")
        p = eager(**batch.inputs(), output_attentions=True).attentions[0][:, 1, -1]
    for row, prompt in enumerate(batch.prompts):
        want = 1 - float(p[row, prompt.positions("img")].sum())
        assert float(dropped[row]) == pytest.approx(want, abs=1e-5)


# Fitting through a recipe -------------------------------------------------------------------


def fitted_on(
    model: Model, recipe_of: Callable[[], Recipe], parameters: list[Tensor], asked: list[Prompt],
    target: int, steps: int = 400, l1: float = 0.0,
) -> None:  # fmt: skip
    """Adam on the cross-entropy of one token, through whatever recipe the parameters make."""
    batch = model.batch(asked, side="left")
    for p in model.hf.parameters():
        p.requires_grad_(False)
    adam = torch.optim.Adam(parameters, lr=0.2)
    goal = torch.full((len(asked),), target)
    for _ in range(steps):
        with recipe_of().on(model, spans=batch):
            out = model.hf(**batch.inputs(), use_cache=False).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(out, goal)
        loss = loss + l1 * sum(p.abs().sum() for p in parameters)
        adam.zero_grad()
        loss.backward()
        adam.step()


def test_soft_injection_opens_the_planted_head_and_moves_no_other() -> None:
    """SITE: gates α between each head and its mean over prompts of class 3, fitted by gradient."""
    model = load(planted_llama(C=4, norm="identity", n_kv_heads=4).hf)
    heads = model.tower("text").heads
    shown = [p for p in class_prompts(4, per_class=4, length=9) if p.meta["class"] == 3]
    asked = [p for p in class_prompts(4, per_class=4, length=9, seed=3) if p.meta["class"] != 3]
    means = collect_features(model, shown).x.mean(0).float()
    logit = torch.zeros(8, requires_grad=True)
    where = at(*heads, queries=Positions(prompt=(-1,)))

    def recipe() -> Recipe:
        return Recipe(Edit("set", where, torch.sigmoid(logit), tensors={"value": means}))

    batch = model.batch(asked, side="left")
    with torch.no_grad():
        before = model.hf(**batch.inputs()).logits[:, -1].argmax(-1)
    fitted_on(model, recipe, [logit], asked, 3)
    alpha = torch.sigmoid(logit.detach())
    place = heads.index(PLANTED)
    assert float(alpha[place]) > 0.99
    rest = [i for i in range(8) if i != place]
    assert bool((alpha[rest] == 0.5).all())  # their gradient is exactly zero
    with torch.no_grad(), recipe().on(model, spans=batch):
        after = model.hf(**batch.inputs()).logits[:, -1].argmax(-1)
    assert not bool((before == 3).any()) and bool((after == 3).all())


def test_fitted_gains_are_largest_at_the_planted_head() -> None:
    """LoFiT stage 1: gains of all heads with an L1 penalty; the planted head's norm stands out."""
    model = load(planted_llama(C=4, norm="identity", n_kv_heads=4).hf)
    heads = model.tower("text").heads
    asked = [p for p in class_prompts(4, per_class=4, length=9) if p.meta["class"] == 1]
    gain = (1e-3 * noise(8, 16)).requires_grad_()
    start = gain.detach().norm(dim=1)

    def recipe() -> Recipe:
        return Recipe(Edit("affine", at(*heads), tensors={"gain": gain}))

    assert recipe().parameters()["0.gain"] is gain
    fitted_on(model, recipe, [gain], asked, 1, steps=20, l1=1e-3)
    norms = gain.detach().norm(dim=1)
    place = heads.index(PLANTED)
    assert int(norms.argmax()) == place
    assert float(norms[place]) > 1.0
    one = torch.zeros(8, 16)
    one[place, 1] = 1  # only the coordinate of class 1 is worth its penalty
    assert int(gain.detach().abs().flatten().argmax()) == int(one.flatten().argmax())
    assert start.max() < 0.01


TENSORS: dict[str, Callable[[Tensor], Edit]] = {
    "gain": lambda t: Edit("affine", at("0.1", "1.2"), 0.7, tensors={"gain": t}),
    "shift": lambda t: Edit("affine", at("0.1", "1.2"), 0.7, tensors={"shift": t}),
    "value": lambda t: Edit("set", at("0.1", "1.2"), 0.6, tensors={"value": t}),
    "set fully": lambda t: Edit("set", at("0.1", "1.2"), tensors={"value": t}),
    "basis": lambda t: Edit("project", at("0.1", "1.2"), 0.5, tensors={"basis": t[..., None]}),
    "k": lambda t: Edit("add", at("0.1", "1.2", keys=span("img")), site="k", tensors={"vector": t}),
    "v": lambda t: Edit("set", at("0.1", "1.2"), 0.5, site="v", tensors={"value": t}),
    "q": lambda t: Edit("affine", at("0.1", "1.2"), site="q", tensors={"gain": t}),
    "gated": lambda t: Edit("add", at("1.2", "1.1"), tensors={"vector": t},
                            gate=Gate(torch.ones(64), 0, -1.0)),
    "scheduled": lambda t: Edit("add", at("0.1", "1.2"), tensors={"vector": t},
                                schedule=Schedule("decay")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TENSORS))
def test_gradients_to_tensors_equal_finite_differences(name: str) -> None:
    model = Model(fresh("gpt2").double(), name="double")
    batch = model.batch(prompts(lengths=(6, 6)))
    t = noise(2, 16).double().requires_grad_()

    def loss(t: Tensor) -> Tensor:
        with Recipe(TENSORS[name](t)).on(model, spans=batch):
            out = model.hf(**batch.inputs(), use_cache=False).logits
        return torch.log_softmax(out[:, -1], -1)[:, 7].sum()

    loss(t).backward()
    assert t.grad is not None
    for place in (3, 16 + 5):
        step = torch.zeros(32, dtype=torch.float64)
        step[place] = 1e-5
        with torch.no_grad():
            want = float(loss(t + step.view(2, 16)) - loss(t - step.view(2, 16))) / 2e-5
        assert abs(want) > 1e-6
        assert float(t.grad.flatten()[place]) == pytest.approx(want, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "kind", ["inkling2_text", "gpt_oss", "falcon", "deepseek_v3", "gemma3n_text", "zamba2", "mpt"]
)
def test_rows_computed_beside_the_kernel_are_the_kernel_s(kind: str) -> None:
    """A temperature of 1 given as a tensor changes nothing, but is not skipped: rows are redone."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.tiny_models import tiny_model

    torch.manual_seed(0)
    hf: Any = tiny_model(kind).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.dim() > 1 and p.is_floating_point():
                p.normal_(std=0.2)
    model = load(hf)
    batch = model.batch([Prompt(tuple(range(5 + i, 14 + i))) for i in range(2)], side="left")
    base = generated(model, batch, n=3)
    size = float(base.abs().max())
    for s, same in ((1.0, True), (0.5, False)):
        with Recipe(Edit("temperature", strength=torch.tensor(s))).on(model):
            got = generated(model, batch, n=3)
            uncached = generated(model, batch, n=3, use_cache=False)
        assert (float((got - base).abs().max()) < 2e-5 * size) == same
        assert float((got - uncached).abs().max()) < 2e-5 * size


# Alone, nested, side by side ----------------------------------------------------------------


def test_two_models_that_take_turns_keep_their_own_steps_and_caches() -> None:
    one, two = handle("llama"), Model(fresh("llama", seed=3), name="other")
    batch = one.batch(prompts(), side="left")
    gate = Gate(noise(64, seed=11), 1, 0.0, evaluate="step")
    recipes = {
        one: Recipe([Edit("scale", at("0.1"), 3.0, schedule=Schedule("linear", 3)),
                     Edit("bias", at("1.1", keys=span("img")), 3.0, gate=gate)]),
        two: Recipe([Edit("zero", at("0.2", queries=Positions(generated=(1, 3)))),
                     Edit("scale", at("0.3"), 2.0, schedule=Schedule("decay"))]),
    }  # fmt: skip
    want = {}
    for model, recipe in recipes.items():
        with recipe.on(model, spans=batch):
            want[model] = generated(model, batch)
    caches: dict[Model, Any] = dict.fromkeys(recipes)
    mask = batch.attention_mask
    tokens = dict.fromkeys(recipes, batch.input_ids)
    with recipes[one].on(one, spans=batch), recipes[two].on(two, spans=batch), torch.no_grad():
        for step in range(5):
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens[one].shape[1] :]
            for model in recipes:
                out = model.hf(
                    input_ids=tokens[model], attention_mask=mask, position_ids=places,
                    past_key_values=caches[model], use_cache=True,
                )  # fmt: skip
                caches[model] = out.past_key_values
                torch.testing.assert_close(out.logits[:, -1], want[model][step], **CLOSE)
                tokens[model] = out.logits[:, -1].argmax(-1)[:, None]
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)


class _Interrupt(StoppingCriteria):
    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, input_ids: Tensor, scores: Tensor, **kw: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("stop")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_when_a_beam_search_is_cut_off(error: type[BaseException] | None) -> None:
    model = handle("llama")
    batch = model.batch(prompts(), side="left")
    base, before = generated(model, batch), hooks(model.hf)
    flags = [p.requires_grad for p in model.hf.parameters()]
    twin = Recipe(Edit("zero", at("0.1")))
    gate = Gate(noise(64, seed=11), 1, 0.0, evaluate="step")
    recipe = Recipe([
        Edit("temperature", at("1.1"), 0.3, gate=gate),
        Edit("scale", at("0.1"), 2.0, site="k"),
        Edit("scale", Where(layers=(1, 2)), 1.1, site="resid"),
        Edit("scale", Where(layers=(0,)), 1.1, site="attn_out"),
        Edit("contrast", twin=twin),
    ])  # fmt: skip
    stop = [] if error is None else [_Interrupt(error, 3)]
    try:
        with recipe.on(model, spans=batch) as session:
            model.hf.generate(**batch.inputs(), max_new_tokens=5, num_beams=3, pad_token_id=0,
                              stopping_criteria=stop)  # fmt: skip
            assert error is None
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert hooks(model.hf) == before and not session.held
    assert [p.requires_grad for p in model.hf.parameters()] == flags
    torch.testing.assert_close(generated(model, batch), base, rtol=0, atol=0)


# Files, controls, weights -------------------------------------------------------------------


def test_a_file_keeps_bits_hash_and_the_model_it_is_for(tmp_path: Any) -> None:
    one, two = handle("llama"), Model(fresh("llama", seed=3), name="other")
    batch = one.batch(prompts(), side="left")
    recipe = Recipe(
        [Edit("add", at("0.1"), torch.tensor([0.3]), tensors={"vector": noise(1, 16)}),
         Edit("contrast", twin=Recipe(Edit("zero", at("1.1"))))],
        fingerprint=one.fingerprint,
    )  # fmt: skip
    again = Recipe.load(recipe.save(tmp_path / "r"))
    assert again.hash == recipe.hash and again.fingerprint == one.fingerprint
    with recipe.on(one, spans=batch):
        want = generated(one, batch)
    with again.on(one, spans=batch):
        assert torch.equal(generated(one, batch), want)
    before = hooks(two.hf)
    for use in (lambda: again.on(two).__enter__(), lambda: again.bake(two)):
        with pytest.raises(ModelError, match="made for the model with fingerprint") as caught:
            use()
        assert two.name in str(caught.value) and "force" in str(caught.value.hint)
    assert hooks(two.hf) == before
    # One number that changed is another recipe.
    other = Recipe(
        [Edit("add", at("0.1"), torch.tensor([0.3]), tensors={"vector": noise(1, 16) + 1e-6}),
         recipe.edits[1]], fingerprint=one.fingerprint,
    )  # fmt: skip
    assert other.hash != recipe.hash


def test_a_second_run_made_for_a_model_makes_the_recipe_so(tmp_path: Any) -> None:
    one, two = handle("llama"), Model(fresh("llama", seed=3), name="other")
    twin = Recipe(Edit("zero", at("1.1")), fingerprint=one.fingerprint)
    recipe = Recipe(Edit("contrast", twin=twin))
    for r in (recipe, Recipe.load(recipe.save(tmp_path / "c"))):
        assert r.fingerprint == one.fingerprint
        with pytest.raises(ModelError, match="made for the model"), r.on(two):
            pass
    with pytest.raises(ModelError, match="must be made for one model; got 2") as caught:
        Recipe(Edit("contrast", twin=twin), fingerprint=two.fingerprint)
    assert caught.value.hint
    with pytest.raises(ModelError, match="not be made for different models"):
        Recipe(Edit("zero"), fingerprint=two.fingerprint) + twin


def test_controls_of_the_planted_head_leave_every_answer() -> None:
    model = load(planted_llama(C=4).hf)
    asked = class_prompts(4, per_class=2)
    batch = model.batch(asked, side="left")
    truth = torch.tensor([p.answer[0] for p in asked if p.answer])
    recipe = Recipe([Edit("zero", at("1.2")), Edit("scale", at("0.1", "0.3"), 0.0)])
    controls = recipe.control(model, 10, seed=1)
    assert len(controls) == 10
    assert [c.hash for c in controls] == [c.hash for c in recipe.control(model, 10, seed=1)]
    assert [c.hash for c in controls] != [c.hash for c in recipe.control(model, 10, seed=2)]
    for control in controls:
        assert sorted(h.layer for h in control.heads) == [0, 0, 1]
        assert not set(control.heads) & set(recipe.heads)
        with torch.no_grad(), control.on(model, spans=batch):
            out = model.hf(**batch.inputs()).logits[:, -1, :4]
        assert torch.equal(out.argmax(-1), truth)
    with torch.no_grad(), recipe.on(model, spans=batch):
        out = model.hf(**batch.inputs()).logits[:, -1, :4]
    assert float((out.argmax(-1) == truth).double().mean()) == 0.25
    with pytest.raises(InputError, match="at least 1") as caught:
        recipe.control(model, 0)
    assert caught.value.hint


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_baked_model_saved_and_loaded_is_the_hooked_one(family: str, tmp_path: Any) -> None:
    model = handle(family)
    batch = model.batch(prompts(), side="left")
    recipe = Recipe([
        Edit("scale", at("0.1", "1.2"), torch.tensor([-1.0, 3.0])),
        Edit("project", at("0.1"), 2.0, tensors={"basis": torch.linalg.qr(noise(1, 16, 3))[0]}),
    ])  # fmt: skip
    with recipe.on(model, spans=batch):
        want = generated(model, batch)
    recipe.bake(model).hf.save_pretrained(tmp_path / "baked")
    again = Model(type(model.hf).from_pretrained(tmp_path / "baked"), name="again")
    torch.testing.assert_close(generated(again, batch), want, rtol=1e-4, atol=1e-4)
    assert float((want - generated(model, batch)).abs().max()) > 1e-2


# What cannot be done, in one line -----------------------------------------------------------


def _run(edit: Edit, family: str = "llama", spans: Any = None) -> None:
    model = handle(family)
    batch = model.batch(prompts(), side="left")
    with torch.no_grad(), Recipe(edit).on(model, spans=batch if spans is None else spans):
        model.hf(**batch.inputs())


BAD: dict[str, tuple[Callable[[], Any], type[InterpError], str]] = {
    "no edits": (lambda: Recipe([]), InputError, "at least one edit; got none"),
    "no heads": (lambda: Where(heads=()), InputError, "at least one head; got none"),
    "no layers": (lambda: Where(layers=()), InputError, "at least one layer; got none"),
    "no positions": (lambda: Positions(), InputError, "must select something; got nothing"),
    "layer outside": (lambda: _run(Edit("zero", Where(layers=(9,)), site="resid")), HeadIdError,
                      "layer 9 is outside"),
    "kv head outside": (lambda: _run(Edit("zero", at("0.2"), site="k")), HeadIdError,
                        "key-value heads 0 to 1; got L0H2"),
    "unknown op": (lambda: Edit("zer"), InterpError, "no op named 'zer'"),
    "unknown site": (lambda: Edit("zero", site="zz"), InterpError, "no site named 'zz'"),
    "unknown field": (lambda: Edit.from_json({"op": "zero", "wher": 1}, {}), InterpError,
                      "no field of an edit named 'wher'"),
    "unknown parameter": (lambda: Edit("move", at("0.1", keys=span("img")), params={"tp": 1}),
                          InterpError, "no parameter of op 'move' named 'tp'"),
    "site the op lacks": (lambda: Edit("bias", at("0.1"), site="z"), InputError, "got site 'z'"),
    "site out of reach": (lambda: _run(Edit("scale", at("0.1"), 2.0, site="q"), "bloom"),
                          SiteError, "site 'q' is not reached"),
    "every key blocked": (
        lambda: _run(Edit("knockout", at("0.1", keys=Positions(window=(0, 50))))), InputError,
        "a row of attention must keep a key; every key that query"),
    "every key of one row": (
        lambda: _run(Edit("knockout", at("0.1", keys=span("bos"), queries=Positions(prompt=0)))),
        InputError, "every key that query 3 of example 0 sees"),
    "no controls": (lambda: Recipe(Edit("zero", at("0.1"))).control(handle("llama"), 0),
                    InputError, "at least 1; got 0"),
    "unequal pair": (lambda: PromptPair(Prompt((1, 2)), Prompt((1,), id="x")), InputError,
                     "equally many tokens; pair ? has 2 and 1"),
    "no range": (lambda: _run(Edit("zero", at("0.1", queries=span("img"))), spans={"img": []}),
                 InputError, "span 'img' needs a range (start, stop), or several; got []"),
    "half a range": (lambda: _run(Edit("zero", at("0.1", queries=span("img"))), spans={"img": 3}),
                     InputError, "span 'img' needs a range (start, stop), or several; got 3"),
}  # fmt: skip


def test_what_the_model_lacks_is_named_beside_what_it_has() -> None:
    with pytest.raises(HeadIdError, match=r"L2H0 is outside.*2 layers x 4 heads \(to L1H3\)"):
        _run(Edit("zero", at("2.0")))
    with pytest.raises(InputError, match="no span 'needle'; it has: bos, img"):
        _run(Edit("zero", at("0.1", queries=span("needle"))))


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_clear_line_with_a_hint(name: str) -> None:
    act, error, text = BAD[name]
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    assert text in message and "\n" not in message
    assert caught.value.hint and "\n" not in caught.value.hint, message
