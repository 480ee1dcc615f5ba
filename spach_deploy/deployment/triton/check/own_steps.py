"""Rules for the steps that spach-package writes: their parameters against their tensors."""

from __future__ import annotations

from collections.abc import Iterator

from spach_deploy.deployment.triton.check.findings import Finding
from spach_deploy.deployment.triton.check.labels import label_file
from spach_deploy.deployment.triton.check.model_folder import ModelFolder, Repository
from spach_deploy.deployment.triton.schema import data_type_name
from spach_deploy.deployment.triton.tensors import DATA_TYPES, shown
from spach_deploy.small_files import parse_json

_AGAIN = "Write it again with spach-package triton --ensemble."


def check_own_steps(model: ModelFolder, repository: Repository) -> Iterator[Finding]:
    """Models of the Python backend that have the parameters `preprocessing` or `top_k`."""
    if model.backend != "python":
        return
    parameters = {name: value.string_value for name, value in model.config.parameters.items()}
    if "preprocessing" in parameters and model.config.output:
        yield from _preprocess(model, parameters["preprocessing"])
    if "top_k" in parameters and model.config.input and model.config.input[0].dims:
        yield from _top_k(model, parameters)


def _preprocess(model: ModelFolder, text: str) -> Iterator[Finding]:
    output = model.config.output[0]
    try:
        settings = parse_json(text)
        size, dtype = int(settings["image_size"]), str(settings["dtype"])
        int(settings["resize_size"])
        if not len(settings["mean"]) == len(settings["std"]) == 3 or 0 in settings["std"]:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        what = "sizes, mean, std and dtype as JSON"
        yield model.finding('parameters["preprocessing"]', "what cannot be read", what, _AGAIN)
        return
    wanted = [size, size, 3] if dtype == "uint8" else [3, size, size]
    have = (data_type_name(output.data_type), list(output.dims))
    if have != (DATA_TYPES.get(dtype), wanted):
        yield model.finding(
            'parameters["preprocessing"]',
            f"a transform to {dtype} {shown(wanted)}",
            f"the output's {have[0]} {shown(have[1])}",
            _AGAIN,
        )


def _top_k(model: ModelFolder, parameters: dict[str, str]) -> Iterator[Finding]:
    classes, text = model.config.input[0].dims[-1], parameters["top_k"]
    k = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= k <= classes:
        yield model.finding('parameters["top_k"]', f'"{text}"', f"1 to {classes}, the number of classes", _AGAIN)
    for index, output in enumerate(model.config.output):
        if list(output.dims) != [k]:
            yield model.finding(f"output[{index}].dims", shown(output.dims), f"[{k}], the parameter top_k", _AGAIN)
    yield from label_file(model, 'parameters["labels"]', parameters.get("labels", ""), classes)
