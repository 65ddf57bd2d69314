"""Patching methods: each a frozen dataclass in a file of its own that registers itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import InputError, UnknownNameError
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.scores import HeadScores
    from patching.pairs import Pairs


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; the fields of a subclass are its parameters.

    Attributes:
        name: registry name.
        summary: one line.
        citation: paper and section.
        exact: whether its effects are measured, not estimated.
        choices: parameter to the words that it may be.
        least: parameter to the smallest number that it may be.

    Raises:
        InputError: a parameter is none of its choices, or below its least.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    exact: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, Iterable[str]]] = {}
    least: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        for name, known in self.choices.items():
            if (value := getattr(self, name)) not in (words := tuple(known)):
                raise InputError(f"{name} must be one of {', '.join(words)}; got {value!r}")
        for name, least in self.least.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name} must be at least {least}; got {value}")

    @abstractmethod
    def scores(
        self, pairs: "Pairs", *, progress: "Callable[[int, int], None] | None" = None
    ) -> "HeadScores":
        """Effects of every head of the pairs' tower."""


METHODS: Registry[type[Method]] = Registry("patching method", "patching")


def make_method(name: str, params: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and parameters, which may be texts from a command line.

    Raises:
        UnknownNameError: no such method, or no such parameter.
        InputError: a value is not of the parameter's type, or the method refuses it.
    """
    from interp.tasks import read_like

    cls = METHODS[name]
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in (params or {}).items():
        if key not in known:
            raise UnknownNameError(f"parameter of method {name!r}", key, known)
        if isinstance(value, str):
            value = read_like(known[key].default, value, f"{name}:{key}")
        values[key] = value
    return cls(**values)
