"""An architecture is data: it is read and checked, and the model of it computes what the published code computes.

`../golden/variants.json` and `variants.npz`: architectures outside the table, by the published constructor's options,
and the published implementation's answers, with weights and input as in `golden_reference`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import chosen_outputs
from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.models import Spach, create_model, load_demo_weights
from spach_deploy.models.matching import assumed_heads, infer_model
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.published import ARCHITECTURES, SIZES, TOP1
from spach_deploy.models.registry import model_size
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import FeatureLayout, OutputSpec, Role
from tests.models.golden_reference import (
    golden_answers,
    golden_model_of,
    golden_models,
    golden_variants,
    reference_batch,
)
from tests.static_models import architecture, relative_l2

# Giga multiply-adds and million parameters, as published.
PUBLISHED = {
    "ms_conv_xxs": (0.7, 5),
    "ms_trans_xxs": (0.5, 2),
    "ms_mlp_xxs": (0.9, 6),
    "ms_conv_s": (7.2, 44),
    "ms_trans_s": (7.6, 40),
    "ms_mlp_s": (8.2, 46),
    "ms_hybrid_s": (11.2, 63),
    "ms_hybrid_s+": (12.3, 63),
}


def meta_model(name: str) -> SelectableOutputs:
    with torch.device("meta"):
        return create_model(name)


# The published table


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_and_sizes_are_the_published_ones(name: str) -> None:
    """PyTorch's counter sees each product and convolution of a forward pass, two per multiply-add."""
    golden, model = golden_models()[name], meta_model(name)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == golden["state_dict"]
    assert SIZES[name].parameters == sum(parameter.numel() for parameter in model.parameters()) == golden["parameters"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert 2 * SIZES[name].macs == counter.get_total_flops()


def test_golden_tables_are_of_these_models() -> None:
    assert list(golden_models()) == list(ARCHITECTURES) == list(SIZES)
    assert set(PUBLISHED) == {name for name in TOP1 if ARCHITECTURES[name].family == "spach"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    """Half a unit of the last digit, and 2 % for what published figures count beside matrices."""
    giga, million = PUBLISHED[name]
    assert abs(SIZES[name].macs / 1e9 - giga) <= 0.05 + 0.02 * giga
    assert abs(SIZES[name].parameters / 1e6 - million) < 1


def test_other_sizes_are_counted_on_the_module() -> None:
    model = create_model("ms_mlp_xxs", image_size=64, num_classes=10)
    counted = model_size(model.architecture)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < counted.macs < SIZES["ms_mlp_xxs"].macs / 10


# Image sizes


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("ms_hybrid_s", 16, "Take 64"),
        ("ms_hybrid_s", 0, "Take 64 or more"),
        ("ms_hybrid_s", 32, "2 by 2"),
        ("ms_hybrid_s", -32, "Take 64 or more"),
        ("mlp_xxs", 16, "2 by 2"),
        ("ms_mlp_xxs", (224, 32), "Image size 224x32 is too small.* Take 64 or more"),
        ("ms_hybrid_s+", 227, "multiples of 4"),
    ],
)
def test_image_sizes_that_do_not_work_are_refused(name: str, size: Any, hint: str) -> None:
    with pytest.raises(ModelError, match=hint):
        create_model(name, image_size=size)


@pytest.mark.parametrize("name", ["conv_xxs", "ms_trans_xxs", "mlp_xxs", "ms_mlp_xxs", "ms_hybrid_xs+"])
def test_the_smallest_image_size_works(name: str) -> None:
    size = ARCHITECTURES[name].smallest_image_size
    with torch.no_grad():
        assert create_model(name, image_size=size)(torch.zeros(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.parametrize(("size", "grids"), [(225, [56, 28, 14, 7]), (239, [59, 29, 14, 7])])
def test_what_patches_and_strides_leave_over_is_cut(size: int, grids: list[int]) -> None:
    model = create_model("ms_trans_xxs", image_size=size)
    assert model.architecture.grids == [(side, side) for side in grids]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 1000)


# Reading and writing

CONTENT: dict[str, Any] = {"patch_size": 4, "width": 32, "channel_ratio": 2, "heads": 1, "stages": [["attn", 2]]}


def test_an_architecture_is_written_and_read_again(tmp_path: Path) -> None:
    for entry in (*ARCHITECTURES.values(), Architecture.of(CONTENT), Architecture.of({**CONTENT, "qk_scale": 0.05})):
        (tmp_path / "model.toml").write_text(entry.to_toml())
        (tmp_path / "model.json").write_text(json.dumps(entry.to_dict()))
        assert Architecture.read(tmp_path / "model.toml") == entry
        assert Architecture.read(tmp_path / "model.json") == entry


def test_published_names_and_short_forms_are_read() -> None:
    """The published names of mixers, one number for a square, one stage as the published code writes it."""
    read = Architecture.of({**CONTENT, "image_size": 64, "stages": [["pass", 1], ["attn", 2]]})
    assert read.image_size == (64, 64)
    for size in (64, [64, 64], (64, 64)):
        assert dataclasses.replace(read, image_size=size) == read  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="is not height and width in pixels"):
        dataclasses.replace(read, image_size=64.5)  # type: ignore[arg-type]
    assert read.stages == ((("conv", 1), ("trans", 2)),)
    assert Architecture.of({**CONTENT, "qk_scale": 0}).qk_scale is None
    grey = Architecture.of({**CONTENT, "channels": 1, "mean": 0.5, "std": 0.25})
    assert (grey.mean, grey.std) == ((0.5,), (0.25,))
    assert Architecture.of({**CONTENT, "mean": 0.5}).mean == (0.5, 0.5, 0.5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"widht": 3}, "unknown key 'widht'. Did you mean width?"),
    "text for a number": ({"width": "32"}, "width: expected"),
    "heads that do not divide": ({"heads": 5}, "5 heads do not divide the model's 32 channels. Give one of 1, 2, 4"),
    "no heads": ({"heads": 0}, "heads is missing"),
    "a small grid": ({"image_size": 7}, "too small"),
    "one side": ({"image_size": [64]}, "image_size"),
    "no block": ({"stages": [[], []]}, "stage without blocks"),
    "an unknown mixer": ({"stages": [["fft", 2]]}, "no mixer 'fft' in spach. One of conv, trans, mlp."),
    "no number of blocks": ({"stages": [["conv", 0]]}, "0 blocks of conv is not 1 to 1000"),
    "an unknown stem": ({"stem": "conv4"}, "no stem 'conv4'. One of patch, conv."),
    "an odd patch": ({"stem": "conv", "patch_size": 3}, "patch_size 3 must be even"),
    "an unknown activation": ({"activation": "mish"}, "no activation 'mish'"),
    "another norm": ({"norm": "batch"}, "no norm 'batch'. One of layer."),
    "a negative epsilon": ({"norm_eps": -1.0}, "-1 is no norm_eps"),
    "no hidden channel": ({"channel_ratio": 0.01}, "leaves no hidden channel"),
    "no hidden token": ({"stages": [["mlp", 1]], "token_ratio": 1e-6}, "leaves no hidden token"),
    "a later version": ({"version": 2}, "has version 2"),
    "another family": ({"family": "vit"}, "no family 'vit'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_one_sentence(case: str, tmp_path: Path) -> None:
    changes, words = WRONG[case]
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**CONTENT, **changes}))
    with pytest.raises(UsageError) as caught:
        Architecture.read(path)
    assert str(caught.value).startswith(f"Architecture {path} ")
    assert words in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"), [("width = ", "is not TOML"), ("width = 3", "lacks patch_size, stages, channel_ratio")]
)
def test_a_file_that_says_no_architecture(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        Architecture.read(tmp_path / "model.toml")


# What the published code computes


def test_blocks_share_where_the_published_code_shares() -> None:
    """In stages of a single mixer, attention or MLP; of several stages, from the second on."""
    shared = architecture(16, 4, 2, "2 mlp | 2 trans | 1 trans, 1 conv", heads=2, shared=True)
    model = Spach(shared)
    first, second, _ = (getattr(model, name) for name in model.stage_names)
    assert first[0].spatial_func is not first[1].spatial_func
    assert second[1].spatial_func is second[2].spatial_func
    assert second[1].norm1 is not second[2].norm1
    assert len({*Spach(architecture(16, 8, 2, "2 trans", heads=2, shared=True)).parameters()}) == 34


def test_without_classes_the_model_gives_its_embedding() -> None:
    model = create_model("ms_trans_xxs", image_size=64, num_classes=0)
    assert not [name for name in model.state_dict() if name.startswith("head.")]
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 256)


PUBLISHED_NAMES = {  # of the constructor's options, where ours are others
    "hidden_dim": "width",
    "num_heads": "heads",
    "net_arch": "stages",
    "img_size": "image_size",
    "in_chans": "channels",
    "num_classes": "classes",
    "act": "activation",
    "eps": "norm_eps",
    "cpe": "position_encoding",
    "scaled": "layer_scale",
    "shared_spatial_func": "shared",
    "stem_type": "stem",
}


def variant(name: str) -> Architecture:
    """The architecture of a variant, from the published options."""
    options = {"channel_ratio": 2, **golden_variants()[name]["options"]}
    content = {PUBLISHED_NAMES.get(key, key): value for key, value in options.items()}
    content["stem"] = {"conv4": "conv"}.get(content.get("stem", ""), "patch")
    return Architecture.of(content)


def every_output(model: SelectableOutputs, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, embedding, and the tokens that each stage gives, as `layer1` and so on."""
    spec = OutputSpec(outputs=(Role.LOGITS, Role.EMBEDDING, Role.FEATURES), feature_layout=FeatureLayout.TOKENS)
    model.outputs = chosen_outputs(spec, model.architecture.classes, model.stage_shapes)
    with torch.no_grad():
        made = model(images)
    return {tensor.name.replace("features", "layer"): y for tensor, y in zip(model.outputs, made, strict=True)}


@pytest.mark.parametrize("name", golden_variants())
def test_an_architecture_outside_the_table_computes_what_the_published_code_computes(name: str) -> None:
    model = golden_model_of(variant(name))
    shapes = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in model.state_dict().items())
    assert hashlib.sha256(shapes.encode()).hexdigest() == golden_variants()[name]["state_dict_sha256"]
    size = model.architecture.image_size
    images = torch.from_numpy(reference_batch((2, model.architecture.channels, *size))[:1])
    computed = every_output(model, images)
    answers = golden_answers(name)
    assert {"logits", "embedding"} <= set(answers)
    for output, value in answers.items():
        ours = computed[output].detach().numpy()
        ours = ours[:, : value.shape[1]] if output.startswith("layer") else ours
        assert relative_l2(ours, value) < 1e-6, output


# Combinations of options

ODD: dict[str, Architecture] = {
    "attention everywhere, shared": architecture(24, 4, 1.5, "2 trans | 2 trans", heads=3, shared=True),
    "attention without bias, scale and position": architecture(
        32, 8, 3.3, "3 trans", heads=2, qkv_bias=False, layer_scale=False, position_encoding=False
    ),
    "five channels and three stages": architecture(12, 2, 2.7, "1 conv | 1 mlp, 1 conv | 2 trans", heads=2, channels=5),
    "an MLP in the first stage": architecture(16, 4, 2, "1 mlp | 1 trans, 1 mlp", heads=4, token_ratio=1.3),
    "a convolutional stem on grey pictures": architecture(20, 4, 2, "1 conv | 1 conv", stem="conv", channels=1),
    "a large patch": architecture(16, 16, 2, "1 conv, 1 trans, 1 conv, 1 mlp", heads=1, token_ratio=0.75),
    "no position encoding": architecture(16, 8, 2, "1 conv, 1 trans", heads=2, position_encoding=False),
    "a rectangle that is cut": architecture(
        16, 4, 2, "1 conv | 1 trans, 1 mlp", heads=2, image_size=(38, 27), activation="relu", qk_scale=0.3
    ),
    "a rectangle with shared attention": architecture(
        16, 4, 2, "1 mlp | 3 trans", heads=2, image_size=(24, 40), shared=True, norm_eps=1e-3, activation="silu"
    ),
    "shared MLPs": architecture(16, 4, 0.6, "2 conv | 3 mlp", shared=True, layer_scale=False, classes=2),
}


class Naive:
    """The forward pass with functions of tensors alone, as written down for the published code; no module of ours."""

    def __init__(self, architecture: Architecture, tensors: dict[str, torch.Tensor]) -> None:
        self.of, self.tensors = architecture, tensors
        self.act = getattr(functional, architecture.activation)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        height, width = x.shape[2:]
        x = self.norm(x.flatten(2).transpose(1, 2), "norm1")
        for stage, (name, mixers) in enumerate(zip(self.of.stage_names, self.of.mixers, strict=True)):
            if stage:
                weights = self.tensors[f"{name}.0.net.1.0.weight"]
                y = functional.conv2d(self.grid(x, height, width), weights, stride=2)
                height, width = y.shape[2:]
                y = functional.group_norm(y, 1, *self.pair(f"{name}.0.net.1.1"), 1e-5)
                x = y.flatten(2).transpose(1, 2)
            for index, mixer in enumerate(mixers, start=bool(stage)):
                x = self.block(x, f"{name}.{index}", mixer, height, width)
        return self.linear(self.norm(x, "norm2").mean(1), "head")

    def block(self, x: torch.Tensor, name: str, mixer: str, height: int, width: int) -> torch.Tensor:
        y = x
        if mixer != "conv":
            z = self.norm(x, f"{name}.norm1")
            inner = f"{name}.spatial_func"
            z = self.attention(z, inner) if mixer == "trans" else self.mlp(z.transpose(1, 2), inner).transpose(1, 2)
            y = y + self.tensors.get(f"{name}.gamma_1", torch.ones(1)) * z
        if self.of.position_encoding:
            weight, bias = self.pair(f"{name}.cpe_net.net.1")
            z = functional.conv2d(self.grid(x, height, width), weight, bias, padding=1, groups=x.shape[2])
            y = y + z.flatten(2).transpose(1, 2)
        return y + self.mlp(self.norm(y, f"{name}.norm2"), f"{name}.channel_func")

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        batch, tokens, dim = x.shape
        parts = self.linear(x, f"{name}.qkv").reshape(batch, tokens, 3, self.of.heads, dim // self.of.heads)
        q, k, v = parts.unbind(2)
        scale = self.of.qk_scale or (dim // self.of.heads) ** -0.5
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale).softmax(-1)
        return self.linear(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2), f"{name}.proj")

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        if self.of.stem == "patch":
            return functional.conv2d(x, *self.pair("stem.proj"), stride=self.of.patch_size)
        for index, stride in ((0, 2), (3, 1), (6, 1)):
            weight = self.tensors[f"stem.proj.{index}.weight"]
            x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
            norm = f"stem.proj.{index + 1}"
            mean, variance = (self.tensors[f"{norm}.running_{part}"] for part in ("mean", "var"))
            x = functional.batch_norm(x, mean, variance, *self.pair(norm), eps=1e-5).relu()
        return functional.conv2d(x, *self.pair("stem.proj.9"), stride=self.of.patch_size // 2)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linear(self.act(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], *self.pair(name), self.of.norm_eps)

    @staticmethod
    def grid(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return x.transpose(1, 2).reshape(len(x), -1, height, width)


@pytest.mark.parametrize("name", ODD)
def test_any_combination_computes_what_functions_alone_compute(name: str) -> None:
    """And its static form with all rewrites computes the same."""
    model = create_model(ODD[name])
    load_demo_weights(model)
    images = torch.randn(2, ODD[name].channels, *ODD[name].image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Naive(ODD[name], dict(model.state_dict())).logits(images).numpy()
        assert relative_l2(model(images).numpy(), wanted) < 2e-6
        assert relative_l2(rewrite(model).model(images).numpy(), wanted) < 5e-6


# Read from tensors


@pytest.mark.parametrize("name", [*golden_variants(), *ODD])
def test_an_architecture_is_read_from_its_tensors(name: str) -> None:
    """All but heads, qk scale, activation and epsilon, which tensors do not show."""
    wanted = ODD[name] if name in ODD else variant(name)
    if wanted.shared and len(wanted.stages) > 1:
        assert any(map(wanted.is_shared, range(len(wanted.stages))))
    state = create_model(wanted).state_dict()
    match, _ = infer_model(state, {}, wanted.image_size)
    unseen = {field: getattr(wanted, field) for field in ("heads", "qk_scale", "activation", "norm_eps")}
    assert match.architecture.replace(**unseen) == wanted
    published = {"three heads": "trans_xxs", "qk_scale": "trans_xxs", "relu": "trans_xxs", "epsilon": "trans_xxs"}
    assert match.name == published.get(name, "spach")
    assert str(match) == published.get(name, f"a {match.architecture.description}")


@pytest.mark.parametrize(
    ("width", "dims", "heads"), [(64, [256, 512], 2), (48, [96, 192], 2), (16, [16], 1), (8, [], 0)]
)
def test_heads_that_nothing_says_are_about_as_in_published_models(width: int, dims: list[int], heads: int) -> None:
    assert assumed_heads(width, dims) == heads


def test_a_token_mlp_of_no_square_grid_needs_the_size_of_the_images() -> None:
    wanted = architecture(16, 8, 2, "1 mlp", image_size=(24, 40), position_encoding=False)
    state = create_model(wanted).state_dict()
    with pytest.raises(UsageError, match=r"mix 15 tokens in stage 1, which is no square grid. Give .*--image-size"):
        infer_model(state, {}, None)
    match, _ = infer_model(state, {}, (24, 40))
    assert match.architecture == wanted
    with pytest.raises(UsageError, match="of 15 tokens in stage 1, as its spatial MLP's weights fix"):
        infer_model(state, {}, (24, 32))
