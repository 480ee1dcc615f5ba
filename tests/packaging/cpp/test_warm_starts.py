"""Kernels that TensorRT for RTX compiles at run time: kept between processes, never a reason to fail."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import small_bundles
from tests.packaging.cpp import models
from tests.packaging.cpp.builds import Build

pytestmark = pytest.mark.cpp


def warm(
    build: Build,
    model: Path,
    batches: str,
    *options: str,
    folder: Path,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
    **variables: str,
) -> tuple[list[str], str]:
    """(what the double traced, what was logged) of a process that runs `batches`, or warms up where it is none."""
    trace = folder / "trace"
    trace.unlink(missing_ok=True)
    given = {**(environment or {}), **variables, "SPACH_DOUBLE_TRACE": str(trace)}
    result = build.run("probe", "warm", model, batches, *options, timeout=120, **given)
    assert (result.returncode, result.stderr) == (code, ""), result.stdout
    assert code or result.stdout.endswith("done\n") or "The runtime cache was" in result.stdout
    return trace.read_text().splitlines() if trace.exists() else [], result.stdout


def test_a_second_process_compiles_nothing(asan: Build, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept" / "kernels.cache"
    trace, said = warm(asan, model, "1,4", f"cache={cache}", folder=tmp_path)
    assert trace == ["compiled batch 1", "compiled batch 4"]
    assert f"info: There is no runtime cache yet: {cache}\nfile: {cache}\ndone\n" in said
    assert said.endswith(f"info: The runtime cache was saved: {cache}\n")
    assert sorted(file.name for file in cache.parent.iterdir()) == ["kernels.cache", "kernels.cache.lock"]

    written = cache.stat().st_mtime_ns
    trace, said = warm(asan, model, "1,4", f"cache={cache}", folder=tmp_path)
    assert trace == ["found batch 1", "found batch 4"]
    assert f"info: The runtime cache was read: {cache}\n" in said
    assert cache.stat().st_mtime_ns == written  # nothing was new

    trace, _ = warm(asan, model, "4,8", f"cache={cache}", folder=tmp_path)
    assert trace == ["found batch 4", "compiled batch 8"]
    assert warm(asan, model, "1,8", f"cache={cache}", folder=tmp_path)[0] == ["found batch 1", "found batch 8"]


def test_the_default_is_in_the_users_cache_folder_for_this_plan_gpu_and_version(
    plain: Build, model: Path, tmp_path: Path
) -> None:
    digest = next(
        line.split()[2] for line in (model / "model.txt").read_text().splitlines() if line.startswith("plan ")
    )
    name = f"{digest[:16]}-sm89-128-1.7.1.cache"
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}
    assert warm(plain, model, "1", folder=tmp_path, environment=home)[0] == ["compiled batch 1"]
    assert (tmp_path / "home" / ".cache" / "spach" / name).is_file()
    assert warm(plain, model, "1", folder=tmp_path, environment=home)[0] == ["found batch 1"]
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert warm(plain, model, "1", folder=tmp_path, environment=xdg)[0] == ["compiled batch 1"]
    assert (tmp_path / "xdg" / "spach" / name).is_file()
    other = warm(plain, model, "1", folder=tmp_path, SPACH_DOUBLE_PROCESSORS="60", environment=xdg)
    assert other[0] == ["compiled batch 1"]
    assert len(list((tmp_path / "xdg" / "spach").glob("*.cache"))) == 2
    trace, said = warm(plain, model, "1", folder=tmp_path, HOME="", XDG_CACHE_HOME="relative")
    assert trace == ["compiled batch 1"]
    assert "warning: There is no runtime cache, because this user has no cache folder.\nfile: \n" in said


def test_it_can_be_left_out(plain: Build, model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        trace, said = warm(plain, model, "1", "cache=none", folder=tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))
        assert (trace, said) == (["compiled batch 1"], "file: \ndone\n")
    assert not (tmp_path / "xdg").exists()
    _, said = warm(plain, model, "save", "cache=none", folder=tmp_path, code=1)
    assert said.endswith("bad argument: This engine has no runtime cache.\n")


def spoil(cache: Path, how: str) -> None:
    content = cache.read_bytes()
    head, _, kernels = content.partition(b"\n")
    cache.write_bytes(
        {
            "empty": b"",
            "cut": content[:-3],
            "longer": content + b"batch 64\n",
            "one bit": content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
            "head alone": head,
            "other words": b"\x00" * 700,
            "no end of line": b"spach-runtime-cache 1 " * 100,
            "other plan": content.replace(b" plan ", b" plan 0"),
            "other GPU": content.replace(b"gpu sm89-128", b"gpu sm89-60"),
            "other version": content.replace(b"version 1.7.1", b"version 1.7.0"),
            "TensorRT's own": kernels,
        }[how]
    )


SPOILED = {
    "empty": "is no runtime cache",
    "cut": "is damaged",
    "longer": "is damaged",
    "one bit": "is damaged",
    "head alone": "is no runtime cache",
    "other words": "is no runtime cache",
    "no end of line": "is no runtime cache",
    "other plan": "was written for another plan, GPU or version of TensorRT",
    "other GPU": "was written for another plan, GPU or version of TensorRT",
    "other version": "was written for another plan, GPU or version of TensorRT",
    "TensorRT's own": "is no runtime cache",
}


def test_a_file_that_is_of_no_use_is_a_line_in_the_log_and_replaced(asan: Build, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kernels.cache"
    warm(asan, model, "1", f"cache={cache}", folder=tmp_path)
    good = cache.read_bytes()
    for how, reason in SPOILED.items():
        spoil(cache, how)  # which the turn before has left as it was
        assert cache.read_bytes() != good, how
        trace, said = warm(asan, model, "1", f"cache={cache}", folder=tmp_path)
        assert trace == ["compiled batch 1"], how
        assert f"warning: The runtime cache is not used: {cache} {reason}.\n" in said, how
        assert cache.read_bytes() == good, how


def test_a_cache_that_tensorrt_refuses_is_not_used(plain: Build, model: Path, tmp_path: Path) -> None:
    """Of another driver, say: TensorRT's own check, which is not ours to make."""
    cache = tmp_path / "kernels.cache"
    warm(plain, model, "1", f"cache={cache}", folder=tmp_path)
    trace, said = warm(plain, model, "1", f"cache={cache}", folder=tmp_path, SPACH_DOUBLE_FAIL="deserialize:1")
    assert trace == ["compiled batch 1"]
    assert f"warning: The runtime cache is not used: {cache}: The runtime cache is incompatible.\n" in said


def test_a_cache_that_tensorrt_refuses_is_replaced_though_it_is_larger(
    plain: Build, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "kernels.cache"
    warm(plain, model, "1", f"cache={cache}", folder=tmp_path)
    good = cache.read_bytes()
    kernels = b"of another driver\n" * 100
    facts = {b"bytes": str(len(kernels)).encode(), b"sha256": hashlib.sha256(kernels).hexdigest().encode()}
    words = good.split(b"\n")[0].split(b" ")
    for name, value in facts.items():
        words[words.index(name) + 1] = value
    cache.write_bytes(b" ".join(words) + b"\n" + kernels)
    trace, said = warm(plain, model, "1", f"cache={cache}", folder=tmp_path)
    assert trace == ["compiled batch 1"]
    assert f"warning: The runtime cache is not used: {cache}: The runtime cache is incompatible.\n" in said
    assert cache.read_bytes() == good


@pytest.mark.parametrize("function", ["createRuntimeCache", "setRuntimeCache", "serialize"])
def test_without_a_cache_the_engine_runs(asan: Build, model: Path, tmp_path: Path, function: str) -> None:
    cache = tmp_path / "kernels.cache"
    trace, said = warm(asan, model, "1", f"cache={cache}", folder=tmp_path, SPACH_DOUBLE_FAIL=f"{function}:1")
    assert trace == ["compiled batch 1"]
    assert said.count("warning: ") == 1
    assert not cache.exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("createRuntimeConfig", "TensorRT could not create a runtime configuration."),
        ("setCudaGraphStrategy", "TensorRT refused CUDA graphs."),
    ],
)
def test_what_was_asked_for_and_refused_is_an_error(
    asan: Build, model: Path, tmp_path: Path, function: str, reason: str
) -> None:
    fails = {"SPACH_DOUBLE_FAIL": f"{function}:1"}
    _, said = warm(asan, model, "1", "cache=none", "cuda_graphs=1", folder=tmp_path, code=1, environment=fails)
    assert said == f"file: \nTensorRT error: {reason}\n"


def test_a_folder_that_cannot_be_written_is_a_line_in_the_log(plain: Build, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "kernels.cache"
    trace, said = warm(plain, model, "1", f"cache={cache}", folder=tmp_path)
    assert trace == ["compiled batch 1"]
    assert f"warning: The runtime cache was not saved: {cache}.lock cannot be written.\n" in said
    _, said = warm(plain, model, "1,save", f"cache={cache}", folder=tmp_path, code=1)
    assert f"bad file: {cache}.lock cannot be written.\n" in said


def together(build: Build, model: Path, cache: Path, batches: list[str], **variables: str) -> None:
    """Processes at once, each of which runs one batch size and ends."""
    command = [str(build.program("probe")), "warm", str(model)]
    environment = {**os.environ, **build.variables, **variables}
    running = [
        subprocess.Popen([*command, batch, f"cache={cache}"], env=environment, stdout=subprocess.PIPE, text=True)
        for batch in batches
    ]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "not used" not in output, output


def test_processes_at_once_lose_nothing(plain: Build, model: Path, tmp_path: Path) -> None:
    """Each begins without the others' kernels, and ends when it likes: the file has them all, and is never half."""
    cache = tmp_path / "kernels.cache"
    together(plain, model, cache, [str(batch) for batch in range(1, 9)])
    trace, said = warm(plain, model, ",".join(map(str, range(1, 9))), f"cache={cache}", folder=tmp_path)
    assert trace == [f"found batch {batch}" for batch in range(1, 9)], said


def test_where_caches_cannot_be_merged_the_larger_one_stays(plain: Build, model: Path, tmp_path: Path) -> None:
    """It is not documented that reading more into a cache adds to it. If it does not, what is missing is compiled."""
    cache, replaces = tmp_path / "kernels.cache", {"SPACH_DOUBLE_REPLACES": "1"}
    warm(plain, model, "1,2,3", f"cache={cache}", folder=tmp_path)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(cache.read_bytes())
    warm(plain, model, "1,2,3,4,5", f"cache={cache}", folder=tmp_path)
    large.write_bytes(cache.read_bytes())
    # A process that read the small one finds the large one when it saves.
    for begins, ends in ((small, large), (large, small)):
        cache.write_bytes(begins.read_bytes())
        process = subprocess.Popen(
            [str(plain.program("probe")), "warm", str(model), "6,wait", f"cache={cache}"],
            env={**os.environ, **plain.variables, **replaces},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while process.stdout.readline() != "waits\n":
            pass
        cache.write_bytes(ends.read_bytes())
        assert process.communicate("\n", timeout=120)[0].startswith("done\n")
        trace, _ = warm(plain, model, "1,2,3,4,5,6", f"cache={cache}", folder=tmp_path, environment=replaces)
        kept = 5 if begins is small else 6
        assert trace == [*(f"found batch {n}" for n in range(1, kept + 1)), *["compiled batch 6"][: 6 - kept]]


def test_what_was_compiled_can_be_saved_on_request_and_is_after_a_warm_up(
    plain: Build, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "kernels.cache"
    _, said = warm(plain, model, "2,save", f"cache={cache}", folder=tmp_path)
    assert said.index("The runtime cache was saved") < said.index("done")
    trace, said = warm(plain, model, "none", f"cache={cache}", folder=tmp_path)
    assert trace == ["compiled batch 1", "compiled batch 4", "compiled batch 8"]  # the profile's
    assert said.index("The runtime cache was saved") < said.index("done")
    assert said.count("The runtime cache was saved") == 1
    assert warm(plain, model, "2,8", f"cache={cache}", folder=tmp_path)[0] == ["found batch 2", "found batch 8"]


def test_cuda_graphs_are_captured_for_each_batch_of_the_profile_and_launched_again(
    asan: Build, model: Path, tmp_path: Path
) -> None:
    trace, _ = warm(asan, model, "none", "cache=none", "cuda_graphs=1", folder=tmp_path)
    assert trace == [line.format(n) for n in (1, 4, 8) for line in ("compiled batch {}", "captured graph {}")]
    trace, _ = warm(asan, model, "4,4,1,4,4", "cache=none", "cuda_graphs=1", folder=tmp_path)
    graphs = [line for line in trace if "graph" in line]
    assert graphs == ["captured graph 4", "launched graph 4", "launched graph 4"]  # device addresses never change


def test_the_specialization_is_as_asked(plain: Build, model: Path, tmp_path: Path) -> None:
    for number, trace in enumerate((["compiled batch 4"], ["compiled batch 4 eagerly"], ["compiled fallback"])):
        got = warm(plain, model, "4", "cache=none", f"specialization={number}", folder=tmp_path)
        assert got[0] == trace


def test_ordinary_tensorrt_refuses_what_it_cannot_do_and_keeps_no_cache(tsan: Build, tmp_path: Path) -> None:
    model = models.model(tmp_path, flavour="tensorrt")
    for option in ("cuda_graphs=1", "specialization=1", f"cache={tmp_path / 'kernels.cache'}"):
        _, said = warm(tsan, model, "1", option, folder=tmp_path, code=1)
        assert said.startswith("bad argument: CUDA graphs, a specialization and a runtime cache are TensorRT for RTX's")
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert warm(tsan, model, "1", folder=tmp_path, environment=xdg) == ([], "file: \ndone\n")
    assert not (tmp_path / "xdg").exists()


def test_the_benchmark_takes_the_same_options(plain: Build, model: Path, tmp_path: Path) -> None:
    cache, trace = tmp_path / "kernels.cache", tmp_path / "trace"
    measure = ("spach_benchmark", "-m", small_bundles.copy(model, tmp_path / "model"), "-b", 4, "-n", 3)
    result = plain.run(*measure, "-c", cache, "-g", "-s", "eager", SPACH_DOUBLE_TRACE=str(trace))
    assert result.returncode == 0, result.stderr
    assert "from the start to the first answers: " in result.stdout
    assert trace.read_text().splitlines()[:2] == ["compiled batch 4 eagerly", "captured graph 4"]
    assert cache.is_file()
    assert plain.run(*measure, "-c", "none").returncode == 0
    assert plain.run(*measure, "-s", "quickly").returncode == 2
