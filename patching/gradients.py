"""One forward and one backward of a run, with what gradient methods read from them.

The forward is the model's own, under whichever attention it was loaded with. Its graph begins at
the input of the first block, so weights get no gradients and cost no memory; the gradient at each
site is the full derivative of the metric, through everything after it. A metric gives one number
per example and examples do not meet in a forward, so the gradient of their sum is every example's
own gradient.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.replay import Replay
from interp.seam.blocks import on_input, on_output

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.calls import AttnCall
    from interp.seam.structure import Layer
    from patching.pairs import PairBatch


@dataclass(frozen=True)
class Trace:
    """Activations of one run, or the gradients of a metric with respect to them.

    Mappings are by attention module; q, k and v are empty where they are not reached.

    Attributes:
        streams: residual stream [batch, pos, d_model] at the input of each block, and after the
            last one.
        z: input of the output projection, [batch, pos, head, d_v].
        mixed: what the attention kernel put out, of the same shape; z unless something such as a
            gate stands between them.
        written: output of the projection, [batch, pos, d_model].
        q: [batch, head, pos, d_qk], after rotation.
        k: [batch, kv_head, pos, d_qk], after rotation.
        v: [batch, kv_head, pos, d_v].
    """

    streams: Mapping[int, Tensor]
    z: Mapping[str, Tensor]
    mixed: Mapping[str, Tensor]
    written: Mapping[str, Tensor]
    q: Mapping[str, Tensor]
    k: Mapping[str, Tensor]
    v: Mapping[str, Tensor]


def trace(run: Replay, *, start: Tensor | None = None) -> tuple[Trace, Tensor]:
    """Run the batch of a kept run again; in gradient mode, with a graph from the first block on.

    Args:
        run: names the model, tower and batch.
        start: residual stream at the first block [batch, pos, d_model]; the model's own if None.

    Returns:
        The activations, and the logits [batch, d_vocab] at the last token.
    """
    hf = run.model.hf
    seen = Trace({}, {}, {}, {}, {}, {}, {})
    mine = {layer.name for layer in run.tower.layers}

    def stream(i: int) -> Any:
        def change(x: Tensor) -> Tensor | None:
            new = None
            if i == 0 and (start is not None or torch.is_grad_enabled()):
                new = (x if start is None else start.to(x)).detach().clone()
                new = new.requires_grad_(torch.is_grad_enabled())
            seen.streams[i] = x if new is None else new  # type: ignore[index]
            return new

        return change

    def kernel(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        if name in mine:
            for place, x in zip((seen.q, seen.k, seen.v), (q, k, v), strict=True):
                place[name] = x  # type: ignore[index]

    def mixed(call: "AttnCall") -> Tensor | None:
        return _through(seen.mixed, call.name, call.z) if call.name in mine else None

    def projected(layer: "Layer", z: Tensor) -> Tensor | None:
        return _through(seen.z, layer.name, z) if layer.name in mine else None

    def written(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.written[name] = output  # type: ignore[index]

        return hook

    with ExitStack() as stack:
        for i, name in enumerate(run.blocks):
            stack.callback(on_input(hf.get_submodule(name), stream(i)))
        stack.callback(on_output(hf.get_submodule(run.blocks[-1]), stream(len(run.blocks))))
        for layer in run.tower.layers:
            projection = hf.get_submodule(layer.projection)
            stack.callback(projection.register_forward_hook(written(layer.name)).remove)
        stack.enter_context(run.model.observe_output(projected))
        stack.enter_context(run.model.observe(mixed, inputs=kernel))
        stack.enter_context(frozen(run.model))
        logits = _last_logits(hf, run.batch.inputs())
    return seen, logits


def _through(place: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Lead the graph through a tensor of our own, so that its gradient can be asked for."""
    own = x.clone()
    place[name] = own  # type: ignore[index]
    return own


def backward(seen: Trace, score: Tensor, *, keep: bool = False) -> Trace:
    """Gradients of a score, summed over examples, with respect to every activation of a trace.

    Args:
        seen: the activations.
        score: [batch], computed from the logits of the same run.
        keep: keep the graph for further derivatives.

    Raises:
        InputError: the score does not depend on the activations smoothly.
    """
    if not score.requires_grad:
        raise InputError(
            "gradient methods need a metric with a gradient; this one counts or ranks",
            hint="choose logit-difference, logit or log-prob",
        )
    every = [(f.name, n, x) for f in fields(seen) for n, x in getattr(seen, f.name).items()]
    grads = torch.autograd.grad(
        score.sum(), [x for *_, x in every], retain_graph=keep, allow_unused=True
    )
    out: dict[str, dict[Any, Tensor]] = {f.name: {} for f in fields(seen)}
    for (site, name, x), grad in zip(every, grads, strict=True):
        out[site][name] = torch.zeros_like(x) if grad is None else grad
    return Trace(**out)


def gradients(batch: "PairBatch", run: Replay, *, start: Tensor | None = None) -> Trace:
    """Gradients of the pairs' metric in a run of one of their prompts; see `trace`."""
    with torch.enable_grad():
        seen, logits = trace(run, start=start)
        return backward(seen, batch.score(logits))


def check_slope(batch: "PairBatch", run: Replay) -> None:
    """Refuse a metric that compares with the very run in which its gradient would be taken.

    Raises:
        InputError: the gradient is zero by definition.
    """
    if batch.metric.compares and run is batch.clean:
        raise InputError(
            f"metric {batch.metric.name!r} is smallest in the clean run, where its gradient is "
            f"zero: nothing can be read from it",
            hint="use direction=denoise, or a metric such as logit-difference",
        )


def _last_logits(hf: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    known = inspect.signature(hf.forward).parameters
    wanted: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
    out = hf(**inputs, **{n: x for n, x in wanted.items() if n in known})
    logits = out.logits if hasattr(out, "logits") else out[0]
    last: Tensor = logits[:, -1] if logits.dim() == 3 else logits
    return last if last.dtype == torch.float64 else last.float()


@contextmanager
def frozen(model: "Model") -> Iterator[None]:
    """No gradients of weights while the context is open."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
