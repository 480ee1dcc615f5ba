#!/usr/bin/env python3
"""Writes docs/options.md from the table of options: scripts/options_page.py > docs/options.md."""

from __future__ import annotations

from collections.abc import Iterator

from spach_deploy.options.click_options import help_of
from spach_deploy.options.recipe import KEYS
from spach_deploy.options.table import COMMANDS, EXPORT, GROUPS, Kind, Option, options_of

HEAD = """# All options

Written by `scripts/options_page.py` from `spach_deploy/options/table.py`, from which the commands are made too. Options
in *italics* can stand in a recipe, by their long name with `_` for `-`; there, `--fp16` is `precision = "fp16"`."""


def page() -> Iterator[str]:
    """Its lines."""
    yield HEAD
    for command in COMMANDS:
        yield f"\n## {command}\n\n| option | what it does |\n|---|---|"
        for group in GROUPS:
            found = [option for option in options_of(command) if option.shown_group == group]
            if found:
                yield f"| **{group}** | |"
            for option in found:
                yield from _rows(option, "*" if command == EXPORT and option.key in KEYS else "")


def _rows(option: Option, mark: str) -> Iterator[str]:
    if option.kind is Kind.FLAGS:
        for choice, text in zip(option.choices, option.each, strict=True):
            yield f"| {mark}`--{choice}`{mark} | {text} |"
        return
    value = "" if option.kind in (Kind.FLAG, Kind.SWITCH) else option.metavar or "\\|".join(option.choices)
    flags = option.flags.replace(" ", ", ") + (f" / {option.off_flag}" if option.off_flag else "")
    yield f"| {mark}`{' '.join(filter(None, [flags, value]))}`{mark} | {_escaped(help_of(option))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("  [", " [")


if __name__ == "__main__":
    print("\n".join(page()))
