"""What was not there when a command began is never lost, whoever wrote it."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from spach_deploy.common.files import Destination, lock_file

Write = Callable[[Destination, str], object]


def write_file(place: Destination, text: str) -> None:
    place.write_text(text)


def write_folder(place: Destination, text: str) -> None:
    draft = place.path.with_name(f".draft-{secrets.token_hex(4)}")
    draft.mkdir()
    (draft / "manifest.json").write_text(text)
    place.put(draft)


def text_of(path: Path) -> str:
    return (path / "manifest.json" if path.is_dir() else path).read_text()


each_kind = pytest.mark.parametrize("write", [write_file, write_folder])
each_system = pytest.mark.parametrize("has_exchange", [True, False])


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **options: object())


@each_kind
@each_system
@pytest.mark.parametrize("old", [None, "old"])
def test_what_came_since_is_left_alone(
    write: Write, has_exchange: bool, old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_exchange:
        without_exchange(monkeypatch)
    path = tmp_path / "there"
    if old:
        write(Destination.of(path), old)
    first, second = Destination.of(path), Destination.of(path)
    write(first, "first")
    with pytest.raises(FileExistsError, match="since this command began"):
        write(second, "second")
    assert text_of(path) == "first"


@each_kind
@each_system
def test_what_was_there_is_replaced(
    write: Write, has_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_exchange:
        without_exchange(monkeypatch)
    for text in ("old", "new"):
        write(Destination.of(tmp_path / "there"), text)
        assert text_of(tmp_path / "there") == text


def test_a_place_that_was_written_may_be_written_again(tmp_path: Path) -> None:
    place = Destination.of(tmp_path / "summary.json")
    for text in ("one", "two"):
        place = place.write_text(text)
    assert (tmp_path / "summary.json").read_text() == "two"
    assert os.listdir(tmp_path) == ["summary.json"]


@each_kind
@pytest.mark.parametrize("old", [None, "old"])
def test_of_many_at_once_one_writes_and_the_others_are_told(write: Write, old: str | None, tmp_path: Path) -> None:
    path, refused = tmp_path / "there", []
    if old:
        write(Destination.of(path), old)
    place, barrier = Destination.of(path), threading.Barrier(8)

    def begin(text: str) -> None:
        barrier.wait()
        try:
            write(place, text)
        except FileExistsError:
            refused.append(text)

    texts = [str(number) for number in range(8)]
    threads = [threading.Thread(target=begin, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([*refused, text_of(path)]) == texts


def test_where_there_are_no_links_a_file_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    place = Destination.of(tmp_path / "there")
    place.write_text("first")
    with pytest.raises(FileExistsError):
        place.write_text("second")
    assert (tmp_path / "there").read_text() == "first"
    assert os.listdir(tmp_path) == ["there"]


def test_a_file_goes_into_no_folder_and_no_device(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("folder", "device"):
        with pytest.raises(OSError, match=r"Is a directory|no regular file"):
            Destination.of(tmp_path / name).write_text("text")
    assert (tmp_path / "device").is_symlink()


def test_a_pipe_in_the_place_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    os.mkfifo(tmp_path / "there" / "manifest.json")
    assert Destination.of(tmp_path / "there").before is not None


def test_a_lock_is_taken_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), lock_file(tmp_path / "lock"):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"), lock_file(tmp_path / "pipe"):
        pass
    with lock_file(tmp_path / "precious"):
        assert (tmp_path / "precious").read_text() == "precious"
