"""A zoo on a Ray cluster: bundles come back from other nodes, and a node that dies costs nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from spach_deploy.bundle.store import Bundle
from tests.commands import console_script, export, refusal
from tests.distributed.small_cluster import add_node, cluster_of, needs_ray
from tests.pipeline.zoo import stub

pytestmark = needs_ray

NAMES = [f"{model}-{precision}" for model in ("ms_conv_xxs", "ms_trans_xxs") for precision in ("fp16", "bf16")]
ASKED = ("--zoo", "ms_trans_xxs,ms_conv_xxs", "--precision", "fp16,bf16", "--engine", "none", "-o", "zoo")
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with cluster_of(2) as running:
        yield running


@pytest.fixture(autouse=True)
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub").mkdir()
    monkeypatch.setattr("spach_deploy.cli.zoo.COMMAND", (*stub.COMMAND, str(tmp_path / "stub")))


def behave(name: str, how: str) -> None:
    Path("stub", name).write_text(how)


def begun() -> list[tuple[str, int]]:
    """Exports that began, with their processes."""
    file = Path("stub/begun")
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(pid)) for name, pid in (line.split() for line in lines)]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def whole(result: Result, code: int) -> dict[str, Any]:
    """The rows of the summary, by name."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not [path for path in Path("zoo").iterdir() if "partial" in path.name]
    found = {row["name"]: row for row in json.loads(Path("zoo/summary.json").read_text())["bundles"]}
    for name, row in found.items():
        assert (Path("zoo") / name).exists() == (row["verdict"] == "agreed")
        if row["verdict"] == "agreed":
            Bundle.open(Path("zoo") / name)
    return found


def test_bundles_come_back_failures_are_rows_and_a_second_run_goes_on(cluster: Any) -> None:
    behave(NAMES[0], "exit 3 No GPU.")
    behave(NAMES[1], "kill")
    found = whole(export(*ASKED, "--ray", cluster.address), 3)
    assert found[NAMES[0]]["problem"] == "No GPU."
    assert "too little memory" in found[NAMES[1]]["problem"]
    assert {row["node"] for row in found.values()} == {socket.gethostname()}
    assert len(begun()) == len(NAMES)  # an export that fails is no reason to try again
    behave(NAMES[0], "")
    behave(NAMES[1], "")
    result = export(*ASKED, "--ray", cluster.address)
    whole(result, 0)
    assert "4 agreed (2 kept from before)" in result.stdout


def test_a_node_that_dies_in_the_middle_costs_nothing(cluster: Any) -> None:
    for name in NAMES:
        behave(name, "wait 2")
    lost = add_node(cluster)

    def lose() -> None:
        until(lambda: len(begun()) >= 3)
        cluster.remove_node(lost, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    found = whole(export(*ASKED, "--ray", cluster.address), 0)
    losing.join()
    assert list(found) == NAMES
    assert len(begun()) == len(NAMES) + 1  # the one that was lost began again


def test_ctrl_c_ends_the_exports_on_their_nodes(cluster: Any) -> None:
    for name in NAMES:
        behave(name, "wait")
    before = (
        f"import spach_deploy.cli.zoo\nspach_deploy.cli.zoo.COMMAND = {(*stub.COMMAND, str(Path('stub').resolve()))!r}"
    )
    script = console_script("spach-export", Path.cwd(), before=before)
    call = [str(script), *ASKED, "--ray", cluster.address]
    process = subprocess.Popen(call, text=True, stderr=subprocess.PIPE)
    until(lambda: len(begun()) == 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=PATIENCE_S)[1].splitlines()
    assert process.returncode == 130, said
    assert said[-1] == "Interrupted. 0 of 4 bundles are there; the same command goes on with the others."
    until(lambda: not any(Path(f"/proc/{pid}").exists() for _, pid in begun()))
    assert not [path for path in Path("zoo").iterdir() if "partial" in path.name]


def test_one_that_no_node_has_the_memory_for_is_told(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spach_deploy.pipeline.estimate._BASE_BYTES", 1e15)
    found = whole(export(*ASKED, "--ray", cluster.address), 3)
    assert "no node of the cluster has more than" in found[NAMES[0]]["problem"]


def test_an_address_that_does_not_answer_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        said = refusal(export(*ASKED, "--ray", f"127.0.0.1:{taken.getsockname()[1]}"), 3)
    assert "No Ray cluster answers at 127.0.0.1" in said
    assert "ray start --head" in said


def test_somebody_else_who_answers_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spach_deploy.distributed.cluster._HEALTH_S", 3.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = refusal(export(*ASKED, "--ray", f"127.0.0.1:{other.getsockname()[1]}"), 3)
    assert "does not answer as Ray does" in said
