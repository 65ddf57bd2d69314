"""`headscope rank --dry-run`: what a command would take, without loading the weights.

Tokens are counted: the prompts are made and tokenised. Memory and time are estimates: weights from
the configuration; time from the multiplications of the forward passes at half the speed of a matrix
product measured here, and for decoding from reading the weights once per step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.exits import say
from app.loading import ZOO, Source, waiting
from app.progress import seconds
from app.tables import Format, Part, Table, write
from interp.errors import ModelError

if TYPE_CHECKING:
    from app.rank import Request
    from heads.scoring import Job
    from interp.model import Model

_COLUMNS = ("quantity", "value", "unit", "note")
_EFFICIENCY = 0.5
_PROBE = 1024


@dataclass(frozen=True)
class Work:
    """What the batches ask of a model.

    Attributes:
        prompts: prompts, each once.
        tokens: tokens of the prompts.
        passed: tokens that go through the model, padding and control prompts counted.
        squares: sum of squared lengths of what goes through the model, for attention.
        steps: decoding steps of all batches.
        widest: tokens of the largest batch, padding counted.
        longest: tokens of the longest prompt.
    """

    prompts: int
    tokens: int
    passed: int
    squares: int
    steps: int
    widest: int
    longest: int


def estimate(request: "Request", *, format: Format, quiet: bool) -> None:
    """Write how many tokens, how much memory and how much time a request would take."""
    from app.rank import prepared
    from heads.scoring import batches

    with waiting("estimating", quiet=quiet):
        from interp.loading import pick_device

        device = pick_device(request.source.device)
        model = _outline(request.source)
        made, prompts, task = prepared(request, model)
        jobs, _ = batches(
            model, made, prompts, task=task, n=request.n, batch_size=request.batch_size,
            seed=request.seed,
        )  # fmt: skip
        work = work_of(jobs)
        rows = _rows(model, work, len(jobs), device)
    title = f"estimate for {request.source.name} on {device}; nothing was scored"
    facts = {"model": request.source.name, "device": device, "estimate": True}
    write(Table("headscope.estimate", _COLUMNS, [Part(title, rows)], facts, limit=None), format)
    if not quiet:
        last = rows[-1]["value"]
        say(f"about {seconds(last)} on {device}: an estimate, from a short measurement")


def work_of(jobs: "Sequence[Job]") -> Work:
    """Count what batches ask of a model."""
    from heads.detector import DecodingDetector, ReadingDetector

    passed = squares = steps = widest = longest = 0
    for job in jobs:
        readers = [d for d in job.detectors if isinstance(d, ReadingDetector)]
        decoders = [d for d in job.detectors if isinstance(d, DecodingDetector)]
        controls = sum(type(d).control is not ReadingDetector.control for d in readers)
        passes = bool(readers) + controls + len(decoders)
        width = max(map(len, job.prompts))
        passed += passes * width * len(job.prompts)
        squares += passes * width**2 * len(job.prompts)
        answer = max(len(p.answer or p.positions("all")[:16]) for p in job.prompts)
        steps += sum(answer + int(d.params.get("extra", 0)) for d in decoders)
        widest, longest = max(widest, width * len(job.prompts)), max(longest, width)
    prompts = [p for job in jobs for p in job.prompts]
    return Work(
        len(prompts), sum(map(len, prompts)), passed, squares, steps, widest, longest
    )  # fmt: skip


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
    try:
        config = tf.AutoConfig.from_pretrained(source.name, **common)
        named = [getattr(tf, name, None) for name in config.architectures or ()]
        cls = next(filter(None, named), None)
        wanted = source.dtype if source.dtype != "auto" else config.dtype or "float32"
        dtype = getattr(torch, str(wanted).removeprefix("torch."))
        with torch.device("meta"):
            hf = cls(config) if cls else tf.AutoModel.from_config(config)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no configuration could be read from {source.name!r}: {first}",
            hint="a folder, a hub name, or zoo:NAME (headscope list zoo)",
        ) from error
    try:
        tokenizer = tf.AutoTokenizer.from_pretrained(source.name, **common)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        tokenizer = None
    return Model(hf.to(dtype).eval(), tokenizer, name=source.name)


def _rows(model: "Model", work: Work, jobs: int, device: str) -> list[dict[str, Any]]:
    config = model.text_config
    item = model.dtype.itemsize
    weights = sum(p.numel() for p in model.hf.parameters())
    width = int(getattr(config, "hidden_size", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    # A dozen tensors of the residual's width live at once, and the logits of every position.
    active = work.widest * (12 * width * item + 4 * model.vocabulary)
    flops = 2 * weights * work.passed + 4 * layers * width * work.squares
    speed, bandwidth = _measured(device, model.dtype)
    duration = flops / (speed * _EFFICIENCY) + work.steps * weights * item / bandwidth
    counted, guessed = "counted", "estimate"
    return [
        _row("prompts", work.prompts, "", counted),
        _row("batches", jobs, "", counted),
        _row("tokens", work.tokens, "", counted),
        _row("longest prompt", work.longest, "tokens", counted),
        _row("tokens through the model", work.passed, "", "with controls and padding"),
        _row("decoding steps", work.steps, "", guessed),
        _row("memory for weights", weights * item, "bytes", counted),
        _row("memory for a batch", active, "bytes", guessed),
        _row("time", duration, "seconds", guessed),
    ]


def _row(quantity: str, value: float, unit: str, note: str) -> dict[str, Any]:
    return {"quantity": quantity, "value": value, "unit": unit or None, "note": note}


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
