"""The search space: which genes there are, where they may go, and the recipe that their values mean."""

import re
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import mergekit
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmevo.errors import ConfigError
from llmevo.genome import STEP, Genes, Genome, SearchSpace, short_names
from llmevo.recipe import Recipe
from llmevo.references import ModelReference

NEEDS_BASE = ("task_arithmetic", "ties", "dare_ties")
EVERY: list[dict[str, Any]] = [
    {"merge_method": "linear"},
    {"merge_method": "linear", "base_model": "org/base"},
    *({"merge_method": name, "base_model": "org/base"} for name in NEEDS_BASE),
    {"merge_method": "slerp"},
    {"merge_method": "slerp", "models": ["org/a", "org/b", "org/c"]},
    {"merge_method": "ties", "base_model": "org/base", "layer_granularity": 2},
    {"merge_method": "ties", "base_model": "org/base", "filters": ["self_attn", "mlp"]},
    {"merge_method": "ties", "base_model": "org/base", "layer_granularity": 2, "smooth": True, "filters": ["mlp"]},
    {"merge_method": "dare_ties", "base_model": "org/base", "allow_negative_weights": True},
    {"merge_method": "task_arithmetic", "base_model": "org/base", "models": ["org/a", "org/base", "org/b"]},
    {"merge_method": "linear", "bounds": {"weight": [0.123456, 0.987654]}},
]
SPACES = [pytest.param(keys, id="-".join(map(str, keys.values()))) for keys in EVERY]


def space(layers: int = 4, **keys: Any) -> SearchSpace:
    return SearchSpace(Genome.model_validate({"models": ["org/a", "org/b"], **keys}), layers)


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


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"merge_method": "liner"}, "merge_method 'liner' is unknown, did you mean 'linear'?"),
        ({"merge_method": "ties"}, "base_model is missing: ties merges what the models add to their base"),
        ({"merge_method": "slerp", "filters": ["mlp"]}, "filters and smooth do not go with slerp"),
        ({"merge_method": "slerp", "smooth": True}, "filters and smooth do not go with slerp"),
        ({"merge_method": "slerp", "models": ["org/a"]}, "slerp needs at least two models"),
        ({"merge_method": "linear", "dtype": "float61"}, "dtype 'float61' is unknown, did you mean 'float16'?"),
        ({"merge_method": "linear", "tokenizer_source": "union"}, "tokenizer_source 'union' is not supported"),
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


# --- points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", SPACES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_a_point_of_the_cube_keeps_its_values_there_and_back(keys: dict[str, Any], data: st.DataObject) -> None:
    of = space(**keys)
    point = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(of.genes), max_size=len(of.genes))))
    genes = of.from_unit(point)
    assert [*genes] == names(of)
    assert of.contains(genes)
    for gene, place in zip(of.genes, of.to_unit(genes), strict=True):
        assert 0.0 <= place <= 1.0
        assert gene.low + place * (gene.high - gene.low) == pytest.approx(genes[gene.name], abs=1e-9)
    assert of.to_unit(genes) == pytest.approx(point, abs=2 * STEP / min(gene.high - gene.low for gene in of.genes))
    assert of.from_unit(of.to_unit(genes)) == genes


@pytest.mark.parametrize("keys", SPACES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_clamped_genes_lie_in_their_bounds_and_stay_where_they_are(keys: dict[str, Any], data: st.DataObject) -> None:
    of = space(**keys)
    wild = {gene.name: data.draw(st.floats(allow_nan=False)) for gene in of.genes}
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


def parameters_of(recipe: Recipe, tensor: str = "model.norm.weight", place: int = 0, depth: float = 0.0) -> Any:
    each, shared = recipe.values(recipe.output_slices(4)[place], tensor, depth)
    return {**each, **shared}


@pytest.mark.parametrize("keys", SPACES)
def test_every_recipe_is_one_that_mergekit_reads(keys: dict[str, Any]) -> None:
    of = space(**keys)
    for genes in (of.uniform(), of.parent(of.merged[0]), of.from_unit(np.full(len(of.genes), 0.3))):
        recipe = of.decode(genes)
        config = mergekit("config").MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
        assert {str(model) for model in config.referenced_models()} == {str(model) for model in recipe.references}
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


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
    assert recipe.models is not None
    assert recipe.models[0].parameters == {"weight": [0.0, 1.0]}
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


@pytest.mark.parametrize("keys", SPACES)
def test_a_parent_has_weight_1_and_all_others_0(keys: dict[str, Any]) -> None:
    of = space(**keys)
    if of.genome.method.pair:
        for model in of.merged:
            (only,) = of.decode(of.parent(model)).output_slices(4)
            t = parameters_of(of.decode(of.parent(model)))["t"]
            assert {0.0: only.base_model, 1.0: only.sources[1].model}[t] == model
        return
    for model in of.merged:
        recipe = of.decode(of.parent(model))
        for place, part in enumerate(recipe.output_slices(4)):
            weights = parameters_of(recipe, place=place)["weight"]
            assert [s.model for s, w in zip(part.sources, weights, strict=True) if w == 1.0] == [model]
            assert sum(map(abs, weights)) == 1.0


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
