"""What reading costs: time and peak memory over the bare forward, peers in the same run.

    python benchmarks/readings.py                      the whole table (about half an hour)
    python benchmarks/readings.py --lengths 512,2048   some lengths
    python benchmarks/readings.py --write              also into docs/benchmarks.md

Models have random weights: GPT-2-small's width (12 heads of 64) and a Llama with 16 query and 4
key-value heads of 64, some layers of each, a small vocabulary, float32; `gpt2-small` is all of
GPT-2 small, 12 layers and 50,257 tokens, at T = 4,096 and without peers. Every way reads the same
prompt. Ways are interleaved: one repetition runs each way once, ours with a bare forward just
before it and peers after the last of these, whose time it is divided by; the table shows the
median. Peak
memory is the growth of the resident set during one forward, in a process that does nothing else.

Peers are asked for the patterns of all layers and nothing else, so their numbers leave the
statistics themselves out.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from page import put  # noqa: E402

from interp import load  # noqa: E402
from interp.decode import StepReader, generate  # noqa: E402
from interp.engine import read  # noqa: E402
from interp.model import Model  # noqa: E402
from interp.prompts import Batch, Prompt  # noqa: E402
from interp.readings import (  # noqa: E402
    Distance,
    Entropy,
    KeyMass,
    Offset,
    PairMass,
    Reading,
    Same,
    SpanMass,
)

GATHER: dict[str, Reading] = {
    "sink": SpanMass("bos"),
    "previous": PairMass(Offset(1)),
    "induction": PairMass(Same(1)),
    "needle": SpanMass("needle"),
}
COLUMNS: dict[str, Reading] = {**GATHER, "span": SpanMass("image"), "distance": Distance()}
EVERYTHING: dict[str, Reading] = {**COLUMNS, "entropy": Entropy(), "keys": KeyMass()}
SAMPLED: dict[str, Reading] = {
    **GATHER,
    "span": SpanMass("image", sample=256),
    "distance": Distance(sample=256),
    "entropy": Entropy(sample=256),
}
OURS = {"gather": GATHER, "columns": COLUMNS, "everything": EVERYTHING, "sampled": SAMPLED}
SHAPES = {
    "gpt2": "GPT-2-small width",
    "gqa": "16 query, 4 key-value heads",
    "gpt2-small": "GPT-2 small with its vocabulary",
    "image-576": "LLaVA with an image of 576 tokens, T = 661",
    "image-2304": "LLaVA with an image of 2,304 tokens, T = 2,389",
}
IMAGES = {"image-576": 24, "image-2304": 48}
PEERS = ("eager", "transformer_lens", "nnsight")
TITLES = {
    "bare": "bare forward",
    "seam": "seam open, nothing read",
    "gather": "sink, previous token, induction, short span",
    "columns": "+ large span, distance",
    "sampled": "the same and entropy on 256 sampled rows, with standard errors",
    "everything": "+ entropy, mass per key, all exact",
    "eager": "HF eager, patterns returned",
    "transformer_lens": "TransformerLens, pattern cache",
    "nnsight": "nnsight, patterns saved",
}


def make(shape: str, layers: int, length: int, attn: str = "sdpa") -> torch.nn.Module:
    """A model of random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if shape in IMAGES:
        return eyed(IMAGES[shape], layers, attn)
    if shape != "gqa":
        config = GPT2Config(
            n_layer=layers, vocab_size=1024 if shape == "gpt2" else 50257, bos_token_id=0,
            n_positions=length + 64, attn_implementation=attn, eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=length + 64,
        attn_implementation=attn, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def eyed(side: int, layers: int, attn: str) -> torch.nn.Module:
    """A LLaVA whose decoder has the shape `gqa` and whose image makes side² tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        image_size=14 * side, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=8192,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=1023, vision_feature_layer=-1,
        attn_implementation=attn,
    )  # fmt: skip
    return Llava(config).eval()


def pictured(side: int) -> Prompt:
    """Twenty words, an image of side² patches, and words to 64 more."""
    gen = torch.Generator().manual_seed(1)
    words = torch.randint(1, 1000, (84,), generator=gen).tolist()
    n = side * side
    ids = (0, *words[:19], *[1023] * n, *words[19:])
    pixels = torch.randn(1, 3, 14 * side, 14 * side, generator=gen)
    spans = {"bos": ((0, 1),), "needle": ((24, 32),), "image": ((20, 20 + n),)}
    return Prompt(ids, spans, inputs={"pixel_values": pixels})


def asked(shape: str, length: int) -> Prompt:
    """The prompt of a shape."""
    return pictured(IMAGES[shape]) if shape in IMAGES else prompt(length)


def prompt(length: int) -> Prompt:
    """Random tokens, some of them twice, with a short and a large span."""
    gen = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 1024, (length,), generator=gen).tolist()
    third = length // 3
    spans = {
        "bos": ((0, 1),),
        "needle": ((third, third + 8),),
        "image": ((third, 2 * third),),
    }
    return Prompt((0, *tokens[1:]), spans)


@torch.no_grad()
def way(name: str, shape: str, layers: int, length: int) -> Callable[[], torch.Tensor]:
    """A function that runs one way once and gives the logits."""
    if name in PEERS:
        return peer(name, shape, layers, length)
    model = load(make(shape, layers, length))
    batch = Batch.of([asked(shape, length)])
    model.structure
    if name == "bare":
        return lambda: bare(model, batch)
    if name == "seam":

        def opened() -> torch.Tensor:
            with model.observe(lambda call: None):
                return bare(model, batch)

        return opened

    def reading() -> torch.Tensor:
        from interp.engine import read_with_output

        return read_with_output(model, batch, OURS[name])[1].logits  # type: ignore[attr-defined]

    return reading


@torch.no_grad()
def bare(model: Model, batch: Batch) -> torch.Tensor:
    """The model's own forward."""
    return model.hf(**batch.inputs()).logits  # type: ignore[no-any-return]


def peer(name: str, shape: str, layers: int, length: int) -> Callable[[], torch.Tensor]:
    """The same prompt through another tool."""
    batch = Batch.of([asked(shape, length)])
    hf = make(shape, layers, length, "eager")
    if name == "eager":

        @torch.no_grad()
        def eager() -> torch.Tensor:
            out = hf(**batch.inputs(), output_attentions=True, use_cache=False)
            assert len(out.attentions) >= layers
            return out.logits  # type: ignore[no-any-return]

        return eager
    if name == "transformer_lens":
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        bridge = build_bridge_from_module(
            hf, type(hf).__name__, hf_config=hf.config, model_name="bench"
        )

        @torch.no_grad()
        def lens() -> torch.Tensor:
            logits, cache = bridge.run_with_cache(
                batch.input_ids, names_filter=lambda n: n.endswith("attn.hook_pattern")
            )
            assert len(cache) >= layers
            return logits  # type: ignore[no-any-return]

        return lens
    from nnsight import NNsight

    traced = NNsight(hf)

    @torch.no_grad()
    def sight() -> torch.Tensor:
        kept = []
        with traced.trace(input_ids=batch.input_ids, use_cache=False):
            for i in range(layers):
                block = traced.transformer.h[i].attn if shape != "gqa" else (
                    traced.model.layers[i].self_attn
                )  # fmt: skip
                kept.append(block.output[1].save())
            logits = traced.output.logits.save()
        assert kept[0].shape[-1] == length
        return logits  # type: ignore[no-any-return]

    return sight


def fits(name: str, shape: str, layers: int, length: int) -> bool:
    """Whether a way that keeps whole patterns fits into 12 GB."""
    heads = 16 if shape == "gqa" else 12
    if shape in IMAGES:
        return name not in ("transformer_lens", "nnsight")
    return name not in PEERS or (layers + 3) * heads * length**2 * 4 < 12e9


def timed(shape: str, layers: int, length: int, ways: list[str], repeats: int) -> dict[str, float]:
    """Median ratio to the bare forward of each way."""
    functions = {n: way(n, shape, layers, length) for n in ways if fits(n, shape, layers, length)}
    expected = functions["bare"]()
    for name, function in functions.items():
        out = function()
        if name not in PEERS and not torch.equal(out, expected):
            raise SystemExit(f"{name} changed the logits of {shape} at T = {length}")
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        floor = 0.0
        for name, function in functions.items():
            gc.collect()
            if name not in PEERS:
                start = time.perf_counter()
                functions["bare"]()
                floor = time.perf_counter() - start
            start = time.perf_counter()
            function()
            ratios[name].append((time.perf_counter() - start) / floor)
    return {name: statistics.median(r) for name, r in ratios.items()}


def memory(shape: str, layers: int, length: int, name: str) -> float | None:
    """Growth of the peak resident set in MB, measured in a process of its own."""
    if not fits(name, shape, layers, length):
        return None
    command = [sys.executable, __file__, "--child", json.dumps([name, shape, layers, length])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def child(spec: str) -> None:
    """What `memory` runs: one forward, and how far the peak rose."""
    name, shape, layers, length = json.loads(spec)
    torch.set_num_threads(1)
    function = way(name, shape, layers, length)
    way(name, shape, layers, 128)()  # imports and lazily made tables are not the method's cost
    gc.collect()
    # Freed memory goes back first and the peak is set back to here (Linux), or earlier work would
    # hide what the forward needs.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    print((status("VmHWM") - before) / 1024)


def status(field: str) -> int:
    """A size of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1])


def decoding(shape: str, layers: int, length: int, repeats: int, steps: int = 32) -> float:
    """Median ratio of generation with the retrieval reading to plain generation."""
    model = load(make(shape, layers, length))
    batch = Batch.of([asked(shape, length)], side="left")
    tower = model.tower("text")
    ratios = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        plain = generate(model, batch, max_new_tokens=steps)
        middle = time.perf_counter()
        reader = StepReader(tower, batch)
        read_tokens = generate(model, batch, max_new_tokens=steps, observer=reader)
        reader.stacked()
        end = time.perf_counter()
        assert plain == read_tokens
        ratios.append((end - middle) / (middle - start))
    return statistics.median(ratios[1:])


def accuracy(shape: str, layers: int) -> float:
    """Largest difference of any statistic from the full matrix, T = 512, float32."""
    model = load(make(shape, layers, 512))
    item = asked(shape, 512)
    length = len(item)
    batch = Batch.of([item])
    found = read(model, batch, EVERYTHING)
    with torch.no_grad():
        out = make(shape, layers, length, "eager")(**batch.inputs(), output_attentions=True)
    p = torch.stack(out.attentions, 1).double()[0]  # [layer, head, query, key]
    i = torch.arange(length)
    pairs = Same(1).pairs(item)
    rows = sorted(set(pairs[:, 0].tolist()))
    sums = torch.stack(
        [p[..., q, pairs[pairs[:, 0] == q, 1]].sum(-1) for q in rows], -1
    )  # fmt: skip
    (needle,), (image,) = item.spans["needle"], item.spans["image"]
    expected = {
        "sink": p[..., 0].mean(-1),
        "previous": p[..., i[1:], i[:-1]].mean(-1),
        "induction": sums.mean(-1),
        "needle": p[..., slice(*needle)].sum(-1).mean(-1),
        "span": p[..., slice(*image)].sum(-1).mean(-1),
        "distance": (p * (i[:, None] - i[None])).sum(-1).mean(-1),
        "entropy": -(p * p.clamp_min(1e-300).log()).sum(-1).mean(-1),
        "keys": p.sum(-2) / (length - i),
    }
    worst = 0.0
    for name, value in expected.items():
        gap = (found[name].values[0].double() - value).abs()
        # Distances are in tokens: their scale is T.
        worst = max(worst, float((gap / (length if name == "distance" else 1)).max()))
    return worst


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,4096,8192,16384")
    parser.add_argument("--shapes", default="gpt2,gqa,gpt2-small")
    parser.add_argument("--ways", default=",".join(TITLES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--section", default="", help="name of a part of the page of its own")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    torch.set_num_threads(args.threads)
    every_length = [int(x) for x in args.lengths.split(",")]
    every_way = args.ways.split(",")
    lines = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"torch {torch.__version__}, {args.threads} thread, {platform.machine()}, "
        f"float32, median of {args.repeats}")  # fmt: skip
    for shape in args.shapes.split(","):
        whole = shape == "gpt2-small"
        layers = 12 if whole else args.layers
        lengths = [4096] if whole else every_length
        if shape in IMAGES:
            lengths = [len(pictured(IMAGES[shape]))]
        ways = [w for w in every_way if not (whole and w in PEERS)]
        table: dict[str, dict[int, str]] = {name: {} for name in ways}
        for length in lengths:
            # Long forwards are timed less often: their ratios vary less.
            repeats = max(2, args.repeats if length <= 4096 else args.repeats // 2)
            ratios = timed(shape, layers, length, ways, repeats)
            for name in ways:
                cell = f"{ratios[name]:.2f}" if name in ratios else "out"
                if not args.no_memory and name in ratios:
                    grown = memory(shape, layers, length, name)
                    cell += " (-)" if grown is None else f" ({grown:.0f})"
                table[name][length] = cell
            print(shape, length, {n: table[n][length] for n in ways}, file=sys.stderr, flush=True)
        say()
        say(f"**{SHAPES[shape]}, {layers} layers**: "
            "time over the bare forward (MB of peak memory)")  # fmt: skip
        say()
        say("| way | " + " | ".join(f"T = {n:,}" for n in lengths) + " |")
        say("|---" * (len(lengths) + 1) + "|")
        for name in ways:
            say(f"| {TITLES[name]} | " + " | ".join(table[name][n] for n in lengths) + " |")
        say()
        at = min(4096, max(lengths))
        ratio = decoding(shape, layers, at, args.repeats)
        say(f"Retrieval scoring, T = {at:,} and 32 new tokens: {ratio:.2f} x plain generation.")
        worst = accuracy(shape, layers)
        say(
            "Largest difference of any statistic from the full matrix (T = 512, or that of the "
            f"image): {worst:.1e}."
        )
    if args.write:
        put(f"readings {args.section}".strip(), lines)


if __name__ == "__main__":
    main()
