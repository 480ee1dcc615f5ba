"""The doctor: what this machine can export, build, run and verify, and whether it can run a given bundle or plan.

First it gathers facts (`MachineInfo`: packages, driver, memory, disk) by reading files and by asking child processes
that have a few seconds to answer. Nothing heavy is imported. Then plain functions derive findings from the facts, each
with the command that would change it.
"""
