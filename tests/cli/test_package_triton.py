"""spach-package triton as a user calls it: what it prints, exit codes, refusals in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.cli.package import main
from spach_deploy.options.specs import IODtype, OutputSpec
from tests.commands import ROOT, console_script, refusal
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny


def package(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="spach-package")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundles.write(tmp_path / "bundle")


@pytest.fixture
def rtx_bundle(tmp_path: Path) -> Path:
    return tiny_bundles.write(tmp_path / "rtx", Tiny(engine="tensorrt-rtx"))


def test_a_repository_is_written_and_its_check_finds_nothing(bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    written = package("triton", bundle, "-o", repository)
    assert written.exit_code == 0
    assert written.stdout.splitlines() == [
        "model       tiny, tensorrt_plan",
        f"versions    1 from {bundle}",
        "takes       input FP32 [3, 8, 8]",
        "gives       logits FP32 [7]",
        "batch       1 to 8, tuned for 4",
        "",
        "Serve it:",
        f"  tritonserver --model-repository {repository}",
    ]
    assert written.stderr == ""
    checked = package("triton", "--check", repository)
    assert checked.exit_code == 0
    assert checked.stdout == f"{repository}: 1 model, nothing found.\n"


def test_a_folders_name_ends_no_line(tmp_path: Path) -> None:
    """Else it could say what the command did not."""
    bundle = tiny_bundles.write(tmp_path / "b\nmodel       forged")
    repository = tmp_path / "r\nmodel       forged"
    for arguments in (
        ("triton", bundle, "-o", repository),
        ("triton", "--check", repository),
        ("cpp", repository, "-o", "x"),
    ):
        said = package(*arguments).output
        assert "forged" in said
        assert not any(line.startswith("model       forged") for line in said.splitlines())


def test_a_finding_is_exit_1(bundle: Path, tmp_path: Path) -> None:
    package("triton", bundle, "-o", tmp_path / "models")
    (tmp_path / "models" / "tiny" / "labels.txt").unlink()
    checked = package("triton", "--check", tmp_path / "models", "--json")
    assert checked.exit_code == 1
    assert json.loads(checked.stdout)["findings"][0]["file"] == "tiny/labels.txt"


def test_a_plan_of_rtx_gives_way_to_the_graph(rtx_bundle: Path, tmp_path: Path) -> None:
    written = package("triton", rtx_bundle, "-o", tmp_path / "models")
    assert written.exit_code == 0
    assert "onnxruntime_onnx" in written.stdout
    assert "does not load plans of TensorRT for RTX" in written.stdout


@pytest.mark.parametrize("option", ["--backend=tensorrt", "--force"])
def test_asked_for_it_is_written_and_checked_with_a_warning(rtx_bundle: Path, tmp_path: Path, option: str) -> None:
    written = package("triton", rtx_bundle, "-o", tmp_path / "models", option)
    assert written.exit_code == 0
    assert "tensorrt_plan" in written.stdout
    assert written.stderr.startswith("Warning: ")
    assert written.stdout.endswith("It is to be read, not served.\n")
    checked = package("triton", "--check", tmp_path / "models")
    assert checked.exit_code == 0
    assert "warning: found a plan of TensorRT for RTX" in checked.stdout


def test_every_option_reaches_the_repository(bundle: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"name {index}\n" for index in range(7)))
    options = "--backend onnxruntime --instances 2 --gpus 0,1 --queue-delay-us 9 --version-policy all --response-cache"
    options += " --instances first_preprocess:5 --rate-limit-resource gpu=1 --rate-limit-priority first:3"
    options += f" --no-warm-up --ensemble --top-k 3 --labels {names} --device gpu"
    written = package("triton", f"first={bundle}", "-o", tmp_path / "models", *options.split())
    assert written.exit_code == 0, written.stderr
    assert "--cache-config=local,size=1073741824" in written.stdout
    text = (tmp_path / "models" / "first" / "config.pbtxt").read_text()
    for line in (
        "count: 2",
        "kind: KIND_GPU",
        "gpus: [0, 1]",
        "max_queue_delay_microseconds: 9",
        "enable: true",
        'name: "gpu"',
        "priority: 3",
    ):
        assert line in text
    assert "count: 5" in (tmp_path / "models" / "first_preprocess" / "config.pbtxt").read_text()
    assert "model_warmup" not in text
    assert (tmp_path / "models" / "first" / "labels.txt").read_text() == names.read_text()
    assert "dims: [3]" in (tmp_path / "models" / "first_ensemble" / "config.pbtxt").read_text()


def test_pixels_go_in_where_the_model_takes_them(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(outputs=OutputSpec(IODtype.UINT8)))
    written = package("triton", bundle, "-o", tmp_path / "m", "--ensemble", "--ensemble-input", "pixels", "--json")
    assert json.loads(written.stdout)["steps"] == ["tiny_top_k", "tiny_ensemble"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Nothing to do."),
        (["BUNDLE"], "Nothing to do."),
        (["-o", "x"], "Nothing to do."),
        (["BUNDLE", "--check", "x"], "takes neither bundles nor --output"),
        (["nowhere", "-o", "x"], "nowhere does not exist"),
        (["BUNDLE", "-o", "x", "--gpus", "zero"], "--gpus 'zero' is no list of GPUs"),
        (["BUNDLE", "-o", "x", "--gpus", "0,0"], "--gpus '0,0' is no list of GPUs"),
        (["BUNDLE", "-o", "x", "--instances", "0"], "--instances 0 serves nothing"),
        (["BUNDLE", "-o", "x", "--instances", "tiny_preprocess:2"], "--instances names tiny_preprocess"),
        (["BUNDLE", "-o", "x", "--rate-limit-resource", "gpu"], "--rate-limit-resource 'gpu' is no resource"),
        (["BUNDLE", "-o", "x", "--rate-limit-priority", "first"], "--rate-limit-priority first is no priority"),
        (["BUNDLE", "-o", "x", "--device", "cpu", "--gpus", "1"], "--gpus contradicts --device cpu"),
        (["BUNDLE", "-o", "x", "--version-policy", "best"], "--version-policy 'best' is none"),
        (["BUNDLE", "-o", "x", "--top-k", "3"], "--top-k needs --ensemble"),
        (["BUNDLE", "-o", "x", "--ensemble-input", "pixels"], "--ensemble-input needs --ensemble"),
        (["BUNDLE", "-o", "x", "--backend", "pytorch"], "'pytorch' is not one of"),
        (["BUNDLE", "-o", "x", "--labels", "nowhere.txt"], "--labels nowhere.txt cannot be read"),
        (["--check", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    bundle: Path, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    given = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    assert sentence in refusal(package("triton", *given))
    assert not Path("x").exists()


def test_a_bundle_without_an_engine_has_no_plan_to_serve(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="none"))
    sentence = refusal(package("triton", bundle, "-o", tmp_path / "models", "--backend", "tensorrt"))
    assert "has no engine for --backend tensorrt" in sentence
    assert "--backend onnxruntime" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["tritn"], "No such command 'tritn'"), (["--nope"], "No such option"), (["triton", "--nope"], "No such option")],
)
def test_the_group_refuses_in_one_sentence_too(arguments: list[str], sentence: str) -> None:
    assert sentence in refusal(package(*arguments))


def test_help_lists_the_subcommands_that_are_there() -> None:
    result = package("--help")
    assert result.exit_code == 0
    assert "  triton " in result.stdout


def test_help_of_the_subcommand_loads_nothing_heavy() -> None:
    program = (
        "import atexit, sys; sys.argv = ['spach-package', 'triton', '--help'];"
        "atexit.register(lambda: print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr));"
        "from spach_deploy.cli.package import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--ensemble" in done.stdout
    assert not [name for name in ("numpy", "onnx", "torch", "google", "PIL") if f"'{name}'" in done.stderr]


def test_the_script_that_pip_makes_starts(tmp_path: Path, bundle: Path) -> None:
    script = console_script("spach-package", tmp_path)
    call = [str(script), "triton", str(bundle), "-o", str(tmp_path / "models")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny, tensorrt_plan" in done.stdout
