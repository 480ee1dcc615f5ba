"""What the benchmark turns off is there to be turned off."""

from __future__ import annotations

import ast
import importlib
import operator
import subprocess

import pytest

from benchmarks.export_time import MECHANISMS, command_without


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_a_mechanism_changes_is_there(name: str) -> None:
    module, change = MECHANISMS[name]
    (statement,) = ast.parse(change).body
    assert isinstance(statement, ast.Assign)
    assert operator.attrgetter(ast.unparse(statement.targets[0]))(importlib.import_module(module))


def test_the_command_without_one_is_changed_and_otherwise_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "models", ("spach_deploy.cli.reporting", "models_as_table = lambda: 'changed'"))
    for option, said in (("--list", "changed"), ("--list-rewrites", "grid_stream")):
        done = subprocess.run([*command_without("models"), option], capture_output=True, text=True, check=True)
        assert said in done.stdout
