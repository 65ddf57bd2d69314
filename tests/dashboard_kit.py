"""A served dashboard for tests: runs made once, a server in a thread, axe in the page."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import waitress

from app.dashboard.jobs import Jobs
from app.dashboard.security import Access
from app.dashboard.server import make_app
from heads.scoring import execute, plan
from interp import load
from interp.files import read_json, write_json
from interp.run import Run
from interp.tasks import make_task
from interp.traces import capture

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "<b>bold</b><br>",
    "javascript:window.hacked=1",
    "\u202eright to left\u202c",
    "line\nbreak\t",
    "{{7*7}}${7*7}",
    "[red]x[/INST]",
    '"quoted" & <a href="http://evil.example">link</a>',
)


def needle_run(root: Path, name: str = "needle") -> Path:
    """Two scores of `zoo:needle`, and a trace of its first prompt."""
    model = load("zoo:needle")
    made = plan(model, ["retrieval", "induction"], task="needle", n=6)
    folder = root / name
    about = {
        "model": "zoo:needle",
        "command": "headscope rank retrieval induction",
        "task": "needle",
    }
    with Run.open_or_create(folder, made.key, about) as run:
        if run.status != "complete":
            execute(model, made, run=run)
    prompt = make_task("needle").prompts(model, 1)[0]
    capture(model, prompt, folder, text="the first needle prompt")
    return folder


def hostile(folder: Path) -> None:
    """Write hostile texts into whatever a run says in words."""
    for path in (folder / "traces").glob("*/trace.json"):
        info = read_json(path)
        for i, text in enumerate(HOSTILE):
            info["tokens"][i + 1] = text
        info["id"] = HOSTILE[0]
        info["spans"][HOSTILE[2]] = [[0, 3]]
        segments = info["towers"]["text"]["segments"]
        segments[0] = HOSTILE[1]
        write_json(path, info)
    info = read_json(folder / "run.json")
    info |= {"model": HOSTILE[1], "command": HOSTILE[0], "task": HOSTILE[2]}
    write_json(folder / "run.json", info)


@contextlib.contextmanager
def served(root: Path, *, jobs: bool = False, token: str | None = None) -> Iterator[str]:
    """The address of a server of a folder of runs, in a thread of this process."""
    queue = Jobs(root) if jobs else None
    listener = waitress.create_server(lambda e, s: [], host="127.0.0.1", port=0, threads=4)
    port = int(listener.effective_port)
    app = make_app(root, Access("127.0.0.1", port, token), queue)
    listener.application = app.server
    thread = threading.Thread(target=_run, args=(listener,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        # Also the connections that the browser keeps open: with them the loop would go on.
        for channel in list(listener._map.values()):
            channel.close()
        listener.task_dispatcher.shutdown()
        if queue is not None:
            queue.close()
        thread.join(timeout=5)


def _run(listener: Any) -> None:
    # The socket is closed under its loop: that is how it ends.
    with contextlib.suppress(OSError, ValueError):
        listener.run()


@contextlib.contextmanager
def served_to(page: Any, root: Path, **more: Any) -> Iterator[str]:
    """`served`, to a page that leaves it before the server goes."""
    with served(root, **more) as address:
        try:
            yield address
        finally:
            leave(page)


def leave(page: Any) -> None:
    """Go away; a question that is under way then fails, which is no fault."""
    if page.url == "about:blank":
        return
    problems = list(page.problems)
    page.goto("about:blank")
    page.pending.clear()
    page.problems[:] = problems


# Every callback has answered, its answer is drawn, and no pop-up opens or closes.
CALM = """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
    const waiting = window.store.getState().callbacks;
    const {completed, ...open} = waiting;
    done(Object.values(open).every((x) => !x.length) &&
         !document.querySelector('[data-dash-is-loading=true]'));
})))"""


def ready(page: Any) -> None:
    """Wait until the page has taken its state from the URL and every callback has answered."""
    page.wait_for_function("() => window.headscope && window.headscope.config")
    calm, end = 0, time.monotonic() + 60
    # Twice: what one answer sets may ask for the next.
    while calm < 2:
        assert time.monotonic() < end, f"the page never came to rest: {_asked(page)}"
        at_rest = page.evaluate(CALM) and not _asked(page)
        calm = calm + 1 if at_rest else 0
        page.wait_for_timeout(20)


def _asked(page: Any) -> list[str]:
    """What the page still waits for, but for news of jobs, which it asks for again and again."""
    return [r.url for r in page.pending if "/jobs.json" not in r.url]


def visit(page: Any, path: str) -> None:
    """Go to a path as a link does: without loading the application anew."""
    page.evaluate(
        """(path) => {
            document.querySelectorAll('dialog[open]').forEach((d) => d.close());
            window.headscope.select({theme: ''});
            window.headscope.go(path);
        }""",
        path,
    )
    ready(page)


def arrive(page: Any, address: str) -> None:
    """Open an address as a browser does that comes from elsewhere."""
    leave(page)
    page.goto(address)
    ready(page)


def show(page: Any, address: str) -> None:
    """Go to an address: as a link does where the application is loaded from there already."""
    parts = urlsplit(address)
    if urlsplit(page.url).netloc == parts.netloc:
        visit(page, parts._replace(scheme="", netloc="").geturl())
    else:
        arrive(page, address)


def violations(page: Any, *, colours: bool = False, hidden: bool = False) -> list[str]:
    """What axe-core finds wrong with the page as it is.

    Args:
        page: where; the panels of other pages, which are hidden, count only where that is said.
        colours: look at nothing but colours.
        hidden: look at hidden panels too, for names that are given twice.
    """
    import axe_playwright_python

    if not page.evaluate("() => 'axe' in window"):
        (source,) = Path(axe_playwright_python.__file__).parent.glob("axe.min.js")
        page.evaluate(source.read_text(encoding="utf-8"))
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    where = {"include": ["html"]} | ({} if hidden else {"exclude": ["section[hidden]"]})
    if colours:
        options["runOnly"] = ["color-contrast", "link-in-text-block"]
    found = page.evaluate(
        "async ([where, options]) => await axe.run(where, options)", [where, options]
    )
    return [
        f"{v['id']}: {v['help']}: "
        + json.dumps([node["target"] for node in v["nodes"]][:4])
        + (v["nodes"][0].get("failureSummary") or "")[:300]
        for v in found["violations"]
    ]
