"""The server: Dash for pages and figures, Flask routes for data, one set of rules before both."""

import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from app.dashboard import data, shell
from app.dashboard.library import Library
from app.dashboard.page import Site, pages
from app.dashboard.security import Access, guard

if TYPE_CHECKING:
    from dash import Dash

    from app.dashboard.jobs import Jobs

ASSETS = Path(__file__).parents[1] / "assets"
# Dash's own names no language and puts its scripts into a footer, which is a landmark.
INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}</head>
<body>{%app_entry%}<div hidden>{%config%}{%scripts%}{%renderer%}</div></body>
</html>"""


def make_app(root: Path, access: Access, jobs: "Jobs | None" = None) -> "Dash":
    """The whole application, ready to be served.

    Args:
        root: folder of the runs; it may be empty or not exist.
        access: who may talk to it.
        jobs: what runs models; None for a server that only reads.
    """
    from dash import Dash

    site = Site(Library(root), jobs)
    app = Dash(
        "headscope",
        assets_folder=str(ASSETS),
        title="headscope",
        update_title="",
        serve_locally=True,
        compress=False,
        enable_mcp=False,
        suppress_callback_exceptions=False,
        # Callbacks listen to feeds, which are filled when their page is looked at.
        prevent_initial_callbacks=True,
        index_string=INDEX,
    )
    app.server.secret_key = secrets.token_bytes(16)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    hashes: list[str] = []
    guard(app.server, access, hashes)
    data.routes(app.server, site.library)
    shell.routes(app.server, site)
    app.layout = shell.layout(site)
    shell.wire(app, site)
    for page in pages():
        page.wire(app, site)
    hashes += app.csp_hashes()  # of all inline scripts: the last callback is registered
    return app
