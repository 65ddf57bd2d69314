"""Other programs' data on attention heads, read and written. One file a format, registering itself.

What is read becomes tables of scores in a run, so that `show`, `compare` and the pages work on it.
Files from elsewhere are not trusted: their sizes are bounded, nothing in them is followed as a
path, and what does not fit is refused in one line.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.registry import Registry

if TYPE_CHECKING:
    import numpy as np

    from interp.run import Run
    from interp.scores import HeadScores

__all__ = ["FORMATS", "Found", "Interchange", "Written"]


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        tables: one table of scores a metric.
        model: name of the model they are of.
        digest: hash of everything that was read.
        about: facts for `run.json`.
        n_parts: number of parts.
        parts: yields what belongs to the run beside its tables, as arrays and facts, one at a
            time: a tree of examples may be larger than the memory.
    """

    tables: "tuple[HeadScores, ...]"
    model: str
    digest: str
    about: Mapping[str, Any] = field(default_factory=dict)
    n_parts: int = 0
    parts: "Callable[[], Iterator[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]]" = lambda: (
        iter(())
    )


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        counts: what it holds: heads, metrics, sequences, ….
        left_out: what the format has no place for, a line each.
    """

    counts: Mapping[str, int]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interchange:
    """One format.

    Attributes:
        summary: one line for lists and help.
        read: reads a file or folder as a model's, whose name is None if it was not given; None if
            the format is not read. Raises InputError for what does not fit and RunError for what
            cannot be read.
        write: writes a run into a folder, of one tower or the run's first; None if the format is
            not written.
    """

    summary: str
    read: Callable[[Path, str | None], Found] | None = None
    write: "Callable[[Run, Path, str | None], Written] | None" = None


FORMATS: Registry[Interchange] = Registry("exchange format", "app.interchange")
