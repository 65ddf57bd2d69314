"""What the commands that act on heads would ask of a model, for `--dry-run`.

Each function counts for a model, whose weights are not looked at, and gives the work and further
rows; see `app.outlook`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from app.estimate import work_of
from app.outlook import Row, Work, padded, row

if TYPE_CHECKING:
    from app.headset import HeadSet
    from app.subject import Subject
    from heads.detector import Detector
    from interp.model import Model
    from interp.prompts import Prompt
    from interp.tasks import Task
    from patching.method import Method

Counted = tuple[Work, Sequence[Row]]
AT_MOST = "at most: blocks before a head are not run again"


def _verified(method: "Method", heads: int) -> int:
    """Runs that measure the best heads and some others, beside the two as they are."""
    n = int(getattr(method, "verify", 0))
    return 2 + min(2 * n, heads) if n else 0


def _steps(method: "Method") -> int:
    return int(getattr(method, "steps", 1))


def _each(method: "Method", heads: int) -> tuple[int, int]:
    return 2 + heads, 0


COSTS: Mapping[str, Callable[["Method", int], tuple[int, int]]] = {
    "ablate": _each,
    "atp": lambda m, heads: (3 + _verified(m, heads), 1),
    "atp-ig": lambda m, heads: (4 + _steps(m) + _verified(m, heads), _steps(m)),
    "attribution": lambda m, heads: (2, 0),
    "copying": lambda m, heads: (0, 0),
    "direct": lambda m, heads: (2 + heads * (getattr(m, "mlps", "") == "live"), 0),
    "eap": lambda m, heads: (5 + _verified(m, heads), 1),
    "eap-ig": lambda m, heads: (6 + _steps(m) + _verified(m, heads), _steps(m)),
    "importance": lambda m, heads: (1, 1),
    "knockout": _each,
    "patch": _each,
    "path": _each,
}
"""Method to the runs of each pair, the clean and the corrupted one among them, and to how many of
these take a gradient; at most."""


def count_method(
    asked: "Subject", method: "Method", chosen: "HeadSet | None", model: "Model"
) -> Counted:
    """A method of patching on pairs; each head is a run of its own."""
    pairs = asked.pairs(model)
    kv = getattr(method, "site", "") in ("k", "v")
    heads = len(_ids(asked, chosen, model, kv=kv))
    runs, backward = COSTS[method.name](method, heads)
    once = padded([p.clean for p in pairs], asked.batch_size, order="equal")
    return _of_pairs(once.run(runs, backward=backward), once), [
        row("heads", heads), row("runs of a prompt", runs * len(pairs), "", "at most"),
    ]  # fmt: skip


def _of_pairs(work: Work, once: Work) -> Work:
    from patching.engine import TOKENS

    # Patched runs are made several at a time, as many as make so many tokens.
    widest = max(once.widest, min(TOKENS, work.passed))
    return replace(work, prompts=2 * once.prompts, tokens=2 * once.tokens, widest=widest)


def count_ablation(
    asked: "Subject", chosen: "HeadSet | None", sets: int | None, model: "Model"
) -> Counted:
    """Heads taken away one by one, or sets of them together.

    Args:
        asked: the prompts.
        chosen: the heads; all if None.
        sets: sets of heads that are ablated; each head by itself if None.
        model: the model.
    """
    heads = len(_ids(asked, chosen, model))
    changes = heads if sets is None else sets
    more = [row("heads", heads), *([] if sets is None else [row("sets of heads", sets)])]
    if asked.paired:
        pairs = asked.pairs(model)
        once = padded([p.clean for p in pairs], asked.batch_size, order="equal")
        work = _of_pairs(once.run(2 + changes), once)
        return work, [*more, row("runs of a prompt", (2 + changes) * len(pairs), "", "at most")]
    once = _fed(*asked.prompts(model), asked.batch_size)
    runs = row("runs of a prompt", (1 + changes) * once.prompts)
    return once.run(1 + changes), [*more, runs]


def _ids(
    asked: "Subject", chosen: "HeadSet | None", model: "Model", *, kv: bool = False
) -> Sequence[Any]:
    from app.headset import parse
    from app.subject import check_tower

    check_tower(model, asked.tower)
    return (chosen or parse(["all"])).of(model, tower=asked.tower, kv=kv)


def _fed(prompts: "Sequence[Prompt]", target: str, batch_size: int) -> Work:
    """Prompts run once with their answers, counted without these."""
    from heads.outcome import with_targets

    once = padded(with_targets(prompts, target), batch_size)
    lengths = [len(p) for p in prompts]
    return replace(once, tokens=sum(lengths), longest=max(lengths))


def count_verdict(
    asked: "Subject", judge: "Detector", own: "Task | None", chosen: "HeadSet | None",
    scored: bool, most: int, controls: int, model: "Model",
) -> Counted:  # fmt: skip
    """A verdict: scoring, and ablations beside controls.

    Args:
        asked: the prompts.
        judge: the detector.
        own: the task; the detector's own if None, unless there are prompts.
        chosen: the heads; those that will be claimed if None.
        scored: whether scores were made earlier.
        most: claimed heads that are ablated.
        controls: draws of random heads.
        model: the model.
    """
    from heads.scoring import batches
    from interp.tasks import make_task

    prompts = asked.prompts(model)[0] if asked.lines is not None else None
    task = (
        own if own is not None or prompts is not None else make_task(judge.task, judge.task_params)
    )
    every = _ids(asked, None, model)
    heads = min(most, len(every)) if chosen is None else len(_ids(asked, chosen, model))
    scoring = Work()
    if not scored:
        scoring = work_of(batches(
            model, [judge], prompts, task=task, n=asked.n, batch_size=asked.batch_size,
            seed=asked.seed,
        )[0], len(every))  # fmt: skip
    if task is not None:
        once = _fed(
            task.prompts(model, asked.n, seed=asked.seed + 1), task.target, asked.batch_size
        )
    else:
        once = _fed(prompts or (), "all", asked.batch_size)
    # As it is; each head and all of them, each beside its controls; then, of those that do not
    # matter alone, the group in two models and each member put back in either.
    first = 1 + (heads + (heads > 1)) * (1 + controls)
    further = 2 * (2 + controls) + 2 * heads * (1 + controls)
    work = replace(scoring, prompts=0, tokens=0) + once.run(first)
    return work, [
        row("heads", heads, "", "at most" if chosen is None else "counted"),
        row("tokens to score", scoring.passed),
        row("sets of heads", first, "", "at most; what follows counts these"),
        row("further sets", further, "", "at most, where claimed heads back each other up"),
        row("runs of a prompt", first * once.prompts, "", "at most"),
    ]


def count_probe(prompts: "Sequence[Prompt]", batch_size: int) -> Counted:
    """Prompts read once; the fits are not counted."""
    return padded(prompts, batch_size, order="given"), []


def count_steering(
    data: "Sequence[Prompt]", text: "Sequence[Prompt]", *, batch_size: int, tokens: int,
    controls: int, strengths: int,
) -> Counted:  # fmt: skip
    """Prompts continued with and without a recipe, and its side effects.

    Args:
        data: the prompts.
        text: neutral text, with what follows as answers.
        batch_size: prompts at a time.
        tokens: tokens to produce; none if 0.
        controls: the recipe on random heads.
        strengths: number of strengths at which side effects are measured.
    """
    answered = data if all(p.answer for p in data) else ()
    work = Work()
    if tokens:
        work = padded(data, batch_size, order="given").run(2)
        fed = 2 * len(data) * (tokens - 1)
        steps = 2 * -(-len(data) // batch_size) * (tokens - 1)
        work = replace(work, passed=work.passed + fed, steps=steps)
    runs = strengths * (2 + controls)
    for texts in filter(None, (answered, text)):
        # The first part of a text as the prompt, the rest fed after it.
        whole = [replace(p, tokens=(*p.tokens, *(p.answer or ())[:-1])) for p in texts]
        work += padded(whole, batch_size, order="equal").run(runs)
    both = [*data, *text]
    longest = max(len(p) for p in both)
    work = replace(work, prompts=len(data), tokens=sum(map(len, data)), longest=longest)
    return work, [
        row("neutral texts", len(text)),
        row("runs of a prompt", 2 * len(data) * bool(tokens) + runs * len((*answered, *text))),
    ]
