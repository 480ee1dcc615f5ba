"""The library as its users compile and run it, on a test double of TensorRT and CUDA that runs the graph."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from spach_deploy.bundle.store import GRAPH
from spach_deploy.cli.package import main as package_command
from spach_deploy.data.preprocess import pixels, to_input
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision, Preprocessing, channel_statistics
from spach_deploy.packaging.cpp.folder import write_folder
from tests import small_bundles
from tests.docs.pages import section_commands
from tests.packaging.cpp import models, plans
from tests.packaging.cpp.builds import UNITY, Build
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import CLASSES, RESIZE, SIZE, Tiny

pytestmark = pytest.mark.cpp

README = Path(__file__).parents[3] / "README.md"


def save(array: npt.NDArray[Any], path: Path) -> Path:
    path.write_bytes(np.ascontiguousarray(array).tobytes())
    return path


# The self-test


def test_the_self_test_passes_on_a_real_model(plain: Build, tmp_path: Path) -> None:
    """A small hybrid, exported for real in FP16 with every output: its engine is the graph, rounded as it is."""
    bundle = small_bundles.copy(small_bundles.bundle(Precision.FP16), tmp_path / "bundle")
    plans.give_plan(bundle)
    write_folder(bundle, tmp_path / "package")
    result = plain.run("spach_self_test", tmp_path / "package" / "model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "small_hybrid, fp16, tensorrt-rtx 1.7.1, built by 1.7.1.6"
    assert "8 golden images against PyTorch in FP32, in batches of 1 8" in result.stdout
    assert result.stdout.endswith("\nPASSED\n")
    for output in ("logits", "probabilities", "top_values", "top_indices"):
        assert output in result.stdout


@pytest.mark.parametrize("io_dtype", list(IODtype))
def test_the_self_test_passes_for_every_interface(plain: Build, tmp_path: Path, io_dtype: IODtype) -> None:
    tiny = dataclasses.replace(models.EVERY, outputs=OutputSpec(io_dtype, top_k=2, softmax=True))
    result = plain.run("spach_self_test", models.model(tmp_path, tiny))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda w: w * 1.01, "relative L2 is 0.01; 0.001 is allowed"),
        (lambda w: w[:, ::-1].copy(), "an image changes class although the reference prefers its own"),
        (lambda w: -w, "the smallest cosine is below what is required"),
        (lambda w: w * np.float32("nan"), "it has numbers that are not finite"),
        (lambda w: w * 0, "relative L2 is 1; 0.001 is allowed"),
        (lambda w: np.roll(w, 1, axis=1), "classes are ranked differently by more than a tie"),
    ],
)
def test_the_self_test_fails_on_a_wrong_engine(plain: Build, tmp_path: Path, change: Any, finding: str) -> None:
    """A validation that cannot fail is a defect: engines whose numbers are wrong, each in its own way."""
    model = models.model(tmp_path)
    models.replace_plan(model, tmp_path / "bundle", models.graph_with_weights(tmp_path / "bundle", change))
    result = plain.run("spach_self_test", model)
    assert result.returncode == 1, result.stderr
    assert f"FAILED: {finding}" in result.stdout
    assert result.stdout.endswith("\nFAILED\n")


def test_a_reference_of_zeros_proves_nothing(plain: Build, tmp_path: Path) -> None:
    model = models.model(tmp_path, Tiny(engine="tensorrt-rtx"))
    models.replace_plan(model, tmp_path / "bundle", models.graph_with_weights(tmp_path / "bundle", lambda w: w * 0))
    golden = (model / "golden.bin").read_bytes()
    (model / "golden.bin").write_bytes(golden[: -4 * 4 * CLASSES] + bytes(4 * 4 * CLASSES))
    models.refresh(model, tmp_path / "bundle")
    result = plain.run("spach_self_test", model)
    assert result.returncode == 1
    assert "the reference is zero everywhere, which proves nothing" in result.stdout


def test_the_self_test_compares_outputs_by_what_they_are(plain: Build, tmp_path: Path) -> None:
    for name, tiny in (("vector", tiny_bundles.EMBEDDING), ("scores", tiny_bundles.RENAMED)):
        result = plain.run("spach_self_test", models.model(tmp_path / name, tiny))
        assert result.returncode == 0, result.stdout + result.stderr
        assert (result.stdout.count("images that change class"), name in result.stdout) == (
            2 * (name == "scores"),
            True,
        )


# Numbers and batches


def test_a_model_without_logits_gives_its_embedding(plain: Build, tmp_path: Path) -> None:
    tiny = tiny_bundles.EMBEDDING
    model = models.model(tmp_path, tiny)
    images = tiny_bundles.samples(tiny, 3, seed=3)
    given, out = save(images, tmp_path / "input"), tmp_path / "vector"
    result = plain.run("probe", "output", model, "vector", given, 3, out)
    assert (result.returncode, result.stdout) == (0, "0 classes\n")
    wanted = tiny_bundles.logits(tiny, images)
    np.testing.assert_allclose(np.fromfile(out, np.float32).reshape(3, CLASSES), wanted, rtol=1e-4, atol=1e-3)
    for question in (("output", model, "logits", given, 3, out), ("logits", model, given, 3, out)):
        assert "no such output" in plain.run("probe", *question).stdout


@pytest.mark.parametrize("io_dtype", list(IODtype))
def test_host_memory_device_memory_and_batches_give_the_same_numbers(
    plain: Build, tmp_path: Path, io_dtype: IODtype
) -> None:
    tiny = Tiny(outputs=OutputSpec(io_dtype), engine="tensorrt-rtx", batch=BatchProfile(2, 4, 6))
    model = models.model(tmp_path, tiny)
    images = tiny_bundles.samples(tiny, 15, seed=3)
    wanted = tiny_bundles.logits(tiny, images)
    answers = np.float16 if io_dtype is IODtype.FP16 else np.float32
    rtol, atol = (2e-3, 2e-2) if io_dtype is IODtype.FP16 else (1e-4, 1e-3)

    whole = save(images, tmp_path / "input")
    result = plain.run("probe", "logits", model, whole, 15, tmp_path / "logits")  # 6, 6, and 3 filled up to none
    assert result.returncode == 0, result.stdout
    np.testing.assert_allclose(
        np.fromfile(tmp_path / "logits", np.float32).reshape(15, CLASSES), wanted, rtol=rtol, atol=atol
    )
    part = save(images[:5], tmp_path / "part")
    for question, name in (("run", "run.logits"), ("enqueue", "enqueue")):
        out = tmp_path / ("run" if question == "run" else "enqueue")
        assert plain.run("probe", question, model, part, 5, out).returncode == 0
        got = np.fromfile(tmp_path / name, answers).reshape(5, CLASSES)
        np.testing.assert_allclose(got.astype(np.float32), wanted[:5], rtol=rtol, atol=atol)


def test_one_image_is_filled_up_to_the_smallest_batch(plain: Build, tmp_path: Path) -> None:
    tiny = Tiny(engine="tensorrt-rtx", batch=BatchProfile(4, 4, 4))
    images = tiny_bundles.samples(tiny, 1)
    out = tmp_path / "out"
    result = plain.run("probe", "logits", models.model(tmp_path, tiny), save(images, tmp_path / "input"), 1, out)
    assert result.returncode == 0, result.stdout
    np.testing.assert_allclose(np.fromfile(out, np.float32), tiny_bundles.logits(tiny, images)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("question", ["run", "enqueue"])
@pytest.mark.parametrize("batch", [-1, 0, 1, 7])
def test_a_batch_outside_the_profile_is_refused(plain: Build, tmp_path: Path, question: str, batch: int) -> None:
    tiny = Tiny(engine="tensorrt-rtx", batch=BatchProfile(2, 4, 6))
    images = save(tiny_bundles.samples(tiny, 8), tmp_path / "input")
    result = plain.run("probe", question, models.model(tmp_path, tiny), images, batch, tmp_path / "out")
    assert result.returncode == 1
    assert result.stdout == f"bad argument: A batch of {batch} is outside the plan's profile, 2 to 6.\n"


def test_an_input_of_another_size_is_refused(plain: Build, model: Path, tmp_path: Path) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 3), tmp_path / "input")
    result = plain.run("probe", "run", model, images, 2, tmp_path / "out")
    assert result.stdout == "bad argument: A batch of 2 has 1536 bytes, not 2304.\n"


def test_top_k_ranks_as_the_graph_does_and_labels(plain: Build, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"Gattung Nr. {index}, grün\n" for index in range(CLASSES)), encoding="utf-8")
    model = models.package(tmp_path, labels=labels) / "model"
    picture = np.random.default_rng(5).integers(0, 256, (14, 11, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.ppm")
    result = plain.run("spach_classify", "-m", model, "-k", 3, tmp_path / "picture.ppm")
    assert result.returncode == 0, result.stderr

    preprocessing = Preprocessing(SIZE, RESIZE)
    inputs = to_input(pixels(Image.fromarray(picture), preprocessing)[None], preprocessing)
    logits = tiny_bundles.logits(models.EVERY, inputs)[0].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-logits)[:3]
    wanted = [f"  {100 * probabilities[i]:6.2f}%  {i:4d}  Gattung Nr. {i}, grün" for i in best]
    assert result.stdout.splitlines() == [str(tmp_path / "picture.ppm"), *wanted]


@pytest.mark.parametrize("io_dtype", [IODtype.FP32, IODtype.UINT8])
def test_grey_rectangles_are_tested_and_classified(plain: Build, tmp_path: Path, io_dtype: IODtype) -> None:
    transform = Preprocessing.for_size((6, 10), *channel_statistics(1), crop=1, interpolation="bilinear")
    tiny = Tiny(outputs=OutputSpec(io_dtype), engine="tensorrt-rtx", preprocessing=transform)
    model = models.model(tmp_path, tiny)
    result = plain.run("spach_self_test", model)
    assert result.returncode == 0, result.stdout + result.stderr
    picture = np.random.default_rng(5).integers(0, 256, (14, 11, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.ppm")
    result = plain.run("spach_classify", "-m", model, "-k", 3, tmp_path / "picture.ppm")
    inputs = to_input(pixels(Image.fromarray(picture), transform)[None], transform, io_dtype)
    best = np.argsort(-tiny_bundles.logits(tiny, inputs)[0])[:3]
    assert [line.split()[-1] for line in result.stdout.splitlines()[1:]] == [str(index) for index in best]


def test_without_labels_a_class_has_its_number(plain: Build, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "picture.ppm")
    result = plain.run("spach_classify", "-m", model, "-k", 99, tmp_path / "picture.ppm")
    assert sorted(line.split()[-2:] for line in result.stdout.splitlines()[1:]) == [["class", str(i)] for i in range(7)]


# Memory, and batches in flight


def test_an_engine_from_memory_is_checked_and_runs_as_that_of_a_folder(
    plain: Build, asan: Build, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"class {index}\n" for index in range(CLASSES)))
    model = models.package(tmp_path, labels=labels) / "model"
    images = save(tiny_bundles.samples(models.EVERY, 3), tmp_path / "input")
    assert plain.run("probe", "run", model, images, 3, tmp_path / "run").returncode == 0
    result = asan.run("probe", "memory", model, images, 3, tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "The engine was loaded from memory: give its golden pack, as parse_golden reads it.\n"
        f"passed 1, labels {CLASSES}, folder ''\n"
    )
    assert (tmp_path / "out").read_bytes() == (tmp_path / "run.logits").read_bytes()
    flip(model / "engine.plan", 3000)
    assert "changed file: engine.plan was changed" in asan.run("probe", "memory", model, images, 3, tmp_path).stdout


def test_batches_in_flight_get_the_answers_of_their_own_slot(
    plain: Build, asan: Build, model: Path, tmp_path: Path
) -> None:
    images = tiny_bundles.samples(models.EVERY, 7, seed=3)
    given = save(images, tmp_path / "input")
    for build in (plain, asan):
        result = build.run("probe", "flight", model, given, 7, tmp_path / "out")
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
        assert result.stdout == "Nothing was submitted in slot 5.\nThere is no slot 16; they are 0 to 15.\n"
        got = np.fromfile(tmp_path / "out", np.float32).reshape(7, CLASSES)
        np.testing.assert_allclose(got, tiny_bundles.logits(models.EVERY, images), rtol=1e-4, atol=1e-3)


def test_the_gpu_reads_where_the_caller_wrote(plain: Build, model: Path, tmp_path: Path) -> None:
    """No second copy: what is written to a slot too late is what is read. The double's stream does its work late."""
    images = tiny_bundles.samples(models.EVERY, 2, seed=3)
    result = plain.run("probe", "late", model, save(images, tmp_path / "input"), tmp_path / "out")
    assert result.returncode == 0, result.stdout
    wanted = tiny_bundles.logits(models.EVERY, images)[1]
    np.testing.assert_allclose(np.fromfile(tmp_path / "out", np.float32), wanted, rtol=1e-4, atol=1e-3)


# The log


def test_what_tensorrt_says_reaches_the_callback_and_nothing_that_it_throws(asan: Build, model: Path) -> None:
    result = asan.run("probe", "log", model, SPACH_DOUBLE_GPU="75")
    assert (result.returncode, result.stdout) == (
        0,
        "error: Target compute capability not supported on device.\n0 0 0\n",
    ), result.stderr


# Errors


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda m: cut(m / "engine.plan", 2000), "truncated: engine.plan has only 2000 of the"),
    "header only": (lambda m: cut(m / "engine.plan", 30), "truncated: engine.plan has only 30 of the"),
    "empty": (lambda m: cut(m / "engine.plan", 0), "truncated: engine.plan is empty."),
    "longer": (lambda m: append(m / "engine.plan"), "changed file: engine.plan has more than the"),
    "one bit": (lambda m: flip(m / "engine.plan", 3000), "changed file: engine.plan was changed: its SHA-256"),
    "no plan": (lambda m: flip(m / "engine.plan", 0), "not a plan: engine.plan does not begin as TensorRT plans do."),
    "gone": (lambda m: (m / "engine.plan").unlink(), "bad file: "),
    "no text": (lambda m: (m / "model.txt").unlink(), "bad file: "),
    "labels": (lambda m: (m / "labels.txt").write_text("one\n"), "bad file: labels.txt has 1 lines; the model has 7"),
}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_spoiled_folder_is_refused_with_the_reason(plain: Build, model: Path, tmp_path: Path, name: str) -> None:
    spoil, reason = REFUSALS[name]
    folder = small_bundles.copy(model, tmp_path / "model")
    spoil(folder)
    result = plain.run("probe", "load", folder, 0, SPACH_DOUBLE_DEVICES="0")
    assert result.returncode == 1
    assert result.stdout.startswith(reason)
    assert plain.run("spach_self_test", folder).returncode in (1, 2)


def test_the_plan_of_the_other_flavour_is_refused_by_name(plain: Build, tmp_path: Path) -> None:
    result = plain.run("probe", "load", models.model(tmp_path, flavour="tensorrt"), 0)
    assert result.stdout == (
        "other TensorRT flavour: engine.plan was built by tensorrt, and this program is linked with tensorrt-rtx.\n"
    )


@pytest.mark.parametrize("version", ["10700", "10702", "10801", "20000"])
def test_another_version_is_refused_before_tensorrt_sees_the_plan(plain: Build, model: Path, version: str) -> None:
    # That there is no GPU would be found out first by anything that asks for one.
    result = plain.run("probe", "load", model, 0, SPACH_DOUBLE_VERSION=version, SPACH_DOUBLE_DEVICES="0")
    assert result.returncode == 1
    assert result.stdout.startswith("other TensorRT version: engine.plan was built by tensorrt-rtx 1.7.1, and this")


@pytest.mark.parametrize(("version", "loads"), [("10700", False), ("10701", True), ("10800", True)])
def test_a_version_compatible_plan_loads_in_later_versions(
    plain: Build, model: Path, tmp_path: Path, version: str, loads: bool
) -> None:
    folder = small_bundles.copy(model, tmp_path / "model")
    text = (folder / "model.txt").read_text().replace("version-compatible 0", "version-compatible 1")
    (folder / "model.txt").write_text(text)
    result = plain.run("probe", "load", folder, 0, SPACH_DOUBLE_VERSION=version)
    assert (result.stdout == "loaded\n") is loads
    assert loads or "or a later one" in result.stdout


def test_a_plan_for_other_gpus_says_which(plain: Build, model: Path) -> None:
    result = plain.run("spach_self_test", model, SPACH_DOUBLE_GPU="75")
    assert result.returncode == 3
    assert result.stderr == (
        "Error: wrong GPU. The plan is for sm86, sm89, and this GPU is sm75. "
        "Target compute capability not supported on device.\n"
    )


def test_without_a_gpu_it_says_so(plain: Build, model: Path) -> None:
    result = plain.run("spach_self_test", model, SPACH_DOUBLE_DEVICES="0")
    assert result.returncode == 3
    assert result.stderr == (
        "Error: no GPU. No NVIDIA GPU with a working driver was found: CUDA driver version is insufficient for CUDA "
        "runtime version.\n"
    )


def test_a_device_that_is_not_there_is_refused(plain: Build, model: Path) -> None:
    assert plain.run("probe", "load", model, 1, SPACH_DOUBLE_DEVICES="2").stdout == "loaded\n"
    for device in ("-1", "2"):
        result = plain.run("probe", "load", model, device, SPACH_DOUBLE_DEVICES="2")
        assert result.stdout == f"bad argument: There is no CUDA device {device}; there are 2.\n"


def test_a_plan_that_is_not_what_model_txt_says_is_refused(plain: Build, model: Path, tmp_path: Path) -> None:
    """The hash fits, the interface does not: sizes that buffers are made from must not be believed."""
    lies = {
        "output logits float32 1 7": "output logits float32 1 8",
        "output logits float32 1 7 ": "output logits float16 1 7 ",
        "output top_indices int64 1 3": "output top_indexes int64 1 3",
        "batch 1 4 8": "batch 1 4 9",
        "output top_indices int64 1 3\n": "",
        "input input float32 3 3 8 8\n": "input input float16 3 3 8 8\n",
    }
    for number, (truth, lie) in enumerate(lies.items()):
        folder = small_bundles.copy(model, tmp_path / str(number))
        text = (folder / "model.txt").read_text()
        assert truth in text
        (folder / "model.txt").write_text(text.replace(truth, lie))
        result = plain.run("probe", "load", folder, 0)
        assert result.stdout.startswith("changed file: The plan "), (lie, result.stdout)


def test_a_golden_pack_that_was_changed_is_refused(plain: Build, model: Path, tmp_path: Path) -> None:
    spoils: tuple[Callable[[Path], None], ...] = (lambda f: cut(f, 500), append, lambda f: flip(f, 400))
    for number, spoil in enumerate(spoils):
        folder = small_bundles.copy(model, tmp_path / str(number))
        spoil(folder / "golden.bin")
        result = plain.run("spach_self_test", folder)
        assert result.returncode == 1
        assert "golden.bin" in result.stderr


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("createInferRuntime", "TensorRT error. TensorRT's runtime could not be created."),
        ("createExecutionContext", "TensorRT error. createExecutionContext: told to fail."),
        ("enqueueV3", "TensorRT error. enqueueV3: told to fail."),
        ("cudaMalloc", "out of memory. cudaMalloc: out of memory."),
        ("cudaMallocHost", "out of memory. cudaMallocHost: out of memory."),
        ("cudaMemcpyAsync", "CUDA error. cudaMemcpyAsync: invalid argument."),
        ("cudaStreamCreateWithFlags", "out of memory. cudaStreamCreateWithFlags: out of memory."),
        ("cudaStreamSynchronize", "CUDA error. cudaStreamSynchronize: unspecified launch failure."),
    ],
)
def test_a_failing_call_is_an_error_and_leaks_nothing(asan: Build, model: Path, function: str, reason: str) -> None:
    """AddressSanitizer watches: whatever was made before the failure is given back."""
    result = asan.run("spach_self_test", model, SPACH_DOUBLE_FAIL=f"{function}:1")
    assert result.returncode == 3, result.stderr
    assert result.stderr == f"Error: {reason}\n"


@pytest.mark.parametrize("call", [2, 3, 4, 5])
@pytest.mark.parametrize("function", ["cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync"])
def test_a_later_call_that_fails_leaks_nothing_either(asan: Build, model: Path, function: str, call: int) -> None:
    result = asan.run("spach_self_test", model, SPACH_DOUBLE_FAIL=f"{function}:{call}")
    assert result.returncode == 3, result.stderr


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("cudaEventCreateWithFlags", "out of memory: cudaEventCreateWithFlags: out of memory."),
        ("cudaEventRecord", "CUDA error: cudaEventRecord: invalid argument."),
        ("cudaEventSynchronize", "CUDA error: cudaEventSynchronize: unspecified launch failure."),
        ("enqueueV3", "TensorRT error: enqueueV3: told to fail."),
    ],
)
def test_a_batch_in_flight_that_fails_is_an_error_and_leaks_nothing(
    asan: Build, model: Path, tmp_path: Path, function: str, reason: str, call: int
) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 4), tmp_path / "input")
    fails = f"{function}:{call}"
    result = asan.run("probe", "flight", model, images, 4, tmp_path / "out", SPACH_DOUBLE_FAIL=fails)
    assert (result.returncode, result.stdout, result.stderr) == (1, f"{reason}\n", "")


# Threads


def test_eight_threads_with_a_context_each_do_not_disturb_one_another(
    plain: Build, model: Path, tmp_path: Path
) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 12), tmp_path / "input")
    result = plain.run("probe", "threads", model, images, 12, 8, 100)
    assert result.returncode == 0
    assert result.stdout == "2000 answered, 0 wrong\n"


def test_eight_threads_under_address_sanitizer(asan: Build, model: Path, tmp_path: Path) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 12), tmp_path / "input")
    result = asan.run("probe", "threads", model, images, 12, 8, 20)
    assert (result.returncode, result.stdout) == (0, "400 answered, 0 wrong\n"), result.stderr[-3000:]


def test_eight_threads_under_thread_sanitizer(tsan: Build, tmp_path: Path) -> None:
    """For ordinary TensorRT: the same sources, the other flavour."""
    model = models.model(tmp_path, flavour="tensorrt")
    images = save(tiny_bundles.samples(models.EVERY, 12), tmp_path / "input")
    result = tsan.run("probe", "threads", model, images, 12, 8, 20)
    assert (result.returncode, result.stdout) == (0, "400 answered, 0 wrong\n"), result.stderr[-3000:]


def test_one_context_in_many_threads_is_refused_and_not_a_race(tsan: Build, tmp_path: Path) -> None:
    model = models.model(tmp_path, flavour="tensorrt")
    images = save(tiny_bundles.samples(models.EVERY, 1), tmp_path / "input")
    result = tsan.run("probe", "shared", model, images)
    assert (result.returncode, result.stdout) == (0, "0 other\n"), result.stderr[-3000:]


@pytest.mark.parametrize("question", ["logits", "run", "enqueue"])
def test_calls_are_clean_under_address_sanitizer(asan: Build, model: Path, tmp_path: Path, question: str) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 7), tmp_path / "input")
    result = asan.run("probe", question, model, images, 7, tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_context_keeps_its_engine_alive(asan: Build, model: Path, tmp_path: Path) -> None:
    images = save(tiny_bundles.samples(models.EVERY, 1), tmp_path / "input")
    result = asan.run("probe", "lifetime", model, images)
    assert (result.returncode, result.stdout) == (0, "The context was moved from.\n"), result.stderr[-3000:]


# C


def test_the_c_api_from_c(plain: Build, asan: Build, model: Path, tmp_path: Path) -> None:
    for build in (plain, asan):
        result = build.run("from_c", model, tmp_path / f"{build.variant.value}.cache")
        assert (tmp_path / f"{build.variant.value}.cache").is_file()
        assert (result.returncode, result.stdout) == (0, "classes 7, batch 1 to 8, passed 1\n"), result.stderr


_CTYPES = """
import ctypes, sys
spach = ctypes.CDLL(sys.argv[1])
class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("message", ctypes.c_char * 512)]
engine, error = ctypes.c_void_p(), Error()
code = spach.spach_engine_load(sys.argv[2].encode(), 0, ctypes.byref(engine), ctypes.byref(error))
print(code, error.code, error.message.decode())
passed = ctypes.c_int()
if code == 0:
    spach.spach_engine_self_test(engine, ctypes.byref(passed), ctypes.byref(error))
    spach.spach_engine_free(engine)
    print(passed.value)
"""


def test_the_c_api_from_another_language(plain: Build, model: Path) -> None:
    (library,) = (plain.path / "installed").rglob("libspach.so")
    command = [sys.executable, "-c", _CTYPES, str(library)]
    environment = {**os.environ, **plain.variables}
    good = subprocess.run([*command, str(model)], env=environment, capture_output=True, text=True, check=True)
    assert good.stdout.split() == ["0", "0", "1"]
    bad = subprocess.run([*command, "nowhere"], env=environment, capture_output=True, text=True, check=True)
    assert bad.stdout == "2 2 bad file. nowhere/model.txt cannot be opened.\n"


# Tools


def test_the_benchmark_measures(plain: Build, model: Path) -> None:
    result = plain.run("spach_benchmark", "-m", model, "-b", 2, "-t", 2, "-n", 20)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("batch 2, 2 threads, 40 runs\na batch: median ")
    assert "images/s" in result.stdout


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("spach_benchmark", ["-b"]),
        ("spach_benchmark", ["-b", "0"]),
        ("spach_benchmark", ["-n", "many"]),
        ("spach_classify", []),
        ("spach_classify", ["-k", "none", "x.ppm"]),
        ("spach_classify", ["-t", "0", "x.ppm"]),
        ("spach_classify", ["--help"]),
        ("spach_self_test", ["a", "b"]),
        ("spach_self_test", ["--help"]),
    ],
)
def test_bad_usage_is_exit_code_2(plain: Build, program: str, arguments: list[str]) -> None:
    result = plain.run(program, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Usage: {program}")


def test_a_batch_beyond_the_profile_ends_the_benchmark(plain: Build, model: Path) -> None:
    result = plain.run("spach_benchmark", "-m", model, "-b", 9, "-t", 2)
    assert result.returncode == 3
    assert "A batch of 9 is outside the plan's profile, 1 to 8." in result.stderr


PICTURES = {
    b"": "cannot be read",
    b"P5\n1 1\n255\n0": "is no JPEG, PNG or binary PPM picture (P6)",
    b"P6\n1 1\n65535\n000000": "does not have 8 bits",
    b"P6\n2 2\n255\n000": "ends before its last pixel",
    b"P6\n0 2\n255\n": "has an unusable size",
    b"P6\n99999999999 1\n255\n": "",
    b"P6\n900000 900000\n255\n": "has an unusable size",
    b"P6\n-1 -1\n255\n": "",
    b"P6\n# a comment that never ends": "",
}


@pytest.mark.parametrize("content", PICTURES)
def test_a_picture_that_is_none_is_refused(asan: Build, model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "picture.ppm").write_bytes(content)
    result = asan.run("spach_classify", "-m", model, tmp_path / "picture.ppm")
    assert result.returncode == 2, result.stderr
    assert PICTURES[content] in result.stderr


def test_comments_in_a_picture_are_skipped(plain: Build, model: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.ppm").write_bytes(b"P6\n# made by hand\n3 2 # wide\n255\n" + bytes(18))
    assert plain.run("spach_classify", "-m", model, tmp_path / "picture.ppm").returncode == 0


# The parts that have a second opinion


def test_sha256_is_that_of_hashlib(plain: Build, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for size in (0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000, 65537):
        content = random.bytes(size)
        (tmp_path / "file").write_bytes(content)
        assert plain.run("probe", "sha256", tmp_path / "file").stdout.strip() == hashlib.sha256(content).hexdigest()


def test_half_is_that_of_numpy(plain: Build, tmp_path: Path) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.sort(every[np.isfinite(every)].astype(np.float32))
    floats = np.concatenate(
        [
            every.astype(np.float32),
            np.nextafter(finite, np.float32(np.inf)),
            (finite[:-1] + finite[1:]) / 2,  # ties, exact in float32
            np.random.default_rng(1).integers(0, 2**32, 200_000, np.uint32).view(np.float32),
        ]
    )
    save(floats, tmp_path / "floats")
    assert plain.run("probe", "half", tmp_path / "floats", tmp_path / "out").returncode == 0
    back = np.fromfile(tmp_path / "out.f32", np.float32)
    np.testing.assert_array_equal(back, every.astype(np.float32))
    halves = np.fromfile(tmp_path / "out.f16", np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = floats.astype(np.float16)
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(halves[numbers], wanted.view(np.uint16)[numbers])
    assert np.isnan(halves.view(np.float16)[~numbers]).all()


# The folder


def test_the_readmes_example_compiles_and_runs(plain: Build, package: Path, tmp_path: Path) -> None:
    """The C++ in README.md, as it stands, in a main() that has what it speaks of: pixels and their size."""
    example = (package / "README.md").read_text().split("```cpp\n")[1].split("```")[0]
    options = (package / "README.md").read_text().split("```cpp\n")[2].split("```")[0]
    include, body = example.split("\n", 1)
    pixels = "const int width = 9, height = 11; const std::vector<unsigned char> all(297, 90);"
    before = (
        f"#include <iostream>\n#include <vector>\n{include}\nint main() {{\n{pixels}\nconst auto* rgb = all.data();\n"
    )
    (tmp_path / "main.cpp").write_text(f"{before}{body}\nif (!best) return 1;\n{{\n{options}}}\nreturn 0;\n}}\n")
    (library,) = (plain.path / "installed").rglob("libspach.so")
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "main.cpp", "-o", "app", str(library)]
    search = [f"-I{plain.path / 'installed' / 'include'}", f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, *search], cwd=tmp_path, check=True)
    (tmp_path / "model").symlink_to(package / "model")
    result = subprocess.run(
        ["./app"], cwd=tmp_path, env={**os.environ, **plain.variables}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5


def test_a_written_folder_holds_the_sources_as_they_are_here(package: Path) -> None:
    from spach_deploy.packaging.cpp.folder import LIBRARY, RECIPE, RECIPE_SOURCE

    for file in LIBRARY.rglob("*"):
        written = package / file.relative_to(LIBRARY).with_name(RECIPE if file.name == RECIPE_SOURCE else file.name)
        assert written.is_dir() if file.is_dir() else written.is_file()
        if file.is_file() and file.name != "README.md":
            assert written.read_bytes() == file.read_bytes()


def test_the_self_test_is_a_ctest(plain: Build) -> None:
    """`ctest` in the build folder, on the model that was packaged."""
    if shutil.which("ctest") is None:
        pytest.skip("No ctest here.")
    listed = subprocess.run(
        ["ctest", "--test-dir", str(plain.path / "library"), "--show-only=json-v1"],
        capture_output=True,
        text=True,
        check=True,
    )
    (test,) = json.loads(listed.stdout)["tests"]
    assert test["name"] == "spach_self_test"
    assert test["command"][1].endswith("/package/model")


def test_a_graph_that_the_double_runs_is_the_bundles_own(package: Path) -> None:
    graph = (package.parent / "bundle" / GRAPH).read_bytes()
    onnx.load_from_string(graph)
    assert (package / "model" / "engine.plan").read_bytes().endswith(graph)


def test_missing_libraries_are_named(package: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("No cmake here.")
    lines = [
        "cmake_minimum_required(VERSION 3.18)",
        "project(none LANGUAGES NONE)",
        "add_library(CUDA::cudart UNKNOWN IMPORTED)",
        "set(SPACH_TENSORRT tensorrt-rtx)",
        f"include({package}/cmake/SpachDependencies.cmake)",
    ]
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    result = subprocess.run(
        ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b"), "-DCMAKE_FIND_ROOT_PATH=/nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"},
    )
    if result.returncode == 0:
        pytest.skip("TensorRT for RTX's headers are installed here.")
    assert "tensorrt-rtx was not found" in result.stderr
    assert "-DTENSORRT_ROOT=DIR" in " ".join(result.stderr.split())


def test_the_worked_example_of_the_readme_builds_and_passes_its_self_test(
    plain: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project's README, as it is written, with the doubles where it says /opt/tensorrt."""
    monkeypatch.chdir(tmp_path)
    bundle = small_bundles.copy(small_bundles.bundle(Precision.FP16), tmp_path / "build" / "ms_hybrid_s-fp16")
    plans.give_plan(bundle)
    Path("imagenet.txt").write_text("".join(f"class {number}\n" for number in range(small_bundles.CLASSES)))
    nvidia = plain.path / "nvidia"
    shown = section_commands(README, "Into production")
    commands = [line for line in shown if line.startswith(("spach-package cpp", "cmake", "engine-cpp/"))]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("/opt/tensorrt", str(nvidia / "tensorrt")))
        if words[0] == "spach-package":
            assert CliRunner().invoke(package_command, words[1:]).exit_code == 0
            continue
        environment = {**os.environ, **plain.variables, "CMAKE_GENERATOR": "Ninja", "CMAKE_BUILD_TYPE": "Debug"}
        found = [f"-DCUDAToolkit_ROOT={nvidia / 'cuda'}", *UNITY] if "-S" in words else []
        done = subprocess.run([*words, *found], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-1500:], done.stderr[-1500:])
    assert done.stdout.endswith("\nPASSED\n")
