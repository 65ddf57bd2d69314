"""Attention of families that never look their implementation up: watched where they compute it.

Falcon, GPT-J, BLOOM, GPT-Neo, MPT, CodeGen, XGLM and their like call
`scaled_dot_product_attention` or `softmax` inside their attention modules. While a seam is open a
function mode watches those two inside the modules given: the first is a call like any other, the
second yields the pattern that the model itself materialised.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from interp.seam.calls import AttnCall, Edited, InputEditor, Observer, WeightEditor
from interp.seam.kernel import Columns, KernelTap

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.nn.functional.softmax}


def is_pattern(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> bool:
    """Whether a function was a softmax over keys: [batch, head, query, key] or [batch·head, …]."""
    if func not in _SOFTMAX or not isinstance(out, Tensor) or out.dim() not in (3, 4):
        return False
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, out.dim() - 1)


class _Watch(TorchFunctionMode):
    """Hears `softmax` and `scaled_dot_product_attention` and says in which module they ran."""

    def __init__(
        self,
        n_heads: Mapping[str, int],
        columns: Columns | None,
        inputs: InputEditor | None,
        weights: WeightEditor | None,
    ) -> None:
        super().__init__()
        self.n_heads, self.inputs, self.weights = n_heads, inputs, weights
        self.inside: list[str] = []
        self.columns = columns
        self.seen: dict[str, list[tuple[str, Any]]] = {}
        self.busy = False
        self.listening = False

    def start(self) -> None:
        """Listen, if not yet: only while a module runs, since seams may close in any order."""
        if not self.listening:
            self.listening = True
            self.__enter__()

    def stop(self) -> None:
        """Listen no more."""
        if self.listening:
            self.listening = False
            self.inside.clear()
            self.__exit__(None, None, None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not self.inside or self.busy:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            # The tap goes below this mode, so the call inside it is not heard again.
            self.busy = True
            try:
                args, kwargs = self._edited(args, kwargs)
                with KernelTap(self.columns) as tap:
                    out = func(*args, **kwargs)
            finally:
                self.busy = False
            self.seen.setdefault(self.inside[-1], []).append(("call", (tap, out)))
            return out
        out = func(*args, **kwargs)
        if is_pattern(func, args, kwargs, out):
            name = self.inside[-1]
            if self.weights is not None:
                whole = out if out.dim() == 4 else out.view(-1, self.n_heads[name], *out.shape[1:])
                with _unheard():
                    new = self.weights(name, whole)
                out = out if new is None else new.view(out.shape)
            self.seen.setdefault(self.inside[-1], []).append(("pattern", out))
        return out

    def _edited(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The kernel's arguments after this seam's edit of q, k and v."""
        if self.inputs is None:
            return args, kwargs
        given = {**dict(zip(_QKV, args, strict=False)), **kwargs}
        new = self.inputs(self.inside[-1], given["query"], given["key"], given["value"])
        if new is None:
            return args, kwargs
        rest = {name: kwargs[name] for name in kwargs if name not in _QKV}
        return (*new, *args[3:]), rest


_QKV = ("query", "key", "value")


@contextmanager
def _unheard() -> Iterator[None]:
    """What runs here is an observer's own work: no seam that listens now may take it for calls."""
    listening = [m for m in _get_current_function_mode_stack() if isinstance(m, _Watch)]
    before = [(watch, watch.busy) for watch in listening]
    for watch in listening:
        watch.busy = True
    try:
        yield
    finally:
        for watch, busy in before:
            watch.busy = busy


@contextmanager
def watched(
    names: Mapping[nn.Module, str],
    projections: Mapping[str, nn.Module],
    n_heads: Mapping[str, int],
    observer: Observer,
    *,
    columns: Columns | None = None,
    inputs: InputEditor | None = None,
    weights: WeightEditor | None = None,
) -> Iterator[None]:
    """Show the attention calls of some modules to an observer.

    Args:
        names: attention modules and their qualified names.
        projections: name to output projection; its input is z.
        n_heads: name to number of query heads.
        observer: called once per attention call, when the output projection receives z; may
            return a new z.
        columns: columns to append to v where the model's kernel is reached.
        inputs: may replace q, k and v where the kernel is reached.
        weights: may replace the pattern where the module computes it by softmax.
    """
    watch = _Watch(n_heads, columns, inputs, weights)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            watch.start()
            watch.inside.append(name)
            watch.seen.pop(name, None)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if watch.inside and watch.inside[-1] == name:
                watch.inside.pop()
                if not watch.inside:
                    watch.stop()

        return hook

    def project(name: str, module: nn.Module) -> Callable[..., Any]:
        def hook(projection: nn.Module, args: tuple[Any, ...]) -> Any:
            heard = watch.seen.pop(name, [])
            if not heard:
                return None
            call = _describe(name, module, args[0], n_heads[name], heard)
            with _unheard():
                new = observer(call)
            z = new.z if isinstance(new, Edited) else new
            return None if z is None else (z.reshape(args[0].shape), *args[1:])

        return hook

    with ExitStack() as stack:
        # No hook runs after an interrupt from the keyboard.
        stack.callback(watch.stop)
        for module, name in names.items():
            stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            # Who came last listens on top, and so hears what the others' edits have made.
            stack.callback(
                module.register_forward_hook(leave(name), always_call=True, prepend=True).remove
            )
            stack.callback(
                projections[name].register_forward_pre_hook(project(name, module)).remove
            )
        yield


def _describe(
    name: str, module: nn.Module, z: Tensor, n_heads: int, heard: list[tuple[str, Any]]
) -> AttnCall:
    """The last thing heard in a module before its output projection, as a call."""
    kind, what = heard[-1]
    if kind == "pattern":
        if what.dim() == 3:  # [batch·head, query, key]
            what = what.view(-1, n_heads, *what.shape[1:])
        # Windows and two-dimensional images: positions of z may lie along several axes.
        z = z.reshape(what.shape[0], what.shape[2], n_heads, -1)
        return AttnCall(name, module, None, None, None, z, pattern=what, how="pattern")
    tap, _ = what
    q, k, v, mask, causal, scale = tap.args
    z = z.reshape(q.shape[0], q.shape[2], n_heads, -1)
    extra = None if tap.extra is None else tap.extra.transpose(1, 2)
    return AttnCall(
        name, module, q, k, v, z, scale=scale, mask=mask, causal=causal, lse=tap.lse,
        extra=extra, how="recomputed" if tap.lse is None else "kernel",
    )  # fmt: skip
