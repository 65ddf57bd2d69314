"""Control tasks and permutations: labels that the features cannot mean.

A control task (Hewitt and Liang, 1909.03368) gives each type - a word, a template, an entity - one
random label, drawn from the distribution of the real labels and the same wherever the type comes
up. A probe can only learn it by heart, type by type; selectivity is the accuracy on the task minus
that on the control. It needs types that come up in several groups, since no probe can know the
label of a type that it never saw.

A permutation shuffles the labels themselves. It answers another question, whether there is any
relation at all, and is the null of the tests here. It respects groups: if every group has one
label, labels move between groups of the same fold; if labels differ within groups, they move within
them. Folds are balanced by label, so labels may not move between folds: given how many groups of
each class a fold holds, and if features say nothing, every arrangement within folds is as likely
as the real one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from interp.errors import InputError
from probes.features import Classes, read_groups


def control_labels(
    types: Sequence[Any] | np.ndarray | Tensor,
    labels: Int[np.ndarray, " example"],
    *,
    seed: int = 0,
) -> Int[np.ndarray, " example"]:
    """A random label for each type, drawn from the labels of the examples.

    Raises:
        InputError: there is not one type for each example.
    """
    _, codes = read_groups(types, len(labels))
    rng = np.random.default_rng([seed, 1])
    drawn = rng.choice(labels, size=codes.max(initial=-1) + 1)
    return np.asarray(drawn[codes])


def control_draws(
    types: Sequence[Any] | np.ndarray | Tensor,
    classes: Classes,
    groups: Int[np.ndarray, " example"],
    n: int,
    *,
    seed: int,
) -> Int[np.ndarray, "example draw"]:
    """Several control tasks, each with at least two classes.

    Raises:
        InputError: no type comes up in two groups, or there is but one type.
    """
    names, codes = read_groups(types, len(groups))
    seen: dict[int, set[int]] = {t: set() for t in range(len(names))}
    for t, g in zip(codes.tolist(), groups.tolist(), strict=True):
        seen[t].add(g)
    if len(names) < 2 or all(len(found) < 2 for found in seen.values()):
        raise InputError(
            f"a control task needs at least two types that come up in several groups; got "
            f"{len(names)} types, "
            f"{sum(len(found) > 1 for found in seen.values())} of them in several groups",
            hint="give types such as the template or the word, not the example",
        )
    draws: list[np.ndarray] = []
    at = 0
    while len(draws) < n:
        drawn = control_labels(types, classes.index, seed=seed + 7919 * at)
        at += 1
        # With few types a draw may give all of them one label, which is no task.
        if len(np.unique(drawn)) > 1:
            draws.append(drawn)
    return np.stack(draws, axis=1)


def permutations(
    labels: Int[np.ndarray, " example"],
    groups: Int[np.ndarray, " example"],
    folds: Int[np.ndarray, " example"],
    n: int,
    *,
    seed: int,
) -> Int[np.ndarray, "example draw"]:
    """Shuffled labels, between groups of one label in the same fold, or else within groups."""
    rng = np.random.default_rng([seed, 2])
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0])
    members = np.split(order, starts[1:])
    out = np.empty((len(labels), n), dtype=np.int64)
    if all((labels[m] == labels[m[0]]).all() for m in members):
        first = np.array([m[0] for m in members])
        for draw in range(n):
            own = labels[first]
            for fold in np.unique(folds):
                here = np.flatnonzero(folds[first] == fold)
                own[here] = rng.permutation(own[here])
            out[order, draw] = np.repeat(own, [len(m) for m in members])
        return out
    for draw in range(n):
        for m in members:
            out[m, draw] = rng.permutation(labels[m])
    return out
