"""main.cpp of spach-package onnxruntime, compiled as README.md says and run on ONNX Runtime's CPU provider.

The library is that of the Python package, which has no headers: scripts/onnxruntime_headers fetches Debian's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from spach_deploy.bundle.store import CONTEXT, GRAPH, PLAN
from spach_deploy.cli.package_onnxruntime import main as package
from spach_deploy.graph.ep_context import RTX_PROVIDER
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec
from spach_deploy.packaging.onnxruntime.folder import MODEL_TEXT, TEMPLATES, golden_file
from tests import small_bundles
from tests.packaging.cpp.builds import onnxruntime_library
from tests.packaging.onnxruntime.folders import recorded
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import EMBEDDING, RENAMED, Tiny
from tests.shared import alone
from tests.validation import faults

pytestmark = pytest.mark.cpp

CPU = "CPUExecutionProvider"
SOURCES = ("main.cpp", "golden.h", "CMakeLists.txt")
EVERYTHING = OutputSpec(io_dtype=IODtype.UINT8, top_k=3, softmax=True)
STRICT = "-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -O1"


def headers() -> Path:
    """The folder with onnxruntime_cxx_api.h; skips the test where it is not here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spach-deploy" / "onnxruntime-headers"
    fetched = Path(os.environ.get("SPACH_ONNXRUNTIME_HEADERS") or cache)
    for folder in (fetched, Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")):
        if (folder / "onnxruntime_cxx_api.h").is_file():
            return folder
    pytest.skip("ONNX Runtime's headers are not here; scripts/onnxruntime_headers fetches them.")


@pytest.fixture(scope="session")
def program() -> Path:
    """The program, made once for this source and these headers."""
    for tools in (("cmake",), ("c++", "g++", "clang++"), ("ninja", "make")):
        if not any(map(shutil.which, tools)):
            pytest.skip(f"No {' or '.join(tools)} here, so nothing can be compiled.")
    library, digest = onnxruntime_library(), hashlib.sha256()
    sources = (*(TEMPLATES / name for name in SOURCES), Path(__file__))
    for file in (*sources, headers() / "onnxruntime_cxx_api.h"):
        digest.update(file.read_bytes())
    digest.update(str(library).encode())
    folder = Path(tempfile.gettempdir()) / f"spach-onnxruntime-{os.getuid()}" / digest.hexdigest()[:16]
    with alone(folder):
        if not (folder / "build" / "main").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            compile_in(folder, library)
    return folder / "build" / "main"


def compile_in(folder: Path, library: Path) -> None:
    """Compile the program in `folder`, with a root as ONNX Runtime's archives have it."""
    root, source = folder / "onnxruntime", folder / "source"
    for place in (root / "lib", source):
        place.mkdir(parents=True)
    (root / "include").symlink_to(headers())
    (root / "lib" / "libonnxruntime.so.1").symlink_to(library)  # as the library calls itself
    (root / "lib" / "libonnxruntime.so").symlink_to("libonnxruntime.so.1")
    for name in SOURCES:
        shutil.copyfile(TEMPLATES / name, source / name)
    options = (f"-DONNXRUNTIME_ROOT={root}", f"-DCMAKE_CXX_FLAGS={STRICT}", "-DCMAKE_BUILD_TYPE=None")
    for command in (["-S", source, "-B", folder / "build", *options], ["--build", folder / "build"]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(program), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def written(tmp_path: Path, tiny: Tiny) -> Path:
    """The folder of a tiny bundle."""
    bundle = tiny_bundles.write(tmp_path / "bundle", tiny)
    result = CliRunner().invoke(package, [str(bundle), "-o", str(tmp_path / "served")])
    assert result.exit_code == 0, result.output
    return tmp_path / "served"


def test_a_real_model_agrees(program: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(package, [str(small_bundles.bundle()), "-o", str(tmp_path / "served")])
    assert result.exit_code == 0, result.output
    done = run(program, tmp_path / "served")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CPU} runs model.onnx" in done.stdout
    assert "inf" not in done.stdout
    assert "  top_indices\n    between classes that differ " in done.stdout
    assert "8 images: what PyTorch answers in FP32" in done.stdout
    assert f"{RTX_PROVIDER} does not run {CONTEXT} here" in done.stderr
    graph = onnx.load(tmp_path / "served" / GRAPH)
    faults.perturb(graph, "layer2.2.channel_func.fc1.weight")
    onnx.save(graph, tmp_path / "served" / GRAPH)
    recorded(tmp_path / "served")
    assert run(program, tmp_path / "served").returncode == 1


@pytest.mark.parametrize(
    "tiny",
    [
        EMBEDDING,
        RENAMED,
        Tiny(outputs=OutputSpec(io_dtype=IODtype.FP16)),
        Tiny(batch=BatchProfile(6, 7, 8)),
        Tiny(classes=2),
        Tiny(engine="none"),
    ],
    ids=["embedding", "renamed", "fp16", "large batches", "two classes", "no plan"],
)
def test_every_interface(program: Path, tmp_path: Path, tiny: Tiny) -> None:
    folder = written(tmp_path, tiny)
    done = run(program, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    main = golden_file(folder, tiny.main)
    main.write_bytes((np.fromfile(main, np.float32) * np.float32(1.5)).tobytes())
    assert run(program, folder, CPU).returncode == 1


def test_every_output_is_compared(program: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, Tiny(outputs=EVERYTHING))
    assert run(program, folder).returncode == 0
    for name in ("logits", "probabilities", "top_values", "top_indices"):
        file = golden_file(folder, name)
        before = file.read_bytes()
        file.write_bytes(np.roll(np.frombuffer(before, np.int64 if name == "top_indices" else np.float32), 1).tobytes())
        assert run(program, folder).returncode == 1, name
        file.write_bytes(before)


def test_what_is_not_finite_does_not_agree(program: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, Tiny())
    graph = onnx.load(folder / GRAPH)
    faults.set_value(graph, "weights", np.full_like(faults.value(graph, "weights"), np.nan))
    onnx.save(graph, folder / GRAPH)
    recorded(folder)
    assert run(program, folder).returncode == 1


def test_what_cannot_run_is_said(program: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, Tiny())
    missing = run(program, folder, "TensorrtExecutionProvider")
    assert missing.returncode == 3
    assert missing.stderr.splitlines()[-1] == "Error: no execution provider here runs this model."
    assert run(program, folder, "NoSuchExecutionProvider").returncode == 3
    assert run(program, folder, CPU, CPU).returncode == 2
    text = (folder / MODEL_TEXT).read_text()
    batch, bound = (next(line for line in text.splitlines() if line.startswith(word)) for word in ("batch", "bound"))
    figures = bound.rsplit(" ", 3)
    broken_bounds = (" ".join((figures[0], figure, *figures[2:])) for figure in ("", "x"))
    for broken in (
        "",
        "batch 8\n",
        text.replace("bound model.onnx", "bond"),
        *(text.replace(batch, f"batch {size}") for size in ("0", "x", "-1", "4x", "9999999999")),
        *(text.replace(bound, line) for line in broken_bounds),
    ):
        (folder / MODEL_TEXT).write_text(broken)
        done = run(program, folder)
        assert done.returncode == 2, broken
        assert len(done.stderr.splitlines()) >= 1
    for bound in ("nan", "-1"):
        (folder / MODEL_TEXT).write_text(text.replace(figures[1], bound))
        assert run(program, folder).returncode == 1, bound
    (folder / MODEL_TEXT).write_text(text)
    for name in ("golden.input.bin", "golden.logits.bin", GRAPH, PLAN, MODEL_TEXT):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert run(program, folder).returncode == 2, name
        (folder / name).write_bytes(kept[:16])
        assert run(program, folder).returncode == 2, name
        (folder / name).write_bytes(kept)
