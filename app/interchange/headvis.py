"""The HeadVis data tree (Luger, Kamath et al. 2026; the pipeline of Neuronpedia), both ways.

    config.json           model, dataset, heads [[layer, head], …], metrics; how it was made
    scatter_data.json     [{"layer", "head", metric: value or null, …}, …]
    heads/L{l}H{h}.json   sequences with their kept attention, and what sums them up
    server_config.json, attributions/manifest.json    empty: nothing is served

Written are the score of every table of the run, the six metrics of `pattern_metrics`, where the run
has traces, and the traces as sequences. The tree has one tower and no intervals, nulls or verdicts:
those stay behind. Its config.json holds one block more, `headscope`, with units and prompt ids.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.interchange import FORMATS, Interchange, Written
from app.interchange.examples import KEYS, LEAST, LENGTH, Example, Kept, of_trace, traces_for, whole
from app.interchange.headvis_sequences import INTERVALS, TOP, WITHIN, head_file, sampled
from app.interchange.headvis_tree import read
from app.interchange.pattern_metrics import INDUCTION_LEAST, METRICS, Sums
from interp.errors import InputError, RunError
from interp.files import disk_errors, jsonable, write_atomic
from interp.headid import DEFAULT_TOWER, HeadId
from interp.traces.trace import TOP as TRUNCATED
from interp.traces.trace import LayerTrace, Trace

if TYPE_CHECKING:
    from interp.run import Run
    from interp.scores import HeadScores


def write(run: "Run", out: Path, tower: str | None) -> Written:
    """Write a run as a tree, into a folder that is new or empty.

    Args:
        run: a complete run.
        out: the folder.
        tower: tower to write; that of the first table if None.

    Raises:
        InputError: the run has no such tower, or nothing that the tree has a place for.
        RunError: the folder is not empty, the run is damaged, or the disk is full.
    """
    every = run.scores
    tower = tower or next((t.towers[0] for t in every.values() if t.towers), DEFAULT_TOWER)
    tables, left_out = _tables(every, tower)
    kept = Kept(run)
    traces, bad = traces_for(run, tower)
    if kept.heads() and traces:
        # Both number their sequences from 0.
        traces, bad = [], [f"{len(traces)} prompts of the run: its imported sequences are written"]
    left_out += bad
    heads = _heads(tables, traces, kept, tower)
    if not heads:
        raise InputError(
            f"a tree is written of the heads of one tower; {run.folder} has none of {tower}"
        )
    if not tables and not any(_counts(trace, tower) for trace in traces):
        raise InputError(
            f"a tree needs a metric; {run.folder} has neither scores nor whole maps of {tower}"
        )
    _empty(out)
    scores: dict[HeadId, dict[str, float]] = {}
    count = 0
    for head in heads:
        examples, sums = _examples(head, traces, kept)
        found = sums.means() if sums.queries else {}
        own = {name: values[head] for name, values in tables.items() if head in values}
        # A column is from one source: a table of a metric's name takes its place, gaps and all.
        scores[head] = {name: x for name, x in found.items() if name not in tables} | own
        peaks = [e.peak for e in examples]
        shown = sampled(examples, seed=head.layer * 1000 + head.head)
        count += len(shown)
        _put(out / "heads" / f"L{head.layer}H{head.head}.json", head_file(shown, peaks))
    metrics = [n for n in METRICS if any(n in row for row in scores.values())]
    metrics += [n for n in tables if n not in metrics]
    rows = [
        {"layer": h.layer, "head": h.head, **{m: _finite(scores[h].get(m)) for m in metrics}}
        for h in heads
    ]
    _put(out / "scatter_data.json", rows)
    _put(out / "server_config.json", {})
    _put(out / "attributions" / "manifest.json", {})
    _put(out / "config.json", _config(run, every, tower, heads, metrics, traces))
    counts = {"heads": len(heads), "metrics": len(metrics), "sequences": count}
    return Written(counts, tuple(left_out))


def _tables(
    every: "Mapping[str, HeadScores]", tower: str
) -> tuple[dict[str, dict[HeadId, float]], list[str]]:
    """Scores of the tower's query heads by table; and what has no place."""
    tables, left_out = {}, []
    for name, table in every.items():
        if table.granularity != "query":
            left_out.append(f"table {name}: its rows are key-value heads")
        elif tower not in table.towers:
            left_out.append(f"table {name}: it has no tower {tower}")
        else:
            pairs = zip(table.heads, table.values.tolist(), strict=True)
            tables[name] = {head: value for head, value in pairs if head.tower == tower}
    return tables, left_out


def _heads(
    tables: Mapping[str, Mapping[HeadId, float]], traces: list[Trace], kept: Kept, tower: str
) -> list[HeadId]:
    found = {head for values in tables.values() for head in values}
    found |= {head for head in kept.heads() if head.tower == tower}
    for trace in traces:
        for layer in trace.tower(tower).layers.values():
            found |= {HeadId(layer.index, h, tower) for h in range(layer.n_heads)}
    return sorted(found)


def _examples(head: HeadId, traces: list[Trace], kept: Kept) -> tuple[list[Example], Sums]:
    examples, sums = kept.of(head), Sums()
    for i, trace in enumerate(traces):
        layer = trace.tower(head.tower).layers.get(head.layer)
        if layer is None or head.head >= layer.n_heads:
            continue
        p = whole(trace, head)
        examples.append(of_trace(i, trace, head, p))
        if _whole(layer):
            ids = trace.info.get("ids")
            labels = trace.tower(head.tower).labels("key")
            sums.add(p, _same(ids if ids and len(ids) == len(labels) else labels)[: len(p)])
    return examples, sums


def _whole(layer: LayerTrace) -> bool:
    """Whether maps of a layer are kept whole: what is left out is missing from every mean."""
    return layer.form != TRUNCATED


def _counts(trace: Trace, tower: str) -> bool:
    return any(_whole(layer) for layer in trace.tower(tower).layers.values())


def _same(tokens: list[Any]) -> list[int]:
    """Numbers that are equal where tokens are."""
    place: dict[Any, int] = {}
    return [place.setdefault(token, len(place)) for token in tokens]


def _config(
    run: "Run", every: "Mapping[str, HeadScores]", tower: str, heads: list[HeadId],
    metrics: list[str], traces: list[Trace],
) -> dict[str, Any]:  # fmt: skip
    first = next(iter(every.values()), None)
    model = str(run.info.get("model") or (first.provenance.get("model") if first else "") or "")
    dataset = str(run.info.get("dataset") or run.info.get("task") or "headscope")
    key = run.info["key"]
    n_layers = 1 + max(h.layer for h in heads)
    n_heads = 1 + max(h.head for h in heads)
    lengths = [min(LENGTH, t.tower(tower).n_query) for t in traces]
    about = {
        name: {"unit": t.unit, "range": list(t.range), "direction": t.direction}
        for name, t in every.items()
        if name in metrics
    }
    return {
        "model_name": model, "dataset_name": dataset,
        "heads": [[h.layer, h.head] for h in heads], "n_layers": n_layers, "n_heads": n_heads,
        "n_intervals": INTERVALS, "metrics": metrics,
        "metric_descriptions": METRICS | {n: about[n]["unit"] or n for n in about},
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Distance from query to key"},
            {"key": "histogram", "label": "Largest attention of each sequence"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Query tokens"},
            {"key": "top_key_tokens", "label": "Key tokens"},
        ],
        "statistics_display": {
            "n_samples": {"label": "Sequences", "format": "default"},
            "mean_max_activation": {"label": "Mean largest attention", "format": "default"},
        },
        "pipeline_config": {
            "model_name": model, "dataset_name": dataset, "n_sequences": len(traces),
            "seq_len": max(lengths, default=0), "dtype": str(key.get("dtype", "unknown")),
            "attn_implementation": str(key.get("attention", "unknown")),
            "revision": run.info.get("revision"), "n_intervals": INTERVALS,
            "samples_per_interval": WITHIN, "samples_per_top_interval": TOP,
            "sparse_topk_per_row": KEYS, "sparse_threshold": LEAST,
            "induction_attention_threshold": INDUCTION_LEAST,
            "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
            "actual_sequences_processed": len(traces),
        },
        "headscope": {
            "version": 1, "tower": tower, "tables": about, "prompts": [t.id for t in traces],
        },
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _empty(out: Path) -> None:
    with disk_errors(out, "create"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(
                f"a tree is written into a folder of its own; {out} is not empty",
                hint="choose another --out",
            )
        (out / "heads").mkdir(parents=True, exist_ok=True)
        (out / "attributions").mkdir(exist_ok=True)


def _put(path: Path, content: Any) -> None:
    text = json.dumps(jsonable(content, path.name), allow_nan=False)
    write_atomic(path, (text + "\n").encode())


FORMATS.register("headvis")(
    Interchange("data tree of HeadVis and Neuronpedia: metrics and sequences", read, write)
)
