"""Tasks of pairs: a clean prompt and a corrupted one of equal length, alike but for a few tokens.

Texts are templates whose slots hold words of one token each. Which words these are is found out
from the tokenizer itself: a word is used if putting it into a sentence adds exactly one token and
changes no other. Slots are then found again among the tokens, in their order.
"""

import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.prompts import Prompt, PromptPair, Range
from interp.tasks import Task
from interp.tasks.ids import opening, ordinary_ids, sample_ids, speaks

if TYPE_CHECKING:
    from interp.model import Model

STYLES = ("auto", "text", "ids")


class PairTask(Task):
    """A maker of pairs; its prompts are the clean ones."""

    @abstractmethod
    def pairs(self, model: "Model", n: int, *, seed: int = 0) -> list[PromptPair]:
        """The first `n` pairs of the task for a model; the same for the same seed.

        The corrupted prompt keeps answer, wrong answer and spans of the clean one.
        """

    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> list[Prompt]:
        """See `Task.prompts`: the clean prompts of the pairs."""
        return [pair.clean for pair in self.pairs(model, n, seed=seed)]


def single_tokens(model: "Model", words: Iterable[str]) -> dict[str, int]:
    """The words that are one token wherever they stand in a sentence, and that token.

    Raises:
        InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(f"texts need a tokenizer and {model.name} has none", hint="use style=ids")
    frames = [(tail, _ids(model, f"the{tail}")) for tail in _TAILS]
    found: dict[str, int] = {}
    for word in words:
        tokens = {_added(_ids(model, f"the {word}{tail}"), empty) for tail, empty in frames}
        token = tokens.pop()
        if not tokens and token not in (None, model.tokenizer.unk_token_id, *found.values()):
            assert token is not None
            found[word] = token
    return found


# What may follow a word; some tokenizers join a word and its stop.
_TAILS = (" and the", ", the", ". The", "? The")


def _added(ids: list[int] | None, empty: list[int] | None) -> int | None:
    """The one token that `ids` has more than `empty`, or None."""
    if ids is None or empty is None or len(ids) != len(empty) + 1:
        return None
    for i, token in enumerate(ids):
        if i == len(empty) or token != empty[i]:
            return token if ids[:i] + ids[i + 1 :] == empty else None
    return None


def enough(model: "Model", kind: str, words: Sequence[str], least: int) -> dict[str, int]:
    """As `single_tokens`, with at least so many.

    Raises:
        InputError: there are fewer.
    """
    found = single_tokens(model, words)
    if len(found) < least:
        raise InputError(
            f"at least {least} {kind} must be single tokens of the tokenizer; of {len(words)} "
            f"tried, {len(found)} are",
            hint="use style=ids, which needs no words",
        )
    return found


def vocabulary(
    model: "Model", style: str, sample: str, kinds: Mapping[str, tuple[Sequence[str], int]]
) -> dict[str, dict[str, int]] | None:
    """The words a task may use on a model, by kind; None for random tokens.

    Args:
        model: the model.
        style: `text`, `ids`, or `auto`: text where the tokenizer knows the sample and enough words.
        sample: a text of the task.
        kinds: kind of word to the words that are tried, and how many are needed.

    Raises:
        InputError: style is `text` and there are too few words.
    """
    if style == "ids" or (style == "auto" and not speaks(model, sample)):
        return None
    try:
        return {kind: enough(model, kind, *tried) for kind, tried in kinds.items()}
    except InputError:
        if style == "text":
            raise
        return None


def _ids(model: "Model", text: str) -> list[int] | None:
    try:
        return list(model.tokenizer(text, add_special_tokens=False).input_ids)
    except Exception:  # noqa: BLE001 - word-level tokenizers without <unk> raise a bare Exception
        return None


def slots_of(template: str) -> list[str]:
    """Names of the slots of a template, in order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def filled(
    model: "Model", template: str, words: Mapping[str, str], ids: Mapping[str, int]
) -> tuple[tuple[int, ...], dict[str, tuple[Range, ...]]]:
    """Tokens of a filled template, and where each slot stands.

    Args:
        model: the model.
        template: text with slots in braces; a slot may come more than once.
        words: what stands in each slot.
        ids: the token of each word.

    Raises:
        InputError: a word is not found at its place.
    """
    tokens = tuple(model.tokenizer(template.format(**words)).input_ids)
    spans: dict[str, tuple[Range, ...]] = {}
    at = 0
    for slot in slots_of(template):
        word = words[slot]
        if word not in ids:
            continue
        try:
            at = tokens.index(ids[word], at)
        except ValueError:
            raise InputError(
                f"the tokenizer of {model.name} splits {word!r} otherwise in {template!r}",
                hint="use style=ids",
            ) from None
        spans[slot] = (*spans.get(slot, ()), (at, at + 1))
        at += 1
    return tokens, spans


def from_ids(
    model: "Model", rng: random.Random, frame: Sequence[str], names: Sequence[str]
) -> tuple[list[int], dict[str, int], dict[str, tuple[Range, ...]]]:
    """A frame of random tokens with slots, for models without words.

    Args:
        model: the model.
        rng: source of randomness.
        frame: slot names, and `` for a filler token.
        names: names of distinct tokens to draw; slots are among them.

    Returns:
        The tokens, the token of each name, and where each slot stands.
    """
    drawn = sample_ids(rng, ordinary_ids(model), len(names) + frame.count(""))
    known = dict(zip(names, drawn, strict=False))
    fillers = iter(drawn[len(names) :])
    tokens = opening(model)
    spans: dict[str, tuple[Range, ...]] = {}
    for slot in frame:
        if slot:
            spans[slot] = (*spans.get(slot, ()), (len(tokens), len(tokens) + 1))
        tokens.append(known[slot] if slot else next(fillers))
    return tokens, known, spans


def with_ends(
    model: "Model", tokens: Sequence[int], spans: Mapping[str, tuple[Range, ...]]
) -> dict[str, tuple[Range, ...]]:
    """Spans with `end`, the last token, and `bos` where the prompt begins with it."""
    out = dict(spans) | {"end": ((len(tokens) - 1, len(tokens)),)}
    if tokens and tokens[0] == model.bos_id:
        out["bos"] = ((0, 1),)
    return out


def check_style(style: str) -> None:
    """Raise InputError unless the style is known."""
    if style not in STYLES:
        raise InputError(f"style must be auto, text or ids; got {style!r}")
