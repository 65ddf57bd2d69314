"""One edit: which operation, where, how strongly, and when."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import HeadIdError, InputError, UnknownNameError
from interp.headid import HeadId
from interp.recipe.ops import LAYER_SITES, OPS, SITES, AttentionOp, Op
from interp.recipe.when import Gate, Schedule
from interp.recipe.where import Positions, Where

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Edit:
    """One operation at one site.

    Attributes:
        op: name of the operation; see `OPS`.
        where: heads or layers, and positions.
        strength: a number, or a tensor with one value, one per head (or layer), or one per head
            and example; None is the op's own default.
        site: the op's first site if not given.
        tensors: what the op takes, each [head, …] in the order of `where.heads` (or layers).
        params: further parameters of the op.
        gate: which examples.
        schedule: how the strength changes over decoding steps.
        twin: the recipe of the second run of `contrast`.

    Raises:
        UnknownNameError: no such op, or the op has no such tensor or parameter.
        InputError: the op does not work at that site, or a tensor is missing or misshapen.
    """

    op: str
    where: Where = Where()  # noqa: RUF009 - a frozen value
    strength: "float | Tensor | None" = None
    site: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None
    schedule: Schedule | None = None
    twin: "Recipe | None" = None

    def __post_init__(self) -> None:
        op = OPS[self.op]
        if not self.site:
            object.__setattr__(self, "site", op.sites[0])
        if self.site not in SITES:
            raise UnknownNameError("site", self.site, SITES)
        if self.site not in op.sites:
            raise InputError(
                f"op {self.op!r} works at {', '.join(op.sites)}; got site {self.site!r}",
                hint="leave site out for the first of these",
            )
        for name in self.params:
            if name not in op.params:
                raise UnknownNameError(f"parameter of op {self.op!r}", name, op.params)
        for name in self.tensors:
            if name not in op.tensors:
                raise UnknownNameError(f"tensor of op {self.op!r}", name, op.tensors)
        missing = [n for n in op.tensors if n not in self.tensors and n not in op.optional]
        if missing or (op.optional and not self.tensors):
            wanted = missing or sorted(op.optional)
            raise InputError(f"op {self.op!r} needs tensor {' or '.join(map(repr, wanted))}")
        self._check_strength()
        self._check_selection()
        self._check_positions()
        if (self.op == "contrast") != (self.twin is not None):
            raise InputError(
                "contrast, and only contrast, takes twin=, the recipe of the second run"
            )
        if self.twin is not None and any(e.site == "logits" for e in self.twin.edits):
            raise InputError("the second run of contrast may not edit its logits")

    def _check_strength(self) -> None:
        op, s = self.operation, self.strength
        if s is None:
            s = op.default
        elif not isinstance(s, Tensor):
            try:
                s = float(s)
            except (TypeError, ValueError):
                raise InputError(f"a strength is a number or a tensor; got {s!r}") from None
        object.__setattr__(self, "strength", s)
        values = s.detach().double() if isinstance(s, Tensor) else torch.tensor(s)
        if not values.numel() or not bool(values.isfinite().all()):
            raise InputError(f"a strength must be finite; got {_shown(values)}")
        why = op.refuses(values)
        if why:
            raise InputError(f"{why}; got {_shown(values)}")
        if self.schedule is not None and op.stepwise and self.schedule.kind != "first":
            raise InputError(
                f"op {self.op!r} is done or not, so its schedule can only be 'first'; got "
                f"{self.schedule.kind!r}"
            )

    def _check_positions(self) -> None:
        op, where = self.operation, self.where
        if isinstance(op, AttentionOp):
            if op.keys == "needed" and where.keys.everywhere:
                raise InputError(
                    f"op {self.op!r} changes nothing, or leaves nothing, when it is about every "
                    f"key",
                    hint="name keys: Where(heads=..., keys=span('needle'))",
                )
            if op.keys == "none" and not where.keys.everywhere:
                raise InputError(f"op {self.op!r} is about whole rows; got keys {where.keys}")
            return
        wanted, other = ("keys", "queries") if self.site in ("k", "v") else ("queries", "keys")
        given: Positions = getattr(where, other)
        if not given.everywhere:
            raise InputError(
                f"positions of site {self.site!r} are {wanted}; got {other} {given}",
                hint=f"Where(..., {wanted}=...)",
            )

    def _check_selection(self) -> None:
        layered = self.site in LAYER_SITES
        if layered and self.where.heads is not None:
            raise InputError(
                f"site {self.site!r} has no heads; got {self.where.heads[0]}",
                hint="select layers: Where(layers=(3,))",
            )
        if not layered and self.where.layers is not None:
            raise InputError(
                f"site {self.site!r} is edited by head; got layers {self.where.layers}",
                hint="select heads, or heads=None for all of them",
            )
        named = self.where.layers if layered else self.where.heads
        if self.site == "logits":
            named = (0,)
        if named is None and self.tensors:
            raise InputError(
                f"op {self.op!r} carries one tensor per {'layer' if layered else 'head'}, so "
                f"these must be named",
            )
        for name, value in self.tensors.items():
            spec = self.operation.tensors[name]
            if value.dim() not in {1 + len(form.split()) for form in spec.split(", or ")}:
                raise InputError(
                    f"tensor {name!r} of op {self.op!r} is [head or layer, {spec}]; got "
                    f"{tuple(value.shape)}"
                )
            if named is not None and value.shape[0] != len(named):
                raise InputError(
                    f"tensor {name!r} of op {self.op!r} has one entry per "
                    f"{'layer' if layered else 'head'}: {len(named)} selected, got "
                    f"{tuple(value.shape)}"
                )
        s = self.strength
        if (
            isinstance(s, Tensor)
            and s.dim()
            and (named is None or s.dim() > 2 or s.shape[0] != len(named))
        ):
            raise InputError(
                f"a strength is a number, one per named head or layer, or one per head and "
                f"example; got shape {tuple(s.shape)}"
            )

    @property
    def operation(self) -> Op:
        """The operation itself."""
        return OPS[self.op]

    @property
    def idle(self) -> bool:
        """Whether it changes nothing: its strength is the number at which its op does nothing."""
        return not isinstance(self.strength, Tensor) and self.strength == self.operation.neutral

    @property
    def positions(self) -> Positions:
        """Where vectors are edited: queries, or keys at the sites k and v."""
        return self.where.keys if self.site in ("k", "v") else self.where.queries

    @property
    def plain(self) -> bool:
        """Whether it does the same at every position of every input."""
        where = self.where
        return (
            where.queries.everywhere
            and where.keys.everywhere
            and self.gate is None
            and self.schedule is None
            and not any(isinstance(v, Positions) for v in self.params.values())
        )

    @property
    def tower(self) -> str:
        """The tower it acts in."""
        heads = self.where.heads
        return heads[0].tower if heads else self.where.tower

    def setting(self, name: str) -> Any:
        """A parameter, or its default."""
        return self.params.get(name, self.operation.params[name])

    def scaled(self, factor: "float | Tensor") -> "Edit":
        """The same edit at neutral + factor·(strength − neutral)."""
        op = self.operation
        assert self.strength is not None
        return replace(self, strength=op.neutral + factor * (self.strength - op.neutral))

    def moved(self, heads: tuple[HeadId, ...]) -> "Edit":
        """The same edit on other heads, as many as before."""
        return replace(self, where=replace(self.where, heads=heads))

    def selected(self, model: "Model") -> tuple[HeadId, ...]:
        """The heads it edits on a model; key-value heads for k and v.

        Raises:
            HeadIdError: a head lies outside the model.
        """
        grouped = self.site in ("k", "v")
        if self.where.heads is None:
            layers = model.tower(self.where.tower).layers
            return tuple(
                HeadId(x.index, h, x.tower)
                for x in layers
                for h in range(x.n_kv_heads if grouped else x.n_heads)
            )
        for head in self.where.heads:
            layer = model.layer_of(head)
            if grouped and head.head >= layer.n_kv_heads:
                raise HeadIdError(
                    f"site {self.site!r} has key-value heads 0 to {layer.n_kv_heads - 1}; got "
                    f"{head}",
                    hint=f"query head h reads key-value head h // "
                    f"{layer.n_heads // layer.n_kv_heads}",
                )
        return self.where.heads

    @property
    def attention(self) -> bool:
        """Whether it edits rows of scores or pattern."""
        return isinstance(self.operation, AttentionOp)

    def parameters(self) -> dict[str, Tensor]:
        """Its tensors, and its strength if that is one."""
        out = dict(self.tensors)
        if isinstance(self.strength, Tensor):
            out["strength"] = self.strength
        if self.gate is not None:
            out["gate.axis"] = self.gate.axis
        return out

    def __str__(self) -> str:
        where = self.where
        if self.site == "logits":
            units = "logits"
        elif self.site in LAYER_SITES:
            chosen = "every layer" if where.layers is None else f"layers {_list(where.layers)}"
            units = f"{self.site} of {chosen}"
        else:
            chosen = f"every head of {where.tower}" if where.heads is None else _list(where.heads)
            units = f"{self.site} of {chosen}"
        s = self.strength
        amount = f"s = {_shown(s)}" if isinstance(s, Tensor) else f"s = {s:g}"
        places = [] if where.queries.everywhere else [f"at {where.queries}"]
        if not where.keys.everywhere:
            places.append(f"on keys {where.keys}")
        extra = [str(x) for x in (self.gate, self.schedule) if x is not None]
        return " ".join([f"{self.op} ({amount})", units, *places, *extra])

    def to_json(self) -> dict[str, Any]:
        """The edit as plain values, without tensors."""
        out: dict[str, Any] = {"op": self.op, "site": self.site, "where": self.where.to_json()}
        if not isinstance(self.strength, Tensor):
            out["strength"] = self.strength
        params = {k: v.to_json() if isinstance(v, Positions) else v for k, v in self.params.items()}
        if params:
            out["params"] = params
        if self.gate is not None:
            out["gate"] = self.gate.to_json()
        if self.schedule is not None:
            out["schedule"] = self.schedule.to_json()
        if self.twin is not None:
            out["twin"] = [e.to_json() for e in self.twin.edits]
        return out

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: "Recipe | None" = None
    ) -> "Edit":
        """The reverse of `to_json`, given its tensors and its twin.

        Raises:
            UnknownNameError: a field that an edit does not have.
        """
        known = {f.name for f in fields(cls)} - {"tensors", "twin"}
        for name in data:
            if name not in known:
                raise UnknownNameError("field of an edit", name, known)
        values = dict(data)
        values["where"] = Where.from_json(values.get("where", {}))
        rest = dict(tensors)
        if "strength" in rest:
            values["strength"] = rest.pop("strength")
        if "gate" in values:
            values["gate"] = Gate(axis=rest.pop("gate.axis"), **values["gate"])
        if "schedule" in values:
            values["schedule"] = Schedule(**values["schedule"])
        values["params"] = {
            k: Positions.from_json(v) if isinstance(v, dict) else v
            for k, v in values.get("params", {}).items()
        }
        return cls(tensors=rest, twin=twin, **values)


def _shown(s: Tensor) -> str:
    return f"{float(s.detach()):g}" if not s.dim() else f"{tuple(s.shape)} values"


def _list(values: Any) -> str:
    shown = [str(v) for v in values]
    return (
        ", ".join(shown) if len(shown) <= 6 else f"{', '.join(shown[:5])} and {len(shown) - 5} more"
    )
