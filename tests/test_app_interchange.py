"""Other programs' data: written as they read it, read as they wrote it, refused in one line."""

import json
import math
import os
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from app_kit import AFTER, assert_refused, files, in_process, process

import interp
from app.headview import show_head
from app.interchange import FORMATS
from app.interchange.examples import Example, Kept, sparse, traces_for
from app.interchange.headvis_sequences import sampled
from app.interchange.pattern_metrics import METRICS, Sums
from heads import score
from interp.errors import InputError, RunError
from interp.files import write_json, write_table
from interp.headid import HeadId
from interp.run import Run
from interp.scores import HeadScores
from interp.tasks import make_task
from interp.traces import capture, traces_of

TREE = {
    "config.json",
    "scatter_data.json",
    "server_config.json",
    "attributions/manifest.json",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADSCOPE_RUNS", raising=False)


@pytest.fixture
def call(capsys):
    return in_process(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A complete run of zoo:needle with six prompts, one of them longer than 512 tokens."""
    model = interp.load("zoo:needle")
    place = tmp_path_factory.mktemp("runs") / "needle"
    tables = score(model, ["retrieval", "sink"], n=4)
    key = {"dtype": "torch.float32", "attention": "sdpa"}
    with Run.open_or_create(place, key, {"model": model.name}) as run:
        run.finish(list(tables.values()))
    prompts = make_task("needle", {"lengths": (64, 80)}).prompts(model, 5)
    prompts += make_task("needle", {"lengths": (600,)}).prompts(model, 1)
    for i, prompt in enumerate(prompts):
        capture(model, replace(prompt, id=f"p{i}"), place)
    return place


@pytest.fixture(scope="module")
def tree(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trees") / "tree"
    FORMATS["headvis"].write(Run.load(folder), out, None)
    return out


def read_json(path: Path):
    return json.loads(path.read_text())


def row_trace(run: Path, name: str, p: np.ndarray, tokens: list[str]) -> None:
    """A trace of one head that is kept by its rows."""
    place = run / "traces" / name
    place.mkdir(parents=True)
    n_query, n_key = p.shape
    low, high = np.zeros(n_query, np.int32), np.full(n_query, n_key, np.int32)
    arrays = {"pattern": p[None].astype(np.float16), "low": low, "high": high}
    about = {"heads": 1, "kv_heads": 1, "form": "rows", "note": "made by hand", "error": None}
    layer = about | {"file": "text-0.safetensors", "arrays": sorted(arrays)}
    write_table(place / "text-0.safetensors", arrays, about)
    tower = {"n_query": n_query, "n_key": n_key, "layers": {"0": layer}, "segments": ["other"]}
    info = {"schema": "headscope.trace", "version": 1, "id": name, "tokens": tokens, "ids": None}
    write_json(place / "trace.json", info | {"spans": {}, "towers": {"text": tower}})


# ---- the parts of a tree, against slow references


def causal(n: int, seed: int) -> np.ndarray:
    s = np.random.default_rng(seed).normal(size=(n, n)) * 2
    s[np.triu_indices(n, 1)] = -np.inf
    e = np.exp(s)
    return np.where(np.isfinite(s), e / e.sum(1, keepdims=True), np.nan)


def test_metrics_equal_their_definition():
    sums, slow, counts = Sums(), defaultdict(float), defaultdict(int)
    rng = np.random.default_rng(3)
    for n in (2, 9, 17):
        p, ids = causal(n, n), rng.integers(0, 4, n).tolist()
        sums.add(p, ids)
        for i in range(n):
            counts["rows"] += 1
            counts["later"] += i > 0
            slow["itself"] += p[i, i]
            slow["before"] += p[i, i - 1] if i else 0.0
            followed = [a + 1 for a in range(i) if ids[a] == ids[i]]
            counts["repeated"] += bool(followed)
            slow["induction"] += sum(p[i, j] for j in followed if p[i, j] >= 0.01)
            for j in range(i + 1):
                slow["entropy"] -= p[i, j] * math.log(p[i, j])
                slow["distance"] += p[i, j] * (i - j)
                slow["square"] += p[i, j] * (i - j) ** 2
    distance = slow["distance"] / counts["rows"]
    assert (np.isnan(causal(3, 0)).sum(), counts["repeated"] > 5) == (3, True)
    want = {
        "self_attention_score": slow["itself"] / counts["rows"],
        "prev_token_score": slow["before"] / counts["later"],
        "pattern_entropy": slow["entropy"] / counts["rows"],
        "qk_distance": distance,
        "qk_distance_variance": slow["square"] / counts["rows"] - distance**2,
        "induction_score": slow["induction"] / counts["repeated"],
    }
    assert sums.means() == pytest.approx(want, rel=1e-12) and list(want) == list(METRICS)


def test_metrics_without_anything_to_count_are_undefined():
    sums = Sums()
    sums.add(causal(3, 0), [1, 2, 3])
    assert math.isnan(sums.means()["induction_score"]) and sums.means()["prev_token_score"] > 0


def slow_sparse(p: np.ndarray) -> dict[int, float]:
    kept = {}
    for i, row in enumerate(p):
        seen = sorted(((x, j) for j, x in enumerate(row) if x == x), key=lambda e: (-e[0], e[1]))
        for x, j in seen[:8]:
            if x >= 0.005:
                kept[i * len(p) + j] = round(float(x), 4)
    return kept


@pytest.mark.parametrize("n", [1, 5, 8, 40])
def test_kept_entries_are_the_largest_of_each_row(n):
    p = causal(n, n)
    if n == 40:
        p[39, :12] = 0.05  # equal ones: the first are kept
        p[38, :12] = 0.0
        p[36:38] = 0.0
        p[37, 3] = 0.005  # inclusive
        p[36, 3] = 0.00499
    indices, values = sparse(p)
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == slow_sparse(p)
    assert (np.diff(indices) > 0).all()


def test_sequences_are_shown_from_every_fifth():
    peaks = np.random.default_rng(0).permutation(60) / 100
    none = np.zeros(0, np.int64)
    every = [Example(i, ("a",), none, none, float(x)) for i, x in enumerate(peaks)]
    shown = sampled(every, seed=1)
    by = defaultdict(list)
    for e in shown:
        by[e.interval].append(e.peak)
        assert e.peak == every[e.sequence].peak
        assert (e.interval - 1) * 0.12 <= e.peak < e.interval * 0.12
    assert {i: len(x) for i, x in by.items()} == {1: 3, 2: 3, 3: 3, 4: 3, 5: 10}
    assert by[5] == sorted(peaks, reverse=True)[:10]
    assert [e.sequence for e in sampled(every, seed=1)] == [e.sequence for e in shown]
    assert [e.sequence for e in sampled(every, seed=2)] != [e.sequence for e in shown]
    assert [e.interval for e in sampled(every[:1], seed=0)] == [5]
    equal = [replace(e, peak=0.5) for e in every[:4]]
    assert [e.interval for e in sampled(equal, seed=0)] == [5] * 4
    assert sampled([], seed=0) == []


# ---- written


def test_the_tree_has_the_fields_that_its_readers_need(folder, tree):
    names = {p.relative_to(tree).as_posix() for p in files(tree)}
    assert names == TREE | {f"heads/L{i}H{h}.json" for i in range(4) for h in range(4)}
    config = read_json(tree / "config.json")
    assert config["model_name"] == "zoo:needle" and config["n_layers"] == config["n_heads"] == 4
    assert config["heads"] == [[i, h] for i in range(4) for h in range(4)]
    assert config["metrics"] == [*METRICS, "retrieval", "sink"]
    assert set(config["metric_descriptions"]) == set(config["metrics"])
    assert config["head_data_pattern"] == "L{layer}H{head}.json" and config["has_umap"] is False
    pipeline = config["pipeline_config"]
    needed = {"model_name", "dataset_name", "n_sequences", "seq_len", "dtype"}
    assert needed | {"attn_implementation"} <= set(pipeline)
    assert (pipeline["n_sequences"], pipeline["seq_len"], pipeline["dtype"]) == (
        6,
        512,
        "torch.float32",
    )
    rows = read_json(tree / "scatter_data.json")
    assert [(r["layer"], r["head"]) for r in rows] == [(i, h) for i in range(4) for h in range(4)]
    assert all(set(r) == {"layer", "head", *config["metrics"]} for r in rows)
    head = read_json(tree / "heads" / "L1H0.json")
    assert set(head) == {"sequences", "qk_distance_histogram", "top_query_tokens",
                         "top_key_tokens", "histogram", "statistics"}  # fmt: skip
    fields = {"sequence_id", "interval", "tokens", "attention_indices", "attention_values"}
    assert set(head["sequences"][0]) == fields | {"seq_len", "max_activation"}
    assert read_json(tree / "server_config.json") == {}
    assert "NaN" not in "".join(p.read_text() for p in files(tree))


def test_entries_metrics_and_sums_follow_from_the_traces(folder, tree):
    traces, bad = traces_for(Run.load(folder), "text")
    assert not bad and max(len(t.tokens) for t in traces) > 512
    ids = read_json(tree / "config.json")["headscope"]["prompts"]
    assert [t.id for t in traces] == ids
    rows = {(r["layer"], r["head"]): r for r in read_json(tree / "scatter_data.json")}
    for layer, head in ((0, 0), (1, 0), (3, 2)):
        content = read_json(tree / "heads" / f"L{layer}H{head}.json")
        assert len(content["sequences"]) == len(traces)
        sums, edges = Sums(), content["qk_distance_histogram"]["bin_edges"]
        mass, keys, peaks = [0.0] * (len(edges) - 1), defaultdict(float), []
        for sequence in content["sequences"]:
            trace = traces[sequence["sequence_id"]]
            n = min(512, len(trace.tokens))
            p = trace.head(HeadId(layer, head)).block((0, n), (0, n))
            assert sequence["tokens"] == trace.tokens[:n] and sequence["seq_len"] == n
            pairs = zip(sequence["attention_indices"], sequence["attention_values"], strict=True)
            kept = dict(pairs)
            assert kept == slow_sparse(p)
            peak = max(p[i, j] for i in range(1, n) for j in range(1, i + 1))
            assert sequence["max_activation"] == float(peak)
            peaks.append(peak)
            for flat, x in kept.items():
                i, j = divmod(flat, n)
                bin_ = next(b for b in range(len(mass)) if edges[b] <= abs(i - j) < edges[b + 1])
                mass[bin_] += x
                keys[trace.tokens[j]] += x
        for trace in traces:
            n = min(512, len(trace.tokens))
            p = trace.head(HeadId(layer, head)).block((0, n), (0, n))
            sums.add(p, trace.info["ids"][:n])
        found = {name: rows[layer, head][name] for name in METRICS}
        assert found == pytest.approx(sums.means(), rel=1e-12)
        assert content["qk_distance_histogram"]["bin_values"] == pytest.approx(mass, abs=1e-4)
        best = max(keys, key=lambda t: keys[t])
        assert content["top_key_tokens"][0] == {"token": best, "weight": round(keys[best], 4)}
        assert sum(content["histogram"]["bin_values"]) == len(peaks) and len(
            content["histogram"]["bin_edges"]) == 51  # fmt: skip
        assert content["statistics"]["mean_max_activation"] == pytest.approx(
            np.mean(peaks), abs=1e-4
        )


def test_what_has_no_place_is_said(folder):
    copy = Path("copy")
    shutil.copytree(folder, copy)
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(600)]
    row_trace(copy, "both-ways", rng.dirichlet(np.ones(600), 600), words)
    row_trace(copy, "cross", rng.dirichlet(np.ones(5), 3), words[:3])
    row_trace(copy, "short", np.ones((1, 1)), words[:1])
    row_trace(copy, "fits", rng.dirichlet(np.ones(4), 4), words[:4])
    done = FORMATS["headvis"].write(Run.load(copy), Path("out"), None)
    assert len(done.left_out) == 3
    said = " / ".join(done.left_out)
    for name, part in (("both-ways", "later keys"), ("cross", "3 queries look at 5 keys"),
                       ("short", "fewer than two")):  # fmt: skip
        assert f"prompt {name}: " in said and part in said
    assert "fits" in read_json(Path("out/config.json"))["headscope"]["prompts"]
    assert len(read_json(Path("out/heads/L0H0.json"))["sequences"]) == 7
    assert len(read_json(Path("out/heads/L0H1.json"))["sequences"]) == 6


def test_a_table_of_groups_or_of_another_tower_stays_behind(folder):
    table = Run.load(folder).scores["sink"]
    groups = replace(table, detector="groups", granularity="kv")
    seen = tuple(replace(h, tower="vision") for h in table.heads)
    other = replace(table, detector="other", heads=seen)
    with Run.open_or_create("run", {"k": 1}, {"model": "m"}) as run:
        run.finish([table, groups, other])
    done = FORMATS["headvis"].write(Run.load("run"), Path("a"), None)
    assert done.counts == {"heads": 16, "metrics": 1, "sequences": 0}
    assert done.left_out == ("table groups: its rows are key-value heads",
                             "table other: it has no tower text")  # fmt: skip
    FORMATS["headvis"].write(Run.load("run"), Path("b"), "vision")
    assert read_json(Path("b/config.json"))["metrics"] == ["other"]
    found = FORMATS["headvis"].read(Path("b"), None)
    assert found.tables[0].heads == seen
    with pytest.raises(InputError, match="has none of audio"):
        FORMATS["headvis"].write(Run.load("run"), Path("c"), "audio")
    assert not Path("c").exists()


def test_a_table_is_written_where_prompts_have_a_metric_of_its_name(folder):
    table = replace(Run.load(folder).scores["sink"], detector="qk_distance")
    towers = tuple(replace(h, tower="vision") for h in table.heads[8:])
    table = replace(table, heads=table.heads[:8] + towers)
    with Run.open_or_create("run", {"k": 1}, {"model": "m"}) as run:
        run.finish([table])
    shutil.copytree(folder / "traces", "run/traces")
    FORMATS["headvis"].write(Run.load("run"), Path("a"), None)
    rows = read_json(Path("a/scatter_data.json"))
    assert [row["qk_distance"] for row in rows[:8]] == table.values[:8].tolist()
    # A column is from one source: heads that the table does not hold have no number in it.
    assert len(rows) == 16 and all(row["qk_distance"] is None for row in rows[8:])
    assert all(row["pattern_entropy"] > 0 for row in rows)
    shutil.rmtree("run/traces")
    FORMATS["headvis"].write(Run.load("run"), Path("b"), None)
    assert len(read_json(Path("b/scatter_data.json"))) == 8


def test_maps_that_were_cut_short_have_no_metrics(folder):
    with Run.open_or_create("run", {"k": 1}, {"model": "m"}) as run:
        run.finish([])
    p = np.array([[1.0, 0.0], [0.25, 0.75]])
    row_trace(Path("run"), "cut", p, ["a", "b"])
    place = Path("run/traces/cut")
    arrays = {"top_key": np.array([[[0, 1], [1, 0]]], np.int32), "low": np.zeros(2, np.int32),
              "top_mass": np.array([[[1.0, 0.0], [0.75, 0.25]]], np.float16),
              "high": np.full(2, 2, np.int32)}  # fmt: skip
    info = read_json(place / "trace.json")
    layer = info["towers"]["text"]["layers"]["0"]
    layer |= {"form": "top", "arrays": sorted(arrays)}
    write_table(place / "text-0.safetensors", arrays, layer)
    write_json(place / "trace.json", info)
    with pytest.raises(InputError, match="needs a metric"):
        FORMATS["headvis"].write(Run.load("run"), Path("a"), None)
    assert not Path("a").exists()
    assert "only the 2 largest entries" in show_head("run", "L0H0").seen.notes[0]
    # Beside a whole one the sequence is there, and the metrics are those of the whole one.
    row_trace(Path("run"), "whole", np.eye(2), ["a", "b"])
    FORMATS["headvis"].write(Run.load("run"), Path("b"), None)
    [row] = read_json(Path("b/scatter_data.json"))
    assert row["self_attention_score"] == 1.0
    kept = {e["sequence_id"]: e for e in read_json(Path("b/heads/L0H0.json"))["sequences"]}
    assert kept[0]["attention_values"] == [1.0, 0.25, 0.75]
    assert kept[0]["attention_indices"] == [0, 2, 3]


def test_nothing_is_written_over(folder):
    Path("full").mkdir()
    Path("full/a.txt").write_text("mine")
    with pytest.raises(RunError, match="full is not empty"):
        FORMATS["headvis"].write(Run.load(folder), Path("full"), None)
    Path("file").write_text("mine")
    with pytest.raises(RunError, match="file is not empty"):
        FORMATS["headvis"].write(Run.load(folder), Path("file"), None)
    assert [p.name for p in files(Path("full"))] == ["a.txt"]


# ---- the round trip


def test_a_tree_comes_back(folder, tree, call):
    done = call("import", str(tree), "--from", "headvis", "--out", "back")
    assert done.code == 0 and "saved: back" in done.err
    before, after = Run.load(folder), Run.load("back")
    assert list(after.scores) == [*METRICS, "retrieval", "sink"]
    rows = read_json(tree / "scatter_data.json")
    for name, table in after.scores.items():
        assert table.values.tolist() == [row[name] for row in rows]
        assert table.provenance["imported"] == "headvis"
        assert (table.n == 1).all() and set(table.verdict) == {"no evidence"}
    for name, table in before.scores.items():
        again = after.scores[name]
        assert (again.heads, again.unit, again.direction) == (
            table.heads,
            table.unit,
            table.direction,
        )
        assert again.range == table.range and again.values.tolist() == table.values.tolist()
    traces, _ = traces_for(before, "text")
    kept = Kept(after)
    assert kept.heads() == tuple(HeadId(i, h) for i in range(4) for h in range(4))
    for head in kept.heads():
        examples = kept.of(head)
        assert sorted(e.sequence for e in examples) == list(range(len(traces)))
        for e in examples:
            trace = traces[e.sequence]
            n = min(512, len(trace.tokens))
            p = trace.head(head).block((0, n), (0, n))
            assert list(e.tokens) == trace.tokens[:n]
            assert dict(zip(e.indices.tolist(), e.values.tolist(), strict=True)) == slow_sparse(p)
            dense = e.dense()
            # Nothing is left out but what the format leaves out.
            lost = np.where(np.isfinite(p) & np.isnan(dense), p, 0.0)
            assert np.nanmax(np.abs(dense - p)) <= 0.5001e-4
            eighth = np.sort(np.nan_to_num(p), axis=1)[:, -8][:, None]
            assert (lost <= np.maximum(eighth, 0.005)).all()
    # Written again it is the same, but for what only the run had.
    assert call("export", "back", "--to", "headvis", "--out", "again").code == 0
    assert read_json(Path("again/scatter_data.json")) == rows
    for head in kept.heads():
        first, second = (read_json(t / "heads" / f"{head}.json") for t in (tree, Path("again")))
        assert first == second


def test_importing_again_finds_the_run(tree, call):
    first = call("import", str(tree), "--from", "headvis")
    second = call("import", str(tree), "--from", "headvis")
    assert first.out == second.out and len(list(Path("runs").iterdir())) == 1
    shutil.copytree(tree, "other")
    path = Path("other/heads/L0H0.json")
    content = read_json(path)
    content["sequences"][0]["attention_values"][0] += 0.0001
    path.write_text(json.dumps(content))
    assert call("import", "other", "--from", "headvis").code == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_an_imported_run_is_compared_and_shown(folder, tree, call):
    call("import", str(tree), "--from", "headvis", "--out", "back")
    done = call("compare", "back", str(folder))
    assert [row["spearman"] for row in done.rows] == ["1.0", "1.0"]
    assert call("show", "back", "--detector", "qk_distance").rows[0]["detector"] == "qk_distance"
    view = show_head("back", "L1H0", "2")
    assert "Imported: of each row" in view.html and view.seen.unseen == "masked, or not kept"
    best = show_head("back", "L1H0")
    peaks = {str(e.sequence): e.peak for e in Kept(Run.load("back")).of(HeadId(1, 0))}
    assert peaks[best.prompt] == max(peaks.values())
    assert call("export", "back", "--head", "L1H0", "--out", "h.html").code == 0


def test_a_run_with_examples_and_prompts_says_which_are_written(folder, tree, call):
    call("import", str(tree), "--from", "headvis", "--out", "back")
    shutil.copytree(folder / "traces", "back/traces")
    done = call("export", "back", "--to", "headvis", "--out", "again")
    assert "6 prompts of the run: its imported sequences are written" in done.err
    assert read_json(Path("again/heads/L1H0.json")) == read_json(tree / "heads" / "L1H0.json")


def test_a_tree_as_its_own_pipeline_writes_it(call):
    """Values are rounded, undefined ones null; no block of ours; tokens may be anything."""
    Path("t/heads").mkdir(parents=True)
    config = {"model_name": "org/m", "np_model_id": "m", "dataset_name": "pile", "n_layers": 2,
              "n_heads": 1, "heads": [[0, 0], [1, 0]], "metrics": list(METRICS)}  # fmt: skip
    Path("t/config.json").write_text(json.dumps(config))
    row = dict.fromkeys(METRICS, 0.25) | {"induction_score": None}
    rows = [{"layer": 1, "head": 0, **row}, {"layer": 0, "head": 0, **row, "qk_distance": 3}]
    Path("t/scatter_data.json").write_text(json.dumps(rows))
    sequence = {"sequence_id": 77, "interval": 5, "tokens": ["<s>", "</script>", "\ud83d"],
                "attention_indices": [0, 3, 4, 6], "attention_values": [1.0, 0.5, 0.5, 0.9996],
                "seq_len": 3, "max_activation": None}  # fmt: skip
    Path("t/heads/L0H0.json").write_text(json.dumps({"sequences": [sequence], "more": 1}))
    done = call("import", "t", "--from", "headvis", "--out", "run")
    assert done.code == 0
    run = Run.load("run")
    assert run.info["model"] == "org/m" and run.info["dataset"] == "pile"
    assert run.scores["qk_distance"].values.tolist() == [3.0, 0.25]
    assert set(run.scores["induction_score"].verdict) == {"undefined"}
    [example] = Kept(run).of(HeadId(0, 0))
    assert example.tokens == ("<s>", "</script>", "\ud83d") and math.isnan(example.peak)
    assert example.dense()[2, 0] == np.float32(0.9996) and Kept(run).of(HeadId(1, 0)) == []
    assert "\\ud83d" in show_head("run", "L0H0", "77").html
    assert call("export", "run", "--to", "headvis", "--out", "again").code == 0
    assert read_json(Path("again/heads/L0H0.json"))["sequences"] == [sequence]


# ---- hostile trees


def small_tree() -> Path:
    """A tree of one head on two tokens."""
    place = Path("small")
    (place / "heads").mkdir(parents=True)
    (place / "config.json").write_text('{"model_name": "m", "metrics": ["a"]}')
    (place / "scatter_data.json").write_text('[{"layer": 0, "head": 0, "a": 0.5}]')
    (place / "heads/L0H0.json").write_text(json.dumps({"sequences": [sequence()]}))
    return place


def sequence(**more) -> dict:
    return {"tokens": ["a", "b"], "attention_indices": [0, 2], "attention_values": [1, 0.5]} | more


def test_the_small_tree_is_good(call):
    assert call("import", str(small_tree()), "--from", "headvis", "--out", "run").code == 0
    assert [e.values.tolist() for e in Kept(Run.load("run")).of(HeadId(0, 0))] == [[1.0, 0.5]]


def test_entries_in_any_order_are_read(call):
    place = small_tree()
    given = sequence(attention_indices=[3, 0, 2], attention_values=[0.25, 1, 0.75])
    (place / "heads/L0H0.json").write_text(json.dumps({"sequences": [given]}))
    assert call("import", str(place), "--from", "headvis", "--out", "run").code == 0
    [example] = Kept(Run.load("run")).of(HeadId(0, 0))
    assert example.indices.tolist() == [0, 2, 3] and example.values.tolist() == [1.0, 0.75, 0.25]


ROW = '[{"layer": 0, "head": 0, "a": %s}]'


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("config.json", "", "must be JSON"),
        ("config.json", "[1]", "must hold a JSON object; got list"),
        ("config.json", "{" * 100_000, "must be JSON"),
        ("config.json", "[" * 100_000, "must be JSON"),
        ("config.json", '{"model_name": 5, "metrics": ["a"]}', "model_name must be a text"),
        ("config.json", '{"metrics": ["a"]}', "a model must be named"),
        ("config.json", '{"model_name": "m", "metrics": []}', "different plain names"),
        ("config.json", '{"model_name": "m", "metrics": ["a", "a"]}', "different plain names"),
        ("config.json", '{"model_name": "m", "metrics": ["../a"]}', "got '../a'"),
        ("config.json", '{"model_name": "m", "metrics": "a"}', "must be a list"),
        ("config.json", '{"model_name": "m", "metrics": ["a"], "metrics": ["b"]}', "twice"),
        ("config.json", '{"model_name": "m", "metrics": ["no evidence"]}', "cannot be called"),
        ("config.json", '{"model_name": "m", "metrics": ["a"], "headscope": 3}', "with tables"),
        ("config.json", '{"model_name": "m", "metrics": ["a"], "headscope": {"tower": "a/b"}}',
         "plain word"),
        ("config.json", '{"model_name": "m", "metrics": ["a"], "headscope": '
         '{"tables": {"a": {"direction": "up"}}}}', "higher or lower"),
        ("config.json", '{"model_name": "m", "metrics": ["a"], "headscope": '
         '{"tables": {"a": {"range": [2, 1]}}}}', "range"),
        ("scatter_data.json", "{}", "must hold a JSON list"),
        ("scatter_data.json", "[]", "heads; it holds 0"),
        ("scatter_data.json", "[3]", "row 0 must be an object"),
        ("scatter_data.json", '[{"layer": 0, "a": 1}]', "head must be a whole number"),
        ("scatter_data.json", '[{"layer": -1, "head": 0}]', "layer must be a whole number"),
        ("scatter_data.json", '[{"layer": 0, "head": 99999}]', "head must be a whole number"),
        ("scatter_data.json", '[{"layer": true, "head": 0}]', "layer must be a whole number"),
        ("scatter_data.json", '[{"layer": 0.0, "head": 0}]', "layer must be a whole number"),
        ("scatter_data.json", '[{"layer": 0, "head": 0}, {"layer": 0, "head": 0}]', "twice"),
        ("scatter_data.json", ROW % "NaN", "NaN is no number"),
        ("scatter_data.json", ROW % "1e999", "finite number"),
        ("scatter_data.json", ROW % ("9" * 400), "finite number"),
        ("scatter_data.json", ROW % ("9" * 5000), "must be JSON"),
        ("scatter_data.json", ROW % '"x"', "finite number"),
        ("scatter_data.json", ROW % "true", "finite number"),
        ("heads/L0H0.json", "\x00\xff", "must be JSON"),
        ("heads/L0H0.json", '{"sequences": 4}', "sequences must be a list"),
        ("heads/L0H0.json", '{"sequences": [4]}', "sequence 0 must be an object"),
    ],
)  # fmt: skip
def test_a_damaged_tree_is_refused_in_a_line(call, file, text, part):
    place = small_tree()
    (place / file).write_text(text, encoding="latin-1")
    done = call("import", str(place), "--from", "headvis")
    assert_refused(done, part)
    assert not Path("runs").exists() and len(done.err) < 1000


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"tokens": []}, "seq_len tokens"),
        ({"tokens": [1, 2]}, "tokens must be a text"),
        ({"tokens": ["x" * 2000, "b"]}, "tokens must be a text of at most"),
        ({"tokens": ["x"] * 5000}, "at most 4096 entries"),
        ({"seq_len": 3}, "seq_len tokens"),
        ({"attention_indices": [0, 4]}, "attention_indices must be a whole number in 0..3"),
        ({"attention_indices": [-1, 2]}, "attention_indices must be a whole number"),
        ({"attention_indices": [0, 0]}, "must be different"),
        ({"attention_indices": [0]}, "as many attention_indices as"),
        ({"attention_indices": [0, 1.5]}, "whole number"),
        ({"attention_indices": list(range(9)), "attention_values": [0] * 9}, "at most 4 entries"),
        ({"attention_values": [1, 1.5]}, "in 0..1.01"),
        ({"attention_values": [1, -0.1]}, "in 0..1.01"),
        ({"attention_values": [1, None]}, "finite number"),
        ({"attention_values": [1, True]}, "finite number"),
        ({"attention_values": [1, 10**400]}, "finite number"),
        ({"attention_indices": [0, True]}, "whole number"),
        ({"attention_indices": [0, 10**30]}, "whole number"),
        ({"max_activation": "high"}, "max_activation must be a finite number"),
        ({"interval": -1}, "interval must be a whole number"),
        ({"sequence_id": 1 << 60}, "sequence_id must be a whole number"),
    ],
)
def test_a_damaged_sequence_is_refused_in_a_line(call, change, part):
    place = small_tree()
    content = {"sequences": [sequence(), sequence(**change)]}
    (place / "heads/L0H0.json").write_text(json.dumps(content))
    done = call("import", str(place), "--from", "headvis")
    assert_refused(done, part)
    assert "L0H0.json, sequence 1" in done.err and not Path("runs").exists()


def test_no_path_of_a_tree_is_followed(call):
    Path("secret.json").write_text(json.dumps({"sequences": [sequence(tokens=["se", "cret"])]}))
    place = small_tree()
    # Whatever its pattern says, heads are looked for where they are.
    config = {"model_name": "m", "metrics": ["a"], "head_data_pattern": "../../secret.json"}
    (place / "config.json").write_text(json.dumps(config))
    assert call("import", str(place), "--from", "headvis", "--out", "run").code == 0
    [example] = Kept(Run.load("run")).of(HeadId(0, 0))
    assert example.tokens == ("a", "b")
    for name in ("heads/L0H0.json", "config.json", "scatter_data.json"):
        kept = (place / name).read_text()
        (place / name).unlink()
        (place / name).symlink_to(Path("secret.json").resolve())
        assert_refused(call("import", str(place), "--from", "headvis"), "must be a plain file")
        (place / name).unlink()
        (place / name).write_text(kept)
    shutil.move(place / "heads", "heads")
    (place / "heads").symlink_to(Path("heads").resolve())
    assert_refused(call("import", str(place), "--from", "headvis"), "must be a plain folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
def test_a_pipe_or_a_large_file_is_not_read(call, monkeypatch):
    place = small_tree()
    (place / "heads/L0H0.json").unlink()
    os.mkfifo(place / "heads/L0H0.json")
    assert_refused(call("import", str(place), "--from", "headvis"), "must be a plain file")
    (place / "heads/L0H0.json").unlink()
    with (place / "heads/L0H0.json").open("wb") as file:
        file.truncate(65 << 20)
    assert_refused(call("import", str(place), "--from", "headvis"), "at most 64 MB; it has 65")


def test_what_is_missing_is_said(call):
    done = call("import", "none", "--from", "headvis")
    assert (done.code, done.out) == (66, "") and "none" in done.err
    assert_refused(call("import", str(Path(__file__)), "--from", "headvis"), "is a folder with")
    place = small_tree()
    (place / "scatter_data.json").unlink()
    done = call("import", str(place), "--from", "headvis")
    assert done.code == 66 and "scatter_data.json" in done.err
    done = call("import", str(place), "--from", "headviz")
    assert done.code == 2 and "did you mean headvis" in done.err
    done = call("export", str(place), "--to", "retrieval-head", "--out", "x")
    assert done.code == 2 and "is read, not written" in done.err


def test_a_damaged_part_of_an_imported_run_is_one_line(tree, call):
    call("import", str(tree), "--from", "headvis", "--out", "back")
    part = Path("back/parts/00004.safetensors")
    part.write_bytes(part.read_bytes()[:200])
    done = call("export", "back", "--head", "L1H0", "--out", "h.html")
    assert_refused(done, "00004.safetensors")
    info = read_json(Path("back/run.json"))
    for examples, text in (("L0H0", "'examples' must be a list"), (["x"], "a head is written")):
        Path("back/run.json").write_text(json.dumps(info | {"examples": examples}))
        assert_refused(call("export", "back", "--head", "L1H0", "--out", "h.html"), text)


def test_parts_of_other_runs_are_no_examples():
    with Run.open_or_create("run", {"k": 1}, {"view": "steer", "examples": ["L0H0"]}) as run:
        run.put_part(0, {}, {"tokens": []})
        run.finish([])
    assert Kept(Run.load("run")).heads() == () and Kept(run).of(HeadId(0, 0)) == []


# ---- Retrieval_Head


def test_score_files_of_retrieval_head(folder, call):
    mine = Run.load(folder).scores["retrieval"]
    rng = np.random.default_rng(0)
    content = {f"{h.layer}-{h.head}": rng.choice([0, 0.25, 1.0], 30).tolist() for h in mine.heads}
    content["1-0"] = [1.0] * 29  # one trial fewer
    Path("m.json").write_text(json.dumps(content))
    done = call("import", "m.json", "--from", "retrieval-head", "--model", "org/m", "--out", "r")
    assert done.code == 0
    table = Run.load("r").scores["retrieval"]
    assert table.heads == mine.heads and table.provenance["model"] == "org/m"
    for head, row in zip(table.heads, table.per_example.T, strict=True):
        given = content[f"{head.layer}-{head.head}"]
        assert row[: len(given)].tolist() == given and np.isnan(row[len(given) :]).all()
    i = table.heads.index(HeadId(1, 0))
    assert (table.n[i], table.values[i], table.n[0]) == (29, 1.0, 30)
    assert table.ci_lo[0] < table.values[0] < table.ci_hi[0]
    assert set(table.verdict) == {"no evidence"}
    [row] = call("compare", "r", str(folder)).rows
    assert row["heads"] == "16" and float(row["spearman"]) == pytest.approx(
        mine.compare(table).spearman
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "it holds none"),
        ('{"0-0": []}', "it holds none"),
        ('{"0-0": 0.5}', "must be a list"),
        ('{"0-0": [1.5]}', "in 0..1"),
        ('{"0-0": [NaN]}', "NaN is no number"),
        ('{"0-0": [null]}', "finite number"),
        ('{"L0H0": [1]}', "LAYER-HEAD; got 'L0H0'"),
        ('{"0-99999": [1]}', "whole number in 0..1023"),
        ('{"٠-٠": [1]}', "LAYER-HEAD"),
        ('{"0-0": [1], "0-0": [0]}', "twice"),
        ('{"0-0": [1], "00-0": [0]}', "twice"),
        ('{"0-0": [1]', "must be JSON"),
    ],
)
def test_a_damaged_score_file_is_refused_in_a_line(call, text, part):
    Path("m.json").write_text(text)
    assert_refused(call("import", "m.json", "--from", "retrieval-head", "-m", "m"), part)
    assert not Path("runs").exists()


def test_a_model_must_be_named(call):
    Path("m.json").write_text('{"0-0": [1]}')
    done = call("import", "m.json", "--from", "retrieval-head")
    assert_refused(done, "a model must be named")
    assert "--model NAME" in done.err
    Path("full_attention_heads.tsv").write_text("1\n")
    assert_refused(call("import", "full_attention_heads.tsv", "--from", "duo-attention"), "named")


# ---- DuoAttention


def pattern(gates: np.ndarray, name: str = "pattern", **config) -> Path:
    place = Path(name)
    place.mkdir(exist_ok=True)
    np.savetxt(place / "full_attention_heads.tsv", gates, delimiter="\t")
    about = {"model_name": "models/Some-7B", "sink_size": 128, "recent_size": 256, "lr": 0.02}
    (place / "config.json").write_text(json.dumps(about | {"output_dir": "/etc"} | config))
    return place


def test_patterns_of_duo_attention(call):
    gates = np.random.default_rng(0).random((3, 2))
    gates[0, 0], gates[2, 1] = -1e-4, 1.002
    place = pattern(gates)
    done = call("import", str(place), "--from", "duo-attention", "--out", "d")
    assert done.code == 0
    run = Run.load("d")
    table = run.scores["duo-attention"]
    assert table.granularity == "kv" and run.info["model"] == "Some-7B"
    assert table.heads == tuple(HeadId(i, h) for i in range(3) for h in range(2))
    assert table.values.tolist() == gates.clip(0, 1).ravel().tolist()
    assert dict(table.params) == {"sink_size": 128, "recent_size": 256, "lr": 0.02}
    call("import", str(pattern(1 - gates, "b")), "--from", "duo-attention", "--out", "e")
    assert call("compare", "d", "e").rows[0]["spearman"] == "-1.0"
    # The table alone is its folder's; under another name nothing beside it is looked at.
    alone = call("import", str(place / "full_attention_heads.tsv"), "--from", "duo-attention")
    assert alone.rows == done.rows
    shutil.copy(place / "full_attention_heads.tsv", place / "x.tsv")
    done = call("import", str(place / "x.tsv"), "--from", "duo-attention", "-m", "m", "-o", "x")
    assert dict(Run.load("x").scores["duo-attention"].params) == {}
    assert done.code == 0 and all(r["detector"] == "duo-attention" for r in done.rows)


def test_groups_are_not_compared_with_heads(folder, call):
    call("import", str(pattern(np.ones((4, 4)))), "--from", "duo-attention", "--out", "d")
    path = folder / "scores" / "sink.safetensors"
    done = call("compare", "d/scores/duo-attention.safetensors", str(path))
    assert_refused(done, "must have the same granularity")


@pytest.mark.parametrize(
    ("table", "config", "part"),
    [
        (b"", "{}", "it holds none"),
        (b"1\t2\n", "{}", "gates about 0..1; got '2'"),
        (b"1\tnan\n", "{}", "gates about 0..1"),
        (b"1\tinf\n", "{}", "gates about 0..1"),
        (b"1\tx\n", "{}", "gates about 0..1"),
        (b"1\t1\n1\n", "{}", "line 2 must have 2 numbers; got 1"),
        (b"1\t" * 2000, "{}", "at most 1024 layers"),
        (b"1\n" * 2000, "{}", "at most 1024 layers"),
        (b"\xff\xfe1", "{}", "it is no text"),
        (b"1\n", "[]", "must hold a JSON object"),
        (b"1\n", '{"model_name": 3}', "model_name must be a text"),
        (b"1\n", '{"model_name": "m", "lr": 1e999}', "lr must be a finite number"),
        (b"1\n", "{}", "a model must be named"),
    ],
)
def test_a_damaged_pattern_is_refused_in_a_line(call, table, config, part):
    place = pattern(np.ones((1, 1)))
    (place / "full_attention_heads.tsv").write_bytes(table)
    (place / "config.json").write_text(config)
    assert_refused(call("import", str(place), "--from", "duo-attention"), part)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "absent"),
    [
        (["export", "--help"], {"torch", "numpy"}),
        (["import", "--help"], {"torch", "numpy"}),
        (["import", "t", "--from", "headviz"], {"torch", "transformers", "pandas"}),
        (["import", "small", "--from", "headvis"], {"torch", "transformers", "pandas"}),
        (["export", "back", "--to", "headvis", "--out", "x"], {"torch", "transformers", "pandas"}),
    ],
)
def test_nothing_heavy_is_imported(tree, call, args, absent):
    small_tree()
    call("import", str(tree), "--from", "headvis", "--out", "back")
    done = process(args, before=AFTER)
    assert done.code in (0, 2)
    assert not absent & set(done.err.splitlines()[-1].split())


def test_every_format_says_what_it_is():
    assert {"headvis", "retrieval-head", "duo-attention"} <= set(FORMATS)
    for name in FORMATS:
        assert FORMATS[name].summary and (FORMATS[name].read or FORMATS[name].write)


def test_tables_read_are_tables(tree):
    found = FORMATS["headvis"].read(tree, "renamed")
    assert found.model == "renamed" and all(isinstance(t, HeadScores) for t in found.tables)
    assert len(list(found.parts())) == found.n_parts == 16
    assert len(traces_of(tree)) == 0
