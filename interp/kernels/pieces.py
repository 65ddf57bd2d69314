"""Towers that run rows as one sequence and attend within pieces of it, read row by row.

Qwen's vision towers call attention once a window, frame or image; Pixtral's calls it once for all
images, with a mask that keeps them apart. The pieces follow each other as the rows do. A query
sees its own piece, so that every other key of its row has mass 0, exactly: each piece goes through
the kernels by itself, and nothing of row × row is made but what a reading asks for.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from interp.errors import SiteError
from interp.kernels import gather, sweep
from interp.kernels.plan import Group, Pairs, Plan, Strip
from interp.seam.calls import AttnCall

Result = tuple[Tensor, str, Tensor | None]
"""Values [example, head, …], the kernel that served them, and their standard error if sampled."""


class Pieces:
    """All readings of one layer, from calls that come one after another.

    Args:
        plan: compiled for the rows, each padded to one width.
        lengths: positions of each row.
        order: the rows in the order in which they run.
        width: positions of the longest row.

    Attributes:
        at: positions read so far.
        total: positions of all rows.
    """

    def __init__(
        self, plan: Plan, lengths: Sequence[int], order: Sequence[int], width: int
    ) -> None:
        self.plan, self.width = plan, width
        self.at, self.total = 0, sum(lengths)
        stops = list(itertools.accumulate(lengths[row] for row in order))
        self._places = list(zip(order, [0, *stops], stops, strict=False))
        self._single: dict[str, Tensor] = {}
        self._rows: list[list[dict[str, Tensor]]] = [[{} for _ in lengths] for _ in plan.groups]
        self._z: Tensor | None = None
        self._v: Tensor | None = None
        self._call: AttnCall | None = None
        self._how: dict[str, set[str]] = {}

    @property
    def done(self) -> bool:
        """Whether every position was read."""
        return self.at == self.total

    @torch.no_grad()
    def add(self, call: AttnCall) -> None:
        """Read the next call [1, query, head, d_v].

        Raises:
            SiteError: it goes beyond the last row, or lets one row see another.
        """
        start, stop = self.at, self.at + call.n_query
        if stop > self.total:
            raise SiteError(
                f"{call.name} attends over at least {stop} positions; the images have {self.total}"
            )
        for row, first, last in self._places:
            a, b = max(start, first), min(stop, last)
            if a < b:
                self._read(_stretch(call, a - start, b - start), row, a - first)
        self.at = stop

    def _read(self, call: AttnCall, row: int, at: int) -> None:
        """Read a piece that begins at a position of a row."""
        keys = slice(at, at + call.n_query)
        for name, pairs in self.plan.pairs.items():
            q, k, w = pairs.per_example[row]
            here = _inside(q, keys) & _inside(k, keys)
            total = self._total(name, call, [x[0] for x in pairs.per_example])
            if here.any():
                total[row] += _pairs(call, Pairs(((q[here] - at, k[here] - at, w[here]),)))
        for name, strip in self.plan.strips.items():
            q, k = strip.rows[row], strip.keys[row]
            near, seen = q[_inside(q, keys)] - at, k[_inside(k, keys)] - at
            total = self._total(name, call, strip.rows)
            if len(near) and len(seen):
                total[row] += _strip(call, Strip((near,), (seen,))) * (len(near) / len(q))
        for group, held in zip(self.plan.groups, self._rows, strict=True):
            self._sweep(call, group, held[row], row, keys)
            for name in group.reducers:
                self._note(name, "sampled" if group.sample else sweep.source(call))
        if self.plan.values:
            self._keep(call, row, keys)

    def _total(self, name: str, call: AttnCall, queries: Sequence[Tensor]) -> Tensor:
        """The sums [row, head] that pieces add to; NaN where nothing is asked of a row."""
        self._note(name, "gather" if gather.serves(call) else sweep.source(call))
        if name not in self._single:
            shape = len(queries), call.n_heads
            self._single[name] = call.z.new_full(shape, math.nan, dtype=call.dtype)
            self._single[name][[row for row, q in enumerate(queries) if len(q)]] = 0.0
        return self._single[name]

    def _note(self, name: str, how: str) -> None:
        self._how.setdefault(name, set()).add(how)

    def _sweep(
        self, call: AttnCall, group: Group, held: dict[str, Tensor], row: int, keys: slice
    ) -> None:
        """Add a piece's quantities to those of its row."""
        start, stop = torch.searchsorted(
            group.rows[row], torch.tensor([keys.start, keys.stop])
        ).tolist()
        for part in _paired(start, stop) if group.sample else [slice(start, stop)]:
            found = sweep.rows(call, group.part(row, part, keys))
            for name, (x,) in found.items():
                per_key = name in ("keymass", "keymass_se2")
                if name not in held:
                    rows = () if per_key else (len(group.rows[row]),)
                    last = (self.width,) if per_key or name == "rows" else x.shape[2:]
                    held[name] = x.new_zeros(x.shape[0], *rows, *last)
                if per_key:
                    held[name][:, keys] += x
                elif name == "rows":
                    held[name][:, part, keys] = x
                else:
                    held[name][:, part] = x + keys.start if name == "top" else x
            if group.sample and "keymass" in group.wants and part.stop - part.start == 1:
                self._halved(group, held, row, part.start, found["keymass"][0], keys)

    def _halved(
        self, group: Group, held: dict[str, Tensor], row: int, at: int, mass: Tensor, keys: slice
    ) -> None:
        """The squared error from a row whose partner has no mass on any key of this piece."""
        spread = group.spread[row]
        if at // 2 < len(spread):
            alone = mass / group.weights[row][at].to(mass)
            held["keymass_se2"][:, keys] += alone.square() * spread[at // 2].to(mass)

    def _keep(self, call: AttnCall, row: int, keys: slice) -> None:
        """Put z and v at their places."""
        if self._z is None:
            n_rows = len(self._places)
            self._call = call
            self._z = call.z.new_zeros(n_rows, self.width, *call.z.shape[2:])
            if call.v is not None:
                shape = n_rows, call.v.shape[1], self.width, call.v.shape[3]
                self._v = call.v.new_zeros(shape)
        self._z[row, keys] = call.z[0]
        if self._v is not None and call.v is not None:
            self._v[row, :, keys] = call.v[0]

    @torch.no_grad()
    def results(self) -> dict[str, Result]:
        """Every reading of the plan, once all is read."""
        assert self.done
        how = {name: "+".join(sorted(found)) for name, found in self._how.items()}
        out: dict[str, Result] = {n: (x, how[n], None) for n, x in self._single.items()}
        for group, held in zip(self.plan.groups, self._rows, strict=True):
            rows = {name: [x[name] for x in held] for name in held[0]}
            for name, (values, _, se) in group.reduce(rows, "sweep").items():
                out[name] = values, how[name], se
        for name, reduce in self.plan.values.items():
            assert self._call is not None and self._z is not None
            whole = AttnCall(self._call.name, self._call.module, None, None, self._v, self._z)
            out[name] = reduce(whole), "z", None
        return out


def _pairs(call: AttnCall, pairs: Pairs) -> Tensor:
    """Weighted sum of entries [head] of a piece."""
    if gather.serves(call):
        return gather.pair_mass(call, pairs)[0]
    return sweep.pair_mass(call, pairs)[0]


def _strip(call: AttnCall, strip: Strip) -> Tensor:
    """Mean over rows of a piece of the mass [head] on a few of its keys."""
    if gather.serves(call):
        return gather.strip_mass(call, strip)[0]
    return sweep.pair_mass(call, strip.pairs)[0]


def _inside(places: Tensor, keys: slice) -> Tensor:
    inside: Tensor = (places >= keys.start) & (places < keys.stop)
    return inside


def _paired(start: int, stop: int) -> list[slice]:
    """A run of sampled rows cut so that pairs (2i, 2i+1) stay whole and halves are alone."""
    cuts = sorted({start, min(start + start % 2, stop), max(stop - stop % 2, start), stop})
    return [slice(a, b) for a, b in itertools.pairwise(cuts)] or [slice(start, stop)]


def _stretch(call: AttnCall, start: int, stop: int) -> AttnCall:
    """A stretch of a call whose queries see nothing else, as a call.

    Raises:
        SiteError: they see more.
    """
    if start == 0 and stop == call.n_query:
        return call
    at = slice(start, stop)
    if not _apart(call, at):
        raise SiteError(
            f"{call.name} lets images of one prompt see those of another, or hides them in a way "
            f"that is not known; its rows cannot be read one by one",
            hint="read one prompt at a time",
        )
    mask = None if call.mask is None else call.mask[..., at]
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., at, :]
    return replace(
        call,
        q=None if call.q is None else call.q[:, :, at],
        k=None if call.k is None else call.k[:, :, at],
        v=None if call.v is None else call.v[:, :, at],
        z=call.z[:, at],
        mask=mask,
        lse=None if call.lse is None else call.lse[..., at],
        extra=None,
        pattern=None if call.pattern is None else call.pattern[..., at, at],
    )


def _apart(call: AttnCall, at: slice) -> bool:
    """Whether queries of a stretch see no key before or after it."""
    seen = call.pattern if call.pattern is not None else call.mask
    if seen is None:
        return False
    if seen.shape[-2] > 1:
        seen = seen[..., at, :]
    beyond = (seen[..., : at.start], seen[..., at.stop :])
    if call.pattern is not None or seen.dtype == torch.bool:
        return not any(bool(x.any()) for x in beyond)
    # Half-precision masks hide by the least number there is.
    least = torch.finfo(seen.dtype).min / 2
    return not any(bool((x > max(least, -1e29)).any()) for x in beyond)
