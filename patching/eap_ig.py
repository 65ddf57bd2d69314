"""Integrated gradients from the corrupted to the clean input, for edges and for heads.

Gradients are taken not in one run but along the straight line between the two streams at the first
block, x_α = x_corrupted + α (x_clean − x_corrupted), and averaged. That sees effects that are
saturated at the end points only. For the edges of the input the scores are complete: they add up
to the whole difference of the metric between the runs, up to the error of the sum over steps.

Rules for the steps: `midpoint` (the most accurate), `left` (from the corrupted run on, without the
clean one: the authors' edges), `right` (without the corrupted one: the authors' nodes), `ends` (the
two runs alone, whatever the number of steps).

Source: Hanna et al. 2024, arXiv 2403.17806, section 3.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from interp.errors import InputError
from interp.scores import HeadScores
from patching.atp import PORTS, AttributionPatching, check_choice, estimates
from patching.eap import EdgeAttributionPatching
from patching.edges import HOWS
from patching.engine import DIRECTIONS, base_run
from patching.gradients import Trace, gradients, trace
from patching.method import METHODS, Method
from patching.pairs import PairBatch, Pairs
from patching.verify import verified

Progress = Callable[[int, int], None]

RULES: dict[str, Callable[[int], list[float]]] = {
    "midpoint": lambda n: [(i + 0.5) / n for i in range(n)],
    "left": lambda n: [i / n for i in range(n)],
    "right": lambda n: [(i + 1) / n for i in range(n)],
    "ends": lambda n: [0.0, 1.0],
}
"""Places between the corrupted run (0) and the clean one (1) at which gradients are taken."""


def path(batch: PairBatch, steps: int, rule: str) -> list[Tensor]:
    """Streams at the first block on the way from the corrupted to the clean run.

    Raises:
        InputError: no step, or an unknown rule.
    """
    check_choice("rule", rule, tuple(RULES))
    if steps < 1:
        raise InputError(f"the number of steps must be at least 1; got {steps}")
    with torch.no_grad():
        clean = trace(batch.clean)[0].streams[0]
        corrupted = trace(batch.corrupted)[0].streams[0]
    return [torch.lerp(corrupted, clean, alpha) for alpha in RULES[rule](steps)]


@METHODS.register("eap-ig")
@dataclass(frozen=True)
class EdgeIntegratedGradients(EdgeAttributionPatching):
    """Effects of edges by gradients averaged between the two inputs, and of heads by their edges.

    Attributes:
        steps: number of steps.
        rule: `midpoint`, `left`, `right` or `ends`.
    """

    steps: int = 5
    rule: str = "midpoint"

    name: ClassVar[str] = "eap-ig"
    summary: ClassVar[str] = "estimate effects of edges from gradients between the two inputs"
    citation: ClassVar[str] = "Hanna et al. 2024, arXiv 2403.17806, section 3"
    choices: ClassVar[Mapping[str, Iterable[str]]] = {
        "direction": DIRECTIONS, "how": HOWS, "rule": RULES,
    }  # fmt: skip
    least: ClassVar[Mapping[str, int]] = {"verify": 0, "steps": 1}

    def slopes(self, batch: PairBatch) -> list[tuple[float, Tensor | None]]:
        """See `EdgeAttributionPatching`."""
        streams = path(batch, self.steps, self.rule)
        return [(1 / len(streams), x) for x in streams]


@METHODS.register("atp-ig")
@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Effects of heads by gradients averaged between the two inputs.

    Attributes:
        site: `z`, `q`, `k` or `v`.
        direction: `noise` or `denoise`.
        steps: number of steps.
        rule: `midpoint`, `left`, `right` or `ends`.
        verify: how many top heads, and how many random others, to measure exactly; 0 for none.
    """

    site: str = "z"
    direction: str = "noise"
    steps: int = 5
    rule: str = "midpoint"
    verify: int = 10

    name: ClassVar[str] = "atp-ig"
    summary: ClassVar[str] = "estimate patch effects from gradients between the two inputs"
    citation: ClassVar[str] = "Hanna et al. 2024, arXiv 2403.17806, section 3"
    exact: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, Iterable[str]]] = {
        "site": PORTS, "direction": DIRECTIONS, "rule": RULES,
    }  # fmt: skip
    least: ClassVar[Mapping[str, int]] = {"verify": 0, "steps": 1}

    def scores(self, pairs: Pairs, *, progress: Progress | None = None) -> HeadScores:
        """See `Method`.

        Raises:
            InputError: an unknown direction, site or rule, no step, or a metric without gradient.
        """
        check_choice("site", self.site, PORTS)
        atp = AttributionPatching(self.site, self.direction, qk_fix=False)

        def of(batch: PairBatch) -> Tensor:
            run = base_run(batch, self.direction)
            streams = path(batch, self.steps, self.rule)
            return atp.estimate(
                pairs, batch, _mean([gradients(batch, run, start=x) for x in streams])
            )

        params = {
            "site": self.site, "direction": self.direction, "steps": self.steps, "rule": self.rule
        }  # fmt: skip
        out = estimates(self.name, pairs, of, self.site, self.direction, params, progress)
        return verified(out, pairs, self.verify)


def _mean(slopes: list[Trace]) -> Trace:
    """Mean of gradients taken at several places."""
    return Trace(
        **{
            f.name: {
                name: torch.stack([getattr(s, f.name)[name] for s in slopes]).mean(0)
                for name in getattr(slopes[0], f.name)
            }
            for f in fields(Trace)
        }
    )
