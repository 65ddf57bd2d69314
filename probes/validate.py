"""How well each head tells classes apart on examples it was not fitted on, and what luck gives.

Cross-validation is grouped: examples of one group (a question, a prompt) are never on both sides.
It is nested: whatever a probe chooses, such as its penalty, it chooses within the training part.

    score     share of a group's examples classified rightly, averaged over groups
    null      the same with permuted labels, fitted and judged in the same way, mean of all draws
    p_perm    share of draws (and the real one) in which this head does at least as well
    q_perm    Benjamini-Hochberg value of p_perm over heads
    p_max     share of draws in which *any* head does at least as well as this one
    control   accuracy on a control task, if types are given; selectivity = score − control

The threshold of the table is the (1 − alpha) quantile of the best head's score under permuted
labels: among a thousand heads without any information the best one looks well above chance, and a
head is claimed only if it beats that and its q-value is at most alpha. Rows of the table are
groups, since examples of one group are no independent evidence. With few groups to a fold there are
few permutations, and then nothing is claimed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.scores import HeadScores
from interp.stats import bh_qvalues, mean_and_count
from probes.control import control_draws, permutations
from probes.features import Classes, HeadFeatures, chunks, read_groups, read_labels
from probes.probe import Probe, make_probe

Progress = Callable[[int, int], None]
"""Called after each chunk of heads with heads done and heads in all."""


def cross_validate(
    features: HeadFeatures,
    labels: Sequence[Any] | np.ndarray | Tensor,
    *,
    probe: str | Probe = "ridge",
    groups: Sequence[Any] | np.ndarray | Tensor | None = None,
    types: Sequence[Any] | np.ndarray | Tensor | None = None,
    folds: int = 5,
    draws: int = 99,
    control_tasks: int = 5,
    alpha: float = 0.05,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Held-out accuracy of a probe on every head.

    Args:
        features: z of all heads.
        labels: one per example.
        probe: name or probe.
        groups: examples that belong together; those of one prompt if None.
        types: type of each example, for control tasks; none are run if None.
        folds: parts of the cross-validation.
        draws: permutations of the labels; 0 runs none, and then nothing is tested.
        control_tasks: control tasks to average over.
        alpha: false discovery rate, and level of the maximum over heads.
        seed: seed of folds, permutations and control tasks.
        provenance: where the features come from.
        progress: called after each chunk of heads.

    Returns:
        Detector `probe.NAME`; extras as in the module's docstring.

    Raises:
        InputError: fewer than two classes, a class in a single group, fewer groups than folds,
            or too few draws for alpha.
        UnknownNameError: no such probe.
    """
    fitter = make_probe(probe) if isinstance(probe, str) else probe
    classes = read_labels(labels, len(features))
    names, codes = read_groups(features.owners if groups is None else groups, len(features))
    _check(fitter, classes, codes, len(names), folds, draws, alpha)
    fold_of = _folds(classes.index, codes, folds, seed)
    shuffles = permutations(classes.index, codes, fold_of, draws, seed=seed)
    columns = [classes.index[:, None], shuffles]
    if types is not None:
        columns.append(control_draws(types, classes, codes, control_tasks, seed=seed))
    labelling = np.concatenate(columns, axis=1)
    rights = _rights(fitter, features, labelling, codes, fold_of, len(classes.names), progress)
    real, shuffled = rights[:, :, 0], rights[:, :, 1 : draws + 1]
    if groups is None and all(features.ids) and len(set(features.ids)) == len(names):
        names = list(dict.fromkeys(features.ids))
    extras: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    threshold = -math.inf
    if draws:
        extras, threshold, about = _against_null(real, shuffled, alpha)
    if types is not None:
        extras["control"] = rights[:, :, draws + 1 :].mean(axis=2)
        extras["selectivity"] = real - extras["control"]
    return HeadScores(
        detector=f"probe.{fitter.name}",
        heads=features.heads,
        per_example=real,
        null_per_example=shuffled.mean(axis=2) if draws else None,
        examples=tuple(names),
        threshold=threshold,
        alpha=alpha,
        unit="share of held-out examples classified rightly",
        range=(0.0, 1.0),
        params={
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fitter.params.items()},
            "probe": fitter.name, "folds": folds, "draws": draws, "seed": seed,
            "classes": [str(c) for c in classes.names], "examples": len(features),
            "control_tasks": control_tasks if types is not None else 0, **about,
        },
        provenance=dict(provenance or {}),
        extras=extras,
    )  # fmt: skip


def _check(
    fitter: Probe,
    classes: Classes,
    codes: Int[np.ndarray, " example"],
    n_groups: int,
    folds: int,
    draws: int,
    alpha: float,
) -> None:
    if fitter.most_classes is not None and len(classes.names) > fitter.most_classes:
        raise InputError(
            f"probe {fitter.name!r} tells {fitter.most_classes} classes apart; got "
            f"{len(classes.names)}",
            hint="use the ridge probe, or one class against the rest",
        )
    if folds < 2:
        raise InputError(f"cross-validation needs at least 2 folds; got {folds}")
    if n_groups < folds:
        raise InputError(
            f"cross-validation in {folds} folds needs at least {folds} groups; got {n_groups}",
            hint="give more prompts, or fewer folds",
        )
    for i, name in enumerate(classes.names):
        if len(np.unique(codes[classes.index == i])) < 2:
            raise InputError(
                f"each class must come up in at least two groups; {name!r} is in one only",
                hint="a class that is held out as a whole cannot be learned",
            )
    if draws < 0 or 0 < draws < math.ceil(1 / alpha) - 1:
        raise InputError(
            f"a test at level {alpha:g} needs at least {math.ceil(1 / alpha) - 1} draws; got "
            f"{draws}",
            hint="draws=0 runs no test",
        )


def _folds(
    labels: Int[np.ndarray, " example"], codes: Int[np.ndarray, " example"], folds: int, seed: int
) -> Int[np.ndarray, " example"]:
    """A fold for each example: whole groups, balanced by their commonest label and by number.

    Without balance the training part has too many of the class that the held-out part has too few
    of, and a probe without information does worse than chance.
    """
    rng = np.random.default_rng([seed, 3])
    counts = np.zeros((codes.max() + 1, labels.max() + 1), dtype=np.int64)
    np.add.at(counts, (codes, labels), 1)
    order = rng.permutation(len(counts))
    order = order[np.argsort(counts.argmax(axis=1)[order], kind="stable")]
    fold = np.empty(len(counts), dtype=np.int64)
    fold[order] = rng.permutation(folds)[np.arange(len(counts)) % folds]
    return np.asarray(fold[codes])


def _rights(
    fitter: Probe,
    features: HeadFeatures,
    labelling: Int[np.ndarray, "example labelling"],
    codes: Int[np.ndarray, " example"],
    fold_of: Int[np.ndarray, " example"],
    n_classes: int,
    progress: Progress | None,
) -> Float[np.ndarray, "group head labelling"]:
    """Share of each group's examples that are classified rightly, held out."""
    device = features.x.device
    n, heads, d = features.x.shape
    labels = torch.from_numpy(labelling).to(device)
    groups = torch.from_numpy(codes).to(device)
    sizes = groups.bincount()
    out = np.empty((len(sizes), heads, labelling.shape[1]))
    parts = [torch.from_numpy(fold_of == f).to(device) for f in range(int(fold_of.max()) + 1)]
    for part in chunks(heads, 8 * n * d, device):
        x = features.x[:, part].transpose(0, 1).double()
        sums = x.new_zeros(len(sizes), x.shape[0], labels.shape[1])
        for held in parts:
            said = fitter.decide(
                x[:, ~held], labels[~held], groups[~held], x[:, held], n_classes=n_classes
            )
            right = (said == labels[held]).transpose(0, 1).double()
            sums.index_add_(0, groups[held], right)
        out[:, part] = (sums / sizes[:, None, None]).cpu().numpy()
        if progress is not None:
            progress(part.stop, heads)
    return out


def _against_null(
    real: Float[np.ndarray, "group head"],
    shuffled: Float[np.ndarray, "group head draw"],
    alpha: float,
) -> tuple[dict[str, np.ndarray], float, dict[str, Any]]:
    """Extras, threshold and parameters that follow from the permutations."""
    groups, heads, draws = shuffled.shape
    score = mean_and_count(real)[0]
    null = mean_and_count(shuffled.reshape(groups, -1))[0].reshape(heads, draws)
    best = null.max(axis=0)
    # Equal scores must count as reached although means are rounded.
    slack = 1e-12

    def share(reached: Bool[np.ndarray, "head draw"]) -> np.ndarray:
        return np.asarray((1 + reached.sum(axis=1)) / (draws + 1))

    p_perm = share(null >= score[:, None] - slack)
    extras = {
        "p_perm": p_perm,
        "q_perm": bh_qvalues(p_perm),
        "p_max": share(best[None] >= score[:, None] - slack),
    }
    # A head beats the maximum at level alpha if at most `allowed` draws reach it.
    allowed = math.floor(alpha * (draws + 1) + 1e-9) - 1
    limit = float(np.sort(best)[::-1][allowed]) + 2 * slack
    about = {
        "max_null_mean": float(best.mean()),
        "max_null_quantile": float(np.sort(best)[::-1][allowed]),
        "best_score": float(score.max()),
        "best_p_max": float(extras["p_max"].min()),
    }
    return extras, limit, about
