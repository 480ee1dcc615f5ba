"""What is read from checkpoint files, and what is refused: nothing in them is ever executed."""

from __future__ import annotations

import argparse
import codecs
import copy
import errno
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from spach_deploy.models import pickles as pickle_size
from spach_deploy.models.checkpoint import weights_sha256
from spach_deploy.models.checkpoint_file import read_checkpoint
from tests.models.small_models import load, refusal, save, state


def test_safetensors_and_both_formats_of_torch_save_give_the_same_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "weights.safetensors")
    paths = [
        tmp_path / "weights.safetensors",
        save(tmp_path, state(), "zip.pt"),
        save(tmp_path, state(), "legacy.pth", _use_new_zipfile_serialization=False),
    ]
    loaded = [load(path) for path in paths]
    assert len({model.weights_sha256 for model in loaded}) == 1
    assert len({model.checkpoint_sha256 for model in loaded}) == 3
    assert loaded[0].checkpoint_sha256 == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert loaded[0].checkpoint_path == paths[0]


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.bin", "weights"])
def test_content_decides_and_not_the_file_s_name(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(state(), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / name)
    assert load(tmp_path / name).name == "ms_trans_xxs"
    assert load(save(tmp_path, state(), name)).name == "ms_trans_xxs"


def test_the_model_does_not_depend_on_the_file_afterwards(tmp_path: Path) -> None:
    path = save(tmp_path, state())
    model = load(path).model
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(tensor, state()[name]) for name, tensor in model.state_dict().items())


def test_plain_data_of_training_arguments_is_read(tmp_path: Path) -> None:
    args = argparse.Namespace(
        model="spach_ms_xxs_patch4_224_attn",
        lr=np.float64(1e-3),
        epochs=np.int64(300),
        amp=np.bool_(True),
        note=np.str_("run 1"),
        dtype=np.dtype(">f4"),
        big=np.array([7], ">i4")[0],
        output=pathlib.PurePosixPath("/out"),
        data=Path("/data"),
        device=torch.device("cuda"),
        betas=(0.9, 0.999),
        tags={"a", "b"},
        nested=argparse.Namespace(x=1),
    )
    content, _ = read_checkpoint(save(tmp_path, {"model": state(), "args": args}))
    read = content["args"]
    assert (read.lr, read.epochs, read.amp, read.note) == (1e-3, 300, True, "run 1")
    assert repr(read.dtype) == "NumpyDtype(>f4)"
    assert read.big == 7
    assert read.output == pathlib.PurePosixPath("/out")
    assert read.data == pathlib.PurePosixPath("/data")
    assert read.nested.x == 1


def test_names_of_other_versions_and_systems_are_read(tmp_path: Path) -> None:
    """NumPy 1 called its module numpy.core, Python 3.13 has pathlib._local, and Windows has other paths."""
    paths = [
        pickled_call(b"pathlib\nWindowsPath", "C:\\", "data"),
        pickled_call(b"pathlib._local\nPosixPath", "/", "a"),
    ]
    for path, expected in zip(paths, ("C:\\data", "/a"), strict=True):
        assert str(read_checkpoint(legacy_file(tmp_path, path))[0]) == expected
    # a scalar whose module name is the old one
    scalar = pickle.dumps(np.float64(2.5), protocol=2)
    for new in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        old = scalar.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(b"numpy.core.multiarray", new)
        assert read_checkpoint(legacy_file(tmp_path, old))[0] == 2.5


def pickled_call(function: bytes, *args: str) -> bytes:
    """A pickle of protocol 2 that calls `function` (module and name, with a newline between)."""
    words = b"".join(b"X" + len(arg).to_bytes(4, "little") + arg.encode() for arg in args)
    return b"\x80\x02c" + function + b"\n(" + words + b"tR."


def legacy_file(folder: Path, content: bytes) -> Path:
    """A file in torch.save's format of before 1.6 whose object is the pickle `content`."""
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001
    system = {"protocol_version": protocol, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (magic, protocol, system))
    path = folder / "legacy.pth"
    path.write_bytes(head + content + pickle.dumps([], protocol=2))
    return path


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (os.mkdir, "posix.mkdir"),
        (getattr, "getattr"),
        (Path.touch, "getattr"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, function: Any, name: str, zipped: bool) -> None:
    victim = tmp_path / "victim"
    commands = {os.system: f"touch {victim}", eval: f"open({str(victim)!r}, 'w')"}
    evil = Call(function, commands.get(function, str(victim)))
    path = save(tmp_path, {"model": state(), "args": evil}, _use_new_zipfile_serialization=zipped)
    assert f"asks for {name}" in refusal(path, "ms_trans_xxs")
    assert not victim.exists()


def test_that_pickle_would_indeed_run_code(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    pickle.loads(pickle.dumps(Call(os.mkdir, str(victim))))
    assert victim.exists()


def test_a_whole_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    text = refusal(save(tmp_path, torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in text
    assert "save the weights alone" in text


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    assert "was refused" in refusal(save(tmp_path, {"args": np.array([1, "a"], dtype=object)}))


@pytest.mark.parametrize("value", [np.datetime64("2024-01-01"), np.zeros(1, "i4,f8")[0], np.array([None])[:1]])
def test_other_numpy_values_are_refused(tmp_path: Path, value: Any) -> None:
    assert "Checkpoint" in refusal(save(tmp_path, {"model": state(), "args": {"value": value}}))


@pytest.mark.parametrize("size", [-(2**31), -1, 0, 2**30, 10**12])
def test_a_forged_numpy_string_is_harmless(tmp_path: Path, size: int) -> None:
    """NumPy itself crashes on a string dtype whose state claims a negative size."""
    honest = pickle.dumps(np.str_("ab"), protocol=2)
    forged = honest.replace(b"K\x08K\x04K\x08t", pickle.dumps(size, protocol=2)[2:-1] + b"K\x04K\x08t")
    assert forged != honest
    assert read_checkpoint(legacy_file(tmp_path, forged))[0] == "ab"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n  <html><body>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"hello, this is text\n", "is not a PyTorch or safetensors file"),
        (b"\x08\x07\x12\x07pytorch", "is not a PyTorch or safetensors file"),
        (gzip.compress(b"x" * 100, mtime=0), "is compressed"),
        (pickle.dumps({"a": 1}, protocol=2), "cannot be read"),
        (pickle.dumps({"a": 1}, protocol=5), "cannot be read"),
        (b"PK\x03\x04" + b"\0" * 100, "cut short or damaged"),
        (b"\xff" * 8 + b"{", "cut short"),
        (b"\x10" + b"\0" * 7 + b"{not json here!}", "cut short or damaged"),
        (b"\x80", "cannot be read"),
        (b"\0", "is not a PyTorch or safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_explained(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert says in refusal(path, "ms_trans_xxs")


def test_other_archives_are_explained(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    assert "not one of torch.save" in refusal(tmp_path / "arrays.npz")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("tensors"), io.BytesIO())
    assert "is a tar archive" in refusal(tmp_path / "old.tar")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        for member in ("script/data.pkl", "script/constants.pkl", "script/code/__torch__.py"):
            script.writestr(member, b"")
    assert "TorchScript program" in refusal(tmp_path / "script.pt")


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    for seed in range(50):
        path = tmp_path / "random.pth"
        path.write_bytes(np.random.default_rng(seed).bytes(1000))
        assert "random.pth" in refusal(path, "ms_trans_xxs")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0.0001])
def test_files_cut_short_are_refused(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "weights"
    if kind == "safetensors":
        safetensors.torch.save_file(state(), path)
    else:
        save(tmp_path, state(), "weights", _use_new_zipfile_serialization=kind == "zip")
    os.truncate(path, int(path.stat().st_size * kept))
    text = refusal(path, "ms_trans_xxs")
    assert "cut short" in text
    assert "Copy or download it again." in text


def test_a_changed_bit_in_the_weights_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, state())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert "wrong checksum" in refusal(path)


def test_a_file_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, state())
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(path).name == "ms_trans_xxs"


def copied(
    source: Path, target: Path, change: Callable[[zipfile.ZipInfo, bytes], Any] = lambda item, data: data
) -> Path:
    """An archive with other members: bytes, or (bytes, how they are packed); None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            made = change(item, old.read(item))
            if made is not None:
                data, packed = made if isinstance(made, tuple) else (made, zipfile.ZIP_STORED)
                new.writestr(item.filename, data, packed)
    return target


def with_pickle(folder: Path, pickled: bytes) -> Path:
    """A file of torch.save whose pickle is another."""
    plain = save(folder, {"a": torch.zeros(3)}, "plain.pth")
    return copied(plain, folder / "w.pth", lambda item, data: pickled if item.filename.endswith("/data.pkl") else data)


def test_a_compressed_member_is_read_as_torch_load_reads_it(tmp_path: Path) -> None:
    """Mapped into memory, its compressed bytes and what lies behind them would be the weights."""
    tensors = state() | {"norm2.bias": torch.zeros(256)}
    plain = save(tmp_path, tensors, "plain.pth")
    member = f"/data/{list(tensors).index('norm2.bias')}"

    def deflated(item: zipfile.ZipInfo, data: bytes) -> Any:
        return (data, zipfile.ZIP_DEFLATED) if item.filename.endswith(member) else data

    loaded = load(copied(plain, tmp_path / "deflated.pth", deflated))
    assert not loaded.model.state_dict()["norm2.bias"].any()
    assert loaded.weights_sha256 == load(plain).weights_sha256
    everything = copied(plain, tmp_path / "all.pth", lambda item, data: (data, zipfile.ZIP_DEFLATED))
    assert load(everything).weights_sha256 == loaded.weights_sha256


def says_sizes(path: Path, name: str, size: int) -> Path:
    """An archive of torch.save in which one member is said to inflate to `size`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/data/0", bytes(100))
        archive.getinfo(name).file_size = size
    return path


def test_sizes_are_judged_before_an_archive_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    assert "has a pickle of 6,000 MB" in refusal(says_sizes(path, "w/data.pkl", 6_000_000_000))
    assert "would become 9,000 MB" in refusal(says_sizes(path, "w/data/0", 9_000_000_000))
    plain = save(tmp_path, state(), "plain.pth")
    packed = copied(plain, tmp_path / "bz2.pth", lambda item, data: (data, zipfile.ZIP_BZIP2))
    assert "packed in a way that torch.load cannot read" in refusal(packed)


def test_members_that_overlap_or_share_a_name_are_refused(tmp_path: Path) -> None:
    """The first makes a small archive endless; of the others torch and a checksum may each look at another one."""
    with zipfile.ZipFile(tmp_path / "overlap.pth", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/data/0", bytes(10_000))
        for key in range(1, 50):
            other = copy.copy(archive.getinfo("w/data/0"))
            other.filename = f"w/data/{key}"
            archive.filelist.append(other)
    assert "its members overlap" in refusal(tmp_path / "overlap.pth")
    with zipfile.ZipFile(tmp_path / "twice.pth", "w") as archive:
        for name in ("w/data.pkl", "w/DATA.pkl"):
            archive.writestr(name, pickle.dumps({}, protocol=2))
    assert "two of its members have one name" in refusal(tmp_path / "twice.pth")


def test_a_long_header_of_safetensors_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 100_000_000)
    assert "has a header of 90 MB" in refusal(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x180)
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert read_checkpoint(tmp_path / "w.safetensors")[0]["a"] == 0


def nested(depth: int) -> bytes:
    """A pickle of a dictionary whose key is a pair of pairs of pairs."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02}K\x01\x85q\x00" + pairs + b"K\x01s."


def encoded(times: int) -> Any:
    return "x" if times == 0 else Call(codecs.encode, encoded(times - 1), "hex")


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (pickle.dumps(Call(bytearray, 10**11), protocol=2), "asks for a bytearray"),
        (pickle.dumps(Call(bytearray, np.int64(10**11)), protocol=2), "asks for a bytearray"),
        (pickle.dumps(encoded(60), protocol=2), "asks for _codecs.encode"),
        (pickle.dumps(Call(torch.FloatTensor, 10**9), protocol=2), "whose values are not in the file"),
        (pickle.dumps(Call(torch.UntypedStorage, 10**9), protocol=2), "whose values are not in the file"),
        (
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nNJ\xff\xff\xff\x7f\x85}tR.",
            "asks for a bytearray",
        ),
        (nested(60), "the same values over and over"),
    ],
    ids=["bytes", "number", "hexadecimal", "tensor", "storage", "within a rebuilt tensor", "pairs"],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_small_pickle_that_becomes_large_is_refused(tmp_path: Path, pickled: bytes, says: str, is_zip: bool) -> None:
    path = with_pickle(tmp_path, pickled) if is_zip else legacy_file(tmp_path, pickled)
    assert says in refusal(path)


def test_a_pickle_of_endless_instructions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_size, "_INSTRUCTIONS", 1000)  # a million take seconds
    assert "more than 1,000 instructions" in refusal(with_pickle(tmp_path, b"\x80\x02" + b"]" * 1001 + b"."))


def test_bytes_in_training_arguments_are_read(tmp_path: Path) -> None:
    args = {"key": b"abc", "array": bytearray(b"abc"), "pair": (b"a", "b")}
    content, _ = read_checkpoint(save(tmp_path, {"args": args}))
    assert content["args"] == args


def test_one_value_that_stands_for_a_billion_is_refused(tmp_path: Path) -> None:
    content = state() | {"head.weight": torch.zeros(1).expand(10**8, 256)}
    assert "one value for many in 1 tensors: head.weight" in refusal(save(tmp_path, content))
    scaled = state() | {"norm1.weight": torch.ones(1).expand(32)}
    assert load(save(tmp_path, scaled)).name == "ms_trans_xxs"


def test_a_tar_of_any_kind_is_recognised(tmp_path: Path) -> None:
    """torch.load unpacks what is one, whatever its first name looks like."""
    header = bytearray(tarfile.TarInfo("\x7f_storages").tobuf(tarfile.USTAR_FORMAT))
    header[0], header[257:265] = 0x80, bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "old.pth").write_bytes(bytes(header) + bytes(1024))
    assert "is a tar archive" in refusal(tmp_path / "old.pth")


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    """Two files of a checkpoint and their index."""
    tensors, files = state(), [f"model-{part:05}-of-00002.{kind}" for part in (1, 2)]
    weight_map = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        if kind == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            save(folder, part, file)
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(tmp_path: Path, kind: str) -> None:
    """By its index, or by any of the files beside it."""
    index = sharded(tmp_path, kind)
    loaded = [load(path) for path in (index, *tmp_path.glob(f"*-of-*.{kind}"))]
    assert {model.weights_sha256 for model in loaded} == {weights_sha256(state())}
    assert len({(model.checkpoint_path, model.checkpoint_sha256) for model in loaded}) == 1
    assert f"read 2 files, as {index.name} says" in loaded[0].notes


def test_one_file_of_several_is_called_that(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first, second = sorted(tmp_path.glob("*-of-*"))
    content = index.read_text()
    index.unlink()
    assert "is one file of 2, and no index beside it names it" in refusal(first)
    index.write_text(content)
    second.unlink()
    for path in (index, first):
        assert f"names {second.name}, which is not beside it" in refusal(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.safetensors", "a/b", "..", "a\\b", ""])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.safetensors").touch()
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm1.bias": name}}))
    assert "which is no file beside it" in refusal(index)


def test_files_that_are_not_what_the_index_says_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    first, second = sorted(tmp_path.glob("*-of-*"))
    parts = [safetensors.torch.load_file(file) for file in (first, second)]
    twice = next(iter(parts[1]))
    safetensors.torch.save_file(parts[0] | {twice: parts[1][twice] * 2}, first)
    assert f"they differ in 1 names ({twice})" in refusal(index)
    safetensors.torch.save_file(dict(list(parts[0].items())[1:]), first)
    assert "they differ in 1 names" in refusal(index)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": [', "{" * 9999]
)
def test_json_that_is_no_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "no index of a checkpoint" in refusal(tmp_path / "config.json")


def test_an_index_of_other_files_does_not_matter(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = save(tmp_path, state(), "whole.pth")
    assert "files" not in "; ".join(load(path).notes)
    assert load(path).checkpoint_path == path


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "run7.pth").touch()
    assert "Name the file in it, such as run7.pth." in refusal(tmp_path)
    assert "There is no checkpoint" in refusal(tmp_path / "absent.pth")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "not a regular file" in refusal(Path("/dev/zero"))
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "cannot be read" in refusal(Path("a\0b"))


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, state())

    def denied(*_args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # by hand, as root may read everything
    assert "cannot be read: Permission denied" in refusal(path)
