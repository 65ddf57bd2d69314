"""What a page of one head shows, gathered from a run: its map on a prompt, scores, summaries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.folders import find
from app.interchange.examples import KEYS, LEAST, Example, Kept
from app.tokentext import shown
from interp.errors import HeadIdError, RunError, UnknownNameError
from interp.headid import HeadId
from interp.run import Run
from interp.traces.pooling import Window, aligned, encode, pooled
from interp.traces.trace import EXACT, TOP, HeadTrace, Trace, traces_of

if TYPE_CHECKING:
    from interp.scores import HeadScores

MASKED = "the query does not see the key"
STRONGEST, RECEIVED = 3, 5


@dataclass(frozen=True)
class Facts:
    """A small table of what is summed up of a head."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Seen:
    """A head on a prompt.

    Attributes:
        head: the head.
        model: name of its model.
        prompt: id of the prompt.
        queries: text of each query position.
        keys: text of each key position.
        window: the whole map in at most so many cells a side.
        strongest: queries and keys with the largest entries, the first token aside.
        scores: rows of the tables of scores, one a table, by `interp.scores.COLUMNS`.
        tables: summaries.
        notes: what must be known of the map, a sentence each, without its full stop.
        unseen: what a cell without a number means.
    """

    head: HeadId
    model: str
    prompt: str
    queries: Sequence[str]
    keys: Sequence[str]
    window: Callable[[int], Window]
    strongest: Sequence[tuple[int, int, float]]
    scores: Sequence[Mapping[str, Any]]
    tables: Sequence[Facts] = ()
    notes: Sequence[str] = ()
    unseen: str = MASKED

    @property
    def n_query(self) -> int:
        """Query positions."""
        return len(self.queries)

    @property
    def n_key(self) -> int:
        """Key positions."""
        return len(self.keys)


def seen_of(run: Run | str | Path, head: HeadId, prompt: str | None) -> Seen:
    """What is shown of a head on a prompt.

    Raises:
        RunError: no such run, it is damaged, or it keeps no attention.
        HeadIdError: no prompt holds the head.
        UnknownNameError: there is no such prompt.
    """
    opened = run if isinstance(run, Run) else Run.load(find(Path(run)))
    kept = Kept(opened)
    traces = traces_of(opened.folder)
    if not traces and not kept.heads():
        raise RunError(
            f"a head is shown on a prompt; {opened.folder} keeps no attention of any",
            hint="headscope capture keeps that of a prompt in a run",
        )
    holding = {key: trace for key, trace in traces.items() if _holds(trace, head)}
    examples = {str(e.sequence): e for e in kept.of(head)}
    if not holding and not examples:
        raise HeadIdError(f"{head} is in none of the prompts that {opened.folder} keeps")
    if prompt is None:
        if holding:
            return _of_trace(opened, next(iter(holding.values())), head)
        return _of_example(opened, max(examples.values(), key=lambda e: e.peak), head)
    for key, trace in holding.items():
        if prompt in (key, trace.id):
            return _of_trace(opened, trace, head)
    if prompt in examples:
        return _of_example(opened, examples[prompt], head)
    raise UnknownNameError(
        f"prompt with {head}", prompt, [*(t.id for t in holding.values()), *examples]
    )


def _holds(trace: Trace, head: HeadId) -> bool:
    if head.tower not in trace.towers:
        return False
    layer = trace.tower(head.tower).layers.get(head.layer)
    return layer is not None and head.head < layer.n_heads


def _of_trace(run: Run, trace: Trace, head: HeadId) -> Seen:
    found = trace.head(head)
    tower = found.layer.tower
    queries, keys = tower.labels("query"), tower.labels("key")
    return Seen(
        head, str(trace.info.get("model") or run.info.get("model") or "a model"), trace.id,
        queries, keys,
        lambda cells: found.window((0, found.n_query), (0, found.n_key), cells=cells),
        _strongest(found), _scores(run.scores, head, HeadId(head.layer, found.kv, head.tower)),
        _sums(found, keys), (_origin(found),),
    )  # fmt: skip


def _origin(found: HeadTrace) -> str:
    layer = found.layer
    if layer.form == EXACT:
        error = "" if layer.error is None else f" by at most {layer.error:.1e}"
        return f"recomputed from queries and keys; checked rows differ from the model's own{error}"
    if layer.form == TOP:
        kept = layer.array("top_key", found.head, slice(0, 1)).shape[-1]
        return f"only the {kept} largest entries of each row were kept: {layer.note}"
    return f"kept as the model computed it: {layer.note}"


def _strongest(found: HeadTrace) -> list[tuple[int, int, float]]:
    """The largest entries of different rows; those of the first token only if there are no others.

    Many heads leave their mass on the first token, which tells nothing of the prompt.
    """
    if not {"peak", "peak_key"} <= set(found.layer.names()):
        return []
    mass, key = found.summary("peak").astype(np.float64), found.summary("peak_key")
    order = sorted(range(len(mass)), key=lambda i: (key[i] == 0, -mass[i], i))
    return [(i, int(key[i]), float(mass[i])) for i in order[:STRONGEST]]


def _sums(found: HeadTrace, keys: Sequence[str]) -> list[Facts]:
    names = set(found.layer.names())
    tables = []
    if "entropy" in names:
        mean = float(found.summary("entropy").astype(np.float64).mean())
        row = [f"{mean:.3g} nats", f"{np.exp(mean):.3g}"]
        tables.append(Facts("Rows", "", ("mean entropy", "as many keys as"), [row]))
    segments = found.layer.tower.segments
    if "segments" in names and len(segments) > 1:
        mass = found.summary("segments")
        rows = [[name, *(f"{x:.3f}" for x in row)]
                for name, row in zip(segments, mass.tolist(), strict=True)]  # fmt: skip
        note = "mean mass from a query of a row's segment to a column's"
        tables.append(Facts("Segments", note, ("from", *segments), rows))
    if "distance" in names:
        mass = found.summary("distance")
        bins = [_bin(b) for b in range(len(mass))]
        rows = [[f"{x:.3f}" for x in mass.tolist()]]
        tables.append(Facts("Distance", "mean mass by distance in tokens", bins, rows))
    if "received" in names:
        mass = found.summary("received")
        top = np.argsort(-mass, kind="stable")[:RECEIVED].tolist()
        rows = [[str(j), shown(keys[j]), f"{mass[j]:.3f}"] for j in top]
        note = "mean mass from the queries that see it"
        tables.append(Facts("Most looked at", note, ("key", "token", "mass"), rows))
    return tables


def _bin(b: int) -> str:
    low, high = (0, 0) if b == 0 else (1 << (b - 1), (1 << b) - 1)
    return str(low) if low == high else f"{low}–{high}"


def _scores(
    tables: "Mapping[str, HeadScores]", head: HeadId, group: HeadId | None
) -> list[dict[str, Any]]:
    """The row of a head in every table; of its key-value head where a table is of those."""
    found = []
    for table in tables.values():
        wanted = head if table.granularity == "query" else group
        row = next((r for r in table.rows() if r["head"] == str(wanted)), None)
        if row is not None:
            named = "" if table.granularity == "query" else f" (key-value head {wanted})"
            found.append({**row, "detector": f"{table.detector}{named}"})
    return found


def _of_example(run: Run, example: Example, head: HeadId) -> Seen:
    dense = example.dense()
    n = len(example.tokens)

    def window(cells: int) -> Window:
        _, _, pool = aligned(0, n, n, cells)
        codes = pooled(encode(dense, np.isfinite(dense)), pool, pool)
        return Window(codes, 0, 0, n, n, pool, pool)

    order = sorted(range(len(example.indices)), key=lambda i: (
        example.indices[i] % n == 0, -example.values[i], example.indices[i]))  # fmt: skip
    strongest = [
        (int(example.indices[i] // n), int(example.indices[i] % n), float(example.values[i]))
        for i in order[:STRONGEST]
    ]
    note = (
        f"imported: of each row at most the {KEYS} largest entries of {LEAST:g} or more are known"
    )
    return Seen(
        head, str(run.info.get("model") or "a model"), str(example.sequence), example.tokens,
        example.tokens, window, strongest, _scores(run.scores, head, None), (), (note,),
        "masked, or not kept",
    )  # fmt: skip
