"""What was written, and which images are known, for the terminal and as JSON."""

from __future__ import annotations

from spach_deploy.deployment.kubernetes.folder import Written
from spach_deploy.deployment.kubernetes.sizes import quantity
from spach_deploy.onnx_graph.runtimes import DATA, Runtimes
from spach_deploy.text import escaped, json_text

_LABEL_WIDTH = 12


def as_text(written: Written) -> str:
    """A few lines: what is served, in which image, and the three commands."""
    deployed = written.deployed
    sizes = deployed.sizes
    rows = {
        "model": f"{deployed.title}, {deployed.model.facts.precision.value}, as {deployed.model.name} in Triton",
        "serves": deployed.serves,
        "image": f"{deployed.image.reference} ({deployed.carries})",
        "pods": f"{_replicas(written)} of {deployed.name}, each with 1 GPU and {quantity(sizes.memory_bytes)}"
        f"{' for ' + ', '.join(deployed.gpus) if deployed.gpus else ''}",
        "start-up": f"{sizes.startup_seconds} s ({sizes.arithmetic})",
        "folder": str(written.path),
    }
    lines = [f"{label:<{_LABEL_WIDTH}}{text}" for label, text in rows.items()]
    notes = [f"{'note':<{_LABEL_WIDTH}}{note}" for note in deployed.notes]
    return escaped([*lines, *notes, "", "Run it:", *(f"  {command}" for command in written.commands)])


def as_json(written: Written) -> str:
    """The same as JSON."""
    deployed = written.deployed
    content = {
        "folder": str(written.path),
        "name": deployed.name,
        "model": deployed.title,
        "backend": deployed.model.backend.value,
        "kserve": deployed.options.kserve,
        "triton_image": deployed.image.reference,
        "image": f"{deployed.image_name}:{written.image_tag}",
        "gpus": list(deployed.gpus),
        "startup_seconds": deployed.sizes.startup_seconds,
        "notes": list(deployed.notes),
        "commands": list(written.commands),
    }
    return json_text(content)


def versions_table(known: Runtimes) -> str:
    """What every Triton image carries, the opset that its ONNX Runtime loads, and where that was seen."""
    lines = [f"{'release':<9}{'TensorRT':<12}{'ONNX Runtime':<14}{'opset':<7}CUDA"]
    for image in known.images:
        runtime = known.onnxruntime(image.onnxruntime)
        opset = "-" if runtime is None else str(runtime.opset)
        versions = f"{image.tensorrt or 'not known':<12}{image.onnxruntime:<14}{opset:<7}{image.cuda}"
        lines.append(f"{image.release:<9}{versions}")
    return "\n".join([*lines, "", f"As read on {known.read}. Where each was seen stands in {DATA}."])


def _replicas(written: Written) -> str:
    replicas = written.deployed.options.replicas
    return f"{replicas.min} to {replicas.max}" if replicas.min != replicas.max else f"{replicas.min}"
