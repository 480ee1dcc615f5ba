"""How commands speak and end: results on stdout, everything else on stderr, errors as one sentence, exit codes.

0 done and verified, 1 the numbers disagree, 2 bad usage or bad input, 3 this machine cannot do or verify it,
130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from spach_deploy.errors import SpachError

INTERRUPTED = 130


def command(body: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a command body: errors become one sentence and an exit code; `--debug` shows the traceback.

    The body returns its exit code, None meaning 0. It is called with click's parameters, `debug` taken out.
    """

    @functools.wraps(body)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            code = body(*args, **kwargs) or 0
        except SpachError as error:
            fail(error, debug=debug)
            code = error.exit_code
        except KeyboardInterrupt:
            say("Interrupted. Nothing was written; an earlier bundle in the same place is as it was.")
            code = INTERRUPTED
        except BrokenPipeError:
            code = _reader_went_away()
        except MemoryError as error:
            fail(
                error, "Out of memory. Close other programs, or choose a smaller --batch or fewer images.", debug=debug
            )
            code = 3
        sys.exit(code)

    return run


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def fail(error: BaseException, sentence: str = "", *, debug: bool = False) -> None:
    """`Error: sentence` on stderr, after the traceback with `debug`."""
    if debug:
        traceback.print_exception(error)
    say(f"Error: {sentence or error}")


def _reader_went_away() -> int:
    """`spach-export --list | head` is no error; keep the interpreter from complaining at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
