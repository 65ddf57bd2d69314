"""What `headscope steer run` and `sweep` write; nothing heavy is imported, so that `show` can."""

from typing import Any

from app.exits import say
from app.keep import Answer
from app.tables import Format, Part, Table, write

_TEXTS = ("id", "prompt", "without", "with", "same", "answer")
_EFFECTS = (
    "measure", "without", "with", "change", "control_change", "n", "ci_lo", "ci_hi",
)  # fmt: skip


def write_steered(
    answer: Answer, model: str, *, format: Format, top: int | None, quiet: bool,
    drawn: bool = False,
) -> None:  # fmt: skip
    """Write continuations with and without a recipe, and its side effects.

    Args:
        answer: what was found.
        model: name of the model.
        format: of the output.
        top: most continuations; all if None.
        quiet: say nothing on stderr.
        drawn: the continuations have been shown already.
    """
    facts = answer.facts
    folder = None if answer.folder is None else str(answer.folder)
    title = f"steered: {'; '.join(facts['recipe'])}; {model}"
    rows = list(facts["rows"])[:top]
    changed = frozenset(i for i, row in enumerate(rows) if not row["same"])
    hidden = frozenset({"answer"} if all(r["answer"] is None for r in rows) else ())
    table = Table("headscope.steer", _TEXTS, [Part(title, rows, changed)],
                  {"run": folder, "model": model, **facts}, hidden, limit=None)  # fmt: skip
    shown = drawn or write(table, format)
    side = Part("side effects", list(facts["side_effects"]), note="; ".join(facts["notes"]))
    if shown:
        write(Table("headscope.steer.effects", _EFFECTS, [side], limit=None), Format.table)
    elif not quiet:
        _say_effects(title, facts)


def _say_effects(title: str, facts: Any) -> None:
    """The side effects as lines on stderr, for those who read data in a pipe."""
    say(title)
    for row in facts["side_effects"]:
        control = row["control_change"]
        against = "" if control is None else f"; random heads {control:+.3g}"
        say(f"{row['measure']}: {row['without']:.4g} -> {row['with']:.4g} "
            f"({row['change']:+.3g}{against}, n = {row['n']})")  # fmt: skip
    for note in facts["notes"]:
        say(note)


def write_sweep(
    answer: Answer, model: str, *, format: Format, top: int | None, quiet: bool
) -> None:
    """Write what a recipe does at several strengths, a table for each measure."""
    title = f"{answer.facts['name']} at several strengths: {model}"
    folder = None if answer.folder is None else str(answer.folder)
    names = list(dict.fromkeys(row["measure"] for row in answer.facts["rows"]))
    parts = [
        Part(f"{title}: {name}", [r for r in answer.facts["rows"] if r["measure"] == name][:top])
        for name in names
    ]
    made = Table(
        "headscope.steer.sweep", ("strength", *_EFFECTS), parts, {"run": folder, **answer.facts},
        frozenset({"measure"}), limit=None,
    )  # fmt: skip
    write(made, format)
    if not quiet:
        for note in answer.facts["notes"]:
            say(note)
