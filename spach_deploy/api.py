"""The public Python interface: `export`, `calibrate`, `validate` and `Bundle`. docs/python.md shows how to use it.

`import spach_deploy` offers these, `Session`, `create_model`, and the types that they return; everything else is
private and may change without notice. The functions take the options of the commands as keywords (`options.table`),
raise the errors of `common.errors`, and print nothing. Error messages name options as the command line does: `--heads`
is the keyword `heads`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle import store
from spach_deploy.common.errors import UsageError
from spach_deploy.options.keywords import FilePath, values_of_keywords, with_keywords
from spach_deploy.options.table import CALIBRATE, EXPORT, VALIDATE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Unpack

    from spach_deploy.common.progress import ExportObserver
    from spach_deploy.models.checkpoint import LoadedModel
    from spach_deploy.options.keywords import CalibrateKeywords, ExportKeywords, ValidateKeywords
    from spach_deploy.options.specs import ModelSpec
    from spach_deploy.quantization.calibration import Calibration
    from spach_deploy.runtime.session import Runtime, Session
    from spach_deploy.validation.result import Validation


@dataclasses.dataclass(frozen=True)
class Bundle(store.Bundle):
    """A bundle on disk: `path` is its directory, `manifest` its manifest.json as a typed object.

        bundle = Bundle.open("build/ms_hybrid_s-fp16")

    reads the manifest and compares the SHA-256 of every file, unless `verify=False`.
    """

    def session(
        self,
        *,
        runtime: Runtime = "auto",
        labels: FilePath | Sequence[str] | None = None,
        batch: int | None = None,
        threads: int | None = None,
        runtime_cache: bool | FilePath = True,
        cuda_graphs: bool = False,
    ) -> Session:
        """A `Session` that runs the bundle within a `with` block.

        with bundle.session() as session:
            session.predict("photo.jpg", top_k=5)
        """
        from spach_deploy.runtime.session import Session

        return Session(
            self,
            runtime=runtime,
            labels=labels,
            batch=batch,
            threads=threads,
            runtime_cache=runtime_cache,
            cuda_graphs=cuda_graphs,
        )


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished export: the bundle, and its validation."""

    bundle: Bundle
    validation: Validation


@with_keywords(EXPORT)
def export(
    model: str | nn.Module | None = None,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    *,
    recipe: FilePath | None = None,
    observer: ExportObserver | None = None,
    **options: Unpack[ExportKeywords],
) -> ExportResult:
    """Export a model to a bundle with graph, engine and validation, as spach-export does, in this process.

        result = spach_deploy.export("ms_hybrid_s", precision="fp16", gpu=["sm86", "sm89"])
        result = spach_deploy.export(my_module, torch.zeros(1, 3, 224, 224), precision="fp16")

    `model`: a name, or any nn.Module, which is exported in evaluation mode and stays as it is; `example_inputs` tell
    what it takes: images, float32 (B, C, H, W), and other inputs in forward's order or by its arguments' names
    (docs/own_module.md). `recipe`: a TOML file of the same options; keywords win over it.
    `observer`: called with phases and notes as they come. The cache of finished exports is not used. Raises a subclass
    of SpachError, and then has written nothing; a validation that does not pass is a MismatchError.
    """
    from spach_deploy.options.recipe import export_options
    from spach_deploy.pipeline import export as pipeline
    from spach_deploy.pipeline.estimate import refuse_early

    own = None if model is None or isinstance(model, str) else model
    values = values_of_keywords("export", EXPORT, {"model": model if own is None else None, **options})
    parsed = export_options(values, None if recipe is None else Path(recipe))
    if own is None:
        if example_inputs is not None:
            raise UsageError("example_inputs are for a module of your own.", "Give the module, or leave them out.")
        done = pipeline.export(parsed, observer, destination=refuse_early(parsed))
    else:
        done = pipeline.export(parsed, observer, loaded=_loaded(own, example_inputs, parsed.model))
    return ExportResult(Bundle(done.bundle.path, done.bundle.manifest), done.validation)


def _loaded(
    module: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None, spec: ModelSpec
) -> LoadedModel:
    """The user's module as the steps of an export take it. UsageError without example inputs."""
    import torch

    from spach_deploy.models.own_module import loaded_module

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"A {type(module).__name__} is no model.", "Give a name, or an nn.Module.")
    if example is None:
        raise UsageError(
            "Your module's inputs are not known.", "Give example_inputs, such as torch.zeros(1, 3, 224, 224)."
        )
    if spec.image_size is not None:
        raise UsageError("example_inputs tell the size of your module's images.", "Leave image_size out.")
    if spec.checkpoint is not None or spec.module is not None:
        raise UsageError("The module has its weights already.", "Load a checkpoint into it, or name a model instead.")
    return loaded_module(module, example, spec)


@with_keywords(CALIBRATE)
def calibrate(
    model: str | None = None,
    *,
    output: FilePath,
    observer: ExportObserver | None = None,
    **options: Unpack[CalibrateKeywords],
) -> Calibration:
    """Calibrate, and write the scales to `output`, FILE.json, for later exports, as spach-calibrate does.

        spach_deploy.calibrate("ms_hybrid_s", calibration="photos/", output="scales.json")

    A file that fits these options and images is kept, and a run that was killed is continued. Raises a subclass of
    SpachError.
    """
    from spach_deploy.models.registry import check_spec
    from spach_deploy.options.quantization import check_calibration_file, check_quantization
    from spach_deploy.options.recipe import calibrate_options
    from spach_deploy.pipeline.export import calibrate_to_file

    parsed = calibrate_options(values_of_keywords("calibrate", CALIBRATE, {"model": model, **options}))
    check_spec(parsed.model)
    check_quantization(parsed)
    return calibrate_to_file(parsed, check_calibration_file(Path(output)), observer)


@with_keywords(VALIDATE)
def validate(
    target: FilePath | store.Bundle, *, observer: ExportObserver | None = None, **options: Unpack[ValidateKeywords]
) -> Validation:
    """Compare a bundle, its engine.plan, its model.onnx or another graph with PyTorch in FP32; as spach-validate does.

    `target`: a path, or an opened bundle.

        assert spach_deploy.validate("build/ms_hybrid_s-fp16", images="val/").passed

    Writes nothing. Disagreement is not an error: it is in the result's `all_findings`. `observer.note` is called before
    steps that take long. Raises a subclass of SpachError for what cannot be validated.
    """
    from spach_deploy.common.progress import ExportObserver
    from spach_deploy.models.registry import check_ignore
    from spach_deploy.options.command_line import validate_command
    from spach_deploy.validation.result import Provenance
    from spach_deploy.validation.target import ValidationRequest, validate_target

    given: dict[str, Any] = values_of_keywords("validate", VALIDATE, options)
    check_ignore(given.get("checkpoint"), given.get("ignore", ()))
    path = target.path if isinstance(target, store.Bundle) else Path(target)
    validation = validate_target(ValidationRequest.of(path, given), (observer or ExportObserver()).note)
    return dataclasses.replace(validation, run=Provenance.here(validate_command(str(path), None, given)))
