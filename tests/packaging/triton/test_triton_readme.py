"""README.md of a repository: its commands are those of the models in it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from spach_deploy.cli.package_triton import main
from spach_deploy.common.errors import UsageError
from spach_deploy.graph.runtimes import runtimes
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision
from spach_deploy.packaging.triton.check import check_repository
from spach_deploy.packaging.triton.options import (
    Accelerator,
    Backend,
    Device,
    Ensemble,
    EnsembleInput,
    Instances,
    RateLimiter,
    TritonOptions,
    VersionPolicy,
)
from spach_deploy.packaging.triton.repository import write_repository
from spach_deploy.packaging.triton.served_model import BundleArgument
from tests.packaging.kubernetes.bundles import with_engine
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.commands import commands, run
from tests.packaging.triton.tiny_bundles import Tiny
from tests.small_bundles import read_manifest, write_manifest

NEWEST = runtimes().images[-1].reference
GRAPH = Tiny(engine="none")
ACCELERATED = Tiny(precision=Precision.BF16)


def readme(folder: Path, *bundles: Path, **options: Any) -> str:
    """Of a repository of these bundles, one of them named a+b.test; its check finds nothing."""
    arguments = [BundleArgument(bundle) for bundle in bundles]
    repository = write_repository(arguments, folder / "repository", TritonOptions(**options)).path
    assert not check_repository(repository).findings
    return (repository / "README.md").read_text(encoding="utf-8")


def of_one(folder: Path, tiny: Tiny = GRAPH, **options: Any) -> str:
    return readme(folder, tiny_bundles.write(folder / "bundle", tiny), **options)


def test_the_server_starts_in_the_newest_image_that_loads_the_model(tmp_path: Path) -> None:
    (start,) = commands(of_one(tmp_path), "docker run --rm --gpus all --shm-size=128m")
    assert start == (
        "docker run --rm --gpus all --shm-size=128m -p 8000:8000 -p 8001:8001 -p 8002:8002"
        f' -v "$PWD":/models:ro {NEWEST} tritonserver --model-repository=/models'
    )


@pytest.mark.parametrize("compatible", [False, True])
def test_a_plan_starts_where_its_tensorrt_is(tmp_path: Path, compatible: bool) -> None:
    bundle = with_engine(tmp_path / "b", "10.13.2.6", version_compatible=compatible)
    text = readme(tmp_path, bundle)
    newer = [image for image in runtimes().images if image.tensorrt and image.tensorrt.startswith("10.")]
    image = newer[-1] if compatible else runtimes().image("25.08")
    start = commands(text, "docker run --rm --gpus")[0]
    assert f"/models:ro {image.reference} " in start
    assert start.endswith("--backend-config=tensorrt,version-compatible=true") is compatible


def test_models_that_no_image_loads_together_are_told_where_each_loads(tmp_path: Path) -> None:
    plan = with_engine(tmp_path / "plan", "10.13.2.6", Tiny("plan"))
    graph = tiny_bundles.write(tmp_path / "graph", Tiny("half", engine="none", precision=Precision.BF16))
    text = readme(tmp_path, plan, graph)
    assert "No known Triton image loads all of these together:" in text
    assert "- `plan`: Triton 25.08. In " in text
    assert "- `half`: Triton 26.02 to " in text
    assert "/models:ro nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver" in commands(text, "docker")[0]


def test_an_engine_that_no_image_loads_is_told_why(tmp_path: Path) -> None:
    text = readme(tmp_path, with_engine(tmp_path / "b", "99.1.2.3"))
    reason = "and the engine was built with 99\\.1\\.2\\.3\\."
    assert re.search(rf"No known Triton image loads this:\n\n- `tiny`: none that is known\. In \S+, .*{reason}", text)


def test_options_are_in_the_command_that_starts_it(tmp_path: Path) -> None:
    text = of_one(
        tmp_path,
        response_cache=True,
        rate_limiter=RateLimiter.parse(["gpu=2", "tiny_preprocess:core=1:global"], ["tiny:2"]),
        instances=Instances.parse(["3"], Device.CPU),
        ensemble=Ensemble(),
    )
    start = commands(text, "docker run --rm")[0]
    assert "--gpus" not in start
    assert (
        "tritonserver --model-repository=/models --cache-config=local,size=1073741824 --rate-limit=execution" in start
    )
    assert "pip install --no-cache-dir pillow==" in start
    assert "| `tiny` | 2 gpu | 2 |" in text
    assert "| `tiny_preprocess` | 1 core (global) | 1 |" in text
    assert "| 3 on the CPU |" in text


def test_every_tensor_and_batch_is_in_the_lines_of_perf_analyzer(tmp_path: Path) -> None:
    text = of_one(tmp_path, Tiny(engine="none", batch=BatchProfile(1, 4, 8), outputs=OutputSpec(top_k=2)))
    lines = commands(text, "perf_analyzer")
    assert [re.findall(r"-m \S+|-b \d+|--shape \S+", line) for line in lines] == [
        ["-m tiny", f"-b {size}", "--shape input:3,8,8"] for size in (1, 4, 8)
    ]
    (profile,) = commands(text, "model-analyzer")
    assert "--profile-models tiny" in profile
    assert "--run-config-search-max-model-batch-size 8" in profile
    assert "`top_indices` INT64 [2]" in text


def test_an_engine_of_its_own_batches_is_asked_in_them(tmp_path: Path) -> None:
    text = readme(tmp_path, with_engine(tmp_path / "b", tiny=Tiny(batch=BatchProfile(2, 4, 6))))
    lines = commands(text, "perf_analyzer")
    assert [re.findall(r"--shape \S+", line) for line in lines] == [[f"--shape input:{n},3,8,8"] for n in (2, 4, 6)]
    assert not any(" -b " in line for line in lines)
    assert not commands(text, "model-analyzer")  # whose search sets max_batch_size


def test_what_was_verified_is_what_the_manifest_says(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b|undle`", GRAPH)
    manifest = read_manifest(bundle)
    manifest["validation"] |= {"level_sentence": "The graph ran.", "images": "mine\n# forged", "image_count": 7}
    write_manifest(bundle, manifest)
    text = readme(tmp_path, bundle)
    assert (
        "| `tiny` | 1 | `b/undle'`, fp16 | agreed with PyTorch in FP32 (mine\\n# forged, 7 images): The graph ran. |"
        in text
    )
    assert "\n# forged" not in text
    assert "    spach-validate grpc://localhost:8001/tiny/1 --bundle BUNDLE" in text


def test_remarks_on_a_model_are_there_without_the_place_where_its_bundle_was(tmp_path: Path) -> None:
    text = of_one(tmp_path, Tiny(engine="none", precision=Precision.BF16))
    assert "\n- Served as ONNX, by onnxruntime: bundle has no engine. ONNX Runtime has kernels for bfloat16 on" in text
    assert str(tmp_path) not in text


def test_what_no_server_loads_has_no_command_that_starts_one(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "b", Tiny(engine="tensorrt-rtx"))
    options = TritonOptions(Backend.TENSORRT)
    repository = write_repository([BundleArgument(bundle)], tmp_path / "repository", options).path
    text = (repository / "README.md").read_text()
    assert "It is to be read, not served" in text
    assert not commands(text, "docker")
    assert not commands(text, "perf_analyzer")


# The way back


def versions(folder: Path, count: int, **options: Any) -> str:
    bundles = [tiny_bundles.write(folder / f"b{i}", Tiny(engine="none", seed=i)) for i in range(count)]
    return readme(folder, *bundles, **options)


@pytest.mark.parametrize("policy", [None, "all", "latest:2"])
def test_the_way_back_is_a_move_that_the_check_takes(tmp_path: Path, policy: str | None) -> None:
    text = versions(tmp_path, 3, version_policy=VersionPolicy.parse(policy) if policy else None)
    (move,) = commands(text, "mv")
    assert move == "mv tiny/3 ../tiny-version-3"
    assert run(move, tmp_path / "repository").returncode == 0
    assert not check_repository(tmp_path / "repository").findings
    assert sorted(path.name for path in (tmp_path / "repository" / "tiny").glob("[0-9]")) == ["1", "2"]


def test_the_way_back_of_a_policy_that_names_versions_is_another_policy(tmp_path: Path) -> None:
    text = versions(tmp_path, 2, version_policy=VersionPolicy.parse("specific:2"))
    (line,) = re.findall(r"write `(version_policy .*?)` in tiny/config.pbtxt", text)
    config = tmp_path / "repository" / "tiny" / "config.pbtxt"
    config.write_text(re.sub(r"version_policy \{\n.*?\n\}\n", f"{line}\n", config.read_text(), flags=re.DOTALL))
    assert line in config.read_text()
    assert not check_repository(tmp_path / "repository").findings


def test_one_version_has_no_way_back_but_the_folder_before(tmp_path: Path) -> None:
    text = versions(tmp_path, 1)
    assert not commands(text, "mv")
    assert "    spach-package triton tiny=OLD_BUNDLE tiny=NEW_BUNDLE -o REPO\n" in text


def test_the_command_for_two_versions_has_the_options_of_this_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its other models, which options may name; run, it writes the same configurations."""
    (tmp_path / "names.txt").write_text("".join(f"animal {n}\n" for n in range(tiny_bundles.CLASSES)))
    given = shlex.split(
        "--instances 2 --instances one_preprocess:3 --rate-limit-resource gpu=2 --rate-limit-priority two:2 --gpus 0,1"
        " --device gpu --backend onnxruntime --queue-delay-us 70 --response-cache --no-warm-up --ensemble --top-k 2"
        " --version-policy latest:2"
    )
    tiny = [tiny_bundles.write(tmp_path / f"b{i}", Tiny(engine="none", seed=i)) for i in range(3)]
    labels = ["--labels", str(tmp_path / "names.txt")]
    done = CliRunner().invoke(
        main, [f"one={tiny[0]}", f"two={tiny[1]}", "-o", str(tmp_path / "repository"), *given, *labels]
    )
    assert done.exit_code == 0, done.output
    command = commands((tmp_path / "repository" / "README.md").read_text(), "spach-package")[0]
    words = shlex.split(command)[2:]
    assert words[:3] == ["one=OLD_BUNDLE", "one=NEW_BUNDLE", "two=BUNDLE"]
    words = [word.replace("OLD_BUNDLE", str(tiny[0])).replace("NEW_BUNDLE", str(tiny[2])) for word in words]
    words = [word.replace("two=BUNDLE", f"two={tiny[1]}").replace("REPO", str(tmp_path / "again")) for word in words]
    monkeypatch.chdir(tmp_path / "repository")
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    for config in (tmp_path / "repository").rglob("config.pbtxt"):
        other = tmp_path / "again" / config.relative_to(tmp_path / "repository")
        assert other.read_text() == config.read_text()
    assert (tmp_path / "again" / "two" / "labels.txt").read_text().startswith("animal 0\n")


def test_the_engines_that_tensorrt_compiles_are_kept_in_a_volume(tmp_path: Path) -> None:
    text = of_one(tmp_path, ACCELERATED, accelerator=Accelerator.TENSORRT)
    volume = r" -v (engines-tiny-[0-9a-f]{12}):%s/tiny-[0-9a-f]{12} nvcr"
    assert re.search(r' -v "\$PWD":/models:ro' + volume % "/tmp", commands(text, "docker run")[0])
    assert "TensorRT inside Triton was not compared" in text
    other = of_one(tmp_path / "other", ACCELERATED, accelerator=Accelerator.TENSORRT, engine_cache="/var/cache/engines")
    assert re.search(volume % "/var/cache/engines", commands(other, "docker run")[0])
    assert "    spach-package triton tiny=OLD_BUNDLE tiny-new=NEW_BUNDLE -o REPO --accelerator tensorrt" in text
    plain = of_one(tmp_path / "plain")
    assert "-v engines" not in plain
    assert "was not compared" not in plain


@pytest.mark.parametrize("folder", ["/models", "/models/engines", "/engines/../models/x"])
def test_engines_cannot_be_kept_where_the_repository_is(folder: str) -> None:
    with pytest.raises(UsageError, match="is below /models, where the server has the repository, read-only"):
        TritonOptions(accelerator=Accelerator.TENSORRT, engine_cache=folder)


def test_an_ensemble_that_takes_pixels_has_its_lines_of_perf_analyzer(tmp_path: Path) -> None:
    tiny = Tiny(engine="none", batch=BatchProfile(1, 1, 8), outputs=OutputSpec(IODtype.UINT8))
    text = of_one(tmp_path, tiny, ensemble=Ensemble(EnsembleInput.PIXELS))
    lines = [line for line in commands(text, "perf_analyzer") if "-m tiny_ensemble" in line]
    assert [re.findall(r"-b \d+|--shape \S+", line) for line in lines] == [
        [f"-b {size}", "--shape pixels:8,8,3"] for size in (1, 8)
    ]
    assert "pictures.json" not in text


def test_pictures_become_what_perf_analyzer_reads(tmp_path: Path) -> None:
    text = of_one(tmp_path, ensemble=Ensemble())
    (lines,) = re.findall(r"    python3 - picture.*?\n    END\n", text, re.DOTALL)
    (tmp_path / "picture.jpg").write_bytes(b"abc")
    (tmp_path / "another.jpg").write_bytes(b"")
    done = run(re.sub(r"^    ", "", lines, flags=re.MULTILINE), tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "pictures.json").read_text())["data"]
    assert found[0] == {"image": {"content": {"b64": "AwAAAGFiYw=="}, "shape": [1]}}
    assert len(found) == 2
    assert "-m tiny_ensemble" in commands(text, "perf_analyzer")[-1]
