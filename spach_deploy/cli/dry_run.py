"""spach-export --dry-run: the plan of work as text or JSON."""

from __future__ import annotations

from spach_deploy.dry_run import MEASURED_CORES, DryRun
from spach_deploy.text import escaped, json_text


def as_text(found: DryRun, *, as_json: bool) -> str:
    """What would be done, what it would cost, and what would be refused."""
    if as_json:
        return json_text(found.to_dict())
    lines = [f"{name:<12}{value}" for name, value in found.facts]
    if found.notes:
        lines += ["", *(f"{note[0].upper()}{note[1:]}." for note in found.notes)]
    if found.is_reused:
        lines += ["", "The same export was done before: its bundle would come from the cache, in about a second."]
    elif not found.refusals:
        lines += ["", *(f"  {step.name:<34}{_seconds(step.seconds)}" for step in found.steps)]
    lines += ["", *_costs(found)]
    if found.refusals:
        lines += ["", "Refused:"]
        lines += [f"- {error.message} {error.hint}".rstrip() for error in found.refusals]
    return escaped(lines)


def _costs(found: DryRun) -> list[str]:
    if found.seconds is None or found.memory_bytes is None or found.disk_bytes is None:
        return ["Time, memory and disk follow from the model, which is not known."]
    return [
        f"time        about {_seconds(found.seconds).strip()}, an estimate from exports on {MEASURED_CORES} cores",
        f"memory      about {found.memory_bytes / 1e9:.1f} GB of {found.free_memory_bytes / 1e9:.1f} GB free"
        f"{_short(found.memory_bytes, found.free_memory_bytes)}",
        f"disk        about {found.disk_bytes / 1e6:,.0f} MB of {found.free_disk_bytes / 1e6:,.0f} MB free"
        f"{_short(found.disk_bytes, found.free_disk_bytes)}",
    ]


def _short(needed: float, free: int) -> str:
    return ": NOT ENOUGH" if needed > free else ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:>5.0f} s"
