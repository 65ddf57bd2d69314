"""`--param NAME:KEY=VALUE`: parameters of detectors and tasks from the command line."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from app.catalog import check
from app.exits import UsageError, usage
from interp.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from heads.detector import Detector
    from interp.tasks import Task

Params = Mapping[str, Mapping[str, str]]
"""Detector or task to parameter to value."""


def read(texts: Sequence[str], detectors: Sequence[str], task: str | None) -> Params:
    """Sort parameters by what they belong to; nothing heavy is imported.

    Args:
        texts: as given, such as `induction:copies=0.1`.
        detectors: detectors of the command.
        task: task of the command, if one is named.

    Raises:
        UsageError: a text of another form, or a value given twice.
        UnknownNameError: a name that is not part of the command, or has no such parameter.
    """
    owners = {name: check("detector", name) for name in detectors}
    tasks = [task] if task else [entry.task for entry in owners.values()]
    owners |= {name: check("task", name) for name in tasks}
    params: dict[str, dict[str, str]] = {}
    for text in texts:
        where, equals, value = text.partition("=")
        owner, colon, key = where.partition(":")
        if not (equals and colon and owner and key):
            raise UsageError(
                f"--param must be NAME:KEY=VALUE; got {text!r}",
                hint="such as --param repeated-tokens:length=50",
            )
        if owner not in owners:
            raise UnknownNameError("detector or task of this command", owner, owners)
        known = owners[owner].params
        if key not in known:
            raise UnknownNameError(f"parameter of {owners[owner].kind} {owner!r}", key, known)
        if key in params.setdefault(owner, {}):
            raise UsageError(f"each parameter may be given once; {where} is given twice")
        params[owner][key] = value
    return params


def detectors_of(names: Sequence[str], params: Params) -> "list[Detector]":
    """The detectors with their parameters.

    Raises:
        UsageError: a value that does not fit its parameter.
    """
    from heads.detector import make_detector

    try:
        return [make_detector(name, params.get(name)) for name in names]
    except InputError as error:
        raise usage(error) from error


def task_of(name: str | None, made: "Sequence[Detector]", params: Params) -> "Task | None":
    """The task for all detectors; None leaves each its own.

    Parameters of a task that was not named change the detectors' own task, if it is the same.

    Raises:
        UsageError: a value that does not fit, or parameters for one of several tasks.
    """
    from interp.tasks import TASKS, make_task

    mine = {task: values for task, values in params.items() if task in TASKS}
    base: Mapping[str, object] = {}
    if name is None:
        if not mine:
            return None
        own = {(d.task, tuple(sorted(d.task_params.items()))) for d in made}
        if len(own) > 1:
            raise UsageError(
                f"parameters of task {min(mine)!r} need one task for all detectors; they have "
                f"{len(own)}",
                hint=f"name it with --task {min(mine)}",
            )
        [(name, items)] = own
        base = dict(items)
    try:
        return make_task(name, {**base, **mine.get(name, {})})
    except InputError as error:
        raise usage(error) from error
