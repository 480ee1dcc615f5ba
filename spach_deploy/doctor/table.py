"""The doctor's findings as text for the terminal: each fact, what it means, and the command that would change it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from spach_deploy._version import __version__
from spach_deploy.common.errors import printable
from spach_deploy.common.text import Escaped, rendered
from spach_deploy.doctor.finding import Finding, Status, Task, blockers, reasons
from spach_deploy.doctor.machine import CORE_FLOW, Machine
from spach_deploy.doctor.target import Target

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 88
_STATUS_COLUMN, _TOPIC_COLUMN = 9, 17
_INDENT = 2 + _STATUS_COLUMN + _TOPIC_COLUMN
_STYLES = {Status.OK: "green", Status.MISSING: "yellow", Status.PROBLEM: "bold red", Status.UNKNOWN: "yellow"}
_FIRST = "spach-export --model ms_hybrid_s --fp16"


def as_text(found: Machine | Target, *, width: int = WIDTH, color: bool = False) -> Escaped:
    """The findings, and the conclusion: what the machine can do, or whether it can run the target."""
    lines = _machine(found, width) if isinstance(found, Machine) else _target(found, width)
    return rendered(lines, color=color)  # commands are never broken over lines: they are there to be copied


def _machine(machine: Machine, width: int) -> Iterator[Text]:
    from rich.text import Text

    yield Text(f"spach-deploy {__version__}, this machine", style="bold")
    yield Text()
    for finding in machine.findings:
        yield from _finding(finding, width)
    yield Text()
    yield Text("This machine can", style="bold")
    for ability in machine.abilities:
        status = Status.OK if ability.possible else Status.PROBLEM if ability.task in CORE_FLOW else Status.MISSING
        yield from _columns("yes" if ability.possible else "no", status, ability.task.value, ability.how, width)
    yield Text()
    yield from _conclusion(machine)


def _conclusion(machine: Machine) -> Iterator[Text]:
    from rich.text import Text

    if machine.exit_code == 0:
        yield Text("All that an export takes is here. To begin:", style="bold green")
        yield Text(f"  $ {_FIRST}")
        return
    yield Text("Not all that an export takes is here. To change that:", style="bold red")
    yield from _remedies(finding for task in CORE_FLOW for finding in blockers(machine.findings, task))


def _remedies(findings: Iterable[Finding]) -> Iterator[Text]:
    """Each command once."""
    from rich.text import Text

    yield from (
        Text(printable(f"  $ {command}")) for command in dict.fromkeys(f.command for f in findings if f.command)
    )


def _target(target: Target, width: int) -> Iterator[Text]:
    from rich.text import Text

    yield Text(printable(f"{target.path}: {target.name}"), style="bold")
    yield Text()
    for finding in target.findings:
        yield from _finding(finding, width)
    yield Text()
    sentence, style = _verdict(target)
    yield Text(textwrap.fill(printable(sentence), width, break_on_hyphens=False, break_long_words=False), style=style)
    yield from _remedies(_in_the_way(target))


def _verdict(target: Target) -> tuple[str, str]:
    why = reasons(_in_the_way(target))
    if target.is_bad:
        return f"NO, not as it is: {why}.", "bold red"
    if not target.can_run:
        return f"NO, this machine cannot run it: {why}.", "bold yellow"
    if any(finding.status is Status.UNKNOWN for finding in target.findings):
        return "PERHAPS: nothing stands in the way, but not all is known. TensorRT decides.", "bold yellow"
    where = f" in {target.runtime}" if target.runtime else ""
    return f"YES,{where} this machine can run it.", "bold green"


def _in_the_way(target: Target) -> tuple[Finding, ...]:
    """Findings against the target; faults of the target itself come first, because no machine would run it."""
    at_fault = tuple(finding for finding in target.findings if finding.bad_target)
    return at_fault or blockers(target.findings, Task.RUN)


def _finding(finding: Finding, width: int) -> Iterator[Text]:
    from rich.text import Text

    yield from _columns(finding.status.value, finding.status, finding.topic, finding.what, width)
    if finding.means:
        yield from (Text(line) for line in _indented(finding.means, width))
    if finding.command:
        yield Text(
            printable(f"{' ' * _INDENT}$ {finding.command}"), style="dim" if finding.status is Status.OK else "cyan"
        )


def _columns(word: str, status: Status, topic: str, text: str, width: int) -> Iterator[Text]:
    from rich.text import Text

    first, *others = _indented(text, width)
    line = Text("  ")
    line.append(f"{word:<{_STATUS_COLUMN}}", style=_STYLES[status])
    line.append(f"{topic:<{_TOPIC_COLUMN}}", style="bold")
    line.append(first[_INDENT:])
    yield line
    yield from (Text(other) for other in others)


def _indented(text: str, width: int) -> list[str]:
    space = " " * _INDENT
    filled = textwrap.fill(
        printable(text),
        width,
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.splitlines() or [space]
