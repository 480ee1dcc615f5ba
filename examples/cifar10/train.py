"""Train the example's model on CIFAR-10 and write its checkpoint: `python examples/cifar10/train.py cifar10/`.

The folder has `train/CLASS/*.jpg` (50,000 pictures) and `test/CLASS/*.jpg` (10,000). README.md beside this file says
what this took and reached. A run that was ended goes on where its last epoch ended (`--state`).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spach_deploy.data.images import batches
from spach_deploy.data.readers import open_images
from spach_deploy.models import Spach
from spach_deploy.options.architecture import Architecture
from spach_deploy.options.specs import Preprocessing

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ARCHITECTURE = Architecture(
    image_size=(32, 32),
    classes=10,
    stem="conv",
    patch_size=2,
    width=48,
    stages=((("conv", 1),), (("conv", 1), ("trans", 1)), (("conv", 1), ("trans", 1)), (("trans", 1),)),
    heads=3,
    channel_ratio=2,
    mean=MEAN,
    std=STD,
    crop=1.0,
)
PREPROCESSING = Preprocessing.for_size(32, MEAN, STD, crop=1)


def args_of(architecture: Architecture) -> dict[str, Any]:
    """What tensors do not show; `spach-export` reads it in the checkpoint."""
    pixels = {"mean": architecture.mean, "std": architecture.std, "crop_pct": architecture.crop}
    heads = {"num_heads": architecture.heads} if architecture.heads else {}
    return {"input_size": architecture.image_size[0], **heads, "act_layer": "gelu", "norm_eps": 1e-6, **pixels}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`rate`, `matrix_rate`: largest learning rates of AdamW and of Muon, which gets the matrices of the blocks."""

    epochs: int = 20
    batch: int = 512
    rate: float = 3e-3
    matrix_rate: float = 0.02
    weight_decay: float = 0.05
    warm_up: float = 0.05
    smoothing: float = 0.1
    largest_shift: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pictures:
    """uint8 RGB (N, 32, 32, 3) and class indices, int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def read(cls, folder: Path) -> Pictures:
        """Those of a folder with one folder for each class, decoded as the evaluation does."""
        read = list(batches(open_images(folder), PREPROCESSING, 1000))
        pixels = torch.cat([torch.from_numpy(batch.pixels) for batch in read])
        return cls(pixels, torch.cat([torch.as_tensor(batch.labels) for batch in read]))


class Training:
    """Model, optimizers and what is left of the schedule; `step` counts batches, `seconds` the time of all runs."""

    def __init__(self, recipe: Recipe, train: Pictures, architecture: Architecture = ARCHITECTURE) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.train = recipe, train
        self.model = new_model(architecture).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        matrices, others = _parameters(self.model)
        decay = recipe.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=decay),
            torch.optim.AdamW(others, lr=recipe.rate, weight_decay=decay),
        ]
        self.rates = [recipe.matrix_rate, recipe.rate]
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """0 at the beginning, 1 at the end."""
        return min(1.0, self.step / (self.recipe.epochs * self._steps))

    @property
    def _steps(self) -> int:
        """Whole batches of an epoch, or one that is not whole."""
        return max(1, len(self.train.labels) // self.recipe.batch)

    def epoch(self) -> float:
        """Train on every picture once. The mean loss."""
        self.model.train()
        losses, began = [], time.monotonic()
        for images, labels in self._batches():
            losses.append(self._train(images, labels))
            self.step += 1
        self.seconds += time.monotonic() - began
        return sum(losses) / len(losses)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.train.labels))
        for chosen in torch.split(order, self.recipe.batch)[: self._steps]:
            yield augmented(self.train.pixels, chosen, self.recipe.largest_shift), self.train.labels[chosen]

    def _train(self, images: Tensor, labels: Tensor) -> float:
        share = _share_of_rate(self.progress, self.recipe.warm_up)
        logits = torch.func.functional_call(self.model, halved(self.model), images.bfloat16())
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """All that is needed to go on."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": states, "random": torch.get_rng_state()}
        torch.save({**state, "step": self.step, "seconds": self.seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        """Read what `save` wrote."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]


def new_model(architecture: Architecture = ARCHITECTURE) -> Spach:
    """The model before training. The published initialisation is for wide models: its small values cost many epochs."""
    model = Spach(architecture)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma_1"):
            nn.init.constant_(parameter, 0.5)
        elif parameter.ndim == 2 and not name.startswith("head"):
            nn.init.xavier_uniform_(parameter)
    return model


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the blocks, and the others."""
    named = dict(model.named_parameters())
    matrices = [name for name, value in named.items() if value.ndim == 2 and not name.startswith("head")]
    return [named[name] for name in matrices], [value for name, value in named.items() if name not in matrices]


def halved(model: nn.Module) -> dict[str, Tensor]:
    """The parameters in bfloat16, as gradients' way to them, without those of BatchNorm, which computes in float32."""
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return {n: p.bfloat16() for n, p in model.named_parameters() if n.rpartition(".")[0] not in norms}


def _share_of_rate(progress: float, warm_up: float) -> float:
    """Of the largest learning rate: up in a line, down in a line."""
    return min(1.0, (progress + 1e-3) / warm_up, (1 - progress) / (1 - warm_up))


def normalized(pixels: Tensor) -> Tensor:
    """uint8 RGB (B, 32, 32, 3) -> float32 (B, 3, 32, 32), channels last in memory."""
    return ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def augmented(pixels: Tensor, chosen: Tensor, largest: int) -> Tensor:
    """Those pictures, each moved by up to `largest` pixels both ways, its edge reflected, and half of them mirrored."""
    side, count = pixels.shape[1], len(chosen)
    places = torch.arange(side) + torch.randint(-largest, largest + 1, (2, count, 1))
    rows, columns = (side - 1) - ((side - 1) - places.abs()).abs()
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return normalized(pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]])


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: Pictures, dtype: torch.dtype = torch.float32) -> float:
    """Of the model in evaluation mode, in percent."""
    model.eval()
    right = 0
    for pixels, labels in zip(torch.split(pictures.pixels, 500), torch.split(pictures.labels, 500), strict=True):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            right += int((model(normalized(pixels)).argmax(1) == labels).sum())
    return 100 * right / len(pictures.labels)


def write_checkpoint(model: Spach, path: Path) -> None:
    """FP16 tensors, and what they do not show."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save({"model": state, "args": args_of(model.architecture)}, path)


def read_checkpoint(path: Path, architecture: Architecture = ARCHITECTURE) -> Spach:
    """The model in float32 with the values of the file."""
    model = new_model(architecture)
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model


def main() -> None:
    """Train, and say the accuracy of the file on all test pictures."""
    options = _options()
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.epochs, seed=options.seed)
    training = Training(recipe, Pictures.read(options.pictures / "train"))
    test = Pictures.read(options.pictures / "test")
    finish(training, test, options.state or options.output.with_suffix(".state"))
    write_checkpoint(training.model, options.output)
    reached = accuracy(read_checkpoint(options.output), test)
    print(f"{options.output}: {reached:.2f} % of {len(test.labels)} test pictures")


def finish(training: Training, test: Pictures, state: Path) -> None:
    """Train to the end, from where `state` stands if it exists, and say what each epoch reached."""
    if state.exists():
        training.resume(state)
    while training.progress < 1:
        loss = training.epoch()
        training.save(state)
        found = accuracy(training.model, test, torch.bfloat16)
        done, minutes = f"{training.progress:4.0%}", training.seconds / 60
        print(f"{done}  step {training.step}  loss {loss:.4f}  test {found:.2f} %  {minutes:.1f} min", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.pth"), help="the checkpoint, in FP16")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=1, help="of the processor; one makes a run repeatable")
    parser.add_argument("--state", type=Path, help="where a run can go on; by default OUTPUT with the ending .state")
    return parser.parse_args()


if __name__ == "__main__":
    main()
