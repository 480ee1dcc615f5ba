"""Conan 2: `conan create . -c user.spach:tensorrt_root=DIR` makes the library a package of your cache.

TensorRT and the CUDA runtime come from NVIDIA: DIR is TENSORRT_ROOT, as README.md describes it.
"""

import re
from pathlib import Path

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout


class Spach(ConanFile):
    """The library without its tools, so that no other package is needed."""

    name = "spach"
    description = "Runs the TensorRT engine of a vision model"
    license = "MIT"
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False], "fPIC": [True, False], "tensorrt": ["tensorrt", "tensorrt-rtx"]}
    default_options = {"shared": False, "fPIC": True}
    exports = "CMakeLists.txt", "model/model.txt"
    exports_sources = "CMakeLists.txt", "LICENSE", "cmake/*", "include/*", "src/*"

    def set_version(self):
        text = (Path(self.recipe_folder) / "CMakeLists.txt").read_text(encoding="utf-8")
        self.version = re.search(r"project\(spach VERSION ([\d.]+)", text).group(1)

    def config_options(self):
        if self.settings.os == "Windows":
            del self.options.fPIC
        model = Path(self.recipe_folder) / "model" / "model.txt"
        if model.is_file():  # the flavour of the plan beside this file
            self.options.tensorrt = re.search(r"^flavour (\S+)", model.read_text(encoding="utf-8"), re.M).group(1)

    def configure(self):
        if self.options.shared:
            self.options.rm_safe("fPIC")

    def validate(self):
        check_min_cppstd(self, 17)

    def validate_build(self):
        if not self._root():
            raise ConanInvalidConfiguration("Give TensorRT's folder: -c user.spach:tensorrt_root=DIR")

    def _root(self):
        return self.conf.get("user.spach:tensorrt_root", check_type=str)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["TENSORRT_ROOT"] = self._root()
        toolchain.cache_variables["SPACH_TENSORRT"] = str(self.options.tensorrt)
        toolchain.cache_variables["SPACH_TOOLS"] = False
        toolchain.generate()
        CMakeDeps(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        CMake(self).install()

    def package_info(self):
        # Spach's own CMake package finds TensorRT and CUDA again where it is used.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = ["lib/cmake/Spach"]
        self.cpp_info.libs = ["spach"]
