"""What a command would take, without loading the weights: the end of every `--dry-run`.

Tokens are counted: the prompts are made and tokenised. Memory and time are estimates: weights from
the configuration; time from the multiplications of the forward passes at half the speed of a matrix
product measured here, a backward pass as two forward ones, and for decoding from reading the
weights once per step.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from app.exits import say
from app.loading import ZOO, Source, waiting
from app.progress import seconds
from app.tables import Format, Part, Table, write
from interp.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from interp.model import Model
    from interp.prompts import Prompt

_COLUMNS = ("quantity", "value", "unit", "note")
_EFFICIENCY = 0.5
_PROBE = 1024
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a command asks of a model; the sum of two is both.

    Attributes:
        prompts: prompts, each once.
        tokens: tokens of the prompts.
        passed: tokens that go through the model, padding and control prompts counted.
        squares: sum of squared lengths of what goes through the model, for attention.
        steps: decoding steps of all batches.
        widest: tokens of the largest batch, padding counted.
        longest: tokens of the longest prompt.
        backward: tokens of the passes whose gradients are taken.
    """

    prompts: int = 0
    tokens: int = 0
    passed: int = 0
    squares: int = 0
    steps: int = 0
    widest: int = 0
    longest: int = 0
    backward: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.prompts + other.prompts, self.tokens + other.tokens, self.passed + other.passed,
            self.squares + other.squares, self.steps + other.steps,
            max(self.widest, other.widest), max(self.longest, other.longest),
            self.backward + other.backward,
        )  # fmt: skip

    def run(self, times: int, *, backward: int = 0) -> "Work":
        """The same prompts run so often, and of these so often with gradients."""
        return replace(
            self, passed=self.passed * times, squares=self.squares * times,
            steps=self.steps * times, backward=self.passed * backward,
        )  # fmt: skip


def padded(prompts: "Sequence[Prompt]", batch_size: int, *, order: str = "length") -> Work:
    """Prompts run once, in batches.

    Args:
        prompts: the prompts.
        batch_size: prompts at a time.
        order: `length` (sorted), `given`, or `equal` (only prompts of one length share a batch).
    """
    lengths = [len(p) for p in prompts]
    if order != "given":
        lengths.sort()
    groups = [[x for x in lengths if x == n] for n in sorted(set(lengths))]
    found = Work(len(lengths), sum(lengths), longest=max(lengths))
    for group in groups if order == "equal" else [lengths]:
        for at in range(0, len(group), batch_size):
            part = group[at : at + batch_size]
            width = max(part)
            size = width * len(part)
            found += Work(passed=size, squares=size * width, widest=size)
    return found


def row(quantity: str, value: float, unit: str = "", note: str = "counted") -> Row:
    """A row of the answer."""
    return {"quantity": quantity, "value": value, "unit": unit or None, "note": note}


def forecast(
    source: Source, count: "Callable[[Model], tuple[Work, Sequence[Row]]]", what: str, *,
    format: Format, quiet: bool, passes: str = "with padding",
) -> None:  # fmt: skip
    """Write how many tokens, how much memory and how much time a request would take.

    Args:
        source: the model.
        count: says for a model without weights what is asked of it, and further rows.
        what: what would be done, in words.
        format: of the output.
        quiet: say nothing on stderr.
        passes: note on the tokens that go through the model.
    """
    with waiting("estimating", quiet=quiet):
        from interp.loading import pick_device

        device = pick_device(source.device)
        model = _outline(source)
        work, more = count(model)
        rows = _rows(model, work, more, device, passes)
    title = f"estimate of {what} for {source.name} on {device}; nothing was run"
    facts = {"model": source.name, "device": device, "estimate": True}
    write(Table("headscope.estimate", _COLUMNS, [Part(title, rows)], facts, limit=None), format)
    if not quiet:
        last = rows[-1]["value"]
        say(f"about {seconds(last)} on {device}: an estimate, from a short measurement")


def _outline(source: Source) -> "Model":
    """The model without its weights, tokenizer included; zoo models are small enough to build."""
    if source.name.startswith(ZOO):
        return source.load(quiet=True)
    import torch
    import transformers as tf

    from interp.model import Model

    common: dict[str, Any] = {
        "revision": source.revision or "main",
        "trust_remote_code": source.trust,
        "local_files_only": source.offline,
    }

    def optional(kind: Any) -> Any:
        try:
            return kind.from_pretrained(source.name, **common)
        except (OSError, ValueError, ImportError, KeyError, TypeError):
            return None

    try:
        config = tf.AutoConfig.from_pretrained(source.name, **common)
        named = [getattr(tf, name, None) for name in config.architectures or ()]
        cls = next(filter(None, named), None)
        wanted = source.dtype if source.dtype != "auto" else config.dtype or "float32"
        dtype = getattr(torch, str(wanted).removeprefix("torch."))
        with torch.device("meta"):
            hf = cls(config) if cls else tf.AutoModel.from_config(config)
        hf = hollow(hf.to(dtype)).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no configuration could be read from {source.name!r}: {first}",
            hint="a folder, a hub name, or zoo:NAME (headscope list zoo)",
        ) from error
    processor = None
    if "pixel_values" in inspect.signature(hf.forward).parameters:
        processor = optional(tf.AutoProcessor)
        if not hasattr(processor, "image_processor"):  # none, or a tokenizer in its place
            processor = optional(tf.AutoImageProcessor)
    return Model(hf, optional(tf.AutoTokenizer), processor, name=source.name)


def hollow(hf: "nn.Module") -> "nn.Module":
    """Give a model on the meta device weights of zeros, which take no memory.

    Towers are found by running a few tokens, which the meta device cannot do where a mask is looked
    at. Zeros that were never written to are one page to the system, however many there are; and
    with them every pattern is even over what is seen, so that masks show.
    """
    import numpy as np
    import torch
    from torch import nn

    made: dict[int, torch.Tensor] = {}
    for module in hf.modules():
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for some in tensors:
            for name, x in some.items():
                if x is None or not x.is_meta:
                    continue
                if id(x) not in made:  # tied weights stay tied
                    size = max(1, x.numel()) * x.element_size()
                    held = torch.from_numpy(np.zeros(size, np.uint8)).view(x.dtype)
                    zeros = held[: x.numel()].view(x.shape)
                    is_weight = isinstance(x, nn.Parameter)
                    made[id(x)] = nn.Parameter(zeros, requires_grad=False) if is_weight else zeros
                some[name] = made[id(x)]
    return hf


def _rows(model: "Model", work: Work, more: Sequence[Row], device: str, passes: str) -> list[Row]:
    config = model.text_config
    item = model.dtype.itemsize
    weights = sum(p.numel() for p in model.hf.parameters())
    width = int(getattr(config, "hidden_size", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    # A dozen tensors of the residual's width live at once, and the logits of every position; where
    # a gradient is taken, those of every layer.
    alive = 12 * width * item * (layers if work.backward else 1)
    logits = model.vocabulary if model.reads_tokens else 0
    active = work.widest * (alive + 4 * logits)
    backward = 2 * work.backward / work.passed if work.passed else 0
    flops = (2 * weights * work.passed + 4 * layers * width * work.squares) * (1 + backward)
    speed, bandwidth = _measured(device, model.dtype)
    duration = flops / (speed * _EFFICIENCY) + work.steps * weights * item / bandwidth
    guessed = "estimate"
    return [
        row("prompts", work.prompts),
        *more,
        row("tokens", work.tokens),
        row("longest prompt", work.longest, "tokens"),
        row("tokens through the model", work.passed, "", passes),
        *([row("of these with gradients", work.backward)] if work.backward else []),
        row("decoding steps", work.steps, "", guessed),
        row("memory for weights", weights * item, "bytes"),
        row("memory for a batch", active, "bytes", guessed),
        row("time", duration, "seconds", guessed),
    ]


def _measured(device: str, dtype: Any) -> tuple[float, float]:
    """Multiplications and additions per second, and bytes read per second, on this device."""
    import torch

    a = torch.ones(_PROBE, _PROBE, device=device, dtype=dtype)

    def once(work: Any) -> float:
        work()
        start = time.perf_counter()
        work().sum().item()  # waits for the device
        return max(time.perf_counter() - start, 1e-6)

    big = torch.ones(32 * _PROBE, _PROBE, device=device, dtype=dtype)
    speed = 2 * _PROBE**3 / once(lambda: a @ a)
    return speed, big.numel() * dtype.itemsize / once(lambda: big[::1] + 0)
