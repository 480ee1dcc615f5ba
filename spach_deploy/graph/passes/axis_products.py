"""Linear layers along both axes of a grid and over channels (sMLPNet) without a concatenation, for TensorRT.

    y = F_0 z + F_1 (P z along rows) + F_2 (Q z along columns)

Products over channels and over pixels commute, so the product with all of F comes first, one Gemm to 3C channels. Its
result (B, H, W, 3C) is (B, H, 3W, C) without a move, where one product with a matrix (W, 3W) or (2W, 3W) sums over
columns and parts at once:

    first = F_0 z + P (F_1 z), second = F_2 z        (2W, 3W), to (B, H, 2, W, C), which is (B, 2H, W*C)
    y = first + Q second                             (H, 2H)

On small grids both are one product with a matrix (H*W, 3*H*W): a kernel less, for more multiplications than needed.
The concatenation that this saves is a copy of 3C channels, as large as fuse's input. smlpnet_tiny in FP16: 223 kernels
and 1,275 MB at batch 8 with it.

The biases of P and Q are the same for every image: b (rows of F_1 summed), and so for Q. Quantized layers stay apart.
For other runtimes, which copy faster than they multiply, `separate_axes` takes it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spach_deploy.graph.editing import (
    NodeWriter,
    array_of,
    constant,
    ints_of,
    is_marked_quantized,
    maker,
    name_of,
    operand,
    owner,
    reader,
    remove_unused_initializers,
    replace_nodes,
    shapes_at_batch_one,
    unused_name,
)

NAME = "axis_products"

SMALL_GRID = 14 * 14
"""Pixels up to which one product over all of them is made."""

Float64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A product along one axis: its nodes, weight (N, N) and bias (N, 1)."""

    nodes: tuple[ir.Node, ...]
    weight: Float64
    bias: Float64


@dataclasses.dataclass(frozen=True)
class _Mixing:
    """The nodes that make y of z, (B, H, W, C). `parts`: of `fuse`'s weight (C, C), for z, rows and columns."""

    z: ir.Value
    rows: _Axis
    columns: _Axis
    parts: tuple[Float64, Float64, Float64]
    nodes: tuple[ir.Node, ...]
    grid: tuple[int, int]


def axis_products(model: ir.Model) -> tuple[str, ...]:
    """Rewrite every such mixing, in place; returns the names of the layers over channels."""
    graph, shapes = model.graph, shapes_at_batch_one(model)
    gemms = [node for node in graph if node.op_type == "Gemm"]
    found = {gemm: mixing for gemm in gemms if (mixing := _mixing(gemm, shapes)) is not None}
    for gemm, mixing in found.items():
        replace_nodes(mixing.nodes, _products(graph, owner(name_of(gemm)), mixing))
        for node in (*mixing.rows.nodes, *mixing.columns.nodes):
            graph.remove(node, safe=True)
    remove_unused_initializers(graph)
    return tuple(name_of(gemm) for gemm in found)


def _mixing(fuse: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Mixing | None:
    """The mixing whose layer over channels is `fuse`; None where its nodes are others, or are quantized."""
    weight, readers = array_of(fuse.inputs[1]), fuse.outputs[0].consumers()
    rows = _maker(fuse, "Reshape")
    concat = None if rows is None else _maker(rows, "Concat")
    if concat is None or rows is None or weight is None or len(concat.inputs) != 3 or len(fuse.inputs) != 2:
        return None
    if (
        is_marked_quantized(fuse)
        or not fuse.attributes.get_int("transB", 0)
        or [n.op_type for n in readers] != ["Reshape"]
    ):
        return None
    z = operand(concat, 0)
    shape = shapes.get(name_of(z), ())
    axes = [_axis(concat, index, z) for index in (1, 2)]
    if len(shape) != 4 or axes[0] is None or axes[1] is None or weight.shape != (shape[3], 3 * shape[3]):
        return None
    _, height, width, channels = shape
    along = {
        shapes[name_of(axis.nodes[-1].outputs[0])][2]: index for index, axis in enumerate(axes) if axis is not None
    }
    if {*along} != {channels, width * channels}:
        return None
    order = (along[channels], along[width * channels])
    pieces = np.split(weight.astype(np.float64), 3, axis=1)
    first, second = axes[order[0]], axes[order[1]]
    assert first is not None
    assert second is not None
    parts = (pieces[0], pieces[1 + order[0]], pieces[1 + order[1]])
    return _Mixing(z, first, second, parts, (concat, rows, fuse, readers[0]), (height, width))


def _axis(concat: ir.Node, index: int, z: ir.Value) -> _Axis | None:
    """The product that makes input `index` of `concat` of `z`: Reshape, MatMul, Add, Reshape."""
    back = _maker(concat, "Reshape", index)
    addition = None if back is None else _maker(back, "Add")
    product = None if addition is None else _maker(addition, "MatMul")
    into = None if product is None else _maker(product, "Reshape", 1)
    if back is None or addition is None or product is None or into is None or operand(into, 0) is not z:
        return None
    weight, bias = array_of(product.inputs[0]), array_of(addition.inputs[1])
    nodes = (into, product, addition, back)
    alone = all(len(node.outputs[0].uses()) == 1 for node in nodes)
    if weight is None or bias is None or not alone or is_marked_quantized(product) or weight.ndim != 2:
        return None
    if weight.shape[0] != weight.shape[1] or bias.shape != (len(weight), 1):
        return None
    return _Axis(nodes[::-1], weight.astype(np.float64), bias.astype(np.float64))


def _maker(node: ir.Node, op_type: str, index: int = 0) -> ir.Node | None:
    """The node that makes input `index` of `node`, if it is an `op_type`."""
    value = node.inputs[index]
    made = None if value is None else value.producer()
    return made if made is not None and made.op_type == op_type else None


def _products(graph: ir.Graph, path: str, mixing: _Mixing) -> list[ir.Node]:
    """Nodes that make (B, H, W, C) of z, the last with the mixing's result."""
    (height, width), channels = mixing.grid, len(mixing.parts[0])
    writer = NodeWriter(path)

    def stored(label: str, value: Float64) -> ir.Value:
        return constant(graph, f"{path}.{label}", value.astype(np.float32))

    def shaped(label: str, value: ir.Value, *shape: int) -> ir.Value:
        stored_shape = constant(graph, f"axis_products.{'x'.join(map(str, shape))}", [-1, *shape])
        return writer.add("Reshape", label, value, stored_shape)

    rows = shaped("rows", mixing.z, channels)
    mixed = writer.add("Gemm", "channels", rows, stored("parts", np.concatenate(mixing.parts)), transB=1)
    matrices = _stored_matrices(mixing)
    if len(matrices) == 1:
        pixels = shaped("pixels", mixed, 3 * height * width, channels)
        y = writer.add("MatMul", "along_both", stored("both", matrices[0]), pixels)
    else:
        row, column = matrices
        y = writer.add("MatMul", "along_rows", stored("row", row), shaped("by_row", mixed, 3 * width, channels))
        columns = shaped("by_column", y, 2 * height, width * channels)
        y = writer.add("MatMul", "along_columns", stored("column", column), columns)
    y = shaped("grid", y, height, width, channels)
    row_bias = mixing.rows.bias * mixing.parts[1].sum(axis=1)
    column_bias = mixing.columns.bias * mixing.parts[2].sum(axis=1)
    y = writer.add("Add", "row_bias", y, stored("row_bias", row_bias))
    writer.add("Add", "column_bias", y, stored("column_bias", column_bias[:, None]))
    return writer.nodes


def _stored_matrices(mixing: _Mixing) -> list[Float64]:
    """The matrices as the graph holds them: one for both axes on a small grid, else one for each."""
    height, width = mixing.grid
    first, second = _matrices(mixing)
    if height * width <= SMALL_GRID:
        return [np.einsum("ahj,jbwk->abhwk", second, first).reshape(height * width, -1)]
    return [first.reshape(2 * width, 3 * width), second.reshape(height, 2 * height)]


def _matrices(mixing: _Mixing) -> tuple[Float64, Float64]:
    """Along rows, (2, W, W, 3): first = part 0 + P part 1, second = part 2. Along columns, (H, H, 2): first + Q second.

    The axes are those of the result, then those that are summed over.
    """
    (height, width) = mixing.grid
    same, none = np.eye(width), np.zeros((width, width))
    along_rows = np.stack([np.stack([same, mixing.rows.weight, none], -1), np.stack([none, none, same], -1)])
    return along_rows, np.stack([np.eye(height), mixing.columns.weight], -1)


def separate_axes(model: ir.Model) -> tuple[str, ...]:
    """Write such mixings as they were, in place: one layer along each axis, concatenated, and one over channels; names
    of the layers over channels.

    P, Q and F are entries of the matrices that `axis_products` made, so nothing is rounded; matrices that hold anything
    else stay. The biases stay behind the sum.
    """
    graph, shapes = model.graph, shapes_at_batch_one(model)
    gemms = [node for node in graph if node.op_type == "Gemm"]
    found = {gemm: joined for gemm in gemms if (joined := _joined(gemm, shapes)) is not None}
    for joined in found.values():
        replace_nodes(joined.nodes, _separate(graph, joined))
    remove_unused_initializers(graph)
    return tuple(name_of(gemm) for gemm in found)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """What `axis_products` wrote for z, (B, H, W, C): its nodes up to the grid, and the weights in them."""

    path: str
    z: ir.Value
    nodes: tuple[ir.Node, ...]
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    fuse: NDArray[np.float32]


def _joined(gemm: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> _Joined | None:
    """The mixing whose layer over channels is `gemm`; None where its nodes or matrices are others."""
    try:
        rows = maker(gemm, 0, "Reshape")
        first = reader(reader(gemm, "Reshape"), "MatMul")
        parts, shape = array_of(gemm.inputs[1]), shapes.get(name_of(rows.inputs[0]), ())
        if parts is None or len(shape) != 4 or parts.shape != (3 * shape[3], shape[3]) or len(gemm.inputs) != 2:
            return None
        _, height, width, channels = shape
        products = [first]
        after = reader(first, "Reshape")
        if height * width > SMALL_GRID:
            products.append(reader(after, "MatMul"))
            after = reader(products[-1], "Reshape")
    except LookupError:
        return None
    matrices = [array_of(node.inputs[0]) for node in products]
    axes = _axes([matrix for matrix in matrices if matrix is not None], height, width)
    if axes is None or ints_of(after.inputs[1]) != [-1, height, width, channels]:
        return None
    between = [reader(product, "Reshape") for product in products[:-1]]
    nodes = (rows, gemm, reader(gemm, "Reshape"), *products, *between, after)
    fuse = np.ascontiguousarray(np.concatenate(np.split(parts, 3), axis=1))
    return _Joined(owner(name_of(gemm)), operand(rows, 0), nodes, *axes, fuse)


def _axes(
    matrices: list[NDArray[np.float32]], height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """P (W, W) and Q (H, H) in the matrices of `_products`; None where those are not made of such."""
    if height * width <= SMALL_GRID:
        if len(matrices) != 1 or matrices[0].shape != (height * width, 3 * height * width):
            return None
        both = matrices[0].reshape(height, width, height, width, 3)
        rows, columns = both[0, :, 0, :, 1], both[:, 0, :, 0, 2]
    else:
        if [matrix.shape for matrix in matrices] != [(2 * width, 3 * width), (height, 2 * height)]:
            return None
        rows = matrices[0].reshape(2, width, width, 3)[0, :, :, 1]
        columns = matrices[1].reshape(height, height, 2)[:, :, 1]
    none = np.zeros((0, 0))
    again = _Mixing(
        z=ir.val("z"),
        rows=_Axis((), rows.astype(np.float64), none),
        columns=_Axis((), columns.astype(np.float64), none),
        parts=(none, none, none),
        nodes=(),
        grid=(height, width),
    )
    made = _stored_matrices(again)
    is_same = all(np.array_equal(matrix, one.astype(np.float32)) for matrix, one in zip(matrices, made, strict=True))
    return (np.ascontiguousarray(rows), np.ascontiguousarray(columns)) if is_same else None


def _separate(graph: ir.Graph, joined: _Joined) -> list[ir.Node]:
    """Nodes that make (B, H, W, C) of z, without the biases along the axes."""
    height, width, channels = len(joined.columns), len(joined.rows), len(joined.fuse)
    writer, grid = NodeWriter(joined.path), (height, width, channels)

    def shaped(label: str, value: ir.Value, *shape: int) -> ir.Value:
        stored_shape = constant(graph, f"axis_products.{'x'.join(map(str, shape))}", [-1, *shape])
        return writer.add("Reshape", label, value, stored_shape)

    def along(label: str, matrix: NDArray[np.float32], *shape: int) -> ir.Value:
        stored = constant(graph, unused_name(graph, f"{joined.path}.{label}"), matrix)
        product = writer.add("MatMul", label, stored, shaped(f"{label}_view", joined.z, *shape))
        return shaped(f"{label}_grid", product, *grid)

    mixed = (along("rows", joined.rows, width, channels), along("columns", joined.columns, height, width * channels))
    concatenated = writer.add("Concat", "concat", joined.z, *mixed, axis=3)
    fuse = constant(graph, unused_name(graph, f"{joined.path}.weight"), joined.fuse)
    y = writer.add("Gemm", "Gemm", shaped("pixels", concatenated, 3 * channels), fuse, transB=1)
    shaped("grid", y, *grid)
    return writer.nodes
