"""Tasks: seeded makers of prompts with spans and answers. One file each, registering itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import InputError, UnknownNameError
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.model import Model
    from interp.prompts import Prompt


class Task(ABC):
    """A maker of prompts; subclasses are frozen dataclasses whose fields are its parameters.

    Attributes:
        summary: one line for lists and help.
        spans: span names that every prompt of the task has, beside `all`.
        target: span of the tokens that a model should predict, for prompts without an answer.
    """

    summary: ClassVar[str]
    spans: ClassVar[tuple[str, ...]] = ()
    target: ClassVar[str] = "all"

    @abstractmethod
    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> "list[Prompt]":
        """The first `n` prompts of the task for a model; the same for the same seed."""


TASKS: Registry[type[Task]] = Registry("task", "interp.tasks")


def make_task(name: str, params: Mapping[str, Any] | None = None) -> Task:
    """A task from its name and parameters, which may be texts as given on a command line.

    Raises:
        UnknownNameError: no such task, or no such parameter.
        InputError: a value is not of the parameter's type.

    >>> make_task("repeated-tokens", {"length": "10"})
    RepeatedTokens(length=10, repeats=4, vary=False)
    """
    cls = TASKS[name]
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in (params or {}).items():
        if key not in known:
            raise UnknownNameError(f"parameter of task {name!r}", key, known)
        default = known[key].default
        values[key] = (
            read_like(default, value, f"{name}:{key}") if isinstance(value, str) else value
        )
    return cls(**values)


def read_like(default: Any, text: str, where: str) -> Any:
    """Read a text as the type of a default: numbers, yes/no, comma-separated tuples, text."""
    if isinstance(default, str):
        return text
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        if isinstance(default, tuple):
            item = type(default[0]) if default else str
            return tuple(item(x) for x in text.split(","))
        return type(default)(text)
    except (ValueError, KeyError):
        kind = type(default).__name__
        raise InputError(f"{where} must be a {kind} such as {default}; got {text!r}") from None


__all__ = ["TASKS", "Task", "make_task", "read_like"]
