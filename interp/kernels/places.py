"""Positions of a row that follow one another, or lie anywhere."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The positions of a row that a piece holds, rising."""

    index: Tensor

    def has(self, positions: Tensor) -> Tensor:
        """Which of some positions are in the piece."""
        found: Tensor = torch.isin(positions, self.index)
        return found

    def within(self, positions: Tensor) -> Tensor:
        """Where in the piece positions stand that are in it."""
        return torch.searchsorted(self.index, positions)


def index_of(places: Tensor) -> slice | Tensor:
    """Places as a slice, which copies nothing, if each is one after the other."""
    n = len(places)
    if n and int(places[-1]) - int(places[0]) == n - 1 and bool((places.diff() == 1).all()):
        return slice(int(places[0]), int(places[0]) + n)
    return places
