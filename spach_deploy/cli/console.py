"""What all commands share: output streams, error messages, exit codes, and the click classes that use them.

Results go to stdout, everything else to stderr, and an error is one sentence. Exit codes: 0 done and verified, 1 the
numbers disagree, 2 bad usage or bad input, 3 this machine cannot do or verify it, 130 interrupted with Ctrl-C.
Output never makes a command fail, but for `show_answer`: streams may be closed, full, a broken pipe, or of an encoding
with few characters.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import functools
import io
import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

import click

from spach_deploy.cli.interrupts import INTERRUPTED, NOTHING, ending_on_interrupt, is_our_script, sentence
from spach_deploy.common.errors import SpachError, printable, printable_lines
from spach_deploy.common.operating_system import takes_text
from spach_deploy.common.text import Escaped
from spach_deploy.common.versions import refuse_unfit_packages
from spach_deploy.options.click_options import write_groups

if TYPE_CHECKING:
    from spach_deploy.common.executors import ClusterAddress


NARROWEST, WIDEST = 60, 100
"""Limits of the width, in columns, at which text is wrapped on a terminal."""


_PLAIN = "spach_deploy.plain"
_REPLACEMENTS = {"─": "-", "–": "-", "…": "...", "×": "x"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: lines and dashes of tables become ASCII, other characters the encoding lacks are escaped."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error(_PLAIN, _plain)


@contextlib.contextmanager
def outputs_that_may_fail() -> Iterator[None]:
    """Let a command go on and end with the same exit code where stdout or stderr cannot be written.

    For stdout, one sentence on stderr says so. Characters that the stream's encoding lacks are escaped.
    """
    _open_closed_ones()
    with _replaced("stderr", 2, ""), _replaced("stdout", 1, "Warning: standard output cannot be written ({}).\n"):
        yield


def _open_closed_ones() -> None:
    """Open closed standard descriptors on /dev/null, so that a file opened later does not become stdout."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest free number; writing to stdout still fails


@contextlib.contextmanager
def _replaced(name: str, number: int, complaint: str) -> Iterator[None]:
    """Replace the stream by a tolerant one on the same descriptor, unless a caller has replaced it already."""
    before: TextIO | None = getattr(sys, name)
    if before is not getattr(sys, f"__{name}__") or takes_text(before):
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
    """A file that drops what cannot be written, and writes `complaint` to stderr the first time.

    `failure` is the first error.
    """

    def __init__(self, number: int, complaint: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.complaint = complaint
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write as a file does; report all bytes as written where that fails."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            complaint, self.complaint = self.complaint, ""
            if complaint:
                sys.stderr.write(complaint.format(error.strerror))
            return memoryview(data).nbytes


_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


def results_stream() -> TextIO:
    """The command's stdout, which gets its results alone."""
    return _results.get() or sys.stdout


@contextlib.contextmanager
def _others_print_to_stderr() -> Iterator[None]:
    """Within the block, what other code prints, such as a user's own module, goes to stderr."""
    before = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(before)


def is_colored() -> bool:
    """Whether stdout gets colours: on a terminal that has them, or with FORCE_COLOR; never with NO_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return results_stream().isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def width(usual: int) -> int:
    """The width to wrap text at: that of the terminal or COLUMNS, 60 to 100; `usual` where stdout is no terminal."""
    columns = shutil.get_terminal_size((usual, 24)).columns if results_stream().isatty() else usual
    return min(max(columns, NARROWEST), WIDEST)


BAD_INPUT, UNAVAILABLE = 2, 3

ARGUMENTS = "spach_deploy.arguments"
"""Key in a command's context for its words as they were typed."""


class Command(click.Command):
    """A click command whose usage errors (an unknown option, a number out of range) are one sentence.

    `--help` shows the options in the groups of the table.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of --help."""
        write_groups(self, ctx, formatter)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run, with streams that may fail."""
        with outputs_that_may_fail() if args is None else contextlib.nullcontext():
            return super().main(args, *more, **extra)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments. Exit code 2 where they cannot be parsed."""
        given = tuple(args)
        try:
            _check_repeated(self, args)
            context = super().make_context(info_name, args, parent, **extra)
            context.meta[ARGUMENTS] = given
            return context
        except click.UsageError as error:
            wrong = " ".join(error.format_message().split()).rstrip(".")
            wrong = wrong if wrong.endswith("?") else f"{wrong}."
            name = info_name if parent is None else f"{parent.command_path} {info_name}"
            fail(error, f"{wrong} See {name} --help.", debug="--debug" in args)
            sys.exit(2)


def _check_repeated(command: click.Command, args: Sequence[str]) -> None:
    """click.UsageError for an option with a value that is given twice, of which one would be lost."""
    valued = {
        flag: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and not (parameter.is_flag or parameter.multiple)
        for flag in parameter.opts
    }
    seen: set[str] = set()
    words = iter(itertools.takewhile(lambda word: word != "--", args))
    for word in words:
        flag, has_value, _ = word.partition("=")
        if (parameter := valued.get(flag)) is None:
            continue
        if parameter.name in seen:
            raise click.UsageError(f"{flag} was given twice.")
        seen.add(parameter.name or "")
        if not has_value:
            next(words, None)


class ComputingCommand(Command):
    """A command that computes for seconds or more. It checks versions of packages first, because old ones fail later
    with misleading errors.
    """

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run, and exit without interpreter teardown."""
        with exit_without_teardown() if args is None else contextlib.nullcontext():
            return super().main(args, *more, **extra)

    def invoke(self, context: click.Context) -> Any:
        """Run. Exit code 3 where a package is missing or too old."""
        try:
            refuse_unfit_packages()
        except SpachError as error:
            fail(error, str(error), debug=bool(context.params.get("debug")))
            sys.exit(error.exit_code)
        return super().invoke(context)


@contextlib.contextmanager
def exit_without_teardown() -> Iterator[None]:
    """Skip the interpreter's teardown at the end of a command, which takes seconds after PyTorch was loaded.

    What `atexit` has runs, and streams are flushed. Nothing changes in a process that was not started as this command,
    and where the block ends with anything but SystemExit.
    """
    arguments = sys.argv[1:]
    if not is_our_script() or sys.orig_argv[len(sys.orig_argv) - len(arguments) :] != arguments:
        yield
        return
    code: int | None = None

    def leave() -> None:
        if code is not None:
            with contextlib.suppress(OSError, ValueError):  # closed or full: Python's own exit reports it
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    atexit.register(leave)  # what is registered first runs last
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def command(body: Callable[..., int | None]) -> Callable[..., None]:
    """Decorator of a command body: errors become one sentence and an exit code; `--debug` shows the traceback.

    The body returns its exit code, None for 0. It is called with click's parameters except `debug`. A KeyboardInterrupt
    that it raises may carry a sentence on what was kept.
    """

    @functools.wraps(body)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            with ending_on_interrupt(lambda: NOTHING), _others_print_to_stderr():
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
    """The message for an error, with the next step, and the exit code."""
    if isinstance(error, SpachError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or "allocate memory" in str(
        error
    ):  # torch and onnxruntime have no exception class for it
        return "Out of memory. Close other programs, or choose a smaller model, image size or batch.", UNAVAILABLE
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "No space left on the disk or in the folder for temporary files. Free some, or set TMPDIR.", BAD_INPUT
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'no file named'}). Check that path.", BAD_INPUT
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"This is a bug of spach-deploy ({what}). Run again with --debug and report what it shows.", UNAVAILABLE


def show(text: str) -> None:
    """Print results to stdout. Text is escaped line by line, unless it is `Escaped`, as from `common.text`."""
    shown = text if isinstance(text, Escaped) else printable_lines(text)
    click.echo(shown, file=results_stream(), color=True)


def show_answer(text: str) -> None:
    """`show`, for a command whose stdout is what it makes: the OSError is raised where it cannot be written."""
    file = getattr(getattr(results_stream(), "buffer", None), "raw", None)
    if not isinstance(file, _Descriptor):
        return show(text)
    file.complaint = ""
    show(text)
    if file.failure is not None:
        raise file.failure


def say(text: str) -> None:
    """Print one line to stderr. Newlines in it, as from a name, are escaped."""
    click.echo(printable(text), err=True)


def fail(error: Exception, sentence: str, *, debug: bool) -> None:
    """Print `Error: sentence` to stderr, with `debug` after the traceback."""
    if debug:
        click.echo(printable_lines("".join(traceback.format_exception(error)).rstrip()), err=True)
    say(f"Error: {sentence}")


def ray_cluster(address: str | None) -> ClusterAddress | None:
    """The Ray cluster at the address given with --ray; None without one."""
    if address is None:
        return None
    from spach_deploy.distributed.actors import RayAddress

    return RayAddress(address)
