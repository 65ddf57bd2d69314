"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from app.tables import Format
from interp.loading import DTYPES


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}; got {value!r}")
    return value


Model = Annotated[
    str, typer.Option("--model", "-m", help="A folder, a hub name, or zoo:NAME (list zoo).")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(callback=_dtype, help=f"One of {', '.join(DTYPES)}.")]
Attn = Annotated[
    str | None, typer.Option(help="Attention implementation to load with; the model's if absent.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never look at the hub.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the weights.")
]
Formatted = Annotated[
    Format,
    typer.Option("--format", "-f", help="auto is a table on a terminal and TSV in a pipe."),
]
Top = Annotated[int | None, typer.Option(min=1, help="Only the strongest N of each table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name in runs/.")]
DEFAULT_MODEL = "zoo:needle"
