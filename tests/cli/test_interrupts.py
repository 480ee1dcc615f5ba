"""Ctrl-C ends a process wherever it strikes; each script here meets one of the places where Python alone would not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.commands import ROOT

PREAMBLE = """
import os, signal, sys, threading
from spach_deploy.cli.interrupts import ending_on_interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def block():
    {block}


try:
    with ending_on_interrupt(lambda: "The old one is kept.", grace_s=0.3):
        block()
except KeyboardInterrupt as error:
    print("caught", error)
    {after}
"""

CAUGHT = "caught The old one is kept.\n"


def run(block: str, after: str = "") -> subprocess.CompletedProcess[str]:
    lines = "\n    ".join(block.strip().splitlines())
    script = PREAMBLE.format(block=lines, after=after or "sys.exit(130)")
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


PLACES = {
    "plain code": "ctrl_c()",
    "a class body, where it becomes a RuntimeError": """
class Field:
    def __set_name__(self, owner, name):
        ctrl_c()
type("Owner", (), {"field": Field()})
""",
    "code that swallows it and ends well": """
try:
    ctrl_c()
except BaseException:
    pass
""",
    "a callback, whose errors Python only prints": """
import weakref
class Thing: pass
thing = Thing()
kept = weakref.ref(thing, lambda _: ctrl_c())
del thing
""",
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_an_interruption_whatever_became_of_it(place: str) -> None:
    done = run(PLACES[place])
    assert done.returncode == 130
    assert done.stderr == ""
    assert done.stdout == CAUGHT


def test_a_block_that_hangs_after_it_is_ended() -> None:
    done = run("try:\n    ctrl_c()\nexcept KeyboardInterrupt:\n    threading.Event().wait()")
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == "Interrupted. The old one is kept.\n"


def test_a_process_that_hangs_at_its_end_is_ended_and_says_nothing_twice() -> None:
    done = run("ctrl_c()", after="sys.stdout.flush(); threading.Event().wait()")
    assert done.returncode == 130
    assert done.stdout == CAUGHT
    assert done.stderr == ""


def test_an_interpreter_that_takes_long_to_end_is_not_killed_by_the_alarm() -> None:
    slow = "sys.slow = type('Slow', (), {'__del__': lambda self, sleep=__import__('time').sleep: sleep(1)})()"
    done = run("ctrl_c()", after=f"{slow}; sys.exit(130)")
    assert done.returncode == 130
    assert done.stdout == CAUGHT


@pytest.mark.parametrize(("name", "code", "said"), [("spach-export", 130, "Interrupted.\n"), ("pytest", -2, None)])
def test_while_our_script_loads_its_modules_it_is_no_traceback(name: str, code: int, said: str | None) -> None:
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # whoever runs this may ignore it
    start = f"import os, signal, sys; {heard}; sys.argv = ['/bin/{name}']"
    script = f"{start}; import spach_deploy.cli; os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stderr == said) if said else "KeyboardInterrupt" in done.stderr


def test_a_second_one_does_not_wait() -> None:
    done = run("try:\n    ctrl_c()\nexcept KeyboardInterrupt:\n    signal.alarm(0)\n    ctrl_c()")
    assert done.returncode == 130
    assert done.stderr == "Interrupted. The old one is kept.\n"


def test_other_errors_pass_and_nothing_is_left_behind() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    done = run("pass\nprint(signal.getitimer(signal.ITIMER_REAL))")
    assert done.returncode == 0
    assert done.stdout == "(0.0, 0.0)\n"


def test_a_background_job_that_ignores_it_goes_on() -> None:
    script = PREAMBLE.replace("signal.default_int_handler", "signal.SIG_IGN").format(block="ctrl_c()", after="")
    done = subprocess.run([sys.executable, "-c", script + "\nprint('done')"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
