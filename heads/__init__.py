"""Detectors, the scoring engine, and what a score does to a model: see `heads.detector`."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from heads.detector import DETECTORS as DETECTORS
    from heads.detector import make_detector as make_detector
    from heads.distance_profile import ring_profile as ring_profile
    from heads.masking import masking_experiment as masking_experiment
    from heads.pursuit import head_pursuit as head_pursuit
    from heads.scoring import score as score
    from heads.verdicts import verdict as verdict

_HOMES = {
    "DETECTORS": "heads.detector",
    "head_pursuit": "heads.pursuit",
    "make_detector": "heads.detector",
    "masking_experiment": "heads.masking",
    "ring_profile": "heads.distance_profile",
    "score": "heads.scoring",
    "verdict": "heads.verdicts",
}
__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, _HOMES)
