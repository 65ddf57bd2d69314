"""Sink removal: heads lose the keys on which they park.

    α_k = (1/(T − k)) Σ_{q ≥ k} A[q, k]        mean mass on key k over the queries that see it
    S   = {k : α_k ≥ ε}                        the sinks of a head on a prompt

`knockout` hides S before the softmax, so that the rest of the row is normalised anew: the head must
look elsewhere. `drop` takes A[·, S] away and leaves the rest: the head loses what it reads there.
Rows of tokens that see nothing but sinks (the first token's, where it is one) stay as they are, so
that every row is defined.

Sinks are those of the unedited model, measured on the prompt; produced tokens lose the same keys.
α of the last keys rests on a few queries: keys that fewer than `queries` see do not count.

Sinks: Gu et al. 2024, arXiv 2410.10781; removal of keys: Geva et al. 2023, arXiv 2304.14767.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import (
    about,
    after,
    as_batch,
    at,
    grouped,
    heads_of,
    heavy_keys,
    noted,
    token_tower,
    where_on,
)
from interp.engine import read
from interp.errors import InputError
from interp.headid import HeadId
from interp.readings import KeyMass
from interp.recipe import Edit, Recipe, Where

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Gu et al. 2024, arXiv 2410.10781; Geva et al. 2023, arXiv 2304.14767"
OPS = ("knockout", "drop")


@maker("sink-removal", summary="hide the keys on which heads park", citation=CITATION)
def make_sink_removal(
    model: "Model",
    inputs: Inputs,
    *,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
    epsilon: float = 0.3,
    queries: int = 16,
    op: str = "knockout",
) -> Recipe:
    """The removal of the sinks of some heads on some prompts.

    Args:
        model: the model in hand.
        inputs: the prompts that will be run.
        heads: heads concerned; all of `layers` if None.
        layers: whose heads; every layer if None.
        epsilon: mean mass from which a key is a sink.
        queries: least number of queries that must see a key for it to count.
        op: `knockout` or `drop`.

    Returns:
        A recipe for the heads that have a sink; its notes hold them (`sinks`).

    Raises:
        InputError: no head has a sink, or a parameter is impossible.
        HeadIdError: a head or layer outside the model.
    """
    if op not in OPS:
        raise InputError(f"sinks are removed by knockout or drop; got {op!r}")
    if not 0 < epsilon < 1 or queries < 1:
        raise InputError(
            f"epsilon lies in (0, 1) and queries is at least 1; got {epsilon} and {queries}"
        )
    batch, tower = as_batch(model, inputs), token_tower(model)
    chosen = heads_of(model, tower, heads, layers, range(tower.n_layers))
    alpha = read(model, batch, {"alpha": KeyMass()}, tower=tower.name)["alpha"].values
    place = {layer.index: i for i, layer in enumerate(tower.layers)}
    found: dict[HeadId, list[tuple[int, ...] | None]] = {h: [] for h in chosen}
    for b, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        for layer in {h.layer for h in chosen}:
            rows = heavy_keys(
                alpha[b, place[layer]], offset, len(prompt),
                limit=epsilon, queries=queries, strict=False, first=0,
            )  # fmt: skip
            for head in (h for h in chosen if h.layer == layer):
                found[head].append(rows[head.head] or None)

    def build(sinks: tuple[int, ...], named: tuple[HeadId, ...], on: Tensor) -> Edit:
        free = next(i for i in range(len(sinks) + 1) if i not in sinks)
        where = Where(heads=named, queries=after(free), keys=at(sinks))
        return Edit(op, where, where_on(on, 1.0, 0.0))

    edits = [build(*g) for g in grouped(found)]
    if not edits:
        raise InputError(
            f"no key receives {epsilon:g} of the mass of those who see it, in {len(chosen)} heads",
            hint=f"keys must be seen by {queries} queries: use longer prompts, or queries=...",
        )
    params = {"epsilon": epsilon, "queries": queries, "op": op}
    notes = about("sink-removal", CITATION, model, batch, params)
    held = {h: s for h, s in found.items() if any(k is not None for k in s)}
    return Recipe(tuple(edits), model.fingerprint, {**notes, "sinks": noted(held)})
