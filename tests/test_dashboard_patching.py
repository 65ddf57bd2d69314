"""The page Patching: its figures, its routes and states, and it in a browser."""

import csv
import io
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import browser
import numpy as np
import pytest
from app_kit import process
from dashboard_kit import HOSTILE, arrive, hostile, ready, served, served_to, show, violations
from test_app_positions import made

from app.cli import main
from app.dashboard import patching as of
from app.dashboard.jobs_line import check_line
from app.dashboard.library import Library
from app.dashboard.page import Site
from app.dashboard.patching_form import UNUSED, WHAT, argv_of
from app.dashboard.patching_panels import choices, others, prompts
from app.dashboard.patching_routes import command, csv_link, python
from app.dashboard.security import Access
from app.dashboard.server import make_app
from app.figures.patching import column_label, effect_grid, position_map, ticks, window_curves
from app.folders import within
from app.positions import read_positions
from app.positionview import cells, view_of
from interp.errors import InputError, RunError
from interp.files import read_table, write_table
from interp.headid import HeadId
from interp.run import Run
from interp.scores import HeadScores

chromium = pytest.fixture(scope="module")(browser.chromium)
tab = pytest.fixture(scope="module")(browser.tab)
page = pytest.fixture(browser.kept)
IOI = ("-m", "zoo:planted-ioi", "--n", "4", "-q")
MADE = {
    "positions": ("patch", "--positions", *IOI), "patch": ("patch", *IOI),
    "groups": ("patch", "--site", "k", *IOI), "atp": ("attribute", "atp", *IOI),
    "windows": ("patch", "--window", "1", "--keys", "io", "--keys", "~io", *IOI),
    "rank": ("rank", "duplicate-token", "--task", "ioi", *IOI),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    with within(place):
        for name, line in MADE.items():
            assert main([*line, "--out", str(place / name)]) == 0
    return place


@pytest.fixture(scope="module")
def site(root):
    return Site(Library(root))


@pytest.fixture(scope="module")
def address(root):
    with served(root) as found:
        yield found


@pytest.fixture(scope="module")
def client(root):
    made = make_app(root, Access("127.0.0.1", 8050, None))
    return partial(made.server.test_client().get, base_url="http://127.0.0.1:8050")


def texts(component) -> str:
    """All texts of components, one after another."""
    if isinstance(component, str | int | float):
        return str(component)
    if component is None:
        return ""
    if isinstance(component, list | tuple):
        return "".join(map(texts, component))
    return texts(getattr(component, "children", None))


# Figures


@pytest.mark.parametrize("example", [None, 0, 2])
@pytest.mark.parametrize("rows", ["head", "layer"])
def test_cells_are_drawn_around_zero_and_noise_apart(rows, example) -> None:
    view = view_of(made(), rows, example=example)
    threshold = float(np.quantile(np.abs(view.values), 0.3))
    figure = position_map(view, threshold=threshold)
    strong, grey = (np.asarray(t.z, float) for t in figure.data)
    noise = view.noise(threshold)
    assert noise.any() and not noise.all()
    np.testing.assert_array_equal(np.isnan(strong), noise)
    np.testing.assert_array_equal(np.isnan(grey), ~noise)
    np.testing.assert_allclose(strong[~noise], view.values[~noise], rtol=1e-6)
    assert -figure.data[0].zmin == figure.data[0].zmax == np.abs(view.values[~noise]).max()
    assert list(figure.data[0].y) == list(view.rows)
    r, c = np.argwhere(~noise)[0]
    assert f"{view.values[r, c]:+.4g}" in figure.data[0].text[r][c]


def test_figures_without_anything_strong_still_have_a_scale() -> None:
    figure = position_map(view_of(made()), threshold=99.0)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)


def test_places_that_differ_say_so_without_colour() -> None:
    columns = view_of(made(), example=0).columns
    assert [column_label(c) for c in columns][:3] == ["t0 0", "≠ c01 → k01 1", "t2 2"]
    many = [replace(columns[i % 2], name=str(i)) for i in range(200)]
    at, labels = ticks(many)
    assert len(at) <= 60 and all(i % 2 for i in at) and all(x.startswith("≠") for x in labels)
    assert ticks(columns)[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_others_stay_texts(text) -> None:
    sweep = made()
    spoken = tuple((tuple([text] * 5), (text, "k", *[text] * 3)) for _ in range(3))
    spans = ({text: [[1, 2]]},) * 3
    sweep = replace(sweep, texts=spoken, spans=spans, heads=("L0H0", text, "L1H0", "L1H1"))
    drawn = [position_map(view_of(sweep, example=1)), position_map(view_of(sweep, by="span"))]
    drawn.append(window_curves([{"keys": text, "queries": text, "window": 1, "layer": 0,
                                 "change": -0.5, "ci_lo": None, "ci_hi": None}]))  # fmt: skip
    for figure in drawn:
        content = figure.to_json().replace("\\u003c", "<")
        for tag in ("<script", "<img", "<b>", "<a ", "</"):
            assert tag not in content.replace("<br>", "").replace("<extra></extra>", "")


def table(**more) -> HeadScores:
    heads = tuple(HeadId(i, j) for i in range(2) for j in range(3))
    x = np.array([[3.0, -2, 0.5, 1e-9, 4, 0], [5, -4, -0.5, 1e-9, 4, 0], [4, -3, 0.1, 1e-9, 4, 0]])
    return HeadScores(
        "patch.noise", heads, x, None, ("a", "b", "c"), unit="change of x", direction="lower",
        extras={"recovered": x.mean(0) / -2}, **more,
    )  # fmt: skip


def test_the_grid_greys_what_may_be_nothing() -> None:
    for recovered, scale in ((False, 1.0), (True, -2.0)):
        figure = effect_grid(table(), recovered=recovered, floor=1e-6)
        strong, grey = (np.asarray(t.z, float) for t in figure.data)
        np.testing.assert_allclose(strong, np.array([[4, -3, np.nan], [np.nan, 4, np.nan]]) / scale)
        np.testing.assert_array_equal(np.isnan(grey), ~np.isnan(strong))
        assert figure.data[0].zmax == -figure.data[0].zmin == 4 / abs(scale)
    assert figure.data[0].customdata[1][1] == "L1H1"
    weaker = np.asarray(effect_grid(table(), threshold=3.5).data[0].z, float)
    assert np.isnan(weaker).sum() == 4
    groups = effect_grid(table(granularity="kv")).data[0]
    assert set(np.ravel(groups.customdata)) == {""} and "key-value head 1" in groups.text[0][1]
    with pytest.raises(InputError, match="no share"):
        effect_grid(replace(table(), extras={}), recovered=True)


def test_rows_of_heads_come_by_strength_of_either_sign() -> None:
    rows = of.head_rows(table(), 0.0, 1e-6)
    assert [r["head"] for r in rows][:3] == ["L0H0", "L1H1", "L0H1"]
    assert [r["noise"] for r in rows] == ["", "", "", "within", "within", "within"]
    assert rows[0]["recovered"] == -2 and "exact" not in rows[0]
    assert of.head_rows(table(granularity="kv"), 0, 0)[0]["group"] == "L0, group 0"


def test_curves_of_windows_differ_by_more_than_colour() -> None:
    rows = [{"keys": k, "queries": "last", "window": 2, "layer": i, "change": -0.1 * i,
             "ci_lo": -0.2 * i, "ci_hi": 0.0} for k in ("io", "~io") for i in range(4)]  # fmt: skip
    figure = window_curves(rows)
    bands, lines = figure.data[::2], figure.data[1::2]
    assert [t.name for t in lines] == ["io → last, 2 layers", "~io → last, 2 layers"]
    assert len({t.line.dash for t in lines}) == len({t.marker.symbol for t in lines}) == 2
    np.testing.assert_allclose(lines[1].y, [0, -0.1, -0.2, -0.3])
    np.testing.assert_allclose(bands[0].y[4:], [-0.6, -0.4, -0.2, 0])


# What is read from runs


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("positions", {"choice", "maps", "heads"}), ("patch", {"heads"}), ("groups", {"heads"}),
        ("atp", {"heads"}), ("windows", {"windows"}), ("rank", set()),
    ],
)  # fmt: skip
def test_a_run_shows_what_it_has(name, there, site) -> None:
    note, listed, controls, *hidden, tables, _, towers, _, examples, by = choices(
        site, {"run": name}
    )
    parts = dict(zip(("choice", "maps", "heads", "windows"), hidden, strict=True))
    assert {n for n, gone in parts.items() if not gone} == there
    assert controls == (not there & {"choice", "heads"})
    assert bool(tables) == bool(towers) == ("heads" in there)
    assert len(examples) == (4 if "maps" in there else 0)
    if "maps" in there:
        assert not any(x["disabled"] for x in by)
    words = texts(listed)
    assert all(n in words for n in MADE if n != "rank") and "rankeach" not in words
    if name == "rank":
        assert "holds no effects" in texts(note) and "headscope patch" in texts(note)


def test_without_a_run_or_with_one_that_is_not_there(site, tmp_path) -> None:
    assert "Choose a run" in texts(choices(site, {})[0])
    assert "nothing-here" in texts(choices(site, {"run": "nothing-here"})[0])
    assert "No run patches" in others(Site(Library(tmp_path)), None)
    for name, call in (
        ("patch", of.sweep_of), ("patch", of.windows_of), ("rank", lambda r: of.effects(r, {})),
    ):  # fmt: skip
        with pytest.raises(RunError) as caught:
            call(site.library.open(name))
        assert "headscope patch" in (caught.value.hint or "")


def test_a_state_chooses_rows_examples_and_means(site) -> None:
    sweep = of.sweep_of(site.library.open("positions"))
    assert of.shown(sweep, "head", {"play": "2"}).rows == ("L2H0", "L2H1", "L2H2", "L2H3")
    assert len(of.shown(sweep, "layer", {"play": "2"}).rows) == 4
    spans = {c.name for c in of.shown(sweep, "head", {"pby": "span"}).columns}
    assert {"io", "s1", "s2", "end"} <= spans
    one = of.shown(sweep, "head", {"pex": "1", "pby": "span", "pval": "recovered"})
    np.testing.assert_allclose(one.values, sweep.by_head[1] / 6.6, atol=1e-4)
    for bad in ({"play": "9"}, {"pex": "4"}):
        with pytest.raises(InputError):
            of.shown(sweep, "head", bad)
    for odd in ("²", "-1", "x", ""):
        assert of.example_of({"pex": odd}) is None
    assert [of.number({"pmin": x}, "pmin") for x in ("0.5", "-2", "nan", "inf", "x")] == [
        0.5, 2, 0, 0, 0,
    ]  # fmt: skip
    listed = of.cell_rows(sweep, {})
    assert [(r["head"], r["position"]) for r in listed[:2]] == [("L0H0", "6"), ("L1H0", "8")]
    assert listed[0]["corrupted"].startswith("≠") and listed[0]["noise"] == ""
    wide = replace(sweep, heads=tuple(f"L0H{i}" for i in range(160)),
                   by_head=np.repeat(sweep.by_head, 10, 1))  # fmt: skip
    assert len(of.shown(wide, "head", {}).rows) == 32
    assert len(of.shown(wide, "head", {"prows": "all"}).rows) == 160


def test_words_for_those_who_do_not_see_the_map(site) -> None:
    view = of.shown(of.sweep_of(site.library.open("positions")), "head", {})
    text = of.summary(view, 0.0, 5)
    assert text.startswith("5 of 144 cells") and "L0H0 at s2 6 -8.8" in text and "5 weaker" in text
    assert of.summary(view, 99.0, 0).startswith("0 of 144") and "Strongest" not in of.summary(
        view, 99.0, 0
    )


def test_prompts_are_marked_where_they_differ(site) -> None:
    sweep = of.sweep_of(site.library.open("positions"))
    words = texts(prompts(sweep, 0))
    assert words.count("≠") == 6 and "They differ at 2, 4, 6." in words
    assert "Clean, logit-difference 6.6" in words and texts(prompts(sweep, 99)) == ""
    assert "Choose an example" in texts(prompts(sweep, None))


# Routes and lines


@pytest.mark.parametrize("query", ["", "?example=2", "?by=span"])
@pytest.mark.parametrize("rows", ["head", "layer"])
def test_a_file_holds_every_cell(rows, query, client, root) -> None:
    reply = client(f"/data/positions/positions/{rows}.csv{query}")
    assert reply.status_code == 200 and "attachment" in reply.headers["Content-Disposition"]
    found = list(csv.DictReader(io.StringIO(reply.text)))
    sweep = read_positions(Run.load(root / "positions"))
    example = 2 if "example" in query else None
    want = list(cells(sweep, rows, example=example, by="span" if "span" in query else None))
    assert [float(r["effect"]) for r in found] == [r["effect"] for r in want]
    assert [r["position"] for r in found] == [r["position"] for r in want]


def test_files_that_are_not_there(client) -> None:
    for path, code in (
        ("/data/nix/positions/head.csv", 404), ("/data/patch/positions/head.csv", 404),
        ("/data/positions/positions/token.csv", 404),
        ("/data/positions/positions/head.csv?example=99", 400),
        ("/data/positions/positions/head.csv?example=²", 400),
        ("/data/positions/positions/head.csv?by=x", 400), ("/data/patch/windows.csv", 404),
    ):  # fmt: skip
        reply = client(path)
        assert reply.status_code == code and reply.mimetype == "text/plain", path
    rows = list(csv.DictReader(io.StringIO(client("/data/windows/windows.csv").text)))
    assert [(r["keys"], r["layer"]) for r in rows][:2] == [("io", "0"), ("io", "1")]
    assert len(rows) == 8


def test_the_link_to_the_file_names_what_is_drawn(site) -> None:
    run = site.library.open("positions")
    sweep = of.sweep_of(run)
    base = "/data/positions/positions/head.csv"
    for feed, end in (({}, ""), ({"pex": "2", "pby": "span"}, "?example=2"),
                      ({"pby": "span"}, "?by=span"), ({"pby": "nix"}, "")):  # fmt: skip
        assert csv_link(run, "head", sweep, feed) == base + end


def test_the_python_that_is_copied_runs(site, monkeypatch) -> None:
    import plotly.graph_objects as go

    for feed in ({"run": "positions", "pex": "1", "pval": "recovered"}, {"run": "atp"}):
        drawn: list[go.Figure] = []
        monkeypatch.setattr(go.Figure, "show", lambda self, drawn=drawn: drawn.append(self))
        exec(python(site, feed), {})
        assert len(drawn) == 1 and drawn[0].data[0].type == "heatmap"
    assert command(site, {"run": "windows"}).startswith("headscope patch --window 1")
    assert python(site, {}) == command(site, {}) == ""


@pytest.mark.parametrize("what", [w for w, _ in WHAT])
def test_the_form_makes_lines_that_may_run(what, tmp_path) -> None:
    fields = {"what": what, "model": "zoo:planted-ioi", "task": "ioi", "n": 5, "window": 2,
              "direction": "denoise", "metric": "log-prob", "heads": "L0",
              "keys": "io"}  # fmt: skip
    argv = argv_of(fields)
    check_line(argv, tmp_path)
    for name, kinds in UNUSED.items():
        if what in kinds and name != "direction":
            assert str(fields[name]) not in argv
    assert ("denoise" in shlex.join(argv)) == (what != "windows")
    assert argv_of({"what": what, "model": "m; rm -rf /"})[-1] == "m; rm -rf /"


def test_the_page_needs_no_torch() -> None:
    code = "import app.dashboard.pages.patching, app.positions, patching.effects"
    done = process(["--version"], before=f"{code}\nassert 'torch' not in sys.modules")
    assert done.code == 0, done.err


# In a browser


def test_clicks_lead_to_heads_and_layers(address, page) -> None:
    show(page, f"{address}/r/positions/patch")
    page.wait_for_selector("#patching-map-head .heatmaplayer")
    assert page.locator("#patching-map-head").is_visible()
    assert "5 of 144 cells" in page.inner_text("#patching-map-head-text")
    assert not page.locator("#patching-windows").is_visible()
    page.evaluate(
        "() => document.querySelector('#patching-map-layer .js-plotly-plot')"
        ".emit('plotly_click', {points: [{y: 'L2', x: 8, curveNumber: 0, pointNumber: [2, 8]}]})"
    )
    page.wait_for_url("**play=2*")
    page.wait_for_function(
        "() => /of 36 cells/.test(document.getElementById('patching-map-head-text').textContent)"
    )
    page.evaluate(
        "() => document.querySelector('#patching-map-head .js-plotly-plot')"
        ".emit('plotly_click', {points: [{y: 'L2H1', x: 8, curveNumber: 0, pointNumber: [1, 8]}]})"
    )
    page.wait_for_url("**/head/2/1*")
    page.go_back()
    page.wait_for_url("**/patch*")


def test_an_example_and_a_threshold_out_of_the_url(address, page) -> None:
    arrive(page, f"{address}/r/positions/patch?pex=1&pval=recovered&pmin=0.5")
    page.wait_for_function("() => document.querySelectorAll('#patching-prompts mark').length == 6")
    page.wait_for_function(
        "() => /^3 of 144/.test(document.getElementById('patching-map-head-text').textContent)"
    )
    assert "example=1" in page.get_attribute("#patching-map-head-csv", "href")
    assert page.inner_text("#patching-do-line").startswith("headscope patch --positions -m zoo:")
    assert page.locator("#patching-do").count() == 0


@pytest.mark.parametrize(
    ("run", "theme"), [("positions", "light"), ("positions", "dark"), ("windows", "light")]
)
def test_nothing_keeps_people_out(run, theme, address, page) -> None:
    show(page, f"{address}/r/{run}/patch?theme={theme}&pex=0")
    page.wait_for_function("() => document.getElementById('patching-runs').textContent")
    ready(page)
    assert violations(page) == []


def test_hostile_runs_stay_texts(root, page, tmp_path) -> None:
    folder = tmp_path / "positions"
    shutil.copytree(root / "positions", folder)
    hostile(folder)
    path = folder / "extra" / "positions.safetensors"
    arrays, header = read_table(path)
    meta = header["meta"]
    for i, text in enumerate(HOSTILE):
        for both in meta["texts"]:
            both[0][i] = text
        meta["examples"][0] = HOSTILE[0]
        meta["metric"] = HOSTILE[1]
    meta["spans"] = [{text: [[i, i + 1]] for i, text in enumerate(HOSTILE)}] * 4
    write_table(path, arrays, {"extra": "positions", "meta": meta})
    with served_to(page, tmp_path) as found:
        show(page, f"{found}/r/positions/patch?pex=0")
        for change in ("{}", "{pex: '', pby: 'span'}"):
            page.evaluate(f"() => window.headscope.select({change})")
            ready(page)
            page.wait_for_selector("#patching-map-head .heatmaplayer")
            page.wait_for_function(
                "() => document.querySelectorAll('#patching-cells .ag-row').length > 3"
            )
            assert page.evaluate("() => window.hacked") is None
            assert page.locator("#page-patching img, #page-patching script").count() == 0


def test_a_job_out_of_the_form_makes_a_run(root, page, tmp_path) -> None:
    shutil.copytree(root / "patch", tmp_path / "first")
    with served_to(page, tmp_path, jobs=True) as found:
        show(page, f"{found}/r/first/patch")
        page.wait_for_function(
            "() => /planted-ioi/.test(document.getElementById('patching-do-line').textContent)"
        )
        page.fill("#patching-do-n", "3")
        page.wait_for_function(
            "() => /--n 3/.test(document.getElementById('patching-do-line').textContent)"
        )
        page.click("#patching-do")
        page.wait_for_selector(".toast:has-text('is done')", timeout=60_000)
    made_runs = [p for p in Path(tmp_path).iterdir() if "positions" in p.name]
    assert len(made_runs) == 1
    assert read_positions(Run.load(made_runs[0])).by_head.shape == (3, 16, 9)
