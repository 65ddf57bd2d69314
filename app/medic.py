"""`headscope doctor`: proof, on a model, that what is read from it is true."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import options as o
from app.exits import FAILED
from app.loading import Source, waiting
from app.tables import Format, Part, Table, write

if TYPE_CHECKING:
    from interp.doctor import Report

_COLUMNS = ("check", "result", "worst", "limit", "note")
_RESULT = {True: "ok", False: "FAIL", None: "does not apply"}


def doctor(
    model: o.Model = o.DEFAULT_MODEL,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also compare with TransformerLens; slow.")
    ] = False,
    format: o.Formatted = Format.auto,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attn: o.Attn = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    trust_remote_code: o.Trust = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Check that what is read from a model is true.

    The exit code is 1 if a check fails.
    """
    source = Source(model, device, dtype, attn, revision, offline, trust_remote_code)
    loaded = source.load(quiet=quiet)
    with waiting(f"examining {model}", quiet=quiet):
        report = loaded.doctor(oracle=oracle)
    write(_table(report), format)
    if not report.ok:
        raise typer.Exit(FAILED)


def _table(report: "Report") -> Table:
    rows: list[dict[str, Any]] = [
        {
            "check": check.name,
            "result": _RESULT[check.ok],
            "worst": check.worst,
            "limit": check.limit,
            "note": check.note or None,
        }
        for check in report.checks
    ]
    about = {
        "model": report.model,
        "ok": report.ok,
        "layers": {
            name: {"tower": tower, "layer": layer, "kernel": how}
            for name, (tower, layer, how) in report.layers.items()
        },
        "unreached": dict(report.unreached),
    }
    failed = frozenset(i for i, check in enumerate(report.checks) if check.ok is False)
    state = "all checks hold" if report.ok else "FAILED"
    notes = [f"not read: {name} ({cls})" for name, cls in report.unreached.items()]
    part = Part(f"doctor: {report.model}: {state}", rows, failed, "; ".join(notes))
    return Table("headscope.doctor", _COLUMNS, [part], about, limit=None)
