"""Parts for planting heads by formula: an address book for the residual stream, and head plans.

A planted residual stream is cut into named blocks (token, previous token, output, …). A head is
four lists of links between blocks, so that every attention score and every effect follows from
arithmetic. All numbers are small multiples of powers of two: scores are exact in float32.

The best key of a row always scores near zero and every other key at least `beta / 2` less (a shift
by a constant changes no softmax), so that patterns are one-hot to exp(-beta / 2), about 2e-28, and
log-sum-exps keep their precision.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError
from interp.zoo.attention_only import AttentionOnlyConfig, AttentionOnlyForCausalLM

Links = Mapping[tuple[str, str], Tensor | float]


@dataclass(frozen=True)
class Layout:
    """Named blocks of a vector, one after another.

    Attributes:
        sizes: block name to its number of dimensions, in order.
        width: length of the whole vector; the blocks' total when 0, else padded up to it.
    """

    sizes: Mapping[str, int]
    width: int = 0

    def __post_init__(self) -> None:
        total = sum(self.sizes.values())
        if self.width and self.width < total:
            raise InputError(f"a layout of {total} dimensions must fit its width; got {self.width}")
        object.__setattr__(self, "width", self.width or total)

    def __getitem__(self, name: str) -> slice:
        start = 0
        for block, size in self.sizes.items():
            if block == name:
                return slice(start, start + size)
            start += size
        raise KeyError(name)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Block name to its half-open range."""
        return {name: (self[name].start, self[name].stop) for name in self.sizes}

    def widened(self, width: int) -> "Layout":
        """The same blocks in a longer vector."""
        return Layout(self.sizes, width)


def linked(rows: Layout, columns: Layout, links: Links) -> Tensor:
    """The matrix [rows, columns] of links between blocks.

    Args:
        rows: layout of the result of the map.
        columns: layout of its argument.
        links: (row block, column block) to a matrix, or to a number for that multiple of the
            identity (or of ones, where one of the blocks has a single dimension).
    """
    matrix = torch.zeros(rows.width, columns.width)
    for (row, column), link in links.items():
        block = matrix[rows[row], columns[column]]
        if isinstance(link, Tensor) or 1 in block.shape:
            block += link
        else:
            block += link * torch.eye(*block.shape)
    return matrix


@dataclass(frozen=True)
class HeadPlan:
    """One head as links.

    Attributes:
        query: (key feature, residual block) links; their products with the key are the scores.
        key: (key feature, residual block) links.
        value: (value feature, residual block) links.
        output: (residual block, value feature) links.
    """

    query: Links = field(default_factory=dict)
    key: Links = field(default_factory=dict)
    value: Links = field(default_factory=dict)
    output: Links = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """The layouts and tables that all heads of a planted model share.

    Attributes:
        residual: blocks of the residual stream.
        features: blocks of a query or key.
        values: blocks of a value.
        tokens: [d_vocab, d_model] token embeddings.
        positions: [pos, d_model] position embeddings.
        unembedding: [d_vocab, d_model] rows whose product with the final stream is a logit.
    """

    residual: Layout
    features: Layout
    values: Layout
    tokens: Tensor
    positions: Tensor
    unembedding: Tensor


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Keep the caller's random state: constructing a model draws weights that are overwritten."""
    with torch.random.fork_rng(devices=[]):
        yield


def _shared(wanted: Sequence[Links]) -> dict[tuple[str, str], Tensor | float]:
    """The links of a key-value head: those of all its query heads, which must not disagree."""
    merged: dict[tuple[str, str], Tensor | float] = {}
    for links in wanted:
        for place, link in links.items():
            known = merged.setdefault(place, link)
            if not torch.equal(torch.as_tensor(known), torch.as_tensor(link)):
                raise InputError(
                    "heads of a key-value group must agree on keys and values; two of them "
                    f"differ in {place[0]!r} from {place[1]!r}",
                    hint="place them in different groups, or use more key-value heads",
                )
    return merged


def assemble(
    stream: Stream, layers: Sequence[Sequence[HeadPlan]], *, n_kv_heads: int | None = None
) -> AttentionOnlyForCausalLM:
    """Write planned heads into a model, in eval mode.

    A key-value head gets the keys and values that any of its query heads plans: a feature that a
    query does not ask for leaves its scores as they are.

    Args:
        stream: what the heads read and write.
        layers: the plans of each layer, equally many.
        n_kv_heads: key-value heads of a layer; as many as query heads when None.

    Raises:
        InputError: query heads of one key-value head plan the same feature differently.
    """
    n_heads = len(layers[0])
    n_kv_heads = n_kv_heads or n_heads
    d_head, d_v = stream.features.width, stream.values.width
    config = AttentionOnlyConfig(
        vocab_size=stream.tokens.shape[0],
        hidden_size=stream.residual.width,
        num_hidden_layers=len(layers),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_head,
        v_head_dim=d_v,
        max_position_embeddings=stream.positions.shape[0],
        residual_blocks=stream.residual.ranges(),
    )
    with untouched_rng():
        model = AttentionOnlyForCausalLM(config)
    group = n_heads // config.num_key_value_heads
    residual, features, values = stream.residual, stream.features, stream.values
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(stream.tokens)
        model.model.embed_positions.weight.copy_(stream.positions)
        model.lm_head.weight.copy_(stream.unembedding)
        for layer, plans in zip(model.model.layers, layers, strict=True):
            attention: Any = layer.self_attn
            groups = [plans[i : i + group] for i in range(0, n_heads, group)]
            keys = [_shared([plan.key for plan in members]) for members in groups]
            carried = [_shared([plan.value for plan in members]) for members in groups]
            q = [linked(features, residual, plan.query) * math.sqrt(d_head) for plan in plans]
            o = [linked(residual, values, plan.output) for plan in plans]
            k = [linked(features, residual, key) for key in keys]
            v = [linked(values, residual, value) for value in carried]
            attention.q_proj.weight.copy_(torch.cat(q))
            attention.k_proj.weight.copy_(torch.cat(k))
            attention.v_proj.weight.copy_(torch.cat(v))
            attention.o_proj.weight.copy_(torch.cat(o, dim=1))
    model.train(False)
    return model


def bits(numbers: Tensor, n_bits: int) -> Tensor:
    """Binary code [n, n_bits] of non-negative numbers, with -1 for a zero bit.

    The product of two codes is `n_bits` when the numbers are equal and at most `n_bits - 2`
    otherwise: a match in logarithmically many dimensions.
    """
    return ((numbers[:, None] >> torch.arange(n_bits)) & 1).float() * 2 - 1


def bit_count(n: int) -> int:
    """Bits needed for the numbers 0 … n - 1, at least two (a lone bit gives too small a gap)."""
    return max(2, (n - 1).bit_length())


def numbered_words(vocab_size: int) -> list[str]:
    """The words `<bos>`, `t1`, `t2`, …, where `ti` has id i."""
    return ["<bos>", *(f"t{i}" for i in range(1, vocab_size))]


def word_tokenizer(words: Sequence[str], *, bos: int = 0) -> Any:
    """A word-level tokenizer built in memory: word i has id i, and word `bos` is put first.

    Words are separated by whitespace; the padding token is BOS, on the left.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{words[bos]} $A", special_tokens=[(words[bos], bos)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        bos_token=words[bos],
        pad_token=words[bos],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
