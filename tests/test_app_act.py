"""The commands that act on heads: numbers of the Python API, runs that survive, mistakes in a line.

Nothing is compared with a number written here: each table is beside the call of the library that it
stands for, or beside a slower way to the same number.
"""

import contextlib
import csv
import inspect
import io
import json
import math
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from app_kit import (
    AFTER,
    Done,
    assert_refused,
    files,
    in_process,
    only_run,
    posix,
    process,
    tokens_line,
)

from app.catalog import entries
from app.cli import app
from app.headset import parse
from interp.headid import HeadId
from interp.loading import load
from interp.recipe import Edit, Positions, Recipe, Where
from interp.run import Run
from interp.tasks import make_task

INDUCTION, RETRIEVAL, IOI, LLAMA = (
    f"zoo:planted-{name}" for name in ("induction", "retrieval", "ioi", "llama")
)
NEEDLE = ("-t", "needle", "--param", "needle:lengths=48,64")
SHORT = {"lengths": "48,64"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def labelled(path: str = "labelled.jsonl", n: int = 30, vocabulary: int = 26) -> str:
    """Prompts whose label is told by their last token."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        tokens = [*map(int, rng.integers(5, vocabulary - 2, 6)), vocabulary - 1 - i % 2]
        lines.append(json.dumps({"tokens": tokens, "label": bool(i % 2)}))
    Path(path).write_text("\n".join(lines))
    return path


def saved_recipe(name: str, *edits: Edit, model: str | None = None) -> str:
    made = Recipe(edits, None if model is None else load(model).fingerprint)
    return str(made.save(Path(name)))


def near(a: float, b: float, tolerance: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


# ---- every command: formats, runs, show

COMMANDS = {
    "verdict": ("verdict", "induction", "-m", INDUCTION, "--n", "9"),
    "verdict, nothing": ("verdict", "sink", "-m", "zoo:planted-nothing", "--n", "4"),
    "ablate": ("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "3", "-H", "L1"),
    "ablate pairs": ("ablate", "-m", IOI, "-t", "ioi", "--reference", "mean", "--n", "4"),
    "joint": ("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "3", "-H", "L1H0", "--joint"),
    "joint pairs": ("ablate", "-m", IOI, "-t", "ioi", "--n", "4", "-H", "L2H0,2.1", "--joint"),
    "patch": ("patch", "--n", "4", "-H", "L1-L2"),
    "attribute": ("attribute", "atp", "--n", "4", "--param", "atp:verify=2"),
    "probe": ("probe", "-m", LLAMA, "-p", "labelled.jsonl", "--draws", "19"),
    "run": ("steer", "run", "--op", "zero", "-H", "L1H0", "-m", RETRIEVAL, *NEEDLE, "--n", "2",
            "--tokens", "3", "--windows", "2"),
    "sweep": ("steer", "sweep", "--op", "zero", "-H", "L1H0", "-m", RETRIEVAL, *NEEDLE, "--n", "2",
              "--strengths", "0,1", "--windows", "2"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_run_is_reused_and_shown_as_it_was_written_in_every_format(case: str, run) -> None:
    labelled()
    command = COMMANDS[case]
    first = run(*command, "--format", "json")
    assert first.code == 0 and "Traceback" not in first.err, first.err
    folder = only_run()
    assert f"saved: {folder}" in first.err
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(folder)}
    document = json.loads(first.out)
    assert document["version"] == 1 and document["run"] == str(folder)
    assert document["schema"].startswith("headscope.")
    assert "NaN" not in first.out and "Infinity" not in first.out
    texts = {"json": first.out}
    for format in ("jsonl", "tsv", "csv", "table"):
        again = run(*command, "--format", format)
        assert again.code == 0 and "nothing was computed" in again.err
        texts[format] = again.out
    # The same run, byte for byte, after all of these; and `show` says what the command said.
    assert only_run() == folder
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(folder)} == kept
    for format, text in texts.items():
        shown = run("show", folder.name, "--format", format)
        assert (shown.code, shown.out) == (0, text), format
    rows = document["rows"]
    assert [json.loads(line) for line in texts["jsonl"].splitlines()] == rows
    plain = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert list(csv.DictReader(io.StringIO(texts["csv"]))) == plain
    tabs = list(csv.DictReader(io.StringIO(texts["tsv"]), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert tabs == [{k: " ".join(v.split()) for k, v in row.items()} for row in plain]
    assert case == "run" or "…" not in texts["table"]  # nothing is cut; long prompts are
    # A pipe gets TSV, and nothing else on stdout.
    assert run(*command).out == texts["tsv"]
    # And nothing is kept on demand; the numbers are the same.
    unsaved = run(*command, "--no-save", "--quiet", "--format", "json")
    assert unsaved.err == "" and json.loads(unsaved.out)["run"] is None
    assert json.loads(unsaved.out)["rows"] == rows


def test_runs_of_these_commands_are_shown_without_torch(run) -> None:
    labelled()
    for case in ("verdict", "run", "patch"):
        assert run(*COMMANDS[case], "--out", f"r-{case}").code == 0
    code = "; ".join(f"main(['show', 'r-{case}'])" for case in ("verdict", "run"))
    done = process(["show", "r-patch"], before=f"{AFTER}\nfrom app.cli import main\n{code}")
    assert done.code == 0 and "app.views" in done.err.split()
    assert not {"torch", "transformers"} & set(done.err.split())


# ---- the numbers are those of the library


def same_table(rows: Sequence[dict[str, str]], table, value: str = "effect") -> None:
    """The rows of a command hold the values of a table of scores, the strongest first."""
    assert [row["head"] for row in rows] == [r["head"] for r in table.rows()]
    for row, mine in zip(rows, table.rows(), strict=True):
        for name, theirs in ((value, "score"), ("ci_lo",) * 2, ("ci_hi",) * 2, ("n",) * 2):
            assert row[name] == ("" if mine[theirs] is None else str(mine[theirs])), name
    for name in table.extras:
        column = table.column(name)
        for row in rows:
            number = float(column[table.heads.index(HeadId.parse(row["head"]))])
            assert row[name] == ("" if math.isnan(number) else repr(number)), name


def pairs_of(n: int, *, metric: str = "logit-difference", seed: int = 0):
    from patching.pairs import Pairs

    model = load(IOI)
    return Pairs(model, make_task("ioi").pairs(model, n, seed=seed), metric=metric)


@pytest.mark.parametrize("method", sorted(entries("method")))
def test_attribute_is_the_method(method: str, run) -> None:
    from patching.method import make_method

    done = run("attribute", method, "--n", "4", "--seed", "1")
    assert done.code == 0, done.err
    same_table(done.rows, make_method(method).scores(pairs_of(4, seed=1)))


def test_parameters_and_metric_reach_the_method(run) -> None:
    from patching.method import make_method

    done = run("attribute", "atp-ig", "--n", "3", "--metric", "log-prob",
               "--param", "atp-ig:steps=2", "--param", "atp-ig:verify=1")  # fmt: skip
    wanted = make_method("atp-ig", {"steps": 2, "verify": 1})
    same_table(done.rows, wanted.scores(pairs_of(3, metric="log-prob")))


@pytest.mark.parametrize("site", ["z", "q", "k", "v", "pattern"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_patch_is_the_exact_patch(site: str, direction: str, run) -> None:
    from patching.engine import head_effects

    asked = ("--n", "3", "--site", site, "--direction", direction)
    data = pairs_of(3)
    whole = head_effects(data.model, data, site=site, direction=direction)
    same_table(run("patch", *asked).rows, whole)
    some = head_effects(data.model, data, site=site, direction=direction, heads=["L2H1", "L0H0"])
    same_table(run("patch", *asked, "-H", "2.1,L0H0").rows, some)


@pytest.mark.parametrize("reference", ["zero", "mean", "resample"])
def test_ablate_on_pairs_is_the_method(reference: str, run) -> None:
    from patching.method import make_method

    done = run("ablate", "-m", IOI, "-t", "ioi", "--n", "4", "--reference", reference)
    same_table(done.rows, make_method("ablate", {"reference": reference}).scores(pairs_of(4)))


def log_prob(model, prompt, recipe: Recipe | None = None) -> tuple[float, bool]:
    """Mean log-probability of an answer fed after its prompt, in one run without a cache."""
    ids = torch.tensor([[*prompt.tokens, *prompt.answer]])
    with torch.no_grad():
        if recipe is None:
            logits = model.hf(ids, use_cache=False).logits
        else:
            with recipe.on(model):
                logits = model.hf(ids, use_cache=False).logits
    said = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    answer = torch.tensor(prompt.answer)
    right = bool((said.argmax(-1) == answer).all())
    return float(said.gather(1, answer[:, None]).mean()), right


def zero(*heads: str) -> Recipe:
    return Recipe((Edit("zero", Where(heads=heads)),))


def test_ablate_without_pairs_is_the_change_of_each_answer(run) -> None:
    done = run("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "3", "--seed", "4")
    model = load(RETRIEVAL)
    prompts = make_task("needle", SHORT).prompts(model, 3, seed=4)
    assert len(done.rows) == len(model.tower("text").heads)
    for row in done.rows:
        found = [log_prob(model, p, zero(row["head"])) for p in prompts]
        plain = [log_prob(model, p) for p in prompts]
        changes = [a - b for (a, _), (b, _) in zip(found, plain, strict=True)]
        assert near(float(row["effect"]), float(np.mean(changes)), 1e-5)
        assert float(row["accuracy"]) == np.mean([right for _, right in found])
    effects = [float(row["effect"]) for row in done.rows]
    assert effects == sorted(effects) and effects[0] < -1


def test_sets_are_ablated_together_beside_others_of_the_same_layers(run) -> None:
    args = ("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "3", "-H", "L0H0,L1H0", "--joint",
            "--controls", "3")  # fmt: skip
    rows = run(*args).rows
    assert [r["set"] for r in rows] == [
        "chosen",
        "random, mean",
        "random 1",
        "random 2",
        "random 3",
    ]
    model = load(RETRIEVAL)
    prompts = make_task("needle", SHORT).prompts(model, 3, seed=0)
    mine = {"L0H0", "L1H0"}
    for row in rows:
        heads = row["heads"].split()
        if not heads:
            randoms = [float(r["effect"]) for r in rows[2:]]
            assert near(float(row["effect"]), float(np.mean(randoms)))
            continue
        if row["set"] != "chosen":
            assert not mine & set(heads) and [h[:2] for h in heads] == ["L0", "L1"]
        changes = [log_prob(model, p, zero(*heads))[0] - log_prob(model, p)[0] for p in prompts]
        assert near(float(row["effect"]), float(np.mean(changes)), 1e-5)
    assert float(rows[0]["p"]) == 0.5 ** len(prompts)  # sign flips: one of 2^n is as extreme


def test_sets_on_pairs_are_those_of_patching(run) -> None:
    from patching.prune import joint_effects

    args = ("ablate", "-m", IOI, "-t", "ioi", "--n", "4", "-H", "L2H0,L2H1", "--joint")
    rows = run(*args, "--reference", "mean", "--controls", "2").rows
    data = pairs_of(4)
    sets = [[HeadId.parse(h) for h in row["heads"].split()] for row in rows if row["heads"]]
    found = joint_effects(data.model, data, sets, reference="mean")
    named = [float(row["effect"]) for row in rows if row["heads"]]
    assert named == pytest.approx(list(found.values), abs=1e-9) and len(named) == 3


def test_a_verdict_is_that_of_the_library(run) -> None:
    from heads.verdicts import verdict

    args = ("verdict", "induction", "-m", INDUCTION, "--n", "9", "--format", "json")
    document = json.loads(run(*args).out)
    found = verdict(load(INDUCTION), detector="induction", n=9)
    assert found.rows() and document["message"] == found.message
    for row, mine in zip(document["rows"], found.rows(), strict=True):
        for name, value in mine.items():
            same = value if value == value else None
            assert row[name] == same, name
    named = json.loads(run(*args, "-H", "L0H0,1.3").out)
    wanted = verdict(load(INDUCTION), detector="induction", heads=["L0H0", "L1H3"], n=9)
    assert [r["effect"] for r in named["rows"]] == [r["effect"] for r in wanted.rows()]


def test_a_verdict_on_scores_made_earlier_scores_nothing(run, monkeypatch) -> None:
    run("rank", "induction", "-m", INDUCTION, "--n", "9", "--out", "scored")
    fresh = run("verdict", "induction", "-m", INDUCTION, "--n", "9").rows

    def never(*args: object, **options: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("heads.verdicts.score", never)
    args = ("verdict", "induction", "-m", INDUCTION, "--n", "9", "--scores", "scored")
    assert run(*args).rows == fresh
    # The scores count, not where they lie.
    Path("scored").rename("moved")
    moved = run(*args[:-1], "moved")
    assert moved.rows == fresh and "nothing was computed" in moved.err


@pytest.mark.parametrize("probe", sorted(entries("probe")))
def test_probe_is_the_cross_validation(probe: str, run) -> None:
    from interp.promptfile import parse as read
    from interp.promptfile import to_prompts
    from probes import PROBES, collect_features, cross_validate

    file = labelled()
    args = ("probe", "-m", LLAMA, "-p", file, "--probe", probe, "--folds", "3", "--draws", "19")
    done = run(*args, "--seed", "2")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    model = load(LLAMA)
    bare = "\n".join(json.dumps({"tokens": x["tokens"]}) for x in lines).encode()
    prompts = to_prompts(read(bare, "p.jsonl"), model)
    features = collect_features(model, prompts)
    labels = [x["label"] for x in lines]
    table = cross_validate(features, labels, probe=PROBES[probe](), folds=3, draws=19, seed=2)
    same_table(done.rows, table, "score")
    assert any(row["verdict"] == f"probe.{probe}" for row in done.rows)


def test_defaults_are_those_of_the_library() -> None:
    """A default of an option that means an argument of the library is the argument's."""
    from heads.verdicts import verdict
    from probes import cross_validate

    for name, call in (("verdict", verdict), ("probe", cross_validate)):
        known = {
            k: p.default
            for k, p in inspect.signature(call).parameters.items()
            if p.default is not p.empty
        }
        [command] = [c for c in app.registered_commands if c.name == name]
        mine = inspect.signature(command.callback).parameters
        shared = (known.keys() & mine.keys()) - {"detector", "task", "probe"}
        assert len(shared) >= 3
        for option in shared:
            assert mine[option].default == known[option], (name, option)


# ---- heads


def test_heads_can_be_written_in_every_way(run) -> None:
    model = load(INDUCTION)  # two layers of six heads
    layer = [[f"L{i}H{h}" for h in range(6)] for i in range(2)]
    run("rank", "induction", "sink", "-m", INDUCTION, "--n", "9")
    folder = only_run()
    table = Run.load(folder).scores["induction"]
    judged = run("verdict", "induction", "-m", INDUCTION, "--n", "9", "--out", "judged").rows
    causal = [row["head"] for row in judged if row["verdict"] == "causal"]
    Path("heads.txt").write_text("# chosen\nL1H3 0.2,L0H1\n\ntext.L1H0  # by hand\n")
    Path("odd,name.txt").write_text("L1H5")
    cases = {
        ("L1H3,0.2",): ["L1H3", "L0H2"],
        ("L1H3", "0.2"): ["L1H3", "L0H2"],
        ("l1h3, L1H3",): ["L1H3"],
        ("L1",): layer[1],
        ("text.L1", "L1H0"): layer[1],
        ("L0-1",): layer[0] + layer[1],
        ("L0-L1",): layer[0] + layer[1],
        ("all",): layer[0] + layer[1],
        ("heads.txt",): ["L1H3", "L0H2", "L0H1", "L1H0"],
        ("odd,name.txt",): ["L1H5"],
        ("heads.txt,L1H5",): ["L1H3", "L0H2", "L0H1", "L1H0", "L1H5"],
        (f"top:3@{folder}#induction",): [str(h) for h in table.top(3)],
        (f"top:2@{folder.name}#sink",): [str(h) for h in Run.load(folder).scores["sink"].top(2)],
        (f"top:2@{folder}/scores/induction.safetensors",): [str(h) for h in table.top(2)],
        (f"claimed@{folder}#induction",): [str(h) for h in table.select(fdr=0.05)],
        ("causal@judged",): causal,
    }
    assert causal == ["L1H3"]
    for texts, heads in cases.items():
        assert [str(h) for h in parse(texts).of(model)] == heads, texts
    # And they reach the command, in the order of their strength.
    chain_of = [x for text in ("heads.txt", "L1H5") for x in ("-H", text)]
    rows = run("ablate", "-m", INDUCTION, "-t", "repeated-tokens", "--n", "2", *chain_of).rows
    assert sorted(r["head"] for r in rows) == sorted(cases[("heads.txt,L1H5",)])


def test_heads_of_another_model_are_said_to_be(run) -> None:
    run("rank", "induction", "-m", INDUCTION, "--n", "9", "--out", "r")
    for args in (
        ("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "2", "-H", "top:1@r"),
        ("patch", "--n", "2", "-H", "top:1@r"),
        ("steer", "run", "--op", "zero", "-m", RETRIEVAL, *NEEDLE, "-H", "top:1@r", "--n", "1",
         "--tokens", "1", "--windows", "1", "--controls", "0"),
    ):  # fmt: skip
        done = run(*args)
        assert done.code == 0 and f"were found on {INDUCTION}, and are used on" in done.err


# ---- steering


def greedy(model, tokens: Sequence[int], n: int, recipe: Recipe) -> list[int]:
    """The most likely token after all tokens so far, again and again, without a cache."""
    out = list(tokens)
    for _ in range(n):
        with torch.no_grad(), recipe.on(model):
            out.append(int(model.hf(torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
    return out[len(tokens) :]


def test_steer_run_shows_both_texts_and_what_else_changed(run) -> None:
    args = ("steer", "run", "--op", "zero", "-H", "L1H0", "-m", "zoo:needle", *NEEDLE)
    more = ("--n", "2", "--tokens", "5", "--windows", "3", "--controls", "2", "--format", "json")
    document = json.loads(run(*args, *more).out)
    model = load("zoo:needle")
    steering = zero("L1H0")
    prompts = make_task("needle", SHORT).prompts(model, 2, seed=0)
    nothing = Recipe((Edit("scale", Where(heads=("L1H0",)), strength=1.0),))
    for row, prompt in zip(document["rows"], prompts, strict=True):
        texts = [greedy(model, prompt.tokens, 5, r) for r in (nothing, steering)]
        assert [row["without"], row["with"]] == [model.tokenizer.decode(t) for t in texts]
        assert row["same"] == (texts[0] == texts[1])
        assert row["answer"] == model.tokenizer.decode(prompt.answer)
    assert not all(row["same"] for row in document["rows"])
    effects = {row["measure"]: row for row in document["side_effects"]}
    controls = steering.control(model, 2, seed=0)
    # The second half of a neutral text is what is predicted.
    texts = make_task("text").prompts(model, 3, seed=0)
    halves = [
        SimpleNamespace(tokens=p.tokens[: len(p) // 2], answer=p.tokens[len(p) // 2 :], n=len(p))
        for p in texts
    ]
    for name, data in (("answers", prompts), ("neutral text", halves)):
        logs = {r: [distribution(model, p, r) for p in data] for r in (None, steering, *controls)}
        entropy = {r: np.mean([-own(x, p) for x, p in zip(v, data, strict=True)])
                   for r, v in logs.items()}  # fmt: skip
        row = effects[f"cross-entropy of {name}"]
        random = np.mean([entropy[r] for r in controls])
        for key, wanted in (("without", entropy[None]), ("with", entropy[steering]),
                            ("change", entropy[steering] - entropy[None]),
                            ("control_change", random - entropy[None])):  # fmt: skip
            assert near(row[key], wanted, 1e-5), (name, key)
        divergence = [float((a.exp() * (a - b)).sum(-1).mean())
                      for a, b in zip(logs[None], logs[steering], strict=True)]  # fmt: skip
        assert near(effects[f"KL on {name}"]["with"], float(np.mean(divergence)), 1e-5)
        assert effects[f"KL on {name}"]["without"] == 0 and row["n"] == len(data)
    right = [log_prob(model, p, steering)[1] for p in prompts]
    assert effects["accuracy on answers"]["with"] == np.mean(right)
    # The words on stderr are the same numbers.
    said = run(*args, *more[:-2]).err
    assert "cross-entropy of neutral text: " in said and "random heads" in said


def distribution(model, prompt, recipe: Recipe | None) -> torch.Tensor:
    """Log-probabilities before each token of an answer, [token, d_vocab]."""
    ids = torch.tensor([[*prompt.tokens, *prompt.answer]])
    with torch.no_grad(), (recipe or zero_nothing()).on(model):
        logits = model.hf(ids, use_cache=False).logits
    return logits[0, len(prompt.tokens) - 1 : -1].double().log_softmax(-1)


def own(logs: torch.Tensor, prompt) -> float:
    return float(logs.gather(1, torch.tensor(prompt.answer)[:, None]).mean())


def zero_nothing() -> Recipe:
    return Recipe((Edit("zero", Where(heads=("L0H0",)), strength=0.0),))


def test_the_recipe_of_a_run_can_be_used_again(run) -> None:
    args = ("steer", "run", "--op", "zero", "-H", "L1H0", "-m", RETRIEVAL, *NEEDLE)
    small = ("--n", "2", "--tokens", "2", "--windows", "2")
    first = run(*args, *small, "--out", "made")
    recipe = Path("made/recipe.safetensors")
    assert str(Recipe.load(recipe)) == str(zero("L1H0"))
    again = ("steer", "run", "made", "-m", RETRIEVAL, *NEEDLE, *small)
    assert run(*again, "--out", "b").out == first.out
    [edit] = run("steer", "show", "made").rows
    assert (edit["op"], edit["heads"]) == ("zero", "L1H0")
    # A process may be killed when the run is complete and the recipe not yet written.
    recipe.unlink()
    assert run(*args, *small, "--out", "made").out == first.out
    assert str(Recipe.load(recipe)) == str(zero("L1H0"))
    wrong = run("show", str(recipe))
    assert wrong.code == 2 and "headscope steer show" in wrong.err


STILL = [
    ("a file", 0, 0.5, None),
    ("zero", 0, 0.5, ()),
    ("scale", 1, 0.5, ()),
    ("temperature", 1, 50, ()),
    ("knockout", 0, 1, ("--keys", "span:needle")),
    ("uniform", 0, 0.5, ()),
]


@pytest.mark.parametrize(("op", "still", "more", "options"), STILL, ids=[s[0] for s in STILL])
def test_a_strength_that_changes_nothing_changes_nothing(op, still, more, options, run) -> None:
    if options is None:
        size = load(RETRIEVAL).tower("text").layers[0].d_v
        where = Where(heads=("L1H0", "L0H2"))
        add = Edit("add", where, tensors={"vector": torch.ones(2, size)}, strength=3.0)
        what = [saved_recipe("r.safetensors", add, zero("L0H0").edits[0])]
    else:
        what = ["--op", op, "-H", "L0H0,L1H0", *options]
    args = ("steer", "sweep", *what, "-m", RETRIEVAL, *NEEDLE, "--n", "2", "--windows", "2")
    done = run(*args, "--strengths", f"{still},{more}", "--controls", "1")
    rows = done.rows
    assert {float(r["strength"]) for r in rows} == {still, more}, done.err
    at_rest = [r for r in rows if float(r["strength"]) == still]
    assert len(at_rest) == 5
    assert {(float(r["change"]), float(r["control_change"])) for r in at_rest} == {(0.0, 0.0)}
    assert any(float(r["change"]) for r in rows if float(r["strength"]) == more)


def test_a_sweep_measures_what_a_run_measures(run) -> None:
    where = ("-H", "L1H0", "-m", RETRIEVAL, *NEEDLE, "--n", "2", "--windows", "2",
             "--controls", "2", "--format", "json")  # fmt: skip
    sweep = json.loads(run("steer", "sweep", "--op", "zero", *where, "--strengths", "0.5,1").out)
    for strength in (0.5, 1.0):
        once = json.loads(
            run("steer", "run", "--op", "zero", *where, "-s", str(strength), "--tokens", "1").out
        )
        swept = [
            {k: v for k, v in row.items() if k != "strength"}
            for measure in (e["measure"] for e in once["side_effects"])
            for row in sweep["rows"]
            if row["measure"] == measure and row["strength"] == strength
        ]
        for a, b in zip(swept, once["side_effects"], strict=True):
            assert a.keys() == b.keys() and a["measure"] == b["measure"]
            assert all(near(a[k], b[k], 1e-9) for k in a if k != "measure")


def test_a_sweep_without_strengths_takes_those_that_fit(run) -> None:
    args = ("-H", "L1H0", "-m", RETRIEVAL, *NEEDLE, "--n", "1", "--windows", "1", "--controls", "0")
    found = {
        op: list(
            dict.fromkeys(r["strength"] for r in run("steer", "sweep", "--op", op, *args).rows)
        )
        for op in ("scale", "temperature")
    }
    assert found["temperature"] == [x for x in found["scale"] if x != "0.0"]
    assert found["scale"][0] == "0.0"


def test_side_effects_that_cannot_be_measured_are_said(run) -> None:
    args = ("steer", "run", "--op", "zero", "-m", RETRIEVAL, *NEEDLE, "--n", "1", "--tokens", "1",
            "--windows", "1", "--format", "json")  # fmt: skip
    spans = json.loads(run(*args, "-H", "L1H0", "--at", "span:needle").out)
    assert any("neutral text is not measured" in note for note in spans["notes"])
    whole = json.loads(run(*args, "-H", "L1").out)
    assert any("no control on random heads" in note for note in whole["notes"])
    assert {row["control_change"] for row in whole["side_effects"]} == {None}


def test_fit_writes_the_recipe_of_the_library(run) -> None:
    from interp.promptfile import parse as read
    from interp.promptfile import to_prompts
    from probes import fit_iti, fit_mean_difference

    file = labelled()
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    model = load(LLAMA)
    bare = "\n".join(json.dumps({"tokens": x["tokens"]}) for x in lines).encode()
    prompts = to_prompts(read(bare, "p.jsonl"), model)
    labels = [x["label"] for x in lines]
    options = {"k": 2, "draws": 19, "folds": 3, "batch_size": 8}
    args = ("-m", LLAMA, "-p", file, "--k", "2", "--draws", "19", "--folds", "3")
    cases = {
        "iti": (("--towards", "false"), fit_iti(model, prompts, labels, towards=False, alpha=15.0,
                                                probe="ridge", **options)),
        "mean-difference": (("-s", "2"), fit_mean_difference(model, prompts, labels, strength=2.0,
                                                             probe="ridge", **options)),
    }  # fmt: skip
    for method, (more, wanted) in cases.items():
        done = run("steer", "fit", method, *args, *more, "-o", f"{method}.safetensors")
        assert done.code == 0, done.err
        made = Recipe.load(f"{method}.safetensors")
        assert str(made) == str(wanted) and made.fingerprint == model.fingerprint
        assert made.parameters().keys() == wanted.parameters().keys()
        for name, tensor in made.parameters().items():
            assert torch.equal(tensor, wanted.parameters()[name])
        assert [row["head"] for row in done.rows] == [str(h) for h in wanted.heads]
        assert [float(row["strength"]) for row in done.rows] == pytest.approx(
            [float(s) for e in wanted.edits for s in strengths(e)]
        )
    assert "towards false, away from true" in run(
        "steer", "fit", "iti", *args, "--towards", "false", "-o", "x.safetensors"
    ).err  # fmt: skip


def strengths(edit: Edit) -> list[float]:
    s = edit.strength
    heads = len(edit.where.heads or ())
    return s.tolist() if isinstance(s, torch.Tensor) and s.dim() else [float(s)] * heads


def test_a_baked_folder_is_loaded_by_transformers_and_does_the_same(run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    edits = (
        Edit("scale", Where(heads=("L1H2",)), strength=0.25),
        Edit("zero", Where(heads=("L0H1", "L1H0"))),
    )
    file = saved_recipe("r.safetensors", *edits, model=LLAMA)
    done = run("steer", "bake", file, "-m", LLAMA, "-o", "deep/baked", "--format", "json")
    assert done.code == 0, done.err
    [row] = json.loads(done.out)["rows"]
    baked = AutoModelForCausalLM.from_pretrained("deep/baked").eval()
    model = load(LLAMA)
    ids = torch.tensor([make_task("text").prompts(model, 1, seed=3)[0].tokens])
    with torch.no_grad():
        plain = model.hf(ids).logits
        with Recipe.load(file).on(model):
            steered = model.hf(ids).logits
        said = baked(ids).logits
    assert (said - steered).abs().max() < 1e-5 < (plain - steered).abs().max()
    assert row["difference"] < 1e-5
    words = AutoTokenizer.from_pretrained("deep/baked")
    assert words.get_vocab() == model.tokenizer.get_vocab()
    # And it is a model like any other.
    assert run("doctor", "-m", "deep/baked").code == 0
    assert sorted(p.name for p in Path("deep").iterdir()) == ["baked"]
    again = run("steer", "bake", file, "-m", LLAMA, "-o", "deep/baked")
    assert again.code == 2 and "new or empty folder" in again.err


# ---- prompts, counting


def test_prompts_can_come_from_stdin(run, monkeypatch) -> None:
    def given(text: str, *args: str) -> Done:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        return run(*args)

    text = f"{tokens_line(id='a')}\n{tokens_line(id='b')}\n"
    Path("p.jsonl").write_text(text)
    file = labelled(vocabulary=26)
    marked = Path(file).read_text()
    steer = ("steer", "run", "--op", "zero", "-H", "L1H3", "-m", INDUCTION, "--tokens", "2",
             "--windows", "2", "--prompts")  # fmt: skip
    for command, content, name in (
        (("ablate", "-m", INDUCTION, "--prompts"), text, "p.jsonl"),
        (("verdict", "induction", "-m", INDUCTION, "-H", "L1H3", "--prompts"), text, "p.jsonl"),
        (steer, text, "p.jsonl"),
        (("probe", "-m", LLAMA, "--draws", "0", "--prompts"), marked, file),
    ):
        from_file = run(*command, name)
        from_stdin = given(content, *command, "-")
        assert from_file.code == 0 and from_file.rows, from_file.err
        assert from_stdin.out == from_file.out, command
    assert given("", *steer, "-").code == 65


def test_a_dry_run_counts_what_is_run_and_leaves_nothing(run, monkeypatch) -> None:
    from interp.model import Model

    passed: list[int] = []
    forward = Model.forward

    def counting(self, inputs, *rest: object, **more: object):
        passed.append(inputs["input_ids"].numel())
        return forward(self, inputs, *rest, **more)

    for more in ((), ("-H", "L1"), ("-H", "L1H0,L0H2"), ("-H", "L1H0", "--joint")):
        args = ("ablate", "-m", RETRIEVAL, "-t", "needle", "--param", "needle:lengths=48", "--n",
                "3", "--controls", "2", *more)  # fmt: skip
        told = {r["quantity"]: float(r["value"]) for r in run(*args, "--dry-run").rows}
        assert not Path("runs").exists()
        passed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Model, "forward", counting)
            real = run(*args, "--no-save").rows
        model = load(RETRIEVAL)
        prompts = make_task("needle", {"lengths": "48"}).prompts(model, 3, seed=0)
        assert told["tokens"] == sum(map(len, prompts)) and told["prompts"] == 3
        assert sum(passed) == told["tokens through the model"]
        assert told["heads"] == (1 if "--joint" in more else len(real))
    told = run("patch", "--n", "4", "-H", "L1", "--site", "k", "--dry-run")
    values = {r["quantity"]: float(r["value"]) for r in told.rows}
    assert values["heads"] == len(run("patch", "--n", "4", "-H", "L1", "--site", "k").rows)
    assert values["prompts"] == 8 and values["runs of a prompt"] == 8 + 4 * values["heads"]


def test_equal_clean_and_corrupted_runs_recover_nothing(run) -> None:
    args = ("patch", "-m", "zoo:planted-nothing", "--metric", "accuracy", "--n", "3")
    done = run(*args, "--format", "json")
    document = json.loads(done.out)
    assert done.code == 0 and "no share of a difference" in done.err
    assert {row.get("recovered") for row in document["rows"]} == {None}
    assert {row["effect"] for row in document["rows"]} == {0.0}


# ---- mistakes

NONE = "none.safetensors"
ON = ("-m", RETRIEVAL, *NEEDLE)
RUN = ("steer", "run", "--op")
MISTAKES = {
    "no command of steer": (["steer"], 2, ""),
    "command of steer": (["steer", "rnu"], 2, "rnu"),
    "no heads": (["ablate", "-H", "", *ON], 2, "at least one head"),
    "commas": (["ablate", "-H", ", ,", *ON], 2, "at least one head"),
    "empty file": (["ablate", "-H", "empty.txt", *ON], 2, "at least one head"),
    "bad file": (["ablate", "-H", "bad.txt", *ON], 2, "bad.txt, line 2: a head is written"),
    "not a text file": (["ablate", "-H", "bad.bin", *ON], 65, "must be in a text file"),
    "not a head": (["ablate", "-H", "L1X3", *ON], 2, "a head is written"),
    "outside": (["ablate", "-H", "L40H3", *ON], 2, "outside this model"),
    "layer outside": (["ablate", "-H", "L9", *ON], 2, "layer 9 is outside"),
    "layers reversed": (["ablate", "-H", "L1-L0", *ON], 2, "lower to the higher"),
    "other tower": (["ablate", "-H", "vision.L0H0", *ON], 2, "outside this model"),
    "no layers": (["patch", "-H", "L7", "--n", "2"], 2, "layer 7 is outside"),
    "key head outside": (["patch", "-H", "L0H9", "--site", "v", "--n", "2"], 2, "outside"),
    "choice": (["ablate", "-H", "tpo:3@r", *ON], 2, "did you mean top"),
    "top nothing": (["ablate", "-H", "top:0@r", *ON], 2, "at least 1"),
    "top what": (["ablate", "-H", "top:x@r", *ON], 2, "top:N@RUN"),
    "no run": (["ablate", "-H", "top:3@r", *ON], 66, "there is no run 'r'"),
    "tower": (["ablate", "--tower", "vison", *ON], 2, "no tower"),
    "tower of patch": (["patch", "--tower", "vison", "--n", "2"], 2, "no tower"),
    "tower of attribute": (["attribute", "atp", "--tower", "vison"], 2, "no tower"),
    "tower of probe": (["probe", "-p", "l.jsonl", "--tower", "vison", "-m", LLAMA], 2, "no tower"),
    "tower of verdict": (["verdict", "sink", "--tower", "vison", *ON], 2, "no tower"),
    "reference": (["ablate", "--reference", "none"], 2, "zero, mean, resample"),
    "mean without pairs": (["ablate", "--reference", "mean", *ON], 2, "needs pairs"),
    "metric without pairs": (["ablate", "--metric", "prob", *ON], 2, "needs pairs"),
    "joint": (["ablate", "--joint", *ON], 2, "--joint needs --heads"),
    "metric": (["patch", "--metric", "logit-diference"], 2, "did you mean logit-difference"),
    "site of patch": (["patch", "--site", "y"], 2, "--site must be one of"),
    "direction": (["patch", "--direction", "up"], 2, "noise or denoise"),
    "no pairs": (["patch", "-t", "needle"], 2, "tasks of pairs: coloured-objects, ioi"),
    "task": (["attribute", "atp", "-t", "ooi"], 2, "did you mean ioi"),
    "method": (["attribute", "apt"], 2, "or atp"),
    "method's parameter": (["attribute", "atp-ig", "--param", "atp-ig:step=2"], 2, "mean steps"),
    "method's value": (["attribute", "atp-ig", "--param", "atp-ig:steps=x"], 2, "a int such as 5"),
    "slope of accuracy": (["attribute", "atp", "--metric", "accuracy"], 65, "with a gradient"),
    "every key hidden": (
        ["attribute", "knockout", "--param", "knockout:keys=all", "--n", "2"], 65,
        "must keep a key",
    ),
    "span of a knockout": (
        ["attribute", "knockout", "--param", "knockout:keys=nix", "--n", "2"], 65, "no span 'nix'",
    ),
    "detector": (["verdict", "inducton"], 2, "did you mean induction"),
    "op of a verdict": (["verdict", "sink", "--op", "mean"], 2, "zero or uniform"),
    "scores": (["verdict", "sink", "--scores", "none"], 66, "there is no run 'none'"),
    "controls": (["verdict", "sink", "--controls", "0"], 2, "--controls"),
    "no prompts": (["probe"], 2, "--prompts"),
    "no such prompts": (["probe", "-p", "none.jsonl"], 66, "there is no such file"),
    "probe": (["probe", "-p", "l.jsonl", "--probe", "rigde"], 2, "did you mean ridge"),
    "setting": (["probe", "-p", "l.jsonl", "--param", "ridge:c=1"], 2, "setting of probe"),
    "draws": (["probe", "-p", "l.jsonl", "--draws", "9"], 2, "--draws must be at least 19"),
    "folds": (["probe", "-p", "l.jsonl", "-m", LLAMA, "--folds", "99"], 65, "at least 99 groups"),
    "span of a probe": (["probe", "-p", "l.jsonl", "-m", LLAMA, "--span", "x"], 65, "no span 'x'"),
    "one label": (["probe", "-p", "one.jsonl", "-m", LLAMA], 65, "at least two labels"),
    "no label": (["probe", "-p", "p.jsonl", "-m", LLAMA], 65, "line 1: a line needs a label"),
    "neither": (["steer", "run", *ON], 2, "RECIPE file or --op must be given; got neither"),
    "both": (["steer", "run", "ok.safetensors", "--op", "zero", *ON], 2, "got both"),
    "recipe and heads": (["steer", "run", "ok.safetensors", "-H", "L0", *ON], 2, "--heads goes"),
    "op": ([*RUN, "sclae", "-H", "L0", *ON], 2, "did you mean scale"),
    "op without heads": ([*RUN, "zero", *ON], 2, "--op needs --heads"),
    "op with tensors": ([*RUN, "add", "-H", "L0", *ON], 2, "needs tensors (vector)"),
    "op's site": ([*RUN, "zero", "-H", "L0", "--site", "zz", *ON], 2, "no site named 'zz'"),
    "not at this site": ([*RUN, "zero", "-H", "L0", "--site", "scores", *ON], 2, "op 'zero' works"),
    "layers' site": ([*RUN, "scale", "-H", "L0H1", "--site", "resid", *ON], 2, "not heads"),
    "strength": ([*RUN, "temperature", "-H", "L0", "-s", "0", *ON], 2, "above 0"),
    "strength nan": ([*RUN, "zero", "-H", "L0", "-s", "nan", *ON], 2, "finite"),
    "every key": ([*RUN, "knockout", "-H", "L0", *ON], 2, "--keys span:needle"),
    "keys of z": ([*RUN, "zero", "-H", "L0", "--keys", "0:1", *ON], 2, "are --at"),
    "span": ([*RUN, "zero", "-H", "L0", "--at", "span:nix", *ON], 65, "no span 'nix'"),
    "position": ([*RUN, "zero", "-H", "L0", "--at", "lst", *ON], 2, "positions are"),
    "window": ([*RUN, "zero", "-H", "L0", "--at", "5:3", *ON], 2, "start < stop"),
    "no text": ([*RUN, "zero", "-H", "L0"], 2, "--prompt, --prompts and --task"),
    "no words": (
        [*RUN, "zero", "-H", "L0", "-m", INDUCTION, "--prompt", "hello"], 65, "must know the text",
    ),
    "neutral": ([*RUN, "zero", "-H", "L0", "--neutral", "none", *ON], 66, "no such file"),
    "no recipe": (["steer", "run", NONE, *ON], 66, "there is no recipe"),
    "folder": (["steer", "run", ".", *ON], 66, "there is no recipe"),
    "recipe of garbage": (["steer", "run", "bad.bin", *ON], 65, "bad.bin is damaged"),
    "recipe cut short": (["steer", "show", "cut.safetensors"], 65, "cut.safetensors is damaged"),
    "not a recipe": (["steer", "show", "table.safetensors"], 65, "is not a recipe"),
    "newer recipe": (["steer", "show", "newer.safetensors"], 65, "is of version 99"),
    "recipe's op": (["steer", "show", "op.safetensors"], 65, "no op named 'zoer'"),
    "recipe's site": (["steer", "show", "site.safetensors"], 65, "site"),
    "recipe's field": (["steer", "show", "field.safetensors"], 65, "field"),
    "recipe of another": (["steer", "run", "ok.safetensors", *ON], 69, "made for the model"),
    "baking another's": (["steer", "bake", "ok.safetensors", *ON[:2], "-o", "b"], 69, "made for"),
    "showing another's": (["steer", "show", "ok.safetensors", *ON[:2]], 69, "made for the model"),
    "heads of a recipe": (["steer", "run", "far.safetensors", *ON], 65, "outside this model"),
    "not exact": (["steer", "bake", "part.safetensors", "-m", LLAMA, "-o", "b"], 65, "positions"),
    "no bias": (["steer", "bake", "add.safetensors", "-m", LLAMA, "-o", "b"], 65, "no bias"),
    "baking over": (["steer", "bake", "ok.safetensors", "-m", LLAMA, "-o", "full"], 2, "empty"),
    "way to fit": (["steer", "fit", "itt", "-p", "l.jsonl", "-o", "b"], 2, "did you mean iti"),
    "iti and heads": (
        ["steer", "fit", "iti", "-p", "l.jsonl", "-o", "b", "-H", "L0"], 2, "by probing",
    ),
    "towards": (
        ["steer", "fit", "iti", "-p", "l.jsonl", "-o", "b", "--towards", "x"], 65, "false, true",
    ),
    "strengths": (["steer", "sweep", "ok.safetensors", "--strengths", "1,a", *ON], 2, "numbers"),
    "strengths nan": (["steer", "sweep", "ok.safetensors", "--strengths", "nan", *ON], 2, "'nan'"),
    "strengths twice": (["steer", "sweep", "ok.safetensors", "--strengths", "1,1", *ON], 2, "diff"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files_made_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    with contextlib.chdir(folder):
        make_bad_files()
    return folder


@pytest.fixture
def bad_files(files_made_once: Path) -> None:
    shutil.copytree(files_made_once, ".", dirs_exist_ok=True)


def make_bad_files() -> None:
    labelled("l.jsonl")
    Path("empty.txt").write_text("# none\n")
    Path("bad.txt").write_text("L1H0\nnix\n")
    Path("bad.bin").write_bytes(b"\xff\xfe\x00\x01" * 9)
    Path("p.jsonl").write_text(json.dumps({"tokens": [5, 6]}))
    Path("one.jsonl").write_text(2 * (json.dumps({"tokens": [5, 6], "label": 1}) + "\n"))
    Path("full").mkdir()
    Path("full/x").touch()
    scale = Edit("scale", Where(heads=("L0H1",)), strength=0.5)
    ok = Path(saved_recipe("ok.safetensors", scale, model=LLAMA))
    Path("cut.safetensors").write_bytes(ok.read_bytes()[:-40])
    saved_recipe("far.safetensors", Edit("zero", Where(heads=("L7H1",))))
    at_last = Where(heads=("L0H1",), queries=Positions(prompt=(-1,)))
    saved_recipe("part.safetensors", Edit("scale", at_last, strength=0.5))
    size = load(LLAMA).tower("text").layers[0].d_v
    add = Edit("add", Where(heads=("L0H1",)), tensors={"vector": torch.ones(1, size)})
    saved_recipe("add.safetensors", add)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, "table.safetensors")
    good = {"op": "zero", "where": {"heads": ["L0H0"]}}
    for name, edit, version in (
        ("newer", good, 99),
        ("op", {**good, "op": "zoer"}, 1),
        ("site", {**good, "site": "y"}, 1),
        ("field", {**good, "wher": {}}, 1),
    ):
        header = {"schema": "headscope.recipe", "version": version, "edits": [edit]}
        save_file({}, f"{name}.safetensors", metadata={"headscope.recipe": json.dumps(header)})


def refused(done: Done, code: int, part: str) -> None:
    assert done.code == code, (done.code, done.err)
    assert part in done.err and "Traceback" not in done.err
    lines = done.err.splitlines()
    assert len(lines) <= 2 and all(x.startswith(("error: ", "hint: ")) for x in lines), done.err


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_has_its_code_and_one_line(case: str, run, bad_files) -> None:
    args, code, part = MISTAKES[case]
    before = sorted(Path().rglob("*"))
    done = run(*args)
    refused(done, code, part)
    assert done.out == "" or case == "no command of steer"
    assert not Path("b").exists() and not Path("b.safetensors").exists()
    left = set(Path().rglob("*")) - set(before)
    assert not [p for p in left if p.name.endswith(".safetensors") or p.name == "run.json"] or (
        Run.load(only_run()).status == "interrupted"
    )


def test_forcing_uses_a_recipe_on_another_model(run) -> None:
    file = saved_recipe("r", Edit("zero", Where(heads=("L1H0",))), model=LLAMA)
    small = ("--n", "1", "--tokens", "1", "--windows", "1")
    assert run("steer", "run", file, *ON, *small).code == 69
    assert run("steer", "run", file, *ON, *small, "--force").code == 0
    assert run("steer", "show", file, "-m", RETRIEVAL, "--force").code == 0


def test_what_a_run_lacks_is_said(run) -> None:
    run("rank", "induction", "sink", "-m", INDUCTION, "--n", "9", "--out", "two")
    run("rank", "retrieval", "-m", "zoo:planted-nothing", "-t", "needle", "--n", "2",
        "--param", "needle:lengths=48", "--out", "nothing")  # fmt: skip
    ablate = ("ablate", "-m", INDUCTION, "-t", "text", "--n", "2", "-H")
    refused(run(*ablate, "top:2@two"), 2, "two#induction")
    refused(run(*ablate, "top:2@two#snik"), 2, "did you mean sink")
    refused(run(*ablate, "claimed@nothing"), 65, "has none there")
    refused(run(*ablate, "causal@two#induction"), 65, "needs a run of headscope verdict")
    refused(run("verdict", "retrieval", "-m", INDUCTION, "--scores", "two"), 2, "table of scores")


# ---- runs survive


def test_ctrl_c_keeps_nothing_and_the_command_can_be_given_again(run, monkeypatch) -> None:
    args = ("ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "2", "--out", "r")

    def stopped(*rest: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("interp.recipe.Recipe.on", stopped)
        done = run(*args)
    assert (done.code, done.out) == (130, "") and "Traceback" not in done.err
    assert "interrupted; nothing was kept" in done.err
    assert Run.load("r").status == "interrupted"
    shown = run("show", "r")
    assert_refused(shown, "headscope ablate")  # how to go on
    again = run(*args)
    assert again.code == 0 and len(again.rows) == 8
    assert run("show", "r").out == again.out


KILLED = """
import os, signal
from {module} import {owner}
real = {owner}.{name}
def stopping(*args, **options):
    found = real(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
    return found
{owner}.{name} = stopping
"""


@posix
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [("interp.run", "Run", "put_part"), ("interp.run", "Run", "finish")],
)
def test_a_killed_command_leaves_a_run_that_can_be_finished(module, owner, name, run) -> None:
    args = ["ablate", "-m", RETRIEVAL, *NEEDLE, "--n", "2", "--out", "r"]
    before = KILLED.format(module=module, owner=owner, name=name)
    killed = process(args, before=before)
    assert (killed.code, killed.out) == (-signal.SIGKILL, "")
    again = run(*args)
    assert again.code == 0
    # Nothing half-written and no lock is left.
    assert [str(p.relative_to("r")) for p in files(Path("r"))] == [
        "parts/00000.safetensors", "run.json", "scores/ablate.zero.safetensors",
    ]  # fmt: skip
    whole = run(*args[:-1], "whole")
    assert again.out == whole.out


KILLED_SAVING = """
import os, signal
from transformers import PreTrainedTokenizerBase
def killed(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
PreTrainedTokenizerBase.save_pretrained = killed
"""
FULL = """
import resource, torch, transformers, errno, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import interp.recipe, interp.loading, interp.tasks
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
"""


@posix
def test_a_baked_folder_is_there_whole_or_not_at_all(run) -> None:
    saved_recipe("r.safetensors", Edit("zero", Where(heads=("L0H1",))))
    args = ["steer", "bake", "r.safetensors", "-m", LLAMA, "-o", "baked"]
    killed = process(args, before=KILLED_SAVING)
    assert killed.code == -signal.SIGKILL and not Path("baked").exists()
    assert run(*args).code == 0
    assert {"config.json", "model.safetensors"} <= {p.name for p in Path("baked").iterdir()}


@posix
def test_a_full_disk_is_a_line_and_the_command_can_be_given_again(run) -> None:
    saved_recipe("r.safetensors", Edit("zero", Where(heads=("L0H1",))))
    baking = ["steer", "bake", "r.safetensors", "-m", LLAMA, "-o", "baked"]
    args = ["steer", "run", "--op", "zero", "-H", "L1H0", "-m", RETRIEVAL, *NEEDLE, "--n", "30",
            "--tokens", "2", "--windows", "2", "--out", "r"]  # fmt: skip
    done = process(args, before=f"{FULL}\nfrom app.cli import main\nassert main({baking!r}) == 69")
    assert (done.code, done.out) == (69, ""), done.err
    assert done.err.count("no space left") == 2 and "Traceback" not in done.err
    # Of the folder to bake nothing is left, and of the run what it can go on from.
    assert sorted(p.name for p in Path().iterdir()) == ["r", "r.safetensors"]
    assert run(*args).code == 0 and Recipe.load("r/recipe.safetensors")
    assert run(*baking).code == 0


# ---- help


def commands() -> list[tuple[str, object]]:
    groups = [("", app), *((f"{g.name} ", g.typer_instance) for g in app.registered_groups)]
    listed = [(f"{p}{c.name}", c.callback) for p, g in groups for c in g.registered_commands]
    return sorted(listed)


def options_of(callback) -> dict[str, typer.models.ParameterInfo]:
    import typing

    hints = typing.get_type_hints(callback, include_extras=True)
    return {
        name: hint.__metadata__[0]
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated
    }


def test_every_option_of_every_command_has_a_sentence() -> None:
    assert {"verdict", "steer run", "steer bake", "probe"} <= {name for name, _ in commands()}
    for name, callback in commands():
        assert (callback.__doc__ or "").split("\n")[0].endswith("."), name
        for option, info in options_of(callback).items():
            said = info.help or ""
            assert said[:1].strip() and said.endswith((".", ")", "…")), (name, option)
            assert len(said) < 110 and said[-2:] != "..", (name, option)


def test_options_of_one_name_are_said_alike() -> None:
    """What `rank` and the acting commands share reads alike; `task` and a few name their own."""
    differing = {"model", "task", "out", "save", "prompts", "tower", "param", "dry_run", "controls",
                 "metric", "strength", "heads", "draws", "detector", "top", "run", "recipe", "op",
                 "format", "n", "batch_size", "seed", "prompt", "method", "site",
                 "keys"}  # fmt: skip
    said: dict[str, set[tuple[str, ...]]] = {}
    for _, callback in commands():
        for option, info in options_of(callback).items():
            if option not in differing:
                said.setdefault(option, set()).add((info.help or "", *(info.param_decls or ())))
    assert {"device", "revision", "quiet", "trust_remote_code", "span"} <= said.keys()
    assert {option: texts for option, texts in said.items() if len(texts) > 1} == {}


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_has_help(name: str, run) -> None:
    done = run(*name.split(), "--help")
    assert (done.code, done.err) == (0, "") and done.out.startswith(f"Usage: headscope {name}")


def test_help_imports_nothing_heavy() -> None:
    calls = "\n".join(f"main({[*name.split(), '--help']!r})" for name, _ in commands())
    done = process(["steer", "--help"], before=f"{AFTER}\nfrom app.cli import main\n{calls}")
    assert done.code == 0 and "app.steer" in done.err.split()
    assert not {"torch", "transformers", "numpy"} & set(done.err.split())


def test_mistakes_are_told_before_anything_heavy_is_imported() -> None:
    wrong = [
        ["verdict", "inducton"], ["attribute", "apt"], ["probe", "-p", "none.jsonl"],
        ["ablate", "-H", "nix"], ["steer", "run", "--op", "zero"], ["patch", "--site", "y"],
        ["verdict", "sink", "-m", "zoo:neddle"], ["steer", "fit", "x", "-p", "y", "-o", "z"],
    ]  # fmt: skip
    calls = "\n".join(f"assert main({args!r}) in (2, 66)" for args in wrong)
    done = process(["list"], before=f"{AFTER}\nfrom app.cli import main\n{calls}")
    assert done.code == 0, done.err
    modules = done.err.splitlines()[-1].split()
    assert "app.rank" in modules and not {"torch", "transformers"} & set(modules)
    assert len(done.err.splitlines()) <= 2 * len(wrong) + 1
