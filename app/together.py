"""Sets of heads taken away together, beside random other sets: `headscope ablate --joint`.

With `each`, three things more, on the same prompts: each head alone, beside the random heads that
stand for it in the random sets; and all heads but one, which says what that one adds to the others.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.keep import Answer, Keeping, kept, key_of
from app.pairwork import PairWork
from app.steps import steps

if TYPE_CHECKING:
    import numpy as np

    from interp.headid import HeadId
    from interp.model import Model
    from interp.prompts import Prompt
    from interp.scores import HeadScores

Heads = tuple["HeadId", ...]


@dataclass(frozen=True)
class Effects:
    """What taking sets of heads away does to examples.

    Attributes:
        changes: set to the change of each example.
        rights: set to the share of examples that are right; None where that is not measured.
        examples: names of the examples.
        unit: of the changes.
        base: mean of what changes, with every head in place.
        right: share of examples that are right with every head in place, or None.
    """

    changes: "Mapping[Heads, np.ndarray]"
    rights: "Mapping[Heads, float | None]"
    examples: tuple[str, ...]
    unit: str
    base: float
    right: float | None


def sets_of(heads: int, controls: int, each: bool) -> int:
    """How many sets of heads are run; at most, with `each`."""
    more = (0 if heads < 2 else heads) + (heads if heads > 2 else 0) if each else 0
    return 1 + controls + more + (heads * controls if more else 0)


def zeroed(heads: "Sequence[HeadId]") -> Any:
    """The recipe that takes heads away."""
    from interp.recipe import Edit, Recipe, Where

    return Recipe((Edit("zero", Where(heads=tuple(heads))),))


def together(
    work: PairWork, keeping: Keeping, model: "Model", ids: "Sequence[HeadId]", *, controls: int,
    each: bool,
) -> Answer:  # fmt: skip
    """Take heads away together, beside random others.

    Args:
        work: prompts or pairs, reference and metric.
        keeping: where the answer is kept.
        model: the model.
        ids: the heads.
        controls: draws of random heads.
        each: also each head alone, and all but each.
    """
    from heads.outcome import with_targets

    asked, ids = work.subject, tuple(ids)
    pairs = asked.pairs(model) if asked.paired else None
    prompts, target = ([], "all") if pairs is not None else asked.prompts(model)
    data = with_targets(prompts, target)
    seen = prompts if pairs is None else [pair.clean for pair in pairs]
    key = key_of(
        model, "ablate.joint", heads=[str(h) for h in ids], controls=controls,
        settings=dict(work.settings), metric=work.metric, **({"each": True} if each else {}),
        **asked.key(prompts or [p for pair in pairs or () for p in (pair.clean, pair.corrupted)]),
    )  # fmt: skip

    def compute() -> Answer:
        draws, note = drawn(model, ids, controls, asked.seed)
        sets = wanted(ids, draws, each)
        found = (
            _on_prompts(work, keeping, model, data, sets)
            if pairs is None
            else _on_pairs(work, keeping, model, pairs, sets)
        )
        facts = {
            "rows": rows_of(found, ids, draws, each), "unit": found.unit, "base": found.base,
            "base_accuracy": found.right, "notes": [note] if note else [],
        }  # fmt: skip
        table = _table(found, work, model, ids, draws) if each else None
        return Answer({} if table is None else {table.detector: table}, facts)

    from app.sights import BOXES, HEADS, Sights

    looks = Sights(model, lambda: seen, asked.clean_lines, asked.tower, BOXES, list(ids)[:HEADS])
    return kept(keeping, key, compute, looks, task=asked.name, seed=asked.seed)


def drawn(
    model: "Model", ids: "Sequence[HeadId]", controls: int, seed: int
) -> "tuple[list[dict[HeadId, HeadId]], str]":
    """Random other heads, each for one of those given, of its layer where there are enough.

    Returns:
        For each draw the head that stands for each, and a note if layers have too few.
    """
    from interp.errors import InputError
    from interp.recipe.control import draw_matched

    draws: list[dict[HeadId, HeadId]] = []
    note = ""
    for i in range(controls):
        rng = random.Random(f"{seed}/{i}")
        try:
            draws.append(draw_matched(model, ids, rng=rng))
        except InputError:
            free = [h for h in model.tower(ids[0].tower).heads if h not in set(ids)]
            if len(free) < len(ids):
                return [], f"no random matched sets: {len(free)} other heads are left"
            note = "some layers have too few other heads: random sets are drawn from all layers"
            draws.append(dict(zip(ids, rng.sample(free, len(ids)), strict=True)))
    return draws, note


def wanted(ids: "Heads", draws: "Sequence[Mapping[HeadId, HeadId]]", each: bool) -> "list[Heads]":
    """The sets to run: the heads, the draws, and with `each` what else there is, each set once."""
    sets: list[Heads] = [ids, *(tuple(draw.values()) for draw in draws)]
    if not each or len(ids) < 2:
        return sets
    more: list[Heads] = [(h,) for h in ids]
    more += [(draw[h],) for draw in draws for h in ids]
    more += [tuple(x for x in ids if x != h) for h in ids]
    known = {frozenset(s) for s in sets}
    for heads in more:
        if frozenset(heads) not in known:
            known.add(frozenset(heads))
            sets.append(heads)
    return sets


def _on_prompts(
    work: PairWork, keeping: Keeping, model: "Model", data: "Sequence[Prompt]",
    sets: "Sequence[Heads]",
) -> Effects:  # fmt: skip
    from heads.outcome import outcome

    size = work.subject.batch_size
    with steps("sets", quiet=keeping.quiet) as report:
        report(0, len(sets))
        bare = outcome(model, data, batch_size=size)
        changes, rights = {}, {}
        for i, heads in enumerate(sets):
            seen = outcome(model, data, zeroed(heads), batch_size=size)
            changes[heads] = seen.log_prob - bare.log_prob
            rights[heads] = float(seen.correct.mean())
            report(i + 1, len(sets))
    return Effects(
        changes, rights, tuple(p.id or f"example-{i}" for i, p in enumerate(data)),
        "change of log-probability (nats)", float(bare.log_prob.mean()),
        float(bare.correct.mean()),
    )  # fmt: skip


def _on_pairs(
    work: PairWork, keeping: Keeping, model: "Model", pairs: Any, sets: "Sequence[Heads]"
) -> Effects:
    from patching.prune import joint_effects

    asked = work.subject
    with steps("sets", quiet=keeping.quiet):
        found = joint_effects(
            model, pairs, sets, reference=work.settings["reference"], metric=work.metric,
            batch_size=asked.batch_size, tower=asked.tower or next(iter(model.towers)),
        )  # fmt: skip
    return Effects(
        {heads: found.per_example[:, i] for i, heads in enumerate(sets)}, dict.fromkeys(sets),
        tuple(found.examples), f"change of {found.metric}", float(found.clean.mean()), None,
    )  # fmt: skip


def rows_of(
    found: Effects, ids: "Heads", draws: "Sequence[Mapping[HeadId, HeadId]]", each: bool
) -> list[dict[str, Any]]:
    """A row for each set; `kind` says what it is, `of` which head it is about.

    Kinds: `chosen`, `random mean`, `random`; with `each` and several heads also `alone`, `alone
    random mean`, `alone random`, and `without`: all of them but one.
    """
    by = {frozenset(heads): heads for heads in found.changes}
    at = lambda heads: by[frozenset(heads)]  # noqa: E731
    rows = _beside(found, "", at(ids), [at(draw.values()) for draw in draws])
    if not each or len(ids) < 2:
        return rows
    for h in ids:
        rows += _beside(found, str(h), at([h]), [at([draw[h]]) for draw in draws])
    for h in ids:
        rest = at([x for x in ids if x != h])
        row = _row(found, f"without {h}", found.changes[rest], rest, found.rights[rest], None)
        rows.append(row | {"kind": "without", "of": str(h)})
    return rows


def _beside(
    found: Effects, of: str, heads: "Heads", others: "Sequence[Heads]"
) -> list[dict[str, Any]]:
    """A set, the mean of those that stand for it, and each of these."""
    import numpy as np

    from interp.stats import paired_test

    mine = found.changes[heads]
    control = np.mean([found.changes[o] for o in others], axis=0) if others else None
    # One-sided: random heads are hurt less, so that their change exceeds that of the chosen.
    p = None if control is None else float(paired_test(control[:, None], mine[:, None])[0])
    rows = [_row(found, "chosen", mine, heads, found.rights[heads], p) | {"kind": "chosen"}]
    if control is not None:
        known = [r for r in (found.rights[o] for o in others) if r is not None]
        right = float(np.mean(known)) if known else None
        mean = _row(found, "random, mean", control, (), right, None)
        rows.append(mean | {"kind": "random mean"})
    for i, other in enumerate(others, 1):
        one = _row(found, f"random {i}", found.changes[other], other, found.rights[other], None)
        rows.append(one | {"kind": "random"})
    if not of:
        return rows
    first = [rows[0] | {"set": of, "kind": "alone", "of": of}]
    return first + [
        r | {"set": f"{of}, {r['set']}", "kind": f"alone {r['kind']}", "of": of} for r in rows[1:]
    ]


def _row(
    found: Effects, name: str, values: "np.ndarray", heads: "Heads", right: float | None,
    p: float | None,
) -> dict[str, Any]:  # fmt: skip
    from interp.stats import bootstrap_interval

    lo, hi = bootstrap_interval(values[:, None])
    return {
        "set": name, "heads": " ".join(map(str, heads)), "effect": float(values.mean()),
        "ci_lo": float(lo[0]), "ci_hi": float(hi[0]), "n": len(values), "accuracy": right, "p": p,
    }  # fmt: skip


def _table(
    found: Effects, work: PairWork, model: "Model", ids: "Heads",
    draws: "Sequence[Mapping[HeadId, HeadId]]",
) -> "HeadScores":  # fmt: skip
    """The effects of the single heads beside the mean of those that stand for them."""
    import numpy as np

    from interp.scores import HeadScores

    by = {frozenset(heads): change for heads, change in found.changes.items()}
    null = [np.mean([by[frozenset([d[h]])] for d in draws], axis=0) for h in ids] if draws else None
    reference = work.settings["reference"]
    rights = {frozenset(heads): right for heads, right in found.rights.items()}
    right = [rights[frozenset([h])] for h in ids]
    n = len(found.examples)
    return HeadScores(
        detector=f"ablate.{reference}", heads=ids,
        per_example=np.stack([by[frozenset([h])] for h in ids], axis=1),
        null_per_example=None if null is None else np.stack(null, axis=1),
        examples=found.examples, unit=found.unit, direction="lower",
        params={"reference": reference, "n": n},
        provenance={
            "model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype),
            "task": work.subject.name, "seed": work.subject.seed,
        },
        extras={} if None in right else {"accuracy": np.array(right, float)},
    )  # fmt: skip
