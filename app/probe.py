"""`headscope probe`: how well the output of each head tells labelled prompts apart."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from app import actoptions as a
from app import options as o
from app.catalog import check
from app.effects import write_effects
from app.exits import UsageError, usage
from app.given import made_prompts
from app.keep import Answer, Keeping, digest, kept, key_of
from app.labelled import read_labelled
from app.loading import Source
from app.steps import steps
from app.subject import check_tower
from app.tables import Format

if TYPE_CHECKING:
    from probes.probe import Probe

Kind = Annotated[str, typer.Option("--probe", help="One of list probes.")]
Span = Annotated[
    str | None, typer.Option(help="Span whose mean is read; the last token if absent.")
]
Folds = Annotated[int, typer.Option(min=2, help="Parts of the cross-validation.")]
Draws = Annotated[
    int, typer.Option(min=0, help="Permutations of the labels, for the null; 0 tests nothing.")
]
_LEAST_DRAWS = 19
"""Permutations that a test at level 0.05 takes."""


def probe(
    context: typer.Context,
    prompts: a.Labelled,
    kind: Kind = "ridge",
    model: o.Model = o.DEFAULT_MODEL,
    span: Span = None,
    folds: Folds = 5,
    draws: Draws = 99,
    top: o.Top = None,
    out: a.Out = None,
    save: a.Save = True,
    format: o.Formatted = Format.auto,
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
    dry_run: a.DryRun = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Probe every head for a label, on prompts that the probe was not fitted on.

    Prompts are a JSONL file with a label a line, and a group where prompts belong together. A head
    is claimed if it beats what the best head reaches with permuted labels.
    """
    check("probe", kind)
    check_draws(draws)
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    source.check()
    data = read_labelled(prompts)
    fitter = probe_of(kind, param or ())

    if dry_run:
        from app.counts import count_probe
        from app.outlook import forecast

        forecast(
            source, lambda model: count_probe(made_prompts(data.lines, model), batch_size),
            "a probe", format=format, quiet=quiet, passes="with padding; without the fits",
        )  # fmt: skip
        return
    loaded = source.load(quiet=quiet)
    check_tower(loaded, tower)
    made = made_prompts(data.lines, loaded)
    key = key_of(
        loaded, "probe", probe=kind, settings=fitter.params, span=span, folds=folds, draws=draws,
        seed=seed, batch_size=batch_size, tower=tower, prompts=digest(made),
        labels=[str(x) for x in data.labels], groups=data.groups, task=prompts.stem,
    )  # fmt: skip

    def compute() -> Answer:
        from probes import collect_features, cross_validate

        with steps("heads", quiet=quiet) as report:
            found = collect_features(loaded, made, span=span, batch_size=batch_size, tower=tower)
            table = cross_validate(
                found, data.labels, probe=fitter, groups=data.groups, folds=folds, draws=draws,
                seed=seed, progress=report,
                provenance={"model": loaded.name, "fingerprint": loaded.fingerprint,
                            "dtype": str(loaded.dtype), "prompts": str(prompts)},
            )  # fmt: skip
        notes = []
        if draws:
            best = float(table.params["max_null_quantile"])
            notes.append(f"the best of {len(table.heads)} heads reaches {best:.3g} by luck")
        return Answer({table.detector: table}, {"notes": notes})

    keeping = Keeping(
        save, out, ["probe", kind], source.name,
        shlex.join(["headscope", *(context.obj or ())]), quiet, "probe",
    )  # fmt: skip
    answer = kept(keeping, key, compute, task=prompts.stem, seed=seed)
    write_effects(answer, schema="headscope.probe", format=format, top=top, quiet=quiet)


def check_draws(draws: int) -> None:
    """Refuse so few permutations that nothing could be claimed.

    Raises:
        UsageError: fewer than a test takes, and not none.
    """
    if 0 < draws < _LEAST_DRAWS:
        raise UsageError(f"--draws must be at least {_LEAST_DRAWS}, or 0 for no test; got {draws}")


def probe_of(kind: str, texts: "list[str] | tuple[()]") -> "Probe":
    """The probe with its settings, from texts such as `logistic:C=0.1`.

    Raises:
        UsageError: a text of another form, or a value that does not fit.
        UnknownNameError: no such setting.
    """
    from dataclasses import fields

    from interp.errors import InputError, UnknownNameError
    from interp.tasks import read_like
    from probes.probe import PROBES

    cls = PROBES[kind]
    known = {f.name: f for f in fields(cls)}
    values = {}
    for text in texts:
        where, equals, value = text.partition("=")
        owner, _, name = where.partition(":")
        if not equals or owner != kind:
            raise UsageError(f"--param must be {kind}:KEY=VALUE; got {text!r}")
        if name not in known:
            raise UnknownNameError(f"setting of probe {kind!r}", name, known)
        try:
            values[name] = read_like(known[name].default, value, f"{kind}:{name}")
        except InputError as error:
            raise usage(error) from error
    try:
        return cls(**values)
    except InputError as error:
        raise usage(error) from error
