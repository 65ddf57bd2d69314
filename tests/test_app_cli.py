"""The command line: data on stdout, exit codes, one-line errors, runs that survive any end."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from app_kit import (
    AFTER,
    assert_refused,
    environment,
    files,
    in_process,
    only_run,
    posix,
    process,
    tokens_line,
)

from app.catalog import entries
from app.tables import Format, Part, Table, write
from interp.run import Run
from interp.scores import COLUMNS

MODEL = "zoo:planted-induction"
FAST = ("-m", MODEL, "--n", "8")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def score_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "scores").iterdir())}


# ---- what is imported


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (["--help"], {"torch", "transformers", "numpy"}),
        (["rank", "--help"], {"torch", "transformers", "numpy"}),
        (["list"], {"torch", "transformers", "numpy"}),
        (["rank", "inducton"], {"torch", "transformers", "numpy"}),
        (["rank", "induction", "-m", "zoo:neddle"], {"torch", "transformers", "numpy"}),
        (["rank", "induction", "--prompts", "none.txt"], {"torch", "transformers"}),
        (["show", "none"], {"torch", "transformers"}),
    ],
)
def test_nothing_heavy_is_imported_for(args: list[str], absent: set[str]) -> None:
    done = process(args, before=AFTER)
    assert "app.rank" in done.err.split()  # the list of modules is there
    assert not absent & set(done.err.split())


def test_saved_runs_are_read_without_torch(run) -> None:
    assert run("rank", "induction", *FAST).code == 0
    folder = str(only_run())
    for args in (["show", folder], ["compare", folder, folder]):
        done = process(args, before=AFTER)
        assert done.code == 0 and done.out
        assert not {"torch", "transformers"} & set(done.err.split())


def test_the_catalog_is_what_the_registries_hold() -> None:
    from dataclasses import fields

    from heads.detector import DETECTORS
    from interp.tasks import TASKS
    from interp.zoo import ZOO

    for kind, registry in (("detector", DETECTORS), ("task", TASKS), ("zoo model", ZOO)):
        assert list(entries(kind)) == list(registry)
    for kind, registry in (("detector", DETECTORS), ("task", TASKS)):
        for name, entry in entries(kind).items():
            assert entry.summary == registry[name].summary
            known = {f.name: repr(f.default) for f in fields(registry[name])}
            assert dict(entry.params) == known
    for name, entry in entries("detector").items():
        assert (entry.task, entry.citation) == (DETECTORS[name].task, DETECTORS[name].citation)
    assert all(entry.summary for entry in entries("zoo model").values())


# ---- data


def test_rank_finds_the_planted_heads_and_writes_nothing_but_data(run) -> None:
    done = run("rank", "induction", "previous-token", "duplicate-token", *FAST)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split("\t") == list(COLUMNS)
    assert all(len(line.split("\t")) == len(COLUMNS) for line in lines) and len(lines) == 1 + 36
    found: dict[str, set[str]] = {}
    for row in done.rows:
        if row["verdict"] == row["detector"]:
            found.setdefault(row["detector"], set()).add(row["head"])
    from interp.zoo import ZOO

    truth = ZOO["planted-induction"]().truth.heads
    asked = ("induction", "previous-token", "duplicate-token")
    assert found == {name: set(map(str, truth[name])) for name in asked if truth.get(name)}
    assert "saved: runs/" in done.err and "induction:" in done.err


def test_what_a_library_prints_does_not_reach_stdout(run, monkeypatch) -> None:
    import interp.loading
    from heads import scoring

    def loud(verb):
        def call(*args: object, **options: object) -> object:
            print("noise")
            return verb(*args, **options)

        return call

    for module, name in ((interp.loading, "load"), (scoring, "plan"), (scoring, "execute")):
        monkeypatch.setattr(module, name, loud(getattr(module, name)))
    done = run("rank", "induction", *FAST)
    assert "noise" not in done.out and done.err.count("noise") == 3


def test_every_format_holds_the_same_numbers(run) -> None:
    command = ("rank", "induction", "sink", *FAST, "--format")
    document = json.loads(run(*command, "json").out)
    assert (document["schema"], document["version"]) == ("headscope.rank", 1)
    assert document["run"] == str(only_run())
    assert document["detectors"]["sink"]["params"] == {"epsilon": 0.3, "queries": 16}
    rows = document["rows"]
    assert [row["detector"] for row in rows] == ["induction"] * 12 + ["sink"] * 12
    assert [json.loads(line) for line in run(*command, "jsonl").out.splitlines()] == rows
    plain = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert run(*command, "tsv").rows == plain
    assert list(csv.DictReader(io.StringIO(run(*command, "csv").out))) == plain
    for name in ("induction", "sink"):
        scores = [r["score"] for r in rows if r["detector"] == name and r["score"] is not None]
        assert scores == sorted(scores, reverse=True)
    drawn = run(*command, "table").out
    assert "L1H3" in drawn and "q <= 0.05" in drawn and "…" not in drawn


def test_the_order_of_the_command_is_the_order_of_the_answer(run) -> None:
    first = run("rank", "sink", "induction", *FAST).rows
    assert [row["detector"] for row in first] == ["sink"] * 12 + ["induction"] * 12
    again = run("rank", "sink", "induction", *FAST).rows
    assert again == first


def test_detectors_in_one_pass_score_as_alone(run) -> None:
    both = run("rank", "induction", "previous-token", *FAST).rows
    alone = run("rank", "previous-token", *FAST).rows
    assert [row for row in both if row["detector"] == "previous-token"] == alone


def test_top_keeps_the_strongest_of_each_detector(run) -> None:
    whole = run("rank", "induction", "sink", *FAST).rows
    top = run("rank", "induction", "sink", *FAST, "--top", "2").rows
    assert top == whole[:2] + whole[12:14]


def test_what_is_undefined_is_null_and_says_why(run) -> None:
    args = ("rank", "retrieval", "-m", "zoo:planted-retrieval-broken", "--n", "4")
    document = json.loads(run(*args, "--format", "json").out)
    assert {row["score"] for row in document["rows"]} == {None}
    assert {row["verdict"] for row in document["rows"]} == {"undefined"}
    assert len(document["detectors"]["retrieval"]["failures"]) == 4
    done = run(*args)
    assert "no successful run" in done.err
    assert {row["score"] for row in done.rows} == {""}


def test_no_text_can_break_a_row_of_tsv(capsys) -> None:
    rows = [{"a": "x\ty\nz", "b": float("nan")}, {"a": '"q"', "b": 0.1}]
    write(Table("s", ("a", "b"), [Part("t", rows)]), Format.tsv)
    assert capsys.readouterr().out == 'a\tb\nx y z\t\n"q"\t0.1\n'


def test_markup_in_a_cell_is_only_text(capsys) -> None:
    rows = [{"a": "[red]x[/INST]"}]
    write(Table("s", ("a",), [Part("[bold]t", rows, note="[/n]")]), Format.table)
    out = capsys.readouterr().out
    assert "[red]x[/INST]" in out and "[bold]t" in out and "[/n]" in out


def test_a_long_table_says_what_it_leaves_out(capsys) -> None:
    rows = [{"a": i} for i in range(30)]
    write(Table("s", ("a",), [Part("t", rows)]), Format.table)
    out = capsys.readouterr().out
    assert " 19" in out and " 20 " not in out and "10 more rows: --top 30" in out


@posix
def test_a_terminal_gets_a_drawn_table() -> None:
    import pty

    main_end, other = pty.openpty()
    code = "import sys; from app.cli import main; sys.exit(main(['list', 'tasks']))"
    child = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=other)
    os.close(other)
    seen = b""
    try:
        while piece := os.read(main_end, 4096):
            seen += piece
    except OSError:  # Linux: the other end was closed
        pass
    os.close(main_end)
    assert child.wait() == 0
    assert "─" in seen.decode() and b"\t" not in seen and b"repeated-tokens" in seen


# ---- prompts and parameters


def test_own_prompts_from_a_file_and_from_stdin_are_the_same_run(run) -> None:
    text = f"{tokens_line(id='a')}\n{tokens_line(id='b')}\n"
    Path("p.jsonl").write_text(text)
    args = ("rank", "induction", "-m", MODEL, "--prompts")
    from_file = run(*args, "p.jsonl")
    assert from_file.code == 0 and {row["n"] for row in from_file.rows} == {"2"}
    assert from_file.rows[0]["head"] == "L1H3"
    from_stdin = process([*args, "-"], stdin=text)
    assert from_stdin.out == from_file.out
    assert "nothing was computed" in from_stdin.err


def test_parameters_reach_detector_and_task(run) -> None:
    args = ("rank", "induction", *FAST, "--format", "json")
    given = run(*args, "--param", "induction:copies=0.2", "--param", "repeated-tokens:length=9")
    facts = json.loads(given.out)["detectors"]["induction"]
    assert facts["params"]["copies"] == 0.2
    # The detector's own task with its own parameters, one of them changed.
    assert facts["provenance"]["tasks"][0]["task"] == (
        "RepeatedTokens(length=9, repeats=4, vary=True)"
    )
    named = run(*args, "--task", "repeated-tokens", "--param", "repeated-tokens:length=9")
    task = json.loads(named.out)["detectors"]["induction"]["provenance"]["tasks"][0]["task"]
    assert task == "RepeatedTokens(length=9, repeats=4, vary=False)"


# ---- mistakes


MISTAKES = {
    "no command": ([], 2, ""),
    "command": (["rnak"], 2, "Did you mean 'rank'"),
    "option": (["rank", "sink", "--modle", "x"], 2, "--model"),
    "no detector": (["rank"], 2, "DETECTOR"),
    "detector": (["rank", "inducton"], 2, "did you mean induction"),
    "detector twice": (["rank", "sink", "sink"], 2, "asked for once"),
    "zoo model": (["rank", "sink", "-m", "zoo:planted-snik"], 2, "did you mean planted-sink"),
    "hub model": (["rank", "sink", "-m", "nobody/nothing"], 69, "no model could be loaded"),
    "folder": (["rank", "sink", "-m", "."], 69, "must hold config.json"),
    "task": (["rank", "sink", "-t", "txet"], 2, "did you mean text"),
    "task and prompts": (["rank", "sink", "-t", "text", "-p", "x"], 2, "exclude each other"),
    "device": (["rank", "sink", "-m", MODEL, "--device", "tpu"], 69, "device must be auto"),
    "no such device": (["rank", "sink", "-m", MODEL, "--device", "cuda:99"], 69, "not available"),
    "dtype": (["rank", "sink", "--dtype", "int8"], 2, "must be one of auto, float32"),
    "format": (["list", "--format", "xml"], 2, "'xml'"),
    "n": (["rank", "sink", "--n", "0"], 2, "--n"),
    "tower": (["rank", "sink", *FAST, "--tower", "txt"], 2, "did you mean text"),
    "param form": (["rank", "sink", "--param", "epsilon=1"], 2, "NAME:KEY=VALUE"),
    "param owner": (["rank", "sink", "--param", "snik:epsilon=1"], 2, "did you mean sink"),
    "param name": (["rank", "sink", "--param", "sink:epsilom=1"], 2, "did you mean epsilon"),
    "param value": (["rank", "sink", *FAST, "--param", "sink:epsilon=x"], 2, "must be a float"),
    "param refused": (["rank", "sink", *FAST, "--param", "sink:epsilon=2"], 2, "must lie in"),
    "param twice": (
        ["rank", "sink", "--param", "sink:epsilon=.3", "--param", "sink:epsilon=.4"],
        2,
        "given twice",
    ),
    "list": (["list", "detectrs"], 2, "did you mean detectors"),
    "no prompt file": (["rank", "sink", "-p", "none.txt"], 66, "there is no such file"),
    "no run": (["show", "none"], 66, "there is no run 'none'"),
    "not a run": (["show", "."], 65, "not a run folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_has_its_code_and_one_line(case: str, run) -> None:
    args, code, part = MISTAKES[case]
    done = run(*args)
    assert done.code == code, done.err
    assert part in done.err and "Traceback" not in done.err
    assert done.out == "" or case == "no command"
    lines = done.err.splitlines()
    assert len(lines) <= 2 and all(x.startswith(("error: ", "hint: ")) for x in lines)
    assert not Path("runs").exists()


FILES = {
    "empty": ("p.txt", b"\n", "p.txt: a prompt file must hold at least one prompt"),
    "broken": ("p.jsonl", b'{"tokens": [1]}\n{"tok', "p.jsonl, line 2: every line must be JSON"),
    "not utf-8": ("p.txt", b"a\n\xff\n", "p.txt, line 2: prompts must be UTF-8"),
    "no tokenizer": ("p.txt", b"some text\n", "p.txt, line 1: text needs a tokenizer"),
    "too long": (
        "p.jsonl",
        json.dumps({"tokens": [5] * 5000, "spans": {"needle": [[1, 3]]}, "id": "q"}).encode(),
        "prompt q has 5000 tokens",
    ),
    "unknown id": ("p.jsonl", b'{"tokens": [99999]}', "p.jsonl, line 1: token ids must lie in"),
    "no needle": ("p.jsonl", b'{"tokens": [5, 6], "id": "q"}', "needs span 'needle'; prompt q"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_prompt_file_is_65_and_names_the_place(case: str, run, nan_model: str) -> None:
    name, data, part = FILES[case]
    Path(name).write_bytes(data)
    model = nan_model if case == "no tokenizer" else "zoo:planted-retrieval"
    done = run("rank", "retrieval", "-m", model, "-p", name)
    assert (done.code, done.out) == (65, ""), done.err
    assert part in done.err and len(done.err.splitlines()) <= 2


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory) -> str:
    """A saved Llama without tokenizer, with one weight that is NaN."""
    import torch

    from interp.zoo import ZOO

    hf = ZOO["planted-llama"]().hf
    with torch.no_grad():
        hf.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    folder = tmp_path_factory.mktemp("nan")
    hf.save_pretrained(folder)
    return str(folder)


def test_nan_weights_are_refused(run, nan_model: str) -> None:
    done = run("rank", "sink", "-m", nan_model, "--n", "4")
    assert (done.code, done.out) == (69, "") and "NaN" in done.err


def test_doctor_answers_with_its_exit_code(run, nan_model: str) -> None:
    fine = run("doctor", "-m", MODEL)
    assert fine.code == 0 and "FAIL" not in fine.out
    assert fine.out.splitlines()[0] == "check\tresult\tworst\tlimit\tnote"
    ill = run("doctor", "-m", nan_model, "--format", "json")
    document = json.loads(ill.out)
    assert ill.code == 1 and document["ok"] is False
    assert any(row["result"] == "FAIL" and "NaN" in row["note"] for row in document["rows"])


def test_an_unexpected_error_is_a_line_and_a_trace_only_if_asked(run, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("heads.scoring.execute", broken)
    done = run("rank", "sink", *FAST)
    assert (done.code, done.out) == (70, "")
    assert "internal error: ZeroDivisionError: a bug" in done.err
    assert "Traceback" not in done.err and "--debug" in done.err
    assert "Traceback" in run("rank", "sink", *FAST, "--debug").err


def test_too_little_memory_is_69_with_the_next_thing_to_try(run, monkeypatch) -> None:
    import torch

    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("heads.measuring.read", full)
    done = run("rank", "sink", *FAST)
    assert done.code == 69 and "--dtype bfloat16" in done.err
    assert "2 prompts at once do not fit into memory; going on with 1" in done.err


# ---- runs


def test_the_same_command_again_computes_nothing(run, monkeypatch) -> None:
    first = run("rank", "induction", *FAST)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(only_run())}

    def never(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("heads.scoring.execute", never)
    again = run("rank", "induction", *FAST)
    assert (again.code, again.out) == (0, first.out)
    assert "nothing was computed" in again.err
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(only_run())}
    # Anything the numbers depend on is another run.
    assert run("rank", "induction", *FAST, "--seed", "1").code == 70


def test_quiet_and_no_save(run) -> None:
    done = run("rank", "induction", *FAST, "--quiet", "--no-save")
    assert done.code == 0 and done.err == "" and len(done.rows) == 12
    assert not Path("runs").exists()


def test_show_and_compare_read_what_rank_wrote(run) -> None:
    ranked = run("rank", "induction", "previous-token", *FAST)
    folder = only_run()
    assert run("show", folder.name).out == ranked.out  # by name under runs/
    assert run("show", str(folder), "--detector", "induction").rows == ranked.rows[:12]
    assert run("show", str(folder / "scores/induction.safetensors")).rows == ranked.rows[:12]
    missing = run("show", str(folder), "--detector", "inductoin")
    assert missing.code == 2 and "did you mean induction" in missing.err
    run("rank", "induction", *FAST, "--seed", "1", "--out", "other")
    [row] = run("compare", str(folder), "other", "--top", "1").rows
    assert (row["shared"], row["expected"], row["corrected"]) == ("1", repr(1 / 12), "1.0")
    document = json.loads(run("compare", str(folder), "other", "--format", "json").out)
    [differences] = document["differences"].values()
    values = {row["head"]: float(row["score"]) for row in ranked.rows[:12]}
    assert {d["head"]: d["base"] for d in differences} == values
    both = [str(folder / f"scores/{d}.safetensors") for d in ("induction", "previous-token")]
    assert run("compare", *both).rows[0]["base"].startswith("induction on")
    run("rank", "sink", *FAST, "--out", "third")
    assert run("compare", str(folder), "third").code == 2


def test_damaged_and_newer_runs_are_refused_in_a_line(run) -> None:
    run("rank", "induction", *FAST, "--out", "r")
    info = Path("r/run.json")
    good = json.loads(info.read_text())
    info.write_text("{")
    assert_refused(run("show", "r"), "damaged")
    assert_refused(run("rank", "induction", *FAST, "--out", "r"), "damaged")
    info.write_text(json.dumps(good | {"version": 99}))
    assert_refused(run("show", "r"), "version 99")
    info.write_text(json.dumps(good))
    table = Path("r/scores/induction.safetensors")
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    assert_refused(run("show", "r"), "damaged")
    assert_refused(run("rank", "sink", *FAST, "--out", "r"), "holds another run")


STOP = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from interp.run import Run
put = Run.put_part
def stopping(self, i, *rest):
    put(self, i, *rest)
    if i == 2:
        os.kill(os.getpid(), signal.{signal})
Run.put_part = stopping
"""
MANY = ["rank", "induction", "previous-token", "-m", MODEL, "--n", "6", "--batch-size", "1"]


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(name: str, run) -> None:
    stopped = process([*MANY, "--out", "cut"], before=STOP.format(signal=name))
    assert stopped.out == ""
    cut = Run.load("cut")
    assert sorted(cut.finished) == [0, 1, 2] and cut.status == "interrupted"
    if name == "SIGINT":
        assert stopped.code == 130 and "Traceback" not in stopped.err
        assert "3 of 12 batches" in stopped.err
        assert "headscope rank induction" in stopped.err and "--out cut" in stopped.err
    else:
        assert stopped.code == -signal.SIGKILL
    shown = run("show", "cut")
    assert shown.code == 65 and "3 of 12 batches" in shown.err and "headscope rank" in shown.err
    kept = {p: p.stat().st_mtime_ns for p in files(Path("cut/parts"))}
    resumed = run(*MANY, "--out", "cut")
    assert resumed.code == 0 and "3 of 12 batches are finished" in resumed.err
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in files(Path("cut/parts"))}.items()
    whole = run(*MANY, "--out", "whole")
    assert resumed.out == whole.out
    assert score_bytes(Path("cut")) == score_bytes(Path("whole"))


FULL = """
import resource, torch, transformers
import heads.scoring, heads.induction
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
"""


@posix
def test_a_full_disk_is_a_line_and_loses_nothing_that_was_kept(run) -> None:
    args = ["rank", "induction", "-m", MODEL, "--n", "16", "--batch-size", "16", "--out", "r"]
    done = process(args, before=FULL)
    assert (done.code, done.out) == (69, ""), done.err
    assert "no space left" in done.err and "Traceback" not in done.err
    assert run(*args).code == 0


@posix
def test_a_reader_that_goes_away_ends_the_command_quietly(run) -> None:
    run("rank", "induction", *FAST, "--out", "r")
    code = "import sys; from app.cli import main; sys.exit(main(['show', 'r']))"
    read, wrote = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=wrote, stderr=subprocess.PIPE
    )
    os.close(wrote)
    os.close(read)
    _, err = child.communicate()
    assert (child.returncode, err) == (141, b"")


# ---- dry run


def test_a_dry_run_counts_what_the_run_would_read_and_leaves_nothing(run) -> None:
    args = ("rank", "induction", "retrieval", "-m", "zoo:planted-retrieval", "--n", "6")
    done = run(*args, "--dry-run")
    assert done.code == 0 and not Path("runs").exists()
    told = {row["quantity"]: float(row["value"]) for row in done.rows}
    run(*args)
    info = Run.load(only_run()).info
    assert (told["tokens"], told["batches"]) == (info["tokens"], info["batches"])
    assert told["prompts"] == 12 and told["time"] > 0 and told["decoding steps"] > 0
    assert "an estimate" in done.err


def test_a_dry_run_of_a_saved_model_reads_no_weights(run, nan_model: str) -> None:
    for weights in Path(nan_model).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".away"))
    try:
        args = ("rank", "sink", "-m", nan_model, "--n", "4")
        done = run(*args, "--dry-run")
        assert done.code == 0, done.err
        assert run(*args).code == 69  # the weights really are away
    finally:
        for weights in Path(nan_model).glob("*.away"):
            weights.rename(weights.with_suffix(".safetensors"))
    told = {row["quantity"]: float(row["value"]) for row in done.rows}
    from interp.loading import load

    hf = load(nan_model).hf
    assert told["memory for weights"] == sum(p.numel() * p.itemsize for p in hf.parameters())


def test_work_counts_padding_controls_and_steps() -> None:
    from app.estimate import Work, work_of
    from heads.detector import make_detector
    from heads.scoring import Job
    from interp.prompts import Prompt

    induction, sink, retrieval = map(make_detector, ("induction", "sink", "retrieval"))
    pruning = make_detector("pruning-importance")
    jobs = [
        # One reading for both, one for the controls that only induction has.
        Job(0, (induction, sink), (Prompt((1,) * 5, id="a"), Prompt((1,) * 7, id="b"))),
        Job(1, (retrieval,), (Prompt((1,) * 9, id="c", answer=(1, 2, 3)),)),
    ]
    assert work_of([Job(0, (pruning,), jobs[0].prompts)], 5).passed == (1 + 5) * 2 * 7
    assert work_of(jobs, 8) == Work(
        prompts=3,
        tokens=5 + 7 + 9,
        passed=2 * (2 * 7) + 9,
        squares=2 * (2 * 49) + 81,
        steps=3 + 4,
        widest=14,
        longest=9,
    )


@pytest.mark.parametrize(("tower", "heads"), [("text", 4 * 8), ("vision", 3 * 4)])
def test_a_detector_that_prunes_runs_once_a_head(tower: str, heads: int, run) -> None:
    args = ("-m", "zoo:shapes-vlm", "-t", "shapes", "--n", "3", "--tower", tower, "--dry-run")
    told = {r["quantity"]: float(r["value"]) for r in run("rank", "pruning-importance", *args).rows}
    assert told["tokens through the model"] == told["tokens"] * (1 + heads)
    told = {r["quantity"]: float(r["value"]) for r in run("rank", "visual-attention", *args).rows}
    assert told["tokens through the model"] == told["tokens"]
