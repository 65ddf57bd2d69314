"""One head as a page: what it holds, how large it is, that no token can do anything in it."""

import base64
import json
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
from app_kit import assert_refused, in_process

import app
import interp
from app.headdata import Facts, Seen, seen_of
from app.headview import HeadView, show_head
from app.tokentext import shown
from heads import score
from interp.errors import HeadIdError, RunError, UnknownNameError
from interp.headid import HeadId
from interp.run import Run
from interp.tasks import make_task
from interp.traces import Trace, capture, decode, encode, traces_of
from interp.traces.pooling import Window, aligned, pooled

chromium = pytest.fixture(scope="module")(browser.chromium)
page = pytest.fixture(browser.page)

HOSTILE = (
    "</script><script>window.x=1</script>",
    "<img src=x onerror='window.x=1'>",
    "<!--<script>",
    "]]>",
    "\u202egnp.exe\u202c",
    "\u2028\u2029",
    "a\nb\tc\r\x00\x1b[31m",
    "\"quoted\" & 'single' \\u003c",
    "\ud800",
    "",
    " ",
    "שלום",
    "e\u0301\u200d",
    "${window.x=1}`",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A complete run of zoo:needle with two prompts, the second longer than 512 tokens."""
    model = interp.load("zoo:needle")
    place = tmp_path_factory.mktemp("runs") / "needle"
    tables = score(model, ["sink"], n=4)
    with Run.open_or_create(place, {"what": "test"}, {"model": model.name}) as run:
        run.finish(list(tables.values()))
    for lengths in ((96,), (700,)):
        [prompt] = make_task("needle", {"lengths": lengths}).prompts(model, 1)
        capture(model, replace(prompt, id=f"p{lengths[0]}"), place)
    return place


def data_of(html: str) -> dict:
    """What the page's script is given."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def codes_of(html: str) -> np.ndarray:
    """The map as a browser decodes it."""
    data = data_of(html)
    raw = zlib.decompress(base64.b64decode(data["map"]))
    return np.frombuffer(raw, np.uint8).reshape(data["rows"], data["cols"])


def made(p: np.ndarray, tokens: list[str], *, keys: list[str] | None = None, **more) -> Seen:
    """A head with this map, NaN where unseen."""
    n, m = p.shape

    def window(cells: int) -> Window:
        (_, _, pq), (_, _, pk) = aligned(0, n, n, cells), aligned(0, m, m, cells)
        codes = pooled(encode(p, np.isfinite(p)), pq, pk)
        return Window(codes, 0, 0, n, m, pq, pk)

    keys = tokens if keys is None else keys
    known = {"strongest": ((n - 1, 0, 0.5),), "scores": (), **more}
    return Seen(HeadId(1, 2), "zoo:none", "p", tokens, keys, window, **known)


def causal(n: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Softmax of noise, which nothing can deflate well."""
    s = np.random.default_rng(seed).normal(size=(n, n)) * spread
    s[np.triu_indices(n, 1)] = -np.inf
    e = np.exp(s)
    return np.where(np.isfinite(s), e / e.sum(1, keepdims=True), np.nan)


def test_the_page_holds_every_entry_of_the_map(folder):
    view = show_head(folder, "L1H0", "p96")
    [trace] = [t for t in traces_of(folder).values() if t.id == "p96"]
    n = len(trace.tokens)
    want = trace.head("L1H0").block((0, n), (0, n))
    got = decode(codes_of(view.html))
    assert view.note == "" and got.shape == want.shape
    assert (np.isnan(got) == np.isnan(want)).all()
    # A code is a rounded square root: half a step of 1/254 there.
    assert np.nanmax(np.abs(np.sqrt(got) - np.sqrt(want))) <= 0.5 / 254 + 1e-6
    assert data_of(view.html)["queries"] == [shown(t) for t in trace.tokens]


def test_scores_and_summaries_are_on_the_page(folder):
    html = show_head(folder, "L0H2").html
    table = Run.load(folder).scores["sink"]
    row = next(r for r in table.rows() if r["head"] == "L0H2")
    cells = re.findall(r"<td>(.*?)</td>", html)
    for name in ("score", "ci_lo", "ci_hi", "null", "q"):
        assert f"{row[name]:.3g}" in cells
    assert {"sink", str(row["n"]), row["verdict"]} <= set(cells)
    assert "haystack" in html and "mean mass by distance" in html
    seen = seen_of(folder, HeadId(0, 2), None)
    trace = next(iter(traces_of(folder).values()))
    n = len(trace.tokens)
    whole = np.nan_to_num(trace.head("L0H2").block((0, n), (0, n)))
    best = [i for i in range(n) if whole[i].argmax() != 0] or list(range(n))
    want = sorted((whole[i].max() for i in best), reverse=True)[:3]
    assert [p for _, _, p in seen.strongest] == pytest.approx(want, abs=1e-3)
    received = whole.sum(0) / (n - np.arange(n))
    [looked] = [t for t in seen.tables if t.title == "Most looked at"]
    assert [float(row[2]) for row in looked.rows] == pytest.approx(
        np.sort(received)[::-1][:5], abs=1e-3
    )
    [distance] = [t for t in seen.tables if t.title == "Distance"]
    assert list(distance.columns[:4]) == ["0", "1", "2\N{EN DASH}3", "4\N{EN DASH}7"]
    for i, j, p in seen.strongest:
        assert p == pytest.approx(np.nanmax(trace.head("L0H2").rows([i])), abs=1e-3)
        assert np.nanargmax(trace.head("L0H2").rows([i])) == j


def test_a_longer_prompt_is_pooled_by_its_maximum_and_says_so(folder):
    view = show_head(folder, "L1H0", "p700")
    trace = next(t for t in traces_of(folder).values() if t.id == "p700")
    n = len(trace.tokens)
    codes, data = codes_of(view.html), data_of(view.html)
    assert n > 512 and codes.shape == (-(-n // 2),) * 2 and data["pool"] == [2, 2]
    p = np.nan_to_num(trace.head("L1H0").block((0, n), (0, n)), nan=-1.0)
    p = np.pad(p, (0, n % 2), constant_values=-1.0)
    top = p.reshape(len(p) // 2, 2, len(p) // 2, 2).max((1, 3))
    assert (codes == encode(top, top >= 0)).all()
    assert "largest of 2 queries × 2 keys" in view.note and "headscope serve" in view.note
    assert "largest of 2 queries" in view.html and len(data["queries"]) == len(codes)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_a_page_of_512_tokens_is_small_and_shows_every_cell(spread):
    p = causal(512, spread=spread)
    view = HeadView(made(p, [f"token{i}" for i in range(512)]))
    assert len(view.html) <= 120_000
    # Noise does not deflate: then levels are rounded, which the page says, and no cell is lost.
    got = decode(codes_of(view.html))
    assert (np.isnan(got) == np.isnan(p)).all()
    step = {"": 1, "127": 2, "63": 4}[
        (re.findall("rounded to ([0-9]+) levels", view.note) or [""])[0]
    ]
    assert "queries" not in view.note and (step == 1) == (view.note == "")
    assert (step > 1) == (spread in (1.0, 2.0))
    assert np.nanmax(np.abs(np.sqrt(got) - np.sqrt(p))) <= (step + 1) / 2 / 254 + 1e-6


def test_no_page_is_large_whatever_it_shows():
    p = np.random.default_rng(0).random((512, 512))  # bidirectional noise
    words = ["\u202e" * 50] * 512
    facts = (Facts("t", "", ("a",), [["x"]]),)
    view = HeadView(made(p, words, tables=facts))
    assert len(view.html) <= 120_000
    assert "ach cell is the largest of 2 queries" in view.html and codes_of(view.html).shape == (
        256,
        256,
    )
    assert "largest of 2 queries × 2 keys" in view.note


def test_a_real_head_at_512_tokens_is_small(folder):
    # The trace of 700 tokens, cut: the numbers of a trained model.
    trace = next(t for t in traces_of(folder).values() if t.id == "p700")
    for head in ("L0H2", "L1H0", "L2H3", "L3H1"):
        p = trace.head(head).block((0, 512), (0, 512))
        view = HeadView(made(p, trace.tokens[:512]))
        assert len(view.html) <= 120_000 and codes_of(view.html).shape == (512, 512)


# ---- hostile tokens


def hostile_view(**more) -> HeadView:
    tokens = list(HOSTILE)
    facts = (Facts(HOSTILE[0], HOSTILE[1], HOSTILE[:2], [HOSTILE[:2]]),)
    row = {"detector": HOSTILE[0], "score": 0.5, "ci_lo": None, "ci_hi": None, "n": 1,
           "null": None, "q": None, "verdict": HOSTILE[1]}  # fmt: skip
    seen = made(
        causal(len(tokens)), tokens, tables=facts, scores=(row,), notes=(HOSTILE[1],), **more
    )
    return HeadView(replace(seen, model=HOSTILE[0], prompt=HOSTILE[1], unseen=HOSTILE[0]))


def test_no_token_leaves_its_place():
    html = hostile_view().html
    assert html.isascii()
    assert len(re.findall("<script", html)) == 2 and len(re.findall("</script", html)) == 2
    assert "<img" not in html and "<!--" not in html
    data = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    assert not set("<>&") & set(data)
    assert data_of(html)["queries"] == [shown(t) for t in HOSTILE]


def test_signs_without_a_shape_are_written_out():
    assert shown("\u202eb") == "\\u202eb" and shown("\ud800") == "\\ud800"
    assert shown("a\nb\t") == "a\\nb\\t" and shown(" a") == "·a" and shown("") == '""'
    assert shown("\U000e0041") == "\\U000e0041" and shown("\xa0") == "\\u00a0"
    assert shown("x" * 40) == "x" * 32 + "…" and shown("שלום") == "שלום"


def test_the_policy_names_the_script_and_style_of_the_page():
    html = hostile_view().html
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    import hashlib

    for tag, text in (
        ("script", html.rpartition("<script>")[2].partition("</script>")[0]),
        ("style", html.partition("<style>")[2].partition("</style>")[0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r'\son\w+=|\sstyle="|javascript:|https?://', html.partition("<style>")[0])


def test_the_scripts_are_ascii_and_bring_no_markup():
    for name in ("headview.js", "headview.css"):
        text = Path(app.__file__).with_name(name).read_text()
        assert text.isascii()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|eval\(|Function\(|http", text)


# ---- notebooks


def test_the_object_shows_itself(folder, tmp_path):
    view = app.show_head(folder, "L1H0")
    frame = view._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" ') and "allow-same-origin" not in frame
    inner = re.fullmatch(r'<iframe [^>]*srcdoc="([^"]*)"></iframe>', frame)[1]
    import html

    assert html.unescape(inner) == view.html
    assert repr(view).startswith("L1H0 of zoo:needle on prompt p") and "sink: " in repr(view)
    assert view.save(tmp_path / "h.html").read_text() == view.html
    with Run.load(folder) as run:
        assert show_head(run, HeadId(1, 0)).html == view.html


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, app; app.__all__; print({'torch', 'numpy', 'app.headview'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_showing_a_head_needs_no_torch(folder):
    code = (
        f"import sys, app; app.show_head({str(folder)!r}, 'L1H0').html; "
        "print({'torch', 'transformers', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_cannot_be_shown_is_refused(folder, tmp_path):
    with pytest.raises(HeadIdError, match="L9H9 is in none of the prompts"):
        show_head(folder, "L9H9")
    with pytest.raises(HeadIdError, match="a head is written"):
        show_head(folder, "nine")
    with pytest.raises(HeadIdError, match="vision"):
        show_head(folder, "vision.L0H0")
    with pytest.raises(UnknownNameError, match="named 'p97'") as caught:
        show_head(folder, "L1H0", "p97")
    assert "p96" in caught.value.hint
    with pytest.raises(RunError, match="there is no run"):
        show_head(tmp_path / "none", "L1H0")
    with Run.open_or_create(tmp_path / "bare", {"what": "bare"}) as run:
        run.finish([])
    with pytest.raises(RunError, match="keeps no attention") as caught:
        show_head(tmp_path / "bare", "L1H0")
    assert "headscope capture" in caught.value.hint


def test_a_prompt_is_named_by_id_or_key(folder):
    for key, trace in traces_of(folder).items():
        by_id, by_key = (show_head(folder, "L1H0", name) for name in (trace.id, key))
        assert by_id.prompt == by_key.prompt == trace.id and by_id.html == by_key.html


def test_a_damaged_trace_is_one_line(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    trace = Trace(next(p for p in (copy / "traces").iterdir()))
    file = trace.folder / "text-1.safetensors"
    file.write_bytes(file.read_bytes()[:400])
    done = in_process(capsys)("export", str(copy), "--head", "L1H0", "--prompt", trace.id,
                              "--out", str(tmp_path / "x.html"))  # fmt: skip
    assert_refused(done, "damaged")
    assert not (tmp_path / "x.html").exists()


def test_the_command_writes_the_page(folder, tmp_path, capsys):
    out = tmp_path / "head.html"
    run = in_process(capsys)
    done = run("export", str(folder), "--head", "L1H0", "--out", str(out), "--prompt", "p700")
    assert done.code == 0 and "headscope serve" in done.err
    [row] = done.rows
    assert out.read_text() == show_head(folder, "L1H0", "p700").html
    assert row["bytes"] == str(out.stat().st_size) and row["prompt"] == "p700"
    for args, part in (
        (["--out", "x"], "needs one of --to FORMAT and --head"),
        (["--out", "x", "--head", "L1H0", "--to", "headvis"], "needs one of"),
        (["--out", "x", "--to", "headvis", "--prompt", "a"], "--prompt goes with --head"),
        (["--out", "x", "--head", "L1H0", "--tower", "text"], "--tower goes with --to"),
    ):
        done = run("export", str(folder), *args)
        assert (done.code, done.out) == (2, "") and part in done.err


# ---- in a browser


def opened(page, view: HeadView, tmp_path: Path):
    page.goto(view.save(tmp_path / "head.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=20_000)
    return page


def pixels(page) -> np.ndarray:
    """[row, column, rgba] of the map."""
    raw, rows, cols = page.evaluate(
        "() => { const c = document.getElementById('map');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [Array.from(d), c.height, c.width]; }"
    )
    return np.array(raw, np.uint8).reshape(rows, cols, 4)


def test_a_browser_draws_the_map(page, folder, tmp_path):
    view = show_head(folder, "L1H0", "p96")
    drawn = pixels(opened(page, view, tmp_path))
    codes = codes_of(view.html)
    assert drawn.shape[:2] == codes.shape and (drawn[..., 3] == 255).all()
    grey = (drawn[..., :3] == 150).all(-1)
    assert (grey == (codes == 0)).all()
    # One colour a code, brighter for more.
    light = drawn[..., :3].astype(float) @ [0.299, 0.587, 0.114]
    order = np.argsort(codes[~grey], kind="stable")
    assert (np.diff(light[~grey][order]) >= -1).all() and light[~grey].max() > 180


def test_tokens_answer_to_pointer_and_keys(page, folder, tmp_path):
    view = show_head(folder, "L1H0", "p96")
    opened(page, view, tmp_path)
    codes = codes_of(view.html)
    texts = data_of(view.html)["queries"]
    assert page.locator(".token").all_text_contents() == texts
    last = len(texts) - 1

    page.hover(f"#q{last - 1}")
    best = int(codes[last - 1].argmax())
    assert page.text_content("#said").startswith(
        f"{texts[last - 1]} ({last - 1}) looks at: {texts[best]} ({best}) "
    )
    alpha = page.evaluate(f"getComputedStyle(document.getElementById('q{best}')).backgroundColor")
    assert float(alpha.rpartition(",")[2].strip(" )")) == pytest.approx(
        (codes[last - 1, best] - 1) / 254, abs=0.005
    )
    page.click(f"#q{last}")
    page.hover("#q3")  # held: pointing elsewhere changes nothing
    assert page.text_content("#said").startswith(f"{texts[last]} ({last}) looks at: ")
    page.focus("#queries")
    page.keyboard.press("Escape")
    page.hover("#q5")
    assert page.text_content("#said").startswith(f"{texts[5]} (5) looks at: ")
    page.hover("#q4")
    later = codes[:, 4].astype(int) * (np.arange(len(texts)) != 4)
    p = float(decode(codes[[later.argmax()], 4])[0])
    shown_p = f"{p:.2f}" if p >= 0.0995 else f"{p:.3f}"
    said = page.text_content("#said")
    assert f"; is looked at by: {texts[later.argmax()]} ({later.argmax()}) {shown_p}" in said
    page.keyboard.press("Home")
    assert page.text_content("#said").startswith(f"{texts[0]} (0) looks at: ")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#queries", "aria-activedescendant") == "q1"
    assert page.get_attribute("#q1", "aria-selected") == "true"
    assert page.locator("[aria-selected]").count() == 1
    page.hover("#map", position={"x": 3, "y": 3})
    assert page.text_content("#here").startswith(f"query {texts[0]} (0), key {texts[0]} (0): 1")


def test_cells_of_a_pooled_map_say_what_they_cover(page, folder, tmp_path):
    view = show_head(folder, "L1H0", "p700")
    opened(page, view, tmp_path)
    n, last = view.seen.n_query, len(data_of(view.html)["queries"]) - 1
    covered = f"{n - 1}" if n % 2 else f"{n - 2}\N{EN DASH}{n - 1}"
    page.focus("#queries")
    page.keyboard.press("End")
    said = page.text_content("#said")
    assert (
        f" ({covered}) looks at: " in said
        and page.locator(".token.at").get_attribute("id") == f"q{last}"
    )
    page.keyboard.press("Home")
    assert " (0\N{EN DASH}1) looks at: " in page.text_content("#said")


def test_no_hostile_token_does_anything_in_a_browser(page, tmp_path):
    view = hostile_view()
    opened(page, view, tmp_path)
    assert page.evaluate("window.x") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert page.locator(".token").all_text_contents() == [shown(t) for t in HOSTILE]
    for i in range(len(HOSTILE)):
        page.hover(f"#q{i}")
    assert page.evaluate("window.x") is None
    assert page.evaluate("Object.keys(window).filter(n => ['data', 'codes', 'map'].includes(n) "
                         "&& !(window[n] instanceof Element))") == []  # fmt: skip


def test_two_heads_in_a_notebook_do_not_meet(page, folder, tmp_path):
    views = [show_head(folder, head, "p96") for head in ("L1H0", "L0H1")]
    body = "<!DOCTYPE html><title>n</title>" + "".join(v._repr_html_() for v in views)
    (tmp_path / "notebook.html").write_text(body)
    page.goto((tmp_path / "notebook.html").as_uri())
    frames = [page.frame_locator(f"iframe >> nth={i}") for i in (0, 1)]
    for frame, view in zip(frames, views, strict=True):
        frame.locator("html[data-ready=yes]").wait_for(timeout=20_000, state="attached")
        assert frame.locator("h1").text_content() == f"{view.head} of zoo:needle"
    # Of an origin of its own: the notebook's page is out of its reach.
    assert page.frames[1].evaluate("() => { try { return parent.document.title } "
                                   "catch { return 'refused' } }") == "refused"  # fmt: skip


def test_different_queries_and_keys_have_a_panel_each(page, tmp_path):
    p = np.random.default_rng(1).dirichlet(np.ones(5), 3)
    view = HeadView(made(p, ["a", "b", "c"], keys=list("vwxyz")))
    opened(page, view, tmp_path)
    assert page.locator("#queries .token").all_text_contents() == ["a", "b", "c"]
    assert page.locator("#keys .token").all_text_contents() == list("vwxyz")
    page.hover("#q1")
    best = int(p[1].argmax())
    assert page.text_content("#said").startswith(f"b (1) looks at: {'vwxyz'[best]} ({best}) ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(page, folder, tmp_path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    # The rules are injected as a script, which the page's own policy forbids.
    view = show_head(folder, "L1H0", "p96")
    html = re.sub(r"<meta http-equiv[^>]*>", "", view.html)
    # A page without a background has the browser's, which the rules take for white.
    html = html.replace("<style>", "<style>html{background:Canvas}")
    (tmp_path / "free.html").write_text(html)
    page.goto((tmp_path / "free.html").as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.hover("#q40")
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    label = page.get_attribute("#map", "aria-label")
    assert (
        page.get_attribute("#map", "role") == "img" and "queries" in label and "Strongest" in label
    )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgba(0, 0, 0, 0)"
