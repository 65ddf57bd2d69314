"""The dashboard in a real browser, and its routes without one."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import browser
import numpy as np
import pytest
from dashboard_kit import (
    arrive,
    hostile,
    leave,
    needle_run,
    ready,
    served,
    served_to,
    show,
    visit,
)

from app.dashboard.page import pages
from interp.traces import decode, traces_of

chromium = pytest.fixture(scope="module")(browser.chromium)
tab = pytest.fixture(scope="module")(browser.tab)
page = pytest.fixture(browser.kept)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run; its like that says hostile things; one that is damaged, one of a later time."""
    place = tmp_path_factory.mktemp("runs")
    hostile(Path(shutil.copytree(needle_run(place), place / "hostile")))
    (place / "damaged").mkdir()
    (place / "damaged" / "run.json").write_text("{ no json")
    (place / "newer").mkdir()
    (place / "newer" / "run.json").write_text(
        '{"schema": "headscope.run", "version": 99, "status": "complete", "key": {}, '
        '"content_key": ""}'
    )
    return place


@pytest.fixture(scope="module")
def site(root):
    with served(root) as address:
        yield address


@pytest.fixture(scope="module")
def trace(root):
    (made,) = traces_of(root / "needle").values()
    return made


def until(page, condition):
    """Wait for something outside the page."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        page.wait_for_timeout(20)


def number(text):
    return float(text.replace("−", "-"))


def test_a_deep_link_shows_the_head_the_window_and_the_theme(site, page, trace):
    arrive(page, f"{site}/r/needle/head/1/0?q=200:240&k=0:60&m=induction&theme=dark")
    assert page.title() == "Head L1H0 · headscope"
    assert page.inner_text("#head-title") == "Head L1H0"
    page.wait_for_function(
        "() => /queries 200–239/.test(document.getElementById('head-window').textContent)"
    )
    assert page.get_attribute("html", "data-theme") == "dark"
    shown = page.evaluate(
        "() => { const t = document.querySelector('#head-map .js-plotly-plot')._fullData[0];"
        " return [t.z.length, t.z[0].length, t.z[5][7]]; }"
    )
    want = trace.head("L1H0").window((200, 240), (0, 60)).codes
    assert shown == [40, 60, int(want[5, 7])]
    assert "theme=dark" in page.url and "q=200:240" in page.url


def test_keys_alone_lead_from_the_runs_to_a_zoomed_map(site, page):
    show(page, f"{site}/r/needle/heads")
    page.wait_for_selector("#heads-grid .js-plotly-plot .heatmaplayer")
    page.focus("#heads-app")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert re.match(r"Layer 1 head 1, .* rank \d+ of 16", page.inner_text("#live"))
    cursor = page.locator("#heads-cursor")
    assert cursor.is_visible()
    page.keyboard.press("b")
    assert page.locator("#basket").is_visible() and "L1H1" in page.inner_text("#basket")
    page.keyboard.press("Enter")
    ready(page)
    assert "/r/needle/head/1/1" in page.url
    before = page.url
    page.keyboard.press("]")
    page.wait_for_function("(u) => location.href !== u", arg=before)
    page.keyboard.press("/")
    page.keyboard.type("3.2")
    page.keyboard.press("Enter")
    page.wait_for_url("**/head/3/2*")
    page.keyboard.press("Alt+m")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.keyboard.press("?")
    assert page.locator("#shortcuts").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#shortcuts").is_visible()
    page.go_back()
    page.wait_for_function("() => !location.pathname.endsWith('/head/3/2')")


def test_zooming_asks_for_a_finer_window_and_z_goes_back(site, page):
    show(page, f"{site}/r/needle/head/1/0")
    box = page.wait_for_selector("#head-map .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 330, steps=4)
    page.mouse.up()
    page.wait_for_url("**q=*")
    found = re.search(r"k=(\d+):(\d+)", page.url)
    low, high = int(found[1]), int(found[2])
    page.wait_for_function(
        "(k) => document.getElementById('head-window').textContent.includes(`keys ${k}–`)", arg=low
    )
    shape = page.evaluate(
        "() => document.querySelector('#head-map .js-plotly-plot')._fullData[0].z[0].length"
    )
    assert shape == high - low < 245
    page.focus("body")
    page.keyboard.press("z")
    page.wait_for_function("() => !/[?&]k=/.test(location.search)")


def test_hovering_a_token_shows_the_row_of_the_map(site, page, trace):
    show(page, f"{site}/r/needle/head/1/0")
    page.wait_for_selector("#tokens .token:nth-child(245)")
    page.hover("#tokens .token:nth-child(120)")
    page.wait_for_function(
        "() => document.getElementById('token-facts').textContent.includes('(119) looks at')"
    )
    text = page.inner_text("#token-facts")
    top = re.search(r"looks at\s+\S+ \((\d+)\): ([\d.]+)", text)
    row = trace.head("L1H0").rows([119])[0]
    assert int(top[1]) == int(np.nanargmax(row))
    assert number(top[2]) == pytest.approx(float(np.nanmax(row)), abs=4e-3)
    page.click("#tokens .token:nth-child(60)")
    page.wait_for_url("**lock=r59*")
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**lock=r60*")
    page.hover("#tokens .token:nth-child(5)", modifiers=["Shift"])
    page.wait_for_function(
        "() => document.getElementById('token-facts').textContent.includes('is looked at by')"
    )


def test_a_metric_that_is_chosen_changes_every_view(site, page):
    show(page, f"{site}/r/needle/heads?m=induction")
    page.wait_for_function(
        "() => document.getElementById('heads-title').textContent.includes('induction')"
    )
    page.focus("body")
    page.keyboard.press("m")
    page.wait_for_url("**m=retrieval*")
    page.wait_for_function(
        "() => document.getElementById('heads-title').textContent.includes('retrieval')"
    )
    page.wait_for_function(
        "() => { const row = document.querySelector('#heads-table .ag-row[row-index=\"0\"]');"
        " return row && row.querySelector('[col-id=head]').textContent === 'L1H0'; }"
    )


def test_hostile_tokens_are_drawn_as_text(site, page):
    for path in ("/", "/r/hostile/heads", "/r/hostile/head/1/0?q=0:20&k=0:20"):
        show(page, site + path)
        assert page.evaluate("() => window.hacked") is None
        assert page.locator("img[src=x]").count() == 0
    page.wait_for_selector("#tokens .token:nth-child(20)")
    assert page.inner_text("#tokens .token:nth-child(2)").startswith("</script>")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#head-map .ytick text')].some("
        "(t) => t.textContent.includes('<b>bold'))"
    )
    assert page.locator("#head-map a").count() == 0
    assert page.locator("#tokens a, #tokens b, #tokens img").count() == 0
    assert "</script>" in page.get_attribute("#prompt-select", "placeholder")


def test_unknown_things_say_so_and_the_server_lives(site, page):
    show(page, f"{site}/r/unknown/heads")
    page.wait_for_function(
        "() => /there is no run named 'unknown'/.test(document.body.textContent)"
    )
    visit(page, "/r/needle/head/77/5")
    page.wait_for_selector("[role=alert] >> visible=true")
    assert "layer 77 of text was not kept" in page.inner_text("#page-head")
    visit(page, "/r/needle/head/1/0?p=0123456789ab")
    assert "there is no prompt with a trace in this run named" in page.inner_text("#page-head")
    arrive(page, f"{site}/no/such/page")
    assert page.locator("h1:visible").inner_text() == "No such page"
    visit(page, "/r/needle/head/1/0?q=900:1000&k=oops")
    assert page.inner_text("#head-title") == "Head L1H0"


def test_a_damaged_and_a_newer_run_hide_no_other(site, page):
    show(page, f"{site}/")
    page.wait_for_selector("#runs-table .ag-row[row-index='3']")
    text = page.inner_text("#runs-note")
    assert "damaged" in text and "run of version 99" in text and "update headscope" in text
    visit(page, "/r/newer/heads")
    page.wait_for_selector("[role=alert] >> visible=true")


def test_an_empty_folder_says_how_to_make_a_run(tmp_path, page):
    with served_to(page, tmp_path / "none") as address:
        show(page, address)
        assert "headscope rank retrieval" in page.inner_text("#runs-note")


def test_copies_reproduce_what_is_shown(site, page, root):
    show(page, f"{site}/r/needle/head/1/0")
    page.click("#copy-open")
    page.click("#copy-python")
    page.wait_for_function(
        "() => document.getElementById('copy-text').textContent.includes('show_head')"
    )
    code = page.inner_text("#copy-text")
    assert str(root / "needle") in code and "'L1H0'" in code
    space: dict[str, object] = {}
    exec(code.replace("show_head(Run", "shown = show_head(Run"), space)
    assert "L1H0" in repr(space["shown"])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_are_downloaded(site, page, kind):
    show(page, f"{site}/r/needle/heads")
    page.wait_for_selector("#heads-grid .js-plotly-plot .heatmaplayer")
    page.click("#copy-open")
    files = []
    page.on("download", lambda download: files.append(download.suggested_filename))
    page.click(f"#figures-{kind}")
    page.wait_for_function(
        "() => /2 figures saved/.test(document.getElementById('copy-text').textContent)"
    )
    until(page, lambda: len(files) >= 2)
    assert sorted(files) == [f"needle-heads-grid.{kind}", f"needle-heads-scatter.{kind}"]


# Routes, without a browser.


@pytest.fixture
def client(root):
    from app.dashboard.security import Access
    from app.dashboard.server import make_app

    return make_app(root, Access("127.0.0.1", 8050)).server.test_client()


def get(client, path, **headers):
    return client.get(path, headers={"Host": "127.0.0.1:8050", **headers})


def test_rows_columns_and_windows_are_those_of_the_trace(client, trace):
    head = trace.head("L1H0")
    base = f"/data/needle/{trace.key}/text/1/0"
    row = np.frombuffer(get(client, f"{base}/row/100").data, np.uint8)
    want = head.rows([100])[0]
    assert ((row == 0) == np.isnan(want)).all()
    np.testing.assert_allclose(decode(row)[~np.isnan(want)], want[~np.isnan(want)], atol=5e-3)
    column = np.frombuffer(get(client, f"{base}/column/3").data, np.uint8)
    np.testing.assert_array_equal(column == 0, np.isnan(head.columns([3])[0]))
    answer = get(client, f"{base}/window?q=50:90&k=0:40")
    assert answer.headers["X-Window"] == "50:90 0:40 1x1 40x40"
    made = np.frombuffer(answer.data, np.uint8).reshape(40, 40)
    np.testing.assert_array_equal(made, head.window((50, 90), (0, 40)).codes)
    assert "immutable" in answer.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/data/needle/{t}/text/1/0/row/245", 400, "each query must lie in 0..244"),
        ("/data/needle/{t}/text/1/9/row/0", 400, "outside this trace"),
        ("/data/needle/{t}/text/9/0/row/0", 400, "was not kept"),
        ("/data/needle/{t}/vision/1/0/row/0", 404, "tower of this trace"),
        ("/data/needle/{t}/text/1/0/window?q=9:3", 400, "must lie within 0..245"),
        ("/data/needle/{t}/text/1/0/window?q=a:b", 400, "FIRST:LAST"),
        ("/data/needle/{t}/text/1/0/window?cells=4096", 400, "must lie in 1..512"),
        ("/data/needle/nope/text/1/0/row/0", 404, "prompt with a trace"),
        ("/data/nope/{t}/text/1/0/row/0", 404, "there is no run named 'nope'"),
        ("/data/..%2f..%2fetc/{t}/text/1/0/row/0", 404, ""),
        ("/data/needle/table/nope.csv", 404, "table of scores in this run"),
        ("/data/needle/table/retrieval.exe", 404, "form of a table"),
        ("/data/needle/{t}/image/0.png", 400, ""),
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_line_and_a_status(client, trace, path, status, text):
    answer = get(client, path.format(t=trace.key))
    assert answer.status_code in (status, 404) and text in answer.text
    assert answer.content_type.startswith("text/")


def test_tables_are_downloaded_whole(client, root):
    import io

    import pandas as pd

    from interp.run import Run

    want = Run.load(root / "needle").scores["retrieval"].to_frame()
    csv = pd.read_csv(io.BytesIO(get(client, "/data/needle/table/retrieval.csv").data))
    assert list(csv["head"]) == list(want["head"])
    np.testing.assert_allclose(csv["score"], want["score"])


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:9", "127.0.0.1.evil.example:8050", ""])
def test_another_host_is_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_posts_from_other_pages_are_refused(client, headers):
    body = {"output": "x", "inputs": []}
    answer = client.post(
        "/_dash-update-component", json=body, headers={"Host": "127.0.0.1:8050", **headers}
    )
    assert answer.status_code == 403


def test_huge_requests_are_refused(client):
    answer = client.post(
        "/_dash-update-component", data=b"x" * (5 << 20), content_type="application/json",
        headers={"Host": "127.0.0.1:8050", "Origin": "http://127.0.0.1:8050"},
    )  # fmt: skip
    assert answer.status_code == 413


def test_pages_may_run_no_foreign_script(client):
    policy = get(client, "/").headers["Content-Security-Policy"]
    scripts = re.search(r"script-src ([^;]*)", policy)[1]
    assert "unsafe" not in scripts and "*" not in scripts and "http" not in scripts
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_a_token_is_asked_for_once(root):
    from app.dashboard.security import Access
    from app.dashboard.server import make_app

    server = make_app(root, Access("127.0.0.1", 8050, "secret")).server
    client = server.test_client()
    host = {"Host": "127.0.0.1:8050"}
    assert client.get("/", headers=host).status_code == 401
    assert client.get("/?token=wrong", headers=host).status_code == 401
    first = client.get("/r/needle/heads?token=secret", headers=host)
    assert first.status_code == 302 and "secret" not in first.headers["Location"]
    cookie = first.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert client.get("/", headers=host).status_code == 200


def test_a_server_that_only_reads_loads_no_torch_on_any_page(root, page):
    command = [sys.executable, "-m", "app.cli", "serve", str(root), "--read-only", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            address = server.stdout.readline().decode().strip().rstrip("/")
            names = [p.path.format(run="needle", layer=1, head=0) for p in pages()]
            show(page, address)
            for name in (*names, "/r/needle/head/1/0?mode=value&q=0:50"):
                visit(page, name)
            maps = Path(f"/proc/{server.pid}/maps").read_text()
            assert "numpy" in maps and "torch" not in maps
            leave(page)
        finally:
            server.terminate()
