"""What every merge method promises, and that it computes what mergekit computes."""

import gc
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from llmevo.errors import CandidateError
from llmevo.merging.methods.base import Cache, TensorGroup, divisor
from llmevo.merging.methods.registry import METHODS, Method, Parameter
from llmevo.merging.preparation.registry import STEPS
from llmevo.models.checkpoints import Weight
from llmevo.testing import MergeMethodContract
from support.checkpoints import bits, mergekit

LARGE = (401, 403)
"""More than two blocks, none of them whole rows."""

SEVERAL = 3
"""How many models are merged where a method does not say."""


def params(names: Sequence[str]) -> list[object]:
    return [pytest.param(METHODS[name], id=name) for name in names]


EVERY = params([*METHODS])
ON_TASK_VECTORS = params([name for name, method in METHODS.items() if method.takes_base])
WEIGHTED = params([name for name, method in METHODS.items() if "weight" in method.each])
MANY = [name for name, method in METHODS.items() if method.models[1] != 1]
OF_MANY = params(MANY)
TRIMMED = params([name for name, method in METHODS.items() if "density" in method.each])


def test_every_parameter_of_a_method_or_a_step_has_a_line_that_says_what_it_does() -> None:
    declared = [of for method in METHODS.values() for of in (*method.each.items(), *method.shared.items())]
    declared += [of for step in STEPS.values() for of in step.parameters.items()]
    assert [name for name, parameter in declared if not parameter.meaning or "\n" in parameter.meaning] == []


def some(count: int, shape: tuple[int, ...] = (7, 11), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def some_fine_tunes(count: int, shape: tuple[int, ...] = (7, 11), seed: int = 0) -> list[Tensor]:
    """A base and models near it."""
    base, *changes = some(count, shape, seed)
    return [base, *(base + 0.1 * change for change in changes)]


def how_many(method: Method) -> int:
    """How many models the method merges here."""
    return min(SEVERAL, method.models[1] or SEVERAL)


def inputs_of(
    method: Method,
    base: Tensor | None,
    models: Sequence[Weight],
    each: Mapping[str, Sequence[float]] | None = None,
    shared: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorGroup:
    """Inputs with the method's defaults filled in: weight 1, and the middle of the box for what has to be given."""

    def value(name: str, parameter: Parameter) -> float:
        if parameter.default is None:
            return 1.0 if name == "weight" else 0.5 * (parameter.high or 1.0)
        return float(parameter.default)

    filled = {name: [value(name, p)] * len(models) for name, p in method.each.items()}
    fixed = {name: value(name, p) for name, p in method.shared.items()}
    needs_base = method.takes_base or method.pair or method.may_take_base
    origin = base if needs_base else None
    places = [*(seeds or range(len(models)))]
    return TensorGroup(origin, models, {**filled, **(each or {})}, {**fixed, **(shared or {})}, places, dtype)


def merged(
    method: Method,
    base: Tensor | None,
    models: Sequence[Weight],
    each: Mapping[str, Sequence[float]] | None = None,
    shared: Mapping[str, float] | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    return method.merge(inputs_of(method, base, models, each, shared, seeds))


def typical(method: Method, seed: int = 0, shape: tuple[int, ...] = (7, 11)) -> TensorGroup:
    """Inputs that leave nothing out: different weights, trimmed, every gene inside its bounds."""
    base, *models = some_fine_tunes(1 + how_many(method), shape, seed)
    values = {"weight": [0.7, 0.3, 0.5], "density": [0.4, 0.8, 0.6], "gamma": [0.1, 0.02, 0.05]}
    each = {name: values[name][: len(models)] for name in method.each if name in values}
    shared = {"select_topk": 0.4, "lambda": 0.8, "epsilon": 0.05, "t": 0.01 if method.name == "nearswap" else 0.4}
    own = {name: value for name, value in shared.items() if name in method.shared}
    return inputs_of(method, base, models, each, own, seeds=[11, 12, 13][: len(models)])


# --- what every method promises ---------------------------------------------------------------------------------


class TestEveryMethod(MergeMethodContract):
    fixed: Mapping[str, float] = {"lambda": 0.8, "epsilon": 0.05}

    @pytest.fixture(params=METHODS.values(), ids=[*METHODS])
    def method(self, request: pytest.FixtureRequest) -> Method:
        return request.param


@pytest.mark.parametrize("method", [p for p in WEIGHTED if p not in params(["linear", "nuslerp"])])
@pytest.mark.parametrize("normalize", [0.0, 1.0])
def test_weight_0_everywhere_gives_the_base_bit_for_bit(method: Method, normalize: float) -> None:
    base, *models = some(4)
    for name in ("normalize", "normalize_weights"):
        if name in method.shared:
            result = merged(method, base, models, {"weight": [0.0] * 3}, {name: normalize})
            assert torch.equal(bits(result), bits(base))


@pytest.mark.parametrize("method", [p for p in OF_MANY if p not in params(["nuslerp", "model_stock"])])
def test_one_model_alone_is_that_model(method: Method) -> None:
    base, model = some(2)
    torch.testing.assert_close(merged(method, base, [model]), model, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "with_base"),
    [
        (METHODS[name], base)
        for name in MANY
        for base in (True, False)
        # What mergekit lacks separates models that have something in common: see test_separating.py.
        if METHODS[name].in_mergekit and (base or METHODS[name].may_take_base)
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "base" if value else "no base",
)
def test_models_that_are_all_the_same_merge_to_that_model(method: Method, with_base: bool) -> None:
    base, model = some(2)
    own = {"weight": [1.0 / how_many(method)] * how_many(method)} if "weight" in method.each else {}
    result = merged(method, base if with_base else None, [model.clone() for _ in range(how_many(method))], own)
    torch.testing.assert_close(result, model, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", OF_MANY)
def test_the_order_of_the_models_does_not_matter(method: Method) -> None:
    inputs = typical(method)
    first = method.merge(inputs)
    for order in itertools.permutations(range(len(inputs.models))):
        moved = replace(
            inputs,
            models=[inputs.models[i] for i in order],
            each={name: [values[i] for i in order] for name, values in inputs.each.items()},
            seeds=[inputs.seeds[i] for i in order],
        )
        torch.testing.assert_close(method.merge(moved), first, rtol=1e-5, atol=1e-6)


TENSORS: dict[str, list[Tensor]] = {
    "a scalar": some(4, ()),
    "no entry": [torch.zeros(0, 3)] * 4,
    "no column": [torch.zeros(3, 0)] * 4,
    "one entry": some(4, (1,)),
    "one by one": some(4, (1, 1)),
    "one column": some(4, (5, 1)),
    "a vector": some(4, (5,)),
    "a matrix": some(4, (3, 4)),
    "three dimensions": some(4, (2, 3, 2)),
    "zeros": [torch.zeros(3, 2)] * 4,
    "a zero base": [torch.zeros(6), *some(3, (6,))],
    "one zero model": [*some(3, (6,)), torch.zeros(6)],
    "all the same": some(1, (6,)) * 4,
    "all but the base the same": [*some(1, (6,)), *(some(1, (6,), seed=1) * 3)],
    "opposites": [tensor * sign for tensor, sign in zip(some(1, (6,)) * 4, (0, 1, -1, 1), strict=True)],
    "balanced": [torch.zeros(2), *(torch.tensor(v) for v in ([1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]))],
    "shifted rows": [torch.ones(2, 3) * shift for shift in range(4)],
    "tiny": [tensor * 1e-30 for tensor in some(4, (6,))],
    "large": [tensor * 1e15 for tensor in some(4, (6,))],
}


@st.composite
def points(draw: st.DrawFn, method: Method) -> tuple[dict[str, list[float]], dict[str, float]]:
    """A point of a method's box, weights also below 0, with any of its switches."""

    def value(name: str, parameter: Parameter) -> float:
        if isinstance(parameter.default, bool):
            return float(draw(st.booleans()))
        if parameter.low is None or parameter.high is None:
            assert parameter.default is not None
            return parameter.default
        low = -parameter.high if name == "weight" else parameter.low
        special = [low, parameter.low, parameter.high, parameter.start or 0.0, min(parameter.low + 1e-4, 0.5), 0.5]
        inside = [value for value in special if low <= value <= parameter.high]
        return draw(st.sampled_from(inside) | st.floats(low, parameter.high))

    each = {name: [value(name, p) for _ in range(how_many(method))] for name, p in method.each.items()}
    if "weight" in each and draw(st.booleans()):
        each["weight"][-1] = -sum(each["weight"][:-1]) + draw(st.sampled_from([0.0, 1e-12, -1e-9, 1e-5]))
    return each, {name: value(name, p) for name, p in method.shared.items()}


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_point_within_the_bounds_crashes_or_gives_what_is_not_finite(method: Method, data: st.DataObject) -> None:
    base, *models = TENSORS[data.draw(st.sampled_from([*TENSORS]))]
    models = models[-how_many(method) :]
    each, shared = data.draw(points(method))
    origin = None if method.may_take_base and data.draw(st.booleans()) else base
    try:
        result = merged(method, origin, models, each, shared)
    except CandidateError:
        around = zip(each["density"], each["epsilon"], strict=True)
        assert any(d < 1.0 and not (d - e > 0.0 and d + e < 1.0) for d, e in around)
        return
    assert result.shape == base.shape
    assert torch.isfinite(result).all()


BLENDED = [name for name, method in METHODS.items() if "blend" in method.shared]


@pytest.mark.parametrize("name", BLENDED)
@pytest.mark.parametrize("blend", [5e-324, 1e-310, 1e-9])
def test_the_least_blend_is_next_to_none(name: str, blend: float) -> None:
    base, *models = some_fine_tunes(4, (7, 11), 0)
    plain, least = (merged(METHODS[name], base, models, shared={"blend": value}) for value in (0.0, blend))
    assert torch.allclose(plain, least, atol=1e-5)


# --- the family on task vectors ---------------------------------------------------------------------------------


def test_a_value_of_the_last_genes_is_kept_unless_nothing_is() -> None:
    made: list[float] = []

    def array(tag: float) -> NDArray[np.float32]:
        made.append(tag)
        return np.zeros(60, np.float32)

    for limit, again in ((400, []), (100, []), (0, [0.5, 0.6])):
        cache = Cache(limit)
        made.clear()
        for tag in (0.5, 0.5, 0.6, 0.6):
            cache.latest("a", tag, lambda tag=tag: array(tag))
        assert sorted(made) == sorted([0.5, 0.6, *again])


@pytest.mark.parametrize("method", EVERY)
def test_with_a_limit_of_0_no_array_of_a_merge_is_kept(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[object]] = []

    def watched(make: Callable[[], object]) -> Callable[[], object]:
        def made() -> object:
            value = make()
            for part in value if isinstance(value, tuple) else [value]:
                if getattr(part, "nbytes", 0):
                    held.append(weakref.ref(part))
            return value

        return made

    get, latest = Cache.get, Cache.latest
    monkeypatch.setattr(Cache, "get", lambda self, key, make: get(self, key, watched(make)))
    monkeypatch.setattr(Cache, "latest", lambda self, key, tag, make: latest(self, key, tag, watched(make)))
    inputs, cache = TestEveryMethod().typical(method, (40, 50)), Cache(0)
    method.merge(replace(inputs, keys=[*range(len(inputs.models))], cache=cache))
    gc.collect()
    assert not [of for of in held if of() is not None]
    assert cache.used == 0


def test_the_divisor_of_a_sum_near_0_is_1() -> None:
    assert divisor([0.5, -0.5]) == 1.0
    assert divisor([0.5, -0.25]) == 0.25
    assert divisor([-1.0, -1.0]) == -2.0
    assert divisor([1.0, -0.9999]) == pytest.approx(1e-4)


@pytest.mark.parametrize("method", [p for p in WEIGHTED if p not in params(["nuslerp"])])
@pytest.mark.parametrize("rest", [0.0, 1e-12, -1e-12, 1e-9])
def test_weights_that_sum_to_nearly_0_do_not_blow_up(method: Method, rest: float) -> None:
    base, *models = some(3)
    own = {name: 1.0 for name in ("normalize", "normalize_weights") if name in method.shared}
    assert float(merged(method, base, models, {"weight": [0.5, -0.5 + rest]}, own).abs().max()) < 20


def test_normalize_makes_linear_a_mean_and_its_absence_a_sum() -> None:
    models = [torch.ones(2), torch.full((2,), 3.0)]
    weights = {"weight": [0.5, 1.5]}
    assert merged(METHODS["linear"], None, models, weights).tolist() == [2.5, 2.5]
    assert merged(METHODS["linear"], None, models, weights, {"normalize": 0.0}).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("method", [p for p in ON_TASK_VECTORS if p in params([*METHODS][2:10])])
def test_lambda_scales_what_is_added_to_the_base(method: Method) -> None:
    base, *models = some(3)
    plain, scaled = (merged(method, base, models, shared={"lambda": times}) for times in (1.0, 0.25))
    torch.testing.assert_close(scaled - base, (plain - base) * 0.25, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", TRIMMED)
@pytest.mark.parametrize("normalize", [0.0, 1.0])
def test_density_1_trims_nothing(method: Method, normalize: float) -> None:
    base, *models = some(4)
    each = {"weight": [0.3, 0.9, -0.4]}
    untrimmed = METHODS["ties" if method.name.endswith("ties") or method.name == "della" else "task_arithmetic"]
    results = [merged(m, base, models, each, {"normalize": normalize}) for m in (method, untrimmed)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def changed(method: Method, base: Tensor, model: Tensor, density: float, **shared: float) -> Tensor:
    """The task vector of one model with weight 1 after trimming or dropping; `base` is of zeros."""
    each = {"density": [density]} | ({"gamma": [shared.pop("gamma")]} if "gamma" in shared else {})
    return merged(method, base, [model], each, {"normalize": 0.0, "rescale": 0.0, **shared})


@pytest.mark.parametrize(("density", "size", "kept"), [(0.01, 1, 1), (0.01, 50, 1), (0.5, 10, 5), (0.29, 100, 28)])
def test_ties_keeps_the_largest_entries_and_at_least_one(density: float, size: int, kept: int) -> None:
    (delta,) = some(1, (size,))
    trimmed = changed(METHODS["ties"], torch.zeros(size), delta, density)
    held = trimmed != 0
    assert int(held.sum()) == kept
    assert torch.equal(trimmed[held], delta[held])
    assert float(delta[held].abs().min()) >= float(delta[~held].abs().max() if size > kept else 0.0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("density", [0.0001, 0.1, 0.37, 0.8, 0.95])
def test_of_equal_entries_exactly_as_many_are_kept_as_asked_for(density: float, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randint(1, 6, LARGE, generator=generator).bfloat16() * torch.where(some(1, LARGE)[0] > 0, 1, -1)
    base, size = torch.zeros(LARGE, dtype=torch.bfloat16), delta.numel()
    # Of equal entries those that come first count as the larger ones.
    order = torch.argsort(delta.float().abs().reshape(-1), descending=True, stable=True)
    torch.set_num_threads(threads)
    try:
        for name, gamma in (("ties", 0.0), ("breadcrumbs", 0.0), ("breadcrumbs", 0.03), ("breadcrumbs_ties", 0.03)):
            result = changed(METHODS[name], base, delta, density, **({"gamma": gamma} if gamma else {}))
            left_out = min(int((gamma or (0.01 if name != "ties" else 0.0)) * size), size - int(density * size))
            expected = torch.zeros(size)
            kept = order[left_out : left_out + int(density * size)]
            expected[kept] = delta.float().reshape(-1)[kept]
            assert torch.equal(result.reshape(-1), expected), name
    finally:
        torch.set_num_threads(1)


def test_ties_leaves_out_the_entries_against_the_elected_sign() -> None:
    models = [torch.tensor([2.0, 1.0, -1.0]), torch.tensor([-1.0, 3.0, -3.0])]
    assert merged(METHODS["ties"], torch.zeros(3), models).tolist() == [2.0, 2.0, -2.0]


def test_ties_takes_the_positive_entries_where_the_signs_balance() -> None:
    base, models = torch.zeros(2), [torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 1.0])]
    result = merged(METHODS["ties"], base, models)
    assert result.tolist() == [2.0, 1.0]
    assert torch.equal(result, by_mergekit("ties", base, models, {"weight": [1.0, 1.0]}, {}))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_masks_follow_the_seed_and_nothing_else(name: str) -> None:
    base, model = some(2, (40, 40))

    def masked(seed: int) -> Tensor:
        torch.rand(5)  # the global generator moves on and must not matter
        return merged(METHODS[name], base, [model], {"density": [0.5]}, seeds=[seed])

    assert torch.equal(masked(7), masked(7))
    assert not torch.equal(masked(7), masked(8))
    assert torch.equal(masked(2**64 - 1), masked(2**64 - 1))


@pytest.mark.parametrize("distance", [1e-8, 3e-10, 1e-16])
def test_a_density_just_under_1_keeps_everything(distance: float) -> None:
    base, model = torch.zeros(40, 40), torch.ones(40, 40)
    kept = merged(METHODS["dare_linear"], base, [model], {"density": [1.0 - distance]}, {"rescale": 0.0}, [3])
    assert torch.equal(kept, model)


def test_the_masks_of_two_seeds_have_nothing_to_do_with_each_other() -> None:
    ones, zeros = torch.ones(LARGE), torch.zeros(LARGE)
    for second in (8, 7 + 2**32, 7 + 2**63):
        one, other = (
            merged(METHODS["dare_linear"], zeros, [ones], {"density": [0.5]}, {"rescale": 0.0}, [seed])
            for seed in (7, second)
        )
        # Five standard deviations of the share of independent draws.
        assert float((one * other).mean()) == pytest.approx(0.25, abs=5 * 0.44 / ones.numel() ** 0.5)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.1 + 1e-7, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_dropped_is_made_up_for(name: str, density: float) -> None:
    (delta,), zeros, size = some(1, (200, 200)), torch.zeros(200, 200), 200 * 200
    epsilon = {"epsilon": [min(density, 1 - density) / 2]} if name == "della_linear" else {}

    def left(**shared: float) -> Tensor:
        return merged(METHODS[name], zeros, [delta], {"density": [density], **epsilon}, shared)

    plain = left(rescale=0.0)
    assert torch.equal(plain[plain != 0], delta[plain != 0])
    assert float((plain != 0).float().mean()) == pytest.approx(density, abs=5 * 0.5 / size**0.5)
    assert float(left(rescale=1.0).abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
    # Divided by its probability, an entry is what it was on average.
    total, spread = float(delta.sum()), float((delta.square() * (1.5 / density)).sum()) ** 0.5
    assert float(left(rescale=1.0, inverse_density=1.0).sum()) == pytest.approx(total, abs=5 * spread)


def test_dare_does_not_scale_up_what_is_almost_nothing() -> None:
    kept = merged(METHODS["dare_linear"], torch.zeros(4), [torch.full((4,), 1e-9)], {"density": [0.5]})
    assert float(kept.max()) <= 1.001e-9


def test_della_keeps_large_entries_more_often_than_small_ones() -> None:
    row = torch.arange(1.0, 101.0).repeat(400, 1)
    each = {"density": [0.5], "epsilon": [0.3]}
    kept = merged(METHODS["della_linear"], torch.zeros_like(row), [row], each, {"rescale": 0.0}) != 0
    expected = 0.2 + 0.6 * torch.arange(100) / 99
    # Five standard deviations of a share of 400 draws.
    torch.testing.assert_close(kept.float().mean(0), expected, rtol=0, atol=5 * 0.5 / 400**0.5)


# --- the other methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_starts_at_the_base_and_ends_at_the_other(t: float) -> None:
    base, model = some(2)
    result = merged(METHODS["slerp"], base, [model], shared={"t": t})
    torch.testing.assert_close(result, model if t else base, rtol=0, atol=1e-6)


def test_slerp_from_the_other_end_is_the_same_walk() -> None:
    one, other = some(2)
    there = merged(METHODS["slerp"], one, [other], shared={"t": 0.3})
    back = merged(METHODS["slerp"], other, [one], shared={"t": 0.7})
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_on_the_sphere_between_vectors_of_one_length_the_length_is_kept(name: str) -> None:
    method = METHODS[name]
    units = [tensor / tensor.norm() for tensor in some(3)]
    base, models = (units[0], units[1:2]) if method.pair else (None, units[: how_many(method)])
    assert float(merged(method, base, models).norm()) == pytest.approx(1.0, abs=1e-5)


def test_nuslerp_takes_half_of_each_where_weights_cancel_out() -> None:
    _, *models = some(3)
    halves = [merged(METHODS["nuslerp"], None, models, {"weight": w}) for w in ([0.5, 0.5], [0.5, -0.5], [0.0, 0.0])]
    assert torch.equal(halves[0], halves[1])
    assert torch.equal(halves[0], halves[2])


def test_multislerp_is_linear_where_the_directions_cancel_out() -> None:
    (model,) = some(1)
    models = [model, -model, torch.zeros_like(model)]
    result = merged(METHODS["multislerp"], None, models, {"weight": [0.5, 0.5, 0.0]})
    torch.testing.assert_close(result, torch.zeros_like(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, -0.5, -2.0])
def test_della_needs_chances_between_0_and_1(epsilon: float) -> None:
    base, *models = some(3)
    with pytest.raises(CandidateError, match="density ± epsilon must lie between 0 and 1"):
        merged(METHODS["della"], base, models, {"density": [0.5, 0.5], "epsilon": [epsilon] * 2})


def test_karcher_is_as_far_from_each_of_three_directions() -> None:
    result = merged(METHODS["karcher"], None, [*(3.0 * torch.eye(3))])
    torch.testing.assert_close(result, torch.full((3,), 3.0**0.5), rtol=1e-5, atol=0)


def test_karcher_of_models_without_length_is_their_mean() -> None:
    models = [torch.full((2,), 1e-7), torch.full((2,), 3e-7)]
    torch.testing.assert_close(merged(METHODS["karcher"], None, models), torch.full((2,), 2e-7))


def test_model_stock_stays_at_the_base_where_the_models_have_nothing_in_common() -> None:
    base = torch.ones(3)
    assert torch.equal(merged(METHODS["model_stock"], base, [base + row for row in torch.eye(3)]), base)


def test_sce_selects_exactly_the_share_of_the_entries_that_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [torch.randint(1, 3, LARGE, generator=generator).float() for _ in range(2)]
    differ = int((models[0] != models[1]).sum())
    for topk in (0.1, 0.5, 0.9999, 1.0):
        changes = int((merged(METHODS["sce"], torch.zeros(LARGE), models, shared={"select_topk": topk}) != 0).sum())
        assert changes == (LARGE[0] * LARGE[1] if topk == 1.0 else int(topk * differ))


def test_ram_takes_the_mean_where_models_overlap_and_all_where_one_is_alone() -> None:
    models = [torch.tensor([2.0, 4.0, 0.0, 1e-6]), torch.tensor([4.0, 0.0, 0.0, 0.0])]
    assert merged(METHODS["ram"], torch.zeros(4), models).tolist() == [3.0, 4.0, 0.0, 0.0]
    # The first model shares one entry and has one alone, so its ratio is 1 and α is the limit.
    plus = merged(METHODS["ramplus_tl"], torch.zeros(4), models, shared={"r": 0.5, "alpha": 0.25})
    assert plus.tolist() == [3.0, 4.5, 0.0, 0.0]


def test_nearswap_moves_by_t_and_takes_over_what_is_nearer() -> None:
    base, model = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.001, 1.0, -1.0])
    result = merged(METHODS["nearswap"], base, [model], shared={"t": 0.01})
    torch.testing.assert_close(result, torch.tensor([0.001, 0.01, -0.01]))
    assert torch.equal(merged(METHODS["nearswap"], base, [model], shared={"t": 0.0}), base)


def test_arcee_fusion_takes_entries_over_as_they_are_or_not_at_all() -> None:
    base, model = some_fine_tunes(2, (50, 60))
    result = merged(METHODS["arcee_fusion"], base, [model])
    fused = result != base
    assert torch.equal(result[fused], model[fused])
    assert 0.0 < float(fused.float().mean()) < 0.25


def test_passthrough_copies_bit_for_bit_and_scales() -> None:
    model = torch.tensor([-0.0, 1.5])
    assert torch.equal(bits(merged(METHODS["passthrough"], None, [model])), bits(model))
    assert merged(METHODS["passthrough"], None, [model], {"scale": [2.0]}).tolist() == [0.0, 3.0]


# --- the same numbers as mergekit -------------------------------------------------------------------------------


def by_mergekit(
    name: str,
    base: Tensor | None,
    models: Sequence[Tensor],
    each: Mapping[str, Sequence[float]],
    shared: Mapping[str, float],
) -> Tensor:
    """mergekit's own method on one tensor of each model; models are called 1, 2, … and the base 0."""
    tensors = mergekit("merge_methods.base")
    method = mergekit("merge_methods.registry").get(name)
    entries = [] if base is None else [tensors.TensorEntry(id=0, tensor=base, is_base=True)]
    entries += [tensors.TensorEntry(id=place, tensor=model) for place, model in enumerate(models, 1)]
    parameters = {name: dict(enumerate(values, 1)) for name, values in each.items()} | dict(shared)
    (result,) = method((tensors.TensorGroup(entries=tuple(entries)),), parameters=parameters)
    return result


Case = tuple[str, Mapping[str, Sequence[float]], Mapping[str, float]]
NORMALIZED = [{"normalize": False, "lambda": 0.8}, {"normalize": True, "lambda": 1.0}]
RESCALED = [{"normalize": True, "rescale": True}, {"normalize": False, "rescale": False}]
BY_PARTS = [
    {"nuslerp_flatten": True},
    {"nuslerp_flatten": False},
    {"nuslerp_flatten": False, "nuslerp_row_wise": True},
]

UNEQUAL = [[0.0009, 1.0, 0.5], [1e-6, 1.0, -0.25], [1.0, -(1 - 2.0**-11), 0.0]]
"""Weights of which one, or the sum, is under a thousandth of the others."""

CASES: list[Case] = [
    *(
        (name, {"weight": w, **more}, s)
        for name, more in (
            ("task_arithmetic", {}),
            ("ties", {"density": [0.35, 1.0, 0.6]}),
            ("breadcrumbs_ties", {"density": [0.35, 1.0, 0.8], "gamma": [0.05, 0.01, 0.2]}),
        )
        for w in UNEQUAL
        for s in NORMALIZED
    ),
    *(("linear", {"weight": w}, {"normalize": True}) for w in UNEQUAL),
    *(
        (name, {"weight": w, "density": [1.0] * 3}, NORMALIZED[1])
        for name in ("dare_linear", "dare_ties", "della", "della_linear")
        for w in UNEQUAL
    ),
    *(("nuslerp", {"weight": w}, BY_PARTS[0]) for w in ([0.0009, 1.0], [1.0, -0.75])),
    ("multislerp", {"weight": UNEQUAL[0]}, {"normalize_weights": True}),
    *(
        ("linear", {"weight": w}, {"normalize": n})
        for w in ([0.3, 0.9, 0.4], [1.5, -0.7, 0.2], [0.0, 1.0, 0.0])
        for n in (False, True)
    ),
    *(("task_arithmetic", {"weight": w}, s) for w in ([0.3, 0.9, 0.4], [1.5, -0.7, 0.2]) for s in NORMALIZED),
    *(
        ("ties", {"weight": w, "density": [0.35, 1.0, 0.6]}, s)
        for w in ([0.3, 0.9, 0.4], [1.5, -0.7, 0.2], [0.0, 1.0, 0.0])
        for s in (*NORMALIZED, *RESCALED)
    ),
    *(
        (name, {"weight": [0.3, 0.9, -0.4], "density": [1.0] * 3}, s)
        for name in ("dare_linear", "dare_ties", "della", "della_linear")
        for s in NORMALIZED
    ),
    *(
        (name, {"weight": [0.3, 0.9, -0.4], "density": [0.35, 1.0, 0.8], "gamma": [0.05, 0.01, 0.4]}, s)
        for name in ("breadcrumbs", "breadcrumbs_ties")
        for s in (*NORMALIZED, *RESCALED)
    ),
    *(("slerp", {}, {"t": t}) for t in (0.0, 0.1, 0.5, 0.83, 1.0)),
    *(("nuslerp", {"weight": w}, s) for w in ([0.3, 0.6], [1.0, 0.0], [1.0, -0.4], [0.0, 0.0]) for s in BY_PARTS),
    *(
        ("multislerp", {"weight": w}, {"normalize_weights": n})
        for w in ([0.3, 0.6, 0.2], [1.0, -0.4, 0.1], [0.0, 0.0, 1.0])
        for n in (False, True)
    ),
    ("karcher", {}, {}),
    ("karcher", {}, {"max_iter": 2, "tol": 1e-3}),
    ("model_stock", {}, {"filter_wise": False}),
    ("model_stock", {}, {"filter_wise": True}),
    *(("sce", {}, {"select_topk": topk}) for topk in (1.0, 0.9, 0.35, 0.01)),
    ("ram", {}, {"epsilon": 0.05}),
    ("ramplus_tl", {}, {"epsilon": 0.05}),
    ("ramplus_tl", {}, {"epsilon": 0.1, "r": 0.7, "alpha": 0.9}),
    *(("nearswap", {}, {"t": t}) for t in (0.0, 5e-7, 0.003, 0.05)),
    ("passthrough", {"scale": [0.7]}, {}),
]


@pytest.mark.parametrize("shape", [(1,), (6,), (5, 1), (13, 17), LARGE], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{[*case[1].values()]}-{[*case[2].values()]}")
def test_every_method_without_chance_equals_mergekit(case: Case, shape: tuple[int, ...]) -> None:
    name, each, shared = case
    method = METHODS[name]
    takes_base = method.takes_base or method.pair or method.may_take_base
    for apart, with_base in ((0.1, True), (1.0, takes_base), (1.0, False)):
        if with_base != takes_base and not (method.may_take_base and not with_base):
            continue
        first, *changes = some(1 + how_many(method), shape, seed=sum(shape))
        base = first if with_base else None
        models = [first + apart * change for change in changes]
        torch.set_num_threads(2 if shape == LARGE else 1)
        try:
            ours = merged(method, base, models, each, shared)
        finally:
            torch.set_num_threads(1)
        theirs = by_mergekit(name, base, models, each, shared)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("apart", [0.01, -1.0])
def test_slerp_equals_mergekit_where_the_arc_is_a_line(t: float, apart: float) -> None:
    base, noise = some(2, (13, 17))
    other = -base if apart < 0 else base + apart * noise
    theirs = by_mergekit("slerp", base, [other], {}, {"t": t})
    torch.testing.assert_close(merged(METHODS["slerp"], base, [other], shared={"t": t}), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (6,), (5, 1), (13, 17), LARGE], ids=str)
def test_arcee_fusion_equals_mergekit_in_float64(shape: tuple[int, ...]) -> None:
    # In float32 mergekit's divergence of two nearly equal distributions is mostly rounding.
    base, model = some_fine_tunes(2, shape)
    theirs = by_mergekit("arcee_fusion", base.double(), [model.double()], {}, {}).float()
    torch.testing.assert_close(merged(METHODS["arcee_fusion"], base, [model]), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(9,), (13, 17), LARGE], ids=str)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_with_the_same_masks_random_methods_equal_mergekit(
    name: str, rescale: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    base, *models = some_fine_tunes(4, shape)
    each = {"weight": [0.3, 0.9, -0.4], "density": [0.5, 0.3, 0.8]}
    each |= {"epsilon": [0.2, 0.1, 0.15]} if "epsilon" in method.each else {}
    seeds = [5, 6, 7]

    def dropped(place: int, inverse: float) -> Tensor:
        own = {name: [values[place]] for name, values in each.items()} | {"weight": [1.0]}
        alone = {"normalize": 0.0, "rescale": inverse, "inverse_density": inverse}
        zeros, delta = torch.zeros_like(base), models[place] - base
        return merged(method, zeros, [delta], own, alone, seeds=[seeds[place]])

    places = iter(range(3))

    def same_mask(chances: Tensor) -> Tensor:
        place = next(places)
        mask = (dropped(place, 0.0) != 0).reshape(chances.shape)
        scaled = dropped(place, 1.0).reshape(chances.shape)
        delta = (models[place] - base).reshape(chances.shape)
        near = torch.isclose(scaled[mask] * chances[mask], delta[mask], rtol=1e-5, atol=1e-7)
        # mergekit's ranks of equal entries of a row are as its sorting leaves them.
        assert float(near.float().mean()) > 0.9999
        return mask.to(chances.dtype)

    shared = {"normalize": True, "rescale": rescale}
    ours = merged(method, base, models, each, shared, seeds)
    monkeypatch.setattr(torch, "bernoulli", same_mask)
    theirs = by_mergekit(name, base, models, each, shared)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
