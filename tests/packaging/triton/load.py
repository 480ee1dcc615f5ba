"""Many clients at once, each request with its own input: what was answered, to whom, and what failed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.packaging.triton.clients import Client
from tests.packaging.triton.server import Server


@dataclasses.dataclass
class Answers:
    """Logits by the number of the request, and errors by theirs."""

    logits: dict[int, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    errors: dict[int, Exception] = dataclasses.field(default_factory=dict)


def flood(
    server: Server,
    model: str,
    inputs: npt.NDArray[Any],
    clients: int,
    meanwhile: Callable[[Answers], None] | None = None,
) -> Answers:
    """Send `inputs` one by one from `clients` threads, half of them HTTP and half gRPC; each asks again at once."""
    answers = Answers()
    barrier = threading.Barrier(clients)

    def work(number: int) -> None:
        client = Client(server, "grpc" if number % 2 else "http")
        barrier.wait()
        try:
            for index in range(number, len(inputs), clients):
                try:
                    answers.logits[index] = client.ask(model, input=inputs[index : index + 1])["logits"]
                except Exception as error:
                    answers.errors[index] = error
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    if meanwhile is not None:
        meanwhile(answers)
    for thread in threads:
        thread.join()
    return answers


def crossed(answers: Answers, expected: npt.NDArray[np.float32], tolerance: float) -> list[int]:
    """Requests whose answer is not that of their own input."""
    return [
        index
        for index, logits in answers.logits.items()
        if logits.shape != (1, expected.shape[1]) or np.abs(logits[0] - expected[index]).max() > tolerance
    ]


def smallest_distance(expected: npt.NDArray[np.float32]) -> float:
    """Largest difference of the two answers that are most alike; larger than any tolerance, they cannot be confused."""
    distances = [
        float(np.abs(expected[index + 1 :] - expected[index]).max(axis=1).min()) for index in range(len(expected) - 1)
    ]
    return min(distances)
