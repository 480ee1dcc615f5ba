"""Options written as a command line, so that a manifest or a report can say how to repeat a run."""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spach_deploy.common.files import Destination
from spach_deploy.options.recipe import keys_of_quantization, value_of
from spach_deploy.options.specs import ExportOptions, Precision, size_in_words
from spach_deploy.options.table import EXPORT, TABLE, VALIDATE, Kind, Option, filling, options_of


def quoted(word: object) -> str:
    """A word quoted for a shell. Unprintable characters become octal bytes within $'...', as in bash, zsh and ksh."""
    text = str(word)
    return shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_in_dollar_quotes, text))}'"


def _in_dollar_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    try:
        content = os.fsencode(character)
    except UnicodeEncodeError:  # from the text of a file; no file name of this system can hold it
        content = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in content)


def joined(words: Iterable[object]) -> str:
    """Words quoted for a shell and joined to a command line."""
    return " ".join(map(quoted, words))


def export_command(options: ExportOptions) -> str:
    """The spach-export command for `options`. Default values are left out, except for the precision."""
    return joined([EXPORT, *export_words(options)])


def cpu_command(options: ExportOptions, requested: Precision | None) -> str:
    """The spach-export command that measures forms with `options` on a CPU, in the `requested` precision or in all."""
    words = export_words(options)
    if requested is None:
        words.remove(f"--{options.precision.value}")
    return joined([EXPORT, *words, "--target", "cpu"])


def export_words(options: ExportOptions, table: Sequence[Option] = TABLE) -> list[str]:
    """The words of `export_command` after the program's name."""
    skipped = set() if options.precision.is_quantized else keys_of_quantization(table)
    words: list[str] = []
    defaults = type(options)()
    for option in filling(EXPORT, table):
        if option.is_recorded and option.key not in skipped:
            value = value_of(options, option.field)
            if option.kind is Kind.FLAGS or value != value_of(defaults, option.field):
                words += words_of(option, value)
    return words


def validate_command(target: str, other: Path | None = None, given: Mapping[str, Any] | None = None) -> str:
    """The spach-validate command for click's values `given`; options that were not given are left out."""
    values = given or {}
    words = [VALIDATE, target, *([] if other is None else [str(other)])]
    for option in options_of(VALIDATE):
        if option.is_recorded and (value := values.get(option.key)) not in (None, ()):
            words += words_of(option, value)
    return joined(words)


def flag_for(field: str, value: object) -> str:
    """The flag of spach-export that sets a dotted field of `ExportOptions` to `value`."""
    option = next(option for option in filling() if option.field == field)
    return next(iter(words_of(option, value)))


def words_of(option: Option, value: Any) -> Iterator[str]:
    """The command-line words that give an option a value; none for a flag that is not set."""
    if option.kind is Kind.FLAGS:
        yield f"--{_text(value)}"
    elif isinstance(value, bool):
        yield from filter(None, [option.flag if value else option.off_flag])
    elif option.kind is Kind.REPEATED:
        for entry in value:
            yield from (option.flag, _text(entry))
    else:
        yield from (option.flag, size_in_words(value) if option.kind is Kind.SIZE else _text(value))


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, Destination):
        return str(value.path)
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)
