"""Prepared weights: low-rank where the expert is an adapter of the base."""

import numpy as np
import torch
from torch import Tensor

from llmevo.merging.kernels.spectral import Product, of_product
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
    """Return a model's weight + product; low-rank, of the least rank, where the model is."""
    weight, (up, down) = inputs.models[place], _tensors(product)
    if not (isinstance(weight, LowRank) and is_adapted(inputs, place)):
        return torch.addmm(inputs.weight(place), up, down)
    wide = torch.cat([weight.up, up], dim=1), torch.cat([weight.down, down])
    found = of_product(*(each.double().numpy() for each in wide))
    return LowRank(inputs.origin, torch.from_numpy(found.left * found.values.astype(np.float32)), _own(found.right))


def _tensors(product: Product) -> tuple[Tensor, Tensor]:
    rounded = product.rounded()
    return torch.from_numpy(rounded.left), torch.from_numpy(rounded.right)


def _own(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix))
