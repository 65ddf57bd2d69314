"""What the benchmarks of patching share: the model, the pairs, and the page."""

import sys
from collections.abc import Sequence
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


def put(page: Path, name: str, lines: Sequence[str], command: str) -> None:
    """Put lines into a page between marks of their own."""
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    block = "\n".join([begin, *lines, end])
    if begin in text:
        head, rest = text.split(begin, 1)
        text = head + block + rest.split(end, 1)[1]
    else:
        text += f"\n## {name.capitalize()}\n\n`{command} --write`\n\n{block}\n"
    page.write_text(text)
