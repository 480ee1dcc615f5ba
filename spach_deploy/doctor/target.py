"""Whether this machine can run a bundle or a plan, and if not why, in the terms of what would have to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spach_deploy._version import __version__
from spach_deploy.bundle.store import MANIFEST, PLAN, Bundle
from spach_deploy.common.errors import BundleError, ChangedFileError, UsageError
from spach_deploy.common.files import sha256_of
from spach_deploy.doctor.bundle_findings import FILES, about_bundle
from spach_deploy.doctor.compatibility import PlanRequirements, compatibility
from spach_deploy.doctor.finding import Finding, Task, blockers
from spach_deploy.doctor.machine_info import MachineInfo, ask_tensorrt
from spach_deploy.doctor.plan_file import PlanFile, find_plan, what_it_is
from spach_deploy.doctor.plan_findings import AskTensorRT, about_form, about_header, about_origin
from spach_deploy.options.command_line import quoted

_PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Target:
    """What was found about a target. `name` says in words what it is."""

    path: str
    name: str
    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing found stands in the way; TensorRT has the last word."""
        return not blockers(self.findings, Task.RUN)

    @property
    def is_bad(self) -> bool:
        """Whether the target itself is at fault, wherever it would run."""
        return any(finding.bad_target for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 it can run here, 3 it cannot, 2 the target itself is at fault, 1 its files are not what was exported."""
        if any(finding.bad_target and finding.topic == FILES for finding in self.findings):
            return ChangedFileError.exit_code
        return 2 if self.is_bad else 0 if self.can_run else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spach_deploy": __version__,
            "exit_code": self.exit_code,
            "target": self.path,
            "is": self.name,
            "can_run": self.can_run and not self.is_bad,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def examine_target(path: Path, here: MachineInfo, ask: AskTensorRT = ask_tensorrt) -> Target:
    """What a bundle, a file of a bundle, or a plan from anywhere needs, against what is here.

    `ask` is what the installed TensorRT says of a plan's header. Raises UsageError for what is neither a bundle nor a
    plan, with what it is.
    """
    try:
        if path.is_dir():
            return _directory(path, here, ask)
        if path.name == PLAN and not path.exists() and (path.parent / MANIFEST).is_file():
            return _bundle(path, Bundle.open(path.parent, verify=False), here, ask)
        _check_is_file(path)
        return _file(path, here, ask)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}).", "Check its permissions.") from None


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path} does not exist.", "Give a bundle directory or an engine.plan.")
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a directory.", "Give a bundle directory or an engine.plan.")


def _directory(path: Path, here: MachineInfo, ask: AskTensorRT) -> Target:
    if (path / MANIFEST).is_file():
        return _bundle(path, Bundle.open(path, verify=False), here, ask)
    inside = sorted(found for suffix in _PLAN_SUFFIXES for found in _within(path, suffix))
    if not inside:
        raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", "Give a bundle or a plan.")
    listed = ", ".join(str(found) for found in inside[:_LISTED])
    more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
    hint = f"It holds plans, though: {listed}{more}. Try spach-doctor {quoted(inside[0])}."
    raise BundleError(f"{path} is a directory without {MANIFEST}, so it is no bundle.", hint)


def _within(path: Path, suffix: str) -> Iterator[Path]:
    """Three levels down, as Triton's model repositories have them."""
    for depth in ("", "*/", "*/*/"):
        yield from path.glob(f"{depth}*{suffix}")


def _file(path: Path, here: MachineInfo, ask: AskTensorRT) -> Target:
    directory = path.parent
    if path.name in (MANIFEST, PLAN) and (directory / MANIFEST).is_file():
        return _bundle(path, Bundle.open(directory, verify=False), here, ask)
    plan = find_plan(path)
    other = what_it_is(path) if plan is None or plan.offset else None
    if plan is None or (other is not None and other.is_container):
        assert other is not None
        inside = f", with a plan inside it from byte {plan.offset} on" if plan is not None else ""
        raise UsageError(f"{path} is {other.kind}{inside}.", other.advice)
    if (bundle := _bundle_of(path)) is not None:
        return _bundle(directory, bundle, here, ask)
    return _plan(path, plan, here, ask)


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle beside a plan of another name, if it is that bundle's plan."""
    if not (path.parent / MANIFEST).is_file():
        return None
    bundle = Bundle.open(path.parent, verify=False)
    return bundle if bundle.manifest.files.get(PLAN) == sha256_of(path) else None


def _plan(path: Path, plan: PlanFile, here: MachineInfo, ask: AskTensorRT) -> Target:
    name = f"a plan of {plan.flavour.value}, version {plan.version or 'not known'}"
    known = PlanRequirements(plan.flavour, plan.version, plan.gpus, plan.newer_gpus)
    findings = (
        *about_form(path, plan),
        about_origin(),
        *compatibility(known, here),
        *about_header(plan, known, here, ask),
    )
    return Target(str(path), name, findings)


def _bundle(path: Path, bundle: Bundle, here: MachineInfo, ask: AskTensorRT) -> Target:
    findings = about_bundle(bundle, here, ask)
    return Target(str(path), f"{bundle.manifest.model['name']} in {bundle.manifest.precision}, a bundle", findings)
