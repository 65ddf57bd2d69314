"""A recipe: an intervention as a value.

    recipe = Recipe([Edit("zero", Where(heads=["L9H6"]))])
    with recipe.on(model):
        model.hf.generate(...)

Edits are applied in the order of the forward pass, and at one site in the order of the list. The
model is as it was after the context closes, on success, error and Ctrl-C. Ablation, patching,
knockout, steering, calibration and pruning are all recipes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp.errors import InputError, ModelError
from interp.headid import HeadId
from interp.recipe.edit import Edit
from interp.recipe.where import read_heads

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.place import Spans
    from interp.recipe.session import Session


@dataclass(frozen=True, eq=False)
class Recipe:
    """Edits in order.

    Attributes:
        edits: at least one.
        fingerprint: of the model it was made for, or None for any model.
        notes: facts about it (fit settings, scores, source), kept when saved.

    Raises:
        InputError: there is no edit.
        ModelError: the second run of a contrast was made for another model.
    """

    edits: tuple[Edit, ...]
    fingerprint: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        edits = (self.edits,) if isinstance(self.edits, Edit) else tuple(self.edits)
        if not edits:
            raise InputError(
                "a recipe needs at least one edit; got none",
                hint="Recipe([Edit('zero', Where(heads=['L9H6']))])",
            )
        object.__setattr__(self, "edits", edits)
        # A second run of contrast that was made for a model makes the whole recipe so.
        meant = {self.fingerprint, *(e.twin.fingerprint for e in edits if e.twin)} - {None}
        if len(meant) > 1:
            raise ModelError(
                f"all edits of a recipe must be made for one model; got {len(meant)} fingerprints",
                hint="make the recipe of the second run on the same model",
            )
        object.__setattr__(self, "fingerprint", next(iter(meant), None))

    @contextmanager
    def on(
        self, model: "Model", *, spans: "Spans" = None, force: bool = False
    ) -> Iterator["Session"]:
        """Switch it on while the context is open; contexts nest.

        Args:
            model: a model in hand.
            spans: the batch or prompts that will be run, if positions name spans; rows of beams
                follow their prompt.
            force: use it on a model it was not made for.

        Yields:
            The session; its `log` holds what gates decided.

        Raises:
            InputError: `model` is not a `Model`.
            ModelError: it was made for another model.
            HeadIdError: a head or layer lies outside the model.
            SiteError: a site is not reached on this model.
        """
        from interp.model import Model
        from interp.recipe.session import switched_on

        if not isinstance(model, Model):
            raise InputError(
                f"a recipe is switched on on a Model; got {type(model).__name__}",
                hint="recipe.on(interp.load(your_model))",
            )
        self._check_meant_for(model, force=force)
        with switched_on(self, model, spans) as session:
            yield session

    def _check_meant_for(self, model: "Model", *, force: bool) -> None:
        if self.fingerprint is not None and not force and self.fingerprint != model.fingerprint:
            raise ModelError(
                f"this recipe was made for the model with fingerprint {self.fingerprint}; "
                f"{model.name} has {model.fingerprint}",
                hint="force=True (--force) uses it all the same",
            )

    def __add__(self, other: "Recipe") -> "Recipe":
        """First this recipe's edits, then the other's."""
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise ModelError(
                f"recipes that are added must not be made for different models; got "
                f"{self.fingerprint} and {other.fingerprint}",
                hint="replace(recipe, fingerprint=None) is a recipe for any model",
            )
        return Recipe(
            self.edits + other.edits,
            self.fingerprint or other.fingerprint,
            {**self.notes, **other.notes},
        )

    def __mul__(self, factor: "float | Tensor") -> "Recipe":
        """Every strength moved from its neutral value by a factor; 0 changes nothing."""
        return replace(self, edits=tuple(e.scaled(factor) for e in self.edits))

    __rmul__ = __mul__

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """The heads named by its edits, each once, in order of appearance."""
        return tuple(dict.fromkeys(h for e in self.edits for h in e.where.heads or ()))

    def without(self, heads: Sequence[HeadId | str] | HeadId | str) -> "Recipe":
        """The recipe without some heads.

        Raises:
            InputError: a head is not in it, or nothing would be left.
        """
        gone = set(read_heads(heads))
        if missing := gone - set(self.heads):
            raise InputError(f"{min(missing)} is not in this recipe")
        edits = []
        for edit in self.edits:
            named = edit.where.heads
            if named is None or not gone & set(named):
                edits.append(edit)
                continue
            keep = [i for i, h in enumerate(named) if h not in gone]
            if keep:
                edits.append(_taken(edit, keep))
        if not edits:
            raise InputError("nothing would be left of this recipe")
        return replace(self, edits=tuple(edits))

    def control(
        self, model: "Model", n: int = 10, *, seed: int = 0, exclude: Sequence[HeadId] = ()
    ) -> tuple["Recipe", ...]:
        """The same edits on random other heads, as many in each layer; see `control.py`."""
        from interp.recipe.control import controls

        return controls(self, model, n, seed=seed, exclude=exclude)

    def explain(self, model: "Model") -> str:
        """What each edit will do on a model, and by which path; see `explain.py`."""
        from interp.recipe.explain import explained

        return explained(self, model)

    def bake(self, model: "Model", *, new_bias: bool = False, force: bool = False) -> "Model":
        """A copy of the model with the recipe folded into its weights; see `bake.py`.

        Raises:
            ModelError: it was made for another model, and `force` is not given.
        """
        from interp.recipe.bake import baked

        self._check_meant_for(model, force=force)
        return baked(self, model, new_bias=new_bias)

    def parameters(self) -> dict[str, Tensor]:
        """Tensors and tensor strengths by name, such as `0.vector`; gradients flow to them."""
        from interp.recipe.store import named

        return dict(named(self.edits))

    @property
    def hash(self) -> str:
        """Hash of its content."""
        from interp.recipe.store import to_bytes

        return hashlib.sha256(to_bytes(self)).hexdigest()[:16]

    def save(self, path: "str | Path") -> Path:
        """Write it as one safetensors file with JSON metadata, whole or not at all."""
        from interp.recipe.store import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: "str | Path") -> "Recipe":
        """Read a saved recipe.

        Raises:
            RunError: no such file, or a damaged or newer one.
        """
        from interp.recipe.store import load

        return load(Path(path))

    def __str__(self) -> str:
        return "\n".join(f"{i}  {e}" for i, e in enumerate(self.edits))


def _taken(edit: Edit, keep: list[int]) -> Edit:
    """An edit of some of its heads."""
    assert edit.where.heads is not None
    s = edit.strength
    return replace(
        edit,
        where=replace(edit.where, heads=tuple(edit.where.heads[i] for i in keep)),
        tensors={n: t[keep] for n, t in edit.tensors.items()},
        strength=s[keep] if isinstance(s, Tensor) and s.dim() else s,
    )
