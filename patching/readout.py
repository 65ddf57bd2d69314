"""From the residual stream that leaves the last block to a metric, without a forward.

The module between the last block and the unembedding is found by letting the model's own forward
run with all blocks answering from memory. Where it and the unembedding alone make the logits, a
metric that is linear in them needs few rows of the unembedding; elsewhere (soft-capped logits,
other metrics) the model's own forward finishes the run.
"""

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import SiteError
from interp.model import Model
from interp.replay import Replay
from patching.pairs import PairBatch

_TAILS: "WeakKeyDictionary[Model, Tail]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Tail:
    """What follows the last block.

    Attributes:
        norm: the module between last block and unembedding, or None.
        head: the unembedding.
        plain: whether logits = head(norm(stream)), nothing else.
    """

    norm: nn.Module | None
    head: nn.Module | None
    plain: bool


@dataclass(frozen=True)
class Norm:
    """A norm as a linear map at a fixed scale: x to scale·gain⊙(x − mean), plus bias.

    Attributes:
        gain: [d_model].
        centred: whether the mean over d_model is removed.
        bias: [d_model] or None.
    """

    gain: Tensor
    centred: bool
    bias: Tensor | None

    def direct(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The linear map at scale 1, without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * self.gain.to(x)


def norm_of(module: nn.Module, width: int) -> Norm:
    """The gain, bias and centring of a norm, read off what it does.

    Raises:
        SiteError: it is not a gain on the normalised vector.
    """
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    like = weight if isinstance(weight, Tensor) else torch.zeros(width)
    ones = torch.ones(1, 1, width, device=like.device, dtype=like.dtype)
    ones[..., ::2] *= -1
    with torch.no_grad():
        add = bias if isinstance(bias, Tensor) else None
        # Mean 0 (d_model is even) and norm known: what is left is the gain.
        gain = ((module(ones) - (0 if add is None else add)) * ones)[0, 0]
        shifted = module(ones + 3)
        centred = bool(torch.allclose(shifted, module(ones), atol=1e-3))
        norm = Norm(gain, centred, add)
        scale_at(norm, module, like.new_tensor(range(width)).sin()[None])
    return norm


def scale_at(
    norm: Norm, module: nn.Module, x: Float[Tensor, "batch d_model"]
) -> Float[Tensor, " batch"]:
    """The factor by which a norm scales these vectors.

    Raises:
        SiteError: the module does more than that.
    """
    out = module(x[:, None])[:, 0] - (0 if norm.bias is None else norm.bias)
    direct = norm.direct(x)
    scale: Tensor = (out * direct).sum(-1) / (direct * direct).sum(-1).clamp_min(1e-30)
    wrong = float((out - scale[:, None] * direct).abs().max())
    if wrong > 1e-3 * float(out.abs().max()) + 1e-6:
        raise SiteError(f"{type(module).__name__} is no gain on a normalised vector")
    return scale


@torch.no_grad()
def tail_of(base: Replay) -> Tail:
    """What follows the last block of a model, found once."""
    if base.model not in _TAILS:
        _TAILS[base.model] = _find(base)
    return _TAILS[base.model]


def _find(base: Replay) -> Tail:
    hf = base.model.hf
    get = getattr(hf, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        return Tail(None, None, False)
    resid = base.leaving(-1)[:, -1]
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, args[0], output))

    handles = [
        m.register_forward_hook(hook)
        for m in hf.modules()
        if next(m.children(), None) is None
    ]  # fmt: skip
    try:
        base.finish(resid[None])
    finally:
        for handle in handles:
            handle.remove()
    final = [x for m, x, _ in seen if m is head]
    if not final:
        return Tail(None, None, False)
    wanted = final[-1][:, -1]
    plain = torch.allclose(head(wanted).float(), base.logits.float(), atol=1e-4, rtol=1e-4)
    if torch.equal(wanted, resid):
        return Tail(None, head, plain)
    for module, x, out in seen:
        if module is head or x.shape[-1] != resid.shape[-1] or x.dim() != 3:
            continue
        if torch.equal(x[:, -1], resid) and torch.equal(out[:, -1], wanted):
            return Tail(module, head, plain)
    return Tail(None, head, False)


@dataclass(frozen=True, eq=False)
class Readout:
    """The metric as a function of the stream at the last token.

    Attributes:
        base: the kept run.
        batch: its pairs.
        tail: what follows the last block.
        resid: [batch, d_model] the stream that leaves the last block.
        direction: [batch, d_model] gradient of the metric with respect to the normalised stream,
            or None where the metric is not linear in it.
        offset: [batch] the metric at a normalised stream of zero.
    """

    base: Replay
    batch: PairBatch
    tail: Tail
    resid: Tensor
    direction: Tensor | None
    offset: Tensor

    def effect(self, delta: Float[Tensor, "copy batch d_model"]) -> Float[Tensor, "copy batch"]:
        """m(stream + delta) − m(stream)."""
        resid = self.resid[None] + delta.to(self.resid)
        if self.direction is None:
            floor = self.batch.score(self.base.logits)
            return self.batch.score(self.base.finish(resid)) - floor
        after = self._normalised(resid) - self._normalised(self.resid[None])
        return (after * self.direction).sum(-1)

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.tail.norm is None else self.tail.norm(x)

    def share(self, vector: Float[Tensor, "part batch d_model"]) -> Float[Tensor, "part batch"]:
        """What each part of the stream adds to the metric, the norm's scale frozen.

        Raises:
            SiteError: the metric is not linear in the normalised stream.
        """
        return (self._direct(vector) * self._linear()).sum(-1)

    def constant(self) -> Float[Tensor, " batch"]:
        """What the biases of the final norm and the unembedding add."""
        bias = 0 if self.tail.norm is None else norm_of(
            self.tail.norm, self.resid.shape[-1]
        ).bias  # fmt: skip
        if bias is None or isinstance(bias, int):
            return self.offset
        return self.offset + (bias.to(self.resid) * self._linear()).sum(-1)

    def _linear(self) -> Tensor:
        if self.direction is None:
            raise SiteError(
                f"the logits of {self.base.model.name} are not linear in the normalised stream",
                hint="use the direct effect, which is exact on any model",
            )
        return self.direction

    def _direct(self, vector: Tensor) -> Tensor:
        module = self.tail.norm
        if module is None:
            return vector
        norm = norm_of(module, vector.shape[-1])
        return norm.direct(vector) * scale_at(norm, module, self.resid)[:, None]


@torch.no_grad()
def readout(base: Replay, batch: PairBatch) -> Readout:
    """The readout of a kept run."""
    tail = tail_of(base)
    resid = base.leaving(-1)[:, -1]
    found = Readout(base, batch, tail, resid, None, torch.zeros(len(resid), device=resid.device))
    if not (tail.plain and batch.metric.linear and tail.head is not None):
        return found
    with torch.enable_grad():
        logits = torch.zeros_like(base.logits).requires_grad_()
        (slope,) = torch.autograd.grad(batch.score(logits).sum(), logits)
    used = slope.any(0).nonzero()[:, 0]  # two tokens per example for a difference of logits
    weight = tail.head.weight
    assert isinstance(weight, Tensor)
    direction = slope[:, used] @ weight[used].to(slope)
    bias = getattr(tail.head, "bias", None)
    offset = found.offset
    if isinstance(bias, Tensor):
        offset = slope[:, used] @ bias[used].to(slope)
    return replace(found, direction=direction.to(resid), offset=offset)
