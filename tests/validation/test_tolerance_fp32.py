from __future__ import annotations

import numpy as np
import pytest

from spach_deploy.common.errors import MismatchError
from spach_deploy.validation.tolerance import Fp32Reference, check_equal, prove_equal, rounding_limit

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
LOGITS = IMAGES.reshape(3, -1)[:, :10].copy()
REFERENCE = Fp32Reference({"logits": LOGITS}, {"logits": rounding_limit(5e-7)})


def answer(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"logits": images.reshape(len(images), -1)[:, :10].copy()}


def test_batches_take_other_images_each_and_wrap_around() -> None:
    seen: list[np.ndarray] = []

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(images)
        return answer(images)

    assert prove_equal("model", run, IMAGES, REFERENCE, (1, 2, 1)) == {1: 0.0, 2: 0.0}
    assert [len(batch) for batch in seen] == [1, 2, 1]
    assert np.array_equal(seen[2], IMAGES[:1])


def test_a_model_that_is_wrong_at_one_batch_size_is_refused() -> None:
    with pytest.raises(MismatchError, match="The static model differs from the reference model at batch 2"):
        prove_equal(
            "static model",
            lambda x: {"logits": answer(x)["logits"] * np.float32(1 + 2e-5 * (len(x) == 2))},
            IMAGES,
            REFERENCE,
            (1, 2),
        )


def test_what_is_not_a_number_is_refused() -> None:
    spoilt = LOGITS.copy()
    spoilt[1, 1] = np.nan
    with pytest.raises(MismatchError):
        check_equal("graph", {"logits": spoilt}, REFERENCE)


def test_rounding_passes() -> None:
    assert check_equal("graph", {"logits": LOGITS * np.float32(1 + 1e-6)}, REFERENCE) < 2e-6


def test_what_is_rounding_follows_from_the_noise_that_was_measured() -> None:
    off = {"logits": LOGITS * np.float32(1 + 8e-6)}
    assert check_equal("graph", off, REFERENCE) > 7e-6
    with pytest.raises(MismatchError, match=r"at most 5\.0e-06 is rounding"):
        check_equal("graph", off, Fp32Reference({"logits": LOGITS}, {"logits": rounding_limit(2.5e-7)}))


def test_where_no_noise_was_seen_a_rounding_is_allowed_all_the_same() -> None:
    reference = Fp32Reference({"logits": LOGITS}, {"logits": rounding_limit(0.0)})
    assert check_equal("graph", {"logits": np.nextafter(LOGITS, np.float32(9))}, reference) > 0
