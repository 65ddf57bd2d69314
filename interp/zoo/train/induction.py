"""Train `zoo:induction`: two layers that continue repeated random tokens at any lag.

    python -m interp.zoo.train.induction --out interp/zoo/weights/induction
    python -m interp.zoo.train.induction --evaluate interp/zoo/weights/induction

Each sequence repeats one random block; the length of the block, and so the lag, differs from
sequence to sequence, so that no fixed offset helps. Some lags are never trained on and tested.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor

from interp.zoo.train.common import BOS, SPECIALS, small_llama, store, train, word_tokenizer

WORDS = [f"t{i}" for i in range(1, 125)]
HELD_OUT = (11, 17, 23, 29, 48, 60, 75)
LAGS = tuple(x for x in range(6, 41) if x not in HELD_OUT)
WIDTH = 104


def sequence(rng: random.Random, lag: int, width: int) -> tuple[list[int], list[float]]:
    """BOS and copies of a block of `lag` different tokens; weight 1 from the second copy on."""
    first = len(SPECIALS)
    block = rng.sample(range(first, first + len(WORDS)), lag)
    ids = [BOS, *(block * (width // lag + 1))[: width - 1]]
    return ids, [0.0 if i <= lag + 1 else 1.0 for i in range(len(ids))]


def batch(rng: random.Random, size: int) -> tuple[Tensor, Tensor]:
    """Sequences of random trained lags."""
    rows = [sequence(rng, rng.choice(LAGS), WIDTH) for _ in range(size)]
    return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


@torch.no_grad()
def accuracy(model: torch.nn.Module, lag: int, *, n: int = 32, seed: int = 1) -> float:
    """Share of tokens from the second copy on that are predicted right."""
    rng = random.Random(seed)
    rows = [sequence(rng, lag, max(WIDTH, 2 * lag + 1)) for _ in range(n)]
    ids, weight = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    guess = model(input_ids=ids).logits[:, :-1].argmax(-1)  # type: ignore[operator]
    counted = weight[:, 1:] > 0
    return float((guess == ids[:, 1:])[counted].float().mean())


def table(model: torch.nn.Module) -> str:
    """Accuracy at trained and at unseen lags, as a Markdown table."""
    lines = ["| lag | trained on | right |", "|---|---|---|"]
    for lag in sorted((6, 15, 25, 40, *HELD_OUT)):
        seen = "yes" if lag in LAGS else "no"
        lines.append(f"| {lag} | {seen} | {accuracy(model, lag):.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Train or evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from transformers import LlamaForCausalLM

        print(table(LlamaForCausalLM.from_pretrained(args.evaluate).eval()))
        return
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    vocab = len(SPECIALS) + len(WORDS)
    model = small_llama(vocab, layers=2, heads=4, kv_heads=2, context=512)
    start = time.time()

    def report(step: int, loss: float) -> None:
        print(f"{time.time() - start:6.0f}s step {step:5d} loss {loss:.4f}", flush=True)

    train(model, ((args.steps, lambda: batch(rng, 16), 1.5e-3),), report=report)
    if args.out:
        card = (
            f"# zoo:induction\n\nTrained by `python -m interp.zoo.train.induction` (seed "
            f"{args.seed}, {args.steps} steps, {time.time() - start:.0f} s on {args.threads} CPU "
            f"thread, torch {torch.__version__}) on random tokens alone; it started with a "
            "constructed previous-token pair and a rough matching pair "
            "(`interp.zoo.train.common.small_llama`).\n\n"
            f"{table(model)}\n"
        )
        store(model, word_tokenizer(WORDS), args.out, card)


if __name__ == "__main__":
    main()
