"""README.md of a repository: how to start it, what was verified, how to measure it, how to go back to a version.

Every command is filled in for the models that are there. Triton takes folders of a repository for models, and leaves
files beside them alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.common.errors import printable
from spach_deploy.graph.runtimes import REPOSITORY, TritonImage, runtimes
from spach_deploy.options.command_line import joined, quoted
from spach_deploy.packaging.triton.config import LABELS_FILE, data_type_name, engine_folder, shown
from spach_deploy.packaging.triton.options import KIND_AUTO, KIND_CPU, MOUNT, TritonOptions
from spach_deploy.packaging.triton.served_model import ServedModel, Version
from spach_deploy.packaging.triton.serving import PILLOW, fitting_images, misfit, server_flags, shared_memory_bytes

README = "README.md"

_KINDS = {KIND_AUTO: "on each GPU, or on the CPU", KIND_CPU: "on the CPU"}
_PORTS = "-p 8000:8000 -p 8001:8001 -p 8002:8002"

_PICTURES = """\
    python3 - picture.jpg another.jpg >pictures.json <<'END'
    import base64, json, pathlib, struct, sys

    def entry(file):
        data = pathlib.Path(file).read_bytes()
        text = base64.b64encode(struct.pack("<I", len(data)) + data).decode()
        return {"image": {"content": {"b64": text}, "shape": [1]}}

    print(json.dumps({"data": [entry(file) for file in sys.argv[1:]]}))
    END"""


@dataclasses.dataclass(frozen=True)
class RepositoryContent:
    """What a README describes. `configs`: the ModelConfig of each model, with those of its ensemble's steps behind it,
    by the served model's name."""

    models: tuple[ServedModel, ...]
    configs: Mapping[str, Sequence[Any]]
    options: TritonOptions

    @property
    def is_servable(self) -> bool:
        """Whether a server loads everything; false for what --force wrote."""
        return not any(model.warnings for model in self.models)

    @property
    def on_gpu(self) -> bool:
        """Whether instances may run on a GPU."""
        return not all(model.on_cpu for model in self.models)

    @property
    def images(self) -> tuple[TritonImage, ...]:
        """The known images that load every model, oldest first."""
        fitting = [fitting_images(model, runtimes()) for model in self.models]
        return tuple(image for image in runtimes().images if all(image in images for images in fitting))

    @property
    def image(self) -> str:
        """The newest image that loads every model, with YY.MM in place of its release where none is known."""
        images = self.images
        return images[-1].reference if images else f"{REPOSITORY}:YY.MM-py3"

    @property
    def decodes_pictures(self) -> bool:
        """Whether a step needs Pillow in the server's Python."""
        return any("preprocessing" in config.parameters for config in self.all_configs)

    @property
    def all_configs(self) -> tuple[Any, ...]:
        """The configurations in the order of the models."""
        return tuple(config for model in self.models for config in self.configs[model.name])

    @property
    def shared_memory_mebibytes(self) -> int:
        """What the Python steps of all models need."""
        total = 0
        for model in self.models:
            steps = [config for config in self.configs[model.name] if config.backend == "python"]
            total += shared_memory_bytes(model, sum(g.count for config in steps for g in config.instance_group))
        return total >> 20


def readme(content: RepositoryContent) -> str:
    """The text of README.md."""
    notes = "\n".join(f"- {note}" for note in _remarks(content, "notes"))
    parts = [_title(content), _table(content), notes]
    if content.is_servable:
        parts += [_start(content)]
    else:
        parts += ["**It is to be read, not served:** " + " ".join(_remarks(content, "warnings"))]
    parts += [_verified(content)]
    if content.is_servable:
        parts += [_speed(content), _limits(content)]
    parts += [_versions(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(content: RepositoryContent) -> str:
    names = ", ".join(f"`{model.name}`" for model in content.models)
    return (
        f"# A Triton model repository: {names}\n\n"
        f"Written by `spach-package triton` {__version__}. All commands are for this folder. Triton takes folders for\n"
        "models; this file and manifest.json are not for it."
    )


def _table(content: RepositoryContent) -> str:
    lines = ["| model | runs in | takes | gives | batch | instances |", "|---|---|---|---|---|---|"]
    for config in content.all_configs:
        cells = [
            f"`{config.name}`",
            config.platform or config.backend,
            *(_tensors(tensors) for tensors in (config.input, config.output)),
            f"1 to {config.max_batch_size}" if config.max_batch_size else "as the client sends it",
            ", ".join(map(_instances, config.instance_group)) or "none, it connects the others",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _remarks(content: RepositoryContent, kind: str) -> Iterable[str]:
    """Notes or warnings on the models, with the names of bundles in place of where they were on the writing machine."""
    for model in content.models:
        for remark in getattr(model, kind):
            for version in model.versions:
                remark = remark.replace(str(version.bundle.path), version.bundle.path.name)
            yield printable(remark)


def _tensors(tensors: Iterable[Any]) -> str:
    return ", ".join(f"{_code(t.name)} {_data_type(t)} {shown(t.dims)}" for t in tensors)


def _data_type(tensor: Any) -> str:
    name = data_type_name(tensor.data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _instances(group: Any) -> str:
    where = f"on GPU {', '.join(map(str, group.gpus))}" if group.gpus else _KINDS.get(group.kind, "on each GPU")
    return f"{group.count} {where}"


def _code(text: str) -> str:
    """Text from a bundle as Markdown's code, which nothing in it can end."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


# Start


def _start(content: RepositoryContent) -> str:
    ready = "\n".join(f"    curl -fsS localhost:8000/v2/models/{config.name}/ready" for config in content.all_configs)
    lines = [
        f"## Start\n\n{_which_image(content)}",
        _docker_run(content),
        *([_pillow()] if content.decodes_pictures else []),
        *([_engines(content)] if content.options.accelerator else []),
        *(["On a machine without a GPU leave `--gpus all` out."] if _runs_on_cpus(content) else []),
        f"Is it up? Each command ends with 0 where it is.\n\n    curl -fsS localhost:8000/v2/health/ready\n{ready}",
    ]
    pictures = [config.name for config in content.all_configs if _takes_pictures(config)]
    if pictures:
        asked = "\n".join(
            f"    curl -fsS localhost:8000/v2/models/{name}/infer -H 'Inference-Header-Content-Length: 0' \\\n"
            "      --data-binary @picture.jpg --output -"
            for name in pictures
        )
        lines.append(f"The classes of a picture; the labels stand at the end, behind numbers in binary:\n\n{asked}")
    return "\n\n".join(lines)


def _which_image(content: RepositoryContent) -> str:
    images, known = content.images, runtimes()
    if images:
        return f"Known to load everything here: {_releases(images)} ({_carries(images[-1])} in {images[-1].release})."
    needs = "\n".join(
        f"- `{model.name}`: {_releases(fitting_images(model, known))}. In {known.images[-1].release},"
        f" {misfit(model, known.images[-1], known) or 'it loads'}."
        for model in content.models
    )
    together = " all of these together" if len(content.models) > 1 else " this"
    return f"No known Triton image loads{together}:\n\n{needs}\n\nIn an image that does, in place of YY.MM:"


def _docker_run(content: RepositoryContent) -> str:
    gpus = "--gpus all " if content.on_gpu else ""
    cache = "".join(f" \\\n      -v {volume}:{quoted(folder)}" for volume, folder in _engine_volumes(content))
    server = " ".join([f"tritonserver --model-repository={MOUNT}", *server_flags(content.models, content.options)])
    if content.decodes_pictures:
        server = f"bash -c 'pip install --no-cache-dir pillow=={PILLOW} && exec {server}'"
    return (
        f"    docker run --rm {gpus}--shm-size={content.shared_memory_mebibytes}m {_PORTS} \\\n"
        f'      -v "$PWD":{MOUNT}:ro{cache} {content.image} \\\n'
        f"      {server}"
    )


def _pillow() -> str:
    return (
        "The image has no Pillow, which decodes pictures, so this command installs it. Where a server has no network,\n"
        "put it into an image of your own, as `spach-package kubernetes` does."
    )


def _engine_volumes(content: RepositoryContent) -> list[tuple[str, str]]:
    """A volume for the engines of each model, and its folder; none without an accelerator."""
    if content.options.accelerator is None:
        return []
    folders = [engine_folder(model, content.options) for model in content.models]
    return [(f"engines-{PurePosixPath(folder).name}", folder) for folder in folders]


def _engines(content: RepositoryContent) -> str:
    volumes = ", ".join(f"`{volume}`" for volume, _ in _engine_volumes(content))
    return (
        f"What TensorRT compiles at the first start, for minutes, is kept: {volumes}. Engines are for one graph, one\n"
        "kind of GPU and one image; `docker volume rm` removes them."
    )


def _runs_on_cpus(content: RepositoryContent) -> bool:
    return (
        content.on_gpu and not any(model.needs_gpu for model in content.models) and not content.options.instances.gpus
    )


def _releases(images: Sequence[TritonImage]) -> str:
    """Releases in words: their first and last where none between them is missing, else each of them."""
    if not images:
        return "none that is known"
    known, releases = [image.release for image in runtimes().images], [image.release for image in images]
    first, last = known.index(releases[0]), known.index(releases[-1])
    is_range = len(releases) > 2 and known[first : last + 1] == releases
    return f"Triton {releases[0]} to {releases[-1]}" if is_range else f"Triton {', '.join(releases)}"


def _carries(image: TritonImage) -> str:
    tensorrt = f"TensorRT {image.tensorrt}, " if image.tensorrt else ""
    return f"{tensorrt}ONNX Runtime {image.onnxruntime}, CUDA {image.cuda}"


def _takes_pictures(config: Any) -> bool:
    return bool(config.platform == "ensemble" and _data_type(config.input[0]) == "BYTES")


def _takes_pixels(config: Any) -> bool:
    return bool(config.platform == "ensemble" and _data_type(config.input[0]) != "BYTES")


# Evidence


def _verified(content: RepositoryContent) -> str:
    rows = [row for model in content.models for version in model.versions for row in _evidence(model, version)]
    table = "\n".join(["| model | version | bundle | what was compared |", "|---|---|---|---|", *rows])
    again = "\n".join(
        f"    spach-validate grpc://localhost:8001/{model.name}/{version.number} --bundle BUNDLE"
        for model in content.models
        for version in model.versions
        if version.number in _served(model, content)
    )
    return (
        f"## What was verified\n\n{table}\n\n{_not_verified(content)}"
        "That was on the machine of the export. What this server answers on its own device, one command compares,\n"
        f"with spach-deploy and the bundle at hand:\n\n{again}"
    )


def _not_verified(content: RepositoryContent) -> str:
    if content.options.accelerator is None:
        return ""
    return (
        "**TensorRT inside Triton was not compared:** the server compiles the graph itself, by its own TensorRT, and\n"
        "only the command below compares what it answers.\n\n"
    )


def _evidence(model: ServedModel, version: Version) -> Iterable[str]:
    manifest = version.bundle.manifest
    found = manifest.validation
    images = f", {found.image_count} images" if found.image_count else ""
    said = found.level_sentence or f"level of evidence: {found.level}."
    verdict = "agreed" if found.passed else "**did not agree**"
    asked = manifest.precision.asked.value
    yield (
        f"| `{model.name}` | {version.number} | {_code(version.bundle.path.name)}, {asked} | "
        f"{verdict} with PyTorch in FP32 ({printable(found.images).replace('|', '/')}{images}): "
        f"{printable(said).replace('|', '/')} |"
    )


# Speed


def _speed(content: RepositoryContent) -> str:
    sdk = f"{content.image}-sdk"
    gpus = "--gpus all " if content.on_gpu else ""
    commands = [
        command
        for model in content.models
        for config in content.configs[model.name]
        if config is content.configs[model.name][0] or _takes_pixels(config)
        for command in _perf_commands(model, config)
    ]
    ensembles = [config.name for config in content.all_configs if _takes_pictures(config)]
    parts = [
        "## How fast it is",
        f"With perf_analyzer, of NVIDIA's SDK image:\n\n    docker run --rm -it {gpus}--net=host {sdk}",
        "In it, for batches that the model was made for, of random numbers; the last line of each tells inferences a\n"
        "second:\n\n" + "\n".join(commands),
    ]
    if ensembles:
        asked = "\n".join(
            f"    perf_analyzer -m {name} -i grpc -u localhost:8001 --input-data pictures.json"
            " --concurrency-range 1:16:5"
            for name in ensembles
        )
        parts.append(f"With the ensemble's steps, for pictures of yours:\n\n{_PICTURES}\n\n{asked}")
    return "\n\n".join([*parts, _model_analyzer(content, sdk, gpus)])


def _perf_commands(model: ServedModel, config: Any) -> Iterable[str]:
    sizes = sorted({model.batch.min, model.batch.opt, model.batch.max})
    has_batch = bool(model.batches.max_batch_size)
    for size in sorted({1, *sizes}) if has_batch else sizes:
        shapes = []
        for tensor in config.input:
            dims = list(tensor.dims) if has_batch else [size, *tensor.dims[1:]]
            shapes.append(f"--shape {quoted(tensor.name)}:{','.join(map(str, dims))}")
        batch = f"-b {size} " if has_batch else ""
        shape = " ".join(shapes)
        yield f"    perf_analyzer -m {config.name} -i grpc -u localhost:8001 {batch}{shape} --concurrency-range 1:4"


def _model_analyzer(content: RepositoryContent, sdk: str, gpus: str) -> str:
    profiled = [model for model in content.models if model.batches.max_batch_size]
    if not profiled:
        return ""
    commands = "\n".join(
        f'    model-analyzer profile --model-repository "$PWD" --profile-models {model.name} \\\n'
        f"      --triton-launch-mode docker --triton-docker-image {content.image} \\\n"
        f'      --output-model-repository-path "$PWD-analysis/{model.name}" --export-path "$PWD-analysis" \\\n'
        f"      --run-config-search-max-model-batch-size {model.batches.max_batch_size} \\\n"
        "      --run-config-search-max-instance-count 4"
        for model in profiled
    )
    flags = [flag for flag in server_flags(content.models, content.options) if flag.startswith("--backend-config")]
    flagged = "".join(f"\n\nIts servers need `{flag}` too: `triton_server_flags` in a file for `-f`." for flag in flags)
    return (
        "model_analyzer searches instances, batches and queues for the fastest configuration, and starts servers of\n"
        "its own for it, so stop this one before. Paths must be the same inside and outside:\n\n"
        '    mkdir -p "$PWD-analysis"\n'
        f"    docker run --rm -it {gpus}--net=host --shm-size=1g -v /var/run/docker.sock:/var/run/docker.sock \\\n"
        f'      -v "$PWD":"$PWD" -v "$PWD-analysis":"$PWD-analysis" -w "$PWD" {sdk}\n\n'
        f"In it:\n\n{commands}{flagged}"
    )


# Rate limiter


def _limits(content: RepositoryContent) -> str:
    if not content.options.rate_limiter:
        return ""
    rows = [
        f"| `{config.name}` | {_needs(group.rate_limiter)} | {group.rate_limiter.priority or 1} |"
        for config in content.all_configs
        for group in config.instance_group
        if group.HasField("rate_limiter")
    ]
    table = "\n".join(["| model | needs to run | priority |", "|---|---|---|", *rows])
    return (
        f"## Rate limiter\n\n{table}\n\n"
        "Without `--rate-limit=execution_count`, which the command above has, a server ignores all of this. There is\n"
        "as much of a resource as the instance that needs most: on each device, or in the whole server where it is\n"
        "global. `--rate-limit-resource=NAME:COUNT` makes it more. Priority 2 gets half as many turns as 1."
    )


def _needs(limiter: Any) -> str:
    return (
        ", ".join(f"{r.count} {r.name}{' (global)' if getattr(r, 'global') else ''}" for r in limiter.resources) or "-"
    )


# Versions


def _versions(content: RepositoryContent) -> str:
    parts = ["## Versions, and the way back"]
    for model in content.models:
        parts.append(_way_back(model, content))
    parts.append(
        "Then start the server again, or, with `--model-control-mode=explicit`, tell it:\n\n"
        + "\n".join(f"    curl -fsS -X POST localhost:8000/v2/repository/models/{m.name}/load" for m in content.models)
        + "\n\nWhich versions it serves now:\n\n"
        + "\n".join(f"    curl -fsS localhost:8000/v2/models/{m.name}" for m in content.models)
    )
    return "\n\n".join(parts)


def _served(model: ServedModel, content: RepositoryContent) -> tuple[int, ...]:
    numbers = tuple(version.number for version in model.versions)
    policy = content.options.version_policy
    return numbers[-1:] if policy is None else policy.serves(numbers)


def _packaged_again(model: ServedModel, content: RepositoryContent) -> str:
    """The command that writes this repository with two versions of a model, with the options of this one."""
    bundles = [
        f"{other.name}={'OLD_BUNDLE' if other is model else 'BUNDLE'}"
        for other in content.models
        for _ in other.versions
    ]
    after = next(i + 1 for i, text in enumerate(bundles) if "OLD" in text)
    bundles.insert(after, f"{model.name}{'-new' if content.options.accelerator else ''}=NEW_BUNDLE")
    options = content.options
    if options.labels is not None:
        options = dataclasses.replace(options, labels=Path(model.name) / LABELS_FILE)
    return joined(["spach-package", "triton", *bundles, "-o", "REPO", *options.words()])


def _way_back(model: ServedModel, content: RepositoryContent) -> str:
    numbers, served = [version.number for version in model.versions], _served(model, content)
    name = model.name
    if len(numbers) == 1:
        return (
            f"`{name}` has one version, so the way back is the folder of the release before: keep it, and start the\n"
            "server on it. To have both in one folder, oldest first:\n\n"
            f"    {_packaged_again(model, content)}"
        )
    newest, before = max(served), max((number for number in numbers if number < max(served)), default=None)
    said = f"`{name}` has versions {', '.join(map(str, numbers))}; {', '.join(map(str, served))} of them served."
    if before is None:
        return f"{said} There is none before version {newest}."
    policy = content.options.version_policy
    if policy is not None and policy.specific:
        line = f"version_policy {{ specific {{ versions: {before} }} }}"
        return f"{said} Back to version {before}: write `{line}` in {name}/config.pbtxt in place of its version_policy."
    return (
        f"{said} Back to version {before}, without anything lost:\n\n"
        f"    mv {name}/{newest} ../{name}-version-{newest}\n\n"
        f"and forward again: `mv ../{name}-version-{newest} {name}/{newest}`. Clients that name no version get the\n"
        "newest that is there."
    )
