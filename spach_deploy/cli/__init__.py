"""The commands, one file each. Their options are entries of `spach_deploy.options.table`."""

from spach_deploy.cli.interrupts import install_early_interrupt_handler

install_early_interrupt_handler()
