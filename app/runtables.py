"""The tables of scores of a saved run, or of one file of scores."""

from pathlib import Path
from typing import TYPE_CHECKING

from app.exits import UsageError
from interp.errors import RunError, UnknownNameError

if TYPE_CHECKING:
    from interp.run import Run
    from interp.scores import HeadScores


def tables_of(place: Path) -> "tuple[dict[str, HeadScores], Run | None]":
    """The tables of a run, or of one file of scores.

    Raises:
        RunError: there is none, it is damaged, or it is not complete.
    """
    from app.folders import find
    from interp.run import Run
    from interp.scores import HeadScores

    path = find(place)
    if path.is_file():
        if _is_recipe(path):
            raise UsageError(
                f"a run, or a file of scores, is needed; {path} is a recipe",
                hint=f"headscope steer show {path}",
            )
        table = HeadScores.load(path)
        return {table.detector: table}, None
    run = Run.load(path)
    if run.status != "complete":
        total = run.info.get("batches", "?")
        raise RunError(
            f"a run must be complete to be shown; {path} is {run.status}, with "
            f"{len(run.finished)} of {total} batches",
            hint=f"go on with: {run.info.get('command', 'the command that began it')}",
        )
    return run.scores, run


def _is_recipe(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return "headscope.recipe" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def table_named(scores: "dict[str, HeadScores]", detector: str) -> "HeadScores":
    """One of the tables of a run.

    Raises:
        UnknownNameError: the run has no such table.
    """
    if detector not in scores:
        raise UnknownNameError("table of scores in this run", detector, scores)
    return scores[detector]
