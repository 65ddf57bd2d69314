"""`headscope export`: a run as another program's data, or one head of it as a page."""

from pathlib import Path
from typing import Annotated

import typer

from app import options as o
from app.exits import UsageError, say
from app.tables import Format, Part, Table, write


def export(
    run: o.Folder,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder, or with --head the file, to write.")
    ],
    to: Annotated[str | None, typer.Option("--to", help="Format of a folder: headvis.")] = None,
    head: Annotated[str | None, typer.Option("--head", help="A head, such as L9H6.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --head, id of the prompt; the first if absent.")
    ] = None,
    tower: Annotated[
        str | None, typer.Option(help="With --to, the tower; that of the first table if absent.")
    ] = None,
    format: o.Formatted = Format.auto,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a run as another program's data, or one head of it as a page of its own.

    With --to headvis the scores and the kept attention as a tree that HeadVis and Neuronpedia read.
    With --head one HTML file that needs no network: the head's map, tokens, scores and summaries.
    """
    if (to is None) == (head is None):
        raise UsageError("export needs one of --to FORMAT and --head HEAD")
    if prompt is not None and head is None:
        raise UsageError("--prompt goes with --head; got none")
    if tower is not None and to is None:
        raise UsageError("--tower goes with --to; a head's own is written vision.L3H2")
    if head is not None:
        _page(run, head, prompt, out, format, quiet=quiet)
    else:
        _tree(run, str(to), tower, out, format, quiet=quiet)


def _tree(
    place: Path, to: str, tower: str | None, out: Path, format: Format, *, quiet: bool
) -> None:
    from app.interchange import FORMATS
    from app.runtables import tables_of

    form = FORMATS[to]
    if form.write is None:
        known = ", ".join(name for name in FORMATS if FORMATS[name].write is not None)
        raise UsageError(f"format {to!r} is read, not written", hint=f"written are: {known}")
    run = tables_of(place)[1]
    if run is None:
        raise UsageError(f"a run is needed; {place} is a file of scores")
    written = form.write(run, out, tower)
    row = {"format": to, "out": str(out), **written.counts}
    about = {"run": str(run.folder), "left_out": list(written.left_out)}
    part = Part(f"{run.folder} as {to}", [row], note="; ".join(written.left_out))
    drawn = write(Table("headscope.export", tuple(row), [part], about), format)
    if not quiet and not drawn:
        for line in written.left_out:
            say(line, label="left out")


def _page(
    place: Path, head: str, prompt: str | None, out: Path, format: Format, *, quiet: bool
) -> None:
    from app.headview import show_head

    view = show_head(place, head, prompt)
    path = view.save(out)
    row = {
        "format": "html", "out": str(path), "head": view.head, "prompt": view.prompt,
        "bytes": path.stat().st_size,
    }  # fmt: skip
    part = Part(f"{head} of {place}", [row], note=view.note)
    drawn = write(Table("headscope.export", tuple(row), [part], {"run": str(place)}), format)
    if not quiet and not drawn and view.note:
        say(view.note, label="note")
