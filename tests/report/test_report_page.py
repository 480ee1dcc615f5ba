"""What a page says in every state, and that it is whole: structure, escaping, nothing loaded from anywhere."""

from __future__ import annotations

import html
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from spach_deploy.bundle.schema import Manifest
from spach_deploy.report import bundle_sections, plots, validation_sections
from spach_deploy.report.content import ReportContent
from spach_deploy.report.page import SECTIONS, render
from tests.report import made_up

VOID = {"meta", "link", "img", "br", "hr", "input"}
SVG_ALONE = {"path", "circle", "rect", "use", "line"}


class Page(HTMLParser):
    """Elements with their attributes, and whether every one that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(page: str) -> str:
    """What a reader reads, in one line."""
    body = re.sub(r"(?s)<(style|svg)\b.*?</\1>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize(
    ("state", "heading", "reason", "level"),
    [
        (
            "agrees",
            "Agrees with PyTorch in FP32",
            "10 % of what is allowed, and none of 2 images changes class.",
            "graph",
        ),
        ("engine", "Agrees with PyTorch in FP32", "In the worst image the logits differ by", "engine"),
        ("unverified", "The graph agrees with PyTorch; the engine did not run", "In the worst image", "graph"),
        ("ties", "Agrees with PyTorch in FP32", "and one of 2 images changes class.", "graph"),
        ("wrong", "Does not agree with PyTorch in FP32", "Output 'logits': relative L2 is", "graph"),
        ("not finite", "Does not agree with PyTorch in FP32", "has NaN or infinite values", "graph"),
        ("nothing", "Nothing could be compared", "Nothing was compared.", "graph"),
        ("drop", "Agrees with PyTorch, but loses more accuracy than allowed", "Top-1 accuracy falls by", "graph"),
    ],
)
def test_the_top_says_what_came_out_and_why(state: str, heading: str, reason: str, level: str) -> None:
    text = text_of(render(made_up.content(state)))
    top = text[: text.index("What was compared")]
    assert heading in top
    assert reason in top
    assert f"Level of evidence: {level}" in top


@pytest.mark.parametrize("manifest", [made_up.MANIFEST, None], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("state", made_up.STATES)
def test_a_page_is_well_formed_and_loads_nothing(state: str, manifest: Manifest | None) -> None:
    text = render(made_up.content(state, manifest))
    page = Page(text)
    assert page.wrong == []
    assert page.open == []
    assert page.of("script") == []
    links = [a.get("href", "") for tag, a in page.elements if tag in ("a", "link", "use")]
    links += [a.get("xlink:href", "#") for a in page.of("use")] + [a["src"] for a in page.of("img")]
    assert all(link.startswith(("#", "data:")) or not link for link in links)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)


@pytest.mark.parametrize("state", ["wrong", "unverified", "engine"])
def test_a_page_can_be_read_without_seeing_it(state: str) -> None:
    page = Page(render(made_up.content(state)))
    assert len(page.of("h1")) == 1
    assert all(attributes.get("alt") for attributes in page.of("img"))
    assert all(attributes.get("aria-hidden") == "true" for attributes in page.of("svg"))
    images = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert images
    assert all(attributes["aria-label"] for attributes in images)
    tags = [tag for tag, _ in page.elements]
    assert all(tags[index + 1] == "caption" for index, tag in enumerate(tags) if tag == "table")
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, times in ids.items() if times > 1] == []
    regions = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "region"]
    assert len(regions) == len(set(regions)) > 5
    labels = {attributes["aria-labelledby"] for attributes in page.of("section")}
    assert labels <= set(ids)


def test_all_sections_are_shown_where_there_is_something_to_show() -> None:
    shown = [attributes["id"] for attributes in Page(render(made_up.content("wrong"))).of("section")]
    assert shown == [section.name for section in SECTIONS if section.name != "accuracy"]
    assert "accuracy" in [attributes["id"] for attributes in Page(render(made_up.content("drop"))).of("section")]


def test_names_are_escaped_everywhere() -> None:
    hostile = "<script>alert(1)</script>"
    trace = {**made_up.TRACE, "modules": [{**module, "module": hostile} for module in made_up.MODULES]}
    images = {"description": hostile, "count": 2, "names": [hostile, hostile]}
    first = made_up.report(made_up.evidence(made_up.WRONG))["evidence"][0]
    answers = [{**answer, "name": hostile} for answer in first["answers"]]
    changed = made_up.content(
        "wrong", trace=trace, images=images, findings=[hostile], evidence=[{**first, "answers": answers}]
    )
    assert hostile not in render(changed)
    assert text_of(render(changed)).count(hostile) > 5


def test_every_figure_that_the_issue_asks_for_is_there() -> None:
    text = text_of(render(made_up.content("wrong")))
    for words in (
        "PyTorch in FP32",
        "1.00e-06",  # the noise
        "Calibration scales for eight bits – – – 1 min 5 s",  # no error of its own
        "layer1.0.qkv",  # the suspect
        "flip from class 0 to 6",
        "The first module beyond its bound is norm",
        "layer1.0.fc1/Gemm linear int8 fp16",  # asked and achieved
        "1 layer did not come out as asked",
        "142.3 MB",
        "158 kernels",
        "spach-export --model ms_hybrid_s --fp16",
        "ef" * 32,
        "2.13.0",
    ):
        assert words in text, words


def test_a_state_has_its_colour() -> None:
    states = {name: validation_sections.state_of(report) for name, report in made_up.STATES.items()}
    assert states == {
        **dict.fromkeys(("agrees", "engine", "ties"), "good"),
        "unverified": "partial",
        **dict.fromkeys(("wrong", "not finite", "nothing", "drop"), "bad"),
    }


def test_a_figure_beyond_its_bound_is_marked() -> None:
    tiles = validation_sections.verdict(made_up.content("wrong"))["tiles"]
    assert [tile["label"] for tile in tiles if tile.get("is_bad")] == [
        "Relative L2, worst image",
        "Images that change class",
    ]
    assert not [tile for tile in validation_sections.verdict(made_up.content("ties"))["tiles"] if tile.get("is_bad")]


def test_steps_beyond_what_is_allowed_disagree() -> None:
    view = bundle_sections.steps(made_up.content("unverified"))
    assert view is not None
    assert [(row["step"], row["verdict"]) for row in view["rows"]] == [
        ("Reference", ""),
        ("Static model", "agrees"),
        ("Exported graph", "disagrees"),
        ("Calibration", ""),
        ("Typed graph", "agrees"),
        ("Engine", "did not run"),
    ]


def test_the_first_module_beyond_its_bound_is_named() -> None:
    view = validation_sections.depth(made_up.content("wrong"))
    assert view is not None
    assert view["first_over"] == "norm"
    drawn = view["plot"]
    assert drawn.has_marks
    assert drawn.wide.count("var(--bad)") >= 2
    assert "#0" not in re.sub(r'(href="|url\()#[^")]*', "", drawn.wide)  # no stand-in colour is left


def test_what_was_not_measured_is_left_out() -> None:
    for view in (
        validation_sections.depth,
        validation_sections.bisect,
        bundle_sections.ranges,
        bundle_sections.precision,
    ):
        assert view(made_up.content("agrees", None)) is None
    assert validation_sections.bisect(made_up.content("agrees")) is None


def test_infinite_headroom_is_no_error() -> None:
    view = bundle_sections.ranges(made_up.content("agrees"))
    assert view is not None
    assert view["closest"][1]["times"] == float("inf")


def test_a_chart_without_a_positive_number_is_none() -> None:
    line = plots.Line("nothing", (0.0, None), "ours")
    assert plots.draw(plots.Chart(("a", "b"), (line,), "unit"), "x") is None


def test_stages_of_a_network() -> None:
    groups = plots.groups_of(["stem", "layer1.0", "layer1.1", "layer2.0", "head"])
    assert [(group.name, group.start, group.stop) for group in groups] == [
        ("stem", 0, 1),
        ("layer1", 1, 3),
        ("layer2", 3, 4),
        ("head", 4, 5),
    ]


def test_the_same_contents_give_the_same_page() -> None:
    assert render(made_up.content("wrong")) == render(made_up.content("wrong"))


def test_a_deep_network_is_drawn_without_dots() -> None:
    parts = tuple(f"layer1.{index}" for index in range(100))
    drawn = plots.draw(plots.Chart(parts, (plots.Line("error", (1e-3,) * 100, "ours", dots=True),), "unit"), "x")
    assert drawn is not None
    assert not drawn.legend[0].dots
    assert drawn.wide.count("<use") < 50


def test_a_report_alone_is_enough() -> None:
    report = made_up.report(made_up.evidence(made_up.CLOSE))
    assert "Do it again" in text_of(render(ReportContent(report)))
