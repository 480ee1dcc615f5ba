"""A validation in parts: the same report as from one process, and what differs between nodes is refused."""

from __future__ import annotations

import gc
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from spach_deploy.bundle.store import GRAPH
from spach_deploy.cli.validate import main
from spach_deploy.data.images import ImageEntry
from spach_deploy.options.specs import BatchProfile, Precision
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from spach_deploy.validation import shards
from spach_deploy.validation.runs import graph_batches
from spach_deploy.validation.shards import batches_per_shard, split_batches
from tests import small_bundles
from tests.commands import refusal
from tests.distributed.fakes import FakeCluster
from tests.quantization import small_quantized
from tests.quantization.small_quantized import pictures
from tests.validation import faults

pytestmark = pytest.mark.usefixtures("small_model_registered")

IMAGES = 31


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()
    monkeypatch.setattr("spach_deploy.distributed.actors.RayAddress", lambda address: fake)
    return fake


@pytest.fixture(scope="module")
def classed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pictures, some of which cannot be read."""
    root = tmp_path_factory.mktemp("classed")
    for number, picture in enumerate(pictures(IMAGES)):
        file = root / ("1" if number % 2 else "0").zfill(2) / f"{number:04}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(file, compress_level=0)
        if number in (0, 7, 8, 30):
            file.write_bytes(file.read_bytes()[:100])
    return root


@pytest.fixture(scope="module")
def tar(classed: Path) -> Path:
    path = classed.with_name("all.tar")
    with tarfile.open(path, "w") as archive:
        for file in sorted(classed.rglob("*.png")):
            content = file.read_bytes()
            member = tarfile.TarInfo(file.name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def same_report(*arguments: object, code: int = 0) -> dict[str, Any]:
    """From one process and from a cluster: the same JSON, table and remarks, but for what says how far it is."""
    results = [validate(*arguments, *more) for more in ((), ("--ray",))]
    for result in results:
        assert result.exit_code == code, result.output
    here, there = results
    assert here.stdout == there.stdout
    told = [[line for line in result.stderr.splitlines() if "Running the" not in line] for result in results]
    assert told[0] == told[1]
    report: dict[str, Any] = json.loads(there.stdout)
    return report


# Batches


@pytest.mark.parametrize(
    "profile", [BatchProfile(), BatchProfile(8, 8, 8), BatchProfile(2, 4, 4), BatchProfile(1, 1, 1)]
)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("batches", [1, 4])
def test_every_batch_is_whole_in_one_cut(profile: BatchProfile, count: int, batches: int) -> None:
    cuts = list(split_batches(count, profile, batches))
    reference = [batch for cut in cuts for batch in cut.reference]
    graph = [batch for cut in cuts for batch in cut.graph]
    assert reference == [(start, min(start + 3, count)) for start in range(0, count, 3)]
    assert [stop - start for start, stop in graph] == list(graph_batches(count, profile))
    for batch, following in itertools.pairwise(graph):
        assert batch[1] == following[0]
    assert all(cut.start <= start for cut in cuts for start, _ in cut.graph)


def test_parts_are_small_enough_for_all_workers_and_bounded() -> None:
    assert batches_per_shard(10, 8) == 1
    assert batches_per_shard(3 * 32, 2) == 4
    assert batches_per_shard(10_000_000, 100) == 16


# The same report


def test_a_folder_with_unreadable_pictures_and_labels(cluster: FakeCluster, classed: Path) -> None:
    graph = small_bundles.bundle(Precision.FP16) / GRAPH
    report = same_report(graph, "--images", classed, "--labels", classed, "--json")
    assert report["images"]["count"] == IMAGES - 4
    assert report["accuracy"]["images"] == IMAGES - 4
    assert [item["passed"] for item in report["evidence"]] == [True, True]
    assert cluster.pools[0] > 1e9


def test_spares_stand_in_for_pictures_that_cannot_be_read(cluster: FakeCluster, classed: Path) -> None:
    graph = small_bundles.bundle(Precision.FP32) / GRAPH
    report = same_report(graph, "--images", classed, "--max-images", 25, "--json")
    assert report["images"]["count"] == 25
    assert report["images"]["names"][-1] != sorted(report["images"]["names"])[-1]  # the last one is a spare


def test_a_tar_whose_pictures_are_sent(cluster: FakeCluster, tar: Path) -> None:
    same_report(small_bundles.bundle(Precision.BF16) / GRAPH, "--images", tar, "--max-images", 11, "--json")


def test_a_bundle_whose_plan_does_not_run_here(cluster: FakeCluster, classed: Path) -> None:
    report = same_report(small_bundles.bundle(Precision.FP16), "--images", classed, "--json", code=3)
    assert "no NVIDIA GPU" in report["level_sentence"]


def test_a_quantized_bundle_on_an_npz_with_labels(cluster: FakeCluster, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    np.savez(images, images=pictures(20), labels=np.arange(20) % small_bundles.CLASSES)
    graph = small_quantized.bundle(Precision.INT8) / GRAPH
    report = same_report(graph, "--images", images, "--max-drop", 100, "--json")
    assert report["accuracy"]["labels"] == "the npz's own"


def test_the_table_too(cluster: FakeCluster, classed: Path, tmp_path: Path) -> None:
    graph = small_bundles.bundle(Precision.FP16) / GRAPH
    reports = [tmp_path / "here.json", tmp_path / "there.json"]
    texts = [
        validate(graph, "--images", classed, "--report", report, *more).stdout.replace(str(report), "")
        for report, more in zip(reports, ((), ("--ray",)), strict=True)
    ]
    assert texts[0] == texts[1]
    assert reports[0].read_text() == reports[1].read_text()


# Graphs that are not right


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    return small_bundles.copy(small_bundles.bundle(Precision.FP16), tmp_path / "bundle")


def test_a_graph_that_computes_something_else(cluster: FakeCluster, spoiled: Path, classed: Path) -> None:
    model = small_bundles.load_graph(spoiled)
    faults.perturb(model, "head.weight")
    small_bundles.save_graph(model, spoiled)
    report = same_report(spoiled / GRAPH, "--images", classed, "--json", code=1)
    assert not any(item["passed"] for item in report["evidence"])


def test_a_graph_that_takes_other_inputs_is_not_tried_elsewhere(
    cluster: FakeCluster, spoiled: Path, classed: Path
) -> None:
    model = small_bundles.load_graph(spoiled)
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "input" else name for name in node.input]
    small_bundles.save_graph(model, spoiled)
    report = same_report(spoiled / GRAPH, "--images", classed, "--json", code=1)
    assert "Its inputs are not the bundle's" in report["findings"][0]


def test_a_graph_that_fails_at_some_batch(cluster: FakeCluster, classed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first problem in the images' order is told, though later parts fail otherwise."""
    run = OnnxRuntimeRunner.run

    def failing(self: OnnxRuntimeRunner, feeds: Any) -> Any:
        if len(feeds["input"]) == 3:
            raise RuntimeError(f"no memory for {float(feeds['input'].sum()):.3f}")
        return run(self, feeds)

    graph = small_bundles.bundle(Precision.FP16) / GRAPH
    monkeypatch.setattr(OnnxRuntimeRunner, "run", failing)
    report = same_report(graph, "--images", classed, "--json", code=1)
    assert "It failed while it ran: no memory for" in report["findings"][0]


def test_a_bundle_without_a_graph(cluster: FakeCluster, spoiled: Path, classed: Path) -> None:
    (spoiled / GRAPH).unlink()
    same_report(spoiled, "--images", classed, "--json", code=1)


# What differs between nodes


def test_pictures_that_change_between_the_passes_are_an_error(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    original = shards.batches_per_shard

    def meanwhile(change: Callable[[], object]) -> str:
        def batches(images: int, workers: int) -> int:
            change()
            return original(images, workers)

        monkeypatch.setattr(shards, "batches_per_shard", batches)
        return refusal(validate(small_bundles.bundle(Precision.FP32) / GRAPH, "--images", tmp_path, "--ray"))

    other = Image.fromarray(pictures(1, 9)[0])
    assert "3.png was changed while it was validated on" in meanwhile(lambda: other.save(tmp_path / "3.png"))


def test_labels_that_do_not_fit_are_refused_before_the_expensive_pass(cluster: FakeCluster, classed: Path) -> None:
    labels = classed.with_name("labels.txt")
    labels.write_text("nobody.png 0\n")
    arguments = small_bundles.bundle(Precision.FP32) / GRAPH, "--images", classed, "--labels", labels, "--ray"
    result = validate(*arguments)
    assert result.exit_code == 2
    assert "labels none of the" in result.stderr
    assert cluster.pools == []


def test_pictures_are_held_for_a_few_parts_only(cluster: FakeCluster, tmp_path: Path) -> None:
    images, most = tmp_path / "images.npz", 0

    def count(item: Any) -> None:
        nonlocal most
        most = max(most, sum(type(thing) is ImageEntry for thing in gc.get_objects()))

    np.savez(images, images=pictures(120))
    cluster.watch = count
    assert validate(small_bundles.bundle(Precision.FP32) / GRAPH, "--images", images, "--ray").exit_code == 0
    assert 0 < most < 40


# Refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((GRAPH,), "--ray spreads many images over a cluster, and the golden pack holds few. Give --images PATH too"),
        ((GRAPH, "--images", "photos", "--bisect"), "--bisect looks at a few images on this machine"),
        (("engine.plan", "--images", "photos"), "--ray runs graphs in ONNX Runtime, and no plans. Give"),
    ],
)
def test_what_a_cluster_does_not_do_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    target, *more = arguments
    assert reason in refusal(validate(small_bundles.bundle(Precision.FP16) / target, *more, "--ray"))


def test_one_target_and_files_alone_are_spread(classed: Path) -> None:
    bundle = small_bundles.bundle(Precision.FP16)
    assert "--ray is for one target" in refusal(validate(bundle, bundle, "--ray"))
    server = validate("http://localhost:1/model", "--bundle", bundle, "--ray")
    assert "--ray is not for models on a server" in refusal(server)
    against = validate(bundle / GRAPH, "--against", bundle, "--images", classed, "--ray")
    assert "--against looks at a few images on this machine" in refusal(against)


def test_a_plan_that_runs_here_is_not_left_out_in_silence(classed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = small_bundles.bundle(Precision.FP16)
    monkeypatch.setattr("spach_deploy.validation.target.runs_here", lambda plan, flavour: True)
    result = validate(bundle, "--images", classed, "--ray")
    assert "this machine can run the plan itself" in refusal(result)


def test_without_ray_the_way_to_install_it_is_named(classed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_bundles.bundle(Precision.FP16) / GRAPH
    monkeypatch.setitem(sys.modules, "ray", None)
    result = validate(graph, "--images", classed, "--ray")
    assert "--ray needs ray, which is not installed here. Install it: pip install" in refusal(result, 3)
