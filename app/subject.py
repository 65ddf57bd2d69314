"""What a command works on: a task or own prompts, made for the model once it is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app import params
from app.catalog import check
from app.exits import UsageError
from app.given import NEVER, Given, made_pairs, made_prompts
from app.keep import digest
from interp.errors import ModelError, PromptFileError, UnknownNameError

if TYPE_CHECKING:
    from interp.metrics import Metric
    from interp.model import Model
    from interp.pairfile import PairLine
    from interp.promptfile import Line
    from interp.prompts import Prompt, PromptPair
    from interp.tasks import Task


ALL = "all"
"""Every tower of a model, where a command reads several."""


@dataclass(frozen=True)
class Subject:
    """A task or own prompts, checked as far as it can be without a model.

    Attributes:
        task: name of the task, or None.
        lines: own prompts, or None.
        params: parameters by task, detector or method.
        n: prompts of a task.
        batch_size: prompts at a time.
        seed: seed of the task.
        tower: tower to act on; the model's first if None.
        own: own pairs, or None.
    """

    task: str | None
    lines: "Sequence[Line] | None"
    params: params.Params
    n: int
    batch_size: int
    seed: int
    tower: str | None = None
    own: "Sequence[PairLine] | None" = None

    @property
    def name(self) -> str:
        """The task's name, or that these are own prompts or pairs."""
        return self.task or ("own prompts" if self.own is None else "own pairs")

    @property
    def paired(self) -> bool:
        """Whether there is a corrupted prompt to each."""
        return self.own is not None or (self.task is not None and is_pairs(self.task))

    @property
    def clean_lines(self) -> "Sequence[Line] | None":
        """Own prompts, the clean ones of own pairs; None for a task."""
        return self.lines if self.own is None else [pair.clean for pair in self.own]

    def make(self) -> "Task | None":
        """The task; None for own prompts.

        Raises:
            UsageError: a parameter's value does not fit.
        """
        return None if self.task is None else params.task_of(self.task, (), self.params)

    def prompts(self, model: "Model", *, seed: int = 0) -> "tuple[list[Prompt], str]":
        """The prompts, and the span of the tokens to predict.

        Args:
            model: the model they are for.
            seed: added to the task's seed.

        Raises:
            InputError: prompts that do not fit the model.
        """
        task = self.make()
        if task is not None:
            return task.prompts(model, self.n, seed=self.seed + seed), task.target
        return made_prompts(self.lines or (), model), "all"

    def pairs(self, model: "Model") -> "list[PromptPair]":
        """Own pairs, or those of a task of pairs; see `check_pairs`.

        Raises:
            InputError: pairs that do not fit the model.
        """
        from interp.tasks.pairs import PairTask

        if self.own is not None:
            return made_pairs(self.own, model)
        task = self.make()
        assert isinstance(task, PairTask)
        return task.pairs(model, self.n, seed=self.seed)

    def key(self, prompts: "Sequence[Prompt]") -> dict[str, Any]:
        """What answers depend on, for a run's key."""
        return {
            "task": self.name, "params": {k: dict(v) for k, v in self.params.items()},
            "n": self.n, "seed": self.seed, "batch_size": self.batch_size, "tower": self.tower,
            "prompts": digest(prompts),
        }  # fmt: skip


def subject(
    task: str | None,
    given: Given,
    *,
    param: Sequence[str] | None = None,
    method: str | None = None,
    kind: str = "method",
    detector: str | None = None,
    n: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    tower: str | None = None,
    pairs: str = NEVER,
) -> Subject:
    """Check what a command line names; prompts are read, no model is.

    Args:
        task: name of a task.
        given: own prompts.
        param: parameters as given.
        method: method they may belong to.
        kind: what that is, see `app.catalog`.
        detector: detector they may belong to.
        n: prompts of a task.
        batch_size: prompts at a time.
        seed: seed of the task.
        tower: tower to act on.
        pairs: whether own prompts are pairs: `NEVER`, `MAYBE` (as its first line says), `ALWAYS`.

    Raises:
        UsageError: a task and prompts, or a parameter of another form.
        UnknownNameError: no such task or parameter.
        PromptFileError: the prompts cannot be read.
    """
    if task is not None:
        check("task", task)
        if given.options:
            raise UsageError(f"{given.options[0]} and --task exclude each other; got both")
    mine: dict[str, dict[str, str]] = {}
    rest = []
    for text in param or ():
        if method is None or not text.startswith(f"{method}:"):
            rest.append(text)
            continue
        where, equals, value = text.partition("=")
        key = where.removeprefix(f"{method}:")
        known = check(kind, method).params
        if not equals:
            raise UsageError(f"--param must be NAME:KEY=VALUE; got {text!r}")
        if key not in known:
            raise UnknownNameError(f"parameter of {kind} {method!r}", key, known)
        mine.setdefault(method, {})[key] = value
    if rest and task is None and detector is None:
        raise UsageError(f"--param {rest[0]} belongs to no task or method of this command")
    read = params.read(rest, () if detector is None else (detector,), task) if rest else {}
    lines, own = given.read(pairs)
    return Subject(task, lines, {**read, **mine}, n, batch_size, seed, tower, own)


def check_pairs(asked: Subject) -> None:
    """Refuse a task without pairs, before a model is loaded.

    Raises:
        UsageError: the task makes no pairs, or a value of a parameter does not fit.
    """
    from interp.tasks import TASKS

    if not asked.paired:
        known = [name for name in TASKS if is_pairs(name)]
        raise UsageError(
            f"this needs a task of pairs, clean and corrupted; {asked.name} has none",
            hint=f"tasks of pairs: {', '.join(known)}; or --prompts FILE with pairs of your own",
        )
    asked.make()


def check_answers(lines: "Sequence[PairLine]", metric: "Metric") -> None:
    """Refuse pairs without the answers that a metric needs, before a model is loaded.

    Raises:
        PromptFileError: a pair has none.
    """
    for line in lines:
        needed = {
            "answer": metric.needs_answer and line.answer is None,
            "wrong": metric.needs_wrong and line.wrong is None,
        }
        lacking = next((name for name, absent in needed.items() if absent), "")
        if lacking:
            other = "" if lacking == "answer" else ", or choose --metric log-prob"
            raise PromptFileError(
                f'{line.place}: metric {metric.name!r} needs "{lacking}" in every pair; this '
                f"one has none",
                hint=f'write {{..., "{lacking}": " word"}}{other}',
            )


def check_tower(model: "Model", tower: str | None) -> None:
    """Refuse a tower that the model does not have.

    Raises:
        UnknownNameError: the model has no such tower.
        ModelError: there is attention in it that is not reached, perhaps that of this tower.
    """
    if tower is not None and tower not in model.towers:
        missed = model.structure.unreached
        if missed:
            kinds = ", ".join(sorted(set(missed.values())))
            raise ModelError(
                f"{model.name} has no tower {tower!r} whose attention is reached; it has "
                f"{', '.join(model.towers)}, and {len(missed)} modules that are not read: {kinds}",
                hint="headscope doctor names these modules",
            )
        raise UnknownNameError(f"tower of {model.name}", tower, model.towers)


def read_towers(text: str | None) -> tuple[str, ...]:
    """The towers that a command line names: `vision`, `text,vision` or `all`; none for the first.

    Raises:
        UsageError: a name is empty, or there twice.
    """
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise UsageError(f"--tower names each tower once, as in text,vision; got {text!r}")
    return names


def check_towers(model: "Model", names: Sequence[str]) -> tuple[str, ...] | None:
    """The towers of a model that are meant by what `read_towers` read; None for the first.

    Raises:
        UnknownNameError: the model has no such tower.
        ModelError: there is attention in it that is not reached, perhaps that of this tower.
    """
    if tuple(names) == (ALL,):
        return tuple(model.towers)
    for name in names:
        check_tower(model, name)
    return tuple(names) or None


def is_pairs(task: str) -> bool:
    """Whether a task makes pairs."""
    from interp.tasks import TASKS
    from interp.tasks.pairs import PairTask

    return issubclass(TASKS[task], PairTask)
