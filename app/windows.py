"""`headscope patch --window`: attention cut off in windows of layers; see `patching.windows`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.exits import UsageError, say
from app.keep import Answer, Keeping, kept, key_of
from app.steps import steps
from app.subject import Subject
from app.tables import Format, Part, Table, write

if TYPE_CHECKING:
    from app.counts import Counted
    from interp.headid import HeadId
    from interp.model import Model
    from interp.prompts import Prompt

_COLUMNS = ("keys", "queries", "window", "layer", "change", "ci_lo", "ci_hi", "n")


@dataclass(frozen=True)
class Cut:
    """What a command line cuts off.

    Attributes:
        window: layers of a window.
        queries: token group that may no longer look.
        keys: token groups that are hidden from it, one after another.
    """

    window: int
    queries: str
    keys: tuple[str, ...]


def asked_cut(
    window: int | None, queries: str | None, keys: Sequence[str] | None, others: Sequence[str]
) -> Cut | None:
    """What is cut off, if anything is.

    Args:
        window: as given.
        queries: as given; the last token if None.
        keys: as given; all others if there are none.
        others: options that mean nothing here and were given.

    Raises:
        UsageError: options that do not go together.
    """
    if window is None:
        if queries is not None or keys:
            name = "--queries" if queries is not None else "--keys"
            raise UsageError(
                f"{name} goes with --window, the number of layers in which attention is cut off",
                hint="--window 1; of each head alone: headscope attribute knockout",
            )
        return None
    if others:
        raise UsageError(f"{others[0]} means nothing with --window, which patches no activation")
    return Cut(window, queries or "last", tuple(dict.fromkeys(keys or ("others",))))


def prompts_of(asked: Subject, model: "Model") -> "list[Prompt]":
    """The prompts; of pairs, the clean ones."""
    if asked.paired:
        return [pair.clean for pair in asked.pairs(model)]
    return asked.prompts(model)[0]


def count_cut(asked: Subject, cut: Cut, model: "Model") -> "Counted":
    """A run as it is for each token group, and one for each layer."""
    from app.outlook import padded, row
    from app.subject import check_tower

    check_tower(model, asked.tower)
    prompts = prompts_of(asked, model)
    tower = model.tower(asked.tower or next(iter(model.towers)))
    runs = len(cut.keys) * (1 + len(tower.layers))
    work = padded(prompts, asked.batch_size, order="given").run(runs)
    return work, [row("windows", len(tower.layers)), row("runs of a prompt", runs * len(prompts))]


def cut_off(
    asked: Subject, cut: Cut, keeping: Keeping, model: "Model", ids: "list[HeadId] | None"
) -> Answer:
    """The change of a probability by layer, for each group of keys.

    Of the answer where every prompt has one, else of the token that the model itself predicts.
    """
    prompts = prompts_of(asked, model)
    target = "answer" if all(p.answer for p in prompts) else "predicted"
    key = key_of(
        model, "patch.window", window=cut.window, queries=cut.queries, keys=list(cut.keys),
        heads=None if ids is None else [str(h) for h in ids], **asked.key(prompts),
    )  # fmt: skip

    def compute() -> Answer:
        from patching.windows import window_knockout

        rows: list[dict[str, Any]] = []
        sure = 0.0
        with steps("windows", quiet=keeping.quiet) as report:
            for i, keys in enumerate(cut.keys):

                def told(done: int, total: int, i: int = i) -> None:
                    report(i * total + done, len(cut.keys) * total)

                found = window_knockout(
                    model, prompts, queries=cut.queries, keys=keys, window=cut.window,
                    target=target, heads=ids, batch_size=asked.batch_size,
                    tower=asked.tower or next(iter(model.towers)), progress=told,
                )  # fmt: skip
                rows += found.rows()
                sure = float(found.probability.mean())
        what = "the answer" if target == "answer" else "the predicted token"
        notes = [f"as it is, {what} has probability {sure:.4g}"]
        return Answer({}, {"rows": rows, "target": target, "probability": sure, "notes": notes})

    return kept(keeping, key, compute, task=asked.name, seed=asked.seed)


def write_cut(answer: Answer, model: str, *, format: Format, top: int | None, quiet: bool) -> None:
    """Write what `patch --window` found, by layer; with `top`, that which hurts most."""
    facts = answer.facts
    rows = list(facts["rows"])
    if top is not None:
        rows = sorted(rows, key=lambda row: row["change"])[:top]
    title = f"cut off in windows of layers: relative change of a probability, {model}"
    part = Part(title, rows, note="; ".join(facts["notes"]))
    folder = None if answer.folder is None else str(answer.folder)
    made = Table("headscope.patch.window", _COLUMNS, [part], {"run": folder, **facts}, limit=None)
    if not write(made, format) and not quiet:
        say(": ".join(filter(None, (title, part.note))))
