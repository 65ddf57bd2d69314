"""Routes of the page Vision: patches of a prompt, rows of heads over them, who reads them."""

from typing import Any

import numpy as np
from flask import Flask, Response, jsonify, request

from app.dashboard.data import KEPT, answered
from app.dashboard.library import Library
from app.dashboard.vision import (
    ALL,
    FRAME,
    IMAGE,
    TILE,
    Patches,
    own_query,
    patches_of,
    positions_of,
    row_of,
    shift_of,
)
from app.dashboard.vision_heads import readers, readers_by_head
from app.figures.maps import marked
from interp.errors import InputError
from interp.headid import HeadId
from interp.traces.pooling import encode
from interp.traces.trace import Trace

MOST_HEADS = 32


def routes(server: Flask, library: Library) -> None:
    """Add the routes to a server."""
    base = "/data/<run>/<trace>/<tower>"

    @server.get(f"{base}/patches.json")
    @answered
    def patches(run: str, trace: str, tower: str) -> Response:
        found = library.open(run).trace(trace)
        return _kept(jsonify(described(found, tower, patches_of(found, tower))))

    @server.get(f"{base}/sights/<query>")
    @answered
    def sights(run: str, trace: str, tower: str, query: str) -> Response:
        found = library.open(run).trace(trace)
        at = _query(found, tower, query)
        heads = [HeadId.parse(h) for h in request.args.get("heads", "").split(",") if h]
        if not 0 < len(heads) <= MOST_HEADS:
            raise InputError(f"between 1 and {MOST_HEADS} heads are needed; got {len(heads)}")
        places = patches_of(found, tower).at
        rows = [row_of(found.head(HeadId(h.layer, h.head, tower)), at)[places] for h in heads]
        codes, most = relative(np.stack(rows))
        answer = Response(codes.tobytes(), mimetype="application/octet-stream")
        answer.headers["X-Sights"] = " ".join(
            f"{top:.6g}:{float(np.nansum(row)):.6g}" for top, row in zip(most, rows, strict=True)
        )
        return _kept(answer)

    @server.get(f"{base}/<int:layer>/<int:head>/readers/<query>")
    @answered
    def reading(run: str, trace: str, tower: str, layer: int, head: int, query: str) -> Response:
        found = library.open(run).trace(trace)
        places = patches_of(found, tower)
        chosen = places.among(positions_of(request.args.get("at")))
        if not len(chosen):
            raise InputError("patches must be named, as at=5-7,12; got none")
        one = found.head(HeadId(layer, head, tower))
        labels, shift = one.layer.tower.labels("query"), shift_of(one.layer.tower)
        every = request.args.get("every") == "1"
        tokens = readers(one, places, chosen, every=every)
        heads = readers_by_head(found, tower, _query(found, tower, query), chosen)
        return _kept(jsonify({
            "patches": len(chosen),
            "tokens": [[i + shift, marked(labels[i]), round(m, 6)] for i, m in tokens if m >= 1e-6],
            "heads": [[str(h), round(m, 6)] for h, m in heads if m >= 1e-6],
        }))  # fmt: skip


def described(trace: Trace, tower: str, patches: Patches) -> dict[str, Any]:
    """What the page must know of the patches of a tower.

    Returns:
        `at`, `image`, `tile`, `frame`, `row`, `column` of each patch; `box`, four numbers of each,
        in pixels; `images` with their sizes and whether there is a picture; `named` boxes; `own`,
        the query that looks unless another is chosen, or null for the mean over all; and `shift`,
        positions before the first query.
    """
    arrays = trace.pictures[0]
    places = patches.places
    return {
        "at": patches.at.tolist(),
        **{name: places[:, column].tolist() for name, column in
           (("image", IMAGE), ("row", 3), ("column", 4), ("tile", TILE), ("frame", FRAME))},
        "box": [round(float(x), 2) for x in patches.boxes.reshape(-1)],
        "images": [{"size": list(size), "picture": f"image-{j}" in arrays}
                   for j, size in enumerate(patches.sizes)],
        "named": {name: [image, *box] for name, (image, box) in patches.named.items()},
        "own": own_query(trace, tower),
        "shift": shift_of(trace.tower(tower)),
        "id": trace.id,
    }  # fmt: skip


def relative(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[row, patch] masses as codes in which 255 is the largest of each row, and these largest.

    A patch of thousands may have a mass of 1e-5: codes of the mass itself would not tell it from
    another of 4e-5. Code 0 is a patch that the query does not see, a mass of NaN.
    """
    most = np.nan_to_num(rows).max(1, initial=0.0)
    scaled = rows / np.where(most > 0, most, 1.0)[:, None]
    return encode(scaled, ~np.isnan(rows)), most


def _query(trace: Trace, tower: str, text: str) -> int | None:
    if text == ALL:
        return None
    n = trace.tower(tower).n_query
    if not text.isdecimal() or len(text) > 12 or int(text) >= n:
        raise InputError(f"a query must be {ALL} or lie in 0..{n - 1}; got {text[:20]!r}")
    return int(text)


def _kept(answer: Response) -> Response:
    answer.headers["Cache-Control"] = KEPT
    return answer
