"""Addresses of served models, and what happens without a client or a server. Real servers: tests/packaging/triton."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from spach_deploy.common.errors import MismatchError, MissingPackageError, UnavailableError, UsageError
from spach_deploy.options.specs import IODtype, OutputSpec
from spach_deploy.runtime.triton_runner import ServedAt, TritonRunner
from tests.packaging.kubernetes.served import StandIn, serving
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny


@pytest.mark.parametrize(
    ("url", "served"),
    [
        ("http://localhost:8000/ms_hybrid_s", ServedAt("http", "localhost", 8000, "ms_hybrid_s")),
        ("http://gpu7/m", ServedAt("http", "gpu7", 8000, "m")),
        ("https://example.org/m/", ServedAt("https", "example.org", 443, "m")),
        ("grpc://10.0.0.1:9001/m-1.b/3", ServedAt("grpc", "10.0.0.1", 9001, "m-1.b", "3")),
        ("grpc://localhost/m", ServedAt("grpc", "localhost", 8001, "m")),
        ("http://h:1/v2/models/m", ServedAt("http", "h", 1, "m")),
        ("http://h:1/v2/models/m/versions/2", ServedAt("http", "h", 1, "m", "2")),
        ("http://[::1]:8000/m", ServedAt("http", "::1", 8000, "m")),
    ],
)
def test_an_address_names_server_model_and_version(url: str, served: ServedAt) -> None:
    assert ServedAt.parse(url) == served
    assert ServedAt.parse(str(served)) == served


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost:8000", "http://localhost:8000/", "http:///m", "ftp://h/m", "http://h/m/0", "http://h/m/x"),
        *(
            "http://h/a/b/c",
            "http://h:port/m",
            "http://h:99999/m",
            "http://h/m?x=1",
            "http://me:secret@h/m",
            "http://h/m m",
        ),
    ],
)
def test_what_names_no_model_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"Give http://HOST:PORT/MODEL"):
        ServedAt.parse(url)


def test_without_a_client_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tritonclient\[grpc\]'"):
        TritonRunner(ServedAt("grpc", "localhost", 1, "m")).__enter__()


# HTTP


def runner(server: StandIn, **options: float) -> TritonRunner:
    return TritonRunner(ServedAt.parse(f"{server.url}/{server.name}"), **options)


@pytest.mark.parametrize("outputs", [OutputSpec(IODtype.FP16, top_k=3, softmax=True), OutputSpec(IODtype.UINT8)])
def test_answers_are_what_the_server_computed(outputs: OutputSpec) -> None:
    tiny = Tiny(outputs=outputs)
    inputs = tiny_bundles.samples(tiny, 11)
    with serving(tiny) as server, runner(server) as asked:
        assert (asked.platform, asked.input_specs["input"].shape[0]) == ("onnxruntime", None)
        found = asked.run({"input": inputs})
        assert server.batches == [8, 3]
        expected = server.answer(inputs)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=1e-2)  # products of other batches round otherwise


def test_a_server_that_drips_is_given_up() -> None:
    tiny = Tiny()
    with serving(tiny) as server, runner(server, timeout_s=0.3) as asked:
        server.drips = True
        with pytest.raises(UnavailableError, match=r"No answer from .* \(not whole within 0\.3 s\)"):
            asked.run({"input": tiny_bundles.samples(tiny, 8)})


def test_an_answer_larger_than_what_was_asked_for_is_not_read() -> None:
    tiny = Tiny()
    with (
        serving(tiny, lambda outputs: {**outputs, "logits": np.zeros((1, 1 << 20), np.float32)}) as server,
        runner(server) as asked,
        pytest.raises(MismatchError, match=r"its answer has more than 1,04\d,\d+ bytes"),
    ):
        asked.run({"input": tiny_bundles.samples(tiny, 1)})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v2/models/tiny", b"{}"),
        ("/v2/models/tiny", b"[]"),
        ("/v2/models/tiny", b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1e999]}], "outputs": []}'),
        ("/v2/models/tiny", b'{"inputs": [], "inputs": [], "outputs": []}'),
        ("/v2/models/tiny", b"not JSON"),
        ("/v2/models/tiny", b"[" * 100_000),
        ("/v2/models/tiny", b" " * (17 << 20)),
        ("/v2/models/tiny/config", b'{"max_batch_size": "abc"}'),
        ("/v2/models/tiny/config", b"7"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_server_that_does_not_describe_its_model_is_one_sentence(path: str, says: bytes) -> None:
    with serving(Tiny()) as server:
        server.says[path] = says
        with pytest.raises(MismatchError, match=r"does not describe|refused: its answer"):
            runner(server).__enter__()


def test_refusals_and_absences_are_told_apart() -> None:
    with serving(Tiny(), status=400) as server:
        with runner(server) as asked, pytest.raises(MismatchError, match="refused: no"):
            asked.run({"input": tiny_bundles.samples(Tiny(), 1)})
        url = server.url
    with pytest.raises(UnavailableError, match="No answer from"):
        TritonRunner(ServedAt.parse(f"{url}/tiny")).__enter__()
