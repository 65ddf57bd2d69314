"""Answers all readings of all detectors in one forward pass per batch.

`read` compiles the readings into three kinds of work and chooses per layer how to do each:

    kernel   what it answers                            where
    gather   single entries, from q, k and the LSE      layers whose kernel gave the LSE
    columns  A @ columns, appended to v                 float32 layers run by the CPU flash kernel
    sweep    entropy, key mass, whole rows, top keys,   everywhere: blocks of query rows, never a
             and whatever the other two cannot          T×T tensor
    pattern  as sweep                                   layers that materialise their own pattern

Each answer says which kernel served which layer. The model's output keeps every bit.

Towers of one model are read each in its own geometry. A vision tower's positions are those of its
rows (images, tiles, or all images of a prompt), in the order in which it runs them. One that runs
all rows as one sequence, and attends once a window, frame or image, is read piece by piece: a key
of another piece has mass 0, and distances count places of the tower's order. So is one whose layers
cut rows into windows; its layers may have positions of their own, since stages merge patches.
Layers that attend over images from the text have the prompt's tokens as queries, and as keys the
positions of the prompt's view `TOWER/keys`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from interp.errors import SiteError
from interp.kernels.answer import answer as answer
from interp.kernels.pieces import Pieces
from interp.kernels.plan import Plan, Side, compile_plan
from interp.kernels.seen import Seen, check_keys, own_views, whole_view, width_of
from interp.model import Model
from interp.prompts import Batch
from interp.readings import Reading
from interp.seam.calls import AttnCall
from interp.seam.structure import Tower

# Towers whose positions are the prompt's tokens; others attend over patches or frames.
_TOKENS = {"text", "encoder", "cross"}
# Inputs that run through a vision tower one after the other.
_RUNS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Answer:
    """What one reading found.

    Attributes:
        values: [example, layer, head, …] in the order of `Tower.layers`; NaN where there is no
            such head, or where the example does not define the reading.
        how: for each layer of the tower, the kernel that served it; several with + between them.
        se: standard error of each value, for sampled readings; else None.
    """

    values: Tensor
    how: tuple[str, ...]
    se: Tensor | None = None

    @property
    def exact(self) -> bool:
        """False if the values are estimates on sampled rows."""
        return self.se is None


@dataclass
class _Collected:
    values: dict[str, Tensor] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    se: dict[str, Tensor] = field(default_factory=dict)


class Collector:
    """An observer that answers readings for one tower; made by `read` and by decoding.

    Args:
        tower: whose layers to read.
        batch: prompts whose spans the readings name.
        readings: name to reading.
    """

    def __init__(self, tower: Tower, batch: Batch, readings: Mapping[str, Reading]) -> None:
        self.tower = tower
        seen = batch.view(tower.name)
        self.batch: Batch = batch if seen is None else seen[0]
        self._owners: tuple[int, ...] | None = None if seen is None else seen[1]
        self._whole = whole_view(tower, batch, seen)
        self._prompts = batch.prompts
        self._pieces: dict[str, Pieces] = {}
        self.readings = dict(readings)
        self._names = {layer.name: layer for layer in tower.layers}
        self._own = own_views(tower, batch)
        self._found = {name: _Collected() for name in readings}

    def columns(self, v: Tensor) -> Tensor | None:
        """Columns for the model's own kernel, if any reading wants some."""
        if v.shape[0] != len(self.batch) or self._own or self._whole.cut:
            return None
        for (_, n_key, _), plan in self._whole.plans.items():
            if n_key == v.shape[2]:
                return plan.appended()
        if v.shape[2] == width_of(self._whole.keys):
            # Which layer this is is not known yet; columns are the same for all of them.
            causal = self.tower.layers[0].causal
            n_query = width_of(self._whole.queries)
            return self._plan(self._whole, n_query, v.shape[2], causal=causal).appended()
        return None

    def __call__(self, call: AttnCall) -> None:
        """Answer every reading for one layer."""
        layer = self._names.get(call.name)
        if layer is None:
            return
        seen = self._own.get(layer.name, self._whole)
        piece = not seen.cut and self._is_piece(call)
        if not seen.cut and call.z.shape[0] != len(self.batch) and not piece:
            raise SiteError(
                f"{call.name} attends in {call.z.shape[0]} groups, not once per example; readings "
                f"of whole prompts do not apply to it"
            )
        if any(layer.name in found.values for found in self._found.values()):
            raise SiteError(f"{call.name} was called twice in one forward; readings need one call")
        if seen.cut:
            assert seen.windows is not None
            pieces = self._rows(seen, causal=layer.causal)
            pieces.add_windows(call, seen.windows)
            results = pieces.results()
        elif piece:
            if layer.name not in self._pieces:
                self._pieces[layer.name] = self._rows(seen, causal=layer.causal)
            pieces = self._pieces[layer.name]
            pieces.add(call)
            if not pieces.done:
                return
            results = pieces.results()
            del self._pieces[layer.name]
        else:
            check_keys(call, seen)
            plan = self._plan(seen, call.n_query, call.n_key, causal=layer.causal)
            results = answer(call, plan)
        for name, (values, how, se) in results.items():
            found = self._found[name]
            found.values[layer.name], found.how[layer.name] = values, how
            if se is not None:
                found.se[layer.name] = se

    def _is_piece(self, call: AttnCall) -> bool:
        """Whether a call holds a part of a row of the tower, or rows one after another."""
        if self._owners is None or call.z.shape[0] != 1 or call.n_query != call.n_key:
            return False
        return len(self.batch) > 1 or call.n_query < width_of(self.batch)

    def _rows(self, seen: Seen, *, causal: bool) -> Pieces:
        """The rows of a layer, of which nothing is read yet."""
        width = width_of(seen.queries)
        lengths = [len(p) for p in seen.queries.prompts]
        plan = self._plan(seen, width, width, causal=causal)
        return Pieces(plan, lengths, self._run_order(), width)

    def _run_order(self) -> list[int]:
        """Rows in the order in which a tower runs them as one sequence: images before videos."""
        assert self._owners is not None
        runs: list[int] = []
        for i in sorted(set(self._owners)):
            n = self._owners.count(i)
            given = [run for run, x in enumerate(_RUNS) if x in self._prompts[i].inputs]
            if len(given) > 1 and len(given) != n:
                raise SiteError(
                    f"tower {self.tower.name!r} runs images and videos apart; the {n} rows of "
                    f"prompt {self._prompts[i].id or '?'} do not say which they are"
                )
            runs += given if len(given) == n else (given or [0]) * n
        return sorted(range(len(runs)), key=lambda row: runs[row])

    def _plan(self, seen: Seen, n_query: int, n_key: int, *, causal: bool) -> Plan:
        key = (n_query, n_key, causal)
        if key not in seen.plans:
            sides = Side(seen.queries).at(n_query), Side(seen.keys).at(n_key)
            if self._owners is None and self.tower.name.split("-")[0] not in _TOKENS:
                # As many patches as the prompt has tokens are still no tokens.
                sides = Side(self.batch, n_query), Side(self.batch, n_key)
            seen.plans[key] = compile_plan(self.readings, *sides, causal=causal)
        return seen.plans[key]

    def answers(self) -> dict[str, Answer]:
        """Everything read so far, by example.

        Of an example with several images or tiles, the mean over them; its standard error is the
        mean of theirs, which is right if all err alike and else too large.

        Raises:
            SiteError: a layer of the tower was not reached, or not for all images; or an example
                has several, and a reading gives more than a number a head.
        """
        found = self.rows()
        if self._owners is None or self._owners == tuple(range(len(self._prompts))):
            return found
        out = {}
        for name, by_row in found.items():
            if by_row.values.dim() > 3 and not self.readings[name].averages:
                raise SiteError(
                    f"reading {name!r} gives more than a number a head, and an example has several "
                    f"images or tiles in tower {self.tower.name!r}",
                    hint="give prompts with one image each, or use interp.engine.read_rows",
                )
            se = by_row.se
            if se is not None:
                se = self._mean(se.masked_fill(by_row.values.isnan(), math.nan))
            out[name] = Answer(self._mean(by_row.values), by_row.how, se)
        return out

    def rows(self) -> dict[str, Answer]:
        """Everything read so far, by rows of the tower: values [row, layer, head, …].

        Raises:
            SiteError: a layer of the tower was not reached, or not for all images.
        """
        for name, pieces in self._pieces.items():
            raise SiteError(
                f"{name} attended over {pieces.at} positions; the images have {pieces.total}"
            )
        out = {}
        for name, found in self._found.items():
            missing = [n for n in self._names if n not in found.values]
            if missing:
                raise SiteError(
                    f"the forward pass did not reach {len(missing)} of {len(self._names)} "
                    f"attention layers of tower {self.tower.name!r}, first {missing[0]}"
                )
            order = [layer.name for layer in self.tower.layers]
            out[name] = Answer(
                _stack([found.values[n] for n in order]),
                tuple(found.how[n] for n in order),
                _stack([found.se[n] for n in order]) if found.se else None,
            )
        return out

    @property
    def owners(self) -> tuple[int, ...]:
        """The example that each row belongs to."""
        return tuple(range(len(self._prompts))) if self._owners is None else self._owners

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over each example's rows; NaN for an example without any."""
        out = values.new_full((len(self._prompts), *values.shape[1:]), math.nan)
        for i in sorted(set(self.owners)):
            mine = [row for row, owner in enumerate(self.owners) if owner == i]
            out[i] = values[mine].nanmean(0)
        return out


def read(
    model: Model, batch: Batch, readings: Mapping[str, Reading], *, tower: str | None = None
) -> dict[str, Answer]:
    """Run the model once on a batch and answer every reading.

    Args:
        model: the model in hand.
        batch: prompts, with the spans that the readings name.
        readings: name to reading.
        tower: which tower; the model's first if None.

    Returns:
        Name to `Answer`, values in float32 (float64 for float64 models) on the model's device.

    Raises:
        SpanError: a prompt lacks a span.
        SiteError: the tower is missing or its layers were not reached.
    """
    answers, _ = read_with_output(model, batch, readings, tower=tower)
    return answers


def read_rows(
    model: Model, batch: Batch, readings: Mapping[str, Reading], *, tower: str | None = None
) -> tuple[dict[str, Answer], tuple[int, ...]]:
    """As `read`, but an answer for every image or tile that is a row of the tower.

    Returns:
        Name to `Answer`, values [row, layer, head, …] with NaN beyond the last of a row; and the
        prompt of each row, as `batch.view(tower)` has them.
    """
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    collector = Collector(stack, batch, readings)
    with model.observe(collector, columns=collector.columns):
        model.forward(_inputs(model, batch))
    return collector.rows(), collector.owners


def read_with_output(
    model: Model, batch: Batch, readings: Mapping[str, Reading], *, tower: str | None = None
) -> tuple[dict[str, Answer], object]:
    """As `read`, and the model's own output beside the answers."""
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    collector = Collector(stack, batch, readings)
    with model.observe(collector, columns=collector.columns):
        output = model.forward(_inputs(model, batch))
    return collector.answers(), output


def _inputs(model: Model, batch: Batch) -> dict[str, Tensor]:
    """The inputs of a batch that the model takes: one of images alone has no use for tokens.

    It may accept a token mask all the same, and then mask its patches by it.
    """
    inputs = batch.inputs()
    if not model.reads_tokens:
        inputs = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}
    return inputs


def _stack(layers: list[Tensor]) -> Tensor:
    """Layers of [example, head, …] as [example, layer, head, …], NaN where shapes fall short."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in layers), strict=True)]
    out = layers[0].new_full((len(layers), *shape), math.nan)
    for i, x in enumerate(layers):
        target = out[i]
        for dim, size in enumerate(x.shape):
            target = target.narrow(dim, 0, size)
        target.copy_(x)
    return out.transpose(0, 1)
