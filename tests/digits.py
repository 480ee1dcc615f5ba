"""Small SPACH models that really classify: scikit-learn's handwritten digits (1,797 pictures, carried in its wheel).

They show what a precision costs in accuracy. A clean small model keeps its accuracy under almost any quantization, so
each can be made hard, as large trained transformers are by nature: a few channels much larger than the rest, by changes
that leave the function as it was in exact arithmetic (`with_layer_norm_outliers`, `with_value_outliers`). Beside them
stand the peers: onnxruntime's static quantization with the settings TensorRT takes, and with its plain defaults.

Training is repeatable (one thread, fixed seeds) and done once: weights lie in a cache folder that processes share.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, load_model_from_string
from PIL import Image
from torch import nn
from torch.nn import functional as F

from spach_deploy.blocks import rewrite
from spach_deploy.bundle.outputs import INPUT, LOGITS
from spach_deploy.common.machine import torch_threads
from spach_deploy.data.preprocess import normalize, pixels
from spach_deploy.graph.editing import as_proto
from spach_deploy.graph.export import export_canonical
from spach_deploy.models.spach import Attention, MixingBlock, Spach
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import Precision, Preprocessing
from spach_deploy.runtime.onnxruntime_runner import OnnxRuntimeRunner
from tests.protos import rounded_graph, type_graph
from tests.shared import alone
from tests.static_models import architecture

IMAGE_SIZE, CLASSES, FOLDS = 16, 10, 5
PREPROCESSING = Preprocessing(image_size=IMAGE_SIZE, resize_size=IMAGE_SIZE)
CALIBRATION_IMAGES = 64


def _architecture(stages: str, heads: int = 0) -> Architecture:
    return architecture(32, 2, 2, stages, heads=heads, image_size=(IMAGE_SIZE, IMAGE_SIZE), classes=CLASSES)


ARCHITECTURES: dict[str, Architecture] = {
    "conv": _architecture("5 conv"),
    "trans": _architecture("5 trans", heads=2),
    "mlp": _architecture("5 mlp"),
    # Two stages, as the published hybrids have four: a downsampling convolution between them.
    "hybrid": _architecture("2 conv | 1 conv, 2 trans", heads=2),
}
MIXINGS = tuple(ARCHITECTURES)

Images = NDArray[np.float32]
Logits = NDArray[np.float32]
Quantize = Callable[[Spach, Images], ModelProto]
Spoil = Callable[[Spach], Spach]
Run = Callable[[ModelProto, Images], Logits]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the models are trained. Weight decay spares one-dimensional parameters and gamma_1."""

    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    batch: int = 32
    epochs: int = 16
    warm_up_epochs: int = 2
    largest_shift: int = 2
    clip: float = 1.0
    seed: int = 0


RECIPE = Recipe()


@functools.cache
def images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All pictures, uint8 RGB (1797, 16, 16, 3), and their digits, int64 (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
    enlarged = [pixels(Image.fromarray(picture), PREPROCESSING) for picture in grey]
    return np.stack(enlarged), digits.target.astype(np.int64)


def normalized(pictures: NDArray[np.uint8]) -> Images:
    """uint8 RGB (N, 16, 16, 3) -> float32 (N, 3, 16, 16), as the evaluation transform does it."""
    return normalize(pictures, PREPROCESSING)


@functools.cache
def _folds() -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
    from sklearn.model_selection import StratifiedKFold

    split = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return tuple(split.split(*images()))


def fold(k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and of the test pictures of fold `k`, stratified; the five test parts are everything."""
    return _folds()[k]


def calibration_images(k: int, count: int = CALIBRATION_IMAGES) -> Images:
    """`count` training pictures of fold `k`, float32 (count, 3, 16, 16); always the same."""
    chosen = np.random.default_rng(k).choice(fold(k)[0], count, replace=False)
    return normalized(images()[0][chosen])


def train(mixing: str, k: int, recipe: Recipe = RECIPE) -> Spach:
    """The model of `mixing` trained on fold `k`, in evaluation mode; from the cache where it is there."""
    path = cache_folder(recipe) / f"{mixing}-{k}.pt"
    with alone(path), torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Spach(ARCHITECTURES[mixing])
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            _initialize(model)
            _fit(model, fold(k)[0], recipe)
            _save(model, path)
    return model.eval()


def cache_folder(recipe: Recipe = RECIPE) -> Path:
    """Where weights are kept: below SPACH_DIGITS_CACHE or a temporary folder of this user's, by recipe, shapes and
    torch version.
    """
    own = Path(tempfile.gettempdir()) / f"spach-digits-{os.getuid()}"
    root = Path(os.environ.get("SPACH_DIGITS_CACHE") or own)
    key = hashlib.sha256(repr((recipe, ARCHITECTURES, torch.__version__)).encode()).hexdigest()[:16]
    return root / key


def _save(model: Spach, path: Path) -> None:
    """Whole or not at all: a killed process must not leave half a model."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(model.state_dict(), file)
    os.replace(file.name, path)


def _initialize(model: Spach) -> None:
    """The published initialisation is for wide models: with 32 channels its small values cost many epochs."""
    for name, parameter in model.named_parameters():
        if name.endswith("gamma_1"):
            nn.init.constant_(parameter, 0.1)
        elif parameter.ndim == 2 and not name.startswith("head"):
            nn.init.xavier_uniform_(parameter)


def _fit(model: Spach, indices: NDArray[np.int64], recipe: Recipe) -> None:
    rng = np.random.default_rng(recipe.seed)
    batches_per_epoch = len(indices) // recipe.batch
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / batches_per_epoch, recipe))
    labels = images()[1]
    model.train()
    for _ in range(recipe.epochs):
        order = rng.permutation(indices)[: batches_per_epoch * recipe.batch]
        for chosen in order.reshape(-1, recipe.batch):
            batch = torch.from_numpy(_shifted(chosen, recipe.largest_shift, rng))
            loss = F.cross_entropy(model(batch), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()


def _optimizer(model: Spach, recipe: Recipe) -> torch.optim.AdamW:
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith("gamma_1")]
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("gamma_1")]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _rate(epoch: float, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to zero."""
    if epoch < recipe.warm_up_epochs:
        return (epoch + 0.01) / (recipe.warm_up_epochs + 0.01)
    progress = (epoch - recipe.warm_up_epochs) / (recipe.epochs - recipe.warm_up_epochs)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _shifted(chosen: NDArray[np.int64], largest: int, rng: np.random.Generator) -> Images:
    """Those pictures, each moved by up to `largest` pixels in both directions over black, normalized."""
    shifts = rng.integers(0, 2 * largest + 1, size=(2, len(chosen)))
    moved = _windows(largest)[chosen, shifts[0], shifts[1]]  # (B, 3, S, S)
    return normalized(np.ascontiguousarray(moved.transpose(0, 2, 3, 1)))


@functools.cache
def _windows(largest: int) -> NDArray[np.uint8]:
    """Every shift of every picture, as a view (N, 2L + 1, 2L + 1, 3, S, S)."""
    padded = np.pad(images()[0], ((0, 0), (largest, largest), (largest, largest), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (IMAGE_SIZE, IMAGE_SIZE), axis=(1, 2))


def with_layer_norm_outliers(model: Spach, scale: float, channels: int = 3) -> Spach:
    """A copy in which some channels of each block's LayerNorms are `scale` times as large, and the weights that read
    them as much smaller: norm1 and qkv where there is attention, norm2 and fc1 everywhere. The same function.
    """
    spoiled = copy.deepcopy(model)
    for path, block in _blocks(spoiled):
        pairs = [(block.norm2, block.channel_func.fc1)]
        if block.has_spatial and isinstance(block.spatial_func, Attention):
            pairs.append((block.norm1, block.spatial_func.qkv))
        for index, (norm, linear) in enumerate(pairs):
            chosen = _channels(f"{path}/{index}", norm.weight.numel(), channels)
            norm.weight.data[chosen] *= scale
            norm.bias.data[chosen] *= scale
            linear.weight.data[:, chosen] /= scale
    return spoiled


def with_value_outliers(model: Spach, scale: float, channels: int = 3) -> Spach:
    """A copy in which some value channels of each attention are `scale` times as large, and the projection's columns
    that read them as much smaller. The same function; the model itself where there is no attention.
    """
    spoiled = copy.deepcopy(model)
    for path, block in _blocks(spoiled):
        if not block.has_spatial or not isinstance(block.spatial_func, Attention):
            continue
        qkv, proj = block.spatial_func.qkv, block.spatial_func.proj
        chosen = _channels(path, proj.in_features, channels)
        rows = 2 * proj.in_features + chosen  # query, key, value
        qkv.weight.data[rows] *= scale
        qkv.bias.data[rows] *= scale
        proj.weight.data[:, chosen] /= scale
    return spoiled


def _blocks(model: Spach) -> Iterator[tuple[str, MixingBlock]]:
    return ((path, block) for path, block in model.named_modules() if isinstance(block, MixingBlock))


def _channels(name: str, width: int, count: int) -> torch.Tensor:
    """Which channels: by the layer's name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.choice(width, count, replace=False))


def canonical(model: Spach, *, quantized: bool = True) -> ModelProto:
    """The canonical FP32 graph of `model`, rewritten as for eight bits or for a half precision; the caller's to change.

    Kept by weights: exporting takes seconds.
    """
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    key = f"{hashlib.sha256(weights).hexdigest()} {quantized}"
    if key not in _exported:
        static = rewrite(model, quantized=() if quantized else None).model
        _exported[key] = as_proto(export_canonical(static, model.architecture.image_size[0])).SerializeToString()
    return load_model_from_string(_exported[key])


_exported: dict[str, bytes] = {}

_WEIGHTED = ["Conv", "MatMul", "Gemm"]


def naive_int8(model: Spach, calibration: Images) -> ModelProto:
    """onnxruntime's static quantization with the settings TensorRT takes, weights per channel: the baseline to beat."""
    from onnxruntime.quantization import QuantType

    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "OpTypesToExcludeOutputQuantization": _WEIGHTED,
    }
    return _quantized(
        model,
        calibration,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=_WEIGHTED,
        extra_options=options,
    )


def everything_int8(model: Spach, calibration: Images) -> ModelProto:
    """onnxruntime's static quantization as it comes: every operator it knows, weights per tensor."""
    return _quantized(model, calibration)


def naive_fp16(model: Spach, calibration: Images) -> ModelProto:
    """Everything in half that the format's rules allow, whatever the ranges."""
    return type_graph(canonical(model), Precision.FP16).model


def _quantized(model: Spach, calibration: Images, **options: Any) -> ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            canonical(model),
            path,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod.MinMax,
            **options,
        )
        return onnx.load(path)


class _Batches:
    """What onnxruntime's calibrators read from."""

    def __init__(self, images: Images, size: int = 32) -> None:
        self._feeds = iter([{INPUT: images[start : start + size]} for start in range(0, len(images), size)])

    def get_next(self) -> dict[str, Images] | None:
        return next(self._feeds, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """quantize_static advises a preprocessing that our graphs had already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def logits(graph: ModelProto, batch: Images) -> Logits:
    """Logits (n, 10) of `graph` for (n, 3, 16, 16). Its nodes run as they stand, Q and DQ in floating point: what the
    graph says, whatever integer kernels this CPU has.
    """
    with OnnxRuntimeRunner(graph.SerializeToString(), threads=1, optimization="none", max_batch=60) as runner:
        return np.asarray(runner.run({INPUT: batch})[LOGITS], np.float32)


def rounded_logits(graph: ModelProto, batch: Images) -> Logits:
    """Logits (n, 10) of a half graph, every half tensor rounded to its format and infinite beyond it, as on a GPU."""
    return logits(rounded_graph(graph), batch)


def torch_logits(model: Spach, batch: Images) -> Logits:
    """Logits (n, 10) of the PyTorch model."""
    with torch_threads(1), torch.inference_mode():
        result: Logits = model(torch.from_numpy(batch)).numpy()
    return result


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Over the test parts of all folds that ran. Accuracies in percent; `flipped` predictions differ from FP32's;
    `relative_l2` is of all logits together.
    """

    images: int
    accuracy: float
    fp32_accuracy: float
    flipped: int
    relative_l2: float

    @property
    def loss(self) -> float:
        """Points of accuracy lost against FP32."""
        return self.fp32_accuracy - self.accuracy


def clean(model: Spach) -> Spach:
    """The model as it was trained."""
    return model


def cross_validate(
    mixing: str,
    quantize: Quantize,
    *,
    spoil: Spoil = clean,
    run: Run = logits,
    folds: int = FOLDS,
    calibration: int = CALIBRATION_IMAGES,
) -> CrossValidation:
    """Quantize the model of each fold, made hard by `spoil`, on pictures it was trained on; judge on the others.

    The reference is the trained model as it was, in PyTorch and FP32. `run` evaluates a graph.
    """
    pictures, labels = images()
    found, expected, truth = [], [], []
    for k in range(folds):
        test = fold(k)[1]
        model = train(mixing, k)
        batch = normalized(pictures[test])
        expected.append(torch_logits(model, batch))
        found.append(run(quantize(spoil(model), calibration_images(k, calibration)), batch))
        truth.append(labels[test])
    return compare(np.concatenate(found), np.concatenate(expected), np.concatenate(truth))


def compare(found: Logits, expected: Logits, truth: NDArray[np.int64]) -> CrossValidation:
    """Logits (N, 10) against FP32's and the true digits (N,)."""
    predicted, reference = found.argmax(axis=1), expected.argmax(axis=1)
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    return CrossValidation(
        images=len(truth),
        accuracy=100 * float(np.mean(predicted == truth)),
        fp32_accuracy=100 * float(np.mean(reference == truth)),
        flipped=int(np.sum(predicted != reference)),
        relative_l2=float(difference / np.linalg.norm(expected.astype(np.float64))),
    )
