"""Bisection: the first export step whose output is wrong, the first module that is wrong given right inputs, and the
kind of fault.

`export_steps` repeats the steps of an export and compares each with the reference. `locate` does the same for the
modules of one graph: `probe_points` finds where to look, `tensor_matching` records the reference's tensors there and
matches the graph's with them, guided by `search`, `fault_diagnosis` names the fault.
"""

from spach_deploy.validation.bisect.locate import bisect_graph
from spach_deploy.validation.bisect.result import Bisection, ModuleResult, StepResult, Suspect
from spach_deploy.validation.bisect.tensor_matching import ProbedReference

__all__ = ["Bisection", "ModuleResult", "ProbedReference", "StepResult", "Suspect", "bisect_graph"]
