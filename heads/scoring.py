"""The scoring engine: from detectors and a task to tables of head scores.

Detectors that use the same prompts share one forward pass per batch. Batches hold prompts of
similar length, so that little is padded. Each finished batch goes into the run, if there is one:
a process killed at any moment loses at most the batch in flight, and the same call goes on.

Of several towers, a table holds the heads of all those that its detector applies to, each beside
the controls of its own tower. Its q-values correct for all of these heads together, so that a head
may have a larger one than in a table of its tower alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from heads.detector import Detector, make_detector, require
from heads.measuring import Job as Job
from heads.measuring import applying
from heads.measuring import measure as _measure
from interp.errors import InputError
from interp.model import Model
from interp.prompts import Prompt
from interp.run import Run
from interp.scores import HeadScores
from interp.tasks import Task, make_task

if TYPE_CHECKING:
    from interp.headid import HeadId

Progress = Callable[[int, int], None]
"""Called after each batch with tokens done and tokens in all."""


@dataclass(frozen=True)
class Plan:
    """Everything a call of `score` is going to do.

    Attributes:
        jobs: the batches.
        towers: names of the towers read, in the order of the model.
        key: all that the numbers depend on, for the run.
    """

    jobs: tuple[Job, ...]
    towers: tuple[str, ...]
    key: Mapping[str, Any]

    @property
    def tower(self) -> str:
        """The first tower read."""
        return self.towers[0]

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
    tower: str | Sequence[str] | None = None,
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
        tower: tower to score, or several, whose heads share the tables; the model's first if
            None.
        run: where finished batches are kept, opened with `plan(...).key`.
        progress: called after each batch.

    Returns:
        Detector name to scores.

    Raises:
        DoctorError: what would be read from this model is not true.
        InputError: prompts that do not fit the model or lack a span, or a detector that applies to
            none of the towers. One that applies to some leaves out the others: the table's
            failures and `provenance["left_out"]` say why.
        SiteError: the model has no such tower.
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
    tower: str | Sequence[str] | None = None,
) -> Plan:
    """What `score` would do with the same arguments; nothing is run."""
    towers = towers_of(model, tower)
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
        "tower": ",".join(towers),
        # A formula may change between versions: an old run must not answer for a new one.
        "headscope": _version("headscope"),
    }
    return Plan(jobs, towers, key)


def towers_of(model: Model, asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the towers asked for, in the order of the model; its first if None.

    Raises:
        SiteError: the model has no such tower.
        InputError: no tower, or one twice.
    """
    if not asked and not isinstance(asked, str | None):
        raise InputError("at least one tower is needed; got none")
    if not asked:
        return (next(iter(model.towers)),)
    names = [asked] if isinstance(asked, str) else list(asked)
    if len(set(names)) != len(names):
        raise InputError(f"each tower may be asked for once; got {', '.join(names)}")
    found = {model.tower(name).name for name in names}
    return tuple(name for name in model.towers if name in found)


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
    parts: dict[int, Mapping[str, np.ndarray]] = {}
    failed: dict[int, Mapping[str, Mapping[str, str]]] = {}
    towers, left = _settled(model, made, run, seed)
    done = 0
    for job in made.jobs:
        part = run.part(job.index) if run is not None and job.index in run.finished else None
        if part is not None:
            parts[job.index], failed[job.index] = part.arrays, part.meta["failures"]
        else:
            arrays, failures = _measure(model, towers, job, seed)
            parts[job.index], failed[job.index] = arrays, failures
            if run is not None:
                told = {d.name: left[d.name] for d in job.detectors if d.name in left}
                about = {"failures": failures}
                run.put_part(job.index, arrays, about | ({"left_out": told} if told else {}))
        done += job.tokens
        if progress is not None:
            progress(done, made.tokens)
    scores = {
        d.name: _table(d, model, made, towers[d.name], left.get(d.name, {}), parts, failed)
        for d in {d.name: d for job in made.jobs for d in job.detectors}.values()
    }
    if run is not None and run.status != "complete":
        run.finish(list(scores.values()))
    return scores


def _settled(
    model: Model, made: Plan, run: Run | None, seed: int
) -> tuple[dict[str, tuple[str, ...]], dict[str, Mapping[str, str]]]:
    """Towers by detector, before the first batch is measured; and why others are left out."""
    towers: dict[str, tuple[str, ...]] = {}
    left: dict[str, Mapping[str, str]] = {}
    for job in made.jobs:
        if job.detectors[0].name in towers:  # told by an earlier batch
            continue
        if run is not None and job.index in run.finished:
            told = run.part(job.index).meta.get("left_out", {})
            for d in job.detectors:
                towers[d.name] = tuple(t for t in made.towers if t not in told.get(d.name, ()))
        else:
            found, told = applying(model, made.towers, job, seed)
            towers |= found
        left |= told
    return towers, left


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


def _table(
    detector: Detector,
    model: Model,
    made: Plan,
    towers: Sequence[str],
    left: Mapping[str, str],
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
    heads: list[HeadId] = [head for name in towers for head in model.tower(name).heads]
    about = provenance(model, made)
    if left:
        about["left_out"] = dict(left)
        first = prompts[0].id
        said = [f"tower {name} is left out: {why}" for name, why in left.items()]
        failures[first] = "; ".join([*filter(None, [failures.get(first)]), *said])
    return HeadScores(
        detector=detector.name,
        heads=tuple(heads),
        per_example=gather("score"),
        null_per_example=gather("null"),
        examples=tuple(p.id for p in prompts),
        failures=tuple(failures.items()),
        threshold=detector.limit,
        unit=detector.unit,
        range=detector.range,
        params=detector.params,
        provenance=about,
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
