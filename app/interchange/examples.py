"""Attention of one head on one prompt as the HeadVis tree keeps it: few entries a row.

Of each row there are the at most `KEYS` largest entries that are at least `LEAST`, rounded to
`DIGITS` decimals, as flat indices query · length + key in rising order. An example comes from a
trace of the run, or from an imported tree, whose examples are the parts of its run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from interp.errors import HeadIdError, RunError
from interp.headid import HeadId
from interp.traces.trace import HeadTrace, Trace, traces_of

if TYPE_CHECKING:
    from interp.run import Run

KEYS, LEAST, DIGITS = 8, 0.005, 4
LENGTH = 512
"""Tokens of a sequence that the tree keeps; longer prompts are cut, as its own pipeline does."""
VIEW = "import"
"""The `view` of runs whose parts are examples of heads."""


@dataclass(frozen=True)
class Example:
    """The kept attention of one head on one sequence.

    Attributes:
        sequence: number of the sequence.
        tokens: text of each of its tokens.
        indices: flat indices of the entries, rising.
        values: their attention.
        peak: the largest entry outside the first row and column, before anything was left out.
        interval: 1 for the weakest fifth of the head's sequences, up to 5; 0 is not known.
    """

    sequence: int
    tokens: tuple[str, ...]
    indices: np.ndarray
    values: np.ndarray
    peak: float
    interval: int = 0

    def dense(self) -> Float[np.ndarray, "query key"]:
        """The map; NaN where nothing was kept."""
        n = len(self.tokens)
        out = np.full(n * n, np.nan, np.float32)
        out[self.indices] = self.values
        return out.reshape(n, n)


def sparse(p: Float[np.ndarray, "query key"]) -> tuple[np.ndarray, np.ndarray]:
    """The entries of a square map that are kept: flat indices and values."""
    p = np.nan_to_num(p, nan=0.0)
    keep = min(KEYS, p.shape[1])
    # Stable, so that of equal entries the first are kept on every machine.
    top = np.sort(np.argsort(-p, axis=1, kind="stable")[:, :keep], axis=1)
    values = np.take_along_axis(p, top, axis=1)
    row, place = np.nonzero(values >= LEAST)
    flat = row * p.shape[1] + top[row, place]
    return flat, np.round(values[row, place].astype(np.float64), DIGITS)


def peak(p: Float[np.ndarray, "query key"]) -> float:
    """The largest entry outside the first row and column, where sinks are; 0 if there is none."""
    inner = np.nan_to_num(p[1:, 1:], nan=0.0)
    return float(inner.max()) if inner.size else 0.0


def why_not(trace: Trace, tower: str) -> str | None:
    """Why a trace has no place in the tree; None if it has."""
    if tower not in trace.towers:
        return f"it has no tower {tower}"
    kept = trace.tower(tower)
    n = kept.n_query
    if n != kept.n_key:
        return f"{n} queries look at {kept.n_key} keys, and the format knows one sequence"
    if n < 2:
        return "it has fewer than two tokens"
    if n > LENGTH:
        for layer in kept.layers.values():
            later = HeadTrace(layer, 0).block((0, LENGTH), (LENGTH, LENGTH + 1))
            if np.isfinite(later).any():
                return f"cut at {LENGTH} tokens it would be another: queries see later keys"
    return None


def whole(trace: Trace, head: HeadId) -> Float[np.ndarray, "query key"]:
    """The map of a head on the part of a prompt that the tree keeps."""
    found = trace.head(head)
    n = min(LENGTH, found.n_query)
    return found.block((0, n), (0, n))


def of_trace(number: int, trace: Trace, head: HeadId, p: np.ndarray) -> Example:
    """The example of a map that `whole` gave."""
    labels = trace.tower(head.tower).labels("key")[: p.shape[1]]
    return Example(number, tuple(labels), *sparse(p), peak(p))


class Kept:
    """Examples of an imported run, read head by head.

    Args:
        run: the run.
    """

    def __init__(self, run: "Run") -> None:
        self.run = run

    @cached_property
    def _places(self) -> dict[HeadId, int]:
        # A run of another kind keeps its batches in the same place.
        if self.run.info.get("view") != VIEW:
            return {}
        heads = self.run.info.get("examples") or []
        if not isinstance(heads, list):
            raise RunError(f"{self.run.folder / 'run.json'} is damaged: 'examples' must be a list")
        found = {}
        for i, name in enumerate(heads):
            try:
                found[HeadId.parse(str(name))] = i
            except HeadIdError as error:
                raise RunError(f"{self.run.folder / 'run.json'} is damaged: {error}") from error
        return found

    def heads(self) -> tuple[HeadId, ...]:
        """Heads with examples."""
        return tuple(self._places)

    def of(self, head: HeadId) -> list[Example]:
        """Examples of a head; none if none were kept.

        Raises:
            RunError: they are damaged.
        """
        if head not in self._places:
            return []
        part = self.run.part(self._places[head])
        try:
            return list(_unpacked(part.arrays, part.meta))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RunError(f"the examples of {head} in {self.run.folder} are damaged") from error


def packed(examples: list[Example]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Examples of a head as arrays and facts of one part."""
    starts = np.cumsum([0, *(len(e.indices) for e in examples)])
    indices = np.concatenate([np.zeros(0, np.int64), *(e.indices for e in examples)])
    values = np.concatenate([np.zeros(0), *(e.values for e in examples)])
    arrays: dict[str, np.ndarray] = {
        "starts": starts.astype(np.int64),
        "indices": indices.astype(np.int32),
        "values": values.astype(np.float32),
        "sequence": np.array([e.sequence for e in examples], np.int64),
        "interval": np.array([e.interval for e in examples], np.int32),
        "peak": np.array([e.peak for e in examples], np.float64),
    }
    return arrays, {"tokens": [list(e.tokens) for e in examples]}


def _unpacked(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Iterator[Example]:
    starts = arrays["starts"]
    for i, tokens in enumerate(meta["tokens"]):
        part = slice(int(starts[i]), int(starts[i + 1]))
        # Four decimals survive single precision, and come back as they were written.
        values = np.round(arrays["values"][part].astype(np.float64), DIGITS)
        yield Example(
            int(arrays["sequence"][i]), tuple(map(str, tokens)), arrays["indices"][part], values,
            float(arrays["peak"][i]), int(arrays["interval"][i]),
        )  # fmt: skip


def traces_for(run: "Run", tower: str) -> tuple[list[Trace], list[str]]:
    """Traces of a run that have a place in the tree, and a line for each that has none."""
    good, bad = [], []
    for trace in traces_of(run.folder).values():
        why = why_not(trace, tower)
        if why is None:
            good.append(trace)
        else:
            bad.append(f"prompt {trace.id}: {why}")
    return good, bad
