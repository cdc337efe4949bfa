"""Inner products of whole tensors: the methods on the sphere need no more than these of all entries.

Such a merge is a sum of the models with a few factors that follow from norms and angles, which no gene changes.
"""

import math

import numpy as np
from numpy.typing import NDArray

from llmevo.merging.kernels.blocks import Operand, Scratch, flat, over_blocks, task_vectors, weights
from llmevo.merging.kernels.rows import read_all
from llmevo.merging.kernels.steps import Stored, inner
from llmevo.merging.methods.base import TensorGroup


def gram(inputs: TensorGroup, origin: bool) -> NDArray[np.float64]:
    """The inner products (n, n), in float64, of all models' task vectors, or without `origin` of their weights."""
    return inputs.keep_all("gram", lambda: _gram(inputs, origin))


def gram_with_base(inputs: TensorGroup) -> NDArray[np.float64]:
    """The inner products (n + 1, n + 1) of the base's and all models' weights, the base first."""
    return inputs.keep_all("gram with base", lambda: _products([Operand.of(inputs.origin), *weights(inputs)]))


def _gram(inputs: TensorGroup, origin: bool) -> NDArray[np.float64]:
    if not origin:
        return _products(weights(inputs))
    return _products(task_vectors(inputs), flat(inputs.origin))


def _products(operands: list[Operand], origin: Stored | None = None) -> NDArray[np.float64]:
    many = len(operands)
    pairs = [(a, b) for a in range(many) for b in range(a, many)]

    def work(start: int, stop: int, scratch: Scratch) -> list[float]:
        rows, _ = read_all(operands, origin, start, stop, scratch)
        return [inner(rows[a], rows[b]) for a, b in pairs]

    products = np.empty((many, many))
    # fsum is exact: the sum does not depend on how the blocks were shared out.
    sums = [math.fsum(column) for column in zip(*over_blocks(len(operands[0].stored), work), strict=True)]
    if not all(map(math.isfinite, sums)):
        raise FloatingPointError("a weight is not finite, so it has no direction")
    for (a, b), value in zip(pairs, sums or [0.0] * len(pairs), strict=True):
        products[a, b] = products[b, a] = value
    return products
