"""Published interventions as recipe makers: one file each, registering itself.

A maker looks at prompts and gives a `Recipe` for them. What it found (sinks, heads, differences),
its parameters and its source are in the recipe's notes. Where the finding differs between prompts,
the recipe holds one strength per head and prompt: it is then for exactly these prompts, in this
order, in one batch (each for as many rows as there are beams), padded on either side.

    recipe = make_recipe("vhr", model, prompts, {"span": "image"})
    with recipe.on(model):
        model.hf.generate(...)

Temperature, inference-time intervention and function vectors are for any prompts; the last two are
fitted by `probes` on prompts given for that. Mean differences are in `probes` alone.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from interp.errors import InputError, UnknownNameError
from interp.prompts import Batch, Prompt
from interp.registry import Registry

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe import Recipe

Inputs = Batch | Sequence[Prompt]
"""What makers look at: prompts, or a batch with images."""

Made = TypeVar("Made", bound="Callable[..., Recipe]")


@dataclass(frozen=True)
class Maker:
    """An entry of the registry.

    Attributes:
        name: registry name.
        summary: one line.
        citation: paper.
        make: called as make(model, inputs, *, …), returns a recipe.
    """

    name: str
    summary: str
    citation: str
    make: "Callable[..., Recipe]"

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters and their defaults."""
        given = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}

    @property
    def looks(self) -> bool:
        """Whether it looks at prompts."""
        inputs = inspect.signature(self.make).parameters["inputs"]
        return inputs.default is inputs.empty


MAKERS: Registry[Maker] = Registry("recipe maker", "heads.makers")


def maker(name: str, *, summary: str, citation: str) -> Callable[[Made], Made]:
    """Decorator that enters a function as a maker; the function is returned unchanged."""

    def enter(make: Made) -> Made:
        MAKERS.register(name)(Maker(name, summary, citation, make))
        return make

    return enter


def make_recipe(
    name: str, model: "Model", inputs: Inputs, params: Mapping[str, Any] | None = None
) -> "Recipe":
    """A recipe by the name of its maker; parameters may be texts from a command line.

    Raises:
        UnknownNameError: no such maker, or no such parameter.
        InputError: a value is not of the parameter's type, a text stands for prompts or positions,
            or what the maker raises.
    """
    return MAKERS[name].make(model, inputs, **read_params(name, params or {}))


def read_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a maker, texts read as what they stand for.

    Raises:
        UnknownNameError: no such maker, or no such parameter.
        InputError: a value is not of the parameter's type, or a text stands for prompts or
            positions.
    """
    from interp.tasks import read_like

    entry = MAKERS[name]
    known = entry.params
    values = {}
    for key, value in params.items():
        if key not in known:
            raise UnknownNameError(f"parameter of recipe maker {name!r}", key, known)
        if isinstance(value, str):
            _check_text(entry, key, value)
            default = known[key]
            many = "," in value and "Sequence" in _annotation(entry, key)
            plain = isinstance(default, bool | int | float | str) and not many
            value = read_like(default, value, f"{name}:{key}") if plain else _listed(value)
        values[key] = value
    return values


def _check_text(entry: Maker, key: str, text: str) -> None:
    """Refuse a text for a parameter that no text can stand for."""
    annotation = _annotation(entry, key)
    for kind in ("Prompt", "Positions"):
        if kind in annotation:
            raise InputError(
                f"parameter {key!r} of {entry.name!r} takes values of {kind}; got {text!r}"
            )


def _annotation(entry: Maker, key: str) -> str:
    return str(inspect.signature(entry.make).parameters[key].annotation)


def _listed(text: str) -> Any:
    """A text without a default to be like: a number, or a list of numbers or of words."""
    parts = [part.strip() for part in text.split(",")]
    for kind in (int, float):
        try:
            numbers = tuple(kind(part) for part in parts)
        except ValueError:
            continue
        return numbers[0] if len(numbers) == 1 else numbers
    return tuple(parts)


__all__ = ["MAKERS", "Inputs", "Maker", "make_recipe", "maker", "read_params"]
