"""What a detector wants to know about attention, declared as frozen values.

A reading says which quantity over which query rows; `interp.engine` answers all readings asked
for in one forward pass, each by the cheapest exact kernel. Query rows are named by a span; rows of
padding are never counted. With `sample=n` a reading is estimated on n stratified rows, and its
standard error comes with it; an estimate is never called exact.

Pattern A has rows that sum to one, or to less where the layer has learned sinks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from interp.errors import InputError
from interp.prompts import Prompt

PairArray = NDArray[np.int64]


class Relation(ABC):
    """Which (query, key) pairs of a prompt belong together, judged by its reference tokens."""

    @abstractmethod
    def pairs(self, prompt: Prompt) -> PairArray:
        """The pairs as [n, 2] positions (query, key), without padding."""


@dataclass(frozen=True)
class Offset(Relation):
    """Each query and the key `back` positions before it (0: itself; −1: the next token)."""

    back: int = 1

    def pairs(self, prompt: Prompt) -> PairArray:
        """See `Relation.pairs`."""
        n = len(prompt)
        query = np.arange(max(self.back, 0), min(n, n + self.back))
        return np.stack([query, query - self.back], axis=1)


@dataclass(frozen=True)
class Same(Relation):
    """Each query and, for every earlier copy of its token, the key `shift` after that copy.

    shift 0 is the duplicate-token relation, shift 1 the induction relation: the token that
    followed an earlier copy. Only keys before the query count; queries without any have no pair.
    Tokens of an image share a placeholder and nothing else: each is a token of its own.
    """

    shift: int = 0

    def pairs(self, prompt: Prompt) -> PairArray:
        """See `Relation.pairs`."""
        tokens = np.array(prompt.reference or prompt.tokens)
        if "image" in prompt.spans:
            patches = prompt.positions("image")
            tokens[patches] = -1 - np.arange(len(patches))
        order = np.argsort(tokens, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(tokens[order]) != 0])
        parts = [np.empty((0, 2), dtype=np.int64)]
        for group in np.split(order, starts[1:]):
            if len(group) > 1:
                late, early = np.tril_indices(len(group), -1)
                parts.append(np.stack([group[late], group[early] + self.shift], axis=1))
        pairs = np.concatenate(parts)
        # What followed a token repeated at once is the query itself: that is no look back.
        pairs = pairs[(pairs[:, 1] >= 0) & (pairs[:, 1] < pairs[:, 0])]
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


class Binning(ABC):
    """Which bin each (query, key) pair of a prompt belongs to."""

    @abstractmethod
    def bins(self, prompt: Prompt) -> PairArray:
        """Bins [query, key] from 0; −1 for pairs of none. Without padding."""


@dataclass(frozen=True)
class Rings(Binning):
    """Patches by their Chebyshev distance on the grid: 0 itself, 1 its up to 8 neighbours, ….

    Tokens that stand for no pixels (class token, registers, padding) belong to no ring, nor do
    patches of different images, tiles or frames.
    """

    def bins(self, prompt: Prompt) -> PairArray:
        """See `Binning.bins`.

        Raises:
            InputError: which pixels the tokens stand for is not known.
        """
        if prompt.patches is None:
            raise InputError(
                f"rings need patches; prompt {prompt.id or '?'} has none",
                hint="make it with interp.images.image_prompt",
            )
        out = np.full((len(prompt), len(prompt)), -1, dtype=np.int64)
        grids: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
        for p in prompt.patches:
            key = p.image, -1 if p.tile is None else p.tile, p.frame
            grids.setdefault(key, []).append((p.position, p.row, p.column))
        for members in grids.values():
            position, *place = np.array(members).T
            far = np.max([np.abs(x[:, None] - x[None]) for x in place], axis=0)
            out[np.ix_(position, position)] = far
        return out


class Reading:
    """Base of all readings: one value per example and head, unless a reading says its shape.

    Attributes:
        averages: whether values of several images of one example may be averaged, whatever their
            shape; single numbers always may.
    """

    averages: ClassVar[bool] = False


def _check_sample(sample: int | None) -> None:
    if sample is not None and sample < 4:
        raise InputError(f"a sample needs at least 4 rows to state its error; got {sample}")


@dataclass(frozen=True)
class PairMass(Reading):
    """Mean over queries of the mass on the keys related to them.

    Attributes:
        relation: the pairs.
        query: only queries of this span.
        per: `query` sums the keys of a query and averages over queries that have any; `entry`
            averages over all pairs (a head that splits evenly over copies then scores less).

    Range [0, 1]; undefined (NaN) for an example without any pair.
    """

    relation: Relation
    query: str = "all"
    per: str = "query"

    def __post_init__(self) -> None:
        if self.per not in ("query", "entry"):
            raise InputError(f"per must be 'query' or 'entry'; got {self.per!r}")


@dataclass(frozen=True)
class BinMass(Reading):
    """Mean over queries of the mass in each bin of pairs: [example, layer, head, bin].

    Attributes:
        binning: the bins.
        query: only queries of this span; those without a pair in any bin never count.
        per: `query` sums the keys of a bin (an empty bin has 0), so that the bins of a query sum to
            its mass on all of them; `entry` takes the mean over the keys of a bin, over the queries
            that have any there.

    Range [0, 1]; NaN beyond the last bin of an example.
    """

    binning: Binning
    query: str = "all"
    per: str = "query"

    averages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.per not in ("query", "entry"):
            raise InputError(f"per must be 'query' or 'entry'; got {self.per!r}")


@dataclass(frozen=True)
class SpanMass(Reading):
    """Mean over queries of the mass on a span of keys. Range [0, 1]."""

    key: str
    query: str = "all"
    sample: int | None = None

    def __post_init__(self) -> None:
        _check_sample(self.sample)


@dataclass(frozen=True)
class Distance(Reading):
    """Mean over queries i of Σ_j A_ij·(i − j), in tokens; positive is backward."""

    query: str = "all"
    sample: int | None = None

    def __post_init__(self) -> None:
        _check_sample(self.sample)


@dataclass(frozen=True)
class Entropy(Reading):
    """Mean over queries of −Σ_j A_ij·log A_ij, in nats, ≥ 0."""

    query: str = "all"
    sample: int | None = None

    def __post_init__(self) -> None:
        _check_sample(self.sample)


@dataclass(frozen=True)
class KeyMass(Reading):
    """Mass received by each key: its mean over the queries of the span that can see it.

    Gives [example, layer, head, key]; NaN for keys that no such query sees. This is α_k of the
    sink metric (Gu et al., 2410.10781): (1/(T−k)) Σ_{i≥k} A_ik.
    """

    query: str = "all"
    sample: int | None = None

    def __post_init__(self) -> None:
        _check_sample(self.sample)


@dataclass(frozen=True)
class TopKey(Reading):
    """The key with the most mass, for each query of a span.

    Gives positions [example, layer, head, n] as floats, NaN where an example has fewer queries;
    with padding on the left, positions count the padding. Ties go to the first key.
    """

    query: str


@dataclass(frozen=True)
class Rows(Reading):
    """Whole rows of the pattern for the queries of a span: [example, layer, head, n, key].

    The only reading whose size grows with both the rows asked for and the keys.
    """

    query: str


@dataclass(frozen=True)
class ZNorm(Reading):
    """Mean over queries of the L2 norm of z. ≥ 0."""

    query: str = "all"


@dataclass(frozen=True)
class ZValue(Reading):
    """z at the queries of a span: [example, layer, head, n, d_v]."""

    query: str


@dataclass(frozen=True)
class ValueNorm(Reading):
    """Mean L2 norm of v over the keys of a span; query heads of a group share it. ≥ 0."""

    key: str = "all"
