"""Prompts with spans: named ranges of tokens, recorded when the prompt is built.

A `Prompt` is one example, a `Batch` is prompts padded to one length, a `PromptPair` is a clean
and a corrupted prompt of equal length. Spans are never searched for afterwards: locating a needle
by the overlap of token sets, as published code does, finds shifted windows and earlier copies.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, PairError, SpanError

if TYPE_CHECKING:
    from torch import Tensor

    from interp.images.patches import PatchMap

Range = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """One example: token ids and what is known about them.

    Attributes:
        tokens: token ids, without padding.
        spans: span name to half-open ranges of positions; `all` always exists.
        id: name of the example, for reports.
        answer: token ids the model should produce next, if any.
        reference: token ids by which relations such as "same token" are judged; a control prompt
            keeps those of the prompt it controls, so that both are read at the same places.
        meta: facts about the example (depth, length, …), kept with its scores.
        inputs: further inputs of the model for this example alone, such as `pixel_values`; the
            first axis counts images, tiles or patches, and a batch puts them one after another.
        patches: which pixels its tokens stand for, if it has images.
        views: tower to this example as that tower sees it, in positions of its own; a vision tower
            may see it as several rows, one per image or tile.

    Raises:
        SpanError: a range lies outside the prompt or is empty.
    """

    tokens: tuple[int, ...]
    spans: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    id: str = ""
    answer: tuple[int, ...] | None = None
    reference: tuple[int, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Tensor"] = field(default_factory=dict, compare=False)
    patches: "PatchMap | None" = None
    views: "Mapping[str, tuple[Prompt, ...]]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError(f"a prompt needs at least one token; prompt {self.id or '?'} is empty")
        for name, ranges in self.spans.items():
            for start, stop in ranges:
                if not 0 <= start < stop <= len(self.tokens):
                    raise SpanError(
                        f"span {name!r} of prompt {self.id or '?'} must lie within its "
                        f"{len(self.tokens)} tokens; got {start}:{stop}"
                    )

    def __len__(self) -> int:
        return len(self.tokens)

    def span(self, name: str) -> tuple[Range, ...]:
        """The ranges of a span.

        Raises:
            SpanError: the prompt has no such span; the message lists those it has.
        """
        if name in self.spans:
            return self.spans[name]
        if name == "all":
            return ((0, len(self.tokens)),)
        known = ", ".join([*self.spans, "all"])
        raise SpanError(f"prompt {self.id or '?'} has no span {name!r}; it has: {known}")

    def positions(self, name: str) -> list[int]:
        """The positions of a span, in order, each once."""
        return sorted({i for start, stop in self.span(name) for i in range(start, stop)})

    def controlled_by(self, tokens: Sequence[int]) -> "Prompt":
        """A control prompt: other tokens, the same spans, relations judged by the original."""
        if len(tokens) != len(self.tokens):
            raise PairError(
                f"a control needs as many tokens as its prompt; prompt {self.id or '?'} has "
                f"{len(self.tokens)}, the control {len(tokens)}"
            )
        return replace(self, tokens=tuple(tokens), reference=self.reference or self.tokens)


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt of equally many tokens.

    Raises:
        PairError: their lengths differ.
    """

    clean: Prompt
    corrupted: Prompt

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupted):
            raise PairError(
                "clean and corrupted prompts must have equally many tokens; pair "
                f"{self.clean.id or '?'} has {len(self.clean)} and {len(self.corrupted)}",
                hint="choose names and fillers that are single tokens",
            )


@dataclass(frozen=True)
class Batch:
    """Prompts padded to one length.

    Attributes:
        prompts: the prompts, in order.
        input_ids: [batch, pos] int64.
        attention_mask: [batch, pos] int64, 1 on real tokens.
        offsets: number of pad tokens before each prompt (0 when padded on the right).
        extra: further model inputs, such as `pixel_values`.
        decoder: what the decoder of an encoder-decoder reads; this batch is then the encoder's.
    """

    prompts: tuple[Prompt, ...]
    input_ids: "Tensor"
    attention_mask: "Tensor"
    offsets: tuple[int, ...]
    extra: Mapping[str, "Tensor"] = field(default_factory=dict)
    decoder: "Batch | None" = None

    @classmethod
    def of(
        cls, prompts: Iterable[Prompt], *, pad_id: int = 0, side: str = "right", device: str = "cpu"
    ) -> "Batch":
        """Pad prompts to the longest of them.

        Args:
            prompts: at least one prompt.
            pad_id: token id for the padding.
            side: `right` or `left`; generation needs `left`.
            device: where the tensors live.
        """
        import torch

        prompts = tuple(prompts)
        if not prompts:
            raise InputError("a batch needs at least one prompt; got none")
        if side not in ("left", "right"):
            raise InputError(f"side must be 'left' or 'right'; got {side!r}")
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        offsets = tuple(width - len(p) if side == "left" else 0 for p in prompts)
        for row, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
            ids[row, offset : offset + len(prompt)] = torch.tensor(prompt.tokens)
            mask[row, offset : offset + len(prompt)] = 1
        extra = {n: x.to(device) for n, x in _merged(prompts, offsets, width).items()}
        return cls(prompts, ids.to(device), mask.to(device), offsets, extra)

    def view(self, tower: str) -> "tuple[Batch, tuple[int, ...]] | None":
        """The batch as a tower sees it, and the prompt that each of its rows belongs to.

        None for towers that attend over the prompt's own tokens.
        """
        if not any(tower in p.views for p in self.prompts):
            return None
        rows = [(i, seen) for i, p in enumerate(self.prompts) for seen in p.views.get(tower, ())]
        made = Batch.of([seen for _, seen in rows], device=str(self.input_ids.device))
        return made, tuple(i for i, _ in rows)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def padded(self) -> bool:
        """Whether any prompt is shorter than the batch."""
        return any(len(p) != self.input_ids.shape[1] for p in self.prompts)

    def positions(self, name: str) -> list[list[int]]:
        """Positions of a span in each row of the batch, padding counted."""
        return [
            [offset + i for i in prompt.positions(name)]
            for prompt, offset in zip(self.prompts, self.offsets, strict=True)
        ]

    def inputs(self) -> dict[str, "Tensor"]:
        """Keyword arguments for the model's forward."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.extra}
        if self.decoder is not None:
            inputs["decoder_input_ids"] = self.decoder.input_ids
            inputs["decoder_attention_mask"] = self.decoder.attention_mask
        return inputs


def _merged(
    prompts: tuple[Prompt, ...], offsets: tuple[int, ...], width: int
) -> "dict[str, Tensor]":
    """Further inputs of all prompts, one after another; such as have a value a token are padded.

    Raises:
        InputError: some prompts have an input that others lack.
    """
    import torch

    out = {}
    for name in dict.fromkeys(name for p in prompts for name in p.inputs):
        lacking = [p for p in prompts if name not in p.inputs]
        if lacking and len(lacking) < len(prompts) and name not in _PER_IMAGE:
            raise InputError(
                f"prompts of one batch must have the same inputs; prompt {lacking[0].id or '?'} "
                f"has no {name!r}",
                hint="score prompts with and without images apart",
            )
        parts = [p.inputs[name] for p in prompts if name in p.inputs]
        if name.endswith("token_type_ids"):
            whole = parts[0].new_zeros(len(prompts), width)
            for row, (part, offset, p) in enumerate(zip(parts, offsets, prompts, strict=True)):
                whole[row, offset : offset + len(p)] = part.reshape(-1)
            out[name] = whole
            continue
        if name == "cross_attention_mask":  # [1, pos, image, tile]: its second axis is the prompt's
            import torch

            parts = [
                torch.nn.functional.pad(x, (0, 0, 0, 0, at, width - at - len(p)))
                for x, at, p in zip(parts, offsets, prompts, strict=True)
            ]
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]
        padded = []
        for x in parts:
            if list(x.shape[1:]) != shape:  # fewer tiles than another prompt of the batch
                larger = x.new_zeros(x.shape[0], *shape)
                larger[tuple(slice(n) for n in x.shape)] = x
                x = larger
            padded.append(x)
        out[name] = torch.cat(padded)
    return out


# Inputs that count images, so that a prompt without any adds nothing to them.
_PER_IMAGE = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_values_videos",
    "video_grid_thw",
)
