"""Running torch code so that its backward computes coefficients of some rules."""

from relp.propagation.engine import Propagation, coverage, propagate
from relp.propagation.frames import module_names
from relp.propagation.kinds import UnknownOperationError
from relp.propagation.tally import must_have_attached

__all__ = [
    "Propagation",
    "UnknownOperationError",
    "coverage",
    "module_names",
    "must_have_attached",
    "propagate",
]
