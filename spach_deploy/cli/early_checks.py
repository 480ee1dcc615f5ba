"""What can be refused before torch is loaded, which takes seconds: a mistyped name is answered at once.

The pipeline checks all of it again with the same functions, for callers that are no command.
"""

from __future__ import annotations

from pathlib import Path

from spach_deploy.bundle.store import check_target, default_directory
from spach_deploy.common.files import Destination
from spach_deploy.engine.flavours import choose_flavour
from spach_deploy.models.registry import check_spec, resolve
from spach_deploy.options.quantization import check_quantization
from spach_deploy.options.specs import ExportOptions


def refuse_early(options: ExportOptions) -> Destination | None:
    """Raise the SpachError that `pipeline.export` would raise for model, engine or target; where the bundle will go."""
    check_spec(options.model)
    check_quantization(options)
    refuse_opset(options)
    flavour = choose_flavour(options.engine.flavour)
    if flavour is not None:
        engine = flavour.resolve(options.engine, options.precision)
        if options.precision.is_quantized:
            flavour.resolve(engine, options.rest)
    target = target_directory(options)
    return None if target is None else check_target(target, overwrite=options.overwrite)


def refuse_opset(options: ExportOptions) -> None:
    """The same for --opset, which takes ONNX to be asked about."""
    if options.opset is not None:
        from spach_deploy.graph.opset import check_opset

        check_opset(options)


def target_directory(options: ExportOptions) -> Path | None:
    """Where the bundle will go; None where the checkpoint has yet to tell which model it is."""
    if options.output is not None or options.model.name is None:
        return options.output
    return default_directory(resolve(options.model.name), options.precision.value)
