"""Offline check of a Triton model repository, without a server or a GPU; no model is run.

    findings = check_repository(Path("models"))
    findings.exit_code            # 1 on any finding

config.pbtxt is parsed with Triton's own protobuf messages, and compared with the ONNX graph, or for a plan with the
manifest of its bundle. `RULES` lists all checks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import read_bytes
from spach_deploy.packaging.triton.check.accelerators import check_accelerators
from spach_deploy.packaging.triton.check.ensembles import check_ensemble, check_own_steps
from spach_deploy.packaging.triton.check.fields import check_fields, check_labels
from spach_deploy.packaging.triton.check.findings import Checked, RepositoryFinding, Severity
from spach_deploy.packaging.triton.check.model_folder import CONFIG, ModelFolder, Repository, check_files
from spach_deploy.packaging.triton.check.tensors import check_batching, check_tensors, check_warm_up
from spach_deploy.packaging.triton.config import ConfigSyntaxError, field_names, parse

__all__ = ["RULES", "Checked", "RepositoryFinding", "Severity", "check_repository"]

Rule = Callable[[ModelFolder, Repository], Iterator[RepositoryFinding]]

RULES: tuple[Rule, ...] = (
    check_fields,
    check_files,
    check_tensors,
    check_batching,
    check_warm_up,
    check_accelerators,
    check_labels,
    check_own_steps,
    check_ensemble,
)
"""All rules, in the order of the report. Each gets one model, and the repository for references to other models."""


def check_repository(path: Path) -> Checked:
    """Check every model of the repository at `path`. UsageError where it is not a folder or cannot be read."""
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UsageError(f"{path} {what}.", "Give a model repository: a folder with one folder per model.")
    try:
        return _checked(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{error.filename or path} cannot be read ({reason}).", "Check its permissions.") from None


def _checked(path: Path) -> Checked:
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    if not folders:
        finding = RepositoryFinding(".", "", "no folder", "one folder per model", "Write it with spach-package triton.")
        return Checked(str(path), (), (finding,))
    models: list[ModelFolder] = []
    findings: list[RepositoryFinding] = []
    for folder in folders:
        read = _read(folder)
        if isinstance(read, RepositoryFinding):
            findings.append(read)
        else:
            models.append(ModelFolder(folder, read))
    repository = Repository(path, tuple(models), frozenset(folder.name for folder in folders))
    for model in models:
        findings.extend(finding for rule in RULES for finding in rule(model, repository))
    return Checked(str(path), tuple(folder.name for folder in folders), tuple(findings))


def _read(folder: Path) -> object:
    """The folder's ModelConfig, or a finding that says why there is none."""
    where = f"{folder.name}/{CONFIG}"
    if not (folder / CONFIG).is_file():
        return RepositoryFinding(
            where, "", "no such file", "the model's configuration", "Write it, or move the folder away."
        )
    try:
        return parse(read_bytes(folder / CONFIG).decode("utf-8"))
    except OSError as error:
        return RepositoryFinding(where, "", f"a file that cannot be read ({error.strerror})", "text", "Write it again.")
    except UnicodeDecodeError:
        return RepositoryFinding(where, "", "bytes that are not UTF-8", "text", "Write it again.")
    except ConfigSyntaxError as error:
        line = f"line {error.line}" if error.line else ""
        return RepositoryFinding(
            where, line, error.reason, "a ModelConfig in protobuf's text format", _advice(error.reason)
        )


def _advice(reason: str) -> str:
    """How to fix a syntax error; for an unknown field, with the known field that is most similar."""
    unknown = reason.partition('has no field named "')[2].partition('"')[0]
    close = difflib.get_close_matches(unknown, field_names(), n=1) if unknown else []
    return f"Did you mean {close[0]}?" if close else "Correct that line."
