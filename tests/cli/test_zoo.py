"""spach-export --zoo: failures are rows, a second run goes on, kills and full disks lose one bundle at most."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from spach_deploy.bundle.store import GRAPH, MANIFEST, Bundle
from spach_deploy.pipeline.zoo import make as making
from tests import small_bundles, static_models
from tests.bundle.test_bundle import write
from tests.commands import console_script, export, refusal
from tests.pipeline.zoo import stub
from tests.report.test_report_page import Page

MODELS = ("ms_trans_xxs", "ms_conv_xxs")
NAMES = [f"{model}-{precision}" for model in reversed(MODELS) for precision in ("fp16", "bf16")]
ASKED = ("--zoo", ",".join(MODELS), "--precision", "fp16,bf16", "--engine", "none", "-o", "zoo")
WAITING = tuple(name for name in NAMES if name.startswith("ms_trans"))
"""The shorter ones, which begin when the others are done."""

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory of its own, with exports that are stubs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub").mkdir()
    monkeypatch.setenv("STUB", str(tmp_path / "stub"))
    monkeypatch.setattr("spach_deploy.cli.zoo.COMMAND", stub.COMMAND)


def behave(name: str, how: str) -> None:
    Path("stub", name).write_text(how)


def summary() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("zoo/summary.json").read_text())
    return content


def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in summary()["bundles"]}


def made() -> dict[str, bytes]:
    """Each bundle's manifest, which no two exports share."""
    return {path.parent.name: path.read_bytes() for path in Path("zoo").glob(f"*/{MANIFEST}")}


def whole(result: Result, code: int) -> Result:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for name in made():
        Bundle.open(Path("zoo") / name)
    assert not [path for path in Path("zoo").iterdir() if "partial" in path.name]
    return result


def test_all_are_made_and_told() -> None:
    result = whole(export(*ASKED), 0)
    assert "4 bundles: 4 agreed." in result.stdout
    assert "Summary: zoo/summary.html" in result.stdout
    assert set(made()) == set(NAMES)
    assert list(rows()) == NAMES
    content = summary()
    assert (content["schema_version"], content["kind"], content["exit_code"]) == (1, "spach-deploy zoo", 0)
    assert content["command"].startswith("spach-export --zoo ms_trans_xxs,ms_conv_xxs --precision fp16,bf16")
    row = content["bundles"][0]
    assert row["rel_l2"] == 0.001
    assert row["kernels"] == 7
    assert row["report"] == "ms_conv_xxs-fp16/report.html"
    assert row["bundle_bytes"] == sum(file.stat().st_size for file in Path("zoo", NAMES[0]).iterdir())
    assert row["peak_bytes"] > 1e6


def test_failures_are_rows_and_the_worst_decides() -> None:
    for name, how in zip(NAMES, ("exit 3 No GPU.", "kill", "exit 2 Bad image."), strict=False):
        behave(name, how)
    result = whole(export(*ASKED), 3)
    assert "4 bundles: 1 agreed, 3 failed." in result.stdout
    found = rows()
    assert [found[name]["exit_code"] for name in NAMES] == [3, -9, 2, 0]
    assert found[NAMES[0]]["problem"] == "No GPU."
    assert "too little memory" in found[NAMES[1]]["problem"]
    assert set(made()) == set(NAMES[3:])
    behave(NAMES[3], "exit 1 It does not agree with PyTorch.")
    shutil.rmtree("zoo")
    assert "1 disagreed" in whole(export(*ASKED), 1).stdout
    assert rows()[NAMES[3]]["verdict"] == "disagreed"


def test_a_second_run_makes_what_is_missing_and_keeps_the_rest() -> None:
    behave(NAMES[2], "exit 3 No.")
    whole(export(*ASKED), 3)
    before = made()
    behave(NAMES[2], "")
    result = whole(export(*ASKED), 0)
    assert "4 agreed (3 kept from before)" in result.stdout
    assert f"{NAMES[0]}: agreed, kept" in result.stderr
    after = made()
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {NAMES[2]}
    assert [name for name, row in rows().items() if not row["is_kept"]] == [NAMES[2]]


def test_a_damaged_bundle_is_made_again() -> None:
    whole(export(*ASKED), 0)
    before = made()
    Path("zoo", NAMES[1], GRAPH).write_bytes(b"spoiled")
    Path("zoo", NAMES[3], GRAPH).unlink()
    result = whole(export(*ASKED), 0)
    assert f"{NAMES[1]} was damaged and is made again." in result.stderr
    assert {name for name, manifest in made().items() if manifest != before[name]} == {NAMES[1], NAMES[3]}


def test_bundles_of_other_options_are_not_replaced_unasked() -> None:
    whole(export(*ASKED), 0)
    before = made()
    said = refusal(export(*ASKED, "--softmax"))
    assert "zoo/ms_conv_xxs-fp16 holds a bundle of other options, inputs or code (4 such bundles in all)" in said
    assert "--overwrite" in said
    assert made() == before
    behave(NAMES[0], "exit 3 No.")
    whole(export(*ASKED, "--softmax", "--overwrite"), 3)
    assert made()[NAMES[0]] == before[NAMES[0]]  # the old one is there, and is not taken for the new one
    assert NAMES[0] in refusal(export(*ASKED, "--softmax"))
    behave(NAMES[0], "")
    assert "(3 kept from before)" in whole(export(*ASKED, "--softmax", "--overwrite"), 0).stdout


def test_a_bundle_that_came_since_the_zoo_began_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the zoo may replace the one that was there."""
    whole(export(*ASKED), 0)
    shutil.rmtree(Path("zoo", NAMES[3]))

    def work_of(*arguments: Any, **how: Any) -> Any:
        found = making.work_of(*arguments, **how)
        for name in (NAMES[0], NAMES[3]):
            write(Path("zoo", name), b"another's", overwrite=True)
        return found

    monkeypatch.setattr("spach_deploy.cli.zoo.work_of", work_of)
    whole(export(*ASKED, "--softmax", "--overwrite"), 3)
    for name in (NAMES[0], NAMES[3]):
        assert "was written there since this command began" in rows()[name]["problem"]
        assert Path("zoo", name, GRAPH).read_bytes() == b"another's"


def test_a_page_of_somebody_else_is_left_alone() -> None:
    Path("zoo").mkdir()
    Path("zoo/summary.html").write_text("<p>My summary</p>")
    assert "zoo/summary.html is no page of spach-deploy and is left alone." in refusal(export(*ASKED))
    assert Path("zoo/summary.html").read_text() == "<p>My summary</p>"


def test_images_of_the_same_path_with_other_content_make_other_bundles() -> None:
    Path("photos").mkdir()
    shutil.copy(Path(__file__).parents[2] / "spach_deploy/data/probes/coffee.jpg", "photos/a.jpg")
    whole(export(*ASKED, "--images", "photos"), 0)
    assert "4 kept" in whole(export(*ASKED, "--images", "photos"), 0).stdout
    Path("photos/b.jpg").write_bytes(Path("photos/a.jpg").read_bytes())
    assert "other options, inputs or code" in refusal(export(*ASKED, "--images", "photos"))


def test_no_cache_does_it_all_again() -> None:
    whole(export(*ASKED), 0)
    before = made()
    refusal(export(*ASKED, "--no-cache"))
    whole(export(*ASKED, "--no-cache", "--overwrite"), 0)
    assert not set(made().values()) & set(before.values())


def test_a_dry_run_tells_and_does_nothing() -> None:
    result = export(*ASKED, "--dry-run")
    assert result.exit_code == 0
    assert "4 bundles, 0 kept, 4 to make" in result.stdout
    assert not Path("zoo").exists()
    whole(export(*ASKED), 0)
    assert "4 kept, 0 to make" in export(*ASKED, "--dry-run").stdout
    content = json.loads(export(*ASKED, "--dry-run", "--json").stdout)
    assert [row["name"] for row in content["bundles"]] == NAMES


def test_json_is_the_summary_itself() -> None:
    content = json.loads(whole(export(*ASKED, "--json"), 0).stdout)
    assert content["bundles"] == summary()["bundles"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--zoo", "ms_conv_xxs", "--model", "ms_conv_xxs"), "--zoo names models, and --model does too"),
        (("--zoo", "ms_conv_xxs", "--auto"), "--auto is for one model"),
        (("--zoo", "vgg*"), "matches no model"),
        (("--zoo", "ms_conv_xxs", "--precision", "fp16,fp5"), "'fp5' is unknown"),
        (("--zoo", "ms_conv_xxs", "--precision", "fp16,int8", "--engine", "none"), "ms_conv_xxs-int8: --int8 needs"),
        (("--zoo", "ms_conv_xxs", "--precision", "fp16", "--calibration", "x"), "--calibration is for quantized"),
        (("--zoo", "ms_conv_xxs", "--images", "nowhere"), "There is no nowhere"),
        (("--model", "ms_conv_xxs", "--precision", "fp16"), "--precision is for --zoo"),
        (("--model", "ms_conv_xxs", "--jobs", "2"), "--jobs is for --zoo"),
    ],
)
def test_bad_usage_is_refused_before_anything_begins(words: tuple[str, ...], said: str) -> None:
    assert said in refusal(export(*words, "-o", "zoo"))
    assert not Path("zoo").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_each_gpu_has_its_bundle_and_impossible_ones_are_named() -> None:
    words = ("--zoo", "ms_conv_xxs", "--engine", "tensorrt-rtx", "-o", "zoo", "--gpu", "sm86+sm89,sm120")
    whole(export(*words, "--fp16"), 0)
    assert set(made()) == {"ms_conv_xxs-fp16-sm86-sm89", "ms_conv_xxs-fp16-sm120"}
    Path("c").mkdir()
    shutil.copy(Path(__file__).parents[2] / "spach_deploy/data/probes/coffee.jpg", "c/a.jpg")
    said = refusal(export(*words, "--precision", "fp16,fp8", "--calibration", "c", "--overwrite"))
    assert "ms_conv_xxs-fp8-sm86-sm89" in said
    assert "ms_conv_xxs-fp8-sm120" not in said


def test_files_of_others_are_left_alone() -> None:
    Path("zoo").mkdir()
    Path("zoo/summary.json").write_text('{"mine": 1}')
    assert "left alone" in refusal(export(*ASKED))
    Path("zoo/summary.json").unlink()
    Path("zoo", NAMES[0]).mkdir()
    Path("zoo", NAMES[0], "thesis.txt").write_text("mine")
    assert "else than a bundle" in refusal(export(*ASKED))
    shutil.rmtree("zoo")
    write(Path("zoo"))
    assert "is a bundle, no place for many" in refusal(export(*ASKED))


def test_the_page_is_whole_and_links_to_every_report() -> None:
    behave(NAMES[1], "exit 3 <b>No</b> & never.")
    whole(export(*ASKED), 3)
    text = Path("zoo/summary.html").read_text()
    page = Page(text)
    assert page.wrong == []
    assert page.open == []
    links = [found["href"] for tag, found in page.elements if tag == "a" and "report" in found["href"]]
    assert len(links) == 3
    assert all(Path("zoo", link).is_file() for link in links)
    assert "<script" not in text
    assert "&lt;b&gt;No&lt;/b&gt; &amp; never." in text
    assert "1 bundle could not be made" in text


# Processes of their own, which can be killed

REGISTER = f"import os\nimport spach_deploy.cli.zoo\nspach_deploy.cli.zoo.COMMAND = {stub.COMMAND!r}"


def start(*more: str, limit_bytes: int | None = None) -> subprocess.Popen[str]:
    """spach-export as a user starts it, two exports at once."""
    script = console_script("spach-export", Path.cwd(), before=REGISTER)

    def limited() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [str(script), *ASKED, "--jobs", "2", *more], text=True, stderr=subprocess.PIPE, preexec_fn=limited
    )


def until_all_wait(names: Sequence[str]) -> None:
    """Until these exports, which wait, have begun to write."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if all(list(Path("zoo").glob(f".{name}.partial*/model.onnx")) for name in names):
            return
        time.sleep(0.02)
    raise AssertionError("they did not begin")


def processes() -> list[int]:
    """Stubs that run in this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(Path.cwd()) and b"stub.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone() -> bool:
    end = time.monotonic() + PATIENCE_S
    while processes() and time.monotonic() < end:
        time.sleep(0.02)
    return not processes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_exports_and_costs_what_was_in_progress(number: int) -> None:
    for name in WAITING:
        behave(name, "wait")
    process = start()
    until_all_wait(WAITING)
    finished = set(made())
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE_S)[1].splitlines()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
    assert gone()
    assert set(made()) == finished
    assert finished == set(NAMES) - set(WAITING)
    if number != signal.SIGKILL:
        assert said[-1] == ("Interrupted. 2 of 4 bundles are there; the same command goes on with the others.")
        assert not [path for path in Path("zoo").iterdir() if "partial" in path.name]
        assert {row["verdict"] for row in rows().values()} == {"agreed", "waiting"} - (
            {"agreed"} if not finished else set()
        )
    for file in Path("stub").iterdir():
        file.unlink()
    assert f"({len(finished)} kept" in whole(export(*ASKED), 0).stdout


def test_an_export_that_is_killed_costs_its_bundle_alone() -> None:
    behave(NAMES[0], "wait")
    behave(NAMES[1], "wait")
    process = start()
    until_all_wait(NAMES[:2])
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert set(made()) == set(NAMES[2:])
    assert {rows()[name]["exit_code"] for name in NAMES[:2]} == {-9}
    for file in Path("stub").iterdir():
        file.unlink()
    whole(export(*ASKED), 0)


def test_a_full_disk_costs_the_bundle_that_does_not_fit() -> None:
    behave(NAMES[3], "bytes 3000000")
    process = start(limit_bytes=1_000_000)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert set(made()) == set(NAMES) - {NAMES[3]}
    assert "cannot be written (File too large)" in rows()[NAMES[3]]["problem"]
    assert not [path for path in Path("zoo").iterdir() if "partial" in path.name]
    assert "(3 kept" in whole(export(*ASKED), 0).stdout


def test_a_disk_too_full_for_the_summary_does_not_cost_the_bundles() -> None:
    process = start(limit_bytes=12_000)  # between a manifest and summary.html
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert "The summary in zoo could not be written (File too large)." in said
    assert process.returncode == 0
    assert set(made()) == set(NAMES)


def test_two_zoos_in_one_directory_do_not_meet() -> None:
    for name in NAMES:
        behave(name, "wait")
    process = start()
    until_all_wait(NAMES[:2])
    said = refusal(export(*ASKED))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert "Another spach-export --zoo works in zoo" in said


# The real thing

SMALL = f"""
from spach_deploy.models import published
from tests import static_models
published.ARCHITECTURES[{small_bundles.NAME!r}] = static_models.ARCHITECTURES["hybrid"]
"""


@pytest.mark.slow
def test_real_exports_of_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model_registered: None
) -> None:
    script = console_script("spach-export", tmp_path, before=SMALL)
    monkeypatch.setattr("spach_deploy.cli.zoo.COMMAND", (sys.executable, str(script)))
    size = ("--image-size", str(static_models.IMAGE_SIZE), "--num-classes", str(static_models.CLASSES))
    words = ("--zoo", small_bundles.NAME, "--precision", "fp16", "--engine", "none", *size, "-o", "zoo")
    assert "1 bundle: 1 agreed." in whole(export(*words), 0).stdout
    found = rows()
    assert 1e-5 < found["small_hybrid-fp16"]["rel_l2"] < 0.01
    manifest = json.loads(Path("zoo/small_hybrid-fp16", MANIFEST).read_text())
    assert "--output zoo/small_hybrid-fp16" in manifest["command"]
    assert "(1 kept" in whole(export(*words), 0).stdout
