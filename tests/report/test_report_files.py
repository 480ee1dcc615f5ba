"""Where pages go, what stands in their way, and who opens them."""

from __future__ import annotations

import json
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from spach_deploy.bundle.store import GRAPH, PAGE, PLAN, REPORT, Bundle
from spach_deploy.cli.export import main as export_command
from spach_deploy.cli.reporting import ReportRequest, write_reports
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.common.errors import BundleError, MissingPackageError, UsageError
from spach_deploy.common.files import Destination
from spach_deploy.data.preprocess import normalize, to_input
from spach_deploy.options.specs import IODtype, Precision, Preprocessing, channel_statistics
from spach_deploy.pipeline.auto import PrecisionCandidate, Recommendation
from spach_deploy.report.content import ReportContent, pictures_of, pixels_of
from spach_deploy.report.page import (
    TEMPLATES,
    check_can_make_pages,
    content_of,
    environment,
    page_beside,
    page_problem,
    write_page,
)
from tests import small_bundles
from tests.commands import ROOT, contents, export
from tests.report import made_up

VALIDATION = made_up.validation(made_up.evidence(made_up.WRONG))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a browser was asked to open."""
    urls: list[str] = []

    def open_url(url: str) -> bool:
        urls.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", open_url)
    return urls


@pytest.fixture
def without_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundles.copy(small_bundles.bundle(), tmp_path / "bundle")


def validate(*arguments: object) -> Result:
    with small_bundles.registered():
        return CliRunner().invoke(validate_command, [str(argument) for argument in arguments])


# In a bundle


def test_an_export_has_a_page_that_is_no_part_of_what_is_hashed(bundle: Path) -> None:
    assert "Do it again" in (bundle / PAGE).read_text(encoding="utf-8")
    assert PAGE not in Bundle.open(bundle).manifest.files
    (bundle / PAGE).write_text("something else")
    assert Bundle.open(bundle).changed_files() == {}


def test_validating_writes_the_report_and_its_page(bundle: Path) -> None:
    (bundle / PAGE).unlink()
    result = validate(bundle / PLAN)
    page = (bundle / PAGE).read_text(encoding="utf-8")
    assert result.exit_code == 3
    assert f"Report: {bundle / REPORT}\nPage: {bundle / PAGE}\n" in result.stderr
    assert f"spach-validate {bundle / PLAN}" in page
    assert "the engine did not run" in page
    assert json.loads((bundle / REPORT).read_text())["report_version"] == 2
    assert Bundle.open(bundle).changed_files() == {}


def test_the_page_lies_beside_the_report_that_was_asked_for(bundle: Path, tmp_path: Path) -> None:
    before = contents(bundle)
    result = validate(bundle / GRAPH, "--report", tmp_path / "mine.json")
    assert result.exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine.html", "mine.json"]
    assert contents(bundle) == before


def test_a_report_where_the_page_would_go_is_refused(bundle: Path, tmp_path: Path) -> None:
    result = validate(bundle, "--report", tmp_path / "mine.html")
    assert result.exit_code == 2
    assert "is where the page goes. Give mine.json." in result.stderr
    assert page_beside(tmp_path / "mine") == tmp_path / "mine.html"


def test_a_page_of_somebody_else_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<h1>Mine</h1>")
    result = validate(bundle / GRAPH, "--report", tmp_path / "index.json")
    assert result.exit_code == 0
    assert "index.html is no page of spach-deploy and is left alone." in result.stderr
    assert (tmp_path / "index.html").read_text() == "<h1>Mine</h1>"
    assert json.loads((tmp_path / "index.json").read_text())["passed"]


# Without the packages


def test_without_jinja2_the_report_is_written_and_a_sentence_says_what_to_install(
    bundle: Path, without_jinja2: None
) -> None:
    (bundle / PAGE).unlink()
    result = validate(bundle / GRAPH)
    assert result.exit_code == 0
    assert result.stderr.endswith(
        "The page report.html needs jinja2, which is not installed here. Install it: pip install"
        " 'spach-deploy[report]'\n"
    )
    assert json.loads((bundle / REPORT).read_text())["passed"]
    assert not (bundle / PAGE).exists()


def test_an_export_without_jinja2_says_so_once_and_in_its_manifest(tmp_path: Path, without_jinja2: None) -> None:
    with small_bundles.registered():
        size, classes = str(small_bundles.SIZE), str(small_bundles.CLASSES)
        words = ("--model", small_bundles.NAME, "--image-size", size, "--num-classes", classes, "--engine", "none")
        done = export(*words, "-o", tmp_path / "b", "--no-cache")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("needs jinja2") == 1
    assert any("needs jinja2" in note for note in Bundle.open(tmp_path / "b").manifest.notes)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_either_package_is_missed_by_name(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"needs {package}") as error:
        check_can_make_pages()
    assert error.value.exit_code == 3
    environment.cache_clear()


def test_open_without_jinja2_is_refused_before_any_work(bundle: Path, without_jinja2: None) -> None:
    before = contents(bundle)
    result = validate(bundle, "--open")
    assert result.exit_code == 3
    assert "pip install 'spach-deploy[report]'" in result.stderr
    assert result.stdout == ""
    assert contents(bundle) == before
    exported = CliRunner().invoke(export_command, ["--model", "ms_hybrid_s", "--open"])
    assert exported.exit_code == 3
    assert "pip install 'spach-deploy[report]'" in exported.stderr


# Opened


def test_open_shows_the_page(bundle: Path, opened: list[str], tmp_path: Path) -> None:
    assert validate(bundle / GRAPH, "--open").exit_code == 0
    assert validate(bundle / GRAPH, "--open", "--json", "--report", tmp_path / "mine.json").exit_code == 0
    assert opened == [(bundle / PAGE).as_uri(), (tmp_path / "mine.html").as_uri()]


def test_open_shows_the_page_of_an_export(opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spach_deploy.cli.export._export", lambda *options, **how: tmp_path / PAGE)
    result = CliRunner().invoke(export_command, ["--model", "ms_hybrid_s", "--engine", "none", "--open"])
    assert result.exit_code == 0, result.output
    assert opened == [(tmp_path / PAGE).as_uri()]


def test_open_shows_the_page_of_what_auto_recommends(
    opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PrecisionCandidate(Precision.INT8, bundle=tmp_path)
    found = Recommendation((chosen,), chosen, None, ())
    monkeypatch.setattr("spach_deploy.cli.export._recommend", lambda *options, **how: found)
    assert CliRunner().invoke(export_command, ["--auto", "--open"]).exit_code == 0
    assert opened == [(tmp_path / PAGE).as_uri()]


def test_a_page_says_how_its_bundle_was_exported(bundle: Path) -> None:
    asked = f"spach-export --model {small_bundles.NAME} --image-size {small_bundles.SIZE}"
    assert small_bundles.read_manifest(bundle)["command"].startswith(asked)
    assert asked in (bundle / PAGE).read_text(encoding="utf-8")


def test_a_machine_without_a_browser_is_told_where_the_page_is(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    result = validate(bundle / GRAPH, "--open")
    assert result.exit_code == 0
    assert f"No browser could be opened here. The page is {bundle / PAGE}" in result.stderr


def test_open_where_no_page_would_be_written_is_refused_before_any_work(bundle: Path, opened: list[str]) -> None:
    shutil.copy(bundle / GRAPH, bundle / "other.onnx")
    for arguments in ((bundle, "--json"), (bundle / "other.onnx",), (bundle / GRAPH, "--against", bundle)):
        result = validate(*arguments, "--open")
        assert result.exit_code == 2
        assert "--open needs a page, and none would be written. Give --report FILE.json too." in result.stderr
    assert opened == []


# What pages are made from


@pytest.mark.parametrize(
    "damage",
    [
        {"phases": [{"name": "calibrate", "seconds": 1.0, "peak_bytes": -(10**400)}]},
        {"engine": {"flavour": "tensorrt", "kernels": {"by_kind": {"gemm": 0}}}},
    ],
)
def test_a_damaged_manifest_costs_the_page_and_nothing_else(damage: dict[str, Any], tmp_path: Path) -> None:
    manifest = made_up.manifest(**damage)
    problem = page_problem(VALIDATION, manifest, Destination.of(tmp_path / PAGE))
    assert "The page report.html was not made: an entry of the manifest or the report is not of its kind" in problem
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError):
        write_page(VALIDATION, manifest, Destination.of(tmp_path / PAGE))


def test_a_report_and_a_page_that_came_since_are_left_alone(tmp_path: Path) -> None:
    asked = ReportRequest(tmp_path, None, tmp_path / "mine.json", as_json=False, is_opened=False)
    places = asked.check()
    assert places is not None
    write_page(VALIDATION, made_up.MANIFEST, Destination.of(tmp_path / "mine.html"))
    assert "since this command began" in page_problem(VALIDATION, made_up.MANIFEST, places.page)
    (tmp_path / "mine.json").write_text("another's")
    with pytest.raises(UsageError, match=r"mine\.json cannot be written \(something was written there since"):
        write_reports(VALIDATION, asked, places)
    assert (tmp_path / "mine.json").read_text() == "another's"


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write_page(VALIDATION, made_up.MANIFEST, Destination.of(tmp_path / "nowhere" / PAGE))


def test_the_images_that_the_page_shows_are_pictured() -> None:
    content = content_of(VALIDATION, made_up.MANIFEST)
    assert sorted(content.pictures) == [0, 1]
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in content.pictures.values())
    assert content_of(VALIDATION, None).pictures == {}
    assert ReportContent({}).evidence == []


@pytest.mark.parametrize("io_dtype", IODtype)
def test_a_picture_is_what_was_sent(io_dtype: IODtype) -> None:
    preprocessing = Preprocessing.for_size(16)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    sent = to_input(pixels, preprocessing, io_dtype)
    for index in range(3):
        shown = pixels_of(sent[index], preprocessing).astype(int)
        assert np.abs(shown - pixels[index]).max() <= (io_dtype is IODtype.FP16)
    assert pixels_of(normalize(pixels, preprocessing)[0], preprocessing).tobytes() == pixels[0].tobytes()
    assert len(pictures_of(lambda start, stop: sent[start:stop], preprocessing, [0, 2])) == 2


def test_the_package_has_every_template() -> None:
    """The patterns of setup.cfg, as setuptools reads them."""
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    patterns = [p.strip() for p in config["options.package_data"]["spach_deploy.report"].split(",")]
    shipped = {path for pattern in patterns for path in TEMPLATES.parent.glob(pattern) if path.is_file()}
    assert shipped == {path for path in TEMPLATES.rglob("*") if path.is_file()}


@pytest.mark.parametrize("channels", [1, 5])
def test_pictures_of_other_channels_show_the_first_in_grey(channels: int) -> None:
    preprocessing = Preprocessing.for_size((6, 9), *channel_statistics(channels))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 6, 9, channels), np.uint8)
    for image in (pixels[0], normalize(pixels, preprocessing)[0]):
        shown = pixels_of(image, preprocessing)
        assert shown.shape == (6, 9, 3)
        assert (shown == pixels[0, ..., :1]).all()
