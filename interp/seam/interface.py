"""The attention function that transformers looks up by name, observed.

Every attention module calls `ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)`. While a seam is
open, each name a model uses ("sdpa", "eager", …) leads to a wrapper that passes foreign modules
through and, for the modules of its own model, runs the implementation the model had and shows the
call to an observer.

Names are kept rather than new ones registered: masks are built by the same name, and some models
branch on it, so under a new name a model may silently lose its mask or take another path. With
the names kept there is no mask twin to register, no configuration to restore, and the sub-models
of a vision-language model need no treatment of their own.

Wrappers nest (an inner seam delegates to the outer one) and may be closed in any order.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from interp.errors import SiteError
from interp.seam.calls import AttnCall, Edited, InputEditor, Observer
from interp.seam.kernel import Columns, KernelTap, additive
from interp.seam.masks import by_argument, from_padding, within_sequences

_LOCK = threading.RLock()


@contextmanager
def observed(
    names: Mapping[nn.Module, str],
    observer: Observer,
    *,
    columns: Columns | None = None,
    inputs: InputEditor | None = None,
) -> Iterator[None]:
    """Show every attention call of some modules to an observer.

    Where seams are nested, all edits of q, k and v come first, the outermost's before the inner
    ones', so that every observer sees what the kernel receives.

    Args:
        names: the modules of the model and their qualified names.
        observer: called once per attention call; may return a new z.
        columns: columns to append to v in the model's own kernel; see `interp.seam.kernel`.
        inputs: may replace q, k and v before the kernel runs.
    """
    by_id = {id(module): name for module, name in names.items()}
    opened: list[_Wrapper] = []
    try:
        with _LOCK:
            for interface, name in _used(names):
                opened.append(_Wrapper(interface, name, by_id, observer, columns, inputs))
        yield
    finally:
        with _LOCK:
            for wrapper in reversed(opened):
                wrapper.close()


def _used(names: Mapping[nn.Module, str]) -> list[tuple[AttentionInterface, str]]:
    """Every (interface, implementation name) that the modules may look up."""
    interfaces: dict[int, AttentionInterface] = {
        id(ALL_ATTENTION_FUNCTIONS): ALL_ATTENTION_FUNCTIONS
    }
    for file in {type(module).__module__ for module in names}:
        # A modelling file may declare an interface of its own to override one implementation.
        for value in vars(sys.modules[file]).values() if file in sys.modules else ():
            if isinstance(value, AttentionInterface):
                interfaces[id(value)] = value
    used = {"eager"}
    for module in names:
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if isinstance(implementation, str):
            used.add(implementation)
    return [(i, n) for i in interfaces.values() for n in sorted(used)]


class _Wrapper:
    """Stands in one interface under one name until closed."""

    def __init__(
        self,
        interface: AttentionInterface,
        name: str,
        by_id: Mapping[int, str],
        observer: Observer,
        columns: Columns | None,
        inputs: InputEditor | None,
    ) -> None:
        self.interface, self.name, self.inputs = interface, name, inputs
        self.by_id, self.observer, self.columns = by_id, observer, columns
        self.previous = interface._local_mapping.get(name)
        self.open = True
        interface._local_mapping[name] = self

    def close(self) -> None:
        self.open = False
        local = self.interface._local_mapping
        # Seams closed out of order stay in the chain as pass-throughs until they are on top.
        while isinstance(top := local.get(self.name), _Wrapper) and not top.open:
            if top.previous is None:
                del local[self.name]
            else:
                local[self.name] = top.previous

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        base = self.previous or _original(self.interface, self.name, module)
        name = self.by_id.get(id(module)) if self.open else None
        if name is None:
            return base(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        below = _BELOW.get() == id(module)
        if not below:
            query, key, value = self._edited(module, query, key, value)
        token = _BELOW.set(id(module))
        try:
            with KernelTap(self.columns) as tap:
                out = base(module, query, key, value, attention_mask, *args, **kwargs)
        finally:
            _BELOW.reset(token)
        call = describe(name, module, query, key, value, attention_mask, kwargs, out, tap)
        new = self.observer(call)
        if isinstance(new, Edited):
            z = new.z.reshape(out[0].shape)
            return _EditedOutput((z, new.pattern if below else None, *out[2:]))
        return out if new is None else type(out)((new.reshape(out[0].shape), *out[1:]))

    def _edited(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v after every open seam of this module, the outermost first."""
        if isinstance(self.previous, _Wrapper):
            q, k, v = self.previous._edited(module, q, k, v)
        name = self.by_id.get(id(module)) if self.open else None
        new = self.inputs(name, q, k, v) if self.inputs is not None and name is not None else None
        return (q, k, v) if new is None else new


class _EditedOutput(tuple[Any, ...]):
    """What a wrapper returns whose observer edited the pattern: z and perhaps that pattern."""


_BELOW: "ContextVar[int | None]" = ContextVar("headscope_inner_wrapper", default=None)
"""The module whose call is on its way down the chain of wrappers."""


def reader_above(module: nn.Module) -> bool:
    """Whether an observer further out will read the call that an observer is looking at."""
    return _BELOW.get() == id(module)


def _original(
    interface: AttentionInterface, name: str, module: nn.Module
) -> Callable[..., tuple[Any, ...]]:
    """The implementation the model would have used, had no seam been open."""
    if name in interface._global_mapping:
        return interface._global_mapping[name]  # type: ignore[no-any-return]
    for cls in type(module).__mro__:
        # "eager" lives in the file that defines the forward: soft-caps, sinks and biases differ.
        forward = vars(cls).get("forward")
        scope = getattr(getattr(forward, "__wrapped__", forward), "__globals__", {})
        if "eager_attention_forward" in scope:
            return scope["eager_attention_forward"]  # type: ignore[no-any-return]
    raise SiteError(f"no implementation {name!r} of attention is known for {type(module).__name__}")


def describe(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: Mapping[str, Any],
    out: tuple[Any, ...],
    tap: KernelTap,
) -> AttnCall:
    """The call as a value: from the kernel's arguments, or the returned weights, or rebuilt."""
    z = out[0]
    n_query, n_heads = query.shape[2], query.shape[1]
    if z.dim() == 3:
        z = z.view(*z.shape[:2], n_heads, -1)
    if isinstance(out, _EditedOutput):
        return AttnCall(name, module, query, key, value, z, pattern=out[1], how="pattern")
    if tap.args is not None:
        _, seen_k, _, mask, causal, scale = tap.args
        n_key = seen_k.shape[2]
        if mask is not None and mask.shape[-2] != n_query:
            # One decoded row of grouped heads: the heads of a group were folded into rows.
            mask = mask.reshape(mask.shape[0], -1, 1, mask.shape[-1])
        lse = None if tap.lse is None else tap.lse.reshape(z.shape[0], n_heads, n_query)
        extra = (
            None
            if tap.extra is None
            else tap.extra.reshape(z.shape[0], n_heads, n_query, -1).transpose(1, 2)
        )
        return AttnCall(
            name, module, query, key[:, :, :n_key], value[:, :, :n_key], z,
            scale=scale, mask=mask, causal=causal, lse=lse, extra=extra,
            how="recomputed" if lse is None else "kernel",
        )  # fmt: skip
    scaling = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    weights = out[1] if len(out) > 1 else None
    if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[-2] == n_query:
        sinks = kwargs.get("sinks") if sinks is None else sinks
    if (
        isinstance(weights, Tensor)
        and weights.dim() == 4
        and weights.shape[-2] == n_query
        and not _lacks_sink(weights, sinks)
    ):
        return AttnCall(
            name, module, query, key, value, z,
            scale=scale, mask=_biased(_tensor(attention_mask, n_query), kwargs), softcap=softcap,
            sinks=sinks, pattern=weights, how="pattern",
        )  # fmt: skip
    said = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if said is None else said)
    mask = _tensor(attention_mask, n_query)
    if attention_mask is not None and mask is None:
        mask = from_padding(attention_mask, name)
    elif mask is not None:
        causal = False
    if mask is None or mask is not attention_mask:
        mask, causal = by_argument(mask, query, key, causal, kwargs.get("sliding_window"))
    mask = _biased(within_sequences(mask, query, key, kwargs, name), kwargs)
    return AttnCall(
        name, module, query, key, value, z,
        scale=scale, mask=mask, causal=causal and n_query > 1, softcap=softcap, sinks=sinks,
    )  # fmt: skip


def _lacks_sink(weights: Tensor, sinks: Tensor | None) -> bool:
    """Whether weights were returned as before the sink, which some models apply to z alone."""
    if sinks is None or sinks.dim() != 1:
        return False
    return bool(weights.float().sum(-1).sub(1).abs().lt(1e-6).all())


def _biased(mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask with the position bias that some models add to scores."""
    if not isinstance(bias := kwargs.get("position_bias"), Tensor):
        return mask
    hidden = additive(mask, bias.dtype)
    return bias if hidden is None else bias + hidden


def _tensor(mask: Any, n_query: int) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
