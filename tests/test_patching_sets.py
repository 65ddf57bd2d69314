"""Sets of heads: importance, pruning, knockout, circuits, repair."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patching_kit import difference, logits_of, random_pairs, seen_z, tiny
from torch import Tensor

import interp
from interp.errors import HeadIdError, InputError, RunError, SpanError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.recipe import Edit, Positions, Recipe, Where
from interp.stats import bootstrap_interval
from interp.zoo.planted_ioi import ioi_pairs
from patching import Pairs, head_effects, make_method
from patching.circuit import HeadSet, circuit_curve, circuit_sizes, ranked, top_heads
from patching.importance import head_importance
from patching.knockout import head_knockout
from patching.prune import greedy_prune, joint_effects, leave_one_out
from patching.repair import force_attention, self_repair
from patching.windows import knockout_curves, window_knockout


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy() -> Model:
    return interp.load("zoo:planted-ioi")


def ablated(model: Model, pair: PromptPair, heads: tuple[HeadId, ...], *, zero: bool) -> float:
    """The metric of one unpadded prompt with a set of heads replaced, by hooks of torch."""
    other = seen_z(model, pair.corrupted)
    by_name: dict[str, list[int]] = {}
    for head in heads:
        by_name.setdefault(model.layer_of(head).name, []).append(head.head)

    def put(name: str):  # type: ignore[no-untyped-def]
        def change(z: Tensor) -> Tensor:
            index = by_name[name]
            z[:, index] = 0 if zero else other[name][:, index]
            return z

        return change

    logits = logits_of(model, pair.clean, {name: put(name) for name in by_name})
    return difference(logits, pair.clean)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "bloom"])
@pytest.mark.parametrize("reference", ["zero", "other"])
def test_joint_effects_equal_whole_runs(kind: str, reference: str) -> None:
    model, pairs = tiny(kind), random_pairs(2)
    sets = [
        ["0.1", "0.3", "2.2"],
        [],
        ["1.0"],
        ["2.0", "1.1"],
        list(map(str, tiny(kind).tower("text").heads)),
    ]
    found = joint_effects(model, pairs, sets, reference=reference)
    for i, pair in enumerate(pairs):
        base = difference(logits_of(model, pair.clean), pair.clean)
        assert found.clean[i] == pytest.approx(base, abs=1e-4)
        for j, heads in enumerate(found.sets):
            want = ablated(model, pair, heads, zero=reference == "zero") - base
            assert found.per_example[i, j] == pytest.approx(want, abs=3e-4)
    assert abs(found.values[1]) < 1e-5 < np.abs(found.values[[0, 2, 3]]).min()


def test_planted_joint_ablation(toy: Model) -> None:
    sets = [["2.0", "2.1"], ["2.0", "2.1", "3.0"], ["2.0", "2.1", "2.2", "3.0"]]
    found = joint_effects(toy, ioi_pairs(8), sets)
    np.testing.assert_allclose(found.values, [-4.2, -9.0, -6.6], atol=1e-3)
    alone = leave_one_out(toy, ioi_pairs(8))
    singles = [sum(alone.values[alone.heads.index(h)] for h in s) for s in found.sets]
    np.testing.assert_allclose(singles, [-4.2, -4.2, -1.8], atol=1e-3)


def test_greedy_pruning_is_the_best_choice_at_each_step() -> None:
    model, pairs = tiny("llama"), random_pairs(2)
    heads = ["0.0", "1.1", "1.3", "2.2"]
    curve = greedy_prune(model, pairs, heads=heads)
    left, gone = [HeadId.parse(h) for h in heads], ()
    for step, head in enumerate(curve.order):
        means = [
            np.mean([ablated(model, p, (*gone, h), zero=True) for p in pairs]) for h in left
        ]  # fmt: skip
        best = left[int(np.argmax(means))]
        assert head == best
        assert curve.values[step] == pytest.approx(max(means), abs=3e-4)
        left.remove(best)
        gone = (*gone, best)
    curve.plot()


def test_planted_greedy_pruning(toy: Model) -> None:
    """The negative mover goes first, the movers after every idle head; nothing else helps."""
    curve = greedy_prune(toy, ioi_pairs(4))
    assert curve.order[0] == HeadId(2, 2)
    assert set(curve.order[-4:]) == {HeadId(0, 0), HeadId(1, 0), HeadId(2, 0), HeadId(2, 1)}
    np.testing.assert_allclose(curve.values[:12], 9.0, atol=1e-3)
    assert curve.kept(1.0) == 12 and curve.kept(0.9) == 13
    few = greedy_prune(toy, ioi_pairs(4), steps=2, reference="other")
    assert len(few.order) == 2 and few.values[0] == pytest.approx(9.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_importance_is_the_slope_of_a_gate(kind: str) -> None:
    """Central differences of gates on whole heads, and on single positions."""
    model = tiny(kind)
    (pair,) = pairs = random_pairs(1)
    by_example = head_importance(model, pairs)
    by_position = head_importance(model, pairs, per="position")
    eps = 1e-2
    for j, head in list(enumerate(by_example.heads))[::4]:
        name = model.layer_of(head).name

        def slope(rows: slice, n: str = name, h: int = head.head) -> float:
            def scaled(factor: float) -> float:
                def change(z: Tensor) -> Tensor:
                    z[rows, h] *= factor
                    return z

                return difference(logits_of(model, pair.clean, {n: change}), pair.clean)

            return (scaled(1 + eps) - scaled(1 - eps)) / (2 * eps)

        want = abs(slope(slice(None)))
        assert by_example.values[j] == pytest.approx(want, rel=0.02, abs=2e-3)
        each = [abs(slope(slice(p, p + 1))) for p in range(10)]
        assert by_position.values[j] == pytest.approx(np.mean(each), rel=0.02, abs=2e-3)
    assert not np.allclose(by_example.values / 10, by_position.values, atol=1e-3)
    assert all(p.requires_grad for p in model.hf.parameters())


def test_importance_normalised_and_saturated(toy: Model) -> None:
    plain = head_importance(tiny("llama"), random_pairs(2))
    scaled = head_importance(tiny("llama"), random_pairs(2), normalise=True)
    for layer in range(3):
        mine = slice(4 * layer, 4 * layer + 4)
        assert np.linalg.norm(scaled.values[mine]) == pytest.approx(1.0)
        ratio = plain.values[mine] / scaled.values[mine]
        np.testing.assert_allclose(ratio, ratio[0])
    found = make_method("importance").scores(Pairs(toy, ioi_pairs(4)))
    value = dict(zip(map(str, found.heads), found.values, strict=True))
    assert [value[h] for h in ("L2H0", "L2H1", "L2H2")] == pytest.approx([6, 3, 2.4], abs=1e-3)
    # Ablating either of these costs 8.8; their slope is zero, for attention is saturated.
    assert value["L0H0"] < 1e-3 and value["L1H0"] < 1e-3


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama", "llama-eager", "mistral", "gemma2", "gptj", "bloom"]
)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ("last", "early"),
        ("late", "others"),
        ("last", "~early"),
        ("last", "~bos,early"),
        ("~bos,last", "early"),
        ("~early,bos", "others"),
        ("~bos,early,last", "~early"),
    ],
)
def test_head_knockout_equals_recipes(kind: str, queries: str, keys: str) -> None:
    model = tiny(kind)
    pairs = [
        PromptPair(*(replace(p, spans={**p.spans, "bos": ((0, 1),)})
                     for p in (pair.clean, pair.corrupted)))
        for pair in random_pairs(2)
    ]  # fmt: skip
    scores = head_knockout(model, pairs, queries=queries, keys=keys)
    _, batch = next(Pairs(model, pairs).batches())
    floor = batch.score(batch.clean.logits)
    rows = {
        "last": (9,), "late": (8, 9), "~bos,last": tuple(range(1, 9)),
        "~early,bos": tuple(range(3, 10)), "~bos,early,last": tuple(range(3, 9)),
    }[queries]  # fmt: skip
    hidden = {
        "early": (1, 2),
        "others": tuple(i for i in range(10) if i not in rows),
        "~early": (0, 9) if queries.startswith("~") else (0, *range(3, 9)),
        "~bos,early": tuple(range(3, 9)),
    }[keys]
    where = {"queries": Positions(prompt=rows), "keys": Positions(prompt=hidden)}
    for j, head in list(enumerate(scores.heads))[::3]:
        with Recipe([Edit("knockout", Where(heads=[head], **where))]).on(model):
            logits = model.forward(batch.clean.batch.inputs()).logits[:, -1]
        want = (batch.score(logits) - floor).numpy()
        np.testing.assert_allclose(scores.per_example[:, j], want, atol=3e-4)
    prompts = [p.clean for p in pairs]
    found = window_knockout(model, prompts, queries=queries, keys=keys, window=1, target="answer")
    plain = batch.clean.logits.double().softmax(-1)
    answers = torch.tensor([[p.answer[0]] for p in prompts if p.answer])
    for layer in found.layers:
        heads = [HeadId(layer, h) for h in range(4)]
        with Recipe([Edit("knockout", Where(heads=heads, **where))]).on(model):
            cut = model.forward(batch.clean.batch.inputs()).logits[:, -1].double().softmax(-1)
        change = (cut / plain).gather(1, answers)[:, 0] - 1
        np.testing.assert_allclose(found.per_example[:, layer], change, atol=3e-4)
    # The last query of the sliding window never sees the early keys.
    unseen = kind == "mistral" and (queries, keys) == ("last", "early")
    assert (np.abs(scores.values).max() > 1e-3) != unseen


def test_planted_knockout(toy: Model) -> None:
    scores = make_method("knockout", {"keys": "io"}).scores(Pairs(toy, ioi_pairs(8)))
    want = {"L2H0": -1.2, "L2H1": -3.0, "L2H2": 2.4}
    for head, value in zip(scores.heads, scores.values, strict=True):
        assert value == pytest.approx(want.get(str(head), 0.0), abs=1e-3)
    _, batch = next(Pairs(toy, ioi_pairs(8)).batches())
    for heads, effect in ((["2.0", "2.1"], -4.2), (["2.0", "2.1", "2.2", "3.0"], -6.6)):
        where = Where(heads=heads, queries=Positions(prompt=(-1,)), keys=Positions(spans=("io",)))
        with Recipe([Edit("knockout", where)]).on(toy, spans=batch.clean.batch):
            logits = toy.forward(batch.clean.batch.inputs()).logits[:, -1]
        change = (batch.score(logits) - batch.score(batch.clean.logits)).mean()
        assert float(change) == pytest.approx(effect, abs=1e-3)


def test_window_knockout(toy: Model) -> None:
    prompts = [p.clean for p in ioi_pairs(5)]
    found = window_knockout(toy, prompts, keys="io", window=1, batch_size=2)
    single = [f"2.{h}" for h in range(4)]
    assert found.layers == (0, 1, 2, 3)
    for i, prompt in enumerate(prompts):
        batch = toy.batch([prompt])
        where = Where(heads=single, queries=Positions(prompt=(-1,)), keys=Positions(spans=("io",)))
        before = toy.forward(batch.inputs()).logits[0, -1].softmax(-1)
        with Recipe([Edit("knockout", where)]).on(toy, spans=batch):
            after = toy.forward(batch.inputs()).logits[0, -1].softmax(-1)
        assert prompt.answer is not None
        token = prompt.answer[0]
        want = float((after[token] - before[token]) / before[token])
        assert found.per_example[i, 2] == pytest.approx(want, abs=1e-5)
        assert found.probability[i] == pytest.approx(float(before[token]), abs=1e-5)
    np.testing.assert_allclose(found.values[[0, 1, 3]], 0, atol=1e-4)
    wide = window_knockout(toy, prompts, keys="io", window=9, target="answer")
    assert np.ptp(wide.values) < 1e-6 and wide.values[0] < -0.05  # every window holds all layers
    two = window_knockout(toy, prompts, keys="io", window=2)  # layers l - 1 and l
    np.testing.assert_allclose(two.values[2], found.values[2], atol=1e-5)
    assert abs(two.values[3]) > 0.05 and abs(two.values[1]) < 1e-4


def test_window_curves(toy: Model) -> None:
    prompts = [p.clean for p in ioi_pairs(5)]
    seen: list[tuple[int, int]] = []
    one = window_knockout(
        toy, prompts, keys="io", window=1, batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(i + 1, 12) for i in range(12)]
    lo, hi = one.interval
    want = bootstrap_interval(one.per_example)
    assert np.array_equal([lo, hi], want) and (lo <= one.values).all() and lo[2] < hi[2]
    rows = one.rows()
    assert [r["layer"] for r in rows] == [0, 1, 2, 3] and len(one.to_frame()) == 4
    assert rows[2] == {
        "queries": "last", "keys": "io", "window": 1, "layer": 2, "change": one.values[2],
        "ci_lo": lo[2], "ci_hi": hi[2], "n": 5,
    }  # fmt: skip
    (band, line) = one.plot().data
    assert line.name == "io → last" and np.array_equal(line.y, one.values)
    assert list(band.x) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert np.array_equal(band.y, [*hi, *lo[::-1]])
    single = window_knockout(toy, prompts[:1], keys="s1", window=2)
    figure = knockout_curves({"io": one, "one prompt": single})
    assert [t.name for t in figure.data if t.showlegend] == ["io", "one prompt"]
    assert len(figure.data) == 3 and "windows of 1, 2 layers" in figure.layout.title.text
    with pytest.raises(InputError, match="at least one result"):
        knockout_curves({})


def test_an_image_that_only_the_second_layer_reads_is_cut_off_there_alone() -> None:
    """Nothing at all changes where nobody looks, and everything where somebody does."""
    hf = copy.deepcopy(tiny("llama").hf)
    with torch.no_grad():  # only layer 1 moves anything between tokens
        for layer in (0, 2):
            hf.model.layers[layer].self_attn.v_proj.weight.zero_()
    model = interp.load(hf)
    prompts = [p.clean for p in random_pairs(3)]
    found = window_knockout(model, prompts, keys="early", window=1)
    assert (found.per_example[:, [0, 2]] == 0).all() and (found.per_example[:, 1] != 0).all()
    two = window_knockout(model, prompts, keys="early", window=2)
    assert np.array_equal(two.per_example[:, [1, 2]], found.per_example[:, [1, 1]])
    upper = window_knockout(model, prompts, keys="early", window=3, heads=["0.1", "2.0"])
    assert (upper.per_example == 0).all()


def test_head_sets(tmp_path: Path) -> None:
    movers = HeadSet("movers", ("2.0", "L2H1"), {"strong": ("2.0",)}, {"task": "ioi"})  # type: ignore[arg-type]
    assert movers.heads == (HeadId(2, 0), HeadId(2, 1)) and HeadId(2, 1) in movers
    back = HeadSet.load(movers.save(tmp_path / "movers.json"))
    assert back == movers and len(back) == 2
    other = HeadSet("other", ("2.1", "3.0", "0.0"))  # type: ignore[arg-type]
    found = movers.overlap(other, total=16)
    assert (found.shared, found.expected) == (1, 6 / 16)
    # Chance of at least one of two heads among three of sixteen.
    draws = list(itertools.combinations(range(16), 2))
    assert found.p == pytest.approx(np.mean([any(x < 3 for x in d) for d in draws]))
    movers.check(tiny("llama"))
    with pytest.raises(HeadIdError, match="outside"):
        HeadSet("far", ("9.0",)).check(tiny("llama"))  # type: ignore[arg-type]
    with pytest.raises(HeadIdError, match="has no L1H1"):
        HeadSet("bad", ("2.0",), {"x": ("1.1",)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="twice"):
        HeadSet("bad", ("2.0", "L2H0"))  # type: ignore[arg-type]
    (tmp_path / "no.json").write_text('{"heads": ["2.0"]}')
    with pytest.raises(RunError, match="version 1"):
        HeadSet.load(tmp_path / "no.json")
    (tmp_path / "half.json").write_text('{"headscope_heads": 1, "name": "x"}')
    with pytest.raises(RunError, match="no whole set"):
        HeadSet.load(tmp_path / "half.json")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_circuit_curves_equal_whole_runs(kind: str) -> None:
    model, pairs = tiny(kind), random_pairs(2)
    order = head_effects(model, pairs)
    curve = circuit_curve(model, pairs, order, sizes=(0, 3, 7, 12))
    assert curve.order == ranked(order)
    m = {
        k: np.mean([ablated(model, p, curve.order[k:], zero=False) for p in pairs])
        for k in curve.sizes
    }
    rest = {
        k: np.mean([ablated(model, p, curve.order[:k], zero=False) for p in pairs])
        for k in curve.sizes
    }
    f = np.array([(m[k] - m[0]) / (m[12] - m[0]) for k in curve.sizes])
    g = np.array([1 - (rest[k] - m[0]) / (m[12] - m[0]) for k in curve.sizes])
    np.testing.assert_allclose(curve.faithfulness, f, atol=2e-3)
    np.testing.assert_allclose(curve.completeness, g, atol=2e-3)
    assert f[0] == 0 and f[-1] == 1 and curve.faithfulness[-1] == pytest.approx(1, abs=1e-4)
    x = np.array([0, 3, 7, 12]) / 12
    assert curve.cpr == pytest.approx(np.trapezoid(f, x), abs=2e-3)
    assert curve.cmd == pytest.approx(np.trapezoid(np.abs(1 - f), x), abs=2e-3)
    curve.plot()


def test_planted_circuit(toy: Model) -> None:
    pairs = ioi_pairs(6)
    found = circuit_curve(toy, pairs, ["0.0", "1.0", "2.0", "2.1", "2.2"], sizes=(0, 3, 4, 5, 16))
    want = [0, 6 / 6.6, 9 / 6.6, 1, 1]
    np.testing.assert_allclose(found.faithfulness, want, atol=1e-3)
    np.testing.assert_allclose(found.completeness[[0, 3, 4]], [0, 1, 1], atol=1e-3)
    assert found.total == 16 and len(found.order) == 16
    best = top_heads(head_effects(toy, pairs), 5, name="circuit")
    assert set(map(str, best.heads)) == {"L0H0", "L1H0", "L2H0", "L2H1", "L2H2"}
    assert best.notes["method"] == "patch.noise"
    perfect = circuit_curve(toy, pairs, best)
    assert perfect.sizes == tuple(range(17)) and perfect.cmd < 0.25 < perfect.cpr
    assert circuit_sizes(144) == (0, 1, 3, 7, 14, 29, 72, 144)


def test_self_repair(toy: Model) -> None:
    one = self_repair(toy, ioi_pairs(6), ["2.0"])
    assert one.joint.mean() == pytest.approx(-1.2, abs=1e-3)
    assert one.lost.mean() == pytest.approx(-6.0, abs=1e-3)
    assert one.repaired == pytest.approx(4.8, abs=1e-3)
    head, gain = one.compensating(1)[0]
    assert (str(head), gain) == ("L3H0", pytest.approx(4.8, abs=1e-3))
    assert one.excess == pytest.approx(0, abs=1e-5)
    three = self_repair(toy, ioi_pairs(6), ["2.0", "2.1", "3.0"])
    assert three.excess == pytest.approx(-9.0 + 4.2, abs=1e-3)
    assert three.repaired == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(three.change, 0, atol=1e-3)
    silent = self_repair(toy, ioi_pairs(6), ["2.0"], reference="other")
    # Noise from other names leaves the backup silent: nothing is made good.
    assert silent.joint.mean() == pytest.approx(-6.0, abs=1e-3)
    np.testing.assert_allclose(silent.change, 0, atol=1e-3)


def test_change_of_direct_effects_in_a_model_with_norms() -> None:
    """Shares of later heads from whole runs by hand, each run with its own norm scale."""
    model = tiny("llama")
    (pair,) = pairs = random_pairs(1)
    found = self_repair(model, pairs, ["0.2"])
    norm, rows = model.hf.model.norm, model.hf.lm_head.weight
    assert pair.clean.answer is not None
    direction = rows[pair.clean.answer[0]] - rows[pair.clean.meta["wrong"]]
    shares = []
    for factor in (1.0, 0.0):
        ends: list[Tensor] = []
        zs: dict[str, Tensor] = {}

        def note(name: str, zs: dict[str, Tensor] = zs, factor: float = factor):  # type: ignore[no-untyped-def]
            def change(z: Tensor) -> Tensor:
                if name == "model.layers.0.self_attn":
                    z[:, 2] *= factor
                zs[name] = z
                return z

            return change

        handle = norm.register_forward_pre_hook(lambda m, a, ends=ends: ends.append(a[0][0, -1]))
        logits_of(model, pair.clean, {n: note(n) for n in model.structure.layers})
        handle.remove()
        scale = ends[0].pow(2).mean().add(1e-6).rsqrt()
        o = model.hf.model.layers[2].self_attn.o_proj.weight[:, 8:16]
        z = zs["model.layers.2.self_attn"][-1, 1]
        shares.append(float((((z @ o.T) * scale * norm.weight) @ direction).detach()))
    column = found.later.index(HeadId(2, 1))
    assert found.change[0, column] == pytest.approx(shares[1] - shares[0], abs=1e-4)
    assert abs(shares[1] - shares[0]) > 1e-3


def test_attention_is_forced(toy: Model) -> None:
    """Movers made to look at S answer with S: the logit difference turns around."""
    pairs = ioi_pairs(4)
    batch = toy.batch([p.clean for p in pairs], side="left")
    recipe = force_attention(["2.0", "2.1", "2.2"], keys="s1")
    with recipe.on(toy, spans=batch):
        logits = toy.forward(batch.inputs()).logits[:, -1]
    for row, pair in zip(logits, pairs, strict=True):
        assert difference(row, pair.clean) == pytest.approx(-6.6, abs=1e-3)


def test_bad_input(toy: Model) -> None:
    model, pairs = tiny("llama"), random_pairs(2)
    with pytest.raises(InputError, match="example or position"):
        head_importance(model, pairs, per="token")
    with pytest.raises(InputError, match="no gradient"):
        head_importance(model, pairs, metric="accuracy")
    with pytest.raises(InputError, match="at least one set"):
        joint_effects(model, pairs, [])
    with pytest.raises(HeadIdError, match="outside"):
        joint_effects(model, pairs, [["5.0"]])
    with pytest.raises(InputError, match="between 1 and the 2 heads"):
        greedy_prune(model, pairs, heads=["0.1", "0.2"], steps=3)
    with pytest.raises(SpanError, match="no span 'io'"):
        head_knockout(model, pairs, keys="io")
    with pytest.raises(InputError, match="must keep a key"):
        head_knockout(model, pairs, keys="all")
    prompts = [p.clean for p in pairs]
    with pytest.raises(InputError, match="must keep a key"):
        window_knockout(model, prompts, keys="all")
    with pytest.raises(InputError, match="predicted or answer"):
        window_knockout(model, prompts, target="best")
    with pytest.raises(InputError, match="window of at least 1"):
        window_knockout(model, prompts, window=0)
    with pytest.raises(InputError, match="sizes must rise"):
        circuit_curve(model, pairs, ["0.1"], sizes=(3, 2))
    with pytest.raises(InputError, match="sizes must rise"):
        circuit_curve(model, pairs, ["0.1"], sizes=(0, 13))
    same = [PromptPair(p.clean, p.clean) for p in pairs]
    with pytest.raises(InputError, match="must differ"):
        _ = circuit_curve(model, same, ["0.1"], sizes=(12,)).faithfulness
    with pytest.raises(InputError, match="size or strong"):
        ranked(head_effects(model, pairs), by="rank")
    with pytest.raises(InputError, match="between 1 and the 12"):
        top_heads(head_effects(model, pairs), 13)
    with pytest.raises(InputError, match="linear"):
        self_repair(model, pairs, ["0.1"], metric="prob")
    with pytest.raises(InputError, match="at least one head"):
        self_repair(model, pairs, [])
