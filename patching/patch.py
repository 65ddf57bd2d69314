"""Activation patching of every head, and ablation by zero, mean or another example's value."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from interp.scores import HeadScores
from patching.engine import DIRECTIONS, SITES, head_effects
from patching.method import METHODS, Method
from patching.pairs import Pairs
from patching.references import REFERENCES


@METHODS.register("patch")
@dataclass(frozen=True)
class Patch(Method):
    """Exact effect of replacing each head's activation by that of the pair's other prompt.

    Attributes:
        site: `z`, `q`, `k`, `v` or `pattern`.
        direction: `noise` or `denoise`.
    """

    site: str = "z"
    direction: str = "noise"

    name: ClassVar[str] = "patch"
    summary: ClassVar[str] = "replace a head's activation by the other prompt's; exact"
    citation: ClassVar[str] = "Wang et al. 2022, arXiv 2211.00593, section 3"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {"site": SITES, "direction": DIRECTIONS}

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return head_effects(
            pairs.model, pairs, site=self.site, direction=self.direction, tower=pairs.tower,
            progress=progress,
        )  # fmt: skip


@METHODS.register("ablate")
@dataclass(frozen=True)
class Ablate(Method):
    """Exact effect of taking each head away from the clean run.

    Attributes:
        reference: `zero`, `mean` (per position, over the corrupted prompts of a batch) or
            `resample` (another pair's corrupted prompt).
    """

    reference: str = "zero"

    name: ClassVar[str] = "ablate"
    summary: ClassVar[str] = "take a head away: zero, mean or resample; exact"
    citation: ClassVar[str] = "Michel et al. 2019, arXiv 1905.10650; Wang et al. 2211.00593"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {"reference": REFERENCES}

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`."""
        return head_effects(
            pairs.model, pairs, reference=self.reference, tower=pairs.tower, progress=progress
        )
