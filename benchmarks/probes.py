"""What probes on all heads cost beside loops of scikit-learn fits, and whether they agree.

    python benchmarks/probes.py            the whole table (some minutes)
    python benchmarks/probes.py --write    also into docs/benchmarks.md

Features are synthetic: normal, correlated, float32 as read from a model; every eighth head holds
the label. All ways get the same array, in float64. Ours give for every head the penalty out of
five with the least leave-one-out error, the fit, and the held-out prediction of every example.

- `RidgeCV`: the same, by the same closed form, head by head;
- `LogisticRegression`: one fit, which predicts nothing held out;
- `LogisticRegression` in 5 folds: a held-out prediction of every example from fits on 80 %;
- leave-one-group-out: examples in groups of five. scikit-learn has no closed form and refits
  for every group and penalty; timed on two heads and scaled to all.

Ways are interleaved and the ratio of a repetition is taken within it; the table shows medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from page import put  # noqa: E402

from probes.features import HeadFeatures  # noqa: E402
from probes.logistic import fit_logistic  # noqa: E402
from probes.ridge import fit_ridge, ridge_from_statistics  # noqa: E402
from probes.statistics import HeadStatistics  # noqa: E402

GRID = [1.0, 10.0, 100.0, 1000.0, 10000.0]


def made(n: int, heads: int, d: int, seed: int = 0) -> tuple[HeadFeatures, torch.Tensor]:
    """Correlated features, and labels that every eighth head holds."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=rng)
    x = torch.randn(n, heads, d, generator=rng)
    mix = torch.randn(heads, d, d, generator=rng) / d**0.5
    x = torch.einsum("nhd,hde->nhe", x, mix)
    theta = torch.randn(heads, d, generator=rng) / d**0.5
    x[:, ::8] += (labels[:, None, None] * 2 - 1) * theta[::8]
    return HeadFeatures.of(x), labels


def each_head(found: HeadFeatures, fit: Callable[[np.ndarray], object]) -> list:
    return [fit(found.x[:, h].double().numpy()) for h in range(len(found.heads))]


def sklearn_ways(found: HeadFeatures, y: np.ndarray) -> dict[str, Callable[[], list]]:
    """Loops over heads."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def ridge(x: np.ndarray) -> tuple[np.ndarray, float]:
        fit = RidgeCV(alphas=GRID, store_cv_results=True).fit(x, y)
        return fit.coef_, fit.alpha_

    def scaled(**more: object) -> object:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, **more))

    def tight(x: np.ndarray) -> np.ndarray:
        fit = scaled(tol=1e-12, solver="newton-cholesky").fit(x, y)
        return fit[1].coef_[0] / fit[0].scale_

    return {
        "RidgeCV": lambda: each_head(found, ridge),
        "LogisticRegression": lambda: each_head(
            found, lambda x: LogisticRegression(max_iter=1000).fit(x, y)
        ),
        "scaled": lambda: each_head(found, lambda x: scaled().fit(x, y)),
        "folds": lambda: each_head(found, lambda x: cross_val_predict(scaled(), x, y, cv=5)),
        "tight": lambda: each_head(found, tight),
    }


def sklearn_groups(found: HeadFeatures, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Leave-one-group-out predictions of every head under every penalty, by refits."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

    return np.stack([
        [
            cross_val_predict(Ridge(alpha=a), x, y, groups=groups, cv=LeaveOneGroupOut())
            for a in GRID
        ]
        for x in (found.x[:, h].double().numpy() for h in range(len(found.heads)))
    ])  # fmt: skip


def timed(ways: dict[str, Callable[[], object]], repeats: int) -> tuple[dict, dict]:
    """Median seconds of each way, and the last result."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    pairs = zip(seconds[slow], seconds[fast], strict=True)
    return statistics.median(a / b for a, b in pairs)


TITLES = {
    "ours": "**ridge, penalty and leave-one-out, all heads at once**",
    "RidgeCV": "loop of RidgeCV",
    "LogisticRegression": "loop of LogisticRegression, one fit",
    "scaled": "the same behind a StandardScaler",
    "folds": "the same in 5 folds",
    "ours_groups": "**ridge, leave-one-group-out**",
    "groups": "loop of Ridge refits, leave-one-group-out",
    "ours_logistic": "**logistic, all heads at once** (over the scaled loop)",
}


def compare(heads: int, d: int, n: int, repeats: int) -> tuple[dict[str, str], str]:
    """Cells of one column, and a line on agreement."""
    found, labels = made(n, heads, d)
    y = labels.double().numpy() * 2 - 1
    targets, groups = torch.from_numpy(y), np.arange(n) // 5
    few = found.x[:, :2]
    theirs = sklearn_ways(found, y)
    tight = np.stack(theirs.pop("tight")())
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: fit_ridge(found, targets, penalties=GRID, relative=False),
        "ours_groups": lambda: fit_ridge(
            found, targets, penalties=GRID, relative=False, groups=groups
        ),
        "ours_logistic": lambda: fit_logistic(found, labels, standardise=True),
        **theirs,
    }
    seconds, results = timed(ways, repeats)
    start = time.perf_counter()
    refits = sklearn_groups(HeadFeatures.of(few), y, groups)
    seconds["groups"] = [(time.perf_counter() - start) * heads / 2] * repeats
    cells = {}
    for name in TITLES:
        cells[name] = f"{statistics.median(seconds[name]):.2f} s"
        if name == "ours_logistic":
            cells[name] += f" ({ratio(seconds, 'scaled', name):.1f} x)"
        elif not name.startswith("ours"):
            ours = "ours_groups" if name == "groups" else "ours"
            cells[name] += f" ({ratio(seconds, name, ours):.1f} x)"
    fit, cv = results["ours"], results["RidgeCV"]
    same = sum(float(fit.penalty[h]) == cv[h][1] for h in range(heads))
    gap = max(float(np.abs(fit.coef[h, :, 0].numpy() - cv[h][0]).max()) for h in range(heads))
    grouped = results["ours_groups"].held_out[:, :2, 0].numpy()
    chosen = [GRID.index(float(p)) for p in results["ours_groups"].penalty[:2]]
    gap_groups = max(float(np.abs(grouped[:, h] - refits[h, chosen[h]]).max()) for h in range(2))
    logistic = results["ours_logistic"]
    assert bool(logistic.converged.all())
    gap_logistic = float(np.abs(logistic.coef.numpy() - tight).max())
    return cells, (
        f"{heads} heads of {d}: the penalty of RidgeCV on {same} of {heads} heads, coefficients "
        f"within {gap:.0e}; leave-one-group-out within {gap_groups:.0e} of the refits; logistic "
        f"coefficients within {gap_logistic:.0e} of scikit-learn's optimum."
    )


def stream(spec: str) -> None:
    """What `memory` runs: examples made, added and forgotten, then the fit."""
    n, heads, d, size = json.loads(spec)
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(heads, d, generator=rng)
    theta /= theta.norm(dim=1, keepdim=True)
    empty = HeadFeatures.of(torch.zeros(1, heads, d))
    sums = HeadStatistics(empty.heads, empty.sizes, 1)
    start, spent = time.perf_counter(), 0.0
    at = 0
    while at < n:
        count = min(size, n - at)
        labels = torch.randint(0, 2, (count, 1), generator=rng).double() * 2 - 1
        x = torch.randn(count, heads, d, generator=rng) + 0.1 * labels[:, :, None].float() * theta
        before = time.perf_counter()
        sums.add(HeadFeatures.of(x), labels)
        spent += time.perf_counter() - before
        at += count
    fit = ridge_from_statistics(sums)
    w = fit.coef[:, :, 0].float()
    cosine = float(((w * theta).sum(1) / w.norm(dim=1)).min())
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024
    print(json.dumps([peak, spent, time.perf_counter() - start, cosine]))


def memory(n: int, heads: int, d: int, size: int) -> list[float]:
    """Peak resident MB, seconds of adding, seconds in all, least cosine; in its own process."""
    command = [sys.executable, __file__, "--child", json.dumps([n, heads, d, size])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--shapes", default="144x64,128x128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", default="10000,100000,1000000")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        stream(args.child)
        return
    import sklearn
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {args.threads} thread, "
        f"{platform.machine()}, N = {args.n:,}, median of {args.repeats}")  # fmt: skip
    say()
    shapes = [tuple(int(x) for x in shape.split("x")) for shape in args.shapes.split(",")]
    with threadpool_limits(limits=args.threads):
        columns = [compare(heads, d, args.n, args.repeats) for heads, d in shapes]
    say("| way | " + " | ".join(f"{heads} heads of {d}" for heads, d in shapes) + " |")
    say("|---" * (len(shapes) + 1) + "|")
    for name, title in TITLES.items():
        say(f"| {title} | " + " | ".join(cells[name] for cells, _ in columns) + " |")
    say()
    say("Seconds, and in parentheses how many times ours.")
    for _, line in columns:
        say(line)
    say()
    say("Streamed statistics, 32 heads of 64, batches of 4,096, the fit by generalised "
        "cross-validation:")  # fmt: skip
    say()
    say("| N | peak memory of the process | time to add | least cosine to the planted direction |")
    say("|---|---|---|---|")
    for n in (int(x) for x in args.streams.split(",")):
        peak, spent, _, cosine = memory(n, 32, 64, 4096)
        say(f"| {n:,} | {peak:.0f} MB | {spent:.1f} s | {cosine:.4f} |")
    if args.write:
        put("probes", lines)


if __name__ == "__main__":
    main()
