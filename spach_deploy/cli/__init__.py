"""Commands: options.py defines each option once, one file per command."""

from spach_deploy.cli.interrupts import quiet_until_a_command_begins

quiet_until_a_command_begins()
