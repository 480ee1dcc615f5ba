from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.schema import Manifest
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import Destination, sha256_of
from tests.manifests import sections


def write(target: Path, graph: bytes = b"graph", *, overwrite: bool = False) -> None:
    with bundles.writing(bundles.check_target(target, overwrite=overwrite)) as staging:
        (staging / bundles.GRAPH).write_bytes(graph)
        (staging / bundles.PLAN).write_bytes(b"plan")
        bundles.seal(staging, Manifest.parse(json.dumps(sections()), "here"))


def test_a_bundle_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.inputs[0].shape == (None, 3, 224, 224)
    assert bundle.plan == tmp_path / "b" / "engine.plan"
    assert Bundle.open(tmp_path / "b" / "engine.plan").path == bundle.path
    assert os.listdir(tmp_path) == ["b"]


def test_what_is_settled_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(bundles, "sha256_of", lambda file: read.append(file.name) or sha256_of(file))  # type: ignore[func-returns-value]
    with bundles.writing(bundles.check_target(tmp_path / "b", overwrite=False)) as staging:
        (staging / bundles.GRAPH).write_bytes(b"graph")
        (staging / bundles.REPORT).write_text("{}")
        settled = bundles.digest_files(staging)
        assert list(settled) == [bundles.GRAPH]
        (staging / bundles.PLAN).write_bytes(b"plan")
        bundles.seal(staging, Manifest.parse(json.dumps(sections()), "here"), settled)
    assert read == [bundles.GRAPH, bundles.PLAN]
    assert not Bundle.open(tmp_path / "b").changed_files()


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "b")
    (tmp_path / "b" / bundles.GRAPH).write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        Bundle.open(tmp_path / "b")
    (tmp_path / "b" / bundles.PLAN).unlink()
    with pytest.raises(BundleError, match=r"engine\.plan is missing; model\.onnx was changed"):
        Bundle.open(tmp_path / "b")
    assert Bundle.open(tmp_path / "b", verify=False).changed_files() == {
        "engine.plan": "is missing",
        "model.onnx": "was changed",
    }


def test_a_name_that_is_taken_is_refused_and_overwrite_replaces(tmp_path: Path) -> None:
    write(tmp_path / "b", b"old")
    with pytest.raises(BundleError, match="--overwrite"):
        write(tmp_path / "b", b"new")
    assert (tmp_path / "b" / bundles.GRAPH).read_bytes() == b"old"
    write(tmp_path / "b", b"new", overwrite=True)
    assert (tmp_path / "b" / bundles.GRAPH).read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["b"]


def test_a_directory_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(BundleError, match="something else than a bundle"):
        write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("old", [None, b"old"])
def test_of_two_exports_to_one_place_the_later_is_refused(old: bytes | None, tmp_path: Path) -> None:
    """Whether they may replace an older one or not: what was not there when a command began is left alone."""
    if old:
        write(tmp_path / "b", old)
    late = bundles.check_target(tmp_path / "b", overwrite=old is not None)
    with pytest.raises(BundleError, match="written there since this command began") as refused, bundles.writing(late):
        write(tmp_path / "b", b"first", overwrite=old is not None)
    assert refused.value.exit_code == 2
    with pytest.raises(BundleError, match="since this command began"), bundles.writing(late):
        raise AssertionError("no work is begun for a place that was taken")
    assert Bundle.open(tmp_path / "b").file(bundles.GRAPH).read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["b"]


def test_an_error_in_the_middle_leaves_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b", b"old")

    def interrupted() -> None:
        with bundles.writing(bundles.check_target(tmp_path / "b", overwrite=True)) as staging:
            (staging / bundles.GRAPH).write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Bundle.open(tmp_path / "b").file(bundles.GRAPH).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_the_longest_name_that_a_file_system_takes(tmp_path: Path) -> None:
    """What is written beside it until it is whole has a name of its own."""
    target = tmp_path / ("é" * 127 + "b")
    write(target)
    write(target, overwrite=True)
    assert bundles.Bundle.open(target).path == target
    Destination.of(target / ("r" * 255)).write_text("report")
    with pytest.raises(OSError, match="name too long"):
        bundles.check_target(tmp_path / ("b" * 256), overwrite=False)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: both end a write with OSError."""
    with (
        pytest.raises(BundleError, match="cannot be written"),
        bundles.writing(bundles.check_target(tmp_path / "b", overwrite=False)) as staging,
    ):
        raise OSError(27, "File too large", str(staging))
    with (
        pytest.raises(BundleError, match="No space left"),
        bundles.writing(bundles.check_target(tmp_path / "b", overwrite=False)),
    ):
        raise OSError(28, "No space left on device")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["file/b", "file"])
def test_a_target_that_cannot_be_a_directory_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(BundleError):
        write(tmp_path / where)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[1]", "not a spach-deploy manifest"),
        ("{}", "not a spach-deploy manifest"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "lacks model"),
        (json.dumps(sections(files=7)), "wrong kind"),
        (json.dumps(sections(inputs=[{"name": 3}])), "wrong kind"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(sections())[:-1] + ', "files": {}}', "'files' is in it twice"),
        (
            json.dumps(sections()).replace("224, 224", "224, 1e999"),
            "entry of the wrong kind",
        ),
        (
            json.dumps(sections()).replace("224, 224]", "32, 32]"),
            "inputs: input has shape .*, and the model's image_size",
        ),
    ],
)
def test_a_hostile_manifest_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason):
        Manifest.parse(text, "manifest.json")


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("model", {"num_classes": 10**12}, "model: num_classes is 1000000000000, not 1 to 1,000,000"),
        ("model", {"num_classes": 7}, "outputs: logits has shape (None, 1000), and the model's num_classes is 7"),
        ("model", {"image_size": -1}, "model: image_size is -1, not 1 to 16,384"),
        ("model", {"image_size": 32}, "preprocessing: image_size is 224, and the model's is 32"),
        ("batch", {"max": 10**9}, "batch: max is 1000000000, not 1 to 999,999"),
        ("batch", {"most": 8}, "batch: it has not min, opt and max alone"),
        ("preprocessing", {"std": [0, 0, 0]}, "preprocessing: std is [0, 0, 0], not positive numbers"),
        ("preprocessing", {"mean": None}, "preprocessing.mean: expected array, got null"),
        ("files", None, "files: expected object, got null"),
    ],
)
def test_a_manifest_of_absurd_sizes_is_refused_when_it_is_read(section: str, changes: Any, reason: str) -> None:
    """Whoever believed them would make a name for each class, or wait for a batch of a thousand million."""
    content = sections()
    Manifest.parse(json.dumps(content), "manifest.json")
    content[section] = changes and {**content[section], **changes}
    with pytest.raises(BundleError, match=re.escape(f"has an entry of the wrong kind ({reason}).")):
        Manifest.parse(json.dumps(content), "manifest.json")


def test_a_manifest_cannot_name_files_outside_the_bundle(tmp_path: Path) -> None:
    write(tmp_path / "b")
    path = tmp_path / "b" / bundles.MANIFEST
    content = json.loads(path.read_text())
    content["files"]["../../etc/passwd"] = {"sha256": "0", "bytes": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="is outside the bundle"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("text", ["no bundle", ""])
def test_what_is_no_bundle_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text(text)
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError):
            Bundle.open(path)


WRITER = """
import sys
from pathlib import Path
from tests.bundle.test_bundle import write
print("ready", flush=True)
for turn in range(10_000):
    write(Path(sys.argv[1]), bytes([turn % 251]) * 20_000, overwrite=True)
"""


def test_kills_at_many_moments_leave_a_whole_bundle(tmp_path: Path) -> None:
    target = tmp_path / "b"
    write(target, b"first")
    chance = random.Random(7)
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert Bundle.open(target).plan is not None
    write(target, b"last", overwrite=True)
    assert os.listdir(tmp_path) == ["b"]  # what the killed ones left is gone
