"""What patching returns: tables of effects per head, and per head and position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from interp.model import Model
    from patching.pairs import Pairs


_TAKING = ("ablate", "patch.noise", "knockout")


def table(
    method: str,
    model: "Model",
    data: "Pairs",
    units: tuple[HeadId, ...],
    per_example: Float[np.ndarray, "example head"],
    clean: Float[np.ndarray, " example"],
    corrupted: Float[np.ndarray, " example"],
    *,
    params: Mapping[str, Any],
    granularity: str = "query",
    extras: Mapping[str, np.ndarray] | None = None,
    strong: str | None = None,
) -> HeadScores:
    """Effects as head scores, with what share of the difference between the runs each makes.

    `strong` is the end at which a head matters: `lower` where it was taken away, else `higher`; by
    default told from the name of the method.
    """
    gap = _gap(clean, corrupted)
    more = dict(extras or {})
    if gap:
        more["recovered"] = per_example.mean(0) / gap
    return HeadScores(
        detector=method,
        heads=units,
        per_example=per_example,
        null_per_example=None,
        examples=data.ids,
        unit=f"change of {data.metric.name} ({data.metric.unit})",
        direction=strong or ("lower" if method.startswith(_TAKING) else "higher"),
        params=dict(params) | {"metric": data.metric.name},
        provenance={
            "model": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype),
            "clean": float(clean.mean()),
            "corrupted": float(corrupted.mean()),
        },
        granularity=granularity,
        extras=more,
    )


_NOISE = 1e-6
"""Differences below this share of the metric are rounding."""


def _gap(clean: np.ndarray, corrupted: np.ndarray) -> float:
    """Mean difference of the metric; 0 where it is no more than rounding."""
    gap = float(clean.mean() - corrupted.mean())
    size = float(max(np.abs(clean).max(), np.abs(corrupted).max()))
    return gap if abs(gap) > _NOISE * size else 0.0


def normaliser(clean: np.ndarray, corrupted: np.ndarray) -> float:
    """Mean difference of the metric between clean and corrupted runs.

    Raises:
        InputError: it is zero, so a share of it means nothing.
    """
    gap = _gap(clean, corrupted)
    if not gap:
        raise InputError(
            f"clean and corrupted runs must differ in the metric; both have {clean.mean():g}",
            hint="choose another corruption or metric",
        )
    return gap


@dataclass(frozen=True, eq=False)
class PositionEffects:
    """Effects of heads at single positions.

    Attributes:
        method: name of the method.
        heads: rows.
        per_example: [example, head, pos]; effect = m(patched) − m(base).
        examples: ids.
        clean: metric of the clean runs, per example.
        corrupted: metric of the corrupted runs, per example.
        metric: name of the metric.
        unit: its unit.
    """

    method: str
    heads: tuple[HeadId, ...]
    per_example: Float[np.ndarray, "example head pos"]
    examples: tuple[str, ...]
    clean: Float[np.ndarray, " example"]
    corrupted: Float[np.ndarray, " example"]
    metric: str
    unit: str

    @property
    def values(self) -> Float[np.ndarray, "head pos"]:
        """Mean over examples."""
        return np.asarray(self.per_example.mean(0))

    @property
    def recovered(self) -> Float[np.ndarray, "head pos"]:
        """Mean effect over the mean difference between the runs.

        Raises:
            InputError: the runs do not differ.
        """
        return self.values / normaliser(self.clean, self.corrupted)

    def top(self, n: int = 10) -> list[tuple[HeadId, int, float]]:
        """The strongest cells, either sign: head, position, mean effect."""
        values = self.values
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:n]
        rows, columns = np.unravel_index(order, values.shape)
        return [
            (self.heads[int(r)], int(c), float(values[r, c]))
            for r, c in zip(rows, columns, strict=True)
        ]

    def to_frame(self) -> "pd.DataFrame":
        """One row per head and position."""
        import pandas as pd

        rows = [
            {"method": self.method, "head": str(h), "position": p, "effect": v}
            for h, line in zip(self.heads, self.values, strict=True)
            for p, v in enumerate(line)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """Heat map of heads and positions."""
        import plotly.graph_objects as go

        limit = float(np.abs(self.values).max()) or 1.0
        figure = go.Figure(
            go.Heatmap(
                z=self.values.astype(np.float32), y=[str(h) for h in self.heads],
                zmin=-limit, zmax=limit, colorscale="RdBu",
                colorbar={"title": f"change of {self.metric}"},
            )
        )  # fmt: skip
        figure.update_layout(
            title=f"{self.method}, n = {len(self.examples)}",
            xaxis_title="position", yaxis_autorange="reversed",
        )  # fmt: skip
        return figure
