"""Runs that are kept, and replayed from the middle.

Patching every head means running the model once per head, and all but a part of each run is known:
blocks before the patched one put out what they did, and in a causal model nothing changes before
the first patched position. A `Replay` keeps one run; `rerun` then computes many patched runs at
once, with the known blocks answered from memory and, where only late positions differ, the earlier
keys and values taken from the cache. Nothing of this is written for a model family: a block or an
attention module is made to answer from memory by giving it another `forward` while the context is
open, and the model's own forward does the rest.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, InterpError, SiteError
from interp.memory import fitting
from interp.prompts import Batch
from interp.seam.blocks import block_names, on_input, on_output
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model

_CHECKED: "WeakKeyDictionary[Model, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Kept:
    """What one attention layer did.

    Attributes:
        z: [batch, pos, head, d_v], the input of the output projection.
        call: q, k, v, mask as the kernel received them, or None where they are not reached.
        output: what the attention module returned.
        plain: whether its first output is the projection of z and nothing else.
    """

    z: Tensor
    call: AttnCall | None
    output: Any
    plain: bool


class Replay:
    """One kept run of a batch, padded on the left.

    Args:
        model: the model.
        batch: prompts padded on the left, so that the last column is each prompt's last token.
        tower: the tower whose heads will be patched.

    Attributes:
        logits: [batch, d_vocab] at the last token.
        kept: attention module to what it did.
        blocks: names of the tower's blocks.
        entry: [batch, pos, d_model], the residual stream that enters the first block.

    Raises:
        InputError: the batch is padded on the right.
        SiteError: a layer runs more than once in a forward, or the model cannot be replayed.
    """

    @torch.no_grad()
    def __init__(self, model: "Model", batch: Batch, *, tower: str = "text") -> None:
        if any(
            off + len(p) != batch.input_ids.shape[1]
            for off, p in zip(batch.offsets, batch.prompts, strict=True)
        ):
            raise InputError("a replay needs a batch padded on the left")
        self.model, self.batch, self.tower = model, batch, model.tower(tower)
        self.blocks = block_names(model, self.tower)
        self.kept: dict[str, Kept] = {}
        self._outputs: list[Any] = [None] * len(self.blocks)
        self._z: dict[str, Tensor] = {}
        self._calls: dict[str, AttnCall] = {}
        self._attention: dict[str, Any] = {}
        self._times: dict[str, int] = {}
        self._run_once()
        self._check()

    @property
    def n_pos(self) -> int:
        """Columns of the batch."""
        return self.batch.input_ids.shape[1]

    def _run_once(self) -> None:
        hf = self.model.hf

        def note(place: dict[str, Any], name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                place[name] = output

            return hook

        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for name in self.blocks:
                module = hf.get_submodule(name)
                stack.callback(module.register_forward_hook(note(outputs, name)).remove)
            for layer in self.tower.layers:
                module = hf.get_submodule(layer.name)
                stack.callback(
                    module.register_forward_hook(note(self._attention, layer.name)).remove
                )
            stack.callback(on_input(hf.get_submodule(self.blocks[0]), self._note_entry))
            stack.enter_context(self.model.observe_output(self._note_z))
            stack.enter_context(self.model.observe(self._note_call))
            self.logits = self._forward(self.batch.inputs())
        if twice := next((x for x in self.tower.layers if self._times.get(x.name, 0) > 1), None):
            raise SiteError(
                f"a layer must run once in a forward to be replayed; {twice.name} of "
                f"{self.model.name} runs {self._times[twice.name]} times",
                hint="a recipe acts at every one of these: Recipe(Edit('zero', Where(heads=...)))",
            )
        self._outputs = [outputs[name] for name in self.blocks]
        for layer in self.tower.layers:
            z, output = self._z[layer.name], self._attention[layer.name]
            made = hf.get_submodule(layer.projection)(z.flatten(-2))
            first = _first(output)
            self.kept[layer.name] = Kept(
                z,
                self._calls.get(layer.name),
                output,
                isinstance(made, Tensor) and torch.equal(made, first),
            )

    def _check(self) -> None:
        """Runs in which nothing is changed must end as the kept one; tried once for each model."""
        known = _CHECKED.setdefault(self.model, set())
        if self.tower.name in known:
            return
        start = self.n_pos // 2 if self.suffix_works else 0
        for layer in {x.name: x for x in (self.tower.layers[0], self.tower.layers[-1])}.values():
            z = self.kept[layer.name].z[None, :, start:].repeat(2, 1, 1, 1, 1)
            try:
                logits = self.rerun({layer.name: z}, copies=2, start=start)
            except InterpError:
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
                logits = torch.full_like(self.logits, torch.nan)[None]
            scale = float(self.logits.abs().max().clamp_min(1))
            if not bool((logits - self.logits).abs().max() < 1e-3 * scale):
                raise SiteError(
                    f"a run must be the same when it is replayed from {layer.name} on; that of "
                    f"{self.model.name} is not (layers that share state?)",
                    hint="a recipe runs the whole model: Recipe(Edit('zero', Where(heads=...)))",
                )
        known.add(self.tower.name)

    def _note_entry(self, x: Tensor) -> None:
        self.entry = x

    def _note_z(self, layer: Layer, site: Tensor) -> None:
        self._z[layer.name] = site
        self._times[layer.name] = self._times.get(layer.name, 0) + 1

    def _note_call(self, call: AttnCall) -> None:
        self._calls[call.name] = call if call.k is not None else replace(call, v=None)

    @cached_property
    def _last_only(self) -> dict[str, Any]:
        known = inspect.signature(self.model.hf.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def _forward(self, inputs: Mapping[str, Any]) -> Tensor:
        extra = dict(self._last_only)
        if "use_cache" in inspect.signature(self.model.hf.forward).parameters:
            extra["use_cache"] = "past_key_values" in inputs
        if not self.model.reads_tokens:
            inputs = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}
        out = self.model.hf(**inputs, **extra)
        logits = out.logits if hasattr(out, "logits") else out[0]
        # A classifier has one row of logits an example.
        last: Tensor = logits[:, -1] if logits.dim() == 3 else logits
        return last if last.dtype == torch.float64 else last.float()

    @torch.no_grad()
    def rerun(
        self,
        changes: Mapping[str, Tensor],
        *,
        copies: int,
        start: int = 0,
        freeze: bool = False,
        record: "Record | None" = None,
        overlays: "Mapping[str, Overlay] | None" = None,
        inputs: "Mapping[str, Inputs] | None" = None,
        ids: Tensor | None = None,
        freeze_mlps: bool = False,
    ) -> Float[Tensor, "copy batch d_vocab"]:
        """Logits at the last token of many patched runs.

        Args:
            changes: attention module to its z in each run: [copy, batch, pos, head, d_v], with the
                positions from `start` on.
            copies: number of runs.
            start: first position that differs from the kept run.
            freeze: keep the z of all other attention layers as in the kept run.
            record: collects what later attention layers do; a frozen layer that it asks for still
                computes its q, k and v.
            overlays: attention module to a z for some of its heads, the others being live.
            inputs: attention module to what becomes of its q, k and v, rows being copies × batch.
            ids: [batch, pos] other token ids to run all copies on, all positions.
            freeze_mlps: keep what the blocks add beside attention as in the kept run.

        Raises:
            TooLargeError: the runs do not fit into memory.
            InputError: part of the run is given for the last positions only, which this model
                cannot run on their own, or nothing is changed.
        """
        changed = {*changes, *(overlays or {}), *(inputs or {})}
        if not changed and ids is None:
            raise InputError("a replay needs something that is changed; got nothing")
        first = 0 if ids is not None else min(self._block_of(name) for name in changed)
        if start and not self.suffix_works:
            if overlays or inputs or ids is not None:
                raise InputError(
                    f"the end of a prompt does not run on its own on {self.model.name}",
                    hint="give z, q, k and v of all positions",
                )
            whole = {n: self._widened(n, z, start) for n, z in changes.items()}
            return self.rerun(
                whole, copies=copies, freeze=freeze, record=record, freeze_mlps=freeze_mlps
            )
        given = self._inputs(copies, start)
        if ids is not None:
            given["input_ids"] = _expand(ids[:, start:], copies).flatten(0, 1)
        beside = self._beside if freeze_mlps else {}  # made before anything is patched
        what = f"{copies} patched runs of {len(self.batch)} prompts"
        with fitting(what, "use a smaller batch"), ExitStack() as stack:
            for i in range(first):
                stack.enter_context(self._answering(i, copies, start))
            for layer in self.tower.layers:
                if self._block_of(layer.name) < first:
                    continue
                runs = record is not None and layer.name in record.layers
                if layer.name in changes:
                    stack.enter_context(self._patched(layer, changes[layer.name], runs=runs))
                elif overlays and layer.name in overlays:
                    stack.enter_context(self._overlaid(layer, overlays[layer.name]))
                elif freeze:
                    z = _expand(self.kept[layer.name].z[:, start:], copies)
                    stack.enter_context(self._patched(layer, z, runs=runs))
            stack.enter_context(self._mlps_frozen(beside, first, copies, start))
            if record is not None:
                stack.enter_context(record.listening(self))
            if inputs:
                stack.enter_context(self._inputs_edited(inputs))
            logits = self._forward(given)
        return logits.view(copies, len(self.batch), -1)

    def leaving(self, block: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that left a block in the kept run."""
        return _first(self._outputs[block])

    @torch.no_grad()
    def finish(
        self, resid: Float[Tensor, "copy batch d_model"]
    ) -> Float[Tensor, "copy batch d_vocab"]:
        """Logits at the last token had this residual stream left the last block there."""
        copies = resid.shape[0]
        start = self.n_pos - 1 if self.suffix_works else 0
        last = len(self.blocks) - 1
        value = _map(self._outputs[last], lambda x: self._like_hidden(x, copies, start).clone())
        _first(value)[:, -1] = resid.flatten(0, 1)
        with ExitStack() as stack:
            for i in range(last):
                stack.enter_context(self._answering(i, copies, start))
            block = self.model.hf.get_submodule(self.blocks[last])
            stack.enter_context(_forward_as(block, lambda *a, **k: value))
            logits = self._forward(self._inputs(copies, start))
        return logits.view(copies, len(self.batch), -1)

    @torch.no_grad()
    def ends(
        self, changes: Mapping[str, Tensor], *, copies: int, start: int = 0, freeze: bool = False
    ) -> Float[Tensor, "copy batch d_model"]:
        """As `rerun`, but the residual stream at the last token, without the unembedding."""
        last = self.blocks[-1]
        record = Record(blocks=(last,))
        get = getattr(self.model.hf, "get_output_embeddings", None)
        head = get() if get is not None else None
        with ExitStack() as stack:
            if isinstance(head, nn.Module):
                stack.enter_context(_forward_as(head, lambda x: x[..., :1]))
            self.rerun(changes, copies=copies, start=start, freeze=freeze, record=record)
        return record.leaving[last][:, -1].view(copies, len(self.batch), -1)

    def _block_of(self, name: str) -> int:
        return self.model.structure.layers[name].index

    def _widened(self, name: str, z: Tensor, start: int) -> Tensor:
        """Z of every position, the kept one before `start`."""
        kept = self.kept[name].z
        out = kept[None].expand(z.shape[0], *kept.shape).clone()
        out[:, :, start:] = z
        return out

    def _inputs(self, copies: int, start: int) -> dict[str, Any]:
        inputs = {n: _expand(x, copies).flatten(0, 1) for n, x in self.batch.inputs().items()}
        if start:
            inputs["input_ids"] = inputs["input_ids"][:, start:]
            inputs["past_key_values"] = self._cache(copies, start)
        return inputs

    def _cache(self, copies: int, start: int) -> Any:
        """A cache that holds the keys and values before `start`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in self.tower.layers:
            call = self.kept[layer.name].call
            assert call is not None and call.k is not None and call.v is not None
            k, v = call.k[:, :, :start], call.v[:, :, :start]
            cache.update(
                _expand(k, copies).flatten(0, 1), _expand(v, copies).flatten(0, 1), layer.index
            )
        return cache

    @cached_property
    def suffix_works(self) -> bool:
        """Whether the end of the prompt alone, on a cache, gives the kept logits."""
        calls = [self.kept[x.name].call for x in self.tower.layers]
        whole = len(self.tower.layers) == len(self.blocks)
        if not whole or self.n_pos < 2 or self.batch.extra or self.batch.decoder is not None:
            return False
        if any(c is None or c.k is None or c.k.shape[2] != self.n_pos for c in calls):
            return False
        if not all(x.causal for x in self.tower.layers):
            return False
        try:
            logits = self._forward(self._inputs(1, self.n_pos // 2))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        scale = float(self.logits.abs().max().clamp_min(1))
        return bool((logits - self.logits).abs().max() < 1e-4 * scale)

    @contextmanager
    def _answering(self, block: int, copies: int, start: int) -> Iterator[None]:
        """A block that gives back what it gave in the kept run."""
        value = _map(self._outputs[block], lambda x: self._like_hidden(x, copies, start))
        with _forward_as(self.model.hf.get_submodule(self.blocks[block]), lambda *a, **k: value):
            yield

    def _like_hidden(self, x: Tensor, copies: int, start: int) -> Tensor:
        if x.dim() >= 2 and x.shape[0] == len(self.batch):
            x = x[:, start:] if x.shape[1] == self.n_pos else x
            return _expand(x, copies).flatten(0, 1)
        if x.dim() == 2 and x.shape[0] == len(self.batch) * self.n_pos:  # OPT flattens positions
            x = x.view(len(self.batch), self.n_pos, -1)[:, start:]
            return _expand(x, copies).flatten(0, 2)
        return x

    @contextmanager
    def _overlaid(self, layer: Layer, overlay: "Overlay") -> Iterator[None]:
        """An attention module that runs, with the z of some heads given."""
        value = overlay.z.flatten(0, 1)
        chosen = overlay.heads[:, None].expand(-1, len(self.batch), -1).flatten(0, 1)

        def put(live: Layer, z: Tensor) -> Tensor | None:
            if live.name != layer.name:
                return None
            return torch.where(chosen[:, None, :, None], value.to(z), z)

        with self.model.observe_output(put):
            yield

    @contextmanager
    def _inputs_edited(self, inputs: "Mapping[str, Inputs]") -> Iterator[None]:
        """Attention modules whose q, k and v are changed before the kernel runs."""

        def editor(
            name: str, q: Tensor, k: Tensor, v: Tensor
        ) -> tuple[Tensor, Tensor, Tensor] | None:
            return inputs[name](q, k, v) if name in inputs else None

        with self.model.observe(lambda call: None, inputs=editor):
            yield

    @cached_property
    def _beside(self) -> dict[str, Any]:
        """What holds the weights of a block beside attention: module to its kept output.

        Children of blocks as a whole. Where a child also passes the residual stream on (BLOOM,
        and the norms behind BERT's layers), answering from memory would cut the stream: there the
        layers with weights inside it are taken.
        """
        hf = self.model.hf
        children = [
            f"{block}.{child}"
            for block in self.blocks
            for child, module in hf.get_submodule(block).named_children()
            if any(p.dim() > 1 for p in module.parameters())
            and not any(
                f"{x.name}.".startswith(f"{block}.{child}.") for x in self.tower.layers
            )
        ]  # fmt: skip
        inside = {name: _weighted(hf.get_submodule(name)) for name in children}
        names = [*children, *(f"{n}.{x}" for n, parts in inside.items() for x in parts)]
        given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        outputs: dict[str, Any] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given[name], outputs[name] = (args, kwargs), output

            return hook

        with ExitStack() as stack:
            for name in names:
                hook = hf.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
                stack.callback(hook.remove)
            self._forward(self.batch.inputs())
        out: dict[str, Any] = {}
        for name in (n for n in children if n in outputs):
            parts = [f"{name}.{x}" for x in inside[name] if f"{name}.{x}" in outputs]
            held = {p: outputs[p] for p in parts}
            through = parts and self._passes_on(name, held, *given[name])
            out |= held if through else {name: outputs[name]}
        return out

    def _passes_on(
        self, name: str, held: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a module still depends on what it is given while its weights answer so."""
        hf, generator = self.model.hf, torch.Generator().manual_seed(0)
        module = hf.get_submodule(name)

        def moved(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return x + torch.randn(x.shape, generator=generator).to(x)

        with ExitStack() as stack:
            for part, value in held.items():
                stack.enter_context(
                    _forward_as(hf.get_submodule(part), lambda *a, _v=value, **k: _v)
                )
            try:
                old = _first(module(*args, **kwargs))
                named = {k: moved(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
                new = _first(module(*(_map(a, moved) for a in args), **named))
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                return False  # parts that see a few tokens each (experts): held as a whole
        return not torch.allclose(old, new, rtol=1e-4, atol=1e-4)

    @contextmanager
    def _mlps_frozen(
        self, beside: Mapping[str, Any], first: int, copies: int, start: int
    ) -> Iterator[None]:
        """Blocks from `first` on add beside attention what they added in the kept run."""
        late = tuple(f"{name}." for name in self.blocks[first:])
        with ExitStack() as stack:
            for name in (n for n in beside if n.startswith(late)):
                value = _map(beside[name], lambda x: self._like_hidden(x, copies, start))
                module = self.model.hf.get_submodule(name)
                stack.enter_context(_forward_as(module, lambda *a, _v=value, **k: _v))
            yield

    @contextmanager
    def _patched(self, layer: Layer, z: Tensor, *, runs: bool = False) -> Iterator[None]:
        """An attention module whose z is given: [copy, batch, pos, head, d_v].

        Where it `runs`, it still computes q, k and v for those who listen.
        """
        kept = self.kept[layer.name]
        hf = self.model.hf
        flat = z.flatten(0, 1)
        if kept.plain and not runs:
            projection = hf.get_submodule(layer.projection)

            def forward(*args: Any, **kwargs: Any) -> Any:
                return _instead_of(kept.output, projection(flat.flatten(-2)))

            with _forward_as(hf.get_submodule(layer.name), forward):
                yield
            return

        # Something stands between projection and output: run the module and put z in.
        def pre(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (flat.reshape(args[0].shape), *args[1:])

        handle = hf.get_submodule(layer.projection).register_forward_pre_hook(pre)
        try:
            yield
        finally:
            handle.remove()

    def z_under(
        self,
        layer: Layer,
        heads: slice,
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        pattern: Tensor | None = None,
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Z of some heads had q, k, v or the pattern been others.

        Args:
            layer: the layer.
            heads: query heads, whole groups or within one.
            q: [batch, head, pos, d_qk] of all query heads.
            k: [batch, kv_head, pos, d_qk] of all key-value heads.
            v: [batch, kv_head, pos, d_v].
            pattern: [batch, head, query, key] of the chosen heads.
        """
        call = self.call(layer)
        call = replace(
            call,
            q=call.q if q is None else q,
            k=call.k if k is None else k,
            v=call.v if v is None else v,
            # A pattern that the model itself made is that of the old q and k.
            pattern=call.pattern if q is None and k is None else None,
            lse=None,
            extra=None,
        )
        return torch.stack([_z(call, b, heads, pattern) for b in range(call.z.shape[0])])

    def call(self, layer: Layer) -> AttnCall:
        """q, k, v and mask of a layer in the kept run.

        Raises:
            InputError: they are not reached on this model.
        """
        call = self.kept[layer.name].call
        if call is None or call.q is None or call.v is None:
            raise InputError(
                f"q, k and v of {layer.name} are not reached on {self.model.name}",
                hint="patch z instead",
            )
        return call


def _weighted(module: nn.Module) -> list[str]:
    """The parts of a module that hold weights themselves; none if it does so."""
    if any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return []
    return [
        name
        for name, part in module.named_modules()
        if name and any(p.dim() > 1 for p in part.parameters(recurse=False))
    ]


def _z(call: AttnCall, b: int, heads: slice, pattern: Tensor | None) -> Tensor:
    assert call.v is not None
    group = call.n_heads // call.v.shape[1]
    index = torch.arange(heads.start, heads.stop, device=call.v.device) // group
    p = call.rows(b, heads, slice(0, call.n_query)) if pattern is None else pattern[b]
    return (p @ call.v[b, index].to(p.dtype)).transpose(0, 1).to(call.z.dtype)


Inputs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Given q, k and v as in `AttnCall`, other q, k and v of the same shapes."""


@dataclass(frozen=True)
class Overlay:
    """Z of some heads of a layer.

    Attributes:
        z: [copy, batch, pos, head, d_v] of every head; those not chosen are not looked at.
        heads: [copy, head] which heads get their z from here.
    """

    z: Tensor
    heads: Tensor


class Record:
    """Collects the attention calls of a rerun, and z.

    Args:
        layers: attention modules to run although their z is given.
        blocks: blocks whose outgoing residual stream is collected.

    Attributes:
        calls: attention module to its call, rows being copies × batch.
        z: attention module to z as the output projection received it, rows likewise.
        leaving: block to the stream that left it, [copies × batch, pos, d_model].
    """

    def __init__(self, layers: Collection[str] = (), *, blocks: Collection[str] = ()) -> None:
        self.layers, self.blocks = frozenset(layers), tuple(blocks)
        self.calls: dict[str, AttnCall] = {}
        self.z: dict[str, Tensor] = {}
        self.leaving: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, replay: Replay) -> Iterator[None]:
        """Listen while the context is open."""
        with ExitStack() as stack:
            stack.enter_context(replay.model.observe(self._note))
            stack.enter_context(replay.model.observe_output(self._note_z))
            for name in self.blocks:
                module = replay.model.hf.get_submodule(name)
                stack.callback(on_output(module, partial(self._note_block, name)))
            yield

    def _note_block(self, name: str, x: Tensor) -> None:
        self.leaving[name] = x

    def _note(self, call: AttnCall) -> None:
        self.calls[call.name] = call

    def _note_z(self, layer: Layer, z: Tensor) -> None:
        self.z[layer.name] = z


def _expand(x: Tensor, copies: int) -> Tensor:
    return x[None].expand(copies, *x.shape)


def _first(value: Any) -> Tensor:
    """The first tensor of a nested output: the hidden states."""
    return value if isinstance(value, Tensor) else _first(value[0])


def _instead_of(output: Any, first: Tensor) -> Any:
    """What an attention module returns, with another first tensor.

    Of the rest only parameters are known (a bias that the block adds later).
    """
    if isinstance(output, Tensor):
        return first
    rest = [x if isinstance(x, nn.Parameter) else None for x in output[1:]]
    return [first, *rest] if isinstance(output, list) else (first, *rest)


def _map(value: Any, change: Any) -> Any:
    """A nested output with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(x, change) for x in value)
    if isinstance(value, list):
        return [_map(x, change) for x in value]
    return copy.copy(value)


@contextmanager
def _forward_as(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward for a module while the context is open."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
