"""Registry of the SPACH models: names, aliases, the table that `spach-export --list` prints, and `create_model`.

Only `create_model` imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.models.hyperparameters import with_hyperparameters
from spach_deploy.models.published import CONFIGS, SpachConfig
from spach_deploy.models.shapes import count_macs, count_parameters
from spach_deploy.options.specs import Hyperparameters, ModelSpec, WeightSource

if TYPE_CHECKING:
    from spach_deploy.models.spach import Spach

__all__ = ["CONFIGS", "ModelInfo", "check_spec", "create_model", "list_models", "model_info", "resolve"]

# ImageNet-1K top-1 in percent at 224 pixels of the checkpoints that were published, each named spach_<our
# name>.pth.
PUBLISHED_TOP1 = {
    "ms_conv_xxs": 73.1,
    "ms_trans_xxs": 65.4,
    "ms_mlp_xxs": 74.5,
    "ms_conv_s": 81.6,
    "ms_trans_s": 82.9,
    "ms_mlp_s": 82.1,
    "ms_hybrid_s": 83.7,
    "ms_hybrid_s+": 83.9,
}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One line of the table, for 224 pixels and 1000 classes.

    `reference_name`: the published registry name; models with another stem or with shared weights have the name of the
    plain model. `macs`: multiply-adds for one image, as `shapes.count_macs` counts. `published_top1`: ImageNet-1K
    accuracy in percent; it and `published_checkpoint` are None where nothing was published.
    """

    name: str
    config: SpachConfig
    reference_name: str
    parameters: int
    macs: int
    stages: str
    published_top1: float | None
    published_checkpoint: str | None


def list_models() -> list[ModelInfo]:
    """Every model, in the order of the table."""
    return [model_info(name) for name in CONFIGS]


def model_info(name: str) -> ModelInfo:
    """The table's entry of the model `name`, which may be an alias. ModelError when there is none."""
    name = resolve(name)
    config = CONFIGS[name]
    return ModelInfo(
        name=name,
        config=config,
        reference_name=_reference_name(name),
        parameters=count_parameters(config),
        macs=count_macs(config),
        stages=_describe_stages(config),
        published_top1=PUBLISHED_TOP1.get(name),
        published_checkpoint=f"spach_{name}.pth" if name in PUBLISHED_TOP1 else None,
    )


def resolve(name: str) -> str:
    """The name in this package for `name`, which may be an alias.

    Aliases are the published registry names (`spach_ms_s_patch4_224_hybrid`), which mean the plain model
    where variants share one, and the published checkpoint names without suffix (`spach_ms_hybrid_s`). Case
    and dashes are not corrected, but the ModelError suggests the right name.
    """
    if name in CONFIGS:
        return name
    if name in _aliases():
        return _aliases()[name]
    raise ModelError(f"There is no model {name!r}.", _suggestion(name))


def check_spec(spec: ModelSpec) -> None:
    """Check `spec` before weights are read. ModelError or UsageError for no model, an unknown one,
    a wrong image size.
    """
    if spec.name is None and spec.checkpoint is None:
        raise ModelError("No model was named.", "Give --model NAME, --checkpoint FILE, or both; --list shows names.")
    if spec.checkpoint is None and spec.weights is WeightSource.EMA:
        raise UsageError("--weights ema chooses between weights of a checkpoint.", "Give --checkpoint FILE.")
    check_ignore(spec.checkpoint, spec.ignore)
    if spec.name is not None:
        config = with_hyperparameters(CONFIGS[resolve(spec.name)], spec.hyperparameters)
        if spec.image_size is not None:
            config.check_image_size(spec.image_size)


def check_ignore(checkpoint: Path | None, ignore: tuple[str, ...]) -> None:
    """UsageError for patterns of tensors without a checkpoint."""
    if checkpoint is None and ignore:
        raise UsageError("--ignore names tensors of a checkpoint.", "Give --checkpoint FILE.")


def create_model(
    name: str,
    *,
    image_size: int = 224,
    num_classes: int = 1000,
    hyperparameters: Hyperparameters = Hyperparameters(),  # noqa: B008
) -> Spach:
    """A freshly initialised model in evaluation mode, float32 on the CPU.

    As published, its head is zero, and so are its logits: load a checkpoint, or call `load_demo_weights`, before
    comparing anything. `image_size`: in pixels, one side. Raises ModelError for an unknown name, and for an image size
    or hyperparameters that the architecture does not allow.
    """
    from spach_deploy.models.spach import Spach

    config = with_hyperparameters(CONFIGS[resolve(name)], hyperparameters)
    return Spach(config, image_size=image_size, num_classes=num_classes).eval()


@functools.cache
def _aliases() -> dict[str, str]:
    plain = [name for name, config in CONFIGS.items() if not (config.conv_stem or config.shared_spatial)]
    registry = {_reference_name(name): name for name in plain}
    return registry | {f"spach_{name}": name for name in PUBLISHED_TOP1}


def _reference_name(name: str) -> str:
    """`ms_hybrid_s+` -> `spach_ms_s_patch4_224_hybrid`; the published registry has stem and sharing as options."""
    *stages, mixer, size = name.rstrip("+").removesuffix("_shared").split("_")
    mixer = "attn" if mixer == "trans" else mixer
    return "_".join(["spach", *stages, size, f"patch{CONFIGS[name].patch_size}", "224", mixer])


def _describe_stages(config: SpachConfig) -> str:
    """`3 conv | 2 conv, 2 trans | ...`."""
    runs = [[(len(list(run)), mixer) for mixer, run in itertools.groupby(stage)] for stage in config.stages]
    return " | ".join(", ".join(f"{count} {mixer}" for count, mixer in stage) for stage in runs)


def _suggestion(name: str) -> str:
    known = [*CONFIGS, *_aliases()]
    spelled = {_fold(other): other for other in known}
    if _fold(name) in spelled:
        return f"It is spelled {spelled[_fold(name)]}."
    near = [spelled[other] for other in difflib.get_close_matches(_fold(name), spelled, n=3)]
    return f"Near it: {', '.join(near)}." if near else "spach-export --list shows all."


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")
