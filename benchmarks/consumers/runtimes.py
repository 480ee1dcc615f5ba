"""The runtimes that graphs are given to, each in an environment of its own, and what they answer.

A runtime that crashes at a graph is started anew behind it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_tools.environments import Peer, environment, run

Question = dict[str, object]
Answer = dict[str, object]

_HERE = Path(__file__).parent
_INSTALL_SECONDS = 600.0
_SHOWN = 150
_PREFIXES = (
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : ",
    r"^Can't create a session. ERROR_CODE: \d+, ERROR_MESSAGE: ",
    r"^(error: )?\(-\d+:Unsupported format or combination of formats\) ",
    r"^(error: )?\(-\d+:(?=Assertion failed)|(?<=Assertion failed)\)",
)
_OPENVINO = re.compile(r"GeneralFailure:\n(?!Errors)(.+)")
_CODE = re.compile(r"\S+\.(?:cc|cpp|hpp|h):\d+:?")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A release of a runtime, from PyPI or npm. `reader`: the word that client.py knows it by; empty on npm."""

    name: str
    package: str
    version: str
    reader: str = ""
    others: tuple[str, ...] = ("numpy",)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def command(self, cache: Path) -> list[str]:
        """Starts its client, from an environment below `cache` that is made unless it is there. SystemExit where the
        package does not install.
        """
        return self._python(cache) if self.reader else self._node(cache)

    def _python(self, cache: Path) -> list[str]:
        peer = Peer(self.name, self.package, self.version, ((f"{self.package}=={self.version}", *self.others),))
        found = environment(peer, cache)
        if found.problem:
            raise SystemExit(f"{self} does not install: {found.problem}")
        return [str(found.python), str(_HERE / "client.py"), self.reader]

    def _node(self, cache: Path) -> list[str]:
        folder = cache / f"{self.package}-{self.version}"
        package = folder / "node_modules" / self.package
        if not (package / "package.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Its install script would fetch libraries for GPUs; those for CPUs are in the package.
            options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
            ended = run(["npm", "install", *options, f"{self.package}@{self.version}"], _INSTALL_SECONDS)
            if ended.code:
                raise SystemExit(f"{self} does not install: {ended.text.strip()}")
        return ["node", str(_HERE / "client.cjs"), str(package)]


def _onnxruntime(version: str, *others: str) -> Runtime:
    return Runtime("ONNX Runtime", "onnxruntime", version, "onnxruntime", others or ("numpy",))


def _npm(package: str, version: str) -> Runtime:
    return Runtime(package, package, version)


RUNTIMES = (
    *(_onnxruntime("1.17.3", "numpy<2"), _onnxruntime("1.20.1"), _onnxruntime("1.23.2"), _onnxruntime("1.28.0")),
    _onnxruntime("1.32.0"),
    *(Runtime("OpenVINO", "openvino", version, "openvino") for version in ("2024.6.0", "2026.4.1")),
    Runtime("OpenCV", "opencv-python-headless", "4.11.0.86", "opencv", ("numpy<2.3",)),
    Runtime("OpenCV", "opencv-python-headless", "4.14.0.94", "opencv"),
    Runtime("OpenCV", "opencv-python-headless", "5.0.0.93", "opencv"),
    *(
        _npm(package, version)
        for package in ("onnxruntime-web", "onnxruntime-node")
        for version in ("1.17.3", "1.30.0")
    ),
)


def answers(command: Sequence[str], questions: Sequence[Question]) -> list[Answer]:
    """What a client says to each question, in the order of the questions."""
    left, found = list(questions), list[Answer]()
    while left:
        sent = "".join(f"{json.dumps(question)}\n" for question in left)
        done = subprocess.run(["nice", *command], input=sent, capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if not lines:
            raise SystemExit(f"{' '.join(command)} did not start: {done.stderr.strip()[-500:]}")
        seen = lines[1:]
        found += seen
        finished = {line["graph"] for line in seen if line["batch"] != 1}
        left = [question for question in left if question["graph"] not in finished]
        if left and done.returncode == 0:
            raise SystemExit(f"{' '.join(command)} left {left[0]['graph']} out.")
        if left:
            crashed = left.pop(0)["graph"]
            found.append({"graph": crashed, "batch": 0, "error": f"the process ended with {done.returncode}"})
    return found


def reason(text: str) -> str:
    """What a runtime says of a graph, without places in its source and in the graph, in few words."""
    causes = _OPENVINO.findall(text)  # it tells of every node
    words = " ".join((causes or _CODE.split(text))[0 if causes else -1].split())
    words = re.sub(r"^.*::.*\) (?=[A-Z])", "", words)  # the signature of a function
    words = re.sub("|".join(_PREFIXES), "", words)
    words = re.sub(r" in function '\w+'$| (node )?with name '[^']*'", "", words)
    if len(words) <= _SHOWN:
        return words or "refused without words"
    last = words.rstrip(".").rpartition(". ")[2]
    return last if len(last) <= _SHOWN else f"{last[: _SHOWN - 1]}…"
