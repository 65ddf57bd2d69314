"""`--dry-run` of the commands that act on heads, beside what the same command then does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from app_kit import Done, in_process

from app.catalog import entries
from app.counts import COSTS
from app.outlook import Work, padded
from interp.loading import load
from interp.prompts import Prompt
from interp.tasks import make_task

RETRIEVAL, IOI, INDUCTION, LLAMA = (
    f"zoo:planted-{name}" for name in ("retrieval", "ioi", "induction", "llama")
)
NEEDLE = ("-t", "needle", "--param", "needle:lengths=48,64", "-m", RETRIEVAL)
LOOKS = {(2, 12), (2, 24)}
"""Batches by which the library finds out how a model is built; they are always the same."""
Forwards = list[tuple[int, ...]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


@pytest.fixture
def forwards(monkeypatch) -> Iterator[Forwards]:
    """Shapes of the tokens of every forward of models that a command loads."""
    from app.loading import Source

    seen: Forwards = []
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
    yield seen


def told(run: Callable[..., Done], *args: str) -> dict[str, float]:
    """What a dry run counts; it leaves nothing and runs nothing."""
    done = run(*args, "--dry-run")
    assert done.code == 0 and "nothing was run" not in done.out, done.err
    assert "an estimate, from a short measurement" in done.err
    assert not Path("runs").exists()
    values = {row["quantity"]: float(row["value"]) for row in done.rows}
    assert values["memory for weights"] > 0 < values["memory for a batch"]
    assert (values["time"] > 0) == (values["tokens through the model"] > 0)
    return values


def passed(forwards: Forwards, since: int = 0) -> int:
    return sum(rows * columns for rows, columns in forwards[since:])


STEER = {
    "zero": ("--op", "zero", "-H", "L1H0"),
    "another batch": ("--op", "zero", "-H", "L1H0", "--batch-size", "2"),
    "more tokens": ("--op", "scale", "-H", "L1H0", "-s", "0.5", "--tokens", "6"),
    "one token": ("--op", "zero", "-H", "L0H1", "--tokens", "1", "--controls", "0"),
}


@pytest.mark.parametrize("case", STEER)
def test_steer_run(case: str, run, forwards: Forwards) -> None:
    args = ("steer", "run", *STEER[case], *NEEDLE, "--n", "3", "--windows", "3")
    if "--tokens" not in args:
        args += ("--tokens", "3")
    values = told(run, *args)
    assert (values["prompts"], values["neutral texts"]) == (3, 3)
    prompts = make_task("needle", {"lengths": "48,64"}).prompts(load(RETRIEVAL), 3, seed=0)
    assert values["tokens"] == sum(map(len, prompts))
    start = len(forwards)
    assert start == 0
    assert run(*args, "--no-save").code == 0
    assert passed(forwards) == values["tokens through the model"]
    n_controls = 0 if "--controls" in args else 3
    assert values["runs of a prompt"] == 2 * 3 + (2 + n_controls) * (3 + 3)
    tokens = int(args[args.index("--tokens") + 1])
    batches = 2 if "--batch-size" in args else 1
    assert values["decoding steps"] == 2 * batches * (tokens - 1)


@pytest.mark.parametrize("answers", [True, False])
def test_steer_sweep(answers: bool, run, forwards: Forwards) -> None:
    lines = [{"tokens": [1, *range(20, 20 + n)]} for n in (5, 5, 9)]
    Path("p.jsonl").write_text(
        "\n".join(json.dumps(x | ({"answer": [7, 8]} if answers else {})) for x in lines)
    )
    args = ("steer", "sweep", "--op", "zero", "-H", "L1H0", "-m", RETRIEVAL, "-p", "p.jsonl",
            "--strengths", "0,0.5,1", "--controls", "2", "--windows", "2")  # fmt: skip
    values = told(run, *args)
    assert run(*args, "--no-save").code == 0
    assert passed(forwards) == values["tokens through the model"]
    assert values["runs of a prompt"] == 3 * 4 * (2 + 3 * answers)
    assert values["tokens"] == 22


def test_probe(run, forwards: Forwards) -> None:
    lines = [{"tokens": [5 + i % 9] * (2 + i % 4), "label": i % 2} for i in range(30)]
    Path("l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ("probe", "-m", LLAMA, "-p", "l.jsonl", "--draws", "0", "--batch-size", "7")
    values = told(run, *args)
    assert run(*args, "--no-save").code == 0
    assert passed(forwards) == values["tokens through the model"] > values["tokens"]
    assert (values["prompts"], values["longest prompt"]) == (30, 5)


@pytest.mark.parametrize("more", [(), ("-H", "L1H3,L0H2"), ("--most", "2", "--controls", "3")])
def test_verdict(more: tuple[str, ...], run, forwards: Forwards) -> None:
    args = ("verdict", "induction", "-m", INDUCTION, "--n", "9", *more)
    values = told(run, *args)
    done = run(*args, "--no-save", "--format", "json")
    assert done.code == 0
    once = values["runs of a prompt"] / values["sets of heads"]
    assert once == values["prompts"] == 9
    most = values["tokens through the model"] * (
        1 + values["further sets"] / values["sets of heads"]
    )
    assert values["tokens to score"] < passed(forwards) <= most
    # The first forwards are those of the scores, and are counted exactly.
    scoring = 0
    while passed(forwards[: scoring + 1]) <= values["tokens to score"]:
        scoring += 1
    assert passed(forwards[:scoring]) == values["tokens to score"]
    ablating = passed(forwards, scoring) / values["tokens"]
    assert 2 <= ablating <= values["sets of heads"] + values["further sets"]
    heads = {(): 8, ("-H", "L1H3,L0H2"): 2}.get(more, 2)
    controls = 3 if "--controls" in more else 5
    assert values["heads"] == heads
    assert values["sets of heads"] == 1 + (heads + 1) * (1 + controls)


def test_a_verdict_on_scores_made_earlier_scores_nothing(run) -> None:
    assert run("rank", "induction", "-m", INDUCTION, "--n", "9", "--out", "scored").code == 0
    args = ("verdict", "induction", "-m", INDUCTION, "--n", "9", "--scores", "scored")
    assert told(run, *args)["tokens to score"] == 0
    assert told(run, *args[:-2])["tokens to score"] > 0


def test_every_method_of_patching_has_its_cost() -> None:
    assert set(COSTS) == set(entries("method"))


@pytest.mark.parametrize("method", sorted(entries("method")))
@pytest.mark.parametrize("few", [False, True])
def test_attribute_and_patch(method: str, few: bool, run) -> None:
    """No more goes through the last block than is told, and not much less."""
    from patching.method import make_method
    from patching.pairs import Pairs

    known = entries("method")[method].params
    params = {k: v for k, v in {"verify": "1", "steps": "3"}.items() if k in known and few}
    texts = [x for k, v in params.items() for x in ("--param", f"{method}:{k}={v}")]
    values = told(run, "attribute", method, "--n", "6", *texts)
    model = load(IOI)
    pairs = make_task("ioi").pairs(model, 6, seed=0)
    assert values["prompts"] == 12
    assert values["tokens"] == sum(len(p.clean) + len(p.corrupted) for p in pairs)
    if method == "copying":
        assert values["tokens through the model"] == 0  # it reads weights
        return
    made = make_method(method, params)
    made.scores(Pairs(model, pairs))  # what is found out about a model once is not counted
    block = model.hf.get_submodule(model.tower("text").layers[-1].name.rsplit(".", 1)[0])
    seen: Forwards = []

    def note(module, args, kwargs) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(x.shape[:2]))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    made.scores(Pairs(model, pairs))
    handle.remove()
    most = values["tokens through the model"]
    tail = 2 * sum(len(p.clean) for p in pairs) if method == "attribution" else 0
    assert most / 6 <= passed(seen) <= most + tail
    gradients = {"atp": 1, "eap": 1, "importance": 1}.get(method, int(params.get("steps", 5)))
    assert values.get("of these with gradients", 0) == (
        values["tokens"] / 2 * gradients if method in ("importance", "atp", "eap") or
        "steps" in known else 0
    )  # fmt: skip


def test_what_is_wrong_is_said_by_a_dry_run_too(run) -> None:
    for args, code in (
        (("attribute", "atp-ig", "--param", "atp-ig:steps=0"), 2),
        (("attribute", "atp", "-t", "needle"), 2),
        (("patch", "-H", "L9H9"), 2),
        (("verdict", "sink", "--tower", "vison"), 2),
        (("steer", "run", "--op", "zero", "-H", "L9H9", *NEEDLE), 2),
        (("steer", "run", "--op", "zero", "-H", "all", "-m", "zoo:neddle", *NEEDLE[:2]), 2),
        (("probe", "-p", "none.jsonl"), 66),
    ):
        done = run(*args, "--dry-run")
        assert (done.code, done.out) == (code, "") and len(done.err.splitlines()) <= 2, args


def test_batches_are_counted_with_their_padding() -> None:
    prompts = [Prompt((1,) * n, id=str(n)) for n in (3, 9, 5, 3, 4)]
    given = padded(prompts, 2, order="given")
    assert given == Work(5, 24, 9 * 2 + 5 * 2 + 4, 81 * 2 + 25 * 2 + 16, 0, 18, 9)
    ordered = padded(prompts, 2)
    assert (ordered.passed, ordered.widest) == (3 * 2 + 5 * 2 + 9, 10)
    equal = padded(prompts, 8, order="equal")
    assert (equal.passed, equal.squares, equal.widest) == (24, 2 * 9 + 81 + 25 + 16, 9)
    twice = given.run(3, backward=2)
    assert (twice.passed, twice.backward, twice.tokens, twice.widest) == (3 * 32, 2 * 32, 24, 18)
    both = given + equal
    assert (both.prompts, both.passed, both.widest, both.longest) == (10, 32 + 24, 18, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Zoo models as folders, which a dry run reads without their weights."""
    place = tmp_path_factory.mktemp("saved")
    for name in ("needle", "shapes-vit"):
        model = load(f"zoo:{name}")
        model.hf.save_pretrained(place / name)
        for part in (model.tokenizer, model.processor):
            if part is not None:
                part.save_pretrained(place / name)
    return place


FOLDER = {
    "capture": ("capture", "-t", "needle", "--n", "2"),
    "verdict": ("verdict", "retrieval", "-t", "needle", "--n", "2"),
    "patch": ("patch", "-t", "ioi", "--n", "2"),
    "attribute": ("attribute", "atp", "-t", "ioi", "--n", "2"),
    "ablate": ("ablate", "-H", "L1H0", "-t", "needle", "--n", "2"),
    "rank": ("rank", "retrieval", "-t", "needle", "--n", "2"),
}


@pytest.mark.parametrize("case", FOLDER)
def test_a_folder_is_counted_without_its_weights_as_the_model_itself(case, run, saved) -> None:
    folder = told(run, *FOLDER[case], "-m", str(saved / "needle"))
    itself = told(run, *FOLDER[case], "-m", "zoo:needle")
    measured = ("time",)
    assert {k: v for k, v in folder.items() if k not in measured} == {
        k: v for k, v in itself.items() if k not in measured
    }


def test_a_folder_of_a_model_of_images_is_counted(run, saved) -> None:
    args = ("rank", "vision-head-divergence", "--n", "2", "-m")
    folder = told(run, *args, str(saved / "shapes-vit"))
    assert folder["prompts"] == told(run, *args, "zoo:shapes-vit")["prompts"] == 2
    refused = run("rank", "sink", "-m", str(saved / "shapes-vit"), "--dry-run")
    assert refused.code == 65 and "reads images alone" in refused.err


def test_weights_of_zeros_keep_ties_and_take_no_memory() -> None:
    import torch
    from torch import nn

    resource = pytest.importorskip("resource")

    from app.outlook import hollow

    with torch.device("meta"):
        one, other = nn.Linear(1 << 15, 1 << 15, dtype=torch.bfloat16), nn.Linear(4, 4)
    other.weight = one.weight
    other.register_buffer("empty", torch.empty(0, 3, device="meta"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = hollow(nn.ModuleList([one, other]))
    assert made[0].weight is made[1].weight and made[0].weight.dtype == torch.bfloat16
    assert not made[0].weight[:3].any() and made[1].empty.shape == (0, 3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 19  # KiB; the weights would be 2 GiB
