"""The dashboard's budget: bytes, server and browser time of every view, in a real Chromium.

    python benchmarks/dashboard.py            the table
    python benchmarks/dashboard.py --write    also into docs/benchmarks.md

Two runs are served, read only: `zoo:needle` with a trace, and a synthetic one of 32 layers × 32
heads (8 key-value groups of 64 dimensions) with a trace of 8,192 tokens. The synthetic trace is
captured from one layer of that shape with random weights; the other layers are links to its file,
so that every read goes through the same code on the same sizes. Tables of scores are random.

Server time is from the request to the first byte of its answer as the browser sees it, browser time
the rest until the second frame after the change is drawn. Medians of several repetitions.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from page import put

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
JOB = ["rank", "retrieval", "--model", "zoo:needle", "--n", "60"]
POLLS = """() => performance.getEntriesByType('resource').filter((e) => /jobs[.]json/.test(e.name))
  .map((e) => [e.encodedBodySize, e.responseStart - e.requestStart, e.startTime, e.responseEnd])"""
LAYERS, HEADS, KV, LENGTH = 32, 32, 8, 8192


@dataclass(frozen=True)
class Budget:
    """One row of the table: what a view may take."""

    view: str
    size: str
    kib: float
    server: float
    browser: float


def tables(layers: int, heads: int, names: int, seed: int = 0) -> list[Any]:
    """Random tables of scores with controls."""
    from interp.headid import HeadId
    from interp.scores import HeadScores

    rng = np.random.default_rng(seed)
    ids = tuple(HeadId(i, j) for i in range(layers) for j in range(heads))
    return [
        HeadScores(
            f"score-{n}", ids, rng.beta(0.4, 3, (12, len(ids))), rng.beta(0.4, 4, (12, len(ids))),
            tuple(f"prompt-{i}" for i in range(12)), threshold=0.5, range=(0.0, 1.0),
        )
        for n in range(names)
    ]  # fmt: skip


def synthetic(root: Path) -> None:
    """The run of 1,024 heads × 8,192 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from interp import load
    from interp.prompts import Prompt
    from interp.run import Run
    from interp.traces import capture

    folder = root / "synthetic"
    with Run.open_or_create(folder, {"model": "synthetic"}, {"model": "synthetic"}) as run:
        run.finish(tables(LAYERS, HEADS, 3))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=64,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = load(LlamaForCausalLM(config))
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.q_proj.weight.mul_(20)
    tokens = tuple(torch.randint(0, 512, (LENGTH,)).tolist())
    trace = capture(model, Prompt(tokens, {"bos": ((0, 1),)}, id="long"), folder)
    path = trace.folder / "trace.json"
    info = json.loads(path.read_text())
    layers = info["towers"]["text"]["layers"]
    file = trace.folder / layers["0"]["file"]
    for layer in range(1, LAYERS):
        name = f"text-{layer}.safetensors"
        os.link(file, trace.folder / name)
        layers[str(layer)] = layers["0"] | {"file": name}
    path.write_text(json.dumps(info))


def grids(root: Path) -> None:
    """Runs of tables alone, of the sizes of the budget."""
    from interp.run import Run

    for layers, heads in ((12, 12), (80, 64)):
        name = f"grid-{layers}x{heads}"
        with Run.open_or_create(root / name, {"model": name}, {"model": name}) as run:
            run.finish(tables(layers, heads, 3))


def needle(root: Path) -> None:
    """`zoo:needle` with a trace."""
    from heads.scoring import execute, plan
    from interp import load
    from interp.run import Run
    from interp.tasks import make_task
    from interp.traces import capture

    model = load("zoo:needle")
    made = plan(model, ["retrieval"], n=4)
    with Run.open_or_create(root / "needle", made.key, {"model": "zoo:needle"}) as run:
        execute(model, made, run=run)
    capture(model, make_task("needle").prompts(model, 5)[4], root / "needle")


def shapes(root: Path) -> str:
    """A prompt with an image; returns the key of its trace."""
    command = ["rank", "visual-attention", "--model", "zoo:shapes-vlm", "--n", "4", "--traces", "1"]
    subprocess.run(
        [sys.executable, "-m", "app.cli", *command, "-q", "--out", str(root / "shapes")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (trace,) = (root / "shapes" / "traces").iterdir()
    return trace.name


@contextlib.contextmanager
def served(root: Path, *, read_only: bool = True) -> Iterator[str]:
    """The address of a server of a folder of runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", str(root), "--port", "0", "-q",
         *(["--read-only"] if read_only else [])],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


SCRIPT = (Path(__file__).parent / "dashboard.js").read_text()


class Bench:
    """A page in a browser, and what was measured in it."""

    def __init__(self, page: Any, address: str, repeats: int) -> None:
        self.page, self.address, self.repeats = page, address.rstrip("/"), repeats
        self.rows: list[tuple[Budget, float, float, float]] = []

    def open(self, path: str, ready: str) -> None:
        """Go to a path and wait until it is drawn."""
        self.page.goto(self.address + path)
        self.page.wait_for_selector(ready, timeout=60_000)
        self.page.wait_for_timeout(1500)
        self.page.evaluate(SCRIPT)

    def time(
        self, budget: Budget, action: str, sign: str, wanted: Callable[[str], bool],
        *, set: str = "",
    ) -> None:  # fmt: skip
        """Measure one view."""
        if set:
            self.page.evaluate(f"() => {{ {set} }}")
        found = []
        for i in range(self.repeats + 1):
            got = self.page.evaluate("(x) => window.measured(x)", [action, sign])
            if i:  # the first fills caches
                mine = [e for e in got["entries"] if wanted(e["name"])]
                # Other callbacks answer at the same time: the view's own answer is the largest.
                own = max(mine, key=lambda e: float(e["bytes"]), default=None)
                server = own["server"] if own else 0.0
                size = own["bytes"] if own else 0.0
                found.append((size / 1024, server, got["total"] - server))
            self.page.wait_for_timeout(150)
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        self.rows.append((budget, *medians))
        print(budget.view, budget.size, *(f"{m:.1f}" for m in medians), flush=True)


def measure(
    address: str, root: Path, image: str, repeats: int
) -> list[tuple[Budget, float, float, float]]:
    """Every view of the budget."""
    from playwright.sync_api import sync_playwright

    found = next(p for name in CHROMIUM if (p := shutil.which(name)))
    dash = lambda name: "_dash-update" in name  # noqa: E731
    row = lambda name: "/row/" in name or "/column/" in name  # noqa: E731
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=list(FLAGS))
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        page = context.new_page()
        b = Bench(page, address, repeats)
        for layers, heads in ((12, 12), (80, 64)):
            b.open(f"/r/grid-{layers}x{heads}/heads", "#heads-grid .js-plotly-plot .heatmaplayer")
            b.time(Budget("Head grid, metric switch", f"{layers} × {heads}", 50, 20, 100),
                   "grid", "plot:heads-grid", dash)  # fmt: skip
        b.time(
            Budget("Ranking table", "5,120 heads", 1024, 80, 350),
            "metric",
            "rows:heads-table",
            dash,
        )
        b.time(Budget("Keyboard cursor move", "80 × 64", 0, 0, 100), "cursor", "none",
               lambda n: False)  # fmt: skip
        b.open("/r/synthetic/heads", "#heads-atlas[src*=atlas]")
        b.time(Budget("Head atlas", "1,024 heads", 1126, 50, 100), "atlas", "image",
               lambda n: "atlas" in n)  # fmt: skip
        b.open("/r/synthetic/head/0/0", "#head-map .js-plotly-plot .heatmaplayer")
        window = lambda name: dash(name)  # noqa: E731
        b.time(Budget("Head map, open", "overview, T = 8,192", 110, 20, 120), "head",
               "plot:head-map", window)  # fmt: skip
        for width in (128, 512, 1024, 2048, 4096):
            size = f"{width} × {width} of 8,192"
            b.time(Budget("Head map, zoom", size, 360, 40, 200), "zoom", "plot:head-map", window,
                   set=f"window.width = {width}")  # fmt: skip
        page.wait_for_function("document.querySelectorAll('#tokens .token').length > 8000")
        b.time(Budget("Token hover, row and lines", "T = 8,192", 8, 5, 33), "hover", "row", row)
        b.time(Budget("Token hover, column", "T = 8,192", 8, 5, 33), "hover", "row", row,
               set="window.shift = true")  # fmt: skip
        b.rows.append(panel(browser, address, repeats))
        overlay(b, image)
        b.rows.append(poll(browser, root))
        b.rows.append(exported(root))
        b.rows.append(first_paint(browser, address, repeats))
        browser.close()
    return b.rows


def overlay(b: Bench, key: str) -> None:
    """One row of an image's patches, fetched as the page of images does."""
    b.open("/r/shapes/vision", "#page-vision canvas")
    base = f"/data/shapes/{key}/text"
    b.page.evaluate(f"() => {{ window.sight = '{base}/sights/'; }}")
    b.time(Budget("Patch overlay, per token", "8 × 8 patches", 5, 5, 16), "sight", "fetched",
           lambda n: "/sights/" in n)  # fmt: skip


def poll(browser: Any, root: Path) -> tuple[Budget, float, float, float]:
    """What a page learns of a running job, and how long after it happened at most."""
    with served(root, read_only=False) as address:
        page = browser.new_context().new_page()
        page.goto(f"{address}/jobs".replace("//jobs", "/jobs"))
        page.wait_for_function("() => window.headscope && window.headscope.config")
        page.wait_for_timeout(1500)
        page.evaluate("() => performance.clearResourceTimings()")
        page.evaluate(f"() => headscope.submit({JOB}, 'benchmark')")
        page.wait_for_timeout(9000)
        got = page.evaluate(POLLS)
        page.context.close()
    gaps = [b[3] - a[3] for a, b in itertools.pairwise(got) if b[2] - a[2] < 2000]
    return (
        Budget("Job progress", "poll, gap between two answers", 1, 10, 300),
        statistics.median(e[0] for e in got) / 1024,
        statistics.median(e[1] for e in got),
        statistics.median(gaps),
    )


def exported(root: Path) -> tuple[Budget, float, float, float]:
    """One head of 512 tokens as a page of its own."""
    from app import show_head
    from interp import load
    from interp.run import Run
    from interp.tasks import make_task
    from interp.traces import capture

    model = load("zoo:needle")
    (prompt,) = make_task("needle", {"lengths": (512,)}).prompts(model, 1)
    folder = root / "export"
    with Run.open_or_create(folder, {"model": "export"}) as run:
        run.finish([])
    capture(model, prompt, folder)
    place = folder / "head.html"
    show_head(Run.load(folder), "L1H0").save(place)
    size = f"{len(prompt)} tokens"
    return (
        Budget("Self-contained HTML, one head", size, 120, 0, 0),
        place.stat().st_size / 1024,
        0,
        0,
    )


def first_paint(browser: Any, address: str, repeats: int) -> tuple[Budget, float, float, float]:
    """From an empty cache to the drawn grid of heads."""
    times, sizes = [], []
    for _ in range(repeats):
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        got: list[int] = []
        page.on("response", lambda r, got=got: got.append(int(r.headers.get("content-length", 0))))
        page.goto(address.rstrip("/") + "/r/needle/heads")
        page.wait_for_selector("#heads-grid .js-plotly-plot .heatmaplayer image, "
                               "#heads-grid .js-plotly-plot .hm")  # fmt: skip
        times.append(float(page.evaluate("() => performance.now()")))
        sizes.append(sum(got) / 1024)
        page.context.close()
    row = Budget("First paint", "empty cache", 0, 0, 3000), statistics.median(sizes), 0.0
    print("first paint", statistics.median(times))
    return *row, statistics.median(times)


def panel(browser: Any, address: str, repeats: int) -> tuple[Budget, float, float, float]:
    """The tokens of the long prompt, from the request on."""
    found = []
    for _ in range(repeats):
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        page.goto(address.rstrip("/") + "/r/synthetic/heads")
        page.wait_for_selector("#heads-grid .js-plotly-plot .heatmaplayer")
        page.wait_for_timeout(1200)
        page.evaluate(SCRIPT)
        got = page.evaluate("(x) => window.measured(x)", ["tokens", f"tokens:{LENGTH}"])
        mine = [e for e in got["entries"] if "tokens.json" in e["name"]]
        # Other parts of the page are drawn at the same time: counted from the answer on.
        found.append((mine[0]["bytes"] / 1024, mine[0]["server"], got["total"] - mine[0]["end"]))
        page.context.close()
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    print("panel", medians)
    return (Budget("Token panel, build", "8,192 tokens", 120, 20, 250), *medians)


def main() -> None:
    """Make the runs, serve them, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into the docs")
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        grids(root)
        needle(root)
        image = shapes(root)
        synthetic(root)
        with served(root) as address:
            rows = measure(address, root, image, asked.repeats)
    lines = [
        "| view | size | KiB | at most | server, ms | at most | browser, ms | at most |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for b, size, server, browser in rows:
        lines.append(
            f"| {b.view} | {b.size} | {size:.1f} | {b.kib or '–'} | {server:.1f} | "
            f"{b.server or '–'} | {browser:.0f} | {b.browser:.0f} |"
        )
    print("\n".join(lines))
    if asked.write:
        put("dashboard", lines)


if __name__ == "__main__":
    main()
