"""The errors a user can meet.

    InterpError
      ModelError         UnsupportedModelError, SiteError, DoctorError, DeviceError
      InputError         HeadIdError, SpanError, PairError, PromptFileError   (also ValueError)
      UnknownNameError   (also LookupError)
      RunError           a run folder that cannot be read or written

Each message says what must hold and what came; `hint` says what to do. Anything that is not an
`InterpError` is our bug and shows its trace.
"""

import difflib
from collections.abc import Iterable


class InterpError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: what must hold and what came, in one line.
        hint: what to do, in one line; shown on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")


class ModelError(InterpError):
    """The model cannot be used as asked."""


class UnsupportedModelError(ModelError):
    """The model's attention cannot be reached by any backend."""


class SiteError(ModelError):
    """A layer, or a site of it, is not available on this model."""


class DoctorError(ModelError):
    """An identity that readings rest on does not hold on this model."""


class DeviceError(ModelError):
    """The device is missing or too small."""


class TooLargeError(DeviceError):
    """The work does not fit into the memory of the device."""


class InputError(InterpError, ValueError):
    """A prompt, file or argument is not what it must be."""


class HeadIdError(InputError):
    """A head id cannot be read, or names a head that the model does not have."""


class SpanError(InputError):
    """A prompt lacks a span, or a span lies outside its prompt."""


class PairError(InputError):
    """Two prompts do not form a pair."""


class PromptFileError(InputError):
    """A prompt file cannot be read; the message names the line."""


class UnknownNameError(InterpError, LookupError):
    """A name that no registry entry has; the hint names the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"there is no {kind} named {name!r}", hint=hint)
        self.kind, self.name, self.known = kind, name, names


class RunError(InterpError):
    """A run folder is missing, corrupt, of a newer schema, or cannot be written."""


class SmallerBatchWarning(UserWarning):
    """A batch did not fit into memory and was halved; results are the same, the run is slower."""
