"""HeadScores: what every detector, sweep, probe and attribution returns.

One number per head is not a result. A table of scores keeps the score of every example, so that
interval, test and verdict follow from it and shards merge exactly:

- `values`: mean over the examples where the head is defined; NaN where there is none;
- `ci_lo`, `ci_hi`: 95 % percentile bootstrap over examples; NaN with fewer than two;
- `p`: paired one-sided test against the matched control of each example, `q` its
  Benjamini-Hochberg value over all heads of the table (`interp.stats`);
- `verdict`: the detector's name where `q <= alpha` and the score reaches the threshold, both
  inclusive and without tolerance; "undefined" where no example is defined; else "no evidence".
  Without controls nothing was tested, so nothing is claimed: every defined head is "no evidence".

Sign rule, for every table that holds the effect of an intervention: effect = m(intervened) -
m(base), where m is the metric. An ablation that hurts has a negative effect: direction "lower".
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from interp.agreement import Accuracy, Comparison, accuracy, compare_scores, ranking
from interp.errors import InputError, UnknownNameError
from interp.files import jsonable
from interp.headid import DEFAULT_TOWER, HeadId
from interp.stats import bh_qvalues, bootstrap_interval, mean_and_count, paired_test

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["COLUMNS", "NO_EVIDENCE", "UNDEFINED", "Accuracy", "Comparison", "HeadScores"]

NO_EVIDENCE, UNDEFINED = "no evidence", "undefined"
COLUMNS = (
    *("detector", "head", "tower", "layer", "index"),
    *("score", "ci_lo", "ci_hi", "n", "null", "q", "verdict"),
)
_DERIVED = {"score": "values"} | {name: name for name in ("ci_lo", "ci_hi", "n", "null", "p", "q")}
_SIGNS = {"higher": 1.0, "lower": -1.0}


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of heads, example by example, with what they were made from.

    Attributes:
        detector: name of the method; also the verdict of a head that shows it.
        heads: the heads, one per column.
        per_example: score of each example for each head; NaN is undefined.
        null_per_example: the same on each example's matched control; None where there is none.
        examples: ids of the examples, all different, one per row.
        failures: examples that gave no score, as (example id, reason).
        threshold: score a head must reach to be claimed; an infinite one asks for nothing.
        alpha: false discovery rate up to which a head is claimed.
        unit: what the score counts, such as "share of attention".
        range: smallest and largest possible score; infinite where unbounded.
        direction: "higher" or "lower": which end of the score is the strong one.
        params: parameters of the method.
        provenance: model, revision, fingerprint, dtype, task, seed, versions.
        granularity: "query", or "kv" where a head stands for a key-value group.
        extras: further columns, `[head]` for facts on a head, or `[example, head]`, whose column
            is the mean and which merge exactly.

    Raises:
        InputError: shapes, ids, ranges or names that do not fit together.
    """

    detector: str
    heads: tuple[HeadId, ...]
    per_example: Float[np.ndarray, "example head"]
    null_per_example: Float[np.ndarray, "_ _"] | None
    examples: tuple[str, ...]
    failures: tuple[tuple[str, str], ...] = ()
    threshold: float = -math.inf
    alpha: float = 0.05
    unit: str = ""
    range: tuple[float, float] = (-math.inf, math.inf)
    direction: str = "higher"
    params: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    granularity: str = "query"
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("heads", tuple(self.heads))
        put("examples", tuple(self.examples))
        put("failures", tuple((str(i), str(why)) for i, why in self.failures))
        put("threshold", float(self.threshold))
        put("range", (float(self.range[0]), float(self.range[1])))
        put("per_example", _frozen(self.per_example))
        if self.null_per_example is not None:
            put("null_per_example", _frozen(self.null_per_example))
        extras = {name: np.array(column) for name, column in self.extras.items()}
        for column in extras.values():
            column.setflags(write=False)
        put("extras", extras)
        _check(self)

    @property
    def _sign(self) -> float:
        return _SIGNS[self.direction]

    @cached_property
    def _mean_and_n(self) -> tuple[Float[np.ndarray, " head"], Int[np.ndarray, " head"]]:
        return mean_and_count(self.per_example)

    @property
    def values(self) -> Float[np.ndarray, " head"]:
        """Score per head: the mean over its defined examples."""
        return self._mean_and_n[0]

    @property
    def n(self) -> Int[np.ndarray, " head"]:
        """Number of defined examples per head."""
        return self._mean_and_n[1]

    @cached_property
    def _interval(self) -> tuple[Float[np.ndarray, " head"], Float[np.ndarray, " head"]]:
        return bootstrap_interval(self.per_example)

    @property
    def ci_lo(self) -> Float[np.ndarray, " head"]:
        """Lower end of the 95 % interval."""
        return self._interval[0]

    @property
    def ci_hi(self) -> Float[np.ndarray, " head"]:
        """Upper end of the 95 % interval."""
        return self._interval[1]

    @cached_property
    def null(self) -> Float[np.ndarray, " head"]:
        """Mean score of the controls; NaN without controls."""
        if self.null_per_example is None:
            return np.full(len(self.heads), np.nan)
        return mean_and_count(self.null_per_example)[0]

    @cached_property
    def p(self) -> Float[np.ndarray, " head"]:
        """p-value per head against its controls; NaN without controls."""
        if self.null_per_example is None:
            return np.full(len(self.heads), np.nan)
        return paired_test(self._sign * self.per_example, self._sign * self.null_per_example)

    @cached_property
    def q(self) -> Float[np.ndarray, " head"]:
        """Benjamini-Hochberg q-value per head over the heads of this table."""
        return bh_qvalues(self.p)

    @cached_property
    def verdict(self) -> Shaped[np.ndarray, " head"]:
        """The detector's name, "no evidence" or "undefined", per head."""
        claimed = self._claimed(self.alpha, self.threshold)
        found = np.where(claimed, self.detector, NO_EVIDENCE)
        return np.where(self.n == 0, UNDEFINED, found)

    def _claimed(self, fdr: float, threshold: float) -> Bool[np.ndarray, " head"]:
        reached = self._sign * self.values >= self._sign * threshold
        strong = reached | (math.isinf(threshold) & (self.n > 0))
        claimed: Bool[np.ndarray, " head"] = strong & (self.q <= fdr)
        return claimed

    @property
    def towers(self) -> tuple[str, ...]:
        """Towers of the heads, in the order they first appear."""
        return tuple(dict.fromkeys(head.tower for head in self.heads))

    @property
    def message(self) -> str:
        """One line on what the examples were worth."""
        total = len(set(self.examples) | {example for example, _ in self.failures})
        scored = int((~np.isnan(self.per_example)).any(axis=1).sum())
        if scored == 0:
            reasons = Counter(why for _, why in self.failures).most_common(1)
            why = f" ({reasons[0][0]})" if reasons else ""
            return f"no successful run: 0 of {total} examples gave a score{why}"
        text = f"{scored} of {total} examples gave a score"
        if self.null_per_example is None:
            return f"{text}; no controls, so nothing was tested"
        tested = int((~np.isnan(self.p)).sum())
        smallest = tested * 2.0 ** -int(self.n.max())
        if smallest > self.alpha and not (self.verdict == self.detector).any():
            enough = math.ceil(math.log2(tested / self.alpha))
            text += f"; too few to find a single head among {tested}: that takes {enough}"
        return text

    def column(self, name: str) -> Shaped[np.ndarray, " head"]:
        """A column by name: score, ci_lo, ci_hi, n, null, p, q, or one of the extras.

        Raises:
            UnknownNameError: there is no such column.
        """
        if name in self.extras:
            extra = self.extras[name]
            return extra if extra.ndim == 1 else mean_and_count(extra)[0]
        if name not in _DERIVED:
            raise UnknownNameError("column", name, [*_DERIVED, *self.extras])
        values: Shaped[np.ndarray, " head"] = getattr(self, _DERIVED[name])
        return values

    def grid(
        self, tower: str = DEFAULT_TOWER, column: str = "score"
    ) -> Float[np.ndarray, "layer head"]:
        """A column laid out by layer and head; NaN where there is no such head.

        Raises:
            InputError: no head of the table is in this tower.
        """
        mine = [i for i, head in enumerate(self.heads) if head.tower == tower]
        if not mine:
            raise InputError(
                f"the table has no tower {tower!r}; it has: {', '.join(self.towers) or 'no heads'}"
            )
        layers = [self.heads[i].layer for i in mine]
        indices = [self.heads[i].head for i in mine]
        grid = np.full((max(layers) + 1, max(indices) + 1), np.nan)
        grid[layers, indices] = self.column(column)[mine]
        return grid

    def top(self, n: int) -> tuple[HeadId, ...]:
        """The `n` strongest defined heads, strongest first; ties keep the order of the heads."""
        if n < 0:
            raise InputError(f"the number of heads must not be negative; got {n}")
        return tuple(self.heads[i] for i in ranking(self.values, sign=self._sign)[:n])

    def select(
        self, *, fdr: float | None = None, threshold: float | None = None
    ) -> tuple[HeadId, ...]:
        """Heads with `q <= fdr` that reach the threshold, strongest first.

        Args:
            fdr: false discovery rate; the table's `alpha` by default.
            threshold: score to reach; the table's threshold by default.

        Raises:
            InputError: the table has no controls, so that no rate can be held.
        """
        if self.null_per_example is None:
            raise InputError(
                f"selecting at a false discovery rate needs controls; this table of "
                f"{self.detector} has none",
                hint="use top(n), or score with controls",
            )
        claimed = self._claimed(
            self.alpha if fdr is None else fdr, self.threshold if threshold is None else threshold
        )
        order = ranking(self.values, sign=self._sign)
        return tuple(self.heads[i] for i in order if claimed[i])

    def compare(self, other: "HeadScores", *, k: int | None = None) -> Comparison:
        """Compare with another table of the same heads; differences are other minus self.

        Args:
            other: scores of the same heads, in any order.
            k: size of the top sets; by default a tenth of the heads, at least one.

        Raises:
            InputError: the tables differ in heads, granularity or direction.
        """
        for name in ("granularity", "direction"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"tables to compare must have the same {name}; got "
                    f"{getattr(self, name)!r} and {getattr(other, name)!r}"
                )
        if set(self.heads) != set(other.heads):
            only = [sorted(set(a.heads) - set(b.heads)) for a, b in ((self, other), (other, self))]
            raise InputError(
                f"tables to compare must be about the same heads; {len(only[0])} are only in the "
                f"first and {len(only[1])} only in the second, such as {(only[0] + only[1])[0]}",
                hint="compare runs on one model, or on models of the same shape",
            )
        place = {head: i for i, head in enumerate(other.heads)}
        return compare_scores(
            self.heads,
            self.values,
            other.values[[place[head] for head in self.heads]],
            k=k,
            names=(self._label(), other._label()),
            sign=self._sign,
        )

    def score_against(self, truth: Collection[HeadId]) -> Accuracy:
        """Precision, recall and ranking quality of the verdicts against the true heads.

        Raises:
            HeadIdError: a true head is not in the table.
        """
        claimed = self.verdict == self.detector
        return accuracy(self.heads, self.values, claimed, truth, sign=self._sign)

    def merge(self, other: "HeadScores") -> "HeadScores":
        """The table of both shards' examples; equal to scoring them in one go.

        Raises:
            InputError: the shards share examples, or differ in anything but their examples.
        """
        from interp.scoreio import merged

        return merged(self, other)

    def same_values(self, other: "HeadScores", *, atol: float = 0.0) -> bool:
        """Whether both tables hold the same scores of the same heads and examples.

        NaN equals NaN. Parameters and provenance are not compared.
        """
        names = ("detector", "heads", "examples", "failures", "threshold", "alpha", "direction")
        if any(getattr(self, name) != getattr(other, name) for name in names):
            return False
        mine, theirs = self.arrays(), other.arrays()
        return mine.keys() == theirs.keys() and all(
            mine[name].shape == theirs[name].shape
            and np.allclose(mine[name], theirs[name], rtol=0.0, atol=atol, equal_nan=True)
            for name in mine
        )

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per head with the columns of `COLUMNS`, strongest first, undefined last.

        Plain Python values; what is undefined is None.
        """
        numbers = {name: self.column(name).tolist() for name in _DERIVED}
        ranked = ranking(self.values, sign=self._sign)
        ranked += [i for i, n in enumerate(self.n) if n == 0]
        rows = []
        for i in ranked:
            head = self.heads[i]
            row: dict[str, Any] = {name: _none(column[i]) for name, column in numbers.items()}
            row |= {"detector": self.detector, "head": str(head), "tower": head.tower}
            row |= {"layer": head.layer, "index": head.head, "verdict": str(self.verdict[i])}
            rows.append({name: row[name] for name in COLUMNS})
        return rows

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas data frame, with a column for each of the extras."""
        import pandas as pd

        frame = pd.DataFrame(self.rows(), columns=list(COLUMNS))
        numbers = ["score", "ci_lo", "ci_hi", "null", "q"]
        frame[numbers] = frame[numbers].astype(float)
        place = {str(head): i for i, head in enumerate(self.heads)}
        order = [place[name] for name in frame["head"]]
        for name in self.extras:
            frame[name] = self.column(name)[order]
        return frame

    def plot(self, tower: str | None = None) -> "go.Figure":
        """Heat map of layer by head; heads with a positive verdict are marked.

        Args:
            tower: the tower to draw; the first of the table by default.
        """
        from interp.scoreview import heatmap

        return heatmap(self, tower=tower)

    def save(self, folder: str | Path) -> Path:
        """Write the table as `<detector>.safetensors` in a folder, atomically; returns the file.

        Raises:
            RunError: the folder or file cannot be written.
        """
        from interp.scoreio import save

        return save(self, Path(folder))

    def to_bytes(self) -> bytes:
        """The table as the bytes of one safetensors file; equal tables give equal bytes."""
        from interp.scoreio import encode

        return encode(self)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays as they are stored: scores, controls, and `extras.<name>`."""
        arrays = {"per_example": self.per_example}
        if self.null_per_example is not None:
            arrays["null_per_example"] = self.null_per_example
        return arrays | {f"extras.{name}": column for name, column in self.extras.items()}

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """Read a table from its file, or from a folder that holds exactly one.

        Raises:
            RunError: nothing there, several tables, a damaged file, or a newer version.
        """
        from interp.scoreio import load

        return load(Path(path))

    def _label(self) -> str:
        model = self.provenance.get("model")
        return f"{self.detector} on {model}" if model else self.detector

    def __repr__(self) -> str:
        from interp.scoreview import text

        return text(self)

    def _repr_html_(self) -> str:
        from interp.scoreview import html

        return html(self)


def _frozen(array: np.ndarray) -> Float[np.ndarray, "example head"]:
    """A read-only copy in single or double precision."""
    copy = np.array(array)
    if copy.dtype not in (np.float32, np.float64):
        copy = copy.astype(np.float64)
    copy.setflags(write=False)
    return copy


def _none(value: int | float) -> int | float | None:
    return None if math.isnan(value) else value


def _check(s: HeadScores) -> None:
    shape = (len(s.examples), len(s.heads))
    for name in ("per_example", "null_per_example"):
        array = getattr(s, name)
        if array is None:
            continue
        if array.shape != shape:
            raise InputError(
                f"{name} of {s.detector} must have a row per example and a column per head, "
                f"{list(shape)}; got {list(array.shape)}"
            )
        if np.isinf(array).any():
            raise InputError(f"{name} of {s.detector} must be finite or NaN; got an infinity")
    for name, column in s.extras.items():
        if column.dtype.kind not in "biuf":
            raise InputError(f"column {name!r} of {s.detector} must hold numbers")
        if column.shape not in (shape, shape[1:]):
            raise InputError(
                f"column {name!r} of {s.detector} must be {list(shape[1:])} or {list(shape)}; "
                f"got {list(column.shape)}"
            )
        if name in COLUMNS or name in _DERIVED:
            raise InputError(f"column {name!r} of {s.detector} is taken; choose another name")
    for name, ids in (("heads", s.heads), ("examples", s.examples)):
        twice = [str(i) for i, count in Counter(ids).items() if count > 1]
        if twice:
            raise InputError(f"{name} of {s.detector} must be different; {twice[0]!r} is repeated")
    if s.direction not in _SIGNS:
        raise InputError(f"direction must be 'higher' or 'lower'; got {s.direction!r}")
    if s.granularity not in ("query", "kv"):
        raise InputError(f"granularity must be 'query' or 'kv'; got {s.granularity!r}")
    if not 0 < s.alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1; got {s.alpha}")
    if math.isnan(s.threshold) or not s.range[0] <= s.range[1]:
        raise InputError(f"threshold and range must be numbers; got {s.threshold} and {s.range}")
    if s.detector in ("", NO_EVIDENCE, UNDEFINED):
        raise InputError(f"a detector cannot be called {s.detector!r}")
    # Now rather than when a long run is saved.
    jsonable(s.params, "params")
    jsonable(s.provenance, "provenance")
