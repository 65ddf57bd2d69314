"""Composition of heads in their weights: Q, K and V composition, OV circuits, copying.

W_Q, W_K and W_V are read off the model by feeding each attention module unit vectors at position 0,
where rotation does nothing; a module that does not map them linearly (a norm on q or k) is refused.
The gain of the norm before attention is folded in, and the mean taken out where that norm does so;
the scale of the norm, which depends on the input, is left out, and biases play no part.

With W_QK = W_Q·W_Kᵀ and W_OV = W_V·W_O (both d_model × d_model, acting on row vectors), the
composition of an earlier head u with a later head v is

    Q: ‖OV_u·QK_v‖ / (‖OV_u‖·‖QK_v‖)    K: with QK_vᵀ    V: ‖OV_u·OV_v‖ / (‖OV_u‖·‖OV_v‖)

in Frobenius norms, between 0 and 1; all from products of d_head × d_head. It is a statement about
weights: no data says that the path is used.

The copying score is Σ Re λ / Σ |λ| over the eigenvalues of W_E·W_OV·W_U, between −1 and 1; these
are the eigenvalues of a d_head × d_head product.

Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, SiteError
from interp.headid import HeadId
from interp.model import Model
from interp.scores import HeadScores
from interp.seam.calls import AttnCall
from interp.seam.structure import Layer
from interp.unembed import unembedding
from patching.effects import table
from patching.method import METHODS, Method
from patching.pairs import Pairs
from patching.readout import norm_of

KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Weights:
    """The matrices of one attention layer, for row vectors of the residual stream.

    Attributes:
        q: [head, d_model, d_qk].
        k: [head, d_model, d_qk], key-value heads repeated for the query heads that read them.
        v: [head, d_model, d_v], likewise.
        o: [head, d_v, d_model].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def attention_weights(model: Model, *, tower: str = "text") -> dict[int, Weights]:
    """The matrices of every attention layer, by layer, in float64.

    Raises:
        SiteError: q, k and v are not reached, or are not linear in what the module receives.
    """
    layers = {x.name: x for x in model.tower(tower).layers}
    width = model.w_o(next(iter(layers.values()))).shape[-1]
    generator = torch.Generator().manual_seed(0)
    check = torch.randn(4, width, generator=generator)
    probe = torch.cat([torch.zeros(1, width), torch.eye(width), check])
    seen, norms = _run(model, layers, probe)
    out = {}
    for name, layer in layers.items():
        if name not in seen:
            raise SiteError(
                f"q, k and v of {name} are not reached on {model.name}",
                hint="composition needs an attention layer of the transformers interface",
            )
        maps = [_linear(x, check, name, site) for x, site in zip(seen[name], KINDS, strict=True)]
        if name in norms:
            norm = norm_of(norms[name], width)
            maps = [_folded(m, norm.gain, norm.centred) for m in maps]
        group = layer.n_heads // layer.n_kv_heads
        q, k, v = maps
        out[layer.index] = Weights(
            q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0),
            model.w_o(layer).double(),
        )  # fmt: skip
    return out


def _run(
    model: Model, layers: dict[str, Layer], probe: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], dict[str, nn.Module]]:
    """q, k, v [row, head, d] of each layer at position 0 for the rows of a probe; and the norms."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    norms: dict[str, nn.Module] = {}
    made: list[tuple[nn.Module, Tensor]] = []
    hf = model.hf
    rows = probe

    def observer(call: AttnCall) -> None:
        if call.name in layers and call.q is not None and call.k is not None and call.v is not None:
            seen.setdefault(call.name, []).append(
                (call.q[:, :, 0].double(), call.k[:, :, 0].double(), call.v[:, :, 0].double())
            )

    def replace(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            for norm, out in made:
                if out is given:
                    norms[name] = norm
            new = rows.to(given)[:, None]
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made[:] = [*made[-3:], (module, output)]

    handles = [
        m.register_forward_hook(note)
        for m in hf.modules()
        if "norm" in type(m).__name__.lower() and next(m.children(), None) is None
    ]
    handles += [
        hf.get_submodule(name).register_forward_pre_hook(replace(name), with_kwargs=True)
        for name in layers
    ]
    try:
        with model.observe(observer):
            for at in range(0, len(probe), 1024):
                rows = probe[at : at + 1024]
                ids = torch.zeros(len(rows), 1, dtype=torch.long, device=model.device)
                model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        for handle in handles:
            handle.remove()
    joined = {
        name: tuple(torch.cat(x) for x in zip(*parts, strict=True)) for name, parts in seen.items()
    }
    return joined, norms  # type: ignore[return-value]


def _linear(x: Tensor, check: Tensor, name: str, site: str) -> Tensor:
    """[head, d_model, d]: the linear map behind x, whose rows are 0, unit vectors and checks."""
    bias, n = x[0], check.shape[1]
    matrix = (x[1 : n + 1] - bias).transpose(0, 1)
    made = torch.einsum("nd,hde->nhe", check.to(x), matrix) + bias
    wrong = float((made - x[n + 1 :]).abs().max())
    if wrong > 1e-2 * float(x[n + 1 :].abs().max()) + 1e-6:
        raise SiteError(
            f"{site} of {name} is not linear in what the layer receives (a norm on {site}?), so "
            f"it has no weight matrix",
            hint="measure composition by path patching instead",
        )
    return matrix


def _folded(matrix: Tensor, gain: Tensor, centred: bool) -> Tensor:
    matrix = matrix * gain.to(matrix)[:, None]
    return matrix - matrix.mean(1, keepdim=True) if centred else matrix


@dataclass(frozen=True, eq=False)
class Composition:
    """Composition scores of pairs of heads.

    Attributes:
        kind: `q`, `k` or `v`.
        heads: both axes.
        values: [earlier, later] within [0, 1]; NaN unless the first head is in an earlier layer.
    """

    kind: str
    heads: tuple[HeadId, ...]
    values: Float[np.ndarray, "head head"]

    def top(self, n: int = 10) -> list[tuple[HeadId, HeadId, float]]:
        """The strongest pairs, first the earlier head."""
        order = np.argsort(-np.nan_to_num(self.values, nan=-1), axis=None, kind="stable")[:n]
        rows, columns = np.unravel_index(order, self.values.shape)
        return [
            (self.heads[i], self.heads[j], float(self.values[i, j]))
            for i, j in zip(rows, columns, strict=True)
            if not np.isnan(self.values[i, j])
        ]


@torch.no_grad()
def composition_scores(model: Model, *, kind: str = "q", tower: str = "text") -> Composition:
    """How far each head's output lies in what each later head reads.

    Args:
        model: the model.
        kind: `q`, `k` or `v`: the input of the later head.
        tower: tower of the heads.

    Raises:
        InputError: an unknown kind.
        SiteError: see `attention_weights`.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be q, k or v; got {kind!r}")
    weights = attention_weights(model, tower=tower)
    heads = model.tower(tower).heads
    v = torch.cat([w.v for w in weights.values()])
    o = torch.cat([w.o for w in weights.values()])
    layers = list(weights.values())
    reads = torch.cat([{"q": w.q, "k": w.k, "v": w.v}[kind] for w in layers])
    rest = torch.cat([{"q": w.k, "k": w.q, "v": w.o.transpose(1, 2)}[kind] for w in layers])
    # ‖V·O·R·Sᵀ‖² = tr(VᵀV · (O·R) · SᵀS · (O·R)ᵀ): only d_head × d_head products.
    v_gram, s_gram = v.transpose(1, 2) @ v, rest.transpose(1, 2) @ rest
    own = (v_gram * (o @ o.transpose(1, 2))).sum((1, 2)).clamp_min(0).sqrt()
    other = (s_gram * (reads.transpose(1, 2) @ reads)).sum((1, 2)).clamp_min(0).sqrt()
    values = np.full((len(heads), len(heads)), np.nan)
    for i, head in enumerate(heads):
        later = [j for j, h in enumerate(heads) if h.layer > head.layer]
        if later:
            between = o[i] @ reads[later]
            inside = torch.einsum("ab,jbc,jcd,jad->j", v_gram[i], between, s_gram[later], between)
            size = (own[i] * other[later]).clamp_min(1e-30)
            values[i, later] = (inside.clamp_min(0).sqrt() / size).cpu()
    return Composition(kind, heads, values)


@torch.no_grad()
def ov_circuit(model: Model, head: HeadId | str) -> Float[Tensor, "token token"]:
    """W_E·W_OV·W_U of a head: row a, column b is what attending to a adds to the logit of b.

    The final norm's gain and centring are folded in, its scale left out; d_vocab² numbers.
    """
    head = HeadId.parse(head) if isinstance(head, str) else head
    model.layer_of(head)
    w = attention_weights(model, tower=head.tower)[head.layer]
    before, after = _ends(model)
    return before @ w.v[head.head] @ w.o[head.head] @ after


@torch.no_grad()
def qk_circuit(model: Model, head: HeadId | str) -> Float[Tensor, "token token"]:
    """W_E·W_QK·W_Eᵀ of a head: row a, column b is the score of query a for key b, unscaled.

    Positions and rotation are left out.
    """
    head = HeadId.parse(head) if isinstance(head, str) else head
    model.layer_of(head)
    w = attention_weights(model, tower=head.tower)[head.layer]
    before, _ = _ends(model)
    return (before @ w.q[head.head]) @ (before @ w.k[head.head]).T


def _ends(model: Model) -> tuple[Tensor, Tensor]:
    """W_E [d_vocab, d_model] and W_U [d_model, d_vocab] with the final norm folded in."""
    get = getattr(model.hf, "get_input_embeddings", None)
    embedding = get() if get is not None else None
    if embedding is None or not isinstance(getattr(embedding, "weight", None), Tensor):
        raise SiteError(f"{model.name} has no token embedding that can be read")
    last = unembedding(model)
    after = last.weight.double().T
    if last.gain is not None:
        after = after * last.gain.double()[:, None]
    if last.centred:
        after = after - after.mean(0)
    return embedding.weight.double(), after


@torch.no_grad()
def copying_scores(
    model: Model, *, tower: str = "text"
) -> dict[HeadId, float]:  # fmt: skip
    """Σ Re λ / Σ |λ| of each head's OV circuit: 1 copies, −1 suppresses what is attended to.

    NaN for a head that writes nothing.

    Raises:
        SiteError: see `attention_weights`; or the model has no embedding or unembedding.
    """
    before, after = _ends(model)
    ends = after @ before  # [d_model, d_model]
    out = {}
    for index, w in attention_weights(model, tower=tower).items():
        small = torch.einsum("hvd,de,hew->hvw", w.o, ends, w.v)
        values = torch.linalg.eigvals(small)
        total = values.abs().sum(-1)
        share = (values.real.sum(-1) / total).masked_fill(total < 1e-20, torch.nan)
        for h, score in enumerate(share.tolist()):
            out[HeadId(index, h, tower)] = score
    return out


@METHODS.register("copying")
@dataclass(frozen=True)
class Copying(Method):
    """Share of positive eigenvalues of each head's OV circuit; from weights, without data."""

    name: ClassVar[str] = "copying"
    summary: ClassVar[str] = "whether a head raises what it attends to; from weights alone"
    citation: ClassVar[str] = "Elhage et al. 2021, A Mathematical Framework, copying heads"

    def scores(
        self, pairs: Pairs, *, progress: Callable[[int, int], None] | None = None
    ) -> HeadScores:
        """See `Method`; every example has the same score."""
        units = pairs.model.tower(pairs.tower).heads
        found = copying_scores(pairs.model, tower=pairs.tower)
        row = np.array([found[h] for h in units])
        n = len(pairs.pairs)
        zeros = np.zeros(n)
        scores = table(
            "copying", pairs.model, pairs, units, np.tile(row, (n, 1)), zeros, zeros, params={}
        )
        return _unit(scores, "Σ Re λ / Σ |λ|")


def _unit(scores: HeadScores, unit: str) -> HeadScores:
    from dataclasses import replace

    return replace(scores, unit=unit, range=(-1.0, 1.0))
