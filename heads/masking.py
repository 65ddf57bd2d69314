"""The causal check of retrieval heads: mask them while the model answers, and see answers break.

Three arms decode the same prompts greedily:

    base       nothing masked
    masked     the k strongest heads masked
    controls   draws of k other heads, as many in each layer as `masked` has there; no control head
               has a score at or above the threshold, or no score at all

    effect     = accuracy(masked) − accuracy(base)
    difference = accuracy(masked) − mean accuracy(controls)            both in [−1, 1]

Negative means that masking hurts. Heads matter if the difference is negative beyond chance: p is
the paired one-sided test of `interp.stats` over examples, controls above masked, with the draws
of controls averaged. An answer is right if its tokens occur in a row in what was produced.

Masking is `uniform` (the head attends evenly to all it can see, as when its query is set to zero;
what the source did) or `zero` (it writes nothing): see `heads.head_mask`. The two need not agree,
for a uniform head still writes the mean of its context. It acts on the rows of the tokens fed while
decoding, the prompt's last among them, or on all rows.

Source: Wu et al. 2024, arXiv 2404.15574, section 4; code nightdessert/Retrieval_Head. There the
random control is meant to leave the retrieval heads out and, by a comparison that is never true,
does not; it is also not matched by layer. Here both hold, or the call is refused.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from heads.head_mask import HeadMask, check_names
from heads.masking_result import MaskedArm, MaskingResult
from interp.decode import generate
from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt
from interp.scores import HeadScores
from interp.tasks import Task, make_task

if TYPE_CHECKING:
    from interp.model import Model

__all__ = ["MaskedArm", "MaskingResult", "masking_experiment"]

Progress = Callable[[int, int], None]
"""Called after each batch of each arm with batches done and batches in all."""


def masking_experiment(
    model: "Model",
    scores: HeadScores,
    prompts: Sequence[Prompt] | None = None,
    *,
    task: Task | str = "needle",
    n: int = 20,
    k: int | None = None,
    controls: int = 5,
    op: str = "uniform",
    phase: str = "decoding",
    threshold: float | None = None,
    extra: int = 4,
    batch_size: int = 4,
    seed: int = 1,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> MaskingResult:
    """Decode with nothing, the strongest heads, and matched other heads masked.

    Args:
        model: the model in hand.
        scores: scores of its heads, usually of the retrieval detector.
        prompts: own prompts with answers; those of the task if None.
        task: the task that makes them.
        n: number of prompts of the task.
        k: heads to mask; all heads with a positive verdict if None.
        controls: draws of control heads.
        op: `uniform` or `zero`; see the module's docstring.
        phase: `decoding` masks the rows of tokens fed while decoding, `all` those of the prompt
            as well.
        threshold: score from which a head is no control; that of the scores if None.
        extra: tokens decoded beyond the length of the longest answer.
        batch_size: prompts at a time.
        seed: seed of the task and of the draws. Take another than that of the scores, so that
            heads are tested on prompts by which they were not chosen.
        use_cache: keep keys and values from step to step (the same answers either way).
        progress: called after each batch of each arm.

    Raises:
        InputError: no head to mask, a layer has too few heads for the controls, or prompts that
            lack an answer or do not fit the model.
        UnknownNameError: no such op or phase.
        HeadIdError: the scores are of another model.
        SiteError: the model's keys and values are not reached, so `uniform` is not defined.
    """
    check_names(op, phase)
    if controls < 1 or n < 1 or batch_size < 1 or extra < 0:
        raise InputError(
            "controls, n and batch_size must be at least 1 and extra at least 0; got "
            f"{controls}, {n}, {batch_size} and {extra}"
        )
    chosen = _chosen(scores, k)
    for head in chosen:
        model.layer_of(head)
    limit = scores.threshold if threshold is None else threshold
    drawn = _draws(scores, chosen, limit, controls, seed)
    made = make_task(task) if isinstance(task, str) else task
    listed = list(prompts) if prompts is not None else made.prompts(model, n, seed=seed)
    cut = _batches(model, listed, batch_size, extra)
    model.check()
    arms: dict[str, tuple[HeadId, ...]] = {"base": (), "masked": chosen}
    arms |= {f"control {i + 1}": heads for i, heads in enumerate(drawn)}
    known: dict[tuple[HeadId, ...], tuple[bool, ...]] = {}
    done, total = 0, len(cut) * len(set(arms.values()))
    for heads in arms.values():
        if heads in known:  # small models have few different draws
            continue
        correct: dict[int, bool] = {}
        for part in cut:
            batch = model.batch([listed[i] for i in part], side="left")
            mask = HeadMask(model, heads, op=op, phase=phase, prompt=batch.input_ids.shape[1])
            produced = generate(
                model, batch, max_new_tokens=_room(batch.prompts, extra), observer=mask,
                use_cache=use_cache,
            )  # fmt: skip
            correct |= {i: _right(listed[i], produced[b], extra) for b, i in enumerate(part)}
            done += 1
            if progress is not None:
                progress(done, total)
        known[heads] = tuple(correct[i] for i in range(len(listed)))
    found = [MaskedArm(name, heads, known[heads]) for name, heads in arms.items()]
    return MaskingResult(
        model=model.name,
        detector=scores.detector,
        op=op,
        phase=phase,
        threshold=limit,
        examples=tuple(p.id or f"prompt-{i}" for i, p in enumerate(listed)),
        base=found[0],
        masked=found[1],
        controls=tuple(found[2:]),
        params={
            "task": repr(made) if prompts is None else None,
            "k": len(chosen),
            "controls": controls,
            "extra": extra,
            "seed": seed,
        },
    )


def _chosen(scores: HeadScores, k: int | None) -> tuple[HeadId, ...]:
    """The heads to mask, in the order of the model."""
    heads = scores.select() if k is None else scores.top(k)
    if k is not None and (k < 1 or len(heads) < k):
        raise InputError(
            f"k must be between 1 and the {len(scores.top(len(scores.heads)))} heads with a score "
            f"of {scores.detector}; got {k}",
            hint=scores.message,
        )
    if not heads:
        raise InputError(
            f"no head has a positive verdict of {scores.detector}, so there is none to mask "
            f"({scores.message})",
            hint="give k to mask the strongest heads all the same",
        )
    return tuple(sorted(heads))


def _draws(
    scores: HeadScores, chosen: tuple[HeadId, ...], limit: float, n: int, seed: int
) -> list[tuple[HeadId, ...]]:
    """`n` sets of heads below the limit, as many in each layer as are masked there."""
    needed = Counter((head.tower, head.layer) for head in chosen)
    pools: dict[tuple[str, int], list[HeadId]] = {place: [] for place in needed}
    sign = 1 if scores.direction == "higher" else -1
    for head, value in zip(scores.heads, scores.values, strict=True):
        # A head without a score (NaN) may be anything: it compares as not below.
        below = bool(sign * value < sign * limit)
        if (head.tower, head.layer) in pools and below and head not in chosen:
            pools[head.tower, head.layer].append(head)
    for (tower, layer), count in sorted(needed.items()):
        have = pools[tower, layer]
        if len(have) < count:
            raise InputError(
                f"controls need {count} heads of layer {layer} ({tower}) that are below "
                f"{scores.detector} {limit:g}; it has {len(have)}",
                hint="mask fewer heads with k, or raise the threshold",
            )
    rng = random.Random(f"controls/{seed}")
    return [
        tuple(
            sorted(h for place in sorted(needed) for h in rng.sample(pools[place], needed[place]))
        )
        for _ in range(n)
    ]


def _batches(
    model: "Model", prompts: Sequence[Prompt], batch_size: int, extra: int
) -> list[list[int]]:
    """Indices of prompts of similar length, after a look whether all of them can be answered."""
    if not prompts:
        raise InputError("at least one prompt is needed; got none")
    for i, prompt in enumerate(prompts):
        if not prompt.answer:
            raise InputError(
                f"masking is judged by answers; prompt {prompt.id or i} has none",
                hint="give prompts with an answer, or name a task whose prompts have one",
            )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    cut = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    for part in cut:
        members = [prompts[i] for i in part]
        width = model.batch(members).input_ids.shape[1]
        room = _room(members, extra)
        if model.context is not None and width + room > model.context:
            raise InputError(
                f"prompt and answer must fit the {model.context} positions of {model.name}; got "
                f"{width} + {room}"
            )
    return cut


def _room(prompts: Sequence[Prompt], extra: int) -> int:
    """Tokens to decode for the longest answer."""
    return max(len(p.answer or ()) for p in prompts) + extra


def _right(prompt: Prompt, produced: tuple[int, ...], extra: int) -> bool:
    """Whether the answer stands in what was produced, in the room that this prompt has alone."""
    answer = prompt.answer or ()
    produced = produced[: len(answer) + extra]
    return any(
        produced[i : i + len(answer)] == answer for i in range(len(produced) - len(answer) + 1)
    )
