"""Every model type of transformers that can be built tiny: is what is read of it true?

    python benchmarks/seam.py [--write] [--only gpt2,llama] [--jobs 2] [--timeout 60]

For each type a tiny random model is built offline (`benchmarks.tiny_models`), handed to
`interp.load` as any user's model is, and examined: every tensor of the output with all readings
installed must equal the output without, bit for bit, and `doctor` must pass. Each type runs in a
worker process of its own kind, so that a crash or an endless loop costs that type alone. With
`--write` the outcome becomes `docs/architectures.md`.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.seam_page import Outcome, page  # noqa: E402

MEMORY_GB = 8


def examine(model_type: str) -> Outcome:
    """Build one model type and examine it."""
    import torch

    import interp
    from benchmarks.tiny_models import model_class, tiny_model

    start = time.perf_counter()
    out = Outcome(model_type, "unbuilt")
    try:
        out.cls = model_class(model_type).__name__
        out.family = model_class(model_type).__module__.split(".")[-2]
        hf = tiny_model(model_type)
    except Exception as error:
        out.reason = _line(error)
        return out
    out.parameters = sum(p.numel() for p in hf.parameters())
    try:
        model = interp.load(hf)
        with torch.no_grad():
            towers = model.towers
        out.towers = [
            (
                t.name,
                len(t.layers),
                t.n_layers,
                t.n_heads,
                "+".join(sorted({x.reached for x in t.layers})),
            )
            for t in towers.values()
        ]
        out.category = category(model)
        out.partly = sorted(set(model.structure.unreached.values()))
        out.equal, note, out.observed_only = bits_equal(model)
        report = model.doctor()
        out.worst = max((c.worst for c in report.checks if c.worst is not None), default=None)
        out.status = "pass" if report.ok and out.equal else "fail"
        failed = [f"{c.name}: {c.worst} {c.note}" for c in report.checks if c.ok is False]
        out.reason = "; ".join([*failed, *([note] if note else [])])
    except interp.errors.UnsupportedModelError as error:
        out.status, out.reason = "unreached", _line(error)
        if "look like it: none" in out.reason:
            out.status = "none"
        if "no example" in out.reason:
            out.status = "unfed"
    except Exception as error:
        out.status, out.reason = "crash", _line(error)
    out.seconds = time.perf_counter() - start
    return out


def _line(error: BaseException) -> str:
    import traceback

    at = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    where = Path(at.filename).name
    if where in ("structure.py", "example.py"):
        return text
    return f"{type(error).__name__}: {text} ({where}:{at.name})"


def category(model: Any) -> str:
    """What kind of model it is, from its towers."""
    towers = set(model.towers)
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    text = [t for n, t in model.towers.items() if n.startswith(("text", "encoder"))]
    if any(n.startswith("audio") for n in towers):
        return "audio"
    if any(n.startswith("vision") for n in towers):
        return "vision-language" if text else "vision"
    if all(not layer.causal for t in text for layer in t.layers):
        return "encoder"
    return "decoder"


def bits_equal(model: Any) -> tuple[bool, str, list[str]]:
    """Whether every tensor of the output keeps its bits with all readings of all towers on.

    Also says why not, and in which towers calls are not one for each prompt: these have no reading
    per prompt, and their calls are observed only.
    """
    import torch

    from interp.doctor import _example, _outputs
    from interp.engine import Collector
    from interp.errors import SiteError
    from interp.readings import Distance, Entropy, KeyMass, Offset, PairMass, SpanMass, ZNorm

    inputs = model._example if model._example is not None else _example(model)
    readings = {
        "span": SpanMass("all"), "distance": Distance(), "entropy": Entropy(),
        "keys": KeyMass(), "z": ZNorm(),
    }  # fmt: skip
    related = readings | {"pairs": PairMass(Offset(1))}
    plain = _outputs(model, inputs)
    apart: list[str] = []
    for tower in model.towers.values():
        # Patches of an image have no "token before": relations are the text's.
        for wanted in (related, readings, None):
            if wanted is None:
                apart.append(tower.name)
                break
            collector = Collector(tower, batch_of(inputs), wanted)
            try:
                with model.observe(collector, columns=collector.columns):
                    read = _outputs(model, inputs)
                collector.answers()
            except SiteError:
                continue
            equal = [torch.equal(a, b) for a, b in zip(plain, read, strict=True)]
            if not all(equal):
                return False, f"readings of tower {tower.name} change the output", apart
            break
    return True, "", apart


def batch_of(inputs: Any) -> Any:
    """Example inputs as the batch of prompts that readings are asked of."""
    import torch

    from interp.prompts import Batch, Prompt

    size = len(next(iter(inputs.values())))
    ids = inputs.get("input_ids", torch.zeros(size, 4, dtype=torch.long))
    batch = Batch.of([Prompt(tuple(row)) for row in ids.tolist()])
    if "decoder_input_ids" not in inputs:
        return batch
    decoder = Batch.of([Prompt(tuple(row)) for row in inputs["decoder_input_ids"].tolist()])
    return replace(batch, decoder=decoder)


def work() -> None:
    """A worker: model types in on stdin, outcomes out on the real stdout, one JSON line each."""
    import resource
    import warnings

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_GB << 30, MEMORY_GB << 30))
    warnings.simplefilter("ignore")
    import torch
    from transformers import logging

    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    for line in sys.stdin:
        outcome = examine(line.strip())
        channel.write(json.dumps(asdict(outcome)) + "\n")
        channel.flush()


class _Worker:
    """One worker process; started anew after a crash or a timeout."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def run(self, model_type: str) -> Outcome:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(model_type + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return Outcome(model_type, "crash", reason="the worker died")
        ready, _, _ = select.select([process.stdout], [], [], self.timeout)
        line = process.stdout.readline() if ready else ""
        if line:
            row = json.loads(line)
            row["towers"] = [tuple(t) for t in row["towers"]]
            return Outcome(**row)
        process.kill()
        code = process.wait()
        why = f"the process died ({code})" if ready else f"not done after {self.timeout:.0f} s"
        return Outcome(model_type, "crash", reason=why)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def sweep(types: list[str], *, jobs: int, timeout: float) -> list[Outcome]:
    """Examine every type, `jobs` at a time, and tell of each as it is done."""
    queue = list(reversed(types))
    done: list[Outcome] = []
    lock = threading.Lock()

    def serve() -> None:
        worker = _Worker(timeout)
        while True:
            with lock:
                if not queue:
                    break
                model_type = queue.pop()
            outcome = worker.run(model_type)
            with lock:
                done.append(outcome)
                print(_row(outcome, len(done), len(types)), flush=True)
        worker.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sorted(done, key=lambda o: o.type)


def _row(o: Outcome, n: int, total: int) -> str:
    towers = " ".join(f"{name}:{k}/{m}x{h}" for name, k, m, h, _ in o.towers)
    return f"{n:>4}/{total} {o.status:<9} {o.type:<28} {o.seconds:5.1f}s {towers} {o.reason}"[:260]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one type")
    parser.add_argument("--json", default="", help="also write the outcomes to this file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return
    if args.write and args.only:
        parser.error("--write needs every model type; leave --only out")
    from benchmarks.tiny_models import model_types

    types = args.only.split(",") if args.only else model_types()
    outcomes = sweep(types, jobs=args.jobs, timeout=args.timeout)
    counts = Counter(o.status for o in outcomes)
    print("  ".join(f"{k}: {v}" for k, v in counts.most_common()))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    if args.write:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "architectures.md").write_text(page(outcomes))


if __name__ == "__main__":
    main()
