"""Which tokens a forward is about: absolute positions under caches, padding and beams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from interp.errors import InputError, SpanError
from interp.prompts import Batch, Prompt
from interp.recipe.where import Positions

Spans = Batch | Sequence[Prompt] | Mapping[str, Any] | None
Prompts = tuple[Prompt, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """Columns of a padded sequence, and what is known of each row.

    Attributes:
        offsets: [batch] pad tokens before each row.
        lengths: [batch] real tokens of the prompt.
        width: columns of the prompt, padding included.
        past: columns before this forward.
        fed: columns of this forward.
        ids: [batch, past + fed] token ids so far, or None.
        bound: for each recipe that is on, its prompts, each for batch / len(prompts) consecutive
            rows.
        known: selections made already.
    """

    offsets: Tensor
    lengths: Tensor
    width: int
    past: int
    fed: int
    ids: Tensor | None
    bound: tuple[Prompts, ...]
    known: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        """Columns so far."""
        return self.past + self.fed

    @property
    def step(self) -> int:
        """The decoding step; 0 is the prompt."""
        return self.step_of(self.total - 1)

    def step_of(self, column: int) -> int:
        """The step at which a column is fed for the first time; 0 for the prompt."""
        return max(0, column - self.width + 1)

    def first_of(self, n: int, *, keys: bool) -> int:
        """The first column of a tensor that holds n of them."""
        # A static cache has room to spare at its end, a sliding one has lost its beginning; of
        # queries, some sites keep the last ones only.
        return 0 if keys and n >= self.total else self.total - n

    def select(self, positions: Positions, owner: int, start: int, n: int) -> Tensor:
        """[batch, n] which columns from `start` on are selected; padding never is.

        Raises:
            SpanError: a span is not bound, or a prompt lacks it.
            InputError: an index outside every prompt, or token ids that are not known.
        """
        key = (positions, owner, start, n)
        if key not in self.known:
            self.known[key] = self._select(positions, owner, start, start + n)
        return self.known[key]

    def _select(self, positions: Positions, owner: int, start: int, stop: int) -> Tensor:
        column = torch.arange(start, stop, device=self.offsets.device)[None]
        place = column - self.offsets[:, None]
        made = column >= self.width
        real = made | ((place >= 0) & (place < self.lengths[:, None]))
        # A produced token follows the prompt's last real one.
        place = torch.where(made, column - self.width + self.lengths[:, None], place)
        chosen = self._chosen(positions, owner, place, made, start, stop)
        if positions.exclude is not None:
            chosen &= ~self._chosen(positions.exclude, owner, place, made, start, stop)
        return chosen & real

    def _chosen(
        self, wanted: Positions, owner: int, place: Tensor, made: Tensor, start: int, stop: int
    ) -> Tensor:
        out = torch.zeros_like(place, dtype=torch.bool)
        if wanted.prompt == "all":
            out |= ~made
        elif wanted.prompt:
            longest = int(self.lengths.max())
            for i in (int(x) for x in wanted.prompt):
                if not -longest <= i < longest:
                    raise InputError(
                        f"a position of the prompt must lie in one; got {i}, and the longest "
                        f"prompt has {longest} tokens"
                    )
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
            out |= self._span(name, owner, place)
        if wanted.tokens:
            if self.ids is None:
                raise InputError(
                    "positions by token need the ids of all tokens so far; this forward got "
                    "embeddings, or began with a cache"
                )
            ids = torch.full_like(place, -1)
            upto = min(stop, self.ids.shape[1])
            ids[:, : max(0, upto - start)] = self.ids[:, start:upto]
            out |= torch.isin(ids, torch.tensor(wanted.tokens, device=ids.device))
        return out

    def _span(self, name: str, owner: int, place: Tensor) -> Tensor:
        prompts = self.bound[owner] if owner < len(self.bound) else ()
        rows, n = place.shape[0], len(prompts)
        if n == 0:
            raise SpanError(
                f"span {name!r} must be bound before it is used",
                hint="recipe.on(model, spans=batch) with the batch or prompts that are run",
            )
        if rows % n:
            raise InputError(f"{rows} rows are run, but spans are bound for {n} prompts")
        out = torch.zeros_like(place, dtype=torch.bool)
        for row in range(rows):
            for first, last in prompts[row // (rows // n)].span(name):
                out[row] |= (place[row] >= first) & (place[row] < last)
        return out


class Tracker:
    """Follows the forwards of one model, so that positions stay absolute.

    A forward with a filled cache goes on with the sequence before it. So does one without a cache
    whose rows are those of the forward before, each one token longer: generation without a cache
    looks like that. Every other forward is a new prompt, up to the width of a bound `Batch` that
    begins with the same tokens.

    Args:
        encoder_decoder: whether the model reads its prompts with an encoder; then spans are those
            of the encoder's prompts, and of `Batch.decoder` for the decoder.

    Attributes:
        frame: of the current forward of the decoder, or None if its tokens are not known.
        source: of the encoder's input, or None.
    """

    def __init__(self, *, encoder_decoder: bool) -> None:
        self.encoder_decoder = encoder_decoder
        self.frame: Frame | None = None
        self.source: Frame | None = None
        self._spans: list[Spans] = []

    def bind(self, spans: Sequence[Spans]) -> None:
        """The spans of the recipes that are on; None stands for those of the recipe before."""
        self._spans = []
        for given in spans:
            inherited = self._spans[-1] if self._spans else None
            self._spans.append(inherited if given is None else given)
        if self.frame is not None:
            self.frame = replace(self.frame, bound=self._bound(decoder=True), known={})
        if self.source is not None:
            self.source = replace(self.source, bound=self._bound(decoder=False), known={})

    def before(self, given: Mapping[str, Any]) -> Tensor | None:
        """Take note of a forward of the whole model, given its arguments by name.

        Returns:
            None if this is a new prompt; else [batch], for each row the row before that it
            continues.
        """
        prefix = "decoder_" if self.encoder_decoder else ""
        ids = given.get(f"{prefix}input_ids")
        fed = ids if ids is not None else given.get(f"{prefix}inputs_embeds")
        if not isinstance(fed, Tensor) or fed.dim() < 2:
            self.frame = None
            return None
        rows, n = fed.shape[:2]
        mask = given.get(f"{prefix}attention_mask")
        past = cached(given.get("past_key_values"))
        last = self.frame
        order = None
        if past:
            if last is None or past > last.total or rows % len(last.offsets):
                self.frame = self._first(fed, None, mask, past, decoder=True)
                return None
            times = rows // len(last.offsets)
            order = torch.arange(rows, device=fed.device) // times
            known = last.ids is not None and ids is not None
            history = torch.cat([last.ids[order, :past], ids], 1) if known else None  # type: ignore[index,list-item]
            last = _reordered(last, order)
            self.frame = replace(last, past=past, fed=n, ids=history, known={})
            return order
        order = self._continued(ids)
        if order is not None and last is not None:
            self.frame = replace(_reordered(last, order), past=0, fed=n, ids=ids, known={})
        else:
            self.frame = self._first(fed, ids, mask, 0, decoder=True)
        return order

    def before_encoder(self, given: Mapping[str, Any]) -> None:
        """Take note of a forward of the encoder."""
        ids = given.get("input_ids")
        fed = ids if ids is not None else given.get("inputs_embeds")
        if not isinstance(fed, Tensor) or fed.dim() < 2:
            self.source = None
            return
        self.source = self._first(fed, ids, given.get("attention_mask"), 0, decoder=False)

    def reorder(self, order: Tensor) -> None:
        """Beams were chosen: row i goes on with what row order[i] was."""
        if self.frame is not None and len(order) == len(self.frame.offsets):
            ids = self.frame.ids
            ids = None if ids is None else ids[order.to(ids.device)]
            self.frame = replace(_reordered(self.frame, order), ids=ids)

    def _continued(self, ids: Tensor | None) -> Tensor | None:
        """The rows that these continue by one token, run without a cache; None if they do not."""
        last = self.frame
        if ids is None or last is None or last.past or last.ids is None:
            return None
        if ids.shape != (last.ids.shape[0], last.ids.shape[1] + 1):
            return None
        if torch.equal(ids[:, :-1], last.ids):
            return torch.arange(len(ids), device=ids.device)
        same = (ids[:, None, :-1] == last.ids[None]).all(-1)  # beams change places
        return same.int().argmax(1) if bool(same.any(1).all()) else None

    def _first(
        self, fed: Tensor, ids: Tensor | None, mask: Any, past: int, *, decoder: bool
    ) -> Frame:
        rows, n = fed.shape[:2]
        width, real = past or n, None
        batch = self._batch(decoder=decoder)
        if batch is not None and rows % len(batch) == 0:
            times = rows // len(batch)
            wanted = batch.input_ids.to(fed.device).repeat_interleave(times, 0)
            shared = min(n, wanted.shape[1])
            if ids is None or torch.equal(ids[:, :shared], wanted[:, :shared]):
                width = wanted.shape[1]
                real = batch.attention_mask.to(fed.device).repeat_interleave(times, 0).bool()
        if isinstance(mask, Tensor) and mask.shape[:1] == (rows,) and mask.dim() == 2:
            real = mask[:, :width].bool() if mask.shape[1] >= width else real
        if real is None:
            real = torch.ones(rows, width, dtype=torch.bool, device=fed.device)
        bound = self._bound(decoder=decoder)
        return Frame(real.long().argmax(1), real.sum(1), width, past, n, ids, bound)

    def _batch(self, *, decoder: bool) -> Batch | None:
        for spans in reversed(self._spans):
            if isinstance(spans, Batch):
                return spans.decoder if decoder and self.encoder_decoder else spans
        return None

    def _bound(self, *, decoder: bool) -> tuple[Prompts, ...]:
        return tuple(self._prompts(s, decoder=decoder) for s in self._spans)

    def _prompts(self, spans: Spans, *, decoder: bool) -> Prompts:
        if decoder and self.encoder_decoder:
            inner = spans.decoder if isinstance(spans, Batch) else None
            return () if inner is None else inner.prompts
        return read_spans(spans)


def _reordered(frame: Frame, order: Tensor) -> Frame:
    order = order.to(frame.offsets.device)
    return replace(
        frame, offsets=frame.offsets[order], lengths=frame.lengths[order], known={}
    )  # fmt: skip


def cached(cache: Any) -> int:
    """Columns that a cache holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def still(rows: int, n: int, device: torch.device) -> Frame:
    """The frame of a tower whose positions are no tokens of a prompt, such as image patches."""
    offsets = torch.zeros(rows, dtype=torch.long, device=device)
    lengths = torch.full((rows,), n, dtype=torch.long, device=device)
    return Frame(offsets, lengths, n, 0, n, None, ())


def repeated(frame: Frame, rows: int) -> Frame:
    """The frame of an encoder's input for more rows: beams of one prompt follow one another."""
    n = len(frame.offsets)
    if rows == n or rows % n:
        return frame
    order = torch.arange(rows, device=frame.offsets.device) // (rows // n)
    ids = None if frame.ids is None else frame.ids[order]
    return replace(_reordered(frame, order), ids=ids)


def read_spans(spans: Spans) -> Prompts:
    """The prompts that spans are given by; one mapping of names to ranges holds for every row."""
    if spans is None:
        return ()
    if isinstance(spans, Batch):
        return spans.prompts
    if isinstance(spans, Mapping):
        ranges = {name: _ranges(name, r) for name, r in spans.items()}
        end = max((stop for rs in ranges.values() for _, stop in rs), default=1)
        return (Prompt((0,) * end, ranges),)
    return tuple(spans)


def _ranges(name: str, given: Any) -> tuple[tuple[int, int], ...]:
    """One range (start, stop) or several, as several."""
    try:
        several = [given] if isinstance(given[0], Integral) else list(given)
        return tuple((int(start), int(stop)) for start, stop in several)
    except (TypeError, ValueError, IndexError):
        raise InputError(
            f"span {name!r} needs a range (start, stop), or several; got {given!r}",
            hint="spans={'image': (5, 581)}, or the batch that is run",
        ) from None
