"""What this machine can export, build, run and verify, and whether it can run a given bundle or plan.

Facts are gathered first (`Here`: packages, driver, memory, disk), by reading files and by asking child processes that
have a few seconds to answer; nothing heavy is imported. Findings are then derived from them by plain functions, each
with the command that would change it.
"""
