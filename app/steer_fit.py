"""`headscope steer fit`: recipes fitted on labelled prompts, or made for prompts in hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app.catalog import check, entries
from app.exits import UsageError, say, usage
from app.given import ALWAYS, NEVER, Given, made_prompts
from app.headset import HeadSet, parse
from app.labelled import read_labelled, word
from app.loading import Source, waiting
from app.probe import Draws, Folds, Kind, Span, check_draws
from app.steering import examples_of
from app.subject import Subject, check_pairs, check_tower, subject
from app.tables import Format, Part, Table, write
from interp.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from interp.recipe import Recipe

LABELLED = ("iti", "mean-difference")
"""Ways to fit that need labelled prompts; the others are recipe makers."""
_OF_LABELLED = {
    "k": "--k", "strength": "--strength", "towards": "--towards", "kind": "--probe",
    "folds": "--folds", "draws": "--draws", "tower": "--tower",
}  # fmt: skip
_OF_MAKERS = {"task": "--task", "n": "--n", "param": "--param"}


def fit(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="mean-difference, or one of list makers."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe file to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            "-p",
            allow_dash=True,
            help="Own prompts, with labels for iti and mean-difference; - is stdin.",
        ),
    ] = None,
    model: o.Model = o.DEFAULT_MODEL,
    task: a.Task = None,
    heads: a.Heads = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Number of heads.")] = 10,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", "-s", help="In standard deviations for iti (15), else gaps (1)."
        ),
    ] = None,
    towards: Annotated[
        str | None, typer.Option(help="Label to move to; the last if absent.")
    ] = None,
    kind: Kind = "ridge",
    span: Span = None,
    folds: Folds = 5,
    draws: Draws = 99,
    format: o.Formatted = Format.auto,
    n: a.N = 4,
    batch_size: a.BatchSize = 8,
    seed: a.Seed = 0,
    tower: a.Tower = None,
    param: a.Param = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make a recipe file by a published method.

    iti and mean-difference move heads towards a label and are fitted on labelled prompts. Other
    makers look at prompts of --prompts or --task and take --param METHOD:KEY=VALUE; function-vector
    looks at pairs, clean prompts that show a task and corrupted ones that do not.
    """
    known = sorted({*entries("recipe maker"), *LABELLED})
    if method not in known:
        raise UnknownNameError("way to fit a recipe", method, known)
    _refuse(context, method)
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    chosen = parse(heads) if heads else None
    if method in LABELLED:
        check("probe", kind)
        check_draws(draws)
        if prompts is None:
            raise UsageError(f"{method} needs labelled prompts: --prompts FILE; got none")
        recipe, said = _fitted(
            method, source, prompts, chosen, towards, tower, quiet=quiet, strength=strength,
            common={"k": k, "probe": kind, "folds": folds, "draws": draws, "span": span,
                    "batch_size": batch_size, "seed": seed},
        )  # fmt: skip
    else:
        asked = _asked(method, task, prompts, param, n, batch_size, seed)
        given: dict[str, Any] = {"span": span, "batch_size": batch_size, "seed": seed}
        recipe, said = _made(method, source, asked, chosen, given, quiet=quiet)
    path = recipe.save(out)
    _write_heads(recipe, f"{method}: {source.name}", str(path), format)
    if not quiet:
        say(f"saved: {path}; {said}")


def _refuse(context: typer.Context, method: str) -> None:
    """Refuse options that do not go with a method.

    Raises:
        UsageError: one was given.
    """

    def given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    if method in LABELLED:
        wrong = [option for name, option in _OF_MAKERS.items() if given(name)]
        if wrong:
            raise UsageError(
                f"{wrong[0]} does not go with {method}",
                hint=f"it takes {', '.join(_OF_LABELLED.values())}",
            )
        if given("heads") and method == "iti":
            raise UsageError("iti chooses its heads by probing; --heads goes with mean-difference")
        return
    takes = check("recipe maker", method).params
    for name, option in {**_OF_LABELLED, "heads": "--heads", "span": "--span"}.items():
        if given(name) and (name in _OF_LABELLED or name not in takes):
            keys = ", ".join(takes)
            raise UsageError(
                f"{option} does not go with {method}", hint=f"--param {method}:KEY=VALUE; {keys}"
            )


def _fitted(
    method: str, source: Source, prompts: Path, chosen: HeadSet | None, towards: str | None,
    tower: str | None, *, quiet: bool, strength: float | None, common: Mapping[str, Any],
) -> "tuple[Recipe, str]":  # fmt: skip
    """A recipe that moves heads towards a label, and what it does in words."""
    source.check()
    data = read_labelled(prompts)
    target = data.towards(towards)
    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    from probes import fit_iti, fit_mean_difference

    made = made_prompts(data.lines, loaded)
    more: dict[str, Any] = {**common, "towards": target, "groups": data.groups, "tower": tower}
    with waiting(f"fitting {method}", quiet=quiet):
        if method == "iti":
            alpha = 15.0 if strength is None else strength
            recipe = fit_iti(loaded, made, data.labels, alpha=alpha, **more)
        else:
            recipe = fit_mean_difference(
                loaded, made, data.labels, strength=1.0 if strength is None else strength,
                heads=None if chosen is None else chosen.of(loaded, tower=tower), **more,
            )  # fmt: skip
    words = {str(label): word(label) for label in data.labels}
    to, away = (words.get(str(recipe.notes[x]), "?") for x in ("towards", "away"))
    return recipe, f"towards {to}, away from {away}"


def _asked(
    method: str, task: str | None, prompts: Path | None, param: Sequence[str] | None, n: int,
    batch_size: int, seed: int,
) -> Subject:  # fmt: skip
    from heads.makers import MAKERS

    taken = MAKERS[method].params
    pairs = ALWAYS if "corrupted" in taken else NEVER
    asked = subject(
        task, Given(prompts), param=param, method=method, kind="recipe maker", n=n,
        batch_size=batch_size, seed=seed, pairs=pairs,
    )  # fmt: skip
    if not MAKERS[method].looks:
        if task is not None or prompts is not None:
            raise UsageError(f"{method} looks at no prompts; got {asked.name}")
    elif task is None and prompts is None:
        what = "a task or file of pairs" if pairs == ALWAYS else "prompts that will be run"
        raise UsageError(f"{method} looks at {what}: --task or --prompts; got neither")
    elif pairs == ALWAYS:
        check_pairs(asked)
    return asked


def _made(
    method: str, source: Source, asked: Subject, chosen: HeadSet | None,
    given: Mapping[str, Any], *, quiet: bool,
) -> "tuple[Recipe, str]":  # fmt: skip
    """The recipe of a maker, and what it is for in words."""
    from heads.makers import MAKERS, make_recipe, read_params

    taken = MAKERS[method].params
    try:
        values = read_params(method, asked.params.get(method, {}))
    except InputError as error:
        raise usage(error) from error
    for name, value in given.items():
        if name in taken and value is not None:
            values.setdefault(name, value)
    asked.make()
    source.check()
    loaded = source.load(quiet=quiet)
    if chosen is not None:
        values["heads"] = tuple(chosen.of(loaded))
    with waiting(f"making {method}", quiet=quiet):
        if "corrupted" in taken:
            pairs = asked.pairs(loaded)
            prompts = [pair.clean for pair in pairs]
            values["corrupted"] = [pair.corrupted for pair in pairs]
        else:
            prompts = asked.prompts(loaded)[0] if MAKERS[method].looks else []
        recipe = make_recipe(method, loaded, prompts, values)
    bound = examples_of(recipe)
    if bound:
        return recipe, f"for these {bound} prompts, in this order and in one batch"
    return recipe, f"made on {len(prompts)} prompts" if prompts else "for any prompts"


def _write_heads(recipe: "Recipe", title: str, path: str, format: Format) -> None:
    inside = recipe.notes.get("heads")
    inside = inside if isinstance(inside, Mapping) else {}  # heads that a vector is made of
    scores = recipe.notes.get("scores", inside)
    claimed = set(recipe.notes.get("claimed", ()))
    rows: list[dict[str, Any]] = []
    for edit in recipe.edits:
        layers = [f"L{x}" for x in edit.where.layers or ()]
        every = "logits" if edit.site == "logits" else "all"
        named: Sequence[Any] = edit.where.heads or layers or [every]
        for i, head in enumerate(named):
            amount, examples = _amount(edit, i)
            keys = None if edit.where.keys.everywhere else str(edit.where.keys)
            rows.append({
                "head": str(head), "op": edit.op, "strength": amount, "keys": keys,
                "examples": examples,
            })  # fmt: skip
    rows += [{"head": head, "op": "in the vector"} for head in inside]
    for row in rows:
        known = row["head"] in scores
        row["score"] = scores.get(row["head"])
        row["claimed"] = (row["head"] in claimed) if known else None
    note = ""
    if "max_null" in recipe.notes:
        note = f"the best head reaches {float(recipe.notes['max_null']):.3g} by luck"
    columns = ("head", "op", "strength", "keys", "examples", "score", "claimed")
    hidden = frozenset(c for c in columns if all(row.get(c) is None for row in rows))
    facts = {"recipe": path, "hash": recipe.hash, "notes": dict(recipe.notes)}
    part = Part(title, rows, note=note)
    write(Table("headscope.steer.fit", columns, [part], facts, hidden, limit=None), format)


def _amount(edit: Any, i: int) -> tuple[float | None, int | None]:
    """The strength of the i-th head of an edit, and on how many examples, if not on all.

    Of strengths that differ between examples it is the mean over those where it acts.
    """
    amount = edit.strength
    if isinstance(amount, float | int | None):
        return amount, None
    mine = amount[i] if amount.dim() else amount
    if not mine.dim():
        return float(mine), None
    acting = mine[mine != edit.operation.neutral]
    return float(acting.mean()) if len(acting) else None, len(acting)
