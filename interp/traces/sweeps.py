"""Passing over the rows of a layer once: log-sum-exps, summaries, the check, whole patterns."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.seam.calls import MASKED, AttnCall, hide_future
from interp.traces.rules import Rule
from interp.traces.summary import Summary

CHECKED = 64
"""Rows of each head that are compared with the model's own."""
WHOLE = 1024
"""Prompt length up to which the rows of layers without a rule are kept whole."""
LARGEST = 64
"""Entries of each row that are kept beyond that."""
BLOCK = 128
"""Rows at a time: few enough to stay in a processor's cache."""


def swept(
    q: Float[Tensor, "head query d"], k: Float[Tensor, "kv key d"], rule: Rule, summary: Summary
) -> Float[Tensor, "head query"]:
    """Log-sum-exp of every row, and on the way what is summed up."""
    n_heads, n_query = q.shape[:2]
    group = n_heads // len(k)
    keys = k.float()
    lse = keys.new_zeros(n_heads, n_query)
    step = summary.step(BLOCK)
    for at in range(0, n_query, step):
        rows = torch.arange(at, min(at + step, n_query), device=q.device)
        block = rule.block(rows, summary.cell[1])
        if block.keys.start == block.keys.stop:
            continue
        summary.see(at, block.keys.start, block.seen)
        for h in range(n_heads):
            s = rule.scores(h, q[h, at : at + step].float(), keys[h // group], block)
            lse[h, at : at + step], p, entropy = rule.lse(h, s, block)
            summary.add(h, at, block.keys.start, p, entropy)
    return lse


def compared(
    calls: Sequence[AttnCall],
    q: Float[Tensor, "head query d"],
    k: Float[Tensor, "kv key d"],
    lse: Float[Tensor, "head query"],
    rule: Rule,
) -> float:
    """Largest difference of recomputed rows from the model's own; infinite where one is NaN."""
    n_heads, n_query = q.shape[:2]
    group = n_heads // len(k)
    chosen = np.random.default_rng(0).choice(n_query, min(CHECKED, n_query), replace=False)
    worst = 0.0
    for call, b, at, first in examples(calls):
        here = sorted(int(i) for i in chosen if at <= i < at + call.n_query)
        if not here:
            continue
        rows = torch.tensor(here, device=q.device)
        block = rule.block(rows)
        own = slice(first, first + call.n_key)
        for h in range(n_heads):
            got = q.new_zeros(len(rows), rule.keys, dtype=torch.float32)
            s = rule.scores(h, q[h, rows].float(), k[h // group].float(), block)
            got[:, block.keys] = (s - lse[h, rows, None]).exp() * block.seen
            want = call.rows(b, slice(h, h + 1), rows - at)[0].to(got)
            worst = max(worst, _difference(got[:, own], want))
    return worst


def _difference(got: Tensor, want: Tensor) -> float:
    found = float((got - want).abs().max())
    return found if found == found else float("inf")


def examples(calls: Sequence[AttnCall]) -> Iterator[tuple[AttnCall, int, int, int]]:
    """Each example of each call, and where its first query and its first key stand in a row."""
    at = first = 0
    for call in calls:
        for b in range(call.z.shape[0]):
            yield call, b, at, first
            at, first = at + call.n_query, first + call.n_key


def by_rows(
    calls: Sequence[AttnCall], summary: Summary, n_heads: int
) -> tuple[dict[str, np.ndarray], bool]:
    """A layer kept by its rows, whole or the largest entries of each; and whether whole.

    A whole pattern is NaN where a query does not see a key.
    """
    n_query, n_key = summary.n_query, summary.n_key
    whole = max(n_query, n_key) <= WHOLE
    arrays: dict[str, np.ndarray]
    if whole:
        arrays = {"pattern": np.full((n_heads, n_query, n_key), np.nan, np.float16)}
    else:
        kept = min(LARGEST, n_key)
        arrays = {
            "top_key": np.zeros((n_heads, n_query, kept), np.int32),
            "top_mass": np.zeros((n_heads, n_query, kept), np.float16),
        }
    arrays |= {name: np.zeros(n_query, np.int32) for name in ("low", "high")}
    for call, b, at, first in examples(calls):
        keys = slice(first, first + call.n_key)
        for start in range(0, call.n_query, BLOCK):
            part = slice(start, min(start + BLOCK, call.n_query))
            rows = slice(at + part.start, at + part.stop)
            seen = visible(call, b, part)
            anywhere = seen.any(0)
            summary.see(rows.start, first, anywhere)
            arrays["low"][rows], arrays["high"][rows] = _hull(anywhere, first)
            for h in range(n_heads):
                p = call.rows(b, slice(h, h + 1), part)[0].float()
                summary.add(h, rows.start, first, p, torch.special.entr(p).sum(-1))
                if whole:
                    shown = p.masked_fill(~seen[min(h, len(seen) - 1)], float("nan"))
                    arrays["pattern"][h, rows, keys] = _np(shown)
                else:
                    mass, key = p.topk(min(arrays["top_key"].shape[-1], call.n_key))
                    arrays["top_key"][h, rows, : key.shape[-1]] = _np(key) + first
                    arrays["top_mass"][h, rows, : key.shape[-1]] = _np(mass)
    return arrays, whole


def visible(call: AttnCall, b: int, rows: slice) -> Bool[Tensor, "head row key"]:
    """Which keys some rows see; of all heads at once where they do not differ.

    Where only the pattern is known, an entry that is zero in every head counts as not seen, unless
    entries before and after it are not.
    """
    n = rows.stop - rows.start
    if call.mask is None:
        if call.causal or call.pattern is None:
            hidden = torch.zeros(1, n, call.n_key, device=call.z.device)
            if call.causal:
                hide_future(hidden, rows)
            return hidden > MASKED / 2
        some = (call.pattern[b][:, rows] > 0).any(0).int()
        # Seen from the first to the last entry that is not zero.
        return ((some.cumsum(-1) > 0) & (some.flip(-1).cumsum(-1).flip(-1) > 0))[None]
    mask = call.mask[b if len(call.mask) > 1 else 0]
    mask = mask.expand(-1, call.n_query, call.n_key)[:, rows]
    seen = mask
    if mask.dtype != torch.bool:
        # Half precision masks by its own least number, which is far above MASKED.
        seen = mask > max(MASKED, torch.finfo(mask.dtype).min) / 2
    if call.causal:
        later = torch.zeros(n, call.n_key, device=mask.device)
        hide_future(later, rows)
        seen = seen & (later > MASKED / 2)
    return seen


def _hull(seen: Bool[Tensor, "row key"], first: int) -> tuple[np.ndarray, np.ndarray]:
    """First key of each row and the one after the last, of those it sees."""
    here = _np(seen)
    some = here.any(-1)
    low = np.where(some, here.argmax(-1), 0)
    high = np.where(some, here.shape[1] - here[:, ::-1].argmax(-1), 0)
    return (low + first).astype(np.int32), (high + first).astype(np.int32)


def _np(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
