"""Readings compiled for one shape of call: pairs to gather, rows to sweep, columns to append.

A plan is made once per batch and call shape and used for every layer. Everything linear in a row
of the pattern becomes columns c: the reading is then a weighted mean over query rows of A @ c.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from interp.errors import InputError, SiteError, SpanError
from interp.prompts import Batch
from interp.readings import (
    BinMass,
    Distance,
    Entropy,
    KeyMass,
    PairMass,
    Reading,
    Rows,
    SpanMass,
    TopKey,
    ValueNorm,
    ZNorm,
    ZValue,
)
from interp.seam.calls import AttnCall

# The entries of a span of at most so many keys are computed; a longer one becomes a column. A
# column costs the kernel a tenth of its time whatever the span.
STRIP_KEYS = 64


@dataclass(frozen=True)
class Side:
    """The query or key side of a call: how wide it is and where spans lie on it."""

    batch: Batch
    n: int | None = None

    @property
    def width(self) -> int:
        """Positions of the side, padding counted."""
        return self.batch.input_ids.shape[1] if self.n is None else self.n

    def at(self, n: int) -> "Side":
        """The side of a call that has `n` positions."""
        return self if n == self.width else Side(self.batch, n)

    def positions(self, span: str) -> list[list[int]]:
        """Positions of a span for each example.

        Raises:
            SiteError: the call's positions are not the prompt's tokens and a span is asked for.
        """
        if self.n is None:
            return self.batch.positions(span)
        if span != "all":
            raise SiteError(
                f"span {span!r} names tokens of the prompt ({self.batch.input_ids.shape[1]} wide); "
                f"this tower attends over {self.n} other positions",
                hint="read span 'all' on this tower",
            )
        return [list(range(self.n))] * len(self.batch)


@dataclass(frozen=True)
class Pairs:
    """Single entries of the pattern and their weights: out[b] = Σ w·A[b, :, q, k].

    Attributes:
        per_example: for each example q [n], k [n] and weights [n]; n = 0 is undefined.
    """

    per_example: tuple[tuple[Tensor, Tensor, Tensor], ...]


@dataclass(frozen=True)
class Strip:
    """All entries of some rows and a few keys; the value is the mean over rows of their sum.

    Attributes:
        rows: for each example the query rows, ascending.
        keys: for each example the keys.
    """

    rows: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]

    @cached_property
    def pairs(self) -> Pairs:
        """The same as single entries."""
        out = []
        for q, k in zip(self.rows, self.keys, strict=True):
            pairs = torch.cartesian_prod(q, k).view(-1, 2)
            weight = torch.full((len(pairs),), 1 / max(len(q), 1), dtype=torch.float64)
            out.append((pairs[:, 0], pairs[:, 1], weight))
        return Pairs(tuple(out))


Reducer = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]


@dataclass
class Group:
    """Readings that share query rows and are answered in one pass over them.

    Attributes:
        rows: for each example the query rows, ascending.
        weights: for each example the weight of each row in a mean; they sum to one.
        spread: for each example the coefficient of (x₁ − x₂)² in the squared standard error, one
            for each consecutive pair of sampled rows.
        sample: rows asked for, or None if all are read.
        columns: [example, key, c] or None.
        wants: which per-row quantities are needed: `entropy`, `keymass`, `top`, `rows`.
        bins: reading name to the bins [row, key] of each example, 0 for none, and their number.
        reducers: reading name to the function that makes its values from the per-row quantities.
    """

    rows: list[Tensor]
    weights: list[Tensor]
    spread: list[Tensor]
    sample: int | None
    columns: Tensor | None = None
    wants: set[str] = field(default_factory=set)
    bins: dict[str, tuple[list[Tensor], int]] = field(default_factory=dict)
    reducers: dict[str, Reducer] = field(default_factory=dict)

    @property
    def appendable(self) -> bool:
        """Whether columns on the model's own kernel answer all of it."""
        if self.wants or self.bins:
            return False
        return self.columns is not None and self.sample is None

    def add_columns(self, columns: Tensor) -> slice:
        """Append columns [example, key, c]; returns where they stand."""
        at = 0 if self.columns is None else self.columns.shape[-1]
        parts = [columns] if self.columns is None else [self.columns, columns]
        self.columns = torch.cat(parts, dim=-1)
        return slice(at, at + columns.shape[-1])

    def mean(self, per_row: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weighted means over rows of [head, row] values for each example, and standard errors."""
        means, errors = [], []
        for x, w, c in zip(per_row, self.weights, self.spread, strict=True):
            means.append(x @ w.to(x) if len(w) else x.new_full(x.shape[:1], math.nan))
            if self.sample is not None:
                diff = x[:, 0 : 2 * len(c) : 2] - x[:, 1 : 2 * len(c) : 2]
                errors.append((diff.square() @ c.to(x)).sqrt())
        return torch.stack(means), torch.stack(errors) if self.sample is not None else None

    def reduce(
        self, rows: Mapping[str, Tensor | list[Tensor]], how: str
    ) -> dict[str, tuple[Tensor, str, Tensor | None]]:
        """The values of each reading of the group from its per-row quantities."""
        out = {}
        if how == "columns":
            whole = rows["columns"]
            assert isinstance(whole, Tensor)
            rows = {"columns": [_at(x, r) for x, r in zip(whole, self.rows, strict=True)]}
        for name, reducer in self.reducers.items():
            values, se = reducer(rows)  # type: ignore[arg-type]
            out[name] = values, how, se
        return out


def _at(x: Tensor, rows: Tensor) -> Tensor:
    return x if len(rows) == x.shape[1] else x[:, rows.to(x.device)]


@dataclass
class Plan:
    """All readings, compiled."""

    pairs: dict[str, Pairs] = field(default_factory=dict)
    strips: dict[str, Strip] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    values: dict[str, Callable[[AttnCall], Tensor]] = field(default_factory=dict)

    def appended(self) -> Tensor | None:
        """Columns [example, key, c] for the model's own kernel, groups in order, or None."""
        parts = [g.columns for g in self.groups if g.appendable and g.columns is not None]
        return torch.cat(parts, dim=-1) if parts else None


def compile_plan(
    readings: Mapping[str, Reading], queries: Side, keys: Side, *, causal: bool
) -> Plan:
    """Compile readings for calls of `queries.width` × `keys.width` positions.

    Args:
        readings: name to reading.
        queries: the query side.
        keys: the key side.
        causal: whether queries see no later keys, padding aside.
    """
    plan = Plan()
    groups: dict[tuple[str, int | None], Group] = {}

    def group(query: str, sample: int | None) -> Group:
        if (query, sample) not in groups:
            groups[query, sample] = _rows(queries.positions(query), sample)
        return groups[query, sample]

    for name, reading in readings.items():
        match reading:
            case PairMass():
                plan.pairs[name] = _related(reading, queries, keys)
            case SpanMass(sample=None) if _short(keys.positions(reading.key), keys.width):
                plan.strips[name] = Strip(
                    tuple(torch.tensor(x) for x in queries.positions(reading.query)),
                    tuple(torch.tensor(x) for x in keys.positions(reading.key)),
                )
            case SpanMass():
                g = group(reading.query, reading.sample)
                at = g.add_columns(_indicator(keys, reading.key)[..., None])
                g.reducers[name] = _linear(g, at)
            case BinMass():
                g = group(reading.query, None)
                g.bins[name] = _binned(reading, g, queries, keys)
                g.reducers[name] = _bin_mass(g, name, reading.per)
            case Distance():
                g = group(reading.query, reading.sample)
                at = g.add_columns(_ramp(keys))
                g.reducers[name] = _distance(g, at, keys.width)
            case Entropy():
                g = group(reading.query, reading.sample)
                g.wants.add("entropy")
                g.reducers[name] = _per_row(g, "entropy")
            case KeyMass():
                g = group(reading.query, reading.sample)
                g.wants.add("keymass")
                g.reducers[name] = _key_mass(g, causal, keys.positions("all"))
            case TopKey():
                g = group(reading.query, None)
                g.wants.add("top")
                g.reducers[name] = _listed("top")
            case Rows():
                g = group(reading.query, None)
                g.wants.add("rows")
                g.reducers[name] = _listed("rows")
            case ZNorm():
                plan.values[name] = _z_norm(queries.positions(reading.query))
            case ZValue():
                plan.values[name] = _z_value(queries.positions(reading.query))
            case ValueNorm():
                plan.values[name] = _value_norm(keys.positions(reading.key))
            case _:
                raise InputError(f"{type(reading).__name__} is not a reading the engine knows")
    plan.groups = list(groups.values())
    return plan


def _short(spans: list[list[int]], n_key: int) -> bool:
    most = min(STRIP_KEYS, max(4, n_key // STRIP_KEYS))
    return all(0 < len(keys) <= most for keys in spans)


def _rows(positions: list[list[int]], sample: int | None) -> Group:
    rows, weights, spread = [], [], []
    for listed in positions:
        if sample is None or len(listed) <= sample:
            n = len(listed)
            rows.append(torch.tensor(listed, dtype=torch.long))
            weights.append(torch.full((n,), 1 / max(n, 1), dtype=torch.float64))
            spread.append(torch.zeros(n // 2, dtype=torch.float64))
            continue
        # Two rows from each of equal strata; the choice depends on the length alone.
        gen = torch.Generator().manual_seed(len(listed))
        bounds = torch.linspace(0, len(listed), sample // 2 + 1).round().long().tolist()
        chosen, w, c = [], [], []
        for start, stop in itertools.pairwise(bounds):
            size = stop - start
            pick = (torch.randperm(size, generator=gen)[:2] + start).sort().values.tolist()
            chosen += [listed[i] for i in pick]
            share = size / len(listed)
            w += [share / len(pick)] * len(pick)
            # Var of the mean of 2 of `size` rows is (1 − 2/size)·s²/2, and s² = (x₁ − x₂)²/2.
            c.append(share**2 * (1 - 2 / size) / 4)
        rows.append(torch.tensor(chosen))
        weights.append(torch.tensor(w, dtype=torch.float64))
        spread.append(torch.tensor(c, dtype=torch.float64))
    return Group(rows, weights, spread, sample)


def _indicator(side: Side, span: str) -> Tensor:
    out = torch.zeros(len(side.batch), side.width, device=side.batch.input_ids.device)
    for row, listed in zip(out, side.positions(span), strict=True):
        row[listed] = 1
    return out


def _ramp(side: Side) -> Tensor:
    """Columns [one, place], the place scaled to about ±1/2 so that float32 keeps its digits."""
    n = side.width
    device = side.batch.input_ids.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    place = (torch.arange(n, device=device, dtype=wide) - n // 2) / n
    return torch.stack([torch.ones_like(place), place], dim=-1).expand(len(side.batch), -1, -1)


def _tokens_both(queries: Side, keys: Side) -> None:
    if queries.n is not None or keys.n is not None or queries.batch is not keys.batch:
        raise SiteError(
            "relations between tokens need queries and keys that are both the prompt's tokens"
        )


def _related(reading: PairMass, queries: Side, keys: Side) -> Pairs:
    _tokens_both(queries, keys)
    out = []
    batch = queries.batch
    for prompt, offset in zip(batch.prompts, batch.offsets, strict=True):
        pairs = torch.from_numpy(reading.relation.pairs(prompt))
        if reading.query != "all":
            allowed = torch.zeros(len(prompt), dtype=torch.bool)
            allowed[prompt.positions(reading.query)] = True
            pairs = pairs[allowed[pairs[:, 0]]]
        n = len(pairs) if reading.per == "entry" else len(pairs[:, 0].unique())
        weight = torch.full((len(pairs),), 1 / max(n, 1), dtype=torch.float64)
        out.append((pairs[:, 0] + offset, pairs[:, 1] + offset, weight))
    return Pairs(tuple(out))


def _binned(reading: BinMass, group: Group, queries: Side, keys: Side) -> tuple[list[Tensor], int]:
    _tokens_both(queries, keys)
    out = []
    batch = queries.batch
    for prompt, offset, rows in zip(batch.prompts, batch.offsets, group.rows, strict=True):
        bins = torch.from_numpy(reading.binning.bins(prompt)) + 1
        whole = bins.new_zeros(len(rows), keys.width)
        whole[:, offset : offset + len(prompt)] = bins[rows - offset]
        out.append(whole)
    return out, max(int(x.max()) if x.numel() else 0 for x in out)


def _bin_mass(group: Group, name: str, per: str) -> Reducer:
    listed, n = group.bins[name]
    count = [x.new_zeros(len(x), n + 1).scatter_add_(1, x, torch.ones_like(x)) for x in listed]

    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values = []
        for mass, keys in zip(rows[f"bins/{name}"], count, strict=True):
            keys = keys[:, 1:].to(mass)
            weight = (keys.sum(1, keepdim=True) > 0).expand_as(keys)
            if per == "entry":
                mass, weight = mass / keys.clamp(min=1), keys > 0
            x = (mass * weight).sum(1) / weight.sum(0)
            values.append(x.masked_fill(keys.sum(0) == 0, math.nan))
        return torch.stack(values), None

    return reduce


def _linear(group: Group, at: slice) -> Reducer:
    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return group.mean([x[..., at.start] for x in rows["columns"]])

    return reduce


def _distance(group: Group, at: slice, n_key: int) -> Reducer:
    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        per_row = []
        for x, r in zip(rows["columns"], group.rows, strict=True):
            mass, place = x[..., at.start], x[..., at.start + 1]
            query = (r.to(x.device) - n_key // 2).to(x.dtype) / n_key
            per_row.append((query * mass - place) * n_key)
        return group.mean(per_row)

    return reduce


def _per_row(group: Group, key: str) -> Reducer:
    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return group.mean(list(rows[key]))

    return reduce


def _key_mass(group: Group, causal: bool, real: list[list[int]]) -> Reducer:
    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values, errors = [], []
        for b, (r, w) in enumerate(zip(group.rows, group.weights, strict=True)):
            mass = rows["keymass"][b]
            n = mass.shape[-1]
            if not causal:
                seen = mass.new_full((n,), 1.0 if len(r) else 0.0)
            else:
                # Weight of the rows at or after each key: all that can see it.
                first = torch.zeros(n, dtype=torch.float64).index_add_(0, r, w)
                seen = first.flip(0).cumsum(0).flip(0).to(mass)
            undefined = seen < 1e-12
            # Padding is no key that anything could see, wherever it stands.
            padding = torch.ones_like(undefined)
            padding[real[b]] = False
            undefined |= padding
            values.append((mass / seen).masked_fill(undefined, math.nan))
            if group.sample is not None:
                se = rows["keymass_se2"][b].sqrt() / seen
                errors.append(se.masked_fill(undefined, math.nan))
        return torch.stack(values), torch.stack(errors) if errors else None

    return reduce


def _listed(key: str) -> Reducer:
    def reduce(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        parts = list(rows[key])
        n = max(x.shape[1] for x in parts)
        if n == 0:
            raise SpanError("whole rows were asked for, and no prompt has a query for them")
        out = parts[0].new_full((len(parts), parts[0].shape[0], n, *parts[0].shape[2:]), math.nan)
        for b, x in enumerate(parts):
            out[b, :, : x.shape[1]] = x
        return out, None

    return reduce


def _z_norm(positions: list[list[int]]) -> Callable[[AttnCall], Tensor]:
    def reduce(call: AttnCall) -> Tensor:
        norms = call.z.to(call.dtype).norm(dim=-1)
        return torch.stack([x[p].mean(0) for x, p in zip(norms, positions, strict=True)])

    return reduce


def _z_value(positions: list[list[int]]) -> Callable[[AttnCall], Tensor]:
    def reduce(call: AttnCall) -> Tensor:
        n = max(map(len, positions))
        z = call.z.to(call.dtype)
        out = z.new_full((z.shape[0], z.shape[2], n, z.shape[3]), math.nan)
        for b, p in enumerate(positions):
            out[b, :, : len(p)] = z[b, p].transpose(0, 1)
        return out

    return reduce


def _value_norm(positions: list[list[int]]) -> Callable[[AttnCall], Tensor]:
    def reduce(call: AttnCall) -> Tensor:
        if call.v is None:
            raise SiteError(f"values of {call.name} are not reached; only its pattern is")
        norms = call.v.to(call.dtype).norm(dim=-1)
        per_group = torch.stack([x[:, p].mean(1) for x, p in zip(norms, positions, strict=True)])
        return per_group.repeat_interleave(call.n_heads // per_group.shape[1], dim=1)

    return reduce
