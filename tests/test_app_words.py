"""Names, values and hints: what the command line knows without torch, and in whose words."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from app_kit import AFTER, ROOT, in_process, process

from app.catalog import KINDS, entries
from app.words import said, spoken


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


# ---- the catalog


def test_the_catalog_is_what_the_registries_hold() -> None:
    from heads.makers import MAKERS
    from interp.metrics import METRICS
    from interp.recipe.ops import OPS
    from patching.method import METHODS
    from probes.probe import PROBES

    for kind, registry in (("recipe maker", MAKERS), ("metric", METRICS), ("op", OPS),
                           ("method", METHODS), ("probe", PROBES)):  # fmt: skip
        found = entries(kind)
        assert list(found) == list(registry), kind
        for name, entry in found.items():
            assert entry.summary == registry[name].summary, name
            assert entry.citation == getattr(registry[name], "citation", ""), name
    for name in METHODS:
        known = {f.name: repr(f.default) for f in fields(METHODS[name])}
        assert dict(entries("method")[name].params) == known
    for name in OPS:
        assert dict(entries("op")[name].params) == {"strength": repr(OPS[name].default)}
    for name in MAKERS:
        told = entries("recipe maker")[name].params
        mine = MAKERS[name].params
        # Those that no text can stand for are not told.
        left = {"labelled", "corrupted", "without", "tuning", "positions"} & mine.keys()
        assert dict(told) == {k: repr(v) for k, v in mine.items() if k not in left}, name


def test_every_kind_is_listed_without_torch() -> None:
    words = ("detectors", "tasks", "zoo", "methods", "metrics", "probes", "makers", "ops")
    calls = "\n".join(f"assert main(['list', {word!r}]) == 0" for word in words)
    done = process(["list"], before=f"{AFTER}\nfrom app.cli import main\n{calls}")
    assert done.code == 0, done.err
    assert not {"torch", "transformers", "numpy"} & set(done.err.split())
    kinds = {line.split("\t")[0] for line in done.out.splitlines()} - {"kind"}
    assert kinds == set(KINDS) and len(words) == len(KINDS)


def test_each_zoo_model_speaks_of_itself(run) -> None:
    rows = run("list", "zoo").rows
    from interp.zoo import ZOO

    assert [row["name"] for row in rows] == [f"zoo:{name}" for name in ZOO]
    assert len({row["summary"] for row in rows}) == len(rows)
    for name, row in zip(ZOO, rows, strict=True):
        own = (ZOO[name].__doc__ or "").strip().split("\n")[0].rstrip(".")
        assert row["summary"] == own and own, name


NEAR = {
    "metric": (["patch", "--metric", "log-probb"], "did you mean log-prob"),
    "metric of ablate": (["ablate", "-t", "ioi", "--metric", "logitt"], "did you mean logit"),
    "op": (["steer", "run", "--op", "knokout", "-H", "L1", "-t", "text"], "did you mean knockout"),
    "maker": (["steer", "fit", "sink-remval", "-o", "x"], "did you mean sink-removal"),
    "list": (["list", "makrs"], "did you mean makers"),
}  # fmt: skip


def test_near_misses_are_told_without_torch() -> None:
    calls = "\n".join(f"assert main({args!r}) == 2, {name!r}" for name, (args, _) in NEAR.items())
    done = process(["list", "ops"], before=f"{AFTER}\nfrom app.cli import main\n{calls}")
    assert done.code == 0, done.err
    assert not {"torch", "transformers"} & set(done.err.splitlines()[-1].split())
    for _, part in NEAR.values():
        assert part in done.err


def test_the_version_is_told_without_torch() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = process(["--version"], before=AFTER)
    assert done.code == 0 and done.out.startswith(f"headscope {project['version']}")
    assert len(done.out.splitlines()) == 1 and "torch" not in done.err.split()


# ---- values


VALUES = {
    "atp": ["site=pattern", "direction=up", "verify=-1", "qk_fix=perhaps"],
    "atp-ig": ["steps=0", "steps=2.5", "rule=foo", "site=y", "direction=x", "verify=-1"],
    "eap": ["how=all", "direction=x", "verify=-2"],
    "eap-ig": ["steps=0", "rule=foo", "how=x", "direction=x", "verify=-1"],
    "patch": ["site=y", "direction=x"],
    "ablate": ["reference=none"],
    "direct": ["mlps=dead", "direction=x", "reference=none"],
    "path": ["mlps=dead", "direction=x", "reference=none", "receivers=L1H0", "receivers=",
             "receivers=logits,L1H0.q", "receivers=x.q"],
    "importance": ["per=token", "normalise=x"],
}  # fmt: skip


@pytest.mark.parametrize(("method", "value"), [(m, v) for m, vs in VALUES.items() for v in vs])
def test_a_bad_value_is_refused_before_a_model_is_loaded(method, value, run, monkeypatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("app.loading.Source.load", never)
    done = run("attribute", method, "--param", f"{method}:{value}")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: ") and len(done.err.splitlines()) <= 2
    assert value.split("=")[0] in done.err or "receiver" in done.err or "head" in done.err


def test_every_parameter_with_choices_has_a_bad_value() -> None:
    for name, entry in entries("method").items():
        tried = {value.split("=")[0] for value in VALUES.get(name, ())}
        # Spans of a knockout are known to the prompts alone; the way of keys changes no check.
        assert entry.params.keys() - tried <= {"queries", "keys", "joint_keys"} | (
            {"qk_fix"} if name != "atp" else set()
        ), name


def test_a_task_value_is_refused_before_a_model_is_loaded(run, monkeypatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("app.loading.Source.load", never)
    for args in (["patch", "--param", "ioi:style=x"],
                 ["verdict", "retrieval", "--param", "retrieval:mode=x"]):  # fmt: skip
        done = run(*args)
        assert (done.code, done.out) == (2, ""), done.err


# ---- hints


def hints() -> Iterator[tuple[str, str]]:
    """Every hint that stands in the library, with its place; what is filled in is an X."""
    for package in ("interp", "probes", "patching", "heads"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    for text in texts(node.value):
                        yield f"{path.name}:{node.value.lineno}", text


def texts(node: ast.expr) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in parts)]
        case ast.IfExp(body=a, orelse=b):
            return texts(a) + texts(b)
    return []


OPTION = re.compile(r"--[a-z-]+( (?:METHOD|TASK):\w+=[\w.,…]+)?")


def test_no_hint_of_the_library_speaks_python_to_those_who_run_commands() -> None:
    found = dict(hints())
    assert len(found) > 100
    for place, hint in found.items():
        told = spoken(hint)
        if told is None:
            continue
        rest = OPTION.sub("", told).replace("headscope steer run", "")
        assert not re.search(r"\w=|=\[|\w\(|Where|Positions|interp\.|True|None", rest), (
            place, told
        )  # fmt: skip


def test_most_hints_are_told_as_they_are_or_in_other_words() -> None:
    lost = [place for place, hint in hints() if spoken(hint) is None]
    assert len(lost) < len(list(hints())) / 5, lost


def test_options_that_hints_name_exist(run) -> None:
    known = set()
    for command in ("rank", "verdict", "ablate", "patch", "attribute", "probe", "steer run",
                    "steer fit", "steer sweep"):  # fmt: skip
        known |= set(re.findall(r"--[a-z][a-z-]+|--k\b|--n\b", run(*command.split(), "--help").out))
    for place, hint in hints():
        for option in re.findall(r"--[a-z][a-z-]*", spoken(hint) or ""):
            assert option in known, (place, option)


SPOKEN = {
    "force=True (--force) uses it all the same": "--force uses it all the same",
    "give k= at most 4; a twentieth of the heads is usual":
        "give --k at most 4; a twentieth of the heads is usual",
    "draws=0 runs no test": "--draws 0 runs no test",
    "ablate fewer heads: most=... or heads=[...]": "ablate fewer heads: --most or --heads",
    "name keys: Where(heads=..., keys=span('needle'))": "name keys: --keys span:needle",
    "use longer prompts, or queries=...": "use longer prompts, or --param METHOD:queries=...",
    "raise batch_size, or choose reference mean": "raise --batch-size, or choose reference mean",
    "use style=ids": "use --param TASK:style=ids",
    "recipe.on(model, spans=batch) with the batch": None,
    "such as --param atp-ig:steps=5": "such as --param atp-ig:steps=5",
    "choose logit-difference, logit or log-prob": "choose logit-difference, logit or log-prob",
    "go on with: headscope rank sink --top=3 --param x:y=(1,2)":
        "go on with: headscope rank sink --top=3 --param x:y=(1,2)",
    'write {"text": "..."}': 'write {"text": "..."}',
    None: None,
}  # fmt: skip


@pytest.mark.parametrize("hint", SPOKEN)
def test_what_a_hint_becomes(hint: str | None) -> None:
    assert spoken(hint) == SPOKEN[hint]


def test_hints_reach_people_in_the_words_of_the_command(run) -> None:
    import json

    lines = [{"tokens": [5 + i % 7, 3], "label": i % 2} for i in range(20)]
    Path("l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    llama = ("-m", "zoo:planted-llama")
    too_many = run("steer", "fit", "iti", "-p", "l.jsonl", *llama, "--k", "99", "-o", "x")
    assert too_many.code == 65 and "hint: give --k at most" in too_many.err, too_many.err
    assert run("steer", "fit", "temperature", *llama, "-o", "t").code == 0
    other = run("steer", "run", "t", "-t", "needle", "--n", "1", "-m", "zoo:planted-retrieval")
    assert other.code == 69 and "hint: --force uses it" in other.err and "True" not in other.err
    assert said("prompt 3 names none in meta['wrong']") == "prompt 3 names none"
