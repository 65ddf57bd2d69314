"""All readings of one whole call, each by the cheapest kernel that serves it."""

import torch

from interp.kernels import gather, sweep
from interp.kernels.pieces import Result
from interp.kernels.plan import Plan
from interp.seam.calls import AttnCall


@torch.no_grad()
def answer(call: AttnCall, plan: Plan) -> dict[str, Result]:
    """Every reading of a plan for one call: values [example, head, …], kernel, standard error."""
    out: dict[str, Result] = {}
    fast, slow = gather.serves(call), sweep.source(call)
    for name, pairs in plan.pairs.items():
        if fast:
            out[name] = gather.pair_mass(call, pairs), "gather", None
        else:
            out[name] = sweep.pair_mass(call, pairs), slow, None
    for name, strip in plan.strips.items():
        if fast:
            out[name] = gather.strip_mass(call, strip), "gather", None
        else:
            out[name] = sweep.pair_mass(call, strip.pairs), slow, None
    extra_at = 0
    for group in plan.groups:
        width = group.columns.shape[-1] if group.columns is not None else 0
        extra = None
        if group.appendable:
            if call.extra is not None:
                extra = call.extra[..., extra_at : extra_at + width]
            extra_at += width
        if extra is not None:
            rows = {"columns": extra.transpose(1, 2).to(call.dtype)}
            out.update(group.reduce(rows, "columns"))
        else:
            how = "sampled" if group.sample else slow
            out.update(group.reduce(sweep.rows(call, group), how))
    for name, reduce in plan.values.items():
        out[name] = reduce(call), "z", None
    return out
