"""`headscope serve`: the dashboard on this machine."""

import secrets
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from app import options as o
from app.exits import UNAVAILABLE, UsageError, say


def serve(
    runs: Annotated[
        Path | None, typer.Argument(help="Folder of runs, or one run; runs/ if absent.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8050,
    host: Annotated[str, typer.Option(help="Other than loopback needs a token.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(help="What must be known to get in; 'new' makes one.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Run no model; torch is never imported.")
    ] = False,
    open: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Browse runs in a local web page, and run models from it.

    Everything the page shows is read from the runs in the folder; everything that runs a model is
    a command of this program, whose result is a run.
    """
    try:
        import dash_mantine_components  # noqa: F401 - the extra is there or it is not
        import waitress
    except ImportError as error:
        raise UsageError(
            f"the page needs {error.name}, which is not installed",
            hint="pip install headscope[app]",
        ) from None
    from app.dashboard.security import Access, is_loopback
    from app.dashboard.server import make_app
    from app.folders import base

    root = runs or base()
    name = None
    if (root / "run.json").is_file():
        root, name = root.resolve().parent, root.resolve().name
    elif runs is not None and not root.is_dir():
        raise UsageError(f"a folder of runs is needed; there is no folder {root}")
    if token == "new":
        token = secrets.token_urlsafe(16)
    if token is None and not is_loopback(host):
        raise UsageError(
            f"to be reached at {host} the page needs a token: it runs models for whoever gets in",
            hint="add --token new",
        )
    jobs = None
    if not read_only:
        from app.dashboard.jobs import Jobs

        jobs = Jobs(root)
    try:
        listener = waitress.create_server(
            _late, host=host, port=port, threads=8, ident=None, clear_untrusted_proxy_headers=True
        )
    except OSError as error:
        say(f"port {port} of {host} must be free: {error.strerror or error}", label="error",
            hint="--port 0 takes any free port")  # fmt: skip
        raise typer.Exit(UNAVAILABLE) from None
    found = int(listener.effective_port)
    app = make_app(root, Access(host, found, token), jobs)
    listener.application = app.server
    place = f"[{host}]" if ":" in host else host
    address = f"http://{place}:{found}/" + (f"r/{name}/heads" if name else "")
    address += f"?token={token}" if token else ""
    print(address, flush=True)
    if not quiet:
        say(f"runs in {root}; {'reads only' if read_only else 'runs models too'}; Ctrl-C ends it")
    if open:
        webbrowser.open(address)
    try:
        listener.run()
    finally:
        listener.close()
        if jobs is not None:
            jobs.close()


def _late(environ: object, start_response: object) -> list[bytes]:
    """Stands in until the application knows the port that it is served on."""
    raise RuntimeError("the application is not there yet")
