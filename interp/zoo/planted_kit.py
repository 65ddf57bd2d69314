"""A kit of planted heads over a vocabulary with BOS (id 0) and ordinary tokens.

The key of a head holds those features of a position that its query asks for, out of one list for
all heads (its token, the token before, where it stands); the value is the token, BOS has none. Any
grouping of query heads over key-value heads is therefore consistent.

Prompts must begin with BOS, the only place where it may stand. Positions count from 0.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from interp.errors import InputError
from interp.zoo.planted_parts import HeadPlan, Layout, Links, Stream, bit_count, bits

BETA = 128.0


@dataclass(frozen=True)
class Kit:
    """Head plans for one vocabulary and context length.

    Attributes:
        vocab_size: tokens, BOS among them.
        max_positions: longest prompt.
        window: width of the local-window head.
        beta: gap in score between a full match and any other key; fallbacks lie half-way.
    """

    vocab_size: int = 64
    max_positions: int = 512
    window: int = 4
    beta: float = BETA

    def __post_init__(self) -> None:
        if self.vocab_size < 4 or self.max_positions < 2:
            raise InputError(
                "a kit needs at least 4 tokens and 2 positions; got "
                f"{self.vocab_size} and {self.max_positions}"
            )

    @cached_property
    def _code(self) -> Tensor:
        """Code of each token [d_vocab, bits]; zero for BOS, which matches nothing."""
        code = bits(torch.arange(self.vocab_size), bit_count(self.vocab_size))
        code[0] = 0
        return code

    @cached_property
    def _keep(self) -> Tensor:
        """[d_vocab - 1, d_vocab]: a token one-hot without BOS."""
        return torch.eye(self.vocab_size)[1:]

    @cached_property
    def stream(self) -> Stream:
        """Layouts, embeddings and unembedding of every model made with this kit."""
        vocab, count = self.vocab_size, self.max_positions
        near_query, near_key = self._near()
        place_bits, near = bit_count(count), near_key.shape[1]
        residual = Layout(
            {"tok": vocab, "prev": vocab, "out": vocab, "here": place_bits, "before": place_bits}
            | {"rank": 1, "near_query": near, "near_key": near, "one": 1}
        )
        residual = residual.widened(math.ceil(residual.width / 8) * 8)
        n_bits = self._code.shape[1]
        features = Layout(
            {"tok": n_bits, "prev": n_bits, "here": place_bits, "rank": 1, "near": near}
            | {"bos": 1, "one": 1}
        )
        # A power of four: the softmax scale is then a power of two, and the scores stay exact.
        features = features.widened(4 ** math.ceil(math.log(features.width, 4)))
        values = Layout({"tok": vocab - 1, "bos": 1})
        values = values.widened(max(values.width, features.width))
        tokens, positions = torch.zeros(vocab, residual.width), torch.zeros(count, residual.width)
        tokens[:, residual["tok"]] = torch.eye(vocab)
        tokens[:, residual["one"]] = 1
        place = torch.arange(count)
        positions[:, residual["here"]] = bits(place, place_bits)
        positions[:, residual["before"]] = bits((place - 1).clamp(min=0), place_bits)
        positions[:, residual["rank"]] = place[:, None].float()
        positions[:, residual["near_query"]] = near_query
        positions[:, residual["near_key"]] = near_key
        unembedding = torch.zeros(vocab, residual.width)
        unembedding[:, residual["out"]] = torch.eye(vocab)
        return Stream(residual, features, values, tokens, positions, unembedding)

    def _near(self) -> tuple[Tensor, Tensor]:
        """Query and key codes [pos, n] whose product is largest on the last `window` keys.

        Blocks of twice the window, cut once at multiples and once half-way between: any window
        lies within a block of one of the two cuts, which the query picks; within the block the
        window is a set of phases. Rows of these codes stay short where one-hot positions do not.
        """
        width, size = self.window, 2 * self.window
        place = torch.arange(self.max_positions)
        n_bits = bit_count((self.max_positions + width) // size + 1)
        cuts = [bits(place // size, n_bits), bits((place + width) // size, n_bits)]
        phase = torch.nn.functional.one_hot(place % size, size).float()
        whole = (place % size >= width - 1).float()[:, None]
        back = (place[:, None] - torch.arange(width)) % size
        wanted = torch.zeros(self.max_positions, size).scatter_(1, back, 1.0)
        query = torch.cat([cuts[0] * whole / 2, cuts[1] * (1 - whole) / 2, wanted], dim=1)
        return self.beta * query, torch.cat([*cuts, phase], dim=1)

    def head(
        self, query: Links, *, writes: str = "", gain: float = 1.0, carries: bool = True
    ) -> HeadPlan:
        """A head of this kit.

        Args:
            query: (key feature, residual block) links.
            writes: block that receives the attended token, `prev` or `out`; nothing when empty.
            gain: size of what is written.
            carries: whether the value is the attended token; else it is zero.
        """
        code, bos = self._code.T, torch.eye(self.vocab_size)[:1]
        known: Links = {
            ("tok", "tok"): code,
            ("prev", "prev"): code,
            ("here", "here"): 1.0,
            ("rank", "rank"): 1.0,
            ("near", "near_key"): 1.0,
            ("bos", "tok"): bos,
            ("one", "one"): 1.0,
        }
        asked = {feature for feature, _ in query}
        key = {place: link for place, link in known.items() if place[0] in asked}
        value: Links = {("tok", "tok"): self._keep} if carries else {}
        output: Links = {(writes, "tok"): gain * self._keep.T} if writes else {}
        return HeadPlan(query, key, value, output)

    def previous_token(self, *, writes: str = "prev") -> HeadPlan:
        """Attends to the position before (BOS to itself)."""
        n_bits = self.stream.features.sizes["here"]
        return self.head(
            {("here", "before"): self.beta / 2, ("one", "one"): -self.beta * n_bits / 2},
            writes=writes,
        )

    def self_token(self, *, carries: bool = True) -> HeadPlan:
        """Attends to its own position."""
        n_bits = self.stream.features.sizes["here"]
        match = {("here", "here"): self.beta / 2, ("one", "one"): -self.beta * n_bits / 2}
        return self.head(match, carries=carries)

    def duplicate_token(self) -> HeadPlan:
        """Attends to the first copy of the token, never to itself; to BOS where there is none.

        Even splitting over the copies while shutting out the query itself would need a dimension
        per position (the scores form a triangular matrix). Preferring earlier keys by `beta` per
        position needs one: BOS is ranked half a step before the query.
        """
        n_bits = self._code.shape[1]
        match = self.beta * 2 ** (math.ceil(math.log2(self.max_positions)) + 1)
        return self.head(
            {
                ("tok", "tok"): match / 2 * self._code.T,
                ("one", "one"): -match * n_bits / 2,
                ("rank", "one"): -self.beta,
                ("bos", "one"): match * n_bits / 2 + self.beta / 2,
                ("bos", "rank"): -self.beta,
            }
        )

    def induction(self, *, writes: str = "out", gain: float = 10.0) -> HeadPlan:
        """Attends evenly to the tokens after earlier copies of its token; to BOS without one.

        The keys read the `prev` block: an earlier layer needs a previous-token head.
        """
        n_bits = self._code.shape[1]
        return self.head(
            {
                ("prev", "tok"): self.beta / 2 * self._code.T,
                ("one", "one"): -self.beta * n_bits / 2,
                ("bos", "one"): self.beta * (n_bits - 1) / 2,
            },
            writes=writes,
            gain=gain,
        )

    def bos_sink(self) -> HeadPlan:
        """Attends to BOS, with a value of zero everywhere."""
        return self.head({("bos", "one"): self.beta, ("one", "one"): -self.beta}, carries=False)

    def bos_bias(self, effect: Tensor) -> HeadPlan:
        """Attends to BOS and adds `effect` [d_vocab] to the logits of every position."""
        sink = self.bos_sink()
        value: Links = {("bos", "tok"): torch.eye(self.vocab_size)[:1]}
        return replace(sink, value=value, output={("out", "bos"): effect[:, None]})

    def token_sink(self, token: int) -> HeadPlan:
        """Attends evenly to the occurrences of one token; to BOS before the first."""
        code = self._code[token]
        n_bits = len(code)
        return self.head(
            {
                ("tok", "one"): self.beta / 2 * code[:, None],
                ("one", "one"): torch.tensor([[-self.beta * n_bits / 2]]),
                ("bos", "one"): torch.tensor([[self.beta * (n_bits - 1) / 2]]),
            }
        )

    def place_sink(self, place: int) -> HeadPlan:
        """Attends to one absolute position; to BOS before it."""
        n_bits = self.stream.features.sizes["here"]
        code = bits(torch.tensor([place]), n_bits)[0]
        # BOS stands at 0: lift it half a gap below the match, from where its own code leaves it.
        at_bos = float(code @ bits(torch.tensor([0]), n_bits)[0])
        return self.head(
            {
                ("here", "one"): self.beta / 2 * code[:, None],
                ("one", "one"): torch.tensor([[-self.beta * n_bits / 2]]),
                ("bos", "one"): torch.tensor([[self.beta * (n_bits - at_bos - 1) / 2]]),
            }
        )

    def local_window(self) -> HeadPlan:
        """Attends evenly to the last `window` positions, its own among them."""
        n_bits = (self.stream.features.sizes["near"] - 2 * self.window) // 2
        return self.head(
            {("near", "near_query"): 1.0, ("one", "one"): -self.beta * (n_bits / 2 + 1)}
        )

    def uniform(self, *, carries: bool = True) -> HeadPlan:
        """Attends evenly to all positions up to its own."""
        return self.head({}, carries=carries)

    def shapeless(self, seed: int, *, size: float = 0.15) -> HeadPlan:
        """Attends nearly evenly, with a small random liking for some tokens; writes noise.

        What it attends to depends on the key alone, so it has no relation to the query that any
        detector could find.
        """
        generator = torch.Generator().manual_seed(seed)
        n_bits = self._code.shape[1]
        liking = size * torch.randn(n_bits, 1, generator=generator)
        noise = size * torch.randn(self.vocab_size, self.vocab_size - 1, generator=generator)
        return replace(self.head({("tok", "one"): liking}), output={("out", "tok"): noise})
