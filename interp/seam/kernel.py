"""Asking the model's own CPU kernel for the row log-sum-exp, and for A @ columns.

`F.scaled_dot_product_attention` on a CPU dispatches to a flash kernel that computes the row
log-sum-exp and throws it away. Inside a `KernelTap` the same kernel is called directly, after
torch's own dispatcher (`_fused_sdp_choice`) said that it would be chosen: z keeps every bit, and
LSE comes for nothing. Columns appended to v, with zeros appended to q and k, leave the first d_v
columns of the output as they were, bit for bit, for most head sizes but not for all (a head of 8
is multiplied in another order than one of 16): `appending_keeps_bits` finds out for each shape
before columns are used, and `in_whole_vectors` refuses calls for which no such proof
holds. Doctor checks the outcome on each model.
Where the dispatcher would choose another kernel, the call goes through untouched.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION as _fused_sdp_choice reports it
Columns = Callable[[Tensor], Tensor | None]
"""Given v [batch, kv_head, key, d_v], the columns [batch, key, c] to append to it, or None."""


_ACTIVE: "ContextVar[KernelTap | None]" = ContextVar("headscope_kernel_tap", default=None)


class KernelTap(TorchFunctionMode):
    """Watches the one `scaled_dot_product_attention` call made inside it.

    Taps nest: an inner and an outer observer of the same call both receive its numbers, since only
    the innermost tap sees the function called.

    Attributes after the call (None if there was none, or more than one):
        args: q, k, v, mask, causal, scale as the kernel received them.
        lse: [batch, head, query], or None where another kernel ran.
        extra: [batch, head, query, c], or None.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        super().__init__()
        self.columns = columns
        self.parent: KernelTap | None = None
        self.calls = 0
        self.args: tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float] | None = None
        self.lse: Tensor | None = None
        self.extra: Tensor | None = None

    def __enter__(self) -> "KernelTap":
        self.parent = _ACTIVE.get()
        self._token = _ACTIVE.set(self)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        _ACTIVE.reset(self._token)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        seen = (query, key, value, attn_mask, is_causal, factor)
        chain = self._chain()
        if not _flash_on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            for tap in chain:
                tap._record(seen, None, None)
            return out
        wanted: list[Tensor | None] = [None] * len(chain)
        if query.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled():
            wanted = [tap.columns(value) if tap.columns else None for tap in chain]
            width = sum(c.shape[-1] for c in wanted if c is not None)
            if width and not (
                in_whole_vectors(query, key, value)
                and appending_keeps_bits(
                    value.shape[-1],
                    width,
                    query.shape[2],
                    key.shape[2],
                    is_causal,
                    attn_mask is not None,
                    query.dtype,
                    torch.get_num_threads(),
                )
            ):
                wanted = [None] * len(chain)
        out, lse, extras = flash(query, key, value, attn_mask, is_causal, factor, wanted)
        for tap, extra in zip(chain, extras, strict=True):
            tap._record(seen, lse, extra)
        return out

    def _chain(self) -> list["KernelTap"]:
        return [self, *(self.parent._chain() if self.parent else [])]

    def _record(self, args: Any, lse: Tensor | None, extra: Tensor | None) -> None:
        self.calls += 1
        once = self.calls == 1
        self.args = args if once else None
        self.lse, self.extra = (lse, extra) if once else (None, None)


def _flash_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> bool:
    """Whether torch would run its CPU flash kernel on this call."""
    if q.device.type != "cpu" or q.dim() != 4 or dropout:
        return False
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)
    return choice == _FLASH


def in_whole_vectors(*tensors: Tensor) -> bool:
    """Whether the order in which a call adds depends on its shape alone, not on its memory.

    The kernel works through blocks of rows and keys. A last block of a single one is multiplied
    as a vector, and rows that do not begin on a vector register are peeled, both in an order that
    depends on where the tensor lies: no test on other tensors can speak for such a call.
    """
    for x in tensors:
        # Blocks are multiples of 32 in every version.
        if x.shape[2] < 16 or x.shape[2] % 32 == 1:
            return False
        steps = [n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1][:-1]
        if any(n * x.element_size() % 32 for n in (x.storage_offset(), *steps)):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def appending_keeps_bits(
    d: int,
    width: int,
    n_query: int,
    n_key: int,
    causal: bool,
    masked: bool,
    dtype: torch.dtype,
    n_threads: int,
) -> bool:
    """Whether z keeps every bit when `width` columns are appended to calls of this shape.

    The order in which the kernel adds depends on the shape alone, so one head of random numbers
    shows it, at the price of two heads of one layer.
    """
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, n_query, d, generator=gen, dtype=dtype)
    k, v = (torch.randn(1, 1, n_key, d, generator=gen, dtype=dtype) for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(1, 1, n_query, n_key, generator=gen) < 0.9
    columns = torch.rand(1, n_key, width, generator=gen, dtype=dtype)
    # Inside a tap torch functions are heard; these calls are the tap's own business.
    with torch._C.DisableTorchFunction():
        plain, plain_lse, _ = flash(q, k, v, mask, causal, d**-0.5, [])
        out, lse, _ = flash(q, k, v, mask, causal, d**-0.5, [columns])
    return torch.equal(plain, out) and torch.equal(plain_lse, lse)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True = visible) as the additive one torch makes of it; floats unchanged."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    columns: list[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Torch's CPU flash kernel with its log-sum-exp, and A @ columns for each set of columns.

    Args:
        q: [batch, head, query, d].
        k: [batch, kv_head, key, d].
        v: [batch, kv_head, key, d].
        mask: additive or boolean, broadcastable to [batch, head, query, key], or None.
        causal: whether query i sees only keys j ≤ i.
        scale: factor on q·k.
        columns: sets of columns [batch, key, c], or None.

    Returns:
        z [batch, head, query, d], lse [batch, head, query], and per set [batch, head, query, c].
    """
    d = v.shape[-1]
    present = [c for c in columns if c is not None]
    if present:
        width = sum(c.shape[-1] for c in present)
        pad = -width % 8  # whole vector registers
        tail = torch.cat([*present, v.new_zeros(*present[0].shape[:-1], pad)], dim=-1)
        tail = tail[:, None].expand(-1, v.shape[1], -1, -1).to(v.dtype)
        v = torch.cat([v, tail], dim=-1)
        q, k = F.pad(q, (0, width + pad)), F.pad(k, (0, width + pad))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=additive(mask, q.dtype), scale=scale
    )
    extras: list[Tensor | None] = []
    at = d
    for c in columns:
        extras.append(None if c is None else out[..., at : at + c.shape[-1]])
        at += 0 if c is None else c.shape[-1]
    return out[..., :d], lse, extras
