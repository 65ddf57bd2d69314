"""Attribution patching: the effect of patching each head, to first order, from one backward.

    AtP(n) = Σ_pos,feature (a_src(n) − a_dst(n)) · ∂m/∂a(n), the gradient taken in the dst run

dst is the run that would be patched: clean for noising, corrupted for denoising; the sign is that
of the exact effect m(patched) − m(base). A patch of q or k acts through the softmax, whose
gradient vanishes where it is saturated; with `qk_fix` that step is computed exactly instead:

    Σ_query,key ΔA · ∂m/∂A,   ∂m/∂A_ij = v_j · ∂m/∂z_i

and only the way from z to the metric stays linear. Range unbounded, in units of the metric. An
estimate: saturation and cancellation make it miss heads, so the top is measured by default.

Sources: Nanda 2023, "Attribution patching"; Syed et al. 2310.10348; Kramár et al. 2403.00745,
sections 3.1 (QK fix) and appendix (keys one position at a time).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.recipe.attend import scores_of, softmax_of
from interp.replay import Replay
from interp.scores import HeadScores
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer
from patching.effects import table
from patching.engine import DIRECTIONS, base_run
from patching.gradients import Trace, check_slope, gradients
from patching.method import METHODS, Method
from patching.pairs import PairBatch, Pairs
from patching.references import other_run
from patching.verify import verified

Progress = Callable[[int, int], None]
PORTS = ("z", "q", "k", "v")


@METHODS.register("atp")
@dataclass(frozen=True)
class AttributionPatching(Method):
    """First-order estimate of each head's patch effect from one forward and backward.

    Attributes:
        site: `z`, `q`, `k` or `v`; k and v are scored per key-value head.
        direction: `noise` or `denoise`.
        qk_fix: for q and k, compute the change of the pattern exactly.
        joint_keys: with `qk_fix`, change all keys of a head at once, as its exact patch does; else
            one position at a time and add up, as published.
        verify: how many top heads, and how many random others, to measure exactly; 0 for none.
    """

    site: str = "z"
    direction: str = "noise"
    qk_fix: bool = True
    joint_keys: bool = True
    verify: int = 10

    name: ClassVar[str] = "atp"
    summary: ClassVar[str] = "estimate patch effects from one gradient, pattern changes exactly"
    citation: ClassVar[str] = "Kramar et al. 2024, arXiv 2403.00745, sections 2.2 and 3.1"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {"site": PORTS, "direction": DIRECTIONS}
    least: ClassVar[Mapping[str, int]] = {"verify": 0}
    exact: ClassVar[bool] = False

    def scores(self, pairs: Pairs, *, progress: Progress | None = None) -> HeadScores:
        """See `Method`.

        Raises:
            InputError: an unknown direction or site, a metric without gradient, or a site that is
                not reached on this model.
        """
        check_choice("site", self.site, PORTS)

        def of(batch: PairBatch) -> Float[Tensor, "batch head"]:
            run = base_run(batch, self.direction)
            check_slope(batch, run)
            return self.estimate(pairs, batch, gradients(batch, run))

        params = {
            "site": self.site, "direction": self.direction, "qk_fix": self.qk_fix,
            "joint_keys": self.joint_keys,
        }  # fmt: skip
        out = estimates(self.name, pairs, of, self.site, self.direction, params, progress)
        return verified(out, pairs, self.verify)

    def estimate(self, pairs: Pairs, batch: PairBatch, slope: Trace) -> Float[Tensor, "batch head"]:
        """Estimates of a batch from gradients in the run that would be patched."""
        parts = []
        for layer in pairs.model.tower(pairs.tower).layers:
            if self.site in ("z", "v") or not self.qk_fix:
                parts.append(plain(batch, self.direction, self.site, layer, slope))
            elif self.site == "k" and not self.joint_keys:
                parts.append(one_key_at_a_time(batch, self.direction, layer, slope).sum(-1))
            else:
                parts.append(through_pattern(batch, self.direction, self.site, layer, slope))
        return torch.cat(parts, dim=1)


def plain(
    batch: PairBatch, direction: str, site: str, layer: Layer, slope: Trace
) -> Float[Tensor, "batch head"]:
    """Change of an activation times its gradient, per head."""

    def value(run: Replay) -> Tensor:
        if site == "z":
            return run.kept[layer.name].z.transpose(1, 2)
        out: Tensor = getattr(run.call(layer), site)
        return out

    grad: Tensor = getattr(slope, site)[layer.name]
    base, other = base_run(batch, direction), other_run(batch, direction)
    grad = grad.transpose(1, 2) if site == "z" else grad
    return dot(value(other) - value(base), grad).sum(-1)


def through_pattern(
    batch: PairBatch, direction: str, site: str, layer: Layer, slope: Trace
) -> Float[Tensor, "batch head"]:
    """Σ ΔA·∂m/∂A per query or key-value head, the new pattern computed from the other q or k."""
    out = []
    for group in _groups(batch, direction, layer, slope):
        call = replace(group.base, **{site: getattr(group.other, site)})
        change = _pattern(call, group.heads) - _pattern(group.base, group.heads)
        out.append((change * group.slope).sum((-2, -1)))
    return torch.cat(out, dim=1) if site == "q" else torch.stack([x.sum(1) for x in out], dim=1)


def one_key_at_a_time(
    batch: PairBatch, direction: str, layer: Layer, slope: Trace
) -> Float[Tensor, "batch kv_head pos"]:
    """Estimate of patching the key of each single position, the softmax exact.

    A new key t changes one column of the scores. With w_i the new weight of t and M_i the mean of
    ∂m/∂A_is over the other keys s under the old pattern, Σ_s ΔA_is·∂m/∂A_is is
    (w_i − A_it)(∂m/∂A_it − M_i): O(pos²) for all t.
    """
    out = []
    for group in _groups(batch, direction, layer, slope):
        old, visible = _scores(group.base, group.heads)
        new, _ = _scores(replace(group.base, k=group.other.k), group.heads)
        sinks = None if group.base.sinks is None else group.base.sinks[group.heads]
        out.append(column_changes(old, new, visible, group.slope, sinks).sum((1, 2)))
    return torch.stack(out, dim=1)


@dataclass(frozen=True)
class _Group:
    """Query heads that share keys, and ∂m/∂A of them [batch, head, query, key]."""

    base: AttnCall
    other: AttnCall
    heads: list[int]
    slope: Tensor


def _groups(batch: PairBatch, direction: str, layer: Layer, slope: Trace) -> Iterator[_Group]:
    """One group at a time, so that few patterns are held; ∂m/∂A_ij = v_j · ∂m/∂z_i."""
    base, other = base_run(batch, direction).call(layer), other_run(batch, direction).call(layer)
    assert base.v is not None
    size = base.n_heads // base.v.shape[1]
    grad, v = (x.to(wide(x)) for x in (slope.mixed[layer.name].transpose(1, 2), base.v))
    for kv in range(v.shape[1]):
        heads = list(range(kv * size, (kv + 1) * size))
        yield _Group(base, other, heads, grad[:, heads] @ v[:, kv : kv + 1].mT)


def column_changes(
    old: Float[Tensor, "batch head query key"],
    new: Float[Tensor, "batch head query key"],
    visible: Tensor,
    g: Float[Tensor, "batch head query key"],
    sinks: Tensor | None,
) -> Float[Tensor, "batch head query key"]:
    """Σ_s ΔA_is·G_is for each row i and each column t whose score alone goes from old to new.

    Sums over the other keys are made without subtracting from the whole: in a saturated row, which
    is what this is for, one minus the largest weight has no digits left.

    Args:
        old: masked scores.
        new: masked scores with every key changed.
        visible: which keys each row sees.
        g: ∂m/∂A.
        sinks: [head] learned sink logits, or None.
    """
    visible = visible.expand_as(old)
    rest = None if sinks is None else sinks.to(old)[None, :, None, None]
    every = torch.logsumexp(old, dim=-1, keepdim=True)
    every = every if rest is None else torch.logaddexp(every, rest.expand_as(every))
    a = (old - every).exp() * visible
    others = _others(a) + (0 if rest is None else (rest - every).exp())
    mean = _others(a * g) / others.clamp_min(torch.finfo(a.dtype).tiny)
    weight = torch.sigmoid(new - every - others.log())
    return ((weight - a) * (g - mean)).masked_fill(~visible, 0.0)


def _others(x: Tensor) -> Tensor:
    """Sum over the last axis without the element itself, without subtracting it."""
    zero = torch.zeros_like(x[..., :1])
    before = torch.cat([zero, x[..., :-1].cumsum(-1)], dim=-1)
    after = torch.cat([x[..., 1:].flip(-1).cumsum(-1).flip(-1), zero], dim=-1)
    return before + after


def _scores(call: AttnCall, heads: list[int]) -> tuple[Tensor, Tensor]:
    assert call.q is not None and call.k is not None
    dtype = wide(call.q)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), z=call.z.to(dtype))
    return scores_of(call, heads, slice(0, call.n_query))


def _pattern(call: AttnCall, heads: list[int]) -> Tensor:
    return softmax_of(call, heads, slice(0, call.n_query), *_scores(call, heads))


def wide(x: Tensor) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Product summed over the last axis, in float64 where the device has it."""
    return (a.to(wide(a)) * b.to(wide(a))).sum(-1)


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is none of the known ones.

    Raises:
        InputError: it is not.
    """
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def estimates(
    method: str,
    pairs: Pairs,
    of: Callable[[PairBatch], Float[Tensor, "batch head"]],
    site: str,
    direction: str,
    params: dict[str, object],
    progress: Progress | None = None,
) -> HeadScores:
    """A table of estimates, batch by batch."""
    check_choice("direction", direction, DIRECTIONS)
    granularity = "kv" if site in ("k", "v") else "query"
    units = tuple(
        HeadId(x.index, h, x.tower)
        for x in pairs.model.tower(pairs.tower).layers
        for h in range(x.n_kv_heads if granularity == "kv" else x.n_heads)
    )
    n = len(pairs.pairs)
    out = np.zeros((n, len(units)))
    clean, corrupted = np.zeros(n), np.zeros(n)
    done = 0
    for places, batch in pairs.batches():
        clean[places] = batch.score(batch.clean.logits).cpu()
        corrupted[places] = batch.score(batch.corrupted.logits).cpu()
        out[places] = of(batch).detach().cpu().numpy()
        done += len(places)
        if progress is not None:
            progress(done, n)
    scores = table(
        f"{method}.{direction}", pairs.model, pairs, units, out, clean, corrupted,
        params=params, granularity=granularity,
    )  # fmt: skip
    return replace(scores, direction="lower" if direction == "noise" else "higher")
