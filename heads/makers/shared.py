"""What makers share: batches, layers, findings per head and example, and one pass in layer order.

Published calibrations act while they look: a layer is judged on inputs that the layers before it
have already changed. `in_order` does this in one forward: at each layer it asks what to change,
changes it, and goes on.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heads.makers import Inputs
from interp.engine import answer
from interp.errors import HeadIdError, InputError, SiteError
from interp.headid import HeadId
from interp.kernels.plan import Side, compile_plan
from interp.prompts import Batch, Prompt
from interp.readings import KeyMass
from interp.recipe import Edit, Positions
from interp.recipe.act import strength_of
from interp.recipe.attend import RowEdit, edited_weights, edited_z
from interp.recipe.ops import AttentionOp
from interp.recipe.place import Frame
from interp.recipe.where import read_heads
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer, Tower

if TYPE_CHECKING:
    from interp.model import Model

K = TypeVar("K", bound=Hashable)
_ONE_SEQUENCE = "recipe makers read one sequence; got prompts of encoder and decoder"
Found = Mapping[HeadId, Sequence[K | None]]
"""For each head what was found on each example; None where nothing was."""


def as_batch(model: "Model", inputs: Inputs) -> Batch:
    """The inputs as one batch.

    Raises:
        InputError: there are no prompts, or they are for an encoder and a decoder.
    """
    prompts = prompts_of(inputs)
    return inputs if isinstance(inputs, Batch) else model.batch(list(prompts), side="left")


def prompts_of(inputs: Inputs) -> tuple[Prompt, ...]:
    """The prompts of the inputs.

    Raises:
        InputError: there are none, or they are for an encoder and a decoder.
    """
    if isinstance(inputs, Batch) and inputs.decoder is not None:
        raise InputError(_ONE_SEQUENCE)
    prompts = tuple(inputs.prompts if isinstance(inputs, Batch) else inputs)
    if not prompts:
        raise InputError("a recipe maker needs at least one prompt; got none")
    return prompts


def as_fitted(inputs: Inputs) -> list[Any]:
    """The inputs as a fit of `probes` goes through them: prompts, or one batch with its images."""
    return [inputs] if isinstance(inputs, Batch) else list(inputs)


def token_tower(model: "Model") -> Tower:
    """The model's first tower, whose positions are the tokens of prompts.

    Raises:
        SiteError: the model has no such tower.
    """
    tower = next(iter(model.towers.values()))
    if tower.name.split("-")[0] not in ("text", "encoder"):
        raise SiteError(f"recipe makers need a tower over tokens; {model.name} has {tower.name!r}")
    return tower


def layers_of(
    tower: Tower, layers: "Sequence[int] | int | None", default: Sequence[int]
) -> tuple[Layer, ...]:
    """Layers of a tower, in order.

    Raises:
        HeadIdError: a layer that the tower does not have, or that has no attention.
        InputError: none is chosen.
    """
    known = {layer.index: layer for layer in tower.layers}
    if layers is None:
        chosen = [i for i in default if i in known]
        if not chosen:
            raise InputError(
                f"the published choice of layers is empty for {tower.n_layers} layers",
                hint="name them: layers=(0, 1)",
            )
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
        if not chosen:
            raise InputError("layers must name at least one layer; got none")
    for i in chosen:
        if i not in known:
            raise HeadIdError(
                f"tower {tower.name!r} has attention in layers "
                f"{', '.join(map(str, known))}; got {i}"
            )
    return tuple(known[i] for i in sorted(set(chosen)))


def middle(tower: Tower) -> range:
    """Layers from the third to the one before the last, which VAR and ACT calibrate."""
    return range(2, tower.n_layers - 1)


def heads_of(
    model: "Model",
    tower: Tower,
    heads: "Sequence[HeadId | str] | None",
    layers: "Sequence[int] | int | None",
    default: Sequence[int],
) -> tuple[HeadId, ...]:
    """The named heads, or all heads of the chosen layers.

    Raises:
        InputError: both heads and layers are given, or what `layers_of` raises.
        HeadIdError: a head is outside the tower.
    """
    if heads is None:
        return tuple(
            HeadId(layer.index, h, tower.name)
            for layer in layers_of(tower, layers, default)
            for h in range(layer.n_heads)
        )
    if layers is not None:
        raise InputError("give heads or layers, not both")
    named = read_heads(heads)
    for head in named:
        model.layer_of(head)
        if head.tower != tower.name:
            raise HeadIdError(f"heads must be of tower {tower.name!r}; got {head}")
    return named


def frame_of(batch: Batch) -> Frame:
    """Where the columns of a batch stand in its prompts."""
    device = batch.input_ids.device
    offsets = torch.tensor(batch.offsets, device=device)
    lengths = torch.tensor([len(p) for p in batch.prompts], device=device)
    width = batch.input_ids.shape[1]
    return Frame(offsets, lengths, width, 0, width, batch.input_ids, (batch.prompts,))


def last_tokens(batch: Batch) -> Tensor:
    """[example] the column of each prompt's last token."""
    columns = [o + len(p) - 1 for o, p in zip(batch.offsets, batch.prompts, strict=True)]
    return torch.tensor(columns, device=batch.input_ids.device)


def at(places: Sequence[int]) -> Positions:
    """Some places of a prompt."""
    first, last = min(places), max(places)
    if last - first + 1 == len(places) > 1:
        return Positions(window=(first, last + 1))
    return Positions(prompt=tuple(places))


def after(n: int) -> Positions:
    """Every position but the first n."""
    return Positions.all() if n == 0 else Positions(
        prompt="all", generated="all", exclude=Positions(window=(0, n))
    )  # fmt: skip


def grouped(
    found: Found[K],
) -> Iterator[tuple[K, tuple[HeadId, ...], Bool[Tensor, "head example"]]]:
    """Each different finding, the heads that have it, and on which examples."""
    by: dict[K, dict[HeadId, list[bool]]] = {}
    for head, keys in found.items():
        for i, key in enumerate(keys):
            if key is not None:
                by.setdefault(key, {}).setdefault(head, [False] * len(keys))[i] = True
    for key, rows in by.items():
        heads = tuple(sorted(rows))
        yield key, heads, torch.tensor([rows[h] for h in heads])


def where_on(on: Bool[Tensor, "head example"], s: float, neutral: float) -> Tensor | float:
    """Strength s where `on`, else the neutral one; a number if it is s everywhere."""
    return s if bool(on.all()) else torch.where(on, s, neutral)


def noted(found: Found[Any]) -> dict[str, list[Any]]:
    """A finding as plain values."""
    return {str(h): [None if k is None else list(k) for k in ks] for h, ks in found.items()}


def about(
    name: str, citation: str, model: "Model", inputs: Inputs | None, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Notes that every recipe of a maker has."""
    examples = [] if inputs is None else [p.id for p in prompts_of(inputs)]
    return {
        "name": name, "citation": citation, "model": model.name, "params": dict(params),
        "examples": examples,
    }  # fmt: skip


def key_mass(call: AttnCall, batch: Batch, layer: Layer) -> Float[Tensor, "example head key"]:
    """Mean mass that each key receives from the queries that see it; NaN for padding."""
    sides = Side(batch).at(call.n_query), Side(batch).at(call.n_key)
    plan = compile_plan({"alpha": KeyMass()}, *sides, causal=layer.causal)
    return answer(call, plan)["alpha"][0]


def heavy_keys(
    alpha: Float[Tensor, "head key"], offset: int, length: int, *, limit: float, queries: int,
    strict: bool, first: int,
) -> list[tuple[int, ...]]:  # fmt: skip
    """For each head the places whose mass is over a limit, of one example.

    Args:
        alpha: mean mass of each key, padding counted.
        offset: pad tokens before the prompt.
        length: tokens of the prompt.
        limit: the limit.
        queries: least number of queries that must see a key.
        strict: whether the limit itself is not enough.
        first: the first place that may count.
    """
    mine = alpha[:, offset : offset + length]
    over = mine > limit if strict else mine >= limit
    stop = length - queries + 1
    return [tuple(i for i in row.nonzero()[:, 0].tolist() if first <= i < stop) for row in over]


@torch.no_grad()
def in_order(
    model: "Model",
    batch: Batch,
    layers: Sequence[Layer],
    choose: Callable[[Layer, AttnCall], Found[K]],
    build: Callable[[K, tuple[HeadId, ...], Tensor], Edit],
) -> dict[HeadId, Sequence[K | None]]:
    """Run a batch once; at each layer find what to change, and change it for the layers after.

    Args:
        model: the model in hand.
        batch: what is run.
        layers: layers that are looked at.
        choose: what is found at a layer, given its attention.
        build: the edit of pattern or scores that follows from one finding.

    Returns:
        What was found, for all layers.
    """
    frame, wanted = frame_of(batch), {layer.name: layer for layer in layers}
    found: dict[HeadId, Sequence[K | None]] = {}

    def edits(call: AttnCall) -> list[RowEdit]:
        if call.name not in wanted:
            return []
        here = choose(wanted[call.name], call)
        found.update(here)
        return [_bound(build(*g), frame, call) for g in grouped(here)]

    def observer(call: AttnCall) -> Tensor | None:
        if call.q is None:  # its pattern has been edited
            return None
        rows = edits(call)
        return edited_z(call, rows) if rows else None

    def weights(name: str, p: Tensor) -> Tensor | None:
        z = p.new_zeros(p.shape[0], p.shape[2], p.shape[1], 1)
        module = model.hf.get_submodule(name)
        rows = edits(AttnCall(name, module, None, None, None, z, pattern=p, how="pattern"))
        return edited_weights(p, rows, name) if rows else None

    with model.observe(observer, weights=weights):
        model.forward(batch.inputs())
    return found


def _bound(edit: Edit, frame: Frame, call: AttnCall) -> RowEdit:
    """An edit of one layer, bound to a forward without a cache."""
    op, where = edit.operation, edit.where
    assert isinstance(op, AttentionOp) and where.heads is not None

    def of(positions: Positions, n: int) -> Tensor:
        return frame.select(positions, 0, 0, n)

    params = {n: edit.setting(n) for n in op.params}
    units = tuple(h.head for h in where.heads)
    s = strength_of(edit, tuple(range(len(units))), call.z.shape[0])
    others = {n: of(p, call.n_key) for n, p in params.items() if isinstance(p, Positions)}
    rows = None if where.queries.everywhere else of(where.queries, call.n_query)
    keys = of(where.keys, call.n_key)
    return RowEdit(op, edit.site, units, s, params, rows, keys, others)
