"""What the panels of the page Vision say and draw."""

from typing import TYPE_CHECKING, Any

import numpy as np

from app.dashboard.library import OpenRun
from app.dashboard.page import Feed, Site, head_of, told
from app.dashboard.vision import budget, own_query, query_of, shift_of, towers_of
from app.dashboard.vision_heads import box_names, pointing, visual_tables
from app.figures.maps import marked
from app.figures.vision import budget_bars
from interp.errors import InterpError
from interp.traces.trace import Trace

if TYPE_CHECKING:
    from dash.development.base_component import Component

MAKE = "headscope capture --model zoo:shapes-vlm --task shapes"


def traced(run: OpenRun, feed: Feed) -> Trace:
    """The trace that a feed names; the first with images if it names none.

    Raises:
        RunError: the run has no traces.
        UnknownNameError: no such trace.
    """
    if "prompt" in feed:
        return run.trace(feed["prompt"])
    first = run.trace(None)
    return next((t for t in run.traces.values() if t.has_pictures), first)


def seen_tower(trace: Trace, feed: Feed) -> str:
    """The tower that a feed names, if its positions stand for pixels; else the first of which so.

    Raises:
        RunError: there is none.
    """
    towers = towers_of(trace)
    return feed["tower"] if feed.get("tower") in towers else towers[0]


def nothing(site: Site, feed: Feed, error: InterpError) -> "list[Component]":
    """Why there is nothing to see, and the command that makes it."""
    from dash import html

    try:
        found = site.run(feed)
    except InterpError:
        return [html.P(told(error), className="alert", role="alert")]
    out: list[Component] = [html.P(str(error), className="alert", role="alert")]
    others = [(key, t.id) for key, t in found.traces.items() if t.has_pictures]
    if others and "prompt" in feed:
        links = [
            html.Li(html.A(name, href=f"/r/{found.name}/vision?p={key}")) for key, name in others
        ]
        return [*out, html.P("Prompts of this run with images:"), html.Ul(links[:40])]
    sees = any(len(t.towers) > 1 for t in found.traces.values()) or any(
        visual_tables(found, tower) for s in found.tables.values() for tower in s.towers
    )
    model = found.info.get("model") if sees else None
    made = f"headscope capture --model {model or 'MODEL'} --image PICTURE.png --prompt TEXT"
    return [
        *out,
        html.P("Traces of prompts with images are made by a model that reads images:"),
        html.Pre(f"{made}\n{MAKE}", tabIndex="0"),
    ]


def drawn_budget(run: OpenRun, feed: Feed) -> Any:
    """The bars of a feed, and the same in words.

    Raises:
        InterpError: there is no such trace, or it is damaged.
    """
    trace = traced(run, feed)
    tower = seen_tower(trace, feed)
    found = trace.tower(tower)
    query = query_of(trace, tower, feed.get("lock"))
    by_segment = feed.get("vsource") == "segment"
    if by_segment and len(found.segments) == 1:  # of all positions, as none is told from another
        query = None
    heads, names, mass = budget(trace, tower, query, by_segment=by_segment)
    layer_of = np.array([h.layer for h in heads])
    head = head_of({**feed, "tower": tower})
    layer = head.layer if head is not None and head.layer in found.layers else int(layer_of[0])
    whose = words(trace, tower, query, by_segment=by_segment)
    if feed.get("vsplit") == "heads":
        bars, at = mass[layer_of == layer], list(range(int((layer_of == layer).sum())))
        axis, pointer = "head", head.head if head is not None else None
        text = f"Heads of layer {layer} of {tower}. {whose}."
    else:
        at = sorted(found.layers)
        bars = np.stack([mass[layer_of == i].mean(0) for i in at])
        axis, pointer = "layer", layer
        text = f"Mean over the heads of each layer of {tower}. {whose}."
    images = bars[:, [name.startswith("image") for name in names]].sum(1)
    best = int(images.argmax())
    if images[best] > 0:
        text += f" Images get most in {axis} {at[best]}: {images[best]:.2f}."
    figure = budget_bars(bars, names, at, axis=axis, theme=feed.get("theme"), marked=pointer)
    return figure, text


def words(trace: Trace, tower: str, query: int | None, *, by_segment: bool) -> str:
    """Which queries a budget is that of."""
    found = trace.tower(tower)
    if query is None:
        return "Mean over all queries"
    if by_segment:
        name = found.segments[found.about["query_segments"][query]]
        return f"Mean over the queries of segment {name}"
    label = marked(found.labels("query")[query])
    own = ", the prompt's own" if query == own_query(trace, tower) else ""
    return f"From {label} ({query + shift_of(found)}){own}"


def pointed(
    run: OpenRun, tower: str, box: str | None
) -> tuple[list[dict[str, Any]], str, list[str], str]:
    """Rows of the table of pointing, a line on them, names of boxes, and the one that was taken."""
    traces = list(run.traces.values())
    names = box_names(traces)
    if not names:
        line = "No prompt of this run names a box: boxes in a file of prompts do, or a task's own."
        return [], line, [], ""
    name = box if box in names else names[0]
    rows = pointing(traces, tower, name)
    n = max((r["n"] for r in rows), default=0)
    if not n:
        return [], f"No patch of {tower} touches a box named {name}.", names, name
    prompts = "1 prompt" if n == 1 else f"{n} prompts"
    few = " With so few, a head may hit by luck." if n < 20 else ""
    line = (
        f"{prompts} with a box {name}, each from its own query. Hits: how often the patch with "
        f"the largest mass touches the box. In the box: share of the image mass on patches that "
        f"touch it. By chance: share of patches that touch it.{few}"
    )
    return rows, line, names, name
