"""Taking a model in hand for a command: mistakes told before anything slow, libraries quiet."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from app.catalog import check
from app.exits import usage
from app.reporter import aside
from interp.errors import InputError, ModelError

if TYPE_CHECKING:
    from interp.model import Model

ZOO = "zoo:"


@dataclass(frozen=True)
class Source:
    """Which model, and how to load it; the options of `interp.load`."""

    name: str
    device: str = "auto"
    dtype: str = "auto"
    attn: str | None = None
    revision: str | None = None
    offline: bool = False
    trust: bool = False

    def check(self) -> None:
        """Refuse what can be refused without loading anything.

        Raises:
            UnknownNameError: no zoo model of that name.
        """
        if self.name.startswith(ZOO):
            check("zoo model", self.name.removeprefix(ZOO))

    def load(self, *, quiet: bool = False) -> "Model":
        """The model; the one in hand where `cached` holds it.

        Raises:
            ModelError: it cannot be loaded, or there is no such device.
            UsageError: an option that does not fit.
        """
        self.check()
        cache = _CACHE.get()
        load = partial(self._load, quiet=quiet)
        return load() if cache is None else cache.get(self, load)

    def _load(self, *, quiet: bool) -> "Model":
        with waiting(f"loading {self.name}", quiet=quiet):
            from interp.loading import load

            _hush()
            try:
                return load(
                    self.name,
                    device=self.device,
                    dtype=self.dtype,
                    attn=self.attn,
                    revision=self.revision,
                    trust_remote_code=self.trust,
                    offline=self.offline,
                )
            except InputError as error:
                raise usage(error) from error
            except ValueError as error:
                if self.attn is None:
                    raise
                raise ModelError(
                    f"{self.name} must run with --attn {self.attn}: {error}"
                ) from error


class Cache(Protocol):
    """Models that are held from one command to the next."""

    def get(self, source: Source, load: "Callable[[], Model]") -> "Model":
        """The model of a source; `load` makes it."""
        ...


_CACHE: ContextVar[Cache | None] = ContextVar("models", default=None)


@contextlib.contextmanager
def cached(cache: Cache) -> Iterator[None]:
    """Let the commands that this thread runs meanwhile take their models from a cache."""
    token = _CACHE.set(cache)
    try:
        yield
    finally:
        _CACHE.reset(token)


@contextlib.contextmanager
def waiting(text: str, *, quiet: bool) -> Iterator[None]:
    """Say on a terminal what is being waited for; whatever libraries print goes to stderr."""
    with aside():
        if quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.text import Text

        with Console(file=sys.stderr).status(Text(f"{text} …")):
            yield


def _hush() -> None:
    """Bars of weights being read are for people who watch."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
