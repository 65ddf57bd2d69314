"""What the benchmarks of patching share: GPT-2-small with random weights, and random pairs."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from interp.prompts import Prompt, PromptPair  # noqa: E402

VOCAB = 50257


def make(layers: int, seed: int = 0) -> torch.nn.Module:
    """GPT-2-small's shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(n_layer=layers, attn_implementation="sdpa")
    return GPT2LMHeadModel(config).eval()


def pairs(batch: int, length: int, seed: int = 1) -> list[PromptPair]:
    """Random prompts; the corrupted one differs in the tokens after the first quarter."""
    gen = torch.Generator().manual_seed(seed)
    out = []
    for i in range(batch):
        a, b = torch.randint(0, VOCAB, (2, length), generator=gen).tolist()
        clean = Prompt(tuple(a), id=str(i), answer=(5,), meta={"wrong": 7})
        same = length // 4
        out.append(PromptPair(clean, Prompt((*a[:same], *b[same:]))))
    return out
