"""What patching every head costs: ours, TransformerLens and nnsight side by side, same numbers.

    python benchmarks/patching.py             the table
    python benchmarks/patching.py --write     also into docs/benchmarks.md

The model has GPT-2-small's shape and random weights, float32. A sweep of the peers is one forward
per head (or per head and position), which takes minutes at the larger sizes: they are timed on a
random sample of cells and the time is scaled to all; ours runs whole. Runs alternate, and the
effects of the sampled cells are compared. The whole vocabulary is kept: peers compute the logits of
every position, ours those of the last. Clean and corrupted prompts share their first quarter, as
templates with swapped names do; ours takes it from the cache.
"""

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

warnings.filterwarnings("ignore")
from gpt2_pairs import make, pairs  # noqa: E402
from page import put  # noqa: E402

from interp import load  # noqa: E402
from interp.model import Model  # noqa: E402
from patching.engine import head_effects, head_position_effects  # noqa: E402
from patching.pairs import Pairs  # noqa: E402

Cell = tuple[int, int, int | None]


def lens(model: torch.nn.Module, data: Pairs) -> Callable[[Cell], torch.Tensor]:
    """TransformerLens: one forward of the clean prompts per cell."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config, model_name="bench"
    )
    clean, other = ids(data)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(other, names_filter=lambda n: n.endswith("attn.hook_z"))

    @torch.no_grad()
    def patched(cell: Cell) -> torch.Tensor:
        layer, head, position = cell
        name = f"blocks.{layer}.attn.hook_z"
        where = slice(None) if position is None else slice(position, position + 1)

        def put(z: torch.Tensor, hook: object) -> torch.Tensor:
            z[:, where, head] = cache[name][:, where, head]
            return z

        logits = bridge.run_with_hooks(clean, fwd_hooks=[(name, put)])
        return logits[:, -1, 5] - logits[:, -1, 7]

    return patched


def sight(model: torch.nn.Module, data: Pairs) -> Callable[[Cell], torch.Tensor]:
    """The same with nnsight: one trace per cell."""
    from nnsight import NNsight

    traced = NNsight(model)
    clean, other = ids(data)
    store: list[torch.Tensor] = []
    with torch.no_grad(), traced.trace(input_ids=other, use_cache=False):
        for block in traced.transformer.h:
            store.append(block.attn.c_proj.input.save())
    size = model.config.n_embd // model.config.n_head

    @torch.no_grad()
    def patched(cell: Cell) -> torch.Tensor:
        layer, head, position = cell
        where = slice(None) if position is None else slice(position, position + 1)
        part = slice(head * size, (head + 1) * size)
        with traced.trace(input_ids=clean, use_cache=False):
            traced.transformer.h[layer].attn.c_proj.input[:, where, part] = store[layer][
                :, where, part
            ]
            logits = traced.output.logits.save()
        return logits[:, -1, 5] - logits[:, -1, 7]

    return patched


def ids(data: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupted tokens."""
    clean = torch.tensor([p.clean.tokens for p in data.pairs])
    return clean, torch.tensor([p.corrupted.tokens for p in data.pairs])


def compare(
    layers: int, batch: int, length: int, *, positions: bool, sample: int, repeats: int
) -> dict[str, float]:
    """Times of a whole sweep in seconds, and the largest difference of sampled effects."""
    model: Model = load(make(layers))
    data = Pairs(model, pairs(batch, length), batch_size=batch)
    heads = model.text_config.n_head
    cells: list[Cell] = [
        (i, h, p)
        for i in range(layers)
        for h in range(heads)
        for p in (range(length) if positions else [None])
    ]
    chosen = random.Random(0).sample(cells, min(sample, len(cells)))
    peers = {"TransformerLens": lens(make(layers), data), "nnsight": sight(make(layers), data)}
    with torch.no_grad():
        logits = model.hf(input_ids=ids(data)[0]).logits
    base = logits[:, -1, 5] - logits[:, -1, 7]
    times: dict[str, list[float]] = {"headscope": [], "forward": [], **{n: [] for n in peers}}
    worst = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            model.hf(input_ids=ids(data)[0])
        times["forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = head_position_effects(model, data) if positions else head_effects(model, data)
        times["headscope"].append(time.perf_counter() - start)
        for name, patched in peers.items():
            patched(chosen[0])
            start = time.perf_counter()
            effects = {cell: patched(cell) - base for cell in chosen}
            times[name].append((time.perf_counter() - start) * len(cells) / len(chosen))
            for (layer, head, p), effect in effects.items():
                row = next(
                    i for i, h in enumerate(found.heads) if (h.layer, h.head) == (layer, head)
                )
                mine = found.per_example[:, row] if p is None else found.per_example[:, row, p]
                worst = max(worst, float((effect - torch.tensor(mine)).abs().max()))
    out = {name: statistics.median(t) for name, t in times.items()}
    return out | {"worst": worst, "cells": len(cells), "scale": float(base.abs().max())}


SETTINGS = (
    ("every head", 1, 16, False),
    ("every head", 8, 128, False),
    ("every head and position", 1, 32, True),
    ("every head and position", 8, 32, True),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sample", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=int, help="index of one setting")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"torch {torch.__version__}, {args.threads} thread(s), GPT-2-small's shape with "
        f"{args.layers} layers, float32; peers timed on {args.sample} cells; median of "
        f"{args.repeats}.",
        "",
        "| sweep | B | T | cells | headscope | in forwards | TransformerLens | nnsight | "
        "largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    settings = SETTINGS if args.only is None else SETTINGS[args.only : args.only + 1]
    for title, batch, length, positions in settings:
        repeats = 1 if batch > 1 else args.repeats
        got = compare(
            args.layers, batch, length, positions=positions, sample=args.sample, repeats=repeats
        )
        mine = got["headscope"]
        lines.append(
            f"| {title} | {batch} | {length} | {got['cells']:.0f} | {mine:.2f} s | "
            f"{mine / got['forward']:.1f} | {got['TransformerLens'] / mine:.1f} x | "
            f"{got['nnsight'] / mine:.1f} x | {got['worst']:.1e} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if args.write:
        put("patching", lines)


if __name__ == "__main__":
    main()
