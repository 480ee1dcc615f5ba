"""spach-validate: compare a bundle's engine or graph with PyTorch in FP32.

The target may also be a folder for ONNX Runtime, two bundles, which are compared with each other too, or a model on a
Triton server (http://, grpc://). Each kind of target refuses the options that it cannot use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import ComputingCommand, command, is_colored, ray_cluster, say, show, width
from spach_deploy.cli.reporting import ReportDestinations, check_report, open_page
from spach_deploy.common.errors import SpachError, UsageError
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.command_line import validate_command
from spach_deploy.options.table import VALIDATE, options_of

if TYPE_CHECKING:
    from spach_deploy.common.files import Destination
    from spach_deploy.validation.result import Validation
    from spach_deploy.validation.side_by_side import SideBySide
    from spach_deploy.validation.target import ValidationRequest


def is_server(target: str) -> bool:
    """Whether the target is the URL of a model on a server."""
    return re.match(r"(https?|grpcs?)://", target) is not None


def check_bundle(bundle: Path | None) -> None:
    """UsageError for --bundle with a target that is not on a server."""
    if bundle is not None:
        raise UsageError("--bundle is for models on a server.", "Give http://HOST:PORT/MODEL, or leave it out.")


def validate_on_server(url: str, bundle: Path | None, misplaced: Mapping[str, object]) -> Validation:
    """Validate the model at `url` with the golden pack of `bundle`. UsageError without --bundle, or for an option in
    `misplaced`, by flag, that has a value: servers have no such option."""
    given = [option for option, value in misplaced.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} is not for models on a server.", "They are sent the bundle's golden pack.")
    if bundle is None:
        raise UsageError("A server has no golden pack.", "Give --bundle DIR, what the model was packaged from.")
    from spach_deploy.runtime.triton_runner import ServedAt
    from spach_deploy.validation.server import ServerRequest, validate_server

    return validate_server(ServerRequest(ServedAt.parse(url), bundle))


def check_two(misplaced: Mapping[str, object], report: Path | None, *, is_opened: bool) -> ReportDestinations | None:
    """Check the options of a comparison of two bundles, and return the report's destinations. UsageError for options
    that need a single target, MissingPackageError where a page is to be opened and cannot be made."""
    given = [option for option, value in misplaced.items() if value]
    if given:
        raise UsageError(f"{given[0]} is for one target.", "Leave it out, or give one bundle.")
    if report is not None:
        check_report(report)
    destinations = None if report is None else ReportDestinations.of(report)
    if is_opened:
        from spach_deploy.report.page import check_can_make_pages

        check_can_make_pages()
        if destinations is None:
            raise UsageError("--open needs a page, and none would be written.", "Give --report FILE.json too.")
    return destinations


def validate_two(first: ValidationRequest, second: Path, command: str) -> SideBySide:
    """Validate both bundles with the same options, and compare them with each other."""
    from spach_deploy.validation.result import Provenance
    from spach_deploy.validation.side_by_side import compare_bundles

    compared = compare_bundles(first, dataclasses.replace(first, target=second), say)
    return dataclasses.replace(compared, run=Provenance.here(command))


def show_two(compared: SideBySide, destinations: ReportDestinations | None, *, as_json: bool, is_opened: bool) -> int:
    """Print the comparison as a table or JSON, and write report and page if requested. Returns the exit code."""
    from spach_deploy.validation.result import dumped, write_whole
    from spach_deploy.validation.side_by_side import as_text
    from spach_deploy.validation.table import WIDTH

    show(dumped(compared.to_dict()).rstrip() if as_json else as_text(compared, width=width(WIDTH), color=is_colored()))
    if destinations is not None:
        write_whole(destinations.report, dumped(compared.to_dict()))
        _write_page(compared, destinations.page, is_opened=is_opened)
    return compared.exit_code


def _write_page(compared: SideBySide, destination: Destination, *, is_opened: bool) -> None:
    """Write and open the page; where that fails, a sentence says so."""
    from spach_deploy.report.page import write_page_of_two

    try:
        write_page_of_two(compared, destination)
    except SpachError as error:
        say(str(error))
        return
    say(f"Page: {destination.path}")
    if is_opened:
        open_page(destination.path)


@click.command("spach-validate", cls=ComputingCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", type=str)
@click.argument("other", type=FILE, required=False)
@click_options(VALIDATE)
@command
def main(target: str, other: Path | None, report: Path | None, is_opened: bool, as_json: bool, **given: Any) -> int:
    """Compare TARGET with PyTorch in FP32: a bundle, its engine.plan, its model.onnx, a folder that spach-package
    onnxruntime wrote, or a model on a Triton server.

    With OTHER, a second bundle, both are compared with PyTorch and with each other.

    \b
    spach-validate build/ms_hybrid_s-fp16/engine.plan
    spach-validate build/ms_hybrid_s-fp16 --images val/ --checkpoint run7.pth
    spach-validate build/ms_hybrid_s-fp16 --images val/ \\
        --labels val/ --max-drop 0.3
    spach-validate build/ms_hybrid_s-fp16 --images val/ \\
        --max-images 50000 --ray 10.0.0.1:6379
    spach-validate build/ms_hybrid_s-fp16 --bisect
    spach-validate build/ms_hybrid_s-fp16 build/ms_hybrid_s-int8
    spach-validate other.onnx --against build/ms_hybrid_s-fp16
    spach-validate grpc://localhost:8001/ms_hybrid_s \\
        --bundle build/ms_hybrid_s-fp16

    Two levels of evidence: `engine`, the plan itself ran here; `graph`, the graph that it was built from ran in ONNX
    Runtime instead, because this machine cannot run the plan.

    Exit codes: 0 agreed, 1 did not agree, lost more than --max-drop or a file is not the one that was exported, 2 bad
    usage or input, 3 the graph agreed but the plan could not be run here (0 with --accept graph).
    """
    from spach_deploy.cli.reporting import ReportRequest, write_reports
    from spach_deploy.models.registry import check_ignore

    check_ignore(given["checkpoint"], given["ignore"])
    typed = validate_command(target, other, _recorded(given))
    if other is not None:
        destinations = check_two(
            _flags(given, "bundle", "against", "bisect", "ray", "answers"), report, is_opened=is_opened
        )
        compared = validate_two(_request(target, given), other, typed)
        return show_two(compared, destinations, as_json=as_json, is_opened=is_opened)
    bundle, against = given["bundle"], given["against"]
    own = None if is_server(target) or against is not None else Path(target)
    request = ReportRequest(bundle or against or Path(target), own, report, as_json, is_opened)
    destinations = request.check()
    if is_server(target):
        of_files = ("ray", "against", "bisect", "images", "labels", "checkpoint", "answers", "accept")
        validation = validate_on_server(target, bundle, _flags(given, *of_files))
    else:
        from spach_deploy.validation.target import validate_target

        check_bundle(bundle)
        validation = validate_target(_request(target, given), say)
    validation = _with_provenance(validation, typed)
    _show(validation, as_json=as_json)
    if destinations is not None:
        write_reports(validation, request, destinations)
    return validation.exit_code


def _recorded(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that a report records. --max-images means nothing without --images, and is then left out."""
    return given if given["images"] is not None else {**given, "max_images": None}


def _flags(given: Mapping[str, Any], *keys: str) -> dict[str, object]:
    """Values of some options by their flags; None for options that were not given."""
    return {
        option.flag: given[option.key] or None for key in keys for option in options_of(VALIDATE) if option.key == key
    }


def _request(target: str, given: Mapping[str, Any]) -> ValidationRequest:
    from spach_deploy.validation.target import ValidationRequest

    return ValidationRequest.of(Path(target), {**given, "ray": ray_cluster(given["ray"])})


def _with_provenance(validation: Validation, typed: str) -> Validation:
    """The validation with its command and versions. --ray is not in the command: it changes no figure."""
    from spach_deploy.validation.result import Provenance

    return dataclasses.replace(validation, run=Provenance.here(typed))


def _show(validation: Validation, *, as_json: bool) -> None:
    from spach_deploy.validation.result import as_json as report_text
    from spach_deploy.validation.table import WIDTH, as_text

    if as_json:
        show(report_text(validation).rstrip())
    else:
        show(as_text(validation, width=width(WIDTH), color=is_colored()))


if __name__ == "__main__":
    main()
