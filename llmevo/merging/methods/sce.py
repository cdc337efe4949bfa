"""SCE: select the entries the models differ in, weigh models by their energy, erase minority signs
(FuseChat, https://arxiv.org/abs/2408.07990, section 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmevo.merging.kernels.blocks import Operand, Scratch, flat, merge_blocks, over_blocks, read_all, task_vectors
from llmevo.merging.kernels.loops import Floats, Stored, compiled, inner
from llmevo.merging.methods.base import TensorGroup


@dataclass(frozen=True)
class _Selection:
    """The selected entries of the task vectors, and the models' shares."""

    least: np.float32
    """The variance an entry needs to be selected."""
    last: int
    """The last of the entries with exactly that variance that is selected: the first in the tensor come first."""
    weights: Floats
    """Each model's share of the sum of squares."""


def sce(inputs: TensorGroup) -> Tensor:
    """Return base + the mean, weighted by energy, of the selected entries that agree with the majority's sign.

    `select_topk` is the share of the entries with any variance over the models that is selected: those with the most.
    Task vectors with a mean square under 1e-6 in all count alike, as in mergekit.
    """
    operands, origin, topk = task_vectors(inputs), flat(inputs.origin), inputs.shared["select_topk"]
    variance = inputs.keep("variance", lambda: _measure(operands, origin)) if topk < 1.0 else None
    selection = inputs.keep_latest("selection", topk, lambda: _select(operands, origin, variance, topk))

    def kernel(start: int, stop: int, rows: Floats, total: Floats) -> None:
        if variance is not None:
            _keep(variance[start:stop], selection.least, selection.last - start, rows)
        _elect_mean(rows, selection.weights, total)

    return merge_blocks(inputs, operands, kernel)


def _measure(operands: Sequence[Operand], origin: Stored) -> Floats:
    """Return the variance of every entry over the task vectors."""
    variance = np.empty(len(origin), np.float32)

    def work(start: int, stop: int, scratch: Scratch) -> None:
        _variance(read_all(operands, origin, start, stop, scratch)[0], variance[start:stop])

    over_blocks(len(origin), work)
    return variance


def _select(operands: Sequence[Operand], origin: Stored, variance: Floats | None, topk: float) -> _Selection:
    least, last = (np.float32(0.0), len(origin)) if variance is None else _bounds(variance, topk)

    def energies(start: int, stop: int, scratch: Scratch) -> list[float]:
        rows, _ = read_all(operands, origin, start, stop, scratch)
        if variance is not None:
            _keep(variance[start:stop], least, last - start, rows)
        return [inner(row, row) for row in rows]

    sums = np.array([math.fsum(parts) for parts in zip(*over_blocks(len(origin), energies), strict=True)])
    if sums.sum() < 1e-6 * len(origin) or not len(origin):
        sums = np.ones(len(operands))
    return _Selection(least, last, (sums / sums.sum()).astype(np.float32))


def _bounds(variance: Floats, topk: float) -> tuple[np.float32, int]:
    """Return the least variance of the selected entries, and the last selected entry that has it."""
    wanted = int(np.count_nonzero(variance) * max(topk, 0.0))
    if not wanted:
        return np.float32(np.inf), -1
    place = len(variance) - wanted
    least = np.partition(variance, place)[place]
    equal = np.flatnonzero(variance == least)
    return least, int(equal[wanted - np.count_nonzero(variance > least) - 1])


@compiled
def _variance(rows: Floats, out: Floats) -> None:
    models = rows.shape[0]
    for i in range(len(out)):
        # Relative to the first: equal entries differ by exactly 0 from it, but not always from a rounded mean.
        first, mean, squares = np.float64(rows[0, i]), 0.0, 0.0
        for m in range(1, models):
            mean += (np.float64(rows[m, i]) - first) / models
        for m in range(models):
            squares += (np.float64(rows[m, i]) - first - mean) ** 2
        out[i] = squares / models


@compiled
def _keep(variance: Floats, least: np.float32, last: int, rows: Floats) -> None:
    for m in range(rows.shape[0]):
        for i in range(len(variance)):
            kept = (variance[i] > least) | ((variance[i] == least) & (i <= last))
            rows[m, i] = rows[m, i] if kept else np.float32(0)


@compiled
def _elect_mean(rows: Floats, weights: Floats, total: Floats) -> None:
    """Add the mean of the entries that agree with the sign of the sum of all; a sum of 0 counts as positive."""
    size = rows.shape[1]
    sums, mixed, shares = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
    for m in range(rows.shape[0]):
        for i in range(size):
            sums[i] += rows[m, i]
    for m in range(rows.shape[0]):
        row = rows[m]
        for i in range(size):
            agrees = row[i] > np.float32(0) if sums[i] >= np.float32(0) else row[i] < np.float32(0)
            mixed[i] += weights[m] * row[i] if agrees else np.float32(0)
            shares[i] += weights[m] if agrees else np.float32(0)
    for i in range(size):
        total[i] += mixed[i] / max(shares[i], np.float32(1e-6))
