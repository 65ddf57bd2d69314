"""What a first reader of the page met: addresses, words and places that must lead somewhere."""

import shutil

import browser
import numpy as np
import pytest
from dashboard_kit import arrive, needle_run, ready, served_to

from app.dashboard.headfacts import badges
from app.dashboard.library import Library, place_of
from app.dashboard.page import told
from app.dashboard.pages.head import meant
from app.dashboard.pages.heads import no_scores, passing, rows, verdicts
from app.dashboard.pages.runs import row_of
from app.figures.scores import head_scatter
from interp.errors import RunError
from interp.files import read_json, write_json
from interp.headid import HeadId
from interp.scores import HeadScores

chromium = pytest.fixture(scope="module")(browser.chromium)
page = pytest.fixture(browser.page)


def scores(tower="text", name="patch.noise"):
    heads = tuple(HeadId(layer, h, tower) for layer in range(2) for h in range(2))
    made = np.array([[-8.0, 0.0, 1.0, 2.0], [-9.0, 0.0, 1.0, 2.5]])
    return HeadScores(name, heads, made, None, ("a", "b"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    made = needle_run(place)
    begun = shutil.copytree(made, place / "begun")
    info = dict(read_json(begun / "run.json")) | {"status": "running"}
    info["command"] = "headscope rank sink --model zoo:needle"
    info.pop("scores", None)
    write_json(begun / "run.json", info)
    return place


@pytest.fixture(scope="module")
def library(root):
    return Library(root)


@pytest.mark.parametrize(
    ("info", "page"),
    [
        ({"view": "sweep"}, "intervene?result=a%20b"),
        ({"view": "windows"}, "patch"),
        ({"view": "positions", "scores": {"patch.noise": {}}}, "patch"),
        ({"view": "capture"}, "head/0/0"),
        ({"scores": {"sink": {}}}, "heads"),
        ({"view": "capture", "status": "running"}, "heads"),
    ],
)
def test_a_run_opens_on_the_page_that_shows_it(info, page):
    assert place_of("a b", {"status": "complete", **info}) == f"/r/a%20b/{page}"


def test_a_run_that_is_not_complete_is_called_by_its_command(library):
    (entry,) = [e for e in library.entries() if e.name == "begun"]
    assert row_of(entry)["kind"] == "rank"
    assert no_scores(library.open("begun")) is None


def test_an_error_and_its_hint_are_one_sentence():
    assert told(RunError("a prompt is needed", hint="write one")) == "a prompt is needed; write one"


def test_a_table_without_controls_does_not_say_no_evidence(library):
    table = scores()
    assert set(verdicts(table)) == {"not tested"}
    assert {row["verdict"] for row in rows(table, {})} == {"not tested"}
    assert rows(table, {"cls": "not tested"}) and "no controls" in passing(table, {})
    kept = library.open("needle")
    tested = next(t for t in kept.tables.values() if np.isfinite(t.q).any())
    assert verdicts(tested) == [str(v) for v in tested.verdict]
    words = str(badges(kept, tested.heads[0]))
    assert "[–" not in words and "q –" not in words


def test_a_head_without_a_tower_is_one_of_the_run():
    class Open:
        tables, traces = {"visual-attention": scores("vision")}, {}

    feed = {"layer": "1", "head": "0"}
    assert meant(Open, feed) == HeadId(1, 0, "vision")
    assert meant(Open, feed | {"tower": "text"}) == HeadId(1, 0, "text")
    Open.tables = {"sink": scores("text")}
    assert meant(Open, feed) == HeadId(1, 0, "text")


def test_layers_of_the_colour_bar_are_whole():
    bar = head_scatter({"a": scores()}, "a", "a").data[0].marker.colorbar
    assert bar.dtick == 1 and bar.tick0 == 0


def test_another_page_begins_at_its_top_and_takes_the_keyboard_along(root, page):
    with served_to(page, root) as site:
        arrive(page, f"{site}/r/needle/heads")
        page.set_viewport_size({"width": 900, "height": 500})
        page.focus("#heads-app")
        page.keyboard.press("ArrowDown")
        page.evaluate("window.scrollTo(0, 300)")
        page.keyboard.press("Enter")
        ready(page)
        assert page.inner_text("#head-title") == "Head L0H0"
        assert page.evaluate("[window.scrollY, document.activeElement.id]") == [0, "main"]
        arrive(page, f"{site}/compare")
        assert "Choose a run" in page.text_content("#compare-points")
