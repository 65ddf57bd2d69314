"""Proof, on the user's own model, that what is read is true.

`examine` runs the model on a few tokens with and without reading and checks, for every layer, the
identities that all readings rest on. A failed identity is an error, unless the model declares why
(learned sinks make rows sum to less than one).
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import DoctorError
from interp.example import example_inputs
from interp.seam.calls import MASKED, AttnCall
from interp.seam.structure import Layer

if TYPE_CHECKING:
    from interp.model import Model


_BLOCK = 1 << 25  # entries of the pattern held at once


@dataclass(frozen=True)
class Check:
    """One identity on one model.

    Attributes:
        name: what must hold.
        worst: largest deviation found, in the unit of `name`; None where it is not a number.
        limit: largest deviation allowed; None where the check is yes or no.
        ok: whether it holds; None if it does not apply.
        note: where the worst was found, or why it does not apply.
    """

    name: str
    worst: float | None
    limit: float | None
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The doctor's table.

    Attributes:
        model: name of the model.
        checks: one row a check.
        layers: for each attention module, the tower, layer and kernel that its numbers come from.
        unreached: modules that look like attention and are not read.
    """

    model: str
    checks: tuple[Check, ...]
    layers: Mapping[str, tuple[str, int, str]]
    unreached: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok is not False for check in self.checks)

    def raise_if_failed(self) -> None:
        """Refuse a model on which an identity fails.

        Raises:
            DoctorError: names the failed checks.
        """
        failed = [c for c in self.checks if c.ok is False]
        if failed:
            what = "; ".join(f"{c.name} ({c.note or c.worst})" for c in failed)
            raise DoctorError(
                f"readings of {self.model} would not be true: {what}",
                hint="headscope doctor --model M shows the whole table",
            )

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAIL", None: "-"}
        lines = [f"doctor: {self.model}: {'all checks hold' if self.ok else 'FAILED'}"]
        width = max(len(c.name) for c in self.checks)
        for c in self.checks:
            worst = "" if c.worst is None else f"{c.worst:.1e}"
            limit = "" if c.limit is None else f"<= {c.limit:.0e}"
            row = f"  {c.name:<{width}}  {mark[c.ok]:<4}  {worst:>8} {limit:<9} {c.note}"
            lines.append(row.rstrip())
        for name, cls in self.unreached.items():
            lines.append(f"  not read: {name} ({cls})")
        return "\n".join(lines)


@torch.no_grad()
def examine(
    model: "Model", inputs: Mapping[str, Tensor] | None = None, *, oracle: bool = False
) -> Report:
    """Check every identity on one small input.

    Args:
        model: the model in hand.
        inputs: keyword inputs of the forward; made from the configuration if None. Text models
            are run on a padded batch, longer than their sliding window.
        oracle: also compare patterns with TransformerLens on a copy (slow; needs the family to be
            one that it supports).
    """
    if inputs is None:
        inputs = model._example if model._example is not None else _example(model)
    plain = _outputs(model, inputs)
    watch = _Watch(model, inputs)
    with (
        model.observe_output(watch.output),
        model.observe(watch.call, columns=watch.columns),
    ):
        read = _outputs(model, inputs)
    after = _outputs(model, inputs)
    checks = [
        _same("output with reading equals output without, bit for bit", plain, read),
        _same("output afterwards is unchanged", plain, after),
        *watch.checks(),
    ]
    if oracle:
        from interp.oracle import compare

        checks.append(compare(model, inputs))
    layers = {x.name: (x.tower, x.index, watch.how.get(x.name, "none")) for x in _layers(model)}
    return Report(model.name, tuple(checks), layers, model.structure.unreached)


def _layers(model: "Model") -> list[Layer]:
    return list(model.structure.layers.values())


def _example(model: "Model") -> dict[str, Tensor]:
    """Text longer than any sliding window, the second example padded at its end."""
    length = min(max(24, _window(model.text_config) + 8), 160)
    inputs = example_inputs(model.hf, length=length)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[0] > 1 and mask.shape[1] > 4:
        mask[1, -3:] = 0
    return inputs


def _window(config: Any) -> int:
    """The widest sliding window of any layer, 0 if there is none."""
    try:
        windows = [getattr(config, "sliding_window", None)]
    except RuntimeError:  # where layers differ, the whole has no answer
        layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return max((x for x in windows if isinstance(x, int)), default=0)


def _logits(output: Any) -> Tensor:
    """The first floating tensor of a model's output."""
    for value in _tensors(output):
        if value.is_floating_point():
            return value
    raise DoctorError("the model's output holds no tensor to compare")


def _outputs(model: "Model", inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every floating tensor of a model's output, caches left out.

    Some models draw random numbers even in evaluation: each forward starts from the same seed,
    and the user's generator is put back.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        output = model.forward(inputs)
    tensors = [x for x in _tensors(output) if x.is_floating_point() and x.numel()]
    if not tensors:
        raise DoctorError("the model's output holds no tensor to compare")
    return tensors


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _same(name: str, a: list[Tensor], b: list[Tensor]) -> Check:
    if any(bool(x.isnan().any()) for x in a):
        return Check(name, None, 0.0, False, "the output holds NaN: are there NaN in the weights?")
    if [x.shape for x in a] != [x.shape for x in b]:
        return Check(name, None, 0.0, False, "the output has another shape")
    pairs = list(zip(a, b, strict=True))
    # Where equal, infinities would differ by NaN.
    worst = max(0.0 if torch.equal(x, y) else float((x - y).double().abs().max()) for x, y in pairs)
    return Check(name, worst, 0.0, all(torch.equal(x, y) for x, y in pairs))


class _Worst:
    """The largest deviation seen and where."""

    def __init__(self, name: str, limit: float) -> None:
        self.name, self.limit = name, limit
        self.value: float | None = None
        self.where = ""

    def see(self, value: float, where: str, limit: float | None = None) -> None:
        limit = self.limit if limit is None else limit
        if self.value is None or self._worse(value, limit):
            self.value, self.where, self.limit = value, where, limit

    def _worse(self, value: float, limit: float) -> bool:
        assert self.value is not None
        # NaN compares false with everything: it is the worst of all, and stays so.
        if math.isnan(self.value) or math.isnan(value):
            return not math.isnan(self.value)
        # Where limits differ, by the share of its own limit (which is never 0 then).
        if limit == self.limit:
            return value > self.value
        return value * self.limit > self.value * limit

    def check(self, missing: str) -> Check:
        if self.value is None:
            return Check(self.name, None, self.limit, None, missing)
        ok = self.value <= self.limit
        return Check(self.name, self.value, self.limit, ok, f"worst in {self.where}")


class _Watch:
    """Collects every deviation during one forward."""

    def __init__(self, model: "Model", inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        self.layers = model.structure.layers
        self.mask = inputs.get("attention_mask")
        exact = model.dtype in (torch.float32, torch.float64)
        # In 16 bits the model itself rounds z to 3 digits; the identities hold to that.
        self.limit = 2e-5 if exact else 3e-2
        self.calls: dict[str, int] = {}
        self.how: dict[str, str] = {}
        self.sums = _Worst("pattern rows sum to one", self.limit)
        self.z = _Worst("pattern @ v equals z", self.limit)
        self.lse = _Worst("kernel's log-sum-exp equals the scores'", self.limit)
        self.appended = _Worst("columns appended to v give pattern @ columns", self.limit)
        self.future = _Worst("no mass on later tokens (causal layers)", 0.0)
        self.padding = _Worst("no mass on padding", 0.0)
        self.heads = _Worst("heads through W_O plus bias equal attention output", self.limit)
        self.out_in: dict[str, Tensor] = {}

    def columns(self, v: Tensor) -> Tensor:
        ones = torch.ones(v.shape[0], v.shape[2], 1, device=v.device)
        return torch.cat([ones, ones.cumsum(1) / v.shape[2]], dim=-1)

    def output(self, layer: Layer, site: Tensor) -> None:
        module = self.model.hf.get_submodule(layer.projection)
        weight = self.model.w_o(layer).float()
        flat = site.float()
        per_head = torch.einsum("...he,hed->...d", flat, weight)
        bias = getattr(module, "bias", None)
        expected = per_head if bias is None else per_head + bias.float()
        actual = module.forward(site.flatten(-2)).float()
        scale = float(actual.abs().max().clamp_min(1))
        self.heads.see(float((expected - actual).abs().max()) / scale, layer.projection)

    def call(self, call: AttnCall) -> None:
        layer = self.layers[call.name]
        self.calls[call.name] = self.calls.get(call.name, 0) + 1
        self.how[call.name] = call.how
        # A few rows at a time: towers of tiled images attend over thousands of patches.
        step = max(1, _BLOCK // (call.n_heads * call.n_key))
        for b in range(min(call.z.shape[0], 2)):
            for at in range(0, call.n_query, step):
                self._block(call, layer, b, slice(at, min(at + step, call.n_query)))

    def _block(self, call: AttnCall, layer: Layer, b: int, rows: slice) -> None:
        heads = slice(0, call.n_heads)
        real = self._real_rows(b, call)[rows]
        if not bool(real.any()):
            return
        p = call.rows(b, heads, rows)[:, real]
        z = call.z[b].transpose(0, 1)[:, rows][:, real].to(p)
        total = p.sum(-1)
        gap = (total - 1).clamp_min(0) if layer.sinks else (total - 1).abs()
        self.sums.see(float(gap.max()), call.name)
        if call.v is not None:
            v = call.v[b].to(p).repeat_interleave(call.n_heads // call.v.shape[1], dim=0)
            size = float(call.z[b].abs().max().clamp_min(1))
            self.z.see(float((p @ v - z).abs().max()) / size, call.name)
        if layer.causal and call.n_query == call.n_key:
            query = torch.arange(call.n_query, device=p.device)[rows][real]
            later = torch.arange(call.n_key, device=p.device)[None] > query[:, None]
            self.future.see(float((p * later).max()), call.name)
        pad = self._padding(b, call)
        if pad is not None:
            self.padding.see(float(p[..., pad].max()) if bool(pad.any()) else 0.0, call.name)
        if call.lse is None:
            return
        s = call.scores(b, heads, rows)
        gap = (call.row_lse(s, heads) - call.lse[b][:, rows])[:, real].abs()
        # Scores of size s carry a rounding error of s·eps, and so does all made of them.
        seen = s.masked_fill(s <= MASKED / 2, 0).abs().max()
        limit = self.limit + 8 * float(seen) * torch.finfo(s.dtype).eps
        self.lse.see(float(gap.max()), call.name, limit)
        if call.extra is not None:
            ones = torch.ones(call.n_key, 1, device=p.device, dtype=p.dtype)
            columns = torch.cat([ones, ones.cumsum(0) / call.n_key], dim=-1)
            extra = call.extra[b].transpose(0, 1)[:, rows][:, real].to(p)
            self.appended.see(float((p @ columns - extra).abs().max()), call.name, limit)

    def _text(self, name: str, n: int) -> bool:
        tower = self.layers[name].tower
        return self.mask is not None and self.mask.shape[-1] == n and tower in ("text", "encoder")

    def _real_rows(self, b: int, call: AttnCall) -> Tensor:
        if self._text(call.name, call.n_query) and call.z.shape[0] == len(self.mask):  # type: ignore[arg-type]
            return self.mask[b].bool()  # type: ignore[index]
        return torch.ones(call.n_query, dtype=torch.bool, device=call.z.device)

    def _padding(self, b: int, call: AttnCall) -> Tensor | None:
        if self._text(call.name, call.n_key) and call.z.shape[0] == len(self.mask):  # type: ignore[arg-type]
            return ~self.mask[b].bool()  # type: ignore[index]
        return None

    def checks(self) -> list[Check]:
        wrong = [n for n, x in self.layers.items() if self.calls.get(n, 0) != x.calls]
        note = f"{len(self.layers)} layers, {sum(self.calls.values())} calls"
        if wrong:
            note = f"{len(wrong)} of {len(self.layers)} not as at load, first {wrong[0]}"
        calls = Check(
            "every attention layer called as often as expected", None, None, not wrong, note
        )
        sinks = any(x.sinks for x in self.layers.values())
        sums = self.sums.check("")
        if sinks:
            name = "pattern rows sum to at most one (learned sinks)"
            sums = Check(name, sums.worst, sums.limit, sums.ok, sums.note)
        return [
            calls,
            sums,
            self.z.check("values are not reached, only the pattern"),
            self.heads.check(""),
            self.future.check("no causal layer"),
            self.padding.check("no padding in this input"),
            self.lse.check("another kernel runs here; rows are recomputed"),
            self.appended.check("another kernel runs here; rows are recomputed"),
        ]


def copy_of(model: "Model") -> Any:
    """A deep copy of the model, for an oracle that changes what it wraps."""
    return copy.deepcopy(model.hf)
