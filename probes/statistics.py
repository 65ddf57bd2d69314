"""Sums over examples from which fits and directions follow, for any number of examples.

Per head: the count, mean and scatter of z, and its cross product with targets. Batches are added
and shards merged in any order; memory is heads × d² however many examples come. Everything is
kept in float64 and about the mean, by the pairwise update of Chan, Golub and LeVeque (1979): with
plain sums, heads whose mean is large beside their spread would lose their digits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from probes.features import HeadFeatures, capture, chunks

if TYPE_CHECKING:
    from interp.model import Model
    from interp.prompts import Prompt


class HeadStatistics:
    """Count, means, scatter and cross products, added to in place.

    Attributes:
        heads: the heads.
        sizes: length of each head's own vector.
        classes: the classes, if the targets are their indicators (1 or 0); else empty.
        n: examples so far.
        mean: mean of z [head, d].
        scatter: Σ (x − mean)(x − mean)ᵀ [head, d, d].
        target_mean: mean of the targets [target].
        target_scatter: Σ (y − mean)² [target].
        cross: Σ (x − mean)(y − mean)ᵀ [head, d, target].

    Args:
        heads: the heads.
        sizes: length of each head's own vector.
        targets: number of targets.
        classes: the classes, if the targets are their indicators.
        device: where the sums live.
    """

    def __init__(
        self,
        heads: Sequence[HeadId],
        sizes: Sequence[int],
        targets: int,
        *,
        classes: Sequence[Any] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        self.heads, self.sizes, self.classes = tuple(heads), tuple(sizes), tuple(classes)
        count, d = len(self.heads), max(self.sizes)
        self.n = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.mean: Float[Tensor, "head d"] = zeros(count, d)
        self.scatter: Float[Tensor, "head d d"] = zeros(count, d, d)
        self.target_mean: Float[Tensor, " target"] = zeros(targets)
        self.target_scatter: Float[Tensor, " target"] = zeros(targets)
        self.cross: Float[Tensor, "head d target"] = zeros(count, d, targets)

    @torch.no_grad()
    def add(
        self, features: HeadFeatures, targets: Float[Tensor, "example target"]
    ) -> "HeadStatistics":
        """Add examples; returns itself.

        Raises:
            InputError: other heads, or not one finite row of targets per example.
        """
        y = targets.to(self.cross)
        if features.heads != self.heads or features.x.shape[2] != self.mean.shape[1]:
            raise InputError("features to add must be of the heads that these statistics are of")
        if y.shape != (len(features), len(self.target_mean)):
            raise InputError(
                f"targets must be {[len(features), len(self.target_mean)]}, one row per example; "
                f"got {list(y.shape)}"
            )
        if not bool(torch.isfinite(y).all()):
            raise InputError("targets must be finite")
        n = len(features)
        if not n:
            return self
        y_mean = y.mean(dim=0)
        y = y - y_mean
        shift = y_mean - self.target_mean
        share = n / (self.n + n)
        for part in chunks(len(self.heads), 8 * n * self.mean.shape[1], self.mean.device):
            x = features.x[:, part].transpose(0, 1).to(self.cross)
            mean = x.mean(dim=1)
            x = x - mean[:, None]
            step = mean - self.mean[part]
            self.scatter[part].baddbmm_(x.transpose(1, 2), x)
            self.cross[part] += x.transpose(1, 2) @ y
            self._joined(part, step, shift, share)
        self.target_scatter += y.square().sum(dim=0) + shift.square() * (self.n * share)
        self.target_mean += shift * share
        self.n += n
        return self

    def merge(self, other: "HeadStatistics") -> "HeadStatistics":
        """Take in the examples of another shard; returns itself.

        Raises:
            InputError: the other is of other heads, targets or classes.
        """
        if (self.heads, self.classes) != (other.heads, other.classes) or (
            self.cross.shape != other.cross.shape
        ):
            raise InputError("statistics to merge must be of the same heads, targets and classes")
        if not other.n:
            return self
        share = other.n / (self.n + other.n)
        shift = other.target_mean.to(self.cross) - self.target_mean
        step = other.mean.to(self.cross) - self.mean
        self.scatter += other.scatter.to(self.cross)
        self.cross += other.cross.to(self.cross)
        self._joined(slice(None), step, shift, share)
        self.target_scatter += other.target_scatter.to(self.cross)
        self.target_scatter += shift.square() * (self.n * share)
        self.target_mean += shift * share
        self.n += other.n
        return self

    def _joined(self, part: slice, step: Tensor, shift: Tensor, share: float) -> None:
        """What the distance of the two means adds."""
        weight = self.n * share
        self.scatter[part].baddbmm_(step[:, :, None], step[:, None], alpha=weight)
        self.cross[part] += weight * step[:, :, None] * shift
        self.mean[part] += step * share

    @property
    def class_counts(self) -> Float[Tensor, " target"]:
        """Examples of each class.

        Raises:
            InputError: the targets are not classes.
        """
        self._need_classes()
        return (self.target_mean * self.n).round()

    @property
    def class_means(self) -> Float[Tensor, "target head d"]:
        """Mean z of each class.

        Raises:
            InputError: the targets are not classes, or a class has no example.
        """
        counts = self.class_counts
        if not bool((counts > 0).all()):
            empty = self.classes[int(counts.argmin())]
            raise InputError(f"every class needs an example; {empty!r} has none")
        return self.mean + (self.cross / counts).permute(2, 0, 1)

    def spread(
        self, direction: Float[Tensor, "head d"], *, ddof: int = 1
    ) -> Float[Tensor, " head"]:
        """Standard deviation of z along a direction of each head."""
        u = direction.to(self.scatter)
        return (torch.einsum("hd,hde,he->h", u, self.scatter, u) / (self.n - ddof)).sqrt()

    def _need_classes(self) -> None:
        if not self.classes:
            raise InputError("these statistics are of numbers, not of classes")


def indicators(labels: Sequence[Any], classes: Sequence[Any]) -> Float[Tensor, "example class"]:
    """1 for the class of each example, 0 elsewhere.

    Raises:
        InputError: a label is none of the classes.
    """
    place = {name: i for i, name in enumerate(classes)}
    unknown = [x for x in labels if x not in place]
    if unknown:
        raise InputError(f"labels must be among {list(classes)}; got {unknown[0]!r}")
    out = torch.zeros(len(labels), len(place), dtype=torch.float64)
    out[torch.arange(len(labels)), [place[x] for x in labels]] = 1
    return out


def class_statistics(
    model: "Model",
    labelled: Iterable[tuple["Prompt", Any]],
    classes: Sequence[Any],
    *,
    span: str | None = None,
    reduce: str = "mean",
    batch_size: int = 8,
    tower: str | None = None,
    device: str = "cpu",
) -> HeadStatistics:
    """Stream prompts through a model, keeping sums only.

    Args:
        model: the model in hand.
        labelled: prompts, each with its class; an iterator of any length.
        classes: the classes there are.
        span: see `capture`.
        reduce: see `capture`.
        batch_size: prompts at a time.
        tower: see `capture`.
        device: where the sums live.

    Raises:
        InputError: there are no prompts, or a label is none of the classes; also what `capture`
            raises.
    """
    if len(set(classes)) < 2 or len(set(classes)) != len(classes):
        raise InputError(f"classes must be two or more different ones; got {list(classes)}")
    waiting: list[Any] = []
    found: HeadStatistics | None = None
    first = 0
    for batch in capture(
        model, _noted(labelled, waiting.append),
        span=span, reduce=reduce, batch_size=batch_size, tower=tower, device=device,
    ):  # fmt: skip
        if found is None:
            found = HeadStatistics(
                batch.heads, batch.sizes, len(classes), classes=classes, device=device
            )
        labels = [waiting[i - first] for i in batch.owners]
        found.add(batch, indicators(labels, classes))
        first += len(waiting)
        waiting.clear()
    if found is None:
        raise InputError("statistics need at least one prompt; got none")
    return found


def _noted(
    labelled: Iterable[tuple["Prompt", Any]], note: Callable[[Any], None]
) -> Iterator["Prompt"]:
    for prompt, label in labelled:
        note(label)
        yield prompt
