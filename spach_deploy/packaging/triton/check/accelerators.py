"""Rules for execution accelerators in config.pbtxt, as Triton's ONNX Runtime backend reads them.

The backend refuses a model with an unknown accelerator, an unknown parameter or a value that it cannot parse. What it
passes on unread, folders and shapes, fails later: when an engine is built, or at the first request.
Source: https://github.com/triton-inference-server/onnxruntime_backend, README.md and src/onnxruntime.cc.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from spach_deploy.packaging.triton.check.findings import RepositoryFinding, Severity
from spach_deploy.packaging.triton.check.model_folder import ModelFolder, Repository
from spach_deploy.packaging.triton.config import shown
from spach_deploy.packaging.triton.options import KIND_CPU, MOUNT, is_mounted_over

TENSORRT, CUDA, OPENVINO = "tensorrt", "cuda", "openvino"

_KINDS = {
    "precision_mode": "mode",
    "max_workspace_size_bytes": "bytes",
    "int8_calibration_table_name": "text",
    "int8_use_native_calibration_table": "flag",
    "trt_max_partition_iterations": "number",
    "trt_min_subgraph_size": "number",
    "trt_dla_enable": "flag",
    "trt_dla_core": "number",
    "trt_engine_cache_enable": "flag",
    "trt_engine_cache_path": "text",
    "trt_engine_cache_prefix": "text",
    "trt_dump_subgraphs": "flag",
    "trt_force_sequential_engine_build": "flag",
    "trt_context_memory_sharing_enable": "flag",
    "trt_layer_norm_fp32_fallback": "flag",
    "trt_timing_cache_enable": "flag",
    "trt_timing_cache_path": "text",
    "trt_force_timing_cache": "flag",
    "trt_detailed_build_log": "flag",
    "trt_build_heuristics_enable": "flag",
    "trt_sparsity_enable": "flag",
    "trt_builder_optimization_level": "number",
    "trt_auxiliary_streams": "number",
    "trt_tactic_sources": "text",
    "trt_extra_plugin_lib_paths": "text",
    "trt_profile_min_shapes": "shapes",
    "trt_profile_max_shapes": "shapes",
    "trt_profile_opt_shapes": "shapes",
    "trt_cuda_graph_enable": "flag",
    "trt_dump_ep_context_model": "flag",
    "trt_ep_context_file_path": "text",
    "trt_ep_context_embed_mode": "number",
}
"""What the value of each parameter of the accelerator `tensorrt` is."""

_ACCEPTED = {
    "mode": (r"FP32|FP16|BF16|INT8", "FP32, FP16, BF16 or INT8"),
    "bytes": (r"\d{1,19}", "a number of bytes"),
    "number": (r"-?\d{1,9}", "a whole number"),
    "flag": (r"(?i:true|false|1|0)", "true, false, 1 or 0"),
    "text": (r".+", "some text"),
    "shapes": (r"[^:,]+:\d+(x\d+)*(,[^:,]+:\d+(x\d+)*)*", "NAME:1x3x224x224, with a comma between inputs"),
}

_PROFILES = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
_PREFIX = "trt_engine_cache_prefix"
_CACHES = (
    ("trt_engine_cache_enable", "trt_engine_cache_path", "engines"),
    ("trt_timing_cache_enable", "trt_timing_cache_path", "timings"),
)


def check_accelerators(model: ModelFolder, repository: Repository) -> Iterator[RepositoryFinding]:
    """Check names and parameters of accelerators, and of TensorRT its cache folders and profiles."""
    accelerators = model.config.optimization.execution_accelerators
    for side, known in (("gpu", (TENSORRT, CUDA)), ("cpu", (OPENVINO,))):
        given = getattr(accelerators, f"{side}_execution_accelerator")
        for index, accelerator in enumerate(given):
            where = f"optimization.execution_accelerators.{side}_execution_accelerator[{index}]"
            if model.backend != "onnxruntime":
                yield model.finding(
                    where,
                    f'"{accelerator.name}" with backend {model.backend or "none"}',
                    "none: accelerators are of ONNX Runtime",
                    "Remove it, or serve the graph by onnxruntime.",
                )
            elif accelerator.name not in known:
                yield _unknown(model, f"{where}.name", accelerator.name, known)
            elif accelerator.name == TENSORRT:
                yield from _tensorrt(model, repository, where, dict(accelerator.parameters))


def _unknown(model: ModelFolder, where: str, name: str, known: tuple[str, ...]) -> RepositoryFinding:
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"Did you mean {close[0]}?" if close else "Correct it, or remove it: Triton refuses the model."
    return model.finding(where, f'"{name}"', f"one of {', '.join(known)}", fix)


def _tensorrt(
    model: ModelFolder, repository: Repository, where: str, parameters: Mapping[str, str]
) -> Iterator[RepositoryFinding]:
    for name, value in parameters.items():
        field = f'{where}.parameters["{name}"]'
        if name not in _KINDS:
            close = difflib.get_close_matches(name, _KINDS, n=1)
            fix = f"Did you mean {close[0]}?" if close else "Remove it: Triton refuses the model."
            yield model.finding(field, f'"{value}"', "a parameter that Triton's backend knows", fix)
            continue
        pattern, expected = _ACCEPTED[_KINDS[name]]
        if not re.fullmatch(pattern, value):
            yield model.finding(field, f'"{value}"', expected, "Correct it: Triton refuses the model.")
    groups = model.config.instance_group
    if groups and all(group.kind == KIND_CPU for group in groups):
        yield model.finding(
            where, "TensorRT with KIND_CPU", "KIND_GPU: on a CPU it is never used", "Correct one of them."
        )
    yield from _mode(model, f'{where}.parameters["precision_mode"]', parameters)
    for enable, path, what in _CACHES:
        yield from _cache(model, repository, where, parameters, (enable, path, what))
    yield from _profiles(model, where, parameters)


def _mode(model: ModelFolder, field: str, parameters: Mapping[str, str]) -> Iterator[RepositoryFinding]:
    """The mode must allow the types of the graph's weights: TensorRT takes no others."""
    have = parameters.get("precision_mode", "FP32")
    if "int8_calibration_table_name" in parameters:
        return  # the types are the table's
    for version in model.versions:
        types = graph_modes(model.path / str(version) / model.file_name)
        if types is None or types == {have}:
            continue
        found, wanted = (
            f"{have}, the default" if "precision_mode" not in parameters else have,
            " and ".join(sorted(types)),
        )
        if types == {"FP32"} and have in ("FP16", "BF16"):
            expected = f"FP32, as the graph in {version} has: nothing compared {have} with it"
            yield model.finding(field, found, expected, 'Write "FP32".', severity=Severity.WARNING)
        else:
            fix = f'Write "{wanted}".' if len(types) == 1 else "Export with --int8 --rest fp32: a mode names one type."
            yield model.finding(field, found, f"{wanted}, as the graph in {version} has", fix)


def graph_modes(file: Path) -> set[str] | None:
    """The modes of TensorRT's provider that a graph needs, by its weights and Q/DQ pairs; None for what is no graph.

    Whole tensors that stay in FP32 beside lower types need none: each mode allows them.
    """
    import onnx

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception:  # protobuf's own, OSError; `check_files` reports it
        return None
    names = {onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.BFLOAT16: "BF16"}
    types = {names[w.data_type] for w in graph.initializer if w.data_type in names and math.prod(w.dims) > 1}
    types |= {"INT8"} if any(node.op_type == "QuantizeLinear" for node in graph.node) else set()
    return types or {"FP32"}


def _cache(
    model: ModelFolder,
    repository: Repository,
    where: str,
    parameters: Mapping[str, str],
    names: tuple[str, str, str],
) -> Iterator[RepositoryFinding]:
    enable, path, what = names
    is_on, folder = parameters.get(enable, "").lower() in ("true", "1"), parameters.get(path, "")
    field = f'{where}.parameters["{path}"]'
    warning = Severity.WARNING
    if is_on and not folder:
        fix = f"Add {path} with a folder that is kept."
        yield model.finding(field, "none", f"a folder for the {what}", fix, severity=warning)
    if not folder:
        return
    if not is_on:
        fix = f'Add {enable}: "true".'
        yield model.finding(field, f'"{folder}", which is not used', f"{enable}", fix, severity=warning)
    if shared := _others_in(model, repository, parameters, path):
        found, expected = f'"{folder}", which {shared} too', "a folder for each: engines are named by structure alone"
        yield model.finding(field, found, expected, "Give another one.", severity=warning)
    if problem := _impossible(folder, repository.path):
        yield model.finding(field, f'"{folder}", {problem}', "a folder that the server can make", "Give another one.")
    elif is_mounted_over(folder):
        found = f'"{folder}", below {MOUNT}, where README.md has the repository, read-only'
        yield model.finding(field, found, "a folder that the server can write", "Give another one.", severity=warning)
    elif not PurePosixPath(folder).is_absolute():
        found = f'"{folder}", below wherever the server is started'
        yield model.finding(field, found, "an absolute path", "Give the whole path.", severity=warning)


def _others_in(model: ModelFolder, repository: Repository, parameters: Mapping[str, str], path: str) -> str:
    """Who else keeps engines in a model's folder, as a clause. A prefix of its own tells engines apart."""
    if path != "trt_engine_cache_path":
        return ""  # timings are of kernels, whatever the model
    if len(model.versions) > 1:
        return "its other versions use"
    own = (parameters.get(path), parameters.get(_PREFIX))
    for other in repository.models:
        for block in other.config.optimization.execution_accelerators.gpu_execution_accelerator:
            if other.name != model.name and (block.parameters.get(path), block.parameters.get(_PREFIX)) == own:
                return f"{other.name} uses"
    return ""


def _impossible(folder: str, repository: Path) -> str:
    """Why a path can be no cache folder, as a clause; empty where nothing is known against it."""
    path = Path(folder)
    if any(not character.isprintable() for character in folder):
        return "which has characters that no shell shows"
    for part in (path, *path.parents):
        if path.is_absolute() and part.is_file():
            return f"and {part} is a file here"
    if path.is_absolute() and repository.resolve() in (path.resolve(), *path.resolve().parents):
        return "inside the repository, where Triton takes folders for models and versions"
    return ""


def _profiles(model: ModelFolder, where: str, parameters: Mapping[str, str]) -> Iterator[RepositoryFinding]:
    """All three shapes, for the model's inputs, in order, and for every batch that the server may send."""
    given = {name: parameters[name] for name in _PROFILES if name in parameters}
    if not given or not all(re.fullmatch(_ACCEPTED["shapes"][0], value) for value in given.values()):
        return
    missing = [name for name in _PROFILES if name not in given]
    if missing:
        field = f'{where}.parameters["{missing[0]}"]'
        yield model.finding(field, "none", "all three: ONNX Runtime takes min, opt and max together", "Add it.")
        return
    least, usual, most = (_shapes(given[name]) for name in _PROFILES)
    for tensor in model.config.input:
        if not all(tensor.name in shapes for shapes in (least, usual, most)):
            field = f'{where}.parameters["{_PROFILES[0]}"]'
            yield model.finding(field, f'no "{tensor.name}"', "every input, in all three", f"Add {tensor.name}.")
            continue
        shapes = (least[tensor.name], usual[tensor.name], most[tensor.name])
        yield from _profile(model, where, tensor, shapes)
    for name in sorted({*least, *usual, *most} - {tensor.name for tensor in model.config.input}):
        field = f'{where}.parameters["{_PROFILES[0]}"]'
        yield model.finding(field, f'"{name}"', "inputs of the model", "Correct its name, or remove it.")


Shape = tuple[int, ...]


def _shapes(text: str) -> dict[str, Shape]:
    entries = (entry.rpartition(":") for entry in text.split(","))
    return {name: tuple(map(int, dims.split("x"))) for name, _, dims in entries}


def _profile(
    model: ModelFolder, where: str, tensor: Any, shapes: tuple[Shape, Shape, Shape]
) -> Iterator[RepositoryFinding]:
    batched = model.config.max_batch_size > 0
    dims = [-1, *tensor.dims] if batched else list(tensor.dims)
    for name, shape in zip(_PROFILES, shapes, strict=True):
        fits = len(shape) == len(dims) and all(want in (-1, have) for have, want in zip(shape, dims, strict=True))
        if not fits:
            field, note = f'{where}.parameters["{name}"]', ", the batch first" if batched else ""
            found = f"{tensor.name}:{'x'.join(map(str, shape))}"
            yield model.finding(field, found, f"a shape that fits dims {shown(dims)}{note}", "Correct it.")
            return
    least, usual, most = shapes
    if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
        field = f'{where}.parameters["{_PROFILES[1]}"]'
        yield model.finding(
            field, f"opt of {tensor.name} is not between min and max", "min <= opt <= max", "Correct it."
        )
    elif batched and most[0] < model.config.max_batch_size:
        yield model.finding(
            f'{where}.parameters["{_PROFILES[2]}"]',
            f"batches up to {most[0]}, with max_batch_size {model.config.max_batch_size}",
            "every batch that the server may send: a larger one makes it fail, or compile again",
            f"Write max_batch_size: {most[0]}, or a larger profile.",
        )
    elif batched and least[0] > 1:
        yield model.finding(
            f'{where}.parameters["{_PROFILES[0]}"]',
            f"batches from {least[0]}",
            "1: the server also sends single samples",
            "Begin the profile at 1.",
        )
