"""Inner products of tensors, their rows and columns, for the methods on the sphere.

Such a merge is a sum of the models with a few factors that follow from norms and angles, which no gene changes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import blocks
from llmevo.merging.kernels.blocks import Operand, Scratch, flat, read_all
from llmevo.merging.kernels.loops import Floats, Stored, compiled, inner, narrow
from llmevo.merging.methods.base import TensorGroup


def gram(inputs: TensorGroup, origin: bool) -> NDArray[np.float64]:
    """Return the inner products (n, n), in float64, of all models' task vectors, or without `origin` their weights."""
    if not origin:
        return inputs.keep("gram", lambda: _products(blocks.weights(inputs)))
    return inputs.keep("gram", lambda: _products(blocks.task_vectors(inputs), flat(inputs.origin)))


def gram_with_base(inputs: TensorGroup) -> NDArray[np.float64]:
    """Return the inner products (n + 1, n + 1) of the base's and all models' weights, the base first."""
    return inputs.keep("gram with base", lambda: _products([Operand.of(inputs.origin), *blocks.weights(inputs)]))


def _products(operands: list[Operand], origin: Stored | None = None) -> NDArray[np.float64]:
    many = len(operands)
    pairs = [(a, b) for a in range(many) for b in range(a, many)]

    def work(start: int, stop: int, scratch: Scratch) -> list[float]:
        rows, _ = read_all(operands, origin, start, stop, scratch)
        return [inner(rows[a], rows[b]) for a, b in pairs]

    products = np.empty((many, many))
    # fsum is exact: the sum does not depend on the order of the blocks.
    sums = [math.fsum(column) for column in zip(*blocks.over_blocks(len(operands[0].stored), work), strict=True)]
    if not all(map(math.isfinite, sums)):
        raise FloatingPointError("a weight is not finite, so it has no direction")
    for (a, b), value in zip(pairs, sums or [0.0] * len(pairs), strict=True):
        products[a, b] = products[b, a] = value
    return products


def gram_by_row(operands: Sequence[Operand], base: Tensor | None, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return the inner products (rows, n, n), in float64, of several matrices' rows; of task vectors with a base."""
    origin = None if base is None else flat(base)
    rows, columns = blocks.rows_of(shape)
    many = len(operands)
    products = np.zeros((rows, many, many))

    def work(which: slice, entries: slice) -> None:
        block, _ = read_all(operands, origin, entries.start, entries.stop)
        for a in range(many):
            for b in range(a, many):
                _inner_by_row(block[a], block[b], products[which, a, b])
                products[which, b, a] = products[which, a, b]

    blocks.over_rows(rows, columns, work)
    return products


def gram_by_column(operands: Sequence[Operand], base: Tensor | None, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return the inner products (columns, n, n) over a tensor's first dimension; of task vectors with a base.

    The sums run through all blocks in order and so on one core.
    """
    origin = None if base is None else flat(base)
    rows, columns = blocks.columns_of(shape)
    many, several = len(operands), max(1, blocks.BLOCK // max(1, columns))
    products = np.zeros((many, many, columns))
    for first in range(0, rows if columns else 0, several):
        entries = slice(first * columns, min(first + several, rows) * columns)
        block, _ = read_all(operands, origin, entries.start, entries.stop)
        for a in range(many):
            for b in range(a, many):
                _add_products(block[a], block[b], products[a, b])
                products[b, a] = products[a, b]
    return np.ascontiguousarray(products.transpose(2, 0, 1))


def weighted_sum_by_row(
    operands: Sequence[Operand],
    scales: NDArray[np.float64],
    base: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    by_column: bool = False,
) -> Tensor:
    """Return base + Σ sᵢ·xᵢ with scales (rows, n) for every row, or column; rounded once to `dtype`."""
    origin = None if base is None else flat(base)
    merged = blocks.empty(shape, dtype)
    out = flat(merged)
    by_model = np.ascontiguousarray(scales.T, np.float32)
    rows, columns = blocks.columns_of(shape) if by_column else blocks.rows_of(shape)

    def work(which: slice, entries: slice) -> None:
        block, total = read_all(operands, origin, entries.start, entries.stop)
        matrix = total.reshape(-1, columns)
        for row, own in zip(block, by_model, strict=True):
            matrix += (own if by_column else own[which, None]) * row.reshape(-1, columns)
        narrow(total, out[entries])

    blocks.over_rows(rows, columns, work)
    return merged


@compiled
def _inner_by_row(first: Floats, second: Floats, products: NDArray[np.float64]) -> None:
    columns = len(first) // len(products)
    for r in range(len(products)):
        products[r] = inner(first[r * columns : (r + 1) * columns], second[r * columns : (r + 1) * columns])


@compiled
def _add_products(first: Floats, second: Floats, products: NDArray[np.float64]) -> None:
    columns = len(products)
    for start in range(0, len(first), columns):
        for i in range(columns):
            products[i] += np.float64(first[start + i]) * np.float64(second[start + i])
