"""Visual retrieval heads: while the model says a word, the head's top key is what the word names.

At decoding step t the token w_t is produced; a_t is the head's row of the token just fed. Words of
the answer have regions of the image (`answer_spans` in the prompt's meta). A step counts if w_t has
a region, and it is a hit if argmax a_t lies in the region's tokens.

    score = hits / steps that count,   in [0, 1]

Only examples whose answer was produced count (unigram recall above `success`), and only steps up to
the one that completes it. If none succeeds the result is undefined, not zero. A token that words of
two regions share names neither and does not count.

The null is what the same number of image tokens elsewhere would have hit: at each step the hits in
the other regions (in the rest of the image, where no other region is named), times the number of
tokens of the region over theirs, at most 1. A head that looks at whatever is thing-like, or at
large parts of the image, scores as high there. Extra: `image`, the share of these steps whose top
key lies in the image at all.

This is `retrieval` for pictures. The published code adds 1 / (tokens in the box) per hit, so that
small boxes make large scores; the score here is never scaled by size. It also finds a word's box by
searching for the token's text inside other texts, with the tokenizer's word marks still in it, and
counts answers that are wrong.

Source: Wang et al. 2025, arXiv 2506.05344 (SparseMM); code CR400AF-A/SparseMM.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from heads.detector import DETECTORS, DecodingDetector, Outcome
from heads.retrieval import recall_of
from heads.sight import reads_prompt
from interp.decode import decode
from interp.errors import InputError
from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.model import Model

WORDS = "answer_spans"


@DETECTORS.register("visual-retrieval")
@dataclass(frozen=True)
class VisualRetrieval(DecodingDetector):
    """Hits in the region of the word being said; see the module's docstring.

    Attributes:
        success: unigram recall of the answer above which an example counts.
        extra: tokens decoded beyond the length of the answer.
        span: what counts as the image.
    """

    success: float = 0.5
    extra: int = 4
    span: str = "image"

    name: ClassVar[str] = "visual-retrieval"
    summary: ClassVar[str] = "looks at the part of the image that it puts into words"
    citation: ClassVar[str] = "Wang et al. 2025, arXiv 2506.05344, section 3"
    unit: ClassVar[str] = "share of steps that look where the word is"
    threshold: ClassVar[float] = 0.1
    no_evidence: ClassVar[str] = "looks at the region of the word no more than at others"
    task: ClassVar[str] = "shapes"
    needs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        if self.extra < 0:
            raise InputError(f"visual-retrieval:extra must not be negative; got {self.extra}")

    def watch(self, model: "Model", prompts: list[Prompt], *, tower: str | None) -> Outcome:
        """See `DecodingDetector`."""
        stack = model.tower(tower) if tower else next(iter(model.towers.values()))
        reads_prompt(stack, prompts, self.name)
        answers = [_answer(p) for p in prompts]
        regions = [regions_of(model, p) for p in prompts]
        batch = model.batch(prompts, side="left")
        longest = max(map(len, answers)) + self.extra
        seen = decode(model, batch, max_new_tokens=longest, tower=stack.name)
        values = torch.full(seen.top.shape[:3], math.nan)
        null, image = values.clone(), values.clone()
        failures = {}
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            produced = seen.tokens[b][: len(answer) + self.extra]
            recall = recall_of(produced, answer)
            if recall <= self.success:
                failures[b] = f"the answer was not produced (recall {recall:.2f})"
                continue
            steps = self._steps(prompt, _until_said(produced, answer), regions[b])
            if not steps:
                failures[b] = "no token that was produced has a region of its own in the image"
                continue
            top = seen.top[b][..., [t for t, _, _ in steps]].cpu()
            missing = top.isnan().any(-1)
            at = top.nan_to_num(-1).long()
            whole = set(prompt.positions(self.span))
            inside = [_within(at[..., i], own) for i, (_, own, _) in enumerate(steps)]
            stray = [
                (_within(at[..., i], other) * (len(own) / len(other))).clamp(max=1)
                for i, (_, own, other) in enumerate(steps)
            ]
            looks = [_within(at[..., i], whole) for i in range(len(steps))]
            for out, found in ((values, inside), (null, stray), (image, looks)):
                out[b] = torch.stack(found).mean(0).masked_fill(missing, math.nan)
        return Outcome(values, null, {"image": image}, failures)

    def _steps(
        self, prompt: Prompt, produced: tuple[int, ...], regions: dict[int, str]
    ) -> list[tuple[int, set[int], set[int]]]:
        """Steps that count: their number, the places of the region, those it is compared with."""
        places = {name: set(prompt.positions(name)) for name in set(regions.values())}
        named = set().union(*places.values())
        out = []
        for t, token in enumerate(produced):
            own = places.get(regions.get(token, ""), set())
            other = named - own or set(prompt.positions(self.span)) - own
            if own and other:
                out.append((t, own, other))
        return out


def regions_of(model: "Model", prompt: Prompt) -> dict[int, str]:
    """The region that each token names: token id to span.

    Words are texts, or ids of tokens: where the model has no tokenizer, and where all are numbers
    of which none is a word of the answer.

    Raises:
        InputError: the prompt does not say which words have regions, or has texts that nobody
            can make tokens of.
    """
    words = prompt.meta.get(WORDS)
    if not words:
        raise InputError(
            f"detector 'visual-retrieval' needs meta[{WORDS!r}], from words of the answer to "
            f"spans; prompt {prompt.id or '?'} has none",
            hint="use the task shapes, or say in the prompt file which word is seen where",
        )
    tokenizer = model.tokenizer
    by_id = all(str(word).isdecimal() for word in words)
    if tokenizer is not None:
        by_id = by_id and words.keys().isdisjoint(
            re.findall(r"\w+", tokenizer.decode(list(_answer(prompt))))
        )
    elif not by_id:
        raise InputError(
            f"meta[{WORDS!r}] must name ids of tokens, as {model.name} has no tokenizer; prompt "
            f"{prompt.id or '?'} has: {', '.join(map(str, words))}"
        )
    named: dict[int, set[str]] = {}
    for word, span in words.items():
        for token in [int(word)] if by_id else _tokens(tokenizer, str(word)):
            named.setdefault(token, set()).add(str(span))
    return {token: spans.pop() for token, spans in named.items() if len(spans) == 1}


def _tokens(tokenizer: Any, word: str) -> set[int]:
    """Tokens of a word at the beginning of a text or within it; no unknown or blank ones."""
    found: set[int] = set()
    for text in (word, f" {word}"):
        found |= set(tokenizer(text, add_special_tokens=False).input_ids)
    return {i for i in found - {tokenizer.unk_token_id} if tokenizer.decode([i]).strip()}


def _answer(prompt: Prompt) -> tuple[int, ...]:
    if not prompt.answer:
        raise InputError(
            f"detector 'visual-retrieval' needs prompts with an answer; {prompt.id or '?'} has none"
        )
    return prompt.answer


def _until_said(produced: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
    """What was produced up to the token that completes the answer."""
    missing = Counter(answer)
    for t, token in enumerate(produced):
        missing -= Counter([token])
        if not missing:
            return produced[: t + 1]
    return produced


def _within(top: Tensor, places: set[int]) -> Tensor:
    """1 where a position [layer, head] is one of some, else 0."""
    return torch.isin(top, torch.tensor(sorted(places))).float()
