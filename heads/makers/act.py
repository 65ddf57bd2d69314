"""ACT: attention that a head spends on sinks in mid-text goes back to the other tokens.

    c_j = Σ_{q ≥ j} A[q, j] / (T − j)             mean mass on key j over the queries that see it
    S   = {j > 0 : c_j > threshold}               the sinks of a head on a prompt
    A'[q, S] = β·A[q, S], and the mass freed goes to the row's other keys in proportion

The first token is never a sink here: its mass is left alone, and it receives its share. Sinks are
found on the prompt, layer after layer in one pass, so that a layer is judged on calibrated inputs;
produced tokens are calibrated at the same keys. Rows that hold nothing but sinks stay as they are.
c_j of the last keys rests on a few queries, and a head that attends to itself has sinks there;
`queries` leaves such keys out.

Which heads: calibrate one head at a time on labelled prompts and keep those that raise the mean
accuracy (`search_heads`). The gain on the very prompts of the search is too good; measure it on
others.

Yu et al. 2024, arXiv 2406.15765. Differences from the published code: it exempts the first sink it
finds, be that the first token or not, and resets A[0, 0] to 1, both wrong for a row of a cached
run; it calibrates the first example of a batch only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import (
    about,
    as_batch,
    at,
    grouped,
    heads_of,
    heavy_keys,
    in_order,
    key_mass,
    middle,
    noted,
    token_tower,
    where_on,
)
from heads.outcome import outcome, with_targets
from interp.engine import read
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from interp.readings import KeyMass
from interp.recipe import Edit, Recipe, Where
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Yu et al. 2024, arXiv 2406.15765"
Sinks = tuple[int, ...]


@maker("act", summary="give attention on mid-text sinks back to other tokens", citation=CITATION)
def make_act(
    model: "Model",
    inputs: Inputs,
    *,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
    threshold: float = 0.1,
    beta: float = 0.4,
    queries: int = 1,
    labelled: Sequence[Prompt] | None = None,
) -> Recipe:
    """The calibration of some heads on some prompts.

    Args:
        model: the model in hand.
        inputs: the prompts that will be run.
        heads: heads to calibrate; those of `layers` if None.
        layers: whose heads; the third to the one before the last if None, as published.
        threshold: mean mass above which a key is a sink.
        beta: share that sinks keep.
        queries: least number of queries that must see a key for it to be a sink.
        labelled: prompts with answers; of the heads, only those are then calibrated that raise the
            mean accuracy on them.

    Raises:
        InputError: no head has a sink, none raises the accuracy, or a parameter is impossible.
        HeadIdError: a head or layer outside the model.
    """
    _check(threshold, beta, queries)
    batch, tower = as_batch(model, inputs), token_tower(model)
    chosen = heads_of(model, tower, heads, layers, middle(tower))
    search: dict[str, object] = {}
    if labelled is not None:
        result = search_heads(
            model, labelled, heads=chosen, threshold=threshold, beta=beta, queries=queries
        )
        search = {"base": result.base, **{str(h): a for h, a in result.accuracy.items()}}
        if not result.heads:
            raise InputError(
                f"no head raises the mean accuracy of {result.base:.3g} on {len(labelled)} prompts"
            )
        chosen = result.heads

    def choose(layer: Layer, call: AttnCall) -> dict[HeadId, list[Sinks | None]]:
        alpha = key_mass(call, batch, layer)
        mine = [h for h in chosen if h.layer == layer.index]
        return {h: s for h, s in _sinks(alpha, batch, layer, threshold, queries).items()
                if h in mine}  # fmt: skip

    def build(sinks: Sinks, named: tuple[HeadId, ...], on: Tensor) -> Edit:
        return Edit("move", Where(heads=named, keys=at(sinks)), where_on(on, beta, 1.0))

    wanted = [x for x in tower.layers if any(h.layer == x.index for h in chosen)]
    found = in_order(model, batch, wanted, choose, build)
    edits = [build(*g) for g in grouped(found)]
    if not edits:
        raise InputError(
            f"no key but the first receives more than {threshold:g} of the mass of those who see "
            f"it, in {len(chosen)} heads"
        )
    params = {"threshold": threshold, "beta": beta, "queries": queries}
    notes = about("act", CITATION, model, batch, params)
    held = {h: s for h, s in found.items() if any(k is not None for k in s)}
    return Recipe(
        tuple(edits),
        model.fingerprint,
        {**notes, "sinks": noted(held), "searched": [str(h) for h in chosen], "accuracy": search},
    )


def _sinks(
    alpha: Tensor, batch: Batch, layer: Layer, threshold: float, queries: int
) -> dict[HeadId, list[Sinks | None]]:
    """The sinks of every head of a layer on every example, from alpha [example, head, key]."""
    out: dict[HeadId, list[Sinks | None]] = {
        HeadId(layer.index, h, layer.tower): [] for h in range(layer.n_heads)
    }
    for b, (prompt, offset) in enumerate(zip(batch.prompts, batch.offsets, strict=True)):
        rows = heavy_keys(
            alpha[b, : layer.n_heads], offset, len(prompt),
            limit=threshold, queries=queries, strict=True, first=1,
        )  # fmt: skip
        for held, row in zip(out.values(), rows, strict=True):
            held.append(row or None)
    return out


def _check(threshold: float, beta: float, queries: int) -> None:
    if not 0 < threshold < 1 or not 0 <= beta <= 1 or queries < 1:
        raise InputError(
            f"threshold lies in (0, 1), beta in [0, 1] and queries is at least 1; got "
            f"{threshold}, {beta} and {queries}"
        )


@dataclass(frozen=True)
class HeadSearch:
    """What calibrating one head at a time does.

    Attributes:
        base: mean accuracy of the model as it is.
        accuracy: mean accuracy with each head calibrated.
        heads: those that raise it, best first.
    """

    base: float
    accuracy: Mapping[HeadId, float]
    heads: tuple[HeadId, ...]


def search_heads(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
    threshold: float = 0.1,
    beta: float = 0.4,
    queries: int = 1,
    target: str = "all",
    batch_size: int = 4,
) -> HeadSearch:
    """Calibrate one head at a time and compare accuracies.

    Args:
        model: the model in hand.
        prompts: labelled prompts: with answers, or with a span of tokens to predict.
        heads: heads to try; those of `layers` if None.
        layers: whose heads; the third to the one before the last if None.
        threshold: as in `make_act`.
        beta: as in `make_act`.
        queries: as in `make_act`.
        target: span of the tokens to predict, for prompts without answer.
        batch_size: prompts at a time.

    Raises:
        InputError: there is no prompt, or one has nothing to predict.
    """
    _check(threshold, beta, queries)
    if not prompts or batch_size < 1:
        raise InputError(f"a search needs prompts and a batch size; got {len(prompts)} prompts")
    tower = token_tower(model)
    tried = heads_of(model, tower, heads, layers, middle(tower))
    order = sorted(prompts, key=len)
    base: list[np.ndarray] = []
    correct: dict[HeadId, list[np.ndarray]] = {h: [] for h in tried}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        # Sinks are those of the question; the answers appended do not take part.
        data = sorted(zip(part, with_targets(part, target), strict=True), key=lambda x: len(x[1]))
        run = [p for _, p in data]
        batch = model.batch([p for p, _ in data], side="left")
        alpha = read(model, batch, {"alpha": KeyMass()}, tower=tower.name)["alpha"].values
        base.append(outcome(model, run, batch_size=len(run)).correct)
        for i, layer in enumerate(tower.layers):
            found = _sinks(alpha[:, i], batch, layer, threshold, queries)
            for head in (h for h in found if h in correct):
                edits = [
                    Edit("move", Where(heads=named, keys=at(sinks)), where_on(on, beta, 1.0))
                    for sinks, named, on in grouped({head: found[head]})
                ]
                done = outcome(model, run, Recipe(tuple(edits)), batch_size=len(run)).correct \
                    if edits else base[-1]  # fmt: skip
                correct[head].append(done)
    plain = float(np.concatenate(base).mean())
    accuracy = {h: float(np.concatenate(x).mean()) for h, x in correct.items()}
    better = sorted((h for h in tried if accuracy[h] > plain), key=lambda h: (-accuracy[h], h))
    return HeadSearch(plain, accuracy, tuple(better))
