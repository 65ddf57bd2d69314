"""Circuits: sets of heads as values, and how much of a behaviour they carry.

Heads outside a circuit C put out what they do in the corrupted run (or zero, or a mean); MLPs and
embeddings are always kept. With N all heads and ∅ none,

    faithfulness f(C) = (m(C) − m(∅)) / (m(N) − m(∅)),  completeness g(C) = 1 − f(N ∖ C),

so a faithful circuit has f = 1, and a complete one leaves nothing behind: g = 1. Both may leave
[0, 1], for some heads work against the behaviour. Over circuits of growing size with share
x = heads / all heads, joined by straight lines,

    CPR = ∫ f dx (higher is better),  CMD = ∫ |1 − f| dx (0 is best).

Sources: Wang et al. 2211.00593, section 4 (faithfulness, completeness); Mueller et al. 2504.13151
(CPR and CMD, there over edges); Merullo et al. 2310.08744 (reuse of heads between tasks).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from interp.agreement import ranking
from interp.errors import HeadIdError, InputError, RunError
from interp.files import read_json, write_json
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import PromptPair
from interp.recipe.where import read_heads
from interp.scores import HeadScores
from interp.stats import Overlap, overlap
from patching.engine import prepared
from patching.pairs import Pairs
from patching.prune import ablated_logits, replacements

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCHEMA = 1
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the heads at which circuits are measured where there are too many for every size."""


@dataclass(frozen=True)
class HeadSet:
    """A named set of heads, optionally in named groups.

    Attributes:
        name: what it is called.
        heads: the heads, each once.
        groups: name of a role to some of the heads.
        notes: facts about it: source, task, method, model.

    Raises:
        InputError: there are no heads, or a head comes twice.
        HeadIdError: a head cannot be read, or a group names one that is not in the set.
    """

    name: str
    heads: tuple[HeadId, ...]
    groups: Mapping[str, tuple[HeadId, ...]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", read_heads(tuple(self.heads)))
        groups = {name: read_heads(tuple(heads)) for name, heads in self.groups.items()}
        object.__setattr__(self, "groups", groups)
        for name, heads in groups.items():
            if stray := [h for h in heads if h not in self.heads]:
                raise HeadIdError(
                    f"group {name!r} must name heads of set {self.name!r}; it has no {stray[0]}"
                )

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def check(self, model: Model) -> None:
        """Raise HeadIdError unless the model has every head."""
        for head in self.heads:
            model.layer_of(head)

    def overlap(self, other: "HeadSet", *, total: int) -> Overlap:
        """Agreement with another set of heads, with its chance level.

        Args:
            other: the other set.
            total: heads that could have been chosen.
        """
        return overlap(self.heads, other.heads, total=total)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        path = Path(path)
        write_json(
            path,
            {
                "headscope_heads": SCHEMA,
                "name": self.name,
                "heads": [str(h) for h in self.heads],
                "groups": {n: [str(h) for h in heads] for n, heads in self.groups.items()},
                "notes": dict(self.notes),
            },
        )
        return path

    @classmethod
    def load(cls, path: str | Path) -> "HeadSet":
        """Read a saved set.

        Raises:
            RunError: no such file, or it is no set of heads, or of a newer version.
        """
        data = read_json(Path(path))
        version = data.get("headscope_heads")
        if version != SCHEMA:
            raise RunError(
                f"{path} must be a set of heads of version {SCHEMA}; got {version!r}",
                hint="write it with HeadSet.save",
            )
        try:
            return cls(data["name"], tuple(data["heads"]), data["groups"], data["notes"])
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise RunError(f"{path} is no whole set of heads: {error}") from error


def top_heads(scores: HeadScores, n: int, *, by: str = "size", name: str = "") -> HeadSet:
    """The strongest heads of a table as a set.

    Args:
        scores: a table of head scores.
        n: number of heads.
        by: `size` (|score|), or `strong` (the strong end of the table first).
        name: of the set; the table's detector by default.

    Raises:
        InputError: `by` is neither, or there are not so many defined heads.
    """
    order = ranked(scores, by=by)
    if not 1 <= n <= len(order):
        raise InputError(f"n must lie between 1 and the {len(order)} defined heads; got {n}")
    notes = {"method": scores.detector, "by": by, **scores.provenance}
    return HeadSet(name or scores.detector, order[:n], notes=notes)


def ranked(scores: HeadScores, *, by: str = "size") -> tuple[HeadId, ...]:
    """Defined heads, strongest first: by |score| (`size`) or from the strong end (`strong`)."""
    if by not in ("size", "strong"):
        raise InputError(f"by must be size or strong; got {by!r}")
    if by == "size":
        return tuple(scores.heads[i] for i in ranking(np.abs(scores.values)))
    return scores.top(len(scores.heads))


@dataclass(frozen=True, eq=False)
class CircuitCurve:
    """How much circuits of growing size carry.

    Attributes:
        order: heads, first taken first.
        sizes: number of heads of each circuit.
        total: number of all heads.
        circuit: [example, size] m(C), all heads outside C replaced.
        rest: [example, size] m(N ∖ C), the heads of C replaced.
        full: [example] m(N).
        empty: [example] m(∅).
        examples: ids.
        metric: name of the metric.
        reference: what replaced heads put out.
    """

    order: tuple[HeadId, ...]
    sizes: tuple[int, ...]
    total: int
    circuit: Float[np.ndarray, "example size"]
    rest: Float[np.ndarray, "example size"]
    full: Float[np.ndarray, " example"]
    empty: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    metric: str
    reference: str

    def _share(self, values: np.ndarray) -> Float[np.ndarray, " size"]:
        gap = float(self.full.mean() - self.empty.mean())
        if abs(gap) < 1e-6 * max(1.0, abs(float(self.full.mean()))):
            raise InputError(
                f"the metric must differ with and without heads; both are {self.full.mean():g}",
                hint="choose another corruption, reference or metric",
            )
        return np.asarray((values.mean(0) - self.empty.mean()) / gap)

    @property
    def faithfulness(self) -> Float[np.ndarray, " size"]:
        """Share f of each circuit: a ratio of means over examples."""
        return self._share(self.circuit)

    @property
    def completeness(self) -> Float[np.ndarray, " size"]:
        """Share g of each circuit: 1 where the heads outside it carry nothing."""
        return np.asarray(1 - self._share(self.rest))

    @property
    def shares(self) -> Float[np.ndarray, " size"]:
        """Size of each circuit over the number of heads."""
        return np.array(self.sizes) / self.total

    @property
    def cpr(self) -> float:
        """∫ f dx from the first size to the last."""
        return _area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """∫ |1 − f| dx from the first size to the last."""
        return _area(self.shares, np.abs(1 - self.faithfulness))

    def plot(self) -> "go.Figure":
        """Both curves over the number of heads."""
        import plotly.graph_objects as go

        figure = go.Figure()
        for name, line in (
            ("faithfulness", self.faithfulness), ("completeness", self.completeness),
        ):  # fmt: skip
            figure.add_scatter(x=list(self.sizes), y=line.tolist(), name=name, mode="lines+markers")
        figure.update_layout(xaxis_title="heads in the circuit", yaxis_title="share of the effect")
        return figure


def _area(x: np.ndarray, y: np.ndarray) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def circuit_sizes(total: int) -> tuple[int, ...]:
    """Sizes at which circuits are measured: every one up to 32 heads, else at `SHARES`."""
    if total <= 32:
        return tuple(range(total + 1))
    return tuple(sorted({0, *(max(1, round(x * total)) for x in SHARES)}))


@torch.no_grad()
def circuit_curve(
    model: Model,
    pairs: Sequence[PromptPair] | Pairs,
    order: HeadScores | HeadSet | Iterable[HeadId | str],
    *,
    sizes: Sequence[int] | None = None,
    reference: str = "other",
    metric: str = "logit-difference",
    batch_size: int = 8,
    tower: str = "text",
) -> CircuitCurve:
    """Faithfulness and completeness of the first heads of an order, for growing numbers.

    Args:
        model: the model.
        pairs: clean and corrupted prompts.
        order: heads, most important first; scores are taken by size.
        sizes: rising numbers of heads; `circuit_sizes` by default. Sizes beyond the order are
            filled with the remaining heads in the model's order.
        reference: `other`, `zero`, `mean` or `resample`: what heads outside put out.
        metric: name of a metric.
        batch_size: pairs at a time.
        tower: tower of the heads.

    Raises:
        InputError: sizes that do not rise or lie outside 0 to all heads.
        HeadIdError: a head lies outside the model.
    """
    every = model.tower(tower).heads
    first = ranked(order) if isinstance(order, HeadScores) else (
        order.heads if isinstance(order, HeadSet) else read_heads(tuple(order))
    )  # fmt: skip
    for head in first:
        model.layer_of(head)
    full_order = (*first, *(h for h in every if h not in set(first)))
    sizes = circuit_sizes(len(every)) if sizes is None else tuple(sizes)
    if not sizes or list(sizes) != sorted(set(sizes)) or not 0 <= sizes[0] <= sizes[-1] <= len(
        every
    ):  # fmt: skip
        raise InputError(f"sizes must rise and lie within 0 to {len(every)}; got {sizes}")
    data = prepared(model, pairs, metric, batch_size, tower)
    outside = [full_order[k:] for k in sizes]
    inside = [full_order[:k] for k in sizes]
    n = len(data.pairs)
    circuit, rest = np.zeros((n, len(sizes))), np.zeros((n, len(sizes)))
    full, empty = np.zeros(n), np.zeros(n)
    for places, batch in data.batches():
        new = replacements(data, batch, reference, tower)
        logits = ablated_logits(batch.clean, new, [*outside, *inside, every])
        values = batch.score(logits).cpu().numpy()
        circuit[places], rest[places] = values[: len(sizes)].T, values[len(sizes) : -1].T
        empty[places] = values[-1]
        full[places] = batch.score(batch.clean.logits).cpu()
    return CircuitCurve(
        full_order, tuple(sizes), len(every), circuit, rest, full, empty, data.ids,
        data.metric.name, reference,
    )  # fmt: skip
