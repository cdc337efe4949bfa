"""The norms of and cosines between the models' task vectors, slice by slice, for the prompt."""

import hashlib
import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from llmevo.models.architecture import text_stack
from llmevo.models.checkpoints import LowRank, Weight, same, stored
from llmevo.models.sources import Sources
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import SearchSpace

ENTRIES = 1 << 28  # entries of each model that are read at most: all of a small model, a sample of a large one
BLOCK = 1 << 18


def measure(space: SearchSpace, sources: Sources, entries: int = ENTRIES) -> list[SliceGeometry]:
    """Return norms of and cosines between the models' task vectors, to four decimals, for every slice of the space.

    Without a base model, vectors start at the mean of the models. Finite tensors of layers count, in the order of a
    hash of their names, up to `entries`. LoRA adapters of the base are compared by their factors.
    """
    base = space.genome.base_model
    models = [model for model in space.merged if model != base]
    names = [space.names[model] for model in models]
    facts: list[SliceGeometry] = []
    for label, tensors in zip(space.slices, _sample(space, sources, entries // len(space.slices)), strict=True):
        gram, square = torch.zeros(len(models), len(models), dtype=torch.float64), 0.0
        for tensor in tensors:
            origin = sources[base].tensor(tensor) if base else None
            products, size = _products(origin, [sources[model].weight(tensor) for model in models])
            if products.isfinite().all() and math.isfinite(size):
                gram, square = gram + products, square + size
        norms = gram.diagonal().clamp(min=0).sqrt().tolist()
        whole = math.sqrt(square) or 1.0
        cosines = {
            f"{names[a]}/{names[b]}": round(
                float(gram[a, b]) / (norms[a] * norms[b]) if norms[a] * norms[b] else 0.0, 4
            )
            for a, b in combinations(range(len(models)), 2)
        }
        facts.append(SliceGeometry(label, {n: round(v / whole, 4) for n, v in zip(names, norms, strict=True)}, cosines))
    return facts


def _sample(space: SearchSpace, sources: Sources, entries: int) -> list[list[str]]:
    """The names of the tensors to read of every slice."""
    shapes = sources[space.genome.references[0]].shapes
    stack = text_stack(shapes, space.layers)
    by_slice: list[list[str]] = [[] for _ in space.slices]
    for name in sorted(shapes, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        layer = stack.layer(name)
        if layer is not None:
            place = next(i for i, (start, stop) in enumerate(space.spans) if start <= layer < stop)
            if sum(math.prod(shapes[taken]) for taken in by_slice[place]) < entries:
                by_slice[place].append(name)
    return by_slice


def _products(base: Tensor | None, weights: Sequence[Weight]) -> tuple[Tensor, float]:
    """Inner products (models, models) of one tensor's task vectors, and the squared norm of their origin."""
    first = stored(weights[0])
    if not first.is_floating_point():
        return torch.zeros(len(weights), len(weights), dtype=torch.float64), 0.0
    if base is not None and all(same(stored(w), base) for w in weights):
        return _of_factors(weights), float(sum(part.double().square().sum() for part in base.reshape(-1).split(BLOCK)))
    rows = [(w.dense() if isinstance(w, LowRank) else w).reshape(-1).split(BLOCK) for w in weights]
    origins = [None] * len(rows[0]) if base is None else base.reshape(-1).split(BLOCK)
    gram, square = torch.zeros(len(weights), len(weights), dtype=torch.float64), 0.0
    for *parts, origin in zip(*rows, origins, strict=True):
        block = torch.stack([part.float() for part in parts if part is not None])
        start = block.mean(0) if origin is None else origin.float()
        vectors = block - start
        gram += (vectors @ vectors.T).double()
        square += float(start.double().square().sum())
    return gram, square


def _of_factors(weights: Sequence[Weight]) -> Tensor:
    """Inner products of adapters by their factors: ⟨BA, DC⟩ = Σ (BᵀD) ∘ (ACᵀ); 0 for the base itself."""
    gram = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for a, first in enumerate(weights):
        for b, second in enumerate(weights):
            if isinstance(first, LowRank) and isinstance(second, LowRank):
                gram[a, b] = ((first.up.T @ second.up) * (first.down @ second.down.T)).double().sum()
    return gram
