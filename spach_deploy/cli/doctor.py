"""spach-doctor --cache: what the cache of finished exports holds.

spach-doctor: what this machine can build and run, and whether it can run a given bundle or plan.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.bundle.cache import CacheEntry, Store
from spach_deploy.cli.console import Command, command, is_colored, show, width
from spach_deploy.common.files import is_own
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.table import DOCTOR
from spach_deploy.pipeline.cache import NONE, PLACE, SIZE, open_store

if TYPE_CHECKING:
    from spach_deploy.doctor.machine import Machine
    from spach_deploy.doctor.machine_info import MachineInfo
    from spach_deploy.doctor.target import Target


_NO_CACHE = f"There is no cache: {PLACE}={NONE}, or this user has no home directory. Give a directory with {PLACE}=DIR."


def shown(*, as_json: bool) -> str:
    """Place, size, limit and entries, the last used first."""
    store = open_store()
    if store is None:
        return "null" if as_json else _NO_CACHE
    entries = store.entries()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        place = {"place": str(store.root), "bytes": total, "limit_bytes": store.limit_bytes}
        return json_text({**place, "entries": [_plain(entry) for entry in entries]})
    lines = [
        f"place      {store.root}  ({PLACE})",
        f"size       {total / 1e6:,.0f} MB of {store.limit_bytes / 1e6:,.0f} MB  ({SIZE})",
        f"exports    {len(entries)}{', the last used first:' if entries else ''}{_why_none(store)}",
        *(f"  {_line(entry)}" for entry in entries),
    ]
    return escaped(lines)


def _why_none(store: Store) -> str:
    """That nothing is taken from a directory in which others may write."""
    if not store.root.exists() or is_own(store.root):
        return ""
    return f": nothing is taken from where others may write (chmod -R go-w {store.root})"


def cleared() -> str:
    """Remove all; how many there were."""
    store = open_store()
    count = 0 if store is None else store.clear()
    return f"{count} finished {'export was' if count == 1 else 'exports were'} removed from the cache."


def _line(entry: CacheEntry) -> str:
    name = f"{entry.about.get('model', '')} {entry.about.get('precision', '')}".strip()
    return f"{name:<24} {entry.size_bytes / 1e6:>7,.0f} MB  used {_time(entry.used)}  {entry.about.get('target', '')}"


def _plain(entry: CacheEntry) -> dict[str, Any]:
    times = {"made": _time(entry.made), "used": _time(entry.used)}
    return {"key": entry.key, "bytes": entry.size_bytes, **times, **entry.about}


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


@click.command("spach-doctor", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", type=FILE, required=False, metavar="[BUNDLE|PLAN]")
@click_options(DOCTOR)
@command
def main(target: Path | None, show_cache: bool, clear_cache: bool, as_json: bool) -> int:
    """Say what this machine can export, build, run and verify; or whether it can run BUNDLE or PLAN.

    \b
    spach-doctor
    spach-doctor build/ms_hybrid_s-fp16
    spach-doctor /models/engine.plan
    spach-doctor --cache

    Every line says what is here, what that means and the command that would change it. A plan may come from anywhere:
    what its bytes tell is said, and what they do not tell too. It is not loaded.

    Exit codes: 0 all that an export takes is here, or the target can run here; 1 a file of the bundle is not the one
    that was exported; 2 the target is no bundle and no plan, or not whole; 3 this machine cannot do it.
    """
    if show_cache or clear_cache:
        show(cleared() if clear_cache else shown(as_json=as_json))
        return 0
    from spach_deploy.doctor.machine import examine_machine
    from spach_deploy.doctor.machine_info import gather

    here = gather()
    found: Machine | Target = examine_machine(here) if target is None else _examined(target, here)
    show(_json(found) if as_json else _text(found))
    return found.exit_code


def _examined(target: Path, here: MachineInfo) -> Target:
    """The doctor works where packages are missing, so it says so of the one that reads manifests."""
    try:
        from spach_deploy.doctor.target import examine_target
    except ImportError as error:
        from spach_deploy.common.errors import MissingPackageError
        from spach_deploy.doctor.commands import installing

        if error.name != "msgspec":
            raise
        raise MissingPackageError("msgspec", "Reading a manifest", installing("msgspec")) from None
    return examine_target(target, here)


def _json(found: Machine | Target) -> str:

    return json_text(found.to_dict())


def _text(found: Machine | Target) -> str:
    """The doctor works where packages are missing, so it says so of the one that it needs to be read."""
    from spach_deploy.common.errors import UnavailableError
    from spach_deploy.doctor.commands import installing
    from spach_deploy.doctor.table import WIDTH, as_text

    try:
        return as_text(found, width=width(WIDTH), color=is_colored())
    except ImportError:
        message = "Showing the findings needs rich, which is not installed here."
        raise UnavailableError(
            message, f"Install it: {installing('rich')}, or add --json, which needs it not."
        ) from None


if __name__ == "__main__":
    main()
