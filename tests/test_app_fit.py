"""`steer fit` with every recipe maker: the recipe is that of the library, and is used as made."""

import json
from pathlib import Path

import pytest
import torch
from app_kit import in_process

from app.catalog import entries
from heads.makers import MAKERS, make_recipe
from interp.decode import generate
from interp.loading import load
from interp.recipe import Edit, Recipe, Where
from interp.tasks import make_task

NEEDLE, IOI = "zoo:needle", "zoo:planted-ioi"
TASK = ("-t", "needle", "--param", "needle:lengths=64", "-m", NEEDLE)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def prompts(n: int, seed: int = 0):
    return make_task("needle", {"lengths": "64"}).prompts(load(NEEDLE), n, seed=seed)


def same(made: Recipe, wanted: Recipe) -> None:
    """Two recipes do the same to the last bit, and say the same of themselves."""
    assert str(made) == str(wanted) and made.fingerprint == wanted.fingerprint
    mine, theirs = made.parameters(), wanted.parameters()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert json.loads(json.dumps(made.notes)) == json.loads(json.dumps(dict(wanted.notes)))


CASES = {
    "vhr": (("--span", "needle"), {"span": "needle"}),
    "vhr with numbers": (
        ("--param", "vhr:span=needle", "--param", "vhr:alpha=3", "--param", "vhr:layers=1,2"),
        {"span": "needle", "alpha": 3.0, "layers": (1, 2)},
    ),
    "vhr shared": (
        ("--span", "needle", "--param", "vhr:shared=yes"), {"span": "needle", "shared": True},
    ),
    "var": (
        ("--span", "needle", "-H", "L1,L2", "--param", "var:dims=1,2", "--param", "var:tau=0.5"),
        {"span": "needle", "dims": (1, 2), "tau": 0.5,
         "heads": [f"L{i}H{h}" for i in (1, 2) for h in range(4)]},
    ),
    "act": (
        ("--param", "act:beta=0.2", "--param", "act:layers=1,2"), {"beta": 0.2, "layers": (1, 2)},
    ),
    "act of heads": (("-H", "L1H1,L2H0"), {"heads": ("L1H1", "L2H0")}),
    "sink-removal": (("--param", "sink-removal:op=drop"), {"op": "drop"}),
    "vcd": (("--span", "needle", "--param", "vcd:beta=0.2"),
            {"span": "needle", "beta": 0.2, "seed": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_maker_looks_at_the_prompts_of_the_command(case: str, run) -> None:
    options, params = CASES[case]
    name = case.split()[0]
    done = run("steer", "fit", name, *TASK, "--n", "3", "--seed", "1", *options, "-o", "r")
    assert done.code == 0, done.err
    wanted = make_recipe(name, load(NEEDLE), prompts(3, seed=1), params)
    made = Recipe.load("r.safetensors")
    same(made, wanted)
    heads = {row["head"] for row in done.rows}
    assert heads == ({str(h) for h in wanted.heads} or ({"logits"} if name == "vcd" else {"all"}))
    if made.notes["examples"]:
        other = run("steer", "fit", name, *TASK, "--n", "3", "--seed", "2", *options, "-o", "s")
        assert other.code == 0 and Recipe.load("s.safetensors").hash != wanted.hash


def test_every_maker_is_named_by_the_command(run) -> None:
    """Each maker is covered by a test of this file or of its labels."""
    covered = {case.split()[0] for case in CASES} | {"function-vector", "iti"}
    blind = {name for name in MAKERS if not MAKERS[name].looks}
    assert covered | blind == set(MAKERS) == set(entries("recipe maker")) and "lqcd" in blind
    said = run("steer", "fit", "vrh", *TASK, "-o", "r").err
    assert "did you mean" in said and "vhr" in said


def test_own_prompts_are_looked_at_and_need_no_labels(run) -> None:
    lines = [{"tokens": list(p.tokens), "spans": {"it": [list(r) for r in p.spans["needle"]]}}
             for p in prompts(2)]  # fmt: skip
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ("steer", "fit", "vhr", "-m", NEEDLE, "--span", "it", "-o")
    assert run(*args, "a", "-p", "p.jsonl").code == 0
    made = Recipe.load("a.safetensors")
    wanted = make_recipe("vhr", load(NEEDLE), prompts(2), {"span": "needle"})
    assert made.heads == wanted.heads and made.notes["examples"] == ["line-1", "line-2"]
    for name, tensor in made.parameters().items():
        assert torch.equal(tensor, wanted.parameters()[name])


def test_a_temperature_looks_at_no_prompts(run) -> None:
    options = ("--param", "temperature:temperature=0.5,2", "-H", "L1H0,L2H1", "-m", NEEDLE)
    done = run("steer", "fit", "temperature", *options, "-o", "t")
    assert done.code == 0 and "for any prompts" in done.err
    params = {"temperature": (0.5, 2.0), "heads": ("L1H0", "L2H1")}
    same(Recipe.load("t.safetensors"), make_recipe("temperature", load(NEEDLE), (), params))
    assert {r["head"]: float(r["strength"]) for r in done.rows} == {"L1H0": 0.5, "L2H1": 2.0}
    words = run("steer", "fit", "lqcd", "--span", "x", "-m", NEEDLE, "-o", "w")
    same(Recipe.load("w.safetensors"), make_recipe("lqcd", load(NEEDLE), (), {"span": "x"}))
    assert [row["head"] for row in words.rows] == ["all", "logits"]
    every = run("steer", "fit", "temperature", "-m", NEEDLE, "-o", "u")
    assert [row["head"] for row in every.rows] == ["all"]
    assert run("steer", "fit", "temperature", *TASK, "-o", "v").code == 2
    assert not Path("v").exists()


def test_a_function_vector_is_made_of_pairs(run) -> None:
    args = ("steer", "fit", "function-vector", "-m", IOI, "--param", "function-vector:top=3")
    done = run(*args, "-t", "ioi", "--n", "5", "-o", "f")
    assert done.code == 0, done.err
    model = load(IOI)
    pairs = make_task("ioi").pairs(model, 5, seed=0)
    shown, bare = [p.clean for p in pairs], [p.corrupted for p in pairs]
    wanted = make_recipe("function-vector", model, shown, {"top": 3, "corrupted": bare})
    same(Recipe.load("f.safetensors"), wanted)
    scores = {r["head"]: float(r["score"]) for r in done.rows if r["score"]}
    assert scores == dict(wanted.notes["heads"]) and len(scores) == 3
    refused = run(*args, "-t", "needle", "-o", "g")
    assert refused.code == 2 and "needs a task of pairs" in refused.err


def test_each_prompt_meets_its_own_strengths(run) -> None:
    """A recipe that differs between prompts does in a command what it does in one batch."""
    small = ("--tokens", "5", "--windows", "2", "--controls", "0", "--batch-size", "2")
    run("steer", "fit", "vhr", *TASK, "--n", "3", "--span", "needle", "-o", "r",
        "--param", "vhr:alpha=8")  # fmt: skip
    recipe, model = Recipe.load("r.safetensors"), load(NEEDLE)
    [edit] = recipe.edits
    assert isinstance(edit.strength, torch.Tensor) and edit.strength.shape[1] == 3
    assert len({tuple(column.tolist()) for column in edit.strength.T}) > 1
    # As it was named, though its file has a suffix.
    done = run("steer", "run", "r", *TASK, "--n", "3", *small, "--format", "json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    for i, (row, prompt) in enumerate(zip(document["rows"], prompts(3), strict=True)):
        one = Recipe((Edit(edit.op, edit.where, strength=edit.strength[:, i].contiguous()),))
        with one.on(model):
            [alone] = generate(model, model.batch([prompt], side="left"), max_new_tokens=5)
        assert row["with"] == model.tokenizer.decode(list(alone))
    assert any("neutral text is not measured" in note for note in document["notes"])
    # Another number of prompts is refused: strengths would be repeated, as if for beams.
    for n in ("2", "6"):
        wrong = run("steer", "run", "r", *TASK, "--n", n, *small)
        assert wrong.code == 65 and "for 3 prompts" in wrong.err and wrong.out == ""
        swept = run("steer", "sweep", "r", *TASK, "--n", n, "--windows", "2", "--strengths", "1")
        assert swept.code == 65 and "for 3 prompts" in swept.err


def test_answers_are_measured_only_where_each_prompt_meets_its_own(run) -> None:
    [prompt] = prompts(1)
    for name, cut in (("alike", 0), ("unlike", 1)):
        lines = [{"tokens": list(prompt.tokens[x:]), "answer": list(prompt.answer)}
                 for x in (0, cut)]  # fmt: skip
        Path(name).write_text("\n".join(json.dumps(x | {"id": i}) for i, x in enumerate(lines)))
    strength = torch.tensor([[0.0, 1.0]])
    Recipe((Edit("scale", Where(heads=("L1H0",)), strength=strength),)).save(Path("r"))
    more = ("--windows", "2", "--controls", "0", "-m", NEEDLE, "--format", "json")
    alike = json.loads(run("steer", "sweep", "r", "-p", "alike", *more, "--strengths", "1").out)
    [row] = [r for r in alike["rows"] if r["measure"] == "KL on answers"]
    zero = Recipe((Edit("zero", Where(heads=("L1H0",))),)).save(Path("z"))
    both = json.loads(run("steer", "sweep", str(zero), "-p", "alike", *more,
                          "--strengths", "1").out)  # fmt: skip
    [whole] = [r for r in both["rows"] if r["measure"] == "KL on answers"]
    assert row["with"] == pytest.approx(whole["with"] / 2, rel=1e-6) and row["with"] > 0
    unlike = json.loads(run("steer", "sweep", "r", "-p", "unlike", *more, "--strengths", "1").out)
    assert any("answers are not measured" in note for note in unlike["notes"])


MISTAKES = {
    "no prompts": (["vhr"], 2, "vhr looks at prompts that will be run"),
    "no pairs": (["function-vector"], 2, "looks at a task or file of pairs"),
    "both": (["vhr", "-t", "needle", "-p", "p.jsonl"], 2, "exclude each other"),
    "option of labels": (["vhr", *TASK, "--k", "3"], 2, "--k does not go with vhr"),
    "its default": (["vhr", *TASK, "--k", "10"], 2, "--k does not go with vhr"),
    "tower": (["act", *TASK, "--tower", "text"], 2, "--tower does not go with act"),
    "probe": (["act", *TASK, "--probe", "ridge"], 2, "--probe does not go with act"),
    "span": (["act", *TASK, "--span", "needle"], 2, "--span does not go with act"),
    "heads": (["vhr", *TASK, "-H", "L1"], 2, "--heads does not go with vhr"),
    "task of iti": (["iti", "-t", "needle"], 2, "--task does not go with iti"),
    "param of iti": (["iti", "-p", "p.jsonl", "--param", "iti:k=3"], 2, "--param does not go"),
    "no labels": (["mean-difference"], 2, "needs labelled prompts"),
    "key": (["vhr", *TASK, "--param", "vhr:alhpa=3"], 2, "did you mean alpha"),
    "value": (["vhr", *TASK, "--param", "vhr:alpha=x"], 2, "vhr:alpha must be"),
    "prompts as a value": (["act", *TASK, "--param", "act:labelled=x"], 2, "no parameter of"),
    "task's key": (["act", *TASK, "--param", "needle:lenghts=3"], 2, "did you mean lengths"),
    "no span": (["vhr", *TASK], 65, "no span 'image'"),
    "range": (["act", *TASK, "--param", "act:threshold=2"], 65, "threshold lies in (0, 1)"),
    "pairs": (["vhr", "-p", "pairs.jsonl", "-m", NEEDLE], 65, "prompts are needed"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_a_line_and_no_file(case: str, run) -> None:
    Path("p.jsonl").write_text('{"tokens": [1, 2]}')
    Path("pairs.jsonl").write_text('{"clean": {"tokens": [1]}, "corrupted": {"tokens": [2]}}')
    args, code, part = MISTAKES[case]
    done = run("steer", "fit", *args, "-o", "r")
    assert (done.code, done.out) == (code, ""), done.err
    assert part in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 2
    assert not Path("r").exists() and not Path("r.safetensors").exists()
