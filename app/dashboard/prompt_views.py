"""What the page Prompt draws of runs: a head on two prompts, a row of both, scores of a needle."""

from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.page import Feed, Site, head_of
from app.dashboard.prompt_diff import WHOLE, Alignment, Difference, align_towers, row_difference
from app.dashboard.prompt_needle import scores_of
from app.figures.maps import marked
from app.figures.prompt import needle_grid, row_bars
from interp.errors import RunError
from interp.headid import DEFAULT_TOWER, HeadId

if TYPE_CHECKING:
    from app.dashboard.library import OpenRun
    from interp.traces.trace import HeadTrace, Trace

BARS = 24
"""Keys that are drawn of a row."""
NONE = "-"
"""What stands for a run in the path where none is chosen."""


def model_of(run: "OpenRun") -> str:
    """Name of the model of a run."""
    return str(run.info.get("model") or run.info.get("key", {}).get("model") or "")


def prompts_of(run: "OpenRun") -> list[dict[str, str]]:
    """The prompts with traces in a run, as choices."""
    return [
        {"value": key, "label": f"{t.id} ({len(t.tokens)})"} for key, t in run.traces.items()
    ]  # fmt: skip


def tower_of(trace: "Trace", feed: Feed) -> str:
    """The tower of a feed if the trace has it, else its first."""
    name = feed.get("tower") or DEFAULT_TOWER
    return name if name in trace.towers else next(iter(trace.towers))


def heads_of(trace: "Trace", feed: Feed) -> list[HeadId]:
    """Heads that can be compared."""
    name = tower_of(trace, feed)
    layers = trace.towers[name].layers
    return [HeadId(i, h, name) for i in sorted(layers) for h in range(layers[i].n_heads)]


def chosen(trace: "Trace", feed: Feed) -> HeadId:
    """The head of a feed, or the first that was kept."""
    if "dh" in feed:
        return HeadId.parse(feed["dh"])
    known = heads_of(trace, feed)
    wanted = head_of(feed)
    return wanted if wanted in known and wanted is not None else known[0]


def pair_of(site: Site, feed: Feed) -> "tuple[HeadTrace, HeadTrace, Alignment]":
    """The head of a feed in both traces, and which of their positions belong together.

    Raises:
        RunError: nothing is chosen to compare with.
        InterpError: it was not kept in both, or cannot be compared.
    """
    if feed.get("run", NONE) == NONE or "ab" not in feed:
        raise RunError("a difference needs two prompts, A and B", hint="write both, and run them")
    found = site.run(feed)
    one = found.trace(feed.get("prompt"))
    other = (site.library.open(feed["abrun"]) if "abrun" in feed else found).trace(feed["ab"])
    head = chosen(one, feed)
    a, b = one.head(head), other.head(head)
    pairs = align_towers(a.layer.tower, b.layer.tower)
    if not len(pairs):
        raise RunError("A and B have no token in common, so no entry can be compared")
    return a, b, pairs


def labels_of(a: "HeadTrace", b: "HeadTrace", found: Alignment) -> list[str]:
    """Text of each pair: one token, or that of A, a bar and that of B."""
    mine, theirs = a.layer.tower.labels("key"), b.layer.tower.labels("key")
    return [
        f"{marked(mine[i])} | {marked(theirs[j])}" if different else marked(mine[i])
        for (i, j), different in zip(found.pairs.tolist(), found.differs.tolist(), strict=True)
    ]


def described_map(made: Difference, found: Alignment, labels: list[str]) -> str:
    """A difference in words."""
    where = f"Queries {made.r0}–{made.r1 - 1}, keys {made.c0}–{made.c1 - 1} of {len(found)} pairs"
    pool = (
        "every entry" if made.exact else
        f"a cell is the entry of the largest absolute value of {made.pool_r} × {made.pool_c}"
    )  # fmt: skip
    parts = [f"{where}, {pool}"]
    if len(found) > WHOLE:
        parts.append(f"at most {WHOLE} pairs a side are worked out at once, the last unless zoomed")
    lone = len(found.only_a) + len(found.only_b)
    if lone:
        parts.append(f"{lone} tokens without a counterpart are left out")
    size = np.abs(np.nan_to_num(made.values))
    at = np.argsort(-size, axis=None, kind="stable")[:3]
    rows, columns = np.unravel_index(at, size.shape)
    top = [
        f"{labels[made.r0 + r * made.pool_r]} ({made.r0 + r * made.pool_r}) to "
        f"{labels[made.c0 + c * made.pool_c]} ({made.c0 + c * made.pool_c}) "
        f"{made.values[r, c]:+.3f}"
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
        if size[r, c] >= 5e-4
    ]  # fmt: skip
    parts.append(f"largest: {'; '.join(top)}" if top else "nothing of 0.001 or more")
    return ". ".join(p[0].upper() + p[1:] for p in parts) + "."


def drawn_row(a: "HeadTrace", b: "HeadTrace", found: Alignment, feed: Feed) -> tuple[Any, str]:
    """The row of a feed, the last unless it names one: the keys that differ most, and in words."""
    text = feed.get("dr", "")
    row = int(text) if text.isdecimal() and len(text) < 9 else len(found) - 1
    one, other, change = row_difference(a, b, found, row)
    labels = labels_of(a, b, found)
    size = np.nan_to_num(np.abs(change), nan=-1.0)
    order = np.sort(np.argsort(-size, kind="stable")[:BARS])
    order = order[size[order] >= 0]
    figure = row_bars(one, other, order, labels=labels, theme=feed.get("theme"))
    top = np.argsort(-size, kind="stable")[:5]
    words = ", ".join(
        f"{labels[i]} ({i}) {change[i]:+.3f}" for i in top.tolist() if size[i] >= 5e-4
    )
    shown = f"the {len(order)} keys that differ most" if len(found) > BARS else "every key"
    largest = words or "nothing of 0.001 or more"
    return figure, f"Row {row}, {labels[row]}: {shown}. Largest A − B: {largest}."


def drawn_grid(site: Site, feed: Feed) -> tuple[Any, str]:
    """Retrieval of a head by depth and length, in the run of a feed.

    Raises:
        RunError: the run has no such prompts.
    """
    hint = "make prompts here and score retrieval on them"
    if feed.get("run", NONE) == NONE:
        raise RunError("no run is chosen", hint=hint)
    found = site.run(feed)
    name = "retrieval" if "retrieval" in found.tables else None
    if name is None:
        raise RunError(f"run {found.name} has no scores of retrieval", hint=hint)
    table = found.table(name)
    head = HeadId.parse(feed["dh"]) if "dh" in feed else (table.top(1) or table.heads)[0]
    scores = scores_of(table, head)
    if scores is None:
        raise RunError(
            f"the prompts of {found.name} do not say their depth and length", hint=hint
        )  # fmt: skip
    figure = needle_grid(
        scores.lengths, scores.depths, scores.mean, scores.counts, theme=feed.get("theme")
    )
    gave = int(scores.counts.sum())
    lost = "" if gave == scores.asked else "; of the others the answer was not produced"
    text = f"{head}: {gave} of {scores.asked} prompts gave a score{lost}."
    if gave:
        low = np.nanargmin(scores.mean)
        d, n = np.unravel_index(low, scores.mean.shape)
        text += (
            f" Mean {np.nanmean(scores.mean):.3f}; lowest {scores.mean[d, n]:.3f} at depth "
            f"{scores.depths[d]:g}, {scores.lengths[n]} tokens."
        )
    return figure, text
