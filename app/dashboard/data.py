"""Routes of plain data: rows, columns, windows, tokens, pictures and tables, outside of Dash.

What comes from a trace or a finished table never changes under its address, so browsers keep it.
Everything is addressed by names out of the library; a name that is not there is a 404 with a line
that says what there is.
"""

import io
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, request

from app.dashboard.library import Library
from app.dashboard.page import told
from app.figures.maps import marked
from interp.errors import InputError, InterpError, UnknownNameError
from interp.headid import HeadId
from interp.traces.pooling import CELLS, encode
from interp.traces.trace import HeadTrace, Trace

KEPT = "private, max-age=31536000, immutable"
TOKENS_LIMIT = 1 << 20
THUMB = 32


def routes(server: Flask, library: Library) -> None:
    """Add the routes to a server."""

    def head_of(run: str, trace: str, tower: str, layer: int, head: int) -> HeadTrace:
        return library.open(run).trace(trace).head(HeadId(layer, head, tower))

    base = "/data/<run>/<trace>"
    one = f"{base}/<tower>/<int:layer>/<int:head>"

    @server.get(f"{base}/tokens.json")
    @answered
    def tokens(run: str, trace: str) -> Response:
        found = library.open(run).trace(trace)
        tower = found.tower(request.args.get("tower") or next(iter(found.towers)))
        return _kept(jsonify(_tokens(found, tower.name)))

    @server.get(f"{one}/row/<int:at>")
    @answered
    def row(run: str, trace: str, tower: str, layer: int, head: int, at: int) -> Response:
        p = head_of(run, trace, tower, layer, head).rows([at])[0]
        return _bytes(encode(p, ~np.isnan(p)))

    @server.get(f"{one}/column/<int:at>")
    @answered
    def column(run: str, trace: str, tower: str, layer: int, head: int, at: int) -> Response:
        p = head_of(run, trace, tower, layer, head).columns([at])[0]
        return _bytes(encode(p, ~np.isnan(p)))

    @server.get(f"{one}/window")
    @answered
    def window(run: str, trace: str, tower: str, layer: int, head: int) -> Response:
        found = head_of(run, trace, tower, layer, head)
        cells = _number("cells", CELLS, 1, CELLS)
        made = found.window(_span("q", found.n_query), _span("k", found.n_key), cells=cells)
        answer = _bytes(made.codes)
        answer.headers["X-Window"] = (
            f"{made.q0}:{made.q1} {made.k0}:{made.k1} {made.pool_q}x{made.pool_k} "
            f"{made.codes.shape[0]}x{made.codes.shape[1]}"
        )
        return answer

    @server.get(f"{base}/<tower>/atlas.png")
    @answered
    def atlas(run: str, trace: str, tower: str) -> Response:
        return _kept(_png(thumbnails(library.open(run).trace(trace), tower)))

    @server.get(f"{base}/image/<int:at>.png")
    @answered
    def image(run: str, trace: str, at: int) -> Response:
        arrays, _ = library.open(run).trace(trace).pictures
        name = f"image-{at}"
        if name not in arrays:
            raise UnknownNameError("picture of this prompt", name, arrays)
        return _kept(Response(arrays[name].tobytes(), mimetype="image/png"))

    @server.get("/data/<run>/table/<name>.<kind>")
    @answered
    def table(run: str, name: str, kind: str) -> Response:
        found = library.open(run).table(name)
        writers: dict[str, Callable[[Any], tuple[bytes, str]]] = {
            "csv": lambda f: (f.to_csv(index=False).encode("utf-8", "replace"), "text/csv"),
            "parquet": lambda f: (_parquet(f), "application/vnd.apache.parquet"),
            "json": lambda f: (f.to_json(orient="records").encode(), "application/json"),
        }
        if kind not in writers:
            raise UnknownNameError("form of a table", kind, writers)
        data, mime = writers[kind](found.to_frame())
        answer = Response(data, mimetype=mime)
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{run}-{name}")
        answer.headers["Content-Disposition"] = f'attachment; filename="{stem}.{kind}"'
        return answer

    @server.get("/data/<path:rest>")
    def nothing(rest: str) -> Response:
        return Response("there is no such data", status=404, mimetype="text/plain")


def answered(route: Callable[..., Response]) -> Callable[..., Response]:
    """Turn errors of the library into a status and a line."""

    @wraps(route)
    def safe(**places: Any) -> Response:
        try:
            return route(**places)
        except InterpError as error:
            known = isinstance(error, InputError)
            return Response(told(error), status=400 if known else 404, mimetype="text/plain")

    return safe


def thumbnails(trace: Trace, tower: str, side: int = THUMB) -> np.ndarray:
    """[layers · side, heads · side] codes: a small map of each head, pooled by maximum."""
    layers = trace.tower(tower).layers
    n_heads = max(layer.n_heads for layer in layers.values())
    sheet = np.zeros(((max(layers) + 1) * side, n_heads * side), np.uint8)
    for index, layer in layers.items():
        maps = layer.array("thumb")
        rows, columns = (np.arange(side) * n // side for n in maps.shape[1:])
        maps = maps[:, rows][:, :, columns]
        high = slice(index * side, (index + 1) * side)
        sheet[high, : layer.n_heads * side] = maps.transpose(1, 0, 2).reshape(side, -1)
    return sheet


def _tokens(trace: Trace, tower: str) -> dict[str, Any]:
    found = trace.tower(tower)
    n = found.n_query + found.n_key
    if n > TOKENS_LIMIT:
        raise InputError(f"at most {TOKENS_LIMIT} positions are shown; this trace has {n}")
    shift = found.n_key - found.n_query
    same = found.labels("query") == found.labels("key")[max(0, shift) :]
    return {
        "key": [marked(t) for t in found.labels("key")],
        "query": None if same else [marked(t) for t in found.labels("query")],
        "shift": shift if same else 0,
        "spans": trace.info["spans"] if len(trace.tokens) == found.n_key else {},
        "segments": list(found.segments),
        "of": list(found.about["key_segments"]),
        "words": len(trace.tokens) == found.n_key,
    }


def _kept(answer: Response) -> Response:
    answer.headers["Cache-Control"] = KEPT
    return answer


def _bytes(codes: np.ndarray) -> Response:
    data = np.ascontiguousarray(codes).tobytes()
    return _kept(Response(data, mimetype="application/octet-stream"))


def _png(codes: np.ndarray) -> Response:
    """Codes as a PNG with a palette: masked cells are clear."""
    from PIL import Image
    from plotly.colors import get_colorscale, sample_colorscale, unlabel_rgb

    names = sample_colorscale(get_colorscale("Viridis"), np.linspace(0, 1, 255).tolist())
    palette = [0, 0, 0, *(round(c) for name in names for c in unlabel_rgb(name))]
    image = Image.fromarray(codes, mode="P")
    image.putpalette(palette)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0, compress_level=1)
    return Response(out.getvalue(), mimetype="image/png")


def _parquet(frame: Any) -> bytes:
    from interp.errors import RunError

    try:
        data: bytes = frame.to_parquet(index=False)
    except ImportError:
        raise RunError("a Parquet file needs pyarrow", hint="pip install pyarrow") from None
    return data


def _span(name: str, n: int) -> tuple[int, int]:
    text = request.args.get(name)
    if text is None:
        return 0, n
    try:
        low, high = (int(x) for x in text.split(":"))
    except ValueError:
        raise InputError(f"{name} must be FIRST:LAST; got {text[:40]!r}") from None
    return low, high


def _number(name: str, default: int, low: int, high: int) -> int:
    text = request.args.get(name, str(default))
    if not text.isdigit() or not low <= int(text) <= high:
        raise InputError(f"{name} must lie in {low}..{high}; got {text[:40]!r}")
    return int(text)
