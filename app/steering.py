"""A recipe as a command line means it: a file, or an op with heads, strength and positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.exits import UsageError
from app.headset import HeadSet, parse
from app.subject import usage
from interp.errors import InputError, RunError, UnknownNameError

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe import Positions, Recipe

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file; or give --op.")
]
Op = Annotated[str | None, typer.Option(help="Operation: zero, scale, temperature, knockout, …")]
Strength = Annotated[
    float | None, typer.Option("--strength", "-s", help="Of --op; or a factor on a RECIPE.")
]
Site = Annotated[str, typer.Option(help="Site of --op: z, q, k, v, resid, …; its first if absent.")]
At = Annotated[
    str,
    typer.Option(help="Where: all, prompt, generated, last, span:NAME, 3:9; several with commas."),
]
Keys = Annotated[str, typer.Option(help="Keys of an op on attention, in the same words as --at.")]


@dataclass(frozen=True)
class Wanted:
    """A recipe as asked for; made once the model is there.

    Attributes:
        file: a recipe, or None.
        op: name of the op, where there is no file.
        heads: heads of the op.
        strength: of the op, or a factor on the file's strengths; None leaves both as they are.
        site: site of the op, or its own.
        at: positions.
        keys: positions of keys.
    """

    file: "Recipe | None"
    op: str
    heads: HeadSet | None
    strength: float | None
    site: str
    at: str
    keys: str
    name: str

    def recipe(self, model: "Model", strength: float | None = None) -> "Recipe":
        """The recipe for a model.

        Args:
            model: the model.
            strength: another strength, or another factor.

        Raises:
            UsageError: the op cannot be made from a command line, or does not fit the heads.
        """
        s = self.strength if strength is None else strength
        if self.file is not None:
            return self.file if s is None else self.file * s
        from interp.recipe import Edit, Recipe
        from interp.recipe.ops import OPS

        op = OPS[self.op]
        if op.tensors and not op.optional:
            raise UsageError(
                f"op {self.op!r} needs tensors ({', '.join(op.tensors)}), which no option holds",
                hint="headscope steer fit makes recipes with vectors; or save one from Python",
            )
        try:
            where = self._where(model, self.site or op.sites[0])
            return Recipe((Edit(self.op, where, strength=s, site=self.site),))
        except InputError as error:
            raise usage(error) from error

    def _where(self, model: "Model", site: str) -> Any:
        from interp.recipe import Where
        from interp.recipe.ops import ATTENTION_SITES, LAYER_SITES

        at, keys = positions(self.at), positions(self.keys)
        assert self.heads is not None
        if site in LAYER_SITES:
            layers = None if site == "logits" or self.heads.text == "all" else self.heads.layers()
            return Where(layers=layers, queries=at, keys=keys)
        chosen = tuple(self.heads.of(model, kv=site in ("k", "v")))
        if site in ("k", "v"):
            return Where(heads=chosen, keys=at)
        if site in ATTENTION_SITES:
            return Where(heads=chosen, queries=at, keys=keys)
        return Where(heads=chosen, queries=at, keys=keys)

    def about(self) -> dict[str, Any]:
        """What a run's key holds of it."""
        return {
            "recipe": None if self.file is None else self.file.hash, "op": self.op,
            "heads": "" if self.heads is None else self.heads.text, "strength": self.strength,
            "site": self.site, "at": self.at, "keys": self.keys,
        }  # fmt: skip


def wanted(
    recipe: Path | None,
    *,
    op: str | None,
    heads: Sequence[str] | None,
    strength: float | None,
    site: str,
    at: str,
    keys: str,
) -> Wanted:
    """Check what a command line says of a recipe, before a model is loaded.

    Raises:
        UsageError: both or neither of recipe and op, or options that do not go together.
        UnknownNameError: no such op.
        RunError: the recipe cannot be read.
    """
    if (recipe is None) == (op is None):
        came = "neither" if recipe is None else "both"
        raise UsageError(
            f"a RECIPE file or --op must be given; got {came}",
            hint="such as --op zero --heads claimed@RUN",
        )
    positions(at), positions(keys)
    if recipe is not None:
        for name, value in {"--heads": heads, "--site": site}.items():
            if value:
                raise UsageError(f"{name} goes with --op; a recipe says it itself")
        return Wanted(load_recipe(recipe), "", None, strength, "", at, keys, recipe.stem)
    from interp.recipe.ops import OPS, SITES

    assert op is not None
    OPS[op]
    if site and site not in SITES:
        raise UnknownNameError("site", site, SITES)
    if not heads:
        raise UsageError("--op needs --heads; got none", hint="--heads all for every head")
    return Wanted(None, op, parse(heads), strength, site, at, keys, op)


def load_recipe(path: Path) -> "Recipe":
    """A recipe from its file.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    from interp.recipe import Recipe

    if not path.is_file():
        raise RunError(f"there is no recipe {path}", hint="headscope steer fit makes one") from (
            FileNotFoundError(str(path))
        )
    return Recipe.load(path)


def positions(text: str) -> "Positions":
    """Positions from words: `all`, `prompt`, `generated`, `last`, `span:NAME`, `3:9`.

    Raises:
        UsageError: another word.
    """
    from interp.recipe import Positions

    values: dict[str, Any] = {}
    for word in text.split(","):
        start, colon, stop = word.strip().partition(":")
        if start in _WORDS and not colon:
            values |= _WORDS[start]
        elif start == "span" and stop:
            values["spans"] = (*values.get("spans", ()), stop)
        elif start.isdigit() and stop.isdigit():
            values["window"] = (int(start), int(stop))
        else:
            raise UsageError(f"positions are {', '.join(_WORDS)}, span:NAME or 3:9; got {word!r}")
    try:
        return Positions(**values)
    except InputError as error:
        raise usage(error) from error


_WORDS: Mapping[str, Mapping[str, Any]] = {
    "all": {"prompt": "all", "generated": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generated": "all"},
    # Where the next token is decided: the end of the prompt, and what is produced.
    "last": {"prompt": (-1,), "generated": "all"},
}


def for_any(recipe: "Recipe", *, force: bool) -> "Recipe":
    """The recipe, bound to no model if it is forced."""
    return replace(recipe, fingerprint=None) if force else recipe
