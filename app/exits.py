"""How a command ends: exit codes, and the one or two lines on stderr that say why.

    0    done
    1    done, and the answer is no (`doctor` found a fault)
    2    usage: an unknown option, name or value
    65   bad input: a prompt, a prompt file, a run that cannot be read
    66   no such file or folder
    69   unavailable: model, device, memory or disk
    70   a bug of ours
    130  Ctrl-C
    141  the reader of the pipe went away

A user meets one line and a hint; `--debug` adds the trace.
"""

import sys
import traceback

from interp.errors import (
    InputError,
    InterpError,
    ModelError,
    PromptFileError,
    RunError,
    UnknownNameError,
)

OK, FAILED, USAGE, DATA, MISSING = 0, 1, 2, 65, 66
UNAVAILABLE, INTERNAL, INTERRUPTED, PIPE = 69, 70, 130, 141


class UsageError(InterpError):
    """The command line does not say what it must."""


# The first class that fits decides.
_CODES: tuple[tuple[type[InterpError], int], ...] = (
    (UsageError, USAGE),
    (UnknownNameError, USAGE),
    (ModelError, UNAVAILABLE),
    (InputError, DATA),
    (RunError, DATA),
)


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return PIPE
    if _memory(error):
        return UNAVAILABLE
    if isinstance(error, PromptFileError | RunError) and isinstance(error.__cause__, OSError):
        return MISSING if isinstance(error.__cause__, FileNotFoundError) else UNAVAILABLE
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL)


def explain(error: BaseException, *, debug: bool = False) -> None:
    """Say on stderr what happened and what to do, in a line each."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, InterpError):
        text, hint = _told(error)
        say(text, label="error", hint=hint)
    elif _memory(error):
        hint = "lower --batch-size, choose shorter prompts, or --dtype bfloat16"
        say("the model and its input do not fit into memory", label="error", hint=hint)
    else:
        hint = "this is a bug of headscope: run again with --debug and report the trace"
        say(f"{type(error).__name__}: {error}", label="internal error", hint=hint)


def usage(error: InterpError) -> UsageError:
    """A mistake in a value of the command line, as such."""
    text, hint = _told(error)
    return UsageError(text, hint=hint)


def _told(error: InterpError) -> tuple[str, str | None]:
    if isinstance(error, UsageError | UnknownNameError):
        return str(error), error.hint
    from app.words import said, spoken

    return said(str(error)), spoken(error.hint)


def say(text: str, *, label: str = "", hint: str | None = None) -> None:
    """Print one line for people on stderr, and the hint on a line of its own."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr, highlight=False)
    line = Text(" ".join(text.split()))
    if label:
        line = Text.assemble((f"{label}: ", "bold red"), line)
    console.print(line, soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), " ".join(hint.split())), soft_wrap=True)


def _memory(error: BaseException) -> bool:
    # By name: torch is not imported to explain a mistyped option.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
