"""spach-package cpp as a user calls it: what it writes, what it refuses, and in which words. Compiles nothing."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.store import GOLDEN, MANIFEST, PLAN
from spach_deploy.cli.package import main as package_command
from spach_deploy.cli.package_cpp import main
from spach_deploy.options.specs import IODtype, OutputSpec
from tests import small_bundles
from tests.commands import contents, refusal
from tests.outputs import of_logits
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import CLASSES, SIZE, Tiny


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="spach-package cpp")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    outputs = OutputSpec(top_k=2, softmax=True)
    return tiny_bundles.write(tmp_path / "bundle", Tiny(outputs=outputs, engine="tensorrt-rtx"))


def entries(folder: Path) -> dict[str, list[str]]:
    """model.txt: what stands behind each key."""
    found: dict[str, list[str]] = {}
    for line in (folder / "model" / "model.txt").read_text().splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


def test_it_writes_a_folder_and_says_how_to_build_it(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = package(bundle, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "model      tiny, fp16, batch 1:4:8",
        "engine     tensorrt-rtx 10.8 for sm89",
        f"library    {out}",
        "",
        "Build it and run the self-test:",
        f"  cmake -S {out} -B {out}/build -DTENSORRT_ROOT=DIR",
        f"  cmake --build {out}/build",
        f"  {out}/build/spach_self_test {out}/model",
    ]
    assert sorted(path.name for path in (out / "model").iterdir()) == ["engine.plan", "golden.bin", "model.txt"]
    assert {path.name for path in out.iterdir()} == {
        *(
            "CMakeLists.txt",
            "LICENSE",
            "README.md",
            "cmake",
            "conanfile.py",
            "include",
            "manifest.json",
            "model",
            "src",
            "tools",
            "vcpkg",
        )
    }


def test_it_is_a_subcommand(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(package_command, ["cpp", str(bundle), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_model_txt_says_what_the_manifest_says(bundle: Path, tmp_path: Path) -> None:
    package(bundle, "-o", tmp_path / "out")
    found, plan = entries(tmp_path / "out"), (bundle / PLAN).read_bytes()
    assert (tmp_path / "out" / "model" / "engine.plan").read_bytes() == plan
    golden = (tmp_path / "out" / "model" / "golden.bin").read_bytes()
    assert found == {
        "spach-model": ["1"],
        "name": ["tiny"],
        "precision": ["fp16"],
        "flavour": ["tensorrt-rtx"],
        "version": ["10.8"],
        "version-compatible": ["0"],
        "gpus": ["89"],
        "batch": ["1 4 8"],
        "input": [f"input float32 3 3 {SIZE} {SIZE}"],
        "output": [
            f"logits float32 1 {CLASSES} 0.001 0.01 0.999 0.01",
            f"probabilities float32 1 {CLASSES} 0.001 0.01 0.999 0.01",
            "top_values float32 1 2 0.001 0.01 0.999 0.01",
            "top_indices int64 1 2",
        ],
        "resize": ["9 8"],
        "pillow": found["pillow"],
        "mean": ["0.485 0.456 0.406"],
        "std": ["0.229 0.224 0.225"],
        "plan": [f"{len(plan)} {hashlib.sha256(plan).hexdigest()}"],
        "golden": [f"{len(golden)} {hashlib.sha256(golden).hexdigest()}"],
    }


def test_the_tolerances_are_the_engines_and_not_the_graphs(bundle: Path, tmp_path: Path) -> None:
    """They differ where a GPU may use TF32."""
    manifest = small_bundles.read_manifest(bundle)
    manifest["validation"]["tolerances"]["engine"]["outputs"]["logits"] |= {"rel_l2": 0.5, "max_abs": None}
    small_bundles.write_manifest(bundle, manifest)
    package(bundle, "-o", tmp_path / "out")
    assert entries(tmp_path / "out")["output"][0] == f"logits float32 1 {CLASSES} 0.5 any 0.999 0.01"


@pytest.mark.parametrize("io_dtype", list(IODtype))
def test_golden_bin_is_the_golden_pack(tmp_path: Path, io_dtype: IODtype) -> None:
    outputs = OutputSpec(io_dtype, top_k=2, softmax=True)
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(outputs=outputs, engine="tensorrt-rtx"))
    assert package(bundle, "-o", tmp_path / "out").exit_code == 0
    content = (tmp_path / "out" / "model" / "golden.bin").read_bytes()
    golden = Golden.load(bundle / GOLDEN)
    expected = of_logits(golden.outputs["logits"], outputs)

    assert content[:8] == b"SPACHGLD"
    version, images = struct.unpack_from("<II", content, 8)
    assert (version, images) == (1, len(golden.names))
    at = 16
    for name in golden.names:
        (length,) = struct.unpack_from("<I", content, at)
        assert content[at + 4 : at + 4 + length].decode() == name
        at += 4 + length
    for array in (golden.input, *expected.values()):
        assert content[at : at + array.nbytes] == array.tobytes()
        at += array.nbytes
    assert at == len(content)


def test_labels_are_written_with_the_model(bundle: Path, tmp_path: Path) -> None:
    text = "".join(f"class of {index}\n" for index in range(CLASSES))
    (tmp_path / "labels").write_text(text)
    assert package(bundle, "-o", tmp_path / "out", "--labels", tmp_path / "labels").exit_code == 0
    assert (tmp_path / "out" / "model" / "labels.txt").read_text() == text


def test_labels_of_another_model_are_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("one\ntwo\n")
    sentence = refusal(package(bundle, "-o", tmp_path / "out", "--labels", tmp_path / "labels"))
    assert "has 2 lines; the model has 7 classes" in sentence
    assert not (tmp_path / "out").exists()


def test_the_readme_speaks_of_this_model(bundle: Path, tmp_path: Path) -> None:
    package(bundle, "-o", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("# tiny in C++\n")
    assert "| engine | tensorrt-rtx 10.8 for sm89 |" in text
    assert "@" not in text.replace("@example", "")


def test_json(bundle: Path, tmp_path: Path) -> None:
    result = package(bundle, "-o", tmp_path / "out", "--json")
    content = json.loads(result.stdout)
    assert content["folder"] == str(tmp_path / "out")
    assert (content["model"], content["flavour"], content["gpus"]) == ("tiny", "tensorrt-rtx", ["sm89"])
    assert len(content["commands"]) == 3


# Refusals


def test_a_bundle_without_a_plan_is_refused_with_its_reason(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    sentence = refusal(package(bundle, "-o", tmp_path / "out"))
    assert "has no engine.plan: --engine none was asked for. Export it with --engine tensorrt-rtx" in sentence
    assert not (tmp_path / "out").exists()


def test_a_changed_plan_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / PLAN).write_bytes(b"other")
    assert "engine.plan was changed" in refusal(package(bundle, "-o", tmp_path / "out"), code=1)


def test_no_bundle_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(package(tmp_path / "nowhere", "-o", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "is no bundle" in refusal(package(tmp_path / "empty", "-o", tmp_path / "out"))


def _input(manifest: dict[str, Any]) -> None:
    manifest["inputs"][0]["dtype"] = "bfloat16"


def _two_inputs(manifest: dict[str, Any]) -> None:
    manifest["inputs"] *= 2


def _free_side(manifest: dict[str, Any]) -> None:
    manifest["inputs"][0]["shape"][2] = None


def _bilinear(manifest: dict[str, Any]) -> None:
    manifest["preprocessing"]["interpolation"] = "bilinear"


def _no_tolerance(manifest: dict[str, Any]) -> None:
    del manifest["validation"]["tolerances"]["engine"]["outputs"]["logits"]


def _gpu(manifest: dict[str, Any]) -> None:
    manifest["engine"]["gpus"] = ["Ada"]


def _name(manifest: dict[str, Any]) -> None:
    manifest["model"]["name"] = "two words"


def _line(manifest: dict[str, Any]) -> None:
    manifest["engine"]["version"] = "10.8\nplan 1 0"


def _batch(manifest: dict[str, Any]) -> None:
    manifest["batch"] = {"min": 4, "opt": 2, "max": 8}


def _shape(manifest: dict[str, Any]) -> None:
    manifest["inputs"][0]["shape"] = [None, 3, 9, 9]
    manifest["model"]["image_size"] = manifest["preprocessing"]["image_size"] = 9


FAULTS: dict[Callable[[dict[str, Any]], None], str] = {
    _input: "inputs: input has dtype 'bfloat16', not float32",
    _two_inputs: "has 2 inputs; the C++ library feeds one",
    _free_side: "only the batch may be free",
    _bilinear: "preprocessing: interpolation is 'bilinear', not 'bicubic, antialiased'",
    _no_tolerance: "has no tolerance for the output logits",
    _gpu: "names a GPU 'Ada', which is no compute capability",
    _name: "'two words' is no name that model.txt can hold",
    _line: "is no name that model.txt can hold",
    _batch: "has an entry of the wrong kind",
    _shape: "says of input input: float32 [N, 3, 9, 9]; model.onnx has float32 [N, 3, ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_manifest_that_cpp_cannot_follow_is_refused(
    bundle: Path, tmp_path: Path, fault: Callable[[dict[str, Any]], None]
) -> None:
    manifest = small_bundles.read_manifest(bundle)
    fault(manifest)
    small_bundles.write_manifest(bundle, manifest)
    assert FAULTS[fault] in refusal(package(bundle, "-o", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_golden_pack_that_is_not_finite_is_refused(bundle: Path, tmp_path: Path) -> None:
    golden = Golden.load(bundle / GOLDEN)
    Golden(golden.input, {"logits": golden.outputs["logits"] * np.float32("nan")}, golden.names).save(bundle / GOLDEN)
    manifest = small_bundles.read_manifest(bundle)
    manifest["files"][GOLDEN]["sha256"] = hashlib.sha256((bundle / GOLDEN).read_bytes()).hexdigest()
    small_bundles.write_manifest(bundle, manifest)
    assert "holds answers of another model" in refusal(package(bundle, "-o", tmp_path / "out"))


def test_a_folder_of_its_own_is_replaced_only_with_overwrite(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package(bundle, "-o", out)
    before = contents(out)
    assert "holds a C++ library already. Give --overwrite" in refusal(package(bundle, "-o", out))
    assert contents(out) == before
    assert package(bundle, "-o", out, "--overwrite").exit_code == 0


def test_what_it_did_not_write_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    assert "which is left alone" in refusal(package(bundle, "-o", tmp_path / "mine", "--overwrite"))
    assert "which is left alone" in refusal(package(bundle, "-o", bundle, "--overwrite"))
    assert (bundle / MANIFEST).is_file()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_build_inside_the_folder_goes_with_it(bundle: Path, tmp_path: Path) -> None:
    """What CMake made of the old sources is not mixed with the new ones."""
    out = tmp_path / "out"
    package(bundle, "-o", out)
    (out / "build").mkdir()
    assert package(bundle, "-o", out, "--overwrite").exit_code == 0
    assert not (out / "build").exists()


def test_output_is_needed(bundle: Path) -> None:
    assert "Missing option '-o' / '--output'" in refusal(package(bundle))
