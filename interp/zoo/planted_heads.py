"""Two layers of five textbook heads, one of each kind.

    layer 0   previous-token · duplicate-token · BOS sink · uniform · self
    layer 1   induction · local window of 4 · BOS sink · uniform · previous-token without output

L0H0 writes the previous token, from which L1H0 composes its keys (Elhage et al. 2021, "induction
heads"); L1H0 alone writes to the logits. All other heads have no output.
"""

import math

from interp.headid import HeadId
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_parts import assemble, numbered_words, word_tokenizer

L0_PREVIOUS, L0_DUPLICATE, L0_SINK, L0_UNIFORM, L0_SELF = (HeadId(0, h) for h in range(5))
L1_INDUCTION, L1_LOCAL, L1_SINK, L1_UNIFORM, L1_PREVIOUS = (HeadId(1, h) for h in range(5))


def planted_heads(
    *,
    vocab_size: int = 64,
    max_positions: int = 512,
    gain: float = 10.0,
    n_kv_heads: int | None = None,
    length: int = 20,
    repeats: int = 4,
) -> ZooModel:
    """Build the model of the module docstring.

    The truth holds on BOS and `repeats` copies of `length` different tokens. There, heads that
    park on BOS for want of a match do so on the first copy only, at most (length + 1) / T of
    the queries, and are not sinks at a threshold of 0.3. On text without repetition they are
    sinks as well: L0H1 and L1H0 then give BOS all their attention, as the sinks do.

    Args:
        vocab_size: tokens, BOS (id 0) among them.
        max_positions: longest prompt.
        gain: logit that L1H0 gives to the token it attends to.
        n_kv_heads: key-value heads of a layer: 5 (the default) or 1.
        length: tokens of one copy in the task of the truth; more than the window of 4.
        repeats: copies in the task of the truth.
    """
    kit = Kit(vocab_size, max_positions)
    layers = [
        [
            kit.previous_token(),
            kit.duplicate_token(),
            kit.bos_sink(),
            kit.uniform(),
            kit.self_token(),
        ],
        [
            kit.induction(gain=gain),
            kit.local_window(),
            kit.bos_sink(),
            kit.uniform(),
            kit.previous_token(writes=""),
        ],
    ]
    return ZooModel(
        assemble(kit.stream, layers, n_kv_heads=n_kv_heads),
        _truth(length, repeats),
        word_tokenizer(numbered_words(vocab_size)),
    )


def _truth(length: int, repeats: int) -> Truth:
    """Heads and exact scores on BOS + `repeats` copies of `length` different tokens.

    Scores are means over the queries that have a target: of the mass on the position before
    (previous-token), on all earlier copies (duplicate-token), on all tokens after earlier copies
    (induction); for sinks the mean over all queries of the mass on BOS.
    """
    total = 1 + length * repeats
    harmonic = math.fsum(1 / (i + 1) for i in range(total))
    again = range(1 + length, total)
    per_copy = {i: (i - 1) // length for i in again}
    # After an earlier copy of the query at i stands a position <= i, so every copy counts.
    spread = math.fsum(per_copy[i] / (i + 1) for i in again) / len(again)
    first_row = 1 / (total - 1)
    local = (1 / 2 + 1 / 3 + (total - 3) / 4) / (total - 1)
    zero = dict.fromkeys((HeadId(layer, head) for layer in range(2) for head in range(5)), 0.0)
    uniform = (L0_UNIFORM, L1_UNIFORM)
    sinks, parked = (L0_SINK, L1_SINK), (L0_DUPLICATE, L1_INDUCTION)
    # A head that looks at BOS from position 1 looks at the position before, once.
    previous = (
        zero
        | dict.fromkeys(sinks + parked, first_row)
        | dict.fromkeys(uniform, (harmonic - 1) / (total - 1))
        | {L0_PREVIOUS: 1.0, L1_PREVIOUS: 1.0, L1_LOCAL: local}
    )
    sink = (
        dict.fromkeys(zero, 2 / total)
        | dict.fromkeys(sinks, 1.0)
        | dict.fromkeys(parked, (length + 1) / total)
        | dict.fromkeys(uniform, harmonic / total)
        | {L0_SELF: 1 / total, L1_LOCAL: (1 + 1 / 2 + 1 / 3 + 1 / 4) / total}
    )
    copies = zero | dict.fromkeys(uniform, spread)
    repeated = ("repeated-tokens", {"length": length, "repeats": repeats})
    return Truth(
        heads={
            "previous-token": frozenset({L0_PREVIOUS, L1_PREVIOUS}),
            "duplicate-token": frozenset({L0_DUPLICATE}),
            "induction": frozenset({L1_INDUCTION}),
            "sink": frozenset(sinks),
            "retrieval": frozenset({L1_INDUCTION}),
        },
        scores={
            "previous-token": previous,
            "duplicate-token": copies | {L0_DUPLICATE: 1.0},
            "induction": copies | {L1_INDUCTION: 1.0},
            "sink": sink,
            "retrieval": zero | {L1_INDUCTION: 1.0},
        },
        task=dict.fromkeys(("previous-token", "duplicate-token", "induction", "sink"), repeated)
        | {"retrieval": ("needle", {})},
        note="weights written by formula; attention is one-hot to 2e-28",
    )


@ZOO.register("planted-heads")
def _default() -> ZooModel:
    """Two layers of five textbook heads, one of each kind."""
    return planted_heads()
