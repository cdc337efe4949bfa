"""Reinforced Agent Merging: mean where task vectors overlap, whole where one is alone (https://arxiv.org/abs/2601.13572).

Two methods: `ram`, and `ramplus_tl`, which scales up the changes of one model alone, tensor by tensor.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels.blocks import Operand, Scratch, flat, merge_blocks, over_blocks, read_all, task_vectors
from llmevo.merging.kernels.loops import Floats, compiled
from llmevo.merging.methods.base import TensorGroup


def ram(inputs: TensorGroup) -> Tensor:
    """Return base + for every entry the mean over the models that changed it."""
    return _merge(inputs, task_vectors(inputs), [1.0] * len(inputs.models))


def ramplus_tl(inputs: TensorGroup) -> Tensor:
    """Like `ram`, with the entries that one model alone changed times 1 + r · min(ρ, α).

    ρ is the ratio of a model's changed entries that others changed too to those that it alone changed.
    """
    operands, (r, alpha, epsilon) = task_vectors(inputs), (inputs.shared[name] for name in ("r", "alpha", "epsilon"))
    counts = inputs.keep(f"contributors over {epsilon:g}", lambda: _count(inputs, operands))
    ratios = [shared / max(unique, epsilon, 1e-30) for shared, unique in counts]
    return _merge(inputs, operands, [1.0 + r * min(max(ratio, 0.0), alpha) for ratio in ratios])


def _merge(inputs: TensorGroup, operands: list[Operand], alone: Sequence[float]) -> Tensor:
    """Merge with scales for the entries that each model alone changed."""
    epsilon, scales = np.float32(inputs.shared["epsilon"]), np.array(alone, np.float32)
    return merge_blocks(inputs, operands, lambda _start, _stop, rows, total: _average(rows, epsilon, scales, total))


def _count(inputs: TensorGroup, operands: list[Operand]) -> list[tuple[int, int]]:
    """Return for each model the number of entries that others changed too, and that it alone changed."""
    origin, epsilon, many = flat(inputs.origin), np.float32(inputs.shared["epsilon"]), len(operands)

    def work(start: int, stop: int, scratch: Scratch) -> list[tuple[int, int]]:
        shared, unique = np.zeros(many, np.int64), np.zeros(many, np.int64)
        _count_block(read_all(operands, origin, start, stop, scratch)[0], epsilon, shared, unique)
        return [*zip(shared.tolist(), unique.tolist(), strict=True)]

    blocks = over_blocks(len(origin), work)
    return [(sum(block[m][0] for block in blocks), sum(block[m][1] for block in blocks)) for m in range(many)]


@compiled
def _count_block(rows: Floats, epsilon: np.float32, shared: NDArray[np.int64], unique: NDArray[np.int64]) -> None:
    size = rows.shape[1]
    many = np.zeros(size, np.int32)
    for m in range(rows.shape[0]):
        for i in range(size):
            many[i] += abs(rows[m, i]) > epsilon
    for m in range(rows.shape[0]):
        for i in range(size):
            mine = abs(rows[m, i]) > epsilon
            shared[m] += mine & (many[i] > 1)
            unique[m] += mine & (many[i] == 1)


@compiled
def _average(rows: Floats, epsilon: np.float32, alone: Floats, total: Floats) -> None:
    size = rows.shape[1]
    mixed, boosted, many = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
    for m in range(rows.shape[0]):
        row = rows[m]
        for i in range(size):
            mine = abs(row[i]) > epsilon
            mixed[i] += row[i] if mine else np.float32(0)
            boosted[i] += alone[m] * row[i] if mine else np.float32(0)
            many[i] += np.float32(1) if mine else np.float32(0)
    for i in range(size):
        total[i] += boosted[i] if many[i] < np.float32(2) else mixed[i] / many[i]
