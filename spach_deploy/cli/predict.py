"""spach-predict: run a bundle's model on images, and print the best classes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spach_deploy.cli.console import Command, command, results_stream, say, show_answer
from spach_deploy.cli.interrupts import ending_on_interrupt
from spach_deploy.common.errors import UsageError
from spach_deploy.common.text import escaped, json_text
from spach_deploy.options.click_options import FILE, click_options
from spach_deploy.options.table import PREDICT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spach_deploy.data.images import ImageSource
    from spach_deploy.runtime.session import Prediction, Session


@click.command("spach-predict", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=FILE)
@click.argument("images", type=FILE, nargs=-1, required=True, metavar="IMAGE...")
@click_options(PREDICT)
@command
def main(bundle: Path, images: tuple[Path, ...], top_k: int | None, as_json: bool, **given: Any) -> int:
    """Say what BUNDLE's model sees in pictures: files, and folders, tars or npz files of them.

    \b
    spach-predict build/ms_hybrid_s-fp16 photo.jpg
    spach-predict build/ms_hybrid_s-fp16 photos/ --labels imagenet.txt
    spach-predict build/ms_hybrid_s-fp16 photos.tar --json > answers.jsonl

    The engine runs where it can, else the graph in ONNX Runtime or OpenVINO. With --json each picture is a line:
    {"image": NAME, "classes": [{"index": 7, "probability": 0.9, "label": NAME}, ...]}; "label" only with --labels.
    Of a bundle that gives an embedding or features, embeddings are printed as their norm and their cosine with the
    first picture's, and features as their shapes; with --json, {"embedding": [0.1, ...]} and
    {"features1": {"shape": [64, 56, 56]}} stand beside "classes", or in its place without logits.

    Exit codes: 0 done, pictures that cannot be read are named and skipped; 1 a file is not the one that was exported;
    2 bad usage or input, no picture can be read, or stdout cannot be written; 3 nothing here can run it, or not the
    runtime that was asked for.
    """
    from spach_deploy.bundle.store import Bundle
    from spach_deploy.data.readers import open_pictures
    from spach_deploy.runtime.session import Session

    session = Session(Bundle.open(bundle), **given)
    source = open_pictures(images)
    with session:
        say(f"Runs in {session.name}.")
        for note in session.notes:
            say(note)
        with contextlib.suppress(BrokenPipeError):  # who reads has enough
            _predict(session, source, top_k, as_json=as_json)
    return 0


def _predict(session: Session, source: ImageSource, top_k: int | None, *, as_json: bool) -> None:
    """Print predictions as they come, then the skipped images and the throughput."""
    done, start, first = 0, time.perf_counter(), None
    with ending_on_interrupt(lambda: f"{done} pictures were answered."), _progress(source.count) as tell:
        for prediction in session.predictions(source, top_k):
            first = first or prediction
            _write(_line(prediction) if as_json else _block(prediction, first), done)
            done += 1
            tell(done)
    seconds = time.perf_counter() - start
    for skipped in source.skipped:
        say(f"Skipped {skipped}")
    pictures = "1 picture" if done == 1 else f"{done:,} pictures"
    say(f"{pictures} in {seconds:.1f} s with reading, {done / seconds:,.1f} images/s in {session.name}.")


def _write(answer: str, done: int) -> None:
    """Print an answer. UsageError where stdout cannot be written, BrokenPipeError where nobody reads it any more."""
    try:
        show_answer(answer)
    except BrokenPipeError:
        raise
    except OSError as error:
        pictures = "1 picture was" if done == 1 else f"{done:,} pictures were"
        reason = f"Standard output cannot be written ({error.strerror})"
        raise UsageError(f"{reason}; {pictures} written.", "Send it to where there is space.") from error


def _line(prediction: Prediction) -> str:
    classes = [
        {"index": best.index, "probability": best.probability, **({} if best.label is None else {"label": best.label})}
        for best in prediction.classes
    ]
    others = {
        name: [float(value) for value in values] if values.ndim == 1 else {"shape": list(values.shape)}
        for name, values in prediction.outputs.items()
    }
    content = {"image": prediction.name, **({"classes": classes} if classes else {}), **others}
    return json_text(content, indent=None)


def _block(prediction: Prediction, first: Prediction) -> str:
    best = (f"  {best.probability:7.2%}  {best.index:>5}  {best.label or ''}".rstrip() for best in prediction.classes)
    others = (f"  {name}  {_described(values, first.outputs[name])}" for name, values in prediction.outputs.items())
    return escaped([prediction.name, *best, *others])


def _described(values: NDArray[Any], first: NDArray[Any]) -> str:
    """A vector's norm, and its cosine with the first picture's; a map's shape."""
    import numpy as np

    if values.shape == (1,):
        return f"{values[0]:.6g}"
    if values.ndim > 1:
        return " x ".join(map(str, values.shape))
    ours, theirs = values.astype(np.float64), first.astype(np.float64)
    norms = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    text = f"{len(values)} numbers, norm {norms[0]:.4g}"
    return (
        text
        if values is first or not all(norms)
        else f"{text}, cosine with the first {ours @ theirs / norms[0] / norms[1]:.4f}"
    )


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal and stdout is not."""
    if not sys.stderr.isatty() or results_stream().isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


if __name__ == "__main__":
    main()
