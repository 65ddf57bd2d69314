"""Ablations for a verdict: effects beside matched controls, and the two stages of tests.

What the stages decide is said in `heads.verdicts`.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from heads.outcome import Performance, outcome
from heads.verdict_result import Effect
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.stats import bh_qvalues, paired_test

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe.recipe import Recipe

Heads = tuple[HeadId, ...]
Progress = Callable[[int, int], None]
"""Called after each run of the model over the prompts with runs done and runs known of; the latter
grows when causal heads are known and the others are looked at again."""


@dataclass(frozen=True)
class Asked:
    """Heads to ablate where others are ablated already."""

    heads: Heads
    given: Heads = ()


class Lab:
    """Ablations on one set of prompts; each set of heads is ablated once.

    Args:
        model: the model.
        data: prompts made by `with_targets`.
        scores: by which heads may be controls.
        op: `zero` or `uniform`.
        controls: different controls of each effect, where there are as many.
        seed: seed of their draws.
        size: prompts at a time.
        chosen: heads that are ablated and may not be controls.
        claimed: heads that the detector claims; no controls where there are enough others.
        progress: called after each run of the model over the prompts.
    """

    def __init__(
        self, model: "Model", data: list[Prompt], scores: HeadScores, op: str, controls: int,
        seed: int, size: int, chosen: Heads, claimed: Heads, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.op, self.size = model, data, op, size
        self.controls, self.seed, self.progress = controls, seed, progress
        sign = 1 if scores.direction == "higher" else -1
        suspect = ~(sign * scores.values < sign * scores.threshold)  # NaN is suspect
        if math.isinf(scores.threshold):
            suspect = scores.n == 0
        self.ablated = set(chosen)
        self.alike = {*claimed, *(h for h, s in zip(scores.heads, suspect, strict=True) if s)}
        self.drew_alike = False
        self._known: dict[frozenset[HeadId], Performance] = {}

    @property
    def base(self) -> Performance:
        """What the unablated model does."""
        return self._known[frozenset()]

    def effects(self, asked: Sequence[Asked]) -> list[Effect]:
        """The effects asked for, beside controls; q is not known yet."""
        draws = [self.draws(a.heads) for a in asked]
        wanted: dict[frozenset[HeadId], None] = {frozenset(): None}
        for a, sets in zip(asked, draws, strict=True):
            for heads in ((), a.heads, *sets):
                wanted[frozenset((*a.given, *heads))] = None
        fresh = [ablated for ablated in wanted if ablated not in self._known]
        total = len(self._known) + len(fresh)
        for ablated in fresh:
            self._known[ablated] = outcome(
                self.model, self.data, self._recipe(ablated), batch_size=self.size
            )
            if self.progress is not None:
                self.progress(len(self._known), total)
        return [self._effect(a, sets) for a, sets in zip(asked, draws, strict=True)]

    def _effect(self, asked: Asked, controls: Sequence[Heads]) -> Effect:
        before = self._known[frozenset(asked.given)]
        mine = self._known[frozenset((*asked.given, *asked.heads))]
        others = [self._known[frozenset((*asked.given, *c))] for c in controls]
        return Effect(
            heads=asked.heads,
            given=asked.given,
            per_example=mine.log_prob - before.log_prob,
            controls=tuple(controls),
            control_per_example=np.stack([o.log_prob - before.log_prob for o in others]),
            base_accuracy=float(before.correct.mean()),
            accuracy=float(mine.correct.mean()),
            control_accuracy=float(np.mean([o.correct.mean() for o in others])),
        )

    def _recipe(self, heads: Iterable[HeadId]) -> "Recipe | None":
        from interp.recipe.edit import Edit
        from interp.recipe.recipe import Recipe
        from interp.recipe.where import Where

        towers: dict[str, list[HeadId]] = {}
        for head in sorted(heads):
            towers.setdefault(head.tower, []).append(head)
        edits = tuple(Edit(self.op, Where(heads=tuple(mine))) for mine in towers.values())
        return Recipe(edits) if edits else None

    def draws(self, heads: Heads) -> list[Heads]:
        """Different sets of other heads, as many in each layer; from any layer if need be.

        Heads that look like the detector's are no controls, unless nearly all of them do.
        """
        found = self._drawn(heads, self.ablated | self.alike)
        if found is None:
            found = self._drawn(heads, self.ablated)
            self.drew_alike = True
        if found is None:
            raise InputError(
                f"a control needs {len(heads)} heads that are not ablated; too few are left beside "
                f"the {len(self.ablated)} that are",
                hint="ablate fewer heads: most=... or heads=[...]",
            )
        return found

    def _drawn(self, heads: Heads, taken: set[HeadId]) -> list[Heads] | None:
        free: dict[tuple[str, int], list[HeadId]] = {}
        for tower in {h.tower for h in heads}:
            for h in self.model.tower(tower).heads:
                if h not in taken:
                    free.setdefault((tower, h.layer), []).append(h)
        needed = Counter((h.tower, h.layer) for h in heads)
        pools = {place: free.get(place, []) for place in needed}
        if any(len(pools[place]) < count for place, count in needed.items()):
            needed = Counter((h.tower, -1) for h in heads)
            pools = {
                (t, -1): [h for (u, _), hs in free.items() if u == t for h in hs] for t, _ in needed
            }
        if any(len(pools[place]) < count for place, count in needed.items()):
            return None
        # One seed for all heads of a layer: they share their controls, which are run once.
        return _different(needed, pools, self.controls, random.Random(f"{self.seed}/{needed}"))


def _different(
    needed: Mapping[tuple[str, int], int], pools: Mapping[tuple[str, int], list[HeadId]], n: int,
    rng: random.Random,
) -> list[Heads]:  # fmt: skip
    """`n` different sets, or all there are."""
    places = sorted(needed)
    if math.prod(math.comb(len(pools[p]), needed[p]) for p in places) <= n:
        parts = [itertools.combinations(sorted(pools[p]), needed[p]) for p in places]
        return [tuple(itertools.chain(*chosen)) for chosen in itertools.product(*parts)]
    found: dict[Heads, None] = {}
    while len(found) < n:
        found[tuple(sorted(h for p in places for h in rng.sample(pools[p], needed[p])))] = None
    return list(found)


def stage_one(lab: Lab, chosen: Heads, joint: Heads) -> dict[Heads, Effect]:
    """Effects of each head and of all claimed ones together, tested."""
    sets = dict.fromkeys([*((h,) for h in chosen), *([joint] if joint else [])])
    # The largest first: too few controls are an error before anything is run.
    for heads in reversed(sets):
        lab.draws(heads)
    found = lab.effects([Asked(heads) for heads in sets])
    return {e.heads: e for e in _tested(found)}


def stage_two(
    lab: Lab, stage: Mapping[Heads, Effect], joint: Heads, least: float, fdr: float
) -> tuple[dict[HeadId, Effect], set[HeadId]]:
    """The effects that show heads to be redundant, and those of these heads shown singly."""
    causal = tuple(h for h in joint if stage[(h,)].hurts(least, fdr))
    rest = tuple(h for h in joint if h not in causal and not stage[(h,)].helps(least))
    contexts = [c for c in dict.fromkeys([(), causal]) if c or len(rest) > 1]
    if not rest or not contexts:
        return {}, set()
    groups = lab.effects([Asked(rest, c) for c in contexts])
    promising = [g for g in groups if replace(g, q=_p([g])[0]).hurts(least, fdr)]
    members = [
        Asked((h,), (*g.given, *(r for r in rest if r != h)))
        for g in promising if len(rest) > 1 for h in rest
    ]  # fmt: skip
    tested = _tested([*groups, *lab.effects(members)])
    hurting = [e for e in tested if e.hurts(least, fdr)]
    backed: dict[HeadId, Effect] = {}
    for e in sorted((e for e in hurting if len(e.heads) == 1), key=lambda e: e.mean):
        backed.setdefault(e.heads[0], e)
    single = set(backed)
    explained = {frozenset((*e.given, *e.heads)) for e in hurting if len(e.heads) == 1}
    for e in hurting:
        if len(e.heads) > 1 and frozenset((*e.given, *e.heads)) not in explained:
            backed |= {h: e for h in rest if h not in backed}
    return backed, single


def _p(effects: Sequence[Effect]) -> np.ndarray:
    """p-values; the test asks whether the first exceeds the second: controls are hurt less."""
    return paired_test(
        np.stack([e.control for e in effects], axis=1),
        np.stack([e.per_example for e in effects], axis=1),
    )


def _tested(effects: Sequence[Effect]) -> list[Effect]:
    """The effects with their q values."""
    if not effects:
        return []
    return [replace(e, q=float(q)) for e, q in zip(effects, bh_qvalues(_p(effects)), strict=True)]
