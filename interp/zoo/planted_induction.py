"""The induction circuit of two layers, with decoys; and the same circuit as a retrieval head.

A previous-token head writes each token's predecessor, an induction head composes its keys from it
and copies the token that followed an earlier copy (Elhage et al. 2021; Olsson et al. 2022). Decoys
attend exactly as the induction head does, but add nothing to the logits, or lower them.
"""

from interp.headid import HeadId
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_parts import assemble, numbered_words, word_tokenizer

# Heads that park on BOS for want of a match do so on the first of four copies only.
REPEATED = ("repeated-tokens", {"length": 20, "repeats": 4})
PREVIOUS = HeadId(0, 0)


def planted_induction(
    *,
    vocab_size: int = 64,
    max_positions: int = 512,
    gain: float = 10.0,
    decoy_gain: float = -4.0,
    n_kv_heads: int | None = None,
) -> ZooModel:
    """A previous-token head, an induction head and two decoys among idle heads.

        layer 0   previous-token · self · local window of 4 | BOS sink · uniform · BOS sink
        layer 1   BOS sink · uniform · self | induction · silent decoy · lowering decoy

    On repeated tokens the logit of the right next token is `gain + decoy_gain`, all others are 0.
    With `n_kv_heads=2` the heads on each side of the bar share keys and values, and the two sides
    differ in both: taking the wrong one changes patterns and logits.

    Args:
        vocab_size: tokens, BOS (id 0) among them.
        max_positions: longest prompt.
        gain: logit that the induction head gives to the token it attends to.
        decoy_gain: the same for L1H5; must be below zero for a truth without it.
        n_kv_heads: key-value heads of a layer: 1, 2, 3 or 6 (the default).
    """
    kit = Kit(vocab_size, max_positions)
    layers = [
        [
            kit.previous_token(),
            kit.self_token(),
            kit.local_window(),
            kit.bos_sink(),
            kit.uniform(carries=False),
            kit.bos_sink(),
        ],
        [
            kit.bos_sink(),
            kit.uniform(carries=False),
            kit.self_token(carries=False),
            kit.induction(gain=gain),
            kit.induction(writes=""),
            kit.induction(gain=decoy_gain),
        ],
    ]
    induction, silent, negative = (HeadId(1, head) for head in (3, 4, 5))
    sinks = frozenset({HeadId(0, 3), HeadId(0, 5), HeadId(1, 0)})
    matching = frozenset({silent, induction, negative})
    truth = Truth(
        heads={
            "previous-token": frozenset({PREVIOUS}),
            "duplicate-token": frozenset(),
            "induction": frozenset({induction}),
            "sink": sinks,
            # The retrieval score reads attention only: the decoys look where the copy comes from.
            "retrieval": matching,
        },
        scores={
            "previous-token": {PREVIOUS: 1.0},
            "prefix-matching": dict.fromkeys(matching, 1.0),
            "copying": {induction: 1.0, negative: -1.0},
            "sink": dict.fromkeys(sinks, 1.0),
            "retrieval": dict.fromkeys(matching, 1.0),
        },
        task=dict.fromkeys(("previous-token", "duplicate-token", "induction", "sink"), REPEATED)
        | {"retrieval": ("needle", {})},
        note="weights written by formula; decoys match prefixes but do not copy",
    )
    return ZooModel(
        assemble(kit.stream, layers, n_kv_heads=n_kv_heads),
        truth,
        word_tokenizer(numbered_words(vocab_size)),
    )


def planted_retrieval(
    *,
    vocab_size: int = 128,
    max_positions: int = 2048,
    gain: float = 10.0,
    n_kv_heads: int | None = None,
    copies: bool = True,
) -> ZooModel:
    """The induction circuit with room for a needle in a haystack.

        layer 0   previous-token · BOS sink · uniform · self
        layer 1   induction, the retrieval head · BOS sink · local window of 4 · uniform

    On `BOS haystack KEY needle haystack KEY` greedy decoding continues with the needle, provided
    that KEY and the needle's tokens occur nowhere else. Values are wider than keys (d_v > d_head).

    Args:
        vocab_size: tokens, BOS (id 0) among them.
        max_positions: longest prompt with its continuation.
        gain: logit that the retrieval head gives to the token it attends to.
        n_kv_heads: key-value heads of a layer: 1, 2 or 4 (the default).
        copies: whether the head writes what it attends to; without, no generation succeeds, and
            a retrieval score has nothing to rest on.
    """
    kit = Kit(vocab_size, max_positions)
    layers = [
        [kit.previous_token(), kit.bos_sink(), kit.uniform(), kit.self_token()],
        [
            kit.induction(gain=gain, writes="out" if copies else ""),
            kit.bos_sink(),
            kit.local_window(),
            kit.uniform(),
        ],
    ]
    head = HeadId(1, 0)
    found = frozenset({head}) if copies else frozenset()
    every = [HeadId(layer, index) for layer in range(2) for index in range(4)]
    truth = Truth(
        heads={
            "previous-token": frozenset({PREVIOUS}),
            "duplicate-token": frozenset(),
            "induction": found,
            "sink": frozenset({HeadId(0, 1), HeadId(1, 1)}),
            "retrieval": found,
        },
        scores={"retrieval": dict.fromkeys(every, 0.0) | {head: 1.0}} if copies else {},
        task=dict.fromkeys(("previous-token", "duplicate-token", "induction", "sink"), REPEATED)
        | {"retrieval": ("needle", {})},
        note="weights written by formula"
        if copies
        else "weights written by formula; attends to the needle but cannot say it",
    )
    return ZooModel(
        assemble(kit.stream, layers, n_kv_heads=n_kv_heads),
        truth,
        word_tokenizer(numbered_words(vocab_size)),
    )


@ZOO.register("planted-induction")
def _induction() -> ZooModel:
    """The induction circuit of two layers: a previous-token and an induction head, and decoys."""
    return planted_induction()


@ZOO.register("planted-induction-gqa")
def _induction_gqa() -> ZooModel:
    """The induction circuit with three query heads to a key-value head."""
    return planted_induction(n_kv_heads=2)


@ZOO.register("planted-retrieval")
def _retrieval() -> ZooModel:
    """The induction circuit with room for a needle: one retrieval head."""
    return planted_retrieval()


@ZOO.register("planted-retrieval-broken")
def _retrieval_broken() -> ZooModel:
    """The same head looks at the needle and does not copy it: no retrieval head."""
    return planted_retrieval(copies=False)
