"""The edits of a recipe, sorted by the module at which they act."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from interp.errors import HeadIdError, SiteError
from interp.recipe.edit import Edit
from interp.recipe.when import Gate
from interp.seam.blocks import block_names

if TYPE_CHECKING:
    from interp.model import Model


@dataclass(frozen=True, eq=False)
class Part:
    """What one edit does at one module.

    Attributes:
        edit: the edit.
        units: heads (or key-value heads) of the layer; (0,) at sites without heads.
        entries: their places in the edit's tensors.
        depth: index of the layer, or of the one that follows the site.
        owner: which of the recipes that are on it belongs to.
    """

    edit: Edit
    units: tuple[int, ...]
    entries: tuple[int, ...]
    depth: int
    owner: int


@dataclass(eq=False)
class Table:
    """Edits by site and by module.

    Attributes:
        heads: site to attention module to parts, for z, q, k, v.
        attention: attention module to parts, for scores and pattern.
        blocks: block module to parts at its input (resid).
        after: last block of a tower to parts at its output (resid after the last layer).
        outputs: output projection to parts (attn_out).
        logits: parts at the logits.
        gates: block module to the gates measured at its input, each with the tower's name.
    """

    heads: dict[str, dict[str, list[Part]]] = field(default_factory=dict)
    attention: dict[str, list[Part]] = field(default_factory=dict)
    blocks: dict[str, list[Part]] = field(default_factory=dict)
    after: dict[str, list[Part]] = field(default_factory=dict)
    outputs: dict[str, list[Part]] = field(default_factory=dict)
    logits: list[Part] = field(default_factory=list)
    gates: dict[str, list[tuple[Gate, str]]] = field(default_factory=dict)

    @property
    def attends(self) -> bool:
        """Whether the seam must be open."""
        return bool(self.attention) or any(self.heads.get(s) for s in ("q", "k", "v"))


def compile_table(model: "Model", recipes: Iterable[Iterable[Edit]]) -> Table:
    """Sort the edits of recipes by module, in the order in which they were switched on.

    Raises:
        HeadIdError: a head or layer lies outside the model.
        SiteError: a site is not reached on this model.
    """
    table = Table()
    for owner, edits in enumerate(recipes):
        for edit in edits:
            if edit.gate is not None:
                _gate(model, edit.gate, edit.tower, table)
            _SITES[edit.site](model, edit, owner, table)
    return table


def _gate(model: "Model", gate: Gate, tower: str, table: Table) -> None:
    blocks = block_names(model, model.tower(tower))
    _check_layer(model, gate.layer, len(blocks) - 1)
    here = table.gates.setdefault(blocks[gate.layer], [])
    if all(known is not gate for known, _ in here):
        here.append((gate, tower))


def _head_parts(model: "Model", edit: Edit, owner: int) -> dict[str, Part]:
    by_layer: dict[str, list[tuple[int, int]]] = {}
    for i, head in enumerate(edit.selected(model)):
        by_layer.setdefault(model.layer_of(head).name, []).append((head.head, i))
    layers = model.structure.layers
    return {
        name: Part(
            edit, tuple(u for u, _ in units), tuple(i for _, i in units), layers[name].index, owner
        )
        for name, units in by_layer.items()
    }


def _heads(model: "Model", edit: Edit, owner: int, table: Table) -> None:
    for name, part in _head_parts(model, edit, owner).items():
        layer = model.structure.layers[name]
        if edit.site != "z" and layer.d_qk is None:
            raise SiteError(
                f"site {edit.site!r} is not reached in {name} of {model.name}: it computes its "
                f"pattern by itself",
                hint="z, scores and pattern can be edited there",
            )
        table.heads.setdefault(edit.site, {}).setdefault(name, []).append(part)


def _attention(model: "Model", edit: Edit, owner: int, table: Table) -> None:
    for name, part in _head_parts(model, edit, owner).items():
        table.attention.setdefault(name, []).append(part)


def _check_layer(model: "Model", layer: int, last: int) -> None:
    if not 0 <= layer <= last:
        raise HeadIdError(
            f"layer {layer} is outside {model.name}, whose layers are 0 to {last}",
            hint="layers count from 0; for resid, one more than the last is after the last",
        )


def _resid(model: "Model", edit: Edit, owner: int, table: Table) -> None:
    blocks = block_names(model, model.tower(edit.where.tower))
    chosen = edit.where.layers if edit.where.layers is not None else range(len(blocks))
    for i, layer in enumerate(chosen):
        _check_layer(model, layer, len(blocks))
        place, name = (
            (table.after, blocks[-1]) if layer == len(blocks) else (table.blocks, blocks[layer])
        )
        place.setdefault(name, []).append(Part(edit, (0,), (i,), layer, owner))


def _attn_out(model: "Model", edit: Edit, owner: int, table: Table) -> None:
    layers = {x.index: x for x in model.tower(edit.where.tower).layers}
    chosen = edit.where.layers if edit.where.layers is not None else tuple(layers)
    for i, layer in enumerate(chosen):
        if layer not in layers:
            raise HeadIdError(
                f"layer {layer} of {model.name} has no attention; those that have: "
                f"{', '.join(map(str, layers))}"
            )
        part = Part(edit, (0,), (i,), layer, owner)
        table.outputs.setdefault(layers[layer].projection, []).append(part)


def _logits(model: "Model", edit: Edit, owner: int, table: Table) -> None:
    table.logits.append(Part(edit, (0,), (0,), sys.maxsize, owner))


_SITES = {
    "z": _heads, "q": _heads, "k": _heads, "v": _heads,
    "scores": _attention, "pattern": _attention,
    "resid": _resid, "attn_out": _attn_out, "logits": _logits,
}  # fmt: skip
