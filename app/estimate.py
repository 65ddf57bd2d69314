"""`headscope rank --dry-run`: what the batches of a request would take."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from app.outlook import Row, Work, forecast, row
from app.subject import ALL, check_towers
from app.tables import Format

if TYPE_CHECKING:
    from app.rank import Request
    from heads.scoring import Job
    from interp.model import Model


def estimate(request: "Request", *, format: Format, quiet: bool) -> None:
    """Write how many tokens, how much memory and how much time a request would take."""
    forecast(
        request.source, partial(_count, request), "scoring", format=format, quiet=quiet,
        passes="with controls and padding",
    )  # fmt: skip


def _count(request: "Request", model: "Model") -> tuple[Work, list[Row]]:
    from app.rank import prepared
    from heads.scoring import batches

    # A single tower is not looked for: that takes a run of a few tokens.
    towers = tuple(request.towers)
    if len(towers) > 1 or towers == (ALL,):
        towers = check_towers(model, towers) or ()
    made, prompts, task = prepared(request, model)
    jobs, _ = batches(
        model, made, prompts, task=task, n=request.n, batch_size=request.batch_size,
        seed=request.seed,
    )  # fmt: skip
    batched = row("batches", len(jobs))
    if len(towers) <= 1:
        return work_of(jobs, _heads(model, towers[0] if towers else None, jobs)), [batched]
    # The first prompt of its detectors tells which of several towers they apply to.
    first = {job.detectors: job for job in reversed(jobs)}.values()
    tried = [
        replace(job, detectors=(d,), prompts=job.prompts[:1]) for job in first
        for d in job.detectors
    ]  # fmt: skip
    once = work_of(jobs, 0)
    work = Work(longest=once.longest)
    for name in towers:
        heads = len(model.tower(name).heads)
        work = work + work_of(jobs, heads) + work_of(tried, heads)
    work = replace(work, prompts=once.prompts, tokens=once.tokens)
    return work, [row("towers", len(towers), "", "at most, of each detector"), batched]


def _heads(model: "Model", tower: str | None, jobs: "Sequence[Job]") -> int:
    """Heads of the tower, by the configuration; 0 where no detector runs the model once a head."""
    if not any(getattr(d, "per_head", 0) for job in jobs for d in job.detectors):
        return 0
    sees = tower not in (None, "text") or not model.reads_tokens
    config = getattr(model.config, "vision_config", model.config) if sees else model.text_config
    return int(config.num_hidden_layers) * int(config.num_attention_heads)


def work_of(jobs: "Sequence[Job]", heads: int) -> Work:
    """Count what batches ask of a model, in whose tower there are so many heads."""
    from heads.detector import DecodingDetector, ReadingDetector, WatchingDetector

    passed = squares = steps = widest = longest = 0
    for job in jobs:
        readers = [d for d in job.detectors if isinstance(d, ReadingDetector)]
        decoders = [d for d in job.detectors if isinstance(d, DecodingDetector)]
        controls = sum(type(d).control is not ReadingDetector.control for d in readers)
        watched = sum(
            d.passes + heads * d.per_head
            for d in job.detectors if isinstance(d, WatchingDetector)
        )  # fmt: skip
        passes = bool(readers) + controls + watched
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
