"""Low-rank factors of a change of a matrix: exact for sums of adapters, else by a singular value decomposition.

The best rank-r approximation in the Frobenius norm keeps the r largest singular values (Eckart and Young); its squared
error is the sum of the squares of the others.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmevo.errors import UserError
from llmevo.models.checkpoints import LowRank, Weight, same

SMALL = 2048
"""The shorter side up to which a matrix is decomposed in full; a randomized decomposition finds larger ones' largest
singular values.
"""

LARGEST = 256
"""Singular values that the randomized decomposition finds, unless a rank asks for more."""

SPARE, ITERATIONS = 16, 4
"""Of the randomized decomposition (arXiv 0909.4061): further directions, and power iterations."""

ENERGY = 0.95
"""The share of the squared singular values that `auto` keeps."""


@dataclass(frozen=True)
class Rank:
    """A choice of ranks: one number, an energy for each matrix, a budget for all of them, or all that there is."""

    fixed: int | None = None
    energy: float | None = None
    parameters: int | None = None

    @classmethod
    def of(cls, rank: str | int | None, energy: float | None = None, parameters: str | int | None = None) -> "Rank":
        """Read the options `--rank`, `--energy` and `--parameters`. None, or `exact`, keeps every singular value.

        `auto` keeps `energy` of each matrix, by default 0.95, or with `parameters` the best ranks of that many numbers.
        Raises UserError that names the option.
        """
        if rank in (None, "exact") and energy is None and parameters is None:
            return cls()
        if energy is not None and not 0.0 < energy <= 1.0:
            raise UserError(f"--energy {energy:g}: it is a share of the squared singular values, over 0 and up to 1")
        if parameters is not None and energy is not None:
            raise UserError(f"--parameters {parameters} and --energy {energy:g} both choose the ranks; leave one out")
        if rank not in (None, "auto"):
            if energy is not None or parameters is not None:
                other = f"--energy {energy:g}" if energy is not None else f"--parameters {parameters}"
                raise UserError(f"--rank {rank} and {other} both choose the ranks; give --rank auto, or leave one out")
            try:
                fixed = int(rank or "")
            except ValueError:
                raise UserError(f"--rank {rank}: give a whole number from 1, auto or exact") from None
            if fixed < 1:
                raise UserError(f"--rank {rank}: give a whole number from 1, auto or exact")
            return cls(fixed=fixed)
        if parameters is not None:
            return cls(parameters=_count(parameters))
        return cls(energy=ENERGY if energy is None else energy)

    def check_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise UserError for a fixed rank that no matrix has."""
        most = max((min(shape) for shape in shapes.values()), default=0)
        if self.fixed is not None and shapes and self.fixed > most:
            name = next(name for name, shape in shapes.items() if min(shape) == most)
            raise UserError(
                f"--rank {self.fixed}: no changed matrix has so many singular values; the largest, {name}, has {most}"
                f" {tuple(shapes[name])}; give a smaller rank, or --rank auto"
            )


def _count(text: str | int) -> int:
    """Read a number of parameters: 10000000, 10M, 1.5B, 500k."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    word = str(text).strip().lower()
    try:
        number = float(word[:-1]) * units[word[-1]] if word[-1:] in units else float(word)
        if not 1 <= number < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(f"--parameters {text}: give a number of parameters, such as 10M, 500k or 2000000") from None
    return int(number)


@dataclass(frozen=True)
class Factors:
    """A matrix's change as U diag(σ) Vᵀ: the largest singular values, and the energy of all."""

    left: Tensor
    """(outputs, k)."""
    values: Tensor
    """(k,), descending."""
    right: Tensor
    """(k, inputs)."""
    rest: float
    """Σσ² of the singular values that were not found."""

    def energy(self, rank: int | None = None) -> float:
        """Return Σσ² of the first `rank` singular values; of all, also those not found, by default."""
        if rank is None:
            return self.energy(len(self.values)) + self.rest
        return float(self.values[:rank].double().square().sum())

    def balanced(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return LoRA's A (rank, inputs) and B (outputs, rank), with √σ on either side, so that B·A is the change."""
        root = self.values[:rank].sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def change_of(weight: Weight, base: Tensor) -> Weight | None:
    """Return weight - base: low-rank (its `origin` is the base), or a float32 matrix; None where they are equal."""
    if isinstance(weight, LowRank):
        if same(weight.origin, base) or torch.equal(weight.origin, base):
            return weight if weight.up.shape[1] and weight.up.any() and weight.down.any() else None
        weight = weight.dense()
    if same(weight, base) or torch.equal(weight, base):
        return None
    return weight.to(torch.float32, copy=True).sub_(base.float())


def decompose(change: Weight, wanted: int | None = None) -> Factors:
    """Decompose a change. `wanted` is a fixed rank, which the randomized decomposition has to reach.

    The product of adapters' factors is decomposed exactly: QR of both, and the SVD of the small core.
    """
    if isinstance(change, LowRank):
        left, upper = torch.linalg.qr(change.up.double())
        right, lower = torch.linalg.qr(change.down.double().T)
        small, values, across = torch.linalg.svd(upper @ lower.T)
        size = len(values)
        return _significant(left @ small[:, :size], values, across[:size] @ right.T)
    if min(change.shape) <= SMALL:
        return _significant(*torch.linalg.svd(change, full_matrices=False))
    found = min(min(change.shape), max(LARGEST, wanted or 0) + SPARE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same file every time
        left, values, across = torch.svd_lowrank(change, found, niter=ITERATIONS)
    energy = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    return _significant(left, values, across.mT, energy)


def _significant(left: Tensor, values: Tensor, right: Tensor, energy: float | None = None) -> Factors:
    """Return factors without the singular values that are rounding errors, as numpy's `matrix_rank` counts them.

    `energy` is that of all singular values, where only some were found.
    """
    least = float(values[0]) * max(len(left), right.shape[1]) * torch.finfo(values.dtype).eps
    kept = max(1, int((values > least).sum()))
    found = Factors(left[:, :kept].float(), values[:kept].float(), right[:kept].float(), 0.0)
    return found if energy is None else replace(found, rest=max(0.0, energy - found.energy(kept)))


def rank_of(choice: Rank, factors: Factors) -> int:
    """Return the rank of one matrix by a choice other than a budget of parameters."""
    if choice.fixed is not None:
        return min(choice.fixed, len(factors.values))
    if choice.energy is None or choice.energy >= 1.0:
        return len(factors.values)
    kept = factors.values.double().square().cumsum(0)
    return min(len(kept), 1 + int((kept < choice.energy * factors.energy() * (1 - 1e-9)).sum()))


def share_parameters(
    parameters: int, values: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Return the ranks with the least summed squared error of so many parameters, greedily by σ² a parameter.

    `values` are the singular values of each matrix, descending, so its largest shares are its first ones. A rank of 0
    leaves a matrix as the base has it. Raises UserError when there is no parameter for any matrix.
    """
    shares = [
        (float(value) ** 2 / sum(shapes[name]), place, name)
        for name, of in values.items()
        for place, value in enumerate(of)
    ]
    ranks, left = dict.fromkeys(values, 0), parameters
    for _, place, name in sorted(shares, key=lambda share: (-share[0], share[1])):
        if ranks[name] == place and sum(shapes[name]) <= left:
            ranks[name] += 1
            left -= sum(shapes[name])
    if values and not any(ranks.values()):
        least = min(sum(shapes[name]) for name in values)
        raise UserError(f"--parameters {parameters}: too few for any matrix; rank 1 of the smallest takes {least:,}")
    return ranks


def summed(parts: Iterable[tuple[float, LowRank]], origin: Tensor) -> LowRank:
    """Return a weighted sum of adapters on one weight as one: [B₁ … Bₙ]·diag(w)·[A₁; …; Aₙ]."""
    factors = [(part.up * weight, part.down) for weight, part in parts]
    if not factors:
        rows, columns = origin.shape
        return LowRank(origin, torch.zeros(rows, 0), torch.zeros(0, columns))
    ups, downs = zip(*factors, strict=True)
    return LowRank(origin, torch.cat(ups, 1), torch.cat(downs, 0))
