"""Own pairs: the pairs of a task in a file give what the task gives; every mistake is a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from app_kit import Done, assert_refused, in_process, process

from interp.errors import PromptFileError
from interp.loading import load
from interp.pairfile import holds_pairs, parse, read_pairs, to_pairs
from interp.prompts import PromptPair
from interp.tasks import make_task

IOI, NEEDLE = "zoo:planted-ioi", "zoo:needle"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def as_line(pair: PromptPair) -> dict[str, object]:
    """A pair as a file holds it, the corrupted prompt without spans."""
    spans = {k: [list(r) for r in v] for k, v in pair.clean.spans.items() if k != "bos"}
    return {
        "clean": {"tokens": list(pair.clean.tokens), "spans": spans},
        "corrupted": {"tokens": list(pair.corrupted.tokens)},
        "answer": list(pair.clean.answer or ()), "wrong": [pair.clean.meta["wrong"]],
        "id": pair.clean.id,
    }  # fmt: skip


def write(path: str, lines: Sequence[object]) -> str:
    Path(path).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def ioi_file(n: int = 4) -> str:
    return write("own.jsonl", [as_line(p) for p in make_task("ioi").pairs(load(IOI), n, seed=0)])


SAME = {
    "patch": ("patch",),
    "denoise a site": ("patch", "--site", "k", "--direction", "denoise"),
    "attribute": ("attribute", "atp", "--param", "atp:verify=2"),
    "spans": ("attribute", "knockout", "--param", "knockout:keys=s1"),
    "mean": ("ablate", "--reference", "mean"),
    "resample": ("ablate", "--reference", "resample", "--metric", "log-prob"),
    "joint": ("ablate", "--joint", "-H", "L2H0,L2H1", "--reference", "mean", "--controls", "2"),
}


@pytest.mark.parametrize("case", SAME)
def test_own_pairs_are_measured_as_those_of_a_task(case: str, run) -> None:
    file, more = ioi_file(), (*SAME[case], "-m", IOI)
    task = make_task("ioi").pairs(load(IOI), 4, seed=0)
    if case == "spans":
        assert "s1" in task[0].clean.spans
    wanted = run(*more, "--no-save", "-t", "ioi", "--n", "4")
    found = run(*more, "--no-save", "-p", file)
    assert found.code == wanted.code == 0, found.err + wanted.err
    assert found.out == wanted.out and len(found.rows) > 2
    # Of each, what was corrupted counts: another corruption is another run with other numbers.
    lines = [as_line(p) for p in task]
    for line, pair in zip(lines, task, strict=True):
        other = [t if t == u else line["wrong"][0] for t, u in
                 zip(pair.clean.tokens, pair.corrupted.tokens, strict=True)]  # fmt: skip
        assert other != list(pair.corrupted.tokens)
        line["corrupted"] = {"tokens": other}
    run(*more, "-p", file)
    changed = run(*more, "-p", write("own.jsonl", lines))
    assert "nothing was computed" not in changed.err and len(list(Path("runs").iterdir())) == 2
    if case not in ("spans",):
        assert changed.out != found.out


def test_ablate_tells_pairs_from_prompts_by_the_first_line(run) -> None:
    pair = as_line(make_task("ioi").pairs(load(IOI), 1, seed=0)[0])
    prompts = write("p.jsonl", [{**pair["clean"], "answer": pair["answer"]}])
    alone = run("ablate", "-m", IOI, "-p", prompts, "-H", "L2H0", "--format", "json")
    paired = run("ablate", "-m", IOI, "-p", ioi_file(1), "-H", "L2H0", "--format", "json")
    units = [next(iter(json.loads(x.out)["methods"].values()))["unit"] for x in (alone, paired)]
    assert units == ["change of log-probability (nats)", "change of logit-difference (logits)"]
    assert run("ablate", "-m", IOI, "-p", prompts, "--reference", "mean").code == 2


def test_pairs_come_from_stdin(run, monkeypatch) -> None:
    import io
    import sys

    file = ioi_file()
    wanted = run("patch", "-p", file, "--no-save")
    for args in (("patch",), ("ablate", "-m", IOI, "-H", "all")):
        from_file = run(*args, "-p", file, "--no-save")
        stdin = SimpleNamespace(buffer=io.BytesIO(Path(file).read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        done = run(*args, "-p", "-", "--no-save")
        assert done.code == 0 and done.out == from_file.out, done.err
    assert wanted.rows


def test_a_dry_run_counts_own_pairs(run) -> None:
    told = run("patch", "-p", ioi_file(3), "-H", "L1", "--dry-run")
    values = {r["quantity"]: float(r["value"]) for r in told.rows}
    assert (values["prompts"], values["heads"], values["runs of a prompt"]) == (6, 4, 3 * (2 + 4))


# ---- text


def words(n: int) -> list[str]:
    """Words that are one token each for the model of `NEEDLE`."""
    model = load(NEEDLE)
    known = sorted(w for w in model.tokenizer.get_vocab() if w.isalpha() and len(w) > 3)
    return [w for w in known if len(model.tokenizer(w).input_ids) <= 2][:n]


def test_text_is_tokenised_and_the_corrupted_prompt_has_the_same_spans(run) -> None:
    model = load(NEEDLE)
    a, b, c, d = words(4)
    clean, corrupted = f"{a} {b} {c}", f"{a} {d} {c}"
    line = {
        "clean": {"text": clean, "spans": {"it": b}, "answer": a}, "corrupted": corrupted,
        "wrong": d,
    }  # fmt: skip
    [pair] = read_pairs(write("x.jsonl", [line]), model)
    assert pair.clean.id == "line-1"
    for prompt, text in ((pair.clean, clean), (pair.corrupted, corrupted)):
        assert list(prompt.tokens) == model.tokenizer(text).input_ids
        bare = {word: tuple(model.tokenizer(word, add_special_tokens=False).input_ids)
                for word in (a, d)}  # fmt: skip
        assert prompt.answer == bare[a] and prompt.meta["wrong"] == bare[d][0]
    assert pair.clean.spans == pair.corrupted.spans and "it" in pair.clean.spans
    own = {**line, "corrupted": {"text": corrupted, "spans": {"it": c, "more": a}}}
    [pair] = to_pairs(parse(json.dumps(own).encode(), "x"), model)
    [(start, stop)] = pair.corrupted.spans["it"]
    assert model.tokenizer.decode(pair.corrupted.tokens[start:stop]).strip() == c
    assert "more" not in pair.clean.spans
    assert run("patch", "-m", NEEDLE, "-p", "x.jsonl").code == 0


def test_which_files_hold_pairs() -> None:
    for data, found in (
        (b'\n \n{"clean": "a"}', True), (b'\xef\xbb\xbf{"corrupted": 1}', True), (b"", False),
        (b'{"text": "clean"}', False), (b"[1]", False), (b"clean", False), (b'{"clean"', False),
    ):  # fmt: skip
        assert holds_pairs(data) is found, data


GOOD = {"clean": {"tokens": [1, 2]}, "corrupted": {"tokens": [1, 3]}, "answer": [4], "wrong": [5]}
MODEL_LESS = {
    "broken": ([GOOD, '{"clean": "a"'], "line 2: every line must be JSON"),
    "huge number": ([GOOD, '{"clean": ' + "1" * 5000 + "}"], "line 2: every line must be JSON"),
    "a list": ([GOOD, [1]], "line 2: every line must be a JSON mapping"),
    "a prompt": ([GOOD, {"text": "a"}], "line 2: pairs of prompts are needed"),
    "key": ([{**GOOD, "wrnog": 1}], "line 1: there is no key 'wrnog' in a pair"),
    "key inside": ([{**GOOD, "clean": {"txet": "a"}}], "line 1, clean: there is no key 'txet'"),
    "key twice": (['{"clean": "a", "clean": "b"}'], "'clean' stands twice"),
    "one": ([{"clean": "a", "answer": "b"}], "corrupted must be a text or a prompt; got null"),
    "number": ([{**GOOD, "corrupted": 3}], "corrupted must be a text or a prompt; got 3"),
    "empty": ([{**GOOD, "clean": ""}], "clean: text must be a text that is not empty"),
    "ids": ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], "line 2: ids must all be different; 'x'"),
    "id inside": ([{**GOOD, "clean": {"tokens": [1], "id": "a"}}], "a pair has one id"),
    "two answers": ([{**GOOD, "clean": {"tokens": [1, 2], "answer": [3]}}], "has one answer"),
    "answer of corrupted": (
        [{**GOOD, "corrupted": {"tokens": [1, 3], "answer": [3]}}], "that of its clean prompt",
    ),
    "answer": ([{**GOOD, "answer": ""}], "answer must be a text or token ids"),
    "wrong": ([{**GOOD, "wrong": [1.5]}], "wrong must be a text or token ids"),
    "no answer": ([GOOD, {k: v for k, v in GOOD.items() if k != "answer"}],
                  "line 2: metric 'logit-difference' needs \"answer\""),
    "no wrong": ([GOOD, {k: v for k, v in GOOD.items() if k != "wrong"}],
                 "line 2: metric 'logit-difference' needs \"wrong\""),
    "nothing": ([""], "must hold at least one prompt"),
}  # fmt: skip
WITH_MODEL = {
    "lengths": ([GOOD, {**GOOD, "corrupted": {"tokens": [1, 3, 6]}}],
                "line 2: clean and corrupted must have equally many tokens; got 2 and 3"),
    "same beginning": ([{**GOOD, "wrong": [4, 6]}], "line 1: answer and wrong must begin with"),
    "token outside": ([{**GOOD, "wrong": [999999]}], "line 1: token ids must lie in 0.."),
    "token of a prompt outside": (
        [{**GOOD, "corrupted": {"tokens": [1, 999999]}}], "line 1, corrupted: token ids must lie",
    ),
    "text": ([{**GOOD, "clean": "a b"}], "line 1, clean: the tokenizer of"),
}  # fmt: skip


def refused(done: Done, part: str) -> None:
    assert_refused(done, part)
    assert len(done.err.splitlines()) <= 2 and "x.jsonl" in done.err, done.err


@pytest.mark.parametrize("case", [*MODEL_LESS, *WITH_MODEL])
@pytest.mark.parametrize("command", [("patch",), ("attribute", "atp"), ("ablate", "-m", IOI)])
def test_a_mistake_in_a_file_of_pairs_is_a_line(case: str, command, run, monkeypatch) -> None:
    lines, part = {**MODEL_LESS, **WITH_MODEL}[case]
    file = write("x.jsonl", lines)
    if case in MODEL_LESS:

        def never(*args: object, **options: object) -> None:
            raise AssertionError("the model was loaded")

        monkeypatch.setattr("app.loading.Source.load", never)
        if command[0] == "ablate" and not holds_pairs(Path(file).read_bytes()):
            pytest.skip("read as prompts")
    refused(run(*command, "-p", file), part)


def test_a_metric_takes_what_it_needs_and_no_more(run) -> None:
    bare = {k: v for k, v in GOOD.items() if k != "wrong"}
    file = write("x.jsonl", [bare])
    for metric in ("log-prob", "logit", "prob", "accuracy"):
        done = run("patch", "-p", file, "--metric", metric, "--no-save")
        assert done.code == 0, done.err
    assert "--metric log-prob" in run("patch", "-p", file).err
    done = run("patch", "-p", write("x.jsonl", [GOOD, bare]), "--metric", "log-prob")
    assert done.code == 0 and all(row["n"] == "2" for row in done.rows)


def test_lengths_that_differ_are_shown_where_they_part() -> None:
    a, b, c, d = words(4)
    line = {"clean": f"{a} {b}", "corrupted": f"{a} {c} {d}"}
    with pytest.raises(PromptFileError) as error:
        to_pairs(parse(json.dumps(line).encode(), "x.jsonl"), load(NEEDLE))
    assert b in (error.value.hint or "") and c in (error.value.hint or "")
    assert a not in (error.value.hint or "")


def test_pairs_where_prompts_are_needed_are_said_to_be(run) -> None:
    file = write("x.jsonl", [GOOD])
    steer = ("steer", "run", "--op", "zero", "-H", "L0")
    for command in (("rank", "sink"), ("verdict", "sink"), steer):
        refused(run(*command, "-p", file), "prompts are needed; these are pairs")
    both = run("patch", "-p", file, "-t", "ioi")
    assert both.code == 2 and "exclude each other" in both.err
    assert run("patch", "-p", "none.jsonl").code == 66


def test_mistakes_in_pairs_are_told_without_torch() -> None:
    write("x.jsonl", [{**GOOD, "wrnog": 1}])
    code = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = process(["patch", "-p", "x.jsonl"], before=code)
    assert done.code == 65 and done.err.splitlines()[-1] == "False"


# ---- images


def test_a_run_is_of_its_images_not_of_their_names() -> None:
    import torch

    from app.keep import digest
    from interp.prompts import Prompt

    def one(value: float, **more: object) -> str:
        return digest([Prompt((1, 2), id="a", inputs={"pixel_values": torch.full((1, 3), value)})])

    assert one(0.5) == one(0.5) != one(0.25)
    flag = [Prompt((1, 2), id="a", inputs={"x": torch.tensor(v)}) for v in (True, False)]
    assert digest(flag[:1]) != digest(flag[1:])
