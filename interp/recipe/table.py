"""The edits of a recipe, sorted by the module at which they act."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from interp.errors import HeadIdError, SiteError
from interp.recipe.edit import Edit
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
    """

    edit: Edit
    units: tuple[int, ...]
    entries: tuple[int, ...]


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
        gates: block module to gates measured at its input.
    """

    heads: dict[str, dict[str, list[Part]]] = field(default_factory=dict)
    attention: dict[str, list[Part]] = field(default_factory=dict)
    blocks: dict[str, list[Part]] = field(default_factory=dict)
    after: dict[str, list[Part]] = field(default_factory=dict)
    outputs: dict[str, list[Part]] = field(default_factory=dict)
    logits: list[Part] = field(default_factory=list)
    gates: dict[str, list[Edit]] = field(default_factory=dict)

    @property
    def attends(self) -> bool:
        """Whether the seam must be open."""
        return bool(self.attention) or any(self.heads.get(s) for s in ("q", "k", "v"))


def compile_table(model: "Model", edits: Iterable[Edit]) -> Table:
    """Sort edits by module.

    Raises:
        HeadIdError: a head or layer lies outside the model.
        SiteError: a site is not reached on this model.
    """
    table = Table()
    for edit in edits:
        if edit.gate is not None:
            tower = model.tower(edit.where.tower)
            blocks = block_names(model, tower)
            _check_layer(model, edit.gate.layer, len(blocks) - 1)
            table.gates.setdefault(blocks[edit.gate.layer], []).append(edit)
        _SITES[edit.site](model, edit, table)
    return table


def _head_parts(model: "Model", edit: Edit) -> dict[str, Part]:
    by_layer: dict[str, list[tuple[int, int]]] = {}
    for i, head in enumerate(edit.selected(model)):
        by_layer.setdefault(model.layer_of(head).name, []).append((head.head, i))
    return {
        name: Part(edit, tuple(u for u, _ in units), tuple(i for _, i in units))
        for name, units in by_layer.items()
    }


def _heads(model: "Model", edit: Edit, table: Table) -> None:
    for name, part in _head_parts(model, edit).items():
        layer = model.structure.layers[name]
        if edit.site != "z" and layer.d_qk is None:
            raise SiteError(
                f"site {edit.site!r} is not reached in {name} of {model.name}: it computes its "
                f"pattern by itself",
                hint="z and pattern can be edited there",
            )
        table.heads.setdefault(edit.site, {}).setdefault(name, []).append(part)


def _attention(model: "Model", edit: Edit, table: Table) -> None:
    for name, part in _head_parts(model, edit).items():
        table.attention.setdefault(name, []).append(part)


def _check_layer(model: "Model", layer: int, last: int) -> None:
    if not 0 <= layer <= last:
        raise HeadIdError(f"layer {layer} is outside {model.name}, whose layers are 0 to {last}")


def _resid(model: "Model", edit: Edit, table: Table) -> None:
    blocks = block_names(model, model.tower(edit.where.tower))
    chosen = edit.where.layers if edit.where.layers is not None else range(len(blocks))
    for i, layer in enumerate(chosen):
        _check_layer(model, layer, len(blocks))
        place, name = (
            (table.after, blocks[-1]) if layer == len(blocks) else (table.blocks, blocks[layer])
        )
        place.setdefault(name, []).append(Part(edit, (0,), (i,)))


def _attn_out(model: "Model", edit: Edit, table: Table) -> None:
    layers = {x.index: x for x in model.tower(edit.where.tower).layers}
    chosen = edit.where.layers if edit.where.layers is not None else tuple(layers)
    for i, layer in enumerate(chosen):
        if layer not in layers:
            raise HeadIdError(f"layer {layer} of {model.name} has no attention")
        table.outputs.setdefault(layers[layer].projection, []).append(Part(edit, (0,), (i,)))


def _logits(model: "Model", edit: Edit, table: Table) -> None:
    table.logits.append(Part(edit, (0,), (0,)))


_SITES = {
    "z": _heads, "q": _heads, "k": _heads, "v": _heads,
    "scores": _attention, "pattern": _attention,
    "resid": _resid, "attn_out": _attn_out, "logits": _logits,
}  # fmt: skip
