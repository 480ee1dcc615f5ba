"""The cache's store: whole entries or none, whatever happens to it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spach_deploy.bundle.cache import RECORD, Store

MEGABYTE = 1_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10 * MEGABYTE)


def content(folder: Path, size: int = MEGABYTE, fill: bytes = b"a") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.plan").write_bytes(fill * size)
    (folder / "manifest.json").write_text("{}")
    return folder


def taken(store: Store, key: str, target: Path) -> bool:
    target.mkdir(parents=True, exist_ok=True)
    return any(store.take(entry, target) for entry in store.entries() if entry.key == key)


def test_what_is_put_is_taken(store: Store, tmp_path: Path) -> None:
    store.put("key", content(tmp_path / "bundle"), {"model": "m"})
    target = tmp_path / "out"
    assert taken(store, "key", target)
    assert (target / "engine.plan").read_bytes() == (tmp_path / "bundle" / "engine.plan").read_bytes()
    assert sorted(file.name for file in target.iterdir()) == ["engine.plan", "manifest.json"]
    assert [entry.about for entry in store.entries()] == [{"model": "m"}]


def test_an_entry_takes_no_second_place_on_the_disk(store: Store, tmp_path: Path) -> None:
    source = content(tmp_path / "bundle")
    store.put("key", source, {})
    kept = store.root / "entries" / "key" / "engine.plan"
    assert kept.samefile(source / "engine.plan")
    shutil.rmtree(source)
    assert taken(store, "key", tmp_path / "out")
    assert not kept.samefile(tmp_path / "out" / "engine.plan")


def test_where_a_file_can_have_no_second_name_it_is_copied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*names: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", elsewhere)
    source = content(tmp_path / "bundle")
    store.put("key", source, {})
    assert not (store.root / "entries" / "key" / "engine.plan").samefile(source / "engine.plan")
    assert taken(store, "key", tmp_path / "out")


def test_a_bundle_that_was_changed_where_it_lies_is_not_taken(store: Store, tmp_path: Path) -> None:
    source = content(tmp_path / "bundle")
    known = {"engine.plan": hashlib.sha256((source / "engine.plan").read_bytes()).hexdigest()}
    store.put("key", source, {}, known)
    with (source / "engine.plan").open("r+b") as stream:
        stream.write(b"changed")
    assert not taken(store, "key", tmp_path / "out")
    assert not store.entries()


def test_what_was_not_put_is_not_there(store: Store, tmp_path: Path) -> None:
    assert not taken(store, "key", tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "record"])
def test_a_damaged_entry_is_removed_and_nothing_of_it_taken(store: Store, tmp_path: Path, damage: str) -> None:
    store.put("key", content(tmp_path / "bundle"), {})
    plan = store.root / "entries" / "key" / "engine.plan"
    if damage == "flip":
        data = bytearray(plan.read_bytes())
        data[len(data) // 2] ^= 1
        plan.write_bytes(bytes(data))
    elif damage == "truncate":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "missing":
        plan.unlink()
    else:
        (plan.parent / RECORD).write_text("{")
    assert not taken(store, "key", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert store.entries() == []


def write_record(store: Store, key: str, record: object) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    (store.root / "entries" / key / RECORD).write_text(text)


@pytest.mark.parametrize(
    "record",
    [
        {"files": {"../../../precious": "0"}, "about": {}, "made": 1},
        {"files": {"/tmp/precious": "0"}, "about": {}, "made": 1},
        {"files": ["engine.plan"], "about": {}, "made": 1},
        {"files": {"engine.plan": 7}, "about": {}, "made": 1},
        {"files": {}, "about": ["m"], "made": 1},
        {"files": {}, "about": {"model": {"a": 1}}, "made": 1},
        {"files": {}, "about": {}, "made": 1e300},
        {"files": {}, "about": {}, "made": "NaN"},
        {"files": {}, "about": {}},
        7,
        "[" * 100_000,
        " " * 2_000_000 + "{}",
    ],
    ids=lambda record: str(record)[:50].strip(),
)
def test_a_record_that_is_none_is_no_entry(record: object, store: Store, tmp_path: Path) -> None:
    key = "a" * 64
    (tmp_path / "precious").write_text("precious")
    store.put(key, content(tmp_path / "bundle"), {})
    write_record(store, key, record)
    assert not taken(store, key, tmp_path / "out")
    assert store.clear() == 0
    store.put("other", content(tmp_path / "bundle"), {})
    assert os.listdir(store.root / "entries") == ["other"]
    assert (tmp_path / "precious").read_text() == "precious"


def test_all_of_it_is_the_users_alone_whatever_the_umask(store: Store, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        store.put("key", content(tmp_path / "bundle"), {})
    finally:
        os.umask(before)
    entry = store.root / "entries" / "key"
    for path, mode in ((store.root, 0o700), (entry.parent, 0o700), (entry, 0o700), (entry / RECORD, 0o600)):
        assert path.stat().st_mode & 0o777 == mode, path


def test_a_folder_that_others_may_write_in_is_said_of_what_it_holds_too(store: Store, tmp_path: Path) -> None:
    """Nothing is taken from it, so that it would be exported again each time, without a word."""
    source = content(tmp_path / "bundle")
    store.put("key", source, {})
    store.root.chmod(0o777)
    assert not taken(store, "key", tmp_path / "out")
    with pytest.raises(PermissionError, match="chmod -R go-w"):
        store.put("key", source, {})


@pytest.mark.parametrize("part", ["", "entries", "entries/key", f"entries/key/{RECORD}"])
def test_nothing_is_taken_from_where_others_may_write(part: str, store: Store, tmp_path: Path) -> None:
    store.put("key", content(tmp_path / "bundle"), {})
    assert taken(store, "key", tmp_path / "out")
    (store.root / part).chmod(0o770)
    assert not taken(store, "key", tmp_path / "again")


def test_a_cache_of_another_user_is_not_used(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", content(tmp_path / "bundle"), {})
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert store.entries() == []
    with pytest.raises(PermissionError, match="others may write in it, or own it"):
        store.put("another", content(tmp_path / "bundle"), {})


def test_what_a_cache_does_not_know_is_left_alone(store: Store, tmp_path: Path) -> None:
    """Whoever names a directory with other things in it as the cache keeps them."""
    store.put("key", content(tmp_path / "bundle"), {})
    for folder in ("entries/photos", "partial/thesis"):
        (store.root / folder).mkdir()
    store.put("next", content(tmp_path / "bundle"), {})
    assert store.clear() == 2
    assert (store.root / "entries/photos").is_dir()
    assert (store.root / "partial/thesis").is_dir()


def test_the_least_recently_used_go_first(store: Store, tmp_path: Path) -> None:
    source = content(tmp_path / "bundle", 3 * MEGABYTE)
    for age, key in ((300, "old"), (200, "older use"), (100, "new")):
        store.put(key, source, {})
        past = time.time() - age
        os.utime(store.root / "entries" / key / RECORD, (past, past))
    assert taken(store, "old", tmp_path / "out")
    store.put("newest", source, {})
    assert {entry.key for entry in store.entries()} == {"old", "new", "newest"}


def test_what_is_larger_than_the_limit_is_not_kept(store: Store, tmp_path: Path) -> None:
    store.put("large", content(tmp_path / "bundle", 11 * MEGABYTE), {})
    assert store.entries() == []


def test_clear_removes_all(store: Store, tmp_path: Path) -> None:
    store.put("a", content(tmp_path / "bundle"), {})
    store.put("b", content(tmp_path / "bundle"), {})
    assert store.clear() == 2
    assert store.entries() == []


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from spach_deploy.bundle.cache import Store
store = Store(Path(sys.argv[1]), 50_000_000)
print("ready", flush=True)
for number in range(1000):
    key = f"key{{number % 4}}"
    store.put(key, Path(sys.argv[2]), {{}})
    if number % 3 == int(sys.argv[3]):
        store.remove(key)
"""


def writer(cache: Path, source: Path, phase: int) -> subprocess.Popen[str]:
    code = _WRITER.format(root=str(Path(__file__).parents[2]))
    call = [sys.executable, "-c", code, str(cache), str(source), str(phase)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_kills_at_any_moment_leave_whole_entries_and_nothing_else(tmp_path: Path) -> None:
    source = content(tmp_path / "bundle", 2 * MEGABYTE)
    cache = tmp_path / "cache"
    generator = random.Random(5)
    for _ in range(12):
        process = writer(cache, source, 1)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = Store(cache, 50 * MEGABYTE)
        for number, entry in enumerate(store.entries()):
            assert taken(store, entry.key, tmp_path / f"out{number}")
        for number in range(4):
            for file in (tmp_path / f"out{number}").glob("*"):
                file.unlink()
    Store(cache, 50 * MEGABYTE).put("last", source, {})
    assert list((cache / "partial").iterdir()) == []


def test_two_processes_at_once_do_each_other_no_harm(tmp_path: Path) -> None:
    source = content(tmp_path / "bundle", MEGABYTE // 4)
    cache = tmp_path / "cache"
    both = [writer(cache, source, 0), writer(cache, source, 2)]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    store = Store(cache, 50 * MEGABYTE)
    for entry in store.entries():
        assert taken(store, entry.key, tmp_path / "out")
