"""Singular values and vectors of task vectors, for the methods that act on matrices instead of single entries.

Everything here depends on no weight of a recipe: it is computed once and kept. A LoRA adapter's task vector is
decomposed exactly, by the QR decompositions of its two factors; a small matrix by LAPACK; a larger one by a randomized
range finder with two power iterations (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061, algorithm 4.4).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup, divisor
from llmevo.models.checkpoints import LowRank, same, stored

Matrix = NDArray[np.float64]

EXACT = 512
"""The smaller side of a matrix up to which all singular values are computed and the largest are taken."""

OVERSAMPLING = 16
"""Directions that a randomized decomposition looks at beyond the ones it returns."""

LEAST = 1e-12
"""Singular values that are smaller, relative to the largest, count as 0."""


@dataclass(frozen=True)
class Singular:
    """The largest singular values and vectors of a matrix: left · diag(values) · right."""

    left: NDArray[np.float32]
    """(rows, rank), orthonormal columns."""
    values: Matrix
    """(rank), the largest first, without those that are 0 or noise of the type that the weight is stored in."""
    right: NDArray[np.float32]
    """(rank, columns), orthonormal rows."""

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.values.nbytes + self.right.nbytes


@dataclass(frozen=True)
class Product:
    """A low-rank matrix: left · right."""

    left: NDArray[np.floating]
    right: NDArray[np.floating]

    def rounded(self) -> "Product":
        """Return it in float32, as it is added to weights."""
        return Product(*(np.ascontiguousarray(each, np.float32) for each in (self.left, self.right)))

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


class Arrays(tuple[Any, ...]):
    """Several arrays as one entry of the cache."""

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> Any:
    """Return a context in which NumPy's linear algebra uses one thread: the same bits on any machine's number."""
    return _controller().limit(limits=1, user_api="blas")


def used(inputs: TensorGroup) -> tuple[int, ...]:
    """Return the places of the models that are mixed: those whose weight is not 0."""
    return tuple(place for place, weight in enumerate(inputs.each["weight"]) if weight != 0.0)


def is_separable(inputs: TensorGroup) -> bool:
    """Return whether there is anything to separate: a matrix, and two or more models in the mix."""
    return inputs.origin.dim() == 2 and inputs.origin.numel() > 0 and len(used(inputs)) > 1


def factor(inputs: TensorGroup) -> float:
    """Return λ, divided by Σ wᵢ with `normalize`."""
    return inputs.shared["lambda"] / (divisor(inputs.each["weight"]) if inputs.shared["normalize"] else 1.0)


def blended(inputs: TensorGroup, products: Sequence[Product], blend: float = 1.0, instead: bool = True) -> Tensor:
    """Return base + λ Σ wᵢ·((1 - blend)·δᵢ + blend·Pᵢ) of the models that are used; Pᵢ are their `products`.

    Without `instead` the products are added to the task vectors: base + λ Σ wᵢ·(δᵢ + blend·Pᵢ).
    """
    scale, places = factor(inputs), used(inputs)
    weights = [inputs.each["weight"][place] * scale for place in places]
    models = [inputs.models[place] for place in places]
    plain = [weight * (1.0 - blend if instead else 1.0) for weight in weights]
    added = [low_rank(inputs.origin, each) for each in products]
    return weighted_sum(
        [*models, *added], [*plain, *(weight * blend for weight in weights)], inputs.origin, inputs.dtype
    )


def low_rank(base: Tensor, product: Product) -> LowRank:
    """Return base + product as a model's weight."""
    rounded = product.rounded()
    return LowRank(base, torch.from_numpy(rounded.left), torch.from_numpy(rounded.right))


def vectors(inputs: TensorGroup, share: float = 1.0) -> list[Singular]:
    """Return each used model's largest singular values and vectors, `share` of its own rank but at least one.

    The own rank is a LoRA adapter's; of another model it is the smaller side of the matrix over the number of models,
    which is what TSV-M keeps (https://arxiv.org/abs/2412.00081, section 4.2).
    """
    places = used(inputs)
    found: list[Singular] = []
    for place in places:
        whole = inputs.keep(f"singular {len(places)}", lambda at=place: _decomposed(inputs, at, len(places)), place)
        rank = min(len(whole.values), max(1, round(share * len(whole.values))))
        found.append(Singular(whole.left[:, :rank], whole.values[:rank], whole.right[:rank]))
    return found


def _decomposed(inputs: TensorGroup, place: int, many: int) -> Singular:
    weight = inputs.models[place]
    with one_thread():
        if isinstance(weight, LowRank) and same(weight.origin, inputs.origin):
            return _of_factors(weight.up.double().numpy(), weight.down.double().numpy())
        found = of_matrix(inputs.delta(place), max(1, min(inputs.origin.shape) // many))
        return _above(found, _rounding(stored(weight)))


def _rounding(weight: Tensor) -> float:
    """Return the largest singular value of the error with which a weight is rounded to its type.

    Independent errors of standard deviation s in a matrix (m, n) have singular values up to s(√m + √n), the edge of the
    Marchenko–Pastur distribution.
    """
    deviation = torch.finfo(weight.dtype).eps / math.sqrt(12.0) * float(weight.float().square().mean().sqrt())
    return deviation * sum(map(math.sqrt, weight.shape))


def _above(found: Singular, least: float) -> Singular:
    """Return the values over `least`: the directions of others are noise, which a method would take for real ones."""
    rank = int((found.values > least).sum())
    return Singular(found.left[:, :rank], found.values[:rank], found.right[:rank])


def _of_factors(up: Matrix, down: Matrix) -> Singular:
    """Return the exact decomposition of a product up (rows, r) · down (r, columns)."""
    left, upper = np.linalg.qr(up)
    right, lower = np.linalg.qr(down.T)
    u, values, v = svd(upper @ lower.T)
    return Singular((left @ u).astype(np.float32), values, (v @ right.T).astype(np.float32))


def of_matrix(matrix: Tensor, rank: int) -> Singular:
    """Return the `rank` largest singular values and vectors of a float32 matrix."""
    given = matrix.numpy()
    if min(given.shape) <= EXACT or rank + OVERSAMPLING >= min(given.shape):
        u, values, v = svd(given.astype(np.float64))
        return Singular(u[:, :rank].astype(np.float32), values[:rank], v[:rank].astype(np.float32))
    # Not torch.svd_lowrank: it draws from the global random state, and tensors are merged side by side.
    sample = np.random.default_rng(0).standard_normal((given.shape[1], rank + OVERSAMPLING), np.float32)
    basis = np.linalg.qr(given @ sample)[0]
    for _ in range(2):
        basis = np.linalg.qr(given @ np.linalg.qr(given.T @ basis)[0])[0]
    u, values, v = svd((basis.T @ given).astype(np.float64))
    return Singular((basis @ u[:, :rank]).astype(np.float32), values[:rank], v[:rank].astype(np.float32))


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return a matrix's singular vectors and values, without those that are 0. Raises FloatingPointError."""
    if not np.isfinite(matrix).all():
        raise FloatingPointError("a weight is not finite, so it has no singular values")
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    count = int((values > LEAST * values[0]).sum()) if len(values) and values[0] > 0 else 0
    return u[:, :count], values[:count], v[:count]


def polar(matrix: Matrix) -> Matrix:
    """Return the matrix with orthonormal columns that is nearest to one with independent columns.

    U(UᵀU)^(-1/2), the solution of the orthogonal Procrustes problem; directions that depend on others are left out.
    """
    values, vectors_ = np.linalg.eigh(matrix.T @ matrix)
    kept = values > 1e-10 * max(float(values[-1]), 0.0) if len(values) else np.zeros(0, bool)
    some = vectors_[:, kept]
    return matrix @ (some / np.sqrt(values[kept])) @ some.T


def keep_products(
    inputs: TensorGroup, what: str, tag: Hashable, make: Callable[[], Sequence[Product]]
) -> Sequence[Product]:
    """Return products that depend on no weight but on which models are used, and on `tag`; the last ones are kept."""

    def made() -> Arrays:
        with one_thread():
            return Arrays(each.rounded() for each in make())

    return inputs.keep_latest(what, (used(inputs), tag), made)
