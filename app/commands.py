"""The commands of `headscope`, all but the page, which runs them.

Data goes to stdout and nothing else does; progress, hints and errors go to stderr. Each command is
a file of its own and imports what is heavy when it runs, so that help and mistakes are quick.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.ablate import ablate
from app.capture import capture
from app.exits import INTERRUPTED, USAGE, code_of, explain, say
from app.exporting import export
from app.importing import import_
from app.lists import listing
from app.medic import doctor
from app.patch import attribute, patch
from app.probe import probe
from app.rank import rank
from app.saved import compare, show
from app.steer import run as steer_run
from app.steer import sweep as steer_sweep
from app.steer_files import bake as steer_bake
from app.steer_files import show as steer_show
from app.steer_fit import fit as steer_fit
from app.verdicts import verdict
from interp.errors import SmallerBatchWarning

app = typer.Typer(
    name="headscope",
    help="Find what each attention head of a transformer does.",
    no_args_is_help=True,
    # Plain help and one-line errors: the same on a terminal, in a pipe and in the docs.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("rank")(rank)
app.command("verdict")(verdict)
app.command("ablate")(ablate)
app.command("patch")(patch)
app.command("attribute")(attribute)
app.command("probe")(probe)
steer = typer.Typer(
    help="Change what heads do while the model answers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _name, _command in (
    ("run", steer_run), ("fit", steer_fit), ("sweep", steer_sweep), ("bake", steer_bake),
    ("show", steer_show),
):  # fmt: skip
    steer.command(_name)(_command)
app.add_typer(steer, name="steer")
app.command("capture")(capture)
app.command("show")(show)
app.command("compare")(compare)
app.command("export")(export)
app.command("import")(import_)
app.command("list")(listing)
app.command("doctor")(doctor)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"headscope {version('headscope')}")
        except PackageNotFoundError:
            print(f"headscope {_of_checkout()}, run from a checkout that is not installed")
        raise typer.Exit


def _of_checkout() -> str:
    """The version that the project's own file says."""
    import tomllib

    file = Path(__file__).parents[1] / "pyproject.toml"
    try:
        return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, KeyError, ValueError):
        return "(unknown version)"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find what each attention head of a transformer does."""


def _warn(message: Warning | str, *rest: Any, **more: Any) -> None:
    say(str(message), label="note")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; see `app.exits`.

    Args:
        argv: the arguments after the program's name; those of the process if None.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                # Those of libraries: they are not for the people who run a command.
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=SmallerBatchWarning)
                warnings.showwarning = _warn
                os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            result = app(args=args, prog_name="headscope", standalone_mode=False, obj=args)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else USAGE
    except Exception as error:  # noqa: BLE001 - the outermost place: every error gets its line
        said = getattr(error, "format_message", None)
        if said is not None:  # typer's own, of whichever version: a mistake in the arguments
            command = getattr(getattr(error, "ctx", None), "command_path", "headscope")
            if type(error).__name__ == "NoArgsIsHelpError":  # of a group: help, on several lines
                print(said())
            elif said():
                say(said(), label="error", hint=f"{command} --help")
            return USAGE
        explain(error, debug=debug)
        return code_of(error)
