"""Attention sinks of every kind, and a model in which there is nothing to find.

A sink is a key that many queries attend to whatever they hold. It may be BOS, another position or
a delimiter token; its value may be zero, so that the head does nothing, or a bias (Xiao et al.
2023; Gu et al. 2024).
"""

import torch

from interp.headid import HeadId
from interp.zoo import ZOO, Truth, ZooModel
from interp.zoo.planted_kit import Kit
from interp.zoo.planted_parts import assemble, numbered_words, word_tokenizer

DELIMITER = 1
REPEATED = ("repeated-tokens", {"length": 20, "repeats": 4})


def planted_sink(
    *,
    vocab_size: int = 64,
    max_positions: int = 512,
    place: int = 4,
    effect_token: int = 2,
    effect: float = 3.0,
    n_kv_heads: int | None = None,
) -> ZooModel:
    """Four kinds of sink over four heads that are none.

        layer 0   BOS, value zero · BOS, with effect · position `place` · delimiter token
        layer 1   uniform · self · previous-token without output · local window of 4

    L0H1 alone reaches the logits: it adds `effect` to that of `effect_token`, at every position.
    L0H2 and L0H3 attend to BOS until their position or the delimiter (id 1) has come. The self and
    previous-token heads give the last few keys all the attention those can get: sinks only to a
    reader that forgets how few queries see them.

    Args:
        vocab_size: tokens, BOS (id 0) and the delimiter (id 1) among them.
        max_positions: longest prompt.
        place: the absolute position to which L0H2 sinks; at least 1.
        effect_token: token whose logit L0H1 raises.
        effect: by how much.
        n_kv_heads: key-value heads of a layer: 1, 2 or 4 (the default).
    """
    kit = Kit(vocab_size, max_positions)
    raised = effect * torch.nn.functional.one_hot(torch.tensor(effect_token), vocab_size).float()
    layers = [
        [
            kit.bos_sink(),
            kit.bos_bias(raised),
            kit.place_sink(place),
            kit.token_sink(DELIMITER),
        ],
        [
            kit.uniform(),
            kit.self_token(),
            kit.previous_token(writes=""),
            kit.local_window(),
        ],
    ]
    sinks = [HeadId(0, head) for head in range(4)]
    truth = Truth(
        heads={
            "previous-token": frozenset({HeadId(1, 2)}),
            "duplicate-token": frozenset(),
            "induction": frozenset(),
            "sink": frozenset(sinks),
            "retrieval": frozenset(),
        },
        scores={
            "previous-token": {HeadId(1, 2): 1.0},
            "sink": dict.fromkeys(sinks[:3], 1.0),
            "zero-ablation": {sinks[0]: 0.0, sinks[1]: -effect, sinks[2]: 0.0, sinks[3]: 0.0},
        },
        task=dict.fromkeys(("previous-token", "duplicate-token", "induction", "sink"), REPEATED)
        | {"retrieval": ("needle", {})},
        note="weights written by formula; a sink's score is that of its best position",
    )
    words = numbered_words(vocab_size)
    words[DELIMITER] = "<sep>"
    return ZooModel(
        assemble(kit.stream, layers, n_kv_heads=n_kv_heads), truth, word_tokenizer(words)
    )


def planted_nothing(
    *, vocab_size: int = 64, max_positions: int = 512, seed: int = 0, n_kv_heads: int | None = None
) -> ZooModel:
    """Two layers of a uniform head, a self head and two heads with faint random likings.

    No detector may find a head here. The random heads write noise to the logits, so the model
    answers nothing; the self heads tempt readers of the last few keys.

    Args:
        vocab_size: tokens, BOS (id 0) among them.
        max_positions: longest prompt.
        seed: seed of the random heads.
        n_kv_heads: key-value heads of a layer: 1, 2 or 4 (the default).
    """
    kit = Kit(vocab_size, max_positions)
    layers = [
        [
            kit.uniform(),
            kit.self_token(),
            kit.shapeless(2 * layer + 4 * seed),
            kit.shapeless(2 * layer + 4 * seed + 1),
        ]
        for layer in range(2)
    ]
    names = ("previous-token", "duplicate-token", "induction", "sink", "retrieval")
    truth = Truth(
        heads=dict.fromkeys(names, frozenset()),
        task=dict.fromkeys(names[:4], REPEATED) | {"retrieval": ("needle", {})},
        note="no head attends by content, order or position",
    )
    return ZooModel(
        assemble(kit.stream, layers, n_kv_heads=n_kv_heads),
        truth,
        word_tokenizer(numbered_words(vocab_size)),
    )


@ZOO.register("planted-sink")
def _sink() -> ZooModel:
    """Four kinds of attention sink among heads that are none."""
    return planted_sink()


@ZOO.register("planted-nothing")
def _nothing() -> ZooModel:
    """A model in which there is nothing to find."""
    return planted_nothing()
