"""Names of the published models: aliases, the table that `spach-export --list` prints, and `create_model`.

Only `create_model` imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spach_deploy.common.errors import CheckpointError, ModelError, UsageError
from spach_deploy.models.hyperparameters import with_hyperparameters
from spach_deploy.models.published import ARCHITECTURES, SIZES, TOP1, Size
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import ModelSpec, WeightSource

if TYPE_CHECKING:
    from spach_deploy.models.outputs import SelectableOutputs

__all__ = ["ARCHITECTURES", "ModelInfo", "check_spec", "create_model", "list_models", "model_info", "resolve"]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One line of the table, for 224 pixels and 1000 classes.

    `reference_name`: the published registry name; models with another stem or with shared weights have the name of the
    plain model. `macs`: multiply-adds for one image (`published.Size`). `published_top1`: ImageNet-1K accuracy in
    percent; it and `published_checkpoint` are None where nothing was published.
    """

    name: str
    architecture: Architecture
    reference_name: str
    parameters: int
    macs: int
    stages: str
    published_top1: float | None
    published_checkpoint: str | None


def list_models() -> list[ModelInfo]:
    """Every model, in the order of the table."""
    return [model_info(name) for name in ARCHITECTURES]


def model_info(name: str) -> ModelInfo:
    """The table's entry of the model `name`, which may be an alias. ModelError when there is none."""
    name = resolve(name)
    return ModelInfo(
        name=name,
        architecture=ARCHITECTURES[name],
        reference_name=reference_name(name),
        parameters=SIZES[name].parameters,
        macs=SIZES[name].macs,
        stages=ARCHITECTURES[name].described_stages,
        published_top1=TOP1.get(name),
        published_checkpoint=f"spach_{name}.pth" if name in TOP1 and _is_spach(name) else None,
    )


def resolve(name: str) -> str:
    """The name in this package for `name`, which may be an alias.

    Aliases are the published registry names (`spach_ms_s_patch4_224_hybrid`), which mean the plain model
    where variants share one, and the published checkpoint names without suffix (`spach_ms_hybrid_s`). Case
    and dashes are not corrected, but the ModelError suggests the right name.
    """
    if name in ARCHITECTURES:
        return name
    if name in _aliases():
        return _aliases()[name]
    raise ModelError(f"There is no model {name!r}.", _suggestion(name))


@dataclasses.dataclass(frozen=True)
class Match:
    """The architecture that tensors fit. `name`: of the published model, or its family's where it is none of these."""

    name: str
    architecture: Architecture

    @property
    def is_published(self) -> bool:
        """Whether it is an entry of the table."""
        return self.name in ARCHITECTURES

    def __str__(self) -> str:
        return self.name if self.is_published else f"a {self.architecture.description}"


_UNSEEN = ("version", "image_size", "classes", "heads", "qk_scale", "activation", "norm_eps", "divisions")
_UNSEEN_PIXELS = ("mean", "std", "crop", "interpolation")


def published_match(architecture: Architecture) -> Match:
    """The entry of the table that has the same tensors, with its own values of what cannot be seen.

    CheckpointError where several have.
    """
    seen = _seen(architecture)
    names = [name for name, entry in ARCHITECTURES.items() if _seen(entry) == seen]
    if len(names) > 1:
        raise CheckpointError(f"The checkpoint's tensors fit {' and '.join(names)} alike.", "Say which with --model.")
    if not names:
        return Match(architecture.family, architecture)
    entry = ARCHITECTURES[names[0]]
    return Match(names[0], entry.replace(image_size=architecture.image_size, classes=architecture.classes))


def _seen(architecture: Architecture) -> dict[str, Any]:
    """What tensors show of an architecture. Without a block that could share, `shared` means nothing."""
    values = {name: value for name, value in vars(architecture).items() if name not in (*_UNSEEN, *_UNSEEN_PIXELS)}
    return {**values, "shared": any(map(architecture.is_shared, range(len(architecture.stages))))}


def check_spec(spec: ModelSpec) -> None:
    """Check `spec` before weights are read. ModelError or UsageError for no model, an unknown one,
    a wrong image size.
    """
    if spec.module is not None and (spec.name is not None or spec.architecture is not None):
        other = "--arch describes" if spec.name is None else "--model names"
        raise UsageError(f"--module makes the model, and {other} another.", "Give one of them.")
    if spec.name is not None and isinstance(spec.architecture, Path):
        raise UsageError("--model names an architecture, and --arch describes one.", "Give one of them.")
    if spec.checkpoint is None and spec.module is None and requested(spec) is None:
        raise ModelError("No model was named.", "Give --model NAME, --checkpoint FILE, or both; --list shows names.")
    if spec.checkpoint is None and spec.weights is WeightSource.EMA:
        raise UsageError("--weights ema chooses between weights of a checkpoint.", "Give --checkpoint FILE.")
    check_ignore(spec.checkpoint, spec.ignore)
    if spec.num_classes is not None and spec.num_classes < 0:
        raise ModelError(f"A classifier of {spec.num_classes} classes does not exist.", "Give 0, for none, or more.")
    if (architecture := requested(spec)) is not None:
        with_hyperparameters(architecture, spec.hyperparameters)


def requested(spec: ModelSpec) -> Architecture | None:
    """The architecture that `spec` names or describes, with its image size and classes; None where the checkpoint has
    to tell. ModelError for an unknown name, UsageError for a file without an architecture.
    """
    if isinstance(spec.architecture, Path):
        architecture = Architecture.read(spec.architecture)
    elif spec.architecture is not None:
        architecture = spec.architecture
    elif spec.name is not None:
        architecture = ARCHITECTURES[resolve(spec.name)]
    else:
        return None
    asked = {"image_size": spec.image_size, "classes": spec.num_classes}
    return architecture.replace(**{field: value for field, value in asked.items() if value is not None})


def known_name(spec: ModelSpec) -> str | None:
    """The name of what `spec` names or describes; None where the checkpoint has to tell."""
    architecture = requested(spec)
    if architecture is None or spec.architecture is None:
        return None if architecture is None else resolve(spec.name or "")
    return spec.name or published_match(architecture).name


def check_ignore(checkpoint: Path | None, ignore: tuple[str, ...]) -> None:
    """UsageError for patterns of tensors without a checkpoint."""
    if checkpoint is None and ignore:
        raise UsageError("--ignore names tensors of a checkpoint.", "Give --checkpoint FILE.")


def create_model(model: str | Architecture, *, num_classes: int | None = None, **changes: Any) -> SelectableOutputs:
    """A freshly initialised model in evaluation mode, float32 on the CPU.

        create_model("ms_trans_xxs", image_size=64, num_classes=10)
        create_model(Architecture(...))

    As published, its head is zero, and so are its logits: load a checkpoint, or call `load_demo_weights`, before
    comparing anything. `model`: a name, or an architecture. `changes`: other values for fields of the `Architecture`;
    `num_classes` is its `classes`. Raises ModelError for an unknown name and for values that contradict each other,
    TypeError for a field that does not exist.
    """
    from spach_deploy.models.shiftvit import ShiftViT
    from spach_deploy.models.smlpnet import SMLPNet
    from spach_deploy.models.spach import Spach

    families: dict[str, type[SelectableOutputs]] = {"spach": Spach, "smlpnet": SMLPNet, "shiftvit": ShiftViT}
    if num_classes is not None:
        changes["classes"] = num_classes
    architecture = ARCHITECTURES[resolve(model)] if isinstance(model, str) else model
    architecture = architecture.replace(**changes)
    return families[architecture.family](architecture).eval()


def model_size(architecture: Architecture) -> Size:
    """Parameters and multiply-adds: those of the table, else counted on the module, for which torch is imported."""
    name = next((name for name, entry in ARCHITECTURES.items() if entry == architecture and name in SIZES), None)
    return SIZES[name] if name is not None else _counted(architecture)


def _counted(architecture: Architecture) -> Size:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_model(architecture)
        model(torch.empty(1, architecture.channels, *architecture.image_size))
    return Size(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


@functools.cache
def _aliases() -> dict[str, str]:
    plain = [name for name, entry in ARCHITECTURES.items() if entry.stem == "patch" and not entry.shared]
    aliases = {reference_name(name): name for name in plain if _is_spach(name)}
    return aliases | {f"spach_{name}": name for name in TOP1 if _is_spach(name)}


def _is_spach(name: str) -> bool:
    return ARCHITECTURES[name].family == "spach"


def reference_name(name: str) -> str:
    """`ms_hybrid_s+` -> `spach_ms_s_patch4_224_hybrid`; the published registry has stem and sharing as options. Those
    of the other families are ours.
    """
    if ARCHITECTURES[name].family != "spach":
        return name
    *stages, mixer, size = name.rstrip("+").removesuffix("_shared").split("_")
    mixer = "attn" if mixer == "trans" else mixer
    return "_".join(["spach", *stages, size, f"patch{ARCHITECTURES[name].patch_size}", "224", mixer])


def _suggestion(name: str) -> str:
    known = [*ARCHITECTURES, *_aliases()]
    spelled = {_fold(other): other for other in known}
    if _fold(name) in spelled:
        return f"It is spelled {spelled[_fold(name)]}."
    near = [spelled[other] for other in difflib.get_close_matches(_fold(name), spelled, n=3)]
    return f"Near it: {', '.join(near)}." if near else "spach-export --list shows all."


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")
