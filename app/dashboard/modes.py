"""Ways of reading a head's map: as it is, weighted by what is written, without the sink, A − B."""

from collections.abc import Callable

import numpy as np

from app.dashboard.page import Feed, span_of
from interp.traces.pooling import Window, encode, pooled
from interp.traces.trace import HeadTrace

MODES = (("attention", "attention"), ("value", "value-weighted"), ("nosink", "sink hidden"))
OVERVIEW = 512
"""Queries beyond which the whole map is shown as it was pooled at capture."""
_BAND = 1 << 21

Weigh = Callable[[np.ndarray, slice, slice], np.ndarray]
"""From entries [row, key], rows and keys of the map to other entries of the same shape."""


def window_of(head: HeadTrace, feed: Feed) -> tuple[Window, float]:
    """The window of a feed in its mode, and by how much its values were scaled.

    `value` multiplies each entry by ‖v_j W_O‖ over the largest such norm; `nosink` leaves the
    first key out and divides each row by what is left.

    Raises:
        RunError: the norms of what the head writes were not kept.
    """
    q, k = span_of(feed.get("q"), head.n_query), span_of(feed.get("k"), head.n_key)
    mode = feed.get("mode") or "attention"
    if mode == "value":
        norm = head.summary("value_norm").astype(np.float32)
        most = max(float(norm.max()), 1e-30)
        return weighed(head, q, k, lambda p, rows, keys: p * (norm[keys] / most)), 1.0 / most
    if mode == "nosink":
        left = np.maximum(1.0 - np.nan_to_num(head.columns([0])[0]), 1e-6)
        return weighed(head, q, k, lambda p, rows, keys: _without_first(p, keys, left[rows])), 1.0
    if q == (0, head.n_query) and k == (0, head.n_key) and head.n_query > OVERVIEW:
        return head.overview(), 1.0
    return head.window(q, k), 1.0


def _without_first(p: np.ndarray, keys: slice, left: np.ndarray) -> np.ndarray:
    out: np.ndarray = p / left[:, None]
    if keys.start == 0:
        out[:, 0] = np.where(np.isnan(out[:, 0]), np.nan, 0.0)
    return out


def weighed(head: HeadTrace, q: tuple[int, int], k: tuple[int, int], weigh: Weigh) -> Window:
    """A window whose entries are weighed before they are pooled, in bands of rows."""
    shape = head.window(q, k)
    keys = slice(shape.k0, shape.k1)
    cells = max(1, _BAND // ((shape.k1 - shape.k0) * shape.pool_q))
    band = cells * shape.pool_q
    found = []
    for at in range(shape.q0, shape.q1, band):
        rows = slice(at, min(at + band, shape.q1))
        p = weigh(head.block((rows.start, rows.stop), (keys.start, keys.stop)), rows, keys)
        found.append(pooled(np.where(np.isnan(p), -1.0, p), shape.pool_q, shape.pool_k))
    cell = np.concatenate(found)
    return Window(
        encode(np.clip(cell, 0, 1), cell >= 0), shape.q0, shape.k0, shape.q1, shape.k1,
        shape.pool_q, shape.pool_k,
    )  # fmt: skip
