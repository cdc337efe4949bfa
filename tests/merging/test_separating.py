"""The methods that separate task vectors, against their papers' formulas on whole matrices in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.registry import METHODS, Method
from llmevo.models.checkpoints import LowRank, Weight
from support.checkpoints import bits

Matrix = NDArray[np.float64]
Reference = Callable[[Sequence[Matrix], Sequence[float], Mapping[str, float]], Matrix]
SEPARATING = {name: method for name, method in METHODS.items() if method.takes_base and not method.in_mergekit}
NEUTRAL = {
    name: {key: parameter.neutral for key, parameter in method.shared.items() if parameter.neutral is not None}
    for name, method in SEPARATING.items()
}
"""The parameter with which each is task arithmetic."""

WEIGHTS = (0.7, 0.4, 1.1)
RANK = 3


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(count: int = 3, shape: tuple[int, int] = (18, 24), rank: int = RANK) -> TensorGroup:
    """A base and adapters of it."""
    base = random(shape, 9)
    pairs = [(random((shape[0], rank), 2 * n), random((rank, shape[1]), 2 * n + 1)) for n in range(count)]
    return TensorGroup(base, [LowRank(base, up, down) for up, down in pairs], {}, {}, [0] * count)


def with_values(
    inputs: TensorGroup,
    method: Method,
    shared: Mapping[str, float] | None = None,
    weights: Sequence[float] = WEIGHTS,
) -> TensorGroup:
    values = {name: float(p.default or 0.0) for name, p in method.shared.items()} | {**(shared or {})}
    return replace(inputs, each={"weight": [*weights[: len(inputs.models)]]}, shared=values)


def dense(inputs: TensorGroup) -> TensorGroup:
    return replace(inputs, models=[inputs.weight(place) for place in range(len(inputs.models))])


def deltas(inputs: TensorGroup) -> list[Matrix]:
    return [inputs.delta(place).double().numpy() for place in range(len(inputs.models))]


def change(inputs: TensorGroup, method: Method) -> Matrix:
    """The merged task vector."""
    return (method.merge(inputs) - inputs.origin).double().numpy()


# --- the papers' formulas -----------------------------------------------------------------------------------------


def top(delta: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def procrustes(matrix: Matrix) -> Matrix:
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    return p @ q


def tsv(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    parts = [top(delta, max(1, round(shared["rank"] * RANK))) for delta in found]
    left = procrustes(np.hstack([u for u, _, _ in parts]))
    right = procrustes(np.vstack([v for _, _, v in parts]))
    values = np.concatenate([weight * s for weight, (_, s, _) in zip(weights, parts, strict=True)])
    plain = sum(weight * delta for weight, delta in zip(weights, found, strict=True))
    return (1 - shared["blend"]) * plain + shared["blend"] * (left * values) @ right


def wudi(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    grams = [delta.T @ delta / (delta**2).sum() for delta in found]
    total = np.sum(grams, axis=0)
    rank = np.linalg.matrix_rank(total)
    ridge = (1 - shared["blend"]) / shared["blend"] * np.trace(total) / rank * np.eye(len(total))
    inverse = np.linalg.inv(total + ridge)
    return np.sum([w * d @ (g + ridge) @ inverse for w, d, g in zip(weights, found, grams, strict=True)], axis=0)


def star(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    total = np.zeros_like(found[0])
    for weight, delta in zip(weights, found, strict=True):
        u, s, v = top(delta, RANK)
        kept = next(k for k in range(1, RANK + 1) if s[:k].sum() >= shared["eta"] * s.sum())
        total += weight * (u[:, :kept] * s[:kept] * s.sum() / s[:kept].sum()) @ v[:kept]
    return total


def knots(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    u, s, v = top(np.hstack(found), RANK * len(found))
    trimmed: list[Matrix] = []
    for part in np.split(v, len(found), axis=1):
        least = np.sort(np.abs(part), axis=None)[-int(shared["density"] * part.size)]
        trimmed.append(np.where(np.abs(part) >= least, part, 0.0))
    weighted = np.array([weight * part for weight, part in zip(weights, trimmed, strict=True)])
    agrees = np.sign(weighted) == np.sign(weighted.sum(axis=0))
    return (u * s) @ (weighted * agrees).sum(axis=0)


def isotropic(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    u, s, v = top(np.sum([w * d for w, d in zip(weights, found, strict=True)], axis=0), RANK * len(found))
    flat = s.mean() ** (1 - shared["gamma"]) * s ** shared["gamma"]
    return (u * flat * math.sqrt((s**2).sum() / (flat**2).sum())) @ v


def subspace_boosting(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    u, s, v = top(np.sum([w * d for w, d in zip(weights, found, strict=True)], axis=0), RANK * len(found))
    cut = next(k for k in range(len(s)) if s[: k + 1].sum() >= shared["beta"] * s.sum())
    return (u * np.where(np.arange(len(s)) > cut, s[cut], s)) @ v


def consensus(found: Sequence[Matrix], weights: Sequence[float], shared: Mapping[str, float]) -> Matrix:
    total = np.sum(found, axis=0)
    votes = np.sum([np.abs(d) >= shared["threshold"] * np.abs(total - d) for d in found], axis=0)
    return np.sum([w * d for w, d in zip(weights, found, strict=True)], axis=0) * (votes >= shared["agree"])


CASES: list[tuple[Reference, dict[str, float]]] = [
    *((tsv, {"rank": rank, "blend": blend}) for rank in (0.4, 1.0) for blend in (0.3, 1.0)),
    *((wudi, {"blend": blend}) for blend in (0.05, 0.5, 0.95)),
    *((star, {"eta": eta}) for eta in (0.2, 0.6, 0.95)),
    *((knots, {"density": density}) for density in (0.2, 0.7)),
    *((isotropic, {"gamma": gamma}) for gamma in (0.0, 0.6)),
    *((subspace_boosting, {"beta": beta}) for beta in (0.0, 0.4, 0.8)),
    *((consensus, {"threshold": threshold, "agree": agree}) for threshold in (0.2, 0.8) for agree in (1.0, 2.0, 3.0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{[*case[1].values()]}")
def test_a_method_is_its_formula(case: tuple[Reference, dict[str, float]]) -> None:
    reference, shared = case
    method = METHODS[reference.__name__]
    inputs = with_values(adapters(), method, shared)
    expected = reference(deltas(inputs), WEIGHTS, inputs.shared)
    np.testing.assert_allclose(change(inputs, method), expected, atol=2e-5 * np.abs(expected).max())


# --- what all of them promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEPARATING.values(), ids=SEPARATING)
@pytest.mark.parametrize("of", [adapters, lambda: dense(adapters())], ids=["adapters", "dense"])
def test_the_neutral_value_is_task_arithmetic_bit_for_bit(method: Method, of: Callable[[], TensorGroup]) -> None:
    assert len(NEUTRAL[method.name]) == 1
    inputs = with_values(of(), method, NEUTRAL[method.name])
    assert torch.equal(bits(method.merge(inputs)), bits(METHODS["task_arithmetic"].merge(inputs)))
    other = with_values(of(), method)
    assert not torch.equal(method.merge(other), METHODS["task_arithmetic"].merge(other))


@pytest.mark.parametrize("method", SEPARATING.values(), ids=SEPARATING)
def test_a_model_alone_and_what_is_no_matrix_are_task_arithmetic(method: Method) -> None:
    inputs = adapters()
    alone = with_values(inputs, method, weights=(0.0, 0.8, 0.0))
    assert torch.equal(bits(method.merge(alone)), bits(METHODS["task_arithmetic"].merge(alone)))
    if method.name != "consensus":  # it acts on entries
        vectors = replace(inputs, base=random((9,)), models=[random((9,), seed) for seed in (1, 2, 3)])
        merged = method.merge(with_values(vectors, method))
        assert torch.equal(bits(merged), bits(METHODS["task_arithmetic"].merge(with_values(vectors, method))))


@pytest.mark.parametrize("method", SEPARATING.values(), ids=SEPARATING)
def test_the_order_of_the_models_does_not_matter(method: Method) -> None:
    inputs = adapters()
    order = (2, 0, 1)
    other = replace(inputs, models=[inputs.models[place] for place in order])
    merged = method.merge(with_values(inputs, method))
    again = method.merge(with_values(other, method, weights=[WEIGHTS[place] for place in order]))
    torch.testing.assert_close(again, merged, rtol=0, atol=1e-5 * float(merged.abs().max()))


@pytest.mark.parametrize(
    ("name", "weights", "strengths"),
    [
        *((name, WEIGHTS, (2.0, 3.0, 4.0)) for name in ("tsv", "wudi", "knots")),
        *((name, (1.0,) * 3, (2.0,) * 3) for name in ("isotropic", "subspace_boosting")),
    ],
)
@pytest.mark.parametrize("of", [lambda of: of, dense], ids=["adapters", "dense"])
def test_task_vectors_without_common_directions_are_added(
    name: str, weights: tuple[float, ...], strengths: tuple[float, ...], of: Callable[[TensorGroup], TensorGroup]
) -> None:
    """The last two change what is unequally strong; STAR and consensus leave out parts of any task vector."""
    base = random((18, 24), 9)
    left, right = torch.linalg.qr(random((18, 9)))[0], torch.linalg.qr(random((24, 9), 1))[0]
    parts = zip([slice(3 * place, 3 * place + 3) for place in range(3)], strengths, strict=True)
    models = [LowRank(base, left[:, part] * strength, right.T[part]) for part, strength in parts]
    inputs = of(TensorGroup(base, models, {}, {}, [0] * 3))
    merged = METHODS[name].merge(with_values(inputs, METHODS[name], weights=weights))
    plain = METHODS["task_arithmetic"].merge(with_values(inputs, METHODS[name], weights=weights))
    torch.testing.assert_close(merged, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SEPARATING.values(), ids=SEPARATING)
@pytest.mark.parametrize(
    "models",
    [
        pytest.param(lambda _base, model, _: [model] * 3, id="equal"),
        pytest.param(lambda _, *both: [*both], id="opposite"),
        pytest.param(lambda base, model, _: [model, base], id="one is the base"),
        pytest.param(lambda base, *_: [base, base.clone()], id="all are the base"),
        pytest.param(lambda base, model, _: [LowRank(base, 0 * model.up, model.down)] * 2, id="zero factors"),
    ],
)
def test_task_vectors_that_depend_on_each_other_give_a_finite_merge(
    method: Method, models: Callable[[Tensor, LowRank, LowRank], list[Weight]]
) -> None:
    base, up, down = random((18, 24), 9), random((18, 3)), random((3, 24), 1)
    given = models(base, LowRank(base, up, down), LowRank(base, -up, down))
    inputs = with_values(TensorGroup(base, given, {}, {}, [0] * len(given)), method)
    merged = method.merge(inputs)
    assert torch.isfinite(merged).all()
    if all(isinstance(model, Tensor) for model in given):
        torch.testing.assert_close(merged, base, rtol=0, atol=0)


@pytest.mark.parametrize("method", SEPARATING.values(), ids=SEPARATING)
def test_adapters_of_a_rank_above_the_sides_of_the_matrix_are_merged_like_smaller_ones(method: Method) -> None:
    inputs = with_values(adapters(shape=(6, 8), rank=11), method)
    smaller: list[Weight] = []
    for delta in deltas(inputs):
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        smaller.append(LowRank(inputs.origin, *(torch.from_numpy(each).float() for each in (u * s, v))))
    merged = method.merge(inputs)
    same = method.merge(replace(inputs, models=smaller))
    torch.testing.assert_close(merged, same, rtol=0, atol=1e-4 * float(merged.abs().max()))


def test_wudi_without_a_ridge_has_the_least_loss_of_the_paper() -> None:
    """The loss of FusionBench's code, Σ ‖(Δ - δᵢ)δᵢᵀ‖²/‖δᵢ‖², which is 0 where rank and inputs allow it."""

    def loss(total: Matrix) -> float:
        return float(sum((((total - d) @ d.T) ** 2).sum() / (d**2).sum() for d in found))

    inputs = with_values(adapters(), METHODS["wudi"], {"blend": 1.0}, (1.0, 1.0, 1.0))
    found = deltas(inputs)
    assert loss(change(inputs, METHODS["wudi"])) < 1e-6 * loss(np.sum(found, axis=0))


# --- decompositions -------------------------------------------------------------------------------------------------


def test_a_large_matrix_is_decomposed_near_the_optimum() -> None:
    """The randomized decomposition loses hardly more than the best one of this rank."""
    shape = (spectral.EXACT + 40, spectral.EXACT + 90)
    decay = torch.arange(1.0, 81.0) ** -1.0
    matrix = (random((shape[0], 80)) * decay) @ random((80, shape[1]), 1) / shape[0]
    found = spectral.of_matrix(matrix, 20)
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    best = math.sqrt((s[20:] ** 2).sum())
    lost = np.linalg.norm(matrix.double().numpy() - (found.left * found.values) @ found.right)
    assert best <= lost * (1 + 1e-6)
    assert lost <= 1.01 * best
    np.testing.assert_allclose(found.values[:10], s[:10], rtol=1e-3)
    again = spectral.of_matrix(matrix, 20)
    assert all(np.array_equal(getattr(found, part), getattr(again, part)) for part in ("left", "values", "right"))


def test_an_adapter_is_decomposed_exactly() -> None:
    inputs = with_values(adapters(), METHODS["tsv"])
    for place, found in enumerate(spectral.vectors(inputs)):
        assert len(found.values) == RANK
        np.testing.assert_allclose((found.left * found.values) @ found.right, deltas(inputs)[place], atol=1e-5)
        np.testing.assert_allclose(found.left.T @ found.left, np.eye(RANK), atol=1e-5)
