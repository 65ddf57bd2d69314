"""A recipe switched on: the hooks, the positions, and the edits as they act on each forward.

One session serves all recipes that are on at once on one model, so that nested recipes compose in
the order in which they were entered, as if they were one.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError, SiteError
from interp.recipe.attend import RowEdit, edited_weights, edited_z, full_pattern
from interp.recipe.edit import Edit
from interp.recipe.ops import AttentionOp, VectorOp
from interp.recipe.place import Frame, Spans, Tracker, still
from interp.recipe.table import Part, Table, compile_table
from interp.recipe.where import Positions
from interp.seam.blocks import on_input, on_output
from interp.seam.calls import AttnCall, Edited
from interp.seam.interface import reader_above
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


@dataclass(frozen=True)
class Decision:
    """What a gate decided for one forward.

    Attributes:
        step: decoding step; 0 is the prompt.
        layer: layer measured.
        cosine: per example.
        open: per example.
    """

    step: int
    layer: int
    cosine: tuple[float, ...]
    open: tuple[bool, ...]


_SESSIONS: "ContextVar[tuple[Session, ...]]" = ContextVar("headscope_recipes", default=())


@contextmanager
def switched_on(recipe: "Recipe", model: "Model", spans: Spans) -> Iterator["Session"]:
    """The recipe's edits in force on a model while the context is open."""
    mine = [s for s in _SESSIONS.get() if s.model.hf is model.hf]
    session = mine[-1] if mine else Session(model)
    token = _SESSIONS.set((*_SESSIONS.get(), session)) if not mine else None
    try:
        with session.holding(recipe, spans):
            yield session
    finally:
        if token is not None:
            _SESSIONS.reset(token)


class Session:
    """All recipes on one model.

    Attributes:
        model: the model.
        log: what gates decided, forward by forward.
    """

    def __init__(self, model: "Model") -> None:
        self.model = model
        self.log: list[Decision] = []
        self._recipes: list[Recipe] = []
        self._table = Table()
        self._tracker = Tracker()
        self._stack = ExitStack()
        self._gates: dict[int, Tensor] = {}
        self._twins: dict[int, Any] = {}
        self._inner = False

    @contextmanager
    def holding(self, recipe: "Recipe", spans: Spans) -> Iterator[None]:
        """Add a recipe for as long as the context is open."""
        before = self._recipes, self._tracker
        table = compile_table(self.model, [e for r in [*self._recipes, recipe] for e in r.edits])
        self._recipes = [*self._recipes, recipe]
        if spans is not None or not before[0]:
            self._tracker = Tracker(spans)
        try:
            self._install(table)
            yield
        finally:
            self._recipes, self._tracker = before
            self._install(compile_table(self.model, [e for r in self._recipes for e in r.edits]))

    def _install(self, table: Table) -> None:
        self._stack.close()
        self._stack = ExitStack()
        self._table = table
        self._twins.clear()
        if not self._recipes:
            return
        twins = [
            compile_table(self.model, p.edit.twin.edits) for p in table.logits if p.edit.twin
        ]  # fmt: skip
        stack, hf = self._stack, self.model.hf
        try:
            stack.callback(
                hf.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove
            )
            if any(t.attends for t in (table, *twins)):
                stack.enter_context(
                    self.model.observe(self._attend, inputs=self._inputs, weights=self._weights)
                )
            if any(t.heads.get("z") for t in (table, *twins)):
                stack.enter_context(self.model.observe_output(self._z))
            everything = (table, *twins)
            for name in {n for t in everything for n in (*t.blocks, *t.gates)}:
                stack.callback(on_input(hf.get_submodule(name), self._block(name)))
            for name in {n for t in everything for n in t.after}:
                stack.callback(on_output(hf.get_submodule(name), self._after(name)))
            for name in {n for t in everything for n in t.outputs}:
                stack.callback(on_output(hf.get_submodule(name), self._output(name)))
            if table.logits:
                stack.callback(
                    hf.register_forward_hook(self._logits, with_kwargs=True).remove
                )  # fmt: skip
        except BaseException:
            stack.close()
            raise

    # What the hooks call.

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inner:
            return
        decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self._tracker.before(kwargs, args, decoder=decoder)
        if self._tracker.step == 0:
            self._gates.clear()
            self._twins.clear()

    def _inputs(
        self, name: str, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        table, layer = self._table, self.model.structure.layers[name]
        sites = [s for s in ("q", "k", "v") if name in table.heads.get(s, {})]
        if not sites:
            return None
        new = {"q": q, "k": k, "v": v}
        for site in sites:
            x = new[site].transpose(1, 2)  # [batch, pos, head, d]
            for part in table.heads[site][name]:
                if site == "q":
                    chosen = self._queries(layer, part.edit.where.queries, x)
                else:
                    chosen = self._keys(layer, part.edit.where.keys, x.shape[0], x.shape[1], x)
                x = self._changed(x, part, chosen)
            new[site] = x.transpose(1, 2)
        return new["q"], new["k"], new["v"]

    def _attend(self, call: AttnCall) -> Tensor | Edited | None:
        parts = self._table.attention.get(call.name)
        if not parts:
            return None
        if call.pattern is not None and call.v is None:
            return None  # done by `_weights`
        edits = self._rows(call.name, parts, call.z.shape[0], call.n_query, call.n_key, call.z)
        edits = [e for e in edits if e is not None]
        if not edits:
            return None
        z = edited_z(call, edits)
        return Edited(z, full_pattern(call, edits) if reader_above(call.module) else None)

    def _weights(self, name: str, p: Tensor) -> Tensor | None:
        parts = self._table.attention.get(name)
        if not parts:
            return None
        return edited_weights(p, self._rows(name, parts, p.shape[0], p.shape[2], p.shape[3], p))

    def _z(self, layer: Layer, site: Tensor) -> Tensor | None:
        parts = self._table.heads.get("z", {}).get(layer.name)
        if not parts:
            return None
        x = site
        for part in parts:
            where = part.edit.where.queries
            if x.dim() != 4:
                if not where.everywhere:
                    raise SiteError(f"positions of {layer.name} are not those of a sequence")
                x = self._changed(x[None] if x.dim() == 3 else x, part, None).reshape(site.shape)
                continue
            x = self._changed(x, part, self._queries(layer, where, x))
        return x

    def _block(self, name: str) -> Any:
        def change(x: Tensor) -> Tensor | None:
            for edit in self._table.gates.get(name, ()):
                self._decide(edit, x)
            return self._stream(x, self._table.blocks.get(name))

        return change

    def _after(self, name: str) -> Any:
        return lambda x: self._stream(x, self._table.after.get(name))

    def _output(self, name: str) -> Any:
        return lambda x: self._stream(x, self._table.outputs.get(name))

    def _stream(self, x: Tensor, parts: list[Part] | None) -> Tensor | None:
        if not parts:
            return None
        wide = x[:, :, None]
        for part in parts:
            frame = self._frame(part.edit.where.tower, x)
            chosen = _fitted(frame.queries(part.edit.where.queries), x.shape[1])
            wide = self._changed(wide, part, chosen)
        return wide[:, :, 0]

    def _logits(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._inner or not self._table.logits:
            return None
        logits = output.logits if hasattr(output, "logits") else output[0]
        x = logits[:, :, None]
        for part in self._table.logits:
            frame = self._frame("text", logits)
            chosen = _fitted(frame.queries(part.edit.where.queries), x.shape[1])
            extra = {}
            if part.edit.twin is not None:
                extra["other"] = self._second(part.edit, args, kwargs)[:, -x.shape[1] :, None]
            x = self._changed(x, part, chosen, extra)
        if hasattr(output, "logits"):
            output.logits = x[:, :, 0]
            return output
        return (x[:, :, 0], *output[1:])

    def _second(self, edit: Edit, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The logits of the same input under the twin recipe, with a cache of its own."""
        assert edit.twin is not None
        given = dict(kwargs)
        cache = given.get("past_key_values")
        if cache is not None:
            if id(edit) not in self._twins:
                self._twins[id(edit)] = type(cache)(config=self.model.text_config)
            given["past_key_values"] = self._twins[id(edit)]
        table, self._table, self._inner = self._table, compile_table(
            self.model, edit.twin.edits
        ), True  # fmt: skip
        try:
            out = self.model.hf(*args, **given)
        finally:
            self._table, self._inner = table, False
        return out.logits if hasattr(out, "logits") else out[0]  # type: ignore[no-any-return]

    # Positions, strengths and gates.

    def _frame(self, tower: str, like: Tensor) -> Frame:
        tracker = self._tracker
        if tower in ("text", "cross") and tracker.frame is not None:
            return tracker.frame
        batch = tracker.batch if tower == "encoder" else None
        return still(like.shape[0], like.shape[1], like.device, batch)

    def _queries(self, layer: Layer, where: Positions, x: Tensor) -> Tensor | None:
        if where.everywhere:
            return None
        return _fitted(self._frame(layer.tower, x).queries(where), x.shape[1])

    def _keys(
        self, layer: Layer, where: Positions, rows: int, n_key: int, like: Tensor
    ) -> Tensor | None:
        if where.everywhere:
            return None
        if layer.tower == "text" and self._tracker.frame is not None:
            return self._tracker.frame.keys(where, n_key)
        batch = self._tracker.batch if layer.tower in ("encoder", "cross") else None
        return still(rows, n_key, like.device, batch).queries(where)

    def _rows(
        self, name: str, parts: list[Part], rows: int, n_query: int, n_key: int, like: Tensor
    ) -> list[RowEdit]:
        layer = self.model.structure.layers[name]
        out = []
        for part in parts:
            edit, op = part.edit, part.edit.operation
            assert isinstance(op, AttentionOp)
            shown = like.new_empty(rows, n_query)
            chosen = self._queries(layer, edit.where.queries, shown)
            gate = self._gate(edit, rows, like)
            if gate is not None:
                full = torch.ones(rows, n_query, dtype=torch.bool, device=like.device)
                chosen = (full if chosen is None else chosen) & gate[:, None]
            keys = self._keys(layer, edit.where.keys, rows, n_key, like)
            if keys is None:
                keys = torch.ones(rows, n_key, dtype=torch.bool, device=like.device)
            params = {n: edit.setting(n) for n in op.params}
            others = {}
            for n, value in params.items():
                if isinstance(value, Positions):
                    found = self._keys(layer, value, rows, n_key, like)
                    others[n] = torch.ones_like(keys) if found is None else found
            s = self._strength(edit, part.entries)
            factors = self._factors(edit, n_query, like)
            out.append(RowEdit(op, edit.site, part.units, s, params, chosen, keys, others, factors))
        return out

    def _strength(self, edit: Edit, entries: tuple[int, ...]) -> Tensor | float:
        s = edit.strength
        assert s is not None
        if isinstance(s, Tensor) and s.dim():
            s = s[list(entries)]
        return s

    def _factors(self, edit: Edit, columns: int, like: Tensor) -> Tensor | None:
        """The schedule's factor for each of the last `columns` columns.

        It follows the position and not the forward, so that running without a cache, where every
        forward sees all positions again, gives the same numbers.
        """
        if edit.schedule is None:
            return None
        frame = self._tracker.frame
        if frame is None:
            raise InputError("a schedule needs a forward whose tokens are known")
        end = frame.past + frame.fed
        steps = [max(0, c - frame.width + 1) for c in range(end - columns, end)]
        return torch.tensor([edit.schedule.factor(s) for s in steps], device=like.device)

    def _changed(
        self,
        x: Tensor,
        part: Part,
        chosen: Tensor | None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One edit of some units of x [batch, pos, unit, d] at the chosen [batch, pos]."""
        edit, op = part.edit, part.edit.operation
        assert isinstance(op, VectorOp)
        gate = self._gate(edit, x.shape[0], x)
        if gate is not None:
            full = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            chosen = (full if chosen is None else chosen) & gate[:, None]
        if chosen is not None and not bool(chosen.any()):
            return x
        s = self._strength(edit, part.entries)
        if isinstance(s, Tensor):
            s = s.to(x)
            s = s[:, None] if s.dim() else s
        factors = self._factors(edit, x.shape[1], x)
        if factors is not None:
            s = op.neutral + factors.to(x)[:, None, None] * (s - op.neutral)
        tensors = {n: self._tensor(n, t, part, x) for n, t in edit.tensors.items()}
        tensors |= dict(extra or {})
        whole = part.units == tuple(range(x.shape[2]))
        index = torch.tensor(part.units, device=x.device)
        old = x if whole else x[:, :, index]
        new = op.apply(old, s, tensors, {n: edit.setting(n) for n in op.params}).to(x.dtype)
        if chosen is not None:
            new = torch.where(chosen[:, :, None, None], new, old)
        return new if whole else x.index_copy(2, index, new)

    def _tensor(self, name: str, value: Tensor, part: Part, x: Tensor) -> Tensor:
        value = value[list(part.entries)].to(x)
        if part.edit.op == "set" and value.dim() == 4:
            frame = self._tracker.frame
            past = 0 if frame is None or part.edit.site in ("k", "v") else frame.past
            if value.shape[2] < past + x.shape[1] and value.shape[2] != 1:
                raise InputError(
                    f"values to set are given for {value.shape[2]} positions; position "
                    f"{past + x.shape[1] - 1} is run"
                )
            if value.shape[2] != 1:
                value = value[:, :, past : past + x.shape[1]]
            if value.shape[1] not in (1, x.shape[0]):
                raise InputError(
                    f"values to set are given for {value.shape[1]} examples; {x.shape[0]} are run"
                )
        elif value.shape[-1] != x.shape[-1] and name != "basis":
            raise InputError(
                f"tensor {name!r} must have {x.shape[-1]} numbers per unit at site "
                f"{part.edit.site!r}; got {value.shape[-1]}"
            )
        return value

    def _gate(self, edit: Edit, rows: int, like: Tensor) -> Tensor | None:
        if edit.gate is None:
            return None
        closed = torch.zeros(rows, dtype=torch.bool, device=like.device)
        return self._gates.get(id(edit), closed)

    def _decide(self, edit: Edit, x: Tensor) -> None:
        gate, step = edit.gate, self._tracker.step
        assert gate is not None
        if gate.evaluate == "prompt" and step > 0:
            return
        frame = self._frame("text", x)
        last = torch.full((x.shape[0],), x.shape[1] - 1, device=x.device)
        if frame.past == 0:  # on the right, padding follows the last token
            last = (frame.offsets + frame.lengths - 1).clamp(max=x.shape[1] - 1)
        open_, cosine = gate.decide(x[torch.arange(x.shape[0], device=x.device), last])
        self._gates[id(edit)] = open_
        self.log.append(
            Decision(step, gate.layer, tuple(cosine.tolist()), tuple(open_.tolist()))
        )  # fmt: skip


def _fitted(chosen: Tensor | None, n: int) -> Tensor | None:
    """The last n columns, for sites that keep only the last positions."""
    return chosen if chosen is None or chosen.shape[1] == n else chosen[:, -n:]
