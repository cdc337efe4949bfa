"""Arcee Fusion: take over only the other model's most important changes (https://arcee.ai)."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llmevo.merging.kernels.blocks import Operand, empty, flat, over_rows, read_all, rows_of, weights
from llmevo.merging.kernels.loops import Floats, Stored, compiled, narrow
from llmevo.merging.methods.base import TensorGroup

EPSILON = 1e-8
"""Added to every probability, as in mergekit."""


@dataclass(frozen=True)
class _Importance:
    """The importance of changes."""

    divergences: Floats
    """The Kullback-Leibler divergence of each row's softmax in the other model from that in the base."""
    threshold: float
    """The least importance of a change that is kept."""

    @property
    def nbytes(self) -> int:
        return self.divergences.nbytes


def arcee_fusion(inputs: TensorGroup) -> Tensor:
    """Return the base, with the other model's entries of an importance of median + 1.5 · interquartile range or more.

    An entry's importance is the size of its change times the divergence of its row. The quantiles are exact; mergekit
    estimates those of tensors with more than a million entries from a random sample.
    """
    origin, (other,) = flat(inputs.origin), weights(inputs)
    rows, columns = rows_of(inputs.origin.shape)
    merged = empty(inputs.origin.shape, inputs.dtype)
    out = flat(merged)
    if not len(origin):
        return merged
    important = inputs.keep("importance", lambda: _measure(origin, other, rows, columns))

    def work(which: slice, entries: slice) -> None:
        (row,), base = read_all([other], origin, entries.start, entries.stop)
        _take_over(row, important.divergences[which], important.threshold, base)
        narrow(base, out[entries])

    over_rows(rows, columns, work)
    return merged


def _measure(origin: Stored, other: Operand, rows: int, columns: int) -> _Importance:
    divergences, scores = np.empty(rows, np.float32), np.empty(len(origin), np.float32)

    def work(which: slice, entries: slice) -> None:
        (row,), base = read_all([other], origin, entries.start, entries.stop)
        _diverge(row, base, EPSILON, divergences[which], scores[entries])

    over_rows(rows, columns, work)
    places = [int(share * (len(scores) - 1)) for share in (0.25, 0.5, 0.75)]
    scores.partition(sorted({*places}))
    lower, median, upper = (float(scores[place]) for place in places)
    return _Importance(divergences, median + 1.5 * (upper - lower))


@compiled
def _diverge(row: Floats, base: Floats, epsilon: float, divergences: Floats, scores: Floats) -> None:
    """Write the divergence of each row, computed in float64: the terms of nearly equal distributions cancel."""
    columns = len(row) // len(divergences)
    mine, theirs = np.empty(columns, np.float64), np.empty(columns, np.float64)
    for r in range(len(divergences)):
        start = r * columns
        my_peak, their_peak = row[start], base[start]
        for i in range(columns):
            my_peak, their_peak = max(my_peak, row[start + i]), max(their_peak, base[start + i])
        my_sum, their_sum = 0.0, 0.0
        for i in range(columns):
            mine[i] = np.exp(np.float64(row[start + i]) - np.float64(my_peak))
            theirs[i] = np.exp(np.float64(base[start + i]) - np.float64(their_peak))
            my_sum += mine[i]
            their_sum += theirs[i]
        total = 0.0
        for i in range(columns):
            p, q = mine[i] / my_sum + epsilon, theirs[i] / their_sum + epsilon
            total += p * np.log(p / q)
        # Less than 0 is rounding.
        divergences[r] = max(total, 0.0)
        for i in range(start, start + columns):
            scores[i] = abs(row[i] - base[i]) * divergences[r]


@compiled
def _take_over(row: Floats, divergences: Floats, threshold: float, base: Floats) -> None:
    columns = len(row) // len(divergences)
    for r in range(len(divergences)):
        for i in range(r * columns, (r + 1) * columns):
            base[i] = row[i] if abs(row[i] - base[i]) * divergences[r] >= threshold else base[i]
