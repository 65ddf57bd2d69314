"""Which command lines may run as jobs: read by the command's own parser, then looked at."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.dashboard.joblog import Log, logged
from app.exits import UsageError

COMMANDS = ("rank", "verdict", "ablate", "patch", "attribute", "probe", "capture", "doctor")
STEER = ("run", "fit", "sweep")
_REFUSED = {"debug": "--debug", "trust_remote_code": "--trust-remote-code"}


def check_line(argv: Sequence[str], root: Path) -> None:
    """Refuse a command line that cannot run as a job.

    Args:
        argv: the arguments after the program's name.
        root: the folder of all runs; nothing is written elsewhere.

    Raises:
        UsageError: another command, an option that a page must not set, or a mistake in the
            arguments; nothing heavy is imported to find it.
    """
    argv = list(argv)
    if any("\0" in arg for arg in argv):
        raise UsageError("the arguments of a job must be text without NUL")
    name = " ".join(argv[:2]) if argv[:1] == ["steer"] else "".join(argv[:1])
    known = (*COMMANDS, *(f"steer {x}" for x in STEER))
    if name not in known:
        raise UsageError(f"a job must be one of {', '.join(known)}; got {name or 'nothing'!r}")
    values = _parsed(argv)
    for key, option in _REFUSED.items():
        if values.get(key):
            raise UsageError(
                f"{option} is not for jobs", hint="run the command in a terminal instead"
            )
    if any(path == Path("-") for path in _paths(values)):
        raise UsageError("a job reads files; got -, which is the standard input of a command")
    out = values.get("out")
    if out is not None:
        _check_out(Path(out), root, recipe=name == "steer fit")


def _check_out(out: Path, root: Path, *, recipe: bool) -> None:
    base, place = root.resolve(), out.resolve()
    if base not in place.parents:
        raise UsageError(f"--out of a job must lie in {root}; got {out}")
    inside = [p for p in place.parents if base in p.parents]
    if recipe and any((p / "run.json").exists() for p in inside):
        raise UsageError(f"--out of a recipe must not lie in the folder of a run; got {out}")


def _parsed(argv: Sequence[str]) -> Mapping[str, Any]:
    """The values of a command's parameters, as the command itself will read them."""
    import typer

    from app.commands import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("headscope", [], resilient_parsing=True)
    rest = list(argv)
    # Options such as --help print and leave: nothing of that may reach the server's streams.
    with logged(Log()):
        try:
            while hasattr(command, "resolve_command"):
                name, command, rest = command.resolve_command(context, rest)
                options = {"resilient_parsing": True} if hasattr(command, "commands") else {}
                given = [] if options else rest
                context = command.make_context(name, list(given), parent=context, **options)
        except typer.Exit as error:
            raise UsageError("a job must run a command; got a question about it") from error
        except Exception as error:
            said = getattr(error, "format_message", None)
            if said is None:
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", "headscope")
            raise UsageError(said(), hint=f"{path} --help") from error
    found: Mapping[str, Any] = context.params
    return found


def _paths(values: Mapping[str, Any]) -> Iterator[Path]:
    for value in values.values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path):
                yield one
