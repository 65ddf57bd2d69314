"""Cheap ways to the heads that matter: direct effects, and gradients verified by exact patches.

    python benchmarks/screening.py            the tables
    python benchmarks/screening.py --write    also into docs/benchmarks.md

GPT-2-small's shape, random weights, float32. Direct effects of every head are timed beside one
forward of the same prompts, the two kept runs (clean and corrupted) not counted: any patching needs
them. Screening estimates every head by attribution patching and measures the top tenth exactly;
its top ten is compared with that of the exact sweep, on several random models and prompts. Random
weights have no circuit, so that effects lie close together: a hard case for the order, and no
saturated softmax, which is what gradients miss on trained models.
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import torch

warnings.filterwarnings("ignore")
from gpt2_pairs import make, pairs  # noqa: E402
from page import put  # noqa: E402

from interp import load  # noqa: E402
from patching.direct import direct_effects, logit_attribution  # noqa: E402
from patching.engine import head_effects  # noqa: E402
from patching.method import make_method  # noqa: E402
from patching.pairs import Pairs  # noqa: E402


class Kept(Pairs):
    """Pairs whose kept runs are made once."""

    def batches(self):  # type: ignore[no-untyped-def]
        """See `Pairs`."""
        if not hasattr(self, "_made"):
            self._made = list(super().batches())
        return iter(self._made)


def took(function, repeats: int = 3) -> float:  # type: ignore[no-untyped-def]
    """Median seconds of some calls, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def direct(batch: int, length: int) -> list[str]:
    """Time of direct effects over one forward."""
    model = load(make(12))
    data = Kept(model, pairs(batch, length), batch_size=batch)
    ids = torch.tensor([p.clean.tokens for p in data.pairs])

    @torch.no_grad()
    def forward() -> None:
        model.hf(input_ids=ids)

    floor = took(forward)
    rows = []
    for title, function in (
        ("onto the logit difference, frozen norm", lambda: logit_attribution(model, data)),
        ("through the live norm and unembedding", lambda: direct_effects(model, data)),
    ):
        rows.append(f"| {title} | {batch} | {length} | {took(function) / floor:.2f} |")
        print(rows[-1], flush=True)
    return rows


def screening(batch: int, length: int, seeds: int, layers: int) -> list[str]:
    """How often the screened top ten is the exact one."""
    same, overlap, exact_time, quick_time = 0, [], [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = load(make(layers, seed))
        data = Kept(model, pairs(batch, length, seed), batch_size=batch)
        data.batches()
        start = time.perf_counter()
        exact = head_effects(model, data)
        middle = time.perf_counter()
        tenth = max(10, len(exact.heads) // 10)
        found = make_method("atp", {"verify": 0}).scores(data)
        order = np.argsort(-np.abs(found.values))[:tenth]
        measured = head_effects(model, data, heads=[found.heads[i] for i in order])
        quick_time.append(time.perf_counter() - middle)
        exact_time.append(middle - start)
        best = {exact.heads[i] for i in np.argsort(-np.abs(exact.values))[:10]}
        mine = {measured.heads[i] for i in np.argsort(-np.abs(measured.values))[:10]}
        overlap.append(len(best & mine))
        same += best == mine
    ratio = statistics.median(e / q for e, q in zip(exact_time, quick_time, strict=True))
    line = (
        f"| {layers} | {batch} | {length} | {same} of {seeds} | {np.mean(overlap):.1f} of 10 "
        f"| {ratio:.1f} x |"
    )
    print(line, flush=True)
    return [line]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"torch {torch.__version__}, {args.threads} thread, GPT-2-small's shape, float32.", "",
        "| direct effect of every head | B | T | time over one forward |", "|---|---|---|---|",
        *direct(1, 16), *direct(8, 128), "",
        "| layers | B | T | top ten as the exact one | in common | faster than the sweep |",
        "|---|---|---|---|---|---|",
        *screening(4, 32, args.seeds, 12),
    ]  # fmt: skip
    if args.write:
        put("screening", lines)


if __name__ == "__main__":
    main()
