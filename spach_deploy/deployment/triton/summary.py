"""What was written, for the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from spach_deploy.command_lines import quoted
from spach_deploy.deployment.triton.options import Backend
from spach_deploy.deployment.triton.repository import Written
from spach_deploy.deployment.triton.served import ServedModel
from spach_deploy.deployment.triton.tensors import DATA_TYPES, shown
from spach_deploy.text import escaped, json_text

_LABEL_WIDTH = 12


def as_text(written: Written) -> str:
    """A few lines: the models, how they take batches, and the command that serves them."""
    lines = [line for model in written.models for line in _model_lines(model, written)]
    command = serve_command(written)
    return escaped([*lines, "", *(["Serve it:", f"  {command}"] if command else ["It is to be read, not served."])])


def as_json(written: Written) -> str:
    """The same as JSON."""
    return json_text(
        {
            "repository": str(written.path),
            "models": [_facts(model, written) for model in written.models],
            "steps": list(written.steps),
            "warnings": list(written.warnings),
            "serve": serve_command(written),
        }
    )


def serve_command(written: Written) -> str | None:
    """The command that serves the repository; None where a server could not load it."""
    if written.warnings:
        return None
    cache = " --cache-config local,size=1073741824" if written.options.response_cache else ""
    return f"tritonserver --model-repository {quoted(written.path)}{cache}"


def _served_versions(model: ServedModel, written: Written) -> tuple[int, ...]:
    numbers = tuple(version.number for version in model.versions)
    policy = written.options.version_policy
    return numbers[-1:] if policy is None else policy.serves(numbers)


def _facts(model: ServedModel, written: Written) -> dict[str, Any]:
    return {
        "name": model.name,
        "backend": model.backend.value,
        "versions": [version.number for version in model.versions],
        "served_versions": list(_served_versions(model, written)),
        "max_batch_size": model.batches.max_batch_size,
        "notes": list(model.notes),
    }


def _model_lines(model: ServedModel, written: Written) -> list[str]:
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


def _versions(model: ServedModel, written: Written) -> str:
    given = ", ".join(f"{version.number} from {version.bundle.path}" for version in model.versions)
    served = ", ".join(map(str, _served_versions(model, written)))
    return given if len(model.versions) == 1 else f"{given}; served: {served}"


def _batch(model: ServedModel, written: Written) -> str:
    if not model.batches.max_batch_size:
        accepted = "exactly " + str(model.batch.max) if model.batch.min == model.batch.max else str(model.batch)
        return f"{accepted} samples a request; the server cannot make such batches from single samples"
    if model.backend is Backend.TENSORRT or written.options.batching.dynamic:
        return f"1 to {model.batches.max_batch_size}, tuned for {model.batch.opt}"
    return f"1 to {model.batches.max_batch_size}"
