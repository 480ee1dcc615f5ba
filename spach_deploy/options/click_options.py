"""click options made from the table, and `--help` with options in named groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from spach_deploy._version import __version__
from spach_deploy.options.command_line import words_of
from spach_deploy.options.recipe import default_of
from spach_deploy.options.table import GROUPS, INFORMATION, TABLE, Kind, Option, options_of

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.Path):
    """A path that is not empty: an unset variable does not mean the current folder."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the path. UsageError for an empty one."""
        if value == "":
            self.fail("The path is empty.", parameter, context)
        return super().convert(value, parameter, context)


class _Size(click.IntRange):
    """A whole number, or two as in 192x256."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the text. UsageError for a number that is none or out of range."""
        parts: list[Any] = str(value).split("x", 1)
        return "x".join(str(super(_Size, self).convert(part, parameter, context)) for part in parts)


FILE = _Path(path_type=Path, readable=False)  # the code that reads the file says why it cannot


class GroupedOption(click.Option):
    """An option that help shows under the name of its group."""

    def __init__(self, *arguments: Any, group: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.group = group


def click_options(command: str, table: Sequence[Option] = TABLE) -> Callable[[F], F]:
    """Decorator: add all options of a command, named as in the table, and --version."""

    def decorate(function: F) -> F:
        function = version(function)
        for option in reversed(options_of(command, table)):
            for flags, more in reversed(list(_declared(option))):
                function = click.option(*flags, option.key, cls=GroupedOption, group=option.shown_group, **more)(
                    function
                )
        return function

    return decorate


def version(function: F) -> F:
    """Decorator: add --version."""
    return click.version_option(__version__, prog_name="spach-deploy")(function)


def write_groups(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of --help: a section for each group, in the order of `GROUPS`."""
    groups: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None:
            groups[getattr(parameter, "group", INFORMATION)].append(record)
    for group, records in groups.items():
        if records:
            with formatter.section(group):
                formatter.write_dl(records)


def _declared(option: Option) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Arguments of click.option: its flags and its keywords. `Kind.FLAGS` gives a pair for each choice."""
    if option.kind is Kind.FLAGS:
        for choice, text in zip(option.choices, option.each, strict=True):
            yield [f"--{choice}"], {"flag_value": choice, "multiple": True, "help": text}
        return
    flags = [f"{option.flag}/{option.off_flag}"] if option.off_flag else option.flags.split()
    more = {"help": help_of(option), "metavar": option.metavar, "required": option.is_required, **_typed(option)}
    yield flags, more if option.default is None else {**more, "default": option.default}


def _typed(option: Option) -> dict[str, Any]:
    match option.kind:
        case Kind.FLAG:
            return {"is_flag": True}
        case Kind.ADDRESS:
            return {"is_flag": False, "flag_value": "local"}
        case Kind.REPEATED:
            return {"multiple": True, "type": click.Choice(option.choices) if option.choices else str}
        case Kind.SWITCH:
            return {"default": None}
    return {"type": _type(option)}


def _type(option: Option) -> Any:
    match option.kind:
        case Kind.PATH:
            return FILE
        case Kind.CHOICE:
            return click.Choice(option.choices)
        case Kind.SIZE if option.least is not None:
            return _Size(int(option.least), None if option.most is None else int(option.most))
        case Kind.WHOLE if option.least is not None:
            return click.IntRange(int(option.least), None if option.most is None else int(option.most))
        case Kind.WHOLE:
            return int
        case Kind.REAL if option.least is not None:
            return click.FloatRange(option.least, option.most)
        case Kind.REAL:
            return float
    return str


def help_of(option: Option) -> str:
    """The option's help text, with the default in brackets."""
    shown = option.shown or _default(option)
    return f"{option.help}  [{shown}]" if shown else option.help


def _default(option: Option) -> str:
    """The default as it is written on the command line; empty where there is none to show."""
    value = default_of(option.field) if option.field else option.default
    if value in (None, (), False):
        return ""
    return list(words_of(option, value))[-1]
