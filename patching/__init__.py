"""Causal effects of heads: patch, ablate, attribute; see `patching.method`."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from patching.circuit import HeadSet as HeadSet
    from patching.circuit import circuit_curve as circuit_curve
    from patching.circuit import top_heads as top_heads
    from patching.composition import composition_scores as composition_scores
    from patching.composition import copying_scores as copying_scores
    from patching.composition import ov_circuit as ov_circuit
    from patching.composition import qk_circuit as qk_circuit
    from patching.direct import direct_effects as direct_effects
    from patching.direct import logit_attribution as logit_attribution
    from patching.edges import EdgeScores as EdgeScores
    from patching.effects import PositionEffects as PositionEffects
    from patching.engine import head_effects as head_effects
    from patching.engine import head_position_effects as head_position_effects
    from patching.importance import head_importance as head_importance
    from patching.knockout import head_knockout as head_knockout
    from patching.method import METHODS as METHODS
    from patching.method import make_method as make_method
    from patching.pairs import Pairs as Pairs
    from patching.path import edge_effects as edge_effects
    from patching.path import path_effects as path_effects
    from patching.prune import greedy_prune as greedy_prune
    from patching.prune import joint_effects as joint_effects
    from patching.prune import leave_one_out as leave_one_out
    from patching.relevance import relevance_maps as relevance_maps
    from patching.relevance_hiding import perturbation as perturbation
    from patching.repair import self_repair as self_repair
    from patching.verify import verify_top as verify_top
    from patching.windows import knockout_curves as knockout_curves
    from patching.windows import window_knockout as window_knockout

_HOMES = {
    "EdgeScores": "patching.edges",
    "HeadSet": "patching.circuit",
    "METHODS": "patching.method",
    "Pairs": "patching.pairs",
    "PositionEffects": "patching.effects",
    "circuit_curve": "patching.circuit",
    "composition_scores": "patching.composition",
    "copying_scores": "patching.composition",
    "direct_effects": "patching.direct",
    "edge_effects": "patching.path",
    "greedy_prune": "patching.prune",
    "head_effects": "patching.engine",
    "head_knockout": "patching.knockout",
    "head_position_effects": "patching.engine",
    "head_importance": "patching.importance",
    "joint_effects": "patching.prune",
    "knockout_curves": "patching.windows",
    "leave_one_out": "patching.prune",
    "logit_attribution": "patching.direct",
    "make_method": "patching.method",
    "ov_circuit": "patching.composition",
    "path_effects": "patching.path",
    "perturbation": "patching.relevance_hiding",
    "relevance_maps": "patching.relevance",
    "qk_circuit": "patching.composition",
    "self_repair": "patching.repair",
    "top_heads": "patching.circuit",
    "verify_top": "patching.verify",
    "window_knockout": "patching.windows",
}
__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
