"""The command `headscope`: every command, and the page that runs the others."""

import sys

from app.commands import app, main
from app.serve import serve

__all__ = ["app", "main"]

app.command("serve")(serve)

if __name__ == "__main__":
    sys.exit(main())
