"""Blocks of several models at once, and matrices taken row by row or column by column."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels.blocks import BLOCK, Operand, Scratch, empty, flat, in_parts
from llmevo.merging.kernels.steps import Floats, Stored, compiled, inner, narrow, widen

Result = TypeVar("Result")


def read_all(
    operands: Sequence[Operand], origin: Stored | None, start: int, stop: int, scratch: Scratch
) -> tuple[Floats, Floats]:
    """A block of all task vectors (of weights, without a base), one a row, and of the base (unset without one)."""
    rows, base = scratch.rows(len(operands), stop - start), scratch.row(0, stop - start)
    if origin is not None:
        widen(origin[start:stop], base)
    for row, operand in zip(rows, operands, strict=True):
        operand.read(start, stop, base, row)
    return rows, base


def count(shape: Sequence[int]) -> tuple[int, int]:
    """How many rows a tensor has and how long they are: rows are its last dimension, a scalar is one row."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1] if shape else 1


def over_rows(rows: int, columns: int, work: Callable[[slice, slice], Result]) -> list[Result]:
    """`work(which rows, which entries)` for blocks of whole rows, on all cores; results in order."""
    several = max(1, BLOCK // max(1, columns))

    def part(firsts: range) -> list[Result]:
        bounds = [(first, min(first + several, rows)) for first in firsts]
        return [work(slice(first, last), slice(first * columns, last * columns)) for first, last in bounds]

    return in_parts(range(0, rows if columns else 0, several), part)


def count_by_column(shape: Sequence[int]) -> tuple[int, int]:
    """How long a tensor's columns are and how many: columns are its first dimension, a scalar is one column."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0] if shape else 1, columns


def gram_by_row(operands: Sequence[Operand], base: Tensor | None, shape: Sequence[int]) -> NDArray[np.float64]:
    """The inner products (rows, n, n), in float64, of every row of several matrices; of task vectors with a base."""
    origin = None if base is None else flat(base)
    rows, columns = count(shape)
    many = len(operands)
    products = np.zeros((rows, many, many))

    def work(which: slice, entries: slice) -> None:
        block = _task_vectors(operands, origin, entries)
        for a in range(many):
            for b in range(a, many):
                _inner_by_row(block[a], block[b], products[which, a, b])
                products[which, b, a] = products[which, a, b]

    over_rows(rows, columns, work)
    return products


def gram_by_column(operands: Sequence[Operand], base: Tensor | None, shape: Sequence[int]) -> NDArray[np.float64]:
    """The inner products (columns, n, n) over a tensor's first dimension; of task vectors with a base.

    The sums run through all blocks in order and so on one core, whatever there are.
    """
    origin = None if base is None else flat(base)
    rows, columns = count_by_column(shape)
    many, several = len(operands), max(1, BLOCK // max(1, columns))
    products = np.zeros((many, many, columns))
    for first in range(0, rows if columns else 0, several):
        entries = slice(first * columns, min(first + several, rows) * columns)
        block = _task_vectors(operands, origin, entries)
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
    """base + Σ sᵢ·xᵢ with scales (rows, n) of their own for every row, or column; rounded once to `dtype`."""
    origin = None if base is None else flat(base)
    merged = empty(shape, dtype)
    out = flat(merged)
    by_model = np.ascontiguousarray(scales.T, np.float32)
    add = _add_scaled_by_column if by_column else _add_scaled_by_row

    def work(which: slice, entries: slice) -> None:
        size = entries.stop - entries.start
        row, zero = np.empty(size, np.float32), np.zeros(size, np.float32)
        if origin is not None:
            widen(origin[entries], zero)
        total = zero.copy()
        for operand, own in zip(operands, by_model, strict=True):
            operand.read(entries.start, entries.stop, zero, row)
            add(row, own if by_column else own[which], total)
        narrow(total, out[entries])

    over_rows(*(count_by_column(shape) if by_column else count(shape)), work)
    return merged


def _task_vectors(operands: Sequence[Operand], origin: Stored | None, entries: slice) -> Floats:
    size = entries.stop - entries.start
    block, zero = np.empty((len(operands), size), np.float32), np.zeros(size, np.float32)
    if origin is not None:
        widen(origin[entries], zero)
    for row, operand in zip(block, operands, strict=True):
        operand.read(entries.start, entries.stop, zero, row)
    return block


@compiled
def _inner_by_row(first: Floats, second: Floats, products: NDArray[np.float64]) -> None:
    columns = len(first) // len(products)
    for r in range(len(products)):
        products[r] = inner(first[r * columns : (r + 1) * columns], second[r * columns : (r + 1) * columns])


@compiled
def _add_scaled_by_row(block: Floats, scales: Floats, total: Floats) -> None:
    columns = len(block) // len(scales)
    for r in range(len(scales)):
        for i in range(r * columns, (r + 1) * columns):
            total[i] += scales[r] * block[i]


@compiled
def _add_products(first: Floats, second: Floats, products: NDArray[np.float64]) -> None:
    columns = len(products)
    for start in range(0, len(first), columns):
        for i in range(columns):
            products[i] += np.float64(first[start + i]) * np.float64(second[start + i])


@compiled
def _add_scaled_by_column(block: Floats, scales: Floats, total: Floats) -> None:
    columns = len(scales)
    for start in range(0, len(block), columns):
        for i in range(columns):
            total[start + i] += scales[i] * block[start + i]
