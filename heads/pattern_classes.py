"""What kind of map each head of a vision tower has, by rules on its profile.

The first rule that holds names the class. Shares are of the mass on patches; `rules` are the
limits.

    class       at least half of the mass is on tokens without pixels (class token, registers)
    uniform     the entropy of rows is at least 0.95 of that of even attention
    self        at least half on the patch itself
    content     `content` exceeds `place` by at least 0.25: the map moves with the patches
    neighbour   at least half on one of the eight steps to a neighbour, always the same
    local       at least half within one step
    ring        at least half on one ring further out, and twice what even attention has there
    place       the map stays where it was when patches trade places, whatever its shape
    mixed       none of these

`place` and `content` are those of detector `content-agnostic`. The published work clusters the
codes of an autoencoder of maps; these rules need no training and no seed, and say why.

Source: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics
Attempt", arXiv 2303.13731 (the classes, found there by clustering).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heads.content_agnostic import ContentAgnostic
from heads.distance_profile import grids
from heads.scoring import score
from interp.engine import read
from interp.errors import HeadIdError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.readings import BinMass, Binning, Entropy, PairArray, Rings

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

Features = Mapping[str, float]
RULES: Mapping[str, Callable[[Features], bool]] = {
    "class": lambda f: f["class"] >= 0.5,
    "uniform": lambda f: f["uniform"] >= 0.95,
    "self": lambda f: f["self"] >= 0.5,
    "content": lambda f: f["content"] - f["place"] >= 0.25,
    "neighbour": lambda f: f["neighbour"] >= 0.5,
    "local": lambda f: f["local"] >= 0.5,
    "ring": lambda f: f["ring"] >= 0.5 and f["ring"] >= 2 * f["ring-even"],
    "place": lambda f: f["place"] >= 0.5,
    "mixed": lambda f: True,
}
"""Class to what must hold of a head's features; the first counts, and NaN holds for none."""


@dataclass(frozen=True)
class Steps(Binning):
    """The nine steps within distance 1 on the grid: bin 3·(row step + 1) + column step + 1."""

    def bins(self, prompt: Prompt) -> PairArray:
        """See `Binning.bins`."""
        out = np.full((len(prompt), len(prompt)), -1, dtype=np.int64)
        near = Rings().bins(prompt)
        where = np.zeros((len(prompt), 2), dtype=np.int64)
        for p in prompt.patches or ():
            where[p.position] = p.row, p.column
        down, right = (x[None, :] - x[:, None] for x in where.T)
        close = (near == 0) | (near == 1)
        out[close] = (3 * (down + 1) + right + 1)[close]
        return out


@dataclass(frozen=True)
class PatternClasses:
    """A class for every head, and the numbers it follows from.

    Attributes:
        heads: the heads.
        classes: class of each head, a name of `RULES`.
        features: name to a number per head; NaN is undefined.
    """

    heads: tuple[HeadId, ...]
    classes: tuple[str, ...]
    features: Mapping[str, Float[np.ndarray, " head"]]

    def of(self, head: HeadId | str) -> str:
        """Class of one head.

        Raises:
            HeadIdError: it is not in the table.
        """
        head = HeadId.parse(head) if isinstance(head, str) else head
        if head not in self.heads:
            raise HeadIdError(f"{head} is not in the table; it has {self.heads[0]} and others")
        return self.classes[self.heads.index(head)]

    def heads_of(self, kind: str) -> tuple[HeadId, ...]:
        """The heads of a class."""
        return tuple(h for h, k in zip(self.heads, self.classes, strict=True) if k == kind)

    def to_frame(self) -> "pd.DataFrame":
        """A data frame, one row a head."""
        import pandas as pd

        names = [str(h) for h in self.heads]
        return pd.DataFrame({"head": names, "kind": self.classes, **self.features})


def pattern_classes(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    tower: str = "vision",
    batch_size: int = 4,
) -> PatternClasses:
    """Class of every head of a vision tower; see the module's docstring.

    Args:
        model: a model with a vision tower.
        prompts: prompts of one image each; features are means over them.
        tower: its name.
        batch_size: prompts at a time.

    Raises:
        InputError: no prompts, or images that the tower does not see whole.
    """
    table = score(model, ContentAgnostic(), prompts, tower=tower, batch_size=batch_size)
    moved = table["content-agnostic"]
    readings = {
        "rings": BinMass(Rings()), "steps": BinMass(Steps()), "entropy": Entropy("image")
    }  # fmt: skip
    rings, even, steps, entropy = [], [], [], []
    for at in range(0, len(prompts), batch_size):
        batch = model.batch(list(prompts[at : at + batch_size]))
        found = {n: a.values for n, a in read(model, batch, readings, tower=tower).items()}
        for b, (row,) in enumerate(grids(batch, tower)):
            bins = Rings().bins(row)
            inside = bins[bins >= 0]
            even.append(torch.from_numpy(np.bincount(inside) / inside.size))
            rings.append(found["rings"][b, ..., : len(even[-1])].double().cpu())
            steps.append(found["steps"][b].double().cpu())
            entropy.append(found["entropy"][b].double().cpu() / math.log(len(row)))
    features = _features(_mean(rings), _mean(even), _mean(steps), _mean(entropy))
    stack = model.tower(tower)
    columns = {
        name: np.concatenate([x[i, : y.n_heads].numpy() for i, y in enumerate(stack.layers)])
        for name, x in features.items()
    }
    columns |= {"place": moved.values, "content": moved.column("content")}
    rows = [{n: float(c[i]) for n, c in columns.items()} for i in range(len(stack.heads))]
    classes = tuple(next(k for k, rule in RULES.items() if rule(row)) for row in rows)
    return PatternClasses(stack.heads, classes, columns)


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over examples, whose grids may have different numbers of rings."""
    widest = max(x.shape[-1] for x in parts) if parts[0].dim() != 2 else 0
    padded = [torch.nn.functional.pad(x, (0, max(0, widest - x.shape[-1]))) for x in parts]
    return torch.stack(padded).mean(0)


def _features(rings: Tensor, even: Tensor, steps: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    mass = rings.sum(-1)
    share = rings / mass.masked_fill(mass < 1e-6, math.nan)[..., None]
    far = share[..., 2:] if share.shape[-1] > 2 else share[..., :1] * 0
    beside = [i for i in range(steps.shape[-1]) if i != 4]
    best = far.nan_to_num().argmax(-1)
    ahead = even[2:] if len(even) > 2 else even[:1]
    return {
        "class": 1 - mass,
        "uniform": entropy,
        "self": share[..., 0],
        "local": share[..., :2].sum(-1),
        "neighbour": steps[..., beside].amax(-1) / mass.masked_fill(mass < 1e-6, math.nan),
        "ring": far.amax(-1),
        "ring-even": ahead[best],
        "distance": share @ torch.arange(share.shape[-1], dtype=share.dtype),
    }
