"""Names, aliases, and the table."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spach_deploy.common.errors import ModelError
from spach_deploy.models.registry import ARCHITECTURES, create_model, list_models, model_info, resolve
from tests.models.golden_reference import golden_models


def test_the_table_has_every_model() -> None:
    assert [info.name for info in list_models()] == list(golden_models())
    assert all(info.reference_name == golden_models()[info.name]["reference_name"] for info in list_models())


def test_published_checkpoints_and_accuracy() -> None:
    published = {info.published_checkpoint: info.published_top1 for info in list_models() if info.published_top1}
    assert published["spach_ms_hybrid_s+.pth"] == 83.9
    assert len([name for name in published if name]) == 8
    assert model_info("smlpnet_tiny").published_top1 == 81.9
    assert model_info("shiftvit_r2_small").published_top1 == 82.8
    assert model_info("conv_xs").published_top1 is None
    assert model_info("conv_xs").published_checkpoint is None


def test_stages_are_readable() -> None:
    assert model_info("ms_hybrid_s").stages == "3 conv | 2 conv, 2 trans | 2 conv, 10 trans | 1 conv, 2 trans"
    assert model_info("mlp_xxs").stages == "12 mlp"
    assert model_info("smlpnet_tiny").stages == "2 smlp | 8 smlp | 14 smlp | 2 smlp"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_registry_names_mean_the_plain_model(name: str) -> None:
    plain = name.removesuffix("+").removesuffix("_shared")
    assert resolve(golden_models()[name]["reference_name"]) == plain
    assert resolve(name) == name


def test_published_checkpoint_names_are_aliases() -> None:
    assert resolve("spach_ms_hybrid_s") == "ms_hybrid_s"
    assert resolve("spach_ms_hybrid_s+") == "ms_hybrid_s+"
    assert model_info("spach_ms_hybrid_s") == model_info("ms_hybrid_s")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ms_hybird_s", "Near it: ms_hybrid_s"),
        ("MS_Hybrid_S", "It is spelled ms_hybrid_s."),
        ("ms-hybrid-s+", "It is spelled ms_hybrid_s+."),
        ("SPACH_MS_S_PATCH4_224_HYBRID", "It is spelled spach_ms_s_patch4_224_hybrid."),
        ("resnet50", "spach-export --list shows all."),
        ("", "spach-export --list shows all."),
    ],
)
def test_unknown_names_are_refused_with_the_next_step(name: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        create_model(name)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_fields_of_the_architecture_can_be_changed() -> None:
    model = create_model("ms_conv_xxs", image_size=64, num_classes=3, channels=1)
    assert model.architecture == ARCHITECTURES["ms_conv_xxs"].replace(image_size=64, classes=3, channels=1)
    assert create_model(model.architecture, width=32).state_dict()["norm1.weight"].shape == (32,)
    with pytest.raises(ModelError, match="classes -1"):
        create_model("ms_conv_xxs", num_classes=-1)
    with pytest.raises(TypeError, match="depth"):
        create_model("ms_conv_xxs", depth=3)


def test_table_and_names_need_no_torch() -> None:
    code = (
        "import sys; import spach_deploy.models, spach_deploy.models.registry as r; r.list_models(); "
        "r.model_info('ms_hybrid_s').architecture.replace(image_size=256); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lazy_names_of_the_package_exist() -> None:
    import spach_deploy.models as models

    assert all(getattr(models, name) is not None for name in models.__all__)
    assert sorted(models.__all__) == sorted(models._LAZY)
    with pytest.raises(AttributeError, match="nothing"):
        _ = models.nothing
