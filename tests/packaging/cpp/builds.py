"""Compiles the library once for all tests: by content, so that a second run of the tests compiles nothing.

plain      as README.md says (TENSORRT_ROOT, install), shared, and a program that finds it with find_package
asan       a part of another project (FetchContent), static, with AddressSanitizer and UndefinedBehaviorSanitizer
tsan       the same with ThreadSanitizer, for ordinary TensorRT instead of TensorRT for RTX
real_rtx   plain's objects, linked with the real libtensorrt_rtx
windows    for Windows, with mingw-w64 and warnings as errors; its programs do not run here
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from spach_deploy.packaging.cpp.folder import LIBRARY
from tests.shared import alone

HERE = Path(__file__).parent
_PLAIN = "-O1"
# At -O1 the sanitized sources take three times as long to compile.
_ASAN = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
_TSAN = "-O1 -fsanitize=thread"
# All sources of a target as one: the standard library's headers take most of the time. GCC then takes sources for
# headers, and warns of unnamed namespaces in them.
UNITY = ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")
_AS_ONE = "-Wno-subobject-linkage"


class Variant(enum.Enum):
    """What the library is compiled with."""

    PLAIN = "plain"
    ASAN = "asan"
    TSAN = "tsan"
    REAL_RTX = "real_rtx"
    WINDOWS = "windows"


@dataclasses.dataclass(frozen=True)
class Build:
    """A finished build. `variables` is what its programs need in their environment."""

    path: Path
    variant: Variant

    def program(self, name: str) -> Path:
        """`probe`, `from_c` or one of the library's tools."""
        found = [path for path in self.path.rglob(name) if path.is_file() and os.access(path, os.X_OK)]
        return found[0]

    def run(
        self, name: str, *arguments: object, timeout: float = 120, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program; a sanitizer's report or a signal is the caller's to see in the exit code."""
        command = [str(self.program(name)), *(str(argument) for argument in arguments)]
        environment = {**os.environ, **self.variables, **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)

    @property
    def variables(self) -> dict[str, str]:
        """Libraries of this environment, whichever one built it; the sanitizers' options, and the double's version."""
        variables = {"SPACH_DOUBLE_ORT": str(onnxruntime_library()), "LC_ALL": "C"}
        variables["XDG_CACHE_HOME"] = "/dev/null"  # no runtime cache but those that a test names
        if self.variant is Variant.REAL_RTX:
            variables["LD_LIBRARY_PATH"] = str(real_tensorrt_rtx().parent)
        if self.variant is Variant.ASAN:
            variables["ASAN_OPTIONS"] = "exitcode=66:allocator_may_return_null=1"
            variables["LSAN_OPTIONS"] = "exitcode=67"
        if self.variant is Variant.TSAN:
            variables["TSAN_OPTIONS"] = f"exitcode=66:suppressions={HERE / 'tsan_suppressions.txt'}"
            variables["SPACH_DOUBLE_VERSION"] = "101302"
        return variables


def onnxruntime_library() -> Path:
    """The library in the Python package; skips the test where it carries none."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        pytest.skip("onnxruntime is not installed, so nothing can run the graph.")
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("This onnxruntime package carries no libonnxruntime.so.")
    return found[0]


def real_tensorrt_rtx() -> Path:
    """The library in TensorRT for RTX's wheel; skips the test where it is not installed."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    found = sorted(Path(spec.origin).parent.glob("libtensorrt_rtx.so*")) if spec and spec.origin else []
    if not found:
        pytest.skip("tensorrt-rtx is not installed.")
    return found[0]


def build(variant: Variant, package: Path) -> Build:
    """The build of `variant`, from the folder that spach-package wrote; made now unless it was made before."""
    _check_tools()
    folder = Path(tempfile.gettempdir()) / f"spach-cpp-{os.getuid()}" / f"{variant.value}-{_key()}"
    with alone(folder):
        if not (folder / "finished").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _MAKERS[variant](folder, package)
            (folder / "finished").touch()
    return Build(folder, variant)


def _build_as_readme_says(folder: Path, package: Path) -> None:
    roots, prefix = folder / "nvidia", folder / "installed"
    _cmake(HERE / "projects" / "doubles", folder / "doubles", f"-DCMAKE_INSTALL_PREFIX={roots}")
    _run("cmake", "--install", folder / "doubles")
    found = (f"-DTENSORRT_ROOT={roots / 'tensorrt'}", f"-DCUDAToolkit_ROOT={roots / 'cuda'}")
    options = ("-DBUILD_SHARED_LIBS=ON", "-DSPACH_WERROR=ON", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    _cmake(package, folder / "library", *found, *options)
    _run("cmake", "--install", folder / "library")
    _cmake(
        HERE / "projects" / "plain",
        folder / "programs",
        *found,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DPACKAGE={package}",
    )


def _build_with_asan(folder: Path, package: Path) -> None:
    _build_as_part(folder, package, _ASAN)


def _build_with_tsan(folder: Path, package: Path) -> None:
    _build_as_part(folder, package, _TSAN, "-DSPACH_TENSORRT=tensorrt", "-DSPACH_TOOLS=OFF")


def _build_as_part(folder: Path, package: Path, flags: str, *options: str) -> None:
    common = (f"-DPACKAGE={package}", f"-DCMAKE_C_FLAGS={flags}", "-DSPACH_TOOLS=ON", "-DSPACH_WERROR=ON", *UNITY)
    _cmake(HERE / "projects" / "sanitized", folder, *common, *options, flags=f"{flags} {_AS_ONE}")


def _link_with_real_rtx(folder: Path, package: Path) -> None:
    """The objects are plain's: their calls are TensorRT's inline ones, so only the link differs."""
    library = real_tensorrt_rtx()
    plain = build(Variant.PLAIN, package).path
    objects = [*(plain / "library").rglob("*.o"), *(plain / "doubles").rglob("cuda_double.cpp.o")]
    others = {"spach_classify.dir", "spach_benchmark.dir"}
    chosen = [file for file in objects if others.isdisjoint(file.parts)]
    _run("c++", *chosen, library, "-pthread", "-o", folder / "spach_self_test")


def mingw() -> str:
    """The compiler for Windows, of the kind that has std::thread; skips the test where there is none."""
    names = ("x86_64-w64-mingw32-g++-posix", "x86_64-w64-mingw32-g++")
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        assert not os.environ.get("SPACH_REQUIRE_MINGW"), "No mingw-w64 here (apt-get install g++-mingw-w64-x86-64)."
        pytest.skip("No mingw-w64 here, so nothing can be compiled for Windows.")
    return found


def _build_for_windows(folder: Path, package: Path) -> None:
    for_windows = ("-DCMAKE_SYSTEM_NAME=Windows", f"-DCMAKE_CXX_COMPILER={mingw()}", f"-DPACKAGE={package}")
    options = ("-DBUILD_SHARED_LIBS=ON", "-DSPACH_TOOLS=ON", "-DSPACH_PICTURES=OFF", "-DSPACH_WERROR=ON")
    _cmake(HERE / "projects" / "windows", folder, *for_windows, *options, *UNITY, flags=f"{_PLAIN} {_AS_ONE}")


_MAKERS: dict[Variant, Callable[[Path, Path], None]] = {
    Variant.PLAIN: _build_as_readme_says,
    Variant.ASAN: _build_with_asan,
    Variant.TSAN: _build_with_tsan,
    Variant.REAL_RTX: _link_with_real_rtx,
    Variant.WINDOWS: _build_for_windows,
}


def _cmake(source: Path, build: Path, *options: str, flags: str = _PLAIN) -> None:
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    common = ("-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}")
    _run("cmake", *generator, "-S", source, "-B", build, *common, *options)
    _run("cmake", "--build", build, "--parallel", "2")


def _run(*command: object) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"


def _check_tools() -> None:
    for tools in (("cmake",), ("c++", "g++", "clang++"), ("ninja", "make")):
        if not any(shutil.which(tool) for tool in tools):
            pytest.skip(f"No {' or '.join(tools)} here, so nothing can be compiled.")
    onnxruntime_library()


def _key() -> str:
    """Of all that is compiled, and of the compiler."""
    digest = hashlib.sha256()
    roots = [LIBRARY, HERE / "double", HERE / "programs", HERE / "projects", Path(__file__)]
    for root in roots:
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(file.name.encode() + file.read_bytes())
    compiler = shutil.which(os.environ.get("CXX", "c++")) or ""
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout if compiler else ""
    )
    digest.update(version.encode())
    return digest.hexdigest()[:16]
