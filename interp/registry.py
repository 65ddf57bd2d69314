"""Registries that fill themselves from the files of a package.

An entry is registered in exactly one place, its own file. The first look-up imports every module
of the package, so there is no list to maintain; a name registered twice is refused.
"""

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from interp.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries, filled on first look-up from the modules of `package`.

    Args:
        kind: the word for one entry in error texts, such as "detector".
        package: dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = self._loading = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`; the object is returned unchanged."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def _load(self) -> None:
        if self._loaded:
            return
        # Another thread waits until every entry is there; a module that looks up while it is being
        # imported sees those before it.
        with self._lock:
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.ispkg:
                        importlib.import_module(f"{self.package}.{module.name}")
                self._loaded = True
            finally:
                self._loading = False

    def __getitem__(self, name: str) -> T:
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __len__(self) -> int:
        self._load()
        return len(self._entries)
