"""Pages of real bundles in a real browser: nothing asked for, nothing complained of, nothing wider than the window."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from spach_deploy.bundle.store import GRAPH, PAGE
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.options.specs import Precision
from spach_deploy.report.page import render
from tests import small_bundles
from tests.quantization import small_quantized
from tests.report import made_up
from tests.report.browser import PROGRAM, Browser

_FOLDER = tempfile.TemporaryDirectory(prefix="spach-pages-")
KINDS = ("pass", "failure", "int8", "unverified engine", "made up", "two bundles")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not PROGRAM and not os.environ.get("SPACH_REQUIRE_BROWSER"), reason="no Chromium here (apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM, "SPACH_REQUIRE_BROWSER is set and no Chromium is here: apt-get install chromium"
    with Browser() as running:
        yield running


def validated(kind: str, target: Path, *options: str) -> Path:
    """The page of what spach-validate says of `target`, which ends with the exit code that belongs to `kind`."""
    page = Path(_FOLDER.name) / f"{kind.replace(' ', '-')}.html"
    arguments = [str(target), "--report", str(page.with_suffix(".json")), *options]
    with small_bundles.registered():
        result = CliRunner().invoke(validate_command, arguments)
    assert result.exit_code == {"failure": 1, "unverified engine": 3}.get(kind, 0), result.output
    return page


def wrong_graph() -> Path:
    """A bundle's graph in which one layer has other weights, so that images change class."""
    model = small_bundles.load_graph(small_bundles.bundle())
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), weight.name))
    folder = small_bundles.copy(small_bundles.bundle(), Path(_FOLDER.name) / "wrong")
    onnx.save(model, folder / GRAPH)
    return folder / GRAPH


@functools.cache
def page_of(kind: str) -> Path:
    if kind == "failure":
        return validated(kind, wrong_graph(), "--bisect")
    if kind == "unverified engine":
        return validated(kind, small_bundles.bundle())
    if kind == "pass":
        return validated(kind, small_bundles.bundle() / GRAPH)
    if kind == "two bundles":
        second = str(small_bundles.bundle(Precision.FP32))
        return validated(kind, small_bundles.bundle(), second, "--accept", "graph")
    if kind == "int8":
        return small_quantized.bundle(Precision.INT8) / PAGE
    page = Path(_FOLDER.name) / "made-up.html"
    long_name = f"layer1.0.{'a_module_with_a_very_long_name.' * 6}fc1"
    modules = [{**module, "module": long_name} for module in made_up.BISECT["modules"]]
    bisect = {**made_up.BISECT, "modules": modules}
    page.write_text(render(made_up.content("wrong", bisect=bisect, target="/a/very/long/path" * 12)), encoding="utf-8")
    return page


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_quiet_and_fits(kind: str, width: int, browser: Browser) -> None:
    page = page_of(kind)
    for scheme in ("light", "dark"):
        seen = browser.open(page, width=width, scheme=scheme)
        assert seen.console == ()
        assert seen.requests == (page.as_uri(),)
        assert seen.wide == ()
        assert seen.scroll_width == seen.client_width == width
        assert seen.height > 2000


def test_a_page_that_asks_for_something_and_is_too_wide_is_seen(browser: Browser) -> None:
    """The guard itself: a script, an image from elsewhere and a wide element do not go unnoticed."""
    page = Path(_FOLDER.name) / "bad.html"
    page.write_text(
        "<!doctype html><img src='nothing-there.png'><script>console.error('loud')</script>"
        "<div class='x' style='width: 900px'>wide</div>"
    )
    seen = browser.open(page, width=400)
    assert any("loud" in line for line in seen.console)
    assert len(seen.requests) == 2
    assert seen.wide == ("DIV.x",)
    assert seen.scroll_width > seen.client_width


def test_dark_and_light_differ_and_a_plot_follows(browser: Browser) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        browser.open(page_of("int8"), width=1280, scheme=scheme)
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        curve = browser.evaluate("getComputedStyle(document.querySelector('#depth .wide svg [style*=ours]')).stroke")
        colours[scheme] = ground, curve
    assert colours["light"] != colours["dark"]
    assert all(colour.startswith("rgb(") for pair in colours.values() for colour in pair)
    assert len({curve for _, curve in colours.values()}) == 2


def test_every_width_has_its_own_plot(browser: Browser) -> None:
    shown = {}
    for width in (1280, 400):
        browser.open(page_of("int8"), width=width)
        shown[width] = browser.evaluate(
            "[...document.querySelectorAll('#depth .plot svg')].filter((e) => e.checkVisibility()"
            " && e.closest('.wide, .narrow')).map((e) => e.parentNode.className).join()"
        )
    assert shown == {1280: "wide", 400: "narrow"}


def test_the_page_prints_in_dark_ink_on_white(browser: Browser) -> None:
    browser.open(page_of("int8"), width=1280, scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    try:
        assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        pages = browser.call("Page.printToPDF", printBackground=False)["data"]
    finally:
        browser.call("Emulation.setEmulatedMedia", media="", features=[])
    assert len(pages) > 10_000
