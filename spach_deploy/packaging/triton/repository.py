"""Writing a Triton model repository, in one step: a killed run leaves the old repository or none.

REPOSITORY/
  manifest.json              marks it as written by spach-package, from which bundles; Triton reads folders only
  README.md                  how to start it, what was verified, how to measure it, the way back to a version
  NAME/config.pbtxt          inputs, outputs, batching, instances, warm-up
  NAME/labels.txt            the classes, of a model with logits
  NAME/warmup/golden_input   a golden image
  NAME/1/model.plan          or model.onnx
  NAME/1/bundle.json         the bundle's manifest, with which --check compares the rest; of a graph that was made anew
                             for ONNX Runtime, with what was made and measured
  NAME_preprocess/ NAME_top_k/ NAME_ensemble/   with --ensemble

An ensemble has steps around a model, so that a client sends an image and gets labels.

    bytes    NAME_preprocess (decode, resize, crop, normalize) -> NAME -> NAME_top_k
    pixels   NAME -> NAME_top_k, for a model that takes uint8 pixels: it needs no preprocessing

NAME_ensemble connects them; NAME can still be called by itself.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.bundle.outputs import LOGITS, of_role
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.bundle.store import MANIFEST, DirectoryKind, check_target, writing
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.common.text import escaped, json_text, noun
from spach_deploy.data.labels import as_text, read_labels
from spach_deploy.options.command_line import quoted
from spach_deploy.options.specs import IODtype, Preprocessing, Role
from spach_deploy.packaging.triton.config import (
    DATA_TYPES,
    FOLDER,
    LABELS_FILE,
    WarmUp,
    model_config,
    model_configuration,
    shown,
    step_group,
    tensor_fields,
    to_text,
    warm_up,
)
from spach_deploy.packaging.triton.options import PREPROCESS_INSTANCES, Backend, Ensemble, EnsembleInput, TritonOptions
from spach_deploy.packaging.triton.readme import README, RepositoryContent, readme
from spach_deploy.packaging.triton.served_model import BundleArgument, ServedModel, resolve_models
from spach_deploy.packaging.triton.serving import server_flags

CONTENTS = DirectoryKind("triton-model-repository", "a model repository")
CONFIG = "config.pbtxt"
FACTS = "bundle.json"

_STEPS = Path(__file__).with_name("steps")


@dataclasses.dataclass(frozen=True)
class TritonRepository:
    """A written repository: its path, its models, the names of their ensemble steps, and the options."""

    path: Path
    models: tuple[ServedModel, ...]
    steps: tuple[str, ...]
    options: TritonOptions

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what will not work."""
        return tuple(warning for model in self.models for warning in model.warnings)


def write_repository(
    arguments: Sequence[BundleArgument], output: Path, options: TritonOptions, *, overwrite: bool = False
) -> TritonRepository:
    """Write the model repository of some bundles to `output`.

    Raises BundleError for what is not a bundle or has no file for the backend, and for a target that cannot be written;
    UsageError for options that do not fit the bundles.
    """
    destination = check_target(output, overwrite=overwrite, contents=CONTENTS)
    return write_models(resolve_models(arguments, options), destination, output, options)


def write_models(
    models: Sequence[ServedModel], destination: Destination, output: Path, options: TritonOptions
) -> TritonRepository:
    """Write the repository of models that `resolve_models` made with these options. `destination`: what `check_target`
    returned for `output`.
    """
    parts = [_Part.of(model, options) for model in models]
    _check_names([config for part in parts for config in part.configs], options)
    content = RepositoryContent(tuple(models), {part.model.name: part.configs for part in parts}, options)
    with writing(destination) as staging:
        for part in parts:
            part.write(staging)
        _write_manifest(staging, models)
        _write_text(staging / README, readme(content))
    return TritonRepository(output, tuple(models), tuple(name for part in parts for name in part.names[1:]), options)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A model and the steps around it, ready to be written."""

    model: ServedModel
    config: Any
    warm_up: WarmUp
    labels: tuple[str, ...]
    steps: tuple[EnsembleStep, ...]

    @classmethod
    def of(cls, model: ServedModel, options: TritonOptions) -> _Part:
        requests = warm_up(model) if options.warm_up else WarmUp()
        _check_policy(model, options)
        return cls(
            model=model,
            config=model_configuration(model, options, requests),
            warm_up=requests,
            labels=_labels(model, options),
            steps=ensemble_steps(model, options),
        )

    @property
    def names(self) -> list[str]:
        return [str(config.name) for config in self.configs]

    @property
    def configs(self) -> list[Any]:
        return [self.config, *(step.config for step in self.steps)]

    def write(self, repository: Path) -> None:
        folder = repository / self.model.name
        folder.mkdir()
        _write_text(folder / CONFIG, to_text(self.config))
        if self.labels:
            _write_text(folder / LABELS_FILE, as_text(self.labels))
        self._write_warm_up(folder)
        for version in self.model.versions:
            target = folder / str(version.number)
            target.mkdir()
            shutil.copyfile(version.artifact, target / self.model.backend.file_name)
            if version.made is None:
                shutil.copyfile(version.bundle.path / MANIFEST, target / FACTS)
            else:
                _write_text(target / FACTS, version.manifest.text())
        for step in self.steps:
            self._write_step(repository / step.config.name, step)

    def _write_warm_up(self, folder: Path) -> None:
        if self.warm_up.files:
            (folder / FOLDER).mkdir()
        for name, content in self.warm_up.files.items():
            (folder / FOLDER / name).write_bytes(content)

    def _write_step(self, folder: Path, step: EnsembleStep) -> None:
        version = folder / "1"  # Triton needs this folder for an ensemble too, where it is empty
        version.mkdir(parents=True)
        _write_text(folder / CONFIG, to_text(step.config))
        if step.source:
            shutil.copyfile(_STEPS / f"{step.source}.py", version / STEP_FILE)
        if step.has_labels:
            _write_text(folder / LABELS_FILE, as_text(self.labels))


def _labels(model: ServedModel, options: TritonOptions) -> tuple[str, ...]:
    """Names of the classes; none for a model without logits."""
    if of_role(model.outputs, Role.LOGITS) is not None:
        return read_labels(options.labels, model.classes)
    if options.labels is not None:
        raise UsageError(f"--labels names classes, and {model.name} has no logits.", "Leave --labels out.")
    return ()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _check_policy(model: ServedModel, options: TritonOptions) -> None:
    """UsageError for a version policy that names absent versions, which Triton would ignore."""
    policy = options.version_policy
    numbers = tuple(version.number for version in model.versions)
    absent = [number for number in policy.specific if number not in numbers] if policy else []
    if absent:
        raise UsageError(
            f"--version-policy names version {absent[0]}; {model.name} has {', '.join(map(str, numbers))}.",
            "Bundles of one name become its versions 1, 2, … in the order given.",
        )


def _check_names(configs: list[Any], options: TritonOptions) -> None:
    """UsageError for two models of one name, and for options of a model that is not there or has no instances."""
    names = [str(config.name) for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Two models would be called {twice[0]}.", "Give other names: NAME=BUNDLE.")
    run = [str(config.name) for config in configs if config.platform != "ensemble"]
    for option, model in options.named_models:
        if model not in run:
            raise UsageError(
                f"{option} names {model}, and nothing here runs under that name.", f"Name {', '.join(run)}."
            )


def _write_manifest(staging: Path, models: Sequence[ServedModel]) -> None:
    content = {
        "kind": CONTENTS.kind,
        "spach_deploy": __version__,
        "models": {
            model.name: {
                "backend": model.backend.value,
                "versions": {str(version.number): version.bundle.path.name for version in model.versions},
            }
            for model in models
        },
    }
    _write_text(staging / MANIFEST, json_text(content) + "\n")


_LABEL_WIDTH = 12


def repository_text(written: TritonRepository) -> str:
    """The summary for the terminal: models, batches, and the command that serves them."""
    lines = [line for model in written.models for line in _model_lines(model, written)]
    command = serve_command(written)
    return escaped([*lines, "", *(["Serve it:", f"  {command}"] if command else ["It is to be read, not served."])])


def repository_json(written: TritonRepository) -> str:
    """The summary as JSON."""
    return json_text(
        {
            "repository": str(written.path),
            "models": [_facts(model, written) for model in written.models],
            "steps": list(written.steps),
            "warnings": list(written.warnings),
            "serve": serve_command(written),
        }
    )


def serve_command(written: TritonRepository) -> str | None:
    """The command that serves the repository; None where a server could not load it."""
    if written.warnings:
        return None
    return " ".join(
        ["tritonserver --model-repository", quoted(written.path), *server_flags(written.models, written.options)]
    )


def _served_versions(model: ServedModel, written: TritonRepository) -> tuple[int, ...]:
    numbers = tuple(version.number for version in model.versions)
    policy = written.options.version_policy
    return numbers[-1:] if policy is None else policy.serves(numbers)


def _facts(model: ServedModel, written: TritonRepository) -> dict[str, Any]:
    return {
        "name": model.name,
        "backend": model.backend.value,
        "versions": [version.number for version in model.versions],
        "served_versions": list(_served_versions(model, written)),
        "forms": [version.manifest.form.value for version in model.versions],
        "max_batch_size": model.batches.max_batch_size,
        "notes": list(model.notes),
    }


def _model_lines(model: ServedModel, written: TritonRepository) -> list[str]:
    inputs, outputs = (", ".join(_tensors(model, which)) for which in ("inputs", "outputs"))
    steps = [name for name in written.steps if name.startswith(f"{model.name}_")]
    rows = {
        "model": f"{model.name}, {model.backend.platform}",
        "versions": _versions(model, written),
        "takes": inputs,
        "gives": outputs,
        "batch": _batch(model, written),
        "steps": ", ".join(steps),
    }
    lines = [f"{label:<{_LABEL_WIDTH}}{text}" for label, text in rows.items() if text]
    return [*lines, *(f"{'note':<{_LABEL_WIDTH}}{note}" for note in model.notes)]


def _tensors(model: ServedModel, which: str) -> list[str]:
    tensors = model.inputs if which == "inputs" else model.outputs
    return [f"{t.name} {DATA_TYPES[t.dtype].removeprefix('TYPE_')} {shown(model.batches.dims(t))}" for t in tensors]


def _versions(model: ServedModel, written: TritonRepository) -> str:
    given = ", ".join(f"{version.number} from {version.bundle.path}" for version in model.versions)
    served = ", ".join(map(str, _served_versions(model, written)))
    return given if len(model.versions) == 1 else f"{given}; served: {served}"


def _batch(model: ServedModel, written: TritonRepository) -> str:
    if not model.batches.max_batch_size:
        accepted = "exactly " + str(model.batch.max) if model.batch.min == model.batch.max else str(model.batch)
        return f"{accepted} samples a request; the server cannot make such batches from single samples"
    if model.backend is Backend.TENSORRT or written.options.batching.dynamic:
        return f"1 to {model.batches.max_batch_size}, tuned for {model.batch.opt}"
    return f"1 to {model.batches.max_batch_size}"


IMAGE, PIXELS = "image", "pixels"
STEP_FILE = "model.py"

_TOP_K = 5


@dataclasses.dataclass(frozen=True)
class EnsembleStep:
    """A model of the repository that is made for an ensemble. `source`: its module in steps/; None for the ensemble."""

    config: Any
    source: str | None = None
    has_labels: bool = False


def ensemble_steps(model: ServedModel, options: TritonOptions) -> tuple[EnsembleStep, ...]:
    """The steps around `model`, and the ensemble; nothing where the options want none.

    UsageError where they do not fit the model.
    """
    if (ensemble := options.ensemble) is None:
        return ()
    logits = of_role(model.outputs, Role.LOGITS)
    if logits is None:
        raise UsageError(
            f"--ensemble ranks classes, and {model.name} gives {', '.join(t.name for t in model.outputs)} alone.",
            "Leave --ensemble out, or export with --outputs logits too.",
        )
    model.facts.check_one_input("--ensemble makes one, of a picture", "Leave --ensemble out.")
    k = min(_TOP_K, model.classes) if ensemble.top_k is None else ensemble.top_k
    _check(model, ensemble, k)
    steps = (_preprocess(model, options),) if ensemble.input is EnsembleInput.BYTES else ()
    return (*steps, _top_k(model, logits, k, options), _ensemble(model, ensemble.input, logits, k))


def _check(model: ServedModel, ensemble: Ensemble, k: int) -> None:
    if not model.batches.max_batch_size:
        raise UsageError(
            f"--ensemble: {model.name} takes batches of {model.batch.min} and more, but pictures come singly.",
            "Export it with a batch profile from 1, such as --batch 1:8:32, or give --backend onnxruntime.",
        )
    if ensemble.input is EnsembleInput.PIXELS and model.facts.io_dtype is not IODtype.UINT8:
        raise UsageError(
            f"--ensemble-input pixels: {model.name} takes normalized images.",
            "Export it with --io-dtype uint8, or let the ensemble take the bytes of picture files.",
        )
    if ensemble.input is EnsembleInput.BYTES and (channels := model.facts.preprocessing.channels) not in (1, 3):
        raise UsageError(
            f"--ensemble: {model.name} takes images of {channels} channels, which no picture file has.",
            "Export it with --io-dtype uint8 and give --ensemble-input pixels.",
        )
    if not 1 <= k <= model.classes:
        raise UsageError(
            f"--top-k {k} of {model.classes} {noun(model.classes, 'class')} does not exist.",
            f"Give a number from 1 to {model.classes}.",
        )


def _preprocess(model: ServedModel, options: TritonOptions) -> EnsembleStep:
    tensor = model.inputs[0]
    settings = step_settings(model.facts.preprocessing, tensor.dtype)
    config = _step_config(
        f"{model.name}_preprocess",
        model,
        inputs=[tensor_fields(IMAGE, "TYPE_STRING", [1])],
        outputs=[tensor_fields(tensor.name, DATA_TYPES[tensor.dtype], model.batches.dims(tensor))],
    )
    config.instance_group.add(**step_group(config.name, options, PREPROCESS_INSTANCES))
    config.parameters["preprocessing"].string_value = json.dumps(settings)
    return EnsembleStep(config, "preprocess")


def step_settings(transform: Preprocessing, dtype: str) -> dict[str, Any]:
    """What the step that decodes pictures reads, as JSON. `dtype`: of the model's input."""
    settings = {
        "image_size": transform.image_size,
        "resize_size": transform.resize_size,
        "mean": transform.mean,
        "std": transform.std,
        "dtype": dtype,
    }
    if transform.interpolation != Preprocessing.interpolation:
        settings["interpolation"] = transform.interpolation
    return settings


def _top_k(model: ServedModel, logits: TensorInfo, k: int, options: TritonOptions) -> EnsembleStep:
    config = _step_config(
        f"{model.name}_top_k",
        model,
        inputs=[tensor_fields(LOGITS, DATA_TYPES[logits.dtype], model.batches.dims(logits))],
        outputs=_outputs(k),
    )
    config.instance_group.add(**step_group(config.name, options, 1))
    config.parameters["top_k"].string_value = str(k)
    config.parameters["labels"].string_value = LABELS_FILE
    return EnsembleStep(config, "top_k", has_labels=True)


def _outputs(k: int) -> list[dict[str, Any]]:
    types = {"labels": "TYPE_STRING", "probabilities": "TYPE_FP32", "indices": "TYPE_INT64"}
    return [tensor_fields(name, data_type, [k]) for name, data_type in types.items()]


def _step_config(name: str, model: ServedModel, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> Any:
    return model_config(
        name=name,
        backend="python",
        max_batch_size=model.batches.max_batch_size,
        input=inputs,
        output=outputs,
    )


def _ensemble(model: ServedModel, takes: EnsembleInput, logits: TensorInfo, k: int) -> EnsembleStep:
    tensor = model.inputs[0]
    takes_bytes = takes is EnsembleInput.BYTES
    given = tensor_fields(IMAGE, "TYPE_STRING", [1])
    if not takes_bytes:
        given = tensor_fields(PIXELS, DATA_TYPES[tensor.dtype], model.batches.dims(tensor))
    prepared = "prepared" if takes_bytes else PIXELS
    outputs = _outputs(k)
    steps = [
        _link(model.name, {tensor.name: prepared}, {logits.name: LOGITS}),
        _link(f"{model.name}_top_k", {LOGITS: LOGITS}, {output["name"]: output["name"] for output in outputs}),
    ]
    if takes_bytes:
        steps.insert(0, _link(f"{model.name}_preprocess", {IMAGE: IMAGE}, {tensor.name: prepared}))
    config = model_config(
        name=f"{model.name}_ensemble",
        platform="ensemble",
        max_batch_size=model.batches.max_batch_size,
        input=[given],
        output=outputs,
        ensemble_scheduling={"step": steps},
    )
    return EnsembleStep(config)


def _link(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """A step of the ensemble, with maps from its tensors to the ensemble's. Version -1: the newest that is served."""
    return {"model_name": name, "model_version": -1, "input_map": inputs, "output_map": outputs}
