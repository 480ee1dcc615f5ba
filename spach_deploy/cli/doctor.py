"""spach-doctor: what this machine can build and run, and whether it can run a given bundle or plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from spach_deploy.cli import options as opt
from spach_deploy.cli.console import Command, command

if TYPE_CHECKING:
    from spach_deploy.doctor.machine import Machine
    from spach_deploy.doctor.target import Target

_NARROWEST, _WIDEST = 60, 100


@click.command("spach-doctor", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", type=opt.FILE, required=False, metavar="[BUNDLE|PLAN]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@opt.debug
@opt.version
@command
def main(target: Path | None, as_json: bool) -> int:
    """Say what this machine can export, build, run and verify; or whether it can run BUNDLE or PLAN.

    \b
    spach-doctor
    spach-doctor build/ms_hybrid_s-fp16
    spach-doctor /models/engine.plan

    Every line says what is here, what that means and the command that would change it. A plan may come from anywhere:
    what its bytes tell is said, and what they do not tell too. It is not loaded.

    Exit codes: 0 all that an export takes is here, or the target can run here; 2 the target is no bundle and no plan,
    or not whole; 3 this machine cannot do it.
    """
    from spach_deploy.doctor.here import look_around
    from spach_deploy.doctor.machine import examine_machine
    from spach_deploy.doctor.target import examine_target

    if target is None:
        machine = examine_machine(look_around())
        click.echo(_json(machine) if as_json else _machine_text(machine))
        return machine.exit_code
    found = examine_target(target, look_around())
    click.echo(_json(found) if as_json else _target_text(found))
    return found.exit_code


def _json(found: Machine | Target) -> str:
    import json

    return json.dumps(found.to_dict(), indent=2)


def _machine_text(machine: Machine) -> str:
    from spach_deploy.doctor.table import machine_as_text

    return machine_as_text(machine, width=_width(), color=_on_terminal())


def _target_text(target: Target) -> str:
    from spach_deploy.doctor.table import target_as_text

    return target_as_text(target, width=_width(), color=_on_terminal())


def _on_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _width() -> int:
    """The terminal's, within reason; a usual one where there is none."""
    import shutil

    from spach_deploy.doctor.table import WIDTH

    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, _NARROWEST), _WIDEST) if _on_terminal() else WIDTH
