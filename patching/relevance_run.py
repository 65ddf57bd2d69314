"""One run with the pattern of every attention call that a relevance map goes through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.errors import InputError, SiteError
from interp.prompts import Batch
from patching.gradients import frozen
from patching.relevance_sides import Call, Note, Scope, by_size, by_tower, takes_decoder

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.calls import AttnCall
    from interp.seam.structure import Layer, Tower


@dataclass(frozen=True, eq=False)
class Traced:
    """What a run showed.

    Attributes:
        calls: attention calls, in the order in which they ran.
        target: [batch] the token or class whose logit was explained.
        at: deciding position of each example.
        source: the tower that made what was looked at, or None.
    """

    calls: tuple[Call, ...]
    target: Tensor
    at: tuple[int, ...]
    source: "Tower | None"


class _Recorder:
    """Hears attention calls, keeps the patterns of some and leads the graph through them."""

    def __init__(self, scope: Scope, n: int, structure: "Mapping[str, Layer]", slopes: bool):
        towers = (scope.own, *scope.cross, *scope.others)
        self.wanted = {x.name: x for t in towers for x in t.layers}
        self.must = {x.name for x in scope.own.layers}
        self.across = {n for n, x in structure.items() if x.cross and n not in self.wanted}
        self.n, self.slopes = n, slopes
        self.notes: list[Note] = []
        self.later: str | None = None

    def keep(self, name: str, a: Tensor) -> Tensor:
        a = a if a.requires_grad or not self.slopes else a.detach().requires_grad_()
        self.notes.append(Note(self.wanted[name], a))
        return a

    def foreign(self, name: str) -> None:
        """Take note of cross-attention that is no part of the map."""
        if name in self.across and any(x.layer.name in self.must for x in self.notes):
            self.later = name

    def observer(self, call: "AttnCall") -> Tensor | None:
        if call.name not in self.wanted:
            self.foreign(call.name)
            return None
        if call.q is None or call.v is None:
            return None
        if not self.whole(call.name, call.z.shape[0]):
            return None
        every, heads = slice(0, call.n_query), slice(0, call.n_heads)
        rows = torch.stack([call.rows(b, heads, every) for b in range(self.n)])
        a = self.keep(call.name, rows)
        v = call.v.repeat_interleave(call.n_heads // call.v.shape[1], dim=1).to(a)
        return (a @ v).transpose(1, 2).to(call.z).contiguous()

    def weights(self, name: str, a: Tensor) -> Tensor | None:
        if name not in self.wanted or not self.whole(name, a.shape[0]):
            return None
        return self.keep(name, a)

    def whole(self, name: str, rows: int) -> bool:
        """Whether a call has one row of the batch an example; refuse where it must."""
        if rows != self.n and name in self.must:
            raise SiteError(f"{name} attends in groups; its patterns are of no whole prompt")
        return rows == self.n


def run(
    model: "Model",
    scope: Scope,
    batch: Batch,
    read: Batch,
    wanted: Sequence[int] | None,
    slopes: bool,
) -> Traced:
    """Run a batch and keep what the map needs.

    Args:
        model: the model.
        scope: the towers.
        batch: prompts without padding, with what the decoder reads where there is one.
        read: the same examples as `scope.own` sees them.
        wanted: for each prompt the token or class; what the model says if None.
        slopes: whether gradients are wanted.

    Raises:
        InputError: the tower does not decide, or it is not known where.
        SiteError: a pattern that is not reached, or positions that change their number.
    """
    width = read.input_ids.shape[1]
    traced = _run(model, scope, batch, read, width, wanted, slopes)
    if traced is None:  # as many tokens as there are to look at: told apart by a masked one more
        traced = _run(model, scope, longer(batch), read, width + 1, wanted, slopes)
    assert traced is not None
    return traced


def _run(
    model: "Model",
    scope: Scope,
    batch: Batch,
    read: Batch,
    width: int,
    wanted: Sequence[int] | None,
    slopes: bool,
) -> Traced | None:
    """None if sizes do not tell the sides apart."""
    found = _Recorder(scope, len(batch), model.structure.layers, slopes)
    heard = model.observe(found.observer, weights=found.weights)
    with torch.set_grad_enabled(slopes), frozen(model), heard:
        out: Any = model.hf(**inputs_of(model, batch))
        _check(scope, found)
        sided = (by_size if scope.mutual else by_tower)(scope, found.notes, width)
        if sided is None:
            return None
        calls, source = sided
        if source is None and takes_decoder(model):
            raise SiteError(
                "relevance needs the pattern of every layer of the encoder; no tower that is "
                "reached has as many positions as the decoder looks at"
            )
        logits = out.logits if hasattr(out, "logits") else out[0]
        at = _deciding(scope, logits, read)
        if logits.dim() == 3:
            logits = logits[torch.arange(len(batch)), [len(p) - 1 for p in read.prompts]]
        chosen = logits.argmax(-1) if wanted is None else torch.tensor(wanted).to(logits.device)
        if not slopes:
            return Traced(tuple(calls), chosen, at, source)
        score = logits.gather(-1, chosen[:, None]).sum()
        grads = torch.autograd.grad(score, [c.pattern for c in calls], allow_unused=True)
    done = [
        replace(
            c, pattern=c.pattern.detach(), slope=torch.zeros_like(c.pattern) if g is None else g
        )
        for c, g in zip(calls, grads, strict=True)
    ]
    return Traced(tuple(done), chosen, at, source)


def inputs_of(model: "Model", batch: Batch) -> dict[str, Tensor]:
    """What the model takes of a batch: one of images or sounds has no use for tokens."""
    inputs = batch.inputs()
    if model.reads_tokens:
        return inputs
    return {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}


def longer(batch: Batch) -> Batch:
    """The batch with one masked token more at the end of each prompt."""
    pad = torch.nn.functional.pad
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, 1)),
        attention_mask=pad(batch.attention_mask, (0, 1)),
        extra={
            name: pad(x, (0, 1)) if name.endswith("token_type_ids") else x
            for name, x in batch.extra.items()
        },
    )


def _deciding(scope: Scope, logits: Tensor, read: Batch) -> tuple[int, ...]:
    """The deciding position of each example: of its span `cls`, else its last."""
    blind = [p for p in read.prompts if "cls" not in p.spans]
    if blind and logits.dim() == 2 and not scope.own.layers[-1].causal:
        raise InputError(
            f"a class is decided at one position; prompt {blind[0].id or '?'} does not say which "
            f"of tower {scope.own.name!r}, in which every position sees all",
            hint="spans={'cls': ((0, 1),)} if the first position is read",
        )
    return tuple(p.positions("cls")[0] if "cls" in p.spans else len(p) - 1 for p in read.prompts)


def _check(scope: Scope, found: _Recorder) -> None:
    """Refuse runs of which the patterns kept are not all that matters."""
    if found.later is not None:
        raise InputError(
            f"tower {scope.own.name!r} does not decide by itself: {found.later} looks across after "
            f"it, and what its two sides exchange is not one chain of layers",
            hint="relevance serves decoders, encoder-decoders and two sides in the same blocks",
        )
    heard = {note.layer.name for note in found.notes}
    missing = [x.name for x in scope.own.layers if x.name not in heard]
    across = [x.name for t in scope.cross for x in t.layers]
    if any(n in heard for n in across):  # without an image these layers do not run at all
        missing += [n for n in across if n not in heard]
    if scope.mutual:
        missing += [x.name for t in scope.others for x in t.layers if x.name not in heard]
    if missing:
        raise SiteError(
            f"relevance needs the pattern of every layer of the tower; {missing[0]} gives none"
        )
