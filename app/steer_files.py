"""`headscope steer bake` and `show`: recipe files folded into weights, and explained."""

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import actoptions as a
from app import options as o
from app.exits import UsageError, say
from app.loading import Source, waiting
from app.steering import for_any, load_recipe
from app.tables import Format, Part, Table, write
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.recipe import Recipe

File = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file, or a run of steer run.")
]


def bake(
    recipe: File,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new model.")],
    model: o.Model = o.DEFAULT_MODEL,
    format: o.Formatted = Format.auto,
    force: a.Force = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fold a recipe into the weights of a copy of the model, where that is exact.

    The folder can be loaded by transformers; edits that no weights can hold are refused by name.
    """
    made = for_any(load_recipe(recipe), force=force)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out must be a new or empty folder; {out} is not")
    source = Source(model, device, dtype, None, revision, offline, trust_remote_code)
    source.check()
    loaded = source.load(quiet=quiet)
    if made.fingerprint not in (None, loaded.fingerprint):
        with made.on(loaded):  # says whose it is
            pass
    with waiting("baking", quiet=quiet):
        try:
            baked = made.bake(loaded)
        except InputError as error:
            why = "its class has no such bias" if "no bias" in str(error) else error.hint
            raise InputError(str(error), hint=why) from error
        worst = _difference(loaded, baked, made)
        _save_whole(baked, out)
    rows = [{"model": source.name, "recipe": str(recipe), "folder": str(out), "difference": worst}]
    columns = ("model", "recipe", "folder", "difference")
    write(Table("headscope.steer.bake", columns, [Part("baked", rows)], limit=None), format)
    if not quiet:
        say(f"saved: {out}; its logits differ from those of the steered model by {worst:.2g}")


def _save_whole(model: Any, out: Path) -> None:
    """Save a model so that its folder is seen whole or not at all."""
    import shutil
    import tempfile

    from interp.files import disk_errors

    with disk_errors(out, "write"):
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            made.chmod(0o755)
            model.hf.save_pretrained(made)
            for part in (model.tokenizer, model.processor):
                if part is not None:
                    part.save_pretrained(made)
            made.replace(out)  # over an empty folder too
        except BaseException as error:
            shutil.rmtree(made, ignore_errors=True)
            # The library that writes weights has an error of its own for a full disk.
            if type(error).__name__ == "SafetensorError":
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _difference(model: Any, baked: Any, recipe: "Recipe") -> float:
    """Largest difference of the logits on neutral text, baked and steered."""
    from interp.tasks import make_task

    batch = model.batch(make_task("text").prompts(model, 2, seed=0))
    with recipe.on(model, spans=batch):
        steered = model.forward(batch.inputs()).logits
    return float((baked.forward(batch.inputs()).logits - steered).abs().max())


def show(
    recipe: File,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also say by which path, on this model.")
    ] = None,
    format: o.Formatted = Format.auto,
    force: a.Force = False,
    device: o.Device = "auto",
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Say what a recipe does."""
    made = load_recipe(recipe)
    paths: list[str] = []
    if model is not None:
        source = Source(model, device, "auto", None, revision, offline, trust_remote_code)
        loaded = source.load(quiet=quiet)
        with for_any(made, force=force).on(loaded):
            paths = _paths(made.explain(loaded).splitlines())
    rows = [
        {
            "edit": i, "op": e.op, "site": e.site,
            "heads": " ".join(map(str, e.where.heads or e.where.layers or ("all",))),
            "what": str(e), "formula": e.operation.formula,
            "path": paths[i] if paths else None,
        }
        for i, e in enumerate(made.edits)
    ]  # fmt: skip
    columns = ("edit", "op", "site", "heads", "what", "formula", "path")
    notes = "; ".join(
        f"{k}: {v}" for k, v in made.notes.items() if isinstance(v, str | int | float)
    )
    facts = {"recipe": str(recipe), "hash": made.hash, "fingerprint": made.fingerprint,
             "notes": dict(made.notes)}  # fmt: skip
    hidden = frozenset({"heads"} | (set() if paths else {"path"}))
    part = Part(f"{recipe.name}: made for {made.fingerprint or 'any model'}", rows, note=notes)
    drawn = write(Table("headscope.recipe", columns, [part], facts, hidden, limit=None), format)
    if notes and not (drawn or quiet):
        say(notes)


def _paths(lines: list[str]) -> list[str]:
    """The explanation of each edit: the lines that begin with its number, and those below."""
    out: list[str] = []
    for line in lines:
        if line.startswith(" "):
            out[-1] = "; ".join(filter(None, (out[-1], line.strip())))
        else:
            out.append("")
    return out
