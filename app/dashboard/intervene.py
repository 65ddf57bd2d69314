"""What the form of the page Intervene means: an operation, and the command line that does it."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.dashboard.page import Feed, basket_of
from app.exits import UsageError
from interp.errors import HeadIdError
from interp.headid import DEFAULT_TOWER, HeadId

KEYS = (
    "op", "task", "n", "seed", "draws", "alpha", "alphas", "at", "over", "by", "tokens", "param",
)  # fmt: skip
"""Parts of the state that the form is made of, beside the run and its basket."""
SOURCE = {
    "--model": "--model", "-m": "--model", "--device": "--device", "--dtype": "--dtype",
    "--attn": "--attn", "--revision": "--revision",
}  # fmt: skip
"""Options that say which model a command loads, and how."""


@dataclass(frozen=True)
class Form:
    """What is asked for.

    Attributes:
        heads: heads of the basket.
        source: options that load the model of the run.
        task: name of a task.
        texts: own prompts, instead of a task.
        values: what else the controls hold, as texts; those left empty are missing.
    """

    heads: tuple[str, ...]
    source: tuple[str, ...]
    task: str
    texts: tuple[str, ...]
    values: Mapping[str, str]

    def option(self, name: str, key: str, default: str = "") -> list[str]:
        """An option with the value of a control, if there is any."""
        value = self.values.get(key) or default
        if not value:
            return []
        return [f"{name}={value}"] if value.startswith("-") else [name, value]


@dataclass(frozen=True)
class Operation:
    """One thing that can be done to the heads of the basket.

    Attributes:
        name: in the state.
        label: in the list.
        group: what its answer is.
        fields: controls that it has beside those of all.
        make: the command line, without what all have in common.
        about: what it does and what comes of it, in a line.
        pairs: whether it needs clean and corrupted prompts.
        tower: whether its command is told the tower.
        called: what a job of it is called, before the heads; its label if empty.
    """

    name: str
    label: str
    group: str
    fields: tuple[str, ...]
    make: Callable[[Form], list[str]]
    about: str
    pairs: bool = False
    tower: bool = False
    called: str = ""


EFFECT, DOSE, TEXT = "Effect on answers", "Dose and response", "Text side by side"
_BESIDE = "beside random heads of the same layers"


def _ablation(reference: str) -> Callable[[Form], list[str]]:
    def make(form: Form) -> list[str]:
        return ["ablate", "--joint", "--each", "--reference", reference]

    return make


def _sweep(op: str, strengths: str, *, keys: bool = False) -> Callable[[Form], list[str]]:
    def make(form: Form) -> list[str]:
        line = ["steer", "sweep", "--op", op, *form.option("--strengths", "alphas", strengths)]
        return line + form.option("--at", "at") + (form.option("--keys", "over") if keys else [])

    return make


def _text(op: str, strength: str = "", *, keys: bool = False) -> Callable[[Form], list[str]]:
    def make(form: Form) -> list[str]:
        line = ["steer", "run", "--op", op, *form.option("--tokens", "tokens")]
        line += form.option("--strength", "alpha", strength) if strength else []
        return line + form.option("--at", "at") + (form.option("--keys", "over") if keys else [])

    return make


def _verdict(form: Form) -> list[str]:
    return ["verdict", form.values.get("by") or "retrieval"]


OPERATIONS = {
    o.name: o
    for o in (
        Operation("zero", "zero", EFFECT, (), _ablation("zero"),
                  f"The heads write nothing: together, each alone, all but each, {_BESIDE}.",
                  tower=True, called="zero ablation of"),
        Operation("mean", "mean", EFFECT, (), _ablation("mean"),
                  "The heads write their mean over the corrupted prompts; needs a task of pairs.",
                  pairs=True, tower=True, called="mean ablation of"),
        Operation("resample", "resample", EFFECT, (), _ablation("resample"),
                  "The heads write what they write on another corrupted prompt; needs a task of "
                  "pairs.", pairs=True, tower=True, called="resample ablation of"),
        Operation("verdict", "verdict", EFFECT, ("by",), _verdict,
                  "Scores the heads with a detector and says of each whether it matters, "
                  f"{_BESIDE}.",
                  tower=True, called="verdict on"),
        Operation("dose-scale", "scale by α", DOSE, ("alphas", "at"),
                  _sweep("scale", "0,0.5,1,1.5,2"),
                  f"What the heads write, times α: 0 is ablation, 1 changes nothing; {_BESIDE}."),
        Operation("dose-temperature", "temperature τ", DOSE, ("alphas", "at"),
                  _sweep("temperature", "0.5,1,2,4"),
                  f"Attention scores divided by τ: 1 changes nothing, more is flatter; {_BESIDE}."),
        Operation("dose-reweight", "attention to keys × w", DOSE, ("alphas", "at", "over"),
                  _sweep("reweight", "0,0.5,1,2", keys=True),
                  "Attention to some keys times w, the rest of the row making up for it: 0:1 is "
                  f"the first token, where sinks are; {_BESIDE}."),
        Operation("text-zero", "zero", TEXT, ("tokens", "at"), _text("zero"),
                  "Continuations without and with the heads, and side effects on neutral text."),
        Operation("text-scale", "scale by α", TEXT, ("alpha", "tokens", "at"), _text("scale", "2"),
                  "Continuations with what the heads write times α, and side effects."),
        Operation("text-temperature", "temperature τ", TEXT, ("alpha", "tokens", "at"),
                  _text("temperature", "4"),
                  "Continuations with attention scores divided by τ, and side effects."),
        Operation("text-knockout", "knock attention out", TEXT, ("tokens", "at", "over"),
                  _text("knockout", keys=True),
                  "Continuations without the heads' attention to some keys, and side effects."),
        Operation("text-uniform", "uniform attention", TEXT, ("tokens", "at"), _text("uniform"),
                  "Continuations with the heads looking everywhere alike, and side effects."),
    )
}  # fmt: skip


def operation_of(feed: Feed) -> Operation:
    """The operation that a feed names; zero ablation if it names none that is known."""
    return OPERATIONS.get(feed.get("op", ""), OPERATIONS["zero"])


def source_of(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that load the model of a run as its own command did.

    >>> source_of({"command": "headscope rank sink -m zoo:needle --dtype=float32 --n 3"})
    ('--model', 'zoo:needle', '--dtype', 'float32')
    """
    try:
        words = shlex.split(str(info.get("command") or ""))
    except ValueError:
        words = []
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in SOURCE and (equals or i + 1 < len(words)):
            found[SOURCE[name]] = value if equals else words[i + 1]
    model = info.get("model") or info.get("key", {}).get("model")
    if model and "--model" not in found:
        found = {"--model": str(model), **found}
    return tuple(x for pair in found.items() for x in pair)


def task_of(info: Mapping[str, Any]) -> str:
    """The task that a run was made on; needle if it was made on own prompts."""
    from app.catalog import entries

    key = info.get("key", {})
    tasks = key.get("tasks") if isinstance(key.get("tasks"), list) else []
    named = [info.get("task"), key.get("task"), *(_name(t) for t in tasks)]
    return next((str(t) for t in named if t in entries("task")), "needle")


def _name(task: object) -> str:
    """The name of a task that a key holds in full, such as `RepeatedTokens(length=50)`."""
    text = str(task.get("task", "")) if isinstance(task, Mapping) else str(task)
    return re.sub(r"(?<!^)(?=[A-Z])", "-", text.partition("(")[0]).lower()


def detector_of(info: Mapping[str, Any]) -> str:
    """The detector that a run was made with; retrieval if with none."""
    from app.catalog import entries

    named = [info.get("first"), info.get("key", {}).get("detector"), *(info.get("scores") or {})]
    return next((str(d) for d in named if d in entries("detector")), "retrieval")


def heads_of(info: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads that an intervention was about, as far as its run names them."""
    named = info.get("key", {}).get("heads")
    if not named:
        rows = facts.get("rows") or ()
        named = [row.get("head") for row in rows if isinstance(row, Mapping)]
        named += " ".join(facts.get("recipe") or ()).replace(",", " ").split()
    return tuple(dict.fromkeys(str(h) for h in named if _is_head(str(h or ""))))


def _is_head(text: str) -> bool:
    try:
        return bool(HeadId.parse(text))
    except HeadIdError:
        return False


def form_of(feed: Feed, info: Mapping[str, Any], texts: str | None) -> Form:
    """What a feed and the text area ask for, on the model of a run."""
    return Form(
        basket_of(feed), source_of(info), feed.get("task") or task_of(info),
        tuple(line for line in (texts or "").splitlines() if line.strip()),
        {"by": detector_of(info), **{k: v for k, v in feed.items() if k in KEYS and v}},
    )  # fmt: skip


def line_of(form: Form, operation: Operation) -> list[str]:
    """The arguments after the program's name.

    Raises:
        UsageError: no heads, or a task without pairs where pairs are needed.
    """
    if not form.heads:
        raise UsageError(
            "the basket must hold heads to intervene on; it is empty",
            hint="open a head and press b, or choose rows of the ranking on the page Heads",
        )
    if operation.pairs:
        _check_pairs(form, operation)
    line = operation.make(form)
    line += [*form.source, "--heads", ",".join(form.heads)]
    line += [f"--prompt={t}" for t in form.texts] or ["--task", form.task]
    for name, key in (("--n", "n"), ("--seed", "seed"), ("--controls", "draws")):
        line += form.option(name, key)
    for param in () if form.texts else (form.values.get("param") or "").split():
        line += ["--param", param]
    towers = {HeadId.parse(h).tower for h in form.heads if _is_head(h)}
    if operation.tower and len(towers) == 1 and towers != {DEFAULT_TOWER}:
        line += ["--tower", *towers]
    return line


def _check_pairs(form: Form, operation: Operation) -> None:
    from app.subject import is_pairs
    from interp.tasks import TASKS

    if form.texts or form.task not in TASKS or not is_pairs(form.task):
        known = ", ".join(name for name in TASKS if is_pairs(name))
        what = "own prompts" if form.texts else form.task
        raise UsageError(
            f"{operation.label} ablation needs clean and corrupted prompts; {what} has none",
            hint=f"tasks of pairs: {known}; own pairs go through a terminal, --prompts FILE",
        )


def title_of(form: Form, operation: Operation) -> str:
    """What a job of this form is called."""
    shown: Sequence[str] = form.heads[:4]
    more = f" and {len(form.heads) - 4} more" if len(form.heads) > 4 else ""
    how = "" if operation.group == EFFECT else f": {operation.group.lower()}"
    what = operation.called or f"{operation.label},"
    return f"{what} {', '.join(shown)}{more}{how}"
