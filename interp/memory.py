"""What is done when memory runs out: the work is halved and tried again, and that is said."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from interp.errors import SmallerBatchWarning, TooLargeError

Item = TypeVar("Item")
Made = TypeVar("Made")


@contextmanager
def fitting(what: str, hint: str) -> Iterator[None]:
    """Turn the many errors that devices raise for want of memory into one.

    Args:
        what: what may not fit, such as `8 patched runs of 4 prompts`.
        hint: what to do then.

    Raises:
        TooLargeError: memory ran out within.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_short(error):
            raise
        raise TooLargeError(f"{what} do not fit into memory", hint=hint) from error


def _is_short(error: BaseException) -> bool:
    text = str(error).lower()  # the allocator of a CPU raises a plain RuntimeError
    words = ("out of memory" in text) or ("allocate memory" in text)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or words


def halving(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Made], *, what: str
) -> Iterator[tuple[Sequence[Item], Made]]:
    """Work on all items at once, or on halves of them while they do not fit into memory.

    Args:
        items: what is worked on, at least one.
        work: does some of them; run again on fewer if it raises for want of memory.
        what: what the items are, for the warning, such as `prompts`.

    Yields:
        Items and what came of them, in order.

    Raises:
        TooLargeError: a single item does not fit; `work` says so itself, see `fitting`.
    """
    made: list[Made] = []
    try:
        made.append(work(items))
    except TooLargeError:
        if len(items) == 1:
            raise
    # Out of the handler, so that the tensors of the failed run are gone before the next begins.
    if made:
        yield items, made.pop()
        return
    half = (len(items) + 1) // 2
    warnings.warn(
        f"{len(items)} {what} at once do not fit into memory; going on with {half}",
        SmallerBatchWarning,
        stacklevel=2,
    )
    yield from halving(items[:half], work, what=what)
    yield from halving(items[half:], work, what=what)
