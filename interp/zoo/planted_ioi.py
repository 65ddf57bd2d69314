"""A toy indirect-object circuit in which every role and every effect is known exactly.

On `BOS f A f B f S f END`, where S is A or B again, the model answers with the other name:

    L0H0   duplicate-token: at the second S, writes that name to `dup`
    L1H0   S-inhibition: at END, moves `dup` to `inh`
    L2H0, L2H1, L2H2   name movers of gain 6, 3 and -2.4: at END, attend to the names that are not
                       inhibited, and add their gain to the attended name's logit
    L3H0   backup name mover of gain 4.8, silent while the `out` block at END is filled
    L0H1, L0H2   a previous-token head and a BOS sink without effect; the other heads are zero

The roles are those that Wang et al. (2022) found in GPT-2 small. All effects below are on the
logit difference between the right and the repeated name, 6.6 on every clean prompt.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from interp.errors import InputError
from interp.headid import HeadId
from interp.prompts import Prompt, PromptPair
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.attention_only import AttentionOnlyForCausalLM
from interp.zoo.planted_parts import HeadPlan, Layout, Links, Stream, assemble, word_tokenizer

BOS, END = 0, 1
N_NAMES = N_FILLERS = 6
NAMES = range(2, 2 + N_NAMES)
FILLERS = range(NAMES.stop, NAMES.stop + N_FILLERS)
VOCAB = FILLERS.stop
POSITIONS = 16
BETA = 30.0
# The backup mover turns off in proportion to what the movers wrote, measured in the first gain.
UNIT = 6.0

DUPLICATE, PREVIOUS, SINK = (HeadId(0, head) for head in range(3))
INHIBITION = HeadId(1, 0)
MOVER, SECOND, NEGATIVE = (HeadId(2, head) for head in range(3))
BACKUP = HeadId(3, 0)
ROLES = (DUPLICATE, INHIBITION, MOVER, SECOND, NEGATIVE, BACKUP)
LOGIT_DIFF = 6.6


def _stream() -> Stream:
    blocks = {"tok": VOCAB, "pos": POSITIONS, "prev": VOCAB}
    blocks |= {"dup": VOCAB, "inh": VOCAB, "out": VOCAB, "one": 1}
    residual = Layout(blocks, 88)
    features = Layout({"tok": VOCAB, "pos": POSITIONS, "name": 1, "dup": 1, "bos": 1}, 64)
    values = Layout({"tok": VOCAB, "dup": VOCAB}, 64)
    tokens, positions = torch.zeros(VOCAB, 88), torch.zeros(POSITIONS, 88)
    tokens[:, residual["tok"]] = torch.eye(VOCAB)
    tokens[:, residual["one"]] = 1
    positions[:, residual["pos"]] = torch.eye(POSITIONS)
    unembedding = torch.zeros(VOCAB, 88)
    unembedding[:, residual["out"]] = torch.eye(VOCAB)
    return Stream(residual, features, values, tokens, positions, unembedding)


def _marks(tokens: Sequence[int]) -> Tensor:
    """[1, d_vocab]: one at the given tokens."""
    marks = torch.zeros(1, VOCAB)
    marks[0, list(tokens)] = 1
    return marks


def _plans() -> list[list[HeadPlan]]:
    at_end, is_bos, is_name = _marks([END]), _marks([BOS]), _marks(NAMES)
    names = torch.diag(is_name[0])
    to_bos: Links = {("bos", "tok"): is_bos}
    fallback: Links = {("bos", "one"): BETA / 2}
    duplicate = HeadPlan(
        query={("tok", "tok"): BETA, ("pos", "pos"): -2 * BETA, **fallback},
        key={("tok", "tok"): 1.0, ("pos", "pos"): 1.0, **to_bos},
        value={("tok", "tok"): names},
        output={("dup", "tok"): 1.0},
    )
    before = torch.zeros(POSITIONS, POSITIONS)
    before[[0, *range(POSITIONS - 1)], range(POSITIONS)] = 1
    previous = HeadPlan(
        query={("pos", "pos"): BETA * before},
        key={("pos", "pos"): 1.0},
        value={("tok", "tok"): 1.0},
        output={("prev", "tok"): 1.0},
    )
    sink = HeadPlan(query={("bos", "one"): BETA}, key=to_bos)
    inhibition = HeadPlan(
        query={("dup", "tok"): BETA * at_end, **fallback},
        key={("dup", "dup"): torch.ones(1, VOCAB), **to_bos},
        value={("dup", "dup"): 1.0},
        output={("inh", "dup"): 1.0},
    )

    def mover(gain: float) -> HeadPlan:
        return HeadPlan(
            query={("name", "tok"): BETA * at_end, ("tok", "inh"): -2 * BETA, **fallback},
            key={("name", "tok"): is_name, ("tok", "tok"): names, **to_bos},
            value={("tok", "tok"): names},
            output={("out", "tok"): gain},
        )

    backup = mover(4.8)
    silenced: Links = {**backup.query, ("name", "out"): torch.full((1, VOCAB), -1.5 * BETA / UNIT)}
    idle = HeadPlan()
    return [
        [duplicate, previous, sink, idle],
        [inhibition, idle, idle, idle],
        [mover(UNIT), mover(3.0), mover(-2.4), idle],
        [replace(backup, query=silenced), idle, idle, idle],
    ]


def _truth() -> Truth:
    every = [HeadId(layer, head) for layer in range(4) for head in range(4)]

    def table(*effects: float) -> dict[HeadId, float]:
        return dict.fromkeys(every, 0.0) | dict(zip(ROLES, effects, strict=True))

    effects = {
        "zero-ablation": table(-8.8, -8.8, -1.2, -3.0, 2.4, 0.0),
        "noise-abc": table(-8.8, -8.8, -6.0, -3.0, 2.4, 0.0),
        "noise-flip": table(-13.2, -13.2, -12.0, -6.0, 4.8, 0.0),
        "denoise-abc": table(0.0, 0.0, 6 / 6.6, 3 / 6.6, -2.4 / 6.6, 0.0),
        "direct-effect": table(0.0, 0.0, 6.0, 3.0, -2.4, 0.0),
    }
    return Truth(
        heads={
            "duplicate-token": frozenset({DUPLICATE}),
            "previous-token": frozenset({PREVIOUS}),
            "s-inhibition": frozenset({INHIBITION}),
            "name-mover": frozenset({MOVER, SECOND}),
            "negative-name-mover": frozenset({NEGATIVE}),
            "backup-name-mover": frozenset({BACKUP}),
        },
        scores=effects,
        task={name: ("ioi", {}) for name in ("duplicate-token", "previous-token", *effects)},
        note="effects are on the logit difference, 6.6 clean; denoise-abc is a fraction of it",
    )


def _words() -> list[str]:
    names = [f"name{i}" for i in range(1, N_NAMES + 1)]
    return ["<bos>", "<end>", *names, *(f"f{i}" for i in range(1, N_FILLERS + 1))]


def planted_ioi(*, junk: int = 0, rotate: bool = False, seed: int = 0) -> ZooModel:
    """Build the circuit of the module docstring.

    Args:
        junk: number of idle heads (at most 8) to fill with random weights; they write to the
            `prev` block, which no head reads, so no effect changes.
        rotate: whether to turn the residual stream by a random orthogonal matrix: no dimension
            means anything any more, and every effect stays as it is.
        seed: seed of junk and rotation.

    Raises:
        InputError: there are fewer idle heads than `junk`.
    """
    stream, layers = _stream(), _plans()
    generator = torch.Generator().manual_seed(seed)
    idle = [(i, j) for i, plans in enumerate(layers) for j, p in enumerate(plans) if not p.query]
    if not 0 <= junk <= len(idle):
        raise InputError(f"junk must be between 0 and {len(idle)} heads; got {junk}")
    for layer, head in idle[:junk]:
        layers[layer][head] = HeadPlan(
            query={("tok", "tok"): 2 * torch.randn(VOCAB, VOCAB, generator=generator)},
            key={("tok", "tok"): torch.randn(VOCAB, VOCAB, generator=generator)},
            value={("tok", "tok"): torch.randn(VOCAB, VOCAB, generator=generator)},
            output={("prev", "tok"): torch.randn(VOCAB, VOCAB, generator=generator)},
        )
    model = assemble(stream, layers)
    if rotate:
        _rotate(model, generator)
    return ZooModel(model, _truth(), word_tokenizer(_words()))


def _rotate(model: AttentionOnlyForCausalLM, generator: torch.Generator) -> None:
    """Turn the residual stream of a model in place; its function stays the same."""
    width = model.config.hidden_size
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
    turn: Tensor = torch.linalg.qr(noise).Q

    def turned(weight: Tensor) -> Tensor:
        return (weight.double() @ turn).float()

    with torch.no_grad():
        for table in (model.model.embed_tokens, model.model.embed_positions, model.lm_head):
            table.weight.copy_(turned(table.weight))
        for layer in model.model.layers:
            attention = layer.get_submodule("self_attn")
            for name in ("q_proj", "k_proj", "v_proj"):
                reader = attention.get_submodule(name).get_parameter("weight")
                reader.copy_(turned(reader))
            writer = attention.get_submodule("o_proj").get_parameter("weight")
            writer.copy_(turned(writer.T).T)
    model.config.residual_blocks = {}


def ioi_pairs(n: int, *, corruption: str = "abc", seed: int = 0) -> list[PromptPair]:
    """Prompts of the circuit with their corruptions, all of nine tokens.

    Spans: `bos`, `io`, `s1`, `s2`, `end`. The answer is the name that occurs once; `meta["wrong"]`
    is the repeated name. Corrupted prompts keep both from the clean one.

    Args:
        n: number of pairs.
        corruption: `abc` puts three new names in place of the names; `flip` repeats the other name.
        seed: seed of names and fillers.

    Raises:
        InputError: the corruption is none of these.
    """
    if corruption not in ("abc", "flip"):
        raise InputError(f"corruption must be 'abc' or 'flip'; got {corruption!r}")
    draw = random.Random(seed)
    pairs = []
    for i in range(n):
        first, second, *new = draw.sample(NAMES, 5)
        repeats_first = draw.random() < 0.5
        s, io = (first, second) if repeats_first else (second, first)
        fillers = draw.choices(FILLERS, k=4)
        names: dict[str, tuple[int, ...]] = {"clean": (first, second, s)}
        names["other"] = tuple(new) if corruption == "abc" else (first, second, io)
        spans = {"bos": ((0, 1),), "s2": ((6, 7),), "end": ((8, 9),)}
        spans |= {"s1": ((2, 3),), "io": ((4, 5),)} if repeats_first else {}
        spans |= {} if repeats_first else {"io": ((2, 3),), "s1": ((4, 5),)}
        clean, other = (
            Prompt(
                (BOS, fillers[0], a, fillers[1], b, fillers[2], c, fillers[3], END),
                spans,
                id=f"{i}-{kind}",
                answer=(io,),
                meta={"wrong": s},
            )
            for kind, (a, b, c) in names.items()
        )
        pairs.append(PromptPair(clean, other))
    return pairs


@ZOO.register("planted-ioi")
def _plain() -> ZooModel:
    """A toy indirect-object circuit in which every role and every effect is known exactly."""
    return planted_ioi()


@ZOO.register("planted-ioi-rotated")
def _rotated() -> ZooModel:
    """The indirect-object circuit with six random heads, its stream turned at random."""
    return planted_ioi(junk=6, rotate=True)
