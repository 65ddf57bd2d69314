"""Which attention layers a model has, found by running it once, without per-model code.

The probe runs a few tokens with a graph. Each attention call's z is replaced by a leaf, so the
first linear layer whose input depends on that leaf is the output projection, whatever gate or
norm stands between, and whatever the projection is called. Modules that look like attention but
are not reached are named, never silently skipped.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp.errors import UnsupportedModelError
from interp.headid import DEFAULT_TOWER, HeadId
from interp.seam.calls import AttnCall
from interp.seam.functions import is_pattern
from interp.seam.interface import observed


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Attributes:
        tower: name of its tower.
        index: 0-based layer of the tower.
        name: qualified name of the attention module.
        projection: qualified name of the output projection.
        n_heads: query heads.
        n_kv_heads: key-value heads; head h reads group h // (n_heads // n_kv_heads).
        d_qk: size of a query or key (None where only the pattern is reached).
        d_v: size of a value, and of one head's z.
        reached: `interface`, `functions` or `bridge`.
        cross: whether keys come from another sequence.
        causal: whether a query sees no later key.
        calls: attention calls in one forward (more than 1: one per window).
        sinks: whether learned sink logits join each row's normaliser.
    """

    tower: str
    index: int
    name: str
    projection: str
    n_heads: int
    n_kv_heads: int
    d_qk: int | None
    d_v: int
    reached: str = "interface"
    cross: bool = False
    causal: bool = True
    calls: int = 1
    sinks: bool = False


@dataclass(frozen=True)
class Tower:
    """A stack of attention layers: `text`, `encoder`, `vision`, `cross` or another.

    Attributes:
        name: how head ids name it.
        layers: its attention layers, by rising index; hybrids leave indices out.
        n_layers: number of layers of the stack, those without attention included.
    """

    name: str
    layers: tuple[Layer, ...]
    n_layers: int

    @property
    def n_heads(self) -> int:
        """Most query heads of any layer."""
        return max(layer.n_heads for layer in self.layers)

    @property
    def heads(self) -> tuple[HeadId, ...]:
        """Every head of the tower, in order."""
        return tuple(
            HeadId(layer.index, h, self.name) for layer in self.layers for h in range(layer.n_heads)
        )


@dataclass(frozen=True)
class Structure:
    """What the probe found.

    Attributes:
        towers: by name.
        unreached: modules that look like attention but that no backend reaches, with their class.
    """

    towers: Mapping[str, Tower]
    unreached: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, Layer]:
        """Every layer by the qualified name of its attention module."""
        return {layer.name: layer for t in self.towers.values() for layer in t.layers}


@dataclass
class _Found:
    """What the probe learned of one attention module."""

    n_heads: int
    n_kv_heads: int
    d_qk: int | None
    d_v: int
    reached: str
    cross: bool
    causal: bool
    sinks: bool = False
    calls: int = 0
    leaf: Tensor | None = None
    n_query: int = 0
    places: int = 0
    projection: str = ""


def probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Structure:
    """Run the model once on `inputs` and find its attention layers.

    Raises:
        UnsupportedModelError: no attention is reached at all.
    """
    found: dict[str, _Found] = {}
    names = {module: name for name, module in model.named_modules()}

    def observer(call: AttnCall) -> Tensor:
        assert call.q is not None and call.k is not None and call.v is not None
        leaf = call.z.detach().requires_grad_()
        entry = found.setdefault(
            call.name,
            _Found(
                call.n_heads, call.k.shape[1], call.q.shape[-1], call.z.shape[-1],
                "interface", _is_cross(call.name, call.n_query, call.k.shape[2]),
                _is_causal(call.causal, call.mask, call.pattern, call.n_query, call.n_key),
                call.sinks is not None,
            ),
        )  # fmt: skip
        entry.calls += 1
        if torch.is_grad_enabled():  # recurrent models run all rounds but the last without
            entry.leaf, entry.n_query = leaf, call.n_query
            # Windows: the projection receives the positions of all calls at once.
            entry.places += leaf.shape[0] * leaf.shape[1]
        return leaf

    with _tracing(model), _projections(model, names, found), observed(names, observer):
        model(**inputs)
    rest = {
        module: name
        for module, name in names.items()
        if _looks_like_attention(module) and not any(_related(name, other) for other in found)
    }
    if rest:
        size = len(next(iter(inputs.values())))
        with _tracing(model), _projections(model, names, found), _listen(rest, found, size):
            model(**inputs)
    if _main_input(model) == "pixel_values":
        # Vision models see fewer keys by pooling their own patches: that is no other sequence.
        for name, entry in found.items():
            entry.cross = entry.cross and _is_cross(name, 0, 0)
    unreached = {name: type(module).__name__ for module, name in rest.items() if name not in found}
    lost = [name for name, entry in found.items() if not entry.projection]
    for name in lost:
        unreached[name] = f"{type(model.get_submodule(name)).__name__} (no output projection)"
        del found[name]
    if not found:
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} is reached; modules that look like it: "
            f"{', '.join(sorted(set(unreached.values()))) or 'none'}",
            hint="pass a TransformerBridge of the model to interp.load",
        )
    return Structure(_towers(model, found), unreached)


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is named attention, owns linear layers, and holds no smaller such module."""

    def named(m: nn.Module) -> bool:
        return re.search(r"attention|attn", type(m).__name__, re.I) is not None and any(
            _is_linear(x) for x in m.modules()
        )

    return named(module) and not any(named(m) for m in module.modules() if m is not module)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and not isinstance(module, nn.Embedding)
        and next(module.children(), None) is None
    )


def _is_cross(name: str, n_query: int, n_key: int) -> bool:
    return re.search(r"cross|encoder_attn|EncDecAttention", name) is not None or n_query != n_key


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _is_causal(
    causal: bool, mask: Tensor | None, pattern: Tensor | None, n_query: int, n_key: int
) -> bool:
    """Whether no query of an unpadded call sees a later key."""
    if causal:
        return True
    if n_query != n_key:
        return False
    if pattern is not None:
        return not bool(pattern.triu(1).any())
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask > -1e29
    if mask.dtype in (torch.float16, torch.bfloat16):
        seen = mask > torch.finfo(mask.dtype).min / 2
    return not bool(seen.broadcast_to(*mask.shape[:-2], n_query, n_key).triu(1).any())


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    """A graph of what depends on z alone: with the weights' it would hold every activation."""
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for p in weights:
            p.requires_grad_(True)


@contextmanager
def _projections(
    model: nn.Module, names: Mapping[nn.Module, str], found: Mapping[str, _Found]
) -> Iterator[None]:
    """Note, for each attention module, the first linear layer whose input depends on its z."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return None
        for entry in found.values():
            if entry.projection or entry.leaf is None:
                continue
            (grad,) = torch.autograd.grad(
                args[0].sum(), entry.leaf, retain_graph=True, allow_unused=True
            )
            if grad is None:
                continue
            # An input of another width mixes heads already: then there is no per-head site. One
            # of another length mixes positions, or has them before the batch.
            width, places = args[0].shape[-1], math.prod(args[0].shape[:-1])
            d_v = entry.d_v or width // entry.n_heads
            fits = width == entry.n_heads * d_v and places == entry.places
            fits = fits and (args[0].dim() != 3 or args[0].shape[1] in (entry.n_query, places))
            entry.projection = names[module] if fits else ""
            entry.d_v = d_v
            entry.leaf = None
        return (args[0].detach(), *args[1:])

    with ExitStack() as stack:
        for module in names:
            if _is_linear(module):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _listen(rest: Mapping[nn.Module, str], found: dict[str, _Found], batch: int) -> Iterator[None]:
    """Find out which of the modules compute attention by softmax or SDPA inside them."""
    from torch.overrides import TorchFunctionMode

    inside: list[str] = []
    by_name = {name: module for module, name in rest.items()}

    def note(
        name: str, out: Tensor, q: Tensor | None, k: Tensor | None, cross: bool, causal: bool
    ) -> Tensor:
        leaf = out.detach().requires_grad_()
        n_heads = out.shape[1] if out.dim() == 4 else _folded_heads(by_name[name], out, batch)
        d_qk = None if q is None else q.shape[-1]
        entry = found.setdefault(
            name,
            _Found(
                n_heads, n_heads if k is None else k.shape[1], d_qk,
                0 if q is None else out.shape[-1], "functions", cross, causal,
            ),
        )  # fmt: skip
        entry.calls += 1
        entry.leaf = leaf
        entry.n_query = out.shape[-2]
        entry.places += math.prod(out.shape[:-1]) // entry.n_heads
        return leaf

    class Ear(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if not inside or not isinstance(out, Tensor):
                return out
            if func is F.scaled_dot_product_attention and out.dim() == 4:
                seen = {**dict(zip(_SDPA, args, strict=False)), **(kwargs or {})}
                q, k = seen["query"], seen["key"]
                cross = _is_cross(inside[-1], q.shape[2], k.shape[2])
                causal = _is_causal(
                    bool(seen.get("is_causal")), seen.get("attn_mask"), None, q.shape[2], k.shape[2]
                )
                return note(inside[-1], out, q, k, cross, causal)
            if is_pattern(func, args, kwargs or {}, out):
                cross = _is_cross(inside[-1], out.shape[-2], out.shape[-1])
                causal = _is_causal(False, None, out, out.shape[-2], out.shape[-1])
                return note(inside[-1], out, None, None, cross, causal)
            return out

    with ExitStack() as stack:
        for module, name in rest.items():
            stack.callback(
                module.register_forward_pre_hook(lambda *_, n=name: inside.append(n)).remove
            )
            stack.callback(
                module.register_forward_hook(
                    lambda *_: inside.pop() and None, always_call=True
                ).remove
            )
        stack.enter_context(Ear())
        yield


def _folded_heads(module: nn.Module, pattern: Tensor, batch: int) -> int:
    """Heads of a pattern [batch·head, query, key]: as the module says, else by the batch."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        said = getattr(module, name, None)
        if isinstance(said, int) and said > 0 and pattern.shape[0] % said == 0:
            return said
    return max(1, pattern.shape[0] // batch)


def _towers(model: nn.Module, found: Mapping[str, _Found]) -> dict[str, Tower]:
    stacks: dict[tuple[str, bool], list[str]] = {}
    for name in (n for n, _ in model.named_modules() if n in found):
        stacks.setdefault((stack_of(model, name), found[name].cross), []).append(name)
    towers: dict[str, Tower] = {}
    for (stack, cross), members in stacks.items():
        tower = _tower_name(model, stack, cross)
        if tower in towers:
            piece = re.sub(r"\W|\d", "", stack.split(".")[-2] if "." in stack else stack)
            tower = f"{tower}-{piece}"
        while tower in towers:
            tower += "x"
        indices, depth = _indices(model, stack, members)
        layers = tuple(
            Layer(
                tower, i, name, f.projection, f.n_heads, f.n_kv_heads, f.d_qk, f.d_v,
                f.reached, cross, f.causal, f.calls, f.sinks,
            )
            for i, name in zip(indices, members, strict=True)
            for f in [found[name]]
        )  # fmt: skip
        towers[tower] = Tower(tower, layers, depth)
    if DEFAULT_TOWER not in towers and len(towers) == 1:
        return towers
    return dict(sorted(towers.items(), key=lambda item: item[0] != DEFAULT_TOWER))


def stack_of(model: nn.Module, name: str) -> str:
    """The outermost list of layers that holds a module, or the module's parent."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return ".".join(parts[:i])
    return ".".join(parts[:-1])


def _indices(model: nn.Module, stack: str, members: list[str]) -> tuple[list[int], int]:
    """Layer numbers: places in the list where each place holds one such module, else a count."""
    container = model.get_submodule(stack)
    if isinstance(container, nn.ModuleList):
        places = [int(name[len(stack) + 1 :].split(".")[0]) for name in members]
        if len(set(places)) == len(places):
            return places, len(container)
    return list(range(len(members))), len(members)


def _main_input(model: nn.Module) -> str:
    """What a model reads; a vision tower by itself may say `input_ids`, which it does not take."""
    main = getattr(model, "main_input_name", "input_ids")
    names = list(inspect.signature(model.forward).parameters)
    sees = any(re.search(r"^pixel|grid_thw", name) for name in names)
    return "pixel_values" if main not in names and sees else str(main)


def _tower_name(model: nn.Module, stack: str, cross: bool) -> str:
    if cross:
        return "cross"
    main = _main_input(model)
    if re.search(r"vision|visual|image|\bvit\b|vit_|pixel", stack) or (
        main == "pixel_values" and not re.search(r"text|language|decoder", stack)
    ):
        return "vision"
    if re.search(r"audio|speech", stack):
        return "audio"
    if main in ("input_features", "input_values") and "decoder" not in stack:
        return "audio"  # before `encoder`: its positions are frames, not the prompt's tokens
    config = getattr(model, "config", None)
    side = re.search(r"\b(encoder|decoder)\b", stack)  # the outer: decoders may hold an encoder
    if getattr(config, "is_encoder_decoder", False) and side and side[0] == "encoder":
        return "encoder"
    return DEFAULT_TOWER
