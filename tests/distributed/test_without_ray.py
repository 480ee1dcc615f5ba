"""What of a cluster's work needs no cluster: packing, sharing cores, and what is said where ray is missing."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import Destination
from spach_deploy.distributed.builds import build_bundle, pack, portable, unpack
from spach_deploy.distributed.cluster import cores
from spach_deploy.options.specs import ExportOptions, ModelSpec
from tests.bundle.test_bundle import write
from tests.commands import export, refusal


def test_without_ray_the_way_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = export("--zoo", "ms_conv_xxs", "--engine", "none", "-o", tmp_path / "zoo", "--ray")
    assert "--ray needs ray, which is not installed here. Install it: pip install 'spach-deploy[ray]'" in refusal(
        result, 3
    )
    assert not (tmp_path / "zoo").exists()


def test_a_bundle_is_packed_and_unpacked_and_a_spoiled_one_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    packed = pack(tmp_path / "a")
    place = Destination.of(tmp_path / "b")
    unpack(packed, place)
    assert Bundle.open(tmp_path / "b").manifest.files == Bundle.open(tmp_path / "a").manifest.files
    with pytest.raises(BundleError, match="since this command began"):
        unpack(packed, place)
    before, found, after = packed.rpartition(b"graph")  # model.onnx's content; the manifest has the word before
    with pytest.raises(BundleError, match="not as it was exported"):
        unpack(before + found.upper() + after, Destination.of(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_node_with_another_version_says_so() -> None:
    brought = build_bundle(["-c", "pass"], "name", "another digest")
    assert brought.archive is None
    assert "another version of spach-deploy" in brought.ended.sentence


def test_paths_mean_the_same_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = portable(ExportOptions(ModelSpec("m", Path("c.pth")), images=Path("val"), output=Path("zoo/b")))
    assert found.model.checkpoint == tmp_path / "c.pth"
    assert found.images == tmp_path / "val"
    assert found.output == Path("b")


def test_cores_are_not_shared_while_there_are_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6})
    with cores(1) as first, cores(2) as second:
        assert first == {4}
        assert second == {5, 6}
        with cores(1) as third:
            assert third == {4, 5, 6}
    with cores(1) as again:
        assert again == {4}


def test_locks_of_cores_are_not_taken_through_links_or_in_a_directory_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    everything = frozenset(os.sched_getaffinity(0))
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / f"spach-deploy-cores-{os.getuid()}"
    folder.mkdir(0o700)
    for core in everything:
        (folder / str(core)).symlink_to(tmp_path / "precious")
    with cores(1) as taken:
        assert taken == everything
    assert (tmp_path / "precious").read_text() == "precious"
    for core in everything:
        (folder / str(core)).unlink()
    with cores(1) as taken:
        assert len(taken) == 1
    folder.chmod(0o777)
    with cores(1) as taken:
        assert taken == everything
