"""Routes of the page Prompt: previews, command lines, jobs and pairs of prompts, all as JSON."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import RequestEntityTooLarge

from app.dashboard.data import answered
from app.dashboard.page import Site, told
from app.dashboard.prompt_diff import align_towers
from app.dashboard.prompt_needle import Needle, grid, jsonl
from app.dashboard.prompt_run import DRAWN, described, kept, line_for, preview, text_of
from app.dashboard.prompt_text import Asked, is_jsonl, options_of, written
from app.figures.maps import marked
from app.loading import Source
from interp.errors import InputError, InterpError
from interp.traces.trace import TowerTrace

Body = Mapping[str, Any]


def routes(server: Flask, site: Site) -> None:
    """Add the routes to a server; those that run a model only where there is a worker."""

    @server.get("/prompt/text/<run>/<trace>")
    @answered
    def text(run: str, trace: str) -> Response:
        found = site.library.open(run)
        model = str(found.trace(trace).info.get("model") or "")
        source = _source(model, options_of(found.info)) if model else None
        words, note = text_of(site.jobs, found.trace(trace), source)
        return jsonify({"text": words, "note": note, "id": found.trace(trace).id})

    @server.get("/prompt/pair/<run>/<trace>/<other_run>/<other>")
    @answered
    def pair(run: str, trace: str, other_run: str, other: str) -> Response:
        a, b = site.library.open(run).trace(trace), site.library.open(other_run).trace(other)
        name = request.args.get("tower") or next(iter(a.towers))
        one, two = a.tower(name), b.tower(name)
        found = align_towers(one, two)
        return jsonify({"a": _labels(one), "b": _labels(two), "align": described(found)})

    @server.get("/prompt/traces/<run>")
    @answered
    def traces(run: str) -> Response:
        found = site.library.open(run).traces
        return jsonify([{"key": k, "id": t.id, "count": len(t.tokens)} for k, t in found.items()])

    if site.jobs is not None:
        _working(server, site)


def _working(server: Flask, site: Site) -> None:
    jobs = site.jobs
    assert jobs is not None

    @server.post("/prompt/preview")
    @asked
    def look(body: Body) -> Any:
        return preview(jobs, _read(site, body))

    @server.post("/prompt/line")
    @asked
    def line(body: Body) -> Any:
        wanted = _read(site, body)
        plain = not wanted.chat or all(is_jsonl(t) for t in wanted.texts)
        made = (
            written(wanted) if plain
            else jobs.call(lambda: written(wanted, jobs.model(wanted.source)), 45.0)
        )  # fmt: skip
        argv = line_for(wanted, made, site.root)
        what = "two prompts" if len(wanted.texts) > 1 else "a prompt"
        # As the command names them: those of a file have names of their own.
        named = "--prompts" in argv
        ids = [e["id"] if named else f"prompt-{i}" for i, e in enumerate(made.entries, 1)]
        return {"argv": argv, "title": f"attention of {what}", "ids": ids}

    @server.post("/prompt/needle")
    @asked
    def needle(body: Body) -> Any:
        wanted = Needle.read(body)
        source = _read(site, {**body, "texts": [wanted.needle]}).source

        def make() -> list[dict[str, Any]]:
            model = jobs.model(source)
            return grid(wanted, _counter(model), model.context)

        entries = jobs.call(make, 45.0)
        text = jsonl(entries)
        options = _options(site, body)
        path = str(kept(text, site.root))
        common = ["--model", source.name, *_flags(options), "--prompts", path]
        return {
            "jsonl": text, "count": len(entries), "file": path,
            "rank": ["rank", "retrieval", *common], "capture": ["capture", *common],
        }  # fmt: skip


def asked(route: Callable[[Body], Any]) -> Callable[[], Response]:
    """A route that is given JSON and answers with JSON, or with a status and a line."""

    @wraps(route)
    def safe() -> Response:
        try:
            body = _json()
            if not isinstance(body, dict):
                raise InputError("a request must be a JSON mapping")
            return jsonify(route(body))
        except RequestEntityTooLarge:
            return Response("the prompt must be shorter: at most 4 MB can be sent. "
                            "headscope capture --prompts FILE reads longer ones",
                            status=413, mimetype="text/plain")  # fmt: skip
        except InterpError as error:
            status = 400 if isinstance(error, InputError) else 409
            return Response(told(error), status=status, mimetype="text/plain")

    return safe


def _json() -> Any:
    try:
        return request.get_json(force=True, silent=True)
    except RecursionError:
        return None


def _options(site: Site, body: Body) -> dict[str, str]:
    """How the run of the page loaded its model, if the model is that of the run."""
    run = body.get("run")
    if not isinstance(run, str) or run not in site.library.names():
        return {}
    info = site.library.open(run).info
    name = info.get("model") or info.get("key", {}).get("model")
    return options_of(info) if name == body.get("model") else {}


def _read(site: Site, body: Body) -> Asked:
    return Asked.read(body, _options(site, body))


def _source(model: str, options: Mapping[str, str]) -> Source:
    return Asked.read({"model": model, "texts": ["x"]}, options).source


def _flags(options: Mapping[str, str]) -> list[str]:
    return [x for k, v in options.items() for x in ([k, v] if v else [k])]


def _counter(model: Any) -> Callable[[str], int]:
    """Tokens of a text by itself.

    Raises:
        InputError: the model reads no text.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"a needle needs a tokenizer and {model.name} has none")
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _labels(tower: TowerTrace) -> list[str]:
    return [marked(t) for t in tower.labels("key")[:DRAWN]]
