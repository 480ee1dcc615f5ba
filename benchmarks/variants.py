"""Architectures outside the table through the command line: do they agree, and what does the compiler make of them?

    python -m benchmarks.variants [VARIANT ...] [--precision fp16,bf16,int8] [--gpu sm89]     such as cifar_hybrid

Each is a checkpoint of `tests/golden/variants.json` with the published code's answers (`--answers`), exported by
`spach-export` with an engine; INT8 calibrated on photographs. Beside it stands the plain export: torch.onnx.export of
the reference, typed by the same rules and built by the same compiler. Kernels and bytes are the compiler's schedule.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.kernels import BATCH, facts, plain_export
from benchmarks.photographs import write
from benchmarks.results import record, table
from spach_deploy.bundle.store import Bundle
from spach_deploy.common.errors import SpachError
from spach_deploy.common.files import read_json
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision
from tests.models.golden_reference import golden_answers, golden_model_of, golden_variants, reference_batch
from tests.models.test_architecture import variant

PRECISIONS = (Precision.FP16, Precision.BF16, Precision.INT8)
HEADINGS = ("architecture", "precision", "published answers", "agreed", "relative L2 / allowed")
ENGINE_HEADINGS = ("attentions fused", "plain: fused", "kernels / MB", "plain: kernels / MB")


def hidden_settings(architecture: Architecture) -> list[str]:
    """What no tensor of a checkpoint shows, as options of spach-export."""
    options = ["--image-size", "x".join(map(str, architecture.image_size)), "--activation", architecture.activation]
    options += ["--norm-eps", str(architecture.norm_eps)]
    if architecture.attention_dims:
        options += ["--heads", str(architecture.heads)]
        options += [] if architecture.qk_scale is None else ["--qk-scale", str(architecture.qk_scale)]
    return options


class Subject:
    """One architecture: its checkpoint and the published answers, in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.architecture = variant(name)
        self.model = golden_model_of(self.architecture)
        torch.save(self.model.state_dict(), folder / "run.pth")
        shape = (2, self.architecture.channels, *self.architecture.image_size)
        np.savez(folder / "answers.npz", input=reference_batch(shape)[:1], logits=golden_answers(name)["logits"])

    def rows(self, precisions: Sequence[Precision], gpu: str, photographs: tuple[Path, Path]) -> Iterator[list[str]]:
        """A row of the table for each precision."""
        for precision in precisions:
            words = [f"--{precision.value}", "--gpu", gpu, "--images", str(photographs[1])]
            words += ["--calibration", str(photographs[0])] if precision is Precision.INT8 else []
            plain = self._plain(precision, gpu) if precision is not Precision.INT8 else ["-", "-"]
            attention, kernels = plain
            bundle = self.folder / precision.value
            error = self._export(words, bundle)
            if error:
                yield [self.name, precision.value, error, *["-"] * 4, attention, "-", kernels]
                continue
            yield [self.name, precision.value, *_evidence(bundle), *self._engine(bundle, attention), kernels]

    def _export(self, words: Sequence[str], bundle: Path) -> str:
        """Why there is no bundle, "" where there is one."""
        command = [sys.executable, "-m", "spach_deploy.cli.export", "--checkpoint", str(self.folder / "run.pth")]
        command += [*hidden_settings(self.architecture), "--answers", str(self.folder / "answers.npz")]
        done = subprocess.run(
            [*command, *words, "-o", str(bundle)], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        return f"exit {done.returncode}" if done.returncode else ""

    def _plain(self, precision: Precision, gpu: str) -> list[str]:
        """Fused attentions, and kernels with bytes, of the plain export."""
        try:
            found = facts(plain_export(self.model), precision, EngineTarget(gpus=parse_gpus(gpu)))
        except SpachError as error:
            print(f"{self.name} plain: {error}", file=sys.stderr)
            return ["-", "does not build"]
        if found is None:
            return ["-", "not known"]
        return [str(found.fused_attentions), _figures(len(found.kernels), found.bytes_moved(BATCH))]

    def _engine(self, bundle: Path, plain_attentions: str) -> list[str]:
        kernels = Bundle.open(bundle).manifest.engine.kernels
        if kernels is None or kernels.total is None:
            return ["-", plain_attentions, "not known"]
        blocks = sum(mixers.count("trans") for mixers in self.architecture.mixers)
        fused = f"{kernels.fused_attentions} of {blocks}"
        return [fused, plain_attentions, _figures(kernels.total, kernels.bytes_moved)]


def _evidence(bundle: Path) -> list[str]:
    """Distance from the published answers; whether the export agreed; the worst relative L2 and its bound."""
    validation, report = Bundle.open(bundle).manifest.validation, read_json(bundle / "report.json")
    assert validation.answers is not None
    ran = [
        (output["rel_l2_worst"], run["tolerances"]["outputs"][output["name"]]["rel_l2"])
        for run in report["evidence"]
        for output in run["comparison"]["outputs"]
    ]
    error, allowed = max(ran, key=lambda pair: pair[0] / pair[1])
    return [f"{validation.answers.rel_l2:.1e}", "yes" if report["agreed"] else "NO", f"{error:.1e} / {allowed:.1e}"]


def _figures(kernels: int, moved: int | None) -> str:
    return f"{kernels}" + ("" if moved is None else f" / {moved / 1e6:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {name.replace(" ", "_"): name for name in golden_variants()}
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--precision", default=",".join(precision.value for precision in PRECISIONS))
    parser.add_argument("--gpu", default="sm89")
    arguments = parser.parse_args()
    chosen = arguments.variants or list(names)
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no variant {', '.join(sorted(unknown))}. One of {', '.join(names)}.")
    precisions = [Precision(word) for word in arguments.precision.split(",")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="spach-variants-") as made:
        photographs = write(Path(made) / "photographs")
        for name in chosen:
            folder = Path(made) / name
            folder.mkdir()
            for row in Subject(names[name], folder).rows(precisions, arguments.gpu, photographs):
                print(" | ".join(row), flush=True)
                rows.append(row)
    body = (
        "Published answers: relative L2 of what the published code answers from our model in FP64. Kernels / MB moved"
        f" at batch {BATCH}.\n\n{table((*HEADINGS, *ENGINE_HEADINGS), rows)}"
    )
    is_whole = set(chosen) == set(names) and set(precisions) == set(PRECISIONS)
    command = " ".join(["python -m benchmarks.variants", *sys.argv[1:]])
    record("Architectures outside the table", command, body, is_whole=is_whole)
    sys.exit(any("exit" in row[2] or row[3] == "NO" for row in rows))


if __name__ == "__main__":
    main()
