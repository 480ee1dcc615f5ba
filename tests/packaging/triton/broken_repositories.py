"""Model repositories that are as they should be, and the same with one thing broken each.

`BROKEN` says which good one, what is done to it, and which finding must come of it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from spach_deploy.common.files import sha256_of
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision
from spach_deploy.packaging.triton.config import parse, to_text
from spach_deploy.packaging.triton.options import (
    Accelerator,
    Backend,
    Ensemble,
    EnsembleInput,
    RateLimiter,
    TritonOptions,
    VersionPolicy,
)
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

CONFIG = "tiny/config.pbtxt"
ENSEMBLE = "tiny_ensemble/config.pbtxt"


EVERY_OUTPUT = OutputSpec(top_k=3, softmax=True)
GOOD: dict[str, tuple[Tiny, TritonOptions]] = {
    "plan": (Tiny(outputs=EVERY_OUTPUT), TritonOptions()),
    "graph": (Tiny(outputs=EVERY_OUTPUT), TritonOptions(Backend.ONNXRUNTIME, ensemble=Ensemble(top_k=2))),
    "explicit": (Tiny(batch=BatchProfile(2, 4, 6)), TritonOptions()),
    "fixed": (Tiny(batch=BatchProfile(4, 4, 4)), TritonOptions()),
    "single": (Tiny(batch=BatchProfile(1, 1, 1)), TritonOptions()),
    "half": (Tiny(outputs=OutputSpec(IODtype.FP16)), TritonOptions(Backend.ONNXRUNTIME, ensemble=Ensemble())),
    "pixels": (Tiny(outputs=OutputSpec(IODtype.UINT8)), TritonOptions(ensemble=Ensemble(EnsembleInput.PIXELS))),
    "pictures": (Tiny(outputs=OutputSpec(IODtype.UINT8)), TritonOptions(ensemble=Ensemble())),
    "accelerated": (
        Tiny(precision=Precision.BF16),
        TritonOptions(accelerator=Accelerator.TENSORRT, engine_cache="/engines"),
    ),
    "options": (
        Tiny(),
        TritonOptions(version_policy=VersionPolicy.parse("specific:1"), response_cache=True, warm_up=False),
    ),
    "limited": (
        Tiny(engine="none"),
        TritonOptions(
            rate_limiter=RateLimiter.parse(["slot=2", "tiny_preprocess:core=1:global"], ["tiny:2"]),
            ensemble=Ensemble(),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Broken:
    """A good repository, what is done to it, and the finding that must come of it."""

    base: str
    spoil: Callable[[Path], None]
    file: str
    field: str
    found: str


def edit(change: Callable[[Any], None], file: str = CONFIG) -> Callable[[Path], None]:
    """Change a configuration through its message."""

    def spoil(repository: Path) -> None:
        path = repository / file
        config = parse(path.read_text())
        change(config)
        path.write_text(to_text(config))

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(repository: Path) -> None:
        for one in spoils:
            one(repository)

    return spoil


def clear(field: str, file: str = CONFIG) -> Callable[[Path], None]:
    return edit(lambda config: config.ClearField(field), file)


def replace(old: str, new: str, file: str = CONFIG) -> Callable[[Path], None]:
    """Change a configuration as text, as an editor does."""

    def spoil(repository: Path) -> None:
        path = repository / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


def put(file: str, content: bytes | str) -> Callable[[Path], None]:
    def spoil(repository: Path) -> None:
        (repository / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def remove(file: str) -> Callable[[Path], None]:
    return lambda repository: (repository / file).unlink()


def rename(old: str, new: str) -> Callable[[Path], None]:
    def spoil(repository: Path) -> None:
        (repository / old).rename(repository / new)

    return spoil


def set_(path: str, value: Any, file: str = CONFIG) -> Callable[[Path], None]:
    """Set one field, given as an attribute path with indices."""

    def change(config: Any) -> None:
        *parents, last = path.split(".")
        target = config
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
        if isinstance(value, list):
            getattr(target, last)[:] = value
        else:
            setattr(target, last, value)

    return edit(change, file)


def step_setting(name: str, value: object) -> Callable[[Path], None]:
    """Another value in the settings of the step that decodes pictures."""

    def change(config: Any) -> None:
        parameter = config.parameters["preprocessing"]
        parameter.string_value = json.dumps({**json.loads(parameter.string_value), name: value})

    return edit(change, "tiny_preprocess/config.pbtxt")


GPU = "optimization.execution_accelerators.gpu_execution_accelerator"


def block(name: str, value: str | None) -> Callable[[Path], None]:
    """Set a parameter of the accelerator, or remove it."""

    def change(config: Any) -> None:
        parameters = config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
        parameters.pop(name, None) if value is None else parameters.update({name: value})

    return edit(change)


def parameter(name: str) -> str:
    """The field of a parameter in a finding."""
    return f'{GPU}[0].parameters["{name}"]'


def cached_in_the_repository(repository: Path) -> None:
    block("trt_engine_cache_path", str(repository / "engines"))(repository)


def graph_in_place_of_the_plan(repository: Path) -> None:
    bundle = tiny_bundles.write(repository.parent / "other-bundle")
    shutil.copy(bundle / "model.onnx", repository / "tiny" / "1" / "model.plan")


def fixed_batch(repository: Path) -> None:
    path = repository / "tiny" / "1" / "model.onnx"
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, path)
    bundle = json.loads((repository / "tiny" / "1" / "bundle.json").read_text())
    bundle["files"]["model.onnx"]["sha256"] = sha256_of(path)
    (repository / "tiny" / "1" / "bundle.json").write_text(json.dumps(bundle))


def circle(repository: Path) -> None:
    """An ensemble that is its own step."""
    edit(lambda config: setattr(config.ensemble_scheduling.step[0], "model_name", "tiny_ensemble"), ENSEMBLE)(
        repository
    )


def preferred(*sizes: int) -> Callable[[Path], None]:
    return set_("dynamic_batching.preferred_batch_size", list(sizes))


def warm(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return edit(lambda config: change(config.model_warmup[1]))


def warm_input(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return warm(lambda request: change(request.inputs["input"]))


def move_warm_up_input(request: Any) -> None:
    request.inputs["inptu"].CopyFrom(request.inputs["input"])
    del request.inputs["input"]


def step(index: int, change: Callable[[Any], None]) -> Callable[[Path], None]:
    return edit(lambda config: change(config.ensemble_scheduling.step[index]), ENSEMBLE)


def rewire(index: int, side: str, old: str, new: str) -> Callable[[Path], None]:
    """Move a key of a step's map."""

    def change(target: Any) -> None:
        mapping = getattr(target, side)
        mapping[new] = mapping.pop(old)

    return step(index, change)


def wire(index: int, side: str, key: str, name: str) -> Callable[[Path], None]:
    """Change the ensemble's tensor that a step's tensor is mapped to."""
    return step(index, lambda target: getattr(target, side).update({key: name}))


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    model.producer_name = "somebody else"
    return model


def _renamed_tensor(tensor: Any) -> Any:
    copy = type(tensor)()
    copy.CopyFrom(tensor)
    copy.name = "unused"
    return copy


PLAN_FILE, GRAPH_FILE, FACTS = "tiny/1/model.plan", "tiny/1/model.onnx", "tiny/1/bundle.json"
STEP = "ensemble_scheduling.step"
WARM, WARM_INPUT = "model_warmup[1]", 'model_warmup[1].inputs["input"]'

PREPROCESS = "tiny_preprocess/config.pbtxt"
LIMITER, RESOURCE = "instance_group.0.rate_limiter.resources.0", "instance_group[0].rate_limiter.resources[0]"

BROKEN: dict[str, Broken] = {
    # text and schema
    "unknown field": Broken("plan", replace("max_batch_size", "max_batchsize"), CONFIG, "line 3", "no field named"),
    "unknown nested field": Broken("plan", replace("dims:", "dimensions:"), CONFIG, "line 8", "no field named"),
    "unknown type": Broken("plan", replace("TYPE_FP32", "TYPE_FLOAT"), CONFIG, "line 6", "no value named TYPE_FLOAT"),
    "text for a number": Broken("plan", replace("max_batch_size: 8", 'max_batch_size: "8"'), CONFIG, "line 3", '"8"'),
    "field twice": Broken("plan", replace("platform:", 'name: "tiny"\nplatform:'), CONFIG, "line 2", "multiple"),
    "two schedulers": Broken(
        "plan", replace("dynamic_batching", "sequence_batching {}\ndynamic_batching"), CONFIG, "line 37", "oneof"
    ),
    "open brace": Broken("plan", replace("}", ""), CONFIG, "line 10", "no field"),
    "not text": Broken("plan", put(CONFIG, b"\xff\xfe\x00"), CONFIG, "", "not UTF-8"),
    "no configuration": Broken("plan", remove(CONFIG), CONFIG, "", "no such file"),
    # names, platform
    "name of another": Broken("plan", set_("name", "other"), CONFIG, "name", '"other"'),
    "no platform": Broken(
        "plan",
        both(clear("platform"), clear("backend"), rename(PLAN_FILE, "tiny/1/engine.plan")),
        CONFIG,
        "backend",
        "none",
    ),
    "unknown platform": Broken(
        "plan",
        both(clear("backend"), set_("platform", "tensorrt")),
        CONFIG,
        "platform",
        '"tensorrt"',
    ),
    "backend of another": Broken("plan", set_("backend", "onnxruntime"), CONFIG, "backend", '"onnxruntime"'),
    "negative batch": Broken("plan", set_("max_batch_size", -1), CONFIG, "max_batch_size", "-1"),
    # tensors
    "input renamed": Broken("plan", set_("input.0.name", "inptu"), CONFIG, "input[0].name", '"inptu"'),
    "input of the graph renamed": Broken("graph", set_("input.0.name", "images"), CONFIG, "input[0].name", '"images"'),
    "output renamed": Broken("plan", set_("output.0.name", "logit"), CONFIG, "output[0].name", '"logit"'),
    "no input": Broken("plan", clear("input"), CONFIG, "input", "none"),
    "no output": Broken("plan", clear("output"), CONFIG, "output", "none"),
    "output twice": Broken("plan", edit(lambda c: c.output.add().CopyFrom(c.output[0])), CONFIG, "output", "2 times"),
    "input without a name": Broken("plan", set_("input.0.name", ""), CONFIG, "input[0].name", "none"),
    "input type": Broken("plan", set_("input.0.data_type", 10), CONFIG, "input[0].data_type", "TYPE_FP16"),
    "input type of the graph": Broken(
        "graph", set_("input.0.data_type", 2), CONFIG, "input[0].data_type", "TYPE_UINT8"
    ),
    "output type": Broken("plan", set_("output.3.data_type", 8), CONFIG, "output[3].data_type", "TYPE_INT32"),
    "no type": Broken("plan", set_("output.0.data_type", 0), CONFIG, "output[0].data_type", "none"),
    "dims with the batch": Broken("plan", set_("input.0.dims", [8, 3, 8, 8]), CONFIG, "input[0].dims", "[8, 3, 8, 8]"),
    "dims of another layout": Broken("plan", set_("input.0.dims", [8, 8, 3]), CONFIG, "input[0].dims", "[8, 8, 3]"),
    "dims left free": Broken("graph", set_("input.0.dims", [3, -1, -1]), CONFIG, "input[0].dims", "[3, -1, -1]"),
    "output dims": Broken("plan", set_("output.0.dims", [1000]), CONFIG, "output[0].dims", "[1000]"),
    "no dims": Broken("plan", set_("input.0.dims", []), CONFIG, "input[0].dims", "none"),
    "dims of nothing": Broken("plan", set_("input.0.dims", [3, 0, 8]), CONFIG, "input[0].dims", "0"),
    "reshape": Broken(
        "plan",
        edit(lambda c: c.input[0].reshape.shape.extend([3, 63])),
        CONFIG,
        "input[0].reshape.shape",
        "189 elements",
    ),
    "format without three dims": Broken(
        "explicit", set_("input.0.format", 2), CONFIG, "input[0].format", "[-1, 3, 8, 8]"
    ),
    "input that may be left out": Broken("plan", set_("input.0.optional", True), CONFIG, "input.optional", '"input"'),
    # batches
    "batch above the profile": Broken("plan", set_("max_batch_size", 64), CONFIG, "max_batch_size", "64"),
    "single samples for an engine that takes none": Broken(
        "explicit",
        both(set_("max_batch_size", 6), set_("input.0.dims", [3, 8, 8])),
        CONFIG,
        "max_batch_size",
        "single samples",
    ),
    "batch outside the profile": Broken(
        "explicit", set_("input.0.dims", [8, 3, 8, 8]), CONFIG, "input[0].dims", "a batch of 8"
    ),
    "graph with a fixed batch": Broken("graph", fixed_batch, CONFIG, "max_batch_size", "leaves the batch to Triton"),
    "preferred size above the maximum": Broken(
        "plan", preferred(4, 16), CONFIG, "dynamic_batching.preferred_batch_size", "16"
    ),
    "preferred size of nothing": Broken("plan", preferred(0), CONFIG, "dynamic_batching.preferred_batch_size", "0"),
    "preferred size twice": Broken("plan", preferred(4, 4), CONFIG, "dynamic_batching.preferred_batch_size", "[4, 4]"),
    "dynamic batching without a batch": Broken(
        "explicit", edit(lambda c: c.dynamic_batching.SetInParent()), CONFIG, "dynamic_batching", "max_batch_size 0"
    ),
    "priorities without a default": Broken(
        "plan", set_("dynamic_batching.priority_levels", 2), CONFIG, "dynamic_batching.default_priority_level", "0"
    ),
    "default without priorities": Broken(
        "plan",
        set_("dynamic_batching.default_priority_level", 1),
        CONFIG,
        "dynamic_batching.default_priority_level",
        "1",
    ),
    "queue of a level that is not there": Broken(
        "plan",
        edit(lambda c: c.dynamic_batching.priority_queue_policy[3].SetInParent()),
        CONFIG,
        "dynamic_batching.priority_queue_policy",
        "level 3",
    ),
    # instances, versions, cache
    "instances on a CPU": Broken(
        "plan", set_("instance_group.0.kind", 2), CONFIG, "instance_group[0].kind", "KIND_CPU"
    ),
    "CPU instances on a GPU": Broken(
        "graph",
        both(set_("instance_group.0.kind", 2), set_("instance_group.0.gpus", [0])),
        CONFIG,
        "instance_group[0].gpus",
        "KIND_CPU",
    ),
    "GPU twice": Broken("plan", set_("instance_group.0.gpus", [0, 0]), CONFIG, "instance_group[0].gpus", "[0, 0]"),
    "fewer than no instance": Broken(
        "plan", set_("instance_group.0.count", -2), CONFIG, "instance_group[0].count", "-2"
    ),
    "profile for ONNX Runtime": Broken(
        "graph", set_("instance_group.0.profile", ["1"]), CONFIG, "instance_group[0].profile", "one"
    ),
    "resource without a name": Broken("limited", set_(f"{LIMITER}.name", ""), CONFIG, f"{RESOURCE}.name", "none"),
    "resource of nothing": Broken("limited", set_(f"{LIMITER}.count", 0), CONFIG, f"{RESOURCE}.count", "0"),
    "resource twice": Broken(
        "limited",
        edit(lambda c: c.instance_group[0].rate_limiter.resources.add(name="slot", count=1)),
        CONFIG,
        RESOURCE.rpartition("[")[0],
        '"slot" 2 times',
    ),
    "resource of a device and of the server": Broken(
        "limited",
        set_(f"{LIMITER}.name", "slot", PREPROCESS),
        PREPROCESS,
        f"{RESOURCE}.global",
        'true for "slot", which another instance group has for each device',
    ),
    "field of no rate limiter": Broken("limited", replace("priority: 2", "prio: 2"), CONFIG, "line 23", "no field"),
    "policy for a version that is not there": Broken(
        "options", set_("version_policy.specific.versions", [2]), CONFIG, "version_policy.specific.versions", "2"
    ),
    "policy for none": Broken(
        "plan",
        edit(lambda c: c.version_policy.specific.SetInParent()),
        CONFIG,
        "version_policy.specific.versions",
        "none",
    ),
    "policy for the latest none": Broken(
        "plan", edit(lambda c: c.version_policy.latest.SetInParent()), CONFIG, "version_policy.latest.num_versions", "0"
    ),
    "cache for a decoupled model": Broken(
        "options", set_("model_transaction_policy.decoupled", True), CONFIG, "response_cache.enable", "decoupled"
    ),
    # warm-up
    "warm-up above the maximum": Broken(
        "plan", warm(lambda w: setattr(w, "batch_size", 9)), CONFIG, f"{WARM}.batch_size", "9"
    ),
    "warm-up of several without a batch": Broken(
        "explicit", warm(lambda w: setattr(w, "batch_size", 2)), CONFIG, f"{WARM}.batch_size", "2"
    ),
    "warm-up of nothing": Broken(
        "plan", warm(lambda w: setattr(w, "batch_size", 0)), CONFIG, f"{WARM}.batch_size", "sends nothing"
    ),
    "warm-up type": Broken(
        "plan", warm_input(lambda i: setattr(i, "data_type", 10)), CONFIG, f"{WARM_INPUT}.data_type", "TYPE_FP16"
    ),
    "warm-up dims": Broken(
        "plan", warm_input(lambda i: i.dims.insert(0, 4)), CONFIG, f"{WARM_INPUT}.dims", "[4, 3, 8, 8]"
    ),
    "warm-up dims left free": Broken(
        "explicit", warm_input(lambda i: i.dims.__setitem__(0, -1)), CONFIG, f"{WARM_INPUT}.dims", "[-1, 3, 8, 8]"
    ),
    "warm-up batch outside the profile": Broken(
        "explicit", warm_input(lambda i: i.dims.__setitem__(0, 7)), CONFIG, f"{WARM_INPUT}.dims", "a batch of 7"
    ),
    "warm-up of another input": Broken("plan", warm(move_warm_up_input), CONFIG, f"{WARM}.inputs", '"inptu"'),
    "warm-up without data": Broken(
        "plan", warm_input(lambda i: i.ClearField("input_data_file")), CONFIG, WARM_INPUT, "no data"
    ),
    "warm-up file gone": Broken(
        "plan",
        remove("tiny/warmup/golden_input"),
        "tiny/warmup/golden_input",
        f"{WARM_INPUT}.input_data_file",
        "no warmup/golden_input",
    ),
    "warm-up file cut": Broken(
        "plan",
        put("tiny/warmup/golden_input", b"\0" * 100),
        "tiny/warmup/golden_input",
        f"{WARM_INPUT}.input_data_file",
        "100 bytes",
    ),
    "warm-up file elsewhere": Broken(
        "plan",
        warm_input(lambda i: setattr(i, "input_data_file", "../../secret")),
        CONFIG,
        f"{WARM_INPUT}.input_data_file",
        "secret",
    ),
    # files
    "no version": Broken("plan", rename("tiny/1", "tiny/v1"), "tiny/", "", "no version"),
    "version with a zero": Broken("plan", rename("tiny/1", "tiny/01"), "tiny/01", "", "Triton ignores"),
    "no plan": Broken("plan", remove(PLAN_FILE), PLAN_FILE, "", "no such file"),
    "plan under another name": Broken(
        "plan", rename(PLAN_FILE, "tiny/1/engine.plan"), PLAN_FILE, "", "there is engine.plan"
    ),
    "file name that is a path": Broken(
        "plan", set_("default_model_filename", "../model.plan"), CONFIG, "default_model_filename", "../model.plan"
    ),
    "file for one GPU gone": Broken(
        "plan",
        edit(lambda c: c.cc_model_filenames.update({"8.9": "sm89.plan"})),
        CONFIG,
        'cc_model_filenames["8.9"]',
        "no 1/sm89.plan",
    ),
    "graph as a plan": Broken("plan", graph_in_place_of_the_plan, PLAN_FILE, "", "an ONNX graph"),
    "text as a plan": Broken("plan", put(PLAN_FILE, "hello"), PLAN_FILE, "", "text file"),
    "plan as a graph": Broken("graph", put(GRAPH_FILE, b"ftrt" + bytes(200)), GRAPH_FILE, "", "a plan of tensorrt"),
    "graph cut": Broken("graph", put(GRAPH_FILE, b"\x08\x08\x12\x01"), GRAPH_FILE, "", "no whole ONNX graph"),
    "plan of RTX": Broken(
        "plan", put(PLAN_FILE, tiny_bundles.plan_bytes("tensorrt-rtx")), PLAN_FILE, "", "TensorRT for RTX"
    ),
    "another plan": Broken("plan", put(PLAN_FILE, b"ftrt" + bytes(300)), PLAN_FILE, "", "another SHA-256"),
    "another graph": Broken(
        "graph",
        lambda r: onnx.save(_renamed(onnx.load(r / GRAPH_FILE)), r / GRAPH_FILE),
        GRAPH_FILE,
        "",
        "another SHA-256",
    ),
    "plan without its manifest": Broken("plan", remove(FACTS), FACTS, "", "no such file"),
    "manifest that is none": Broken("plan", put(FACTS, "{}"), FACTS, "", "no manifest"),
    # labels
    "labels gone": Broken("plan", remove("tiny/labels.txt"), "tiny/labels.txt", "output[0].label_filename", "no file"),
    "labels too few": Broken("plan", put("tiny/labels.txt", "a\nb\n"), "tiny/labels.txt", "", "2 lines"),
    "label empty": Broken(
        "plan", put("tiny/labels.txt", "a\n\nc\nd\ne\nf\ng\n"), "tiny/labels.txt", "line 2", "no name"
    ),
    "labels not named": Broken("plan", set_("output.0.label_filename", ""), CONFIG, "output[0].label_filename", "none"),
    "labels of a step gone": Broken(
        "graph", remove("tiny_top_k/labels.txt"), "tiny_top_k/labels.txt", 'parameters["labels"]', "no file"
    ),
    # steps
    "step file gone": Broken(
        "graph", remove("tiny_preprocess/1/model.py"), "tiny_preprocess/1/model.py", "", "no such file"
    ),
    "step settings unreadable": Broken(
        "graph",
        edit(lambda c: setattr(c.parameters["preprocessing"], "string_value", "{}"), "tiny_preprocess/config.pbtxt"),
        "tiny_preprocess/config.pbtxt",
        'parameters["preprocessing"]',
        "cannot be read",
    ),
    "step settings of another interpolation": Broken(
        "graph",
        replace(
            'image_size\\": 8', 'interpolation\\": \\"cubic\\", \\"image_size\\": 8', "tiny_preprocess/config.pbtxt"
        ),
        "tiny_preprocess/config.pbtxt",
        'parameters["preprocessing"]',
        "cannot be read",
    ),
    "step settings of another size": Broken(
        "graph",
        replace('image_size\\": 8', 'image_size\\": 16', "tiny_preprocess/config.pbtxt"),
        "tiny_preprocess/config.pbtxt",
        'parameters["preprocessing"]',
        "[3, 16, 16]",
    ),
    **{
        f"step settings of another {name}": Broken(
            "graph", step_setting(name, value), "tiny_preprocess/config.pbtxt", 'parameters["preprocessing"]', found
        )
        for name, value, found in (
            ("mean", [0.5, 0.5, 0.5], "mean [0.5, 0.5, 0.5]"),
            ("std", [1, 1, 1], "std [1, 1, 1]"),
            ("resize_size", 8, "resize_size [8, 8]"),
            ("interpolation", "bilinear, antialiased", 'interpolation "bilinear, antialiased"'),
        )
    },
    "step that is no Python": Broken(
        "graph",
        put("tiny_preprocess/1/model.py", "class TritonPythonModel:\n    def execute(self, requests:\n"),
        "tiny_preprocess/1/model.py",
        "line 2",
        "no Python: '(' was never closed",
    ),
    "step with a null byte": Broken(
        "graph", put("tiny_top_k/1/model.py", b"a = 1\0"), "tiny_top_k/1/model.py", "", "no Python"
    ),
    "step without its class": Broken(
        "graph",
        put("tiny_top_k/1/model.py", "def execute(requests):\n    return []\n"),
        "tiny_top_k/1/model.py",
        "",
        "no TritonPythonModel",
    ),
    "more best classes than classes": Broken(
        "graph",
        edit(lambda c: setattr(c.parameters["top_k"], "string_value", "9"), "tiny_top_k/config.pbtxt"),
        "tiny_top_k/config.pbtxt",
        'parameters["top_k"]',
        '"9"',
    ),
    # wiring
    "step that is not there": Broken(
        "graph", step(1, lambda s: setattr(s, "model_name", "tyni")), ENSEMBLE, f"{STEP}[1].model_name", '"tyni"'
    ),
    "step's version that is not there": Broken(
        "graph", step(1, lambda s: setattr(s, "model_version", 4)), ENSEMBLE, f"{STEP}[1].model_version", "4"
    ),
    "step's input misnamed": Broken(
        "graph", rewire(1, "input_map", "input", "inptu"), ENSEMBLE, f"{STEP}[1].input_map", '"inptu"'
    ),
    "step's output misnamed": Broken(
        "graph", rewire(1, "output_map", "logits", "logit"), ENSEMBLE, f"{STEP}[1].output_map", '"logit"'
    ),
    "wire without a source": Broken(
        "graph", wire(1, "input_map", "input", "perpared"), ENSEMBLE, f"{STEP}[1].input_map", "which nothing gives"
    ),
    "wire with two sources": Broken(
        "graph", wire(1, "output_map", "logits", "prepared"), ENSEMBLE, f"{STEP}[1].output_map", "a second time"
    ),
    "input that no step takes": Broken(
        "graph",
        edit(lambda c: c.input.add().CopyFrom(_renamed_tensor(c.input[0])), ENSEMBLE),
        ENSEMBLE,
        "input[1]",
        "which no step takes",
    ),
    "output that no step gives": Broken(
        "graph", set_("output.0.name", "names", ENSEMBLE), ENSEMBLE, "output[0]", "which nothing gives"
    ),
    "ensemble's output type": Broken(
        "graph", set_("output.2.data_type", 8, ENSEMBLE), ENSEMBLE, "output[2]", "TYPE_INT64"
    ),
    "ensemble's output dims": Broken("graph", set_("output.0.dims", [5], ENSEMBLE), ENSEMBLE, "output[0]", "[2]"),
    "step of another type": Broken(
        "graph",
        edit(lambda c: setattr(c.output[0], "data_type", 10), "tiny_preprocess/config.pbtxt"),
        ENSEMBLE,
        f"{STEP}[1].input_map",
        "TYPE_FP16",
    ),
    "ensemble's batch above its steps'": Broken(
        "graph", set_("max_batch_size", 16, ENSEMBLE), ENSEMBLE, "max_batch_size", "16"
    ),
    "ensemble without steps": Broken(
        "graph",
        edit(lambda c: c.ensemble_scheduling.ClearField("step"), ENSEMBLE),
        ENSEMBLE,
        "ensemble_scheduling",
        "no step",
    ),
    "ensemble of another platform": Broken(
        "graph", set_("platform", "tensorrt_plan", ENSEMBLE), ENSEMBLE, "platform", "tensorrt_plan"
    ),
    "ensemble with a backend": Broken("graph", set_("backend", "python", ENSEMBLE), ENSEMBLE, "backend", "python"),
    "ensemble with instances": Broken(
        "graph", edit(lambda c: c.instance_group.add(), ENSEMBLE), ENSEMBLE, "instance_group", "one"
    ),
    "ensemble in a circle": Broken(
        "graph", circle, ENSEMBLE, "ensemble_scheduling", "a circle: tiny_ensemble -> tiny_ensemble"
    ),
    # accelerators
    "unknown accelerator": Broken(
        "accelerated", set_(f"{GPU}.0.name", "tensort"), CONFIG, f"{GPU}[0].name", '"tensort"'
    ),
    "accelerator of a CPU": Broken(
        "graph",
        edit(lambda c: c.optimization.execution_accelerators.cpu_execution_accelerator.add(name="tensorrt")),
        CONFIG,
        "optimization.execution_accelerators.cpu_execution_accelerator[0].name",
        '"tensorrt"',
    ),
    "accelerator of a plan": Broken(
        "plan",
        edit(lambda c: c.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")),
        CONFIG,
        f"{GPU}[0]",
        '"tensorrt" with backend tensorrt',
    ),
    "accelerator on CPUs": Broken("accelerated", set_("instance_group.0.kind", 2), CONFIG, f"{GPU}[0]", "KIND_CPU"),
    "unknown parameter": Broken(
        "accelerated",
        block("trt_fp16_enable", "true"),
        CONFIG,
        parameter("trt_fp16_enable"),
        '"true"',
    ),
    "unknown precision mode": Broken(
        "accelerated", block("precision_mode", "FP8"), CONFIG, parameter("precision_mode"), '"FP8"'
    ),
    **{
        f"precision mode {mode} of a BF16 graph": Broken(
            "accelerated",
            block("precision_mode", mode),
            CONFIG,
            parameter("precision_mode"),
            mode or "FP32, the default",
        )
        for mode in ("FP32", "INT8", "FP16", None)
    },
    "flag that is none": Broken(
        "accelerated",
        block("trt_engine_cache_enable", "yes"),
        CONFIG,
        parameter("trt_engine_cache_enable"),
        '"yes"',
    ),
    "bytes in words": Broken(
        "accelerated",
        block("max_workspace_size_bytes", "1GB"),
        CONFIG,
        parameter("max_workspace_size_bytes"),
        '"1GB"',
    ),
    "cache in a file": Broken(
        "accelerated",
        block("trt_engine_cache_path", f"{Path(__file__).resolve()}/engines"),
        CONFIG,
        parameter("trt_engine_cache_path"),
        "is a file here",
    ),
    "cache in the repository": Broken(
        "accelerated",
        cached_in_the_repository,
        CONFIG,
        parameter("trt_engine_cache_path"),
        "inside the repository",
    ),
    "two shapes of three": Broken(
        "accelerated",
        block("trt_profile_opt_shapes", None),
        CONFIG,
        parameter("trt_profile_opt_shapes"),
        "none",
    ),
    "shapes without a name": Broken(
        "accelerated",
        block("trt_profile_min_shapes", "1x3x8x8"),
        CONFIG,
        parameter("trt_profile_min_shapes"),
        '"1x3x8x8"',
    ),
    "profile of another input": Broken(
        "accelerated",
        both(*(block(f"trt_profile_{name}_shapes", "image:1x3x8x8") for name in ("min", "opt", "max"))),
        CONFIG,
        parameter("trt_profile_min_shapes"),
        'no "input"',
    ),
    "profile of another size": Broken(
        "accelerated",
        block("trt_profile_max_shapes", "input:8x3x9x9"),
        CONFIG,
        parameter("trt_profile_max_shapes"),
        "input:8x3x9x9",
    ),
    "profile upside down": Broken(
        "accelerated",
        block("trt_profile_opt_shapes", "input:9x3x8x8"),
        CONFIG,
        parameter("trt_profile_opt_shapes"),
        "not between",
    ),
    "more than the profile of an accelerator": Broken(
        "accelerated",
        both(
            block("trt_profile_opt_shapes", "input:2x3x8x8"),
            block("trt_profile_max_shapes", "input:2x3x8x8"),
        ),
        CONFIG,
        parameter("trt_profile_max_shapes"),
        "batches up to 2",
    ),
    "profile above one": Broken(
        "accelerated",
        block("trt_profile_min_shapes", "input:2x3x8x8"),
        CONFIG,
        parameter("trt_profile_min_shapes"),
        "batches from 2",
    ),
}
