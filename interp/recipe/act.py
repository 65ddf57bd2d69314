"""Vector edits as they act on one tensor: strengths, tensors, positions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.errors import InputError
from interp.recipe.edit import Edit
from interp.recipe.gates import Gates
from interp.recipe.ops import VectorOp
from interp.recipe.place import Frame
from interp.recipe.table import Part
from interp.recipe.where import Positions


@dataclass(frozen=True)
class Place:
    """The columns that a tensor holds.

    Attributes:
        frame: the sequence.
        start: the first column.
        n: how many.
    """

    frame: Frame
    start: int
    n: int

    @property
    def steps(self) -> list[int]:
        """The step at which each column was first fed."""
        return [self.frame.step_of(c) for c in range(self.start, self.start + self.n)]

    def select(self, positions: Positions, owner: int) -> Tensor | None:
        """[batch, n] which are selected; None for all."""
        if positions.everywhere:
            return None
        return self.frame.select(positions, owner, self.start, self.n)


def chosen_rows(
    part: Part, positions: Positions, place: Place, gates: Gates, rows: int, like: Tensor
) -> Tensor | None:
    """[batch, n] where an edit acts, its gate included; None for everywhere.

    Raises:
        InputError: the edit is given for other examples than those that are run.
    """
    check_rows(part, place, rows)
    chosen = place.select(positions, part.owner)
    gate = part.edit.gate
    if gate is not None:
        now = part.depth >= gate.layer
        open_ = gates.mask(gate, part.edit.tower, place.steps, now=now, rows=rows, like=like)
        chosen = open_ if chosen is None else chosen & open_
    return chosen


def check_rows(part: Part, place: Place, rows: int) -> None:
    """Refuse rows that are no examples of an edit, each once or as beams beside one another.

    Beams are told from other prompts by the prompts that the recipe is bound to, else by their
    tokens: those of one prompt begin alike. A tower over patches is fed no tokens; its rows may be
    beams or tiles, and any multiple is taken.

    Raises:
        InputError: more rows than examples, and they are of other prompts.
    """
    edit, frame = part.edit, place.frame
    given = {t.shape[1] for t in edit.tensors.values() if t.dim() == 4}
    if isinstance(edit.strength, Tensor) and edit.strength.dim() == 2:
        given.add(edit.strength.shape[1])
    for n in given - {1, rows}:
        if rows % n:
            continue  # refused where it is used, which says what for
        bound = frame.bound[part.owner] if part.owner < len(frame.bound) else ()
        known = len(bound) == n if len(bound) > 1 else _alike(frame, n, rows // n)
        if not known:
            raise InputError(
                f"an edit given for {n} examples must run on these; got {rows} rows of other "
                f"prompts",
                hint="run as many prompts as it was made for; beams of each may follow one another",
            )


def _alike(frame: Frame, n: int, times: int) -> bool:
    """Whether rows are n prompts, each so many times in a row, as far as tokens are known."""
    ids = frame.ids
    if ids is None or len(ids) != n * times:
        return True
    key = ("alike", n)
    if key not in frame.known:
        prompt = ids[:, : frame.width].reshape(n, times, -1)
        frame.known[key] = (prompt == prompt[:, :1]).all()
    return bool(frame.known[key])


def strength_of(edit: Edit, entries: tuple[int, ...], rows: int) -> Tensor | float:
    """The strength of some units: a number, or [batch or 1, unit].

    Raises:
        InputError: it is given for another number of examples.
    """
    s = edit.strength
    assert s is not None
    if not isinstance(s, Tensor) or not s.dim():
        return s
    s = s[list(entries)]
    if s.dim() == 1:
        return s[None]
    if rows % s.shape[1]:
        raise InputError(f"strengths are given for {s.shape[1]} examples; {rows} are run")
    return s.repeat_interleave(rows // s.shape[1], 1).T


def factors_of(edit: Edit, place: Place, like: Tensor) -> Tensor | None:
    """[n] the schedule's factor for each column.

    It follows the position and not the forward, so that a run without a cache gives the same.
    """
    if edit.schedule is None:
        return None
    factors = [edit.schedule.factor(s) for s in place.steps]
    return torch.tensor(factors, device=like.device)


def changed(
    x: Tensor,
    part: Part,
    place: Place,
    gates: Gates,
    extra: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """X [batch, pos, unit, d] after one edit.

    Raises:
        InputError: a tensor or strength does not fit what is run.
    """
    edit, op = part.edit, part.edit.operation
    assert isinstance(op, VectorOp)
    if edit.idle:
        return x
    chosen = chosen_rows(part, edit.positions, place, gates, x.shape[0], x)
    if chosen is not None and not bool(chosen.any()):
        return x
    s = strength_of(edit, part.entries, x.shape[0])
    if isinstance(s, Tensor):
        s = s.to(x)
        s = s[:, None, :, None] if s.dim() else s
    factors = factors_of(edit, place, x)
    if factors is not None:
        s = op.neutral + factors.to(x)[:, None, None] * (s - op.neutral)
    check_sizes(edit, x.shape[-1])
    tensors = {n: _tensor(t, part, place, chosen, x) for n, t in edit.tensors.items()}
    tensors |= dict(extra or {})
    whole = part.units == tuple(range(x.shape[2]))
    index = torch.tensor(part.units, device=x.device)
    old = x if whole else x[:, :, index]
    new = op.apply(old, s, tensors, {n: edit.setting(n) for n in op.params}).to(x.dtype)
    if chosen is not None:
        new = torch.where(chosen[:, :, None, None], new, old)
    return new if whole else x.index_copy(2, index, new)


def check_sizes(edit: Edit, d: int) -> None:
    """Refuse tensors whose vectors are not of size d.

    Raises:
        InputError: one is not.
    """
    for name, value in edit.tensors.items():
        size = value.shape[1] if name == "basis" else value.shape[-1]
        if size != d:
            raise InputError(
                f"tensor {name!r} must have {d} numbers per vector at site {edit.site!r}; got "
                f"{size}"
            )


def _tensor(value: Tensor, part: Part, place: Place, chosen: Tensor | None, x: Tensor) -> Tensor:
    """One tensor of an edit: the entries of this layer's units, at these columns."""
    value = value[list(part.entries)].to(x)
    if value.dim() != 4:
        return value
    # [unit, example, position, d]
    if x.shape[0] % value.shape[1]:
        raise InputError(
            f"values to set are given for {value.shape[1]} examples; {x.shape[0]} are run"
        )
    value = value.repeat_interleave(x.shape[0] // value.shape[1], 1)
    if value.shape[2] == 1:
        return value
    short = place.start + place.n - value.shape[2]
    value = value[:, :, place.start : place.start + place.n]
    if short > 0:
        if chosen is None or bool(chosen[:, value.shape[2] :].any()):
            raise InputError(
                f"values to set are given for {place.start + place.n - short} positions; position "
                f"{place.start + place.n - 1} is run",
                hint="select the positions that have values: queries=Positions(prompt='all')",
            )
        value = torch.nn.functional.pad(value, (0, 0, 0, x.shape[1] - value.shape[2]))
    return value
