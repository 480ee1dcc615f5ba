"""Reports and manifests made by hand, for pages: what a validation says, in every state that it can have."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import numpy as np

from spach_deploy.bundle.schema import Manifest
from spach_deploy.report.content import ReportContent
from spach_deploy.validation.accuracy import Accuracy, notable_predictions, paired
from spach_deploy.validation.compare import compare_outputs
from spach_deploy.validation.result import MissingEngineRun, ReportHeader, Validation
from spach_deploy.validation.runs import EvaluationSet, Level, RunResult
from spach_deploy.validation.tolerance import Bounds
from spach_deploy.validation.verdict import Tolerance, judge
from tests import manifests
from tests.outputs import classifier

NAMES = ("a.jpg", "b.jpg")
REFERENCE = np.array([[3.0, 2.99, 0.0, 1.0, 0.5, 0.2, 0.1], [0.0, 4.0, 0.0, 1.0, 0.5, 0.2, 0.1]], np.float32)
CLOSE = REFERENCE * np.float32(1.001)
TIED = REFERENCE + np.array([[-0.02, 0.02] + [0.0] * 5, [0.0] * 7], np.float32)
WRONG = REFERENCE[:, ::-1].copy()
NOISE = {"images": 1, "rel_l2": 1e-6, "max_abs": 1e-6, "margin": 1e-6}
BOUNDS = Bounds({"logits": Tolerance(0.01, 0.1, 0.99, 0.05, "by hand")}, {"sentence": "by hand", "noise": NOISE})

MODULES: list[dict[str, Any]] = [
    {"module": "stem", "kind": "stem", "error": 2e-4, "noise": 1e-7, "allowed": 5e-4, "peak": 9.5},
    {"module": "layer1.0", "kind": "block", "error": 8e-4, "noise": 1e-7, "allowed": 2e-3, "peak": 123.4},
    {"module": "layer1.1", "kind": "block", "error": None, "noise": 0.0, "allowed": 2e-3, "peak": 0.0},
    {"module": "norm", "kind": "norm", "error": 9e-3, "noise": 1e-6, "allowed": 3e-3, "peak": 70_000.0},
    {"module": "head", "kind": "head", "error": 9e-3, "noise": 1e-6, "allowed": 3e-3, "peak": 4.0},
]
TRACE: dict[str, Any] = {"what": "typed graph in ONNX Runtime (CPU)", "images": ["a.jpg"], "modules": MODULES}
BISECT: dict[str, Any] = {
    "passed": False,
    "lines": ["Step: typed graph disagrees.", "First wrong module: layer1.0.qkv."],
    "first_stage": "typed graph",
    "stages": [
        {"stage": "reference", "error": 0.0, "allowed": 1e-5, "verdict": "agrees", "why": "", "seconds": 1.2},
        {"stage": "typed graph", "error": None, "allowed": 3e-3, "verdict": "disagrees", "why": "NaN", "seconds": 0.0},
        {"stage": "engine", "error": None, "allowed": None, "verdict": "not run", "why": "no GPU", "seconds": 0.0},
    ],
    "suspects": [
        {
            "module": "layer1.0.qkv",
            "kind": "wrong weight",
            "error": 3e-2,
            "allowed": 4e-4,
            "why": "Its error is large.",
        },
        {"module": "", "kind": "wrong layout", "error": None, "allowed": 4e-4, "why": "Unlike anything."},
    ],
    "modules": [
        {"module": "layer1.0.qkv", "inherited": 3e-2, "local": 3e-2, "allowed": 4e-4, "tensor": "a/b", "why": ""},
        {"module": "layer1.1", "inherited": None, "local": None, "allowed": 4e-4, "tensor": None, "why": "No tensor."},
        {"module": "head", "inherited": 3e-2, "local": 0.0, "allowed": 4e-4, "tensor": "logits", "why": ""},
    ],
    "unmapped": [{"module": "layer1.1.act", "why": "it was folded away"}],
}


def evidence(
    logits: np.ndarray, level: Level = Level.GRAPH, ran: str = "typed graph in ONNX Runtime (CPU)"
) -> RunResult:
    """One run whose logits were `logits`."""
    comparison = compare_outputs({"logits": REFERENCE}, {"logits": logits}, image_names=NAMES)
    answers = notable_predictions(REFERENCE, logits, NAMES)
    return RunResult(level, ran, (1, 1), comparison, BOUNDS, judge(comparison, BOUNDS.outputs), answers)


def validation(*items: RunResult, missing: bool = False, max_drop: float | None = None) -> Validation:
    """A validation with a trial that can be pictured; `max_drop` measures accuracy too."""
    pictures = np.zeros((2, 3, 8, 8), np.float32)
    eval_set = EvaluationSet(
        lambda start, stop: pictures[start:stop],
        {"logits": REFERENCE},
        NAMES,
        "photographs",
        "PyTorch in FP32",
        classifier(7),
    )
    why = MissingEngineRun("no NVIDIA GPU here", "an NVIDIA GPU with tensorrt 10.16") if missing else None
    found = Validation(ReportHeader("bundle", "ms_hybrid_s", "fp16", True), eval_set, items, missing_engine_run=why)
    if max_drop is None:
        return found
    measured = paired(REFERENCE, TIED, [0, 1])
    return dataclasses.replace(found, accuracy=Accuracy(measured, "typed graph", "a folder", max_drop))


def report(*items: RunResult, missing: bool = False, max_drop: float | None = None, **changes: Any) -> dict[str, Any]:
    """report.json of such a validation, with other entries in place."""
    return {**validation(*items, missing=missing, max_drop=max_drop).to_dict(), **copy.deepcopy(changes)}


_MANIFEST: dict[str, Any] = {
    "created": "2026-01-02T03:04:05+00:00",
    "command": "spach-export --model ms_hybrid_s --fp16",
    "tools": {"spach-deploy": "0.1.0", "torch": "2.13.0"},
    "model": {
        "name": "ms_hybrid_s",
        "image_size": 8,
        "num_classes": 7,
        "origin": "demo",
        "checkpoint": None,
        "checkpoint_sha256": None,
        "weights": "model",
        "weights_sha256": "ab" * 32,
    },
    "preprocessing": {
        "image_size": 8,
        "resize_size": 9,
        "interpolation": "bicubic, antialiased",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
    "inputs": [{"name": "input", "dtype": "float32", "shape": [None, 3, 8, 8], "layout": "NCHW"}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [None, 7], "layout": "NC"}],
    "precision": {
        "asked": "int8",
        "rest": "fp16",
        "summary": "1 of 2 layers in int8, the rest fp16",
        "nodes": 12,
        "half_nodes": 9,
        "casts": 2,
        "margin": 8.0,
        "limit": 65504.0,
        "ranges": {"source": "the 8 built-in photographs", "images": 8},
        "kept": [
            {"module": "layer1.0", "reason": "statistics", "tensor": None, "max_abs": None, "nodes": 2},
            {"module": "layer1.1", "reason": "range", "tensor": "layer1.1/Add", "max_abs": 70_000.0, "nodes": 1},
        ],
        "weights": {"count": 100, "overflow": 0, "underflow": 1, "subnormal": 2, "notable": []},
        "closest": [{"tensor": "layer1.0/Add", "max_abs": 49.5}, {"tensor": "layer1.1/Add", "max_abs": 0.0}],
        "layers": [
            {"node": "stem.proj/Conv", "module": "stem.proj", "kind": "convolution", "asked": "fp16"},
            {"node": "layer1.0.fc1/Gemm", "module": "layer1.0.fc1", "kind": "linear", "asked": "int8"},
        ],
    },
    "quantization": {
        **manifests.quantization(),
        "calibration": {
            **{"images": 64, "images_sha256": "cd" * 32, "method": "max", "weights_sha256": "ab" * 32},
        },
        "kept_float": [
            {
                **{"module": "stem.proj", "node": "stem.proj/Conv", "kind": "convolution", "macs": 9},
                "reason": "rule: a convolution",
            },
        ],
    },
    "graph": {
        "certificate": {"opset": 20, "nodes": 12, "operators": {"Add": 7, "Gemm": 5}, "symbolic": "batch"},
        "rewrites": {
            "fold_batchnorm": {"modules": 2, "worst_fp64": 1e-16, "skipped": []},
            "grid_stream": {"modules": 0, "worst_fp64": 0.0, "skipped": ["nothing to do"]},
        },
        "passes": {"shift_depthwise": 22, "split_group_norm": 0},
        "relative_l2_limit": 1e-5,
        "relative_l2": {"static model": {"batch 1": 5e-7}, "exported graph": {"batch 1": 2e-5}},
    },
    "engine": {
        "flavour": "tensorrt-rtx",
        "version": "1.7.1",
        "gpus": ["sm86", "sm89"],
        "batch": "1:8:32",
        "bytes": 142_300_996,
        "layers_by_dtype": {"fp16": 1, "int8": 1},
        "layers": {"stem.proj/Conv": "fp16", "layer1.0.fc1/Gemm": "fp16"},
        "kernels": {
            "total": 158,
            "by_kind": {"gemm": 73, "pointwise": 85},
            "fused_attentions": 1,
            "batch": 8,
            "bytes_moved": 1_371_000_000,
        },
        "build_seconds": 11.2,
    },
    "phases": [
        {"name": "load the model", "seconds": 1.5, "peak_bytes": 500_000_000},
        {"name": "calibrate", "seconds": 65.0, "peak_bytes": 900_000_000},
        {"name": "engine build (alongside)", "seconds": 12.0, "peak_bytes": 900_000_000},
        {"name": "something new", "seconds": 0.2, "peak_bytes": 900_000_000},
    ],
    "files": {"model.onnx": {"sha256": "ef" * 32, "bytes": 126_471_864}},
}


def manifest(**changed: Any) -> Manifest:
    """Of an INT8 export in which everything there is to show is there; `changed` are whole sections."""
    return Manifest.parse(json.dumps(manifests.sections(**{**_MANIFEST, **changed})), "manifest.json")


MANIFEST = manifest()


STATES = {
    "agrees": report(evidence(CLOSE)),
    "engine": report(evidence(CLOSE, Level.ENGINE, "engine.plan"), evidence(CLOSE)),
    "unverified": report(evidence(CLOSE), missing=True),
    "ties": report(evidence(TIED)),
    "wrong": report(evidence(WRONG), trace=TRACE, bisect=BISECT),
    "not finite": report(evidence(np.full_like(REFERENCE, np.nan))),
    "nothing": report(),
    "drop": report(evidence(TIED), max_drop=0.0),
}
"""A report in every state, by name."""


def content(state: str = "agrees", manifest: Manifest | None = MANIFEST, **changes: Any) -> ReportContent:
    """What a page of that state is made from."""
    found = {**copy.deepcopy(STATES[state]), **copy.deepcopy(changes)}
    return ReportContent(found, manifest, {0: "data:image/jpeg;base64,AA=="})
