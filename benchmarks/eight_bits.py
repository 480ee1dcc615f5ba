"""Which layers pay in eight bits on TensorRT for RTX: kernels and bytes of the compiler's own schedule.

    python -m benchmarks.eight_bits [STACK_OR_MODEL ...] [--precision int8] [--gpu sm89]

Every kind of layer (linear layers by place, convolutions, attention) stays in half or goes into eight bits: alone,
with one weight scale for each channel or one for all, and by stage where it pays; of a stack of a few blocks
(`benchmarks.forms`) in all combinations. Before them: what spach-export takes (`quantization.paying`), and all that its
other rules allow. Scales are made up: they do not change the schedule.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.forms import CLASSES, SIZE, STACKS
from benchmarks.kernels import BATCH
from benchmarks.results import record, table
from spach_deploy.blocks import rewrite
from spach_deploy.common.errors import SpachError
from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.graph.editing import tensor_of
from spach_deploy.graph.export import export_canonical
from spach_deploy.graph.passes import TENSORRT_PASSES, apply_passes
from spach_deploy.graph.passes.tokens_first import part_weights
from spach_deploy.graph.precision.typed_graph import type_graph
from spach_deploy.models.demo import load_demo_weights
from spach_deploy.models.outputs import SelectableOutputs
from spach_deploy.models.registry import create_model
from spach_deploy.models.spach import Spach
from spach_deploy.options.gpus import parse_gpus
from spach_deploy.options.specs import EngineTarget, Precision
from spach_deploy.quantization.formats import EightBitFormat, eight_bits
from spach_deploy.quantization.paying import paying
from spach_deploy.quantization.plan import QuantizationPlan, QuantizedSite, QuantizedTensor
from spach_deploy.quantization.qdq import InsertQdq
from spach_deploy.quantization.quantize import mark_sites
from spach_deploy.quantization.scales import Method, weight_scales
from spach_deploy.quantization.sites import LayerKind, Selection, Site, find_sites
from spach_deploy.quantization.spelt_quantize import spell_quantizers
from spach_deploy.runtime.onnxruntime_runner import save_model

CHANNEL, TENSOR = "channel", "tensor"
HEAD = "head"
MODELS = ("ms_hybrid_s", "ms_conv_s", "trans_s", "ms_mlp_s")
_LINEAR = (LayerKind.LINEAR, LayerKind.TOKEN_LINEAR)

Choice = dict[str, str]
"""By module in eight bits: `CHANNEL` or `TENSOR`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler makes of a choice. `layers`: how many are in eight bits."""

    name: str
    layers: int
    kernels: int
    bytes_moved: int
    attentions: int

    def cells(self) -> list[object]:
        """As a line of the table."""
        return [self.name, self.layers, self.kernels, f"{self.bytes_moved / 1e6:,.1f}", self.attentions]


class Subject:
    """A model's FP32 graph, as an export of its layers in half precision makes it, and its sites."""

    def __init__(self, name: str, form: EightBitFormat, target: EngineTarget) -> None:
        self.name, self.form, self.target = name, form, target
        model = _model(name)
        self._graph = export_canonical(rewrite(model).model, model.architecture.image_size[0])
        self.sites = {site.module: site for site in find_sites(self._graph)}
        self.kinds = collections.defaultdict[str, list[str]](list)
        for site in self.sites.values():
            self.kinds[kind_of(site)].append(site.module)

    def is_linear(self, module: str) -> bool:
        """Whether a site is a linear layer, of channels or tokens."""
        return self.sites[module].kind in _LINEAR

    def default(self) -> Choice:
        """All layers that the rules by kind allow."""
        reasons = Selection().chosen(tuple(self.sites.values()), self.form)
        return {site.module: CHANNEL for site in self.sites.values() if not reasons[site.node]}

    def paying(self) -> Choice:
        """Those of them that spach-export takes for these GPUs."""
        known = paying(self._graph, tuple(self.sites.values()), self.target.gpus)
        return {module: how for module, how in self.default().items() if module in known}

    def row(self, name: str, choice: Choice, *, spelt: bool = True) -> Row | None:
        """Build with the layers of `choice` in eight bits; None where the compiler refuses."""
        try:
            found = self._facts(choice, spelt=spelt)
        except SpachError as error:
            print(f"{self.name} {name}: {error}", flush=True)
            return None
        return Row(name, len(choice), len(found.kernels), found.bytes_moved(BATCH) or 0, found.fused_attentions)

    def _facts(self, choice: Choice, *, spelt: bool) -> PlanFacts:
        model = self._graph.clone()
        plan = self._plan(choice)
        mark_sites(model, plan)
        apply_passes(model, TENSORRT_PASSES)
        part_weights(model)
        typed = InsertQdq(plan)(type_graph(model, Precision.FP16).model).model
        if spelt:
            spell_quantizers(typed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_model(typed, path)
            built = build_engine(path, self.target, TensorRTForRTX(), precision=Precision.FP16)
        found = read_plan_facts(built.plan)
        assert found is not None
        return found

    def _plan(self, choice: Choice) -> QuantizationPlan:
        sites = tuple(self._site(self.sites[module], how) for module, how in choice.items())
        return QuantizationPlan(self.form, Method.MAX, sites, (), ())

    def _site(self, site: Site, how: str) -> QuantizedSite:
        tensors = tuple(QuantizedTensor(name, 0.05, 0.05 * self.form.limit, 0.05) for name in site.measured)
        scales: tuple[float, ...] = ()
        if site.weight:
            weight = tensor_of(self._graph.graph.initializers[site.weight]).numpy()
            found = weight_scales(weight, self.form, per_channel=how == CHANNEL)
            scales = tuple(np.asarray(found, np.float16).astype(float).reshape(-1).tolist())
        numbers = (site.macs, tensors, site.weight, scales, (), site.products)
        return QuantizedSite(site.module, site.node, site.kind, *numbers)


def _model(name: str) -> SelectableOutputs:
    made = Spach(STACKS[name].replace(image_size=SIZE, classes=CLASSES)) if name in STACKS else create_model(name)
    load_demo_weights(made)
    return made.eval()


def kind_of(site: Site) -> str:
    """A site's place in its block: its path without the numbers of stage and block."""
    parts = [part for part in site.module.split(".") if not part.isdigit()]
    return HEAD if site.is_head else ".".join([re.sub(r"\d+$", "", parts[0]), *parts[1:]])


def stage_of(module: str) -> str:
    """The network stage of a module, such as layer3."""
    return module.partition(".")[0]


def rows(subject: Subject) -> Iterator[Row | None]:
    """All rows of a subject."""
    yield subject.row("all in half", {})
    yield subject.row("all that the other rules allow", subject.default(), spelt=False)
    yield subject.row("what spach-export takes", subject.paying())
    yield subject.row("the same, QuantizeLinear not spelt out", subject.paying(), spelt=False)
    yield subject.row("the same, weights per tensor", dict.fromkeys(subject.paying(), TENSOR))
    inner = [kind for kind, modules in subject.kinds.items() if kind != HEAD and subject.is_linear(modules[0])]
    yield from alone(subject, inner)
    if subject.name in STACKS:
        yield from combinations(subject, inner)
    for kind in subject.kinds:
        if kind not in inner and not _is_fp8_convolution(subject, kind):
            yield subject.row(f"{kind} alone", dict.fromkeys(subject.kinds[kind], CHANNEL))


def _is_fp8_convolution(subject: Subject, kind: str) -> bool:
    site = subject.sites[subject.kinds[kind][0]]
    is_convolution = site.kind in (LayerKind.CONVOLUTION, LayerKind.DEPTHWISE)
    return subject.form.name == "fp8" and is_convolution


def combinations(subject: Subject, kinds: list[str]) -> Iterator[Row | None]:
    """Every combination of two kinds or more, with a scale for each channel."""
    for count in range(2, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, count):
            choice = {module: CHANNEL for kind in chosen for module in subject.kinds[kind]}
            yield subject.row(", ".join(chosen), choice)


def alone(subject: Subject, kinds: list[str]) -> Iterator[Row | None]:
    """Every kind alone, and every stage of one that pays."""
    half = subject.row("", {})
    for kind, how in itertools.product(kinds, (CHANNEL, TENSOR)):
        modules = subject.kinds[kind]
        found = subject.row(f"{kind} alone, per {how}", dict.fromkeys(modules, how))
        yield found
        stages = sorted(set(map(stage_of, modules)))
        if how == CHANNEL and len(stages) > 1 and found and half and found.bytes_moved < half.bytes_moved:
            for stage in stages:
                part = [module for module in modules if stage_of(module) == stage]
                yield subject.row(f"{kind} of {stage} alone, per {how}", dict.fromkeys(part, how))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=[*STACKS, *MODELS])
    parser.add_argument("--precision", choices=["int8", "fp8"], default="int8")
    parser.add_argument("--gpu", default="sm89")
    parser.add_argument("--brief", action="store_true", help="only the first three rows of every subject")
    arguments = parser.parse_args()
    form = eight_bits(Precision(arguments.precision))
    assert form is not None
    parts = []
    for name in arguments.subjects:
        subject = Subject(name, form, EngineTarget(gpus=parse_gpus(arguments.gpu)))
        lines = []
        for found in itertools.islice(rows(subject), 3 if arguments.brief else None):
            if found is not None:
                lines.append(found.cells())
                print(name, *lines[-1], sep=" | ", flush=True)
        headings = (f"{name}: in eight bits", "layers", "kernels", "MB", "attentions fused")
        parts.append(table(headings, lines))
    kind = ", brief" if arguments.brief else ""
    subjects = ", ".join(arguments.subjects)
    title = f"Which layers in eight bits, {arguments.precision}, {arguments.gpu}{kind}: {subjects}"
    body = f"MB moved at batch {BATCH}; scales made up.\n\n" + "\n\n".join(parts)
    record(title, " ".join(["python -m benchmarks.eight_bits", *sys.argv[1:]]), body, ("torch", "tensorrt-rtx"))


if __name__ == "__main__":
    main()
