"""Temperature of attention, per head or for all, and sharpening that grows with the row.

    A = softmax(scores / T)                         below 1 sharpens, above 1 flattens
    A = softmax(scores·(1 + c·log n) / T)           n = 1-based place of the query

T is TempScale (Zhou et al., arXiv 2410.24200), which puts one T on every head of an encoder. The
second form is the position-aware part of selective self-attention (Zhang et al., arXiv 2411.12892),
where c = exp(−exp(2)) ≈ 6e-4 before training. n counts tokens of the prompt without padding and
goes on through the produced ones, whatever the cache; the published code counts the rows of the
chunk.

log n is taken in steps: exact for the first places, then within `step` of log n, so that scores are
scaled to within c·step. The last step holds for all places beyond `longest`.

At site `scores` rows of the edited heads are computed anew. At site `q` the query is divided
instead, which keeps the model's own kernel; the two are equal unless the model soft-caps scores.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heads.makers import Inputs, maker
from heads.makers.shared import about, heads_of, token_tower
from interp.errors import InputError
from interp.headid import HeadId
from interp.recipe import Edit, Positions, Recipe, Where
from interp.recipe.where import read_heads

if TYPE_CHECKING:
    from interp.model import Model

CITATION = "Zhou et al. 2024, arXiv 2410.24200; Zhang et al. 2024, arXiv 2411.12892"
_END = 1 << 40


@maker("temperature", summary="sharpen or flatten attention", citation=CITATION)
def make_temperature(
    model: "Model",
    inputs: Inputs | None = None,
    *,
    temperature: float | Sequence[float] = 0.9,
    heads: Sequence[HeadId | str] | None = None,
    layers: Sequence[int] | int | None = None,
    log_n: float = 0.0,
    step: float = 0.05,
    longest: int = 32768,
    site: str = "scores",
) -> Recipe:
    """Heads at another temperature; for any prompts.

    Args:
        model: the model in hand.
        inputs: not looked at.
        temperature: one for all, or one for each of the named heads.
        heads: heads concerned; all of `layers` if None.
        layers: whose heads; every layer if None.
        log_n: c above; 0 has the same temperature everywhere.
        step: how far log n may be off.
        longest: places beyond are scaled as the last one.
        site: `scores`, or `q` for the model's own kernel.

    Raises:
        InputError: a temperature is not positive, or they are not one per head.
        HeadIdError: a head or layer outside the model.
    """
    tower = token_tower(model)
    every = heads is None and layers is None
    named = heads_of(model, tower, heads, layers, range(tower.n_layers))
    if site not in ("scores", "q"):
        raise InputError(f"a temperature acts at scores or q; got {site!r}")
    if log_n < 0 or not step > 0 or longest < 1:
        raise InputError(
            f"log_n must be at least 0, step above 0 and longest at least 1; got {log_n}, {step} "
            f"and {longest}"
        )
    t = _temperatures(temperature, heads)
    values = t.tolist() if isinstance(t, Tensor) else t
    edits = []
    for queries, factor in _steps(log_n, step, longest):
        strength = t / factor if site == "scores" else factor / t
        where = Where(tower=tower.name, queries=queries) if every and not isinstance(t, Tensor) \
            else Where(heads=named, queries=queries)  # fmt: skip
        op = "temperature" if site == "scores" else "scale"
        edits.append(Edit(op, where, strength, site=site))
    params = {"temperature": values, "log_n": log_n, "step": step, "longest": longest, "site": site}
    notes = about("temperature", CITATION, model, None, params)
    return Recipe(tuple(edits), model.fingerprint, {**notes, "heads": [str(h) for h in named]})


def _temperatures(
    temperature: float | Sequence[float], heads: Sequence[HeadId | str] | None
) -> Tensor | float:
    values = [temperature] if isinstance(temperature, int | float) else list(temperature)
    if not values or not all(0 < t < math.inf for t in values):
        raise InputError(f"a temperature must be above 0; got {temperature}")
    if isinstance(temperature, int | float):
        return float(temperature)
    n = 0 if heads is None else len(read_heads(heads))
    if len(values) != n:
        raise InputError(
            f"temperatures are given one per named head; got {len(values)} for {n} named heads"
        )
    return torch.tensor(values)


def _steps(c: float, step: float, longest: int) -> list[tuple[Positions, float]]:
    """Places and the factor on their scores, 1 + c·log n."""
    if c == 0:
        return [(Positions.all(), 1.0)]
    out, first = [], 1
    while first <= longest:
        last = min(longest, max(first, math.floor(first * math.exp(2 * step))))
        middle = (math.log(first) + math.log(last)) / 2
        stop = _END if last == longest else last
        out.append((Positions(window=(first - 1, stop)), 1 + c * middle))
        first = last + 1
    return out
