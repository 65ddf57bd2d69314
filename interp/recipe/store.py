"""Recipes on disk: one safetensors file, the recipe as JSON in its metadata."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp.errors import InputError, InterpError, RunError
from interp.files import disk_errors, jsonable, write_atomic
from interp.recipe.edit import Edit

if TYPE_CHECKING:
    from interp.recipe.recipe import Recipe

SCHEMA, VERSION = "headscope.recipe", 1


def to_bytes(recipe: "Recipe") -> bytes:
    """The file's content; the same for equal recipes."""
    from safetensors.torch import save as encode

    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in named(recipe.edits)}
    header = {
        "schema": SCHEMA,
        "version": VERSION,
        "fingerprint": recipe.fingerprint,
        "notes": jsonable(recipe.notes, "notes"),
        "edits": [e.to_json() for e in recipe.edits],
    }
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return bytes(encode(tensors, metadata={SCHEMA: text}))


def named(edits: Sequence[Edit], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some edits with its name in the file, such as `0.vector`."""
    for i, edit in enumerate(edits):
        for name, tensor in edit.parameters().items():
            yield f"{prefix}{i}.{name}", tensor
        if edit.twin is not None:
            yield from named(edit.twin.edits, f"{prefix}{i}.twin.")


def save(recipe: "Recipe", path: Path) -> Path:
    """Write a recipe; `.safetensors` is added to a name without it.

    Raises:
        RunError: the disk is full or not ours to write.
    """
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    data = to_bytes(recipe)
    with disk_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return path


def load(path: Path) -> "Recipe":
    """Read a recipe.

    Raises:
        RunError: no such file, not a recipe, damaged, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RunError(f"there is no recipe {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(SCHEMA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        data = json.loads(header) if header is not None else None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged and cannot be read: {error}") from None
    if data is None:
        raise RunError(f"{path} is not a recipe: its metadata has no {SCHEMA!r}")
    if data.get("version", 0) > VERSION:
        raise RunError(
            f"{path} is of version {data['version']}; this headscope reads up to {VERSION}",
            hint="upgrade headscope",
        )
    return _built(data, tensors, path)


def _built(data: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> "Recipe":
    from interp.recipe.recipe import Recipe

    try:
        edits = [_edit(e, tensors, f"{i}.") for i, e in enumerate(data["edits"])]
        return Recipe(tuple(edits), data.get("fingerprint"), data.get("notes", {}))
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from None
    except InterpError as error:
        raise InputError(f"{path} cannot be used: {error}", hint=error.hint) from None


def _edit(data: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Edit:
    from interp.recipe.recipe import Recipe

    mine = {
        n[len(prefix) :]: t
        for n, t in tensors.items()
        if n.startswith(prefix) and not n.startswith(f"{prefix}twin.")
    }
    values = dict(data)
    twin = values.pop("twin", None)
    if twin is None:
        return Edit.from_json(values, mine)
    inner = [_edit(e, tensors, f"{prefix}twin.{i}.") for i, e in enumerate(twin)]
    return Edit.from_json(values, mine, twin=Recipe(tuple(inner)))
