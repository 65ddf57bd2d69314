"""Where an edit acts: which heads or layers, and which positions.

Positions are absolute and count from the first real token of a prompt, whatever the padding. They
are never relative to the chunk of a forward: with a KV cache every forward but the first sees a
single token, and a rule relative to the chunk would silently stop after the prompt.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from interp.errors import InputError, UnknownNameError
from interp.headid import DEFAULT_TOWER, HeadId

Window = tuple[int, int]


@dataclass(frozen=True)
class Positions:
    """A set of token positions: the union of what is given, minus `exclude`.

    Attributes:
        prompt: `all`, or indices into the prompt; negative ones count from its end.
        generated: `all`, or a half-open window of produced tokens, counted from 0.
        window: a half-open window of absolute positions, prompt and produced tokens together.
        spans: names of spans of the prompts, bound when the recipe is switched on.
        tokens: token ids.
        exclude: positions taken away again.

    Raises:
        InputError: nothing is selected, or a window is empty.
    """

    prompt: "str | tuple[int, ...] | None" = None
    generated: "str | Window | None" = None
    window: Window | None = None
    spans: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    exclude: "Positions | None" = None

    def __post_init__(self) -> None:
        for name in ("prompt", "generated", "window", "spans", "tokens"):
            value = getattr(self, name)
            if isinstance(value, int) or (name == "spans" and isinstance(value, str)):
                object.__setattr__(self, name, (value,))
            elif value is not None and not isinstance(value, str | tuple):
                object.__setattr__(self, name, tuple(value))
        if not any((self.prompt, self.generated, self.window, self.spans, self.tokens)):
            raise InputError(
                "positions must select something; got nothing",
                hint="Positions.all(), prompt=(-1,), generated='all', spans=('needle',), …",
            )
        for name in ("prompt", "generated", "window", "tokens"):
            value = getattr(self, name) or ()
            if value == "all" and name in ("prompt", "generated"):
                continue
            if isinstance(value, str) or not all(isinstance(x, int) for x in value):
                what = "'all' or numbers" if name in ("prompt", "generated") else "numbers"
                raise InputError(f"{name} must be {what}; got {value!r}")
        for name in ("generated", "window"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (len(value) != 2 or not 0 <= value[0] < value[1]):
                raise InputError(f"{name} must be a window start < stop, from 0; got {value}")

    @classmethod
    def all(cls) -> "Positions":
        """Every position."""
        return cls(prompt="all", generated="all")

    @property
    def everywhere(self) -> bool:
        """Whether every position is selected."""
        return self.prompt == "all" and self.generated == "all" and self.exclude is None

    def to_json(self) -> dict[str, Any]:
        """The positions as plain values; only what differs from the default."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Positions):
                out[f.name] = value.to_json()
            elif value not in (None, ()):
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Positions":
        """The reverse of `to_json`.

        Raises:
            UnknownNameError: a field that positions do not have.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise UnknownNameError("field of positions", name, known)
        values = dict(data)
        if "exclude" in values:
            values["exclude"] = cls.from_json(values["exclude"])
        return cls(**values)

    def __str__(self) -> str:
        if self.everywhere:
            return "all positions"
        parts = []
        if self.prompt:
            parts.append("prompt" if self.prompt == "all" else f"prompt[{_list(self.prompt)}]")
        if self.generated:
            window = self.generated
            parts.append("generated" if window == "all" else f"generated[{window[0]}:{window[1]}]")
        if self.window:
            parts.append(f"positions[{self.window[0]}:{self.window[1]}]")
        parts += [f"span {name}" for name in self.spans]
        if self.tokens:
            parts.append(f"tokens {_list(self.tokens)}")
        text = " + ".join(parts)
        return f"{text} without ({self.exclude})" if self.exclude else text


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def span(*names: str) -> Positions:
    """The positions of named spans."""
    return Positions(spans=names)


@dataclass(frozen=True)
class Where:
    """Heads or layers, and positions.

    Attributes:
        heads: head ids for the sites z, q, scores and pattern, key-value heads for k and v; None
            is every head of the tower. Texts and (layer, head) pairs are read too.
        layers: layers for the sites resid and attn_out; None is every layer. For resid, layer l is
            the residual stream before layer l, and one more than the last is after the last.
        tower: tower of `layers`, and of `heads=None`.
        queries: positions whose activation is edited, or whose rows of scores and pattern are.
        keys: keys that an edit of scores or pattern is about; positions edited on k and v.

    Raises:
        HeadIdError: an id that cannot be read.
        InputError: an empty selection.
    """

    heads: "tuple[HeadId, ...] | None" = None
    layers: "tuple[int, ...] | None" = None
    tower: str = DEFAULT_TOWER
    queries: Positions = Positions(prompt="all", generated="all")
    keys: Positions = Positions(prompt="all", generated="all")

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", read_heads(self.heads))
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
            if not layers:
                raise InputError(
                    "layers must name at least one layer; got none",
                    hint="leave layers out for every layer of the tower",
                )
            if len(set(layers)) != len(layers):
                raise InputError(f"each layer may be named once; got {layers}")
            object.__setattr__(self, "layers", layers)

    def at(self, queries: Positions | None = None, keys: Positions | None = None) -> "Where":
        """The same heads at other positions."""
        return replace(self, queries=queries or self.queries, keys=keys or self.keys)

    def to_json(self) -> dict[str, Any]:
        """The selection as plain values; only what differs from the default."""
        out: dict[str, Any] = {}
        if self.heads is not None:
            out["heads"] = [str(h) for h in self.heads]
        if self.layers is not None:
            out["layers"] = list(self.layers)
        if self.tower != DEFAULT_TOWER:
            out["tower"] = self.tower
        for name in ("queries", "keys"):
            value = getattr(self, name)
            if not value.everywhere:
                out[name] = value.to_json()
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Where":
        """The reverse of `to_json`.

        Raises:
            UnknownNameError: a field that a selection does not have.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise UnknownNameError("field of where", name, known)
        values = dict(data)
        for name in ("queries", "keys"):
            if name in values:
                values[name] = Positions.from_json(values[name])
        return cls(**values)


def read_heads(heads: Any) -> tuple[HeadId, ...]:
    """Head ids from ids, texts, (layer, head) pairs, or one of these.

    Raises:
        HeadIdError: one cannot be read.
        InputError: there are none, or one comes twice.
    """
    if isinstance(heads, str | HeadId):
        heads = (heads,)
    out = []
    for head in heads:
        if isinstance(head, HeadId):
            out.append(head)
        elif isinstance(head, str):
            out.append(HeadId.parse(head))
        else:
            layer, index = head
            out.append(HeadId(int(layer), int(index)))
    if not out:
        raise InputError(
            "heads must name at least one head; got none",
            hint="leave heads out for every head of the tower",
        )
    if len(set(out)) != len(out):
        twice = next(h for h in out if out.count(h) > 1)
        raise InputError(f"each head may be named once; {twice} comes twice")
    return tuple(out)
