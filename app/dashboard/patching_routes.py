"""What leaves the page Patching: CSV files, and the Python and the command behind it."""

import csv
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flask import Flask, Response, request

from app.dashboard.data import KEPT, answered
from app.dashboard.library import Library, OpenRun
from app.dashboard.page import Feed, Site
from app.dashboard.patching import CUT, effects_of, example_of, mode_of, sweep_of, windows_of
from app.positions import ROWS, PositionSweep
from app.positionview import COLUMNS, cells
from interp.errors import InputError, InterpError, UnknownNameError


def routes(server: Flask, library: Library) -> None:
    """Cells of a sweep, and rows of windows, as CSV files."""

    @server.get("/data/<run>/positions/<rows>.csv")
    @answered
    def positions(run: str, rows: str) -> Response:
        if rows not in ROWS:
            raise UnknownNameError("kind of rows", rows, ROWS)
        example = request.args.get("example", "")
        if example and not (example.isascii() and example.isdigit()):
            raise InputError(f"example must be a number from 0; got {example[:40]!r}")
        found = cells(
            sweep_of(library.open(run)), rows, example=int(example) if example else None,
            by=request.args.get("by") or None,
        )  # fmt: skip
        return _csv(found, COLUMNS, f"{run}-{rows}-positions")

    @server.get("/data/<run>/windows.csv")
    @answered
    def windows(run: str) -> Response:
        return _csv(windows_of(library.open(run))[0], CUT, f"{run}-windows")


def _csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], stem: str) -> Response:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows(rows)
    answer = Response(out.getvalue().encode("utf-8", "replace"), mimetype="text/csv")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem)
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}.csv"'
    answer.headers["Cache-Control"] = KEPT
    return answer


def csv_link(run: OpenRun, rows: str, sweep: PositionSweep, feed: Feed) -> str:
    """Where the drawn cells are to be had as numbers."""
    example, by = example_of(feed), mode_of(sweep, feed)
    query = f"?example={example}" if example is not None else f"?by={by}" if by else ""
    return f"/data/{run.name}/positions/{rows}.csv{query}"


def python(site: Site, feed: Feed) -> str:
    """The Python that draws the same."""
    if "run" not in feed:
        return ""
    run = site.run(feed)
    lines = ["from interp.run import Run", "", f"run = Run.load({str(site.root / run.name)!r})"]
    try:
        sweep_of(run)
    except InterpError:
        name = next(iter(effects_of(run)), None)
        if name is None:
            return ""
        lines.insert(0, "from app.figures.patching import effect_grid")
        return "\n".join([*lines, f"effect_grid(run.scores[{name!r}]).show()"])
    lines[:0] = [
        "from app.figures.patching import position_map",
        "from app.positions import read_positions", "from app.positionview import view_of",
    ]  # fmt: skip
    more = f", example={example_of(feed)}" if example_of(feed) is not None else ""
    more += ", recovered=True" if feed.get("pval") == "recovered" else ""
    lines.append(f'position_map(view_of(read_positions(run), "head"{more})).show()')
    return "\n".join(lines)


def command(site: Site, feed: Feed) -> str:
    """The command that made the run."""
    if "run" not in feed:
        return ""
    run = site.run(feed)
    return str(run.info.get("command") or shlex.join(["headscope", "show", run.name]))
