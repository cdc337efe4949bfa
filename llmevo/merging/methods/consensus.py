"""Consensus merging: leave out the entries that too few of the tasks want (https://arxiv.org/abs/2405.07813)."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.blocks import merge_blocks, task_vectors
from llmevo.merging.kernels.loops import Floats, compiled
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic


def consensus(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢ·m·δᵢ, with the entries m that at least `agree` of the used models want.

    Model i wants an entry where |δᵢ| ≥ threshold·|Σⱼδⱼ - δᵢ| (TALL masks, equation 5 of the paper). `agree` 2 leaves
    out the entries that are selfish, wanted by one, or catastrophic, wanted by none; with fewer models it is their
    number. Threshold 0 is task arithmetic, as is a model that is alone.
    """
    places, threshold = spectral.used(inputs), inputs.shared["threshold"]
    if threshold == 0.0 or len(places) < 2:
        return task_arithmetic(inputs)
    scale, least = spectral.factor(inputs), int(min(inputs.shared["agree"], len(places)))
    scales = np.array([inputs.each["weight"][place] * scale for place in places], np.float32)
    operands = task_vectors(replace(inputs, models=[inputs.models[place] for place in places], keys=()))

    def kernel(_start: int, _stop: int, rows: Floats, total: Floats) -> None:
        _add_wanted(rows, scales, np.float32(threshold), least, total)

    return merge_blocks(inputs, operands, kernel)


@compiled
def _add_wanted(rows: Floats, scales: Floats, threshold: np.float32, least: int, total: Floats) -> None:
    models = rows.shape[0]
    for i in range(len(total)):
        whole = np.float32(0)
        for m in range(models):
            whole += rows[m, i]
        votes, added = 0, np.float32(0)
        for m in range(models):
            votes += 1 if abs(rows[m, i]) >= threshold * abs(whole - rows[m, i]) else 0
            added += scales[m] * rows[m, i]
        total[i] += added if votes >= least else np.float32(0)
