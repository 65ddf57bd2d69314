"""`headscope capture` and `rank --traces`: traces of prompts, kept in runs that go on."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from app_kit import in_process, only_run, tokens_line
from PIL import Image
from test_app_images import VIT, VLM, vit_file, vlm_file

from app.capture import read_layers
from app.exits import UsageError
from interp.decode import generate
from interp.loading import load
from interp.prompts import Prompt
from interp.run import Run
from interp.traces import traces_of

MODEL = "zoo:needle"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def decoded(data: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(data.tobytes()))


def prompts_file(n: int = 2) -> str:
    Path("p.jsonl").write_text(
        "\n".join(tokens_line(id=f"p{i}", spans={"needle": [[3 + i, 5 + i]]}) for i in range(n))
    )
    return "p.jsonl"


def test_prompts_are_kept_and_answered_from_the_run(run) -> None:
    args = ("capture", "-m", MODEL, "-p", prompts_file())
    done = run(*args)
    assert done.code == 0, done.err
    folder = only_run()
    traces = traces_of(folder)
    assert {(r["prompt"], r["layer"]) for r in done.rows} == {
        (p, str(i)) for p in ("p0", "p1") for i in range(4)
    }
    assert {r["form"] for r in done.rows} == {"exact"} and {r["heads"] for r in done.rows} == {"4"}
    for row in done.rows:
        layer = traces[row["trace"]].layer(row["tower"], int(row["layer"]))
        assert float(row["error"]) == layer.error < 1e-3
        assert int(row["bytes"]) == layer.path.stat().st_size
    assert Run.load(folder).status == "complete" and Run.load(folder).scores == {}
    first = next(t for t in traces.values() if t.id == "p1")
    assert first.info["spans"]["needle"] == [[4, 6]] and first.info["ids"][0] == 1
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = run(*args)
    assert again.out == done.out and "nothing was computed" in again.err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    document = json.loads(run(*args, "--format", "json").out)
    assert document["schema"] == "headscope.capture" and document["run"] == str(folder)


def test_it_goes_on_where_it_was_stopped(run, monkeypatch) -> None:
    module = importlib.import_module("interp.traces.recording")
    own, written = module.write_table, []

    def dying(path, *rest):
        written.append(path)
        if len(written) == 6:
            raise KeyboardInterrupt
        own(path, *rest)

    args = ("capture", "-m", MODEL, "-p", prompts_file(3))
    monkeypatch.setattr(module, "write_table", dying)
    done = run(*args)
    assert done.code == 130 and "1 of 3 traces are saved" in done.err and "headscope" in done.err
    folder = only_run()
    [first] = traces_of(folder).values()
    assert first.id == "p0" and Run.load(folder).status == "interrupted"
    monkeypatch.setattr(module, "write_table", lambda *a: (written.append(a[0]), own(*a)))
    written.clear()
    done = run(*args)
    assert done.code == 0 and len(traces_of(folder)) == 3 and "going on" in done.err
    assert len(written) == 8 and not any(first.key in str(p) for p in written)
    whole = run("capture", "-m", MODEL, "-p", "p.jsonl", "--out", "other")
    assert whole.rows == done.rows


def test_layers_and_towers_are_chosen(run) -> None:
    done = run("capture", "-m", MODEL, "-p", prompts_file(1), "--layers", "0,2-3")
    assert [r["layer"] for r in done.rows] == ["0", "2", "3"]
    done = run("capture", "-m", VLM, "-p", vlm_file(1), "--tower", "vision", "--out", "v")
    assert {r["tower"] for r in done.rows} == {"vision"}
    for more, says in (
        (("--layers", "9"), "0 to 3"), (("--layers", "3-1"), "ranges"),
        (("--layers", "x"), "ranges"),
        (("--tower", "ear"), "ear"), (("--task", "needle"), "exclude"),
    ):  # fmt: skip
        done = run("capture", "-m", MODEL, "-p", "p.jsonl", *more, "--out", "w")
        assert done.code == 2 and says in done.err and not Path("w").exists()
    done = run("capture", "-m", MODEL)
    assert done.code == 2 and "needs prompts" in done.err
    assert read_layers(" 4, L1-2 ") == (1, 2, 4)
    with pytest.raises(UsageError):
        read_layers("")


def test_a_continuation_is_read_with_the_prompt(run) -> None:
    done = run("capture", "-m", MODEL, "-p", prompts_file(1), "--generate", "5")
    assert done.code == 0, done.err
    [trace] = traces_of(only_run()).values()
    model = load(MODEL)
    tokens = tuple(trace.info["ids"][: len(trace.info["ids"]) - 5])
    [new] = generate(model, model.batch([Prompt(tokens)]), max_new_tokens=5)
    assert tuple(trace.info["ids"]) == (*tokens, *new)
    n = len(tokens)
    assert trace.info["spans"]["generated"] == [[n, n + 5]]
    assert trace.tower("text").n_query == n + 5
    assert "generated" in trace.tower("text").segments
    done = run("capture", "-m", MODEL, "-p", "p.jsonl", "--generate", "100000", "--out", "o")
    assert done.code == 65 and "positions" in done.err
    done = run("capture", "-m", VIT, "-p", vit_file(1), "--generate", "2", "--out", "o")
    assert done.code == 65 and "images alone" in done.err


def test_an_image_is_continued_too(run) -> None:
    done = run("capture", "-m", VLM, "-p", vlm_file(1), "--generate", "2")
    assert done.code == 0, done.err
    [trace] = traces_of(only_run()).values()
    [[start, stop]] = trace.info["spans"]["generated"]
    assert (stop - start, stop) == (2, len(trace.tokens))
    places = trace.pictures[0]["text/places"]
    assert len(places) == stop and (places[start:, 2] == -1).all()


@pytest.mark.parametrize("model", [VLM, VIT])
def test_images_and_the_patch_of_each_position_are_kept(model, run) -> None:
    file = vlm_file(2) if model == VLM else vit_file(2)
    done = run("capture", "-m", model, "-p", file)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for trace in traces_of(only_run()).values():
        line = next(x for x in lines if x["id"] == trace.id)
        arrays, facts = trace.pictures
        shown = np.asarray(Image.open(line["image"]).convert("RGB"))
        assert np.array_equal(np.asarray(decoded(arrays["image-0"])), shown)
        assert facts["sizes"] == [[shown.shape[1], shown.shape[0]]]
        assert facts["boxes"] == {"thing": [0, *line["boxes"]["thing"]]}
        assert trace.info["text"] == line.get("text", "")
        for name, tower in trace.towers.items():
            places, boxes = arrays[f"{name}/places"], arrays[f"{name}/boxes"]
            assert places.shape == (tower.n_key, 7) and boxes.shape == (tower.n_key, 4)
            stands = places[:, 2] >= 0
            assert (np.isnan(boxes).any(1) == ~stands).all() and stands.any()
            assert (places[:, 1] == np.arange(tower.n_key)).all()  # one image is one row
            # The patches of a tower cover the image once.
            area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[stands].sum()
            assert area == pytest.approx(shown.shape[0] * shown.shape[1], rel=1e-3)
            grid = places[stands][:, 3:5]
            assert len(np.unique(grid, axis=0)) == stands.sum()
            corner = boxes[stands][(grid == 0).all(1)][0]
            assert (corner[:2] == 0).all()
            [labels] = [tower.labels("key")]
            if name == "vision":
                for i in np.nonzero(stands)[0]:
                    assert labels[i] == f"{places[i, 3]},{places[i, 4]}"


def test_pictures_of_a_task_have_no_files(run) -> None:
    done = run("capture", "-m", VLM, "--task", "shapes", "--n", "1", "--layers", "0")
    assert done.code == 0, done.err
    [trace] = traces_of(only_run()).values()
    arrays, facts = trace.pictures
    width, height = facts["sizes"][0]
    assert np.asarray(decoded(arrays["image-0"])).shape == (height, width, 3)
    assert facts["boxes"] and "text/boxes" in arrays


def test_a_dry_run_counts_and_writes_nothing(run) -> None:
    args = ("capture", "-m", MODEL, "-p", prompts_file(2), "--layers", "1-2")
    done = run(*args, "--dry-run")
    assert done.code == 0, done.err
    rows = {r["quantity"]: r for r in done.rows}
    assert rows["layers"]["value"] == "2" and rows["tokens"]["value"] == "50"
    assert not Path("runs").exists()
    made = run(*args)
    for i in (1, 2):
        real = sum(int(r["bytes"]) for r in made.rows if r["layer"] == str(i))
        guess = float(rows[f"file of text layer {i}"]["value"])
        assert 0.7 * real < guess < 1.4 * real
    assert float(rows["files"]["value"]) == sum(
        float(r["value"]) for q, r in rows.items() if q.startswith("file of")
    )
    assert "time" in rows


# ---- rank --traces


def test_rank_keeps_traces_of_its_first_prompts(run) -> None:
    args = ("rank", "sink", "-m", MODEL, "-p", prompts_file(3))
    plain = run(*args)
    assert plain.code == 0 and not (only_run() / "traces").exists()
    done = run(*args, "--traces", "2")
    assert done.code == 0 and done.out == plain.out
    assert [t.id for t in sorted(traces_of(only_run()).values(), key=lambda t: t.id)] == [
        "p0",
        "p1",
    ]
    assert run(*args, "--traces", "2", "--no-save").code == 2


def test_traces_that_fail_take_no_scores_away(run, monkeypatch) -> None:
    from interp.errors import RunError

    def full(*args, **more):
        raise RunError("no space left", hint="free some")

    monkeypatch.setattr("app.capture.captured", full)
    done = run("rank", "sink", "-m", MODEL, "-p", prompts_file(2), "--traces", "1")
    assert done.code == 0 and done.rows and "not all traces are kept: no space left" in done.err
    assert Run.load(only_run()).status == "complete"


def test_rank_keeps_the_images_of_its_prompts(run) -> None:
    done = run("rank", "region-grounding", "-m", VLM, "-p", vlm_file(2), "--traces", "1")
    assert done.code == 0, done.err
    [trace] = traces_of(only_run()).values()
    assert trace.id == "q0" and trace.pictures[1]["boxes"]["thing"][0] == 0
