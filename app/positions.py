"""Effects of heads and layers at single positions: what `headscope patch --positions` keeps.

A cell is the change of the metric when the activation of one head, or of all heads of one layer,
is replaced at one position by that of the pair's other prompt; see `patching.engine`. Prompts of
one template are compared position by position. Others have no positions in common: of these the
mean over each named span is compared, and single examples are shown as they are.

The noise floor is what rounding gives: the largest change of the metric when layers are patched
with values of the same run, which would be 0 in exact arithmetic, and no less than a step of the
logits' precision. Beside it a mean is told from
noise by its interval over examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from interp.errors import RunError

if TYPE_CHECKING:
    from interp.run import Part, Run

EXTRA = "positions"
ROWS = ("head", "layer")
Spans = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, eq=False)
class PositionSweep:
    """Effects at single positions, per example.

    Attributes:
        method: `patch.noise` or `patch.denoise`.
        tower: tower of the heads.
        metric: name of the metric.
        heads: ids, rows of `by_head`.
        layers: rows of `by_layer`; all heads of the layer are patched at once.
        by_head: [example, head, pos] m(patched) - m(base); NaN behind an example's last token.
        by_layer: [example, layer, pos] likewise.
        clean: metric of the clean runs.
        corrupted: metric of the corrupted runs.
        examples: ids.
        texts: clean and corrupted tokens of each example, as texts.
        spans: span name to ranges of positions, of each example.
        aligned: whether all examples are of one length and template.
        floor: largest change that rounding made, in units of the metric.
    """

    method: str
    tower: str
    metric: str
    heads: tuple[str, ...]
    layers: tuple[int, ...]
    by_head: Float[np.ndarray, "example head pos"]
    by_layer: Float[np.ndarray, "example layer pos"]
    clean: Float[np.ndarray, " example"]
    corrupted: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    texts: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    spans: tuple[Spans, ...]
    aligned: bool
    floor: float

    def names(self, rows: str) -> tuple[str, ...]:
        """Names of the rows: heads, or layers such as `L3`."""
        prefix = "" if self.tower == "text" else f"{self.tower}."
        return self.heads if rows == "head" else tuple(f"{prefix}L{i}" for i in self.layers)

    def modes(self) -> tuple[str, ...]:
        """How means can be taken: by `position`, by `span`, both or neither."""
        named = any(self.spans)
        return (*(("position",) if self.aligned else ()), *(("span",) if named else ()))

    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept as arrays."""
        return {
            "by_head": self.by_head.astype(np.float32),
            "by_layer": self.by_layer.astype(np.float32),
            "clean": self.clean, "corrupted": self.corrupted,
        }  # fmt: skip

    def meta(self) -> dict[str, Any]:
        """What is kept beside them."""
        return {
            "method": self.method, "tower": self.tower, "metric": self.metric,
            "heads": list(self.heads), "layers": list(self.layers),
            "examples": list(self.examples), "aligned": self.aligned, "floor": self.floor,
            "texts": [[list(a), list(b)] for a, b in self.texts],
            "spans": [{n: [list(r) for r in at] for n, at in s.items()} for s in self.spans],
        }  # fmt: skip


def read_positions(run: "Run") -> PositionSweep | None:
    """The sweep that a run keeps; None if it keeps none.

    Raises:
        RunError: what it keeps is damaged.
    """
    part = run.extra(EXTRA)
    return None if part is None else _from_part(part)


def _from_part(part: "Part") -> PositionSweep:
    arrays, meta = part.arrays, part.meta
    try:
        made = PositionSweep(
            str(meta["method"]), str(meta["tower"]), str(meta["metric"]), tuple(meta["heads"]),
            tuple(meta["layers"]), arrays["by_head"], arrays["by_layer"], arrays["clean"],
            arrays["corrupted"], tuple(meta["examples"]),
            tuple((tuple(a), tuple(b)) for a, b in meta["texts"]), tuple(meta["spans"]),
            bool(meta["aligned"]), float(meta["floor"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"the sweep over positions of this run is damaged: {error}") from error
    n, widest = len(made.examples), max((len(a) for a, _ in made.texts), default=0)
    wanted = {
        "by_head": (n, len(made.heads), widest), "by_layer": (n, len(made.layers), widest),
        "clean": (n,), "corrupted": (n,),
    }  # fmt: skip
    wrong = next((k for k, shape in wanted.items() if arrays[k].shape != shape), None)
    if wrong or not n or {len(made.texts), len(made.spans)} != {n}:
        raise RunError(f"the sweep over positions of this run is damaged: {wrong or 'examples'}")
    return made
