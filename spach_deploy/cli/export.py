"""spach-export: from a checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.bundle.store import PAGE
from spach_deploy.cli.console import ComputingCommand, command, ray_cluster, say, show
from spach_deploy.cli.interrupts import ending_on_interrupt, what_is_kept
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import click_options
from spach_deploy.options.recipe import export_options, one_precision
from spach_deploy.options.specs import Precision
from spach_deploy.options.table import EXPORT

if TYPE_CHECKING:
    from spach_deploy.common.files import Destination
    from spach_deploy.options.specs import ExportOptions
    from spach_deploy.pipeline.auto import Recommendation
    from spach_deploy.pipeline.cache import Reused


@click.command("spach-export", cls=ComputingCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click_options(EXPORT)
@command
def main(
    show_list: bool,
    list_rewrites: bool,
    recipe: Path | None,
    auto: bool,
    target: str | None,
    dry_run: bool,
    no_cache: bool,
    verbose: bool,
    is_opened: bool,
    as_json: bool,
    **given: Any,
) -> int | None:
    """Export a SPACH model: ONNX graph, TensorRT engine and the evidence that both compute what PyTorch computes.

    \b
    spach-export --model ms_hybrid_s --fp16
    spach-export --checkpoint run7.pth --fp16 --images val/ --gpu rtx4090,l4
    spach-export --model ms_hybrid_s --int8 --calibration photos/
    spach-export --model ms_hybrid_s --auto --calibration photos/ --gpu l4
    spach-export --model ms_hybrid_s --target cpu --calibration photos/
    spach-export --zoo 'ms_*' --precision fp16,bf16 --gpu sm86,sm89 -o zoo/

    Exit codes: 0 done and verified as far as this machine can, 1 the numbers disagree, 2 bad usage or input,
    3 this machine cannot do it.
    """
    if show_list:
        return _list(as_json)
    if list_rewrites:
        return _list_rewrites()
    from spach_deploy.cli.reporting import check_can_open, open_page

    if is_opened:
        check_can_open()
    if _is_zoo(given):
        from spach_deploy.cli.zoo import ZooRequest, zoo

        many = {"ray": given["ray"], "jobs": given["jobs"]}
        request = ZooRequest(auto=auto, dry_run=dry_run, no_cache=no_cache, as_json=as_json, **many)
        code, page = zoo(given, recipe, request)
        if is_opened and page.is_file():
            open_page(page)
        return code
    if given["ray"] is not None and (auto or target is not None):
        raise UsageError(f"--ray is not for {'--auto' if auto else '--target cpu'}.", "Leave one of them out.")
    if target is not None:
        if auto or dry_run:
            raise UsageError("--target cpu measures what it chooses; --auto and --dry-run do not.", "Give one of them.")
        page = _for_cpu(given, recipe, verbose=verbose, as_json=as_json)
        if is_opened:
            open_page(page)
        return 0
    if auto:
        if dry_run:
            raise UsageError("--dry-run is for one export, and --auto makes several.", "Ask for one of them: --fp16.")
        recommendation = _recommend(given, recipe, verbose=verbose, as_json=as_json)
        if is_opened and recommendation.chosen is not None and recommendation.chosen.bundle is not None:
            open_page(recommendation.chosen.bundle / PAGE)
        return recommendation.exit_code
    from spach_deploy.pipeline.estimate import refuse_early

    options = export_options({**given, "ray": ray_cluster(given["ray"])}, recipe)
    if dry_run:
        return _dry_run(options, is_cached=not no_cache, as_json=as_json)
    destination = refuse_early(options)
    if options.quantization.cluster is not None:
        options.quantization.cluster.check()
    page = _export(options, destination, is_cached=not no_cache, verbose=verbose, as_json=as_json)
    if is_opened:
        open_page(page)
    return 0


def _is_zoo(given: Mapping[str, Any]) -> bool:
    """Whether --zoo was given. UsageError for an option that needs --zoo."""
    if given["zoo"] is not None:
        return True
    if given["precision_list"] is not None:
        raise UsageError("--precision is for --zoo.", "Give --zoo PATTERNS, or one precision as --fp16.")
    if given["jobs"] is not None:
        raise UsageError("--jobs is for --zoo.", "Leave it out.")
    return False


def _export(
    options: ExportOptions, destination: Destination | None, *, is_cached: bool, verbose: bool, as_json: bool
) -> Path:
    """Export, or take the same export from the cache, and print the result. Returns the path of the bundle's page.

    torch is imported only if there is something to export. Ctrl-C at any time says what was kept.
    """
    from spach_deploy.pipeline.cache import ExportCache
    from spach_deploy.pipeline.estimate import target_directory

    with ending_on_interrupt(what_is_kept(target_directory(options))):
        cache = ExportCache.of(options, is_used=is_cached)
        if (reused := cache.take(options, destination)) is not None:
            show(_of_reused(reused, as_json=as_json))
            return reused.bundle.path / PAGE
        from spach_deploy.pipeline.scheduler import scheduler_here

        with scheduler_here() as scheduler:
            from spach_deploy.cli.reporting import ProgressDisplay, summary
            from spach_deploy.pipeline.export import export

            with ProgressDisplay(verbose=verbose) as progress:
                result = export(options, progress, destination=destination, scheduler=scheduler)
        show(summary(result, as_json=as_json))
        if problem := cache.keep(result.bundle):
            say(problem)
    return result.bundle.path / PAGE


def _dry_run(options: ExportOptions, *, is_cached: bool, as_json: bool) -> int:
    """Print what an export would do. Returns the exit code of the first refusal, or 0."""
    from spach_deploy.cli.reporting import as_text
    from spach_deploy.pipeline.estimate import dry_run

    plan = dry_run(options, is_cached=is_cached)
    show(as_text(plan, as_json=as_json))
    return plan.exit_code


def _of_reused(reused: Reused, *, as_json: bool) -> str:
    """The summary of a bundle that came from the cache."""
    manifest = reused.bundle.manifest
    if as_json:
        return json_text(manifest.content())
    model, precision, validation = manifest.model.name, manifest.precision.asked.value, manifest.validation
    return escaped(
        [
            f"reused     {model} {precision}, exported {reused.exported}: the same weights,",
            "           images, options, code, packages and machine (--no-cache does it all again)",
            "checked    the SHA-256 of every file",
            f"validated  then, on {validation.image_count} images: agreed with PyTorch in FP32",
            f"           {validation.level_sentence}",
            "",
            f"Bundle: {reused.bundle.path}",
        ]
    )


def _recommend(given: dict[str, Any], recipe: Path | None, *, verbose: bool, as_json: bool) -> Recommendation:
    """Export every candidate of --auto, and print a table and a recommendation."""
    options = _auto_options(given, recipe)
    with ending_on_interrupt(lambda: "Bundles that were finished are kept."):
        from spach_deploy.cli.reporting import ProgressDisplay
        from spach_deploy.pipeline.auto import as_table, recommend
        from spach_deploy.pipeline.scheduler import scheduler_here

        with scheduler_here() as scheduler, ProgressDisplay(verbose=verbose) as progress:
            found = recommend(options, progress, scheduler)
        show(json_text(found.to_dict()) if as_json else as_table(found))
    return found


def _auto_options(given: Mapping[str, Any], recipe: Path | None) -> ExportOptions:
    """Options that all candidates of --auto share. UsageError where a precision is given too."""
    if (precision := one_precision(given["precision"])) is not None:
        raise UsageError(f"--auto chooses the precision, and --{precision} does too.", "Give one of them.")
    options = export_options({**given, "precision": "int8"}, recipe)
    from spach_deploy.pipeline.auto import check_auto, options_for
    from spach_deploy.pipeline.estimate import refuse_early

    check_auto(options)
    refuse_early(options_for(options, Precision.FP16))
    return options


def _for_cpu(given: dict[str, Any], recipe: Path | None, *, verbose: bool, as_json: bool) -> Path:
    """Measure the candidates of --target cpu and write the best. Returns the path of the bundle's page."""
    options, requested = _cpu_options(given, recipe)
    with ending_on_interrupt(lambda: "Nothing was written."):
        from spach_deploy.cli.reporting import ProgressDisplay
        from spach_deploy.pipeline.cpu_target import as_table, export_for_cpu
        from spach_deploy.pipeline.scheduler import scheduler_here

        with scheduler_here() as scheduler, ProgressDisplay(verbose=verbose) as progress:
            choice = export_for_cpu(options, requested, progress, progress.measuring, scheduler)
        show(json_text(choice.bundle.manifest.content()) if as_json else as_table(choice))
    return choice.bundle.path / PAGE


def _cpu_options(given: Mapping[str, Any], recipe: Path | None) -> tuple[ExportOptions, Precision | None]:
    """Options that all candidates of --target cpu share, and the requested precision, None for all candidates."""
    from spach_deploy.pipeline.cpu_target import check_cpu

    requested = one_precision(given["precision"])
    shared = requested or ("int8" if given["calibration"] is not None else "fp32")
    options = export_options({**given, "precision": shared}, recipe)
    precision = None if requested is None else Precision(requested)
    check_cpu(options, precision)
    return options, precision


def _list(as_json: bool) -> int:
    from spach_deploy.cli.reporting import models_as_json, models_as_table

    show(models_as_json() if as_json else models_as_table())
    return 0


def _list_rewrites() -> int:
    from spach_deploy.cli.reporting import rewrites_as_table

    show(rewrites_as_table())
    return 0


if __name__ == "__main__":
    main()
