"""What the bytes of a plan tell, for headers of every kind, and files with more or less than a plan in them."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from spach_deploy.doctor.plan_file import SEARCHED_BYTES, PlanFile, find_plan
from spach_deploy.options.specs import ComputeCapability, Flavour
from spach_deploy.runtime.devices import RTX_CAPABILITIES
from tests import small_bundles
from tests.doctor.plans import old_plan, ordinary_plan, rtx_plan, with_metadata

SM75, SM86, SM89 = (ComputeCapability(*pair) for pair in ((7, 5), (8, 6), (8, 9)))


def found(tmp_path: Path, content: bytes) -> PlanFile | None:
    file = tmp_path / "some.engine"
    file.write_bytes(content)
    return find_plan(file)


def plan(tmp_path: Path, content: bytes) -> PlanFile:
    result = found(tmp_path, content)
    assert result is not None
    return result


# Whole plans


@pytest.mark.parametrize("gpus", [(SM75,), (SM86, SM89), RTX_CAPABILITIES], ids=str)
def test_a_plan_of_tensorrt_for_rtx(tmp_path: Path, gpus: tuple[ComputeCapability, ...]) -> None:
    result = plan(tmp_path, rtx_plan(*gpus))
    assert (result.flavour, result.version, result.gpus) == (Flavour.TENSORRT_RTX, "1.7.1.116", gpus)
    assert result.is_whole
    assert not result.newer_gpus


def test_code_for_later_gpus(tmp_path: Path) -> None:
    assert plan(tmp_path, rtx_plan(SM89, later=True)).newer_gpus


def test_gpus_are_not_known_where_the_header_reads_otherwise(tmp_path: Path) -> None:
    """Another version may keep something else there; a plan without the second magic number, or with unknown bits."""
    assert plan(tmp_path, small_bundles.plan_bytes()).gpus is None
    unknown = bytearray(rtx_plan(SM89))
    unknown[34] = 1
    assert plan(tmp_path, bytes(unknown)).gpus is None
    assert plan(tmp_path, rtx_plan()).gpus is None


@pytest.mark.parametrize("version", [(8, 6, 1, 6), (10, 16, 1, 11), (11, 4, 0, 5)], ids=str)
def test_a_plan_of_tensorrt(tmp_path: Path, version: tuple[int, ...]) -> None:
    result = plan(tmp_path, ordinary_plan(*version))
    assert (result.flavour, result.version) == (Flavour.TENSORRT, ".".join(map(str, version)))
    assert result.gpus is None  # it stands in no known place
    assert result.is_whole


def test_the_version_is_not_known_in_another_serialization(tmp_path: Path) -> None:
    assert plan(tmp_path, ordinary_plan(10, 16, 1, 11, serialization=1)).version is None


@pytest.mark.parametrize(("serialization", "version"), [(205, "8.2"), (213, "8.4"), (232, "8.5"), (7, None)])
def test_a_plan_of_an_old_tensorrt(tmp_path: Path, serialization: int, version: str | None) -> None:
    result = plan(tmp_path, old_plan(serialization))
    assert (result.flavour, result.version, result.is_whole) == (Flavour.TENSORRT, version, True)


# More or less than a plan


@pytest.mark.parametrize("kept", [4, 16, 63, 64, 65, 4095])
def test_a_plan_that_is_cut_off(tmp_path: Path, kept: int) -> None:
    result = plan(tmp_path, rtx_plan(SM89)[:kept])
    assert result.flavour is Flavour.TENSORRT_RTX
    assert not result.is_whole
    assert result.missing_bytes == (64 if kept < 64 else 4096) - kept


@pytest.mark.parametrize("kept", [4, 40, 63])
def test_even_the_header_is_cut_off(tmp_path: Path, kept: int) -> None:
    assert plan(tmp_path, ordinary_plan(10, 16, 1, 11)[:kept]).missing_bytes == 64 - kept
    assert plan(tmp_path, old_plan(232)[:kept]).missing_bytes == 64 - kept


def test_that_a_plan_of_tensorrt_is_cut_off_is_a_guess(tmp_path: Path) -> None:
    result = plan(tmp_path, ordinary_plan(10, 16, 1, 11)[:1000])
    assert result.perhaps_cut
    assert result.is_whole
    assert not plan(tmp_path, ordinary_plan(10, 16, 1, 11, declared=2**60)).perhaps_cut


def test_something_appended(tmp_path: Path) -> None:
    result = plan(tmp_path, rtx_plan(SM89) + b"signature")
    assert (result.surplus_bytes, result.is_whole) == (9, False)


@pytest.mark.parametrize("content", [rtx_plan(SM89), ordinary_plan(10, 3, 0, 26), old_plan(213)])
def test_metadata_as_ultralytics_writes_it(tmp_path: Path, content: bytes) -> None:
    metadata = b'{"task": "detect"}'
    result = plan(tmp_path, with_metadata(content, metadata))
    assert result.offset == 4 + len(metadata)
    assert "Ultralytics" in result.before
    assert not result.is_whole
    assert (result.missing_bytes, result.surplus_bytes) == (0, 0)
    assert result.version == plan(tmp_path, content).version


@pytest.mark.parametrize("prefix", [b"x", b"model: resnet\n" * 40, bytes(100_000)], ids=len)
@pytest.mark.parametrize("content", [rtx_plan(SM89), ordinary_plan(10, 3, 0, 26), small_bundles.plan_bytes()])
def test_another_tools_metadata(tmp_path: Path, prefix: bytes, content: bytes) -> None:
    result = plan(tmp_path, prefix + content)
    assert (result.offset, result.is_whole) == (len(prefix), False)


def test_a_plan_far_behind_the_start_is_not_looked_for(tmp_path: Path) -> None:
    assert found(tmp_path, bytes(SEARCHED_BYTES) + rtx_plan(SM89)) is None


# No plan


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"vtr",
        bytes(5000),
        b"the word ftrt in a text, and vtrt too" + b" " * 100,
        rtx_plan(SM89)[20:],  # the header's second magic number is not a beginning
        b"..." + ordinary_plan(3, 0, 0, 0),
        (12).to_bytes(4, "little") + b"not any JSON" + bytes(100),
        (2**31).to_bytes(4, "little") + b"{" + bytes(100),
        with_metadata(b""),
        with_metadata(bytes(100)),
    ],
    ids=range(10),
)
def test_what_is_no_plan(tmp_path: Path, content: bytes) -> None:
    assert found(tmp_path, content) is None


def test_any_bytes_are_read_without_an_error(tmp_path: Path) -> None:
    """Plans with bytes overwritten, moved and cut at random."""
    chance = random.Random(0)
    originals = [rtx_plan(SM89), ordinary_plan(10, 16, 1, 11), old_plan(232), with_metadata(rtx_plan(SM75))]
    for _ in range(400):
        content = bytearray(chance.choice(originals))
        for _ in range(chance.randrange(8)):
            content[chance.randrange(100)] = chance.randrange(256)
        start, stop = chance.randrange(3), chance.randrange(len(content))
        result = found(tmp_path, bytes(content[start:stop]))
        assert result is None or result.total_bytes == max(0, stop - start)


# The real one

BUILD = """
import json, sys
import tensorrt_rtx as trt
headers = {}
for names in (["SM75"], ["SM86", "SM89"], ["SM120"], []):
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    tensor = network.add_input("x", trt.float16, (4, 64))
    network.mark_output(network.add_activation(tensor, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    plan = bytes(builder.build_serialized_network(network, config))
    headers[" ".join(names)] = [plan[:64].hex(), len(plan)]
print("\\n" + json.dumps({"version": trt.__version__, "headers": headers}))
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_headers_of_plans_built_here(tmp_path: Path) -> None:
    """What is read of the header is nowhere documented: it is held against plans of the installed version."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=True)
    built = json.loads(done.stdout.splitlines()[-1])
    expected = {"SM75": (SM75,), "SM86 SM89": (SM86, SM89), "SM120": (ComputeCapability(12, 0),)}
    for names, (header, total) in built["headers"].items():
        result = plan(tmp_path, bytes.fromhex(header) + bytes(total - 64))
        assert (result.version, result.is_whole) == (built["version"], True)
        assert result.gpus == expected.get(names, RTX_CAPABILITIES[1:])
        assert result.newer_gpus is (names == "")
