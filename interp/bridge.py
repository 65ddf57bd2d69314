"""The second backend: a model that a TransformerLens `TransformerBridge` has taken over.

A bridge replaces modules of the model in place. What that does to attention differs by family,
and is measured at load, layer by layer, never looked up in a list:

- Most families (GPT-2, Llama, Qwen, Gemma, GPT-NeoX, Falcon, BLOOM, MPT, CodeGen, DeepSeek, …) get
  attention written anew, which calls neither transformers' interface nor anything inside the
  original attention module. The plain seam hears nothing there, so these layers are read at
  TransformerLens' own hooks: `hook_pattern` for the pattern, `v.hook_out` for the values, and
  `o.hook_in` for z, before any hook of the user's own.
- Some (OPT, BERT, T5, GPT-J, GPT-Neo) still run the original attention. There TransformerLens fires
  `hook_pattern` only under eager attention and discards what is returned, while the plain seam
  reads and edits the running kernel: it is kept.

The forward is that of `bridge.original_model`, so positions, masks and logits follow Hugging Face's
rules, not those of `bridge(...)`, which derives position ids of its own from left padding. The
tokenizer is the bridge's; TransformerLens may have made it prepend a beginning-of-text token.

Known limits: layers read at hooks materialise their pattern, so there is no long context; values
are shown only where pattern @ values gave z when the layer was measured (not behind MLA or output
gates), and not in cached decoding steps, where the hook sees the newest position alone.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import SiteError, UnsupportedModelError
from interp.example import example_inputs
from interp.model import Model, OutputObserver
from interp.seam.calls import AttnCall, Edited, InputEditor, Observer, WeightEditor
from interp.seam.kernel import Columns
from interp.seam.structure import (
    Layer,
    Structure,
    _Found,
    _is_causal,
    _is_cross,
    _looks_like_attention,
    _related,
    _towers,
    probe,
)


class BridgeModel(Model):
    """A `TransformerBridge` as a `Model`; made by `interp.load(bridge)`.

    Args:
        bridge: the bridge. It stays as it is; hooks live only inside context managers.
        tokenizer: used instead of the bridge's own.
        processor: used instead of the bridge's own.
        example: keyword inputs with which the forward runs, if they cannot be made.

    Attributes:
        bridge: the bridge.
        hf: the Hugging Face model inside it.
    """

    def __init__(
        self,
        bridge: Any,
        tokenizer: Any = None,
        processor: Any = None,
        *,
        example: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            bridge.original_model,
            getattr(bridge, "tokenizer", None) if tokenizer is None else tokenizer,
            getattr(bridge, "processor", None) if processor is None else processor,
            name=str(getattr(bridge.cfg, "model_name", "") or type(bridge.original_model).__name__),
            example=example,
        )
        self.bridge = bridge

    @cached_property
    def _measured(self) -> "tuple[Structure, dict[str, _Site]]":
        inputs = self._example if self._example is not None else example_inputs(self.hf)
        return _measure(self.hf, inputs)

    @cached_property
    def structure(self) -> Structure:
        """Towers and layers, found by forwards of a few tokens."""
        return self._measured[0]

    @contextmanager
    def observe(
        self,
        observer: Observer,
        *,
        columns: Columns | None = None,
        inputs: InputEditor | None = None,
        weights: WeightEditor | None = None,
    ) -> Iterator[None]:
        """Show every attention call to `observer` while the context is open.

        Args:
            observer: sees an `AttnCall`; may return a z that replaces the model's.
            columns: appended to v where a kernel is reached; layers read at hooks have none.
            inputs: may replace q, k and v where a kernel is reached; layers read at hooks, whose
                `d_qk` is None, show none to replace.
            weights: may replace the pattern of layers read at hooks, and of those of the plain
                seam that compute it by softmax.
        """
        _, sites = self._measured
        with ExitStack() as stack:
            if len(sites) < len(self.structure.layers):
                stack.enter_context(
                    super().observe(observer, columns=columns, inputs=inputs, weights=weights)
                )
            for site in sites.values():
                edit = None if weights is None else functools.partial(weights, site.name)
                stack.enter_context(_heard(site.component, site.shown_to(observer), edit))
            yield

    @contextmanager
    def observe_output(self, observer: OutputObserver) -> Iterator[None]:
        """Show the input of every output projection (`o_in`) while the context is open.

        Args:
            observer: called as observer(layer, o_in [batch, pos, head, d_v]); may return a
                replacement of the same shape, or None.

        Raises:
            SiteError: the bridge computes per-head results and so passes its projections by.
        """
        for site in self._measured[1].values():
            if getattr(site.component.config, "use_attn_result", False):
                raise SiteError(
                    f"the output projections of {self.name} must run; its bridge has "
                    f"use_attn_result on and multiplies by their weights itself",
                    hint="bridge.set_use_attn_result(False)",
                )
        with super().observe_output(observer):
            yield


Heard = Callable[[Tensor, Tensor | None, Tensor], Tensor | None]
"""Given pattern [batch, head, query, key], raw values or None, and raw z; a new z or None."""


@dataclass(frozen=True)
class _Site:
    """A layer read at TransformerLens' hooks.

    Attributes:
        name: qualified name of the attention component inside the Hugging Face model.
        component: that component.
        d_v: size of one head's z.
        layout: key of `_LAYOUTS`: how `v.hook_out` lays values out; None where not to be shown.
    """

    name: str
    component: Any
    d_v: int
    layout: str | None

    def shown_to(self, observer: Observer) -> Heard:
        """What hears the hooks and shows a call to an observer."""

        def heard(pattern: Tensor, values: Tensor | None, z: Tensor) -> Tensor | None:
            v = None
            if self.layout is not None and values is not None:
                v = _LAYOUTS[self.layout](values, self.d_v)
                # A decoding step projects the newest position only; the others are in the cache.
                v = v if v is not None and v.shape[2] == pattern.shape[-1] else None
            z = _per_head(z, pattern)
            call = AttnCall(
                self.name, self.component, None, None, v, z, pattern=pattern, how="pattern"
            )
            new = observer(call)
            return new.z if isinstance(new, Edited) else new

        return heard


def _flat(v: Tensor, d_v: int) -> Tensor | None:
    if v.dim() != 3 or v.shape[-1] % d_v:
        return None
    return v.reshape(*v.shape[:2], -1, d_v).transpose(1, 2)


_LAYOUTS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "batch pos kv_head*d": _flat,
    "batch pos kv_head d": lambda v, d_v: v.transpose(1, 2) if v.dim() == 4 else None,
    "batch kv_head pos d": lambda v, d_v: v if v.dim() == 4 else None,
}


def _per_head(z: Tensor, pattern: Tensor) -> Tensor:
    return z.reshape(pattern.shape[0], pattern.shape[2], pattern.shape[1], -1)


@contextmanager
def _heard(
    component: Any, heard: Heard, edit: Callable[[Tensor], Tensor | None] | None = None
) -> Iterator[None]:
    """Call `heard` once per forward of an attention component, when z reaches its projection.

    Args:
        component: TransformerLens' attention component.
        heard: called with the pattern, raw values and raw z.
        edit: may replace the pattern before it is applied to the values.
    """
    seen: dict[str, Tensor] = {}

    def clear(*_: Any) -> None:
        seen.clear()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    def project(module: nn.Module, args: tuple[Any, ...]) -> Any:
        pattern, values = seen.pop("pattern", None), seen.pop("v", None)
        if pattern is None:
            return None
        z = heard(pattern, values, args[0])
        return None if z is None else (z.reshape(args[0].shape), *args[1:])

    def replace(module: nn.Module, args: tuple[Any, ...]) -> Any:
        new = edit(args[0]) if edit is not None else None
        return None if new is None else (new, *args[1:])

    # Torch's own hooks on the hook points: `bridge.reset_hooks()` and TransformerLens' conversions
    # of shape, which split heads of unequal d_v wrongly, leave them alone.
    with ExitStack() as stack:
        stack.callback(component.register_forward_pre_hook(clear, prepend=True).remove)
        # Before the hook point: all edits of nested observers come first, the outermost's before
        # the others', then the user's own, and every observer sees what is applied to the values.
        stack.callback(component.hook_pattern.register_forward_pre_hook(replace).remove)
        stack.callback(component.hook_pattern.register_forward_hook(keep("pattern")).remove)
        v_out = getattr(getattr(component, "v", None), "hook_out", None)
        if v_out is not None:
            stack.callback(v_out.register_forward_hook(keep("v")).remove)
        stack.callback(component.o.hook_in.register_forward_pre_hook(project).remove)
        yield


@torch.no_grad()
def _heard_once(
    hf: nn.Module, inputs: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> dict[str, tuple[_Found, _Site]]:
    """Run the model once and measure the components whose hooks all fire."""
    names = {module: name for name, module in hf.named_modules()}
    out: dict[str, tuple[_Found, _Site]] = {}

    def measure(name: str, component: Any) -> Heard:
        def heard(pattern: Tensor, values: Tensor | None, z: Tensor) -> None:
            if name in out:
                out[name][0].calls += 1
                return
            if pattern.dim() != 4 or z.shape[-1] % pattern.shape[1]:
                return
            z = _per_head(z, pattern)
            n_heads, d_v = z.shape[2:]
            layout, n_kv = _layout(pattern, values, z)
            n_query, n_key = pattern.shape[-2:]
            original = component.original_component
            found = _Found(
                n_heads, n_kv, None, d_v, "bridge", _is_cross(name, n_query, n_key),
                _is_causal(False, None, pattern, n_query, n_key),
                sinks=isinstance(getattr(original, "sinks", None), Tensor), calls=1,
                projection=names[component.o.original_component],
            )  # fmt: skip
            out[name] = found, _Site(name, component, d_v, layout)

        return heard

    with ExitStack() as stack:
        for name, component in rest.items():
            stack.enter_context(_heard(component, measure(name, component)))
        hf(**inputs)
    return out


def _layout(pattern: Tensor, values: Tensor | None, z: Tensor) -> tuple[str | None, int]:
    """The layout in which pattern @ values is z, if any, and the number of key-value heads."""
    n_heads, d_v = z.shape[2:]
    limit = 1e-4 if z.dtype in (torch.float32, torch.float64) else 3e-2
    limit *= float(z.abs().max().clamp_min(1))
    n_kv = n_heads
    for layout, split in _LAYOUTS.items():
        v = None if values is None else split(values, d_v)
        shape = (pattern.shape[0], pattern.shape[-1], d_v)
        if v is None or (v.shape[0], v.shape[2], v.shape[3]) != shape or n_heads % v.shape[1]:
            continue
        n_kv = v.shape[1]
        expanded = v.float().repeat_interleave(n_heads // n_kv, dim=1)
        gap = (pattern.float() @ expanded).transpose(1, 2) - z.float()
        if float(gap.abs().max()) <= limit:
            return layout, n_kv
    return None, n_kv


def _is_component(module: nn.Module) -> bool:
    """Whether a module is an attention of TransformerLens' with every hook that is read here."""
    o = getattr(module, "o", None)
    return isinstance(getattr(module, "hook_pattern", None), nn.Module) and isinstance(
        getattr(o, "hook_in", None), nn.Module
    )


def _measure(hf: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Structure, dict[str, _Site]]:
    """What the plain seam reaches, and, of the rest, what the bridge's hooks reach.

    Raises:
        UnsupportedModelError: neither reaches any attention.
    """
    found: dict[str, _Found] = {}
    unreached: Mapping[str, str] = {}
    try:
        plain = probe(hf, inputs)
    except UnsupportedModelError as error:
        refusal = error
    else:
        found = {layer.name: _as_found(layer) for layer in plain.layers.values()}
        unreached = plain.unreached
    modules = dict(hf.named_modules())
    rest = {
        name: module
        for name, module in modules.items()
        if _is_component(module) and not any(_related(name, other) for other in found)
    }
    heard = _heard_once(hf, inputs, rest) if rest else {}
    found.update((name, entry) for name, (entry, _) in heard.items())
    if not found:
        raise UnsupportedModelError(str(refusal), hint="load the model itself, not a bridge of it")
    missed = {
        name: type(module).__name__
        for name, module in modules.items()
        if _looks_like_attention(module)
    }
    missed = {n: c for n, c in {**missed, **unreached}.items() if not _covered(n, found)}
    sites = {name: site for name, (_, site) in heard.items()}
    return Structure(_towers(hf, found), missed), sites


def _covered(name: str, found: Mapping[str, _Found]) -> bool:
    return any(_related(name, other) for other in found)


def _as_found(layer: Layer) -> _Found:
    return _Found(
        layer.n_heads, layer.n_kv_heads, layer.d_qk, layer.d_v, layer.reached, layer.cross,
        layer.causal, layer.sinks, layer.calls, projection=layer.projection,
    )  # fmt: skip
