"""How `headscope show` writes a run: as the command did that made it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from app.ablate import write_sets
from app.effects import write_effects
from app.keep import Answer
from app.positionwork import write_positions
from app.steered import write_steered, write_sweep
from app.tables import Format
from app.verdicts import write_verdict
from app.windows import write_cut

if TYPE_CHECKING:
    from interp.run import Run


def show_run(run: "Run", *, format: Format, top: int | None) -> bool:
    """Write a complete run as its command did; returns False for runs that are tables of scores."""
    if run.info.get("view") == "capture":
        from app.capture import capture_table
        from app.tables import write as put
        from interp.traces.trace import traces_of

        put(
            capture_table(list(traces_of(run.folder).values()), str(run.info["model"]), run), format
        )
        return True
    write = _VIEWS.get(str(run.info.get("view")))
    if write is None or 0 not in run.finished:
        return False
    answer = Answer(run.scores, run.part(0).meta, run.folder, old=True)
    write(answer, str(run.info["model"]), format=format, top=top, quiet=False)
    return True


def _effects(
    answer: Answer, model: str, *, schema: str, format: Format, top: int | None, quiet: bool
) -> None:
    write_effects(answer, schema=schema, format=format, top=top, quiet=quiet)


_VIEWS: Mapping[str, Callable[..., None]] = {
    "verdict": write_verdict,
    "ablate": partial(_effects, schema="headscope.ablate"),
    "sets": write_sets,
    "positions": write_positions,
    "patch": partial(_effects, schema="headscope.patch"),
    "attribute": partial(_effects, schema="headscope.attribute"),
    "probe": partial(_effects, schema="headscope.probe"),
    "windows": write_cut,
    "steer": write_steered,
    "sweep": write_sweep,
}
