"""Steps "check the options", "load the model" and "compare with your answers": the FP32 reference with its weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from spach_deploy.blocks import REWRITES
from spach_deploy.bundle.outputs import chosen_outputs, of_role
from spach_deploy.bundle.store import default_directory
from spach_deploy.common.errors import MissingPackageError, UsageError
from spach_deploy.common.progress import Phases
from spach_deploy.common.versions import refuse_unfit_packages
from spach_deploy.graph.export import is_alike_in_batches
from spach_deploy.graph.interface import check_outputs
from spach_deploy.graph.opset import check_opset
from spach_deploy.graph.passes import CPU_INT8_PASSES, TENSORRT_PASSES
from spach_deploy.models import own_module
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.quantization import check_quantization
from spach_deploy.options.specs import BatchProfile, ExportOptions, Role
from spach_deploy.validation import user_answers
from spach_deploy.validation.user_answers import Agreement, read_answers


def check_options(options: ExportOptions) -> None:
    """Refuse options that cannot work, and missing or old packages, before any work."""
    refuse_unfit_packages()
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingPackageError("onnxruntime", "Validating a graph", "pip install 'spach-deploy[cpu]'")
    check_quantization(options)
    check_opset(options)
    known = all_rewrites()
    for name in options.disabled_rewrites:
        if name not in known:
            raise UsageError(f"There is no rewrite {name!r} to turn off.", f"One of {', '.join(known)}.")


def all_rewrites() -> tuple[str, ...]:
    """The names of all rewrites and passes, which --no-rewrite takes."""
    passes = (step.name for step in (*TENSORRT_PASSES, *CPU_INT8_PASSES))
    return tuple(dict.fromkeys([*(step.name for step in REWRITES), *passes]))


def load(options: ExportOptions, phases: Phases, loaded: LoadedModel | None = None) -> LoadedModel:
    """The reference model with its weights, which gives the outputs that are asked for. Notes say what was inferred
    from the checkpoint or unwrapped. `loaded`: the model, if it is there already.
    """
    factory = options.model.module if loaded is None and options.model.checkpoint is None else None
    loaded = loaded or own_module.load(options.model)
    if isinstance(loaded.model, own_module.OwnForward):
        own_module.choose_outputs(loaded.model, options.outputs)
        for problem in own_module.check_batches(loaded.model, _batches_to_run(loaded.model, options.engine.batch)):
            phases.note(f"{problem[0].upper()}{problem[1:]}.")
    else:
        loaded.model.outputs = chosen_outputs(options.outputs, loaded.num_classes, loaded.model.stage_shapes)
    check_outputs(options.outputs, loaded.num_classes)
    _check_bounds(loaded, options)
    for note in loaded.notes:
        phases.note(f"{note[0].upper()}{note[1:]}.")
    if factory is not None and own_module.draws_weights(factory, loaded):
        phases.note(
            f"{factory} makes other weights each time, so later commands cannot make these again: give --checkpoint"
            " FILE, or a factory that loads or seeds them."
        )
    return loaded


def _batches_to_run(model: own_module.OwnForward, profile: BatchProfile) -> Collection[int]:
    """Sizes of the batches that a user's module is run in: the profile's three where its forward does the same in
    every batch, else all.
    """
    ends = {profile.min, profile.opt, profile.max}
    if len(ends) == profile.max - profile.min + 1 or is_alike_in_batches(model, profile.max):
        return ends
    return range(profile.min, profile.max + 1)


def _check_bounds(loaded: LoadedModel, options: ExportOptions) -> None:
    """UsageError for a bound on accuracy of a graph without logits."""
    if options.quantization.max_drop is not None and of_role(loaded.model.outputs, Role.LOGITS) is None:
        names = ", ".join(tensor.name for tensor in loaded.model.outputs)
        problem = f"--max-drop counts right classes, and this graph gives {names} alone."
        raise UsageError(problem, "Give --max-rel-l2 instead.")


def hold_to_answers(
    loaded: LoadedModel, options: ExportOptions, phases: Phases
) -> tuple[LoadedModel, Agreement | None]:
    """Compare the model with the user's own outputs (--answers), if given. Returns the model and the comparison.

    Raises what `user_answers.hold_to_answers` raises where they disagree.
    """
    if options.answers is None:
        return loaded, None
    user_answers.check_is_ours(loaded.origin)
    if loaded.origin == "demo":
        raise UsageError("--answers are of your model, and demo weights are nobody's.", "Give --checkpoint FILE too.")
    given = read_answers(options.answers)
    with phases.phase("compare with your answers"):
        return user_answers.hold_to_answers(loaded, given, phases.note)


def target_directory(options: ExportOptions, loaded: LoadedModel) -> Path:
    """Where the bundle goes: --output, or build/MODEL-PRECISION."""
    return options.output or default_directory(loaded.name, options.precision.value)
