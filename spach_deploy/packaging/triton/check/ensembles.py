"""Rules for ensembles: their steps, the tensors that connect them, and the Python steps that spach-package writes.

Every step must name a model of the repository; every tensor needs one source, whose type and dims fit its consumers.
For spach-package's own steps, the parameters are compared with their tensors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from spach_deploy.bundle.schema import Manifest
from spach_deploy.common.files import parse_json
from spach_deploy.options.specs import INTERPOLATIONS, Preprocessing, interpolation_text
from spach_deploy.packaging.triton.check.fields import label_file
from spach_deploy.packaging.triton.check.findings import RepositoryFinding
from spach_deploy.packaging.triton.check.model_folder import ModelFolder, Repository, bundle_manifest
from spach_deploy.packaging.triton.config import DATA_TYPES, data_type_name, shown
from spach_deploy.packaging.triton.repository import step_settings

_NEWEST = -1


def check_ensemble(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check an ensemble's steps, their maps, and the tensors between them."""
    if not model.is_ensemble:
        return
    steps = list(model.config.ensemble_scheduling.step)
    if not steps:
        yield model.finding("ensemble_scheduling", "no step", "one or more", "Add them, or remove the folder.")
        return
    tensors = _Tensors(model)
    for index, step in enumerate(steps):
        where = f"ensemble_scheduling.step[{index}]"
        target = repository.find(step.model_name)
        yield from _model(model, where, step, target, repository)
        if target is not None:
            yield from _maps(model, where, step, target)
            tensors.add(where, step, target)
    yield from tensors.findings()
    if cycle := _cycle(model, repository, (model.name,)):
        yield model.finding("ensemble_scheduling", f"a circle: {' -> '.join(cycle)}", "none", "Break it.")


def _model(
    model: ModelFolder, where: str, step: Any, target: ModelFolder | None, repository: Repository
) -> Iterator[RepositoryFinding]:
    if target is None:
        if step.model_name not in repository.folders:  # otherwise its config.pbtxt has a finding already
            yield model.finding(
                f"{where}.model_name",
                f'"{step.model_name}"',
                f"a model of the repository: {', '.join(sorted(repository.folders - {model.name}))}",
                "Correct it, or add the model.",
            )
        return
    version = step.model_version
    if version != _NEWEST and version not in target.served_versions:
        served = ", ".join(map(str, target.served_versions)) or "none"
        yield model.finding(
            f"{where}.model_version", str(version), f"-1, or one that is served: {served}", "Write model_version: -1."
        )
    mine, its = model.config.max_batch_size, target.config.max_batch_size
    if mine > its:
        yield model.finding(
            "max_batch_size",
            str(mine),
            f"at most {its}, that of its step {target.name}",
            f"Write max_batch_size: {its}.",
        )


def _maps(model: ModelFolder, where: str, step: Any, target: ModelFolder) -> Iterator[RepositoryFinding]:
    sides = (("input_map", step.input_map, target.config.input), ("output_map", step.output_map, target.config.output))
    for field, mapping, tensors in sides:
        known = [tensor.name for tensor in tensors]
        for name in mapping:
            if name not in known:
                what = f"{field.removesuffix('_map')}s of {target.name}: {', '.join(known)}"
                yield model.finding(f"{where}.{field}", f'"{name}"', what, "Correct the key.")
    for tensor in target.config.input:
        if tensor.name not in step.input_map and not tensor.optional:
            yield model.finding(
                f"{where}.input_map", f'no "{tensor.name}"', f"every input of {target.name}", f"Map {tensor.name}."
            )
    if not step.output_map:
        yield model.finding(f"{where}.output_map", "none", "one output or more", "Map those that are used.")


@dataclasses.dataclass(frozen=True)
class _TensorEnd:
    """One end of a connection: a tensor of a model, and the field of the ensemble's configuration that names it."""

    where: str
    owner: str
    tensor: Any
    is_batched: bool

    @property
    def dims(self) -> list[int]:
        """The dims with the batch in front."""
        return [*([-1] if self.is_batched else []), *self.tensor.dims]

    def __str__(self) -> str:
        return f"{data_type_name(self.tensor.data_type)} {shown(self.tensor.dims)} of {self.owner}"


class _Tensors:
    """The ensemble's tensors by name, with their sources and consumers."""

    def __init__(self, model: ModelFolder) -> None:
        self._model = model
        self._sources: dict[str, list[_TensorEnd]] = {}
        self._consumers: dict[str, list[_TensorEnd]] = {}
        is_batched = model.config.max_batch_size > 0
        for where, tensor in model.tensors():
            ends = self._sources if where.startswith("input") else self._consumers
            ends.setdefault(tensor.name, []).append(_TensorEnd(where, "the ensemble", tensor, is_batched))

    def add(self, where: str, step: Any, target: ModelFolder) -> None:
        """Add the tensors of one step."""
        sides = (
            (self._consumers, "input_map", step.input_map, target.config.input),
            (self._sources, "output_map", step.output_map, target.config.output),
        )
        for ends, field, mapping, tensors in sides:
            known = {tensor.name: tensor for tensor in tensors}
            for name, connected in mapping.items():
                if name in known:
                    end = _TensorEnd(f"{where}.{field}", target.name, known[name], target.config.max_batch_size > 0)
                    ends.setdefault(connected, []).append(end)

    def findings(self) -> Iterator[RepositoryFinding]:
        """Tensors with no source or two, inputs that no step uses, and ends that do not fit."""
        for name, consumers in self._consumers.items():
            sources = self._sources.get(name, [])
            if not sources:
                have = ", ".join(sorted(self._sources))
                yield self._model.finding(
                    consumers[0].where,
                    f'"{name}", which nothing gives',
                    f"one of {have}",
                    "Correct the name in the maps.",
                )
            for consumer in consumers if sources else ():
                yield from self._fit(name, sources[0], consumer)
        for name, sources in self._sources.items():
            if len(sources) > 1:
                where = sources[1].where
                yield self._model.finding(where, f'"{name}" a second time', "one source per tensor", "Rename one.")
            if name not in self._consumers and sources[0].owner == "the ensemble":
                yield self._model.finding(
                    sources[0].where, f'"{name}", which no step takes', "an input that is used", "Map it, or remove it."
                )

    def _fit(self, name: str, source: _TensorEnd, consumer: _TensorEnd) -> Iterator[RepositoryFinding]:
        agrees = source.tensor.data_type == consumer.tensor.data_type and _compatible(source.dims, consumer.dims)
        if not agrees:
            yield self._model.finding(consumer.where, f'"{name}": {source}', str(consumer), "Correct one of them.")


def _compatible(given: list[int], taken: list[int]) -> bool:
    return len(given) == len(taken) and all(-1 in pair or pair[0] == pair[1] for pair in zip(given, taken, strict=True))


def _cycle(model: ModelFolder, repository: Repository, path: tuple[str, ...]) -> tuple[str, ...]:
    """Names of models on a cycle of ensembles through `path[0]`; empty where there is none."""
    for step in model.config.ensemble_scheduling.step:
        if step.model_name == path[0]:
            return (*path, step.model_name)
        target = repository.find(step.model_name)
        if target is not None and target.is_ensemble and step.model_name not in path:
            cycle = _cycle(target, repository, (*path, step.model_name))
            if cycle:
                return cycle
    return ()


_AGAIN = "Write it again with spach-package triton --ensemble."


def check_own_steps(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check the steps that spach-package wrote: Python models with the parameters `preprocessing` or `top_k`."""
    if model.backend != "python":
        return
    parameters = {name: value.string_value for name, value in model.config.parameters.items()}
    if "preprocessing" in parameters and model.config.output:
        yield from _preprocess(model, repository, parameters["preprocessing"])
    if "top_k" in parameters and model.config.input and model.config.input[0].dims:
        yield from _top_k(model, parameters)


def _preprocess(model: ModelFolder, repository: Repository, text: str) -> Iterator[RepositoryFinding]:
    output = model.config.output[0]
    try:
        settings = parse_json(text)
        (height, width), dtype = _sides(settings["image_size"]), str(settings["dtype"])
        _sides(settings["resize_size"])
        channels = len(settings["mean"])
        if channels not in (1, 3) or len(settings["std"]) != channels or 0 in settings["std"]:
            raise ValueError
        if settings.get("interpolation", Preprocessing.interpolation) not in map(interpolation_text, INTERPOLATIONS):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        what = "sizes, interpolation, mean, std and dtype as JSON"
        yield model.finding('parameters["preprocessing"]', "what cannot be read", what, _AGAIN)
        return
    wanted = [height, width, channels] if dtype == "uint8" else [channels, height, width]
    have = (data_type_name(output.data_type), list(output.dims))
    if have != (DATA_TYPES.get(dtype), wanted):
        yield model.finding(
            'parameters["preprocessing"]',
            f"a transform to {dtype} {shown(wanted)}",
            f"the output's {have[0]} {shown(have[1])}",
            _AGAIN,
        )
        return
    for target, manifest in _prepared_for(model, repository):
        ours, bundles = (
            _complete(settings),
            _complete(parse_json(json.dumps(step_settings(manifest.preprocessing, dtype)))),
        )
        for name, value in bundles.items():
            if ours[name] != value:
                yield model.finding(
                    'parameters["preprocessing"]',
                    f"{name} {json.dumps(ours[name])}",
                    f"{json.dumps(value)}, as the bundle of {target} has",
                    _AGAIN,
                )


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with what is left out, and with both sides of sizes."""
    sizes = {name: _sides(settings[name]) for name in ("image_size", "resize_size")}
    return {"interpolation": Preprocessing.interpolation, **settings, **sizes}


def _prepared_for(model: ModelFolder, repository: Repository) -> Iterator[tuple[str, Manifest]]:
    """The models that get the step's output in an ensemble, each with the manifest of its newest version's bundle."""
    seen = set()
    for ensemble in repository.models:
        steps = list(ensemble.config.ensemble_scheduling.step)
        made = {name for step in steps if step.model_name == model.name for name in step.output_map.values()}
        for target in (repository.find(step.model_name) for step in steps if made & {*step.input_map.values()}):
            if target is None or not target.versions or target.name in seen:
                continue
            seen.add(target.name)
            manifest = bundle_manifest(target.path / str(target.versions[-1]))
            if manifest is not None:
                yield target.name, manifest


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size in the settings: a square's side, or both."""
    height, width = size if isinstance(size, list) else (size, size)
    return int(height), int(width)


def _top_k(model: ModelFolder, parameters: dict[str, str]) -> Iterator[RepositoryFinding]:
    classes, text = model.config.input[0].dims[-1], parameters["top_k"]
    k = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= k <= classes:
        yield model.finding('parameters["top_k"]', f'"{text}"', f"1 to {classes}, the number of classes", _AGAIN)
    for index, output in enumerate(model.config.output):
        if list(output.dims) != [k]:
            yield model.finding(f"output[{index}].dims", shown(output.dims), f"[{k}], the parameter top_k", _AGAIN)
    yield from label_file(model, 'parameters["labels"]', parameters.get("labels", ""), classes)
