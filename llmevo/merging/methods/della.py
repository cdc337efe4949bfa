"""DELLA: drop at random, small entries more likely than large ones (https://arxiv.org/abs/2406.11617, section 3.1).

Two methods: `della` elects signs, `della_linear` sums the rest.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.errors import CandidateError
from llmevo.merging.kernels.blocks import BLOCK, Operand, flat, in_parts, read_all
from llmevo.merging.kernels.loops import Stored
from llmevo.merging.kernels.task_vectors import NOTHING, Mask, merge_sparse, ranked_mask
from llmevo.merging.methods.base import TensorGroup


def drop_by_rank(inputs: TensorGroup, model: int, operand: Operand) -> Mask | None:
    """Keep an entry with probability density - ε + 2ε · rank / (columns - 1), its rank by magnitude in its row.

    Raises CandidateError where density ± ε is not inside (0, 1), as mergekit does.
    """
    density, epsilon = inputs.each["density"][model], inputs.each["epsilon"][model]
    if density >= 1.0:
        return None
    if density <= 0.0:
        return NOTHING
    if not (density - abs(epsilon) > 0.0 and density + abs(epsilon) < 1.0):
        raise CandidateError(
            f"epsilon {epsilon:g} is too large for density {density:g}: density ± epsilon must lie between 0 and 1"
        )
    rows = inputs.origin.shape[0] if inputs.origin.dim() > 1 else 1
    columns = inputs.origin.numel() // max(1, rows)
    ranks = inputs.keep("ranks", lambda: ranks_by_row(operand, flat(inputs.origin), columns), model)
    inverse = bool(inputs.shared["rescale"]) and bool(inputs.shared["inverse_density"])
    step = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    return ranked_mask(inputs.seeds[model], ranks, density - epsilon if step else density, step, inverse)


def ranks_by_row(operand: Operand, origin: Stored, columns: int) -> NDArray[np.uint16 | np.uint32]:
    """Return each entry's rank by magnitude in its row, 0 the smallest; of equal ones the first is the smaller."""
    ranks = np.empty(len(origin), np.uint16 if columns <= 1 << 16 else np.uint32)
    rows = len(origin) // max(1, columns)
    several = max(1, BLOCK // max(1, columns))
    numbers = np.arange(columns, dtype=np.uint64)

    def rank(first: int) -> None:
        start, stop = first * columns, min(first + several, rows) * columns
        (values,), _ = read_all([operand], origin, start, stop)
        magnitudes = (values.view(np.uint32) & np.uint32(0x7FFFFFFF)).reshape(-1, columns).astype(np.uint64)
        # Magnitude and column in one number: no two are equal, so any way of sorting gives the same order.
        order = np.sort((magnitudes << np.uint64(32)) | numbers, axis=1) & np.uint64(0xFFFFFFFF)
        np.put_along_axis(ranks[start:stop].reshape(-1, columns), order.astype(np.int64), numbers[None], axis=1)

    in_parts(range(0, rows, several), lambda firsts: [rank(first) for first in firsts])
    return ranks


def della(inputs: TensorGroup) -> Tensor:
    """Return base + λ · elected sum of the dropped, rescaled, weighted task vectors."""
    return merge_sparse(inputs, drop_by_rank, elected=True)


def della_linear(inputs: TensorGroup) -> Tensor:
    """Return base + λ · Σ wᵢ · dropped, rescaled task vector i."""
    return merge_sparse(inputs, drop_by_rank, elected=False)
