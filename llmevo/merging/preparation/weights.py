"""Prepared weights: low-rank where the expert is an adapter of the base."""

import numpy as np
import torch
from torch import Tensor

from llmevo.merging.kernels.spectral import Product
from llmevo.merging.methods.base import TensorGroup
from llmevo.models.checkpoints import LowRank, Weight, same


def is_adapted(inputs: TensorGroup, place: int) -> bool:
    """Return whether a model is low-rank over the base itself."""
    weight = inputs.models[place]
    return isinstance(weight, LowRank) and same(weight.origin, inputs.origin)


def of_factors(inputs: TensorGroup, up: Tensor, down: Tensor) -> LowRank:
    """Return base + up · down."""
    return LowRank(inputs.origin, up, down)


def replaced(inputs: TensorGroup, product: Product) -> Weight:
    """Return base + product as a model's weight."""
    return LowRank(inputs.origin, *_tensors(product))


def changed(inputs: TensorGroup, place: int, product: Product) -> Weight:
    """Return a model's weight + product, whose columns are combinations of the task vector's.

    An adapter keeps its first factor, so what is between it and the prepared one has its rank too.
    """
    weight = inputs.models[place]
    if not (isinstance(weight, LowRank) and is_adapted(inputs, place)):
        return torch.addmm(inputs.weight(place), *_tensors(product))
    inner = np.linalg.lstsq(weight.up.double().numpy(), product.left.astype(np.float64))[0]
    more = torch.from_numpy(inner @ product.right.astype(np.float64))
    return LowRank(inputs.origin, weight.up, (weight.down.double() + more).float())


def _tensors(product: Product) -> tuple[Tensor, Tensor]:
    rounded = product.rounded()
    return torch.from_numpy(rounded.left), torch.from_numpy(rounded.right)
