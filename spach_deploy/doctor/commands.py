"""Commands as a user can paste them: for this interpreter, quoted for a shell."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spach_deploy.options.command_line import joined, quoted
from spach_deploy.options.specs import BatchProfile, IODtype, OutputSpec, WeightSource

if TYPE_CHECKING:
    from spach_deploy.bundle.schema import ModelSection
    from spach_deploy.bundle.store import Bundle

_ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")
_QUOTED_WORD = re.compile(r"""(?:\$'(?:\\.|[^\\'])*'|'[^']*'|"'"|[A-Za-z0-9_@%+=:,./-])+""")
_EXPORT_CALL = re.compile(rf"spach-export(?: {_QUOTED_WORD.pattern})+")
"""Words as `command_line.quoted` writes them: a shell runs nothing else that a manifest may say."""

_FLAGS = ("--overwrite",)
_USUAL_SIZE, _USUAL_CLASSES = 224, 1000


def installing(*requirements: str) -> str:
    """The command that installs into the environment of this process."""
    return joined([*_pip("install"), *requirements])


def reinstalling(remove: Iterable[str], requirement: str) -> str:
    """One line that takes `remove` away and installs `requirement` anew."""
    agree = ["-y"] if _has_pip() else []
    return f"{joined([*_pip('uninstall'), *agree, *remove])} && {installing(requirement)}"


def installing_torch(backend: str, requirement: str) -> str:
    """uv knows where PyTorch keeps its builds: `backend` is cpu, or auto for the CUDA of this machine."""
    return joined(["uv", "pip", "install", "--python", _python(), "--torch-backend", backend, requirement])


def _pip(verb: str) -> list[str]:
    """pip of this interpreter, or uv where the environment was made without pip."""
    return [_python(), "-m", "pip", verb] if _has_pip() else ["uv", "pip", verb, "--python", _python()]


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _python() -> str:
    """`python` where the shell's is this one, else the path of this one."""
    found = shutil.which("python")
    if found is not None and os.path.realpath(Path(found).parent) == os.path.realpath(Path(sys.executable).parent):
        return "python"
    return sys.executable or "python3"


def exporting(bundle: Bundle, *changes: str) -> str:
    """The export that made `bundle`, into the same place; each option among `changes` (words) takes the place of what
    was asked for then."""
    dropped = {"--output", "-o", "--overwrite", *changes, *(("--gpu",) if "--engine" in changes else ())}
    words = list(_without(_recorded(bundle) or _by_sections(bundle), dropped))
    return " ".join([*words, joined([*changes, "--overwrite", "-o", str(bundle.path)])])


def _recorded(bundle: Bundle) -> list[str]:
    """The call that the manifest has, as words that are quoted for a shell; none where it has no such call alone."""
    call = bundle.manifest.command
    return [found[0] for found in _QUOTED_WORD.finditer(call)] if _EXPORT_CALL.fullmatch(call) else []


def _without(words: Iterable[str], options: Container[str]) -> Iterator[str]:
    """Words without these options and their values."""
    left = iter(words)
    for word in left:
        if word not in options:
            yield word
        elif word not in _FLAGS:
            next(left, None)


def _by_sections(bundle: Bundle) -> list[str]:
    """The call as far as a manifest without one tells."""
    manifest = bundle.manifest
    words = ["spach-export", "--model", manifest.model.name, *_weights(manifest.model), *_sizes(manifest.model)]
    words += [f"--{manifest.precision.asked.value}", *_outputs(manifest.output_options), *_batch(manifest.batch)]
    return list(map(quoted, words))


def _weights(model: ModelSection) -> list[str]:
    """The manifest keeps the name only: the user knows where it lies. A byte that is no UTF-8 is escaped there."""
    if not model.checkpoint:
        return []
    ignored = [word for pattern in model.ignored for word in ("--ignore", pattern)]
    name = _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), model.checkpoint)
    chosen = [] if model.weights is WeightSource.MODEL else ["--weights", model.weights.value]
    return ["--checkpoint", name, *chosen, *ignored]


def _sizes(model: ModelSection) -> list[str]:
    words = [] if model.image_size == _USUAL_SIZE else ["--image-size", str(model.image_size)]
    is_usual = model.num_classes == _USUAL_CLASSES or model.checkpoint
    return words if is_usual else [*words, "--num-classes", str(model.num_classes)]


def _outputs(options: OutputSpec) -> list[str]:
    words = [] if options.io_dtype is IODtype.FP32 else ["--io-dtype", options.io_dtype.value]
    words += ["--top-k", str(options.top_k)] if options.top_k else []
    return [*words, *(["--softmax"] if options.softmax else [])]


def _batch(batch: BatchProfile) -> list[str]:
    return [] if batch == BatchProfile() else ["--batch", str(batch)]
