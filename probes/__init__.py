"""Probes on heads, all heads at once: what z tells, how surely, and recipes made from it.

- `collect_features`, `capture`: z of every head, kept or streamed;
- `HeadStatistics`: sums that any number of examples can be streamed into and merged;
- `fit_ridge`, `fit_logistic`, `mean_difference`: fits and directions;
- `cross_validate`: held-out accuracy of every head with interval, null and control task;
- `fit_iti`, `fit_mean_difference`, `function_vector`: recipes.
"""

from typing import TYPE_CHECKING

from interp.lazy import lazy

if TYPE_CHECKING:
    from probes.control import control_labels as control_labels
    from probes.direction import Directions as Directions
    from probes.direction import mean_difference as mean_difference
    from probes.features import HeadFeatures as HeadFeatures
    from probes.features import capture as capture
    from probes.features import collect_features as collect_features
    from probes.functions import FunctionVector as FunctionVector
    from probes.functions import function_vector as function_vector
    from probes.iti import fit_iti as fit_iti
    from probes.logistic import LogisticFit as LogisticFit
    from probes.logistic import fit_logistic as fit_logistic
    from probes.probe import PROBES as PROBES
    from probes.probe import make_probe as make_probe
    from probes.ridge import RidgeFit as RidgeFit
    from probes.ridge import fit_ridge as fit_ridge
    from probes.ridge import ridge_from_statistics as ridge_from_statistics
    from probes.shift import fit_mean_difference as fit_mean_difference
    from probes.statistics import HeadStatistics as HeadStatistics
    from probes.statistics import class_statistics as class_statistics
    from probes.validate import cross_validate as cross_validate

_HOMES = {
    "PROBES": "probes.probe",
    "Directions": "probes.direction",
    "FunctionVector": "probes.functions",
    "HeadFeatures": "probes.features",
    "HeadStatistics": "probes.statistics",
    "LogisticFit": "probes.logistic",
    "RidgeFit": "probes.ridge",
    "capture": "probes.features",
    "class_statistics": "probes.statistics",
    "collect_features": "probes.features",
    "control_labels": "probes.control",
    "cross_validate": "probes.validate",
    "fit_iti": "probes.iti",
    "fit_logistic": "probes.logistic",
    "fit_mean_difference": "probes.shift",
    "fit_ridge": "probes.ridge",
    "function_vector": "probes.functions",
    "make_probe": "probes.probe",
    "mean_difference": "probes.direction",
    "ridge_from_statistics": "probes.ridge",
}
__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, _HOMES)
