"""Recipes as values: validation, algebra, controls, words, files; ops on rows done by hand."""

import json
from typing import Any

import pytest
import torch
from reference import handle
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.errors import HeadIdError, InputError, ModelError, RunError, UnknownNameError
from interp.headid import HeadId
from interp.recipe import OPS, Edit, Gate, Positions, Recipe, Schedule, Where, span
from interp.recipe.ops import SITES, AttentionOp, Rows, VectorOp
from interp.recipe.place import Tracker


def at(*heads: str, **kw: Any) -> Where:
    return Where(heads=heads, **kw)


def full() -> Recipe:
    """A recipe with one of everything that is saved."""
    twin = Recipe(Edit("add", at("0.1"), 2.0, tensors={"vector": torch.full((1, 4), 0.5)}))
    return Recipe(
        [
            Edit("add", at("0.1", "1.2"), torch.tensor([1.0, 2.0]),
                 tensors={"vector": torch.arange(8.0).view(2, 4)}),
            Edit("knockout", at("vision.1.0", keys=Positions(prompt=(1, -1), spans=("img",),
                 exclude=Positions(window=(0, 2)))), schedule=Schedule("first", 3)),
            Edit("move", at("1.1", keys=span("sink"), queries=Positions(generated=(0, 5))),
                 params={"to": span("img"), "share": 0.5}),
            Edit("scale", Where(layers=(2,)), 1.5, site="resid",
                 gate=Gate(torch.arange(4.0), 1, 0.25, "below", "step")),
            Edit("contrast", params={"beta": 0.0}, twin=twin),
        ],
        notes={"name": "all", "score": 1.5},
    )  # fmt: skip


# Validation ---------------------------------------------------------------------------------

V = {"vector": torch.zeros(1, 4)}
MISTAKES: list[tuple[Any, type[Exception], str]] = [
    (lambda: Edit("zer"), UnknownNameError, "there is no op named 'zer'"),
    (lambda: Edit("zero", site="zz"), UnknownNameError, "there is no site named 'zz'"),
    (lambda: Edit("zero", site="pattern"), InputError, "op 'zero' works at z, q, k"),
    (lambda: Edit("bias", at("0.1"), site="z"), InputError, "works at scores; got site 'z'"),
    (lambda: Edit("move", at("0.1", keys=span("a")), params={"too": 1}), UnknownNameError,
     "no parameter of op 'move' named 'too'"),
    (lambda: Edit("add", at("0.1"), tensors={**V, "vec": V["vector"]}), UnknownNameError,
     "no tensor of op 'add' named 'vec'"),
    (lambda: Edit("add", at("0.1")), InputError, "op 'add' needs tensor 'vector'"),
    (lambda: Edit("affine", at("0.1")), InputError, "needs tensor 'gain' or 'shift'"),
    (lambda: Edit("add", at("0.1", "0.2"), tensors=V), InputError, r"2 selected, got \(1, 4\)"),
    (lambda: Edit("add", at("0.1"), tensors={"vector": torch.zeros(4)}), InputError,
     r"is \[head or layer, d\]; got \(4,\)"),
    (lambda: Edit("project", at("0.1"), tensors={"basis": torch.zeros(1, 4)}), InputError,
     r"is \[head or layer, d k\]; got"),
    (lambda: Edit("set", at("0.1"), tensors={"value": torch.zeros(1, 3, 4)}), InputError,
     "d, or batch pos d"),
    (lambda: Edit("add", tensors=V), InputError, "one tensor per head, so these must be named"),
    (lambda: Edit("zero", at("0.1"), site="resid"), InputError, "site 'resid' has no heads"),
    (lambda: Edit("zero", Where(layers=(1,))), InputError, "is edited by head; got layers"),
    (lambda: Edit("zero", at("0.1"), float("nan")), InputError, "must be finite; got nan"),
    (lambda: Edit("zero", at("0.1"), torch.tensor([float("inf")])), InputError, "must be finite"),
    (lambda: Edit("zero", at("0.1"), "1.x"), InputError, "a number or a tensor; got '1.x'"),
    (lambda: Edit("zero", at("0.1"), torch.ones(2)), InputError, r"got shape \(2,\)"),
    (lambda: Edit("zero", at("0.1"), torch.ones(1, 2, 3)), InputError, "got shape"),
    (lambda: Edit("zero", strength=torch.ones(2)), InputError, "one per named head"),
    (lambda: Edit("temperature", at("0.1"), -0.5), InputError, "must be above 0; got -0.5"),
    (lambda: Edit("temperature", at("0.1"), torch.tensor(0.0)), InputError, "above 0; got 0"),
    (lambda: Recipe(Edit("temperature", at("0.1"), 0.5)) * 5, InputError, "got -1.5"),
    (lambda: Edit("knockout", at("0.1", keys=span("a")), 0.5), InputError, "0 or 1; got 0.5"),
    (lambda: Edit("knockout", at("0.1", keys=span("a")), schedule=Schedule("decay")), InputError,
     "can only be 'first'; got 'decay'"),
    (lambda: Edit("reweight", at("0.1", keys=span("a")), -1), InputError, "0 or more; got -1"),
    (lambda: Edit("split", at("0.1", keys=span("a")), 1.5), InputError, r"within \[0, 1\]"),
    (lambda: Edit("bias", at("0.1")), InputError, "when it is about every key"),
    (lambda: Edit("knockout", at("0.1")), InputError, "when it is about every key"),
    (lambda: Edit("uniform", at("0.1", keys=span("a"))), InputError, "whole rows; got keys span a"),
    (lambda: Edit("zero", at("0.1", keys=span("a"))), InputError, "site 'z' are queries; got keys"),
    (lambda: Edit("zero", at("0.1", queries=span("a")), site="v"), InputError,
     "site 'v' are keys; got queries span a"),
    (lambda: Edit("contrast"), InputError, "and only contrast, takes twin="),
    (lambda: Edit("zero", at("0.1"), twin=full()), InputError, "and only contrast, takes twin="),
    (lambda: Edit("contrast", twin=full()), InputError, "may not edit its logits"),
    (lambda: Recipe([]), InputError, "at least one edit; got none"),
    (lambda: Where(heads=()), InputError, "at least one head; got none"),
    (lambda: Where(heads="x.y"), HeadIdError, "a head is written"),
    (lambda: Where(heads=("0.1", (0, 1))), InputError, "L0H1 comes twice"),
    (lambda: Where(layers=()), InputError, "at least one layer; got none"),
    (lambda: Where(layers=(1, 1)), InputError, "each layer may be named once"),
    (lambda: Positions(), InputError, "must select something"),
    (lambda: Positions(prompt=()), InputError, "must select something"),
    (lambda: Positions(prompt="some"), InputError, "prompt must be 'all' or numbers"),
    (lambda: Positions(generated=(3, 3)), InputError, "window start < stop"),
    (lambda: Positions(window=(-1, 3)), InputError, "window start < stop"),
    (lambda: Positions(tokens=("a",)), InputError, "tokens must be numbers"),  # type: ignore[arg-type]
    (lambda: Gate(torch.zeros(2, 2), 0, 0.0), InputError, "one vector"),
    (lambda: Gate(torch.zeros(2), 0, 2.0), InputError, r"within \[-1, 1\]"),
    (lambda: Gate(torch.zeros(2), 0, 0.0, "left"), InputError, "above or below"),
    (lambda: Gate(torch.zeros(2), 0, 0.0, evaluate="x"), InputError, "prompt or step"),
    (lambda: Schedule("up"), InputError, "linear, decay or first"),
    (lambda: Schedule("decay", rate=1.0), InputError, "rate within"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(MISTAKES)))
def test_mistakes_are_named_in_one_line(case: int) -> None:
    make, error, text = MISTAKES[case]
    with pytest.raises(error, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_read() -> None:
    assert at("L1H2").heads == Where(heads=[(1, 2)]).heads == (HeadId(1, 2),)
    assert Where(heads="vision.1.2").heads == (HeadId(1, 2, "vision"),)
    assert Where(layers=3).layers == (3,)
    assert Positions(prompt=-1).prompt == (-1,)
    assert Positions(spans="img") == span("img")
    assert Positions(tokens=7) == Positions(tokens=[7])
    assert Edit("zero", strength=1).strength == 1.0
    assert Edit("scale").site == "z"
    assert Edit("bias", at("0.1", keys=span("a"))).site == "scores"


def test_every_op_describes_itself() -> None:
    assert len(OPS) == 16
    for name in OPS:
        op = OPS[name]
        assert op.name == name and op.summary and op.formula
        assert set(op.sites) <= set(SITES)
        assert isinstance(op, VectorOp | AttentionOp)
        assert op.optional <= set(op.tensors)


# Algebra ------------------------------------------------------------------------------------


def test_sums_keep_order_and_notes() -> None:
    a = Recipe(Edit("zero", at("0.1")), notes={"name": "a", "x": 1})
    b = Recipe(Edit("scale", at("1.1"), 2), fingerprint="f", notes={"name": "b"})
    both = a + b
    assert both.edits == a.edits + b.edits
    assert both.fingerprint == "f" and both.notes == {"name": "b", "x": 1}
    assert both.heads == (HeadId(0, 1), HeadId(1, 1))
    with pytest.raises(ModelError, match="different models"):
        _ = both + Recipe(a.edits, fingerprint="g")


def test_factors_move_strengths_from_neutral() -> None:
    recipe = Recipe([
        Edit("scale", at("0.1"), 3.0), Edit("zero", at("0.1"), 1.0),
        Edit("temperature", at("0.1"), 0.5),
        Edit("scale", at("0.1", "0.2"), torch.tensor([0.0, 5.0])),
    ])  # fmt: skip
    half = 0.5 * recipe
    assert [e.strength for e in half.edits[:3]] == [2.0, 0.5, 0.75]
    assert half.edits[3].strength.tolist() == [0.5, 3.0]  # type: ignore[union-attr]
    assert (recipe * 1).hash == recipe.hash
    assert all(e.idle for e in (recipe * 0).edits[:3])
    assert (0 * recipe).edits[3].strength.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    grown = recipe * torch.tensor(1.5, requires_grad=True)
    assert grown.edits[0].strength.requires_grad  # type: ignore[union-attr]


def test_without_takes_heads_and_what_belongs_to_them() -> None:
    recipe = Recipe([
        Edit("add", at("0.1", "0.2", "1.0"), torch.tensor([1.0, 2.0, 3.0]),
             tensors={"vector": torch.arange(12.0).view(3, 4)}),
        Edit("zero", at("0.2")),
        Edit("zero"),
    ])  # fmt: skip
    less = recipe.without("0.2")
    assert [e.where.heads for e in less.edits] == [(HeadId(0, 1), HeadId(1, 0)), None]
    assert less.edits[0].strength.tolist() == [1.0, 3.0]  # type: ignore[union-attr]
    assert less.edits[0].tensors["vector"][:, 0].tolist() == [0.0, 8.0]
    assert recipe.without(["0.2", HeadId(1, 0)]).heads == (HeadId(0, 1),)
    with pytest.raises(InputError, match="L3H3 is not in this recipe"):
        recipe.without("3.3")
    with pytest.raises(InputError, match="nothing would be left"):
        Recipe(Edit("zero", at("0.2"))).without("0.2")


def test_controls_are_matched_by_layer() -> None:
    model = handle("llama")
    recipe = Recipe([
        Edit("add", at("0.1", "1.3"), tensors={"vector": torch.arange(32.0).view(2, 16)}),
        Edit("zero", at("1.3", "1.2")), Edit("zero", at("1.0"), site="v"),
    ])  # fmt: skip
    draws = recipe.control(model, n=20, seed=1)
    assert len(draws) == 20
    assert [d.heads for d in draws] == [d.heads for d in recipe.control(model, n=20, seed=1)]
    assert len({d.heads for d in draws}) > 3
    for d in draws:
        first, second, third = (e.where.heads or () for e in d.edits)
        assert [h.layer for h in first] == [0, 1] and [h.layer for h in second] == [1, 1]
        assert first[1] == second[0]  # one head moves to one head
        assert not {*first, *second} & {HeadId(0, 1), HeadId(1, 3), HeadId(1, 2)}
        assert third == (HeadId(1, 1),)  # the other key-value head
        assert torch.equal(d.edits[0].tensors["vector"], recipe.edits[0].tensors["vector"])
    kept = recipe.control(model, n=20, exclude=[HeadId(0, 0), HeadId(0, 2)])
    assert all(d.heads[0] == HeadId(0, 3) for d in kept)
    with pytest.raises(InputError, match="3 other heads of layer 0; of its 4 heads 1 are left"):
        Recipe(Edit("zero", at("0.0", "0.1", "0.2"))).control(model)
    with pytest.raises(InputError, match="this edit names none"):
        Recipe(Edit("zero")).control(model)
    with pytest.raises(HeadIdError):
        Recipe(Edit("zero", at("9.0"))).control(model)


# Words --------------------------------------------------------------------------------------


def test_it_says_what_it_does() -> None:
    lines = str(full()).splitlines()
    assert lines[0] == "0  add (s = (2,) values) z of L0H1, L1H2"
    assert lines[1] == (
        "1  knockout (s = 1) scores of vision.L1H0 on keys prompt[1, -1] + span img without "
        "(positions[0:2]) for the first 3 steps"
    )
    assert lines[2].endswith("pattern of L1H1 at generated[0:5] on keys span sink")
    assert lines[3].endswith("resid of layers 2 if cosine at layer 1 is below 0.25")
    assert "and 3 more" in str(Recipe(Edit("zero", at(*(f"0.{i}" for i in range(8))))))
    grad = Recipe(Edit("scale", at("0.1"), torch.tensor(2.0, requires_grad=True)))
    assert str(grad) == "0  scale (s = 2) z of L0H1"


def test_explain_names_the_path() -> None:
    model = handle("llama")
    text = Recipe([
        Edit("zero", at("0.1")),
        Edit("bias", at("0.1", "1.2", keys=span("img")), 2.0),
        Edit("add", at("0.1"), site="k", tensors={"vector": torch.zeros(1, 16)}),
        Edit("contrast", twin=Recipe(Edit("zero", at("0.1")))),
    ]).explain(model)  # fmt: skip
    for part in ("input of the output projection", "2 heads in 2 layers computed again",
                 "cancels in the softmax", "runs a second time", "scores + s on keys"):  # fmt: skip
        assert part in text
    with pytest.raises(HeadIdError, match="L5H0 is outside"):
        Recipe(Edit("zero", at("5.0"))).explain(model)


# Files --------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    recipe = full()
    path = recipe.save(tmp_path / "deep" / "r")
    assert path.name == "r.safetensors"
    again = Recipe.load(path)
    assert again.hash == recipe.hash and str(again) == str(recipe)
    assert again.notes == recipe.notes
    assert [e.where for e in again.edits] == [e.where for e in recipe.edits]
    assert again.edits[2].params == recipe.edits[2].params
    assert again.edits[1].schedule == recipe.edits[1].schedule
    gate, other = again.edits[3].gate, recipe.edits[3].gate
    assert gate is not None and other is not None
    assert gate.to_json() == other.to_json() and torch.equal(gate.axis, other.axis)
    twin = again.edits[4].twin
    assert twin is not None and str(twin) == "0  add (s = 2) z of L0H1"
    assert torch.equal(twin.edits[0].tensors["vector"], torch.full((1, 4), 0.5))
    assert sorted(load_file(path)) == sorted(recipe.parameters())


def test_the_hash_is_that_of_the_content() -> None:
    recipe = full()
    assert recipe.hash == full().hash
    assert Recipe(Edit("zero", at("0.1"), 1)).hash == Recipe(Edit("zero", at("0.1"), 1.0)).hash
    changed = [
        recipe + Recipe(Edit("zero")), recipe * 0, Recipe(recipe.edits[::-1]),
        Recipe(recipe.edits, fingerprint="f", notes=recipe.notes),
        Recipe(recipe.edits, notes={"name": "other"}),
    ]  # fmt: skip
    assert len({recipe.hash, *(r.hash for r in changed)}) == 6
    vectors = [torch.zeros(1, 4), torch.tensor([[0.0, 0, 0, 1]])]
    edits = [Recipe(Edit("add", at("0.1"), tensors={"vector": v})).hash for v in vectors]
    assert edits[0] != edits[1]


def rewritten(path: Any, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        data = json.loads(f.metadata()["headscope.recipe"])
    change(data)
    save_file(load_file(path), path, metadata={"headscope.recipe": json.dumps(data)})


FILES: list[tuple[Any, type[Exception], str]] = [
    (lambda d: d.update(version=99), RunError, "is of version 99; this headscope reads up to 1"),
    (lambda d: d["edits"][0].update(op="zer"), InputError, "there is no op named 'zer'"),
    (lambda d: d["edits"][0].update(extra=1), InputError, "no field of an edit named 'extra'"),
    (lambda d: d["edits"][0]["where"].update(head=1), InputError, "no field of where named 'head'"),
    (lambda d: d["edits"][1]["where"]["keys"].update(spam=1), InputError, "field of positions"),
    (lambda d: d["edits"][1]["schedule"].update(spam=1), RunError, "is damaged"),
    (lambda d: d["edits"][3]["gate"].pop("layer"), RunError, "is damaged"),
    (lambda d: d.pop("edits"), RunError, "is damaged"),
    (lambda d: d.update(edits=[]), InputError, "at least one edit"),
]


@pytest.mark.parametrize("case", range(len(FILES)))
def test_files_that_cannot_be_used_say_why(tmp_path: Any, case: int) -> None:
    change, error, text = FILES[case]
    path = full().save(tmp_path / "r")
    rewritten(path, change)
    with pytest.raises(error, match=text) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Any) -> None:
    with pytest.raises(RunError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not that")
    with pytest.raises(RunError, match="is damaged and cannot be read"):
        Recipe.load(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(RunError, match="is not a recipe"):
        Recipe.load(tmp_path / "y.safetensors")
    with pytest.raises((InputError, RunError), match="notes"):
        Recipe(Edit("zero"), notes={"f": object()}).save(tmp_path / "z")


def test_parameters_are_what_gradients_flow_to() -> None:
    names = set(full().parameters())
    assert names == {"0.vector", "0.strength", "3.gate.axis", "4.twin.0.vector"}
    vector = torch.zeros(1, 4, requires_grad=True)
    recipe = Recipe(Edit("add", at("0.1"), tensors={"vector": vector}))
    assert recipe.parameters()["0.vector"] is vector


# Rows by hand -------------------------------------------------------------------------------


def row(op: str, a: list[float], s: float, keys: list[int], *, visible: int | None = None,
        p: dict[str, Any] | None = None, **others: list[int]) -> list[float]:  # fmt: skip
    def marks(places: list[int]) -> Tensor:
        return torch.tensor([i in places for i in range(len(a))])[None, None, None]

    seen = torch.arange(len(a)) < (len(a) if visible is None else visible)
    rows = Rows(marks(keys), seen[None, None, None], {n: marks(x) for n, x in others.items()})
    operation = OPS[op]
    assert isinstance(operation, AttentionOp)
    params = {**operation.params, **(p or {})}
    x = torch.tensor(a, dtype=torch.float64)[None, None, None]
    return operation.apply(x, s, rows, params)[0, 0, 0].tolist()  # type: ignore[no-any-return]


VAR = [0.5, 0.3, 0.2]


def test_move_is_the_redistribution_of_the_paper() -> None:
    # Sinks 0 (text) and 1 (visual) keep 0.6; the other visual token gets what is freed.
    assert row("move", VAR, 0.6, [0, 1]) == pytest.approx([0.30, 0.18, 0.52])
    assert row("move", VAR, 0.6, [0, 1], to=[1, 2]) == pytest.approx([0.30, 0.18, 0.52])
    # To both others in proportion 3 : 2.
    assert row("move", VAR, 0.4, [0]) == pytest.approx([0.2, 0.48, 0.32])
    assert row("move", VAR, 0.4, [0], to=[2]) == pytest.approx([0.2, 0.3, 0.5])
    assert row("move", [0.5, 0.5, 0.0], 0.4, [0, 1]) == [0.5, 0.5, 0.0]  # nobody to receive
    assert row("move", [0.7, 0.3, 1e-31], 0.4, [0, 1]) == pytest.approx([0.28, 0.12, 0.6])
    # Image-centric rows only: sinks are 0.3 of the 0.5 on the image.
    for share, least, moved in ((0.6, 0.2, True), (0.59, 0.2, False), (0.6, 0.51, False)):
        got = row("move", VAR, 0.6, [1], span=[1, 2], p={"share": share, "least": least})
        assert (got != pytest.approx(VAR)) == moved


def test_the_other_rows() -> None:
    assert row("reweight", VAR, 4.0, [2]) == pytest.approx([0.5 / 1.6, 0.3 / 1.6, 0.8 / 1.6])
    assert row("reweight", [0.25, 0.25], 0.0, [0]) == pytest.approx([0, 0.5])  # a sink took half
    assert row("drop", VAR, 1.0, [1]) == pytest.approx([0.5, 0.0, 0.2])
    assert row("drop", VAR, 0.5, [1]) == pytest.approx([0.5, 0.15, 0.2])
    # π = 0.36 on key 0, τ = 1/2: 0.6 there, and 0.4 shared 1 : 3 elsewhere.
    assert row("split", [0.36, 0.16, 0.48], 0.5, [0]) == pytest.approx([0.6, 0.1, 0.3])
    assert row("split", VAR, 0.0, [1, 2]) == pytest.approx([0, 0.6, 0.4])  # all mass moves
    assert row("split", [1.0, 0.0], 0.5, [0]) == [1.0, 0.0]
    assert row("split", [1.0, 0.0], 0.5, [1]) == [1.0, 0.0]
    assert row("override", VAR, 0.5, [1, 2]) == pytest.approx([0.25, 0.40, 0.35])
    assert row("override", [0.6, 0.4, 0], 1.0, [1, 2], visible=2) == pytest.approx([0, 1, 0])
    assert row("override", [0.6, 0.4, 0], 1.0, [2], visible=2) == [0.6, 0.4, 0.0]
    assert row("override", [0.4, 0.2], 1.0, [0, 1]) == pytest.approx([0.3, 0.3])
    assert row("bias", [1.0, 2.0], 0.5, [1]) == [1.0, 2.5]
    assert row("temperature", [1.0, 2.0], 0.5, []) == [2.0, 4.0]
    assert row("uniform", [1.0, 2.0], 1.0, []) == [0.0, 0.0]
    hidden = row("knockout", [1.0, 2.0], 1.0, [1])
    assert hidden[0] == 1.0 and torch.softmax(torch.tensor(hidden), 0).tolist() == [1.0, 0.0]
    assert row("knockout", [1.0, 2.0], 0.0, [1]) == [1.0, 2.0]


def test_a_set_at_full_strength_is_the_value_itself() -> None:
    op = OPS["set"]
    assert isinstance(op, VectorOp)
    x, value = torch.randn(2, 3, 1, 4) * 1e9, torch.randn(1, 4)
    assert torch.equal(op.apply(x, 1.0, {"value": value}, {}), value.expand_as(x))
    many = torch.randn(1, 2, 3, 4)
    assert torch.equal(op.apply(x, 1.0, {"value": many}, {})[:, :, 0], many[0])


# Positions ----------------------------------------------------------------------------------


def chosen(tracker: Tracker, positions: Positions, *, keys: int | None = None) -> list[list[int]]:
    frame = tracker.frame
    assert frame is not None
    n = frame.fed if keys is None else keys
    start = frame.first_of(n, keys=keys is not None)
    mask = frame.select(positions, 0, start, n)
    return [(start + row.nonzero()[:, 0]).tolist() for row in mask]


class _Cache:
    def __init__(self, n: int) -> None:
        self.n = n

    def get_seq_length(self) -> int:
        return self.n


def test_positions_are_absolute_whatever_the_chunk() -> None:
    tracker = Tracker(encoder_decoder=False)
    tracker.bind([{"img": (1, 3)}])
    ids = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert tracker.before({"input_ids": ids, "attention_mask": mask}) is None
    assert chosen(tracker, Positions(prompt=(0, -1))) == [[2, 4], [0, 4]]
    assert chosen(tracker, Positions(prompt=(3,))) == [[], [3]]
    assert chosen(tracker, Positions(window=(1, 9))) == [[3, 4], [1, 2, 3, 4]]
    assert chosen(tracker, span("img")) == [[3, 4], [1, 2]]
    assert chosen(tracker, Positions(prompt="all", exclude=span("img"))) == [[2], [0, 3, 4]]
    assert chosen(tracker, Positions(tokens=(12, 21))) == [[3], [0]]
    assert chosen(tracker, Positions(generated="all")) == [[], []]
    step = {"input_ids": torch.tensor([[31], [32]]), "past_key_values": _Cache(5)}
    assert tracker.before(step) is not None
    assert tracker.frame is not None and tracker.frame.step == 1
    assert chosen(tracker, Positions(prompt="all")) == [[], []]
    assert chosen(tracker, Positions(generated=(0, 1))) == [[5], [5]]
    assert chosen(tracker, Positions(window=(3, 4))) == [[5], []]
    assert chosen(tracker, Positions(tokens=(32, 13)), keys=6) == [[4], [5]]
    assert chosen(tracker, span("img"), keys=6) == [[3, 4], [1, 2]]
    assert chosen(tracker, span("img"), keys=4) == [[3, 4], [2]]  # a sliding cache
    assert chosen(tracker, Positions(prompt=(-1,)), keys=9) == [[4], [4]]  # a static one
    # Without a cache: one token longer, and rows that beams exchanged.
    tracker.before({"input_ids": ids, "attention_mask": mask, "use_cache": False})
    longer = torch.cat([ids.flip(0), torch.tensor([[7], [8]])], 1)
    order = tracker.before({"input_ids": longer})
    assert order is not None and order.tolist() == [1, 0]
    assert chosen(tracker, Positions(generated="all")) == [[5], [5]]
    # Anything else is a new prompt.
    assert tracker.before({"input_ids": longer[:, :4]}) is None
    assert chosen(tracker, Positions(prompt=(-1,))) == [[3], [3]]


def test_a_produced_token_follows_the_last_real_one() -> None:
    tracker = Tracker(encoder_decoder=False)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    tracker.before({"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": mask})
    assert chosen(tracker, Positions(prompt=(-1,))) == [[1], [3]]
    tracker.before({"input_ids": torch.zeros(2, 1, dtype=torch.long), "past_key_values": _Cache(4)})
    assert chosen(tracker, Positions(window=(2, 3))) == [[4], []]
    assert chosen(tracker, Positions(window=(4, 5))) == [[], [4]]
    assert chosen(tracker, Positions(generated=(0, 1))) == [[4], [4]]


def test_the_step_of_a_schedule() -> None:
    assert [Schedule("linear", 4).factor(s) for s in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert [Schedule("first", 2).factor(s) for s in (0, 1, 2)] == [1, 1, 0]
    assert Schedule("decay", rate=0.5).factor(3) == 0.125
