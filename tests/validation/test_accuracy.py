"""Paired accuracy against published figures and SciPy, and labels that a user gets wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.data.labels import ImageLabels, open_labels
from spach_deploy.validation.accuracy import Accuracy, PairedAccuracy, mcnemar_exact, paired, tango_interval, upper_tail

CLASSES = 10


def answers(counts: dict[str, int], classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of reference and candidate, and labels, of so many images that `both`, `reference`, `candidate`, `none`
    get right."""
    labels = np.arange(sum(counts.values())) % classes
    kinds = np.repeat(list(counts), list(counts.values()))
    logits = []
    for who in ("reference", "candidate"):
        right = np.isin(kinds, ["both", who])
        logits.append(np.eye(classes, dtype=np.float32)[np.where(right, labels, (labels + 1) % classes)])
    return logits[0], logits[1], labels


def measured(*, both: int = 0, lost: int = 0, gained: int = 0, none: int = 0) -> PairedAccuracy:
    return paired(*answers({"both": both, "reference": lost, "candidate": gained, "none": none}))


# The interval


@pytest.mark.parametrize(
    ("lost", "gained", "images", "level", "published"),
    [
        # Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables, 2017, chapter 8: airway
        # hyper-responsiveness (Bentur 2009) and complete response (Cavo 2012), as R's contingencytables gives them.
        (1, 7, 21, 0.95, (-0.517, -0.026)),
        (6, 16, 161, 0.95, (-0.1240, -0.0054)),
        # R's PropCIs::scoreci.mp(25, 28, 618, 0.90), which is about the other sign.
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),
    ],
)
def test_the_interval_is_the_published_one(
    lost: int, gained: int, images: int, level: float, published: tuple[float, float]
) -> None:
    digits = 3 if images == 21 else 4
    assert tuple(round(limit, digits) for limit in tango_interval(lost, gained, images, level)) == published


@pytest.mark.parametrize(("lost", "gained", "images"), [(5, 2, 100), (0, 3, 50), (40, 10, 60), (0, 0, 30), (7, 0, 7)])
def test_its_limits_are_where_the_score_test_just_rejects(lost: int, gained: int, images: int) -> None:
    """The likelihood is maximized on a grid here, not by Tango's formula."""
    z = 1.959963984540054
    for drop in tango_interval(lost, gained, images):
        if abs(drop) == 1:
            continue
        share = np.linspace(max(0.0, -drop), (1 - drop) / 2, 2_000_001)[1:-1]  # of images that are gained
        with np.errstate(divide="ignore"):
            same = np.log(1 - drop - 2 * share) * (images - lost - gained)
            likelihood = same + lost * np.log(share + drop) + gained * np.log(share)
        variance = (2 * share[np.argmax(likelihood)] + drop - drop**2) / images
        assert abs((lost - gained) / images - drop) / math.sqrt(variance) == pytest.approx(z, rel=1e-4)


@pytest.mark.parametrize("images", [1, 40, 1000, 50_000])
def test_without_a_difference_the_interval_still_has_a_width(images: int) -> None:
    z2 = 1.959963984540054**2
    assert tango_interval(0, 0, images) == pytest.approx((-z2 / (images + z2), z2 / (images + z2)), rel=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 1), (0, 9), (20, 20)])
def test_exchanging_both_mirrors_it(lost: int, gained: int) -> None:
    low, high = tango_interval(lost, gained, 40)
    assert tango_interval(gained, lost, 40) == pytest.approx((-high, -low), abs=1e-12)
    assert -1 <= low <= (lost - gained) / 40 <= high <= 1


@pytest.mark.parametrize(("lost", "gained", "images"), [(0.02, 0.005, 200), (0.1, 0.1, 60), (0.01, 0.01, 1000)])
def test_it_covers_the_truth_as_often_as_it_says(lost: float, gained: float, images: int) -> None:
    chances = [lost, gained, 1 - lost - gained]
    draws = np.random.default_rng(0).multinomial(images, chances, 2000).tolist()
    covered = 0
    for one, other, _ in draws:
        low, high = tango_interval(one, other, images)
        covered += low <= lost - gained <= high
    assert 0.93 <= covered / len(draws) <= 0.98


# The test


def test_the_test_is_scipys_binomial() -> None:
    stats = pytest.importorskip("scipy.stats")
    pairs = [(one, other) for one in range(0, 60, 3) for other in range(0, 90, 7) if one + other]
    pairs += [(1000, 1100), (0, 500), (3, 700), (5000, 5200)]
    for one, other in pairs:
        assert mcnemar_exact(one, other) == pytest.approx(stats.binomtest(one, one + other).pvalue, rel=1e-12, abs=0)


def test_the_test_of_nothing_is_1_and_of_very_much_is_small() -> None:
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(6, 0) == mcnemar_exact(0, 6) == 2 * 0.5**6
    assert mcnemar_exact(0, 5000) == 0  # 2 ** -4999: no float64, and no error


def test_the_upper_tail_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, images, chance in [(0, 5, 0.1), (3, 20, 0.1), (20, 20, 0.5), (70, 50_000, 0.001)]:
        assert upper_tail(right, images, chance) == pytest.approx(stats.binom.sf(right - 1, images, chance), rel=1e-9)


# Logits and labels


def test_shares_counts_and_drop() -> None:
    result = measured(both=80, lost=6, gained=2, none=12)
    assert (result.top1_reference, result.top1_candidate) == (0.86, 0.82)
    assert (result.only_reference_right, result.only_candidate_right, result.images) == (6, 2, 100)
    assert result.drop_points == 4
    assert result.interval == tuple(100 * limit for limit in tango_interval(6, 2, 100))
    assert result.p_value == mcnemar_exact(6, 2)
    assert json.loads(json.dumps(result.to_dict()))["drop_points"] == 4


def test_top_5_is_by_place_and_absent_with_five_classes() -> None:
    labels = np.arange(8) % 8
    order = np.array([[-((label - c) % 8) for c in range(8)] for label in labels], np.float32)  # own class first
    fifth = np.roll(order, 4, axis=1)
    result = paired(fifth, np.roll(order, 5, axis=1), labels)
    assert (result.top1_reference, result.top5_reference, result.top5_candidate) == (0, 1, 0)
    assert result.top5_drop_points == 100
    few = paired(*answers({"both": 6}, classes=5))
    assert (few.top5_reference, few.top5_candidate, few.top5_drop_points, few.top5_interval) == (None,) * 4


def test_ties_go_to_the_lower_class_as_in_argmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (500, CLASSES)).astype(np.float16)
    labels = rng.integers(0, CLASSES, 500)
    result = paired(logits, logits, labels)
    assert result.top1_reference == (logits.argmax(axis=1) == labels).mean()
    assert result.top5_reference == (np.argsort(-logits, 1, "stable")[:, :5] == labels[:, None]).any(axis=1).mean()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_never_right(value: float) -> None:
    reference, candidate, labels = answers({"both": 20})
    candidate[3] = value
    candidate[4, labels[4]] = value
    assert paired(reference, candidate, labels).only_reference_right == 2


@pytest.mark.parametrize(
    ("reference", "candidate", "labels"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), [0, 1, 2]),
        (np.zeros((3, 4)), np.zeros((3, 4)), [0, 1]),
        (np.zeros(3), np.zeros(3), [0, 1, 2]),
        (np.zeros((0, 4)), np.zeros((0, 4)), []),
        (np.zeros((2, 4)), np.zeros((2, 4)), [0, 4]),
        (np.zeros((2, 4)), np.zeros((2, 4)), [0, -1]),
        (np.zeros((2, 4)), np.zeros((2, 4)), [0.0, 1.0]),
    ],
)
def test_what_does_not_belong_together_is_refused(reference: np.ndarray, candidate: np.ndarray, labels: Any) -> None:
    with pytest.raises(UsageError):
        paired(reference, candidate, labels)


# In words


def test_the_sentence_says_fall_rise_and_neither() -> None:
    result = measured(both=900, lost=20, gained=3, none=77)
    falls, (low, high) = result.sentence(), result.interval
    assert f"Top-1 falls by 1.70 points (95 % interval of the drop {low:.2f} to {high:.2f} points): " in falls
    assert "20 of 1,000 images only PyTorch gets right, 3 only the candidate, which is more than chance" in falls
    assert "p = 0.00049" in falls
    rises = measured(both=90, gained=3, none=7).sentence()
    assert "rises by 3.00 points" in rises
    assert "may be chance" in rises
    same = measured(both=100).sentence()
    assert "stays the same" in same
    assert "not one of 100 images is right with one and wrong with the other" in same


def test_too_few_images_are_said_with_how_many_are_needed() -> None:
    text = measured(both=30, none=10).too_few()
    assert text == (
        "With 40 images a drop below 8.8 points cannot be seen; to see one of 1 point, give 390 images or more."
    )
    assert "With 1 image " in measured(both=1).too_few()
    assert "0.3 points, give 1,300 images" in measured(both=40).too_few(0.3)


def test_so_many_images_as_asked_for_are_enough() -> None:
    few = measured(both=250, lost=4, gained=2)
    for points in (0.1, 0.5, 1.0):
        images = few.images_for(points)
        widths = []
        for count in (images, 0.9 * images):
            low, high = tango_interval(4 * count / few.images, 2 * count / few.images, count)
            widths.append(50 * (high - low))
        assert widths[0] <= points < widths[1]


def test_nothing_is_missing_where_the_interval_decides() -> None:
    assert measured(both=1000).too_few() == ""  # no drop of a point
    assert measured(lost=30, none=10).too_few() == ""  # a drop, beyond doubt, with forty images
    assert measured(both=390, none=0).too_few() == ""
    assert measured(both=370, none=0).too_few() != ""


def test_a_drop_beyond_the_allowed_is_a_finding_with_its_interval() -> None:
    result = measured(both=990, lost=4, gained=1, none=5)  # 0.3 points
    assert Accuracy(result, "typed graph", "labels.txt", 0.3).findings == ()
    assert Accuracy(result, "typed graph", "labels.txt").findings == ()
    (finding,) = Accuracy(result, "typed graph", "labels.txt", 0.2).findings
    low, high = result.interval
    assert low < 0 < high
    assert finding == (
        f"Top-1 accuracy falls by 0.30 points (95 % interval of the drop {low:.2f} to {high:.2f} points), more than "
        "the 0.2 that --max-drop allows."
    )


def test_the_drop_that_is_asked_for_decides_how_many_images_are_enough() -> None:
    result = measured(both=1000)
    assert len(Accuracy(result, "", "").sentences) == 1
    assert any("give 1,300 images" in text for text in Accuracy(result, "", "", 0.3).sentences)
    assert len(Accuracy(result, "", "", 0.0).sentences) == 1  # no number of images shows that there is none at all


def test_a_reference_that_only_guesses_is_named() -> None:
    guessing = measured(both=10, none=90)
    assert any("blind choice among 10 classes" in text for text in Accuracy(guessing, "", "").sentences)
    assert not measured(both=30, none=70).is_guessing
    assert dataclasses.replace(measured(both=3), classes=1000).is_guessing is False


# Labels


def read(
    folder: Path, name: str, content: str | bytes, images: tuple[str, ...] = ("a.jpg", "b.jpg"), classes: int = CLASSES
) -> ImageLabels:
    """Labels of `images`, from a file of that name and content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_labels(path, folder / "images", (), classes).of(images, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "a.jpg 3\nb.jpg 7\n"),
        ("l.TXT", "\n  b.jpg\t7 \r\n./a.jpg 3"),
        ("l.csv", "a.jpg,3\nb.jpg,7\n"),
        ("l.csv", '\ufeffimage,class\r\n"a.jpg", 3\r\n\r\nb.jpg,7\r\n'),
        ("l.json", '{"a.jpg": 3, "b.jpg": 7}'),
        ("l.json", '{"b.jpg": "7", "a.jpg": "3"}'),
    ],
)
def test_the_three_forms_of_a_labels_file(tmp_path: Path, name: str, content: str) -> None:
    labels = read(tmp_path, name, content)
    assert labels.classes.tolist() == [3, 7]
    assert labels.classes.dtype == np.int64
    assert labels.origin.endswith(name)
    assert labels.notes == ()


def test_names_may_hold_spaces_and_commas(tmp_path: Path) -> None:
    names = ("my cat.jpg", "a,b.jpg")
    assert read(tmp_path, "l.txt", "my cat.jpg 1\na,b.jpg 2", names).classes.tolist() == [1, 2]
    assert read(tmp_path, "l.csv", 'my cat.jpg,1\n"a,b.jpg",2', names).classes.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.txt", "a.jpg 10\nb.jpg 1", "line 1, gives a.jpg the class 10; the model has 10 classes, 0 to 9. .* from 1"),
        ("l.txt", "a.jpg 12\nb.jpg 1", "the class 12; the model has 10 classes, 0 to 9. Correct the labels"),
        ("l.csv", "a.jpg,0\nb.jpg,-1", "line 2, gives b.jpg the class -1"),
        ("l.json", '{"a.jpg": 1000, "b.jpg": 0}', "l.json gives a.jpg the class 1000"),
        ("l.txt", "a.jpg 1\nb.jpg 2\na.jpg 1", "line 3, names a.jpg a second time. Keep one"),
        ("l.json", '{"a.jpg": 1, "b.jpg": 2, "./a.jpg": 1}', "names a.jpg a second time"),
        ("l.json", '{"a.jpg": 1, "b.jpg": 2, "a.jpg": 1}', "names a.jpg a second time"),
        ("l.txt", "a.jpg 1", "no label for 1 of 2 images: 'b.jpg'. Add them"),
        (
            "l.txt",
            "x.jpg 1\ny.jpg 2",
            "labels none of the 2 images: it names 'x.jpg', they are called 'a.jpg', 'b.jpg'",
        ),
        ("l.txt", "a.jpg cat\nb.jpg dog", "line 1, gives a.jpg the class 'cat', which is not a class index"),
        ("l.txt", "a.jpg 1.0\nb.jpg 2", "which is not a class index. Give whole numbers from 0 to 9"),
        ("l.txt", "a.jpg ١\nb.jpg 2", "not a class index"),
        ("l.txt", "a.jpg " + "9" * 5000, "not a class index"),
        ("l.txt", "3\n7\n", "line 1, is not a name and a class: '3'"),
        ("l.txt", "", "has no label"),
        ("l.csv", "image,class\n", "has no label"),
        ("l.csv", "a.jpg,3,x\n", "line 1, is not a name and a class: 'a.jpg,3,x'"),
        ("l.csv", "a.jpg;3\n", "line 1, is not a name and a class"),
        ("l.csv", "a.jpg," + "x" * 200_000, "is not CSV|not a class index"),
        ("l.json", "{}", "has no label"),
        ("l.json", "[3, 7]", "no JSON object"),
        ("l.json", '[["a.jpg", 3]]', "no JSON object"),
        ("l.json", '{"a.jpg": [3]}', "not a class index"),
        ("l.json", '{"a.jpg": true}', "not a class index"),
        ("l.json", '{"a.jpg": 3.0}', "not a class index"),
        ("l.json", '{"a.jpg": ' + "9" * 5000 + "}", "is not JSON|the model has"),
        ("l.json", "{'a.jpg': 3}", "is not JSON"),
        ("l.json", '{"a":' * 100_000, "is not JSON"),
        ("l.txt", b"\xff\xfe\x00a", "is not UTF-8 text"),
        ("l.lst", "a.jpg 3", "its name does not end in .txt, .csv, .json. Give"),
        ("labels", "a.jpg 3", "its name does not end in"),
    ],
)
def test_a_wrong_labels_file_is_one_sentence(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        read(tmp_path, name, content)
    assert refusal.value.exit_code == 2
    assert refusal.value.hint
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no .*Give \.txt"):
        open_labels(tmp_path / "l.txt", tmp_path, (), CLASSES)


def test_labels_of_other_images_are_left_out_and_counted(tmp_path: Path) -> None:
    labels = read(tmp_path, "l.txt", "a.jpg 3\nb.jpg 7\nc.jpg 1\nd.jpg 2")
    assert labels.classes.tolist() == [3, 7]
    assert labels.notes == (f"2 of 4 labels in {tmp_path / 'l.txt'} name no image that was taken.",)


def test_a_path_may_be_longer_on_one_side(tmp_path: Path) -> None:
    labels = read(tmp_path, "l.txt", "a.jpg 3\nval/n02/b.jpg 7", ("n01/a.jpg", "n02/b.jpg"))
    assert labels.classes.tolist() == [3, 7]
    assert "2 labels found by the end of the path: n01/a.jpg is a.jpg" in labels.notes[0]


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ("train/a.jpg 3", ("val/a.jpg",)),  # another picture of that name
        ("a.jpg 3", ("n01/a.jpg", "n02/a.jpg")),  # which of them?
        ("n01/a.jpg 3\nn02/a.jpg 4", ("a.jpg",)),
    ],
)
def test_a_file_name_alone_is_not_enough_where_it_could_be_another(
    tmp_path: Path, content: str, images: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match="labels none of"):
        read(tmp_path, "l.txt", content, images)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    for content in ("\x1b[31m.jpg x\n", "\x1b[31m.jpg 99\n", "\x1b[31m.jpg 1\n\x1b[31m.jpg 1\n", "\x1b[31m.jpg 1\n"):
        with pytest.raises(UsageError) as refusal:
            read(tmp_path, "l.txt", content)
        assert "\x1b" not in str(refusal.value)


# Folders and npz


def of_folders(path: Path, folders: tuple[str, ...], places: list[int], classes: int = CLASSES) -> ImageLabels:
    names = [f"{folders[place]}/{i}.png" for i, place in enumerate(places)]
    return open_labels(path, path, folders, classes).of(names, np.array(places, np.int64))


def test_sorted_folders_are_the_classes(tmp_path: Path) -> None:
    folders = tuple(sorted(f"n{i:08d}" for i in range(CLASSES)))
    labels = of_folders(tmp_path, folders, [0, 9, 4])
    assert labels.classes.tolist() == [0, 9, 4]
    assert labels.origin == f"10 class folders of {tmp_path}"
    assert labels.notes == ()


def test_folders_that_are_not_the_models_classes_are_refused(tmp_path: Path) -> None:
    for folders in (("bird", "cat", "dog"), tuple(f"n{i:02d}" for i in range(11)), ("1", "2", "03")):
        with pytest.raises(UsageError, match=f"{len(folders)} class folders, the model 10 classes.*Give all 10"):
            of_folders(tmp_path, folders, [0])


def test_some_of_the_folders_will_do_where_their_names_are_indices(tmp_path: Path) -> None:
    labels = of_folders(tmp_path, ("017", "281", "999"), [2, 0], classes=1000)
    assert labels.classes.tolist() == [999, 17]
    assert "has 3 of the model's 1000 classes" in labels.notes[0]
    for folders in (("17", "281"), ("017", "1000"), ("17", "81")):  # in no order that the numbers have; or out of range
        with pytest.raises(UsageError, match="2 class folders"):
            of_folders(tmp_path, folders, [0], classes=1000)


def test_folders_named_by_numbers_without_zeros_are_warned_of(tmp_path: Path) -> None:
    folders = tuple(sorted(str(i) for i in range(11)))
    labels = of_folders(tmp_path, folders, [2], classes=11)
    assert labels.classes.tolist() == [2]
    assert "folder 10 is class 2; where the numbers are the classes, give a labels file" in labels.notes[0]
    assert of_folders(tmp_path, tuple("0123456789"), [2]).notes == ()


def test_pictures_beside_the_folders_label_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures outside of class folders"):
        open_labels(tmp_path, tmp_path, (), CLASSES)


def test_a_folder_or_npz_only_labels_its_own_images(tmp_path: Path) -> None:
    (tmp_path / "l.npz").write_bytes(b"")
    for path, what in ((tmp_path / "l.npz", "npz"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=f"is another {what} than"):
            open_labels(path, tmp_path / "images", (), CLASSES)


def test_an_npz_brings_its_labels(tmp_path: Path) -> None:
    path = tmp_path / "l.npz"
    path.write_bytes(b"")
    labelling = open_labels(path, path, (), CLASSES)
    names = ("image 0", "image 1")
    assert labelling.of(names, np.array([3, 7])).classes.tolist() == [3, 7]
    with pytest.raises(UsageError, match="gives image 1 the class 10; the model has 10 classes"):
        labelling.of(names, np.array([3, 10]))
    with pytest.raises(UsageError, match="has no array 'labels'"):
        labelling.of(names, None)
