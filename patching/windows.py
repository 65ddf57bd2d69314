"""Attention knockout in windows of layers: where in depth one group of tokens is read by another.

    change_l = (p′ − p) / p,   at least −1

p is the probability of a token after the prompt, p′ the same when the queries of all heads in the
`window` layers around layer l (from l − window // 2 on) may not look at the keys. A curve over l
says at which depth what flows from the keys to the queries is needed; 0 says that it is not, or
that layers outside of the window bring it as well. Token groups are those of `patching.knockout`;
with `image` as keys, `last` and the tokens of the question as queries are the published ones.

Sources: Geva et al. 2304.14767, section 5; for images, Kaduri et al. 2411.17491, which measures
the text that is generated instead.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.model import Model
from interp.prompts import Batch, Prompt
from interp.recipe import Edit, Recipe, Where
from interp.stats import bootstrap_interval
from patching.engine import units_of
from patching.knockout import group_positions, query_positions

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TARGETS = ("predicted", "answer")
_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#79706e")


@dataclass(frozen=True, eq=False)
class WindowKnockout:
    """Relative change of a probability, by window of layers.

    Attributes:
        layers: layer at the centre of each window.
        per_example: [example, layer] (p′ − p) / p.
        probability: [example] p, without knockout.
        examples: ids.
        queries, keys, window: what was asked for.
    """

    layers: tuple[int, ...]
    per_example: Float[np.ndarray, "example layer"]
    probability: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    queries: str
    keys: str
    window: int

    @property
    def values(self) -> Float[np.ndarray, " layer"]:
        """Mean over examples."""
        return np.asarray(self.per_example.mean(0))

    @property
    def interval(self) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
        """95 % bootstrap interval over examples; NaN for a single one."""
        return bootstrap_interval(self.per_example)

    @property
    def label(self) -> str:
        """What flows where: keys → queries."""
        return f"{self.keys} → {self.queries}"

    def rows(self) -> list[dict[str, float | int | str]]:
        """One mapping per layer: queries, keys, window, layer, change, ci_lo, ci_hi, n."""
        asked: dict[str, float | int | str] = {
            "queries": self.queries, "keys": self.keys, "window": self.window
        }  # fmt: skip
        columns = zip(self.layers, self.values, *self.interval, strict=True)
        return [
            {**asked, "layer": layer, "change": float(mean), "ci_lo": float(lo),
             "ci_hi": float(hi), "n": len(self.examples)}
            for layer, mean, lo, hi in columns
        ]  # fmt: skip

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def plot(self) -> "go.Figure":
        """The change over layers, with its interval; see `knockout_curves` for several."""
        return knockout_curves({self.label: self})


def knockout_curves(found: Mapping[str, WindowKnockout]) -> "go.Figure":
    """Curves over layers in one figure: lines are means, bands are 95 % intervals.

    Args:
        found: name in the legend to result; their windows and tokens may differ.

    Raises:
        InputError: there is nothing to draw.
    """
    import plotly.graph_objects as go

    if not found:
        raise InputError("at least one result is needed for a figure; got none")
    figure = go.Figure()
    for i, (name, one) in enumerate(found.items()):
        colour, (lo, hi) = _COLOURS[i % len(_COLOURS)], one.interval
        if not np.isnan(lo).any():
            figure.add_scatter(
                x=[*one.layers, *one.layers[::-1]], y=[*hi.tolist(), *lo.tolist()[::-1]],
                fill="toself", fillcolor=colour, opacity=0.2, line={"width": 0}, mode="lines",
                hoverinfo="skip", legendgroup=name, showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=list(one.layers), y=one.values.tolist(), name=name, mode="lines+markers",
            line={"color": colour}, legendgroup=name, showlegend=True,
        )  # fmt: skip
    windows = sorted({one.window for one in found.values()})
    figure.update_layout(
        xaxis={"title": "layer at the centre of the window", "dtick": 1},
        yaxis={"title": "relative change of the probability", "zeroline": True},
        title="windows of " + ", ".join(map(str, windows)) + " layers",
    )
    return figure


@torch.no_grad()
def window_knockout(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    queries: str = "last",
    keys: str = "others",
    window: int = 9,
    target: str = "predicted",
    heads: Iterable[HeadId | str] | None = None,
    batch_size: int = 8,
    tower: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> WindowKnockout:
    """Knock attention out in a window of layers around each layer.

    Args:
        model: the model.
        prompts: prompts with the spans that are named.
        queries: token group that may no longer look.
        keys: token group that is hidden from it.
        window: number of layers; around layer l those from l − window // 2 on.
        target: `predicted` (the token the model itself predicts) or `answer` (its first token).
        heads: only these heads; all of the layers if None.
        batch_size: prompts at a time.
        tower: tower of the heads.
        progress: called with runs done and runs in all, one for each batch and window.

    Raises:
        InputError: no prompts, an unknown target, a window below 1, a row left without keys, or a
            target without probability.
        SpanError: a prompt has no such span.
    """
    if not prompts or window < 1 or batch_size < 1:
        raise InputError(
            f"prompts, a window of at least 1 and prompts at a time of at least 1 are needed; got "
            f"{len(prompts)}, {window} and {batch_size}"
        )
    if target not in TARGETS:
        raise InputError(f"target must be predicted or answer; got {target!r}")
    if target == "answer" and any(not p.answer for p in prompts):
        raise InputError("target 'answer' needs prompts with answers")
    units, _ = units_of(model, tower, "z", heads)
    layers = tuple(x.index for x in model.tower(tower).layers)
    where_q, where_k = query_positions(queries), group_positions(keys, queries)
    out, before = np.zeros((len(prompts), len(layers))), np.zeros(len(prompts))
    starts = range(0, len(prompts), batch_size)
    for b, at in enumerate(starts):
        some = list(prompts[at : at + batch_size])
        batch = model.batch(some, side="left")
        plain = _probabilities(model, batch)
        token = plain.argmax(-1)
        if target == "answer":
            token = torch.tensor([p.answer[0] for p in some if p.answer], device=plain.device)
        index = token[:, None]
        p = plain.gather(-1, index)[:, 0]
        if not bool((p > 0).all()):
            lost = some[int((p == 0).nonzero()[0])].id
            raise InputError(
                f"the target must have a probability above 0 without knockout; in prompt "
                f"{lost or '?'} it is 0",
                hint="target='predicted' follows the token that the model itself predicts",
            )
        before[at : at + len(some)] = p.cpu()
        for column, layer in enumerate(layers):
            first = layer - window // 2
            chosen = tuple(h for h in units if first <= h.layer < first + window)
            if chosen:
                edit = Edit("knockout", Where(heads=chosen, queries=where_q, keys=where_k))
                with Recipe((edit,)).on(model, spans=batch):
                    cut = _probabilities(model, batch).gather(-1, index)[:, 0]
                out[at : at + len(some), column] = ((cut - p) / p).cpu()
            if progress is not None:
                progress(b * len(layers) + column + 1, len(starts) * len(layers))
    ids = tuple(p.id or f"prompt-{i}" for i, p in enumerate(prompts))
    return WindowKnockout(layers, out, before, ids, queries, keys, window)


def _probabilities(model: Model, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
    out = model.forward(batch.inputs())
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits[:, -1].double().softmax(-1)
