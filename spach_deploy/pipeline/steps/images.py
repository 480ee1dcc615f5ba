"""Step "read images": the golden images, on which every later step is compared and which the bundle keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from spach_deploy.bundle.golden import Golden
from spach_deploy.bundle.inputs import Batch, ModelInputs
from spach_deploy.bundle.schema import TensorInfo
from spach_deploy.common.errors import ImageError
from spach_deploy.common.progress import Phases
from spach_deploy.data.images import probe_source
from spach_deploy.data.preprocess import Pixels, normalize, to_input
from spach_deploy.data.readers import ImageSource, Skipped, batches, open_images
from spach_deploy.models.checkpoint import LoadedModel
from spach_deploy.options.specs import ExportOptions, IODtype, Preprocessing

GOLDEN_IMAGES = 8
"""Number of images in the golden pack, on which every step is compared."""

GOLDEN_BYTES = 24 << 20
"""Bytes of outputs that a golden pack has at most; the feature maps of 8 images of 224 pixels take less. Of larger maps
it has fewer images, but two."""


@dataclasses.dataclass(frozen=True)
class GoldenImages:
    """The images that an export is judged on: `pixels` (N, H, W, C), `images` normalized float32 (N, C, H, W).

    `takes`: the model's inputs.
    """

    source: ImageSource
    preprocessing: Preprocessing
    names: tuple[str, ...]
    pixels: Pixels
    images: NDArray[np.float32]
    built_in: bool
    skipped: tuple[Skipped, ...] = ()
    takes: ModelInputs = dataclasses.field(default_factory=ModelInputs)

    @property
    def inputs(self) -> Batch:
        """The images and the model's other inputs, in FP32."""
        return self.takes.of(self.images)

    def engine_input(self, io_dtype: IODtype) -> Batch:
        """The inputs in the engine's format: images (N, C, H, W) float, or (N, H, W, C) uint8."""
        return self.takes.of(to_input(self.pixels, self.preprocessing, io_dtype))

    def pack(self, outputs: Mapping[str, NDArray[np.float32]], io_dtype: IODtype) -> Golden:
        """The golden pack with the reference's outputs (N, ...) by name."""
        return Golden.of(self.engine_input(io_dtype), outputs, self.names)


def golden_images(outputs: Iterable[TensorInfo]) -> int:
    """How many images a golden pack with these outputs has."""
    values = sum(math.prod(size or 1 for size in tensor.shape[1:]) for tensor in outputs)
    return min(GOLDEN_IMAGES, max(2, GOLDEN_BYTES // (4 * values)))


def read_images(options: ExportOptions, loaded: LoadedModel, phases: Phases) -> GoldenImages:
    """Eight of the user's images, spread evenly over the set, or the built-in photographs; fewer where what the model
    gives is large. ImageError without any.
    """
    preprocessing = loaded.preprocessing
    built_in, count = options.images is None, golden_images(loaded.model.outputs)
    source = probe_source(preprocessing.channels) if options.images is None else open_images(options.images)
    chosen = source.limit(count)
    parts = list(batches(chosen, preprocessing, count))
    if not parts:
        raise ImageError(f"No image could be read from {source.description}.", "Give other --images.")
    note_skipped(chosen.skipped, phases)
    pixels = np.concatenate([part.pixels for part in parts])
    if pixels.dtype != np.uint8 and options.outputs.io_dtype is IODtype.UINT8:
        raise ImageError("A graph with --io-dtype uint8 takes levels 0..255, and the images are floats.", "Save uint8.")
    names = tuple(name for part in parts for name in part.names)
    if count < GOLDEN_IMAGES:
        phases.note(f"The golden pack has {count} images: what the model gives for more is large.")
    if len(pixels) < count:
        phases.note(f"Only {len(pixels)} images to judge on; {count} or more tell more.")
    images = normalize(pixels, preprocessing)
    return GoldenImages(source, preprocessing, names, pixels, images, built_in, chosen.skipped, loaded.takes)


def note_skipped(skipped: Iterable[Skipped], phases: Phases) -> None:
    """A note for each image that could not be read, with the reason."""
    for picture in skipped:
        phases.note(f"Skipped {picture}")
