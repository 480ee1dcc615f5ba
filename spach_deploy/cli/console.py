"""stdout and stderr of a command, which may be closed, full, piped into something that ended, or of few characters.

How commands speak and end: results on stdout, everything else on stderr, errors as one sentence, exit codes.

0 done and verified, 1 the numbers disagree, 2 bad usage or bad input, 3 this machine cannot do or verify it,
130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from spach_deploy.cli.interrupts import INTERRUPTED, NOTHING, ending_on_interrupt, sentence
from spach_deploy.common.errors import SpachError, printable, printable_lines
from spach_deploy.common.text import Escaped
from spach_deploy.common.versions import refuse_unfit_packages
from spach_deploy.options.click_options import write_groups

if TYPE_CHECKING:
    from spach_deploy.common.executors import ClusterAddress


NARROWEST, WIDEST = 60, 100
"""Columns that text is broken at, on a terminal."""


_PLAIN = "spach_deploy.plain"
_SIGNS = {"─": "-", "–": "-", "…": "...", "×": "x"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Instead of characters that a stream's encoding lacks: lines and dashes of tables in ASCII, others escaped."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error(_PLAIN, _plain)


@contextlib.contextmanager
def outputs_that_may_fail() -> Iterator[None]:
    """A command goes on and ends with the same exit code though nobody can read it.

    For stdout one sentence on stderr says so. A character that the stream's encoding lacks is escaped.
    """
    _open_closed_ones()
    with _replaced("stderr", 2, ""), _replaced("stdout", 1, "Warning: standard output cannot be written ({}).\n"):
        yield


def _open_closed_ones() -> None:
    """A file that is opened later must not become stdout because that number is free; children inherit it too."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest free number; writing to stdout still fails


@contextlib.contextmanager
def _replaced(name: str, number: int, complaint: str) -> Iterator[None]:
    """Another stream on the same descriptor; nothing where a caller has put one of its own there."""
    before: TextIO | None = getattr(sys, name)
    if before is not getattr(sys, f"__{name}__"):
        yield
        return
    if before is not None:
        before.flush()
    binary = io.BufferedWriter(_Descriptor(number, complaint))
    encoding = "utf-8" if before is None else before.encoding
    stream = io.TextIOWrapper(binary, encoding, errors=_PLAIN, line_buffering=number == 2 or binary.isatty())
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        setattr(sys, name, before or stream)


class _Descriptor(io.FileIO):
    """Drops what cannot be written; the first time it says so."""

    def __init__(self, number: int, complaint: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._complaint = complaint

    def write(self, data: Any, /) -> int:
        """As a file does; all of it where it fails."""
        try:
            return super().write(data)
        except OSError as error:
            complaint, self._complaint = self._complaint, ""
            if complaint:
                sys.stderr.write(complaint.format(error.strerror))
            return memoryview(data).nbytes


def is_colored() -> bool:
    """Whether stdout gets colours: a terminal that has them, or anything with FORCE_COLOR; nothing with NO_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def width(usual: int) -> int:
    """Columns to break text at: the terminal's or COLUMNS, within reason; `usual` where stdout is no terminal."""
    columns = shutil.get_terminal_size((usual, 24)).columns if sys.stdout.isatty() else usual
    return min(max(columns, NARROWEST), WIDEST)


BAD_INPUT, UNAVAILABLE = 2, 3

ARGUMENTS = "spach_deploy.arguments"
"""Where a command's context keeps its words as they were typed."""


class Command(click.Command):
    """A click command whose own errors (an unknown option, a number out of range) are one sentence too.

    Its help shows the options in the groups of the table.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in --help."""
        write_groups(self, ctx, formatter)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run, whatever its outputs are."""
        with outputs_that_may_fail() if args is None else contextlib.nullcontext():
            return super().main(args, *more, **extra)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse; exit code 2 for what cannot be parsed."""
        given = tuple(args)
        try:
            context = super().make_context(info_name, args, parent, **extra)
            context.meta[ARGUMENTS] = given
            return context
        except click.UsageError as error:
            wrong = " ".join(error.format_message().split()).rstrip(".")
            fail(error, f"{wrong}. See {info_name} --help.", debug="--debug" in args)
            sys.exit(2)


class ComputingCommand(Command):
    """A command that computes for seconds and more. It begins by looking at the versions of packages: old ones fail
    later, and blame something else.
    """

    def invoke(self, context: click.Context) -> Any:
        """Run; exit code 3 where a package is missing or too old."""
        try:
            refuse_unfit_packages()
        except SpachError as error:
            fail(error, str(error), debug=bool(context.params.get("debug")))
            sys.exit(error.exit_code)
        return super().invoke(context)


def command(body: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a command body: errors become one sentence and an exit code; `--debug` shows the traceback.

    The body returns its exit code, None meaning 0. It is called with click's parameters, `debug` taken out. A
    KeyboardInterrupt that it raises may carry a sentence on what was kept.
    """

    @functools.wraps(body)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            with ending_on_interrupt(lambda: NOTHING):
                code = body(*args, **kwargs) or 0
        except KeyboardInterrupt as error:
            say(sentence(str(error) or NOTHING))
            code = INTERRUPTED
        except Exception as error:
            explanation, code = _explained(error)
            fail(error, explanation, debug=debug)
        sys.exit(code)

    return run


def _explained(error: Exception) -> tuple[str, int]:
    """A sentence with the next step, and the exit code."""
    if isinstance(error, SpachError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch and onnxruntime have no class for it
        return "Out of memory. Close other programs, or choose a smaller model, image size or batch.", UNAVAILABLE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "No space left on the disk or in the folder for temporary files. Free some, or set TMPDIR.", BAD_INPUT
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'no file named'}). Check that path.", BAD_INPUT
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"This is a bug of spach-deploy ({what}). Run again with --debug and report what it shows.", UNAVAILABLE


def show(text: str) -> None:
    """Results, on stdout, escaped unless `text.rendered` or `text.escaped` did that: those know names from lines."""
    click.echo(text if isinstance(text, Escaped) else printable_lines(text), color=True)


def say(text: str) -> None:
    """Everything else, on stderr, a line at a time: a newline in it is that of a name, and is escaped."""
    click.echo(printable(text), err=True)


def fail(error: Exception, sentence: str, *, debug: bool) -> None:
    """`Error: sentence` on stderr, after the traceback with `debug`."""
    if debug:
        click.echo(printable_lines("".join(traceback.format_exception(error)).rstrip()), err=True)
    say(f"Error: {sentence}")


def ray_cluster(address: str | None) -> ClusterAddress | None:
    """The Ray cluster at the address that --ray was given; None without one."""
    if address is None:
        return None
    from spach_deploy.distributed.actors import RayAddress

    return RayAddress(address)
