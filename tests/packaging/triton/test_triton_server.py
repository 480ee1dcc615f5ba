"""A real tritonserver serves what `spach-package triton` writes, as it is written.

The graphs run in ONNX Runtime, through a backend of the tests' own. One server has every kind of model; those that
kill one start their own.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.outputs import expected_outputs
from spach_deploy.bundle.store import GRAPH, Bundle
from spach_deploy.cli.validate import main as validate_command
from spach_deploy.data import images as probes_module
from spach_deploy.data import preprocess
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, Precision, Preprocessing
from spach_deploy.packaging.triton.check import check_repository
from spach_deploy.packaging.triton.options import (
    Backend,
    Device,
    Ensemble,
    EnsembleInput,
    Instances,
    RateLimiter,
    TritonOptions,
    VersionPolicy,
)
from spach_deploy.packaging.triton.repository import write_repository
from spach_deploy.packaging.triton.served_model import BundleArgument
from spach_deploy.validation.bundle_facts import BundleFacts
from tests import small_bundles
from tests.outputs import of_logits
from tests.packaging.programs import perf_analyzer
from tests.packaging.triton import load, tiny_bundles
from tests.packaging.triton.broken_repositories import BROKEN, GOOD
from tests.packaging.triton.clients import Client, client
from tests.packaging.triton.commands import commands, run
from tests.packaging.triton.server import Server, serving
from tests.packaging.triton.server_environment import environment
from tests.packaging.triton.tiny_bundles import Tiny

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("triton_packages")]

PROTOCOLS = ("http", "grpc")
HALF = Tiny("half", OutputSpec(IODtype.FP16))
PIXELS = Tiny("pixels", OutputSpec(IODtype.UINT8))
PLAN = Tiny("plan", OutputSpec(top_k=3, softmax=True))
EXPLICIT = Tiny("explicit", batch=BatchProfile(2, 4, 6))
FIXED = Tiny("fixed", batch=BatchProfile(4, 4, 4))
CACHED = Tiny("cached")
SEEDS = (7, 8)

ANY_DEVICE = Instances(device=Device.AUTO)  # there is no GPU here, and Triton refuses KIND_GPU without one
"""What has to be said for a plan, whose instances are on GPUs otherwise."""


def assert_close(answer: npt.NDArray[Any], logits: npt.NDArray[Any]) -> None:
    """FP16 in ONNX Runtime against FP32; answers of other inputs are off by tenths."""
    np.testing.assert_allclose(answer, logits, atol=2e-3, rtol=2e-3)


class Served:
    """The server that tests share, and where its models come from."""

    def __init__(self, server: Server, root: Path, real: Path) -> None:
        self.server = server
        self.root = root
        self.real = real

    def repository(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    real = small_bundles.bundle(Precision.FP16)
    repositories = list(_write(root, real))
    with serving(repositories, root / "server", "--cache-config=local,size=10485760") as server:
        yield Served(server, root, real)


def _write(root: Path, real: Path) -> Iterator[Path]:
    """One repository for each set of options."""
    onnx = Backend.ONNXRUNTIME
    kinds: dict[str, tuple[list[Tiny], TritonOptions]] = {
        "graphs": ([HALF], TritonOptions(onnx, ensemble=Ensemble(top_k=2))),
        "pixels": ([PIXELS], TritonOptions(onnx, ensemble=Ensemble(EnsembleInput.PIXELS, 3))),
        "pictures": ([Tiny("pictures", OutputSpec(IODtype.UINT8))], TritonOptions(onnx, ensemble=Ensemble(top_k=1))),
        "plans": ([PLAN, EXPLICIT, FIXED], TritonOptions(Backend.TENSORRT, instances=ANY_DEVICE)),
        "cached": ([CACHED], TritonOptions(onnx, response_cache=True, warm_up=False)),
        "versions": (
            [Tiny("versions", seed=seed) for seed in SEEDS],
            TritonOptions(onnx, version_policy=VersionPolicy.parse("all")),
        ),
    }
    yield write_repository([BundleArgument(real)], root / "real", TritonOptions(onnx, ensemble=Ensemble())).path
    for name, (tinies, options) in kinds.items():
        bundles = [tiny_bundles.write(root / f"{name}-bundles" / str(i), tiny) for i, tiny in enumerate(tinies)]
        repository = write_repository([BundleArgument(path) for path in bundles], root / name, options).path
        if name == "plans":  # the backend of the tests runs the graph that the plan was built from
            for tiny, bundle in zip(tinies, bundles, strict=True):
                shutil.copy(bundle / GRAPH, repository / tiny.name / "1" / "model.onnx")
        yield repository


def stats(served: Served, model: str) -> Any:
    url = f"http://127.0.0.1:{served.server.http}/v2/models/{model}/stats"
    return json.load(urllib.request.urlopen(url))["model_stats"][0]


def batches(served: Served, repository: str, model: str) -> list[list[int]]:
    """The requests' sizes of each run of a model, warm-up included."""
    text = (served.repository(repository) / model / "batches.txt").read_text()
    return [[int(size) for size in line.split()] for line in text.splitlines()]


# What is written is served


def test_every_configuration_is_served_as_it_is_written_and_its_check_finds_nothing(served: Served) -> None:
    expected = set()
    for name in ("real", "graphs", "pixels", "pictures", "plans", "cached", "versions"):
        checked = check_repository(served.repository(name))
        assert checked.findings == ()
        expected |= set(checked.models)
    with client(served.server, "http") as http:
        ready = {entry["name"] for entry in http.raw.get_model_repository_index() if entry["state"] == "READY"}
        assert ready == expected
        assert http.raw.get_model_config("plan")["platform"] == "tensorrt_plan"


def test_warm_up_ran_at_the_smallest_usual_and_largest_batch(served: Served) -> None:
    assert [sum(sizes) for sizes in batches(served, "real", small_bundles.NAME)[:3]] == [1, 8, 32]
    assert [sum(sizes) for sizes in batches(served, "plans", "explicit")[:3]] == [2, 4, 6]
    assert [sum(sizes) for sizes in batches(served, "plans", "fixed")[:1]] == [4]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_golden_images_get_golden_answers(served: Served, protocol: str, batch: int) -> None:
    golden = Golden.load(served.real / "golden.npz")
    facts = BundleFacts.of(Bundle.open(served.real))
    chosen = np.arange(batch) % len(golden.input)
    expected = expected_outputs(golden.outputs, facts.outputs)
    with client(served.server, protocol) as one:
        answers = one.ask(small_bundles.NAME, input=golden.input[chosen])
    assert list(answers) == ["logits", "probabilities", "top_values", "top_indices"]
    for name in ("logits", "probabilities", "top_values"):
        bound = facts.tolerances.graph.outputs[name].max_abs
        assert np.abs(answers[name] - expected[name][chosen]).max() <= bound
    assert answers["top_indices"].dtype == np.int64


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("tiny", [HALF, PIXELS, PLAN, EXPLICIT, FIXED], ids=lambda tiny: tiny.name)
def test_every_interface_answers(served: Served, protocol: str, tiny: Tiny) -> None:
    inputs = tiny_bundles.samples(tiny, 4, seed=1)
    with client(served.server, protocol) as one:
        answers = one.ask(tiny.name, input=inputs)
    scale = 255 if tiny is PIXELS else 1
    assert_close(answers["logits"] / scale, tiny_bundles.logits(tiny, inputs) / scale)
    assert answers["logits"].dtype == (np.float16 if tiny is HALF else np.float32)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_version_is_the_bundle_it_came_from(served: Served, protocol: str) -> None:
    inputs = tiny_bundles.samples(Tiny())
    with client(served.server, protocol) as one:
        answers = [one.ask("versions", version, input=inputs)["logits"] for version in ("1", "2", "")]
    expected = [tiny_bundles.logits(Tiny(seed=seed), inputs) for seed in (*SEEDS, SEEDS[1])]
    assert np.abs(expected[0] - expected[1]).max() > 0.5
    for answer, logits in zip(answers, expected, strict=True):
        assert_close(answer, logits)


def test_classes_come_with_their_labels(served: Served) -> None:
    inputs = tiny_bundles.samples(PLAN, 1)
    best = np.argsort(-tiny_bundles.logits(PLAN, inputs)[0])[:2]
    with client(served.server, "http") as one:
        tensors, wanted = one.tensors({"input": inputs}), one.wanted(["logits"], class_count=2)
        answer = one.raw.infer("plan", tensors, outputs=wanted).as_numpy("logits").reshape(-1)
    assert [text.decode().split(":")[2] for text in answer] == [f"class {index}" for index in best]


def test_a_repeated_request_is_answered_from_the_cache(served: Served) -> None:
    inputs = tiny_bundles.samples(CACHED, 2, seed=5)
    with client(served.server, "grpc") as one:
        first, second = (one.ask("cached", input=inputs)["logits"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert stats(served, "cached")["inference_stats"]["cache_hit"]["count"] == 1


# Ensembles


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_bytes_of_photographs_get_the_golden_classes(served: Served, protocol: str) -> None:
    """The golden pack is these photographs, preprocessed by this package."""
    golden = Golden.load(served.real / "golden.npz")
    photographs = [Path(path).read_bytes() for path in photograph_files(golden.names)]
    with client(served.server, protocol) as one:
        answers = one.ask(f"{small_bundles.NAME}_ensemble", image=np.array(photographs, np.object_)[:, None])
    expected = of_logits(golden.outputs["logits"], OutputSpec(top_k=5, softmax=True))
    bound = BundleFacts.of(Bundle.open(served.real)).tolerances.graph.outputs["probabilities"].max_abs
    ranked = np.take_along_axis(expected["probabilities"], answers["indices"], axis=1)
    assert np.abs(answers["probabilities"] - ranked).max() <= bound
    assert (answers["indices"][:, 0] == expected["top_indices"][:, 0]).all()
    labels = [[f"class {index}".encode() for index in row] for row in answers["indices"]]
    assert answers["labels"].tolist() == labels


def photograph_files(names: tuple[str, ...]) -> list[Path]:

    return [Path(probes_module.__file__).with_name("probes") / name for name in names]


def test_pictures_of_a_model_of_pixels_are_only_cut_to_size(served: Served) -> None:
    picture = tiny_bundles.samples(PIXELS, 1, seed=3)[0]
    with client(served.server, "http") as one:
        by_pixels = one.ask("pixels_ensemble", pixels=picture[None])
        by_file = one.ask("pictures_ensemble", image=np.array([[png(picture)]], np.object_))
    best = int(np.argmax(tiny_bundles.logits(PIXELS, resized(picture)[None])[0]))
    assert by_file["indices"].tolist() == [[best]]
    assert by_pixels["indices"][0, 0] == np.argmax(tiny_bundles.logits(PIXELS, picture[None])[0])


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def resized(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return preprocess.pixels(Image.fromarray(pixels), Preprocessing(tiny_bundles.SIZE, tiny_bundles.RESIZE))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_that_is_no_picture_fails_its_own_request_only(served: Served, protocol: str) -> None:
    good, bad = png(np.zeros((9, 9, 3), np.uint8)), b"no picture"
    with client(served.server, protocol) as one:
        with pytest.raises(Exception, match="no picture that can be read"):
            one.ask("half_ensemble", image=np.array([[bad]], np.object_))
        assert one.ask("half_ensemble", image=np.array([[good]], np.object_))["indices"].shape == (1, 2)


# What the check finds

REFUSED = (
    *("unknown field", "two schedulers", "backend of another", "no dims", "format without three dims"),
    *("preferred size above the maximum", "warm-up above the maximum", "warm-up file cut"),
)
"""Broken repositories that tritonserver refuses within a second or two; it refuses most of the others as well."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_check_finds_keeps_the_server_from_starting(tmp_path: Path, name: str) -> None:
    broken = BROKEN[name]
    repository = _loadable(tmp_path, broken.base)
    broken.spoil(repository)
    assert check_repository(repository).exit_code == 1
    (tmp_path / "server").mkdir()
    server = Server([repository], tmp_path / "server")
    try:
        server.start(wait=False)
        assert not server.wait_until_ready()
        refused = "failed to load" in server.log or "Poll failed" in server.log
        assert (server.exit_code == 1 and refused) or server.exit_code == -signal.SIGSEGV  # the warm-up, 1 time in 4
    finally:
        server.stop()


@pytest.mark.parametrize("base", ["plan", "explicit"])
def test_unbroken_they_are_served(tmp_path: Path, base: str) -> None:
    with serving([_loadable(tmp_path, base)], tmp_path / "server") as server:
        assert server.is_ready()


def _loadable(folder: Path, base: str) -> Path:
    """A good repository that a server without a GPU can load."""
    tiny, options = GOOD[base]
    bundle = tiny_bundles.write(folder / "bundle", tiny)
    options = dataclasses.replace(options, instances=ANY_DEVICE)
    repository = write_repository([BundleArgument(bundle)], folder / "repository", options).path
    shutil.copy(bundle / GRAPH, repository / "tiny" / "1" / "model.onnx")
    return repository


# Instances, the rate limiter, and the README's commands

LIMITED = Tiny("limited", engine="none")


def limited(folder: Path) -> Path:
    """A repository whose models share what the rate limiter hands out."""
    options = TritonOptions(
        Backend.ONNXRUNTIME,
        instances=Instances.parse(["2", "limited_top_k:3"]),
        rate_limiter=RateLimiter.parse(["slot=2", "limited_preprocess:core=1:global"], ["limited:2"]),
        ensemble=Ensemble(top_k=2),
    )
    bundle = tiny_bundles.write(folder / "bundle", LIMITED)
    return write_repository([BundleArgument(bundle)], folder / "repository", options).path


def test_instances_and_what_they_need_are_what_the_server_has(tmp_path: Path) -> None:
    repository = limited(tmp_path)
    picture = png(tiny_bundles.samples(PIXELS, 1, seed=3)[0])
    with serving([repository], tmp_path / "server", "--rate-limit=execution_count", "--log-verbose=1") as server:
        log = server.log
        counts = {"limited_preprocess": 4, "limited": 2, "limited_top_k": 3}
        for name, count in counts.items():
            started = set(re.findall(rf"ModelInstanceInitialize: ({name}_0_\d+) ", log))
            assert started == {f"{name}_0_{index}" for index in range(count)}
        table = " ".join(re.split(r"(?:\\[nt]|\s)+", log))  # the log has line breaks within a message as \n
        assert "Device: GLOBAL Resource: core Count: 1" in table
        assert "Device: 0 Resource: slot Count: 2" in table
        with client(server, "grpc") as one:
            answers = one.ask("limited_ensemble", image=np.array([[picture]] * 8, np.object_))
        assert answers["indices"].shape == (8, 2)
        inputs = tiny_bundles.samples(LIMITED, 400, seed=2)
        flooded = load.flood(server, "limited", inputs, clients=16)
        assert flooded.errors == {}
        assert load.crossed(flooded, tiny_bundles.logits(LIMITED, inputs), 2e-3) == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], 'Resource "core" is present as both global and device-specific'),
        (["--rate-limit-resource=slot:1"], 'Resource count for "slot" is limited to 1'),
    ],
)
def test_a_server_refuses_resources_that_it_cannot_hand_out(tmp_path: Path, flags: list[str], reason: str) -> None:
    """The first is a finding of the check; the second is what the server was told to have."""
    repository = limited(tmp_path)
    if not flags:
        config = repository / "limited" / "config.pbtxt"
        config.write_text(config.read_text().replace('name: "slot"', 'name: "core"'))
        assert check_repository(repository).exit_code == 1
    (tmp_path / "server").mkdir()
    server = Server([repository], tmp_path / "server", "--rate-limit=execution_count", *flags)
    try:
        server.start(wait=False)
        assert not server.wait_until_ready()
        assert reason in server.log
    finally:
        server.stop()


def of_readme(repository: Path, first_word: str, server: Server) -> list[str]:
    """Commands of a repository's README, for a server on other ports."""
    found = commands((repository / "README.md").read_text(), first_word)
    assert found
    return [text.replace(":8000/", f":{server.http}/").replace(":8001 ", f":{server.grpc} ") for text in found]


def test_the_readme_s_questions_get_answers(served: Served, tmp_path: Path) -> None:
    shutil.copy(photograph_files(("coffee.jpg",))[0], tmp_path / "picture.jpg")
    asked = of_readme(served.repository("real"), "curl", served.server)
    assert len(asked) > 6
    for command in asked:
        done = run(command, tmp_path)
        if "/v2/repository/" in command:  # for servers that were started with --model-control-mode=explicit
            assert done.returncode == 22
            continue
        assert done.returncode == 0, (command, done.stderr)
        if "picture.jpg" in command:
            assert '"labels"' in done.stdout
            assert done.stdout.count("class ") == 5


def test_the_readme_s_lines_of_perf_analyzer_measure(served: Served, tmp_path: Path) -> None:
    analyzer, libraries = perf_analyzer(), environment() / "nvidia_pytriton.libs"
    (tmp_path / "libraries").mkdir()
    for name in ("libb64.so.0d", "libcudart.so.12"):
        (carried,) = libraries.glob(f"{name.partition('.')[0]}-*")
        (tmp_path / "libraries" / name).symlink_to(carried)
    picture = photograph_files(("coffee.jpg",))[0].read_bytes()
    data = {"content": {"b64": base64.b64encode(struct.pack("<I", len(picture)) + picture).decode()}, "shape": [1]}
    (tmp_path / "pictures.json").write_text(json.dumps({"data": [{"image": data}]}))
    windows = "--concurrency-range 2 --measurement-mode count_windows --measurement-request-count 4 -s 9999 -r 3"
    repositories = [served.repository(name) for name in ("real", "pixels", "plans")]
    lines = [line for repository in repositories for line in of_readme(repository, "perf_analyzer", served.server)]
    largest = {line.split()[2]: line for line in lines}
    assert {"plan", "explicit", "fixed", "pixels", f"{small_bundles.NAME}_ensemble"} < set(largest)
    for line in largest.values():
        quick = re.sub(r"--concurrency-range \S+", windows, line).replace("perf_analyzer", str(analyzer), 1)
        done = run(quick, tmp_path, LD_LIBRARY_PATH=str(tmp_path / "libraries"))
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert re.search(r"Concurrency: 2, throughput: [1-9]", done.stdout), line


def test_the_way_back_of_the_readme_leads_to_the_version_before(tmp_path: Path) -> None:
    bundles = [tiny_bundles.write(tmp_path / f"b{seed}", Tiny(engine="none", seed=seed)) for seed in SEEDS]
    options = TritonOptions(Backend.ONNXRUNTIME)
    repository = write_repository([BundleArgument(b) for b in bundles], tmp_path / "repository", options).path
    inputs = tiny_bundles.samples(Tiny())
    explicit = ("--model-control-mode=explicit", "--load-model=*")
    with serving([repository], tmp_path / "server", *explicit) as server, client(server, "http") as one:
        assert_close(one.ask("tiny", input=inputs)["logits"], tiny_bundles.logits(Tiny(seed=SEEDS[1]), inputs))
        (move,) = of_readme(repository, "mv", server)
        load_again, told = of_readme(repository, "curl", server)[-2:]
        for command in (move, load_again, told):
            done = run(command, repository)
            assert done.returncode == 0, (command, done.stderr)
        assert json.loads(done.stdout)["versions"] == ["1"]
        assert_close(one.ask("tiny", input=inputs)["logits"], tiny_bundles.logits(Tiny(seed=SEEDS[0]), inputs))


# Many clients


def test_64_clients_and_2000_requests_lose_nothing_and_cross_nothing(served: Served) -> None:
    count, before = 2000, len(batches(served, "plans", "plan"))
    inputs = tiny_bundles.samples(PLAN, count, seed=99)
    expected = tiny_bundles.logits(PLAN, inputs)
    assert load.smallest_distance(expected) > 10 * 2e-3  # no answer can be taken for another's
    answers = load.flood(served.server, "plan", inputs, clients=64)
    assert answers.errors == {}
    assert len(answers.logits) == count
    assert load.crossed(answers, expected, 2e-3) == []
    ran = batches(served, "plans", "plan")[before:]
    assert sum(sum(sizes) for sizes in ran) == count
    assert max(sum(sizes) for sizes in ran) <= PLAN.batch.max
    assert sum(len(sizes) > 1 for sizes in ran) > 50  # the server did join requests


def test_golden_images_from_many_clients_get_golden_answers(served: Served) -> None:
    golden = Golden.load(served.real / "golden.npz")
    bound = BundleFacts.of(Bundle.open(served.real)).tolerances.graph.outputs["logits"].max_abs
    assert bound is not None
    assert load.smallest_distance(golden.outputs["logits"]) > 2 * bound
    before = len(batches(served, "real", small_bundles.NAME))
    answers = load.flood(served.server, small_bundles.NAME, np.tile(golden.input, (32, 1, 1, 1)), clients=64)
    assert answers.errors == {}
    assert len(answers.logits) == 256
    assert load.crossed(answers, np.tile(golden.outputs["logits"], (32, 1)), bound) == []
    ran = batches(served, "real", small_bundles.NAME)[before:]
    assert sum(len(sizes) > 1 for sizes in ran) > 5


def test_an_answer_to_somebody_else_would_be_noticed() -> None:
    expected = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    right = load.Answers({0: expected[:1], 1: expected[1:]})
    assert load.crossed(right, expected, 1e-3) == []
    assert load.crossed(load.Answers({0: expected[1:], 1: expected[1:]}), expected, 1e-3) == [0]
    assert load.crossed(load.Answers({0: expected}), expected, 1e-3) == [0]


# Bad requests


def shape(one: Client) -> None:
    one.ask("plan", input=np.zeros((1, 3, 8, 9), np.float32))


def rank(one: Client) -> None:
    one.ask("plan", input=np.zeros((3, 8, 8), np.float32))


def dtype(one: Client) -> None:
    one.ask("plan", input=np.zeros((1, 3, 8, 8), np.float16))


def input_name(one: Client) -> None:
    one.ask("plan", inptu=np.zeros((1, 3, 8, 8), np.float32))


def output_name(one: Client) -> None:
    one.ask("plan", outputs=["logit"], input=np.zeros((1, 3, 8, 8), np.float32))


def model_name(one: Client) -> None:
    one.ask("plans", input=np.zeros((1, 3, 8, 8), np.float32))


def version(one: Client) -> None:
    one.ask("plan", "9", input=np.zeros((1, 3, 8, 8), np.float32))


def batch_too_large(one: Client) -> None:
    one.ask("plan", input=np.zeros((9, 3, 8, 8), np.float32))


def batch_of_another_engine(one: Client) -> None:
    one.ask("fixed", input=np.zeros((3, 3, 8, 8), np.float32))


def no_input(one: Client) -> None:
    one.ask("plan")


def two_inputs(one: Client) -> None:
    one.ask("plan", input=np.zeros((1, 3, 8, 8), np.float32), other=np.zeros((1, 1), np.float32))


def less_data_than_shape(one: Client) -> None:
    (tensor,) = one.tensors({"input": np.zeros((1, 3, 8, 8), np.float32)})
    tensor.set_shape([2, 3, 8, 8])
    one.raw.infer("plan", [tensor])


BAD: dict[str, tuple[Callable[[Client], None], str]] = {
    "shape": (shape, r"unexpected shape for input 'input'.*Expected \[-1,3,8,8\], got \[1,3,8,9\]"),
    "rank": (rank, "unexpected shape|batch-size must be <= 8|Expected"),
    "type": (dtype, "data-type is 'FP16', but model 'plan' expects 'FP32'"),
    "input name": (input_name, "unexpected inference input 'inptu'"),
    "output name": (output_name, "unexpected inference output 'logit'"),
    "model name": (model_name, "unknown model: 'plans'"),
    "version": (version, "version 9 is not|at version 9|not found"),
    "batch too large": (batch_too_large, "batch-size must be <= 8"),
    "batch of another engine": (batch_of_another_engine, r"Expected \[4,3,8,8\], got \[3,3,8,8\]"),
    "no input": (no_input, "expected 1 inputs but got 0|missing"),
    "two inputs": (two_inputs, "expected 1 inputs but got 2|unexpected inference input 'other'"),
    "less data than shape": (less_data_than_shape, "byte size|expected size"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_an_error_and_the_server_lives_on(served: Served, protocol: str, name: str) -> None:
    ask, reason = BAD[name]
    with client(served.server, protocol) as one:
        with pytest.raises(Exception, match=re.compile(reason, re.DOTALL)):
            ask(one)
        still_right(one)


def still_right(one: Client) -> None:
    inputs = tiny_bundles.samples(PLAN, 1)
    assert_close(one.ask("plan", input=inputs)["logits"], tiny_bundles.logits(PLAN, inputs))


RAW: dict[str, tuple[bytes, dict[str, str]]] = {
    "truncated JSON": (b'{"inputs": [{"name": "inp', {}),
    "nothing": (b"", {}),
    "bytes": (bytes(range(256)), {}),
    "truncated tensor": (
        b'{"inputs":[{"name":"input","shape":[1,3,8,8],"datatype":"FP32","parameters":{"binary_data_size":768}}]}'
        + bytes(100),
        {"Inference-Header-Content-Length": "103"},
    ),
    "header longer than the body": (b"{}", {"Inference-Header-Content-Length": "99999"}),
    "negative header": (b"{}", {"Inference-Header-Content-Length": "-1"}),
    # 9223372036854775807 in place of 10000 ends tritonserver 2.51 itself
    "huge shape": (b'{"inputs":[{"name":"input","shape":[10000,3,8,8],"datatype":"FP32","data":[1]}]}', {}),
    "negative shape": (b'{"inputs":[{"name":"input","shape":[-1,3,8,8],"datatype":"FP32","data":[1]}]}', {}),
}


@pytest.mark.parametrize("name", RAW)
def test_a_broken_message_gets_an_error_and_the_server_lives_on(served: Served, name: str) -> None:
    body, headers = RAW[name]
    request = urllib.request.Request(f"http://127.0.0.1:{served.server.http}/v2/models/plan/infer", body, headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert 400 <= error.value.code < 600
    with client(served.server, "http") as one:
        still_right(one)


def test_clients_that_go_away_in_mid_request_harm_nobody(served: Served) -> None:
    head = b"POST /v2/models/plan/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"
    for port in (served.server.http, served.server.grpc):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head)
    with client(served.server, "http") as one:
        still_right(one)


# Killed


def test_killed_in_mid_load_clients_see_errors_and_never_wrong_numbers(tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", PLAN)
    options = TritonOptions(Backend.ONNXRUNTIME)
    repository = write_repository([BundleArgument(bundle)], tmp_path / "repository", options).path
    inputs = tiny_bundles.samples(PLAN, 4_000, seed=5)
    expected = tiny_bundles.logits(PLAN, inputs)

    def kill(answers: load.Answers) -> None:
        while len(answers.logits) < 200:
            time.sleep(0.005)
        server.kill()

    with serving([repository], tmp_path / "server") as server:
        answers = load.flood(server, "plan", inputs, clients=16, meanwhile=kill)
        assert not server.group_is_alive()
        assert 200 <= len(answers.logits) < len(inputs)
        assert len(answers.logits) + len(answers.errors) == len(inputs)
        assert load.crossed(answers, expected, 2e-3) == []
        server.start()
        again = load.flood(server, "plan", inputs[:200], clients=16)
        assert again.errors == {}
        assert load.crossed(again, expected, 2e-3) == []
    assert not server.group_is_alive()
    assert server.shared_memory() == []


# spach-validate


def validate(url: str, bundle: Path, *arguments: str) -> Result:
    return CliRunner().invoke(validate_command, [url, "--bundle", str(bundle), *arguments])


def url(served: Served, protocol: str, model: str) -> str:
    port = served.server.grpc if protocol == "grpc" else served.server.http
    return f"{protocol}://127.0.0.1:{port}/{model}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_golden_pack_against_a_server_is_the_same_table(served: Served, protocol: str) -> None:
    result = validate(url(served, protocol, small_bundles.NAME), served.real)
    assert result.exit_code == 0, result.output
    assert "Graph (onnxruntime_onnx) in Triton at 127.0.0.1" in result.stdout
    assert "relative L2, worst image" in result.stdout
    assert "AGREED with PyTorch in FP32." in result.stdout
    assert "Level of evidence: graph. The graph ran, on the server (onnxruntime_onnx)." in " ".join(
        result.stdout.split()
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("tiny", [PLAN, EXPLICIT, FIXED], ids=lambda tiny: tiny.name)
def test_engines_of_every_profile_are_validated(served: Served, tmp_path: Path, protocol: str, tiny: Tiny) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", tiny)
    result = validate(url(served, protocol, tiny.name), bundle, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["level"] == "engine"


def test_another_model_on_the_server_is_exit_1(served: Served, tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny("versions", seed=SEEDS[0]))
    assert validate(url(served, "http", "versions/1"), bundle, "--json").exit_code == 0
    assert validate(url(served, "http", "versions"), bundle, "--json").exit_code == 1


def test_another_interface_on_the_server_is_exit_1(served: Served, tmp_path: Path) -> None:
    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny())
    result = validate(url(served, "grpc", "pixels"), bundle, "--json")
    assert result.exit_code == 1
    assert "Its inputs are not the bundle's" in json.loads(result.stdout)["findings"][0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_is_not_there_is_exit_2_and_named(served: Served, protocol: str) -> None:
    result = validate(url(served, protocol, "nothing"), served.real)
    assert result.exit_code == 2
    assert "has no model nothing. It has cached, explicit" in result.stderr


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_server_is_exit_3(served: Served, protocol: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        result = validate(f"{protocol}://127.0.0.1:{port}/m", served.real)
    assert result.exit_code == 3
    assert "No answer from" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_written_report_is_json(served: Served, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert validate(url(served, "grpc", small_bundles.NAME), served.real, "--report", str(report)).exit_code == 0
    assert json.loads(report.read_text())["passed"]
