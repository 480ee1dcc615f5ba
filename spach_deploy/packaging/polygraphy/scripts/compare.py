"""The verdict of spach-validate for polygraphy run --compare-func-script: relative L2 image by image, by bounds.json.

Polygraphy's own comparison asks how far single numbers are apart. How far an image's outputs are, and whether any class
changes, is another question, and it is the one that the bounds of a bundle answer.
"""

import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent


def compare_outputs(first, second):
    """Whether each output of `second` is within its bound of `first`'s, output by output; order does not matter."""
    bounds = json.loads((HERE / "bounds.json").read_text())
    return {name: compared(name, first[name], second[name], bounds.get(name)) for name in first if name in second}


def compared(name, reference, value, bound):
    """Equal for integers, which are indices of classes; else relative L2, where a bound is known."""
    reference, value = np.asarray(reference), np.asarray(value)
    if reference.shape != value.shape:
        print(f"{name}: {value.shape} against {reference.shape}")
        return False
    if bound is None or reference.dtype.kind in "iu":
        share = float((reference == value).mean())
        print(f"{name}: {share:.2%} equal")
        return bound is None or share == 1.0
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    norms = np.linalg.norm(reference.reshape(len(reference), -1), axis=1)
    errors = np.linalg.norm((value - reference).reshape(len(reference), -1), axis=1) / np.maximum(norms, 1e-30)
    worst = float(errors.max())
    print(f"{name}: relative L2 {worst:.2e} in the worst image, {bound['rel_l2']:.2e} allowed")
    return bool(worst <= bound["rel_l2"])  # false for what is not a number
