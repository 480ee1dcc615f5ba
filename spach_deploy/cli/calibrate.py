"""spach-calibrate: scales for a quantized export, made once and kept in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import ComputingCommand, command, ray_cluster, show
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import click_options
from spach_deploy.options.specs import size_in_words
from spach_deploy.options.table import CALIBRATE

if TYPE_CHECKING:
    from spach_deploy.common.files import Destination
    from spach_deploy.quantization.calibration import Calibration


@click.command("spach-calibrate", cls=ComputingCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click_options(CALIBRATE)
@command
def main(output: Path, verbose: bool, as_json: bool, **given: Any) -> int:
    """Calibrate: run images through the model in FP32 and keep the scales that an 8-bit export needs.

    \b
    spach-calibrate --model ms_hybrid_s --calibration photos/ -o ms_hybrid_s.json
    spach-export --model ms_hybrid_s --int8 --calibration ms_hybrid_s.json

    The file names what it depends on: weights, layers, preprocessing, method and images. An export refuses one that
    does not fit. A run that was killed goes on where it was when it is started again.

    Exit codes: 0 done, 2 bad usage or input, 3 this machine cannot do it.
    """
    from spach_deploy.cli.interrupts import ending_on_interrupt
    from spach_deploy.models.registry import check_spec
    from spach_deploy.options.quantization import check_calibration_file, check_quantization
    from spach_deploy.options.recipe import calibrate_options

    options = calibrate_options({**given, "ray": ray_cluster(given["ray"])})
    check_spec(options.model)
    check_quantization(options)
    destination = check_calibration_file(output)
    with ending_on_interrupt(lambda: "What was done is kept; the same command goes on from there."):
        _calibrate(options, destination, verbose=verbose, as_json=as_json)
    return 0


def _calibrate(options: Any, destination: Destination, *, verbose: bool, as_json: bool) -> None:
    from spach_deploy.cli.reporting import ProgressDisplay
    from spach_deploy.pipeline.export import calibrate_to_file
    from spach_deploy.pipeline.scheduler import scheduler_here

    with scheduler_here() as scheduler, ProgressDisplay(verbose=verbose) as progress:
        calibration = calibrate_to_file(options, destination, progress, scheduler=scheduler)
    if as_json:
        show(json_text(calibration.summary()))
    else:
        show(escaped(_lines(calibration, destination.path)))


def _lines(calibration: Calibration, output: Path) -> Iterator[str]:
    plan, survey = calibration.plan, calibration.survey
    yield f"model        {calibration.key.model}, {size_in_words(calibration.key.image_size)} px"
    yield f"images       {calibration.images}: {calibration.source}"
    yield f"pixels       mean {_rgb(survey['channel_mean'])}, standard deviation {_rgb(survey['channel_std'])}"
    if survey["class_counts"]:
        counts = list(survey["class_counts"].values())
        covered = sum(count > 0 for count in counts)
        yield f"classes      {covered} of {len(counts)}, {min(counts)} to {max(counts)} images each"
    yield f"layers       {len(plan.sites)} in {plan.form.name}, {plan.macs_share:.1%} of multiplications"
    changed = [pair for pair in plan.equalized if pair.alpha is not None]
    yield f"equalized    {len(changed)} of {len(plan.equalized)} pairs"
    yield f"time         {calibration.seconds:.1f} s"
    yield ""
    yield f"Calibration: {output} ({output.stat().st_size / 1e3:,.0f} kB)"


def _rgb(values: Any) -> str:
    return " ".join(f"{value:.1f}" for value in values) + f" ({'RGB, ' if len(values) == 3 else ''}0 to 255)"


if __name__ == "__main__":
    main()
