"""Which tokens a forward is about: absolute positions under caches, padding and beams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError, SpanError
from interp.prompts import Batch, Prompt
from interp.recipe.where import Positions

Spans = Batch | Sequence[Prompt] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Frame:
    """Columns of a padded sequence, and what is known of each row.

    Attributes:
        offsets: [batch] pad tokens before each row.
        lengths: [batch] real tokens of the prompt.
        width: columns of the prompt, padding included.
        past: columns before this forward.
        fed: columns of this forward.
        ids: [batch, past + fed] token ids so far, or None.
        prompts: the prompts, each for batch / len(prompts) consecutive rows.
    """

    offsets: Tensor
    lengths: Tensor
    width: int
    past: int
    fed: int
    ids: Tensor | None
    prompts: tuple[Prompt, ...]

    def queries(self, positions: Positions) -> Tensor | None:
        """[batch, fed] which fed tokens are selected; None for all of them."""
        if positions.everywhere:
            return None
        return self.select(positions, self.past, self.past + self.fed)

    def keys(self, positions: Positions, n_key: int) -> Tensor:
        """[batch, n_key] which keys are selected."""
        total = self.past + self.fed
        # A static cache has room to spare at its end, a sliding one has lost its beginning.
        start = 0 if n_key >= total else total - n_key
        return self.select(positions, start, start + n_key)

    def select(self, positions: Positions, start: int, stop: int) -> Tensor:
        """[batch, stop - start] which columns are selected; padding never is."""
        column = torch.arange(start, stop, device=self.offsets.device)[None]
        place = column - self.offsets[:, None]
        made = column >= self.width
        real = made | ((place >= 0) & (place < self.lengths[:, None]))
        # A produced token follows the prompt's last real one.
        place = torch.where(made, column - self.width + self.lengths[:, None], place)
        chosen = self._chosen(positions, place, made, start, stop)
        if positions.exclude is not None:
            chosen &= ~self._chosen(positions.exclude, place, made, start, stop)
        return chosen & real

    def _chosen(
        self, wanted: Positions, place: Tensor, made: Tensor, start: int, stop: int
    ) -> Tensor:
        out = torch.zeros_like(place, dtype=torch.bool)
        if wanted.prompt == "all":
            out |= ~made
        elif wanted.prompt:
            for i in (int(x) for x in wanted.prompt):
                out |= place == (i if i >= 0 else self.lengths[:, None] + i)
            out &= ~made
        if wanted.generated == "all":
            out |= made
        elif wanted.generated:
            first, last = (int(x) for x in wanted.generated)
            step = place - self.lengths[:, None]
            out |= made & (step >= first) & (step < last)
        if wanted.window:
            out |= (place >= wanted.window[0]) & (place < wanted.window[1])
        for name in wanted.spans:
            out |= self._span(name, place)
        if wanted.tokens:
            if self.ids is None:
                raise InputError("positions by token need input_ids; this forward got embeddings")
            ids = torch.full_like(place, -1)
            upto = min(stop, self.ids.shape[1])
            ids[:, : max(0, upto - start)] = self.ids[:, start:upto]
            out |= torch.isin(ids, torch.tensor(wanted.tokens, device=ids.device))
        return out

    def _span(self, name: str, place: Tensor) -> Tensor:
        rows, n = place.shape[0], len(self.prompts)
        if n == 0:
            raise SpanError(
                f"span {name!r} must be bound before it is used",
                hint="recipe.on(model, spans=batch) with the batch or prompts that are run",
            )
        if rows % n:
            raise InputError(f"{rows} rows are run, but spans are bound for {n} prompts")
        out = torch.zeros_like(place, dtype=torch.bool)
        for row in range(rows):
            for first, last in self.prompts[row // (rows // n)].span(name):
                out[row] |= (place[row] >= first) & (place[row] < last)
        return out


class Tracker:
    """Follows the forwards of one model, so that positions stay absolute.

    Args:
        spans: the batch or prompts that will be run, or one mapping of names to ranges for all.
    """

    def __init__(self, spans: Spans = None) -> None:
        self.batch = spans if isinstance(spans, Batch) else None
        self.prompts = _prompts(spans)
        self.step = 0
        self.frame: Frame | None = None

    def before(self, kwargs: Mapping[str, Any], args: tuple[Any, ...], *, decoder: bool) -> None:
        """Take note of a forward of the whole model."""
        prefix = "decoder_" if decoder else ""
        ids = kwargs.get(f"{prefix}input_ids")
        if ids is None and args and not decoder:
            ids = args[0]
        embeds = kwargs.get(f"{prefix}inputs_embeds")
        fed = ids if ids is not None else embeds
        if fed is None or fed.dim() < 2:
            self.frame = None
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get(f"{prefix}attention_mask")
        last = self.frame
        if past:
            more = ids if ids is not None else None
            known = None if last is None or last.ids is None or more is None else last.ids
            history = (
                None if known is None or more is None
                else torch.cat([known[:, :past], more.to(known)], 1)
                if known.shape[0] == more.shape[0] and known.shape[1] >= past else None
            )  # fmt: skip
            first = last if last is not None else self._first(fed, past, None, mask)
            if past >= first.width:
                self.step += 1
            self.frame = self._next(first, past, fed.shape[1], history, fed.shape[0])
        elif self._continues(ids):
            assert last is not None
            self.step += 1
            self.frame = self._next(last, 0, fed.shape[1], ids, fed.shape[0])
        else:
            self.step = 0
            self.frame = self._first(fed, fed.shape[1], ids, mask)

    def _continues(self, ids: Tensor | None) -> bool:
        """Whether this is the same sequence one token longer, run without a cache."""
        before = None if self.frame is None else self.frame.ids
        return (
            ids is not None
            and before is not None
            and ids.shape == (before.shape[0], before.shape[1] + 1)
            and torch.equal(ids[:, :-1], before)
        )

    def _first(self, fed: Tensor, width: int, ids: Tensor | None, mask: Tensor | None) -> Frame:
        rows, device = fed.shape[0], fed.device
        if self._decoding_batch is not None:
            width = self._decoding_batch.input_ids.shape[1]
        offsets = torch.zeros(rows, dtype=torch.long, device=device)
        lengths = torch.full((rows,), width, dtype=torch.long, device=device)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows:
            real = mask[:, :width].bool()
            offsets = real.long().argmax(1)
            lengths = real.sum(1)
        return Frame(offsets, lengths, width, 0, fed.shape[1], ids, self.prompts)

    @property
    def _decoding_batch(self) -> Batch | None:
        if self.batch is None:
            return None
        return self.batch.decoder if self.batch.decoder is not None else self.batch

    def _next(self, first: Frame, past: int, fed: int, ids: Tensor | None, rows: int) -> Frame:
        offsets, lengths = first.offsets, first.lengths
        if rows != len(offsets) and rows % len(offsets) == 0:
            offsets = offsets.repeat_interleave(rows // len(offsets))
            lengths = lengths.repeat_interleave(rows // len(lengths))
        return Frame(offsets, lengths, first.width, past, fed, ids, self.prompts)


def still(rows: int, n: int, device: torch.device, batch: Batch | None) -> Frame:
    """The frame of a tower that reads everything at once, such as an encoder."""
    offsets = torch.zeros(rows, dtype=torch.long, device=device)
    lengths = torch.full((rows,), n, dtype=torch.long, device=device)
    prompts: tuple[Prompt, ...] = ()
    ids = None
    if batch is not None and batch.input_ids.shape == (rows, n):
        offsets = torch.tensor(batch.offsets, device=device)
        lengths = torch.tensor([len(p) for p in batch.prompts], device=device)
        prompts, ids = batch.prompts, batch.input_ids
    return Frame(offsets, lengths, n, 0, n, ids, prompts)


def _prompts(spans: Spans) -> tuple[Prompt, ...]:
    if spans is None:
        return ()
    if isinstance(spans, Batch):
        return (spans.decoder or spans).prompts
    if isinstance(spans, Mapping):
        ranges = {
            name: tuple(r) if r and not isinstance(r[0], int) else (tuple(r),)
            for name, r in spans.items()
        }
        end = max((stop for rs in ranges.values() for _, stop in rs), default=1)
        return (Prompt((0,) * end, ranges),)
    return tuple(spans)
