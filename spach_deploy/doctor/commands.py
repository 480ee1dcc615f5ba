"""Shell commands for the user to paste: they name this Python interpreter, and are quoted for a shell."""

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
from spach_deploy.options.specs import BatchProfile, FeatureLayout, IODtype, OutputSpec, WeightSource, size_in_words

if TYPE_CHECKING:
    from spach_deploy.bundle.schema import ModelSection
    from spach_deploy.bundle.store import Bundle

_ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")
_QUOTED_WORD = re.compile(r"""(?:\$'(?:\\.|[^\\'])*'|'[^']*'|"'"|[A-Za-z0-9_@%+=:,./-])+""")
_EXPORT_CALL = re.compile(rf"spach-export(?: {_QUOTED_WORD.pattern})+")
"""A recorded export whose words are all quoted as `command_line.quoted` does. A manifest from elsewhere may say
anything: only such a call is shown, because a shell runs nothing else in it.
"""

_FLAGS = ("--overwrite",)
_USUAL_SIZE, _USUAL_CLASSES = 224, 1000


def installing(*requirements: str) -> str:
    """The command that installs `requirements` into this process's environment."""
    return joined([*_pip("install"), *requirements])


def reinstalling(remove: Iterable[str], requirement: str) -> str:
    """One command line that uninstalls `remove` and installs `requirement`."""
    agree = ["-y"] if _has_pip() else []
    return f"{joined([*_pip('uninstall'), *agree, *remove])} && {installing(requirement)}"


def installing_torch(backend: str, requirement: str) -> str:
    """The command that installs PyTorch with uv, which knows PyTorch's indexes. `backend`: cpu, or auto for this
    machine's CUDA.
    """
    return joined(["uv", "pip", "install", "--python", _python(), "--torch-backend", backend, requirement])


def _pip(verb: str) -> list[str]:
    """The words of pip for this interpreter; of uv where the environment has no pip."""
    return [_python(), "-m", "pip", verb] if _has_pip() else ["uv", "pip", verb, "--python", _python()]


def _has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _python() -> str:
    """`python` where the shell's is this interpreter, else this interpreter's path."""
    found = shutil.which("python")
    if found is not None and os.path.realpath(Path(found).parent) == os.path.realpath(Path(sys.executable).parent):
        return "python"
    # Without backslashes it needs no quotes, with which PowerShell would take it for a text.
    return Path(sys.executable).as_posix() if sys.executable else "python3"


def exporting(bundle: Bundle, *changes: str) -> str:
    """The command that exports `bundle` again, into the same folder; of a package, which is no bundle, into a new one
    beside it. Options in `changes` replace those of the first export.
    """
    dropped = {"--output", "-o", "--overwrite", *changes, *(("--gpu", "--target") if "--engine" in changes else ())}
    words = list(_without(_recorded(bundle) or _by_sections(bundle), dropped))
    from spach_deploy.bundle.store import BUNDLE

    is_bundle = BUNDLE.lie_in(bundle.path)
    target = ["--overwrite", "-o", str(bundle.path)] if is_bundle else ["-o", f"{bundle.path}-bundle"]
    return " ".join([*words, joined([*changes, *target])])


def _recorded(bundle: Bundle) -> list[str]:
    """The words of the command in the manifest, still quoted; empty where it holds anything but one spach-export
    call.
    """
    call = bundle.manifest.command
    return [found[0] for found in _QUOTED_WORD.finditer(call)] if _EXPORT_CALL.fullmatch(call) else []


def _without(words: Iterable[str], options: Container[str]) -> Iterator[str]:
    """`words` without these options and their values."""
    left = iter(words)
    for word in left:
        if word not in options:
            yield word
        elif word not in _FLAGS:
            next(left, None)


def _by_sections(bundle: Bundle) -> list[str]:
    """The export command, from the manifest's other sections: for manifests without a usable command."""
    manifest = bundle.manifest
    named = ["--model", manifest.model.name] if manifest.model.title == manifest.model.name else []
    words = ["spach-export", *named, *_weights(manifest.model), *_sizes(manifest.model)]
    words += [f"--{manifest.precision.asked.value}", *_outputs(manifest.output_options), *_batch(manifest.batch)]
    return list(map(quoted, words))


def _weights(model: ModelSection) -> list[str]:
    """The manifest has only the checkpoint's file name, in which bytes that are not UTF-8 are escaped."""
    if not model.checkpoint:
        return []
    ignored = [word for pattern in model.ignored for word in ("--ignore", pattern)]
    name = _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), model.checkpoint)
    chosen = [] if model.weights is WeightSource.MODEL else ["--weights", model.weights.value]
    return ["--checkpoint", name, *chosen, *ignored]


def _sizes(model: ModelSection) -> list[str]:
    words = [] if model.image_size == _USUAL_SIZE else ["--image-size", size_in_words(model.image_size)]
    is_usual = model.num_classes == _USUAL_CLASSES or model.checkpoint
    return words if is_usual else [*words, "--num-classes", str(model.num_classes)]


def _outputs(options: OutputSpec) -> list[str]:
    words = [] if options.io_dtype is IODtype.FP32 else ["--io-dtype", options.io_dtype.value]
    words += ["--top-k", str(options.top_k)] if options.top_k else []
    words += ["--softmax"] if options.softmax else []
    words += ["--outputs", ",".join(role.value for role in options.outputs)] if options.outputs else []
    words += [] if options.feature_layout is FeatureLayout.NCHW else ["--feature-layout", options.feature_layout.value]
    return [*words, *(word for name in options.names for word in ("--output-name", name))]


def _batch(batch: BatchProfile) -> list[str]:
    return [] if batch == BatchProfile() else ["--batch", str(batch)]
