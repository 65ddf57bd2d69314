"""The scoring engine: from detectors and a task to tables of head scores.

Detectors that use the same prompts share one forward pass per batch. Batches hold prompts of
similar length, so that little is padded. Each finished batch goes into the run, if there is one:
a process killed at any moment loses at most the batch in flight, and the same call goes on.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from heads.detector import (
    Detector,
    Outcome,
    ReadingDetector,
    WatchingDetector,
    make_detector,
    require,
)
from interp.engine import Answer, read
from interp.errors import InputError
from interp.memory import fitting, halving
from interp.model import Model
from interp.prompts import Prompt
from interp.run import Run
from interp.scores import HeadScores
from interp.tasks import Task, make_task

if TYPE_CHECKING:
    from interp.seam.structure import Tower

Progress = Callable[[int, int], None]
"""Called after each batch with tokens done and tokens in all."""


@dataclass(frozen=True)
class Job:
    """One batch of prompts for some detectors.

    Attributes:
        index: number of the batch; its part in a run.
        detectors: those that use these prompts.
        prompts: the batch.
    """

    index: int
    detectors: tuple[Detector, ...]
    prompts: tuple[Prompt, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding not counted."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Plan:
    """Everything a call of `score` is going to do.

    Attributes:
        jobs: the batches.
        tower: name of the tower read.
        key: all that the numbers depend on, for the run.
    """

    jobs: tuple[Job, ...]
    tower: str
    key: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(job.tokens for job in self.jobs)


def score(
    model: Model | str,
    detectors: Sequence[str | Detector] | str | Detector,
    prompts: Sequence[Prompt] | None = None,
    *,
    task: Task | str | None = None,
    n: int = 20,
    batch_size: int = 4,
    seed: int = 0,
    tower: str | None = None,
    run: Run | None = None,
    progress: Progress | None = None,
) -> dict[str, HeadScores]:
    """Score every head of a model with some detectors.

    Args:
        model: a model in hand, or whatever `interp.load` takes.
        detectors: names or detectors with parameters.
        prompts: own prompts for all detectors.
        task: a task for all detectors instead; each detector's own task if neither is given.
        n: number of prompts of a task.
        batch_size: prompts at a time.
        seed: seed of tasks and controls.
        tower: tower to score; the model's first if None.
        run: where finished batches are kept, opened with `plan(...).key`.
        progress: called after each batch.

    Returns:
        Detector name to scores.

    Raises:
        DoctorError: what would be read from this model is not true.
        InputError: prompts that do not fit the model or lack a span.
        TooLargeError: a single prompt does not fit into memory.
    """
    if not isinstance(model, Model):
        from interp.loading import load

        model = load(model)
    made = plan(
        model, detectors, prompts,
        task=task, n=n, batch_size=batch_size, seed=seed, tower=tower,
    )  # fmt: skip
    return execute(model, made, run=run, seed=seed, progress=progress)


def plan(
    model: Model,
    detectors: Sequence[str | Detector] | str | Detector,
    prompts: Sequence[Prompt] | None = None,
    *,
    task: Task | str | None = None,
    n: int = 20,
    batch_size: int = 4,
    seed: int = 0,
    tower: str | None = None,
) -> Plan:
    """What `score` would do with the same arguments; nothing is run."""
    stack = model.tower(tower) if tower else next(iter(model.towers.values()))
    jobs, about = batches(
        model, detectors, prompts, task=task, n=n, batch_size=batch_size, seed=seed
    )
    chosen = {d.name: d.params for job in jobs for d in job.detectors}
    key = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype),
        "attention": _implementation(model),
        "detectors": chosen,
        "tasks": about,
        "batch_size": batch_size,
        "seed": seed,
        "tower": stack.name,
        # A formula may change between versions: an old run must not answer for a new one.
        "headscope": _version("headscope"),
    }
    return Plan(jobs, stack.name, key)


def batches(
    model: Model,
    detectors: Sequence[str | Detector] | str | Detector,
    prompts: Sequence[Prompt] | None = None,
    *,
    task: Task | str | None = None,
    n: int = 20,
    batch_size: int = 4,
    seed: int = 0,
) -> tuple[tuple[Job, ...], list[dict[str, Any]]]:
    """The batches of a plan and what their prompts are; the model's weights are not looked at."""
    if n < 1 or batch_size < 1:
        raise InputError(f"n and batch_size must be at least 1; got {n} and {batch_size}")
    if isinstance(detectors, str | Detector):
        detectors = [detectors]
    chosen = [make_detector(d) if isinstance(d, str) else d for d in detectors]
    if not chosen:
        raise InputError("at least one detector is needed; got none")
    names = [d.name for d in chosen]
    if len(set(names)) != len(names):
        raise InputError(f"each detector may be asked for once; got {', '.join(names)}")
    jobs: list[Job] = []
    about = []
    for members, listed, what in _grouped(model, chosen, prompts, task, n, seed):
        for detector in members:
            require(listed, detector.needs, detector.name)
        ids = [p.id for p in listed]
        if len(set(ids)) != len(ids):
            raise InputError("ids of prompts must all be different")
        model.batch(listed)  # refuse what does not fit before anything is computed
        ordered = sorted(listed, key=len)
        for at in range(0, len(ordered), batch_size):
            jobs.append(Job(len(jobs), members, tuple(ordered[at : at + batch_size])))
        about.append(what | {"prompts": _digest(listed)})
    return tuple(jobs), about


def execute(
    model: Model,
    made: Plan,
    *,
    run: Run | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, HeadScores]:
    """Carry a plan out; see `score`."""
    model.check()
    tower = model.tower(made.tower)
    parts: dict[int, Mapping[str, np.ndarray]] = {}
    failed: dict[int, Mapping[str, Mapping[str, str]]] = {}
    done = 0
    for job in made.jobs:
        if run is not None and job.index in run.finished:
            part = run.part(job.index)
            parts[job.index], failed[job.index] = part.arrays, part.meta["failures"]
        else:
            arrays, failures = _measure(model, tower, job, seed)
            parts[job.index], failed[job.index] = arrays, failures
            if run is not None:
                run.put_part(job.index, arrays, {"failures": failures})
        done += job.tokens
        if progress is not None:
            progress(done, made.tokens)
    scores = {
        d.name: _table(d, model, tower, made, parts, failed)
        for d in {d.name: d for job in made.jobs for d in job.detectors}.values()
    }
    if run is not None and run.status != "complete":
        run.finish(list(scores.values()))
    return scores


def _grouped(
    model: Model,
    chosen: list[Detector],
    prompts: Sequence[Prompt] | None,
    task: Task | str | None,
    n: int,
    seed: int,
) -> Iterator[tuple[tuple[Detector, ...], list[Prompt], dict[str, Any]]]:
    """Detectors that use the same prompts, the prompts, and what they are."""
    if prompts is not None:
        if task is not None:
            raise InputError("give prompts or a task, not both")
        if not prompts:
            raise InputError("at least one prompt is needed; got none")
        listed = [p if p.id else _named(p, i) for i, p in enumerate(prompts)]
        yield tuple(chosen), listed, {"task": None, "n": len(listed)}
        return
    groups: dict[Task, list[Detector]] = {}
    for detector in chosen:
        own = make_task(task) if isinstance(task, str) else task
        own = own or make_task(detector.task, detector.task_params)
        groups.setdefault(own, []).append(detector)
    for made, members in groups.items():
        yield tuple(members), made.prompts(model, n, seed=seed), {"task": repr(made), "n": n}


def _named(prompt: Prompt, i: int) -> Prompt:
    from dataclasses import replace

    return replace(prompt, id=f"prompt-{i}")


def _digest(prompts: list[Prompt]) -> str:
    text = json.dumps(
        [
            [p.id, p.tokens, sorted(p.spans.items()), p.answer, repr(sorted(p.meta.items()))]
            for p in prompts
        ],
        sort_keys=True,
    )
    digest = hashlib.sha256(text.encode())
    for prompt in prompts:
        for name, x in sorted(prompt.inputs.items()):
            digest.update(f"{prompt.id}/{name}/{tuple(x.shape)}".encode())
            digest.update(x.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _implementation(model: Model) -> str | None:
    value = getattr(model.text_config, "_attn_implementation", None)
    return value if isinstance(value, str) else None


Arrays = dict[str, np.ndarray]
Failures = dict[str, dict[str, str]]


def _measure(model: Model, tower: "Tower", job: Job, seed: int) -> tuple[Arrays, Failures]:
    def work(prompts: Sequence[Prompt]) -> tuple[Arrays, Failures]:
        return _flattened(model, tower, replace(job, prompts=tuple(prompts)), seed)

    done = [made for _, made in halving(job.prompts, work, what="prompts")]
    arrays = {name: np.concatenate([a[name] for a, _ in done]) for name in done[0][0]}
    failures = {
        name: {i: why for _, f in done for i, why in f[name].items()} for name in done[0][1]
    }
    return arrays, failures


def _flattened(model: Model, tower: "Tower", job: Job, seed: int) -> tuple[Arrays, Failures]:
    arrays: Arrays = {}
    failures: Failures = {}
    longest = max(map(len, job.prompts))
    # Batches are halved before this is said, so that only a single prompt gets here.
    with fitting(
        f"{len(job.prompts)} prompts of up to {longest} tokens",
        "choose shorter prompts, or dtype bfloat16 (--dtype bfloat16)",
    ):
        outcomes = dict(_outcomes(model, tower, job, seed))
    for name, outcome in outcomes.items():
        arrays[f"{name}/score"] = _flat(tower, outcome.values)
        arrays[f"{name}/null"] = _flat(tower, outcome.null)
        for extra, values in outcome.extras.items():
            arrays[f"{name}/extra/{extra}"] = _flat(tower, values)
        failures[name] = {job.prompts[i].id: why for i, why in outcome.failures.items()}
    return arrays, failures


def _outcomes(model: Model, tower: "Tower", job: Job, seed: int) -> Iterator[tuple[str, Outcome]]:
    readers = [d for d in job.detectors if isinstance(d, ReadingDetector)]
    if readers:
        prompts = list(job.prompts)
        for detector in readers:
            prompts = [detector.prepare(p) for p in prompts]
        batch = model.batch(prompts)
        wanted = {f"{d.name}/{n}": r for d in readers for n, r in d.readings().items()}
        answers = read(model, batch, wanted, tower=tower.name)
        for detector in readers:
            # Controls are seeded by the prompt, so that batches may be cut anywhere.
            rngs = [random.Random(f"{seed}/{detector.name}/{p.id}") for p in prompts]
            made = [detector.control(p, rng) for p, rng in zip(prompts, rngs, strict=True)]
            held = [c for c in made if c is not None]
            control = None
            # Rows of the control stand for rows of the batch.
            assert len(held) in (0, len(prompts)), f"{detector.name} controls some prompts only"
            if held:
                own = {n: r for n, r in wanted.items() if n.startswith(f"{detector.name}/")}
                control = _own(detector, read(model, model.batch(held), own, tower=tower.name))
            yield (
                detector.name,
                detector.formula(model, tower, batch, _own(detector, answers) or {}, control),
            )
    for watcher in job.detectors:
        if isinstance(watcher, WatchingDetector):
            yield watcher.name, watcher.watch(model, list(job.prompts), tower=tower.name)


def _own(detector: Detector, answers: Mapping[str, Answer]) -> dict[str, torch.Tensor]:
    prefix = f"{detector.name}/"
    return {n[len(prefix) :]: a.values for n, a in answers.items() if n.startswith(prefix)}


def _flat(tower: "Tower", values: torch.Tensor) -> np.ndarray:
    """[example, layer, head] as [example, head], in the order of `Tower.heads`."""
    rows = [
        values[:, at, : layer.n_heads].detach().cpu().double()
        for at, layer in enumerate(tower.layers)
    ]
    return torch.cat(rows, dim=1).numpy()


def _table(
    detector: Detector,
    model: Model,
    tower: "Tower",
    made: Plan,
    parts: Mapping[int, Mapping[str, np.ndarray]],
    failed: Mapping[int, Mapping[str, Mapping[str, str]]],
) -> HeadScores:
    jobs = [job for job in made.jobs if detector in job.detectors]
    prompts = [p for job in jobs for p in job.prompts]

    def gather(name: str) -> np.ndarray:
        return np.concatenate([parts[job.index][f"{detector.name}/{name}"] for job in jobs])

    prefix = f"{detector.name}/extra/"
    extras = [n[len(prefix) :] for n in parts[jobs[0].index] if n.startswith(prefix)]
    failures = {i: w for job in jobs for i, w in failed[job.index].get(detector.name, {}).items()}
    return HeadScores(
        detector=detector.name,
        heads=tower.heads,
        per_example=gather("score"),
        null_per_example=gather("null"),
        examples=tuple(p.id for p in prompts),
        failures=tuple(failures.items()),
        threshold=detector.limit,
        unit=detector.unit,
        range=detector.range,
        params=detector.params,
        provenance=provenance(model, made),
        extras={name: gather(f"extra/{name}") for name in extras},
    )


def provenance(model: Model, made: Plan) -> dict[str, Any]:
    """What the numbers were made from: the key of the plan, and versions."""
    import platform

    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in ("headscope", "torch", "transformers", "numpy")}
    return {**made.key, "class": type(model.hf).__name__, "device": str(model.device),
            "versions": versions}  # fmt: skip


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
