"""Making a zoo: keep finished bundles, export the others, and rewrite the summary after each."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from spach_deploy.common.errors import BundleError, MissingPackageError
from spach_deploy.common.files import Destination
from spach_deploy.common.text import json_text
from spach_deploy.options.command_line import export_words
from spach_deploy.pipeline.zoo.child import ExportProcess, ProcessEnd
from spach_deploy.pipeline.zoo.folder import PAGE, SUMMARY, ZooFolder
from spach_deploy.pipeline.zoo.outcome import BuildStatus, Row, Summary, ended_row, kept_row, page_of_zoo
from spach_deploy.pipeline.zoo.plan import Build
from spach_deploy.pipeline.zoo.schedule import Limits, Start, run_builds

Finished = Generator[tuple[Build, ProcessEnd], None, None]
Run = Callable[[Sequence[Build], Callable[[Build], None]], Finished]
"""Runs builds, calls back for each that begins, and yields each with how it ended. See `schedule.run_builds`."""


class ZooObserver(Protocol):
    """Callbacks for the progress of a zoo."""

    def began(self, build: Build) -> None:
        """A build begins."""

    def ended(self, row: Row, done: int, total: int) -> None:
        """A build ended, or its bundle was kept from an earlier run."""

    def note(self, text: str) -> None:
        """A sentence for the user."""


@dataclasses.dataclass(frozen=True)
class ZooWork:
    """The builds of a zoo: `kept` have a finished bundle, `builds` are to run, `damaged` had a damaged one."""

    all: tuple[Build, ...]
    kept: tuple[Build, ...]
    builds: tuple[Build, ...]
    damaged: tuple[Build, ...]


def work_of(builds: Sequence[Build], folder: ZooFolder, *, is_kept: bool, overwrite: bool) -> ZooWork:
    """Sort builds into finished ones and those to run. `is_kept` False runs all of them again.

    Raises BundleError where another bundle is at one of the targets, unless `overwrite`.
    """
    states = [(build, folder.look(build, folder.key(build.options) if is_kept else None)) for build in builds]
    problems = [state.problem for _, state in states if state.problem]
    if problems and not overwrite:
        more = f" ({len(problems)} such bundles in all)" if len(problems) > 1 else ""
        raise BundleError(f"{problems[0].rstrip('.')}{more}.", "Give --overwrite, or another --output.")
    return ZooWork(
        tuple(builds),
        tuple(build for build, state in states if state.is_finished),
        tuple(_replacing(build, state.destination) for build, state in states if not state.is_finished),
        tuple(build for build, state in states if state.is_damaged),
    )


def _replacing(build: Build, destination: Destination) -> Build:
    """The build with permission to replace what is at its destination, after the checks above."""
    options = dataclasses.replace(build.options, overwrite=destination.before is not None)
    return dataclasses.replace(build, options=options, destination=destination)


class Zoo:
    """Makes one zoo. `summary`: the state of all builds so far."""

    def __init__(self, work: ZooWork, folder: ZooFolder, observer: ZooObserver, command: str) -> None:
        self._work, self._folder, self._observer = work, folder, observer
        self._start = time.monotonic()
        self._problem = ""
        self._json, self._page = Destination.of(folder.root / SUMMARY), Destination.of(folder.root / PAGE)
        self.summary = Summary(tuple(map(Row.waiting, work.all)), command)

    def make(self, run: Run) -> Summary:
        """Do the work. However it ends, the summary is written and says what is there."""
        try:
            for build in self._work.kept:
                self._take(kept_row(self._row(build), self._folder.target(build)))
            for build in self._work.damaged:
                self._observer.note(f"{build.name} was damaged and is made again.")
            self._write()
            with contextlib.closing(run(self._work.builds, self._began)) as finished:
                for build, ended in finished:
                    self._folder.finish(build, is_made=ended.code == 0)
                    self._take(ended_row(self._row(build), ended, self._folder.target(build)))
                    self._write()
        except BaseException:
            self._interrupted()
            raise
        finally:
            self._write()
            if self._problem:
                self._observer.note(self._problem)
        return self.summary

    def _row(self, build: Build) -> Row:
        return next(row for row in self.summary.rows if row.name == build.name)

    def _began(self, build: Build) -> None:
        self.summary = self.summary.replacing(dataclasses.replace(self._row(build), verdict=BuildStatus.RUNNING))
        self._observer.began(build)

    def _take(self, row: Row) -> None:
        self.summary = self.summary.replacing(row)
        total = len(self.summary.rows)
        done = sum(row.verdict not in (BuildStatus.RUNNING, BuildStatus.WAITING) for row in self.summary.rows)
        self._observer.ended(row, done, total)

    def _interrupted(self) -> None:
        for row in self.summary.rows:
            if row.verdict is BuildStatus.RUNNING:
                waiting = dataclasses.replace(row, verdict=BuildStatus.WAITING, problem="Interrupted.")
                self.summary = self.summary.replacing(waiting)

    def _write(self) -> None:
        """Write summary.json and summary.html. Where that fails, the zoo goes on, and says so at the end."""
        self.summary = dataclasses.replace(self.summary, seconds=time.monotonic() - self._start)
        self._problem = self._problem_writing()

    def _problem_writing(self) -> str:
        """Write both files. Returns a sentence with the reason where that failed, else an empty text."""
        try:
            self._json = self._json.write_text(json_text(self.summary.to_dict()) + "\n")
            self._page = self._page.write_text(page_of_zoo(self.summary))
        except OSError as error:
            return f"The summary in {self._folder.root} could not be written ({error.strerror or error})."
        except MissingPackageError as error:
            return f"{PAGE} was not made. {error}"
        return ""


def on_this_machine(folder: ZooFolder, command: Sequence[str], more: Sequence[str], limits: Limits) -> Run:
    """Run builds as processes on this machine: `command` with the words of each export and `more`."""

    def start(build: Build, cores: frozenset[int]) -> ExportProcess:
        folder.begin(build)
        return ExportProcess([*command, *export_words(build.options), *more], cores=cores)

    begin: Start = start
    return lambda builds, began: run_builds(builds, limits, begin, folder.root, began)
