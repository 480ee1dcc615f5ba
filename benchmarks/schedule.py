"""The kernels of a SPACH model's plan by what they compute, with the reason why each is a kernel of its own.

    python -m benchmarks.schedule [MODEL] [--precision fp16] [--gpu sm89]

Kinds of kernels are told by the ONNX nodes that the compiler put into each (`engine.plan_facts`). The reasons are ours:
what kernels of that kind can do, and what TensorRT for RTX 1.7.1 made of the other forms that were tried.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys

from benchmarks.kernels import BATCH, facts, formed
from benchmarks.results import record, table
from spach_deploy.engine.plan_facts import KernelFact
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.registry import create_model
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision


@dataclasses.dataclass(frozen=True)
class Rule:
    """Kernels of a kind (a pattern) with an ONNX node that `nodes` matches: what they are, and why they remain."""

    kind: str
    nodes: str
    what: str
    why: str


RULES = (
    Rule("attention", "", "attention", "both products and the softmax in one; reads q, k and v where they lie"),
    Rule(
        "gemm", r"channel_func\.fc1/", "fc1, bias, GELU", "its result is read by every tile of fc2: no kernel has both"
    ),
    Rule(
        "gemm", r"channel_func\.fc2/", "fc2, bias, residual", "the norm after it needs whole rows, a product has tiles"
    ),
    Rule("gemm", r"spatial_func\.qkv/", "query, key, value", "one batched product; attention has no product before it"),
    Rule("gemm", r"spatial_func\.proj/", "projection, bias", "attention's heads lie in different kernel blocks"),
    Rule("gemm", r"spatial_func\.fc\d/", "spatial MLP's product", "as of the channels' MLP"),
    Rule("gemm", r"^head/", "head", "the mean before it is over all tokens"),
    Rule("convolution", r"^stem", "stem's convolution", "convolutions take no epilogue of these norms"),
    Rule("convolution", "", "downsampling's convolution", "the GroupNorm after it is over the whole image"),
    Rule(
        ".*", r"^stem|^io/|^norm1/", "before the first block", "input to FP16 and channels of 4; LayerNorm in two parts"
    ),
    Rule(
        ".*", r"net\.1\.1/", "GroupNorm", "statistics over the image: two levels, each a pass that waits for all blocks"
    ),
    Rule(".*", r"cpe_net", "residual, depthwise, LayerNorm", "one pass over the stream: neighbours, then whole rows"),
    Rule(".*", r"/LayerNormalization$", "LayerNorm", "whole rows; a product has tiles, and no statistics beside them"),
    Rule(".*", r"layer\d+\.0/|/Transpose$", "channels first", "the convolution of a downsampling reads images so"),
    Rule(".*", "", "residual, mean, casts", "before pooling and head"),
)


def rule_of(kernel: KernelFact) -> Rule:
    """The first rule that knows the kernel."""
    for rule in RULES:
        known = not rule.nodes or any(re.search(rule.nodes, node) for node in kernel.layers)
        if re.fullmatch(rule.kind, kernel.kind) and known:
            return rule
    sys.exit(f"No rule knows {kernel.name} ({kernel.kind}) of {', '.join(kernel.layers)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="ms_hybrid_s")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--gpu", default="sm89")
    arguments = parser.parse_args()
    model = create_model(arguments.model)
    load_demo_weights(model)
    found = facts(formed(model), Precision(arguments.precision), EngineTarget(gpus=parse_gpus(arguments.gpu)))
    work = None if found is None else found.work(BATCH)
    if found is None or work is None:
        sys.exit("The plan's schedule could not be read.")
    groups = collections.defaultdict[Rule, list[int]](list)
    for kernel, done in zip(found.kernels, work, strict=True):
        groups[rule_of(kernel)].append(done.bytes)
    total = sum(map(sum, groups.values()))
    rows = [
        [rule.what, len(moved), f"{sum(moved) / 1e6:,.1f}", f"{sum(moved) / total:.0%}", rule.why]
        for rule, moved in sorted(groups.items(), key=lambda entry: -sum(entry[1]))
    ]
    body = f"{len(found.kernels)} kernels, {total / 1e6:,.0f} MB at batch {BATCH}.\n\n"
    body += table(("what", "kernels", "MB", "share", "why a kernel of its own"), rows)
    print(body)
    title = f"Kernel by kernel, {arguments.model}, {arguments.precision}, {arguments.gpu}"
    command = f"python -m benchmarks.schedule {arguments.model} --precision {arguments.precision} --gpu {arguments.gpu}"
    record(title, command, body, ("torch", "tensorrt-rtx"))


if __name__ == "__main__":
    main()
