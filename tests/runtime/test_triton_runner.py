"""Addresses of served models, and what happens without a client or a server. Real servers: tests/deployment/triton."""

from __future__ import annotations

import sys

import pytest

from spach_deploy.errors import MissingPackageError, UsageError
from spach_deploy.runtime.triton_runner import ServedAt, TritonRunner


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


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_without_a_client_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'tritonclient\[{protocol}\]'"):
        TritonRunner(ServedAt(protocol, "localhost", 1, "m")).__enter__()
