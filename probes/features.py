"""What probes are fitted on: the z of every head of a tower, one vector per example and head.

z is read where recipes edit it, at the input of the output projection (after gates and sub-norms
where a model has them), so that a direction found here is one that an edit can add. An example is
a prompt at its last token, a prompt averaged over a span, or one token of a span.

Layers whose heads differ in size share one array: the vectors of smaller heads are followed by
zeros. A zero column changes no fit (its coefficient is zero, whatever the penalty), so the
probes need not know.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer, Tower

MEMORY = {"cpu": 2**21}
"""Bytes of features that are worked on at once, by kind of device. On a CPU a chunk that stays in
the cache is twice as fast as a large one; elsewhere large chunks keep the device busy."""
_ELSEWHERE = 2**28

REDUCTIONS = ("mean", "each")


@dataclass(frozen=True, eq=False)
class HeadFeatures:
    """z of all heads for some examples.

    Attributes:
        x: one vector per example and head; zero beyond the size of the head.
        heads: the heads, in the order of the second axis.
        sizes: length of each head's own vector.
        owners: for each example the number of its prompt; examples of one prompt are not
            independent, and cross-validation keeps them together.
        ids: id of each example's prompt.

    Raises:
        InputError: shapes that do not fit together, or a value that is not finite.
    """

    x: Float[Tensor, "example head d"]
    heads: tuple[HeadId, ...]
    sizes: tuple[int, ...]
    owners: tuple[int, ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        n, heads, d = self.x.shape
        if not (len(self.heads) == len(self.sizes) == heads and max(self.sizes, default=0) <= d):
            raise InputError(f"features of {heads} heads need as many ids and sizes up to {d}")
        if not len(self.owners) == len(self.ids) == n:
            raise InputError(f"features of {n} examples need as many owners and ids")
        # A sum is finite only if every term is, and takes no memory.
        if (
            n
            and not math.isfinite(float(self.x.sum(dtype=torch.float64)))
            and not bool(torch.isfinite(self.x).all())
        ):
            bad = torch.isfinite(self.x).all(dim=2).logical_not().nonzero()[0].tolist()
            raise InputError(
                f"features must be finite; example {self.ids[bad[0]] or bad[0]} is not at "
                f"{self.heads[bad[1]]}",
                hint="load the model in float32 or bfloat16: float16 overflows in some models",
            )

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def of(cls, x: Float[Tensor, "example head d"], *, tower: str = "text") -> "HeadFeatures":
        """Features from an array, its heads numbered as those of one layer."""
        n, heads, d = x.shape
        ids = tuple(str(i) for i in range(n))
        named = tuple(HeadId(0, h, tower) for h in range(heads))
        return cls(x, named, (d,) * heads, tuple(range(n)), ids)

    def rows(self, index: Sequence[int] | Int[np.ndarray, " some"]) -> "HeadFeatures":
        """Some of the examples."""
        listed = [int(i) for i in index]
        return replace(
            self,
            x=self.x[listed],
            owners=tuple(self.owners[i] for i in listed),
            ids=tuple(self.ids[i] for i in listed),
        )

    def vector(self, values: Float[Tensor, "head d"], head: HeadId) -> Float[Tensor, " d"]:
        """The entry of one head in an array over heads, without the zeros that follow it."""
        i = self.heads.index(head)
        return values[i, : self.sizes[i]]

    @classmethod
    def joined(cls, parts: Iterable["HeadFeatures"]) -> "HeadFeatures":
        """All examples of several features of the same heads.

        Raises:
            InputError: there is no part.
        """
        listed = list(parts)
        if not listed:
            raise InputError("features need at least one prompt; got none")
        return cls(
            torch.cat([p.x for p in listed]),
            listed[0].heads,
            listed[0].sizes,
            tuple(i for p in listed for i in p.owners),
            tuple(i for p in listed for i in p.ids),
        )


def capture(
    model: "Model",
    prompts: Iterable[Prompt] | Iterable[Batch],
    *,
    span: str | None = None,
    reduce: str = "mean",
    batch_size: int = 8,
    tower: str | None = None,
    device: str = "cpu",
) -> Iterator[HeadFeatures]:
    """Read z batch by batch; nothing but the current batch is kept.

    Args:
        model: the model in hand.
        prompts: prompts, or batches made elsewhere (with images); an endless iterator will do.
        span: span whose tokens are read; the last token of the prompt if None.
        reduce: `mean` gives one example per prompt, the mean over the span; `each` one example
            per token of the span.
        batch_size: prompts at a time.
        tower: tower to read; the model's first if None.
        device: where the features are kept.

    Yields:
        Features of one batch, in float32 (float64 for float64 models).

    Raises:
        SpanError: a prompt lacks the span.
        SiteError: the tower's positions are not the tokens of the prompts.
        InputError: `reduce` is unknown, or z is not finite.
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)}; got {reduce!r}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}")
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    first = 0
    for batch in _batches(model, prompts, batch_size):
        rows = _rows_of(batch, span)
        found = _run(model, stack, batch, rows, reduce, device)
        counts = [1 if reduce == "mean" else len(r) for r in rows]
        owners = [first + i for i, count in enumerate(counts) for _ in range(count)]
        ids = [p.id for p, count in zip(batch.prompts, counts, strict=True) for _ in range(count)]
        yield _stacked(stack, found, tuple(owners), tuple(ids))
        first += len(batch)


def collect_features(
    model: "Model",
    prompts: Iterable[Prompt] | Iterable[Batch],
    *,
    span: str | None = None,
    reduce: str = "mean",
    batch_size: int = 8,
    tower: str | None = None,
    device: str = "cpu",
) -> HeadFeatures:
    """As `capture`, all batches kept.

    Raises:
        InputError: there are no prompts; also what `capture` raises.
    """
    return HeadFeatures.joined(
        capture(
            model, prompts,
            span=span, reduce=reduce, batch_size=batch_size, tower=tower, device=device,
        )
    )  # fmt: skip


def _batches(
    model: "Model", prompts: Iterable[Prompt] | Iterable[Batch], size: int
) -> Iterator[Batch]:
    pending: list[Prompt] = []
    for item in prompts:
        if isinstance(item, Batch):
            yield item
            continue
        pending.append(item)
        if len(pending) == size:
            yield model.batch(pending)
            pending = []
    if pending:
        yield model.batch(pending)


def _rows_of(batch: Batch, span: str | None) -> list[list[int]]:
    if span is not None:
        return batch.positions(span)
    ends = zip(batch.prompts, batch.offsets, strict=True)
    return [[offset + len(prompt) - 1] for prompt, offset in ends]


def _run(
    model: "Model", stack: "Tower", batch: Batch, rows: list[list[int]], reduce: str, device: str
) -> dict[str, Tensor]:
    """One forward; layer name to [example, head, d]."""
    mine = {layer.name for layer in stack.layers}
    width = batch.input_ids.shape[1]
    found: dict[str, Tensor] = {}

    def observer(layer: "Layer", z: Tensor) -> None:
        if layer.name not in mine:
            return
        if z.dim() != 4 or z.shape[:2] != (len(batch), width):
            raise SiteError(
                f"{layer.name} does not run over the {width} tokens of its prompts; its z has the "
                f"shape {tuple(z.shape)}",
                hint="probe a tower whose positions are tokens",
            )
        wide = z.detach()
        wide = wide if wide.dtype == torch.float64 else wide.float()
        taken = [wide[b, r] for b, r in enumerate(rows)]
        if reduce == "mean":
            taken = [t.mean(dim=0, keepdim=True) for t in taken]
        found[layer.name] = torch.cat(taken).to(device)

    with model.observe_output(observer):
        model.forward(batch.inputs())
    missing = mine - found.keys()
    if missing:
        raise SiteError(f"the forward pass did not reach {min(missing)} of {model.name}")
    return found


def _stacked(
    stack: "Tower", found: dict[str, Tensor], owners: tuple[int, ...], ids: tuple[str, ...]
) -> HeadFeatures:
    widest = max(x.shape[-1] for x in found.values())
    parts, sizes = [], []
    for layer in stack.layers:
        x = found[layer.name]
        sizes += [x.shape[-1]] * x.shape[1]
        parts.append(torch.nn.functional.pad(x, (0, widest - x.shape[-1])))
    return HeadFeatures(torch.cat(parts, dim=1), stack.heads, tuple(sizes), owners, ids)


@dataclass(frozen=True, eq=False)
class Classes:
    """Labels as numbers.

    Attributes:
        names: the classes, in order.
        index: for each example the number of its class.
    """

    names: tuple[Any, ...]
    index: Int[np.ndarray, " example"]


def read_labels(labels: Sequence[Any] | np.ndarray | Tensor, n: int) -> Classes:
    """Labels of `n` examples as class numbers; classes are sorted, so False comes before True.

    Raises:
        InputError: a label for each example is not there, one is NaN, or all are the same.
    """
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(given) != n:
        raise InputError(f"every example needs a label; got {n} examples and {len(given)} labels")
    for i, label in enumerate(given):
        if label is None or (isinstance(label, float) and not math.isfinite(label)):
            raise InputError(f"labels must be defined; label {i} is {label}")
    try:
        names = tuple(sorted(set(given)))
    except TypeError as error:
        raise InputError(f"labels must be of one kind, such as all numbers: {error}") from None
    if len(names) < 2:
        raise InputError(
            f"a probe needs examples of at least two classes; all {n} labels are "
            f"{names[0] if names else 'missing'}"
        )
    place = {name: i for i, name in enumerate(names)}
    return Classes(names, np.array([place[label] for label in given]))


def read_groups(groups: Sequence[Any] | np.ndarray | Tensor, n: int) -> tuple[list[str], Any]:
    """Names of the groups, in order of appearance, and the number of each example's group.

    Raises:
        InputError: there is not one group for each example.
    """
    given = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
    if len(given) != n:
        raise InputError(f"every example needs a group; got {n} examples and {len(given)} groups")
    place: dict[Any, int] = {}
    codes = np.array([place.setdefault(g, len(place)) for g in given], dtype=np.int64)
    return [str(g) for g in place], codes


def chunks(n: int, bytes_each: int, device: torch.device, *, factor: int = 1) -> Iterator[slice]:
    """Slices of `range(n)` that take about `factor` times the bytes of `MEMORY`; none is empty."""
    width = max(1, factor * memory_on(device) // max(1, bytes_each))
    for start, stop in itertools.pairwise([*range(0, n, width), n]):
        yield slice(start, stop)


def memory_on(device: torch.device) -> int:
    """Bytes of features to work on at once."""
    return MEMORY.get(device.type, _ELSEWHERE)
