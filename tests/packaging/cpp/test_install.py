"""How programs find the library and the library finds TensorRT: pkg-config, Conan, vcpkg, pip's wheels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spach_deploy.packaging.cpp.folder import LIBRARY
from tests.packaging.cpp import builds
from tests.packaging.cpp.builds import HERE, Build

pytestmark = pytest.mark.cpp

VERSION = re.search(r"project\(spach VERSION ([\d.]+)", (LIBRARY / "CMakeLists.txt").read_text())[1]  # type: ignore[index]


def pkg_config(installed: Path, *words: str) -> list[str]:
    if shutil.which("pkg-config") is None:
        pytest.skip("No pkg-config here.")
    (file,) = installed.rglob("spach.pc")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(file.parent), "PKG_CONFIG_ALLOW_SYSTEM_CFLAGS": "1"}
    done = subprocess.run(["pkg-config", *words, "spach"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_pkg_config_compiles_and_links_a_program(plain: Build, model: Path, tmp_path: Path) -> None:
    """And does so where the installed folder was moved."""
    moved = tmp_path / "moved"
    shutil.copytree(plain.path / "installed", moved, symlinks=True)
    assert pkg_config(moved, "--modversion") == [VERSION]
    (library,) = moved.rglob("libspach.so")
    flags = [*pkg_config(moved, "--cflags", "--libs"), f"-Wl,-rpath,{library.parent}"]
    command = ["cc", "-std=c11", str(HERE / "programs" / "from_c.c"), "-o", str(tmp_path / "app"), *flags]
    subprocess.run(command, check=True)
    run = [str(tmp_path / "app"), str(model), str(tmp_path / "cache")]
    done = subprocess.run(run, env={**os.environ, **plain.variables}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "classes 7, batch 1 to 8, passed 1\n"), done.stderr
    static = pkg_config(moved, "--static", "--libs")
    assert "-lcudart" in static
    assert str(plain.path / "nvidia" / "tensorrt" / "lib" / "libtensorrt_rtx.so") in static


def configure(package: Path, build: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """CMake's first step of a project that looks for TensorRT and prints what it found."""
    lines = [
        "cmake_minimum_required(VERSION 3.18)",
        "project(finds LANGUAGES CXX)",
        "add_library(CUDA::cudart UNKNOWN IMPORTED)",
        f"include({package}/cmake/SpachDependencies.cmake)",
        "get_target_property(library Spach::TensorRT IMPORTED_LOCATION)",
        'message(STATUS "found ${library}")',
    ]
    build.mkdir(exist_ok=True)
    (build / "CMakeLists.txt").write_text("\n".join(lines))
    environment = {name: value for name, value in os.environ.items() if name != "TENSORRT_ROOT"} | variables
    command = ["cmake", "-S", str(build), "-B", str(build / "b"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


FLAVOURS = {
    "tensorrt-rtx": ("tensorrt_rtx_libs", "libtensorrt_rtx.so.1"),
    "tensorrt": ("tensorrt_libs", "libnvinfer.so.10"),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_library_in_a_wheel_is_found_without_a_link(
    plain: Build, package: Path, tmp_path: Path, flavour: str
) -> None:
    """By its folder, by the site-packages it is in, and by asking Python for it."""
    folder, name = FLAVOURS[flavour]
    library = tmp_path / "site-packages" / folder / name
    library.parent.mkdir(parents=True)
    library.touch()
    (library.parent / "__init__.py").touch()
    headers = plain.path / "nvidia" / "tensorrt" / "include"
    flavoured = f"-DSPACH_TENSORRT={flavour}"
    for number, place in enumerate((library.parent, library.parents[1])):
        root = f"-DTENSORRT_ROOT={headers.parent / 'include'};{place}"
        done = configure(package, tmp_path / str(number), flavoured, root)
        assert f"found {library}\n" in done.stdout, done.stderr
    asked = configure(
        package,
        tmp_path / "asked",
        flavoured,
        f"-DTENSORRT_ROOT={headers}",
        f"-DSPACH_PYTHON={sys.executable}",
        PYTHONPATH=str(library.parents[1]),
    )
    assert f"found {library}\n" in asked.stdout, asked.stderr
    alone = configure(package, tmp_path / "alone", flavoured, f"-DTENSORRT_ROOT={library.parent}")
    assert alone.returncode == 1
    said = " ".join(alone.stderr.split())
    assert f"{flavour} was not found: NvInfer.h (pip's packages do not have it). Give -DTENSORRT_ROOT=DIR" in said


def test_the_installed_wheel_is_found_as_it_is(plain: Build, package: Path, tmp_path: Path) -> None:
    wheel = builds.real_tensorrt_rtx()
    options = ("-DSPACH_TENSORRT=tensorrt-rtx", f"-DSPACH_PYTHON={sys.executable}")
    headers = f"-DTENSORRT_ROOT={plain.path / 'nvidia' / 'tensorrt' / 'include'}"
    done = configure(package, tmp_path / "p", *options, headers)
    assert f"found {wheel}\n" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_conan_recipe_makes_a_package(plain: Build, package: Path, tmp_path: Path) -> None:
    """From the recipe to a package that has the library, its headers and its CMake package; no server is asked."""
    conan = shutil.which("conan")
    if conan is None:
        pytest.skip("No Conan here (pip install conan).")
    environment = {**os.environ, "CONAN_HOME": str(tmp_path / "home")}

    def run(*words: str, code: int = 0) -> str:
        done = subprocess.run([conan, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("profile", "detect")
    create = ("create", str(package), "--no-remote", "-s", "build_type=Debug", "-s", "compiler.cppstd=17")
    assert "Give TensorRT's folder: -c user.spach:tensorrt_root=DIR" in run(*create, "--build=*", code=6)
    nvidia = plain.path / "nvidia"
    settings = f"tools.cmake.cmaketoolchain:extra_variables={{'CUDAToolkit_ROOT': '{nvidia / 'cuda'}'}}"
    run(*create, "-c", f"user.spach:tensorrt_root={nvidia / 'tensorrt'}", "-c", settings)
    made = {file.name for file in (tmp_path / "home" / "p").rglob("*") if "/p/" in str(file)}
    assert {"libspach.a", "spach_c.h", "SpachConfig.cmake", "spach.pc"} <= made


def test_recipes_say_the_librarys_version_and_name_what_there_is(package: Path) -> None:
    """The port of vcpkg was never run: its files, its format and the functions that it calls."""
    port = package / "vcpkg" / "spach"
    manifest = json.loads((port / "vcpkg.json").read_text())
    assert (manifest["name"], manifest["version"]) == ("spach", VERSION)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", manifest["name"])
    commands = re.findall(r"^\s*(\w+)\(", (port / "portfile.cmake").read_text(), re.MULTILINE)
    scripts = {dependency["name"] for dependency in manifest["dependencies"] if dependency["host"]}
    assert scripts == {"vcpkg-cmake", "vcpkg-cmake-config"}
    assert {"vcpkg_cmake_configure", "vcpkg_cmake_install", "vcpkg_cmake_config_fixup"} <= set(commands)
    compile((package / "conanfile.py").read_text(), "conanfile.py", "exec")


def test_it_compiles_against_nvidias_own_headers(package: Path) -> None:
    """$SPACH_NVIDIA_HEADERS: folders of NvInfer.h and cuda_runtime_api.h, separated by colons. None is here."""
    folders = [folder for folder in os.environ.get("SPACH_NVIDIA_HEADERS", "").split(":") if folder]
    if not folders:
        pytest.skip("$SPACH_NVIDIA_HEADERS does not name the folders of NVIDIA's headers.")
    versions = "".join(file.read_text() for folder in folders for file in Path(folder).glob("NvInferVersion.h"))
    rtx = int("TRT_MAJOR_RTX" in versions)
    flavour = "tensorrt-rtx" if rtx else "tensorrt"
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f'-DSPACH_FLAVOUR="{flavour}"',
        f"-DSPACH_RTX={rtx}",
    ]
    where = [f"-I{package / 'include'}", f"-I{package / 'src'}", *(f"-isystem{folder}" for folder in folders)]
    for source in sorted((package / "src").glob("*.cpp")):
        subprocess.run(["c++", *flags, *where, str(source)], check=True)
