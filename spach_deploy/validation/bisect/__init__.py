"""Where a disagreement begins: which stage, which module, and what kind of error it is."""

from spach_deploy.validation.bisect.bisection import bisect_graph
from spach_deploy.validation.bisect.reference import Reference
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, StageResult, Suspect

__all__ = ["Bisection", "ModuleResult", "Reference", "StageResult", "Suspect", "bisect_graph"]
