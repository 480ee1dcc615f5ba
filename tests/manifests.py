"""A manifest as an export writes it, in as few words as may be: tests change what they are about."""

from __future__ import annotations

from typing import Any

_TOLERANCE = {"rel_l2": 1e-3, "max_abs": 1e-2, "cosine_min": 0.999, "flip_margin": 1e-2, "origin": "a test"}
_MEASURED = {"images": 1, "rel_l2": 1e-6, "max_abs": 1e-6, "margin": 1e-6}
_DERIVATION = {
    **{"arithmetic": "fp16", "noise": _MEASURED, "noise_factor": 20.0, "loss": _MEASURED, "loss_factor": 2.0},
    "sentence": "given",
}


def sections(name: str = "ms_hybrid_s", asked: str = "fp16", **changed: Any) -> dict[str, Any]:
    """Plain JSON of all that a manifest must say, at 224 pixels and 1000 classes; `changed` are whole sections."""
    return {
        "schema_version": 1,
        "model": model(name),
        "preprocessing": preprocessing(224),
        "inputs": [{"name": "input", "dtype": "float32", "shape": [None, 3, 224, 224], "layout": "NCHW"}],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [None, 1000], "layout": "NC"}],
        "output_options": {"io_dtype": "fp32", "top_k": None, "softmax": False},
        "batch": {"min": 1, "opt": 8, "max": 32},
        "precision": {"asked": asked},
        "engine": {"flavour": "tensorrt-rtx"},
        "validation": {"passed": True, "level": "graph", "tolerances": tolerances("logits")},
        "files": {},
        **changed,
    }


def model(name: str, image_size: int | tuple[int, int] = 224, num_classes: int = 1000) -> dict[str, Any]:
    """The section of a model with demo weights."""
    return {
        **{"name": name, "image_size": image_size, "num_classes": num_classes, "origin": "demo"},
        **{"checkpoint": None, "checkpoint_sha256": None, "weights": "model", "weights_sha256": "0" * 64},
    }


def preprocessing(image_size: int) -> dict[str, Any]:
    """The published transform of that size."""
    return {
        **{"image_size": image_size, "resize_size": image_size * 256 // 224, "interpolation": "bicubic, antialiased"},
        **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }


def quantization(**changed: Any) -> dict[str, Any]:
    """The section of an INT8 export with the rest in FP16, as exports wrote it before they said `quantized_from`."""
    return {
        **{"format": "int8", "rest": "fp16", "scales": "quantization.json"},
        **{"calibration": {"weights_sha256": "0" * 64}, "rewrites": {"disabled": [], "quantize": []}},
        **changed,
    }


def tolerances(*outputs: str) -> dict[str, Any]:
    """Bounds of these outputs, the same for graph and engine."""
    bounds = {"outputs": dict.fromkeys(outputs, _TOLERANCE), "derivation": _DERIVATION}
    return {"graph": bounds, "engine": bounds}
