"""Where a disagreement begins: which stage, which module, and what kind of error it is."""

from spach_deploy.validation.bisect.export_steps import bisect_graph
from spach_deploy.validation.bisect.reference import ProbedReference
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, StepResult, Suspect

__all__ = ["Bisection", "ModuleResult", "ProbedReference", "StepResult", "Suspect", "bisect_graph"]
