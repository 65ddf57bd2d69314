"""Train `zoo:needle`: a small Llama with grouped queries that finds facts in long contexts.

    python -m interp.zoo.train.needle --out interp/zoo/weights/needle
    python -m interp.zoo.train.needle --evaluate interp/zoo/weights/needle

Contexts are filler sentences with facts in random places, followed by questions about all of them
in random order. Loss is weighted to the answers. Training starts on short contexts, where the
matching circuit forms, and is then stretched. Values differ within a context, so that each word
of a value is followed by one word only.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from interp.tasks.lexicon import KEYS, VALUES, WORDINGS, haystack_sentence, vocabulary
from interp.zoo.train.common import BOS, PAD, SPECIALS, small_llama, store, train, word_tokenizer

IDS = {word: i for i, word in enumerate([*SPECIALS, *vocabulary()])}
VALUE_WORDS = 3


def encode(text: str) -> list[int]:
    """Ids of a text, as the tokenizer gives them, without <bos>."""
    return [IDS[word] for word in re.findall(r"\w+|[^\w\s]+", text.lower())]


_SENTENCES: list[list[int]] = []


def _filler(rng: random.Random) -> list[int]:
    if not _SENTENCES:
        own = random.Random(0)
        _SENTENCES.extend(encode(haystack_sentence(own)) for _ in range(20000))
    return rng.choice(_SENTENCES)


def example(
    rng: random.Random, length: int, facts: int, *, asked: int | None = None
) -> tuple[list[int], list[float]]:
    """One training sequence and the weight of each of its tokens."""
    wording = WORDINGS[rng.choice(tuple(WORDINGS))]
    keys = rng.sample(KEYS, facts)
    words = rng.sample(VALUES, facts * VALUE_WORDS)
    values = [" ".join(words[i * VALUE_WORDS : (i + 1) * VALUE_WORDS]) for i in range(facts)]
    stated = [encode(wording.fact.format(key=k, value=v)) for k, v in zip(keys, values)]
    order = rng.sample(range(facts), asked or facts)
    asks = [(encode(wording.question.format(key=keys[i])), encode(values[i] + ".")) for i in order]
    room = length - 1 - sum(map(len, stated)) - sum(len(q) + len(a) for q, a in asks)
    pieces: list[list[int]] = []
    while room > 0:
        pieces.append(_filler(rng))
        room -= len(pieces[-1])
    for fact in stated:
        pieces.insert(rng.randint(0, len(pieces)), fact)
    ids = [BOS, *(x for piece in pieces for x in piece)]
    weight = [0.02] * len(ids)
    for q, a in asks:
        ids += q + a
        weight += [0.02] * len(q) + [1.0] * len(a)
    return ids, weight


def batch(
    rng: random.Random, size: int, lengths: tuple[int, ...], facts: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """A padded batch (padding on the right has weight 0)."""
    length = rng.choice(lengths)
    n = rng.randint(*facts)
    rows = [example(rng, length, n) for _ in range(max(1, size * min(lengths) // length))]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [PAD] * (width - len(i)) for i, _ in rows])
    weight = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])
    return ids, weight


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, *, length: int, depth: float, wording: str, n: int, seed: int
) -> float:
    """Share of questions whose whole answer (all words and the stop) is produced greedily."""
    rng = random.Random(seed)
    right = 0
    device = next(model.parameters()).device
    form = WORDINGS[wording]
    for _ in range(n):
        facts = 4
        keys, words = rng.sample(KEYS, facts), rng.sample(VALUES, facts * VALUE_WORDS)
        values = [" ".join(words[i * 3 : i * 3 + 3]) for i in range(facts)]
        stated = [encode(form.fact.format(key=k, value=v)) for k, v in zip(keys, values)]
        ask, answer = encode(form.question.format(key=keys[0])), encode(values[0] + ".")
        pieces: list[list[int]] = []
        room = length - 1 - len(ask) - sum(map(len, stated))
        while (piece := _filler(rng)) and room - len(piece) >= 0:
            pieces.append(piece)
            room -= len(piece)
        for fact in stated[1:]:
            pieces.insert(rng.randint(0, len(pieces)), fact)
        pieces.insert(round(depth * len(pieces)), stated[0])
        ids = torch.tensor([[BOS, *(x for p in pieces for x in p), *ask, *answer]], device=device)
        logits = model(input_ids=ids).logits[0]  # type: ignore[operator]
        # Greedy decoding gives the answer exactly if, fed with it, each next token is right.
        at = ids.shape[1] - len(answer)
        right += bool((logits[at - 1 : -1].argmax(-1) == ids[0, at:]).all())
    return right / n


def table(model: torch.nn.Module, n: int = 20, lengths: tuple[int, ...] = ()) -> str:
    """Accuracy over length × depth for both wordings, as a Markdown table."""
    lengths = lengths or (128, 256, 512, 1024, 1536, 2000)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    lines = ["| wording | length | " + " | ".join(f"depth {d}" for d in depths) + " |"]
    lines.append("|---" * (2 + len(depths)) + "|")
    for wording in WORDINGS:
        for length in lengths:
            row = [
                evaluate(model, length=length, depth=d, wording=wording, n=n, seed=10_000 + length)
                for d in depths
            ]
            lines.append(f"| {wording} | {length} | " + " | ".join(f"{x:.2f}" for x in row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train or evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from transformers import LlamaForCausalLM

        print(table(LlamaForCausalLM.from_pretrained(args.evaluate).eval(), args.samples))
        return
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = small_llama(len(IDS), layers=4, heads=4, kv_heads=2, context=2048)
    start = time.time()

    def report(step: int, loss: float) -> None:
        print(f"{time.time() - start:6.0f}s step {step:5d} loss {loss:.3f}", flush=True)

    def save() -> None:
        model.eval()
        scores = {
            (w, x): evaluate(model, length=x, depth=0.5, wording=w, n=20, seed=1)
            for w in WORDINGS
            for x in (256, 1024)
        }
        print(f"{time.time() - start:6.0f}s exact answers {scores}", flush=True)
        if args.out:
            store(model, word_tokenizer(vocabulary()), args.out, "")
        model.train()

    stages = (
        (300, lambda: batch(rng, 32, (96,), (3, 8)), 1.5e-3),
        (400, lambda: batch(rng, 32, (128, 256, 512), (3, 10)), 1e-3),
    )
    train(model, stages, report=report, device=args.device, save=save)
    model.cpu()
    if args.out:
        store(model, word_tokenizer(vocabulary()), args.out, _card(model, args, start))


def _card(model: torch.nn.Module, args: argparse.Namespace, start: float) -> str:
    minutes = (time.time() - start) / 60
    return (
        "# zoo:needle\n\nTrained by `python -m interp.zoo.train.needle` "
        f"(seed {args.seed}, {args.threads} threads, {minutes:.0f} minutes, torch "
        f"{torch.__version__}) on text made by `interp.tasks.lexicon` alone; its first layer "
        "started with two constructed heads that look back by one and two, its second with two "
        "that match.\n\n"
        "Exact greedy answers (all three words and the stop; 4 facts in the context, held-out "
        f"seeds, {args.samples} questions a cell), "
        "by `python -m interp.zoo.train.needle --evaluate FOLDER`:\n\n"
        f"{table(model, args.samples)}\n"
    )


if __name__ == "__main__":
    main()
