"""spach-package: a group of subcommands, one for each way to serve a bundle, imported only when called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from spach_deploy.cli.console import fail, outputs_that_may_fail
from spach_deploy.options.click_options import version

SUBCOMMANDS = {
    "triton": ("spach_deploy.cli.package_triton", "A model repository for NVIDIA Triton, and its offline check."),
    "cpp": ("spach_deploy.cli.package_cpp", "A C++17 library that loads the engine, with a self-test."),
    "polygraphy": ("spach_deploy.cli.package_polygraphy", "The golden data for polygraphy run."),
    "onnxruntime": ("spach_deploy.cli.package_onnxruntime", "A folder that an ONNX Runtime application loads."),
    "kubernetes": ("spach_deploy.cli.package_kubernetes", "A container image and manifests for a cluster."),
}
"""Module and help line of each subcommand, which is the module's `main`. Subcommands of absent modules are hidden."""


class LazyGroup(click.Group):
    """A click group that imports a subcommand when it is called, with the errors and streams of the other commands."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run, with streams that may fail."""
        with outputs_that_may_fail() if args is None else contextlib.nullcontext():
            return super().main(args, *more, **extra)

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of subcommands, in the order of `SUBCOMMANDS`."""
        return [name for name, (module, _) in SUBCOMMANDS.items() if importlib.util.find_spec(module)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The subcommand's `main`."""
        if name not in self.list_commands(context):
            return None
        main = importlib.import_module(SUBCOMMANDS[name][0]).main
        assert isinstance(main, click.Command)
        return main

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of --help from `SUBCOMMANDS`, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUBCOMMANDS[name][1]) for name in self.list_commands(context)])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments. One sentence and exit code 2 where they cannot be parsed."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            self._refuse(error, info_name)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand. One sentence and exit code 2 where there is no such one."""
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            self._refuse(error, context.info_name)

    def _refuse(self, error: click.UsageError, name: str | None) -> NoReturn:
        fail(error, f"{error.format_message().rstrip('.')}. See {name} --help.", debug=False)
        sys.exit(2)


@click.group("spach-package", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@version
def main() -> None:
    """Turn a bundle into something that serves.

    \b
    spach-package triton build/ms_hybrid_s-fp16 -o models
    spach-package triton --check models
    spach-package cpp build/ms_hybrid_s-fp16 -o engine-cpp
    spach-package onnxruntime build/ms_hybrid_s-fp16 -o served
    spach-package kubernetes build/ms_hybrid_s-fp16 -o k8s

    Each subcommand explains itself: spach-package triton --help.
    """


if __name__ == "__main__":
    main()
