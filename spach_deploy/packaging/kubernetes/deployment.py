"""What is deployed: a bundle, the Triton image that fits it, its names, and its start-up time and memory.

Triton image (`choose_image`): which images load the model, triton/serving.py says.

Start-up time and memory (`Sizes`) follow from the size of plan or graph, and are generous on purpose. A pod whose start
exceeds the limit is killed and started again, for ever; a limit that is too large costs nothing. So the figures are for
a slow node, with a network disk and an image that was just pulled.

Names for Kubernetes, Triton and registries are made from the model's name, or checked where a user gave them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import UsageError
from spach_deploy.graph.runtimes import REPOSITORY, Runtimes, TritonImage, runtimes
from spach_deploy.options.command_line import quoted
from spach_deploy.packaging.triton.options import Backend, Device, Ensemble, Instances, TritonOptions
from spach_deploy.packaging.triton.repository import EnsembleStep, ensemble_steps
from spach_deploy.packaging.triton.served_model import BundleArgument, ServedModel, instead_of_plan, resolve_models
from spach_deploy.packaging.triton.serving import MEBI, fitting_images, misfit, shared_memory_bytes
from spach_deploy.runtime.onnxruntime_runner import REMEDY, fault_of

GIBI = 1 << 30

SERVER_SECONDS = 180
"""Start of the server: its process, about 2 GB of CUDA libraries from a cold disk, the CUDA context, warm-up."""

BYTES_PER_SECOND = 20_000_000
"""Rate at which a plan is read from a cold disk and loaded to the GPU."""

GRAPH_FACTOR = 2
"""A graph takes longer: ONNX Runtime optimizes it after reading, and searches the fastest convolutions."""

PROBE_SECONDS = 5

CORES = 2
"""CPU cores that a pod requests; it may use more where the node has them free."""

_SERVER_BYTES = 4 * GIBI  # CUDA's libraries, and host memory of the CUDA context
_COPIES = 3  # copies of the model in host memory during loading: file, parsed, converted
_STEP_BYTES = GIBI  # an instance of an ensemble's step: a Python process that may hold the largest picture


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a pod with one model needs. `artifact_bytes`: size of the plan or graph; `arithmetic`: how `startup_seconds`
    was computed, as text."""

    artifact_bytes: int
    startup_seconds: int
    memory_bytes: int
    shm_bytes: int
    arithmetic: str

    @property
    def startup_probes(self) -> int:
        """Number of failed start-up probes before Kubernetes restarts the pod."""
        return math.ceil(self.startup_seconds / PROBE_SECONDS)

    @classmethod
    def of(cls, model: ServedModel, steps: tuple[EnsembleStep, ...] = (), instances: int = 1) -> Sizes:
        """The needs of `instances` of `model` with the steps of an ensemble around it."""
        size = sum(version.artifact.stat().st_size for version in model.versions)
        processes = sum(group.count for step in steps for group in step.config.instance_group)
        shm = shared_memory_bytes(model, processes)
        seconds, arithmetic = _startup(size, is_graph=model.backend is not Backend.TENSORRT)
        memory = _SERVER_BYTES + (_COPIES + instances - 1) * size + processes * _STEP_BYTES + shm
        return cls(size, seconds, memory, shm, arithmetic)


def _startup(size: int, *, is_graph: bool) -> tuple[int, str]:
    factor = GRAPH_FACTOR if is_graph else 1
    loading = math.ceil(factor * size / BYTES_PER_SECOND)
    times = f"{factor} x " if is_graph else ""
    rate = f"{BYTES_PER_SECOND // 1_000_000} MB/s"
    seconds = _up_to(SERVER_SECONDS + loading, 2 * PROBE_SECONDS)
    return seconds, f"{SERVER_SECONDS} s + {times}{size / 1e6:.1f} MB at {rate}, rounded up to {seconds} s"


def _up_to(value: int, step: int) -> int:
    return math.ceil(value / step) * step


def quantity(size: int) -> str:
    """Bytes as a Kubernetes quantity, rounded up: in gibibytes from 4 GiB, in mebibytes below."""
    return f"{math.ceil(size / GIBI)}Gi" if size >= 4 * GIBI else f"{math.ceil(size / MEBI)}Mi"


def choose_image(model: ServedModel, release: str | None, known: Runtimes | None = None) -> TritonImage:
    """The image of `release`, or the newest that fits. UsageError where `release` or every known image does not fit."""
    known = known or runtimes()
    if release is not None:
        image = known.image(release)
        if reason := misfit(model, image, known):
            raise UsageError(f"--triton-version {release}: {reason}.", _advice(model, known))
        return image
    fitting = fitting_images(model, known)
    if not fitting:
        raise UsageError(
            f"No known Triton image fits: {misfit(model, known.images[-1], known)}.", _advice(model, known)
        )
    return fitting[-1]


def _advice(model: ServedModel, known: Runtimes) -> str:
    """The next step: images that fit, or another export."""
    releases = listed(image.release for image in fitting_images(model, known))
    if model.backend is not Backend.TENSORRT:
        return f"It fits {releases}."  # at least one: `resolve_models` refuses graphs that fit none
    instead = instead_of_plan(model.bundle)
    return f"It fits {releases}. {instead}" if releases else instead


def listed(words: Iterable[str]) -> str:
    """Words as a list in a sentence: `a, b and c`."""
    given = list(words)
    return " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)


_PLAIN = re.compile(r"[A-Za-z0-9._+-]{1,200}")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A deployment. `title`: the model's own name; `name`: the name of all its Kubernetes objects."""

    title: str
    name: str
    model: ServedModel
    image: TritonImage
    sizes: Sizes
    options: KubernetesOptions

    @classmethod
    def of(cls, path: Path, options: KubernetesOptions) -> Deployment:
        """The deployment of the bundle at `path`.

        Raises BundleError where it is not a bundle, was changed, or has no file for the backend; UsageError where the
        requested Triton image, or every known one, cannot load it.
        """
        opened = Bundle.open(path, verify=False)
        title = opened.manifest.model.name
        served_with = triton_options(options, Device.CPU if opened.is_for_cpu else Device.GPU)
        (model,) = resolve_models([BundleArgument(path, triton_name(title))], served_with)
        steps = ensemble_steps(model, served_with)
        image = choose_image(model, options.triton_version)
        _check_digests(options, image)
        return cls(
            title=title if _PLAIN.fullmatch(title) else model.name,
            name=options.name or kubernetes_name(title),
            model=model,
            image=image,
            sizes=Sizes.of(model, steps, served_with.instances.count_of(model.name, served_with.instances.count)),
            options=options,
        )

    @property
    def image_name(self) -> str:
        """Name of the image in its registry, without a tag."""
        pushed = self.options.image_digest
        return self.options.image or (pushed and pushed.name) or f"{REGISTRY}/{self.name}"

    def image_reference(self, tag: str) -> str:
        """The image as pods name it: by digest where there is one, else by `tag`."""
        digest = self.options.image_digest
        return f"{self.image_name}:{tag}" if digest is None else f"{self.image_name}@{digest.digest}"

    def commands(self, tag: str, folder: str = "") -> tuple[str, ...]:
        """The commands that build, push and run it. An image with a digest was built and pushed before.

        `folder`: where the written folder is, with a slash at its end; empty for inside of it.
        """
        image = f"{self.image_name}:{tag}"
        build = (f"docker build -t {image} {quoted(f'{folder}image')}", f"docker push {image}")
        apply = f"kubectl apply -k {quoted(f'{folder}overlays/production')}"
        if self.options.helm:
            chart = quoted(f"{folder}chart")
            apply = f"helm upgrade --install {self.name} {chart} --namespace {self.name} --create-namespace"
        return (*(build if self.options.image_digest is None else ()), apply)

    @property
    def device(self) -> Device:
        """Where its instances run: on GPUs, or of a bundle of --target cpu on the CPU."""
        return Device.CPU if self.model.on_cpu else Device.GPU

    @property
    def takes(self) -> str:
        """What a pod takes besides memory, in a few words."""
        return f"{CORES} CPU cores" if self.model.on_cpu else "1 GPU"

    @property
    def is_plan(self) -> bool:
        """Whether the engine plan is served, not the graph."""
        return self.model.backend is Backend.TENSORRT

    @property
    def serves(self) -> str:
        """What is served, in a few words."""
        if self.is_plan:
            return f"TensorRT {self.version} plan"
        return f"ONNX graph in ONNX Runtime {self.image.onnxruntime}"

    @property
    def carries(self) -> str:
        """What the Triton image carries, in a few words."""
        tensorrt = f"TensorRT {self.image.tensorrt}, " if self.image.tensorrt else ""
        return f"{tensorrt}ONNX Runtime {self.image.onnxruntime}, CUDA {self.image.cuda}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the model, and on its behaviour in this image."""
        version = self.image.onnxruntime
        if self.is_plan or not self.model.versions[-1].quantizes_fp16 or not runtimes().truncates_fp16(version):
            return self.model.notes
        seen = "On a GPU that is not known; every pod answers the golden pack before it takes traffic"
        return (*self.model.notes, f"In this image: {fault_of(version)}. {seen}. {REMEDY}")

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs that the plan was built for, such as sm90; empty where any GPU will do."""
        given = self.model.bundle.manifest.engine.gpus if self.is_plan else ()
        return tuple(gpu for gpu in given if re.fullmatch(r"sm\d{2,4}", gpu))

    @property
    def version(self) -> str:
        """Version of the TensorRT that built the plan; `unknown` where it has unsafe characters."""
        built = self.model.bundle.manifest.engine.version
        return built if _PLAIN.fullmatch(built) else "unknown"


def triton_options(options: KubernetesOptions, device: Device) -> TritonOptions:
    """Options of the model repository. On GPUs a pod without one fails, instead of being slow."""
    return TritonOptions(
        backend=options.backend,
        instances=dataclasses.replace(options.instances, device=device),
        labels=options.labels,
        ensemble=Ensemble() if options.ensemble else None,
    )


LONGEST = 40
"""Longest name, so that with `-predictor`, a namespace or a pod's suffix it stays within 63 characters (DNS label)."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_HOST = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_SUBDOMAIN_PART = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_SUBDOMAIN_PART}(\.{_SUBDOMAIN_PART})*")
_IMAGE_NAME = rf"({_HOST}/)?{_PART}(/{_PART})*"
_IMAGE = re.compile(_IMAGE_NAME)
_PINNED = re.compile(
    rf"((?P<name>{_IMAGE_NAME})(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?@)?(?P<digest>sha256:[0-9a-f]{{64}})"
)


def kubernetes_name(model: str) -> str:
    """A DNS label (RFC 1035) for a model's name: `ms_hybrid_s+` -> `ms-hybrid-s-plus`."""
    spelled = model.lower().replace("+", "-plus-")
    name = re.sub(r"[^a-z0-9]+", "-", spelled).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}".rstrip("-")
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 7].rstrip('-')}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def triton_name(model: str) -> str:
    """A model's name for Triton, where it is a folder's name and part of a URL."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", model.replace("+", "_plus"))
    return name if name[:1].isalnum() else f"model{name}"


def check_kubernetes_name(name: str) -> None:
    """UsageError unless `name` is a DNS label of at most `LONGEST` characters."""
    if len(name) > LONGEST or not _LABEL.fullmatch(name):
        raise UsageError(
            f"--name {name!r} is no name for Kubernetes.",
            f"Use lower-case letters, digits and hyphens, a letter first, at most {LONGEST} characters.",
        )


def check_image_name(name: str) -> None:
    """UsageError unless `name` is the name of an image without tag and digest."""
    if len(name) > 200 or not _IMAGE.fullmatch(name):
        raise UsageError(
            f"--image {name!r} is no image's name.",
            "Give registry/path/name without a tag, such as registry.example.com/team/classifier.",
        )


def check_secret_name(name: str) -> None:
    """UsageError unless `name` can name a secret: a DNS subdomain (RFC 1123)."""
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        raise UsageError(
            f"--image-pull-secret {name!r} is no secret's name.",
            "Use lower-case letters, digits, hyphens and dots, as kubectl get secrets shows it.",
        )


@dataclasses.dataclass(frozen=True)
class ImageDigest:
    """The digest of an image, `sha256:...`. `name`: of which image, without a tag; empty where it was not said.

    `tag`: the tag that stood behind the name.
    """

    digest: str
    name: str = ""
    tag: str = ""

    @classmethod
    def parse(cls, option: str, text: str) -> ImageDigest:
        """Parse `sha256:...`, or `NAME@sha256:...` and `NAME:TAG@sha256:...` as Docker shows them. UsageError for
        anything else.
        """
        match = _PINNED.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{option} {text!r} is no digest.",
                "Give sha256: and 64 hexadecimal digits, as docker buildx imagetools inspect IMAGE shows it, or"
                " NAME@sha256:... to say of which image.",
            )
        return cls(match["digest"], match["name"] or "", match["tag"] or "")

    def __str__(self) -> str:
        return f"{self.name}{':' if self.tag else ''}{self.tag}{'@' if self.name else ''}{self.digest}"


def _check_digests(options: KubernetesOptions, triton: TritonImage) -> None:
    """UsageError for a digest that is said to be of another image, and for one digest of two images."""
    pushed, base = options.image_digest, options.triton_digest
    if pushed is not None and base is not None and pushed.digest == base.digest:
        raise UsageError(
            "--image-digest and --triton-digest are the same, and the image that you pushed is built on Triton's.",
            "Give the digest of each: NAME@sha256:... says of which image it is.",
        )
    if pushed is not None and pushed.name == REPOSITORY:
        raise UsageError(
            f"--image-digest is of the image that you pushed, and {pushed} is Triton's.", "Give it to --triton-digest."
        )
    if pushed is not None and pushed.name and options.image not in (None, pushed.name):
        raise UsageError(
            f"--image-digest is of {pushed.name}, and --image is {options.image}.",
            f"Give the digest of {options.image}, or leave --image out.",
        )
    if base is not None and base.name and f"{base.name}:{base.tag or triton.tag}" != triton.reference:
        raise UsageError(
            f"--triton-digest is of {base.name}{':' if base.tag else ''}{base.tag}, and the image is built on"
            f" {triton.reference}.",
            f"Give the digest of {triton.reference}, or another --triton-version.",
        )


REGISTRY = "registry.example.com/spach"
"""Placeholder registry in the name of the image where the user gives none."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """Smallest and largest number of pods."""

    min: int = 2
    max: int = 8

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """`MIN:MAX`, or one number. UsageError for anything else."""
        match = re.fullmatch(r"([1-9]\d{0,3})(?::([1-9]\d{0,3}))?", text)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--replicas {text!r} is no number of pods.", "Give MIN:MAX, such as 2:8, or one number.")
        return cls(int(match[1]), int(match[2] or match[1]))


@dataclasses.dataclass(frozen=True)
class KubernetesOptions:
    """All options of `spach-package kubernetes`.

    `triton_version` None: the newest image that fits. `name` and `image` None: made from the model's name. `helm`: a
    chart instead of kustomizations. `image_digest`, `triton_digest`: of the image that is pushed, and of the image that
    it is built on.
    """

    triton_version: str | None = None
    kserve: bool = False
    backend: Backend = Backend.AUTO
    name: str | None = None
    image: str | None = None
    replicas: Replicas = Replicas()
    labels: Path | None = None
    ensemble: bool = False
    instances: Instances = dataclasses.field(default_factory=Instances)
    helm: bool = False
    pull_secrets: tuple[str, ...] = ()
    image_digest: ImageDigest | None = None
    triton_digest: ImageDigest | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_kubernetes_name(self.name)
        if self.image is not None:
            check_image_name(self.image)
        for secret in self.pull_secrets:
            check_secret_name(secret)
