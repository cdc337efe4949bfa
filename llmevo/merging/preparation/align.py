"""Alignment of hidden neurons (Git Re-Basin, https://arxiv.org/abs/2209.04836, section 3.2).

The neurons of an MLP may stand in any order: rows of gate and up projections, which may be one matrix (`gate_up_proj`),
and columns of the down projection are permuted together, and the MLP computes the same. Models that were not tuned from
one model have their neurons in orders of their own, and entry by entry nothing of them fits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import scipy  # its `optimize` is loaded at its first use
import torch
from torch import Tensor

from llmevo.merging.methods.base import TensorGroup
from llmevo.models.architecture import PROJECTIONS
from llmevo.models.checkpoints import Weight

FUSED, DOWN = "gate_up_proj", PROJECTIONS[-1]
MLP = re.compile(rf"\.mlp\.({'|'.join((*PROJECTIONS, FUSED))})\.weight$")
"""The matrices of the MLPs whose neurons are ordered; those without a gate have no gate projection."""


def align(inputs: TensorGroup, _: Mapping[str, float], orders: Sequence[Tensor]) -> Sequence[Weight]:
    """Return each expert with its neurons in the order of the base's that they are most like.

    `orders` has for each expert the numbers of its neurons, as a column for a matrix whose rows are neurons, as a row
    for one whose columns are. A model in the base's order stays as it is.
    """
    found: list[Weight] = []
    for place, order in enumerate(orders):
        own, dim = order.flatten(), 0 if order.shape[1] == 1 else 1
        ordered = torch.equal(own, torch.arange(len(own)))
        found.append(inputs.models[place] if ordered else inputs.weight(place).index_select(dim, own))
    return found


def order_of(base: Callable[[str], Tensor], model: Callable[[str], Tensor], projections: Sequence[str]) -> Tensor:
    """Return which neuron of a model is most like each neuron of the base, every one once.

    The sum over all neurons of ⟨gᵢ, gⱼ⟩ + ⟨uᵢ, uⱼ⟩ + ⟨dᵢ, dⱼ⟩ is the largest that any order has (equation 2, for one
    MLP). `base` and `model` return a projection by its name.
    """
    products = (
        own @ other.T
        for name in projections
        for own, other in zip(_by_neuron(base, name), _by_neuron(model, name), strict=True)
    )
    likeness = next(products)
    for product in products:
        likeness += product
    solved: Any = scipy.optimize.linear_sum_assignment(likeness.numpy(), maximize=True)
    return torch.from_numpy(solved[1]).long()


def _by_neuron(projection: Callable[[str], Tensor], name: str) -> Sequence[Tensor]:
    """Return the parts of a matrix with one row a neuron."""
    matrix = projection(name)
    return [matrix.T] if name == DOWN else matrix.chunk(2) if name == FUSED else [matrix]


def of_matrix(name: str, order: Tensor) -> Tensor:
    """Return the order of the rows of a matrix, as a column, or that of its columns, as a row."""
    if name == DOWN:
        return order.view(1, -1)
    return (torch.cat([order, order + len(order)]) if name == FUSED else order).view(-1, 1)
