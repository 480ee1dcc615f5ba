"""Stands in for spach-export where a test is about many exports: takes its options, writes a small bundle, or fails.

A file named like the bundle in the folder $STUB, or in the one that is the first word, says how it ends; without one
it succeeds. Started as a script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from spach_deploy.bundle import store as bundles
from spach_deploy.bundle.schema import Manifest
from spach_deploy.common.errors import BundleError
from tests import manifests

COMMAND = (sys.executable, str(Path(__file__).resolve()))


def manifest(model: str, precision: str) -> Manifest:
    engine = {"flavour": "tensorrt-rtx", "gpus": ["sm89"], "bytes": 4, "kernels": {"total": 7}}
    made = manifests.sections(model, precision, engine=engine, created=str(time.time_ns()))
    return Manifest.parse(json.dumps(made), "the stub")


def behave(how: str) -> None:
    """End as the test wants it."""
    if how.startswith("wait"):
        time.sleep(float(how.removeprefix("wait") or 600))
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how.startswith("exit "):
        code, _, words = how.removeprefix("exit ").partition(" ")
        print(f"A note.\nError: {words}", file=sys.stderr)
        sys.exit(int(code))


def main() -> None:
    words = sys.argv[1:]
    target = Path(words[words.index("--output") + 1])
    folder = Path(os.environ.get("STUB") or words[0])
    how = folder / target.name
    with (folder / "begun").open("a") as log:
        print(target.name, os.getpid(), file=log)
    model = words[words.index("--model") + 1]
    size = 100
    with bundles.writing(bundles.check_target(target, overwrite="--overwrite" in words)) as staging:
        text = how.read_text() if how.exists() else ""
        if text.startswith("bytes "):
            size = int(text.removeprefix("bytes "))
        (staging / bundles.GRAPH).write_bytes(bytes(size))
        behave(text)
        (staging / bundles.PLAN).write_bytes(b"plan")
        report = {"evidence": [{"comparison": {"outputs": [{"name": "logits", "rel_l2": 0.001}]}}]}
        (staging / bundles.REPORT).write_text(json.dumps(report))
        (staging / bundles.PAGE).write_text("<p>a report</p>")
        precision = next(word[2:] for word in words if word in ("--fp32", "--fp16", "--bf16"))
        bundles.seal(staging, manifest(model, precision))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BundleError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
