"""Answers kept as runs: the same command again is read from its run, nothing is computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.exits import say

if TYPE_CHECKING:
    from app.sights import Sights
    from interp.model import Model
    from interp.prompts import Prompt
    from interp.scores import HeadScores


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        tables: scores by name.
        facts: everything else, as JSON holds it.
        folder: the run it is kept in, if any.
        old: whether it was read from the run.
    """

    tables: "Mapping[str, HeadScores]"
    facts: Mapping[str, Any]
    folder: Path | None = None
    old: bool = False


@dataclass(frozen=True)
class Keeping:
    """How the answer of a command is kept.

    Attributes:
        save: whether it is kept at all.
        out: folder of the run, or None for one in `runs/`.
        names: words for the folder's name: the command and its method.
        model: name of the model, for the folder's name.
        command: the command line.
        quiet: say nothing.
        view: how the answer is written, in this command and by `show`; see `app.views`.
    """

    save: bool
    out: Path | None
    names: Sequence[str]
    model: str
    command: str
    quiet: bool
    view: str


def kept(
    keeping: Keeping,
    key: Mapping[str, Any],
    compute: Callable[[], Answer],
    sights: "Sights | None" = None,
    **about: Any,
) -> Answer:
    """The answer of a run of this key, or a new one, kept.

    Args:
        keeping: where and whether.
        key: all that the answer depends on.
        compute: makes the answer.
        sights: what is kept of prompts with images, for overlays.
        about: further facts for `run.json`.
    """
    from interp.files import jsonable

    def fresh() -> Answer:
        try:
            made = compute()
        except KeyboardInterrupt:
            say("interrupted; nothing was kept")
            raise
        # As it will be read back, so that old and new answers look alike.
        return Answer(made.tables, jsonable(made.facts))

    if not keeping.save:
        return fresh()
    import platform

    from app.folders import folder_for
    from app.reporter import opening
    from interp.run import COMPLETE, Run

    folder = keeping.out or folder_for(keeping.names, keeping.model, key)
    opening(folder)
    info = {
        "command": keeping.command, "model": keeping.model, "view": keeping.view, "batches": 1,
        "python": platform.python_version(), **about,
    }  # fmt: skip
    with Run.open_or_create(folder, key, info) as run:
        if run.status == COMPLETE:
            answer = Answer(run.scores, run.part(0).meta, run.folder, old=True)
            news = f"answered from the saved run {run.folder}; nothing was computed"
        else:
            made = fresh()
            if 0 not in run.finished:
                run.put_part(0, {}, made.facts)
            run.finish(list(made.tables.values()))
            answer = Answer(made.tables, made.facts, run.folder)
            news = f"saved: {run.folder}"
        if sights is not None:
            sights.keep(run, answer.tables)
    if not keeping.quiet:
        say(news)
    return answer


def key_of(model: "Model", what: str, **rest: Any) -> dict[str, Any]:
    """What any answer depends on: the model and this version; and the rest."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        mine = version("headscope")
    except PackageNotFoundError:
        mine = "not installed"
    return {
        "what": what,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype),
        "attention": str(getattr(model.text_config, "_attn_implementation", None)),
        "headscope": mine,
        **rest,
    }


def digest(prompts: "Sequence[Prompt]") -> str:
    """Hash of what prompts hold, images included."""
    import hashlib
    import json

    import torch

    content = [
        [p.id, p.tokens, sorted(p.spans.items()), p.answer, str(p.meta.get("wrong"))]
        for p in prompts
    ]
    found = hashlib.sha256(json.dumps(content).encode())
    for prompt in prompts:
        for name, x in sorted(prompt.inputs.items()):
            found.update(f"{prompt.id}/{name}/{x.dtype}/{tuple(x.shape)}".encode())
            found.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
