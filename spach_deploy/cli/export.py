"""spach-export: from a checkpoint to a bundle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.bundle.store import PAGE
from spach_deploy.cli import options as opt
from spach_deploy.cli.console import ComputingCommand, command, say, show
from spach_deploy.cli.interrupts import ending_on_interrupt
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.specs import Flavour, IODtype

if TYPE_CHECKING:
    from spach_deploy.common.files import Destination
    from spach_deploy.options.specs import ExportOptions
    from spach_deploy.pipeline.auto import Recommendation
    from spach_deploy.pipeline.cache import Reused


_ANSWERS = "Inputs and logits that your own code computed: the model is held to them before anything else."


@click.command("spach-export", cls=ComputingCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--list", "show_list", is_flag=True, help="Show all models and end.")
@click.option("--list-rewrites", is_flag=True, help="Show the names that --no-rewrite takes and end.")
@click.option("--recipe", type=opt.FILE, metavar="FILE", help="TOML recipe; the command line wins over it.")
@click.option("--model", metavar="NAME", help="Model, such as ms_hybrid_s; inferred from the checkpoint if one fits.")
@opt.checkpoint
@opt.weights
@opt.ignore
@click.option("--image-size", type=click.IntRange(min=1), metavar="PIXELS", help="Side of the square input.  [224]")
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N", help="Classes; inferred from a checkpoint.")
@opt.hyperparameters
@opt.answers(_ANSWERS)
@click.option("--fp32", "precisions", flag_value="fp32", multiple=True, help="Single precision (the default).")
@click.option("--fp16", "precisions", flag_value="fp16", multiple=True, help="Half precision, islands in FP32.")
@click.option("--bf16", "precisions", flag_value="bf16", multiple=True, help="bfloat16, islands in FP32.")
@click.option("--int8", "precisions", flag_value="int8", multiple=True, help="8-bit integers; needs --calibration.")
@click.option("--fp8", "precisions", flag_value="fp8", multiple=True, help="8-bit floats (E4M3), from sm89 on.")
@click.option("--auto", is_flag=True, help="Export fp16, int8 and fp8, compare them and recommend one.")
@opt.target
@opt.many
@opt.calibration
@opt.calibration_cache
@opt.scales
@opt.bounds
@opt.images
@click.option("--io-dtype", type=click.Choice([d.value for d in IODtype]), help="What the caller sends.  [fp32]")
@click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="Add the K best values and their indices.")
@click.option("--softmax/--no-softmax", default=None, help="Add probabilities.")
@click.option("--opset", type=click.IntRange(min=1), metavar="N", help="The graph's opset.  [20; fp8 21, bf16 22]")
@click.option("--engine", type=click.Choice([f.value for f in Flavour]), help="Which TensorRT builds.  [auto]")
@click.option("--gpu", metavar="LIST", help="GPUs, such as sm86,sm89 or rtx4090,l4; default: all from Ampere on.")
@click.option("--batch", metavar="MIN:OPT:MAX", help="Batch sizes the engine accepts, or one number.  [1:8:32]")
@click.option("--opt-level", type=click.IntRange(0, 5), help="The builder's optimization level.")
@click.option("--workspace", metavar="SIZE", help="The builder's scratch memory, such as 2G or 512M.")
@click.option("--timing-cache", type=opt.FILE, metavar="FILE", help="Keep tactic timings here (TensorRT).")
@click.option("--tf32/--no-tf32", default=None, help="Allow TF32 in FP32 matrix products.  [--tf32]")
@click.option(
    "--version-compatible/--no-version-compatible", default=None, help="Plan for later TensorRT versions too."
)
@click.option("--hardware-compatible/--no-hardware-compatible", default=None, help="Plan for other Ampere+ GPUs too.")
@click.option("--no-rewrite", multiple=True, metavar="NAME", help="Leave a rewrite out; may be repeated.")
@click.option("-o", "--output", type=opt.FILE, metavar="DIR", help="The bundle.  [build/MODEL-PRECISION]")
@click.option("--overwrite/--no-overwrite", default=None, help="Replace an earlier bundle in the same place.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, what it would take and what would be refused.")
@click.option("--no-cache", is_flag=True, help="Do it all again, though the same export was done before.")
@click.option("-v", "--verbose", is_flag=True, help="Show what each stage did, its time and memory.")
@click.option("--open", "is_opened", is_flag=True, help="Open the report's page in a browser when it is done.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead of the summary.")
@opt.debug
@opt.version
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
    from spach_deploy.cli.early_checks import refuse_early
    from spach_deploy.cli.export_options import export_options, is_zoo
    from spach_deploy.cli.reporting import check_can_open, open_page

    if is_opened:
        check_can_open()
    if is_zoo(given):
        from spach_deploy.cli.zoo import ZooRequest, zoo

        many = {"ray": given["ray"], "jobs": given["jobs"]}
        asked = ZooRequest(auto=auto, dry_run=dry_run, no_cache=no_cache, as_json=as_json, **many)
        code, page = zoo(given, recipe, asked)
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
        found = _recommend(given, recipe, verbose=verbose, as_json=as_json)
        if is_opened and found.chosen is not None and found.chosen.bundle is not None:
            open_page(found.chosen.bundle / PAGE)
        return found.exit_code
    options = export_options({**given, "cluster": given["ray"]}, recipe)
    if dry_run:
        return _dry_run(options, is_cached=not no_cache, as_json=as_json)
    place = refuse_early(options)
    if options.quantization.cluster is not None:
        from spach_deploy.distributed.cluster import check_address

        check_address(options.quantization.cluster)
    page = _export(options, place, is_cached=not no_cache, verbose=verbose, as_json=as_json)
    if is_opened:
        open_page(page)
    return 0


def _export(
    options: ExportOptions, place: Destination | None, *, is_cached: bool, verbose: bool, as_json: bool
) -> Path:
    """Export and print; the bundle's page. Ctrl-C says what was kept, from before torch is loaded to the last line.

    The same export that was done before comes from the cache, before torch is loaded.
    """
    from spach_deploy.cli.keeping import TargetBefore
    from spach_deploy.pipeline.cache import ExportCache

    with ending_on_interrupt(TargetBefore.of(options).sentence):
        cache = ExportCache.of(options, is_used=is_cached)
        if (reused := cache.take(options, place)) is not None:
            show(_of_reused(reused, as_json=as_json))
            return reused.bundle.path / PAGE
        from spach_deploy.cli.garbage import not_searched_while_loading
        from spach_deploy.pipeline.ahead import Ahead

        with contextlib.ExitStack() as stack:
            with not_searched_while_loading():
                ahead = stack.enter_context(Ahead(options.engine.flavour))
                from spach_deploy.cli.export_output import Progress, summary
                from spach_deploy.pipeline.export import export

            with Progress(verbose=verbose) as progress:
                result = export(options, progress, place=place, ahead=ahead)
        show(summary(result, as_json=as_json))
        if problem := cache.keep(result.bundle):
            say(problem)
    return result.bundle.path / PAGE


def _dry_run(options: ExportOptions, *, is_cached: bool, as_json: bool) -> int:
    """Print the plan of work; the exit code that the export would begin with."""
    from spach_deploy.cli.export_output import as_text
    from spach_deploy.pipeline.estimate import dry_run

    found = dry_run(options, is_cached=is_cached)
    show(as_text(found, as_json=as_json))
    return found.exit_code


def _of_reused(reused: Reused, *, as_json: bool) -> str:
    """What is said of a bundle that was not made again."""

    manifest = reused.bundle.manifest
    if as_json:
        return json_text(manifest.content)
    validation = manifest.content["validation"]
    return escaped(
        [
            f"reused     {manifest.model['name']} {manifest.precision}, exported {reused.exported}: the same weights,",
            "           images, options, code, packages and machine (--no-cache does it all again)",
            "checked    the SHA-256 of every file",
            f"validated  then, on {validation['image_count']} images: agreed with PyTorch in FP32",
            f"           {validation['level_sentence']}",
            "",
            f"Bundle: {reused.bundle.path}",
        ]
    )


def _recommend(given: dict[str, Any], recipe: Path | None, *, verbose: bool, as_json: bool) -> Recommendation:
    """Every candidate exported, one table, one recommendation."""

    from spach_deploy.cli.export_options import auto_options
    from spach_deploy.cli.interrupts import ending_on_interrupt

    options = auto_options(given, recipe)
    with ending_on_interrupt(lambda: "Bundles that were finished are kept."):
        from spach_deploy.cli.export_output import Progress
        from spach_deploy.pipeline.auto import as_table, recommend

        with Progress(verbose=verbose) as progress:
            found = recommend(options, progress)
        show(json_text(found.to_dict()) if as_json else as_table(found))
    return found


def _for_cpu(given: dict[str, Any], recipe: Path | None, *, verbose: bool, as_json: bool) -> Path:
    """Candidates measured, the best written; its page."""

    from spach_deploy.cli.export_options import cpu_options

    options, asked = cpu_options(given, recipe)
    with ending_on_interrupt(lambda: "Nothing was written."):
        from spach_deploy.cli.export_output import Progress
        from spach_deploy.pipeline.cpu_target import as_table, export_for_cpu

        with Progress(verbose=verbose) as observer:
            choice = export_for_cpu(options, asked, observer)
        show(json_text(choice.bundle.manifest.content) if as_json else as_table(choice))
    return choice.bundle.path / PAGE


def _list(as_json: bool) -> int:
    from spach_deploy.cli.export_output import models_as_json, models_as_table

    show(models_as_json() if as_json else models_as_table())
    return 0


def _list_rewrites() -> int:
    from spach_deploy.cli.export_output import rewrites_as_table

    show(rewrites_as_table())
    return 0


if __name__ == "__main__":
    main()
