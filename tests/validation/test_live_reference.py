"""Golden packs, and a bundle's outputs from logits."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spach_deploy.bundle import store
from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import promised_dtypes
from spach_deploy.common.errors import BundleError
from spach_deploy.options.specs import IODtype, OutputSpec
from tests.outputs import classifier, of_logits


def golden(count: int = 3) -> Golden:
    rng = np.random.default_rng(0)
    return Golden(
        rng.standard_normal((count, 3, 8, 8)).astype(np.float32),
        {"logits": rng.standard_normal((count, 11)).astype(np.float32)},
        tuple(f"photo ü {index}.jpg" for index in range(count)),
    )


LOGITS = golden().outputs["logits"]


def test_a_golden_pack_survives_its_file(tmp_path: Path) -> None:
    pack = golden()
    pack.save(tmp_path / "golden.npz")
    loaded = Golden.load(tmp_path / "golden.npz")
    assert loaded.names == pack.names
    assert np.array_equal(loaded.input, pack.input)
    assert np.array_equal(loaded.outputs["logits"], pack.outputs["logits"])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_what_is_no_pack_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read as a golden pack"):
        Golden.load(tmp_path / "golden.npz")


def test_a_pack_is_judged_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four gigabytes of zeros are four megabytes in a file."""
    golden().save(tmp_path / "golden.npz")
    monkeypatch.setattr(store, "OUTPUT_BYTES", 100)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(BundleError, match=r"'logits' is float32 \(3, 11\), 132 bytes; 100 are read at most"):
        Golden.load(tmp_path / "golden.npz")


def rewritten(path: Path, compression: int, *, flags: int = 0) -> None:
    """The pack with its members compressed in another way, and flags set that say how."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    spoilt = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := spoilt.find(mark, at + 1)) >= 0:
            spoilt[at + place] |= flags
    path.write_bytes(spoilt)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: rewritten(path, zipfile.ZIP_STORED, flags=1), "encrypted or compressed"),
        (lambda path: rewritten(path, zipfile.ZIP_LZMA), "encrypted or compressed"),
        (
            lambda path: np.savez(path, input=golden().input, logits=LOGITS),
            "it has no array 'names'",
        ),
        (
            lambda path: np.savez(path, input=golden().input, logits=LOGITS, names=7),
            "is no golden pack",
        ),
    ],
    ids=["encrypted", "lzma", "no names", "one name"],
)
def test_a_pack_that_cannot_be_read_is_one_sentence(spoil: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    golden().save(tmp_path / "golden.npz")
    spoil(tmp_path / "golden.npz")
    with pytest.raises(BundleError, match=reason):
        Golden.load(tmp_path / "golden.npz")


def test_a_pickle_in_a_pack_is_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", input=np.array([{}], dtype=object), logits=LOGITS, names=["a"])
    with pytest.raises(BundleError):
        Golden.load(tmp_path / "golden.npz")


def test_a_pack_of_unequal_lengths_is_refused(tmp_path: Path) -> None:
    pack = golden()
    Golden(pack.input[:2], pack.outputs, pack.names).save(tmp_path / "golden.npz")
    with pytest.raises(BundleError, match="no golden pack"):
        Golden.load(tmp_path / "golden.npz")


def test_outputs_are_what_pytorch_makes_of_the_logits() -> None:
    logits = golden(16).outputs["logits"]
    outputs = of_logits(logits, OutputSpec(top_k=3, softmax=True))
    tensor = torch.from_numpy(logits)
    values, indices = tensor.topk(3)
    assert list(outputs) == ["logits", "probabilities", "top_values", "top_indices"]
    np.testing.assert_allclose(outputs["probabilities"], tensor.softmax(1).numpy(), rtol=1e-6)
    assert np.array_equal(outputs["top_values"], values.numpy())
    assert np.array_equal(outputs["top_indices"], indices.numpy())
    assert {name: array.dtype.name for name, array in outputs.items()} == promised_dtypes(
        classifier(11, OutputSpec(top_k=3, softmax=True))
    )


def test_equal_logits_are_ranked_by_index() -> None:
    outputs = of_logits(np.array([[1, 2, 2, 0]], np.float32), OutputSpec(top_k=3))
    assert outputs["top_indices"].tolist() == [[1, 2, 0]]


def test_large_logits_have_probabilities() -> None:
    outputs = of_logits(np.array([[1e4, 0, -1e4]], np.float32), OutputSpec(softmax=True))
    assert outputs["probabilities"].tolist() == [[1.0, 0.0, 0.0]]


def test_fp16_at_the_boundary_is_promised_for_floats() -> None:
    assert promised_dtypes(classifier(11, OutputSpec(IODtype.FP16, 1, False))) == {
        "logits": "float16",
        "top_values": "float16",
        "top_indices": "int64",
    }
