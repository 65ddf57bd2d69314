"""What detectors say of one batch of prompts, in one or several towers of a model.

Each tower is read in a forward pass of its own, which all reading detectors share: so the numbers
of a tower are the same, bit by bit, whichever others are read beside it.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from heads.detector import Detector, Outcome, ReadingDetector, WatchingDetector
from interp.engine import Answer, read
from interp.errors import InputError, SiteError
from interp.memory import fitting, halving
from interp.model import Model
from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.seam.structure import Tower

Arrays = dict[str, np.ndarray]
Failures = dict[str, dict[str, str]]
LeftOut = dict[str, dict[str, str]]
"""Detector to tower to the reason why the tower is not in its table."""


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


def applying(
    model: Model, towers: Sequence[str], job: Job, seed: int
) -> tuple[dict[str, tuple[str, ...]], LeftOut]:
    """To which of some towers each detector of a batch applies, as the batch's first prompt tells.

    A tower alone is not tried: what is wrong with it is said when it is read.

    Args:
        model: the model.
        towers: names of the towers asked for.
        job: the first batch of its detectors.
        seed: seed of the controls.

    Returns:
        Towers by detector, in the order asked for; and the reason why any other is left out.

    Raises:
        InputError: a detector applies to none of them.
        SiteError: the same, where the model lacks what it reads.
    """
    if len(towers) == 1:
        return {d.name: tuple(towers) for d in job.detectors}, {}
    found: dict[str, tuple[str, ...]] = {}
    left: LeftOut = {}
    for detector in job.detectors:
        tried = replace(job, detectors=(detector,), prompts=job.prompts[:1])
        reasons: dict[str, InputError | SiteError] = {}
        for tower in towers:
            try:
                _flattened(model, {detector.name: (tower,)}, tried, seed)
            except (InputError, SiteError) as error:
                reasons[tower] = error
        if len(reasons) == len(towers):
            raise next(iter(reasons.values()))
        found[detector.name] = tuple(t for t in towers if t not in reasons)
        if reasons:
            left[detector.name] = {t: str(error) for t, error in reasons.items()}
    return found, left


def measure(
    model: Model, towers: Mapping[str, Sequence[str]], job: Job, seed: int
) -> tuple[Arrays, Failures]:
    """Scores of one batch, whose memory is halved where it does not fit.

    Args:
        model: the model.
        towers: the towers to read, by detector; see `applying`.
        job: the batch.
        seed: seed of the controls.

    Returns:
        `DETECTOR/score`, `DETECTOR/null` and `DETECTOR/extra/NAME` [example, head], the heads of a
        detector's towers side by side; and why examples gave no score, by detector and id.

    Raises:
        InputError: prompts that a detector cannot read.
        TooLargeError: a single prompt does not fit into memory.
    """

    def work(prompts: Sequence[Prompt]) -> tuple[Arrays, Failures]:
        return _flattened(model, towers, replace(job, prompts=tuple(prompts)), seed)

    done = [made for _, made in halving(job.prompts, work, what="prompts")]
    arrays = {name: np.concatenate([a[name] for a, _ in done]) for name in done[0][0]}
    failures = {
        name: {i: why for _, f in done for i, why in f[name].items()} for name in done[0][1]
    }
    return arrays, failures


def _flattened(
    model: Model, towers: Mapping[str, Sequence[str]], job: Job, seed: int
) -> tuple[Arrays, Failures]:
    longest = max(map(len, job.prompts))
    found: dict[str, dict[str, Outcome]] = {}
    # Batches are halved before this is said, so that only a single prompt gets here.
    with fitting(
        f"{len(job.prompts)} prompts of up to {longest} tokens",
        "choose shorter prompts, or dtype bfloat16 (--dtype bfloat16)",
    ):
        for tower in dict.fromkeys(t for mine in towers.values() for t in mine):
            readers = tuple(d for d in job.detectors if tower in towers[d.name])
            mine = replace(job, detectors=readers)
            for name, outcome in _outcomes(model, model.tower(tower), mine, seed):
                found.setdefault(name, {})[tower] = outcome
    arrays: Arrays = {}
    failures: Failures = {}
    for name, by_tower in found.items():
        columns = [(model.tower(t), o) for t, o in by_tower.items()]
        arrays[f"{name}/score"] = _joined([(t, o.values) for t, o in columns])
        arrays[f"{name}/null"] = _joined([(t, o.null) for t, o in columns])
        extras = dict.fromkeys(extra for _, o in columns for extra in o.extras)
        for extra in extras:
            arrays[f"{name}/extra/{extra}"] = _joined(
                [(t, o.extras.get(extra, torch.full_like(o.values, math.nan))) for t, o in columns]
            )
        failures[name] = _reasons(job, by_tower)
    return arrays, failures


def _reasons(job: Job, by_tower: Mapping[str, Outcome]) -> dict[str, str]:
    """Why examples gave no score; where there are several towers, in which."""
    if len(by_tower) == 1:
        [only] = by_tower.values()
        return {job.prompts[i].id: why for i, why in only.failures.items()}
    said: dict[str, list[str]] = {}
    for tower, outcome in by_tower.items():
        for i, why in outcome.failures.items():
            said.setdefault(job.prompts[i].id, []).append(f"tower {tower}: {why}")
    return {i: "; ".join(whys) for i, whys in said.items()}


def _outcomes(model: Model, tower: "Tower", job: Job, seed: int) -> Iterator[tuple[str, Outcome]]:
    """What each detector says of a batch in one tower; all readings share one forward pass."""
    readers = [d for d in job.detectors if isinstance(d, ReadingDetector)]
    if readers:
        prompts = list(job.prompts)
        for detector in readers:
            _check_positions(detector, tower, prompts)
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


def _check_positions(detector: Detector, tower: "Tower", prompts: Sequence[Prompt]) -> None:
    """Refuse readings of tokens where positions are patches: their numbers would mean nothing."""
    seen = {name for p in prompts for name in p.views}
    if seen & {tower.name, f"{tower.name}/keys"} and not detector.needs:
        raise InputError(
            f"detector {detector.name!r} is about the tokens of a text; positions of tower "
            f"{tower.name!r} are patches",
            hint="choose the tower that reads the text, or a detector of vision towers",
        )


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


def _joined(columns: "Sequence[tuple[Tower, torch.Tensor]]") -> np.ndarray:
    """[example, head], the heads of one tower after those of another."""
    return np.concatenate([_flat(tower, values) for tower, values in columns], axis=1)
