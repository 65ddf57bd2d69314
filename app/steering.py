"""A recipe as a command line means it: a file, or an op with heads, strength and positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.catalog import check
from app.exits import UsageError, usage
from app.folders import base
from app.headset import HeadSet, parse
from interp.errors import InputError, RunError, UnknownNameError

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe import Positions, Recipe

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file or run; or give --op.")
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


RECIPE = "recipe.safetensors"
"""Name of the recipe in a run of `steer run`."""


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

        try:
            where = self._where(model, self.site or OPS[self.op].sites[0])
            return Recipe((Edit(self.op, where, strength=s, site=self.site),))
        except InputError as error:
            raise usage(error) from error

    def _where(self, model: "Model", site: str) -> Any:
        from interp.recipe import Where
        from interp.recipe.ops import LAYER_SITES

        at, keys = positions(self.at), positions(self.keys)
        assert self.heads is not None
        if site in LAYER_SITES:
            layers = None if site == "logits" or self.heads.text == "all" else self.heads.layers()
            return Where(layers=layers, queries=at, keys=keys)
        chosen = tuple(self.heads.of(model, kv=site in ("k", "v")))
        if site in ("k", "v"):
            return Where(heads=chosen, keys=at)
        return Where(heads=chosen, queries=at, keys=keys)

    def fitting(self, strengths: Sequence[float]) -> list[float]:
        """Those of some strengths that the op takes; a file takes any factor here."""
        if self.file is not None:
            return list(strengths)
        import torch

        from interp.recipe.ops import OPS

        return [x for x in strengths if not OPS[self.op].refuses(torch.tensor(x))]

    def about(self, made: "Recipe") -> dict[str, Any]:
        """What a run's key holds of it: the recipe as it was made, with its heads and positions."""
        return {"recipe": made.hash, "op": self.op}


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
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength must be a finite number; got {strength}")
    if recipe is not None:
        for name, value in {"--heads": heads, "--site": site}.items():
            if value:
                raise UsageError(f"{name} goes with --op; a recipe says it itself")
        return Wanted(load_recipe(recipe), "", None, strength, "", at, keys, recipe.stem)
    assert op is not None
    check("op", op)
    from interp.recipe.ops import OPS, SITES, AttentionOp

    known = OPS[op]
    if known.tensors:
        raise UsageError(
            f"op {op!r} needs tensors ({', '.join(known.tensors)}), which no option holds",
            hint="headscope steer fit makes recipes with vectors; or save one from Python",
        )
    if keys != "all" and not isinstance(known, AttentionOp):
        raise UsageError(f"--keys goes with ops on attention; positions of {op!r} are --at")
    if isinstance(known, AttentionOp) and known.keys == "needed" and keys == "all":
        raise UsageError(
            f"op {op!r} is about some of the keys; got all of them",
            hint="name them with --keys, such as --keys span:needle or --keys 0:1",
        )
    if site and site not in SITES:
        raise UnknownNameError("site", site, SITES)
    if not heads:
        raise UsageError("--op needs --heads; got none", hint="--heads all for every head")
    return Wanted(None, op, parse(heads), strength, site, at, keys, op)


def load_recipe(path: Path) -> "Recipe":
    """A recipe from its file, or that of a run of `steer run`.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    from interp.recipe import Recipe

    for run in (path, base() / path):
        if (run / RECIPE).is_file():
            return Recipe.load(run / RECIPE)
    named = Path(f"{path}.safetensors")  # as a recipe without a suffix is saved
    path = path if path.is_file() or not named.is_file() else named
    if not path.is_file():
        raise RunError(
            f"there is no recipe {path}", hint="headscope steer fit and steer run make one"
        ) from (FileNotFoundError(str(path)))
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
    if not force:
        return recipe
    # A second run of contrast is bound by itself.
    edits = [replace(e, twin=e.twin and for_any(e.twin, force=True)) for e in recipe.edits]
    return replace(recipe, edits=tuple(edits), fingerprint=None)


def examples_of(recipe: "Recipe") -> int:
    """How many examples the strengths and tensors of a recipe are given for; 0 if for any.

    Such a recipe is for these very prompts, in their order and in one batch.
    """
    found = {0}
    for edit in recipe.edits:
        s = edit.strength
        if not isinstance(s, float | int | None) and s.dim() == 2:
            found.add(s.shape[1])
        found |= {t.shape[1] for t in edit.tensors.values() if t.dim() == 4}
        found |= {examples_of(edit.twin)} if edit.twin is not None else set()
    n = max(found)
    return n if n > 1 else 0


def check_examples(recipe: "Recipe", n: int) -> int:
    """Refuse another number of prompts than a recipe is given for; returns that number.

    Raises:
        InputError: it is for another number.
    """
    bound = examples_of(recipe)
    if bound and n != bound:
        raise InputError(
            f"the recipe is for {bound} prompts, in their order; got {n}",
            hint="give those it was made on: --prompts, or --task with the same --n and --seed",
        )
    return bound
