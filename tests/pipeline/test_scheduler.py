"""When steps run: at once or in a worker process, with the same results, errors and bytes; and the worker's end."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

from spach_deploy.common.errors import MissingPackageError
from spach_deploy.options.specs import Precision, QuantizationSpec
from spach_deploy.pipeline.export import export
from spach_deploy.pipeline.scheduler import Overlapped, Scheduler, Sequential
from tests.engine.test_builder import children, is_gone
from tests.quantization.small_quantized import options


def process() -> int:
    return os.getpid()


def add(one: int, other: int) -> int:
    return one + other


def divide(one: int, other: int) -> float:
    return one / other


def described(values: list[torch.Tensor]) -> list[tuple[object, ...]]:
    """What is to be the same of tensors in both processes, whether two are one, and that they can be written to."""
    same = [one is other for one in values for other in values]
    found = [
        (type(value), value.dtype, value.shape, value.stride(), value.requires_grad, value.double().tolist())
        for value in values
    ]
    for value in values:
        value.detach().zero_()
    return [*found, tuple(same)]


def tensors() -> list[torch.Tensor]:
    whole = torch.arange(24.0).reshape(2, 3, 2, 2)
    parameter = nn.Parameter(whole[0].clone())
    return [
        *(
            whole,
            parameter,
            parameter,
            nn.Parameter(torch.ones(2), requires_grad=False),
            torch.tensor(3),
            torch.ones(0),
        ),
        *(whole.to(memory_format=torch.channels_last), whole.mT.clone().mT, whole.half(), whole.bfloat16(), whole > 3),
    ]


def refuse() -> None:
    raise MissingPackageError("onnxruntime", "Adding", "pip install 'spach-deploy[cpu]'")


def die(parent: int) -> int:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


@pytest.mark.parametrize("kind", [Sequential, Overlapped])
def test_a_step_waits_for_those_whose_results_it_takes(kind: type[Sequential] | type[Overlapped]) -> None:
    with _entered(kind) as scheduler:
        three = scheduler.submit(add, 1, 2)
        assert scheduler.submit(add, three, three).result() == 6


@pytest.mark.parametrize("kind", [Sequential, Overlapped])
def test_an_error_of_a_step_comes_with_its_hint_and_its_kind(kind: type[Sequential] | type[Overlapped]) -> None:
    with _entered(kind) as scheduler:
        failed = scheduler.submit(refuse)
        with pytest.raises(MissingPackageError, match=r"Adding needs .*spach-deploy\[cpu\]") as caught:
            failed.result()
        assert caught.value.exit_code == 3
        with pytest.raises(MissingPackageError):  # and so does whatever takes its result
            scheduler.submit(add, failed, 1).result()


def test_tensors_come_to_the_other_process_as_they_are() -> None:
    with Overlapped() as scheduler:
        assert scheduler.submit(described, tensors()).result() == described(tensors())
        assert scheduler.submit(tensors).result()[1].equal(tensors()[1])
        assert scheduler.submit(process).result() != os.getpid()  # it did not run here for want of the other


def test_an_overlapped_step_runs_in_another_process_which_ends_with_the_block() -> None:
    with Overlapped() as scheduler:
        pid = scheduler.submit(process).result()
        assert pid != os.getpid()
        assert pid in children()
    assert is_gone(pid)


def test_a_step_of_a_worker_that_dies_is_done_here() -> None:
    with Overlapped() as scheduler:
        assert scheduler.submit(die, os.getpid()).result() == 7
        assert scheduler.submit(process).result() == os.getpid()


def test_a_fault_in_a_step_is_raised_here_and_printed_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with Overlapped() as scheduler, pytest.raises(ZeroDivisionError):
        scheduler.submit(divide, 1, 0).result()
    assert capfd.readouterr() == ("", "")


def test_work_of_another_process_is_waited_for_where_steps_run_one_after_another() -> None:
    done: Future[int] = Future()
    Overlapped().started(done)  # returns
    done.set_result(1)
    Sequential().started(done)
    Sequential().started(None)


@pytest.mark.usefixtures("small_model_registered")
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_an_export_gives_the_same_bytes_however_its_steps_run(precision: Precision, tmp_path: Path) -> None:
    made = {}
    for kind in (Sequential, Overlapped):
        output = tmp_path / kind.__name__
        with _entered(kind) as scheduler:
            spec = None if precision.is_quantized else QuantizationSpec()
            export(options(precision, output, spec), scheduler=scheduler)
        files = {file.name: file.read_bytes() for file in output.iterdir()}
        made[kind] = {name: content for name, content in files.items() if name in SAME}
    assert "model.onnx" in made[Sequential]
    assert made[Sequential] == made[Overlapped]


SAME = ("model.onnx", "golden.npz", "quantization.json", "sensitivity.svg")
"""Of what is in a bundle; manifest and report name times and where it lies."""


def _entered(kind: type[Sequential] | type[Overlapped]) -> contextlib.AbstractContextManager[Scheduler]:
    return Overlapped() if kind is Overlapped else contextlib.nullcontext(Sequential())
