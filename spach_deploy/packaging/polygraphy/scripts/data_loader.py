"""Inputs for polygraphy run --data-loader-script: the golden images, batch by batch."""

import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent


def load_data():
    """Yield {input's name: (n, ...)} for every batch, in the order of inputs.json and outputs.json."""
    with np.load(HERE / "golden.npz", allow_pickle=False) as golden:
        inputs = {name[len("input.") :]: golden[name] for name in golden.files if name.startswith("input.")}
        batches = golden["batches"]
    for batch in batches:
        chosen = [index for index in batch if index >= 0]
        yield {name: np.ascontiguousarray(array[chosen]) for name, array in inputs.items()}
