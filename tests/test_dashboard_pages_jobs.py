"""The page of jobs: its routes, and what a browser sees of jobs wherever it is."""

import contextlib
import dataclasses
import json
import time

import browser
import pytest
from dashboard_kit import served, violations
from hypothesis import given
from hypothesis import strategies as st

from app.dashboard.jobs import Jobs
from app.dashboard.jobs_entry import Job
from app.dashboard.pages.jobs import answer, asked, brief, whole
from app.dashboard.security import Access
from app.dashboard.server import make_app
from app.exits import UsageError

chromium = pytest.fixture(scope="module")(browser.chromium)
page = pytest.fixture(browser.page)

MODEL = "zoo:planted-induction"
RANK = ["rank", "induction", "--model", MODEL, "--n", "8", "--batch-size", "1"]
LONG = ["rank", "induction", "--model", MODEL, "--n", "3000", "--batch-size", "1"]
HOST = {"Host": "127.0.0.1:8050"}


def job(id="a1", status="running", **more):
    made = Job(
        id=id, title="", argv=("rank", "sink"), command="headscope rank sink", status=status,
        done=3, total=9, unit="tokens", eta_s=1.234567, created=1e9, started=1e9 + 1,
        finished=None, log=("one", "two"), error=None, hint=None, run=None, peak_rss=0,
        cancelling=False, code=None,
    )  # fmt: skip
    return dataclasses.replace(made, **more)


# ---- what is told


def test_a_page_is_told_little_and_of_one_job_everything():
    over = [job(f"old{i}", "done", finished=1e9 + 9, run=f"run-{i}") for i in range(40)]
    mine = job("mine", log=tuple(f"line {i}" for i in range(200)))
    told = answer([mine, *over], {"mine"}, every=False, chosen=None, mark=None)
    assert told["active"] == 1 and [j["id"] for j in told["jobs"]] == ["mine"]
    assert len(json.dumps(told)) < 1024 and "log" not in told["jobs"][0]
    assert len(json.dumps(answer(over, set(), every=False, chosen=None, mark=None))) < 64
    # A page that saw a job at work is told how it ended, though it lists no others.
    ended = answer(over, {"old3"}, every=False, chosen=None, mark=None)
    assert [(j["id"], j["run"]) for j in ended["jobs"]] == [("old3", "run-3")]
    assert len(answer(over, set(), every=True, chosen=None, mark=None)["jobs"]) == 40
    full = answer([mine], set(), every=False, chosen="mine", mark=None)["job"]
    assert full["log"] == list(mine.log) and full["command"] == mine.command
    again = answer([mine], set(), every=False, chosen="mine", mark=full["mark"])["job"]
    assert "log" not in again and again["done"] == 3
    more = dataclasses.replace(mine, log=(*mine.log, "new"))
    assert whole(more, full["mark"])["log"][-1] == "new"
    assert answer([mine], set(), every=False, chosen="x", mark=None)["lost"] == "x"


@pytest.mark.parametrize(
    ("argv", "shown_by"),
    [(("ablate",), "intervene"), (("steer", "run"), "intervene"),
     (("verdict", "sink"), "intervene"), (("rank", "sink"), "heads"), (("capture",), "heads")],
)  # fmt: skip
def test_a_run_is_shown_by_the_page_that_knows_it(argv, shown_by):
    assert brief(job(argv=argv, run="r"))["page"] == shown_by
    assert "page" not in brief(job(argv=argv))
    assert brief(job(argv=argv, title="mine"))["title"] == "mine"
    assert brief(job(argv=argv))["title"] == " ".join(argv)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6))
def test_a_typed_line_and_its_arguments_are_the_same_job(argv):
    import shlex

    line = shlex.join(["headscope", *argv])
    assert asked({"line": line}) == (argv, "") == asked({"argv": argv})


@pytest.mark.parametrize(
    "content",
    [None, [], "rank", {}, {"argv": []}, {"argv": "rank"}, {"argv": [1]}, {"line": ""},
     {"line": "rank 'open"}, {"line": 3}, {"argv": ["rank"], "title": 3},
     {"argv": ["x"] * 401}, {"argv": ["x" * 20_001]}],
)  # fmt: skip
def test_a_request_of_another_form_is_refused(content):
    with pytest.raises(UsageError):
        asked(content)


# ---- routes


@contextlib.contextmanager
def opened(root):
    """A client of a server; made within a test, whose streams the jobs' logs stand over."""
    with Jobs(root) as queue:
        yield make_app(root, Access("127.0.0.1", 8050), queue).server.test_client()


def post(client, path, content=None, **headers):
    return client.post(path, json=content, headers={**HOST, **headers})


def told_of(client, id):
    return client.get(f"/jobs.json?job={id}", headers=HOST).json["job"]


def end(client, id):
    while told_of(client, id)["status"] in ("queued", "running"):
        time.sleep(0.02)
    return told_of(client, id)


def test_a_job_is_submitted_followed_and_its_run_found(tmp_path):
    with opened(tmp_path) as client:
        made = post(client, "/jobs", {"argv": RANK, "title": "mine"})
        assert made.status_code == 200 and made.json["title"] == "mine"
        found = end(client, made.json["id"])
        assert found["status"] == "done" and found["run"].startswith("induction-") and found["log"]
        assert found["command"].split()[1:] == RANK and found["peak_rss"] > 0
        listed = client.get("/jobs.json?all=1", headers=HOST)
        assert [j["id"] for j in listed.json["jobs"]] == [found["id"]] and listed.json[
            "active"
        ] == 0
        # Nothing new is not sent again.
        tag = {"If-None-Match": listed.headers["ETag"]}
        same = client.get("/jobs.json?all=1", headers={**HOST, **tag})
        assert same.status_code == 304 and not same.data


# An interrupt that lands in a destructor is ignored there, and made again.
SWALLOWED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@SWALLOWED
def test_a_running_job_is_cancelled(tmp_path):
    with opened(tmp_path) as client:
        made = post(client, "/jobs", {"argv": LONG})
        assert post(client, f"/jobs/{made.json['id']}/cancel").status_code == 200
        assert end(client, made.json["id"])["status"] == "cancelled"


@pytest.mark.parametrize(
    ("content", "line"),
    [({"argv": ["serve"]}, "a job must be one of"), ({"argv": ["rank", "--nope"]}, "--nope"),
     ({"argv": [*RANK, "--out", "/tmp/elsewhere"]}, "must lie in"), ({}, "a job is")],
)  # fmt: skip
def test_what_cannot_run_is_a_line_and_no_job(tmp_path, content, line):
    with opened(tmp_path) as client:
        answer = post(client, "/jobs", content)
        assert answer.status_code == 400 and line in answer.json["error"]
        assert client.get("/jobs.json?all=1", headers=HOST).json["jobs"] == []


def test_only_the_server_s_own_page_submits_and_cancels(tmp_path):
    with opened(tmp_path) as client:
        for path in ("/jobs", "/jobs/a1/cancel"):
            for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                assert post(client, path, {"argv": RANK}, **headers).status_code == 403
        plain = client.post("/jobs", data='{"argv": ["rank"]}', headers=HOST)
        assert plain.status_code == 400  # a form of another page cannot say that it sends JSON
        unknown = post(client, "/jobs/nope/cancel")
        assert unknown.status_code == 404 and "nope" in unknown.json["error"]
        assert client.get("/jobs.json?all=1", headers=HOST).json["jobs"] == []


def test_a_server_that_only_reads_runs_nothing(tmp_path):
    client = make_app(tmp_path, Access("127.0.0.1", 8050)).server.test_client()
    answer = post(client, "/jobs", {"argv": RANK})
    assert answer.status_code == 400 and "only reads" in answer.json["error"]
    assert client.get("/jobs.json", headers=HOST).json["jobs"] == []


# ---- in a browser


def leave(page, address="about:blank"):
    """Go elsewhere; a question that is under way then fails, which is no fault."""
    page.goto(address)
    page.problems[:] = [x for x in page.problems if not x.startswith("failed: ")]


def until(page, script):
    page.wait_for_function(f"() => {script}", timeout=60_000)


@SWALLOWED
def test_a_typed_command_runs_in_view_and_is_told_of_on_other_pages(tmp_path, page):
    with served(tmp_path / "runs", jobs=True) as site:
        page.goto(f"{site}/jobs")
        page.wait_for_selector("#jobs-line")
        page.fill("#jobs-line", "headscope serve")
        page.click("#jobs-run")
        page.wait_for_selector(".toast >> text=a job must be one of")
        page.problems.clear()  # the browser reports the status of a refusal
        page.fill("#jobs-line", " ".join(["headscope", *LONG]))
        page.keyboard.press("Enter")
        page.wait_for_selector(".job [role=progressbar]")
        page.fill("#jobs-line", " ".join([*LONG, "--seed", "1"]))
        page.keyboard.press("Enter")
        until(page, "document.getElementById('nav-jobs').dataset.count === '2'")
        assert page.get_attribute("#nav-jobs", "aria-label") == "Jobs, 2 at work"
        until(page, "document.querySelectorAll('.job').length === 2")
        states = page.eval_on_selector_all(".job .badge", "es => es.map(e => e.textContent)")
        assert states[1] == "running" and "queued" in states[0]
        until(page, "Number(document.querySelectorAll('.job [role=progressbar]')[1]"
                    ".getAttribute('aria-valuenow')) > 0")  # fmt: skip
        assert violations(page) == []
        page.click(".job >> nth=1 >> text=cancel")
        until(page, "document.querySelectorAll('.job .badge')[1].textContent === 'cancelled'")
        # The end of a job is told wherever one is, and the list of runs is read anew.
        page.fill("#jobs-line", " ".join(RANK))
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.job').length === 3")
        page.click("#nav-runs")
        page.wait_for_selector("#runs-table .ag-root")
        page.wait_for_timeout(500)
        page.evaluate(
            "async () => { const news = await (await fetch('/jobs.json')).json();"
            " await window.headscope.cancel(news.jobs.find(j => j.status === 'running').id); }"
        )
        page.wait_for_selector(".toast >> text=show it")
        name = page.evaluate(
            "async () => (await (await fetch('/jobs.json?all=1')).json())"
            ".jobs.find(j => j.status === 'done').run"
        )
        page.wait_for_selector(f"#runs-table >> text={name}")
        page.click(".toast >> text=show it")
        until(page, "/\\/r\\/induction-.*\\/heads/.test(location.pathname)")
        page.wait_for_selector("#heads-grid .js-plotly-plot .heatmaplayer")
        page.wait_for_load_state("networkidle")
        leave(page)


@pytest.mark.slow
def test_a_job_can_be_looked_up_by_its_address_and_run_again(tmp_path, page):
    with served(tmp_path / "runs", jobs=True) as site:
        page.goto(f"{site}/jobs")
        page.wait_for_selector("#jobs-line")
        page.fill("#jobs-line", " ".join(RANK))
        page.click("#jobs-run")
        page.wait_for_selector("#jobs-detail >> text=show the run")
        address = page.url
        leave(page)
        page.goto(address)
        page.wait_for_selector("#jobs-detail >> text=show the run")
        assert page.inner_text("#jobs-detail .job-command") == " ".join(["headscope", *RANK])
        until(page, "document.querySelector('.job-log').textContent.includes('induction')")
        assert "GiB of memory" in page.inner_text("#jobs-detail")
        page.click("#jobs-detail >> text=run again")
        until(page, "document.querySelectorAll('.job').length === 2")
        until(
            page, "document.querySelector('.job-log').textContent.includes('nothing was computed')"
        )
        leave(page, f"{site}/jobs?job=nope")
        page.wait_for_selector("text=There is no job nope")
        leave(page)


@SWALLOWED
@pytest.mark.slow
def test_a_hidden_tab_asks_nothing(tmp_path, page):
    with served(tmp_path / "runs", jobs=True) as site:
        page.add_init_script(
            "Object.defineProperty(document, 'hidden', {get: () => window.unseen})"
        )
        page.goto(f"{site}/jobs")
        page.wait_for_selector("text=No job yet")
        polls = []
        page.on("request", lambda r: polls.append(r.url) if "jobs.json" in r.url else None)
        made = "window.headscope.submit(" + json.dumps(LONG) + ", 'long', {follow: false})"
        page.evaluate(f"() => {made}")
        until(page, "document.querySelector('.job')")
        page.wait_for_timeout(700)
        assert len(polls) >= 2
        page.evaluate("() => { window.unseen = true; }")
        page.wait_for_timeout(600)
        polls.clear()
        page.wait_for_timeout(700)
        assert polls == []
        page.evaluate("() => { window.unseen = false; "
                      "document.dispatchEvent(new Event('visibilitychange')); }")  # fmt: skip
        page.wait_for_timeout(400)
        assert polls
        leave(page)
