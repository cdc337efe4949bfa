"""What every merge method promises, and that it computes what mergekit computes."""

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from checkpoints import mergekit
from torch import Tensor

from llmevo.methods import METHODS, Method, Parameter
from llmevo.methods.base import Inputs, LowRank, divisor
from llmevo.methods.dare_ties import drop
from llmevo.methods.ties import trim

EVERY = [pytest.param(method, id=name) for name, method in METHODS.items()]
ON_TASK_VECTORS = [pytest.param(method, id=name) for name, method in METHODS.items() if method.takes_base]
OF_MANY = [pytest.param(method, id=name) for name, method in METHODS.items() if not method.pair]


def some(count: int, shape: tuple[int, ...] = (7, 11), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def merged(
    method: Method,
    base: Tensor,
    models: Sequence[Tensor],
    each: Mapping[str, Sequence[float]] | None = None,
    shared: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Merge as `merging.merge` does: task vectors where the method takes a base, parameters filled up."""
    tensors = [model - base for model in models] if method.takes_base else [*models]
    defaults = {name: float(p.default or 0.0) for name, p in method.shared.items()}
    ones = {name: [1.0] * len(models) for name in method.each}
    places = seeds or range(len(models))
    return method.merge(Inputs(base, tensors, {**ones, **(each or {})}, {**defaults, **(shared or {})}, [*places]))


@pytest.mark.parametrize("method", ON_TASK_VECTORS)
@pytest.mark.parametrize("normalize", [0.0, 1.0])
def test_weight_0_everywhere_gives_the_base(method: Method, normalize: float) -> None:
    base, *models = some(4)
    result = merged(method, base, models, {"weight": [0.0] * 3}, {"normalize": normalize})
    assert torch.equal(result, base)


@pytest.mark.parametrize("method", EVERY)
def test_one_model_with_weight_1_is_that_model(method: Method) -> None:
    base, *models = some(4)
    if method.pair:
        for t, expected in ((0.0, base), (1.0, models[0])):
            torch.testing.assert_close(merged(method, base, models[:1], shared={"t": t}), expected, rtol=0, atol=1e-6)
        return
    for place, model in enumerate(models):
        weights = [float(place == other) for other in range(3)]
        torch.testing.assert_close(merged(method, base, models, {"weight": weights}), model, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", OF_MANY)
def test_the_order_of_the_models_does_not_matter(method: Method) -> None:
    base, *models = some(4)
    weights, densities, seeds = [0.7, 0.2, 0.5], [0.4, 0.9, 0.6], [11, 12, 13]

    def in_order(order: Sequence[int]) -> Tensor:
        each = {"weight": [weights[i] for i in order], "density": [densities[i] for i in order]}
        own = {name: values for name, values in each.items() if name in method.each}
        return merged(method, base, [models[i] for i in order], own, seeds=[seeds[i] for i in order])

    first = in_order([0, 1, 2])
    for order in itertools.permutations(range(3)):
        torch.testing.assert_close(in_order(order), first, rtol=1e-5, atol=1e-6)


def test_slerp_from_the_other_end_is_the_same_walk() -> None:
    one, other = some(2)
    there = merged(METHODS["slerp"], one, [other], shared={"t": 0.3})
    back = merged(METHODS["slerp"], other, [one], shared={"t": 0.7})
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)


def test_slerp_between_vectors_of_one_length_keeps_the_length() -> None:
    one, other = (tensor / tensor.norm() for tensor in some(2))
    walked = merged(METHODS["slerp"], one, [other], shared={"t": 0.4})
    assert float(walked.norm()) == pytest.approx(1.0, abs=1e-5)


def values_of(parameter: Parameter, name: str, rng: random.Random) -> list[float]:
    assert parameter.low is not None
    assert parameter.high is not None
    low = -parameter.high if name == "weight" else parameter.low
    return [low, parameter.low, parameter.high, rng.uniform(low, parameter.high)]


TENSORS: dict[str, list[Tensor]] = {
    "one entry": some(4, (1,)),
    "one by one": some(4, (1, 1)),
    "a vector": some(4, (5,)),
    "a matrix": some(4, (3, 4)),
    "zeros": [torch.zeros(3, 2)] * 4,
    "one zero model": [torch.zeros(6), *some(3, (6,))],
    "all the same": some(1, (6,)) * 4,
    "opposites": [tensor * sign for tensor, sign in zip(some(1, (6,)) * 4, (1, -1, 1, -1), strict=True)],
    "tiny": [tensor * 1e-30 for tensor in some(4, (6,))],
    "large": [tensor * 1e15 for tensor in some(4, (6,))],
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("method", EVERY)
def test_no_point_within_the_bounds_crashes_or_gives_nan(method: Method, kind: str) -> None:
    base, *models = TENSORS[kind]
    models = models[:1] if method.pair else models
    rng = random.Random(0)
    each = {name: values_of(p, name, rng) for name, p in method.each.items()}
    switches = [name for name, p in method.shared.items() if isinstance(p.default, bool)]
    genes = {name: values_of(p, name, rng) for name, p in method.shared.items() if p.is_gene}
    for on in itertools.product((0.0, 1.0), repeat=len(switches)):
        for _ in range(20):
            result = merged(
                method,
                base,
                models,
                {name: [rng.choice(values) for _ in models] for name, values in each.items()},
                {**dict(zip(switches, on, strict=True)), **{name: rng.choice(v) for name, v in genes.items()}},
            )
            assert result.shape == base.shape
            assert result.dtype == torch.float32
            assert torch.isfinite(result).all()


@pytest.mark.parametrize("method", EVERY)
def test_a_merge_leaves_its_inputs_as_they_were(method: Method) -> None:
    base, *tensors = some(2 if method.pair else 4)
    copies = [tensor.clone() for tensor in (base, *tensors)]
    shared = {name: float(p.default if p.default is not None else 0.5) for name, p in method.shared.items()}
    each = {name: [0.5] * len(tensors) for name in method.each}
    method.merge(Inputs(base, tensors, each, shared, [*range(len(tensors))]))
    assert all(torch.equal(now, before) for now, before in zip((base, *tensors), copies, strict=True))


@pytest.mark.parametrize("method", [m for m in OF_MANY if "normalize" in METHODS[str(m.id)].shared])
@pytest.mark.parametrize("rest", [0.0, 1e-12, -1e-12, 1e-9])
def test_weights_that_sum_to_nearly_0_do_not_blow_up(method: Method, rest: float) -> None:
    base, *models = some(3)
    result = merged(method, base, models, {"weight": [0.5, -0.5 + rest]}, {"normalize": 1.0})
    assert float(result.abs().max()) < 20


def test_the_divisor_of_a_sum_near_0_is_1() -> None:
    assert divisor([0.5, -0.5]) == 1.0
    assert divisor([0.5, -0.25]) == 0.25
    assert divisor([-1.0, -1.0]) == -2.0


def test_normalize_makes_linear_a_mean_and_its_absence_a_sum() -> None:
    models = [torch.ones(2), torch.full((2,), 3.0)]
    weights = {"weight": [0.5, 1.5]}
    assert merged(METHODS["linear"], models[0], models, weights).tolist() == [2.5, 2.5]
    assert merged(METHODS["linear"], models[0], models, weights, {"normalize": 0.0}).tolist() == [5.0, 5.0]


def test_lambda_scales_what_is_added_to_the_base() -> None:
    base, *models = some(3)
    for name in ("task_arithmetic", "ties", "dare_ties"):
        plain = merged(METHODS[name], base, models)
        scaled = merged(METHODS[name], base, models, shared={"lambda": 0.25})
        torch.testing.assert_close(scaled - base, (plain - base) * 0.25, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("density", "size", "kept"), [(0.01, 1, 1), (0.01, 50, 1), (0.5, 10, 5), (0.29, 100, 28)])
def test_trim_keeps_the_largest_entries_and_at_least_one(density: float, size: int, kept: int) -> None:
    (delta,) = some(1, (size,))
    trimmed = trim(delta, density)
    held = trimmed != 0
    assert int(held.sum()) == kept
    assert torch.equal(trimmed[held], delta[held])
    assert float(delta[held].abs().min()) >= float(delta[~held].abs().max() if size > kept else 0.0)


@pytest.mark.parametrize("method", ON_TASK_VECTORS)
@pytest.mark.parametrize("low", [(True, True, True), (True, False, True)])
def test_a_low_rank_task_vector_merges_like_the_tensor_it_stands_for(method: Method, low: tuple[bool, ...]) -> None:
    (base,), ups, downs = some(1, (7, 11)), some(3, (7, 2), seed=1), some(3, (2, 11), seed=2)
    each = {"weight": [0.7, -0.2, 0.5], "density": [0.4, 0.9, 0.6]}
    shared = {"normalize": 0.0, "lambda": 0.8, "rescale": 1.0}
    own = {name: values for name, values in each.items() if name in method.each}
    products = [up @ down for up, down in zip(ups, downs, strict=True)]
    pairs = [LowRank(up, down) for up, down in zip(ups, downs, strict=True)]
    mixed = [pair if use else product for pair, product, use in zip(pairs, products, low, strict=True)]
    whole = method.merge(Inputs(base, products, own, shared, [1, 2, 3]))
    torch.testing.assert_close(method.merge(Inputs(base, mixed, own, shared, [1, 2, 3])), whole, rtol=1e-5, atol=1e-6)


def test_ties_leaves_out_the_entries_against_the_elected_sign() -> None:
    models = [torch.tensor([2.0, 1.0, -1.0]), torch.tensor([-1.0, 3.0, -3.0])]
    result = merged(METHODS["ties"], torch.zeros(3), models, {"weight": [1.0, 1.0]})
    assert result.tolist() == [2.0, 2.0, -2.0]


def test_ties_takes_the_positive_entries_where_the_signs_balance() -> None:
    base, models, each = torch.zeros(2), [torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 1.0])], {"weight": [1.0, 1.0]}
    result = merged(METHODS["ties"], base, models, each)
    assert result.tolist() == [2.0, 1.0]
    assert torch.equal(result, by_mergekit("ties", base, models, each, {}))


# --- the same numbers as mergekit -------------------------------------------------------------------------------


def by_mergekit(
    name: str, base: Tensor, models: Sequence[Tensor], each: Mapping[str, Sequence[float]], shared: Mapping[str, float]
) -> Tensor:
    """mergekit's own method on one tensor of each model; models are called 1, 2, … and the base 0."""
    tensors = mergekit("merge_methods.base")
    method = mergekit("merge_methods.registry").get(name)
    with_base = METHODS[name].takes_base or METHODS[name].pair
    entries = [tensors.TensorEntry(id=0, tensor=base, is_base=True)] if with_base else []
    entries += [tensors.TensorEntry(id=place, tensor=model) for place, model in enumerate(models, 1)]
    parameters = {name: dict(enumerate(values, 1)) for name, values in each.items()} | dict(shared)
    (result,) = method((tensors.TensorGroup(entries=tuple(entries)),), parameters=parameters)
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [[0.3, 0.9, 0.4], [1.5, -0.7, 0.2], [0.0, 1.0, 0.0]])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
def test_weighted_methods_equal_mergekit(name: str, weights: list[float], normalize: bool, seed: int) -> None:
    base, *models = some(4, (13, 17), seed)
    each = {"weight": weights} | ({"density": [0.35, 1.0, 0.6]} if name == "ties" else {})
    shared = {"normalize": normalize} | ({} if name == "linear" else {"lambda": 0.8})
    theirs = by_mergekit(name, base, models, each, shared)
    torch.testing.assert_close(merged(METHODS[name], base, models, each, shared), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("apart", [1.0, 0.01, -1.0])
def test_slerp_equals_mergekit_on_the_arc_and_on_the_line(t: float, apart: float) -> None:
    base, noise = some(2, (13, 17))
    other = -base if apart < 0 else base + apart * noise
    theirs = by_mergekit("slerp", base, [other], {}, {"t": t})
    torch.testing.assert_close(merged(METHODS["slerp"], base, [other], shared={"t": t}), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_dare_ties_that_drops_nothing_equals_mergekit(normalize: bool) -> None:
    base, *models = some(4, (13, 17))
    each, shared = {"weight": [0.3, 0.9, -0.4], "density": [1.0] * 3}, {"normalize": normalize, "lambda": 0.8}
    theirs = by_mergekit("dare_ties", base, models, each, shared)
    torch.testing.assert_close(merged(METHODS["dare_ties"], base, models, each, shared), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rescale", [False, True])
def test_dare_ties_that_drops_has_the_statistics_of_mergekit(density: float, rescale: bool) -> None:
    (delta,) = some(1, (200, 200))
    base, each, shared = torch.zeros_like(delta), {"weight": [1.0], "density": [density]}, {"rescale": rescale}
    ours = merged(METHODS["dare_ties"], base, [delta], each, shared)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = by_mergekit("dare_ties", base, [delta], each, shared)
    for result in (ours, theirs):
        # Five standard deviations of the share of 40000 independent draws.
        assert float((result != 0).float().mean()) == pytest.approx(density, abs=5 * 0.5 / 200)
    assert float(ours.abs().sum()) == pytest.approx(float(theirs.abs().sum()), rel=1e-4 if rescale else 0.1)
    if rescale:
        assert float(ours.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
    else:
        assert torch.equal(ours[ours != 0], delta[ours != 0])


def test_dare_ties_masks_follow_the_seed_and_nothing_else() -> None:
    base, model = some(2, (40, 40))

    def masked(seed: int) -> Tensor:
        torch.rand(5)  # the global generator moves on and must not matter
        return merged(METHODS["dare_ties"], base, [model], {"density": [0.5]}, seeds=[seed])

    assert torch.equal(masked(7), masked(7))
    assert not torch.equal(masked(7), masked(8))


def test_dare_does_not_scale_up_what_is_almost_nothing() -> None:
    delta = torch.full((4,), 1e-9)
    kept = drop(delta, 0.5, rescale=True, generator=torch.Generator().manual_seed(0))
    assert float(kept.max()) <= 1e-9
