"""Modules with several inputs through an export, and what reads their bundles; modules as frameworks wrap them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import spach_deploy
from spach_deploy.blocks import rewrite
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.schema import Manifest
from spach_deploy.bundle.store import GOLDEN
from spach_deploy.cli.package import main as package_command
from spach_deploy.cli.predict import main as predict_command
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.errors import ModelError, UsageError
from spach_deploy.models.own_module import OwnForward, choose_outputs, loaded_module
from spach_deploy.options.specs import ModelSpec, OutputSpec
from spach_deploy.pipeline.steps.reference import checked_outputs
from tests import own_inputs
from tests.commands import export, refusal
from tests.own_inputs import IMAGE, Siamese, reading, seeded
from tests.own_models import PlainNet, TwoInputs
from tests.quantization.small_quantized import pictures

PACKAGES = "tests.own_inputs:reading"


def run(command: Any, *words: object) -> Result:
    return CliRunner().invoke(command, list(map(str, words)))


def exported(model: nn.Module, example: Any, output: Path, **options: Any) -> Manifest:
    result = spach_deploy.export(model, example, output=output, **{"precision": "fp32", "engine": "none", **options})
    assert result.validation.passed
    return result.bundle.manifest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Reading` in FP16, from a shell, where the factory gives example inputs by name."""
    output = tmp_path_factory.mktemp("reading") / "bundle"
    done = export("--module", PACKAGES, "--fp16", "--engine", "none", "-o", output)
    assert done.exit_code == 0, done.output
    assert "Pictures go to the input pixels; mask, words, temperature have values of the example inputs." in done.stderr
    return output


class TestBundle:
    def test_its_inputs_are_typed_and_all_in_the_golden_pack(self, bundle: Path) -> None:
        manifest = Manifest.read(bundle / "manifest.json")
        assert [(tensor.name, tensor.dtype, tensor.layout) for tensor in manifest.inputs] == [
            ("mask", "bool", ""),
            ("words", "int64", ""),
            ("pixels", "float32", "NCHW"),
            ("temperature", "float32", ""),
        ]
        golden = Golden.load(bundle / GOLDEN)
        golden.check(spach_deploy.Bundle.open(bundle))
        assert golden.input.shape == (8, 3, 32, 32)
        assert {name: array.shape for name, array in golden.others.items()} == {
            "mask": (8, 4),
            "words": (8, 4),
            "temperature": (8, 1),
        }
        assert all(len(np.unique(array, axis=0)) > 1 for array in golden.others.values())

    def test_a_session_takes_a_dictionary_and_answers_as_the_module_does(self, bundle: Path) -> None:
        golden = Golden.load(bundle / GOLDEN)
        feeds = {"pixels": golden.input, **golden.others}
        with spach_deploy.Session(bundle) as session:
            found = session.run(feeds)["logits"]
            with torch.inference_mode():
                wanted = reading()[0].eval()(
                    *(torch.from_numpy(feeds[name]) for name in ("pixels", "words", "mask", "temperature"))
                )
            assert np.allclose(found, wanted.numpy(), atol=2e-2)
            for wrong, said in (
                (golden.input, "takes mask, words, pixels, temperature, not one array"),
                ({"pixels": golden.input}, "takes mask, words, pixels, temperature, not pixels"),
                (
                    {**feeds, "words": feeds["words"].astype(np.int32)},
                    r"takes words, int64 \(N, 4\), not int32 \(8, 4\)",
                ),
                ({**feeds, "mask": feeds["mask"][:2]}, "not of one batch: mask 2, words 8"),
            ):
                with pytest.raises(UsageError, match=said):
                    session.run(wrong)
            with pytest.raises(UsageError, match="pictures alone are one"):
                session.predict("anything.jpg")

    def test_it_is_validated_on_its_pack_and_on_other_images(self, bundle: Path, tmp_path: Path) -> None:
        assert run(validate_command, bundle).exit_code == 0
        np.savez(tmp_path / "set.npz", images=pictures(3))
        done = run(validate_command, bundle, "--images", tmp_path / "set.npz", "--module", PACKAGES)
        assert done.exit_code == 0, done.output

    def test_a_graph_that_ignores_an_input_is_found(self, bundle: Path) -> None:
        golden = Golden.load(bundle / GOLDEN)
        feeds = {"pixels": golden.input, **golden.others}
        with spach_deploy.Session(bundle) as session:
            before = session.run(feeds)["logits"]
            for name, array in golden.others.items():
                after = session.run({**feeds, name: np.roll(array, 1, axis=0)})["logits"]
                assert not np.allclose(before, after, atol=1e-2), name

    def test_triton_and_polygraphy_get_all_inputs(self, bundle: Path, tmp_path: Path) -> None:
        done = run(package_command, "triton", bundle, "-o", tmp_path / "triton")
        assert done.exit_code == 0, done.output
        config = (tmp_path / "triton" / "Reading" / "config.pbtxt").read_text(encoding="utf-8")
        assert config.count('input_data_file: "golden_input_words"') == 3
        assert (tmp_path / "triton" / "Reading" / "warmup" / "golden_input_mask").stat().st_size == 4
        assert "nothing found" in run(package_command, "triton", "--check", tmp_path / "triton").output
        done = run(package_command, "polygraphy", bundle, "-o", tmp_path / "polygraphy")
        assert done.exit_code == 0, done.output
        loaded = subprocess.run(
            [sys.executable, "-c", "import data_loader\nfor feed in data_loader.load_data(): print(sorted(feed))"],
            cwd=tmp_path / "polygraphy",
            capture_output=True,
            text=True,
            check=True,
        )
        assert loaded.stdout.splitlines() == ["['mask', 'pixels', 'temperature', 'words']"] * 3

    @pytest.mark.parametrize(
        ("command", "words", "said"),
        [
            (package_command, ("cpp",), "and the C++ library feeds one. Write it with spach-package triton"),
            (package_command, ("kubernetes",), "and the image's golden check sends one"),
            (package_command, ("triton", "--ensemble"), "and --ensemble makes one, of a picture"),
        ],
    )
    def test_packages_of_one_input_refuse_it(
        self, command: Any, words: tuple[str, ...], said: str, bundle: Path, tmp_path: Path
    ) -> None:
        assert said in refusal(run(command, words[0], bundle, *words[1:], "-o", tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_predict_and_against_refuse_it(self, bundle: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "set.npz", images=pictures(1))
        assert "takes several inputs (mask, words, pixels, temperature)" in refusal(
            run(predict_command, bundle, tmp_path / "set.npz")
        )
        against = run(validate_command, bundle / "model.onnx", "--against", bundle)
        assert "--against compares graphs of one" in refusal(against)


def test_two_images_in_eight_bits_from_pixels(tmp_path: Path) -> None:
    """The second one is mirrored, so their difference is none of zeros; layers that run twice stay in float."""
    np.savez(tmp_path / "set.npz", images=pictures(16, 1))
    options = {"precision": "int8", "calibration": tmp_path / "set.npz", "quantize": "*", "io_dtype": "uint8"}
    manifest = exported(seeded(Siamese()), (IMAGE, IMAGE), tmp_path / "bundle", **options)
    assert [(tensor.name, tensor.dtype, tensor.layout) for tensor in manifest.inputs] == [
        ("left", "uint8", "NHWC"),
        ("right", "uint8", "NHWC"),
    ]
    assert manifest.quantization is not None
    assert manifest.quantization.layers == 1
    assert "rule: it runs several times, on inputs of other ranges" in {
        kept.reason for kept in manifest.quantization.kept_float
    }


def test_the_rows_that_are_given_are_taken() -> None:
    rows = torch.rand(8, 4, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(loaded_module(seeded(TwoInputs()), (IMAGE, rows), ModelSpec()).takes.rows["vector"], rows)


def test_an_input_and_an_output_of_one_name_are_told_apart() -> None:
    class Named(nn.Module):
        def forward(self, image: Tensor, logits: Tensor) -> Tensor:
            return image.mean((2, 3)) + logits

    loaded = loaded_module(Named(), (IMAGE, torch.rand(1, 3)), ModelSpec())
    assert isinstance(loaded.model, OwnForward)
    assert (loaded.takes.names, loaded.model.outputs[0].name) == (("image", "logits_input"), "logits")
    with pytest.raises(UsageError, match="image would be called like an input"):
        choose_outputs(loaded.model, OutputSpec(names=("logits=image",)))


def test_an_image_size_that_contradicts_the_example_is_refused(tmp_path: Path) -> None:
    given = ("--module", PACKAGES, "--fp32", "--engine", "none", "--image-size", 64, "-o", tmp_path / "x")
    assert "--image-size says 64, and the example inputs of" in refusal(export(*given))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.DataParallel(seeded(PlainNet())),
        lambda: torch.compile(seeded(PlainNet()), backend="eager"),
        own_inputs.CompiledInside,
        own_inputs.parametrized,
        lambda: torch.fx.symbolic_trace(seeded(PlainNet())),
        own_inputs.TrainingLoss,
        lambda: seeded(PlainNet()).half(),
    ],
    ids=["DataParallel", "compiled", "compiled inside", "weight norm", "fx", "a loss that is None", "half"],
)
def test_what_frameworks_make_of_a_module_is_taken_and_stays_as_it_is(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    loaded = loaded_module(model, IMAGE, ModelSpec())
    images = torch.rand(2, *IMAGE.shape[1:])
    with torch.inference_mode():
        found, known = loaded.model(images), rewrite(loaded.model).model(images)
    assert torch.allclose(found, known, atol=1e-5)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == dtype for name, (tensor, dtype) in before.items()
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert model.training
    model.float().eval()
    with torch.inference_mode():
        wanted = model(images)
    assert torch.allclose(found, wanted["logits"] if isinstance(wanted, dict) else wanted, atol=1e-5)


def test_zeros_of_a_users_module_are_not_called_demo_weights() -> None:
    model = seeded(PlainNet())
    assert isinstance(model, PlainNet)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    loaded = loaded_module(model, IMAGE, ModelSpec())
    with pytest.raises(UsageError, match="Your module answers exactly zero") as caught:
        checked_outputs(loaded.model, np.ones((2, 3, 32, 32), np.float32))
    assert "demo" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "example", "said"),
    [
        (lambda: torch.jit.script(PlainNet()), IMAGE, "The module is TorchScript"),
        (own_inputs.traced, IMAGE, "The module is TorchScript"),
        (lambda: torch.export.export(PlainNet().eval(), (IMAGE,)).module(), IMAGE, "is an exported program"),
        (own_inputs.Lazy, IMAGE, "head is lazy and has no weights yet"),
        (own_inputs.quantized, IMAGE, r"Its part head is quantized already \(Linear\)"),
        (own_inputs.on_meta, IMAGE, "body.0.weight is on the meta device"),
        (own_inputs.FullyShardedDataParallel, IMAGE, "is sharded over processes"),
        (lambda: PlainNet().double(), IMAGE, "body.0.weight is float64"),
        (own_inputs.Autocast, IMAGE, "computes in 16 bits, as under torch.autocast"),
        (own_inputs.Nothing, IMAGE, "returns NoneType"),
        (own_inputs.Spectrum, IMAGE, "is complex64, and a graph's outputs are floats"),
        (PlainNet, IMAGE.double(), "The example input input is float64"),
        (TwoInputs, (IMAGE, torch.zeros(1, 4, dtype=torch.uint8)), "example input vector is uint8"),
        (TwoInputs, (IMAGE, torch.zeros(4)), r"example input vector has the shape \(4,\)"),
        (TwoInputs, ({"image": IMAGE},), "example input input is a dict, no tensor"),
        (TwoInputs, {"image": IMAGE, "vectors": torch.zeros(1, 4)}, "unexpected keyword argument 'vectors'"),
        (TwoInputs, (), "There are no example inputs"),
        (PlainNet, IMAGE.numpy(), "example inputs are a ndarray"),
        (nn.Identity, torch.zeros(1, 4), "what takes images, float32"),
    ],
)
def test_what_cannot_be_exported_says_what_to_give_instead(
    make: Callable[[], Any], example: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, ModelError), match=said) as caught:
        spach_deploy.export(make(), example, precision="fp32", engine="none", output=tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert caught.value.hint
