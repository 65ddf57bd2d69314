"""A recipe switched on: the hooks, and the edits as they act on each forward.

One session serves all recipes that are on at once on one model, so that nested recipes compose in
the order in which they were entered, as if they were one.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError, SiteError
from interp.recipe.act import Place, changed, chosen_rows, factors_of, strength_of
from interp.recipe.attend import RowEdit, edited_weights, edited_z, full_pattern
from interp.recipe.edit import Edit
from interp.recipe.gates import Decision as Decision
from interp.recipe.gates import Gates
from interp.recipe.ops import AttentionOp
from interp.recipe.place import Frame, Spans, Tracker, repeated, still
from interp.recipe.table import Part, Table, compile_table
from interp.recipe.twin import Twin, logits_of
from interp.recipe.where import Positions
from interp.seam.blocks import on_input, on_output
from interp.seam.calls import AttnCall, Edited
from interp.seam.interface import reader_above
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe

_SESSIONS: "ContextVar[tuple[Session, ...]]" = ContextVar("headscope_recipes", default=())


@contextmanager
def switched_on(recipe: "Recipe", model: "Model", spans: Spans) -> Iterator["Session"]:
    """The recipe's edits in force on a model while the context is open."""
    mine = [s for s in _SESSIONS.get() if s.model.hf is model.hf]
    session = mine[-1] if mine else Session(model)
    if not mine:
        _SESSIONS.set((*_SESSIONS.get(), session))
    try:
        with session.holding(recipe, spans):
            yield session
    finally:
        if not session.held:
            _SESSIONS.set(tuple(s for s in _SESSIONS.get() if s is not session))


@dataclass(frozen=True, eq=False)
class _Held:
    recipe: "Recipe"
    spans: Spans


class Session:
    """All recipes on one model.

    Attributes:
        model: the model.
        held: the recipes that are on, in the order in which they were entered.
    """

    def __init__(self, model: "Model") -> None:
        self.model = model
        self.held: list[_Held] = []
        decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._tracker = Tracker(encoder_decoder=decoder)
        self._gates = Gates()
        self._table = Table()
        self._twins: dict[tuple[int, int], Twin] = {}
        self._stack = ExitStack()
        self._signature = inspect.signature(model.hf.forward)
        self._cache: Any = None
        self._forward: Mapping[str, Any] | None = None
        self._reached: set[str] = set()
        self._inner = False

    @property
    def log(self) -> list[Decision]:
        """What gates decided, forward by forward."""
        return self._gates.log

    @contextmanager
    def holding(self, recipe: "Recipe", spans: Spans) -> Iterator[None]:
        """Add a recipe for as long as the context is open."""
        mine = _Held(recipe, spans)
        try:
            self._install([*self.held, mine])
            yield
        finally:
            self._install([h for h in self.held if h is not mine])

    def _install(self, held: list[_Held]) -> None:
        table = compile_table(self.model, [h.recipe.edits for h in held])
        twins = {
            # Runs under way keep their caches.
            _key(p): self._twins.get(_key(p)) or Twin(self.model, p.edit.twin, p.owner)
            for p in table.logits
            if p.edit.twin
        }
        edits = [e for h in held for e in (*h.recipe.edits, *_twin_edits(h.recipe))]
        if twins and any(e.tower == "encoder" for e in edits) and self._tracker.encoder_decoder:
            raise InputError(
                "both runs of contrast share what the encoder put out; got an edit of the encoder"
            )
        before = self.held
        self._close()
        self.held, self._table, self._twins = held, table, twins
        self._tracker.bind([h.spans for h in held])
        if not held:
            return
        everything = (table, *(t.table for t in twins.values()))
        stack, hf = self._stack, self.model.hf
        try:
            hook = hf.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
            if table.logits:
                stack.callback(hf.register_forward_hook(self._logits).remove)
            stack.callback(hf.register_forward_hook(self._after_all, always_call=True).remove)
            find: Any = getattr(hf, "get_encoder", None)
            if self._tracker.encoder_decoder and find is not None:
                hook = find().register_forward_pre_hook(self._encoder, with_kwargs=True)
                stack.callback(hook.remove)
            if any(t.attends for t in everything):
                stack.enter_context(
                    self.model.observe(self._attend, inputs=self._inputs, weights=self._weights)
                )
            if any(t.heads.get("z") for t in everything):
                stack.enter_context(self.model.observe_output(self._z))
            for name in {n for t in everything for n in (*t.blocks, *t.gates)}:
                stack.callback(on_input(hf.get_submodule(name), self._block(name)))
            for name in {n for t in everything for n in t.after}:
                stack.callback(on_output(hf.get_submodule(name), self._after(name)))
            for name in {n for t in everything for n in t.outputs}:
                stack.callback(on_output(hf.get_submodule(name), self._output(name)))
        except BaseException:
            self._close()
            self.held = before
            raise

    def _close(self) -> None:
        self._unfollow()
        self._forward = None
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    # Around each forward of the whole model.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inner:
            return
        try:
            given = {**self._signature.bind_partial(*args).arguments, **kwargs}
        except TypeError:  # the model's own error is clearer
            return
        if self._tracker.encoder_decoder and given.get("encoder_outputs") is None:
            self._tracker.source = None
        order = self._tracker.before(given)
        if order is None:
            self._gates.clear()
        elif order.tolist() != list(range(len(order))):
            self._gates.reorder(order)
        self._forward = given
        self._reached.clear()
        cache = given.get("past_key_values")
        for twin in self._twins.values():
            twin.before(cache)
        self._follow(cache)

    def _encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inner:
            names = dict(zip(("input_ids", "attention_mask"), args, strict=False))
            self._tracker.before_encoder({**names, **kwargs})

    def _after_all(self, module: nn.Module, args: Any, output: Any) -> None:
        """The end of a forward, also of one that failed."""
        if self._inner:
            return
        self._forward = None
        if output is None or module.training:
            return
        layers = self.model.structure.layers
        for name in self._wanted():
            if layers[name].tower == "text" and name not in self._reached:
                raise SiteError(
                    f"{name} of {self.model.name} was not reached in this forward, so its edit "
                    f"did nothing"
                )

    def _wanted(self) -> set[str]:
        table = self._table
        return {*table.attention, *(n for site in table.heads.values() for n in site)}

    def _follow(self, cache: Any) -> None:
        """Hear of it when beam search gives the rows of a cache another order."""
        if cache is self._cache or not hasattr(cache, "reorder_cache"):
            return
        self._unfollow()
        own = cache.reorder_cache

        def reorder(order: Tensor) -> None:
            own(order)
            self._tracker.reorder(order)
            self._gates.reorder(order)
            for twin in self._twins.values():
                twin.reorder(order)

        cache.reorder_cache = reorder
        self._cache = cache

    def _unfollow(self) -> None:
        if self._cache is not None:
            vars(self._cache).pop("reorder_cache", None)
            self._cache = None

    # The edits.

    def _inputs(
        self, name: str, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        sites = [s for s in ("q", "k", "v") if name in self._table.heads.get(s, {})]
        if not sites:
            return None
        self._reached.add(name)
        layer = self.model.structure.layers[name]
        new = {"q": q, "k": k, "v": v}
        for site in sites:
            x = new[site].transpose(1, 2)  # [batch, pos, head, d]
            for part in self._table.heads[site][name]:
                place = self._place(layer.tower, part, x, x.shape[1], keys=site != "q")
                x = changed(x, part, place, self._gates)
            new[site] = x.transpose(1, 2)
        return new["q"], new["k"], new["v"]

    def _attend(self, call: AttnCall) -> Tensor | Edited | None:
        if call.q is None:
            return None  # the pattern itself was edited, by `_weights`
        edits = self._rows(call.name, call.z, call.n_query, call.n_key)
        if not edits:
            return None
        z = edited_z(call, edits)
        return Edited(z, full_pattern(call, edits) if reader_above(call.module) else None)

    def _weights(self, name: str, p: Tensor) -> Tensor | None:
        edits = self._rows(name, p, p.shape[2], p.shape[3])
        return edited_weights(p, edits, name) if edits else None

    def _rows(self, name: str, like: Tensor, n_query: int, n_key: int) -> list[RowEdit]:
        self._reached.add(name)
        out: list[RowEdit] = []
        rows = like.shape[0]
        tower = self.model.structure.layers[name].tower
        for part in self._table.attention.get(name, ()):
            edit, op = part.edit, part.edit.operation
            assert isinstance(op, AttentionOp)
            if edit.idle:
                continue
            place = self._place(tower, part, like, n_query, keys=False)
            chosen = chosen_rows(part, edit.where.queries, place, self._gates, rows, like)
            if chosen is not None and not bool(chosen.any()):
                continue
            among = self._place(tower, part, like, n_key, keys=True)

            def of(positions: Positions, among: Place = among, part: Part = part) -> Tensor:
                found = among.select(positions, part.owner)
                if found is not None:
                    return found
                return torch.ones(rows, n_key, dtype=torch.bool, device=like.device)

            params = {n: edit.setting(n) for n in op.params}
            others = {n: of(p) for n, p in params.items() if isinstance(p, Positions)}
            s = strength_of(edit, part.entries, rows)
            factors = factors_of(edit, place, like)
            keys = of(edit.where.keys)
            out.append(RowEdit(op, edit.site, part.units, s, params, chosen, keys, others, factors))
        return out

    def _z(self, layer: Layer, site: Tensor) -> Tensor | None:
        parts = self._table.heads.get("z", {}).get(layer.name)
        if not parts:
            return None
        self._reached.add(layer.name)
        # Windows and images have positions along several axes, or none.
        flat = site.dim() != 4
        x = site.reshape(1, -1, *site.shape[-2:]) if flat else site
        for part in parts:
            if flat and not part.edit.plain:
                raise SiteError(f"positions of {layer.name} are not those of a sequence")
            x = changed(x, part, self._place(layer.tower, part, x, x.shape[1]), self._gates)
        return x.reshape(site.shape)

    def _block(self, name: str) -> Any:
        def change(x: Tensor) -> Tensor | None:
            for gate, tower in self._table.gates.get(name, ()):
                frame = self._frame(tower, x, keys=False)
                known = frame if frame is not None else still(x.shape[0], x.shape[1], x.device)
                self._gates.decide(gate, tower, x, known)
            return self._stream(x, self._table.blocks.get(name))

        return change

    def _after(self, name: str) -> Any:
        return lambda x: self._stream(x, self._table.after.get(name))

    def _output(self, name: str) -> Any:
        return lambda x: self._stream(x, self._table.outputs.get(name))

    def _stream(self, x: Tensor, parts: list[Part] | None) -> Tensor | None:
        if not parts:
            return None
        if x.dim() != 3:
            raise SiteError(
                f"the stream of {self.model.name} must be [batch, pos, d_model] here; got "
                f"{tuple(x.shape)}"
            )
        wide = x[:, :, None]
        for part in parts:
            place = self._place(part.edit.tower, part, x, x.shape[1])
            wide = changed(wide, part, place, self._gates)
        return wide[:, :, 0]

    def _logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._inner or self._forward is None:
            return None
        if self._forward.get("labels") is not None:
            raise InputError(
                "the loss of a forward is that of unedited logits; got labels",
                hint="leave labels out and compute the loss from output.logits",
            )
        x = logits_of(output, self.model.name)[:, :, None]
        for part in self._table.logits:
            place = self._place("text", part, x, x.shape[1])
            extra = {}
            if part.edit.twin is not None and not part.edit.idle:
                extra["other"] = self._second(part, output)[:, -x.shape[1] :, None]
            x = changed(x, part, place, self._gates, extra)
        x = x[:, :, 0]
        if hasattr(output, "logits"):
            output.logits = x
            return output
        return (x, *output[1:])

    def _second(self, part: Part, output: Any) -> Tensor:
        """The logits of the second run that a contrast asks for."""
        assert self._forward is not None
        twin = self._twins[_key(part)]
        table, self._table, self._inner = self._table, twin.table, True
        try:
            return twin.run(self._forward, output)
        finally:
            self._table, self._inner = table, False

    # Where things are.

    def _frame(self, tower: str, like: Tensor, *, keys: bool) -> Frame | None:
        tracker, kind = self._tracker, tower.split("-")[0]
        if kind == "text" or (kind == "cross" and not keys):
            return tracker.frame if self._forward is not None else None
        if kind not in ("encoder", "cross"):
            return None
        if not tracker.encoder_decoder:
            return tracker.frame if self._forward is not None and kind == "encoder" else None
        return None if tracker.source is None else repeated(tracker.source, like.shape[0])

    def _place(self, tower: str, part: Part, like: Tensor, n: int, *, keys: bool = False) -> Place:
        frame = self._frame(tower, like, keys=keys)
        if frame is None:
            if tower == "text" and self._forward is None and not part.edit.plain:
                raise SiteError(
                    f"positions are known only while {self.model.name} runs as a whole; a part of "
                    f"it was called by itself",
                    hint="call model.hf(...) or model.hf.generate(...)",
                )
            frame = still(like.shape[0], n, like.device)
        return Place(frame, frame.first_of(n, keys=keys), n)


def _key(part: Part) -> tuple[int, int]:
    return id(part.edit), part.owner


def _twin_edits(recipe: "Recipe") -> list[Edit]:
    return [e for edit in recipe.edits if edit.twin for e in edit.twin.edits]
