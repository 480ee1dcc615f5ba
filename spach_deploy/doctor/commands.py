"""Commands as a user can paste them: for this interpreter, quoted for a shell."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spach_deploy.bundle.store import Bundle
from spach_deploy.options.command_line import joined, quoted
from spach_deploy.options.specs import BatchProfile

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
    call = str(bundle.manifest.content.get("command", ""))
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
    model, options = bundle.manifest.model, bundle.manifest.content.get("output_options", {})
    words = ["spach-export", "--model", str(model["name"]), *_weights(model), *_sizes(model)]
    batch = BatchProfile(**bundle.manifest.content["batch"])
    return list(map(quoted, [*words, f"--{bundle.manifest.precision}", *_outputs(options), *_batch(batch)]))


def _weights(model: Mapping[str, Any]) -> list[str]:
    """The manifest keeps the name only: the user knows where it lies. A byte that is no UTF-8 is escaped there."""
    if not model.get("checkpoint"):
        return []
    chosen = str(model.get("weights", "model"))
    ignored = [word for pattern in model.get("ignored", ()) for word in ("--ignore", str(pattern))]
    name = _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), str(model["checkpoint"]))
    return ["--checkpoint", name, *([] if chosen == "model" else ["--weights", chosen]), *ignored]


def _sizes(model: Mapping[str, Any]) -> list[str]:
    size, classes = model.get("image_size", _USUAL_SIZE), model.get("num_classes", _USUAL_CLASSES)
    words = [] if size == _USUAL_SIZE else ["--image-size", str(size)]
    return words if classes == _USUAL_CLASSES or model.get("checkpoint") else [*words, "--num-classes", str(classes)]


def _outputs(options: Mapping[str, Any]) -> list[str]:
    words = [] if options.get("io_dtype", "fp32") == "fp32" else ["--io-dtype", str(options["io_dtype"])]
    words += ["--top-k", str(options["top_k"])] if options.get("top_k") else []
    return [*words, *(["--softmax"] if options.get("softmax") else [])]


def _batch(batch: BatchProfile) -> list[str]:
    return [] if batch == BatchProfile() else ["--batch", str(batch)]
