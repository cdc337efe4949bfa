"""The search space: which genes there are, where they may go, and the recipe that their values mean."""

import re
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from llmevo.errors import ConfigError
from llmevo.merging.methods.registry import METHODS, WIDEN
from llmevo.merging.recipe import BY_SLICE, Recipe
from llmevo.models.references import ModelReference, short_names
from llmevo.search.genome import Genome, declared_by
from llmevo.search.space import STEP, Genes, SearchSpace
from support.checkpoints import mergekit
from support.recipes import parameters_of

GENELESS = [name for name, method in METHODS.items() if not any(p.is_gene for p in declared_by(method).values())]
SEARCHED = [name for name in METHODS if name not in (*GENELESS, WIDEN)]  # widen's results cannot be searched
THREE = ["org/a", "org/b", "org/c"]


def fitting(method: str, **keys: Any) -> dict[str, Any]:
    """A genome of a method, with as many models as it takes and a base where it can have one."""
    known = METHODS[method]
    models = ["org/a", "org/b"] if known.pair else THREE[: known.models[1] or 2]
    return {
        "merge_method": method,
        "models": models,
        **({"base_model": "org/base"} if known.takes_base else {}),
        **keys,
    }


EVERY: list[dict[str, Any]] = [
    *(fitting(name) for name in SEARCHED),
    *(fitting(name, layer_granularity=2, filters=["self_attn", "mlp"]) for name in SEARCHED),
    *(fitting(name, layer_granularity=1, smooth=True, filters=["mlp"]) for name in SEARCHED),
    *(fitting(name, base_model="org/base") for name in ("linear", "nuslerp", "multislerp", "slerp", "nearswap")),
    {"merge_method": "slerp", "models": THREE, "layer_granularity": 2},
    {"merge_method": "nearswap", "base_model": "org/b"},
    {"merge_method": "slerp", "models": ["org/a"], "base_model": "org/base"},
    fitting("dare_ties", allow_negative_weights=True),
    fitting("task_arithmetic", models=["org/a", "org/base", "org/b"]),
    fitting("ties", parameters={"lambda": 0.5}),
    {"merge_method": "linear", "bounds": {"weight": [0.123456, 0.987654]}},
    *(
        {"merge_method": methods, "base_model": "org/base", **keys}
        for methods in (
            ["ties", "dare_ties", "task_arithmetic"],
            ["karcher", "ties"],
            ["karcher", "ram"],
            ["della", "ram", "ramplus_tl", "sce", "breadcrumbs", "model_stock"],
            ["slerp", "linear", "nuslerp", "arcee_fusion", "nearswap"],
        )
        for keys in ({}, {"layer_granularity": 2, "method_per_slice": True}, {"layer_granularity": 1, "smooth": True})
    ),
    {
        "merge_method": ["slerp", "linear", "della"],
        "models": [*THREE, "org/base"],
        "base_model": "org/base",
        "layer_granularity": 2,
        "method_per_slice": True,
    },
]
SPACES = [pytest.param(keys, id="-".join(map(str, keys.values())).replace("org/", "")) for keys in EVERY]


def space(layers: int = 4, **keys: Any) -> SearchSpace:
    return SearchSpace(Genome.model_validate({"models": ["org/a", "org/b"], **keys}), layers)


@st.composite
def cubes(draw: st.DrawFn, size: int) -> NDArray[np.float64]:
    """A point of the unit cube; every coordinate is 0 or 1 now and then."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    point = random.random(size)
    edges = random.random(size) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    return np.where(edges, np.round(point), point)


def names(of: SearchSpace) -> list[str]:
    return [gene.name for gene in of.genes]


def refusal(**keys: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        space(**keys)
    return re.sub(r"\s+", " ", str(caught.value))


# --- genes ------------------------------------------------------------------------------------------------------


def test_a_gene_is_named_after_its_model_slice_and_parameter() -> None:
    assert names(space(merge_method="linear")) == ["a/all/weight", "b/all/weight"]
    assert names(space(merge_method="ties", base_model="org/base", layer_granularity=2)) == [
        f"{model}/{layers}/{parameter}"
        for layers in ("0-1", "2-3")
        for model in ("a", "b")
        for parameter in ("weight", "density")
    ]


def test_filters_give_genes_of_their_own_and_one_set_for_all_others() -> None:
    assert names(space(merge_method="linear", filters=["self_attn", "mlp"])) == [
        f"{model}/all/{part}/weight" for model in ("a", "b") for part in ("self_attn", "mlp", "other")
    ]


def test_a_base_among_the_models_has_no_genes_where_it_is_the_origin() -> None:
    listed = ["org/a", "org/base"]
    assert names(space(merge_method="task_arithmetic", base_model="org/base", models=listed)) == ["a/all/weight"]
    assert names(space(merge_method="linear", base_model="org/base", models=listed)) == [
        "a/all/weight",
        "base/all/weight",
    ]


def test_slerp_of_two_models_has_one_gene_a_slice_and_of_three_one_a_model() -> None:
    assert names(space(merge_method="slerp", layer_granularity=2)) == ["b/0-1/t", "b/2-3/t"]
    three = ["org/a", "org/b", "org/c"]
    assert names(space(merge_method="slerp", models=three)) == ["a/all/t", "b/all/t", "c/all/t"]


def test_models_of_one_name_are_told_apart() -> None:
    texts = ["one/model", "two/model", "one/model@v2", "x/base+me/lora", "other"]
    given = [ModelReference.parse(text) for text in texts]
    short = short_names(given)
    assert [*short] == given
    assert len({*short.values()}) == len(given)
    assert [short[reference] for reference in (given[0], given[1], given[3], given[4])] == [
        "one-model",
        "two-model",
        "lora",
        "other",
    ]
    assert len({*names(space(merge_method="linear", models=texts))}) == len(texts)


@pytest.mark.parametrize("layers", [4, 30])
def test_slices_that_do_not_divide_the_layers_are_refused_with_those_that_do(layers: int) -> None:
    divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
    with pytest.raises(
        ConfigError, match=rf"layer_granularity: 7 does not divide the {layers} .* use one of {divisors}$"
    ):
        space(layers, merge_method="linear", layer_granularity=7)


def test_slices_cover_every_layer_once() -> None:
    assert space(6, merge_method="linear", layer_granularity=2).spans == [(0, 2), (2, 4), (4, 6)]
    assert space(6, merge_method="linear").spans == [(0, 6)]


# --- bounds -----------------------------------------------------------------------------------------------------


def bounds_of(**keys: Any) -> dict[str, tuple[float, float]]:
    return {gene.parameter: (gene.low, gene.high) for gene in space(base_model="org/base", **keys).genes}


def test_bounds_are_the_methods_own_unless_given() -> None:
    assert bounds_of(merge_method="ties") == {"weight": (0.0, 1.5), "density": (0.01, 1.0)}
    assert bounds_of(merge_method="ties", bounds={"weight": [0.1, 0.8]})["weight"] == (0.1, 0.8)


def test_negative_weights_reach_as_far_down_as_up_and_leave_densities_alone() -> None:
    assert bounds_of(merge_method="ties", allow_negative_weights=True) == {
        "weight": (-1.5, 1.5),
        "density": (0.01, 1.0),
    }
    given = {"allow_negative_weights": True, "bounds": {"weight": (-0.2, 0.7)}}
    assert bounds_of(merge_method="linear", **given)["weight"] == (-0.2, 0.7)


def test_bounds_of_an_unknown_gene_are_refused_with_the_nearest() -> None:
    assert "bounds: ties has no gene 'wieght', did you mean 'weight'?" in refusal(
        merge_method="ties", base_model="org/base", bounds={"wieght": [0, 1]}
    )
    assert "bounds: ties has no gene 'normalize'; known: weight, density" in refusal(
        merge_method="ties", base_model="org/base", bounds={"normalize": [0, 1]}
    )


@pytest.mark.parametrize("wrong", [[1, 0], [0.5, 0.5]])
def test_bounds_in_the_wrong_order_are_refused(wrong: list[float]) -> None:
    assert "bounds: weight needs a lower and a higher number" in refusal(
        merge_method="linear", bounds={"weight": wrong}
    )


def test_bounds_of_a_share_end_at_0_and_1() -> None:
    assert "bounds: density is from 0 to 1, got [0.5, 1.2]" in refusal(
        merge_method="ties", base_model="org/base", bounds={"density": [0.5, 1.2]}
    )


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"merge_method": "liner"}, "merge_method 'liner' is unknown, did you mean 'linear'?"),
        ({"merge_method": "ties"}, "base_model is missing: ties merges what the models add to their base"),
        ({"merge_method": "slerp", "models": THREE, "filters": ["mlp"]}, "filters and smooth do not go with slerp of"),
        ({"merge_method": "slerp", "models": THREE, "smooth": True}, "filters and smooth do not go with slerp of more"),
        ({"merge_method": "slerp", "models": ["org/a"]}, "slerp needs at least two models"),
        ({"merge_method": "nearswap", "models": THREE}, "nearswap merges two models, not 3"),
        ({"merge_method": ["linear", "arcee_fusion"], "models": THREE}, "arcee_fusion merges two models, not 3"),
        ({"merge_method": "nuslerp", "models": THREE}, "nuslerp merges exactly 2 models, not 3"),
        (
            {"merge_method": "nuslerp", "models": THREE, "base_model": "org/base"},
            "nuslerp merges exactly 2 models beside the base_model, not 3",
        ),
        (
            {"merge_method": ["ties", "model_stock"], "models": ["org/a"], "base_model": "org/base"},
            "model_stock merges at least 2 models beside the base_model, not 1",
        ),
        ({"merge_method": "passthrough"}, "passthrough merges exactly 1 model, not 2"),
        ({"merge_method": ["linear", "sce"]}, "base_model is missing: sce merges what the models add to their base"),
        ({"merge_method": ["linear", "tis"]}, "merge_method 'tis' is unknown, did you mean 'ties'?"),
        ({"merge_method": ["linear", "linear"]}, "linear is listed twice"),
        ({"merge_method": []}, "give the name of a method, or a list of names"),
        ({"merge_method": 3}, "give the name of a method, or a list of names"),
        ({"merge_method": "linear", "method_per_slice": True}, "method_per_slice needs several methods"),
        (
            {"merge_method": ["linear", "karcher"], "method_per_slice": True, "smooth": True},
            "smooth and method_per_slice do not go together",
        ),
        (
            {"merge_method": ["linear", "multislerp"], "bounds": {"density": [0, 1]}},
            "bounds: linear and multislerp have no gene 'density'",
        ),
        (
            {"merge_method": ["linear", "karcher"], "parameters": {"lambda": 1}},
            "parameters: linear and karcher have no 'lambda' to fix",
        ),
        ({"merge_method": "linear", "dtype": "float61"}, "dtype 'float61' is unknown, did you mean 'float16'?"),
        ({"merge_method": "linear", "parameters": {"lamda": 1}}, "parameters: linear has no 'lamda' to fix"),
        (
            {"merge_method": "ties", "base_model": "org/base", "parameters": {"lamda": 1}},
            "parameters: ties has no 'lamda' to fix, did you mean 'lambda'?",
        ),
        ({"merge_method": "linear", "models": ["org/a", "org/b", "org/a"]}, "models: org/a is listed twice"),
        (
            {"merge_method": "ties", "models": ["org/base"], "base_model": "org/base"},
            "models: there is none to merge beside the base_model",
        ),
        ({"merge_method": "linear", "filters": ["mlp", "mlp"]}, "filters: every one once"),
        ({"merge_method": "linear", "filters": ["other"]}, "none called 'other'"),
        ({"merge_method": "linear", "models": []}, "at least 1 item"),
    ],
)
def test_a_genome_that_cannot_be_searched_is_refused_with_the_reason(keys: dict[str, Any], reason: str) -> None:
    assert reason in refusal(**keys)


@pytest.mark.parametrize("method", GENELESS)
def test_a_method_without_genes_is_refused_alone_and_allowed_among_others(method: str) -> None:
    keys = fitting(method, base_model="org/base")
    assert f"{method} has nothing to search; merge it with `llmevo merge`" in refusal(**keys)
    several = space(4, **{**keys, "merge_method": [method, "ties"]})
    assert several.genes[0].name == "merge_method"
    assert several.decode(several.uniform()).merge_method == method


# --- points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", SPACES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_a_point_of_the_cube_keeps_its_values_there_and_back(keys: dict[str, Any], data: st.DataObject) -> None:
    of = space(**keys)
    point = data.draw(cubes(len(of.genes)))
    genes = of.from_unit(point)
    assert [*genes] == names(of)
    assert of.contains(genes)
    for gene, place, drawn in zip(of.genes, of.to_unit(genes), point, strict=True):
        assert 0.0 <= place <= 1.0
        if gene.choices:
            assert abs(place - drawn) <= 0.5 / len(gene.choices) + 1e-9
            continue
        assert gene.low + place * (gene.high - gene.low) == pytest.approx(genes[gene.name], abs=1e-9)
        assert place == pytest.approx(drawn, abs=max(2 * STEP / (gene.high - gene.low), 1e-3))
    assert of.from_unit(of.to_unit(genes)) == genes


@pytest.mark.parametrize("keys", SPACES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_clamped_genes_lie_in_their_bounds_and_stay_where_they_are(keys: dict[str, Any], data: st.DataObject) -> None:
    of = space(**keys)
    few = data.draw(st.lists(st.floats(allow_nan=False), min_size=1, max_size=4))
    wild = {gene.name: few[place % len(few)] for place, gene in enumerate(of.genes)}
    inside = of.clamp(wild)
    assert of.contains(inside)
    assert of.clamp(inside) == inside


def test_clamping_rounds_to_the_step_and_keeps_what_is_inside() -> None:
    assert space(merge_method="linear").clamp({"a/all/weight": 0.12344999, "b/all/weight": 7.0}) == {
        "a/all/weight": 0.1234,
        "b/all/weight": 1.0,
    }


def test_points_outside_the_cube_are_moved_onto_it() -> None:
    of = space(merge_method="linear")
    assert of.from_unit(np.array([-3.0, 2.0])) == {"a/all/weight": 0.0, "b/all/weight": 1.0}
    assert of.to_unit({"a/all/weight": -3.0, "b/all/weight": 2.0}).tolist() == [0.0, 1.0]
    assert not of.contains({"a/all/weight": -3.0, "b/all/weight": 0.0})


# --- recipes ----------------------------------------------------------------------------------------------------


def check_with_mergekit(recipe: Recipe) -> None:
    """mergekit reads it, and its method takes these models and has every parameter it needs for every tensor."""
    config = mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
    assert {str(model) for model in config.referenced_models()} == {str(model) for model in recipe.references}
    method = mergekit("merge_methods").get(recipe.merge_method)
    for part in config.slices:
        base = part.base_model or config.base_model
        method.validate_inputs([source.model for source in part.sources], base)
        reader = mergekit("config").ConfigReader(config=config, t=0.3).for_out_slice(part)
        name = "model.layers.0.mlp.up_proj.weight"
        mergekit("parameter_resolver").resolve_parameters(
            method.spec,
            tensor_name=name,
            inputs={source.model: name for source in part.sources},
            sources=reader.parameter_sources,
            base_model=base,
            t=0.3,
        )


@pytest.mark.parametrize("keys", SPACES)
@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
def test_every_point_of_the_cube_is_a_recipe_and_one_of_mergekits_where_it_has_one_method(
    keys: dict[str, Any], data: st.DataObject
) -> None:
    of = space(**keys)
    for genes in (of.from_unit(data.draw(cubes(len(of.genes)))), of.uniform()):
        recipe = of.decode(genes)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        if recipe.merge_method != BY_SLICE and METHODS[recipe.merge_method].in_mergekit:
            check_with_mergekit(recipe)
        for place, part in enumerate(recipe.output_slices(4)):
            for depth in (0.0, 1 / 3, 2 / 3, 1.0):
                values = parameters_of(recipe, place=place, depth=depth)
                if recipe.method_of(part).name.startswith("della"):
                    check_della(values["density"][:2], values["epsilon"][:2])


def check_della(densities: list[float], epsilons: list[float]) -> None:
    for density, epsilon in zip(densities, epsilons, strict=True):
        assert density == 1.0 or 0.0 < density - epsilon <= density + epsilon < 1.0


def test_genes_become_the_parameters_of_their_slice_and_model() -> None:
    of = space(merge_method="ties", base_model="org/base", layer_granularity=2)
    genes: Genes = {name: round(0.1 + 0.05 * place, 2) for place, name in enumerate(names(of))}
    recipe = of.decode(genes)
    for place, label in enumerate(("0-1", "2-3")):
        values = parameters_of(recipe, place=place)
        # The base stands last among the sources, without parameters that count.
        assert values["weight"][:2] == [genes[f"a/{label}/weight"], genes[f"b/{label}/weight"]]
        assert values["density"][:2] == [genes[f"a/{label}/density"], genes[f"b/{label}/density"]]
        sources = recipe.output_slices(4)[place].sources
        assert [str(source.model) for source in sources] == ["org/a", "org/b", "org/base"]
        assert {source.layer_range for source in sources} == {(2 * place, 2 * place + 2)}


def test_filtered_genes_hold_for_the_tensors_that_match_and_the_rest_for_all_others() -> None:
    of = space(merge_method="linear", filters=["self_attn", "mlp"])
    recipe = of.decode({name: round(0.1 * (place + 1), 1) for place, name in enumerate(names(of))})
    assert parameters_of(recipe, "model.layers.0.self_attn.q_proj.weight")["weight"] == [0.1, 0.4]
    assert parameters_of(recipe, "model.layers.0.mlp.up_proj.weight")["weight"] == [0.2, 0.5]
    assert parameters_of(recipe, "model.layers.0.input_layernorm.weight")["weight"] == [0.3, 0.6]


def test_smooth_genes_are_gradients_over_all_layers() -> None:
    of = space(merge_method="linear", layer_granularity=2, smooth=True)
    genes = {"a/0-1/weight": 0.0, "a/2-3/weight": 1.0, "b/0-1/weight": 0.8, "b/2-3/weight": 0.4}
    recipe = of.decode(genes)
    (part,) = recipe.output_slices(4)
    assert part.sources[0].layer_range == (0, 4)
    assert part.sources[0].parameters == {"weight": [0.0, 1.0]}
    assert parameters_of(recipe, depth=0.25)["weight"] == pytest.approx([0.25, 0.7])


@pytest.mark.parametrize(
    ("method", "given", "normalize"),
    [
        ("linear", None, 1.0),
        ("linear", False, 0.0),
        ("ties", None, 1.0),
        ("dare_ties", None, 1.0),
        ("task_arithmetic", None, 0.0),
        ("task_arithmetic", True, 1.0),
    ],
)
def test_normalize_is_as_given_or_as_mergekit_evolve_has_it(method: str, given: bool | None, normalize: float) -> None:
    of = space(merge_method=method, base_model="org/base", normalize=given)
    assert parameters_of(of.decode(of.uniform()))["normalize"] == normalize


def test_fixed_parameters_and_types_stand_in_every_recipe() -> None:
    of = space(
        merge_method="dare_ties",
        base_model="org/base",
        parameters={"lambda": 0.7, "rescale": False},
        dtype="float16",
        tokenizer_source="org/b",
    )
    recipe = of.decode(of.uniform())
    assert parameters_of(recipe)["lambda"] == 0.7
    assert parameters_of(recipe)["rescale"] == 0.0
    assert recipe.dtype == "float16"
    assert str(recipe.tokenizer_donor) == "org/b"


def test_the_uniform_point_gives_every_model_the_same_share() -> None:
    of = space(merge_method="ties", base_model="org/base", models=["org/a", "org/b", "org/c", "org/base"])
    assert {*of.uniform().values()} == {round(1 / 3, 6), 1.0}
    values = parameters_of(of.decode(of.uniform()))
    assert values["weight"][:3] == [round(1 / 3, 6)] * 3
    assert values["density"][:3] == [1.0] * 3
    assert space(merge_method="slerp").uniform() == {"b/all/t": 0.5}


def added(count: int = 4, **keys: Any) -> SearchSpace:
    """The space of so many models over twelve layers, by default of task arithmetic."""
    models = [f"org/m{number}" for number in range(count)]
    genome = {"models": models, "base_model": "org/base", "merge_method": "task_arithmetic", **keys}
    return SearchSpace(Genome.model_validate(genome), 12)


@pytest.mark.parametrize(
    ("of", "weights"),
    [
        (added(1), []),
        (added(2), [0.71]),
        (added(3), [0.48, 0.69]),
        (added(), [0.35, 0.5, 0.71]),
        (added(9), [0.19, 0.33, 0.58]),
        (added(bounds={"weight": [0.0, 1.2]}), [0.35, 0.5, 0.71]),
        (added(bounds={"weight": [0.0, 0.5]}), [0.35]),
        (added(bounds={"weight": [0.0, 0.3]}), []),
        (added(bounds={"weight": [0.0, 0.2]}), []),
        (added(bounds={"weight": [0.5, 1.5]}), [0.71]),
        (added(allow_negative_weights=True), [0.35, 0.5, 0.71]),
        (added(prepare=["tsv"]), [0.35, 0.5, 0.71]),
        (added(prepare=["regmean"], bounds={"weight": [0.0, 1.6]}), [0.71, 1.0, 1.41]),
        (added(prepare=["regmean"], bounds={"weight": [0.0, 1.2]}), [0.71, 1.0]),
        (added(prepare=["regmean"], bounds={"weight": [0.8, 1.2]}), [1.0]),
    ],
)
def test_coefficients_lie_between_the_mean_and_the_sum_of_the_task_vectors_or_around_a_sum_that_is_a_merge(
    of: SearchSpace, weights: list[float]
) -> None:
    assert [*of.coefficients()] == weights
    assert all(of.contains(genes) for genes in of.coefficients().values())


def test_the_tasks_of_a_preparation_are_told_by_short_names_too() -> None:
    prepare = {"steps": ["regmean"], "tasks": {"m0": ["sums"], "org/m1": ["words"]}}
    found = added(2, prepare=prepare).genome.prepare
    assert found
    assert found.tasks == {ModelReference.parse("org/m0"): ["sums"], ModelReference.parse("org/m1"): ["words"]}
    with pytest.raises(ValueError, match=r"tasks: m2 is none of the models; known: m0, m1"):
        added(2, prepare={"steps": ["regmean"], "tasks": {"m2": ["sums"]}})


SEPARATING = {name for name in SEARCHED if not METHODS[name].in_mergekit}
ADDING = {"task_arithmetic", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della_linear", *SEPARATING}


@pytest.mark.parametrize(
    ("normalize", "scaled"), [(None, ADDING), (True, set[str]()), (False, {*ADDING, "ties", "dare_ties", "della"})]
)
def test_only_methods_that_add_task_vectors_and_do_not_normalize_have_coefficients(
    normalize: bool | None, scaled: set[str]
) -> None:
    spaces = {name: space(**fitting(name, base_model="org/base", normalize=normalize)) for name in SEARCHED}
    assert {name for name, of in spaces.items() if of.coefficients()} == {
        n for n in scaled if len(spaces[n].merged) > 1
    }


def test_a_coefficient_gives_all_models_of_all_slices_one_weight_by_the_first_method_that_has_it() -> None:
    of = added(merge_method=["ties", "dare_linear", "task_arithmetic"], layer_granularity=6, filters=["mlp"])
    uniform, found = of.uniform(), of.coefficients()
    assert len(found) == 3
    for value, genes in found.items():
        assert of.decode(genes).merge_method == "dare_linear"
        weights = [gene.name for gene in of.genes if gene.parameter == "weight"]
        assert {genes[name] for name in weights} == {value}
        assert all(genes[g.name] == uniform[g.name] for g in of.genes if g.name not in weights and not g.choices)


def only_model(recipe: Recipe, place: int, depth: float) -> str:
    """The model that a slice is a copy of, by the values of its method."""
    part = recipe.output_slices(4)[place]
    method, origin = recipe.method_of(part), recipe.origin_of(part)
    values = parameters_of(recipe, place=place, depth=depth)
    if method.name == "slerp":
        assert values["t"] in (0.0, 1.0)
        assert part.base_model is not None
        return str(part.base_model if values["t"] == 0.0 else part.sources[1].model)
    if method.name == "passthrough":
        assert values["scale"] == [1.0]
        return str(part.sources[0].model)
    weights = dict(zip((str(source.model) for source in part.sources), values["weight"], strict=True))
    weights.pop(str(origin), None)
    (alone,) = (model for model, weight in weights.items() if weight == pytest.approx(1.0, abs=1e-12))
    assert sum(map(abs, weights.values())) == pytest.approx(1.0, abs=1e-12)
    assert values.get("lambda", 1.0) == 1.0
    if isinstance(values.get("density"), list):
        density = [d for d, source in zip(values["density"], part.sources, strict=True) if str(source.model) == alone]
        assert density == pytest.approx([1.0], abs=1e-12)
    return alone


@pytest.mark.parametrize("keys", SPACES)
def test_a_parents_genes_give_that_model_alone(keys: dict[str, Any]) -> None:
    of = space(**keys)
    assert of.merged
    for model in of.merged:
        recipe = of.decode(of.parent(model))
        for place, _ in enumerate(recipe.output_slices(4)):
            for depth in (0.0, 1 / 3, 0.5, 1.0):
                assert only_model(recipe, place, depth) == str(model)


def test_a_parent_that_no_genes_give_is_no_point_of_the_space() -> None:
    for keys in (fitting("sce"), fitting("nearswap"), fitting("ties", parameters={"lambda": 0.5})):
        of = space(**keys)
        assert of.parent(of.merged[0]) == {"a/alone": 1.0}
        assert not of.contains(of.parent(of.merged[0]))
    assert space(**fitting("ties")).contains(space(**fitting("ties")).parent(ModelReference.parse("org/a")))


def test_a_parent_of_several_methods_takes_the_first_that_gives_it() -> None:
    of = space(merge_method=["karcher", "ties", "linear"], models=["org/a", "org/base"], base_model="org/base")
    assert of.parent(ModelReference.parse("org/a"))["merge_method"] == 1.0
    assert of.parent(ModelReference.parse("org/base"))["merge_method"] == 2.0


def test_slerp_of_two_models_walks_from_the_first_to_the_second() -> None:
    of = space(merge_method="slerp", layer_granularity=2, base_model="org/b")
    recipe = of.decode({"b/0-1/t": 0.25, "b/2-3/t": 0.75})
    for place, t in enumerate((0.25, 0.75)):
        part = recipe.output_slices(4)[place]
        assert str(part.base_model) == "org/a"
        assert [str(source.model) for source in part.sources] == ["org/a", "org/b"]
        assert parameters_of(recipe, place=place) == {"t": t}


@pytest.mark.parametrize(
    ("shares", "first", "second", "t"),
    [
        ((0.1, 0.6, 0.2), "org/b", "org/c", 0.25),
        ((0.4, 0.0, 0.4), "org/a", "org/c", 0.5),
        ((0.0, 0.0, 1.0), "org/c", "org/a", 0.0),
        ((0.0, 0.0, 0.0), "org/a", "org/b", 0.5),
    ],
)
def test_slerp_of_three_models_takes_the_two_with_the_highest_genes(
    shares: tuple[float, ...], first: str, second: str, t: float
) -> None:
    of = space(merge_method="slerp", models=["org/a", "org/b", "org/c"])
    recipe = of.decode(dict(zip(names(of), shares, strict=True)))
    (part,) = recipe.output_slices(4)
    assert [str(source.model) for source in part.sources] == [first, second]
    assert str(part.base_model) == first
    assert parameters_of(recipe)["t"] == pytest.approx(t)


def test_nearswap_starts_from_the_base_model_wherever_it_is_listed() -> None:
    for models in (["org/a", "org/b"], ["org/a"]):
        of = space(merge_method="nearswap", models=models, base_model="org/b")
        recipe = of.decode({"a/all/t": 0.002})
        (part,) = recipe.output_slices(4)
        assert (str(part.base_model), [str(source.model) for source in part.sources]) == ("org/b", ["org/b", "org/a"])
        assert parameters_of(recipe) == {"t": 0.002}


def test_a_walk_between_two_models_may_go_by_filters_and_smoothly() -> None:
    of = space(merge_method="slerp", layer_granularity=2, smooth=True, filters=["mlp"])
    recipe = of.decode({"b/0-1/mlp/t": 0.0, "b/2-3/mlp/t": 1.0, "b/0-1/other/t": 0.4, "b/2-3/other/t": 0.2})
    assert parameters_of(recipe, "model.layers.1.mlp.up_proj.weight", depth=0.25) == {"t": 0.25}
    assert parameters_of(recipe, "model.layers.1.self_attn.q_proj.weight", depth=0.5)["t"] == pytest.approx(0.3)


def test_parameters_that_all_models_share_have_one_gene_a_slice_and_stand_on_the_slice() -> None:
    of = space(**fitting("ramplus_tl", layer_granularity=2))
    assert names(of) == ["0-1/r", "0-1/alpha", "2-3/r", "2-3/alpha"]
    assert {gene.model for gene in of.genes} == {None}
    recipe = of.decode({"0-1/r": 0.1, "0-1/alpha": 0.2, "2-3/r": 0.3, "2-3/alpha": 0.4})
    assert [part.parameters for part in recipe.output_slices(4)] == [{"r": 0.1, "alpha": 0.2}, {"r": 0.3, "alpha": 0.4}]
    assert names(space(**fitting("sce", filters=["mlp"]))) == ["all/mlp/select_topk", "all/other/select_topk"]


def test_the_search_starts_where_each_method_says() -> None:
    assert space(**fitting("sce")).uniform() == {"all/select_topk": 1.0}
    assert space(**fitting("nearswap")).uniform() == {"b/all/t": 0.001}
    assert space(**fitting("passthrough")).uniform() == {"a/all/scale": 1.0}
    della = space(**fitting("della", models=THREE)).uniform()
    assert [della[f"b/all/{name}"] for name in ("weight", "density", "epsilon")] == [0.333333, 1.0, 0.15]


def test_a_narrow_range_has_a_finer_grid() -> None:
    of = space(**fitting("nearswap"))
    assert of.clamp({"b/all/t": 0.0012345678}) == {"b/all/t": 0.00123}


# --- several methods ----------------------------------------------------------------------------------------------

SEVERAL: dict[str, Any] = {"merge_method": ["ties", "sce", "linear"], "base_model": "org/base"}


def test_the_method_is_a_gene_of_the_recipe_or_of_every_slice() -> None:
    rest = [f"{model}/all/{name}" for model in "ab" for name in ("weight", "density")]
    assert names(space(**SEVERAL)) == ["merge_method", *rest, "all/select_topk"]
    of = space(**SEVERAL, layer_granularity=2, method_per_slice=True)
    assert [gene.name for gene in of.genes if gene.choices] == ["0-1/merge_method", "2-3/merge_method"]
    (gene, *_) = of.genes
    assert (gene.low, gene.high, gene.choices) == (0.0, 2.0, ("ties", "sce", "linear"))
    assert [gene.shown(place) for place in range(3)] == ["ties", "sce", "linear"]
    assert gene.described()["choices"] == ["ties", "sce", "linear"]
    assert of.genes[1].described().keys() == {"name", "low", "high"}


def test_choices_have_equal_shares_of_the_unit_interval() -> None:
    (gene, *_) = space(**SEVERAL).genes
    drawn = [gene.from_unit(place) for place in np.linspace(0, 1, 300, endpoint=False)]
    assert [drawn.count(float(place)) for place in range(3)] == [100] * 3
    assert [gene.from_unit(gene.to_unit(place)) for place in (0.0, 1.0, 2.0)] == [0.0, 1.0, 2.0]
    assert [gene.clamp(value) for value in (-7.0, 0.4, 0.6, 1.7, float("inf"))] == [0.0, 0.0, 1.0, 2.0, 2.0]


def test_the_bounds_of_several_methods_are_the_widest() -> None:
    assert bounds_of(merge_method=["linear", "ties"])["weight"] == (0.0, 1.5)
    assert bounds_of(merge_method=["linear", "ties"], bounds={"weight": [0.2, 0.4]})["weight"] == (0.2, 0.4)


@pytest.mark.parametrize(("place", "method"), [*enumerate(["ties", "sce", "linear"])])
def test_the_chosen_method_takes_its_own_parameters_only(place: int, method: str) -> None:
    of = space(**SEVERAL, parameters={"lambda": 0.5})
    genes = {**{gene.name: 0.3 for gene in of.genes}, "merge_method": float(place)}
    recipe = of.decode(genes)
    (part,) = recipe.output_slices(4)
    assert recipe.merge_method == method
    own = {name for source in part.sources for name in source.parameters or {}} | {*(part.parameters or {})}
    assert own == {"ties": {"weight", "density"}, "sce": {"select_topk"}, "linear": {"weight"}}[method]
    fixed = {"ties": {"lambda": 0.5, "normalize": True}, "sce": None, "linear": {"normalize": True}}[method]
    assert recipe.parameters == fixed
    assert [str(source.model) for source in part.sources] == ["org/a", "org/b", *["org/base"] * (method != "linear")]
    active = {gene.name for gene, is_active in zip(of.genes, of.active(genes), strict=True) if is_active}
    assert {name.rsplit("/")[-1] for name in active} == {"merge_method", *own}


def test_a_recipe_goes_by_slice_only_where_its_slices_differ() -> None:
    of = space(**SEVERAL, layer_granularity=2, method_per_slice=True, normalize=False)
    genes = {gene.name: 0.3 if not gene.choices else 0.0 for gene in of.genes}
    assert of.decode(genes).merge_method == "ties"
    assert [part.merge_method for part in of.decode(genes).output_slices(4)] == [None, None]
    recipe = of.decode({**genes, "2-3/merge_method": 1.0})
    assert recipe.merge_method == BY_SLICE
    assert [part.merge_method for part in recipe.output_slices(4)] == ["ties", "sce"]
    assert parameters_of(recipe, place=0)["normalize"] == 0.0
    assert parameters_of(recipe, place=1) == {"select_topk": 0.3}


# --- della --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "epsilon", "expected"),
    [
        (0.5, 0.2, (0.5, 0.2)),
        (0.1, 0.2, (0.1, 0.0999)),
        (0.9, 0.3, (0.9, 0.0999)),
        (1.0, 0.3, (1.0, 0.0)),
        (0.9999, 0.3, (1.0, 0.0)),
        (0.9998, 0.3, (0.9998, 0.0001)),
    ],
)
def test_epsilon_leaves_room_for_the_density(density: float, epsilon: float, expected: tuple[float, float]) -> None:
    of = space(**fitting("della"))
    genes = {gene.name: {"weight": 0.4, "density": density, "epsilon": epsilon}[gene.parameter] for gene in of.genes}
    values = parameters_of(of.decode(genes))
    assert (values["density"][0], values["epsilon"][0]) == pytest.approx(expected, abs=1e-12)


EDGES = st.sampled_from([0.0, 1e-4, 0.01, 0.5, 0.9997, 0.9998, 0.9999, 0.99995, 1.0]) | st.floats(0, 1)


@given(knots=st.lists(st.tuples(EDGES, EDGES), min_size=1, max_size=6), layers=st.integers(2, 40))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_smooth_epsilons_leave_room_at_every_layer(knots: list[tuple[float, float]], layers: int) -> None:
    size = len(knots)
    of = space(
        size, **fitting("della", layer_granularity=1, smooth=True, bounds={"density": [0, 1], "epsilon": [0, 1]})
    )
    genes = of.uniform()
    for (density, epsilon), label in zip(knots, of.slices, strict=True):
        genes |= {f"a/{label}/density": density, f"a/{label}/epsilon": epsilon}
    recipe = of.decode(genes)
    for layer in range(layers):
        values = parameters_of(recipe, depth=layer / (layers - 1))
        density, epsilon = values["density"][0], values["epsilon"][0]
        assert density >= 1.0 or density <= 0.0 or (density - epsilon > 0.0 and density + epsilon < 1.0)
