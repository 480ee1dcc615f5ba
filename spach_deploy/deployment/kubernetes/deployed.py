"""A bundle as what will run in a cluster: its model, the Triton image that fits it, names, sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from spach_deploy.bundle import Bundle
from spach_deploy.deployment.kubernetes.names import kubernetes_name, triton_name
from spach_deploy.deployment.kubernetes.options import REGISTRY, KubernetesOptions
from spach_deploy.deployment.kubernetes.sizes import Sizes
from spach_deploy.deployment.kubernetes.versions import choose_image
from spach_deploy.deployment.triton.ensemble import Step, ensemble_steps
from spach_deploy.deployment.triton.options import Backend, Device, Ensemble, Instances, TritonOptions
from spach_deploy.deployment.triton.served import BundleArgument, ServedModel, served_models
from spach_deploy.onnx_graph.runtimes import TritonImage, runtimes
from spach_deploy.runtime.truncation import REMEDY, fault_of

_PLAIN = re.compile(r"[A-Za-z0-9._+-]{1,200}")


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What is deployed. `title`: the model's own name; `name`: what Kubernetes calls all that belongs to it."""

    title: str
    name: str
    argument: BundleArgument
    model: ServedModel
    image: TritonImage
    sizes: Sizes
    options: KubernetesOptions

    @classmethod
    def of(cls, path: Path, options: KubernetesOptions) -> Deployed:
        """The bundle at `path`.

        Raises BundleError for what is no bundle, was changed, or has no file for the backend; UsageError where no
        Triton image that is known loads it, or not the one that was asked for.
        """
        title = str(Bundle.open(path, verify=False).manifest.model["name"])
        argument = BundleArgument(path, triton_name(title))
        (model,) = served_models([argument], triton_options(options))
        steps: tuple[Step, ...] = ensemble_steps(model, Ensemble()) if options.ensemble else ()
        return cls(
            title=title if _PLAIN.fullmatch(title) else model.name,
            name=options.name or kubernetes_name(title),
            argument=argument,
            model=model,
            image=choose_image(model, options.triton_version),
            sizes=Sizes.of(model, steps),
            options=options,
        )

    @property
    def image_name(self) -> str:
        """Where the image is pushed, without a tag."""
        return self.options.image or f"{REGISTRY}/{self.name}"

    @property
    def is_plan(self) -> bool:
        """Whether the engine is served, and not its graph."""
        return self.model.backend is Backend.TENSORRT

    @property
    def serves(self) -> str:
        """What runs, in a few words."""
        if self.is_plan:
            return f"TensorRT {self.plain('version')} plan"
        return f"ONNX graph in ONNX Runtime {self.image.onnxruntime}"

    @property
    def carries(self) -> str:
        """What the Triton image carries, in a few words."""
        tensorrt = f"TensorRT {self.image.tensorrt}, " if self.image.tensorrt else ""
        return f"{tensorrt}ONNX Runtime {self.image.onnxruntime}, CUDA {self.image.cuda}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts worth reading, of the model and of what the image does with it."""
        version = self.image.onnxruntime
        if self.is_plan or not self.model.bundle.quantizes_fp16 or not runtimes().truncates_fp16(version):
            return self.model.notes
        seen = "On a GPU that is not known; every pod answers the golden pack before it takes traffic"
        return (*self.model.notes, f"In this image: {fault_of(version)}. {seen}. {REMEDY}")

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs that a plan was built for, such as sm90; none where any will do."""
        given = self.model.bundle.manifest.engine.get("gpus", ()) if self.is_plan else ()
        return tuple(str(gpu) for gpu in given if re.fullmatch(r"sm\d{2,4}", str(gpu)))

    def plain(self, entry: str) -> str:
        """An entry of the engine's section that may stand in a text file."""
        text = str(self.model.bundle.manifest.engine.get(entry, ""))
        return text if _PLAIN.fullmatch(text) else "unknown"


def triton_options(options: KubernetesOptions) -> TritonOptions:
    """What the model repository is asked to be: instances on GPUs, so that a pod without one fails, not slows."""
    return TritonOptions(
        backend=options.backend,
        instances=Instances(device=Device.GPU),
        labels=options.labels,
        ensemble=Ensemble() if options.ensemble else None,
    )
