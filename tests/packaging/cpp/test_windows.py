"""The library for Windows: that it compiles. Nothing of it was ever run there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.cpp import builds
from tests.packaging.cpp.builds import Variant

pytestmark = pytest.mark.mingw


def test_library_and_tools_compile_for_windows_without_a_warning(package: Path) -> None:
    """With mingw-w64: a DLL that has the C interface, and the three programs, linked."""
    builds.mingw()
    build = builds.build(Variant.WINDOWS, package)
    made = [file for file in build.path.rglob("*") if file.suffix in {".exe", ".dll"}]
    names = {file.name for file in made if "CMakeFiles" not in file.parts}
    assert names == {"libspach.dll", "spach_benchmark.exe", "spach_classify.exe", "spach_self_test.exe"}
    (library,) = build.path.rglob("libspach.dll")
    content = library.read_bytes()
    assert content.startswith(b"MZ")
    # Files are opened by names of any letters, and locks are Windows' own.
    for function in (b"spach_engine_load_with", b"spach_context_submit", b"LockFileEx", b"CreateFileW"):
        assert function in content
