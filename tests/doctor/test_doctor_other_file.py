"""Files that are no plan are named for what they are."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from spach_deploy.doctor.plan_file import identify_other_file
from tests.doctor.plans import with_metadata


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.onnx"))
    return buffer.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


KINDS = {
    "empty": (b"", "empty"),
    "zeros": (bytes(1000), "nothing but zeros"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "torch": (zipped("archive/data.pkl", "archive/data/0"), "PyTorch checkpoint"),
    "npz": (zipped("input.npy", "logits.npy"), "NumPy archive"),
    "zip": (zipped("bundle/manifest.json"), "a zip archive"),
    "no zip": (b"PK\x03\x04" + b"x" * 200, "damaged"),
    "tar": (tarred(), "a tar archive"),
    "gzip": (gzip.compress(b"plan"), "compressed with gzip"),
    "safetensors": (safetensors(), "safetensors"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "the index of a checkpoint in several files"),
    "pickle": (pickle.dumps({"state_dict": {}}), "Python pickle"),
    "onnx": (b"\x08\x0a\x12\x07pytorch" + bytes(50), "an ONNX graph"),
    "onnx, opset first": (b"\x08\x0a\x42\x04\x0a\x00\x10\x14" + bytes(50), "an ONNX graph"),
    "metadata": (with_metadata(b"\x01" * 20, b'{"task": "detect"}'), "18 bytes of JSON metadata, as Ultralytics"),
    "elf": (b"\x7fELF" + bytes(100), "a compiled program"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(100), "TensorFlow Lite"),
    "html": (b"<!DOCTYPE html><title>404</title>", "HTML"),
    "text": ("a text with \N{SNOWMAN}".encode() * 400, "a text file"),
    "control characters": (b"\x01\x02\x03abc" * 20, "not a TensorRT plan"),
    "bytes": (bytes(range(1, 256)) * 20, "not a TensorRT plan"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    content, says = KINDS[kind]
    file = tmp_path / "engine.plan"
    file.write_bytes(content)
    other = identify_other_file(file)
    assert says in other.kind
    assert other.advice.endswith(".")


def test_real_onnx_files(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    for fields in ({}, {"producer_name": "pytorch"}, {"doc_string": "text"}):
        onnx.save(helper.make_model(graph, **fields), tmp_path / "model.onnx")
        assert "ONNX" in identify_other_file(tmp_path / "model.onnx").kind


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (Path(tmp_path / "harm"),)  # type: ignore[return-value]

    (tmp_path / "engine.plan").write_bytes(pickle.dumps(Harm()))
    assert "pickle" in identify_other_file(tmp_path / "engine.plan").kind
    assert not (tmp_path / "harm").exists()
