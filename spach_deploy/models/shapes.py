"""Shapes of a model's tensors, numbers of its parameters and multiply-adds, computed from its configuration.

No module is built and no torch imported: `--list` is instant, and a checkpoint can be compared with every model. Tests
compare the results with the modules themselves.
"""

from __future__ import annotations

from spach_deploy.options.architecture import CONV, MLP, TRANS, Architecture

STEM_WIDTH = 64

Shapes = dict[str, tuple[int, ...]]


def state_shapes(config: Architecture) -> Shapes:
    """Name and shape of every tensor in the model's state dict, in its order.

    Shared spatial tensors appear once per block, as they do in a state dict.
    """
    shapes = _conv_stem(config) if config.stem == "conv" else _patch_stem(config)
    shapes |= _norm("norm1", config.width)
    for name, dim, side, mixers in _stages(config):
        first = 0
        if config.multi_stage and name != config.stage_names[0]:
            shapes |= {f"{name}.0.net.1.0.weight": (dim, dim // 2, 2, 2)} | _norm(f"{name}.0.net.1.1", dim)
            first = 1
        for index, mixer in enumerate(mixers, start=first):
            shapes |= _block(f"{name}.{index}", config, mixer, dim, side * side)
    width = config.stage_dims[-1]
    return shapes | _norm("norm2", width) | _linear("head", width, config.classes)


def shared_groups(config: Architecture) -> list[list[str]]:
    """Groups of state-dict names that are one tensor, in models whose network stages share one spatial function."""
    if not config.shared:
        return []
    groups: list[list[str]] = []
    for stage, (name, mixers) in enumerate(zip(config.stage_names, config.mixers, strict=True)):
        first = 1 if stage else 0
        blocks = [f"{name}.{i}.spatial_func" for i, mixer in enumerate(mixers, start=first) if mixer == MLP]
        tensors = _linear("fc1", 1, 1) | _linear("fc2", 1, 1)
        groups += [[f"{block}.{tensor}" for block in blocks] for tensor in tensors if blocks]
    return groups


def is_buffer(name: str) -> bool:
    """Whether a state-dict name is a statistic of BatchNorm, not a parameter."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _stages(config: Architecture) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """(name, channels, grid side, mixers) of each stage."""
    sides = [side for side, _ in config.grids]
    return list(zip(config.stage_names, config.stage_dims, sides, config.mixers, strict=True))


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _batch_norm(name: str, dim: int) -> Shapes:
    statistics: Shapes = {f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)}
    return _norm(name, dim) | statistics | {f"{name}.num_batches_tracked": ()}


def _patch_stem(config: Architecture) -> Shapes:
    p = config.patch_size
    return {"stem.proj.weight": (config.width, 3, p, p), "stem.proj.bias": (config.width,)}


def _conv_stem(config: Architecture) -> Shapes:
    """Shapes of the stem (convolution, BatchNorm, ReLU) three times, then the patch convolution at index 9."""
    shapes: Shapes = {}
    for index, (inputs, kernel) in enumerate([(3, 7), (STEM_WIDTH, 3), (STEM_WIDTH, 3)]):
        shapes[f"stem.proj.{3 * index}.weight"] = (STEM_WIDTH, inputs, kernel, kernel)
        shapes |= _batch_norm(f"stem.proj.{3 * index + 1}", STEM_WIDTH)
    p = config.patch_size // 2
    return shapes | {"stem.proj.9.weight": (config.width, STEM_WIDTH, p, p), "stem.proj.9.bias": (config.width,)}


def _block(name: str, config: Architecture, mixer: str, dim: int, tokens: int) -> Shapes:
    shapes: Shapes = {}
    if mixer != CONV:
        spatial = _attention if mixer == TRANS else _spatial_mlp
        shapes[f"{name}.gamma_1"] = (1, 1, dim)
        shapes |= spatial(f"{name}.spatial_func", dim, tokens) | _norm(f"{name}.norm1", dim)
    hidden = int(dim * config.channel_ratio)
    shapes |= _linear(f"{name}.channel_func.fc1", dim, hidden) | _linear(f"{name}.channel_func.fc2", hidden, dim)
    depthwise: Shapes = {f"{name}.cpe_net.net.1.weight": (dim, 1, 3, 3), f"{name}.cpe_net.net.1.bias": (dim,)}
    return shapes | _norm(f"{name}.norm2", dim) | depthwise


def _attention(name: str, dim: int, tokens: int) -> Shapes:
    return _linear(f"{name}.qkv", dim, 3 * dim) | _linear(f"{name}.proj", dim, dim)


def _spatial_mlp(name: str, dim: int, tokens: int) -> Shapes:
    return _linear(f"{name}.fc1", tokens, tokens // 2) | _linear(f"{name}.fc2", tokens // 2, tokens)
