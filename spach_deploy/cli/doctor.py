"""spach-doctor: what this machine can build and run, and whether it can run a given bundle or plan.

`--cache` lists the cache of finished exports, `--clear-cache` empties it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spach_deploy.cli.console import Command, command, is_colored, show, width
from spach_deploy.common.text import json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.table import DOCTOR

if TYPE_CHECKING:
    from spach_deploy.doctor.machine import Machine
    from spach_deploy.doctor.machine_info import MachineInfo
    from spach_deploy.doctor.target import Target


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
        from spach_deploy.cli.cache import cleared, shown

        show(cleared() if clear_cache else shown(as_json=as_json))
        return 0
    from spach_deploy.doctor.machine import examine_machine
    from spach_deploy.doctor.machine_info import gather

    machine = gather()
    result: Machine | Target = examine_machine(machine) if target is None else _examined(target, machine)
    show(json_text(result.to_dict()) if as_json else _text(result))
    return result.exit_code


def _examined(target: Path, machine: MachineInfo) -> Target:
    """Examine a bundle or plan. MissingPackageError without msgspec, which may be missing here."""
    try:
        from spach_deploy.doctor.target import examine_target
    except ImportError as error:
        from spach_deploy.common.errors import MissingPackageError
        from spach_deploy.doctor.commands import installing

        if error.name != "msgspec":
            raise
        raise MissingPackageError("msgspec", "Reading a manifest", installing("msgspec")) from None
    return examine_target(target, machine)


def _text(result: Machine | Target) -> str:
    """The findings as text. UnavailableError without rich: the doctor also runs where packages are missing."""
    from spach_deploy.common.errors import UnavailableError
    from spach_deploy.doctor.commands import installing
    from spach_deploy.doctor.table import WIDTH, as_text

    try:
        return as_text(result, width=width(WIDTH), color=is_colored())
    except ImportError:
        message = "Showing the findings needs rich, which is not installed here."
        raise UnavailableError(
            message, f"Install it: {installing('rich')}, or add --json, which needs it not."
        ) from None


if __name__ == "__main__":
    main()
