from __future__ import annotations

import random
from pathlib import Path

import pytest

from spach_deploy.engine.build import build_engine
from spach_deploy.engine.flavours import TensorRTForRTX
from spach_deploy.engine.plan_facts import PlanFacts, read_plan_facts
from spach_deploy.options.specs import BatchProfile, EngineTarget, Flavour, Precision
from spach_deploy.runtime.devices import is_installed
from tests.engine import tiny_graphs

pytestmark = pytest.mark.skipif(not is_installed(Flavour.TENSORRT_RTX), reason="tensorrt-rtx is not installed")


def build(path: Path, precision: Precision = Precision.FP16) -> bytes:
    target = EngineTarget(batch=BatchProfile(1, 2, 4))
    return build_engine(path, target, TensorRTForRTX(), precision=precision).plan


@pytest.fixture(scope="module")
def mlp_plan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tiny_graphs.mlp(tmp_path_factory.mktemp("mlp") / "mlp.onnx", "fp32"), Precision.FP32)


def facts_of(plan: bytes) -> PlanFacts:
    facts = read_plan_facts(plan)
    assert facts is not None
    return facts


def test_kernels_carry_the_names_of_their_nodes(mlp_plan: bytes) -> None:
    first, second = facts_of(mlp_plan).kernels
    assert first.kind == second.kind == "gemm"
    assert set(first.layers) == {"block.fc1", "block.act"}  # the GELU is the first product's epilogue
    assert set(second.layers) == {"block.fc2", "cast_out"}


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_bytes_moved_are_those_that_arithmetic_gives(mlp_plan: bytes, batch: int) -> None:
    row, matrix, factors = 64 * 4, 64 * 64 * 4, 4 * 4  # x, h or y; weights; alpha and beta of both products
    moved = facts_of(mlp_plan).bytes_moved(batch)
    assert moved == 4 * row * batch + 2 * matrix + factors


def test_a_fused_attention_is_counted(tmp_path: Path) -> None:
    facts = facts_of(build(tiny_graphs.attention(tmp_path / "attention.onnx")))
    assert facts.fused_attentions == 1
    assert facts.kernels_by_kind["attention"] == 1
    (kernel,) = (kernel for kernel in facts.kernels if kernel.kind == "attention")
    assert set(kernel.layers) == {"attn.scores", "attn.softmax", "attn.values"}


SCHEDULE = """header { version = 5 shape_inputs={ "n{odd}" } }
descriptors {
  tensor={ dims={ "b" 4 } name="x" type=half }
  tensor={ dims={ "twice" 4 } name="y" type=float }
  tensor={ dims={ } name="scalar" type=int64 }
}
main {
 label bb1:
  shape_call={ name="shapes" }
  function={ name=__myl_TranResh input_args={ "x" "scalar" } output_args={ "y" }
             layers="[ONNX Layer: a]\x1f[ONNX Layer: b]" }
  corrltn={ name="conv" output={"y" } input={"y" } layers="" }
}
shape_main {
  copy={ name="c" output={"b" } input={"n{odd}" } speculate={ } }
  mul={ name="m" output={"twice" } input={"b" "__s^2i64" } }
  assert={ name=check input={"b" } msg="a { brace
in a string" }
}
"""


def plan_with(text: str) -> bytes:
    data = text.encode()
    return b"vtrt and so on NLYM" + bytes(4) + len(data).to_bytes(4, "little") + bytes(4) + data + bytes(9)


def test_reads_a_schedule_written_by_hand() -> None:
    facts = facts_of(plan_with(SCHEDULE))
    assert [(kernel.kind, kernel.layers) for kernel in facts.kernels] == [("move", ("a", "b")), ("convolution", ())]
    x_bytes, y_bytes = 3 * 4 * 2, 2 * 3 * 4 * 4
    assert facts.bytes_moved(3) == x_bytes + 3 * y_bytes


@pytest.mark.parametrize(
    ("statement", "is_kernel"),
    [
        ('cast={ name="offset" output={"address" } input={"scalar" } }', False),
        ('signal={ name="first" }', False),
        ('wait={ name="second" }', False),
        ('cast={ name="rounded" output={"y" } input={"x" } }', True),
        ('news={ name="unknown" output={"elsewhere" } input={"x" } }', True),
    ],
)
def test_what_a_host_computes_is_no_kernel(statement: str, is_kernel: bool) -> None:
    on_host = 'tensor={ dims={ 1 } name="address" region="hmem_topdown_2" type=int64 }\n}\nmain {'
    text = SCHEDULE.replace("}\nmain {", on_host).replace(" label bb1:", statement)
    assert len(facts_of(plan_with(text)).kernels) == 2 + is_kernel


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("type=half", "type=quarter"),
        ("main {", "other {"),
        ("descriptors {", "descriptors { {"),
        ("name=__myl_TranResh ", ""),
        ("dims={ }", ""),
        ('"n{odd}" }', '"n{odd}" "m" }'),
    ],
)
def test_an_unexpected_schedule_is_not_known(known: str, unknown: str) -> None:
    assert read_plan_facts(plan_with(SCHEDULE.replace(known, unknown, 1))) is None


@pytest.mark.parametrize(
    ("known", "unknown"), [("mul=", "root="), ('"twice" 4', '"other" 4'), ('"y" }\n}', '"z" }\n}')]
)
def test_bytes_are_not_known_when_an_extent_is_not(known: str, unknown: str) -> None:
    facts = facts_of(plan_with(SCHEDULE.replace(known, unknown)))
    assert len(facts.kernels) == 2
    if known != '"y" }\n}':
        assert facts.bytes_moved(3) is None


def test_an_unknown_operand_makes_bytes_unknown() -> None:
    facts = facts_of(plan_with(SCHEDULE.replace('output_args={ "y" }', 'output_args={ "z" }')))
    assert facts.bytes_moved(3) is None


def test_extents_that_refer_to_each_other_end() -> None:
    loop = SCHEDULE.replace('input={"b" "__s^2i64" }', 'input={"twice" "__s^2i64" }')
    assert facts_of(plan_with(loop)).bytes_moved(3) is None


@pytest.mark.parametrize("plan", [b"", b"vtrt", b"NLYM", b"ftrt" + bytes(1000), b"NLYM" * 50, bytes(range(256)) * 9])
def test_no_schedule_is_not_known(plan: bytes) -> None:
    assert read_plan_facts(plan) is None


def test_damaged_plans_never_raise(mlp_plan: bytes) -> None:
    rng = random.Random(0)
    start = mlp_plan.index(b"NLYM")
    for _ in range(150):
        damaged = bytearray(mlp_plan[: rng.randrange(start, len(mlp_plan))] if rng.random() < 0.3 else mlp_plan)
        for _ in range(rng.randrange(1, 30)):
            damaged[rng.randrange(start, len(damaged))] = rng.randrange(256)
        facts = read_plan_facts(bytes(damaged))
        if facts is not None:
            facts.bytes_moved(2)
            assert facts.kernels_by_kind
