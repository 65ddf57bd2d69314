"""Draw every page of the dashboard in both themes into `docs/screenshots/`.

    python docs/screenshots.py            all pages
    python docs/screenshots.py heads      those whose name begins so

Makes its runs with the commands that a user would type, serves them, and looks at each page with
the system's Chromium. Nothing is written by hand afterwards: what the docs show is what there is.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "docs" / "screenshots"
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
COMMANDS = {
    "needle": "rank retrieval induction sink previous-token --model zoo:needle --task needle "
              "--n 20 --traces 3",
    "needle-again": "rank retrieval induction --model zoo:needle --task needle --n 20 --seed 7",
    "ablate": "ablate --model zoo:needle --task needle --n 12",
    "verdict": "verdict retrieval --model zoo:needle --n 12",
    "patch": "patch --model zoo:planted-ioi --task ioi --n 8 --positions",
    "shapes": "rank visual-attention region-grounding --model zoo:shapes-vlm --n 12 --traces 4",
}  # fmt: skip
PAGES = {
    "runs": "/",
    "heads": "/r/needle/heads?basket=L1H0,L1H2&x=induction&y=retrieval",
    "head": "/r/needle/head/1/0?lock=r244",
    "head-zoomed": "/r/needle/head/1/2?q=200:245&k=0:45",
    "prompt": "/r/needle/prompt",
    "vision": "/r/shapes/vision",
    "intervene": "/r/verdict/intervene?basket=L1H0",
    "patching": "/r/patch/patch",
    "compare": "/compare?run=needle&other=needle-again",
    "jobs": "/jobs",
    "help": "/help",
}


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a server of a folder of runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", str(root), "--port", "0", "-q"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environment(root),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip().rstrip("/")
    finally:
        process.terminate()
        process.wait()


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "HEADSCOPE_RUNS": str(root)}  # fmt: skip


def main() -> None:
    """Make the runs, serve them, look."""
    from playwright.sync_api import sync_playwright

    wanted = sys.argv[1:]
    pages = {n: p for n, p in PAGES.items() if not wanted or n.startswith(tuple(wanted))}
    PLACE.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as play:
        root = Path(place) / "runs"
        for name, line in COMMANDS.items():
            command = [sys.executable, "-m", "app.cli", *line.split(), "--out", str(root / name)]
            subprocess.run(
                [*command, "-q"], check=True, cwd=ROOT, env=_environment(root),
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        browser = play.chromium.launch(executable_path=chromium, args=list(FLAGS))
        with served(root) as address:
            for theme in ("light", "dark"):
                page = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
                for name, path in pages.items():
                    mark = "&" if "?" in path else "?"
                    page.goto(f"{address}{path}{mark}theme={theme}")
                    page.wait_for_load_state("networkidle")
                    page.wait_for_timeout(3000)
                    save(page.screenshot(full_page=True), PLACE / f"{name}-{theme}.png")
                    sys.stderr.write(f"{name} {theme}\n")


def save(data: bytes, path: Path) -> None:
    """A picture in few colours: a third of the bytes, and nobody sees it."""
    from PIL import Image

    image: Any = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((0, 0, image.width, min(image.height, 2600)))
    image.quantize(96, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


if __name__ == "__main__":
    main()
