"""Commands that read a bundle, a checkpoint or images: which one meets the damage is drawn for each case."""

from __future__ import annotations

from random import Random

from benchmarks.robustness.box import Box
from benchmarks.robustness.seeds import MODEL, seeds

OUT = "out/bundle"
EXPORT = ("spach-export", *MODEL, "--fp32", "--engine", "none", "-o", OUT)


def export(box: Box, chance: Random, *more: str) -> tuple[str, ...]:
    """An export, half of them over an earlier bundle."""
    if chance.random() < 0.5:
        return (*EXPORT, *more)
    box.bring(seeds().path("fp16"), OUT)
    return (*EXPORT, "--overwrite", *more)


def reading_bundle(chance: Random, name: str) -> tuple[str, ...]:
    """Any command that takes a bundle."""
    package = ("spach-package", chance.choice(("triton", "cpp", "kubernetes")), name, "-o", "out/package")
    ways: tuple[tuple[str, ...], ...] = (
        *(("spach-validate", name), ("spach-validate", name, "--accept", "graph"), ("spach-validate", name, "--json")),
        ("spach-validate", f"{name}/engine.plan"),
        ("spach-doctor", name),
        ("spach-doctor", name, "--json"),
        package,
        package,
        (*package, "--json"),
        ("spach-package", "triton", name, "-o", "out/package", "--backend", "tensorrt", "--force"),
        ("spach-package", "triton", name, "-o", "out/package", "--backend", "onnxruntime"),
    )
    return chance.choice(ways)
