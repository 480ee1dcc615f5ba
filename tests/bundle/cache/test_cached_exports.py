"""The cache of exports: what makes one another export, and the commands that use it."""

from __future__ import annotations

import dataclasses
import json
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.cli.doctor import main as doctor_command
from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import Destination
from spach_deploy.options.specs import (
    EngineTarget,
    ExportOptions,
    Flavour,
    ModelSpec,
    OutputSpec,
    Precision,
    QuantizationSpec,
)
from spach_deploy.pipeline import cache as keys
from spach_deploy.pipeline.cache import ExportCache, export_key, limit_bytes, open_store
from tests import small_bundles
from tests.commands import export

pytestmark = pytest.mark.usefixtures("small_model_registered", "elsewhere")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written where the tests were started."""
    monkeypatch.setenv("SPACH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out`, and in `cache` what was kept of its export."""
    folder = tmp_path_factory.mktemp("cached") / "here"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, small_bundles.registered():
        patch.setenv("SPACH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert small().exit_code == 0
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def cache(exported_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, as the first export left it, is the current one: where a bundle goes is a part of what it is."""
    shutil.rmtree(exported_once)
    shutil.copytree(exported_once.with_name("kept"), exported_once)
    monkeypatch.setenv("SPACH_CACHE", str(exported_once / "cache"))
    monkeypatch.chdir(exported_once)
    return exported_once / "cache"


def small(*more: object) -> Result:
    size, classes = small_bundles.SIZE, small_bundles.CLASSES
    model = ("--model", small_bundles.NAME, "--image-size", size, "--num-classes", classes)
    return export(*model, "--engine", "none", "-o", "out", *more)


def test_the_second_identical_export_is_the_first_ones_bundle(cache: Path) -> None:
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    shutil.rmtree("out")
    second = small()
    assert second.exit_code == 0, second.output
    assert "reused" in second.stdout
    assert "SHA-256" in second.stdout
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before
    Bundle.open(Path("out"))


def test_it_does_not_replace_a_bundle_unasked(cache: Path) -> None:
    again = small()
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_other_options_and_no_cache_are_done_again(cache: Path) -> None:
    for more in (("--softmax",), ("--no-cache",)):
        result = small("--overwrite", *more)
        assert result.exit_code == 0, result.output
        assert "reused" not in result.stdout


def test_a_damaged_entry_is_done_again(cache: Path) -> None:
    (entry,) = (cache / "entries").iterdir()
    (entry / GRAPH).write_bytes(b"")
    result = small("--overwrite")
    assert result.exit_code == 0, result.output
    assert "reused" not in result.stdout
    assert "reused" in small("--overwrite").stdout


@pytest.mark.parametrize("forged", ["the record", "the record and the manifest", "another file"])
def test_an_entry_is_verified_like_a_bundle_from_elsewhere(forged: str, cache: Path, tmp_path: Path) -> None:
    """Whoever can make the record fit has not made the bundle fit."""
    bundle = small_bundles.copy(small_bundles.bundle(), tmp_path / "made")
    exports = ExportCache(open_store(), "a" * 64)
    name = None if forged == "another file" else small_bundles.NAME
    asked = ExportOptions(ModelSpec(name), Precision.FP16, output=tmp_path / "out")
    if forged == "another file":
        (bundle / "run.sh").write_text("#!/bin/sh")
    else:
        (bundle / GRAPH).write_bytes(b"another graph")
    if forged == "the record and the manifest":
        manifest = small_bundles.read_manifest(bundle)
        del manifest["files"][GRAPH]
        small_bundles.write_manifest(bundle, manifest)
    assert exports.store is not None
    exports.store.put("a" * 64, bundle, {})
    assert exports.take(asked) is None
    assert not (tmp_path / "out").exists()
    exports.store.put("a" * 64, small_bundles.bundle(), {})
    assert exports.take(dataclasses.replace(asked, precision=Precision.BF16)) is None
    exports.store.put("a" * 64, small_bundles.bundle(), {})
    assert exports.take(asked) is not None


def test_a_cache_that_cannot_be_written_is_no_failure(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("a file where the cache should be")
    result = small("--overwrite")
    assert result.exit_code == 0, result.output
    assert "Not kept in the cache" in result.stderr


def test_the_doctor_shows_and_clears_it(cache: Path) -> None:
    shown = CliRunner().invoke(doctor_command, ["--cache"])
    assert shown.exit_code == 0
    assert str(cache) in shown.stdout
    assert "small_hybrid fp32" in shown.stdout
    content = json.loads(CliRunner().invoke(doctor_command, ["--cache", "--json"]).stdout)
    assert len(content["entries"]) == 1
    assert content["bytes"] > 0
    assert "1 finished export was removed" in CliRunner().invoke(doctor_command, ["--clear-cache"]).stdout
    store = open_store()
    assert store is not None
    assert store.entries() == []


def test_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE", "none")
    assert open_store() is None
    assert "no cache" in CliRunner().invoke(doctor_command, ["--cache"]).stdout


def test_a_user_without_a_home_has_none_and_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for variable in ("SPACH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert open_store() is None
    assert ExportCache.of(options()).take(options()) is None
    assert "SPACH_CACHE=DIR" in CliRunner().invoke(doctor_command, ["--cache"]).stdout


def test_a_cache_that_may_not_be_read_holds_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> Iterator[Path]:
        raise PermissionError(path)

    assert (cache / "entries").is_dir()
    monkeypatch.setattr(Path, "iterdir", refused)
    assert ExportCache.of(options()).take(options()) is None


# What makes it another export


def options() -> ExportOptions:
    return ExportOptions(ModelSpec("ms_hybrid_s"), Precision.FP16, output=Path("out"))


def other_options(tmp_path: Path) -> dict[str, ExportOptions]:
    checkpoint, images = tmp_path / "run.pth", tmp_path / "images"
    checkpoint.write_bytes(b"weights")
    images.mkdir(exist_ok=True)
    (images / "a.png").write_bytes(b"pixels")
    change = dataclasses.replace
    return {
        "precision": change(options(), precision=Precision.FP32),
        "outputs": change(options(), outputs=OutputSpec(softmax=True)),
        "engine": change(options(), engine=EngineTarget(Flavour.NONE)),
        "rewrites": change(options(), disabled_rewrites=("fold_residual",)),
        "place": change(options(), output=Path("elsewhere")),
        "checkpoint": change(options(), model=ModelSpec("ms_hybrid_s", checkpoint=checkpoint)),
        "images": change(options(), images=images),
        "quantization": change(options(), quantization=QuantizationSpec(method="mse")),
    }


def test_every_option_counts_but_overwrite(tmp_path: Path) -> None:
    keys_of = {name: export_key(other) for name, other in other_options(tmp_path).items()}
    assert len({*keys_of.values(), export_key(options())}) == len(keys_of) + 1
    assert export_key(dataclasses.replace(options(), overwrite=True)) == export_key(options())


def test_content_counts_and_not_the_name_of_a_time(tmp_path: Path) -> None:
    others = other_options(tmp_path)
    before = {name: export_key(others[name]) for name in ("checkpoint", "images")}
    (tmp_path / "run.pth").touch()
    assert export_key(others["checkpoint"]) == before["checkpoint"]
    (tmp_path / "run.pth").write_bytes(b"other")
    (tmp_path / "images" / "a.png").write_bytes(b"other pixels")
    assert export_key(others["checkpoint"]) != before["checkpoint"]
    assert export_key(others["images"]) != before["images"]


@pytest.mark.parametrize("part", ["code_digest", "tool_versions", "machine"])
def test_code_packages_and_machine_count(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = export_key(options())
    monkeypatch.setattr(keys, part, lambda: "other")
    assert export_key(options()) != before


def test_what_writes_elsewhere_too_has_no_key(tmp_path: Path) -> None:
    assert export_key(dataclasses.replace(options(), engine=EngineTarget(timing_cache=Path("t")))) is None
    assert (
        export_key(dataclasses.replace(options(), quantization=QuantizationSpec(cache=Destination.of(Path("c")))))
        is None
    )
    assert export_key(dataclasses.replace(options(), images=tmp_path / "missing")) is None


@pytest.mark.parametrize(("text", "size"), [("20G", 20 * 2**30), ("1.5 MB", 1.5e6), ("100", 100)])
def test_sizes(text: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE_SIZE", text)
    assert limit_bytes() == size


def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACH_CACHE_SIZE", "plenty")
    with pytest.raises(UsageError, match="SPACH_CACHE_SIZE=plenty"):
        limit_bytes()
