"""Which attention calls a relevance map goes through, and which side asks which.

It follows from where modules stand and what ran, for no model type by name: the tower that decides;
the cross-attention in its blocks, or in a list beside them; the self-attention tower that ran last
before it was looked at, if its positions are the keys; and where one module looks both ways, every
tower beside it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.seam.structure import stack_of
from patching.relevance_rules import SOURCE, TOKENS

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer, Tower


@dataclass(frozen=True)
class Scope:
    """The towers that a map may go through.

    Attributes:
        own: the tower whose positions decide.
        cross: towers by which it looks across.
        others: towers that may have made what it looks at.
        mutual: whether a module looks both ways, so that all of `cross` and `others` belong.
    """

    own: "Tower"
    cross: "tuple[Tower, ...]" = ()
    others: "tuple[Tower, ...]" = ()
    mutual: bool = False


def takes_decoder(model: "Model") -> bool:
    """Whether the model's decoder reads tokens of its own, beside what its encoder reads."""
    names = inspect.signature(model.hf.forward).parameters
    split = bool(getattr(model.config, "is_encoder_decoder", False))
    return split and "decoder_input_ids" in names


def scope_of(model: "Model", name: str | None) -> Scope:
    """The towers that a map through a tower goes through.

    Args:
        model: the model.
        name: a tower that decides, or by which such a tower looks across; the first if None.

    Raises:
        InputError: a tower that does not decide.
    """
    towers = model.towers
    crosses = [t for t in towers.values() if any(layer.cross for layer in t.layers)]
    plain = [t for t in towers.values() if t not in crosses]
    mutual = [t for t in crosses if not takes_decoder(model) and any(x.calls > 1 for x in t.layers)]
    asking = {t.name: _asking(model, t, plain) for t in crosses}
    first = next(iter(towers.values()))
    given = model.tower(name) if name else first
    own = given
    if given in crosses:
        asks = asking[given.name]
        if asks is None:
            raise InputError(
                f"tower {given.name!r} looks across for no tower that decides",
                hint=f"explain through tower {first.name!r}",
            )
        own = asks
    for t in mutual:
        beside = _beside(model, t, plain)
        if given is t or given in beside:
            others = tuple(x for x in beside if x is not beside[0])
            return Scope(beside[0], (t,), others, mutual=True)
    if name is None and takes_decoder(model) and own not in asking.values():
        own = next((t for t in asking.values() if t is not None), own)
    mine = tuple(t for t in crosses if asking[t.name] is own)
    blind = own.name.split("-")[0] in ("vision", "audio") and model.reads_tokens
    if blind or (takes_decoder(model) and not mine):
        raise InputError(
            f"tower {own.name!r} decides nothing by itself: a decoder reads what it makes",
            hint="explain through the tower of the decoder; what it looks at is its source",
        )
    others = tuple(t for t in plain if t is not own) if mine else ()
    return Scope(own, mine, others)


def _asking(model: "Model", cross: "Tower", plain: "Sequence[Tower]") -> "Tower | None":
    """The tower that looks across by another: one of the same blocks, or of a list beside them."""
    stack = stack_of(model.hf, cross.layers[0].name)
    for t in plain:
        if stack_of(model.hf, t.layers[0].name) == stack:
            return t
    beside = _beside(model, cross, plain)
    return beside[0] if beside else None


def _beside(model: "Model", cross: "Tower", plain: "Sequence[Tower]") -> "list[Tower]":
    def home(t: "Tower") -> str:
        return stack_of(model.hf, t.layers[0].name).rpartition(".")[0]

    return [t for t in plain if home(t) == home(cross)]


@dataclass(frozen=True, eq=False)
class Note:
    """A call as it was heard, before it is known which sides it has.

    Attributes:
        layer: its layer.
        pattern: [batch, head, query, key].
    """

    layer: "Layer"
    pattern: Float[Tensor, "batch head query key"]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a run.

    Attributes:
        layer: its layer.
        query: side of its queries.
        key: side of its keys.
        pattern: [batch, head, query, key].
        slope: ∂ y / ∂ pattern of the same shape, or None if it was not asked for.
        block: calls of one number ran from the same states.
    """

    layer: "Layer"
    query: str
    key: str
    pattern: Float[Tensor, "batch head query key"]
    slope: Float[Tensor, "batch head query key"] | None = None
    block: int = 0


def sides_of(scope: Scope, layer: str, shape: Sequence[int], width: int) -> tuple[str, str]:
    """The sides of queries and keys of a call.

    Args:
        scope: the towers.
        layer: qualified name of its attention module, which is one of theirs.
        shape: number of queries and of keys.
        width: number of tokens.
    """
    if scope.mutual:  # the number of positions tells, where one module looks both ways
        query, key = (TOKENS if n == width else SOURCE for n in shape)
        return query, key
    if any(x.name == layer for x in scope.own.layers):
        return TOKENS, TOKENS
    across = any(x.name == layer for t in scope.cross for x in t.layers)
    return TOKENS if across else SOURCE, SOURCE


Sided = tuple[list[Call], "Tower | None"]


def by_tower(scope: Scope, notes: Sequence[Note], width: int) -> Sided:
    """Sides by towers: the source is the last that ran before it was looked at."""
    own = {x.name for x in scope.own.layers}
    across = {x.name for t in scope.cross for x in t.layers}
    sizes = {n.pattern.shape[-1] for n in notes if n.layer.name in across}
    asked = {n.pattern.shape[-2] for n in notes if n.layer.name in own | across}
    kept = {n.pattern.shape[-1] for n in notes if n.layer.name in own}
    if asked | kept != {width} or len(sizes) > 1:
        raise SiteError(
            f"relevance needs layers of one length; tower {scope.own.name!r} reads {width} "
            f"positions and attends over {', '.join(map(str, sorted(asked | kept)))}"
            + (f", and across over {', '.join(map(str, sorted(sizes)))}" if sizes else "")
        )
    source = _source(scope, notes, across) if sizes else None
    looked = set() if source is None else {x.name for x in source.layers}
    calls = []
    for i, note in enumerate(notes):
        name = note.layer.name
        if name in own | across | looked:
            query, key = sides_of(scope, name, note.pattern.shape[-2:], width)
            calls.append(Call(note.layer, query, key, note.pattern, block=i))
    return calls, source


def _source(scope: Scope, notes: Sequence[Note], across: set[str]) -> "Tower | None":
    """The tower that made what is looked at, if its positions are those."""
    first = next(i for i, n in enumerate(notes) if n.layer.name in across)
    size = notes[first].pattern.shape[-1]
    towers = {x.name: t for t in scope.others for x in t.layers}
    for note in reversed(notes[:first]):
        tower = towers.get(note.layer.name)
        if tower is not None:
            mine = [n for n in notes if towers.get(n.layer.name) is tower]
            whole = {n.layer.name for n in mine} == {x.name for x in tower.layers}
            fits = all(n.pattern.shape[-2:] == (size, size) for n in mine)
            return tower if whole and fits else None
    return None


def by_size(scope: Scope, notes: Sequence[Note], width: int) -> Sided | None:
    """Sides by the number of positions, where one module looks both ways."""
    across = {x.name for t in scope.cross for x in t.layers}
    sizes = {n for x in notes for n in x.pattern.shape[-2:]}
    if sizes == {width}:
        return None
    if len(sizes) != 2 or width not in sizes:
        raise SiteError(
            f"relevance needs two sides of one length each; {width} tokens were read and attention "
            f"is over {', '.join(map(str, sorted(sizes)))} positions"
        )
    calls: list[Call] = []
    for i, note in enumerate(notes):
        query, key = sides_of(scope, note.layer.name, note.pattern.shape[-2:], width)
        # A module that looks both ways does so from the same states.
        again = note.layer.name in across and calls and calls[-1].layer is note.layer
        block = calls[-1].block if again else i
        calls.append(Call(note.layer, query, key, note.pattern, block=block))
    return calls, None
