"""The public interface: what `import spach_deploy` offers, beside `Session` and `create_model`. See docs/python.md.

Everything else is private by convention: it may change without a word. Functions take the options of the commands as
keywords (`options.table`), raise the errors of `common.errors`, whose sentences name options of the command line
(`--heads` is the keyword `heads`), and print nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.bundle import store
from spach_deploy.options.keywords import FilePath, values_of_keywords, with_keywords
from spach_deploy.options.table import CALIBRATE, EXPORT, VALIDATE

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spach_deploy.common.progress import ExportObserver
    from spach_deploy.options.keywords import CalibrateKeywords, ExportKeywords, ValidateKeywords
    from spach_deploy.quantization.calibration import Calibration
    from spach_deploy.runtime.session import Runtime, Session
    from spach_deploy.validation.result import Validation


@dataclasses.dataclass(frozen=True)
class Bundle(store.Bundle):
    """A bundle on disk: `path` is its directory, `manifest` what manifest.json says.

        bundle = Bundle.open("build/ms_hybrid_s-fp16")

    reads it and compares the SHA-256 of every file (`verify=False` does not).
    """

    def session(
        self,
        *,
        runtime: Runtime = "auto",
        labels: FilePath | Sequence[str] | None = None,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Session:
        """A `Session`, which runs the bundle within its `with` block.

        with bundle.session() as session:
            session.predict("photo.jpg", top_k=5)
        """
        from spach_deploy.runtime.session import Session

        return Session(self, runtime=runtime, labels=labels, batch=batch, threads=threads)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """A finished export: the bundle, and how it was validated."""

    bundle: Bundle
    validation: Validation


@with_keywords(EXPORT)
def export(
    model: str | None = None,
    *,
    recipe: FilePath | None = None,
    observer: ExportObserver | None = None,
    **options: Unpack[ExportKeywords],
) -> ExportResult:
    """Export a model: graph, engine, validation, bundle; as spach-export does, in this process.

        result = spach_deploy.export("ms_hybrid_s", precision="fp16", gpu=["sm86", "sm89"])

    `recipe`: a TOML file of the same options; keywords win over it. `observer`: told of phases and notes while it
    works. Nothing comes from the cache of finished exports. Raises a SpachError of the kind that fits; then nothing
    was written. A validation that does not pass is a MismatchError.
    """
    from spach_deploy.options.values import export_options
    from spach_deploy.pipeline import export as pipeline
    from spach_deploy.pipeline.estimate import refuse_early

    values = values_of_keywords("export", EXPORT, {"model": model, **options})
    asked = export_options(values, None if recipe is None else Path(recipe))
    done = pipeline.export(asked, observer, place=refuse_early(asked))
    return ExportResult(Bundle(done.bundle.path, done.bundle.manifest), done.validation)


@with_keywords(CALIBRATE)
def calibrate(
    model: str | None = None,
    *,
    output: FilePath,
    observer: ExportObserver | None = None,
    **options: Unpack[CalibrateKeywords],
) -> Calibration:
    """Calibrate once and keep the scales in `output`, FILE.json, for later exports; as spach-calibrate does.

        spach_deploy.calibrate("ms_hybrid_s", calibration="photos/", output="scales.json")

    A file that fits is kept, and a run that was killed is continued. Raises a SpachError of the kind that fits.
    """
    from spach_deploy.models.registry import check_spec
    from spach_deploy.options.quantization import check_calibration_file, check_quantization
    from spach_deploy.options.values import calibrate_options
    from spach_deploy.pipeline.export import calibrate_to_file

    asked = calibrate_options(values_of_keywords("calibrate", CALIBRATE, {"model": model, **options}))
    check_spec(asked.model)
    check_quantization(asked)
    return calibrate_to_file(asked, check_calibration_file(Path(output)), observer)


@with_keywords(VALIDATE)
def validate(
    target: FilePath, *, observer: ExportObserver | None = None, **options: Unpack[ValidateKeywords]
) -> Validation:
    """Compare a bundle, its engine.plan, its model.onnx or another graph with PyTorch in FP32; as spach-validate does.

        assert spach_deploy.validate("build/ms_hybrid_s-fp16", images="val/").passed

    Writes nothing; what disagrees is in the result's `all_findings`, no error. `observer.note` is told what takes long.
    Raises a SpachError for what cannot be validated.
    """
    from spach_deploy.common.progress import ExportObserver
    from spach_deploy.models.registry import check_ignore
    from spach_deploy.options.command_line import validate_command
    from spach_deploy.validation.result import Provenance
    from spach_deploy.validation.target import ValidationRequest, validate_target

    given: dict[str, Any] = values_of_keywords("validate", VALIDATE, options)
    check_ignore(given.get("checkpoint"), given.get("ignore", ()))
    found = validate_target(ValidationRequest.of(Path(target), given), (observer or ExportObserver()).note)
    return dataclasses.replace(found, run=Provenance.here(validate_command(str(target), None, given)))
