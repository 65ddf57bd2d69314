"""Towers that attend within pieces of their rows, read row by row.

Qwen's vision towers call attention once a window, frame or image; Pixtral's calls it once for all
images, with a mask that keeps them apart. There the pieces follow each other as the rows do. Swin
has all windows of all images in the batch axis of one call, each with positions from anywhere on
its grid. A query sees its own piece, so that every other key of its row has mass 0, exactly: each
piece goes through the kernels by itself, and nothing of row × row is made but what a reading asks
for.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from interp.errors import SiteError
from interp.images.patches import Windows
from interp.kernels import gather, sweep
from interp.kernels.places import Place, index_of
from interp.kernels.plan import Group, Pairs, Plan, Strip
from interp.kernels.windows import apart
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
                place = Place(torch.arange(a - first, b - first))
                self._read(_stretch(call, a - start, b - start), row, place)
        self.at = stop

    @torch.no_grad()
    def add_windows(self, call: AttnCall, windows: Sequence[Windows]) -> None:
        """Read a call whose batch axis holds all windows of all rows, in the order of the rows.

        Args:
            call: [window, query, head, d_v].
            windows: of each row.

        Raises:
            SiteError: these are not the windows of the rows.
        """
        for piece, row, place in apart(call, windows):
            self._read(piece, row, place)
        self.at = self.total

    def _read(self, call: AttnCall, row: int, place: Place) -> None:
        """Read a piece that holds some positions of a row."""
        for name, pairs in self.plan.pairs.items():
            q, k, w = pairs.per_example[row]
            here = place.has(q) & place.has(k)
            total = self._total(name, call, [x[0] for x in pairs.per_example])
            if here.any():
                inner = Pairs(((place.within(q[here]), place.within(k[here]), w[here]),))
                total[row] += _pairs(call, inner)
        for name, strip in self.plan.strips.items():
            q, k = strip.rows[row], strip.keys[row]
            near, seen = place.within(q[place.has(q)]), place.within(k[place.has(k)])
            total = self._total(name, call, strip.rows)
            if len(near) and len(seen):
                total[row] += _strip(call, Strip((near,), (seen,))) * (len(near) / len(q))
        for group, held in zip(self.plan.groups, self._rows, strict=True):
            self._sweep(call, group, held[row], row, place)
            for name in group.reducers:
                self._note(name, "sampled" if group.sample else sweep.source(call))
        if self.plan.values:
            self._keep(call, row, place)

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
        self, call: AttnCall, group: Group, held: dict[str, Tensor], row: int, place: Place
    ) -> None:
        """Add a piece's quantities to those of its row."""
        mine = place.has(group.rows[row]).nonzero().flatten()
        keys = index_of(place.index)
        for part in _paired(mine) if group.sample else [mine]:
            to = index_of(part)
            found = sweep.rows(call, _part(group, row, part, place))
            for name, (x,) in found.items():
                per_key = name in ("keymass", "keymass_se2")
                if name not in held:
                    rows = () if per_key else (len(group.rows[row]),)
                    last = (self.width,) if per_key or name == "rows" else x.shape[2:]
                    held[name] = x.new_zeros(x.shape[0], *rows, *last)
                if per_key:
                    held[name][:, keys] += x
                elif name == "rows":
                    whole = x.new_zeros(*x.shape[:2], self.width)
                    whole[..., keys] = x
                    held[name][:, to] = whole
                elif name == "top":
                    held[name][:, to] = place.index.to(x.device)[x.long()].to(x)
                else:
                    held[name][:, to] = x
            if group.sample and "keymass" in group.wants and len(part) == 1:
                self._halved(group, held, row, int(part), found["keymass"][0], keys)

    def _halved(
        self,
        group: Group,
        held: dict[str, Tensor],
        row: int,
        at: int,
        mass: Tensor,
        keys: slice | Tensor,
    ) -> None:
        """The squared error from a row whose partner has no mass on any key of this piece."""
        spread = group.spread[row]
        if at // 2 < len(spread):
            alone = mass / group.weights[row][at].to(mass)
            held["keymass_se2"][:, keys] += alone.square() * spread[at // 2].to(mass)

    def _keep(self, call: AttnCall, row: int, place: Place) -> None:
        """Put z and v at their places."""
        if self._z is None:
            n_rows = len(self._places)
            self._call = call
            self._z = call.z.new_zeros(n_rows, self.width, *call.z.shape[2:])
            if call.v is not None:
                shape = n_rows, call.v.shape[1], self.width, call.v.shape[3]
                self._v = call.v.new_zeros(shape)
        keys = index_of(place.index)
        self._z[row, keys] = call.z[0]
        if self._v is not None and call.v is not None:
            self._v[row][:, keys] = call.v[0]

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


def _paired(mine: Tensor) -> list[Tensor]:
    """Sampled rows of a piece: those whose pair (2i, 2i+1) is whole, then each of the others."""
    whole = torch.isin(mine ^ 1, mine)
    return [mine[whole], *mine[~whole].split(1)]


def _part(group: Group, row: int, part: Tensor, place: Place) -> Group:
    """Some of a group's query rows and the keys of a piece, counted within the piece."""
    rows, keys = index_of(part), index_of(place.index)
    columns = None if group.columns is None else group.columns[row : row + 1]
    return Group(
        [place.within(group.rows[row][rows])],
        [group.weights[row][rows]],
        [group.spread[row][part[: len(part) // 2 * 2 : 2] // 2]],
        group.sample,
        None if columns is None else columns[:, keys],
        group.wants,
        {name: ([bins[row][rows][:, keys]], n) for name, (bins, n) in group.bins.items()},
    )


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
