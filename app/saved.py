"""`headscope show` and `headscope compare`: runs that are there, read without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import options as o
from app.exits import UsageError, say
from app.runtables import table_named, tables_of
from app.tables import Format, Part, Table, write

if TYPE_CHECKING:
    from interp.run import Run
    from interp.scores import HeadScores

Detector = Annotated[
    str | None, typer.Option("--detector", "-d", help="Only this detector; all if absent.")
]


def show(
    run: o.Folder,
    detector: Detector = None,
    top: o.Top = None,
    format: o.Formatted = Format.auto,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw where heads look on an image into this file, such as out.png."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="A head, such as L9H6."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --overlay, id of the prompt; the first if absent.")
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Show a saved run, as the command wrote it that made it.

    With --detector one of its tables of scores. With --overlay the image of a prompt under the
    attention of its best heads, written to a file; the table then has a row for each head drawn.
    """
    from app.headtable import head_table
    from app.views import show_run

    if overlay is None and (head or prompt):
        raise UsageError(f"{'--head' if head else '--prompt'} goes with --overlay; got none")
    if overlay is not None:
        from app.drawing import check_suffix

        check_suffix(overlay)
    scores, opened = tables_of(run)
    if overlay is not None:
        _draw(opened, run, overlay, detector, prompt, head or (), top, format)
        return
    if detector is not None:
        scores = {detector: table_named(scores, detector)}
    elif opened is not None and show_run(opened, format=format, top=top):
        return
    write(head_table(scores, run=opened, top=top), format)


def _draw(
    run: "Run | None", place: Path, path: Path, detector: str | None, prompt: str | None,
    heads: Sequence[str], top: int | None, format: Format,
) -> None:  # fmt: skip
    from app.drawing import draw, save
    from app.overlay import COLUMNS, sight_of

    if run is None:
        raise UsageError(f"--overlay needs a run; {place} is a file of scores")
    sight = sight_of(run, prompt=prompt, heads=heads, detector=detector, top=top)
    save(draw(sight), path)
    part = Part(f"overlay of {sight.id}", [sight.row(head) for head in sight.rows])
    about = {"run": str(run.folder), "overlay": str(path)}
    write(Table("headscope.overlay", COLUMNS, [part], about, frozenset({"prompt"})), format)
    say(f"drawn: {path}")


def compare(
    base: o.Folder,
    other: o.Folder,
    detector: Detector = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Size of the top sets; a tenth of the heads if absent."),
    ] = None,
    format: o.Formatted = Format.auto,
    debug: o.Debug = False,
) -> None:
    """Compare two runs, chance corrected.

    Rank correlation of the scores, and overlap of the top heads beyond chance. Tables of the same
    detector are compared; two files of scores, or two runs of one detector each, are compared
    whatever their detectors are.
    """
    mine, theirs = tables_of(base)[0], tables_of(other)[0]
    pairs = [(mine[name], theirs[name]) for name in mine if name in theirs]
    if detector is not None:
        pairs = [(table_named(mine, detector), table_named(theirs, detector))]
    elif not pairs and len(mine) == len(theirs) == 1:
        pairs = list(zip(mine.values(), theirs.values(), strict=True))
    if not pairs:
        raise UsageError(
            f"runs to compare must share a detector; they have {', '.join(mine)} and "
            f"{', '.join(theirs)}",
            hint="name two files of scores: RUN/scores/DETECTOR.safetensors",
        )
    parts, rows = [], []
    for a, b in pairs:
        found = a.compare(b, k=top)
        rows.append(_summary(found))
        parts.append(_differences(found, a, b))
    columns = ("base", "other", "heads", "spearman", "k", "shared", "expected", "p", "corrected")
    title = "agreement; corrected is 0 at chance and 1 for equal top sets"
    about = {"differences": {part.title: list(part.rows) for part in parts}}
    write(Table("headscope.compare", columns, [Part(title, rows)], about, limit=None), format)


def _summary(found: Any) -> dict[str, Any]:
    o = found.overlap
    return {
        "base": found.base,
        "other": found.other,
        "heads": len(found.heads),
        "spearman": found.spearman,
        "k": found.k,
        "shared": o.shared,
        "expected": o.expected,
        "p": o.p,
        "corrected": o.corrected,
    }


def _differences(found: Any, base: "HeadScores", other: "HeadScores") -> Part:
    """Heads in their order, with the score in each table and the difference."""
    place = {head: i for i, head in enumerate(other.heads)}
    rows = [
        {
            "head": str(head),
            "base": float(base.values[i]),
            "other": float(other.values[place[head]]),
            "difference": float(found.differences[i]),
        }
        for i, head in enumerate(found.heads)
    ]
    return Part(f"{found.base} / {found.other}", rows)
