"""`patch --positions`: cells are single patches of whole runs; what is kept is what is shown."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from app_kit import in_process, only_run
from patching_kit import difference, logits_of, random_pairs, seen_z, tiny
from test_app_counts import LOOKS

from app.positions import PositionSweep, read_positions
from app.positionsweep import sweep_positions
from app.positionview import OTHER, cells, strongest, view_of
from interp import load
from interp.errors import InputError, RunError
from interp.files import read_table, write_table
from interp.run import Run
from interp.tasks import make_task
from patching.pairs import Pairs

IOI = "zoo:planted-ioi"
ARGS = ("patch", "-m", IOI, "--positions", "--n", "4", "--batch-size", "3")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def one_at_a_time(model, pair, direction, layer, heads, position) -> float:
    """Effect of one patch, by a whole forward with a hook."""
    base, source = pair.clean, pair.corrupted
    if direction == "denoise":
        base, source = source, base
    value = seen_z(model, source)[layer.name]

    def put(z):
        z[position, heads] = value[position, heads]
        return z

    patched = logits_of(model, base, {layer.name: put})
    # Answers are those of the clean prompt in either direction.
    return difference(patched, pair.clean) - difference(logits_of(model, base), pair.clean)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_cells_equal_whole_runs(kind, direction) -> None:
    """Pairs of two lengths in one sweep, some of the heads."""
    model = tiny(kind)
    pairs = [*random_pairs(2), *random_pairs(2, length=7, first=2, seed=5)]
    pairs = [pairs[i] for i in (2, 0, 3, 1)]
    heads = ["0.1", "1.0", "1.3", "2.2"]
    found = sweep_positions(Pairs(model, pairs, batch_size=2), direction=direction, heads=heads)
    assert found.heads == ("L0H1", "L1H0", "L1H3", "L2H2") and found.layers == (0, 1, 2)
    assert found.by_head.shape == (4, 4, 10) and found.by_layer.shape == (4, 3, 10)
    assert not found.aligned and found.method == f"patch.{direction}"
    layers = {x.index: x for x in model.tower("text").layers}
    every = list(range(4))
    for i, pair in enumerate(pairs):
        n = len(pair.clean)
        assert np.isnan(found.by_head[i, :, n:]).all() and np.isnan(found.by_layer[i, :, n:]).all()
        for p in (0, 2, 4, n - 2, n - 1):
            want = [one_at_a_time(model, pair, direction, layers[int(h[0])], [int(h[2])], p)
                    for h in heads]  # fmt: skip
            np.testing.assert_allclose(found.by_head[i, :, p], want, atol=3e-4)
            whole = [one_at_a_time(model, pair, direction, layers[x], every, p) for x in range(3)]
            np.testing.assert_allclose(found.by_layer[i, :, p], whole, atol=3e-4)
        assert found.clean[i] == pytest.approx(
            difference(logits_of(model, pair.clean), pair.clean), abs=1e-4
        )
    assert np.nanmax(np.abs(found.by_head)) > 0.05 < np.nanmax(np.abs(found.by_layer))
    assert 0 < found.floor < 1e-3


@pytest.mark.parametrize(("corruption", "effects"), [("abc", "noise-abc"), ("flip", "noise-flip")])
def test_planted_effects_stand_at_their_positions(corruption, effects) -> None:
    """Position 6 is the second subject, 8 the end; nothing else has an effect."""
    from interp.zoo.planted_ioi import BACKUP, DUPLICATE, ROLES, planted_ioi

    truth = planted_ioi().truth.scores[effects]
    model = load(IOI)
    pairs = make_task("ioi", {"corruption": corruption}).pairs(model, 5, seed=3)
    found = sweep_positions(Pairs(model, pairs))
    want = np.zeros((16, 9))
    for head in ROLES:
        if head != BACKUP:
            want[4 * head.layer + head.head, 6 if head == DUPLICATE else 8] = truth[head]
    np.testing.assert_allclose(found.by_head, np.broadcast_to(want, (5, 16, 9)), atol=1e-3)
    view = view_of(found)
    assert [view.rows[r] + "@" + view.columns[c].name for r, c in np.argwhere(~view.noise())] == [
        "L0H0@6", "L1H0@8", "L2H0@8", "L2H1@8", "L2H2@8",
    ]  # fmt: skip
    total = sum(truth[h] for h in ROLES if h.layer == 2)
    assert found.by_layer[:, 2, 8] == pytest.approx(total, abs=1e-3)
    shares = view_of(found, recovered=True)
    gap = float((found.clean - found.corrupted).mean())
    np.testing.assert_allclose(shares.values, want / gap, atol=1e-3)
    assert view.columns[6].differs and not view.columns[8].differs
    assert view.columns[0].clean == "<bos>"


def made(seed: int = 0, *, aligned: bool = True) -> PositionSweep:
    """A sweep of random numbers; three examples of 5 positions, or of 5, 4 and 3."""
    rng = np.random.default_rng(seed)
    lengths = (5, 5, 5) if aligned else (5, 4, 3)
    by_head, by_layer = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 2, 5))
    for i, n in enumerate(lengths):
        by_head[i, :, n:] = by_layer[i, :, n:] = np.nan
    clean, corrupted = np.array([3.0, 5.0, 4.0]), np.array([1.0, 2.0, -3.0])
    texts = tuple(
        (tuple(f"c{i}{p}" if p == 1 else f"t{p}" for p in range(n)),
         tuple(f"k{i}{p}" if p == 1 else f"t{p}" for p in range(n)))
        for i, n in enumerate(lengths)
    )  # fmt: skip
    spans = ({"name": [[1, 2]], "end": [[2, 4]]}, {"name": [[1, 2]]}, {"name": [[0, 2]]})
    return PositionSweep(
        "patch.noise", "text", "logit-difference", ("L0H0", "L0H1", "L1H0", "L1H1"), (0, 1),
        by_head, by_layer, clean, corrupted, ("a", "b", "c"), texts, spans, aligned, 1e-6,
    )  # fmt: skip


def test_means_and_intervals_of_aligned_prompts() -> None:
    sweep = made()
    view = view_of(sweep, "layer")
    np.testing.assert_allclose(view.values, sweep.by_layer.mean(0))
    assert (view.low <= view.values).all() and (view.values <= view.high).all()
    assert view.rows == ("L0", "L1") and view.n.tolist() == [3] * 5
    assert [(c.clean, c.corrupted, c.differs) for c in view.columns][:2] == [
        ("t0", "t0", False), ("name", "name", True),
    ]  # fmt: skip
    sure = (np.sign(view.low) == np.sign(view.high)) & (np.abs(view.values) > 1e-6)
    np.testing.assert_array_equal(view.noise(), ~sure)
    np.testing.assert_array_equal(view.noise(99.0), np.ones((2, 5), bool))
    share = view_of(sweep, "layer", recovered=True)
    np.testing.assert_allclose(share.values, sweep.by_layer.mean(0) / (4 - 0))
    assert share.recovered and share.floor == pytest.approx(1e-6 / 4)
    flipped = view_of(replace(sweep, clean=sweep.corrupted, corrupted=sweep.clean), recovered=True)
    assert (flipped.low <= flipped.values).all() and (flipped.values <= flipped.high).all()


def test_one_example_has_its_own_positions_and_its_own_share() -> None:
    sweep = made(aligned=False)
    view = view_of(sweep, example=1, chosen=[3, 0])
    np.testing.assert_allclose(view.values, sweep.by_head[1, [3, 0], :4])
    assert view.rows == ("L1H1", "L0H0") and np.isnan(view.low).all()
    assert [c.clean for c in view.columns] == ["t0", "c11", "t2", "t3"]
    assert [c.corrupted for c in view.columns][1] == "k11" and view.columns[1].differs
    shares = view_of(sweep, example=1, recovered=True)
    np.testing.assert_allclose(shares.values, sweep.by_head[1, :, :4] / (5 - 2))


def test_means_over_spans_where_prompts_do_not_align() -> None:
    sweep = made(aligned=False)
    assert sweep.modes() == ("span",) and made().modes() == ("position", "span")
    view = view_of(sweep)
    assert [c.name for c in view.columns] == ["name", "end", OTHER]
    x = sweep.by_head
    name = np.stack([x[0, :, 1], x[1, :, 1], x[2, :, :2].mean(-1)])
    rest = np.stack([x[0][:, [0, 4]].mean(-1), x[1][:, [0, 2, 3]].mean(-1), x[2, :, 2]])
    want = np.stack([name.mean(0), x[0, :, 2:4].mean(-1), rest.mean(0)], -1)
    np.testing.assert_allclose(view.values, want)
    assert view.n.tolist() == [3, 1, 3] and np.isnan(view.low[:, 1]).all()
    assert [c.differs for c in view.columns] == [True, False, False]
    same = tuple((a, a) for a, _ in sweep.texts)
    first = replace(sweep, texts=(sweep.texts[0], *same[1:]))
    assert [c.differs for c in view_of(first).columns] == [True, False, False]


def test_what_examples_do_not_share_is_refused() -> None:
    sweep = made(aligned=False)
    bare = replace(sweep, spans=({}, {}, {}))
    for call, part in (
        (lambda: view_of(sweep, by="position"), "share no positions"),
        (lambda: view_of(bare), "share no positions"),
        (lambda: view_of(bare, by="span"), "name no spans"),
        (lambda: view_of(sweep, "token"), "head or layer"),
        (lambda: view_of(sweep, by="token"), "position or span"),
        (lambda: view_of(sweep, example=3), "got example 3"),
        (lambda: view_of(replace(sweep, corrupted=sweep.clean), recovered=True), "must differ"),
    ):
        with pytest.raises(InputError, match=part):
            call()
    assert all(
        row["recovered"] is None for row in cells(replace(sweep, corrupted=sweep.clean), "head")
    )


def test_the_strongest_rows_keep_their_order() -> None:
    sweep = made(aligned=False)
    sizes = np.nanmax(np.abs(np.nanmean(sweep.by_head, 0)), -1)
    assert strongest(sweep, "head", 2) == sorted(np.argsort(-sizes)[:2].tolist())
    assert strongest(sweep, "layer", 9) == [0, 1]


def test_the_command_keeps_and_shows_what_was_found(run) -> None:
    done = run(*ARGS)
    assert done.code == 0, done.err
    pairs = make_task("ioi").pairs(load(IOI), 4, seed=0)
    sweep = sweep_positions(Pairs(load(IOI), pairs, batch_size=3))
    want = {(r["row"], r["position"]): r for rows in ("head", "layer") for r in cells(sweep, rows)}
    assert len(done.rows) == len(want) == 20 * 9
    for row in done.rows:
        mine = want[row["row"], row["position"]]
        assert float(row["effect"]) == pytest.approx(mine["effect"], abs=1e-5)
        assert row["clean"] == mine["clean"] and row["n"] == "4"
    kept = Run.load(only_run())
    assert list(kept.scores) == ["patch.noise"] and kept.info["view"] == "positions"
    found = read_positions(kept)
    np.testing.assert_allclose(found.by_head, sweep.by_head, atol=1e-5)
    assert found.texts == sweep.texts and found.examples == sweep.examples and found.aligned
    again = run(*ARGS)
    assert again.out == done.out and "nothing was computed" in again.err
    assert run("show", str(only_run())).out == done.out
    document = json.loads(run(*ARGS, "--format", "json", "--top", "2").out)
    assert document["schema"] == "headscope.patch.positions" and len(document["rows"]) == 4
    assert document["floor"] == found.floor
    (only_run() / "extra" / "positions.safetensors").unlink()
    assert run("show", str(only_run())).code != 0
    assert run(*ARGS).out == done.out and read_positions(Run.load(only_run())) is not None
    shutil.rmtree("runs")
    assert run(*ARGS, "--no-save").out == done.out and not Path("runs").exists()


def test_pairs_of_several_lengths_are_shown_by_span(run) -> None:
    lines = []
    for clean, other in (((0, 8, 3, 9, 4, 10, 3, 11, 1), (0, 8, 5, 9, 6, 10, 7, 11, 1)),
                         ((0, 8, 3, 9, 4, 10, 3, 1), (0, 8, 5, 9, 6, 10, 7, 1))):  # fmt: skip
        lines.append({"clean": {"tokens": clean, "spans": {"s2": [[6, 7]]}},
                      "corrupted": {"tokens": other}, "answer": [4], "wrong": [3]})  # fmt: skip
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("patch", "-m", IOI, "--positions", "-p", "p.jsonl", "-H", "L0H0,L2H1")
    assert done.code == 0, done.err
    found = {(r["row"], r["position"]): float(r["effect"]) for r in done.rows}
    assert found["L0H0", "s2"] == pytest.approx(-8.8, abs=1e-3)
    assert {row for row, _ in found} == {"L0H0", "L2H1", "L0", "L2"}
    assert "means are taken over named spans" in done.err


def test_a_dry_run_counts_at_most_what_is_run(run, monkeypatch) -> None:
    from app.loading import Source

    dry = run(*ARGS, "--dry-run")
    assert dry.code == 0 and not Path("runs").exists()
    values = {r["quantity"]: float(r["value"]) for r in dry.rows}
    assert values["runs of a prompt"] == 4 * (6 + 16 + (16 + 8) * 9)
    assert values["cells of a prompt"] == 20 * 9 and values["prompts"] == 8
    seen: list[tuple[int, ...]] = []
    real = Source.load

    def loaded(self: Source, **options: bool):
        model = real(self, **options)

        def note(module, args, kwargs) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if tuple(ids.shape) not in LOOKS:
                seen.append(tuple(ids.shape))

        model.hf.register_forward_pre_hook(note, with_kwargs=True)
        return model

    monkeypatch.setattr(Source, "load", loaded)
    assert run(*ARGS, "--no-save").code == 0
    assert 0 < sum(a * b for a, b in seen) <= values["tokens through the model"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--window", "1"), "exclude each other"),
        (("--site", "k"), "--positions patches z"),
        (("-H", "L9H0"), "L9H0"),
    ],
)
def test_what_does_not_go_together_is_refused(more, text, run) -> None:
    done = run(*ARGS, *more)
    assert done.code in (2, 65) and done.out == "" and text in done.err
    assert "Traceback" not in done.err and not Path("runs").exists()


def test_a_damaged_sweep_says_so(run) -> None:
    assert run(*ARGS, "--quiet").code == 0
    path = only_run() / "extra" / "positions.safetensors"
    arrays, header = read_table(path)
    meta = header["meta"]
    for a, m in (
        (arrays, {k: v for k, v in meta.items() if k != "texts"}),
        (arrays, {**meta, "heads": meta["heads"][1:]}),
        (arrays, {**meta, "spans": meta["spans"][1:]}),
        ({**arrays, "by_layer": arrays["by_layer"][:, :, :3]}, meta),
        ({**arrays, "clean": arrays["clean"][1:]}, meta),
    ):
        write_table(path, a, {"extra": "positions", "meta": m})
        with pytest.raises(RunError, match="damaged"):
            read_positions(Run.load(only_run()))
