"""Jobs: what runs, what waits, what has ended; and the routes by which every page asks for them."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flask import Response, jsonify, request

from app.dashboard.page import PAGES, Page, Site, enter, told
from app.exits import UsageError
from interp.errors import InterpError, UnknownNameError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

    from app.dashboard.jobs import Job

READ_ONLY = (
    "This server only reads (--read-only), so it runs no model. Run a command in a terminal; its "
    "run appears here."
)
ARGUMENTS, LONGEST = 400, 20_000
_SHOWN_BY = {"ablate": "intervene", "verdict": "intervene", "steer": "intervene",
             "patch": "patching", "attribute": "patching"}  # fmt: skip
_BRIEF = (
    "id", "title", "status", "done", "total", "unit", "eta_s", "created", "started", "finished",
    "run", "error", "cancelling",
)  # fmt: skip


def layout(site: Site) -> "Component":
    """The queue, and the chosen job beside it; `30_jobs.js` fills both."""
    import dash_mantine_components as dmc
    from dash import html

    if site.jobs is None:
        line = f"headscope serve {site.root}"
        return html.Div(
            [
                html.H1("Jobs"),
                html.P(READ_ONLY, role="status"),
                html.P("A server that runs models:"),
                html.Pre(line, tabIndex="0"),
            ]
        )
    return html.Div(
        [
            html.H1("Jobs"),
            html.Div(
                [
                    dmc.TextInput(
                        id="jobs-line", label="Command", size="xs", w=560, debounce=False,
                        placeholder="headscope rank retrieval --model zoo:needle",
                    ),
                    html.Button("Run", id="jobs-run", className="main"),
                ],
                className="row",
            ),
            html.P(id="jobs-said", role="alert", className="alert"),
            html.Div(
                [
                    html.Div(
                        [html.H2("Queue"), html.P("No job yet.", id="jobs-none", className="faint"),
                         html.Div(id="jobs-table")],
                        className="card",
                    ),
                    html.Div(
                        [html.H2("Chosen job"), html.Div(id="jobs-detail")],
                        className="card",
                    ),
                ],
                className="columns jobs-columns",
            ),
        ]
    )  # fmt: skip


def wire(app: "Dash", site: Site) -> None:
    """Routes instead of callbacks: they are asked several times a second."""
    server = app.server

    @server.get("/jobs.json")
    def listed() -> Response:
        if site.jobs is None:
            return jsonify({"active": 0, "jobs": [], "off": True})
        known = set(request.args.get("known", "").split(",")) - {""}
        content = answer(
            site.jobs.list(), known, every="all" in request.args,
            chosen=request.args.get("job"), mark=request.args.get("mark"),
        )  # fmt: skip
        made = jsonify(content)
        made.headers["Cache-Control"] = "no-cache, private"
        made.add_etag()
        return made.make_conditional(request)  # type: ignore[return-value]

    @server.post("/jobs")
    def submitted() -> Response:
        def submit() -> "Job":
            if site.jobs is None:
                raise UsageError(READ_ONLY)
            argv, title = asked(request.get_json(silent=True))
            return site.jobs.submit(argv, title)

        return answered(submit)

    @server.post("/jobs/<id>/cancel")
    def cancelled(id: str) -> Response:
        def cancel() -> "Job":
            if site.jobs is None:
                raise UsageError(READ_ONLY)
            return site.jobs.cancel(id)

        return answered(cancel)


def answer(
    jobs: "Sequence[Job]", known: set[str], *, every: bool, chosen: str | None, mark: str | None
) -> dict[str, Any]:
    """What a page is told: little, since it asks often.

    Args:
        jobs: all of them, newest first.
        known: ids that the page believes to be at work: it is told how these ended.
        every: also those that ended long ago.
        chosen: id of the job of which all is told.
        mark: of its log as the page has it; the same log is not sent again.
    """
    active = [j for j in jobs if j.status in ("queued", "running")]
    shown = [j for j in jobs if every or j in active or j.id in known]
    out: dict[str, Any] = {"active": len(active), "jobs": [brief(j) for j in shown]}
    job = next((j for j in jobs if j.id == chosen), None)
    if job is not None:
        out["job"] = whole(job, mark)
    elif chosen:
        out["lost"] = chosen
    return out


def brief(job: "Job") -> dict[str, Any]:
    """What the queue shows of a job; what is not known is left out."""
    found = job.to_json()
    out = {name: found[name] for name in _BRIEF if found[name] not in (None, "", False)}
    for name in ("created", "started", "finished", "eta_s"):
        if name in out:
            out[name] = round(out[name], 1)
    page = _SHOWN_BY.get(job.argv[0] if job.argv else "", "heads")
    if job.run is not None:
        out["page"] = page if page in PAGES else "heads"
    out["title"] = titled(job)
    return out


def whole(job: "Job", mark: str | None = None) -> dict[str, Any]:
    """All of a job, without its log if the page has it."""
    found = job.to_json()
    stamp = hashlib.sha256("\n".join(job.log).encode("utf-8", "replace")).hexdigest()[:12]
    log = found.pop("log")
    out = {**found, **brief(job), "hint": job.hint, "mark": stamp}
    return out if stamp == mark else out | {"log": log}


def titled(job: "Job") -> str:
    """What a job is called; its command's first words if nobody named it."""
    return job.title or " ".join(job.argv[:3])


def asked(content: Any) -> tuple[list[str], str]:
    """The arguments and the title of a request: `{"argv": [...]}` or `{"line": "headscope ..."}`.

    Raises:
        UsageError: another form.
    """
    content = content if isinstance(content, dict) else {}
    argv, line, title = content.get("argv"), content.get("line"), content.get("title", "")
    if isinstance(line, str) and argv is None and len(line) <= LONGEST:
        try:
            argv = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"the command cannot be read: {error}") from error
        argv = argv[1:] if argv[:1] == ["headscope"] else argv
    fits = isinstance(argv, list) and all(isinstance(x, str) for x in argv)
    if not fits or not isinstance(title, str) or not 0 < len(argv) <= ARGUMENTS:
        raise UsageError(
            f'a job is {{"argv": [...], "title": "..."}} with 1 to {ARGUMENTS} arguments; got '
            f"{json.dumps(content)[:80]}"
        )
    if sum(map(len, argv)) > LONGEST:
        raise UsageError(
            f"the arguments of a job have at most {LONGEST} characters together; got "
            f"{sum(map(len, argv))}",
            hint="put long prompts into a file: --prompts FILE",
        )
    return argv, title[:120]


def answered(action: Any) -> Response:
    """A job as JSON, or the error as a line."""
    try:
        return jsonify(whole(action()))
    except UnknownNameError as error:
        made, made.status_code = jsonify({"error": told(error)}), 404
    except InterpError as error:
        made, made.status_code = jsonify({"error": told(error)}), 400
    return made


enter(
    Page(
        "jobs", "Jobs", "/jobs", layout, wire, keys=("job",), order=8,
        help="commands that run on this machine: progress, log, cancel; each makes a run",
    )
)  # fmt: skip
