"""`patch --window`: what the command writes is what the library finds, from pairs and without."""

import json
from pathlib import Path

import numpy as np
import pytest
from app_kit import in_process, only_run
from test_app_counts import LOOKS

from interp.loading import load
from interp.prompts import Prompt
from interp.tasks import make_task
from patching.windows import window_knockout

IOI, NEEDLE = "zoo:planted-ioi", "zoo:needle"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def numbers(rows) -> np.ndarray:
    return np.array([[float(r[c]) for c in ("change", "ci_lo", "ci_hi")] for r in rows])


@pytest.mark.parametrize("more", [(), ("-H", "L2H0,L3H1")])
def test_layers_of_pairs_are_those_of_the_clean_prompts(more, run) -> None:
    args = ("patch", "-m", IOI, "--window", "2", "--keys", "io", "--keys", "~io", "--n", "5", *more)
    done = run(*args)
    assert done.code == 0, done.err
    prompts = [p.clean for p in make_task("ioi").pairs(load(IOI), 5, seed=0)]
    heads = ["L2H0", "L3H1"] if more else None
    want = []
    for keys in ("io", "~io"):
        want += window_knockout(
            load(IOI), prompts, keys=keys, window=2, target="answer", heads=heads
        ).rows()
    assert [(r["keys"], int(r["layer"])) for r in done.rows] == [
        (r["keys"], r["layer"]) for r in want
    ]
    np.testing.assert_allclose(numbers(done.rows), numbers(want), atol=1e-9)
    assert {(r["queries"], r["window"], r["n"]) for r in done.rows} == {("last", "2", "5")}
    assert "as it is, the answer has probability" in done.err
    again = run(*args)
    assert again.out == done.out and "nothing was computed" in again.err
    assert run("show", str(only_run())).out == done.out
    best = run("show", str(only_run()), "--top", "1").rows
    assert [float(r["change"]) for r in best] == [min(float(r["change"]) for r in done.rows)]
    document = json.loads(run(*args, "--format", "json").out)
    assert document["schema"] == "headscope.patch.window" and document["target"] == "answer"


def test_own_prompts_need_no_pairs_and_no_answers(run) -> None:
    lines = [{"tokens": [1, *range(20, 30)], "spans": {"fact": [[2 + i, 5 + i]]}} for i in range(3)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("patch", "-m", NEEDLE, "-p", "p.jsonl", "--window", "1", "--keys", "fact",
               "--queries", "~fact,last")  # fmt: skip
    assert done.code == 0, done.err
    prompts = [
        Prompt((1, *range(20, 30)), {"fact": ((2 + i, 5 + i),)}, id=f"line-{i + 1}")
        for i in range(3)
    ]
    want = window_knockout(load(NEEDLE), prompts, keys="fact", queries="~fact,last", window=1)
    np.testing.assert_allclose(numbers(done.rows), numbers(want.rows()), atol=1e-9)
    assert np.abs(want.values).max() > 1e-6 and "the predicted token" in done.err


def test_a_dry_run_counts_what_is_run(run, monkeypatch) -> None:
    from app.loading import Source

    args = ("patch", "-m", IOI, "--window", "1", "--keys", "io", "--keys", "s1", "--n", "5",
            "--batch-size", "2")  # fmt: skip
    dry = run(*args, "--dry-run")
    assert dry.code == 0 and not Path("runs").exists()
    values = {r["quantity"]: float(r["value"]) for r in dry.rows}
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
    assert run(*args, "--no-save").code == 0
    assert sum(a * b for a, b in seen) == values["tokens through the model"] > 0
    assert values["runs of a prompt"] == 2 * 5 * 5 and values["windows"] == 4


BAD = {
    "keys alone": (("--keys", "io"), 2, "--keys goes with --window"),
    "queries alone": (("--queries", "last"), 2, "--queries goes with --window"),
    "site": (("--window", "1", "--site", "q"), 2, "--site means nothing with --window"),
    "direction": (("--window", "1", "--direction", "denoise"), 2, "--direction means nothing"),
    "metric": (("--window", "1", "--metric", "prob"), 2, "--metric means nothing"),
    "no layer": (("--window", "0"), 2, "--window"),
    "span": (("--window", "1", "--keys", "nix"), 65, "has no span 'nix'"),
    "every key": (("--window", "1", "--keys", "all"), 65, "must keep a key"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_together_is_refused(case, run) -> None:
    args, code, text = BAD[case]
    done = run("patch", "-m", IOI, "--n", "2", *args)
    assert (done.code, done.out) == (code, "") and text in done.err
    assert "Traceback" not in done.err
