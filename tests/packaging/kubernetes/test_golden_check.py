"""The check that runs in the cluster: what it accepts, what it rejects, and how it treats the server that it starts."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spach_deploy.bundle.outputs import promised_dtypes
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec
from spach_deploy.packaging.kubernetes import golden_check
from spach_deploy.packaging.kubernetes.deployment import Deployment, KubernetesOptions
from spach_deploy.packaging.kubernetes.folder import write_folder
from spach_deploy.packaging.kubernetes.template_context import batches, golden_pack
from spach_deploy.packaging.triton.options import Backend
from spach_deploy.validation.compare import compare_outputs
from spach_deploy.validation.verdict import Tolerance, judge
from tests.outputs import classifier, of_logits
from tests.packaging.kubernetes.served import Arrays, StandIn, serving
from tests.packaging.triton import tiny_bundles
from tests.packaging.triton.tiny_bundles import Tiny

SCRIPT = Path(golden_check.__file__)
EVERYTHING = OutputSpec(top_k=3, softmax=True)


def write_pack(folder: Path, tiny: Tiny) -> Path:
    """The golden pack of a tiny bundle, as an image has it."""
    bundle = tiny_bundles.write(folder / "bundle", tiny)
    deployed = Deployment.of(bundle, KubernetesOptions(backend=Backend.ONNXRUNTIME))
    target = folder / "golden"
    target.mkdir()
    for name, content in golden_pack(deployed.model).files.items():
        (target / name).write_bytes(content)
    return target


def check(pack: Path, url: str, *command: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    """The script as a container runs it: by a bare interpreter, without any package."""
    call = [sys.executable, "-I", "-S", str(SCRIPT), f"--golden={pack}", f"--url={url}", f"--seconds={seconds}"]
    return subprocess.run([*call, *(["--", *command] if command else [])], capture_output=True, text=True, timeout=60)


INTERFACES = {
    "float32": OutputSpec(),
    "float16": OutputSpec(IODtype.FP16, top_k=3, softmax=True),
    "uint8": OutputSpec(IODtype.UINT8, top_k=2),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("outputs", INTERFACES.values(), ids=INTERFACES)
def test_a_server_that_computes_the_same_agrees(outputs: OutputSpec, tmp_path: Path) -> None:
    tiny = Tiny(outputs=outputs)
    pack = write_pack(tmp_path, tiny)
    with serving(tiny, not_ready=3) as server:
        done = check(pack, server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "Golden pack of tiny: 4 images, in batches of 1, 3, 8."
    assert done.stdout.splitlines()[-1] == "AGREED with PyTorch in FP32."
    assert server.batches == [1, 3, 8]


@pytest.mark.parametrize("tiny", [tiny_bundles.EMBEDDING, tiny_bundles.RENAMED], ids=["embedding", "renamed"])
def test_outputs_are_compared_by_what_they_are(tiny: Tiny, tmp_path: Path) -> None:
    """An embedding has no classes to change; top-k ranks logits of any name."""
    pack = write_pack(tmp_path, tiny)
    kinds = {output["name"]: output["kind"] for output in json.loads((pack / "golden.json").read_text())["outputs"]}
    assert kinds[tiny.main] == ("values" if tiny is tiny_bundles.EMBEDDING else "scores")
    with serving(tiny) as server:
        assert check(pack, server.url).returncode == 0
    with serving(tiny, lambda outputs: {**outputs, tiny.main: outputs[tiny.main] * np.float32(1.01)}) as server:
        done = check(pack, server.url)
    assert done.returncode == 1
    assert f"{tiny.main}: relative L2 is" in done.stdout


def _of(change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
    return lambda outputs: {**outputs, "logits": change(outputs["logits"])}


WRONG = {
    "other numbers": (_of(lambda a: a * np.float32(1.01)), "logits: relative L2 is"),
    "one number": (_of(lambda a: a + np.eye(*a.shape, dtype=a.dtype)), "logits: the largest absolute error is"),
    "the other way round": (_of(lambda a: -a), "changes from class"),
    "all zero": (_of(lambda a: a * 0), "logits: relative L2 is 1,"),
    "not a number": (_of(lambda a: np.where(a == a.max(), np.nan, a).astype(a.dtype)), "has NaN or infinite values"),
    "infinite": (_of(lambda a: np.where(a == a.max(), np.inf, a).astype(a.dtype)), "has NaN or infinite values"),
    "another image's answers": (_of(lambda a: np.roll(a, 1, axis=0)), "logits: relative L2 is"),
    "wrong classes": (
        lambda outputs: {**outputs, "top_indices": (outputs["top_indices"] + 1) % tiny_bundles.CLASSES},
        "top_indices:",
    ),
    "a class that there is not": (
        lambda outputs: {**outputs, "top_indices": outputs["top_indices"] + 100},
        "top_indices:",
    ),
    "probabilities that are logits": (
        lambda outputs: {**outputs, "probabilities": outputs["logits"]},
        "probabilities: relative L2",
    ),
    "no output": (lambda outputs: {"logits": outputs["logits"]}, "lacks the output"),
    "another shape": (_of(lambda a: a[:, :-1]), "not FP32"),
    "another type": (_of(lambda a: a.astype(np.float16)), "The output logits is FP16"),
    "fewer images": (_of(lambda a: a[:-1] if len(a) > 1 else a), "not FP32"),
}


@pytest.mark.parametrize(("spoil", "reason"), WRONG.values(), ids=WRONG)
def test_a_server_that_computes_something_else_disagrees(
    spoil: Callable[[Arrays], Arrays], reason: str, tmp_path: Path
) -> None:
    tiny = Tiny(outputs=EVERYTHING)
    pack = write_pack(tmp_path, tiny)
    with serving(tiny, spoil) as server:
        done = check(pack, server.url)
    assert done.returncode == 1, done.stdout + done.stderr
    assert reason in done.stdout
    assert "DISAGREED" in done.stdout
    assert "AGREED with" not in done.stdout.replace("DISAGREED", "")
    assert done.stderr == ""


def test_a_refused_request_is_a_disagreement(tmp_path: Path) -> None:
    tiny = Tiny()
    pack = write_pack(tmp_path, tiny)
    with serving(tiny, status=400) as server:
        done = check(pack, server.url)
    assert done.returncode == 1
    assert done.stdout == 'DISAGREED: A batch of 1 was refused with 400: {"error": "no"}\n'


def test_only_the_largest_batch_being_wrong_is_found(tmp_path: Path) -> None:
    tiny = Tiny()
    pack = write_pack(tmp_path, tiny)
    with serving(tiny, _of(lambda a: a * np.float32(2) if len(a) == 8 else a)) as server:
        assert check(pack, server.url).returncode == 1


@pytest.mark.parametrize("seed", range(12))
def test_its_verdict_is_that_of_spach_validate(seed: int, tmp_path: Path) -> None:
    """Noise around the bounds, on every output: both accept it, or both reject it."""
    tiny = Tiny(outputs=EVERYTHING, seed=seed)
    pack = golden_check.Pack.read(write_pack(tmp_path, tiny))
    random = np.random.default_rng(seed)
    inputs = tiny_bundles.samples(tiny)
    reference = of_logits(tiny_bundles.logits(tiny, inputs), EVERYTHING)
    noisy = reference["logits"] * (1 + random.normal(0, 3e-4 * (1 + seed % 4), reference["logits"].shape))
    answers = of_logits(noisy.astype(np.float32), EVERYTHING)
    tolerances = {
        output["name"]: Tolerance(**output["tolerance"])
        for output in pack.description["outputs"]
        if output["kind"] != "indices"
    }
    comparison = compare_outputs(reference, answers, dtypes=promised_dtypes(classifier(tiny.classes, EVERYTHING)))
    rows = {name: list(enumerate(array.tolist())) for name, array in answers.items()}
    findings = golden_check.compare(pack, rows)
    assert any(finding.faults for finding in findings) != judge(comparison, tolerances).passed


def test_both_verdicts_occur_in_that_comparison(tmp_path: Path) -> None:
    """The seeds above are worth something only if some of them pass and some do not."""
    verdicts = set()
    for seed in range(12):
        (tmp_path / str(seed)).mkdir()
        tiny = Tiny(outputs=EVERYTHING, seed=seed)
        pack = golden_check.Pack.read(write_pack(tmp_path / str(seed), tiny))
        logits = tiny_bundles.logits(tiny, tiny_bundles.samples(tiny))
        noise = np.random.default_rng(seed).normal(0, 3e-4 * (1 + seed % 4), logits.shape)
        answers = of_logits((logits * (1 + noise)).astype(np.float32), EVERYTHING)
        rows = {name: list(enumerate(array.tolist())) for name, array in answers.items()}
        verdicts.add(any(finding.faults for finding in golden_check.compare(pack, rows)))
    assert verdicts == {True, False}


def test_no_server_is_exit_3(tmp_path: Path) -> None:
    pack = write_pack(tmp_path, Tiny())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = check(pack, f"http://127.0.0.1:{free.getsockname()[1]}", seconds=0.3)
    assert done.returncode == 3
    assert done.stdout == "NOT CHECKED: tiny was not ready within 0.3 s.\n"
    assert done.stderr == "Waiting up to 0.3 s for tiny.\n"


def test_a_server_that_ends_before_it_is_ready_is_exit_3(tmp_path: Path) -> None:
    done = check(write_pack(tmp_path, Tiny()), "http://127.0.0.1:9", sys.executable, "-c", "raise SystemExit(7)")
    assert done.returncode == 3
    assert done.stdout == "NOT CHECKED: The server ended with 7 before it was ready.\n"


def test_a_server_that_cannot_be_started_is_exit_3(tmp_path: Path) -> None:
    done = check(write_pack(tmp_path, Tiny()), "http://127.0.0.1:9", "/no/tritonserver")
    assert done.returncode == 3
    assert "/no/tritonserver cannot be started" in done.stdout


@pytest.mark.parametrize("file", ["golden.json", "input.bin", "logits.bin"])
def test_a_damaged_pack_is_exit_2(file: str, tmp_path: Path) -> None:
    pack = write_pack(tmp_path, Tiny())
    content = bytearray((pack / file).read_bytes())
    content[len(content) // 2] ^= 255
    (pack / file).write_bytes(content)
    done = check(pack, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stdout.startswith("NOT CHECKED: ")
    assert "Traceback" not in done.stderr


def test_a_missing_pack_and_a_wrong_address_are_exit_2(tmp_path: Path) -> None:
    assert check(tmp_path, "http://127.0.0.1:9").returncode == 2
    assert check(write_pack(tmp_path, Tiny()), "ftp://127.0.0.1").returncode == 2


def test_nothing_that_an_address_or_a_pack_says_reaches_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden_check.main(["--golden", "/nowhere/\x1b[2J\x9b", "--url", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "/nowhere/\\x1b[2J\\x9b" in said


_STARTED = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(sys.argv[1], "w") as file:
    file.write(f"{child.pid}")
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int) -> bool:
    end = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_server_it_started_ends_with_it_and_all_its_children(tmp_path: Path) -> None:
    tiny, note = Tiny(), tmp_path / "pid"
    pack = write_pack(tmp_path, tiny)
    with serving(tiny, not_ready=4) as server:
        done = check(pack, server.url, sys.executable, "-c", _STARTED, str(note))
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended(int(note.read_text()))


def test_a_pod_that_is_deleted_ends_its_server_too(tmp_path: Path) -> None:
    pack, note = write_pack(tmp_path, Tiny()), tmp_path / "pid"
    call = [sys.executable, "-I", "-S", str(SCRIPT), f"--golden={pack}", "--url=http://127.0.0.1:9", "--"]
    process = subprocess.Popen([*call, sys.executable, "-c", _STARTED, str(note)])
    end = time.monotonic() + 20
    while not (note.exists() and note.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert ended(int(note.read_text()))


def test_a_server_that_drips_or_floods_is_given_up(tmp_path: Path) -> None:
    tiny = Tiny()
    pack = golden_check.Pack.read(write_pack(tmp_path, tiny))
    with serving(tiny) as server:
        server.drips = True
        with pytest.raises(golden_check.CheckError, match=r"does not answer \(not whole within 0\.3 s\)"):
            golden_check.Server(server.url, seconds=0.3).infer(pack, [0, 1, 2, 3])
    with (
        serving(tiny, lambda outputs: {**outputs, "logits": np.zeros((1, 1 << 20), np.float32)}) as server,
        pytest.raises(golden_check.CheckError, match=r"has more than 1,04\d,\d+ bytes"),
    ):
        golden_check.Server(server.url).infer(pack, [0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"input.bin"', '"../input.bin"'),
        lambda text: text.replace('"model": "tiny"', '"model": "tiny", "model": "other"'),
        lambda text: text.replace('"shape"', '"form"'),
        lambda text: text.replace('"rel_l2"', '"l2"'),
        lambda text: re.sub(r'"batches": \[\s*\[\s*0', '"batches": [[9', text),
        lambda text: "[]",
        lambda text: "[" * 100_000,
    ],
    ids=["elsewhere", "twice", "no shape", "no bound", "no such image", "a list", "deep"],
)
def test_a_pack_that_is_none_is_one_sentence(damage: Callable[[str], str], tmp_path: Path) -> None:
    pack = write_pack(tmp_path, Tiny())
    text = (pack / "golden.json").read_text()
    assert damage(text) != text
    (pack / "golden.json").write_text(damage(text))
    with pytest.raises(golden_check.CheckError, match="holds no golden pack") as found:
        golden_check.Pack.read(pack)
    assert found.value.code == 2


PROFILES = {
    "1:4:8": ((0,), (1, 2, 3), (0, 1, 2, 3, 1, 2, 3, 0)),
    "1:1:1": ((0,), (1,), (2,), (3,)),
    "1:2:3": ((0,), (1, 2, 3)),
    "6:6:6": ((0, 1, 2, 3, 1, 2),),
    "2:2:4": ((0, 1), (2, 3), (0, 1, 2, 3)),
}


@pytest.mark.parametrize(("profile", "sent"), PROFILES.items(), ids=PROFILES)
def test_batches_are_ones_that_the_engine_takes(profile: str, sent: tuple[tuple[int, ...], ...]) -> None:
    taken = BatchProfile.parse(profile)
    assert batches(4, taken) == sent
    assert all(taken.min <= len(batch) <= taken.max for batch in sent)
    assert {image for batch in sent for image in batch} == {0, 1, 2, 3}


def test_tolerances_are_the_engine_s_where_tf32_is_allowed(tmp_path: Path) -> None:
    from tests.small_bundles import read_manifest, write_manifest

    bundle = tiny_bundles.write(tmp_path / "bundle")
    manifest = read_manifest(bundle)
    manifest["validation"]["tolerances"]["engine"]["outputs"]["logits"]["rel_l2"] = 0.5
    for tf32, allowed in ((True, 0.5), (False, 1e-3)):
        manifest["engine"]["tf32"] = tf32
        write_manifest(bundle, manifest)
        model = Deployment.of(bundle, KubernetesOptions(backend=Backend.ONNXRUNTIME)).model
        description = json.loads(golden_pack(model).files["golden.json"])
        assert description["outputs"][0]["tolerance"]["rel_l2"] == allowed


@pytest.mark.triton
def test_a_real_triton_agrees_with_the_flags_that_pods_use(tmp_path: Path) -> None:
    """The image's model repository in the server of an environment; on the CPU, where there is no GPU."""
    from tests.packaging.triton.server import serving as triton

    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(outputs=EVERYTHING, engine="tensorrt-rtx"))
    image = write_folder(bundle, tmp_path / "k8s", KubernetesOptions()).path / "image"
    config = image / "models" / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    flags = ["--allow-grpc=false", "--allow-metrics=false", "--strict-readiness=true", "--exit-on-error=true"]
    with triton([image / "models"], tmp_path / "server", *flags) as server:
        done = check(image / "golden", f"http://127.0.0.1:{server.http}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "AGREED with PyTorch in FP32."


@pytest.mark.triton
def test_a_real_triton_has_the_counters_that_the_autoscaler_lives_on(tmp_path: Path) -> None:
    """Both with the same labels, so that one can be divided by the other."""
    from tests.packaging.triton.server import serving as triton

    bundle = tiny_bundles.write(tmp_path / "bundle", Tiny(engine="tensorrt-rtx"))
    image = write_folder(bundle, tmp_path / "k8s", KubernetesOptions()).path / "image"
    config = image / "models" / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    with triton([image / "models"], tmp_path / "server") as server:
        assert check(image / "golden", f"http://127.0.0.1:{server.http}").returncode == 0
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    found = dict(
        re.findall(r"^(nv_inference_(?:queue_duration_us|request_success))\{(.*)\} \d+$", metrics, re.MULTILINE)
    )
    assert set(found) == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
    assert len(set(found.values())) == 1


def test_stand_ins_count_their_batches() -> None:
    stand_in = StandIn(Tiny(), "tiny", dict)
    stand_in.answer(tiny_bundles.samples(Tiny(), 2))
    assert stand_in.batches == [2]
