"""Options that the commands which act on heads share."""

from pathlib import Path
from typing import Annotated

import typer

Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--heads",
        "-H",
        help="L9H6, a layer L3, all, top:20@RUN, claimed@RUN or a file; several with commas.",
    ),
]
Task = Annotated[str | None, typer.Option("--task", "-t", help="Task; see list tasks.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", "-p", allow_dash=True, help="Own prompts: text or JSONL file, - is stdin."
    ),
]
PairTask = Annotated[
    str | None, typer.Option("--task", "-t", help="A task of pairs; ioi without --prompts.")
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        "--prompts", "-p", allow_dash=True,
        help='JSONL, {"clean": ..., "corrupted": ..., "answer": ..., "wrong": ...} a line; - is '
        "stdin.",
    ),
]  # fmt: skip
PromptsOrPairs = Annotated[
    Path | None,
    typer.Option(
        "--prompts", "-p", allow_dash=True,
        help="Own prompts: text or JSONL, or pairs as patch reads them; - is stdin.",
    ),
]  # fmt: skip
Labelled = Annotated[
    Path,
    typer.Option(
        "--prompts", "-p", allow_dash=True,
        help='JSONL, {"text": ..., "label": ..., "group": ...} a line; - is stdin.',
    ),
]  # fmt: skip
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="An image for --prompt; several for several placeholders."),
]
Texts = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt as text; may be given often.")
]
Corrupted = Annotated[
    list[Path] | None,
    typer.Option("--corrupted-image", help="The image of the corrupted prompt of that pair."),
]
Answer = Annotated[
    str | None, typer.Option(help="What follows --prompt, with the space it begins with.")
]
Wrong = Annotated[str | None, typer.Option(help="What the answer of a pair is compared with.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run; in runs/ if absent.")
]
Save = Annotated[bool, typer.Option(help="Keep a run; the same command is answered from it.")]
N = Annotated[int, typer.Option(min=1, help="Prompts of a task.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]
Seed = Annotated[int, typer.Option(help="Seed of tasks and controls.")]
Tower = Annotated[str | None, typer.Option(help="Tower to act on; the model's first if absent.")]
Metric = Annotated[str, typer.Option(help="logit-difference, logit, log-prob, prob, accuracy, …")]
Controls = Annotated[int, typer.Option(min=0, help="Draws of random heads of the same layers.")]
Param = Annotated[list[str] | None, typer.Option(help="NAME:KEY=VALUE; may be given often.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")]
Force = Annotated[
    bool, typer.Option("--force", help="Use a recipe on a model it was not made for.")
]
