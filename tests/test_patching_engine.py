"""The exact engine against planted truth, whole runs of one prompt, and other libraries."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from patching_kit import FAMILIES, difference, logits_of, random_pairs, seen_z, tiny
from torch import Tensor

import interp
from interp.errors import (
    HeadIdError,
    InputError,
    PairError,
    SmallerBatchWarning,
    TooLargeError,
    UnknownNameError,
)
from interp.headid import HeadId
from interp.metrics import METRICS
from interp.model import Model
from interp.prompts import Prompt, PromptPair
from interp.recipe import Edit, Recipe, Where
from interp.replay import Overlay, Replay
from interp.zoo.planted_ioi import ioi_pairs
from patching import METHODS, Pairs, head_effects, head_position_effects, make_method
from patching.engine import SITES
from patching.pairs import PairBatch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def naive(model: Model, pairs: list[PromptPair], heads: tuple[HeadId, ...]) -> np.ndarray:
    """Effect of noising each head: one whole forward per prompt and head, by hooks of torch."""
    out = np.zeros((len(pairs), len(heads)))
    for i, pair in enumerate(pairs):
        other = seen_z(model, pair.corrupted)
        base = difference(logits_of(model, pair.clean), pair.clean)
        for j, head in enumerate(heads):
            name = model.layer_of(head).name

            def put(z: Tensor, value: Tensor = other[name][:, head.head], h: int = head.head):  # type: ignore[no-untyped-def]
                z[:, h] = value
                return z

            patched = logits_of(model, pair.clean, {name: put})
            out[i, j] = difference(patched, pair.clean) - base
    return out


@pytest.mark.parametrize("kind", FAMILIES)
def test_replay_equals_whole_runs(kind: str) -> None:
    model = tiny(kind)
    pairs = random_pairs(2)
    scores = head_effects(model, pairs)
    want = naive(model, pairs, scores.heads)
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(scores.per_example, want, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom"])
def test_single_positions_equal_whole_runs(kind: str) -> None:
    model = tiny(kind)
    (pair,) = pairs = random_pairs(1)
    effects = head_position_effects(model, pairs, heads=["0.1", "2.3"])
    other = seen_z(model, pair.corrupted)
    base = difference(logits_of(model, pair.clean), pair.clean)
    for column, head in enumerate(effects.heads):
        name = model.layer_of(head).name
        for position in (0, 3, 6, 9):

            def put(z: Tensor, p: int = position, h: int = head.head, n: str = name) -> Tensor:
                z[p, h] = other[n][p, h]
                return z

            want = difference(logits_of(model, pair.clean, {name: put}), pair.clean) - base
            assert effects.per_example[0, column, position] == pytest.approx(want, abs=2e-4)
    assert np.abs(effects.values).max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "llama-eager", "gpt2", "mistral", "neox", "gemma2"])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_inputs_of_heads_equal_recipes(kind: str, site: str) -> None:
    model = tiny(kind)
    pairs = random_pairs(2)
    data = Pairs(model, pairs)
    _, batch = next(data.batches())
    scores = head_effects(model, data, site=site)
    layers = {x.index: x for x in model.tower("text").layers}
    assert len(scores.heads) == sum(
        x.n_heads if site == "q" else x.n_kv_heads for x in layers.values()
    )
    floor = batch.score(batch.clean.logits)
    for column, head in list(enumerate(scores.heads))[::3]:
        call = batch.corrupted.call(layers[head.layer])
        value = getattr(call, site)[:, head.head][None]
        recipe = Recipe([Edit("set", Where(heads=[head]), site=site, tensors={"value": value})])
        with recipe.on(model):
            logits = model.forward(batch.clean.batch.inputs()).logits[:, -1]
        want = (batch.score(logits) - floor).numpy()
        np.testing.assert_allclose(scores.per_example[:, column], want, atol=2e-4)
    assert np.abs(scores.values).max() > 1e-3


def test_patterns_equal_attention_of_the_model() -> None:
    """The pattern as Hugging Face returns it, times the clean values."""
    model = tiny("gemma2")
    (pair,) = pairs = random_pairs(1)
    scores = head_effects(model, pairs, site="pattern")
    layers = model.tower("text").layers
    values: dict[int, Tensor] = {}
    handles = [
        model.hf.model.layers[i].self_attn.v_proj.register_forward_hook(
            lambda m, a, out, i=i: values.__setitem__(i, out[0].view(out.shape[1], 2, 8))
        )
        for i in range(3)
    ]
    base = difference(logits_of(model, pair.clean), pair.clean)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        out = model.hf(torch.tensor([pair.corrupted.tokens]), output_attentions=True)
    for column, head in enumerate(scores.heads):
        new = out.attentions[head.layer][0, head.head] @ values[head.layer][:, head.head // 2]

        def put(z: Tensor, new: Tensor = new, h: int = head.head) -> Tensor:
            z[:, h] = new
            return z

        patched = logits_of(model, pair.clean, {layers[head.layer].name: put})
        want = difference(patched, pair.clean) - base
        assert scores.values[column] == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("name", ["zoo:planted-ioi", "zoo:planted-ioi-rotated"])
def test_planted_tables(name: str) -> None:
    model = interp.load(name)
    assert model.truth is not None
    flip, abc = ioi_pairs(12, corruption="flip"), ioi_pairs(12)
    runs = {
        "zero-ablation": head_effects(model, abc, reference="zero").values,
        "noise-abc": head_effects(model, abc).values,
        "noise-flip": head_effects(model, flip).values,
        "denoise-abc": head_effects(model, abc, direction="denoise").extras["recovered"],
    }
    heads = model.tower("text").heads
    for key, values in runs.items():
        want = [model.truth.scores[key][h] for h in heads]
        np.testing.assert_allclose(values, want, atol=1e-3, err_msg=key)


@pytest.mark.parametrize(
    ("site", "want"),
    [
        ("q", {"L0H0": -13.2, "L2H0": -12.0, "L2H1": -6.0, "L2H2": 4.8}),
        ("k", {"L2H0": -6.0, "L2H1": -3.0, "L2H2": 2.4}),
        ("v", {"L1H0": -13.2}),
        ("pattern", {"L0H0": -13.2, "L2H0": -12.0, "L2H1": -6.0, "L2H2": 4.8}),
    ],
)
def test_planted_inputs(site: str, want: dict[str, float]) -> None:
    model = interp.load("zoo:planted-ioi")
    scores = head_effects(model, ioi_pairs(6, corruption="flip"), site=site)
    for head, value in zip(scores.heads, scores.values, strict=True):
        assert value == pytest.approx(want.get(str(head), 0.0), abs=1e-3), (site, head)


def test_planted_positions() -> None:
    model = interp.load("zoo:planted-ioi")
    effects = head_position_effects(model, ioi_pairs(6, corruption="flip"))
    want = {("L0H0", 6): -13.2, ("L1H0", 8): -13.2, ("L2H0", 8): -12.0, ("L2H1", 8): -6.0}
    want |= {("L2H2", 8): 4.8}
    for i, head in enumerate(effects.heads):
        for p in range(9):
            assert effects.values[i, p] == pytest.approx(want.get((str(head), p), 0.0), abs=1e-3)
    assert [(str(h), p) for h, p, _ in effects.top(5)] == list(want)[:5]
    assert effects.recovered[0, 6] == pytest.approx(-1.0, abs=1e-4)
    assert len(effects.to_frame()) == 16 * 9


@pytest.mark.parametrize(
    ("kind", "site"),
    [("gpt2", "z"), ("llama", "z"), ("bloom", "z"), ("gpt2", "q"), ("llama", "v")],
)
def test_a_run_patched_with_itself_does_not_change_by_a_bit(kind: str, site: str) -> None:
    same = [PromptPair(p.clean, p.clean) for p in random_pairs(3)]
    model = tiny(kind)
    scores = head_effects(model, same, site=site)
    if site == "z":
        # The base is run whole, the patched run in copies: BLAS may round a row of a larger
        # matrix otherwise, so equality is asked of the patched runs among themselves.
        data = Pairs(model, same)
        _, batch = next(data.batches())
        layer = model.tower("text").layers[1]
        z = batch.clean.kept[layer.name].z
        new = SITES["z"](data, batch, "noise", "other", layer)
        assert torch.equal(z, new)
        one = batch.clean.rerun({layer.name: z[None]}, copies=1)
        assert torch.equal(one[0], batch.clean.logits)
    assert np.abs(scores.per_example).max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "gptj"])
def test_patching_everything_gives_the_other_run(kind: str) -> None:
    model = tiny(kind)
    data = Pairs(model, random_pairs(2, first=7))  # the last token differs as well
    _, batch = next(data.batches())
    every = {name: kept.z[None] for name, kept in batch.corrupted.kept.items()}
    ids = batch.corrupted.batch.input_ids
    logits = batch.clean.rerun(every, copies=1, ids=ids)[0]
    torch.testing.assert_close(logits, batch.corrupted.logits, rtol=0, atol=1e-5)
    # Without the other embeddings it is not the other run: the test can fail.
    heads_only = batch.clean.rerun(every, copies=1)[0]
    assert float((heads_only - batch.corrupted.logits).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_denoising_is_noising_of_the_swapped_pair(kind: str) -> None:
    model = tiny(kind)
    pairs = random_pairs(2)
    swapped = [
        PromptPair(
            dataclasses.replace(
                p.corrupted, id=p.clean.id, answer=p.clean.answer, meta=p.clean.meta
            ),
            p.clean,
        )
        for p in pairs
    ]
    one = head_effects(model, pairs, direction="denoise")
    two = head_effects(model, swapped)
    np.testing.assert_allclose(one.per_example, two.per_example, atol=1e-5)
    assert one.direction == "higher" and two.direction == "lower"


def test_zero_mean_and_resample() -> None:
    model = tiny("llama")
    pairs = random_pairs(3)
    others = [seen_z(model, p.corrupted) for p in pairs]
    for reference in ("zero", "mean", "resample"):
        scores = head_effects(model, pairs, reference=reference, heads=["1.2"])
        name = model.layer_of("1.2").name
        found = []
        for i, pair in enumerate(pairs):
            choices = {
                "zero": [torch.zeros(10, 8)],
                "mean": [torch.stack([o[name][:, 2] for o in others]).mean(0)],
                "resample": [o[name][:, 2] for j, o in enumerate(others) if j != i],
            }[reference]
            base = difference(logits_of(model, pair.clean), pair.clean)
            wants = []
            for value in choices:

                def put(z: Tensor, value: Tensor = value) -> Tensor:
                    z[:, 2] = value
                    return z

                patched = logits_of(model, pair.clean, {name: put})
                wants.append(difference(patched, pair.clean) - base)
            found.append(min(abs(scores.per_example[i, 0] - w) for w in wants))
        assert max(found) < 1e-4, reference
        assert scores.detector == f"ablate.{reference}"


def test_pairs_of_several_lengths_are_as_each_alone() -> None:
    for kind in ("gpt2", "llama", "mistral"):
        model = tiny(kind)
        short, long = random_pairs(2, length=8, seed=5), random_pairs(3, length=12, seed=6)
        mixed = [long[0], short[0], long[1], short[1], long[2]]
        together = head_effects(model, mixed, batch_size=2)
        assert together.examples == tuple(p.clean.id for p in mixed)
        for i, pair in enumerate(mixed):
            alone = head_effects(model, [pair])
            np.testing.assert_allclose(
                together.per_example[i], alone.per_example[0], atol=1e-5
            )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mistral", "neox"])
def test_a_batch_padded_on_the_left(kind: str) -> None:
    model = tiny(kind)
    prompts = [random_pairs(1, length=n, seed=n)[0].clean for n in (7, 12)]
    replay = Replay(model, model.batch(prompts, side="left"))
    assert replay.suffix_works
    layer = model.tower("text").layers[1]
    z = replay.kept[layer.name].z[None].repeat(4, 1, 1, 1, 1)
    for h in range(4):
        z[h, :, 6:, h] = 0
    from_start = replay.rerun({layer.name: z}, copies=4)
    from_six = replay.rerun({layer.name: z[:, :, 6:]}, copies=4, start=6)
    for row, prompt in enumerate(prompts):
        at = 6 - (12 - len(prompt))
        for h in range(4):

            def put(z: Tensor, at: int = at, h: int = h) -> Tensor:
                z[at:, h] = 0
                return z

            want = logits_of(model, prompt, {layer.name: put})
            torch.testing.assert_close(from_start[h, row], want, rtol=0, atol=2e-4)
            torch.testing.assert_close(from_six[h, row], want, rtol=0, atol=2e-4)
    with pytest.raises(InputError, match="padded on the left"):
        Replay(model, model.batch(prompts))


def test_overlays_leave_other_heads_alive() -> None:
    model = tiny("llama")
    (pair,) = random_pairs(1)
    replay = Replay(model, model.batch([pair.clean], side="left"))
    layers = model.tower("text").layers
    masks = {0: [True, False, False, True], 2: [False, True, False, False]}
    overlays = {
        layers[i].name: Overlay(torch.zeros(1, 1, 10, 4, 8), torch.tensor([mask]))
        for i, mask in masks.items()
    }

    def put(i: int):  # type: ignore[no-untyped-def]
        def change(z: Tensor) -> Tensor:
            z[:, torch.tensor(masks[i])] = 0
            return z

        return change

    want = logits_of(model, pair.clean, {layers[i].name: put(i) for i in masks})
    got = replay.rerun({}, copies=1, overlays=overlays)[0, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_metrics_of_patched_runs(metric: str) -> None:
    model = tiny("llama")
    (pair,) = pairs = random_pairs(1)
    scores = head_effects(model, pairs, metric=metric, heads=["1.1"])
    name, other = model.layer_of("1.1").name, seen_z(model, pair.corrupted)

    def put(z: Tensor) -> Tensor:
        z[:, 1] = other[name][:, 1]
        return z

    clean, patched = logits_of(model, pair.clean), logits_of(model, pair.clean, {name: put})
    assert pair.clean.answer is not None
    answer, wrong = pair.clean.answer[0], pair.clean.meta["wrong"]

    def of(x: Tensor) -> float:
        p, q = clean.softmax(-1), x.softmax(-1)
        return {
            "logit-difference": float(x[answer] - x[wrong]),
            "logit": float(x[answer] - x.mean()),
            "log-prob": float(q[answer].log()),
            "prob": float(q[answer]),
            "accuracy": float(x.argmax() == answer),
            "rank": float((x > x[answer]).sum()),
            "kl": float((p * (p / q).log()).sum()),
        }[metric]

    assert scores.values[0] == pytest.approx(of(patched) - of(clean), abs=1e-4)


def test_heads_are_chosen_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    scores = head_effects(
        tiny("llama"), random_pairs(2), heads=["2.0", "0.3"], batch_size=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert scores.heads == (HeadId(0, 3), HeadId(2, 0))
    assert told == [(2, 4), (4, 4)]  # heads of all layers share a launch


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memory_that_runs_out_halves_the_copies(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny(family), random_pairs(2)
    want = head_effects(model, pairs)
    run, tried = Replay._forward, []

    def small(self: Replay, inputs: dict[str, Tensor]) -> Tensor:
        logits = run(self, inputs)
        tried.append(len(logits))
        if len(logits) > 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return logits

    monkeypatch.setattr(Replay, "_forward", small)
    with pytest.warns(SmallerBatchWarning, match="patched runs at once do not fit into memory"):
        got = head_effects(model, pairs)
    assert max(tried) > 7 and sum(x <= 7 for x in tried) > 2
    np.testing.assert_allclose(got.per_example, want.per_example, atol=1e-5)
    monkeypatch.setattr(Replay, "_forward", run)
    batch, whole = Pairs.batch, []

    def two(self: Pairs, chosen: tuple[PromptPair, ...]) -> PairBatch:
        whole.append(len(chosen))
        if len(chosen) > 1:
            raise TooLargeError("2 pairs do not fit into memory")
        return batch(self, chosen)

    monkeypatch.setattr(Pairs, "batch", two)
    with pytest.warns(SmallerBatchWarning, match="2 pairs at once"):
        got = head_effects(model, pairs)
    assert whole == [2, 1, 1]
    np.testing.assert_allclose(got.per_example, want.per_example, atol=1e-5)


def test_the_model_is_as_before() -> None:
    model = tiny("gpt2")
    (pair,) = pairs = random_pairs(1)
    before = logits_of(model, pair.clean)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    head_effects(model, pairs)
    with pytest.raises(Stop):
        head_effects(model, pairs, progress=stop)
    assert torch.equal(logits_of(model, pair.clean), before)
    assert not any("forward" in vars(m) for m in model.hf.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_bad_input() -> None:
    model, pairs = tiny("llama"), random_pairs(2)
    with pytest.raises(InputError, match="noise or denoise"):
        head_effects(model, pairs, direction="up")
    with pytest.raises(UnknownNameError, match="site"):
        head_effects(model, pairs, site="resid")
    with pytest.raises(UnknownNameError, match="reference"):
        head_effects(model, pairs, reference="noise")
    with pytest.raises(UnknownNameError, match="metric"):
        head_effects(model, pairs, metric="loss")
    with pytest.raises(HeadIdError, match="outside this model"):
        head_effects(model, pairs, heads=["7.1"])
    with pytest.raises(InputError, match="at least one head"):
        head_effects(model, pairs, heads=[])
    with pytest.raises(InputError, match="not a head of site 'k'"):
        head_effects(model, pairs, heads=["0.3"], site="k")
    with pytest.raises(InputError, match="at least one pair"):
        head_effects(model, [])
    with pytest.raises(InputError, match="batch_size"):
        head_effects(model, pairs, batch_size=0)
    with pytest.raises(InputError, match="all be different"):
        head_effects(model, [pairs[0], pairs[0]])
    with pytest.raises(InputError, match="at least 2 pairs"):
        head_effects(model, pairs[:1], reference="resample")
    with pytest.raises(PairError, match="one length"):
        head_position_effects(model, pairs + random_pairs(1, length=8))
    with pytest.raises(PairError, match="equally many tokens"):
        PromptPair(Prompt((1, 2)), Prompt((1,)))
    with pytest.raises(InputError, match="needs an answer"):
        head_effects(model, [PromptPair(Prompt((5, 6)), Prompt((5, 7)))])
    with pytest.raises(InputError, match="wrong answer"):
        head_effects(model, [PromptPair(Prompt((5, 6), answer=(1,)), Prompt((5, 7)))])
    same = [PromptPair(p.clean, p.clean) for p in pairs]
    assert "recovered" not in head_effects(model, same).extras
    with pytest.raises(InputError, match="must differ in the metric"):
        _ = head_position_effects(model, same).recovered
    with pytest.raises(InputError, match="not reached"):
        head_effects(tiny("bloom"), pairs, site="q")


def test_methods_run_by_name() -> None:
    model = interp.load("zoo:planted-ioi")
    data = Pairs(model, ioi_pairs(4))
    scores = make_method("ablate", {"reference": "zero"}).scores(data)
    assert scores.values[scores.heads.index(HeadId(2, 0))] == pytest.approx(-1.2, abs=1e-3)
    noised = make_method("patch", {"direction": "denoise"}).scores(data)
    assert noised.extras["recovered"][8] == pytest.approx(6 / 6.6, abs=1e-4)
    for name in METHODS:
        assert METHODS[name].name == name and METHODS[name].citation and METHODS[name].summary
    with pytest.raises(UnknownNameError):
        make_method("patch", {"colour": "red"})


def test_transformer_lens_gives_the_same_numbers() -> None:
    pytest.importorskip("transformer_lens")
    import copy

    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    model, pairs = tiny("gpt2"), random_pairs(2)
    hf = copy.deepcopy(model.hf)
    bridge = build_bridge_from_module(
        hf, type(hf).__name__, hf_config=hf.config, tokenizer=None, model_name="tiny"
    )
    clean = torch.tensor([p.clean.tokens for p in pairs])
    corrupted = torch.tensor([p.corrupted.tokens for p in pairs])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)

    def metric(logits: Tensor) -> Tensor:
        each = [difference(x[-1], p.clean) for x, p in zip(logits, pairs, strict=True)]
        return torch.tensor(each).mean()

    with torch.no_grad():
        base = metric(bridge(corrupted))
        theirs = get_act_patch_attn_head_out_all_pos(bridge, corrupted, cache, metric) - base
    ours = head_effects(model, pairs, direction="denoise").grid()
    assert np.abs(ours).max() > 0.05
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-4)


@pytest.mark.parametrize("site", ["z", "v", "pattern"])
def test_means_are_over_all_pairs_of_a_kind_however_they_are_cut(site: str) -> None:
    model = tiny("llama")
    short, long = random_pairs(3), [
        PromptPair(*(Prompt((*x.tokens, 3), id=f"long-{x.id}", answer=x.answer, meta=x.meta)
                     for x in (p.clean, p.corrupted)))
        for p in random_pairs(2)
    ]  # fmt: skip
    for i, p in enumerate(short):
        meta = {**p.clean.meta, "template": i % 2}
        short[i] = PromptPair(dataclasses.replace(p.clean, meta=meta), p.corrupted)
    want = {}
    for kind in ([short[0], short[2]], [short[1]], long):
        alone = head_effects(model, kind, site=site, reference="mean", batch_size=8)
        want |= dict(zip(alone.examples, alone.per_example, strict=True))
    for size in (1, 2, 8):
        both = head_effects(model, [*short, *long], site=site, reference="mean", batch_size=size)
        for name, row in zip(both.examples, both.per_example, strict=True):
            np.testing.assert_allclose(row, want[name], atol=2e-5, err_msg=f"{size} {name}")


def test_heads_of_a_plain_vision_transformer_are_patched() -> None:
    from interp.tasks import make_task

    model = interp.load("zoo:shapes-vit", device="cpu")
    pairs = make_task("shapes", {"corruption": "mask"}).pairs(model, 2)
    found = head_effects(model, pairs, metric="log-prob", tower="vision")

    def run(prompt: Prompt, put: tuple[int, int, dict[int, Tensor]] | None = None) -> Any:
        seen: dict[int, Tensor] = {}

        def observer(layer: Any, z: Tensor) -> Tensor:
            seen[layer.index] = z.clone()
            z = z.clone()
            if put is not None and layer.index == put[0]:
                z[:, :, put[1]] = put[2][put[0]][:, :, put[1]]
            return z

        with model.observe_output(observer), torch.no_grad():
            pixels = prompt.inputs["pixel_values"]
            return model.hf(pixel_values=pixels).logits[0].log_softmax(-1), seen

    for i, pair in enumerate(pairs):
        assert pair.clean.answer is not None
        answer = pair.clean.answer[0]
        base, (_, other) = run(pair.clean)[0], run(pair.corrupted)
        for j, head in enumerate(found.heads):
            patched = run(pair.clean, (head.layer, head.head, other))[0]
            want = float(patched[answer] - base[answer])
            assert found.per_example[i, j] == pytest.approx(want, abs=2e-5, rel=1e-4)
    assert np.abs(found.per_example).max() > 0.01
