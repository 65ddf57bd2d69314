"""The file of one head in a HeadVis tree: which sequences it shows, and what sums them up.

Sequences are parted into fifths by their largest attention. Of the strongest fifth the `TOP`
strongest are shown, of each other `WITHIN` at random. The pipeline that the format comes from finds
the fifths on its first sequences and never shows those; here all are at hand before any is chosen.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from app.interchange.examples import DIGITS, Example

INTERVALS, WITHIN, TOP = 5, 3, 10
BINS, TOKENS = 50, 50
EDGES = (0, *(2**i for i in range(13)))
"""Edges of the bins of distance, up to 4096."""


def sampled(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """The examples that are shown, weakest interval first; those that have theirs keep it."""
    if all(e.interval for e in examples):
        return list(examples)
    peaks = np.array([e.peak for e in examples])
    by: dict[int, list[Example]] = defaultdict(list)
    for e in examples:
        # Equal ones go together, and a single sequence is in the strongest interval.
        interval = -(-INTERVALS * int((peaks <= e.peak).sum()) // len(peaks))
        by[interval].append(replace(e, interval=interval))
    rng = random.Random(seed)
    shown = []
    for interval in sorted(by):
        group = by[interval]
        if interval == INTERVALS:
            shown += sorted(group, key=lambda e: (-e.peak, e.sequence))[:TOP]
        else:
            shown += rng.sample(group, min(WITHIN, len(group)))
    return shown


def head_file(examples: Sequence[Example], peaks: Sequence[float]) -> dict[str, Any]:
    """Contents of the file.

    Args:
        examples: what is shown.
        peaks: largest attention of every sequence, shown or not.
    """
    known = np.array([x for x in peaks if x == x])
    counts, edges = np.histogram(known.clip(0.0, 1.0), bins=BINS, range=(0.0, 1.0))
    queries: dict[str, float] = defaultdict(float)
    keys: dict[str, float] = defaultdict(float)
    distances = np.zeros(len(EDGES) - 1)
    for e in examples:
        q, k = np.divmod(e.indices.astype(np.int64), len(e.tokens))
        place = np.searchsorted(EDGES, np.abs(q - k), side="right") - 1
        within = place < len(distances)
        np.add.at(distances, place[within], e.values[within])
        for side, at in ((queries, q), (keys, k)):
            mass = np.bincount(at, e.values, len(e.tokens))
            for token, x in zip(e.tokens, mass.tolist(), strict=True):
                if x:
                    side[token] += x
    return {
        "sequences": [_sequence(e) for e in examples],
        "qk_distance_histogram": {
            "bin_edges": list(EDGES), "bin_values": np.round(distances, DIGITS).tolist(),
        },
        "top_query_tokens": _strongest(queries),
        "top_key_tokens": _strongest(keys),
        "histogram": {
            "bin_edges": np.round(edges, DIGITS).tolist(), "bin_values": counts.tolist(),
        },
        "statistics": {
            "n_samples": len(examples),
            "mean_max_activation": round(float(known.mean()), DIGITS) if len(known) else None,
        },
    }  # fmt: skip


def _sequence(e: Example) -> dict[str, Any]:
    return {
        "sequence_id": e.sequence,
        "interval": e.interval,
        "tokens": list(e.tokens),
        "attention_indices": e.indices.tolist(),
        "attention_values": e.values.tolist(),
        "seq_len": len(e.tokens),
        "max_activation": e.peak,
    }


def _strongest(mass: dict[str, float]) -> list[dict[str, Any]]:
    ranked = sorted(mass.items(), key=lambda item: (-item[1], item[0]))[:TOKENS]
    return [{"token": token, "weight": round(x, DIGITS)} for token, x in ranked]
