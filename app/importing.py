"""`headscope import`: other programs' scores of heads as a run."""

import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import options as o
from app.exits import say
from app.tables import Format, write

if TYPE_CHECKING:
    from app.interchange import Found
    from interp.run import Run


def import_(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="The file or folder of the other program.")
    ],
    source: Annotated[
        str, typer.Option("--from", help="headvis, retrieval-head or duo-attention.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model the scores are of, where they do not say it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; in runs/ if absent.")
    ] = None,
    top: o.Top = None,
    format: o.Formatted = Format.auto,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Read other programs' scores of heads into a run, to show and compare.

    What was read has no controls, so nothing is claimed of its heads. Examples of attention that
    come along are kept in the run.
    """
    from app.headtable import head_table
    from app.interchange import FORMATS
    from interp.errors import InputError
    from interp.files import disk_errors

    form = FORMATS[source]
    if form.read is None:
        raise InputError(f"format {source!r} is written, not read")
    with disk_errors(path, "read"):
        path.stat()
    found = form.read(path, model)
    run = store(found, source, out, shlex.join(["headscope", *(context.obj or ())]))
    if not quiet:
        say(f"saved: {run.folder}")
    write(head_table(run.scores, run=run, top=top), format)


def store(found: "Found", source: str, out: Path | None, command: str) -> "Run":
    """Keep what was read as a complete run; the same data finds the same run.

    Args:
        found: what was read.
        source: name of its format.
        out: folder of the run; in `runs/` if None.
        command: the command line.

    Raises:
        RunError: the folder holds another run, or the disk is full.
    """
    from app.folders import folder_for
    from app.interchange.examples import VIEW
    from interp.run import COMPLETE, Run

    key: dict[str, Any] = {
        "what": "import", "format": source, "model": found.model, "sha256": found.digest,
    }  # fmt: skip
    names = [table.detector for table in found.tables[:3]]
    folder = out or folder_for([source, *names], found.model, key)
    about = {
        "command": command, "model": found.model, "view": VIEW, "batches": found.n_parts,
        "python": platform.python_version(), "imported": source, **found.about,
    }  # fmt: skip
    with Run.open_or_create(folder, key, about) as run:
        if run.status != COMPLETE:
            for i, (arrays, facts) in enumerate(found.parts()):
                if i not in run.finished:
                    run.put_part(i, arrays, facts)
            run.finish(list(found.tables))
    return run
