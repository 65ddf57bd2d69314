"""An independent reading of the same patterns: TransformerLens on a copy of the model.

TransformerLens computes attention by code of its own for most families, and shows the pattern at
`hook_pattern`. `compare` wraps a deep copy, set to eager attention, runs it on the same inputs and
measures the largest |A_seam − A_TransformerLens| over real query rows. What the two share is the
weights and the tokens.

An oracle that computes another output than the model says nothing about its patterns: then, and
where TransformerLens does not take the family, the check does not apply (`ok` is None) and its
note says why. It never fails for want of an oracle.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.doctor import Check, copy_of
from interp.errors import DoctorError
from interp.seam.calls import AttnCall

if TYPE_CHECKING:
    from interp.model import Model

NAME = "patterns equal TransformerLens' on a copy"
_EXAMPLES = 2  # of a batch; a pattern is a T×T matrix


@torch.no_grad()
def compare(model: "Model", inputs: Mapping[str, Tensor]) -> Check:
    """Compare the patterns that the seam reads with those of TransformerLens.

    Holds a copy of the model, and the patterns of two examples, while it runs.

    Args:
        model: the model in hand; neither it nor its configuration changes.
        inputs: keyword inputs of its forward, with `input_ids`.

    Returns:
        A check whose worst is the largest absolute difference of two pattern entries, to be at
        most 1e-5 in float32 and wider, 3e-2 in 16 bits; `ok` is None where nothing can be compared.
    """
    exact = model.dtype in (torch.float32, torch.float64)
    limit = 1e-5 if exact else 3e-2
    if "input_ids" not in inputs:
        return Check(NAME, None, limit, None, "TransformerLens is asked on token ids alone")
    if any(hasattr(module, "hook_pattern") for module in model.hf.modules()):
        return Check(NAME, None, limit, None, "the model is TransformerLens' already")
    try:
        theirs, output = _theirs(model, inputs)
    # Whatever goes wrong inside the other library says nothing about this model.
    except Exception as error:  # noqa: BLE001
        why = str(error).strip().split("\n")[0][:120] or type(error).__name__
        return Check(NAME, None, limit, None, f"no oracle for {type(model.hf).__name__}: {why}")
    worst, where, compared = 0.0, "", set()

    def observer(call: AttnCall) -> None:
        nonlocal worst, where
        pattern = theirs.get(call.name)
        if pattern is None:
            return
        compared.add(call.name)
        for b in range(len(pattern)):
            gap = _gap(call, pattern[b], b, inputs)
            # NaN compares false with everything: it must count as the worst of all.
            if not gap <= worst:
                worst, where = gap, call.name

    with model.observe(observer):
        own = _first_floating(model.forward(inputs))
    drift = _drift(own, output, inputs)
    if not drift <= (1e-3 if exact else 0.1):
        note = f"no oracle: TransformerLens' copy computes another output (by {drift:.1e})"
        return Check(NAME, None, limit, None, note)
    total = len(model.structure.layers)
    if not compared:
        return Check(NAME, None, limit, None, "TransformerLens shows no pattern of these layers")
    note = f"worst in {where}; " if where else ""
    return Check(NAME, worst, limit, worst <= limit, f"{note}{len(compared)} of {total} layers")


def _first_floating(output: Any) -> Tensor:
    values = output.values() if isinstance(output, Mapping) else output
    for value in [output] if isinstance(output, Tensor) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise DoctorError("the model's output holds no tensor to compare")


def _drift(own: Tensor, theirs: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """Largest difference of two outputs at tokens that are no padding, in units of their size."""
    if own.shape != theirs.shape:
        return float("nan")
    gap = (own.double() - theirs.double()).abs()
    mask = inputs.get("attention_mask")
    # What stands at padding depends on how a kernel treats rows that see nothing.
    if mask is not None and mask.shape == own.shape[:2]:
        gap = gap[mask.bool()]
    return float(gap.max()) / float(own.abs().max().clamp_min(1))


def _gap(call: AttnCall, theirs: Tensor, b: int, inputs: Mapping[str, Tensor]) -> float:
    """Largest difference over the query rows of one example that are no padding."""
    ours = call.rows(b, slice(0, call.n_heads), slice(0, call.n_query))
    if ours.shape != theirs.shape:
        return float("nan")
    gap = (ours.double() - theirs.to(ours.device).double()).abs()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[-1] == call.n_query and mask.dim() == 2:
        gap = gap[:, mask[b].bool()]
    return float(gap.max()) if gap.numel() else 0.0


def _theirs(model: "Model", inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """TransformerLens' patterns by the name of our layer, and its output.

    Returns:
        [example, head, query, key] of the first examples for each layer whose hook fired once,
        and the first floating tensor of the output.
    """
    # Imported here: it takes seconds, and nobody who does not ask for the oracle should wait.
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf = copy_of(model)
    if hasattr(hf, "set_attn_implementation"):
        # Adapters that run the original attention show its pattern only if it is materialised.
        hf.set_attn_implementation("eager")
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    wrapped: nn.Module = bridge.original_model
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, pattern: Tensor) -> None:
            seen.setdefault(name, []).append(pattern[:_EXAMPLES].detach().clone())

        return hook

    with ExitStack() as stack:
        for name, module in wrapped.named_modules():
            point = getattr(module, "hook_pattern", None)
            if isinstance(point, nn.Module):
                stack.callback(point.register_forward_hook(keep(name)).remove)
        output = _first_floating(wrapped(**model.placed(inputs)))
    # A component stands where the module was, and holds it as `_original_component`.
    plain = {name.replace("._original_component", ""): patterns for name, patterns in seen.items()}
    found: dict[str, Tensor] = {}
    for layer in model.structure.layers:
        near = [p for name, p in plain.items() if layer == name or layer.startswith(f"{name}.")]
        if len(near) == 1 and len(near[0]) == 1 and near[0][0].dim() == 4:
            found[layer] = near[0][0]
    return found, output
