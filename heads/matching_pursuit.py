"""Simultaneous orthogonal matching pursuit on what one head writes, from small products alone.

With X = (z − mean z) W_O and unit rows D_j, everything the pursuit needs follows from

    X D_jᵀ = z (D_j W_Oᵀ)ᵀ,     D Dᵀ,     ‖X_i‖² = z_i (W_O W_Oᵀ) z_iᵀ

so that X [n, d_model] is never made. Atoms are made orthonormal as they are chosen, which refits
all coefficients at once.

Source: Tropp, Gilbert and Strauss 2006, "Algorithms for simultaneous sparse approximation, part I";
its use on heads is that of Basile et al. 2025, arXiv 2510.21518.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError

_DEPENDENT = 1e-8  # an atom with less than this of its squared norm outside the span lies in it
_NOTHING = 1e-10  # correlations below this part of what they could be explain nothing
_CONSTANT = 1e-12  # a squared spread below this part of the squared size is rounding
_CHUNK = 1 << 24  # correlations held at once


@dataclass(frozen=True)
class Pursued:
    """A matching pursuit on one head.

    Attributes:
        atoms: rows of the dictionary in the order they were chosen; fewer than asked for where no
            further one explains anything.
        curve: [k] explained share after 1, 2, … atoms; the last one repeats where it stopped.
        explained: [n] squared norm of each sample's projection on all atoms chosen.
        norms: [n] squared norm of each centred sample.
    """

    atoms: tuple[int, ...]
    curve: Float[np.ndarray, " k"]
    explained: Float[np.ndarray, " n"]
    norms: Float[np.ndarray, " n"]

    @property
    def evr(self) -> float:
        """Explained share of the variance, in [0, 1]; 0 without variance."""
        return float(self.curve[-1])


@torch.no_grad()
def pursue(
    z: Float[Tensor, "n d_head"],
    w_o: Float[Tensor, "d_head d_model"],
    dictionary: Float[Tensor, "atom d_model"],
    k: int,
    *,
    gram: Float[Tensor, "atom atom"] | None = None,
) -> Pursued:
    """Matching pursuit on what one head writes, without writing it out.

    Args:
        z: the head's z on n samples; centred here.
        w_o: its output projection.
        dictionary: unit rows.
        k: most atoms.
        gram: products of the dictionary's rows, if at hand.
    """
    z, w_o, dictionary = z.double(), w_o.double(), dictionary.double()
    gram = dictionary @ dictionary.T if gram is None else gram
    size = z.square().sum()
    z = z - z.mean(0)
    norms = ((z @ (w_o @ w_o.T)) * z).sum(-1).clamp(min=0)
    whole = float(norms.sum())
    curve = np.zeros(k)
    explained = torch.zeros_like(norms)
    # What is left of a constant without its mean is rounding, whatever the scale.
    written = float(size) * float(torch.linalg.matrix_norm(w_o, 2)) ** 2
    if whole <= _CONSTANT * written:
        return Pursued((), curve, explained.numpy(), torch.zeros_like(norms).numpy())
    seen = dictionary @ w_o.T  # [atom, d_head]
    atoms: list[int] = []
    # Orthonormal basis of the chosen atoms, in terms of all atoms and of samples: row t of `basis`
    # is ⟨q_t, D_j⟩ for every j, and column t of `along` is ⟨X_i, q_t⟩ for every i.
    basis = gram.new_zeros(0, len(dictionary))
    along = z.new_zeros(len(z), 0)
    left = gram.diagonal().clone()
    for t in range(min(k, len(dictionary))):
        strength = _strength(z, seen, along, basis)
        strength[left <= _DEPENDENT] = -1.0  # those chosen among them
        best = int(strength.argmax())
        if float(strength[best]) <= _NOTHING * math.sqrt(whole * len(z)):
            curve[t:] = curve[t - 1] if t else 0.0
            break
        atoms.append(best)
        length = left[best].sqrt()
        row = (gram[best] - basis[:, best] @ basis) / length
        column = (z @ seen[best] - along @ basis[:, best]) / length
        basis, along = torch.cat([basis, row[None]]), torch.cat([along, column[:, None]], dim=1)
        left = (left - row.square()).clamp(min=0)
        explained = explained + column.square()
        curve[t] = min(1.0, float(explained.sum()) / whole)
    else:
        curve[len(atoms) :] = curve[len(atoms) - 1]
    return Pursued(tuple(atoms), curve, explained.numpy(), norms.numpy())


def _strength(z: Tensor, seen: Tensor, along: Tensor, basis: Tensor) -> Tensor:
    """Σ_i |⟨R_i, D_j⟩| of every atom, a block of samples at a time."""
    total = seen.new_zeros(len(seen))
    step = max(1, _CHUNK // max(1, len(seen)))
    for at in range(0, len(z), step):
        rows = slice(at, at + step)
        total += (z[rows] @ seen.T - along[rows] @ basis).abs().sum(0)
    return total


def per_sample(found: Pursued) -> Float[np.ndarray, " n"]:
    """A value per sample whose mean is the explained share; see the module's docstring."""
    whole = found.norms.mean()
    if whole == 0:
        return np.zeros(len(found.norms))
    ratio = found.evr
    values: Float[np.ndarray, " n"] = ratio + (found.explained - ratio * found.norms) / whole
    return values


def unit(rows: Float[Tensor, "atom d_model"]) -> Float[Tensor, "atom d_model"]:
    """Rows with norm one.

    Raises:
        InputError: a row is zero.
    """
    norms = rows.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        raise InputError("a direction must not be zero")
    found: Tensor = rows / norms
    return found
