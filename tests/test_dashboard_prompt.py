"""The page Prompt: alignment, signed differences, needles, previews, and flows in a browser."""

import json
import shlex
import subprocess
import sys

import browser
import numpy as np
import pytest
import torch
from app_kit import environment
from dashboard_kit import (
    HOSTILE,
    hostile,
    needle_run,
    ready,
    served_to,
    show,
    violations,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashboard.jobs import BusyError, Jobs
from app.dashboard.jobs_line import check_line
from app.dashboard.page import Site
from app.dashboard.prompt_diff import (
    WHOLE,
    align,
    align_towers,
    difference,
    pooled_signed,
    row_difference,
    window_of,
)
from app.dashboard.prompt_needle import Needle, grid, jsonl, place_of, scores_of
from app.dashboard.prompt_run import answer_of, kept, line_for, preview
from app.dashboard.prompt_text import Asked, check_text, is_jsonl, options_of, written
from app.dashboard.security import Access
from app.dashboard.server import make_app
from app.figures.prompt import difference_map, needle_grid
from app.loading import Source
from interp import load
from interp.errors import InputError, InterpError
from interp.promptfile import parse, to_prompts
from interp.prompts import Prompt
from interp.run import Run
from interp.traces.recording import capture

chromium = pytest.fixture(scope="module")(browser.chromium)
tab = pytest.fixture(scope="module")(browser.tab)
page = pytest.fixture(browser.kept)

A = "Note: Cedar lemon kite drum. The old baker walked to the market. Recall: Cedar"
B = "Note: Cedar opal vase jewel. The baker walked to the quiet old market. Recall: Cedar"


@pytest.fixture(scope="module")
def model():
    return load("zoo:needle", attn="eager")


@pytest.fixture(scope="module")
def prompts(model):
    made = [{"text": text, "id": name} for text, name in ((A, "A"), (B, "B"))]
    return to_prompts(parse(jsonl(made).encode(), "x.jsonl"), model)


@pytest.fixture(scope="module")
def root(tmp_path_factory, model, prompts):
    """Two runs: A and B of one model, and A of a model whose queries are larger."""
    place = tmp_path_factory.mktemp("runs")
    other = load("zoo:needle", attn="eager")
    with torch.no_grad():
        for name, weight in other.hf.named_parameters():
            if "q_proj" in name:
                weight.mul_(0.4)
    for name, read, some in (("one", model, prompts), ("two", other, prompts[:1])):
        about = {"model": "zoo:needle", "command": "headscope capture", "view": "capture"}
        with Run.open_or_create(place / name, {"name": name}, about) as run:
            for prompt, text in zip(some, (A, B), strict=False):
                capture(read, prompt, run.folder, text=text)
            run.finish([])
    return place, other


def traces(place, name):
    return {t.id: t for t in Site(library(place)).library.open(name).traces.values()}


def library(place):
    from app.dashboard.library import Library

    return Library(place)


def dense(model, prompt):
    """[layer, head, query, key] the model's own patterns."""
    with torch.no_grad():
        out = model.hf(torch.tensor([prompt.tokens]), output_attentions=True)
    return torch.stack(out.attentions)[:, 0].numpy()


# Which tokens belong together.

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=24)


@given(tokens, tokens)
def test_every_position_is_paired_or_alone_and_pairs_rise(a, b):
    found = align(a, b)
    one, other = found.pairs.T.tolist()
    assert all(np.diff(one) > 0) and all(np.diff(other) > 0)
    assert sorted([*one, *found.only_a]) == list(range(len(a)))
    assert sorted([*other, *found.only_b]) == list(range(len(b)))
    assert found.differs.tolist() == [a[i] != b[j] for i, j in found.pairs.tolist()]
    if len(a) == len(b):
        assert one == other == list(range(len(a)))


@given(st.lists(st.integers(), min_size=2, max_size=30, unique=True), st.data())
def test_what_was_put_in_is_what_is_alone(a, data):
    at = data.draw(st.integers(0, len(a)))
    more = data.draw(st.integers(1, 5))
    found = align(a, [*a[:at], *("new",) * more, *a[at:]])
    assert found.only_a == () and found.only_b == tuple(range(at, at + more))
    assert not found.differs.any()


def test_too_much_that_differs_is_not_searched():
    n = 5000
    a, b = ["x", *range(n), "y"], ["x", *range(n, 2 * n + 1), "y"]
    found = align(a, b)
    assert not found.searched and found.pairs.tolist() == [[0, 0], [n + 1, n + 2]]
    assert len(found.only_a) == n and len(found.only_b) == n + 1


# Differences.


@settings(max_examples=60)
@given(
    st.integers(0, 1 << 30),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_cell_holds_the_entry_of_the_largest_absolute_value(seed, n, m, p, q):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, m)).astype(np.float32)
    x[rng.random((n, m)) < 0.3] = np.nan
    got = pooled_signed(x, p, q)
    for i in range(-(-n // p)):
        for j in range(-(-m // q)):
            cell = x[i * p : (i + 1) * p, j * q : (j + 1) * q].ravel()
            cell = cell[~np.isnan(cell)]
            if len(cell):
                assert got[i, j] == cell[np.abs(cell).argmax()]
            else:
                assert np.isnan(got[i, j])


@pytest.mark.parametrize("head", ["L0H0", "L1H0", "L2H3", "L3H1"])
def test_differences_are_those_of_the_dense_patterns_of_two_prompts(model, prompts, root, head):
    kept_traces = traces(root[0], "one")
    a, b = kept_traces["A"].head(head), kept_traces["B"].head(head)
    found = align_towers(a.layer.tower, b.layer.tower)
    assert found.only_a and found.only_b and found.differs.any()
    layer, index = a.layer.index, a.head
    one, other = (dense(model, p)[layer, index] for p in prompts)
    n = len(found)
    want = np.full((n, n), np.nan)
    for r, (i, j) in enumerate(found.pairs.tolist()):
        for c, (k, m) in enumerate(found.pairs.tolist()):
            if k <= i or m <= j:
                want[r, c] = one[i, k] - other[j, m]
    got = difference(a, b, found, (0, n), (0, n))
    assert got.exact
    np.testing.assert_allclose(got.values, want, atol=3e-3)
    part = difference(a, b, found, (3, 9), (2, 7))
    np.testing.assert_allclose(part.values, got.values[3:9, 2:7], atol=1e-4)
    for row in (0, n // 2, n - 1):
        mine, theirs, change = row_difference(a, b, found, row)
        np.testing.assert_allclose(change, got.values[row], atol=1e-4)
        i, j = found.pairs[row]
        np.testing.assert_allclose(np.nan_to_num(mine), one[i, found.pairs[:, 0]], atol=3e-3)
        np.testing.assert_allclose(np.nan_to_num(theirs), other[j, found.pairs[:, 1]], atol=3e-3)
    np.testing.assert_array_equal(
        difference(a, b, found, (0, n), (0, n), cells=5).values,
        pooled_signed(got.values, -(-n // 5), -(-n // 5)),
    )


def test_differences_are_those_of_the_dense_patterns_of_two_models(model, prompts, root):
    place, other = root
    a, b = traces(place, "one")["A"].head("L1H0"), traces(place, "two")["A"].head("L1H0")
    found = align_towers(a.layer.tower, b.layer.tower)
    n = len(found)
    want = dense(model, prompts[0])[1, 0] - dense(other, prompts[0])[1, 0]
    got = difference(a, b, found, (0, n), (0, n)).values
    assert np.abs(want).max() > 0.05
    np.testing.assert_allclose(np.nan_to_num(got), want, atol=3e-3)
    assert (np.isnan(got) == np.triu(np.ones((n, n), bool), 1)).all()


def test_wide_gaps_are_left_out_and_change_nothing(model, tmp_path):
    ids = [1, *np.random.default_rng(0).integers(20, 200, 400).tolist()]
    made = [
        capture(model, Prompt(tuple(t), id=str(len(t))), tmp_path)
        for t in (ids, ids[:90] + ids[300:])
    ]
    a, b = (t.head("L1H1") for t in made)
    found = align_towers(a.layer.tower, b.layer.tower)
    assert len(found) == 191 and len(found.only_a) == 210
    whole = a.block((0, 401), (0, 401))[np.ix_(found.pairs[:, 0], found.pairs[:, 0])]
    want = np.nan_to_num(whole) - np.nan_to_num(b.block((0, 191), (0, 191)))
    got = difference(a, b, found, (0, 191), (0, 191))
    np.testing.assert_allclose(np.nan_to_num(got.values), want, atol=1e-6)


class Drawn:
    """A head whose map is given."""

    def __init__(self, p):
        self._p = p

    def block(self, q, k):
        return self._p[slice(*q), slice(*k)]

    def rows(self, at):
        return self._p[at]


def test_a_key_that_one_map_hides_counts_as_zero_and_one_that_both_hide_as_nothing():
    full = np.full((3, 3), 0.25, np.float32)
    causal = np.where(np.tri(3, dtype=bool), np.float32(0.5), np.float32(np.nan))
    found = align("abc", "abd")
    got = difference(Drawn(full), Drawn(causal), found, (0, 3), (0, 3)).values
    np.testing.assert_array_equal(got, np.where(np.tri(3, dtype=bool), -0.25, 0.25))
    both = difference(Drawn(causal), Drawn(causal), found, (0, 3), (0, 3)).values
    np.testing.assert_array_equal(np.isnan(both), ~np.tri(3, dtype=bool))
    np.testing.assert_array_equal(row_difference(Drawn(full), Drawn(causal), found, 0)[2],
                                  [-0.25, 0.25, 0.25])  # fmt: skip


def test_windows_are_bounded(root):
    assert window_of((0, 9000), (100, 200)) == ((9000 - WHOLE, 9000), (100, 200))
    a = traces(root[0], "one")["A"].head("L0H0")
    found = align_towers(a.layer.tower, a.layer.tower)
    for rows in ((0, 0), (-1, 3), (0, len(found) + 1)):
        with pytest.raises(InputError, match="must lie within"):
            difference(a, a, found, rows, (0, 3))
    with pytest.raises(InputError, match="must be one of"):
        row_difference(a, a, found, len(found))
    many = align(range(WHOLE + 5), range(WHOLE + 5))
    with pytest.raises(InputError, match="at most"):
        difference(a, a, many, (0, WHOLE + 1), (0, 3))


def test_the_map_is_centred_on_zero_and_its_labels_are_inert(root):
    kept_traces = traces(root[0], "one")
    a, b = kept_traces["A"].head("L1H0"), kept_traces["B"].head("L1H0")
    found = align_towers(a.layer.tower, b.layer.tower)
    made = difference(a, b, found, (0, len(found)), (0, len(found)))
    figure = difference_map(made, labels=[HOSTILE[2]] * len(found))
    heat = figure.data[0]
    assert heat.zmin == -heat.zmax and heat.zmax == pytest.approx(np.nanmax(np.abs(made.values)))
    np.testing.assert_array_equal(heat.z, made.values)
    assert "<" not in "".join(figure.layout.xaxis.ticktext)


# Texts.


def test_what_is_no_text_is_refused_in_a_line():
    for text, why in (
        ("", "not empty"), (" \n", "not empty"), (3, "must be a text"), (None, "must be a text"),
        ("x" * 1_000_001, "1,000,000"), ("ab\ud800", "character 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            check_text(text, "the prompt")
    body = {"model": "zoo:needle", "texts": ["a"]}
    for patch in ({"model": ""}, {"texts": []}, {"texts": ["a", "b", "c"]}, {"generate": -1},
                  {"generate": "2"}, {"model": "zoo:nothing"}):  # fmt: skip
        with pytest.raises(InterpError):
            Asked.read(body | patch)


@pytest.mark.parametrize("text", [*HOSTILE, "--help", "-", "a\0b", "{", "[" * 5000, '{"a": 1}'])
def test_commands_read_back_what_was_typed(tmp_path, text):
    asked = Asked(Source("zoo:needle"), (text,), generate=2)
    assert not is_jsonl(text)
    argv = line_for(asked, written(asked), tmp_path)
    check_line(argv, tmp_path)
    assert argv[:5] == ["capture", "--model", "zoo:needle", "--generate", "2"]
    if "--prompts" in argv:
        path = tmp_path / "prompts" / argv[-1].rpartition("/")[2]
        assert [x.text for x in parse(path.read_bytes(), path.name)] == [text]
    else:
        assert argv[-2:] == ["--prompt", text]


def test_jsonl_is_prompts_and_reads_no_file(tmp_path):
    lines = '{"text": "the market", "id": "x", "spans": {"s": "market"}, "answer": " of"}\n'
    more = lines + '{"tokens": [1, 2]}'
    assert is_jsonl(more)
    asked = Asked(Source("zoo:needle"), (more,))
    made = written(asked)
    assert not made.short
    again = parse(made.jsonl.encode(), "x.jsonl")
    assert [(x.text, x.tokens) for x in again] == [("the market", None), (None, (1, 2))]
    assert again[0].spans == {"s": ((4, 10),)} and again[0].answer == " of"
    secret = tmp_path / "secret.png"
    with pytest.raises(InputError, match="hold no images"):
        written(Asked(Source("zoo:needle"), (json.dumps({"image": str(secret), "text": "x"}),)))


def test_files_of_prompts_are_named_by_what_they_hold_and_bounded(tmp_path, monkeypatch):
    first = kept("a\n", tmp_path)
    assert kept("a\n", tmp_path) == first != kept("b\n", tmp_path)
    assert first.parent == tmp_path / "prompts" and first.read_text() == "a\n"
    assert not kept("c\n", tmp_path, write=False).exists()
    monkeypatch.setattr("app.dashboard.prompt_run.ROOM", 5)
    with pytest.raises(InterpError, match="may take"):
        kept("dd\n", tmp_path)


def test_options_of_a_run_are_those_of_its_command():
    line = "headscope rank sink -m x --dtype=bfloat16 --device cpu --offline --prompt '--attn'"
    assert options_of({"command": line}) == {"--dtype": "bfloat16", "--device": "cpu",
                                             "--offline": ""}  # fmt: skip
    assert options_of({"command": "a 'b"}) == options_of({}) == {}


# Previews.


class Opened:
    """A queue opened when it is first asked: pytest sets streams of its own before a test."""

    def __init__(self, root):
        self._root, self._made = root, None

    def __getattr__(self, name):
        self._made = self._made or Jobs(self._root)
        return getattr(self._made, name)


@pytest.fixture
def queue(tmp_path):
    made = Opened(tmp_path / "served")
    yield made
    made.close()


def test_a_preview_is_what_the_tokenizer_and_the_command_say(queue, model):
    found = preview(queue, Asked(Source("zoo:needle"), (A, B)))
    for text, shown in zip((A, B), found["prompts"], strict=True):
        ids = model.tokenizer(text).input_ids
        assert shown["ids"] == ids and shown["count"] == len(ids) and shown["special"] == [0]
    reference = align(*(p["ids"] for p in found["prompts"]))
    assert found["align"]["pairs"] == len(reference)
    assert found["align"]["only_b"] == list(reference.only_b)
    argv = ["capture", "--model", "zoo:needle", "--prompt", A, "--prompt", B, "--dry-run",
            "--format", "json"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *argv], env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    counted = {r["quantity"]: r["value"] for r in found["cost"] if r["note"] == "counted"}
    said = {r["quantity"]: r["value"] for r in json.loads(done.stdout)["rows"]}
    assert counted and counted == {k: said[k] for k in counted}
    assert counted["tokens"] == sum(p["count"] for p in found["prompts"])
    assert said["files"] == {r["quantity"]: r["value"] for r in found["cost"]}["files"]


def test_a_preview_warns_of_what_cannot_run(queue):
    found = preview(queue, Asked(Source("zoo:needle"), ("zzz " * 3000,), generate=5))
    assert not found["fits"] and found["cost"] == []
    unknown, room = found["warnings"]
    assert "3000 tokens are unknown" in unknown
    assert "3,001 tokens and 5 more" in room and "2,048" in room
    with pytest.raises(InputError, match="no chat template"):
        preview(queue, Asked(Source("zoo:needle"), ("a",), chat=True))
    assert queue.call(lambda: 1) == 1


def test_a_chat_template_is_applied_once_and_tokenised_as_it_says(queue, tmp_path):
    from transformers import AutoTokenizer

    plain = load("zoo:needle")
    folder = tmp_path / "chat"
    plain.hf.save_pretrained(folder)
    plain.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}Note: {{ m['content'] }}. {% endfor %}Recall:"
    )
    plain.tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = tokenizer.apply_chat_template(
        [{"role": "user", "content": "lemon kite"}], add_generation_prompt=True, return_dict=False
    )
    found = preview(queue, Asked(Source(str(folder)), ("lemon kite",), chat=True))
    assert found["chat"] and found["prompts"][0]["ids"] == list(want)
    assert found["prompts"][0]["text"].endswith("Note: lemon kite. Recall:")
    assert list(want).count(1) == 1
    off = preview(queue, Asked(Source(str(folder)), ("lemon kite",)))
    assert off["prompts"][0]["count"] == 3


def test_an_answer_of_a_command_is_its_json_or_its_error(queue):
    argv = ["capture", "--model", "zoo:needle", "--dry-run", "--format", "json"]
    with pytest.raises(InputError, match="capture needs prompts"):
        queue.call(lambda: answer_of(argv))


# Needles.


def needle(**patch):
    body = {"needle": "Note: Cedar lemon kite drum.", "answer": "lemon kite drum",
            "question": "Recall: Cedar", "depths": "0,0.5,1", "lengths": "64, 128"}  # fmt: skip
    return Needle.read(body | patch)


@pytest.mark.parametrize("own", ["", "The dog sat. A cat ran! Who knows? It went."])
def test_needles_stand_where_their_spans_and_names_say(model, own):
    count = lambda text: len(model.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    made = grid(needle(haystack=own), count, 2048)
    assert [e["id"] for e in made[:4]] == ["needle-64-0", "needle-64-0.5", "needle-64-1",
                                           "needle-128-0"]  # fmt: skip
    for entry, prompt in zip(made, to_prompts(parse(jsonl(made).encode(), "x.jsonl"), model),
                             strict=True):  # fmt: skip
        length, depth = place_of(entry["id"])
        text, spans = entry["text"], entry["spans"]
        [[start, stop]], [[f0, f1]], [[q0, q1]] = spans["needle"], spans["fact"], spans["question"]
        assert text[start:stop] == "lemon kite drum" and text[f0:f1].startswith("Note: Cedar")
        assert text[q0:q1] == "Recall: Cedar" and q1 == len(text)
        assert length - 15 < len(prompt) <= length
        before = count(text[:f0])
        assert abs(before - depth * (len(prompt) - count(text[f0:f1]) - 4)) < 14
    assert made[0]["text"].startswith("Note:") and made[2]["text"].index("Note:") > 100


def test_needles_that_do_not_fit_are_refused(model):
    count = lambda text: len(text.split())  # noqa: E731
    for patch, why in (
        ({"answer": "nowhere"}, "exactly once"), ({"depths": "0,2"}, "0..1"),
        ({"depths": "0,nan"}, "0..1"), ({"lengths": "x"}, "numbers"), ({"lengths": ""}, "numbers"),
        ({"lengths": "99999999"}, "1..32768"),
        ({"lengths": ",".join(map(str, range(50, 100))), "depths": "0,.5,1"}, "100 prompts"),
        ({"question": "\ud800"}, "surrogate"), ({"haystack": 7}, "must be a text"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            needle(**patch)
    with pytest.raises(InputError, match="take 8 tokens; a length of 5"):
        grid(needle(lengths="5"), count)
    with pytest.raises(InputError, match="must fit the model's 130"):
        grid(needle(), count, 130)
    with pytest.raises(InputError, match="first sentence takes 300"):
        grid(needle(haystack="x " * 300), count)


def test_scores_are_sorted_by_the_names_of_their_prompts(model, tmp_path):
    from heads.scoring import execute, plan

    count = lambda text: len(model.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    made = to_prompts(parse(jsonl(grid(needle(), count)).encode(), "x.jsonl"), model)
    table = execute(model, plan(model, ["retrieval"], prompts=made))["retrieval"]
    head = table.top(1)[0]
    found = scores_of(table, head)
    assert found.lengths == (64, 128) and found.depths == (0.0, 0.5, 1.0) and found.asked == 6
    column = table.heads.index(head)
    for name, value in zip(table.examples, table.per_example[:, column], strict=True):
        length, depth = place_of(name)
        at = found.depths.index(depth), found.lengths.index(length)
        assert found.mean[at] == pytest.approx(value) and found.counts[at] == 1
    drawn = needle_grid(found.lengths, found.depths, found.mean, found.counts).data[0]
    np.testing.assert_allclose(drawn.z, found.mean.astype(np.float32))
    assert drawn.zmax >= 1.0 and drawn.zmin == 0.0


# Routes.


class Busy:
    """A worker that has no time."""

    root = None

    def call(self, function, timeout):
        raise BusyError("the model is busy: a job is running", hint="wait for the job")


def client(place, jobs):
    return make_app(place, Access("127.0.0.1", 8050), jobs).server.test_client()


def post(client, path, body, **options):
    return client.post(path, headers={"Host": "127.0.0.1:8050"}, **(options or {"json": body}))


def test_a_busy_worker_and_bad_requests_are_lines(tmp_path):
    asked = client(tmp_path, Busy())
    body = {"model": "zoo:needle", "texts": ["a"]}
    for patch, status, words in (
        ({}, 409, "the model is busy: a job is running; wait for the job"),
        ({"model": "zoo:nothing"}, 409, "no zoo model named"),
        ({"texts": ["x" * 1_000_001]}, 400, "1,000,000"),
        ({"texts": ["\ud800"]}, 400, "surrogate"),
        ({"texts": "a"}, 400, "one or two texts"),
    ):
        answer = post(asked, "/prompt/preview", body | patch)
        assert answer.status_code == status and words in answer.text
        assert answer.mimetype == "text/plain" and "Traceback" not in answer.text
    for data in (b"", b"\xff", b"[1]", b"[" * 5000):
        assert post(asked, "/prompt/preview", None, data=data).status_code == 400
    answer = post(asked, "/prompt/preview", body | {"texts": ["x" * 5_000_000]})
    assert answer.status_code == 413 and "at most 4 MB" in answer.text


def test_pairs_and_texts_of_traces(root):
    place, _ = root
    asked = client(place, None)
    one = traces(place, "one")
    get = lambda path: asked.get(path, headers={"Host": "127.0.0.1:8050"})  # noqa: E731
    found = get(f"/prompt/pair/one/{one['A'].key}/one/{one['B'].key}").json
    reference = align(one["A"].info["ids"], one["B"].info["ids"])
    assert found["align"]["pairs"] == len(reference)
    assert found["align"]["differs"] == reference.pairs[reference.differs].tolist()
    assert found["a"][:4] == ["<bos>", "note", ":", "cedar"]
    assert get(f"/prompt/text/one/{one['B'].key}").json["text"] == B
    assert {t["id"] for t in get("/prompt/traces/one").json} == {"A", "B"}
    assert get("/prompt/text/one/nope").status_code == 404
    assert get("/prompt/traces/nope").status_code == 404
    assert post(asked, "/prompt/preview", {"texts": ["a"]}).status_code in (404, 405)


def test_a_server_that_reads_needs_no_torch(root):
    code = (
        "import sys\nfrom pathlib import Path\nfrom app.dashboard.security import Access\n"
        "from app.dashboard.server import make_app\n"
        f"app = make_app(Path({str(root[0])!r}), Access('127.0.0.1', 8050))\n"
        "c = app.server.test_client()\nh = {'Host': '127.0.0.1:8050'}\n"
        "key = c.get('/prompt/traces/one', headers=h).json[0]['key']\n"
        "assert c.get(f'/prompt/pair/one/{key}/one/{key}', headers=h).status_code == 200\n"
        "assert c.get(f'/prompt/text/one/{key}', headers=h).status_code == 200\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


# In the browser.


def test_a_prompt_is_typed_previewed_run_and_compared(page, tmp_path):
    with served_to(page, tmp_path, jobs=True) as site:
        show(page, f"{site}/r/-/prompt?model=zoo:needle")
        page.problems.clear()  # the header asks for a run that there is not
        page.fill("#prompt-a", A)
        page.fill("#prompt-b", B)
        assert page.inner_text("#prompt-command") == shlex.join(
            ["headscope", "capture", "--model", "zoo:needle", "--prompt", A, "--prompt", B]
        )
        page.click("#prompt-preview")
        page.wait_for_selector("#prompt-tokens .prompt-strip")
        marked = page.eval_on_selector_all("#prompt-tokens .differ", "all => all.length")
        assert marked == 6 and "lemon / opal (4)" in page.inner_text("#prompt-tokens")
        assert page.eval_on_selector_all("#prompt-tokens .lone", "all => all.length") > 0
        page.click("#prompt-run")
        page.wait_for_selector("#prompt-results a >> text=open its heads")
        page.wait_for_selector("#prompt-map .heatmaplayer image")
        page.wait_for_selector("#prompt-strips .differ")
        name = page.evaluate("() => headscope.state.run")
        assert A not in page.url and "Cedar" not in page.url and name.startswith("capture-")
        mine = {t.id: t for t in library(tmp_path).open(name).traces.values()}
        a, b = mine["prompt-1"].head("L0H0"), mine["prompt-2"].head("L0H0")
        found = align_towers(a.layer.tower, b.layer.tower)
        want = difference(a, b, found, (0, len(found)), (0, len(found))).values
        page.evaluate("() => headscope.select({dq: '4:8', dk: '0:8', dr: '6'})")
        page.wait_for_function(
            "() => document.querySelector('#prompt-map .js-plotly-plot')"
            "._fullData[0].z.length === 4"
        )
        shown = page.evaluate(
            "() => Array.from(document.querySelector('#prompt-map .js-plotly-plot')"
            "._fullData[0].z, row => Array.from(row, x => Number.isFinite(x) ? x : null))"
        )
        got = np.array([[np.nan if x is None else x for x in row] for row in shown])
        np.testing.assert_allclose(got, want[4:8, :8], atol=1e-4)
        page.wait_for_function(
            "() => document.getElementById('prompt-bars-text').textContent.startsWith('Row 6, ')"
        )
        page.click("#prompt-results a >> text=open its heads >> nth=0")
        page.wait_for_function("() => headscope.state.page === 'head'")
        assert page.evaluate("() => headscope.state.prompt") == mine["prompt-1"].key


@pytest.mark.slow
def test_needles_are_made_scored_and_drawn(page, tmp_path):
    with served_to(page, tmp_path, jobs=True) as site:
        show(page, f"{site}/r/-/prompt?model=zoo:needle")
        page.problems.clear()
        page.fill("#needle-lengths", "64,128")
        page.fill("#needle-depths", "0,1")
        page.click("#needle-make")
        page.wait_for_selector("#needle-rank:not([disabled])")
        assert page.inner_text("#needle-jsonl").count('"id"') == 4
        page.click("#needle-rank")
        page.wait_for_selector("#prompt-grid .heatmaplayer image")
        shown = page.evaluate(
            "() => Array.from(document.querySelector('#prompt-grid .js-plotly-plot')"
            "._fullData[0].z, row => Array.from(row))"
        )
        run = library(tmp_path).open(page.evaluate("() => headscope.state.run"))
        table = run.tables["retrieval"]
        np.testing.assert_allclose(shown, scores_of(table, table.top(1)[0]).mean, atol=1e-6)


def test_hostile_texts_are_texts(page, tmp_path):
    folder = needle_run(tmp_path)
    hostile(folder)
    (key,) = [p.name for p in (folder / "traces").iterdir()]
    with served_to(page, tmp_path, jobs=True) as site:
        show(page, f"{site}/r/needle/prompt?p={key}&ab={key}&dq=0:12&dk=0:12&model=zoo:needle")
        page.wait_for_selector("#prompt-strips .token")
        page.wait_for_selector("#prompt-map .heatmaplayer image")
        first = page.eval_on_selector("#prompt-strips .token >> nth=1", "e => e.textContent")
        assert first == HOSTILE[0].replace(" ", "·")
        assert (
            page.eval_on_selector_all("#prompt-map text a, #prompt-map text b", "x => x.length")
            == 0
        )
        for text in (*HOSTILE, "\0", json.dumps({"text": "the market", "id": HOSTILE[1],
                                                 "spans": {HOSTILE[0]: "the"}})):  # fmt: skip
            page.fill("#prompt-a", text)
            page.click("#prompt-preview")
            page.wait_for_selector("#prompt-tokens .prompt-strip, #prompt-error .alert")
        assert HOSTILE[1] in page.inner_text("#prompt-tokens h3")
        page.evaluate(
            "() => { document.getElementById('prompt-a').value = 'the '.repeat(260000); }"
        )
        page.click("#prompt-preview")
        page.wait_for_selector("#prompt-error .alert")
        assert "at most 1,000,000 characters" in page.inner_text("#prompt-error")
        assert page.evaluate("() => window.hacked") is None


def test_a_chosen_prompt_is_taken_up_and_a_file_is_loaded(page, root):
    place, _ = root
    one = traces(place, "one")
    with served_to(page, place) as site:
        show(page, f"{site}/r/one/prompt?p={one['B'].key}")
        page.wait_for_function("() => document.getElementById('prompt-a').value")
        assert page.input_value("#prompt-a") == B
        assert page.query_selector("#prompt-run") is None
        assert "--prompt" in page.inner_text("#prompt-command")
        page.set_input_files(
            "#prompt-upload input",
            [{"name": "x.txt", "mimeType": "text/plain", "buffer": "ü <b>x</b>\u202e".encode()}],
        )
        page.wait_for_function("() => document.getElementById('prompt-a').value.startsWith('ü')")
        assert page.input_value("#prompt-a") == "ü <b>x</b>\u202e"
        page.set_input_files(
            "#prompt-upload input",
            [{"name": "y.txt", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00"}],
        )
        page.wait_for_selector("#prompt-error .alert")
        assert "y.txt must hold text in UTF-8" in page.inner_text("#prompt-error")


@pytest.mark.slow
def test_axe_finds_nothing(page, root):
    place, _ = root
    one = traces(place, "one")
    with served_to(page, place, jobs=True) as site:
        show(page, f"{site}/r/one/prompt?p={one['A'].key}&ab={one['B'].key}&theme=light")
        page.click("#prompt-preview")
        page.wait_for_selector("#prompt-tokens .prompt-strip")
        page.click("#needle-make")
        page.wait_for_selector("#needle-rank:not([disabled])")
        page.wait_for_selector("#prompt-strips .differ")
        for theme in ("light", "dark"):
            page.evaluate("(theme) => window.headscope.select({theme})", theme)
            ready(page)
            assert page.get_attribute("html", "data-theme") == theme
            found = violations(page)
            assert not found, "\n".join(found)
